"""The README says what is so: its figures are those of the result files, its commands parse, its
files, options, pictures and links exist, and both languages say the same.

After a new measurement or a new sentence only FIGURES and NOT_MEASURED are edited."""

import argparse
import functools
import importlib
import json
import re
import runpy
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from test_house import SCRIPTS

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE, ENGLISH = README.split("\n## English\n")

# --- Figures -------------------------------------------------------------------------------------


def per_token(tokenizer: str, measured_on: str) -> str:
    return f"vocab > tokenizers > results > what={tokenizer} > {measured_on} > characters_per_token"


def bits(rows: str) -> str:
    return f"train > quality > results > {rows} > eval > -1 > 2"


def gb(path: str) -> Callable[[dict], float]:
    """A figure in MB, as GB."""
    return lambda results: look_up(results, path) / 1000


MERGE = "merge > model=1.9B"
WHOLE = "merge > model=7B"
WAYS = f"{MERGE} > ways"
RESIZE = "vocab > resize > results"


def training(table: str, measure: str, **row: object) -> Callable[[dict], float]:
    """A measure of one row of bench_train.py's tables."""
    def found(results: dict) -> float:
        rows = results["train"][table]["results"]
        (only,) = (r for r in rows if all(r[name] == value for name, value in row.items()))
        return only[measure]
    return found


def memory(variant: str) -> list[Callable[[dict], float]]:
    """The peaks of a variant, block by block."""
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


def widest(_: dict) -> float:
    """The largest distance of two seeds of one start after the training."""
    found = [trained(name, kind, 240) for name in ("subtoken", "mean_subtoken", "shared")
             for kind in ("modern", "novel")]
    return max(max(bits) - min(bits) for bits in found)


def less(kind: str) -> Callable[[dict], float]:
    """By how many percent `shared` starts below `mean_subtoken`."""
    return lambda found: 100 * (
        1 - mean_of("shared", kind, 0)(found) / mean_of("mean_subtoken", kind, 0)(found))


def before(given: str, head: str) -> Callable[[dict], float]:
    """Bits per character on modern text before training, from the table of starts."""
    def found(results: dict) -> float:
        rows = results["quality"]["starts"]["results"]["starts"]
        key = {"input": given, "output": head, "seed": 0}
        (only,) = (row for row in rows if row.items() >= key.items())
        return only["modern"]
    return found


TRIED_RULES = [
    (rule, rule) for rule in (
        "mean", "first", "last", "weighted", "multivariate", "mean_subtoken, scaled", "aligned")]
TRIED = (
    "`mean` {:.2f}、拼出它的第一列 {:.2f}、最後一列 {:.2f}、兩倍兩倍加權 {:.2f}、多元常態 {:.2f}、"
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


def beside_usual(length: int, measure: str) -> Callable[[dict], float]:
    """A measure of train_pt.py on the GPU, as a multiple of the usual recipe's."""
    usual = on_gpu(length, measure, "usual recipe")
    return lambda results: on_gpu(length, measure)(results) / usual(results)


def gpu_row(length: int) -> tuple:
    """A row of the README's table of the GPU."""
    words = f"| {length:,} | " + " | ".join(["{:.2f}"] * 3 + ["{:,.0f}"] * 2)
    return (
        words, words, on_gpu(length, "peak_gb"), on_gpu(length, "plan_gb"),
        on_gpu(length, "peak_gb", "usual recipe"), on_gpu(length, "tokens_per_second"),
        on_gpu(length, "tokens_per_second", "usual recipe"))


GPU = [
    beside_usual(length, measure)
    for length in (2048, 8192) for measure in ("peak_gb", "tokens_per_second")]
FULL = [
    on_gpu(length, "tokens_per_second", variant)
    for length in (2048, 8192) for variant in ("train_pt.py", "full attention")]
DISK = ["filter > disk > result to text", "filter > disk > peak to text"]
SIX_GB = [lambda results, path=path: 6 * look_up(results, path) for path in DISK]


def slower_dequantized(results: dict) -> float:
    ways = look_up(results, WAYS)
    return ways["dequantized"]["seconds"] / ways["original"]["seconds"]


# The sentence in Chinese, the same in English (None: not said there), then a value for each format
# in it: the path to it from the name of a file in benchmarks/results, below that file's "results"
# (in a list, key=value chooses the row), or a function of {file: its "results"}.
FIGURES: list[tuple] = [
    # the picture at the top
    ("記憶體是 {:.2f} 倍、速度 {:.2f} 倍，8,192 時是 {:.2f} 倍與 {:.2f} 倍",
     "takes {:.2f} times the memory at {:.2f} times the speed at 2,048 tokens, and {:.2f} times at "
     "{:.2f} times the speed", *GPU),
    *(gpu_row(length) for length in (1024, 2048, 4096, 8192)),
    ("8 x 2,048 是 {:,.0f} 對 {:,.0f}，8 x 8,192 是 {:,.0f} 對 {:,.0f}",
     "({:,.0f} against {:,.0f} tokens/s at 8 x 2,048; {:,.0f} against {:,.0f} at 8 x 8,192)",
     *FULL),
    ("2,048 個 token 時是 {:.2f} 倍，8,192 時是 {:.2f} 倍",
     "{:.2f} times at 2,048 tokens, {:.2f} times at 8,192", *SAVED),
    # the real run
    ("每秒判讀約 {:.0f} MB", "about {:.0f} MB a second", "filter > speed > MB/s > filter_cc"),
    ("文字量的 {:.2f} 倍，過程中最多 {:.1f} 倍，6 GB 就是 {:.1f} 與 {:.0f} GB",
     "about {:.2f} times the size of its text, and at most {:.1f} times while it works: "
     "{:.1f} and {:.0f} GB for 6 GB", *DISK, *SIX_GB),
    ("| Llama 2（32,000） | {:.2f} |", "| Llama 2 (32,000) | {:.2f} |",
     per_token("Llama 2", "unseen_83")),
    ("永遠用不到） | {:.2f} |", "can never be produced) | {:.2f} |",
     per_token("Chinese-LLaMA-2 (Simplified)", "unseen_83")),
    ("| 只用紅樓夢 | {:.2f} |", "| 紅樓夢 alone | {:.2f} |",
     per_token("novel alone (default)", "unseen_83")),
    ("權重 1:8 | {:.2f} |", "weight 1:8 | {:.2f} |",
     per_token("novel + modern, weight 1 8", "unseen_83")),
    ("以 {:.2f} 計", "at {:.2f} characters a token",
     per_token("novel + modern, weight 1 8", "unseen_83")),
    ("的權重 {:.0f} 秒（`cp -r` 的 {:.1f} 到 {:.1f} 倍）",
     "{:.0f} s to read and write 13.5 GB of weights ({:.1f} to {:.1f} times `cp -r`)",
     f"{RESIZE} > rounds > 0 > extend_seconds",
     f"{RESIZE} > rounds > 0 > ratio", f"{RESIZE} > rounds > 1 > ratio"),
    ("{:.0f} GB 的模型 {:.0f} 秒，是 `cp -r` 的 {:.1f} 倍", None, f"{WHOLE} > gigabytes",
     f"{WHOLE} > ways > original > seconds", f"{WHOLE} > ways > original > times_cp"),
    (None, "{:.0f} s for a model of {:.0f} GB, {:.1f} times `cp -r`",
     f"{WHOLE} > ways > original > seconds", f"{WHOLE} > gigabytes",
     f"{WHOLE} > ways > original > times_cp"),
    ("慢 {:.1f} 倍", "takes {:.1f} times as long", slower_dequantized),
    # measured
    ("| 常見的做法 | " + " | ".join(["{:.2f}"] * 5), "| the usual recipe | "
     + " | ".join(["{:.2f}"] * 5), *memory("usual recipe")),
    ("| `train_pt.py` | " + " | ".join(["{:.2f}"] * 5), "| `train_pt.py` | "
     + " | ".join(["{:.2f}"] * 5), *memory(OURS)),
    ("| 逐塊記帳的最大值 | " + " | ".join(["{:.2f}"] * 5), "| largest sum of the account | "
     + " | ".join(["{:.2f}"] * 5), *account("traced_gb")),
    ("| `--plan` 推算 | " + " | ".join(["{:.2f}"] * 5), "| `--plan` | "
     + " | ".join(["{:.2f}"] * 5), *account("plan_gb")),
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
    ("每字 {:.1f} 位元；不練新的列則是 {:.1f} 位元", "{:.1f} bits per character on articles held "
     "out, {:.1f} with the new rows frozen", bits("new"), bits("none")),
    *map(start_row, ("subtoken", "mean_subtoken", "random", "shared", "distilled")),
    ("240 步時相差至多 {:.2f}", "differ by {:.2f} at most after 240 steps", widest),
    ("訓練前就低 {:.0f}% 到 {:.0f}%", "starts {:.0f} to {:.0f}% below `mean_subtoken`",
     less("modern"), less("novel")),
    ("英文網頁從每字 {:.2f} 位元升到 {:.2f}（`subtoken` 是 {:.2f}）",
     "English pages go from {:.2f} bits per character to {:.2f} (`subtoken`: {:.2f})",
     mean_of("random", "english", 0), mean_of("random", "english", 240),
     mean_of("subtoken", "english", 240)),
    (TRIED[0], TRIED[1], *(before(*rules) for rules in TRIED_RULES)),
    ("`igzip -dc` 的 {:.2f} 倍速", "{:.2f} times the speed of `igzip -dc`",
     "filter > speed > ratio to igzip -dc"),
    ("後面的 {:.0f} 倍", "{:.0f} times that of the same verdicts",
     "filter > speed > ratio to WarcReader"),
    ("兩個 worker 是一個的 {:.2f} 倍", "two workers make {:.2f} times one",
     "filter > workers > ratio"),
    ("每個 worker 最多 {} MB", "at most {} MB a worker",
     "filter > memory > MB by records > 200000"),
    ("10 萬頁 {:.0f} 秒，40 萬頁 {:.0f} 秒、{} MB",
     "takes {:.0f} s for 100,000 pages, {:.0f} s and {} MB for 400,000",
     f"{DEDUP} > 100000 > seconds", f"{DEDUP} > 400000 > seconds", f"{DEDUP} > 400000 > peak_mb"),
    ("近似重複找到 {:.1f}%", "finds {:.1f}% of near duplicates", lambda results:
     100 * results["filter"]["dedup"]["recall"]["0.8 and over"]["found"]),
    ("{:.2f} GB 的模型：", "A model of {:.2f} GB:", f"{MERGE} > gigabytes"),
    ("`cp -r` 的 {:.1f} 倍時間，比 PEFT 快 {:.1f} 倍",
     "{:.1f} times the time of `cp -r`, {:.1f} times as fast as PEFT",
     f"{WAYS} > original > times_cp", f"{MERGE} > times_faster_than_peft"),
    ("最多用 {:.2f} GB 記憶體（PEFT {:.1f} GB）", "at most {:.2f} GB of memory (PEFT {:.1f} GB)",
     gb(f"{WAYS} > original > peak_mb"), gb(f"{WAYS} > PEFT > peak_mb")),
    ("{} 個張量", "all {} tensors", f"{MERGE} > tensors_equal_to_peft"),
]
# Numbers that nobody measured: the card's, the hardware's, of public things, our settings.
NOT_MEASURED = [
    "Python 3.11", "3.12",
    "24 GB",  # the card's GPU
    "13.5 GB", "14 GB",  # Llama 2 7B in 16 bits
    "6 GB",  # the card's corpus
    "8 × 累積 4 = 32", "8 × accumulation 4 = 32",  # the card's batch
    "0.9、0.999", "0.9, 0.999",  # the card's Adam
    "3.2 節", "section 3.2",  # of LongLoRA's paper
    "Apache-2.0",
    "1% 好頁", "1% good pages",  # the share of good pages in bench_filter.py's WET
    "Jaccard 0.8",  # from which on a pair is a near duplicate
    "4 × 2,048", "1 × 8,192",  # batches of bench_train.py
    # arithmetic: 8,712 steps of 32 x 2,048 tokens; 6 GB / 3 bytes a character / 1.59
    "5.7 億", "571 million", "0.9 GB", "6.6 倍", "6.6 times", "5.8 萬",
    "1.9 GB",  # arithmetic: a checkpoint's 321 million weights with Adam's 8-bit state
    "0.4 GB",  # extend_vocab.py's bound
    "約 20 秒", "20 s for each",  # extend_vocab.py's own docstring
    "1 分鐘", "2 分鐘", "1 minute",  # by hand: time make demo
    "70 分鐘", "70 minutes",  # by hand: time make bench
    "8 x |", "8 x 2,048", "8 x 8,192",  # batches of bench_gpu.py
    # by hand, on the H200: a profile of one step, and the real command held to 18 GB
    "2.31 秒", "2.31 s", "1.13 秒", "1.13 s", "18 GB", "14.86 GB", "17.93 GB",
    "1 x 16,384", "14%",  # a second run there, in one process, the better of two steps
    "2% 到 7%", "2 to 7%",  # plan_gb by peak_gb of the table
]

# --- Reading the README --------------------------------------------------------------------------

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
    found = [(w[i], tuple(w[i + 1 :])) for w in commands(README) if (i := script_of(w)) is not None]
    return list(dict.fromkeys(found))


def our_words() -> Iterator[str]:
    """Every word of code but for those of other programs' commands."""
    for words in commands(README):
        if script_of(words) is not None or words[0] in ("make", "pytest", "ruff"):
            yield from words
    for span in SPAN.findall(FENCE.sub("", README)):
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
    assert [known for known in NOT_MEASURED if known not in README] == []


# --- Names hold ----------------------------------------------------------------------------------


def test_every_picture_is_shown_from_a_file_that_git_keeps():
    shown = [target for mark, target in LINK.findall(README) if mark]
    assert shown
    assert [target for target in shown if target not in tracked()] == []


def test_every_link_leads_somewhere():
    slugs: list[str] = []
    for _, title in headings(README):  # as GitHub makes them
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        again = [s for s in slugs if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", s)]
        slugs.append(f"{slug}-{len(again)}" if again else slug)
    links = {target for _, target in LINK.findall(README)}
    lost = {link for link in links if link.startswith("#") and link[1:] not in slugs}
    local = {link for link in links if not re.match("#|https?://", link)}
    assert lost | {link for link in local if link.rstrip("/") not in tracked()} == set()


def test_every_file_that_is_named_exists_or_is_written_by_a_script():
    sources = "".join((ROOT / name).read_text() for name in [*SCRIPTS, "Makefile", ".gitignore"])
    path = re.compile(r"[\w.-]+(?:/[\w.-]+)*/?")
    endings = (".py", ".md", ".json", ".jsonl", ".toml", ".txt", ".ipynb", ".png", ".yaml")
    named = {w for w in our_words() if path.fullmatch(w) and ("/" in w or w.endswith(endings))}
    assert "train_pt.py" in named
    known = tracked() | {word.rstrip("./") for word in path.findall(sources)}
    unknown = {name for name in named if name.rstrip("/") not in known}
    unknown = {name for name in unknown if not {*name.rsplit("/", 1)} <= known}  # folder and file
    assert unknown == {"meta-llama/Llama-2-13b-hf"}, "all but the other base are ours"


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
    targets = {words[1] for words in commands(README) if words[0] == "make"}
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


# --- Both languages ------------------------------------------------------------------------------


def test_both_languages_have_the_same_headings():
    levels = [level + 1 for level, _ in headings(CHINESE) if level > 1]
    assert levels == [level for level, _ in headings(ENGLISH)]


def test_both_languages_have_the_same_commands():
    assert [block for block in fenced(ENGLISH) if block[0] in ("bash", "sh")] == [
        block for block in fenced(CHINESE) if block[0] in ("bash", "sh")]
    assert [language for language, _ in fenced(ENGLISH)] == [
        language for language, _ in fenced(CHINESE)]


def test_both_languages_have_the_same_tables():
    assert tables(ENGLISH) == tables(CHINESE)
