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


INIT = "vocab > rows > results > last > modern"
MERGE = "merge > model=1.9B"
WAYS = f"{MERGE} > ways"
# The sentence in Chinese, the same in English (None: not said there), then a value for each format
# in it: the path to it from the name of a file in benchmarks/results, below that file's "results"
# (in a list, key=value chooses the row), or a function of {file: its "results"}.
FIGURES: list[tuple] = [
    ("| Llama 2（32,000） | {:.2f} |", None, per_token("Llama 2", "all_drcd")),
    ("永遠用不到） | {:.2f} |", None, per_token("Chinese-LLaMA-2 (Simplified)", "all_drcd")),
    ("`python extend_vocab.py` | {:.2f} |", None, per_token("novel alone (default)", "all_drcd")),
    ("--corpus_weight 1 8` | {:.2f} |", None, per_token("novel + modern, weight 1 8", "unseen_83")),
    ("`mean_subtoken` {:.2f}", "`mean_subtoken` {:.2f}", f"{INIT} > mean_subtoken"),
    ("`random` {:.2f}", "`random` {:.2f}", f"{INIT} > random"),
    ("`mean` {:.2f}", "`mean` {:.2f}", f"{INIT} > mean"),
    ("{:.1f} 對 {:.1f}", "{:.1f} bits per character after 240 steps, against {:.1f}", bits("new"),
     bits("none")),
    ("合併 {:.2f} GB", "Merging {:.2f} GB", f"{MERGE} > gigabytes"),
    ("`cp -r` 的 {:.1f} 倍時間", "{:.1f} times `cp -r`", f"{WAYS} > original > times_cp"),
    ("比 PEFT 快 {:.1f} 倍", "{:.1f} times as fast as PEFT", f"{MERGE} > times_faster_than_peft"),
    ("最多用 {:.2f} GB 記憶體（PEFT {:.1f} GB）", "at most {:.2f} GB of memory",
     gb(f"{WAYS} > original > peak_mb"), gb(f"{WAYS} > PEFT > peak_mb")),
    ("`igzip -dc` 的 {:.2f} 倍速", "{:.2f} times the speed of `igzip -dc`",
     "filter > speed > ratio to igzip -dc"),
    ("後面的 {:.0f} 倍", "{:.0f} times that of the same verdicts",
     "filter > speed > ratio to WarcReader"),
    ("兩個 worker 是一個的 {:.2f} 倍", None, "filter > workers > ratio"),
]
# Numbers that nobody measured: the card's, the hardware's, of public things, our settings.
NOT_MEASURED = [
    "Python 3.11", "3.12",
    "24 GB", "18 GB",  # the card's GPU
    "13.5 GB", "14 GB",  # Llama 2 7B in 16 bits
    "6 GB",  # the card's corpus
    "8 × 累積 4 = 32", "8 × 4 = 32",  # the card's batch
    "0.9、0.999", "(0.9, 0.999,",  # the card's Adam
    "3.2 節", "section 3.2",  # of LongLoRA's paper
    "Apache-2.0",
    "1% 好頁",  # the share of good pages in bench_filter.py's WET
    "1 分鐘", "1 分 36 秒", "1 minute", "1 min 36 s",  # by hand: time make demo
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
    assert {name for name in named if name.rstrip("/") not in known} == set()


def test_every_option_and_make_target_exists():
    from transformers import TrainingArguments

    known = {field.name for field in fields(TrainingArguments)} | {"help"}
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
