"""Peak memory and speed of train_pt.py on a GPU: Llama 2 7B's shapes, 61,388 pieces, random.

    python benchmarks/bench_gpu.py                 # all tables; a GPU and 14 GB of disk
    python benchmarks/bench_gpu.py --only training --lengths 2048
    python benchmarks/bench_gpu.py --tiny          # a tiny model on any machine: does it run?

training   batch 8 x {1024, 2048, 4096, 8192} tokens of packed documents: S² and full attention,
           chunked and plain loss, checkpoints on the GPU and offloaded, against the usual recipe
           (SDPA, prepare_model_for_kbit_training, modules_to_save for embedding and head, plain
           loss): peak memory, tokens per second, and the peak that --plan foretells.
attention  forward and backward of S² at the same lengths: torch.nn.attention.varlen, FlexAttention
           and SDPA over segments of one length.
optimizer  the same step with adamw_8bit, paged_adamw_8bit and adamw_torch.
parts      forward and backward of what a layer repeats, at batch 8 x 2048: its norm as it is and as
           one kernel (torch.nn.functional.rms_norm), a 4-bit projection alone and with LoRA.

What runs out of memory is recorded as such. Nothing is estimated, except the column that says so.
Every row is written as soon as it is measured, so a run cut short keeps what it has. Each model is
loaded once for all its rows; loading has a row of its own.
Results: benchmarks/results/gpu.json and pictures/readme_gpu.png.
"""

import argparse
import gc
import json
import platform
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
SEED, BATCH, LLAMA_2_PIECES = 0, 8, 32_000
FULL = {
    "vocab_size": 61_388, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 8192,
}  # fmt: skip
TINY = FULL | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
sys.path.insert(0, str(ROOT))

import train_pt as script  # noqa: E402

# name: attention, loss, offload
VARIANTS = {
    "train_pt.py": ("s2", "chunked", False),
    "train_pt.py, offload": ("s2", "chunked", True),
    "full attention": ("full", "chunked", False),
    "full attention, offload": ("full", "chunked", True),
    "plain loss": ("s2", "plain", False),
    "full attention, plain loss": ("full", "plain", False),
}
USUAL = "usual recipe"
OPTIMIZERS = ["adamw_8bit", "paged_adamw_8bit", "adamw_torch"]


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
    """Let go of what is dead; peaks() counts from here."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def head_size(sizes: dict) -> int:
    return sizes["hidden_size"] // sizes["num_attention_heads"]


def arguments(folder: Path, length: int, offload: bool, optim: str):
    words = ["--model_name_or_path", str(folder), "--block_size", str(length), "--optim", optim]
    words += ["--base_vocab_size", str(LLAMA_2_PIECES), "--activation_checkpointing", "true"]
    words += ["--activation_checkpointing_kwargs", json.dumps({"offload": offload})]
    return script.parse_args(words)


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
        task_type="CAUSAL_LM", r=32, lora_alpha=64, target_modules=script.LINEAR_LAYERS,
        modules_to_save=["embed_tokens", "lm_head"],
    )  # fmt: skip
    return get_peft_model(model, config)


def batches(args, sizes: dict, flash: bool):
    """Packed random documents of 100 to 2,000 tokens, as web pages are."""
    rng = np.random.default_rng(SEED)
    lengths = rng.integers(100, 2000, 40 * BATCH * args.block_size // 1000)
    tokens = rng.integers(3, sizes["vocab_size"], int(lengths.sum())).astype(np.uint16)
    corpus = script.Corpus(tokens, lengths, lengths)
    blocks = script.PackedBlocks(corpus, np.arange(len(lengths)), args.block_size, padding=0)
    collate = script.Collate(args.group_size, flash)
    for start in range(0, len(blocks) - BATCH, BATCH):
        yield collate([blocks[i] for i in range(start, start + BATCH)])


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


def train(model, head, training, source, loss: str, steps: int) -> list[float]:
    """Seconds of each step, the first one included."""
    from transformers import Trainer

    trained = [p for p in model.parameters() if p.requires_grad]
    kind, options = Trainer.get_optimizer_cls_and_kwargs(training, model)
    optimizer, seconds = kind(trained, **options), []
    for _ in range(steps + 1):
        batch = to_device(next(source), training.device)
        if head is None:
            del batch["cuts"]
        synchronize()
        start = time.perf_counter()
        inside = head.inside_the_loss() if loss == "chunked" else nullcontext()
        with torch.autocast(training.device.type, torch.bfloat16), inside:
            value = model(**batch, use_cache=False).loss
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        seconds.append(time.perf_counter() - start)
        del value, batch
    return seconds


def measure(model, head, args, training, sizes: dict, name: str, steps: int) -> dict:
    """One row: train a few steps with a fresh optimizer."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    attention, loss, _ = VARIANTS.get(name, ("sdpa", "plain", False))
    row = {"length": args.block_size, "batch": BATCH, "variant": name, "optim": args.optim}
    if head is not None:
        llama = model.base_model.model
        llama.config.group_size = args.group_size if attention == "s2" else None
        llama.loss_function = head.loss if loss == "chunked" else ForCausalLMLoss
    free()
    source = batches(args, sizes, script.flash_is_here(head_size(sizes)))
    try:
        seconds = train(model, head, training, source, loss, steps)
        row |= {"tokens_per_second": BATCH * args.block_size / min(seconds[1:])} | peaks()
    except torch.cuda.OutOfMemoryError:
        row["out_of_memory"] = True
    model.zero_grad()
    row["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if name.startswith("train_pt.py"):
        config = SimpleNamespace(**sizes, num_key_value_heads=sizes["num_attention_heads"])
        items = script.memory_items(config, args, LLAMA_2_PIECES, BATCH, args.block_size)
        row["plan_gb"] = sum(items.values()) / 1e9
    return row


def training_rows(folder: Path, sizes: dict, lengths: list[int], optims: list[str], steps: int):
    """Rows as they are measured, the variants that share a model one after the other; with several
    optimizers, train_pt.py's own variant with each."""
    here, offloaded = ([n for n, v in VARIANTS.items() if v[2] == offload] for offload in (0, 1))
    groups = [["train_pt.py"]] if len(optims) > 1 else [here, [USUAL], offloaded]
    for names in groups:
        options = folder, lengths[0], names is offloaded, optims[0]
        try:
            model, head, peak = load(folder, *arguments(*options), usual=names == [USUAL])
        except torch.cuda.OutOfMemoryError:
            yield {"loading": names[0], "out_of_memory": True}
            continue
        yield {"loading": names[0]} | peak
        for length in lengths:
            for optim in optims:
                args, training = arguments(folder, length, names is offloaded, optim)
                for name in names:
                    yield measure(model, head, args, training, sizes, name, steps)
        del model, head


def attention_rows(sizes: dict, lengths: list[int]):
    """One layer's S² attention, forward and backward."""
    heads, size = sizes["num_attention_heads"], head_size(sizes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for length in lengths:
        group, shape = length // 4, (BATCH, heads, length, size)
        args = SimpleNamespace(block_size=length, group_size=group)
        position = next(batches(args, sizes, False))["position_ids"]
        q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
        calls = {"SDPA over segments": by_segments(position, group, False, device)}
        if script.flash_is_here(size):
            calls["torch.nn.attention.varlen"] = by_segments(position, group, True, device)
        if torch.cuda.is_available():
            calls["FlexAttention"] = flex(position.to(device), group)
        for name, call in calls.items():
            row = {"length": length, "way": name}
            try:
                row["milliseconds"] = milliseconds(call, q, k, v)
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


def by_segments(position: torch.Tensor, group: int, flash: bool, device: str):
    """S² as train_pt.py has it, its cut points made once per batch."""
    module = SimpleNamespace(training=True, config=SimpleNamespace(group_size=group))
    cuts = to_device(script.all_cut_points(position, group, flash), device)
    return lambda q, k, v: script.s2_attention(module, q, k, v, None, cuts=cuts)[0]


def part_rows(folder: Path, sizes: dict, length: int):
    """Milliseconds of the parts of the first layer."""
    args, training = arguments(folder, length, False, "adamw_torch")
    model, _, _ = load(folder, args, training, usual=False)
    layer, size = model.base_model.model.model.layers[0], sizes["hidden_size"]
    norm, projection = layer.input_layernorm, layer.mlp.up_proj

    def one_kernel(x):
        weight = norm.weight.to(x.dtype)
        return torch.nn.functional.rms_norm(x, (size,), weight, norm.variance_epsilon)

    ways = {
        "norm, recomputed": norm,
        "norm, one kernel": one_kernel,
        "projection": projection.base_layer,
        "projection with LoRA": projection,
    }
    x = torch.randn(BATCH, length, size, device=training.device, dtype=torch.bfloat16)
    for name, call in ways.items():
        yield {"length": length, "part": name, "milliseconds": milliseconds(call, x)}


def same_segment(position: torch.Tensor, group: int, shift: int):
    """FlexAttention's rule for one half of the heads; position (B, T)."""
    document = (position == 0).cumsum(1)
    segment = (position + shift) // group

    def rule(b, h, q, k):
        same = (document[b, q] == document[b, k]) & (segment[b, q] == segment[b, k])
        return (q >= k) & same

    return rule


def flex(position: torch.Tensor, group: int):
    """S² as FlexAttention: a block mask for each half of the heads, made once per batch."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    B, T = position.shape
    masks = [
        create_block_mask(
            same_segment(position, group, shift), B, None, T, T, device=str(position.device)
        )
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
    parser.add_argument("--only", choices=["training", "attention", "parts", "optimizer"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one of warming up")
    parser.add_argument("--tiny", action="store_true", help="a trial run; nothing is recorded")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.tiny:
        raise SystemExit("no GPU here: --tiny tries the script without one")
    sizes = TINY if args.tiny else FULL
    folder = base_model(sizes, ROOT / "outputs" / ("bench_gpu_tiny" if args.tiny else "bench_gpu"))
    fast = "adamw_torch" if args.tiny and not torch.cuda.is_available() else "adamw_8bit"
    tables = {
        "training": lambda: training_rows(folder, sizes, args.lengths, [fast], args.steps),
        "attention": lambda: attention_rows(sizes, args.lengths),
        "parts": lambda: part_rows(folder, sizes, 256 if args.tiny else 2048),
        "optimizer": lambda: training_rows(folder, sizes, args.lengths[:1], OPTIMIZERS, args.steps),
    }
    for table, rows in tables.items():
        if args.only in (None, table):
            print(table)
            record(table, rows(), keep=not args.tiny)
    if not args.tiny and args.only in (None, "training"):
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
