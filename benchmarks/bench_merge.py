"""merge_lora.py beside PEFT's merge_and_unload and beside cp -r: time, memory, bits.

    python benchmarks/bench_merge.py                 # both models that follow, if the disk allows
    python benchmarks/bench_merge.py --only 1.9B     # a 3.7 GB model, minutes; 25 GB of disk
    python benchmarks/bench_merge.py --only 7B       # a 14 GB one, cp and ours; 32 GB of disk
    python benchmarks/bench_merge.py --draw          # the picture again, from the results

The weights are random, in Llama's shapes with 61,388 rows. The adapter is laid out like
train_pt.py's: rank 32 on all linear layers, norms, 29,388 new rows of embedding and head. The chat
model of the way "chat" is the base, moved at random. Each way is a process of its own, measured
from its start until its files are on the disk (fsync). The ways take turns; we show medians. Times
are comparable within one run only, on a machine that does nothing else. At the end, every tensor of
ours is compared with PEFT's.

Results: benchmarks/results/merge.json, model by model, and pictures/readme_merge.png.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "merge.json"
PICTURE = ROOT / "pictures" / "readme_merge.png"
WORK = ROOT / "outputs" / "bench_merge"
ROWS, NEW_FROM, RANK, SEED = 61_388, 32_000, 32, 0
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
SIZES = {"1.9B": (32, 2048, 5504), "7B": (32, 4096, 11008)}  # layers, hidden, intermediate
WAYS = {"1.9B": ["cp", "original", "dequantized", "chat", "PEFT"], "7B": ["cp", "original"]}
DISK = {"1.9B": 25, "7B": 32}  # GB
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import common  # noqa: E402

import merge_lora as script  # noqa: E402

# --- Material ------------------------------------------------------------------------------------


def random_tensor(shape: tuple[int, ...], dtype, generator):
    """Normal numbers; beyond 16 million they repeat, which no way of merging notices."""
    import torch

    count = torch.Size(shape).numel()
    pool = torch.empty(min(count, 1 << 24), dtype=dtype).normal_(0, 0.02, generator=generator)
    return pool.repeat(-(-count // len(pool)))[:count].reshape(shape).contiguous()


def make_base(folder: Path, size: str, drift: float = 0.0) -> dict[str, tuple[int, ...]]:
    """A model in shards of about 2 GB, with as much of a tokenizer as merging looks at. `drift`:
    how far another training has moved the weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, hidden, inner = SIZES[size]
    heads = {"num_attention_heads": hidden // 128, "num_key_value_heads": hidden // 128}
    config = LlamaConfig(
        vocab_size=ROWS, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        **heads)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    vocabulary = {f"piece {i}": i for i in range(ROWS)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in LlamaForCausalLM(config).state_dict().items()}
    generator, shards, held = torch.Generator().manual_seed(SEED), [[]], 0
    drifting = torch.Generator().manual_seed(SEED + 2)
    for name, shape in shapes.items():
        held += 2 * torch.Size(shape).numel()
        if held > 2e9:
            shards.append([])
            held = 2 * torch.Size(shape).numel()
        shards[-1].append(name)
    where = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {n: random_tensor(shapes[n], torch.bfloat16, generator) for n in names}
        for name in names if drift else []:
            tensors[name] += drift * random_tensor(shapes[name], torch.bfloat16, drifting)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return shapes


def make_adapter(folder: Path, base: Path, size: str) -> None:
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    shapes = make_base(base, size)
    generator, tensors = torch.Generator().manual_seed(SEED + 1), {}
    for name, shape in shapes.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if len(shape) == 1:
            tensors[f"{module}.weight"] = random_tensor(shape, torch.bfloat16, generator)
        elif name in (script.EMBEDDING, script.HEAD):
            rows = (ROWS - NEW_FROM, shape[1])
            key = f"{module}.token_adapter.trainable_tokens_delta"
            tensors[key] = random_tensor(rows, torch.float32, generator)
        else:
            for kind, size in (("A", (RANK, shape[1])), ("B", (shape[0], RANK))):
                key = f"{module}.lora_{kind}.weight"
                tensors[key] = random_tensor(size, torch.float32, generator)
    new = list(range(NEW_FROM, ROWS))
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=LINEAR, modules_to_save=NORMS,
        trainable_token_indices={"embed_tokens": new, "lm_head": new}, task_type="CAUSAL_LM",
        base_model_name_or_path=str(base), inference_mode=True)
    config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


# --- The ways ------------------------------------------------------------------------------------

SYNC = """
import os, pathlib, sys
for path in pathlib.Path(sys.argv[-1]).iterdir():
    with path.open("rb") as file:
        os.fsync(file.fileno())
"""
PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def commands(base: Path, adapter: Path, chat: Path) -> dict[str, list[str]]:
    """Each way's command; the last word is its output folder."""
    copy = f"cp -r {base} $0 && {sys.executable} -c '{SYNC}' $0"
    ours = [sys.executable, str(ROOT / "merge_lora.py"), "--adapter", str(adapter)]
    return {
        "cp": ["bash", "-c", copy],
        "original": [*ours, "--merge_into", "original", "--output_dir"],
        "dequantized": [*ours, "--merge_into", "dequantized", "--output_dir"],
        "chat": [*ours, "--merge_into", "original", "--chat_model", str(chat), "--output_dir"],
        "PEFT": [sys.executable, "-c", PEFT + SYNC, str(base), str(adapter)]}


def run(command: list[str], out: Path) -> dict[str, float]:
    """Wall and processor seconds and peak resident memory of one process."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    process = subprocess.Popen(
        [*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)[:200]} {out}")
    seconds = time.perf_counter() - began
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": usage.ru_maxrss / 1024}


def same_bits(ours: Path, theirs: Path) -> tuple[int, int]:
    """(tensors that are equal, tensors), read from the files one at a time."""
    import torch

    left, right = (script.read_tensors(folder, str(folder)) for folder in (ours, theirs))
    assert left.keys() == right.keys()
    equal = 0
    for name, a in left.items():
        equal += a.shape == right[name].shape and all(
            torch.equal(a.block(begin, end), right[name].block(begin, end))
            for begin, end in script.row_blocks(a.shape))
    return equal, len(left)


def aside(function: Callable, *args: object) -> object:
    """Call it in a process of its own: a child's peak memory begins with what its parent holds."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def measure(size: str, ways: list[str], rounds: int) -> dict:
    """All ways on one model, in turns; one round of cp first, to warm the file cache."""
    base, adapter, chat = WORK / "base", WORK / "adapter", WORK / "chat_model"
    for folder in (base, adapter, chat):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    aside(make_adapter, adapter, base, size)
    if "chat" in ways:
        aside(make_base, chat, size, 0.1)
    command = commands(base, adapter, chat)
    run(command["cp"], WORK / "cp")
    runs: dict[str, list[dict]] = {way: [] for way in ways}
    for turn in range(rounds):
        for way in ways:
            if way == "PEFT" and turn:
                continue  # half a minute or more: once is enough
            runs[way].append(run(command[way], WORK / way))
            print(size, way, {k: round(v, 1) for k, v in runs[way][-1].items()}, flush=True)
            if way not in ("original", "PEFT"):
                shutil.rmtree(WORK / way)
    found = {
        way: {key: round(statistics.median(r[key] for r in all_), 2) for key in all_[0]}
        for way, all_ in runs.items()}
    copy = found["cp"]["seconds"]
    result = {
        "model": size,
        "gigabytes": round(sum(p.stat().st_size for p in base.iterdir()) / 1e9, 2),
        "adapter_gigabytes": round(sum(p.stat().st_size for p in adapter.iterdir()) / 1e9, 2),
        "rounds": rounds,
        "load_average": round(os.getloadavg()[0], 1),
        "ways": {way: {**f, "times_cp": round(f["seconds"] / copy, 2)} for way, f in found.items()}}
    if "PEFT" in ways:
        equal, count = aside(same_bits, WORK / "original", WORK / "PEFT")
        result["tensors"], result["tensors_equal_to_peft"] = count, equal
        times = found["PEFT"]["seconds"] / found["original"]["seconds"]
        result["times_faster_than_peft"] = round(times, 2)
    shutil.rmtree(WORK)
    return result


# --- The picture ---------------------------------------------------------------------------------


def draw(row: dict) -> None:
    """Seconds and peak memory of each way, side by side."""
    from matplotlib.figure import Figure

    labels = {"cp": "cp -r", "PEFT": "PEFT, merge_and_unload"}
    labels |= {w: f"merge_lora.py\n--merge_into {w}" for w in ("original", "dequantized")}
    labels |= {"chat": "merge_lora.py\n--chat_model"} if "chat" in row["ways"] else {}
    ways = sorted(labels, key=lambda way: -row["ways"][way]["seconds"])  # the quickest on top
    panels = {"seconds, until it is safely on the disk": ("seconds", 1, "%.1f s"),
              "peak memory, GB": ("peak_mb", 1000, "%.2f GB")}
    colors = ["#9aa5b1" if way in ("cp", "PEFT") else "#b5322a" for way in ways]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axis, (title, (key, unit, form)) in zip(
            figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        values = [row["ways"][way][key] / unit for way in ways]
        bars = axis.barh([labels[way] for way in ways], values, color=colors, height=0.6)
        axis.bar_label(bars, fmt=form, padding=3)
        axis.set_xlabel(title)
        axis.margins(x=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Merging an adapter into a model of {row['gigabytes']:.2f} GB, on a CPU with "
        f"{row['hardware'].split(' cores')[0].split()[-1]} cores", fontsize="medium")
    figure.savefig(PICTURE, dpi=120)
    print(f"drew {PICTURE.relative_to(ROOT)}")


# --- Main ----------------------------------------------------------------------------------------


def main() -> None:
    """Measure the chosen models; each keeps its own stamp when another is measured again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SIZES, default=SIZES, help="these models")
    parser.add_argument("--rounds", type=int, default=3, help="of cp and ours, on the small model")
    parser.add_argument("--draw", action="store_true", help="only the picture, from the results")
    args = parser.parse_args()
    for size in [] if args.draw else args.only:
        free = shutil.disk_usage(ROOT).free / 1e9
        if free < DISK[size]:
            print(f"{size} skipped: {DISK[size]} GB of disk needed, {free:.0f} GB free")
            continue
        start = time.monotonic()
        packages = ("torch", "transformers", "peft", "bitsandbytes", "safetensors")
        stamp = common.stamp("bench_merge", packages, SEED)
        row = stamp | measure(size, WAYS[size], args.rounds if size == "1.9B" else 1)
        row["measured_in_seconds"] = round(time.monotonic() - start)
        done = json.loads(RESULTS.read_text())["results"] if RESULTS.is_file() else []
        rows = sorted([r for r in done if r["model"] != size] + [row], key=lambda r: r["gigabytes"])
        script.save_json(RESULTS, {"results": rows})
    for row in json.loads(RESULTS.read_text())["results"]:
        print(f"\n{row['model']}, {row['gigabytes']} GB, equal to PEFT: ", end="")
        print(f"{row.get('tensors_equal_to_peft', '-')} of {row.get('tensors', '-')} tensors")
        print("| way | seconds | times cp | peak MB |\n| --- | --- | --- | --- |")
        for way, f in row["ways"].items():
            print(f"| {way} | {f['seconds']} | {f['times_cp']} | {f['peak_mb']:.0f} |")
        if "PEFT" in row["ways"]:
            draw(row)


if __name__ == "__main__":
    main()
