"""What the extended tokenizer is worth on real text, and what resizing a 7B model costs.

    python benchmarks/bench_vocab.py                          # both tables
    python benchmarks/bench_vocab.py --only tokenizers        # some of the tables: 2 minutes
    python benchmarks/bench_vocab.py --only resize            # minutes, and 45 GB of disk
    python benchmarks/bench_vocab.py --draw                   # the picture again, from the results

tokenizers  Characters per token, byte tokens and dead pieces on DRCD for Llama 2, Chinese-LLaMA-2
            and ours, by corpus and weight; then what was tried and not kept.
resize      A 13.5 GB model with Llama 2 7B's shapes resized: time as a ratio to `cp -r` of the same
            folder in the same run, peak memory.

Results: benchmarks/results/vocab.json, table by table, and pictures/readme_vocab.png.
"""

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results" / "vocab.json"
PICTURE = ROOT / "pictures" / "readme_vocab.png"
WORK = ROOT / "outputs" / "bench_vocab"
DRCD = "drcd_dev.jsonl"
NEW_PIECES, TRAINED_ARTICLES, SEED = 29_388, 300, 0
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import common  # noqa: E402

import extend_vocab as script  # noqa: E402

# --- Material ------------------------------------------------------------------------------------


def read(name: str) -> list[str]:
    return list(script.documents(DATA / name, "--corpus"))


def load(name: str):
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    return ModelProto.FromString((DATA / name).read_bytes())


# --- The tokenizer -------------------------------------------------------------------------------


def tokenizers() -> list[dict]:
    """Rows of figures, on all of DRCD and on the 83 articles that nothing was trained on."""
    llama, novel, drcd = load("llama2-tokenizer.model"), read("hongloumeng.txt"), read(DRCD)
    modern, unseen = drcd[:TRAINED_ARTICLES], drcd[TRAINED_ARTICLES:]
    rows = []

    def row(name: str, model) -> None:
        dead = len(script.dead_pieces(model, 32_000))
        figures = {"all_drcd": script.measure(model, drcd)} if "modern" not in name else {}
        figures["unseen_83"] = script.measure(model, unseen)
        rows.append({"what": name, "pieces": len(model.pieces), "dead": dead} | figures)
        columns = f"{name:58}{len(model.pieces):7,}{dead:5}  "
        for found in figures.values():
            columns += f"{found['characters_per_token']:9.3f} {found['byte_token_share']:6.2%}"
        print(columns, flush=True)

    def ours(name: str, weights: list[float], change: dict | None = None) -> None:
        weighted = zip(weights, (novel, modern), strict=True)
        train = [(weight, text) for weight, texts in weighted for text in texts if weight]
        pieces = script.train_pieces(train, script.Arguments(), NEW_PIECES, **change or {})
        row(name, script.merge_pieces(llama, pieces, 61_388)[0])

    by_script, mixed = {"split_by_unicode_script": True}, "novel + modern, weight 1"
    row("Llama 2", llama)
    row("Chinese-LLaMA-2 (Simplified)", load("chinese-llama-2-tokenizer.model"))
    ours("novel alone (default)", [1, 0])
    ours("novel alone, split_by_unicode_script", [1, 0], by_script)
    for weight in (1, 2, 4, 8, 16, 32):
        ours(f"{mixed} {weight}", [1, weight])
    ours("modern alone", [0, 1])
    for weight in (1, 4, 8):
        ours(f"{mixed} {weight}, split_by_unicode_script", [1, weight], by_script)
    for length in (3, 4, 8, 32):
        ours(f"{mixed} 8, pieces up to {length}", [1, 8], {"max_sentencepiece_length": length})
    for share in (1.0, 0.9999, 0.9995):
        ours(f"{mixed} 8, coverage {share}", [1, 8], {"character_coverage": share})
    with patch.object(script, "segments", segments_with_digits):
        ours(f"{mixed} 8, digits in pieces", [1, 8], {"split_by_number": False})
    return rows


def segments_with_digits(text: str) -> Iterator[str]:
    """The script's segments, but years and dates stay whole: not kept, for Llama 2 reads and writes
    numbers digit by digit, and texts of digits alone would no longer have the base's ids."""
    for run in re.split(r"[!-/:-~\x00-\x1f\x7f\u2581]+", text.translate(script.taiwan_forms())):
        yield from filter(str.strip, (run[i : i + 1000] for i in range(0, len(run), 1000)))


def draw(table: dict) -> None:
    """Characters per token of four tokenizers, on articles that ours was not trained on."""
    from matplotlib.figure import Figure

    rows = {row["what"]: row for row in table["results"]}
    labels = {
        "Llama 2": "Llama 2\n{pieces:,} pieces",
        "Chinese-LLaMA-2 (Simplified)": "Chinese-LLaMA-2\n{pieces:,} pieces, {dead} dead",
        "novel alone (default)": "ours, the novel alone\n{pieces:,} pieces, {dead} dead",
        "novel + modern, weight 1 8": "ours, novel + modern 1:8\n{pieces:,} pieces, {dead} dead"}
    bars = {label.format(**rows[what]): rows[what]["unseen_83"]["characters_per_token"]
            for what, label in labels.items()}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axis = figure.subplots()
    colors = ["#9aa5b1", "#9aa5b1", "#b5322a", "#b5322a"]
    axis.bar_label(axis.bar([*bars], [*bars.values()], color=colors, width=0.6), fmt="%.2f")
    axis.set_ylabel("characters per token")
    axis.set_title("Traditional Chinese: 83 Wikipedia articles (DRCD) that ours never saw",
                   fontsize="medium")
    axis.margins(y=0.1)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=120)
    print(f"drew {PICTURE.relative_to(ROOT)}")


# --- The model -----------------------------------------------------------------------------------


def write_7b(folder: Path) -> int:
    """Llama 2 7B's tensors in bf16, random, in shards of four layers; its size in bytes."""
    import torch
    from safetensors.torch import save_file

    hidden, inner, layers = 4096, 11_008, 32
    noise = torch.randn(16 << 20).to(torch.bfloat16)

    def tensor(*shape: int):
        count = torch.Size(shape).numel()
        return noise.repeat(-(-count // len(noise)))[:count].view(shape).clone()

    def layer(i: int) -> dict:
        attention = {f"self_attn.{p}_proj": (hidden, hidden) for p in "qkvo"}
        mlp = {f"mlp.{p}_proj": (inner, hidden) for p in ("gate", "up")}
        mlp |= {"mlp.down_proj": (hidden, inner)}
        norms = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        return {f"model.layers.{i}.{n}.weight": s for n, s in (attention | mlp | norms).items()}

    shapes = [
        {k: v for i in range(first, first + 4) for k, v in layer(i).items()}
        for first in range(0, layers, 4)]
    shapes[0] |= {script.EMBEDDING: (32_000, hidden)}
    shapes[-1] |= {"model.norm.weight": (hidden,), script.HEAD: (32_000, hidden)}
    folder.mkdir(parents=True)
    weight_map, total = {}, 0
    for number, shard in enumerate(shapes, 1):
        name = f"model-{number:05}-of-{len(shapes):05}.safetensors"
        tensors = {key: tensor(*shape) for key, shape in shard.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    script.save_json(folder / "model.safetensors.index.json", index)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    config |= {"vocab_size": 32_000, "hidden_size": hidden, "intermediate_size": inner}
    config |= {"num_hidden_layers": layers, "num_attention_heads": 32}
    script.save_json(folder / "config.json", config)
    shutil.copy(DATA / "llama2-tokenizer.model", folder / "tokenizer.model")
    return total


def timed(command: list) -> tuple[float, float]:
    """Wall seconds of a command and its peak memory in GB (its own maximum, not its siblings')."""
    start = time.monotonic()
    pid = os.spawnvp(os.P_NOWAIT, str(command[0]), [str(word) for word in command])
    _, status, usage = os.wait4(pid, 0)
    assert status == 0, command
    return time.monotonic() - start, usage.ru_maxrss / 1e6


def resize(rounds: int = 2) -> dict:
    """Extend and copy in turn; both wait until everything is on the disk."""
    import torch
    from safetensors import safe_open

    base, result, copy = WORK / "base7b", WORK / "extended7b", WORK / "copy7b"
    for folder in (base, result, copy):
        shutil.rmtree(folder, ignore_errors=True)
    size = write_7b(base)
    words = ["--base_model", base, "--corpus", DATA / "hongloumeng.txt", "--eval_loss", "no"]
    words += ["--output_dir", result]
    rows = []
    for _ in range(rounds):
        shutil.rmtree(copy, ignore_errors=True)
        os.sync()
        copy_seconds, _ = timed(["sh", "-c", f"cp -r {base} {copy} && sync {copy}/*"])
        shutil.rmtree(copy)
        shutil.rmtree(result, ignore_errors=True)
        os.sync()
        seconds, peak = timed([sys.executable, ROOT / "extend_vocab.py", *words])
        rows.append({
            "extend_seconds": seconds, "copy_seconds": copy_seconds,
            "ratio": seconds / copy_seconds, "peak_gb": peak})
        print(rows[-1], flush=True)
    differing = 0
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, "pt") as old, safe_open(result / path.name, "pt") as new:
            for name in old.keys():  # noqa: SIM118
                one, two = old.get_tensor(name), new.get_tensor(name)
                differing += not torch.equal(two[: len(one)], one)
    for folder in (base, result):
        shutil.rmtree(folder)
    return {"base_bytes": size, "rounds": rows, "tensors_differing": differing}


# --- Main ----------------------------------------------------------------------------------------


def lacking(table: str) -> str | None:
    """Say what a table needs that this machine lacks; None: nothing."""
    if not DATA.is_dir():
        return f"{DATA} with its real material is missing"
    free = shutil.disk_usage(ROOT).free / 1e9
    return f"45 GB of disk needed, {free:.0f} GB free" if table == "resize" and free < 45 else None


def main() -> None:
    """Measure the chosen tables; each keeps its own stamp when another is measured again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {"tokenizers": tokenizers, "resize": resize}
    parser.add_argument("--only", nargs="+", choices=tables, help="these tables")
    parser.add_argument("--draw", action="store_true", help="only the picture, from the results")
    args = parser.parse_args()
    for name in [] if args.draw else args.only or tables:
        if reason := lacking(name):
            print(f"{name} skipped: {reason}")
            continue
        packages = (
            "torch", "transformers", "tokenizers", "sentencepiece", "safetensors", "opencc")
        stamp = common.stamp("bench_vocab", packages, SEED, gpu="no GPU")
        common.measure_table(RESULTS, name, tables[name], stamp)
    shutil.rmtree(WORK, ignore_errors=True)
    measured = json.loads(RESULTS.read_text())["results"] if RESULTS.is_file() else {}
    if "tokenizers" in measured:
        draw(measured["tokenizers"])


if __name__ == "__main__":
    main()
