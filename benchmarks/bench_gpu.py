"""Peak memory and speed of train_pt.py on a GPU: Llama 2 7B's shapes, 61,388 pieces, random.

    python benchmarks/bench_gpu.py                 # all tables; a GPU and 14 GB of disk
    python benchmarks/bench_gpu.py --only speed    # what matters most first, 9 minutes at most
    python benchmarks/bench_gpu.py --dry_run       # its commands, each tried with a tiny model
    python benchmarks/bench_gpu.py --tiny          # a tiny model on any machine: does it run?

speed      train_pt.py beside its code of before (BEFORE; --dry_run writes it to outputs/, which
           takes it to a machine without git), without Liger's kernels, with PEFT's own LoRA, S² and
           full attention at 8 x 2,048, 8 x 8,192 and 1 x 16,384; Unsloth; S² as FlexAttention.
           Each part is a process with a limit of its own.
           Its part `kernels` profiles a step, for bench_plan.py's account.
training   batch 8 x {1024, 2048, 4096, 8192} tokens of packed documents: S² and full attention,
           chunked and plain loss, checkpoints on the GPU and offloaded, against the usual recipe
           (SDPA, prepare_model_for_kbit_training, modules_to_save for embedding and head, plain
           loss): peak memory, tokens per second, and the peak that --plan predicts.
attention  forward and backward of S² at the same lengths: torch.nn.attention.varlen, FlexAttention
           and SDPA over segments of one length.

What runs out of memory is recorded as such. Nothing is estimated, except the column that says so.
Every row is written as soon as it is measured, so a run cut short keeps what it has. Each model is
loaded once for all its rows; loading has a row of its own.
Results: benchmarks/results/gpu.json and pictures/readme_gpu.png.
"""

import argparse
import gc
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import date
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from threading import Timer
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
SEED, BATCH, LLAMA_2_PIECES = 0, 8, 32_000
FULL = {
    "vocab_size": 61_388, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 16_384,
}  # fmt: skip
TINY = FULL | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
script = None  # train_pt.py, or its code of before

# name: attention, loss, offload
VARIANTS = {
    "train_pt.py": ("s2", "chunked", False),
    "train_pt.py, offload": ("s2", "chunked", True),
    "full attention": ("full", "chunked", False),
    "full attention, offload": ("full", "chunked", True),
    "plain loss": ("s2", "plain", False),
    "full attention, plain loss": ("full", "plain", False),
}
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
USUAL, FAST = "usual recipe", "adamw_8bit"
BEFORE = "c32a33b"  # the code that was measured on an H200 on 2026-11-27
OLD_SCRIPT = ROOT / "outputs" / "bench_gpu_before" / "train_pt.py"
MINUTES, SHORTEST = 9, 15  # for the table of speed; seconds that a part needs


class Part(NamedTuple):
    """Rows of the speed table that run in one process: the code, its options and the shapes."""

    code: str  # train_pt.py, before, unsloth or FlexAttention
    how: str  # of the switches in speed_rows
    shapes: tuple[str, ...]  # batch x tokens
    attention: tuple[str, ...]
    limit: int  # seconds


NORMAL, BOTH = ("8x2048",), ("s2", "full")
LONG = ("1x16384", "1x16384, one document", "8x8192")
PARTS = {  # the most important first
    "now": Part("train_pt.py", "", NORMAL, BOTH, 90),
    "before": Part("before", "", NORMAL, BOTH, 90),
    "without Liger": Part("train_pt.py", "no Liger", NORMAL, ("s2",), 60),
    "PEFT's LoRA": Part("train_pt.py", "PEFT's LoRA", NORMAL, ("s2",), 60),
    "now, long": Part("train_pt.py", "", LONG, BOTH, 130),
    "kernels": Part("train_pt.py", "kernels", NORMAL, ("s2",), 50),
    "Unsloth": Part("unsloth", "not compiled", (*NORMAL, "8x8192"), ("unsloth",), 90),
    "before, long": Part("before", "", LONG, BOTH, 130),
    "Unsloth, compiled": Part("unsloth", "compiled", NORMAL, ("unsloth",), 150),
    "FlexAttention": Part("FlexAttention", "", NORMAL, ("s2",), 60),
}


def use_script(path: Path) -> None:
    """Choose the train_pt.py to measure: today's, or that of an earlier commit."""
    global script
    spec = spec_from_file_location("train_pt", path)
    script = sys.modules["train_pt"] = module_from_spec(spec)
    spec.loader.exec_module(script)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def base_model(sizes: dict, folder: Path) -> Path:
    """Random weights on disk, in 16 bits."""
    if not (folder / "config.json").exists():
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(SEED)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            torch.set_default_dtype(torch.bfloat16)
            model = LlamaForCausalLM(LlamaConfig(**sizes))
            torch.set_default_dtype(torch.float32)
        model.save_pretrained(folder)
        del model
        free()
    return folder


def free() -> None:
    """Free unused memory and reset the counters of peaks()."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def head_size(sizes: dict) -> int:
    return sizes["hidden_size"] // sizes["num_attention_heads"]


def arguments(folder: Path, length: int, offload: bool, optim: str, *more: str):
    words = ["--model_name_or_path", str(folder), "--block_size", str(length), "--optim", optim]
    words += ["--base_vocab_size", str(LLAMA_2_PIECES), "--activation_checkpointing", "true"]
    words += ["--activation_checkpointing_kwargs", json.dumps({"offload": offload})]
    return script.parse_args([*words, *more])


def usual_model(folder: Path, training):
    """QLoRA as most tutorials have it, with embedding and head trained in full."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["lm_head"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=nf4, attn_implementation="sdpa",
        device_map={"": training.device},
    )  # fmt: skip
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model = prepare_model_for_kbit_training(
        model, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    config = LoraConfig(
        task_type="CAUSAL_LM", r=32, lora_alpha=64, target_modules=LINEAR_LAYERS,
        modules_to_save=["embed_tokens", "lm_head"],
    )  # fmt: skip
    return get_peft_model(model, config)


def batches(args, sizes: dict, flash: bool, batch: int = BATCH, whole: bool = False):
    """Packed random documents of 100 to 2,000 tokens, as web pages are; `whole`: of a block."""
    rng = np.random.default_rng(SEED)
    lengths = rng.integers(100, 2000, 40 * batch * args.block_size // 1000)
    if whole:
        lengths = np.full(20 * batch, args.block_size)
    tokens = rng.integers(3, sizes["vocab_size"], int(lengths.sum())).astype(np.uint16)
    corpus = script.Corpus(tokens, lengths, lengths)
    blocks = script.PackedBlocks(corpus, np.arange(len(lengths)), args.block_size, padding=0)
    collate = script.Collate(args.group_size, flash)
    for start in range(0, len(blocks) - batch, batch):
        yield collate([blocks[i] for i in range(start, start + batch)])


def to_device(thing, device):
    if torch.is_tensor(thing):
        return thing.to(device)
    return {k: to_device(v, device) for k, v in thing.items()} if isinstance(thing, dict) else thing


def load(folder: Path, args, training, usual: bool):
    """The model, its head (None in the usual recipe), and the peak of loading it."""
    free()
    if usual:
        model, head = usual_model(folder, training), None
    else:
        model, head = script.build_model(args, training, folder, LLAMA_2_PIECES)
    return model.train(), head, peaks()


def peaks() -> dict:
    if not torch.cuda.is_available():
        return {}
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"peak_gb": allocated / 1e9, "reserved_gb": reserved / 1e9}


def train(model, head, optimizer, device, source, loss: str, steps: int) -> list[float]:
    """Seconds of each step, the first one included."""
    trained, seconds = [p for p in model.parameters() if p.requires_grad], []
    for _ in range(steps + 1):
        batch = to_device(next(source), device)
        if head is None:
            del batch["cuts"]
        synchronize()
        start = time.perf_counter()
        inside = head.inside_the_loss() if loss == "chunked" else nullcontext()
        with torch.autocast(device.type, torch.bfloat16), inside:
            value = model(**batch, use_cache=False).loss
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        seconds.append(time.perf_counter() - start)
        del value, batch
    return seconds


def timed(model, head, args, training, source, attention: str, loss: str, steps: int) -> dict:
    """Tokens per second and peaks of a few steps with a fresh optimizer."""
    from transformers import Trainer
    from transformers.loss.loss_utils import ForCausalLMLoss

    if head is not None:
        llama = model.base_model.model
        llama.config.group_size = args.group_size if attention == "s2" else None
        llama.loss_function = head.loss if loss == "chunked" else ForCausalLMLoss
    free()
    kind, options = Trainer.get_optimizer_cls_and_kwargs(training, model)
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        optimizer = kind(trained, **options)
        seconds = train(model, head, optimizer, training.device, source, loss, steps)
        tokens = next(source)["input_ids"].numel()
        return {"tokens_per_second": tokens / min(seconds[1:])} | peaks()
    except torch.cuda.OutOfMemoryError:
        return {"out_of_memory": True}
    finally:
        model.zero_grad()


def measure(model, head, args, training, sizes: dict, name: str, steps: int) -> dict:
    """One row of the table of training."""
    attention, loss, _ = VARIANTS.get(name, ("sdpa", "plain", False))
    source = batches(args, sizes, script.flash_is_here(head_size(sizes)))
    row = {"length": args.block_size, "batch": BATCH, "variant": name, "optim": args.optim}
    row |= timed(model, head, args, training, source, attention, loss, steps)
    row["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if name.startswith("train_pt.py"):
        config = SimpleNamespace(**sizes, num_key_value_heads=sizes["num_attention_heads"])
        items = script.memory_items(config, args, LLAMA_2_PIECES, BATCH, args.block_size)
        row["plan_gb"] = sum(items.values()) / 1e9
    return row


def training_rows(folder: Path, sizes: dict, lengths: list[int], optim: str, steps: int):
    """Rows as they are measured, the variants that share a model one after the other."""
    here, offloaded = ([n for n, v in VARIANTS.items() if v[2] == offload] for offload in (0, 1))
    for names in (here, [USUAL], offloaded):
        options = folder, lengths[0], names is offloaded, optim
        try:
            model, head, peak = load(folder, *arguments(*options), usual=names == [USUAL])
        except torch.cuda.OutOfMemoryError:
            yield {"loading": names[0], "out_of_memory": True}
            continue
        yield {"loading": names[0]} | peak
        for length in lengths:
            args, training = arguments(folder, length, names is offloaded, optim)
            for name in names:
                yield measure(model, head, args, training, sizes, name, steps)
        del model, head


def unsloth_model(folder: Path, length: int):
    """Unsloth's own, with the same ranks and with embedding and head trained in full. The folder
    needs a tokenizer."""
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(folder), max_seq_length=length, dtype=torch.bfloat16, load_in_4bit=True,
        use_gradient_checkpointing="unsloth",
    )  # fmt: skip
    return FastLanguageModel.get_peft_model(
        model, r=32, lora_alpha=64, target_modules=LINEAR_LAYERS, max_seq_length=length,
        modules_to_save=["embed_tokens", "lm_head"], use_gradient_checkpointing="unsloth",
    )  # fmt: skip


def speed_rows(name: str, folder: Path, sizes: dict, optim: str, steps: int) -> Iterator[dict]:
    """The rows of one part of the table of speed, in a process of its own."""
    part, on_gpu = PARTS[name], torch.cuda.is_available()
    shapes = []
    for text in part.shapes:
        numbers, _, documents = text.partition(", ")
        batch, length = map(int, numbers.split("x"))
        shapes.append((batch, length // 64 if sizes is TINY else length, documents))
    if part.code == "FlexAttention":
        rows = attention_rows(sizes, [shapes[0][1]], part.code)
        yield from rows if on_gpu else [{"skipped": "FlexAttention needs CUDA"}]
        return
    more = ["--use_liger_kernel", "false"] if part.how == "no Liger" else []
    args, training = arguments(folder, shapes[0][1], False, optim, *more)
    if part.code == "unsloth":
        model, head = unsloth_model(folder, max(length for _, length, _ in shapes)).train(), None
    else:
        model, head, _ = load(folder, args, training, usual=False)
    if part.how == "PEFT's LoRA":
        from peft.tuners.lora import LoraLayer

        for module in model.modules():
            if isinstance(module, LoraLayer):
                vars(module).pop("forward", None)  # train_pt.py's own
    for batch, length, documents in shapes:
        args, training = arguments(folder, length, False, optim, *more)
        for attention in part.attention:
            flash = script.flash_is_here(head_size(sizes))
            source = batches(args, sizes, flash, batch, whole=bool(documents))
            if head is None:  # Unsloth's kernels count positions for themselves
                source = ({n: x for n, x in b.items() if n != "position_ids"} for b in source)
            loss = "plain" if head is None else "chunked"
            step = partial(timed, model, head, args, training, source, attention, loss)
            if part.how == "kernels":
                yield from profiled(step, on_gpu)
                continue
            row = {"code": part.code, "how": part.how, "batch": batch, "length": length}
            yield row | {"documents": documents or "packed", "attention": attention} | step(steps)


def profiled(step, on_gpu: bool) -> Iterator[dict]:
    """The operators that a step spends most on: the mean of two steps, after two of warming up."""
    from torch.profiler import ProfilerActivity, profile

    step(1)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiler:
        step(1)
    times = f"self_{'device' if on_gpu else 'cpu'}_time_total"
    rows = sorted(profiler.key_averages(), key=lambda row: -getattr(row, times))
    for row in rows[:50]:
        milliseconds = getattr(row, times) / 2e3
        yield {"operator": row.key, "milliseconds": milliseconds, "launches": row.count / 2}


def speed_table(tiny: bool, unsloth: str | None) -> Iterator[dict]:
    """Run each part in a process, within its limit and what is left of MINUTES. `unsloth`: the
    folder that it lies in."""
    patience = 10 if tiny else 1  # a CPU may be slow and shared
    end = time.monotonic() + 60 * MINUTES * patience
    for name, part in PARTS.items():
        command = [sys.executable, __file__, "--part", name, *["--tiny"] * tiny]
        limit, here = min(part.limit * patience, end - time.monotonic()), {"part": name}
        print(f"{limit:.0f} s at most: {shlex.join(command)}")
        if limit < SHORTEST:
            yield here | {"skipped": "no time"}
            continue
        environment = dict(os.environ)
        if part.code == "unsloth":
            here["UNSLOTH_COMPILE_DISABLE"] = "1" if part.how == "not compiled" else "0"
            environment["UNSLOTH_COMPILE_DISABLE"] = here["UNSLOTH_COMPILE_DISABLE"]
            environment |= {"PYTHONPATH": unsloth} if unsloth else {}
            if not (unsloth or find_spec("unsloth")):
                yield here | {"skipped": "unsloth is not installed"}
                continue
        start = time.monotonic()
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
        timer = Timer(limit, child.kill)
        timer.start()
        for line in child.stdout:
            if line.startswith('{"'):
                yield here | json.loads(line)
        timer.cancel()
        code = child.wait()
        yield here | {"exit_code": code, "took_s": time.monotonic() - start}


def attention_rows(sizes: dict, lengths: list[int], only: str | None = None) -> Iterator[dict]:
    """One layer's S² attention, forward and backward."""
    heads, size = sizes["num_attention_heads"], head_size(sizes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ways = {"SDPA over segments": partial(by_segments, flash=False)}
    if script.flash_is_here(size):
        ways["torch.nn.attention.varlen"] = partial(by_segments, flash=True)
    if torch.cuda.is_available():
        ways["FlexAttention"] = flex
    for length in lengths:
        group, shape = length // 4, (BATCH, heads, length, size)
        args = SimpleNamespace(block_size=length, group_size=group)
        position = next(batches(args, sizes, False))["position_ids"]
        q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
        for name in [only] if only else ways:
            row = {"length": length, "way": name}
            try:
                row["milliseconds"] = milliseconds(ways[name](position, group, device), q, k, v)
            except torch.cuda.OutOfMemoryError:
                row["out_of_memory"] = True
            yield row
        free()


def milliseconds(call, *tensors: torch.Tensor) -> float:
    """Forward and backward, the best of six after two of warming up."""
    seconds = []
    for _ in range(8):
        inputs = [x.clone().requires_grad_() for x in tensors]
        synchronize()
        start = time.perf_counter()
        with torch.autocast(tensors[0].device.type, torch.bfloat16):
            output = call(*inputs)
        output.backward(torch.ones_like(output))
        synchronize()
        seconds.append(time.perf_counter() - start)
    return 1e3 * min(seconds[2:])


def by_segments(position: torch.Tensor, group: int, device: str, flash: bool):
    """S² as train_pt.py has it, its cut points made once per batch."""
    module = SimpleNamespace(training=True, config=SimpleNamespace(group_size=group))
    cuts = to_device(script.all_cut_points(position, group, flash), device)
    return lambda q, k, v: script.s2_attention(module, q, k, v, None, cuts=cuts)[0]


def same_segment(position: torch.Tensor, group: int, shift: int):
    """FlexAttention's rule for one half of the heads; position (B, T)."""
    document = (position == 0).cumsum(1)
    segment = (position + shift) // group

    def rule(b, h, q, k):
        same = (document[b, q] == document[b, k]) & (segment[b, q] == segment[b, k])
        return (q >= k) & same

    return rule


def flex(position: torch.Tensor, group: int, device: str):
    """S² as FlexAttention: a block mask for each half of the heads, made once per batch."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    B, T = position.shape
    position = position.to(device)
    masks = [
        create_block_mask(same_segment(position, group, shift), B, None, T, T, device=device)
        for shift in (0, group // 2)
    ]
    compiled = torch.compile(flex_attention)

    def call(q, k, v):
        halves = zip(*(x.chunk(2, dim=1) for x in (q, k, v)), masks, strict=True)
        outputs = [compiled(*half, block_mask=mask) for *half, mask in halves]
        return torch.cat(outputs, dim=1).transpose(1, 2)

    return call


def draw(rows: list[dict]) -> None:
    from matplotlib.figure import Figure

    shown = ("train_pt.py", "train_pt.py, offload", "full attention, plain loss", "usual recipe")
    rows = sorted((row for row in rows if row.get("variant") in shown), key=lambda r: r["length"])
    figure = Figure(figsize=(8, 4), layout="constrained")
    memory, speed = figure.subplots(1, 2)
    for name in shown:
        mine = [r for r in rows if r["variant"] == name and "peak_gb" in r]
        memory.plot([r["length"] for r in mine], [r["peak_gb"] for r in mine], "o-", label=name)
        speed.plot([r["length"] for r in mine], [r["tokens_per_second"] for r in mine], "o-")
    memory.axhline(24, color="gray", linestyle=":", label="a 24 GB card")
    memory.set(xlabel=f"tokens x batch {BATCH}", ylabel="peak memory, GB")
    speed.set(xlabel=f"tokens x batch {BATCH}", ylabel="tokens per second", ylim=(0, None))
    memory.legend(fontsize="x-small")
    for axes in (memory, speed):
        axes.grid(alpha=0.3)
    figure.savefig(ROOT / "pictures" / "readme_gpu.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", choices=["speed", "training", "attention"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one of warming up")
    parser.add_argument("--tiny", action="store_true", help="a trial run; nothing is recorded")
    parser.add_argument("--dry_run", action="store_true", help="the table of speed, tried so")
    parser.add_argument("--unsloth", help="a folder with Unsloth and what it needs, if not here")
    parser.add_argument("--part", choices=PARTS, help="of that table; prints its rows as JSON")
    args = parser.parse_args()
    tiny = args.tiny or args.dry_run
    if not torch.cuda.is_available() and not tiny:
        raise SystemExit("no GPU here: --dry_run and --tiny try the script without one")
    code = PARTS[args.part].code if args.part else ""
    if code == "unsloth":
        import unsloth  # noqa: F401 (before Transformers, which it changes)
    if args.dry_run:
        OLD_SCRIPT.parent.mkdir(parents=True, exist_ok=True)
        show = ["git", "-C", str(ROOT), "show", f"{BEFORE}:train_pt.py"]
        OLD_SCRIPT.write_bytes(subprocess.check_output(show))
    use_script(OLD_SCRIPT if code == "before" else ROOT / "train_pt.py")
    sizes = TINY if tiny else FULL
    folder = base_model(sizes, ROOT / "outputs" / ("bench_gpu_tiny" if tiny else "bench_gpu"))
    optim = FAST if torch.cuda.is_available() else "adamw_torch"
    if args.part:
        for row in speed_rows(args.part, folder, sizes, optim, args.steps):
            print(json.dumps(row), flush=True)
        return
    tables = {
        "speed": lambda: speed_table(tiny, args.unsloth),
        "training": lambda: training_rows(folder, sizes, args.lengths, optim, args.steps),
        "attention": lambda: attention_rows(sizes, args.lengths),
    }
    for table, rows in tables.items():
        if table == "speed" if args.dry_run else args.only in (None, table):
            print(table)
            record(table, rows(), keep=not tiny)
    if not tiny and args.only in (None, "training"):
        draw(json.loads(RESULTS.read_text())["results"]["training"]["results"])


def record(table: str, rows, keep: bool) -> None:
    """Print and write every row as it comes."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "triton")
    packages = [n for n in packages if find_spec(n)]
    stamp = {
        "commit": subprocess.getoutput(f"git -C {ROOT} rev-parse --short HEAD"),
        "command": " ".join(["python", "benchmarks/bench_gpu.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version()} | {n: version(n) for n in packages},
        "hardware": f"{torch.cuda.get_device_name()}, {platform.machine()}" if keep else "",
        "seed": SEED,
        "results": [],
    }
    whole = {"results": {}}
    if keep and RESULTS.exists():
        whole = json.loads(RESULTS.read_text())
    whole["results"][table] = stamp
    for row in rows:
        figures = (f"{k} {v:,.2f}" if isinstance(v, float) else f"{v}" for k, v in row.items())
        print("  ".join(figures), flush=True)
        stamp["results"].append(row)
        if keep:
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
