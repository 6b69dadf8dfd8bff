"""The pages say what is so: their figures are those of the result files, their commands parse,
their files, options, pictures, links and messages exist, both languages say the same, and the
Chinese is Taiwan's by our own filter.

After a new measurement or a new sentence only FIGURES and NOT_MEASURED are edited."""

import argparse
import ast
import functools
import importlib
import io
import json
import re
import runpy
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from conftest import ROOT
from test_house import SCRIPTS


def halves(page: str) -> tuple[str, str]:
    """A page's Chinese and English; README.md has a page for each, others a rule between them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if page == "README.md":
        return text, (ROOT / "README.en.md").read_text(encoding="utf-8")
    chinese, english = text.split("\n---\n")
    return chinese, english


DOCS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))
PAGES = {
    page: halves(page) for page in ["README.md", "benchmarks/README.md", "data/README.md", *DOCS]}
CHINESE, ENGLISH = ("\n\n".join(page[language] for page in PAGES.values()) for language in (0, 1))
ALL = f"{CHINESE}\n\n{ENGLISH}"

# --- Figures -------------------------------------------------------------------------------------


def per_token(tokenizer: str) -> str:
    return f"vocab > tokenizers > results > what={tokenizer} > unseen_83 > characters_per_token"


def bits(rows: str) -> str:
    return f"train > quality > results > {rows} > eval > -1 > 2"


def gb(path: str) -> Callable[[dict], float]:
    """A figure in MB, as GB."""
    return lambda results: look_up(results, path) / 1000


MERGE = "merge > model=1.9B"
WHOLE = "merge > model=7B"
WAYS = f"{MERGE} > ways"
RESIZE = "vocab > resize > results"
MIXED = per_token("novel + modern, weight 1 8")


def way(name: str, model: str = MERGE) -> tuple:
    """The measures of one way of merging: seconds, times of cp, GB of memory."""
    at = f"{model} > ways > {name}"
    return f"{at} > seconds", f"{at} > times_cp", gb(f"{at} > peak_mb")


def training(table: str, measure: str, **row: object) -> Callable[[dict], float]:
    """A measure of one row of bench_train.py's tables."""
    def found(results: dict) -> float:
        rows = results["train"][table]["results"]
        (only,) = (r for r in rows if all(r[name] == value for name, value in row.items()))
        return only[measure]
    return found


def memory(variant: str) -> list[Callable[[dict], float]]:
    """The peaks of a variant, sequence length by sequence length."""
    return [training("memory", "peak_gb", variant=variant, block=512 << n) for n in range(5)]


def account(measure: str) -> list[str]:
    """A measure of bench_plan.py's shapes, in their order."""
    return [f"plan > memory > results > {row} > {measure}" for row in range(5)]


OURS = "S², chunked loss"
SAVED = [training("memory", "memory_ratio", variant=OURS, block=block) for block in (2048, 8192)]
LONG = {"tokens": 16_384, "documents": "packed"}
STEP = [training("speed", f"{what}_ratio", variant=OURS, block=block)
        for block in (2048, 8192) for what in ("time", "memory")]
DEDUP = "filter > dedup > cost"


def trained(start: str, kind: str, step: int) -> list[float]:
    """Bits per character of every seed of a start, from bench_quality.py's training table."""
    rows = results()["quality"]["training"]["results"]
    points = [point for row in rows if row["start"] == start for point in row["points"]]
    return [point[kind] for point in points if point["step"] == step]


def mean_of(start: str, kind: str, step: int) -> Callable[[dict], float]:
    return lambda _: statistics.mean(trained(start, kind, step))


def start_row(name: str) -> tuple:
    """A row of the README's table of starts, the same in both languages."""
    row = f"| `{name}` | " + " | ".join(["{:.2f}"] * 6)
    return row, row, *(mean_of(name, kind, step)
                       for kind in ("modern", "novel") for step in (0, 60, 240))


STARTS = ("subtoken", "mean_subtoken", "random", "last, weighted", "shared", "distilled")


def spread(_: dict) -> float:
    """The largest distance of two seeds of one start after the training."""
    found = [trained(name, kind, 240) for name in STARTS for kind in ("modern", "novel")]
    return max(max(bits) - min(bits) for bits in found)


def less(kind: str, than: str) -> Callable[[dict], float]:
    """By how many percent `shared` starts below another start."""
    return lambda found: 100 * (
        1 - mean_of("shared", kind, 0)(found) / mean_of(than, kind, 0)(found))


def before(given: str, head: str) -> Callable[[dict], float]:
    """Bits per character on modern text before training, from the table of starts."""
    def found(results: dict) -> float:
        rows = results["quality"]["starts"]["results"]["starts"]
        key = {"input": given, "output": head, "seed": 0}
        (only,) = (row for row in rows if row.items() >= key.items())
        return only["modern"]
    return found


def at_share(share: float, kind: str, step: int = 240) -> list[float]:
    """Bits per character of every seed with that share of English, from bench_quality.py."""
    rows = [r for r in results()["quality"]["replay"]["results"] if r["english"] == share]
    return [point[kind] for row in rows for point in row["points"] if point["step"] == step]


def mixed(kind: str, *shares: float, step: int = 240) -> list[Callable[[dict], float]]:
    return [lambda _, s=share: statistics.mean(at_share(s, kind, step)) for share in shares]


def replay_row(percent: int) -> tuple:
    """A row of the table of replay, the same in both languages."""
    row = f"| {percent}% | " + " | ".join(["{:.2f}"] * 3) + " |"
    kinds = ("modern", "novel", "english")
    return row, row, *(mixed(kind, percent / 100)[0] for kind in kinds)


def replay_spread(_: dict) -> float:
    """The largest distance of two seeds with the same share of English."""
    found = [at_share(share, kind) for share in (0, 0.05, 0.1, 0.25)
             for kind in ("modern", "novel", "english")]
    return max(max(bits) - min(bits) for bits in found)


def at_rate(kind: str, *factors: float) -> list[Callable[[dict], float]]:
    """Mean bits per character with other learning rates for the new rows."""
    def found(factor: float) -> float:
        rows = results()["quality"]["rates"]["results"]
        return statistics.mean(
            row["points"][-1][kind] for row in rows if row["rows_rate"] == factor)

    return [lambda _, f=factor: found(f) for factor in factors]


def recipe_bits(recipe: str, kind: str, averaged: bool = False) -> list[float]:
    """Bits per character after training, or of the last checkpoints' mean; a value a seed."""
    return [
        point[kind] for row in results()["quality"]["recipes"]["results"]
        for point in row["points"]
        if row["recipe"] == recipe and point["step"] == 240 and ("mean_of" in point) == averaged]


def recipe_row(chinese: str, english: str, recipe: str, averaged: bool = False) -> tuple:
    """A row of the table of recipes."""
    cells = " | ".join(["{:.2f}"] * 3)
    found = [lambda _, k=kind: statistics.mean(recipe_bits(recipe, k, averaged))
             for kind in ("modern", "novel", "english")]
    return f"| {chinese} | {cells} |", f"| {english} | {cells} |", *found


def recipe_spread(wanted: Callable[[str], bool]) -> float:
    """The largest distance of two seeds with the same recipe."""
    recipes = {row["recipe"] for row in results()["quality"]["recipes"]["results"]}
    found = [recipe_bits(recipe, kind) for recipe in recipes if wanted(recipe)
             for kind in ("modern", "novel", "english")]
    return max(max(bits) - min(bits) for bits in found)


def chosen_bits(of: str, pages: str, kind: str) -> list[float]:
    """Bits per character after training on the same number of characters; a value a seed."""
    return [row["points"][-1][kind] for row in results()["quality"]["chosen"]["results"]
            if (row["of"], row["pages"]) == (of, pages)]


def chosen_row(chinese: str, english: str, of: str, pages: str) -> tuple:
    """A row of the table of chosen pages."""
    cells = " | ".join(["{:.2f}"] * 3)
    found = [lambda _, k=kind: statistics.mean(chosen_bits(of, pages, k))
             for kind in ("modern", "novel", "english")]
    return f"| {chinese} | {cells} |", f"| {english} | {cells} |", *found


def chosen_bits_mean(pages: str) -> float:
    """Bits per character on modern text after training on pages of web sites."""
    return round(statistics.mean(chosen_bits("crawl", pages, "modern")), 2)


def chosen_spread(of: str) -> float:
    """The largest distance of two seeds on modern text."""
    found = [chosen_bits(of, pages, "modern") for pages in ("any pages", "--like")]
    return max(max(bits) - min(bits) for bits in found)


def well_formed(way: str, measure: str = "well formed") -> list[Callable[[dict], float]]:
    """Percent of the answers with a chat vector, a value a seed."""
    return [lambda results, s=seed: 100 * results["chat"][s][way][measure] for seed in (0, 1, 2)]


def modern_more(share: float) -> Callable[[dict], float]:
    """How many bits more modern text takes with that share of English than without."""
    return lambda _: statistics.mean(at_share(share, "modern")) - statistics.mean(
        at_share(0, "modern"))


TRIED_RULES = [
    (rule, rule) for rule in (
        "mean", "first", "last", "weighted", "multivariate", "mean_subtoken, scaled", "aligned")]
TRIED = (
    "`mean` {:.2f}、拼出它的第一列 {:.2f}、最後一列 {:.2f}、權重逐列加倍 {:.2f}、多元常態 {:.2f}、"
    "把 `mean_subtoken` 縮放到舊列的長度 {:.2f}、依上下文對齊（TokAlign）{:.2f}",
    "`mean` {:.2f}, the first spelling row {:.2f}, the last {:.2f}, weights that double {:.2f}, a "
    "multivariate normal {:.2f}, `mean_subtoken` scaled to the old rows' norm {:.2f}, alignment by "
    "context (TokAlign) {:.2f}")


def on_gpu(length: int, measure: str, variant: str = "train_pt.py") -> Callable[[dict], float]:
    """A measure of one row of bench_gpu.py's training table."""
    def found(results: dict) -> float:
        rows = results["gpu"]["training"]["results"]
        (only,) = (r for r in rows if (r.get("length"), r.get("variant")) == (length, variant))
        return only[measure]
    return found


def again_on_gpu(variant: str, length: int) -> Callable[[dict], float]:
    """Tokens per second of the second run on the GPU."""
    def found(results: dict) -> float:
        rows = results["gpu"]["variants"]["results"]
        (only,) = (r for r in rows if (r["length"], r["variant"]) == (length, variant))
        return only["tokens_per_second"]
    return found


def gpu_row(length: int) -> tuple:
    """A row of the table of the GPU."""
    words = f"| {length:,} | " + " | ".join(["{:.2f}"] * 3 + ["{:,.0f}"] * 2)
    return (
        words, words, on_gpu(length, "peak_gb"), on_gpu(length, "plan_gb"),
        on_gpu(length, "peak_gb", "usual recipe"), on_gpu(length, "tokens_per_second"),
        on_gpu(length, "tokens_per_second", "usual recipe"))


def predicted(measure: str, *cards: str, times: float = 1) -> list[Callable[[dict], float]]:
    """A prediction of bench_plan.py for some cards."""
    def on(card: str) -> Callable[[dict], float]:
        row = "plan > traffic > results > 0 > cards"
        return lambda results: times * look_up(results, f"{row} > {card} > {measure}")
    return [on(card) for card in cards]


FOUR = ("a10", "4090", "a100", "h200")


def by_plan(*cards: str, hours: float = 0) -> list[Callable[[dict], float]]:
    """Seconds of a step that --plan predicts for some cards; with `hours`, the hours of the card's
    steps, so many times over."""
    def on(card: str) -> float:
        seconds = float(re.search(r"([\d.]+) s a step", plan("--plan_gpu", card))[1])
        return hours * 8712 * seconds / 3600 or seconds
    return [lambda _, c=card: on(c) for card in cards]


WATTS = {"a10": 150, "4090": 450, "a100": 400}  # rated
CARD_TOKENS = 8712 * 32 * 2048  # of the card's steps


def card_text(passes: int) -> Callable[[dict], float]:
    """GB of text, 3 bytes a character, that the card's steps read in so many passes."""
    return lambda results: CARD_TOKENS * look_up(results, MIXED) * 3 / passes / 1e9


def six_gb_by_card(results: dict) -> float:
    """How many times the card's steps 6 GB three times over take."""
    return 6 / card_text(3)(results)


def weeks(card: str) -> Callable[[dict], float]:
    (hours,) = by_plan(card, hours=1)
    return lambda results: hours(results) / 24 * six_gb_by_card(results) / 7


@functools.cache
def plan(*options: str) -> str:
    """What --plan prints for Llama 2 7B with the card's vocabulary."""
    import train_pt

    shape = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 61_388,
        "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096}
    with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()) as printed:
        Path(folder, "config.json").write_text(json.dumps(shape), encoding="utf-8")
        nothing = ["--model_name_or_path", folder, "--dataset", f"{folder}/none"]
        train_pt.main(["--plan", "--plan_gpu_gb", "24", *nothing, *options])
    return printed.getvalue()


def in_all(*options: str) -> float:
    """GB that --plan predicts."""
    return float(re.search(r"in all: +([\d.]+) GB", plan(*options))[1])


def widest(offload: bool) -> list[Callable[[dict], float]]:
    """The largest batches of 2,048 tokens on GPUs of several sizes."""
    options = ["--activation_checkpointing_kwargs", '{"offload": true}'] if offload else []
    return [
        lambda _, gb=gb: int(re.search(
            r"largest batch is (\d+)", plan("--plan_gpu_gb", gb, *options))[1])
        for gb in ("16", "24", "48", "80")]


def pinned(package: str) -> Callable[[dict], str]:
    """Major and minor version that requirements.txt asks for."""
    text = (ROOT / "requirements.txt").read_text()
    return lambda _: re.search(rf"^{package}==(\d+\.\d+)", text, re.MULTILINE)[1]


FULL = [
    on_gpu(length, "tokens_per_second", variant)
    for length in (2048, 8192) for variant in ("train_pt.py", "full attention")]
DISK = ["filter > disk > result to text", "filter > disk > peak to text"]
OFFLOADED = "train_pt.py, offload"
BESIDE = [
    on_gpu(2048, measure, variant) for variant in ("train_pt.py", "usual recipe")
    for measure in ("peak_gb", "tokens_per_second")]
MB = "filter > speed > MB/s"

# The sentence in Chinese, the same in English (None: not said there), then a value for each format
# in it: the path to it from the name of a file in benchmarks/results, below that file's "results"
# (in a list, key=value chooses the row), or a function of {file: its "results"}.
FIGURES: list[tuple] = [
    # README: the picture at the top
    ("用 {:.2f} GB、每秒 {:,.0f} 個 token；常見的做法（SDPA、`modules_to_save`、一次算出全部的 "
     "logits）用 {:.2f} GB、每秒 {:,.0f} 個",
     "takes {:.2f} GB and reads {:,.0f} tokens a second; the usual recipe (SDPA, `modules_to_save`,"
     " all logits at once) takes {:.2f} GB and reads {:,.0f}", *BESIDE),
    # the real run
    ("PyTorch {}", "PyTorch {}", pinned("torch")),
    # what English mixed in does
    ("從 {:.2f} 升到 {:.2f}，摻 5% 的英文是 {:.2f}，10% 是 {:.2f}；中文依序是 {:.2f}、{:.2f}、"
     "{:.2f}",
     "from {:.2f} bits per character to {:.2f} in training, to {:.2f} with 5% of English mixed in"
     " and to {:.2f} with 10%; Chinese ends at {:.2f}, {:.2f} and {:.2f}",
     *mixed("english", 0, step=0), *mixed("english", 0, 0.05, 0.1),
     *mixed("modern", 0, 0.05, 0.1)),
    ("同一列的種子相差至多 {:.2f}", "the seeds of a row differ by {:.2f} at most", replay_spread),
    ("（訓練前 {:.2f}）", "({:.2f} before training)", *mixed("english", 0, step=0)),
    *(replay_row(percent) for percent in (0, 5, 10, 25)),
    ("現代文字多 {:.2f} 到 {:.2f} 位元", "Modern text then takes {:.2f} to {:.2f} bits more",
     modern_more(0.05), modern_more(0.25)),
    ("0.1 倍時紅樓夢 {:.2f}、1 倍 {:.2f}、10 倍 {:.2f}，英文是 {:.2f}、{:.2f}、{:.2f}",
     "紅樓夢 {:.2f} at 0.1, {:.2f} at 1 and {:.2f} at 10; English {:.2f}, {:.2f} and {:.2f}",
     *at_rate("novel", 0.1, 1, 10), *at_rate("english", 0.1, 1, 10)),
    ("固定學習率那一列的種子相差至多 {:.2f}，其餘 {:.2f}",
     "differ by {:.2f} at most in the row of the constant rate, by {:.2f} in the others",
     lambda _: recipe_spread("constant".__eq__), lambda _: recipe_spread("constant".__ne__)),
    recipe_row("預設（cosine）", "the defaults (cosine)", "cosine"),
    recipe_row("`--lr_scheduler_type constant`", "`--lr_scheduler_type constant`", "constant"),
    recipe_row(
        "同上，取 160、200、240 步合併後權重的平均",
        "the same, mean of the merged weights of steps 160, 200 and 240", "constant",
        averaged=True),
    recipe_row("`--learning_rate` 是十分之一", "`--learning_rate` a tenth", "rate / 10"),
    recipe_row(
        "同上，`--embedding_learning_rate` 不變",
        "the same, `--embedding_learning_rate` as before", "rate / 10, rows at rate"),
    recipe_row("`--norm_learning_rate` 是十倍", "`--norm_learning_rate` ten times", "norms x 10"),
    recipe_row("`--loraplus_lr_ratio 4`", "`--loraplus_lr_ratio 4`", "LoRA+, B x 4"),
    recipe_row("`--use_rslora true`", "`--use_rslora true`", "rsLoRA"),
    chosen_row("網站：任意的頁", "web sites, any pages", "crawl", "any pages"),
    chosen_row("網站：`--like`", "web sites, `--like`", "crawl", "--like"),
    chosen_row("文章與小說：任意的頁", "articles and novel, any pages", "mixture", "any pages"),
    chosen_row("文章與小說：`--like`", "articles and novel, `--like`", "mixture", "--like"),
    ("差 {:.2f}，種子之間相差至多 {:.2f}", "lower by {:.2f}, and seeds differ by {:.2f} at most",
     lambda _: chosen_bits_mean("any pages") - chosen_bits_mean("--like"),
     lambda _: chosen_spread("crawl")),
    ("每字位元數從 {:.2f} 降到 {:.2f}）", "went from {:.2f} to {:.2f} bits per character on other",
     lambda _: chosen_bits_mean("any pages"), lambda _: chosen_bits_mean("--like")),
    ("文章與小說的混合裡沒有差別（種子相差至多 {:.2f}）",
     "In the mixture there is no difference (seeds differ by {:.2f} at most)",
     lambda _: chosen_spread("mixture")),
    ("合格的回答，種子依序是 {:.0f}%、{:.0f}%、{:.0f}%",
     "{:.0f}%, {:.0f}% and {:.0f}% are well formed", *well_formed("scale 1")),
    ("（`--chat_embeddings`）是 {:.0f}%、{:.0f}%、{:.0f}%",
     "(`--chat_embeddings`) {:.0f}%, {:.0f}% and {:.0f}%", *well_formed("scale 1, embeddings")),
    ("後者是 {:.0f}%、{:.0f}%、{:.0f}%", "the latter are {:.0f}%, {:.0f}% and {:.0f}%",
     *well_formed("scale 1, embeddings", "whatever the letters")),
    ("| 一步：32 個序列，每個 2,048 個 token" + " | {:.1f} 秒" * 3,
     "| a step: 32 sequences of 2,048 tokens" + " | {:.1f} s" * 3, *by_plan(*WATTS)),
    ("| 8,712 步，即 {:.1f} 億個 token" + " | {:.0f} 小時" * 3, None,
     lambda _: CARD_TOKENS / 1e8, *by_plan(*WATTS, hours=1)),
    (None, "| 8,712 steps, or {:.0f} million tokens" + " | {:.0f} hours" * 3,
     lambda _: CARD_TOKENS / 1e6, *by_plan(*WATTS, hours=1)),
    ("（額定 150、450、400 W）" + " | {:.0f} 度" * 3,
     "(rated 150, 450, 400 W)" + " | {:.0f} kWh" * 3,
     *(by_plan(card, hours=watts / 1000)[0] for card, watts in WATTS.items())),
    ("| 6 GB 讀三遍，約 {:.1f} 萬步" + " | {:.1f} 週" * 3, None,
     lambda results: 0.8712 * six_gb_by_card(results), *map(weeks, WATTS)),
    (None, "| 6 GB three times over, some {:.0f},000 steps" + " | {:.1f} weeks" * 3,
     lambda results: 8.712 * six_gb_by_card(results), *map(weeks, WATTS)),
    ("{:.1f} GB 的文字三遍，或 {:.1f} GB 一遍（以每個 token {:.2f} 個字計",
     "{:.1f} GB of text three times, or {:.1f} GB once (at {:.2f} characters a token",
     card_text(3), card_text(1), MIXED),
    ("篩選 6 GB 的語料最多 {:.0f} GB", "up to {:.0f} GB while 6 GB of corpus are filtered",
     lambda results: 6 * look_up(results, DISK[1])),
    ("一個核心每秒判讀 {:.0f} MB", "One core judges {:.0f} MB a second", f"{MB} > filter_cc"),
    ("在維基百科上量，是從 {:.2f} 增加到 {:.2f}", None, per_token("novel alone (default)"), MIXED),
    (None, "measured on Wikipedia, {:.2f} instead of {:.2f}", MIXED,
     per_token("novel alone (default)")),
    ("13.5 GB 的權重 {:.0f} 秒", "{:.0f} s for 13.5 GB of weights",
     f"{RESIZE} > rounds > 0 > extend_seconds"),
    ("{:.2f} GB 的模型 {:.1f} 秒、{:.2f} GB 記憶體（`cp -r` 的 {:.1f} 倍時間；PEFT {:.1f} 秒", None,
     f"{MERGE} > gigabytes", f"{WAYS} > dequantized > seconds", way("dequantized")[2],
     f"{WAYS} > dequantized > times_cp", f"{WAYS} > PEFT > seconds"),
    (None, "{:.1f} s and {:.2f} GB of memory for a model of {:.2f} GB ({:.1f} times `cp -r`; PEFT "
     "takes {:.1f} s", f"{WAYS} > dequantized > seconds", way("dequantized")[2],
     f"{MERGE} > gigabytes", f"{WAYS} > dequantized > times_cp", f"{WAYS} > PEFT > seconds"),
    ("`--merge_into original` 只要 {:.1f} 秒", "`--merge_into original` takes {:.1f} s",
     f"{WAYS} > original > seconds"),
    # decisions, memory
    ("後者是前者的 {:.1f} 倍", "the second is {:.1f} times as long", six_gb_by_card),
    ("要 {:.2f} GB（推算），比預設的 8 位元多 {:.2f} GB",
     "takes {:.2f} GB (predicted), {:.2f} GB more than the default in 8 bits",
     lambda _: in_all("--optim", "adamw_torch"),
     lambda _: in_all("--optim", "adamw_torch") - in_all()),
    ("{:.2f} GB 變成 {:.2f} GB，每秒 {:,.0f} 個 token 變成 {:,.0f}",
     "{:.2f} GB became {:.2f} GB, and {:,.0f} tokens a second became {:,.0f}",
     *(on_gpu(2048, measure, variant) for measure in ("peak_gb", "tokens_per_second")
       for variant in ("train_pt.py", OFFLOADED))),
    ("一批最多幾個" + " | {}" * 4, "largest batch" + " | {}" * 4, *widest(offload=False)),
    ("同上，加 offload" + " | {}" * 4, "the same, with offload" + " | {}" * 4,
     *widest(offload=True)),
    ("保留了 {:.1f} GB，張量是 {:.2f} GB",
     "{:.1f} GB on the H200 by default, for tensors of {:.2f}",
     on_gpu(2048, "reserved_gb"), on_gpu(2048, "peak_gb")),
    # benchmarks: filtering
    ("每秒 {:.0f} MB（解壓後；WET", "reads {:.0f} MB a second (unpacked WET",
     f"{MB} > filter_cc"),
    ("單純解壓是 {:.0f} MB，所以是它的 {:.2f} 倍", "at {:.0f} MB, so the ratio is {:.2f}",
     f"{MB} > igzip -dc", "filter > speed > ratio to igzip -dc"),
    ("後面是 {:.1f} MB，差 {:.0f} 倍", "reach {:.1f} MB, {:.0f} times less",
     f"{MB} > WarcReader", "filter > speed > ratio to WarcReader"),
    ("每秒 {:.1f} MB；datatrove 的 `WarcReader` 加 Trafilatura 是 {:.1f} MB",
     "{:.1f} MB a second; datatrove's `WarcReader` with Trafilatura reaches {:.1f} MB",
     "filter > warc > MB/s > filter_cc", "filter > warc > MB/s > Trafilatura"),
    ("兩個 worker 的速度是一個的 {:.2f} 倍", "Two workers are {:.2f} times as fast as one",
     "filter > workers > ratio"),
    ("每個 worker 最多用 {} MB", "A worker takes at most {} MB",
     "filter > memory > MB by records > 200000"),
    ("10 萬頁 {:.0f} 秒，40 萬頁 {:.0f} 秒、{} MB",
     "takes {:.0f} s for 100,000 pages, {:.0f} s and {} MB for 400,000",
     f"{DEDUP} > 100000 > seconds", f"{DEDUP} > 400000 > seconds", f"{DEDUP} > 400000 > peak_mb"),
    ("近似重複找到 {:.1f}%", "finds {:.1f}% of near duplicates", lambda results:
     100 * results["filter"]["dedup"]["recall"]["0.8 and over"]["found"]),
    ("每 GB 的成品多 {:.0f} 秒", "{:.0f} seconds more for each GB of the result",
     "filter > like > seconds per GB"),
    ("成品是文字量的 {:.2f} 倍，過程中最多 {:.1f} 倍",
     "takes {:.2f} times the size of its text, at most {:.1f} times", *DISK),
    # vocabulary
    ("| Llama 2（32,000） | {:.2f} |", "| Llama 2 (32,000) | {:.2f} |", per_token("Llama 2")),
    ("用不到的 piece） | {:.2f} |", "dead pieces) | {:.2f} |",
     per_token("Chinese-LLaMA-2 (Simplified)")),
    ("| 只用紅樓夢 | {:.2f} |", "| 紅樓夢 alone | {:.2f} |", per_token("novel alone (default)")),
    ("權重 1:8 | {:.2f} |", "weight 1:8 | {:.2f} |", MIXED),
    ("13.5 GB 的權重：{:.0f} 秒，兩次分別是 `cp -r` 的 {:.1f} 與 {:.1f} 倍，記憶體最多 {:.1f} GB",
     "13.5 GB of weights: {:.0f} s, in two rounds {:.1f} and {:.1f} times `cp -r`, at most {:.1f} "
     "GB", f"{RESIZE} > rounds > 0 > extend_seconds", f"{RESIZE} > rounds > 0 > ratio",
     f"{RESIZE} > rounds > 1 > ratio", f"{RESIZE} > rounds > 1 > peak_gb"),
    # where new rows start
    *map(start_row, STARTS),
    ("240 步時相差至多 {:.2f}", "differ by {:.2f} at most after 240 steps", spread),
    ("訓練前就比 `mean_subtoken` 低 {:.0f}% 到 {:.0f}%",
     "starts {:.0f} to {:.0f}% below `mean_subtoken`",
     less("modern", "mean_subtoken"), less("novel", "mean_subtoken")),
    ("訓練前的每字位元數比預設低 {:.0f}% 到 {:.0f}%",
     "starts with {:.0f} to {:.0f}% fewer bits per character than the default",
     less("modern", "subtoken"), less("novel", "subtoken")),
    ("英文網頁從每字 {:.2f} 位元升到 {:.2f}（`subtoken` 是 {:.2f}）",
     "English pages go from {:.2f} bits per character to {:.2f} (`subtoken`: {:.2f})",
     mean_of("random", "english", 0), mean_of("random", "english", 240),
     mean_of("subtoken", "english", 240)),
    (TRIED[0], TRIED[1], *(before(*rules) for rules in TRIED_RULES)),
    # the H200
    *(gpu_row(length) for length in (1024, 2048, 4096, 8192)),
    ("offload（2,048 個 token）：{:.2f} GB，{:,.0f} tokens/s",
     "Offload (2,048 tokens): {:.2f} GB, {:,.0f} tokens/s", on_gpu(2048, "peak_gb", OFFLOADED),
     on_gpu(2048, "tokens_per_second", OFFLOADED)),
    ("8 x 2,048 是 {:,.0f} 對 {:,.0f} tokens/s，8 x 8,192 是 {:,.0f} 對 {:,.0f}",
     "{:,.0f} against {:,.0f} tokens/s at 8 x 2,048, {:,.0f} against {:,.0f} at 8 x 8,192",
     *FULL),
    ("8 x 2,048 是 {:,.0f} 對 {:,.0f}，1 x 16,384 是 {:,.0f} 對 {:,.0f}",
     "{:,.0f} against {:,.0f} at 8 x 2,048, {:,.0f} against {:,.0f} at 1 x 16,384",
     *(again_on_gpu(variant, length)
       for length in (2048, 16_384) for variant in ("S²", "full attention"))),
    ("兩次得到 {:,.0f} 與 {:,.0f}，相差 {:.0f}%",
     "gave {:,.0f} and {:,.0f} in the two runs, {:.0f}%",
     FULL[0], again_on_gpu("S²", 2048),
     lambda results: 100 * (FULL[0](results) / again_on_gpu("S²", 2048)(results) - 1)),
    # predicted
    ("| 記下來的最大值 | " + " | ".join(["{:.2f}"] * 5), "| largest recorded | "
     + " | ".join(["{:.2f}"] * 5), *account("traced_gb")),
    ("| `--plan` | " + " | ".join(["{:.2f}"] * 5), "| `--plan` | "
     + " | ".join(["{:.2f}"] * 5), *account("plan_gb")),
    ("| 一步（32 × 2,048）的秒數" + " | {:.1f}" * 4,
     "| seconds a step (32 × 2,048)" + " | {:.1f}" * 4, *predicted("step_seconds", *FOUR)),
    ("| 8,712 步的天數" + " | {:.1f}" * 4, "| days for 8,712 steps" + " | {:.1f}" * 4,
     *predicted("days", *FOUR)),
    ("| tokens/s" + " | {:,.0f}" * 4, "| tokens/s" + " | {:,.0f}" * 4,
     *predicted("tokens_per_second", *FOUR)),
    # on a CPU
    ("| 常見的做法 | " + " | ".join(["{:.2f}"] * 5), "| usual recipe | "
     + " | ".join(["{:.2f}"] * 5), *memory("usual recipe")),
    ("| `train_pt.py` | " + " | ".join(["{:.2f}"] * 5), "| `train_pt.py` | "
     + " | ".join(["{:.2f}"] * 5), *memory(OURS)),
    ("2,048 個 token 時是 {:.2f} 倍，8,192 時是 {:.2f} 倍",
     "{:.2f} times at 2,048 tokens, {:.2f} times at 8,192", *SAVED),
    ("時間 {:.2f} 倍、記憶體 {:.2f} 倍；1 × 8,192 個 token，時間 {:.2f} 倍、記憶體 {:.2f} 倍",
     "{:.2f} times the time and {:.2f} times the memory, at 1 × 8,192 tokens {:.2f} times the time "
     "and {:.2f} times the memory", *STEP),
    ("要 S² 的 {:.1f} 倍時間", "takes {:.1f} times as long as S²",
     training("attention", "times_s2", tokens=16_384, documents="one", way="full causal")),
    ("差不多（{:.2f} 倍；預設的 2,048 個 token 則是 {:.2f} 倍",
     "about the same ({:.2f} times; at the default 2,048 tokens {:.2f} times",
     *(training("attention", "times_s2", way="full causal, by document", **LONG | {"tokens": size})
       for size in (16_384, 2048))),
    ("做法要 {:.1f} 倍時間", "uses takes {:.1f} times as long",
     training("attention", "times_s2", way="full causal, masked", **LONG)),
    ("每字 {:.1f} 位元；不訓練新的列則是 {:.1f} 位元",
     "take {:.1f} bits per character, {:.1f} with the new rows frozen", bits("new"), bits("none")),
    # merging
    ("{:.2f} GB 的模型（{} 個張量", None, f"{MERGE} > gigabytes",
     f"{MERGE} > tensors_equal_to_peft"),
    (None, "a model of {:.2f} GB (all {} tensors", f"{MERGE} > gigabytes",
     f"{MERGE} > tensors_equal_to_peft"),
    *((f"| {shown} | {{:.1f}} | {{:.1f}} | {{:.2f}} |",) * 2 + way(name)
      for shown, name in {
          "`--merge_into original`": "original", "`--merge_into dequantized`": "dequantized",
          "PEFT": "PEFT"}.items()),
    ("`--merge_into original`，{:.0f} GB | {:.1f} | {:.1f} | {:.2f} |",
     "`--merge_into original`, {:.0f} GB | {:.1f} | {:.1f} | {:.2f} |",
     f"{WHOLE} > gigabytes", *way("original", WHOLE)),
    # where 6 GB come from: public figures, and what follows
    ("107 GB 的 Parquet，每篇 {:.1f} kB", "107 GB of Parquet, {:.1f} kB each", lambda _: 107 / 48),
    ("只要讀約 {:.1f} GB", "only about {:.1f} GB are read", lambda _: 107 * 2 / 48),
    ("一個約 70 MB 的 WET 檔留下約 140 kB，6 GB 要 {:.1f} 萬個檔案、{:.0f} TB", None,
     lambda _: 6e9 / 140e3 / 1e4, lambda _: 6e9 / 140e3 * 70e6 / 1e12),
    ("1 Gbps 的網路要 {:.0f} 小時，300 Mbps 要 {:.0f} 小時",
     "{:.0f} hours at 1 Gbps, {:.0f} at 300 Mbps",
     lambda _: 3e12 * 8 / 1e9 / 3600, lambda _: 3e12 * 8 / 3e8 / 3600),
    (None, "a WET file of about 70 MB yields about 140 kB, so 6 GB take {:.0f},000 files, a "
     "download of {:.0f} TB", lambda _: 6e6 / 140e3, lambda _: 6e9 / 140e3 * 70e6 / 1e12),
]
# Numbers that nobody measured: the card's, the hardware's, of public things, our settings.
NOT_MEASURED = [
    "Python 3.11 到 3.13", "Python 3.11 to 3.13",
    "24 GB", "16 GB", "48 GB", "80 GB", "20 系列", "20 series",  # GPUs
    "不到 15%", "within 15%",  # held by test_benchmarks.py
    "13.5 GB", "14 GB",  # Llama 2 7B in 16 bits
    "--target_size 3GB",  # more than the 2.7 GB that the card's steps read
    "6 GB",  # the card's corpus
    "8 × 累積 4 = 32", "8 × accumulation 4 = 32",  # the card's batch
    "0.9、0.999", "0.9, 0.999",  # the card's Adam
    "3.2 節", "section 3.2",  # of LongLoRA's paper
    "0.4 GB",  # extend_vocab.py's bound
    "摻 5% 就保住", "10% 與訓練前", "5% keeps", "10% about all",  # rows of the table above
    "的 0.1 倍與 1 倍", "0.1 and 1 differ",
    "lm-eval 0.4.13", "vLLM 0.33.0",
    "0.02% 到 0.07%", "0.02 to 0.07%",  # by hand, on the H200
    "Apache-2.0", "CC BY-SA 3.0", "CC BY-SA 4.0",
    "1% 是好頁", "1% good pages",  # the share of good pages in bench_filter.py's WET
    "Jaccard 0.8",  # from which on a pair is a near duplicate
    "4 × 2,048", "1 × 8,192", "8 x 2,048",  # batches of the benchmarks
    "約 4 GB", "about 4 GB",  # arithmetic: two checkpoints, 321 million weights and 8-bit Adam each
    "約 60 GB", "some 60 GB",  # arithmetic: the sizes that follow, added
    "約 20 秒", "20 s for each",  # extend_vocab.py's own docstring
    "--keep_best 0.3", "30%", "10% English",  # settings
    "2 分鐘", "1 分鐘", "2 minutes", "1 minute",  # by hand: time make demo, nothing else running
    "約 10 分鐘", "10 minutes", "約 7.5 秒", "7.5 s",  # by hand: make test, merge_lora.py
    "70 分鐘", "70 minutes",  # by hand: time make bench
    # by hand, on the H200: a profile of one step, and the real command held to 18 GB
    "2.31 秒", "2.31 s", "1.13 秒", "1.13 s", "18 GB", "14.86 GB", "17.93 GB",
    "2% 到 7%", "2 to 7%",  # plan_gb by peak_gb of the table
]

# --- Reading the pages ---------------------------------------------------------------------------

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
RUNNER = re.compile(r"(?:\w+=\S+ )*(?:python|torchrun|accelerate|srun|make|pytest|ruff) ")
LINK = re.compile(r"(!?)\[[^]]*\]\(([^)\s]+)\)")
# A decimal number, or a whole one before a unit.
UNIT = r"[*\s]*(?:[倍%％秒分×]|小時|(?:[KMGT]B|m?s|x)\b|times\b|second|min|hour)"
NUMBER = re.compile(rf"(?<![\w.,])(?:\d[\d,]*\.\d+|\d[\d,]*(?={UNIT}))")


def look_up(results: dict, path: str) -> Any:
    """The value at "a > b > c"."""
    value: Any = results
    for step in path.split(" > "):
        if isinstance(value, dict):
            value = value[step]
        elif "=" in step:
            key, wanted = step.split("=", 1)
            (value,) = (row for row in value if str(row[key]) == wanted)
        else:
            value = value[int(step)]
    return value


@functools.cache
def results() -> dict[str, Any]:
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8"))["results"] for path in files}


def sentence(row: tuple, language: int) -> str:
    """A row of FIGURES in Chinese (0) or English (1), with the figures of the result files."""
    values = [v(results()) if callable(v) else look_up(results(), v) for v in row[2:]]
    return row[language].format(*values)


def blank(match: re.Match) -> str:
    return " " * len(match[0])


def prose(text: str) -> str:
    """The text with fenced blocks, code and links' targets blanked out, every letter in place."""
    return re.sub(r"(?<=\]\()[^)\n]+", blank, SPAN.sub(blank, FENCE.sub(blank, text)))


def headings(text: str) -> list[tuple[int, str]]:
    """(level, title) of every heading."""
    found = re.findall(r"^(#+) (.+)$", FENCE.sub("", text), re.MULTILINE)
    return [(len(marks), title) for marks, title in found]


def tables(text: str) -> list[tuple[int, int]]:
    """(rows, columns) of every table."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    return [(len(t.splitlines()), t.splitlines()[1].count("|") - 1) for t in found]


def fenced(text: str) -> list[tuple[str, list[str]]]:
    """(language, lines) of every fenced block; of a shell's without comments, which differ."""
    blocks = []
    for language, body in FENCE.findall(text):
        lines = body.replace("\\\n", " ").splitlines()
        if language in ("bash", "sh"):
            lines = [shlex.join(shlex.split(line, comments=True)) for line in lines]
        blocks.append((language, [line for line in lines if line.strip()]))
    return blocks


@functools.cache
def tracked() -> set[str]:
    """Every file that git keeps, and their folders."""
    listing = ["git", "-c", "core.quotePath=false", "ls-files"]
    files = subprocess.check_output(listing, cwd=ROOT, text=True).splitlines()
    folders = {str(folder) for file in files for folder in Path(file).parents}
    return {*files, *folders} - {"."}


def commands(text: str) -> list[list[str]]:
    """The words of every command: in fenced shell blocks, and of our kind within a sentence."""
    lines = [line for language, body in fenced(text) if language in ("bash", "sh") for line in body]
    spans = [span for span in SPAN.findall(FENCE.sub("", text)) if RUNNER.match(span)]
    found = []
    for line in [*lines, *spans]:
        words = shlex.split(line, comments=True) if line.count("'") % 2 == 0 else line.split()
        while words:  # those of a pipe or a list one by one
            end = next((i for i, w in enumerate(words) if w in ("&&", "||", "|", ";")), len(words))
            found.append(words[:end])
            words = words[end + 1 :]
    return found


def script_of(words: list[str]) -> int | None:
    """Where in a command the script of ours stands that it runs."""
    ours = (i for i, w in enumerate(words) if w.endswith(".py") and w in tracked())
    return next(ours, None) if words[0] != "pytest" else None


def our_commands() -> list[tuple[str, tuple[str, ...]]]:
    """(script, its options) of every command that runs a script of the repository."""
    found = [(w[i], tuple(w[i + 1 :])) for w in commands(ALL) if (i := script_of(w)) is not None]
    found = [(name, options) for name, options in found if "argparse" in (ROOT / name).read_text()
             or name in SCRIPTS or options]
    return list(dict.fromkeys(found))


def our_words() -> Iterator[str]:
    """Every word of code but for those of other programs' commands."""
    for words in commands(ALL):
        if script_of(words) is not None or words[0] in ("make", "pytest", "ruff"):
            yield from words
    for span in SPAN.findall(FENCE.sub("", ALL)):
        if not RUNNER.match(span) and not re.match(r"[a-z][\w-]* ", span):
            yield from span.split()


# --- Figures hold --------------------------------------------------------------------------------


@pytest.mark.parametrize(("half", "language"), [(CHINESE, 0), (ENGLISH, 1)], ids=["zh", "en"])
@pytest.mark.parametrize("row", FIGURES, ids=lambda row: row[0])
def test_the_readme_says_what_was_measured(row, half, language):
    if row[language] is None:
        return
    expected = sentence(row, language)
    said = re.search(re.sub(r"\\{.*?\\}", r"[\\d.,]+", re.escape(row[language])), half)
    assert expected in half, f"README: {said and said[0]!r}; result files: {expected!r}"


MANUALS = [  # what a script's help says that it costs
    ("merge_lora.py", "for a model of {:.2f} GB (benchmarks/bench_merge.py): --merge_into original "
     "{:.1f} s ({:.1f} times cp -r; PEFT's merge {:.1f} s) and {:.2f} GB of memory, dequantized "
     "{:.1f} s ({:.1f} times) and {:.2f} GB", f"{MERGE} > gigabytes", *way("original")[:2],
     way("PEFT")[0], way("original")[2], *way("dequantized")),
    ("extend_vocab.py", "{:.0f} s and {:.1f} GB of memory for 13.5 GB of weights ({:.1f} to {:.1f} "
     "times as long as cp -r)", f"{RESIZE} > rounds > 0 > extend_seconds",
     f"{RESIZE} > rounds > 1 > peak_gb", f"{RESIZE} > rounds > 0 > ratio",
     f"{RESIZE} > rounds > 1 > ratio"),
    ("train_pt.py", "for 8 x 2,048 tokens --plan says {:.1f} GB; an H200 took {:.2f} without",
     lambda _: in_all(), on_gpu(2048, "peak_gb"))]


@pytest.mark.parametrize("row", MANUALS, ids=lambda row: row[0])
def test_a_manual_says_what_was_measured(row):
    assert sentence(row, 1) in " ".join(importlib.import_module(row[0][:-3]).__doc__.split())


@pytest.mark.parametrize(("half", "language"), [(CHINESE, 0), (ENGLISH, 1)], ids=["zh", "en"])
def test_every_number_was_measured_or_is_known_not_to_be(half, language):
    covered: set[int] = set()
    known = [sentence(row, language) for row in FIGURES if row[language]]
    for words in [*known, *NOT_MEASURED]:
        for match in re.finditer(re.escape(words), half):
            covered |= {*range(*match.span())}
    stray = [m for m in NUMBER.finditer(prose(half)) if not covered.issuperset(range(*m.span()))]
    shown = [half[max(0, m.start() - 25) : m.end() + 15].replace("\n", " ") for m in stray]
    assert not shown, "no row of FIGURES has these numbers:\n" + "\n".join(shown)


def test_no_known_number_is_out_of_date():
    assert [known for known in NOT_MEASURED if known not in ALL] == []


# --- Names hold ----------------------------------------------------------------------------------


def targets(page: str, text: str) -> Iterator[tuple[str, str]]:
    """(mark, target) of every link of a page; a local target as a path from the root."""
    for mark, target in LINK.findall(text):
        local = not re.match("#|https?://", target)
        path = ROOT / Path(page).parent / target
        yield mark, str(path.resolve().relative_to(ROOT)) if local else target


def test_every_picture_is_shown_from_a_file_that_git_keeps():
    shown = {
        target for page, texts in PAGES.items() for text in texts
        for mark, target in targets(page, text) if mark}
    kept = {name for name in tracked() if re.fullmatch(r"pictures/readme_\w+\.png", name)}
    assert shown == kept


def slugs(text: str) -> list[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: list[str] = []
    for _, title in headings(text):
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        again = [s for s in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", s)]
        found.append(f"{slug}-{len(again)}" if again else slug)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for text in PAGES[page]:
        links = {target for _, target in targets(page, text)}
        anchors = {link[1:] for link in links if link.startswith("#")}
        local = {link for link in links if not re.match("#|https?://", link)}
        assert anchors - {*slugs(text)} == set()
        assert local - tracked() == set()


def test_every_message_that_is_explained_is_a_script_s_or_known_to_be_another_s():
    """The parts of a message between its variable parts stand in a script."""
    sources = "\0".join(
        "".join(part.value for part in getattr(node, "values", [node])
                if isinstance(part, ast.Constant) and isinstance(part.value, str))
        for script in SCRIPTS for node in ast.walk(ast.parse((ROOT / script).read_text()))
        if isinstance(node, ast.JoinedStr | ast.Constant))
    for text in PAGES["docs/troubleshooting.md"]:
        explained = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
        assert len(explained) > 10
        unknown = [m for m in explained if not all(part in sources for part in m.split("…"))]
        assert unknown == ["CUDA out of memory", "No module named 'fcntl'"]


def test_every_file_that_is_named_exists_or_is_written_by_a_script():
    programs = [name for name in tracked() if re.fullmatch(r"(?!tests/).*\.py", name)]
    sources = "".join((ROOT / name).read_text() for name in [*programs, "Makefile", ".gitignore"])
    path = re.compile(r"[\w.-]+(?:/[\w.-]+)*/?")
    endings = (".py", ".md", ".json", ".jsonl", ".toml", ".txt", ".ipynb", ".png", ".yaml")
    named = {w for w in our_words() if path.fullmatch(w) and ("/" in w or w.endswith(endings))}
    assert "train_pt.py" in named
    known = tracked() | {name.partition("/")[2] for name in tracked()}  # from a page's own folder
    known |= {word.rstrip("./") for word in path.findall(sources)}
    unknown = {name for name in named if name.rstrip("/") not in known}
    unknown = {name for name in unknown if not {*name.rsplit("/", 1)} <= known}  # folder and file
    others = {"meta-llama/Llama-2-13b-hf", "outputs/pt2", "標籤/代號"}
    assert unknown == others, "all but what the user names are ours"


def test_every_option_and_make_target_exists():
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser
    from transformers import TrainingArguments

    known = {field.name for field in fields(TrainingArguments)} | {"help"}
    for launcher in (launch_command_parser(), get_args_parser()):
        known |= {action.dest for action in launcher._actions}
    known |= {f.name for s in SCRIPTS for f in fields(importlib.import_module(s[:-3]).Arguments)}
    for path in [*ROOT.glob("benchmarks/*.py"), ROOT / "train_pt.py"]:
        known |= set(re.findall(r'add_argument\(\s*"--(\w+)"', path.read_text()))
    named = {word[2:].split("=")[0] for word in our_words() if re.match(r"--\w", word)}
    assert len(named) > 10
    assert named - known == set()
    targets = {words[1] for words in commands(ALL) if words[0] == "make"}
    defined = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test"} <= targets <= {*defined}


@pytest.mark.parametrize(("script", "options"), our_commands())
def test_every_command_of_ours_parses(script, options, monkeypatch, capsys):
    """Up to the parsed arguments and no further."""

    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    try:
        if script in SCRIPTS:
            importlib.import_module(script[:-3]).parse_args([*options])
            return
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        monkeypatch.setattr(sys, "argv", [script, *options])
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        wanted = {"--help", "--help_trainer"} & {*options}
        assert wanted and not end.code, capsys.readouterr().err.splitlines()[-1]


def test_every_script_is_run_in_the_readme():
    assert {*SCRIPTS} <= {script for script, _ in our_commands()}


def test_a_trial_of_the_filter_has_a_folder_of_its_own():
    """A folder holds results of the same settings only, so the real command would be refused."""
    runs = [options for script, options in our_commands() if script == "filter_cc.py"]
    trials = [options for options in runs if "--limit_files" in options]
    real = [options for options in runs if options not in trials]
    assert trials and real
    assert all("--output_dir" in options for options in trials)
    assert not any("--output_dir" in options for options in real)


def test_the_number_format_is_chosen_where_the_model_is_merged():
    import merge_lora

    merges = [options for script, options in our_commands() if script == "merge_lora.py"]
    assert "python merge_lora.py --dtype bf16\n" in merge_lora.__doc__
    assert merges and all(options[:2] == ("--dtype", "bf16") for options in merges)
    (serve,) = {tuple(words) for words in commands(ALL) if words[:2] == ["vllm", "serve"]}
    assert "--dtype" not in serve


# --- Both languages ------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_have_the_same_shape(page):
    """The same headings, tables and commands, in the same order."""
    chinese, english = PAGES[page]
    assert [level for level, _ in headings(chinese)] == [level for level, _ in headings(english)]
    assert tables(chinese) == tables(english)
    shell = ("bash", "sh")
    assert [b for b in fenced(chinese) if b[0] in shell] == [
        b for b in fenced(english) if b[0] in shell]
    assert [language for language, _ in fenced(chinese)] == [
        language for language, _ in fenced(english)]


# --- The Chinese of Taiwan -----------------------------------------------------------------------


def chinese_texts() -> dict[str, str]:
    """Every Chinese text of the project that people read."""
    notebook = json.loads((ROOT / "notebooks" / "luojiu.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown"]
    return {page: texts[0] for page, texts in PAGES.items()} | {"notebook": "\n\n".join(cells)}


@pytest.mark.parametrize("name", chinese_texts())
def test_our_own_filter_takes_the_wording_for_taiwan_s(name):
    import filter_cc

    judge = filter_cc.Judge(filter_cc.Arguments())
    text = prose(chinese_texts()[name])
    codes = filter_cc.code_points(text)
    han = sum(judge.count(codes)[1:5])
    assert han > 50
    scores = judge.usage(text, codes, han)
    assert {k: v for k, v in scores.items() if v > getattr(judge.limits, f"max_{k}")} == {}

    def mainland(text: str) -> list[str]:
        words = judge.words.count(text, filter_cc.code_points(text))
        return [word for word in words if judge.words.kinds[word] == "mainland"]

    assert mainland(text) == []
    assert mainland(text + "視頻") == ["視頻"]


def test_our_own_filter_keeps_the_readme():
    import filter_cc

    _, _, refused = filter_cc.Judge(filter_cc.Arguments()).verdict(prose(PAGES["README.md"][0]))
    assert refused is None


def test_one_term_a_thing():
    """Words that the field in Taiwan says otherwise, or that we gave up for another."""
    others = [
        "底座", "詞表", "分詞器", "優化器", "程序", "進程", "組長(?!度)", "內存", "顯存", "默認",
        "預言", "(?<!訓)練"]
    chinese = prose("\n".join(chinese_texts().values()))
    assert {word for word in others if re.search(word, chinese)} == set()
    english = ["foretell", "foretold", "[Tt]he road", "one road"]
    assert {word for word in english if re.search(word, prose(ENGLISH) + chinese)} == set()
