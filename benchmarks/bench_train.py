"""What train_pt.py costs and gains, measured on a CPU.

    python benchmarks/bench_train.py                          # every table
    python benchmarks/bench_train.py --only attention memory  # some of them
    python benchmarks/bench_train.py --draw                   # the pictures again, from the results

attention  Forward and backward of the attention function alone on 16,384 tokens in sequences of 512
           to 16,384, 8 heads of 64 in bfloat16: S² with groups of a quarter against full causal
           attention. Once where a sequence is one document (SDPA, is_causal), once for packed
           documents (SDPA with the mask that Transformers makes of position_ids, and document by
           document, as train_pt.py evaluates).
speed      Seconds and peak memory of a training step of one model on the same packed documents, at
           2,048 and 8,192 tokens, 8,192 a step: S² attention with the chunked loss, against
           transformers.Trainer with stock SDPA attention and the plain loss; at 8,192 also each
           of the two alone.
memory     Peak memory of training by block size, one block a step: train_pt.py against the usual
           recipe (prepare_model_for_kbit_training, copies of embedding and head trained by
           modules_to_save, SDPA, plain loss).
quality    A small Llama trained first on English pages, extended to 61,388 pieces with 紅樓夢, then
           trained by train_pt.py on articles of DRCD, with the new rows trained and with none: bits
           per character of articles held out, over the steps.

The model of `speed` and `memory` has 4 layers of width 512 and 61,388 pieces, NF4, LoRA of rank 32,
activation checkpointing; every figure is from a process of its own, variants take turns. Packed
documents are random tokens of the lengths of web pages: log-normal, median 700, nine in ten between
190 and 2,600. Memory is counted over what Python and its libraries take before the model is there.

One thread, unless OMP_NUM_THREADS says otherwise; 14 minutes without `quality`, which takes 15.
Results: benchmarks/results/train.json, pictures/readme_s2.png, readme_memory.png, readme_rows.png.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results" / "train.json"
PICTURES = ROOT / "pictures"
WORK = ROOT / "outputs" / "bench_train"
SEED, PIECES, LLAMA_2_PIECES = 0, 61_388, 32_000
os.environ.setdefault("OMP_NUM_THREADS", "1")  # times compare better on one thread
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import common  # noqa: E402

import train_pt as script  # noqa: E402

# --- Material ------------------------------------------------------------------------------------


def llama(folder: Path, pieces: int, **sizes: int) -> None:
    """A random Llama with the given tokenizer.model already in its folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(vocab_size=pieces, max_position_embeddings=8192, **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def step_model() -> Path:
    """The model whose steps are measured, made once."""
    folder = WORK / "steps"
    if not (folder / "model.safetensors").exists():
        llama(folder, PIECES, hidden_size=512, intermediate_size=1376, num_hidden_layers=4,
              num_attention_heads=8)
    return folder


def packed_documents(block: int, blocks: int):
    """Blocks of random tokens in documents of the lengths of web pages."""
    import numpy as np

    rng = np.random.default_rng(SEED)
    lengths = rng.lognormal(math.log(700), 0.8, block * blocks // 500 + 10).astype(int) + 2
    tokens = rng.integers(3, PIECES, int(lengths.sum())).astype(np.uint16)
    corpus = script.Corpus(tokens, lengths, lengths)
    return script.PackedBlocks(corpus, np.arange(len(lengths)), block, padding=0)


def drcd(path: Path) -> Path:
    """The articles of DRCD as one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(DATA / "drcd_dev.jsonl", path)
    return path


# --- attention -----------------------------------------------------------------------------------

HEADS, HEAD_SIZE, TOKENS = 8, 64, 16_384
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


def attention_ways(position) -> dict:
    """Calls of (q, k, v) for sequences with these positions, a tensor (B, T)."""
    import torch
    import torch.nn.functional as F

    length = position.shape[1]
    group, whole = length // 4, bool((position == torch.arange(length)).all())

    def ours(training: bool):  # cut points come with the batch, so they are not in the time
        module = SimpleNamespace(training=training, config=SimpleNamespace(group_size=group))
        cuts = script.all_cut_points(position, group, flash=False)
        return lambda q, k, v: script.s2_attention(module, q, k, v, None, cuts=cuts)[0]

    if whole:
        full = {"full causal": lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True)}
        return {"S²": ours(True)} | full
    document = (position == 0).cumsum(1)
    # Made once a step for all layers: so it is not in the time either.
    mask = (document[:, :, None] == document[:, None]).tril_()[:, None]
    stock = {"full causal, masked": lambda *qkv: F.scaled_dot_product_attention(*qkv, mask)}
    return {"S²": ours(True), "full causal, by document": ours(False)} | stock


def attention() -> list[dict]:
    """Best time of each way, the ways taking turns."""
    import numpy as np
    import torch

    rows = []
    for length in LENGTHS:
        count = TOKENS // length
        blocks = packed_documents(length, count)
        packed = torch.from_numpy(np.stack([blocks[i]["position_ids"] for i in range(count)]))
        one = torch.arange(length).expand(count, -1)
        for documents, position in (("one", one), ("packed", packed)):
            torch.manual_seed(SEED)
            shape, best = (count, HEADS, length, HEAD_SIZE), {}
            q, k, v = (torch.randn(shape, dtype=torch.bfloat16) for _ in range(3))
            ways = attention_ways(position)
            for _ in range(2):
                for name, call in ways.items():
                    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
                    start = time.perf_counter(), time.process_time()
                    call(*inputs).float().sum().backward()
                    took = time.perf_counter() - start[0], time.process_time() - start[1]
                    best[name] = [*map(min, took, best.get(name, took))]
            for name, (seconds, cpu) in best.items():
                rows.append({"tokens": length, "documents": documents, "way": name,
                             "seconds": seconds, "cpu_seconds": cpu,
                             "times_s2": seconds / best["S²"][0]})
                print(f"{length:6} tokens  {documents:8}{name:26}{1e3 * seconds:9.1f} ms"
                      f"{rows[-1]['times_s2']:7.2f} x S²", flush=True)
    return rows


# --- speed and memory ----------------------------------------------------------------------------

OURS, STOCK, USUAL = "S², chunked loss", "SDPA, plain loss", "usual recipe"
VARIANTS = {  # name: attention, loss
    OURS: ("s2", "chunked"),
    "S², plain loss": ("s2", "plain"),
    "SDPA, chunked loss": ("sdpa", "chunked"),
    STOCK: ("sdpa", "plain"),
    USUAL: ("sdpa", "plain"),
}


def resident(name: str) -> float:
    """Memory of this process in GB: VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+)", status)[1]) * 1024 / 1e9


def train_steps(name: str, block: int, batch: int, steps: int) -> dict:
    """Train a few steps with one variant; called in a process of its own."""
    from transformers import Trainer
    from transformers.loss.loss_utils import ForCausalLMLoss

    attention, loss = VARIANTS[name]
    options = {
        "model_name_or_path": step_model(), "base_vocab_size": LLAMA_2_PIECES, "block_size": block,
        "per_device_train_batch_size": batch, "gradient_accumulation_steps": 1, "max_steps": steps,
        "activation_checkpointing": "true", "eval_strategy": "no", "save_strategy": "no",
        "logging_steps": 10**6, "disable_tqdm": "true", "output_dir": WORK / "step_run"}
    args, training = script.parse_args([str(w) for n, v in options.items() for w in (f"--{n}", v)])
    script.check(args)
    blocks, head = packed_documents(block, batch * steps), None
    before = resident("VmRSS")
    if name == USUAL:
        from bench_gpu import usual_model
        model = usual_model(step_model(), training)
    else:
        folder = Path(args.model_name_or_path)
        model, head = script.build_model(args, training, folder, LLAMA_2_PIECES)
        if attention == "sdpa":
            model.base_model.model.config._attn_implementation = "sdpa"
        if loss == "plain":
            model.base_model.model.loss_function = ForCausalLMLoss
    seconds, cpu_seconds, collate = [], [], script.Collate(args.group_size, flash=False)

    class Watched(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if loss == "plain":
                return super().compute_loss(model, inputs, *args, **kwargs)
            with head.inside_the_loss():
                return super().compute_loss(model, inputs, *args, **kwargs)

        def training_step(self, *args, **kwargs):
            start, cpu_start = time.perf_counter(), time.process_time()
            result = super().training_step(*args, **kwargs)
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
            return result

    def batches(rows: list[dict]) -> dict:
        batch = collate(rows)
        if attention == "sdpa":  # Transformers finds the documents in position_ids
            del batch["cuts"]
        return batch

    trainer = Watched(model=model, args=training, train_dataset=blocks, data_collator=batches)
    built = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    last = trainer.train().training_loss
    peak = resident("VmHWM")
    return {
        "seconds": min(seconds[1:]),  # the first step warms up
        "cpu_seconds": min(cpu_seconds[1:]),  # what a busy machine disturbs less
        "model_gb": built - before,
        "peak_gb": peak - before,
        "loss": last,
    }


def measured(name: str, block: int, batch: int, steps: int) -> dict:
    """train_steps in a process of its own."""
    command = [sys.executable, __file__, "--one", name, str(block), str(batch), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    got = json.loads(done.stdout.splitlines()[-1])
    print(f"{batch} x {block:5} tokens  {name:20}{got['seconds']:8.2f} s"
          f" ({got['cpu_seconds']:.2f} of CPU){got['peak_gb']:7.2f} GB"
          f" (model {got['model_gb']:.2f})  loss {got['loss']:.4f}", flush=True)
    return {"block": block, "batch": batch, "variant": name} | got


def with_ratios(rows: list[dict], reference: str) -> list[dict]:
    """Each row beside the reference of its block size; under 1 is less than the reference."""
    for row in rows:
        to = next(r for r in rows if r["variant"] == reference and r["block"] == row["block"])
        row |= {"time_ratio": row["seconds"] / to["seconds"],
                "cpu_ratio": row["cpu_seconds"] / to["cpu_seconds"],
                "memory_ratio": row["peak_gb"] / to["peak_gb"]}
    return rows


def speed() -> list[dict]:
    """Three steps of each variant, the faster of the last two counts."""
    names = {2048: (OURS, STOCK), 8192: [n for n in VARIANTS if n != USUAL]}
    rows = [measured(n, block, 8192 // block, steps=3) for block in names for n in names[block]]
    return with_ratios(rows, STOCK)


def memory() -> list[dict]:
    """Two steps: the second one has the optimizer's states beside the activations."""
    blocks = (512, 1024, 2048, 4096, 8192)
    rows = [measured(name, block, 1, steps=2) for block in blocks for name in (OURS, USUAL)]
    return with_ratios(rows, USUAL)


# --- quality -------------------------------------------------------------------------------------


def first_training(folder: Path, steps: int) -> float:
    """Train every weight of a small Llama with Llama 2's tokenizer on English; its last loss."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(parents=True)
    shutil.copy(DATA / "llama2-tokenizer.model", folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    llama(folder, LLAMA_2_PIECES, hidden_size=256, intermediate_size=704, num_hidden_layers=4,
          num_attention_heads=8)
    tokenizer, stream = AutoTokenizer.from_pretrained(folder), []
    for text in map(str.strip, common.english_pages()):
        stream += [1, *tokenizer(text, add_special_tokens=False)["input_ids"], 2]
    rows = torch.tensor(np.array(stream[: len(stream) // 256 * 256]).reshape(-1, 256))
    print(f"first training: {len(stream):,} English tokens, {steps} steps of 4 x 256", flush=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order, losses = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED)), []
    for step in range(steps):
        batch = rows[order[[(4 * step + i) % len(rows) for i in range(4)]]]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            print(f"  step {step + 1}: loss {losses[-1]:.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    return sum(losses[-20:]) / 20


def quality(first_steps: int, steps: int) -> dict:
    base, extended = WORK / "english", WORK / "extended"
    if not extended.exists():
        shutil.rmtree(base, ignore_errors=True)
        first_training(base, first_steps)
        command = [sys.executable, ROOT / "extend_vocab.py", "--base_model", base]
        command += ["--corpus", DATA / "hongloumeng.txt", "--output_dir", extended]
        subprocess.run(command, check=True, cwd=WORK)
    text, curves = drcd(WORK / "text" / "drcd.jsonl"), {}
    for rows in ("new", "none"):
        output = WORK / f"rows_{rows}"
        # none would be refused on an extended vocabulary: tell it that nothing is new.
        first_new = PIECES if rows == "none" else LLAMA_2_PIECES
        options = {
            "model_name_or_path": extended, "dataset": text, "output_dir": output,
            "train_embeddings": rows, "base_vocab_size": first_new, "block_size": 256,
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": steps,
            "learning_rate": 1e-3, "eval_fraction": 0.04, "eval_steps": steps // 6,
            "eval_on_start": "true", "save_steps": 10**6, "sample_tokens": 0,
            "picture": output / "trainloss.png", "cache_dir": WORK / "cache", "seed": 42}
        script.main([str(word) for n, v in options.items() for word in (f"--{n}", v)])
        metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        held = [r for r in metrics if "eval_loss" in r]
        curves[rows] = {
            "eval": [[r["step"], r["eval_loss"], r["eval_bits_per_character"]] for r in held],
            "train": [[r["step"], r["loss"]] for r in metrics if "loss" in r],
            "minutes": sum(r.get("train_runtime", 0) for r in metrics) / 60}
        print(rows, [f"{bits:.3f}" for _, _, bits in curves[rows]["eval"]], flush=True)
    return curves


# --- Pictures ------------------------------------------------------------------------------------


def processor(table: dict) -> str:
    """The first word of a table's stamp on hardware."""
    return table["hardware"].split(",")[0]


def save_picture(figure, name: str, title: str) -> None:
    figure.suptitle(title, fontsize="medium")
    figure.savefig(PICTURES / name, dpi=120)
    print(f"drew pictures/{name}")


def tokens_axis(axes, lengths) -> None:
    """A binary scale with the lengths written out."""
    lengths = sorted(set(lengths))
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.minorticks_off()
    axes.set_xlabel("tokens in a sequence")
    axes.grid(alpha=0.3)


def draw_attention(table: dict) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"one": "each sequence one document", "packed": "packed documents (web pages)"}
    for axes, (documents, title) in zip(panels, titles.items(), strict=True):
        rows = [r for r in table["results"] if r["documents"] == documents]
        for way in dict.fromkeys(r["way"] for r in rows):
            mine = [r for r in rows if r["way"] == way]
            x, y = [r["tokens"] for r in mine], [1e3 * r["seconds"] for r in mine]
            axes.plot(x, y, "o-", label=way)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        tokens_axis(axes, LENGTHS)
        axes.set_title(title, fontsize="medium")
        axes.legend(fontsize="small")
    panels[0].set_ylabel(f"ms for {TOKENS:,} tokens, with backward pass")
    save_picture(figure, "readme_s2.png", "S² beside full causal attention, alone, on a CPU "
                 f"({processor(table)}): {HEADS} heads of {HEAD_SIZE}, bfloat16")


def draw_memory(table: dict) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, rows = figure.subplots(), table["results"]
    labels = {USUAL: "usual recipe (SDPA, plain loss, modules_to_save)", OURS: "train_pt.py"}
    for name, label in labels.items():
        mine = [r for r in rows if r["variant"] == name]
        axes.plot([r["block"] for r in mine], [r["peak_gb"] for r in mine], "o-", label=label)
    tokens_axis(axes, [r["block"] for r in rows])
    axes.set(xlabel="tokens in a block, one block a step", ylabel="peak over the bare process, GB")
    axes.set_ylim(0, None)
    axes.legend()
    save_picture(figure, "readme_memory.png", "Peak memory of training on a CPU "
                 f"({processor(table)}): Llama of 4 layers\nx 512 and {PIECES:,} pieces, 76 "
                 "million weights, NF4 and LoRA")


def draw_quality(table: dict) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    names = {"new": "new rows trained (default)", "none": "rows frozen"}
    for rows, curve in table["results"].items():
        steps, _, bits = zip(*curve["eval"], strict=True)
        axes.plot(steps, bits, "o-", label=names[rows])
    axes.set(xlabel="step", ylabel="bits per character, held-out articles")
    axes.legend()
    axes.grid(alpha=0.3)
    save_picture(figure, "readme_rows.png", "Which rows of embedding and head are trained: CPU "
                 f"({processor(table)}),\nLlama of 4 layers x 256 and {PIECES:,} pieces, NF4, LoRA")


# --- Main ----------------------------------------------------------------------------------------


def main() -> None:
    """Measure the chosen tables; each keeps its own stamp when another is measured again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = ["attention", "speed", "memory", "quality"]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these tables")
    parser.add_argument("--draw", action="store_true", help="only the pictures, from the results")
    parser.add_argument("--first_steps", type=int, default=200, help="steps of the first training")
    parser.add_argument("--steps", type=int, default=240, help="steps of train_pt.py in quality")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return print(json.dumps(train_steps(args.one[0], *map(int, args.one[1:]))))
    measure = {"attention": attention, "speed": speed, "memory": memory,
               "quality": lambda: quality(args.first_steps, args.steps)}
    pictures = {"attention": draw_attention, "memory": draw_memory, "quality": draw_quality}
    for name in args.only:
        record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"results": {}}
        if name == "quality" and not DATA.is_dir() and not args.draw:
            print(f"quality skipped: {DATA} with its real material is missing")
            continue
        if not args.draw:
            print(f"--- {name}", flush=True)
            WORK.mkdir(parents=True, exist_ok=True)
            stamp = common.stamp(
                "bench_train", ("torch", "transformers", "peft", "bitsandbytes"), SEED,
                f"{{}} cores, {os.environ['OMP_NUM_THREADS']} used", "no GPU")
            record["results"][name] = stamp | {"results": measure[name]()}
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        if name in pictures and name in record["results"]:
            pictures[name](record["results"][name])
    if not args.draw:
        shutil.rmtree(WORK, ignore_errors=True)


if __name__ == "__main__":
    main()
