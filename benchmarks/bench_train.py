"""What train_pt.py costs and gains, measured on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/bench_train.py               # both tables
    OMP_NUM_THREADS=1 python benchmarks/bench_train.py --only speed  # S² and loss alone

speed    Step time and peak memory of one model (61,388 pieces, NF4) on the same packed documents,
         at 2,048 and 8,192 tokens: S² attention with the chunked loss, against
         transformers.Trainer with stock SDPA attention and the plain loss, and each alone.
quality  A small Llama trained first on English pages, extended to 61,388 pieces with 紅樓夢, then
         trained by train_pt.py on articles of DRCD, with the new rows trained and with none: bits
         per character of articles held out, over the steps.

Each figure of `speed` comes from a process of its own; variants take turns, and the best of the
rounds counts. Results: benchmarks/results/train.json and pictures/readme_rows.png.
"""

import argparse
import gzip
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results" / "train.json"
WORK = ROOT / "outputs" / "bench_train"
SEED, PIECES, LLAMA_2_PIECES = 0, 61_388, 32_000
sys.path.insert(0, str(ROOT))

import train_pt as script  # noqa: E402

# --- Material ------------------------------------------------------------------------------------


def llama(folder: Path, pieces: int, **sizes: int) -> None:
    """A random Llama with the given tokenizer.model already in its folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(vocab_size=pieces, max_position_embeddings=8192, **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def drcd(path: Path) -> Path:
    """The articles of DRCD as one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(DATA / "drcd_dev.jsonl", path)
    return path


# --- speed ---------------------------------------------------------------------------------------

VARIANTS = {
    "S², chunked loss (train_pt.py)": ("s2", "chunked"),
    "S², plain loss": ("s2", "plain"),
    "stock SDPA, chunked loss": ("sdpa", "chunked"),
    "stock SDPA, plain loss (Trainer)": ("sdpa", "plain"),
}


def one_speed(attention: str, loss: str, block: int, steps: int) -> dict:
    """Train a few steps with one variant; called in a process of its own."""
    import numpy as np
    from transformers import Trainer

    batch = 8192 // block
    words = ["--model_name_or_path", str(WORK / "speed"), "--base_vocab_size", str(LLAMA_2_PIECES)]
    words += ["--block_size", str(block), "--per_device_train_batch_size", str(batch)]
    words += [
        "--gradient_accumulation_steps",
        "1",
        "--max_steps",
        str(steps),
        "--eval_strategy",
        "no",
    ]
    words += ["--save_steps", "1000000", "--output_dir", str(WORK / "speed_run")]
    words += ["--activation_checkpointing", "true", "--sample_tokens", "0"]
    args, training = script.parse_args(words)
    script.check(args)
    folder = Path(args.model_name_or_path)
    model, head = script.build_model(args, training, folder, LLAMA_2_PIECES)
    tokens = np.random.default_rng(SEED).integers(3, PIECES, 40 * 8192).astype(np.uint16)
    lengths = np.full(len(tokens) // 640, 640)  # documents of the length of a web page
    corpus = script.Corpus(tokens, lengths, lengths)
    blocks = script.PackedBlocks(corpus, np.arange(len(lengths)), block, padding=0)
    collate, llama = script.Collate(args.group_size, flash=False), model.base_model.model
    if attention == "sdpa":
        llama.config._attn_implementation = "sdpa"
    seconds, cpu_seconds = [], []

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

    if loss == "plain":
        from transformers.loss.loss_utils import ForCausalLMLoss

        llama.loss_function = ForCausalLMLoss
    training.disable_tqdm, training.save_strategy = True, "no"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainer = Watched(model=model, args=training, train_dataset=blocks, data_collator=batches)
    last = trainer.train().training_loss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": min(seconds[1:]),
        "cpu_seconds": min(cpu_seconds[1:]),  # what a busy machine disturbs less
        "peak_gb": peak * 1024 / 1e9,
        "training_gb": (peak - before) * 1024 / 1e9,
        "loss": last,
    }


def speed(rounds: int) -> list[dict]:
    if not (WORK / "speed" / "model.safetensors").exists():
        llama(
            WORK / "speed",
            PIECES,
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=4,
            num_attention_heads=8,
        )
    rows = []
    for block in (2048, 8192):
        best: dict[str, dict] = {}
        for _ in range(rounds):
            for name, (attention, loss) in VARIANTS.items():
                command = [sys.executable, __file__, "--one", attention, loss, str(block)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stdout + done.stderr)
                got = json.loads(done.stdout.splitlines()[-1])
                old = best.setdefault(name, got)
                best[name] = {key: min(old[key], got[key]) for key in got}
        stock = best["stock SDPA, plain loss (Trainer)"]
        for name, got in best.items():
            row = {"block": block, "batch": 8192 // block, "variant": name} | got
            row["time_ratio"] = got["seconds"] / stock["seconds"]
            row["cpu_ratio"] = got["cpu_seconds"] / stock["cpu_seconds"]
            row["memory_ratio"] = got["training_gb"] / stock["training_gb"]
            rows.append(row)
            print(
                f"{block:6} tokens  {name:34}{got['seconds']:7.2f} s ({row['time_ratio']:.2f}, "
                f"of CPU time {row['cpu_ratio']:.2f})"
                f"{got['training_gb']:7.2f} GB over the model ({row['memory_ratio']:.2f})"
                f"   loss {got['loss']:.4f}",
                flush=True,
            )
    return rows


# --- quality -------------------------------------------------------------------------------------


def english() -> list[str]:
    """The English pages of the labelled sample."""
    texts, label = [], ""
    records = gzip.decompress((DATA / "labelled.wet.gz").read_bytes()).split(b"WARC/1.0\r\n")
    for record in records[1:]:
        head, _, body = record.partition(b"\r\n\r\n")
        for line in head.split(b"\r\n"):
            if line.startswith(b"WARC-Target-URI:"):
                label = line.split(b"/")[3].decode()
        if label == "en":
            texts.append(body.decode("utf-8", "replace").strip())
    return texts


def first_training(folder: Path, steps: int) -> float:
    """Train every weight of a small Llama with Llama 2's tokenizer on English; its last loss."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(parents=True)
    shutil.copy(DATA / "llama2-tokenizer.model", folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    llama(
        folder,
        LLAMA_2_PIECES,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stream = [
        i
        for text in english()
        for i in [1, *tokenizer(text, add_special_tokens=False)["input_ids"], 2]
    ]
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
            "model_name_or_path": extended,
            "dataset": text,
            "output_dir": output,
            "train_embeddings": rows,
            "base_vocab_size": first_new,
            "block_size": 256,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "max_steps": steps,
            "learning_rate": 1e-3,
            "eval_fraction": 0.04,
            "eval_steps": steps // 6,
            "eval_on_start": "true",
            "save_steps": 10**6,
            "sample_tokens": 0,
            "picture": output / "trainloss.png",
            "cache_dir": WORK / "cache",
            "seed": 42,
        }
        if not script.read_record(output).get("results"):  # a stopped benchmark goes on
            script.main([str(word) for n, v in options.items() for word in (f"--{n}", v)])
        metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        curves[rows] = {
            "eval": [
                [r["step"], r["eval_loss"], r["eval_bits_per_character"]]
                for r in metrics
                if "eval_loss" in r
            ],
            "train": [[r["step"], r["loss"]] for r in metrics if "loss" in r],
            "minutes": sum(r.get("train_runtime", 0) for r in metrics) / 60,
        }
        print(rows, [f"{bits:.3f}" for _, _, bits in curves[rows]["eval"]], flush=True)
    draw(curves)
    return curves


def draw(curves: dict) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    names = {"new": "new rows trained (default)", "none": "rows frozen"}
    for rows, curve in curves.items():
        axes.plot(
            [s for s, _, _ in curve["eval"]],
            [b for _, _, b in curve["eval"]],
            "o-",
            label=names[rows],
        )
    axes.set(
        xlabel="step",
        ylabel="bits per character, held-out articles",
        title="Which rows of embedding and head are trained",
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(ROOT / "pictures" / "readme_rows.png", dpi=120)


# --- Main ----------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", choices=["speed", "quality"])
    parser.add_argument("--rounds", type=int, default=2, help="rounds of speed; the best counts")
    parser.add_argument("--first_steps", type=int, default=200, help="steps of the first training")
    parser.add_argument("--steps", type=int, default=240, help="steps of train_pt.py in quality")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        attention, loss, block = args.one
        return print(json.dumps(one_speed(attention, loss, int(block), steps=4)))
    if not DATA.is_dir() and args.only != "speed":
        raise SystemExit(f"no real material: {DATA} is missing; --only speed runs without it")
    WORK.mkdir(parents=True, exist_ok=True)
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"results": {}}
    commit = ["git", "rev-parse", "--short", "HEAD"]
    record = {
        "commit": subprocess.check_output(commit, cwd=ROOT, text=True).strip(),
        "date": date.today().isoformat(),
        "versions": {n: version(n) for n in ("torch", "transformers", "peft", "bitsandbytes")},
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{os.environ.get('OMP_NUM_THREADS', 'all')} used",
        "seed": SEED,
        "command": " ".join(["python", "benchmarks/bench_train.py", *sys.argv[1:]]),
        "results": old["results"],
    }
    if args.only != "quality":
        record["results"]["speed"] = speed(args.rounds)
    if args.only != "speed":
        record["results"]["quality"] = quality(args.first_steps, args.steps)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
