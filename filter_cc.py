"""Common Crawl to a clean Traditional Chinese corpus in Taiwan usage.

In: WET, WARC (HTML), JSONL or Parquet files; files, folders, globs, URLs, or a crawl by its name.
Out: zstd Parquet with text, id, url, date, the scores of every page and its number of copies,
stats.json, a dataset card, run.json, and the picture pictures/filter.png: what each rule left.

One pass reads and judges. A record is inflated only as far as its header when the header names
other languages (Common Crawl's CLD2 labels); numpy counts the scripts of the others; trafilatura
extracts the article of HTML that can be Traditional Chinese. Rules judge what is left: script,
length, menus and footers, repetition (Gopher, Rae et al. 2021), closing punctuation (C4, Raffel et
al. 2020; FineWeb, Penedo et al. 2024), wording of Taiwan or elsewhere, spam. Personal data become
placeholders. Then MinHash deduplication (Broder 1997) over all pages and, with --like, the choice
of those most like a text that you trust. datatrove runs it: tasks, logs, resuming, clusters.

A run of a minute on any CPU (this command was run):
    python filter_cc.py --input data/sample
The real run, from a crawl or from a dataset of the hub (no whole download, rows are streamed):
    python filter_cc.py --crawl CC-MAIN-2026-30 --target_size 6GB --workers 8
    python filter_cc.py --input 'hf://datasets/NAME/data/*.parquet' --target_size 6GB --workers 8
Cost: a worker takes 0.2 GB of memory whatever the size of its files; benchmarks/bench_filter.py
measures the speed, and the price of deduplication.
"""

import argparse
import bz2
import codecs
import errno
import fcntl
import gzip
import html
import importlib.util
import io
import json
import lzma
import math
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from functools import partial
from importlib.metadata import version
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import brotli
import fsspec  # datatrove, matplotlib and ray are imported where they are used: --help stays quick
import numpy as np
import zstandard
from isal import igzip_lib
from tqdm import tqdm
from transformers import HfArgumentParser

# --- Constants -----------------------------------------------------------------------------------

CRAWL_URL = "https://data.commoncrawl.org/"
# What a file system without locks answers.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
READABLE = re.compile(r"\.(?:parquet|(?:wet|warc|jsonl|ndjson|json)(?:\.(?:gz|zst|xz|bz2))?)$")
TEXT_COLUMNS = ("text", "content", "raw_content")  # the first of these that a row has
MAX_TASKS = 256  # deduplication opens one file of every task at once
FIRST_TURN = 32  # files read before the yield of a crawl is known (--target_size)
BLOCK = 1 << 18  # bytes that a stream gives at a time
MAX_RECORD = 16 << 20  # bytes; no page of prose is larger
HEAD = 384  # compressed bytes that hold a record's header
SAMPLE = 640  # further bytes that show its script
GZIP = b"\x1f\x8b"
MEMBER = re.compile(rb"(?s)\x1f\x8b\x08[\0-\x1f].{4}[\0-\4]")  # the header of a gzip member
HAN_LEADS = bytes(range(0xE4, 0xEA))  # they begin nearly every Han character in UTF-8
SCORES = (
    "han", "traditional", "repeated", "distinct", "top", "closing", "digits", "pronouns",
    "mainland", "hongkong", "converted", "spam", "spun", "terms")
HERE_ONLY = ("input", "crawl", "limit_files", "workers", "executor", "partition", "time", "picture")
RANGES = {  # of numbers that are no share, no limit per 1,000 Han and no plain count
    "max_mainland": (-1000, math.inf), "max_hongkong": (-1000, math.inf), "keep_best": (0.001, 1),
    "workers": (1, 4096), "minhash_buckets": (1, 1000), "minhash_rows": (1, 1000)}

# Rules in the order in which they are applied; stats.json and the picture follow it.
RULES = {
    "language": "the header names languages, and Chinese is not among them",
    "han": "too few of its words are Chinese",
    "japanese_korean": "kana or hangul",
    "simplified": "Simplified characters",
    "index": "first lines of other pages below links to them",
    "mojibake": "broken bytes, characters that nobody uses, or spaces between the characters",
    "lines": "menus, footers, share buttons and cookie notices (lines; pages stay)",
    "length": "too little prose is left",
    "repetition": "it repeats itself",
    "punctuation": "hardly a line ends like a sentence",
    "digits": "figures, as in price lists and in reports by template",
    "pronouns": "pronouns as in a translation by machine",
    "cantonese": "written Cantonese",
    "mainland": "mainland wording in Traditional glyphs",
    "hongkong": "wording of Hong Kong, Malaysia or Singapore",
    "converted": "characters that a conversion from Simplified took for others",
    "spam": "gambling, loan, adult and drug vocabulary",
    "spun": "words of article spinners, formulas of content farms",
    "terms": "terms of service, privacy policies",
    "duplicate": "the text of another page, or nearly",
    "like": "less like the text of --like than the share that --keep_best keeps",
    "target": "beyond the target size"}

# Fields of a record's header, in lower case: its type, and languages without Chinese.
RECORD_TYPE = re.compile(rb"\nwarc-type:[ \t]*([\w-]+)")
FOREIGN = re.compile(rb"\nwarc-identified-content-language:(?!.*zho)")

# Lines are searched in lower case. Where every alternative of a pattern begins with a plain letter,
# re looks for these letters by a table, many times as fast: hence 上一?頁|下一?頁, not [上下]一?頁.


def listed(name: str) -> list[str]:
    """Return the words, or the patterns, of data/filter/<name>.txt; lines with # are comments."""
    here = Path(__file__).parent if "__file__" in globals() else Path()
    lines = (here / "data" / "filter" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def listed_words(name: str) -> list[str]:
    """Return the words of a list, which whitespace divides."""
    return " ".join(listed(name)).split()


def listed_pattern(name: str) -> re.Pattern:
    """Return one pattern for all that a list holds."""
    return re.compile("|".join(listed(name)))


# What marks a line as furniture, as one about the page, as a heading, or as an item of an article.
FURNITURE, NOTICE, PROMPT, PAYWALL, ABOUT, RELATED, COMMENTS, CONTACT, NUMBERED, ITEM, EXCERPT = (
    map(listed_pattern, (
        "furniture", "notice", "prompt", "paywall", "about", "related", "comments", "contact",
        "numbered", "item", "excerpt")))
CONTACT_LINE = re.compile(rf"\S{{0,2}}(?:{CONTACT.pattern})\s.{{0,12}}\d")
CONTACT = re.compile(rf"(?:{CONTACT.pattern})\s*[:：]")
# Of subtitles, formulas, data and code.
TIMING = re.compile(r"\d+|(?:\d\d:)+\d\d[,.]\d{3} --> .*")
FORMULA = re.compile(r"\S [=≈≤≥] \S")
DATA = re.compile(r"[\d=(){};]")
DIGIT = re.compile(r"\d(?!\d?:\d\d)(?<!:\d)(?<!:\d\d)")  # but of times of day
HAN, LATIN = re.compile("[\u3400-\u9fff]"), re.compile("[a-z]")
APART = re.compile(" (?<=[\u3400-\u9fff] )(?=[\u3400-\u9fff])")
SENTENCE = re.compile(  # Chinese punctuation, or ASCII's behind Han
    "[。！？；，,.!?;](?:(?<=[。！？；，])|(?<=[\u3400-\u9fff」）].)(?=\\s|$|[\u3400-\u9fff「]))")
STOPS = re.compile("[。？！?!]")
ENDED = re.compile("[。？！．｡﹒﹖﹗︒︕︖]")
CLOSING = tuple("。！？…」』）；：.!?\"')~～．｡﹒﹖﹗︒︕︖︰，,、﹐︐﹔;")
COLONS = (":", "：")
FENCES = ("```", "~~~")  # around code in Markdown
CODE = re.compile(r"[{}<>=;$\\|`#]|\w[(\[.:_/]\w|^\s*[\w.-]+$")
INVISIBLE = re.compile(  # no line break; colours of a terminal go whole
    "\x1b\\[[\\d;]*m|[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u180e\u200b\u200c\u200e\u200f"
    "\u202a-\u202e\u2060-\u2064\ufeff]")
PARAGRAPH = tuple("。；：，」』）.\"')~～")  # the ends of these; a title may end in ？ or ！
SEPARATORS = re.compile(r"[\s|｜│>»›＞/／·•．‧★◆■]+")
FUNCTION_WORDS, PRONOUNS, UNCONVERTED, VARIANTS, CANTONESE = map(
    listed_words, ("function_words", "pronouns", "unconverted", "variants", "cantonese"))
CURLY = re.compile("“[\u4e00-\u9fff]")  # Taiwan quotes with 「」; conversion leaves quotes alone
# Personal data. Digits and letters around them must have ended; that is asked after the first
# character, because a pattern that begins with a set of characters is found much faster.
EMAIL = re.compile(r"(?a)[\w.+-]+@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+")
NUMBER = re.compile(r"[0-9０-９][0-9０-９.．()（）\s－‐-―-]{5}")  # all that follow have one
IP_ADDRESS = re.compile(r"(?a)\d(?<![\d.]\d)\d{0,2}(\.\d{1,3}){3}(?!\d|\.\d)")
NATIONAL_ID = re.compile(r"(?a)[A-Z](?<![A-Za-z\d][A-Z])[1289A-D]\d{8}(?!\d)")
PHONE = re.compile(
    r"(?a)[+(（0](?<![\d-][+(（0])"
    r"((?<=\+)886[-\s]?(\(0\)|0)?|(?<=0)0886[-\s]?0?|(?<=[(（])0|(?<=0))"  # country or trunk prefix
    r"(9\d{2}[)）]?([-\s.]?\d{3}){2}|[2-8]\d{0,2}[)）]?[-\s.]?\d{3,4}[-\s.]?\d{4}|800([-\s]?\d{3}){2}"
    r"|(37|89|82|826|836)[)）]?[-\s.]?\d{2,3}[-\s.]?\d{3})"
    r"(?!\d)(\s*(#|轉|分機)\s*\d{1,5})?"
)

PRIVATE = (
    (EMAIL, "[EMAIL]"), (IP_ADDRESS, "[IP]"), (NATIONAL_ID, "[ID]"), (PHONE, "[PHONE]"))
FULL_WIDTH = re.compile("[０-９Ａ-Ｚａ-ｚ＠‐-―]")
HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
HALF_WIDTH |= dict.fromkeys(range(0x2010, 0x2016), ord("-"))

PLACEHOLDER = re.compile(r"\[(?:EMAIL|IP|ID|PHONE)\]")

# --- Arguments -----------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the docstring as it is written, every option's default, and --no_X as the opposite."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        name = action.option_strings[0]
        if name.startswith("--no_"):
            return f"The opposite of --{name[5:]}."
        return super()._get_help_string(action)


def option(default: Any, text: str) -> Any:
    """A dataclass field with its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class Arguments:
    """Every option of the command line; the help text is the documentation."""

    input: list[str] = field(
        default_factory=lambda: ["data/sample"],
        metadata={"help": "Files, folders, globs, URLs: .wet, .warc[.gz], .jsonl[.zst], .parquet."})
    crawl: str | None = option(None, "Crawl to read, such as CC-MAIN-2026-30; None: --input.")
    limit_files: int | None = option(None, "Read only so many files; None: all.")
    text_column: str | None = option(
        None, f"Column of rows that holds the text; None: the first of {', '.join(TEXT_COLUMNS)}.")
    output_dir: str = option("data/cc_filtered", "Folder for the corpus; made if missing.")
    target_size: str | None = option(None, "Stop at so much text (UTF-8), such as 6GB; None: all.")
    executor: Literal["local", "ray", "slurm"] = option("local", "datatrove executor to run on.")
    workers: int = option(1, "Tasks at a time.")
    tasks: int | None = option(None, f"Groups of files; None: one a file, at most {MAX_TASKS}.")
    save_rejected: bool = option(False, "Write refused pages to rejected/<rule>/ to read and tune.")
    min_han: float = option(
        0.5, "Least share of Han; a run of Latin letters counts as one, code not at all.")
    max_kana_hangul: float = option(0.2, "Largest share of kana and hangul in East Asian letters.")
    min_traditional: float = option(0.9, "Least share of Traditional where scripts differ.")
    max_broken: float = option(
        0.01, "Largest share of broken characters (U+FFFD, private use); 5 are always allowed.")
    max_rare: float = option(0.15, "Largest share of Han outside Big5 level 1, the 5,401 in use.")
    max_apart: float = option(
        0.25, "Largest share of Han with a space before the next, as OCR and PDF set them.")
    min_length: int = option(200, "Least number of Han left when the lines are cleaned.")
    max_cantonese: float = option(0.01, "Largest share of characters of written Cantonese.")
    max_mainland: float = option(4.0, "Most mainland words, less Taiwan's, per 1,000 Han.")
    max_hongkong: float = option(6.0, "Most Hong Kong words, less Taiwan's, per 1,000 Han.")
    max_converted: float = option(4.0, "Most wrongly converted words per 1,000 Han.")
    max_repeated: float = option(0.2, "Largest share of 10-grams of characters repeated (Gopher).")
    min_distinct: float = option(0.5, "Least share of distinct 2-grams in the first 1,000.")
    max_top: float = option(0.16, "Largest share of text in its most frequent 4-gram (Gopher).")
    min_closing: float = option(0.3, "Least share of text in lines that end like a sentence (C4).")
    max_spam: float = option(6.0, "Most spam words per 1,000 Han, of two different at least.")
    max_spun: float = option(6.0, "Most words of spinners and content farms per 1,000 Han.")
    max_terms: float = option(8.0, "Most words of terms of service per 1,000 Han.")
    max_digits: float = option(0.2, "Largest share of digits, times of day aside.")
    max_pronouns: float = option(
        0.03, "Largest share of 它, 你的, 他們的 and 一個, frequent in translations by machine.")
    like: str | None = option(
        None, "Text that you trust (.txt, .jsonl, .parquet): every page gets the column `like`, how"
        " much more likely it is there than in the crawl.")
    keep_best: float = option(1.0, "Share of pages to keep, those most like the text of --like.")
    minhash_buckets: int = option(20, "MinHash bands: more find more near duplicates.")
    minhash_rows: int = option(8, "MinHash values in a band: more are stricter.")
    partition: str = option("cpu", "Slurm partition.")
    time: str = option("08:00:00", "Slurm time limit of a task.")
    picture: str = option("pictures/filter.png", "Where to draw what each rule left.")


def refuse_twice(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Refuse a list given in two places: argparse would drop the first without a word."""
    given = [str(word).partition("=")[0].replace("-", "_") for word in argv]
    for setting in fields(Arguments):
        if "list[" in str(setting.type) and given.count(f"__{setting.name}") > 1:
            name = f"--{setting.name}"
            parser.error(f"{name} is given twice; give it once, with all values: {name} A B")


def parse_args(argv: list[str] | None) -> Arguments:
    """Read the command line (None: sys.argv; in a notebook nothing); exit code 2 if it is wrong."""
    parser = HfArgumentParser(
        Arguments, description=__doc__, formatter_class=HelpFormatter,
        usage="%(prog)s [options]", allow_abbrev=False)
    if argv is None:  # a notebook's sys.argv is Jupyter's own
        argv = sys.argv[1:] if "__file__" in globals() else []
    refuse_twice(parser, argv)
    args, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        names = [f"--{setting.name}" for setting in fields(Arguments)]
        near = get_close_matches(unknown[0].partition("=")[0], names, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        parser.error(f"unknown option: {' '.join(unknown)}; {hint}--help lists the options")
    return args


# --- Errors --------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake that the user can mend: the argument, its value, what was expected, what to do."""


@contextmanager
def user_errors() -> Iterator[None]:
    """End mistakes and refusals in one line: exit code 2 for a UserError or a package that is
    missing or too old, 1 for a full or read-only disk, 130 for Ctrl-C. Anything else is our bug and
    keeps its traceback."""
    with suppress(AttributeError):  # no option of a notebook's stdout
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may not be UTF-8
    refusals = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG}
    try:
        yield
        return
    except UserError as error:
        message, code = f"error: {error}", 2
    except KeyboardInterrupt:
        message, code = "interrupted; run the same command again to go on", 130
    except ImportError as error:
        message, code = f"error: {error}; pip install -r requirements.txt mends it", 2
    except Exception as error:
        if getattr(error, "errno", None) not in refusals and "No space left" not in str(error):
            raise
        message, code = f"error: {error}", 1
    print(message, file=sys.stderr)
    raise SystemExit(code)


# --- Records out of damaged files ----------------------------------------------------------------


@contextmanager
def mapped(stream) -> Iterator[mmap.mmap]:
    """Map a stream's bytes into memory. A stream that is not a local file is copied into a
    temporary file first."""
    with tempfile.TemporaryFile() as file:
        try:
            stream.fileno()
        except OSError:
            shutil.copyfileobj(stream, file, BLOCK)
            stream = file
        stream.flush()
        size = os.fstat(stream.fileno()).st_size
        yield mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if size else b""


def file_records(data: mmap.mmap, wanted: Callable, damage: Callable, tally: "Tally") -> Iterator:
    """Yield the records of plain WARC bytes, each with the place and length of its body. Where a
    length is wrong, search for the next record's header."""
    at, lost = 0, False
    while (start := data.find(b"WARC/1.", at)) >= 0:
        if not lost and data[at : min(start, at + HEAD)].strip():
            damage("foreign bytes")
        head = data[start : start + (1 << 16)]
        end = re.search(rb"\r?\n\r?\n", head)
        body = end.end() if end else 4
        header = head[:body].lower()
        said = header.partition(b"\ncontent-length:")[2].partition(b"\n")[0].strip()
        length = int(said[:20]) if said.isdigit() else 0  # int() refuses thousands of digits
        at = start + body + length
        kind = None
        if not said.isdigit():
            kind = "record without a length"
        elif length > MAX_RECORD:
            kind = "oversized record"
        elif at > len(data):
            kind = "truncated record"
        elif not b"WARC/1.".startswith(data[at : at + 11].lstrip(b"\r\n")[:7]):
            kind = "record with a wrong length"
        if lost := kind is not None:
            damage(kind)
            at = start + 7  # past this header's WARC/1., on to the next
            continue
        tally.read += 1
        if wanted(header, length):
            yield data[start:at], body, length
    if not lost and data[at : at + HEAD].strip():
        damage("foreign bytes")


def only_record(data: mmap.mmap, at: int, end: int, wanted: Callable) -> tuple | None:
    """Return the record of the gzip member data[at:end], with the place and length of its body.
    Return () if `wanted` refuses its header or its first bytes: the rest is not inflated then.
    Return None if the member is damaged or does not hold exactly one record. The member's last four
    bytes, the inflated size, must be the record's size."""
    try:
        inflate, fed = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_GZIP), at + HEAD
        head, size = inflate.decompress(data[at:fed]), int.from_bytes(data[end - 4 : end], "little")
        while (body := head.find(b"\r\n\r\n") + 4) < 4 and not inflate.eof and fed < end:
            head += inflate.decompress(data[fed : fed + HEAD])
            fed += HEAD
        header, length = head[: body - 2].lower(), size - body - 4
        said = b"\ncontent-length: %d\r" % length in header and header.startswith(b"warc/1.")
        if not said or size > MAX_RECORD:
            return None
        if not wanted(header, length):
            return ()
        if not inflate.eof:
            head += inflate.decompress(data[fed : fed + SAMPLE])
        if not wanted(header, length, head[body:]):
            return ()
        if not inflate.eof:
            head += inflate.decompress(data[fed + SAMPLE : end], size)
        return (head, body, length) if inflate.eof and len(head) == size else None
    except igzip_lib.IsalError:
        return None


def inflate_member(data: mmap.mmap, at: int, file) -> int | None:
    """Inflate the gzip member at `at` into a file; return its end, None if it is damaged."""
    inflate, fed = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_GZIP), at
    with suppress(igzip_lib.IsalError):
        while not inflate.eof and (fed < len(data) or not inflate.needs_input):
            given = data[fed : fed + BLOCK] if inflate.needs_input else b""
            fed += len(given)
            file.write(inflate.decompress(given, BLOCK))
    return fed - len(inflate.unused_data) if inflate.eof else None


def gzip_records(data: mmap.mmap, wanted: Callable, damage: Callable, tally: "Tally") -> Iterator:
    """Yield the records of gzip members. A member is searched for by its magic bytes, so that
    damage costs one member. A member should hold one record. Any other member (many records, a
    wrong length, damage, magic bytes inside compressed data) is inflated into a file, and that is
    searched for records."""
    at = 0
    while at < len(data):
        following = MEMBER.search(data, at + 1)
        end = following.start() if following else len(data)
        found = only_record(data, at, end, wanted)
        if found is not None:
            tally.read += 1
            at = end
            if found:
                yield found
            continue
        with tempfile.TemporaryFile() as file:
            whole = inflate_member(data, at, file)
            if whole is None:
                damaged = MEMBER.match(data, at)
                damage("damaged gzip member" if damaged else "foreign bytes")
            at = whole or end
            with mapped(file) as records:
                told = damage if whole else lambda kind: None  # one member, counted once
                yield from file_records(records, wanted, told, tally)


def stream_records(stream, wanted: Callable, damage: Callable, tally: "Tally") -> Iterator[tuple]:
    """Yield the wanted records of a WET or WARC file, compressed or not, whatever its name says."""
    with mapped(stream) as data:
        if not data:
            damage("empty file")
        elif data[:2] == GZIP:
            yield from gzip_records(data, wanted, damage, tally)
        elif (plain := decompressed(data, data[:6])) is data:
            yield from file_records(data, wanted, damage, tally)
        else:
            with tempfile.TemporaryFile() as file:
                with broken_compression(damage):
                    while block := plain.read1(BLOCK):
                        file.write(block)
                with mapped(file) as records:
                    yield from file_records(records, wanted, damage, tally)


def decompressed(stream, start: bytes):
    """Return a stream that decompresses another, whose first bytes name the compression; return
    the same stream if it is not compressed."""
    if start.startswith(GZIP):
        return gzip.GzipFile(fileobj=stream)
    if start.startswith((b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18")):
        reader = zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)
        return io.BufferedReader(reader, BLOCK)
    if start.startswith(b"\xfd7zXZ"):
        return lzma.LZMAFile(stream)
    return bz2.BZ2File(stream) if start.startswith(b"BZh") else stream


@contextmanager
def broken_compression(damage: Callable) -> Iterator[None]:
    """Count the damage that ends a compressed stream; what it held before has been read."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # the disk's or the network's fault
        damage(f"damaged compression ({type(error).__name__})")


# --- Pages out of records ------------------------------------------------------------------------


@dataclass
class Tally:
    """What a task read, refused and kept: for progress, stats.json and the log; one file a task."""

    path: str
    pages: Counter = field(default_factory=Counter)  # rule or "kept" -> pages
    bytes: Counter = field(default_factory=Counter)  # the same -> bytes of UTF-8
    damage: Counter = field(default_factory=Counter)  # kind -> how often
    others: Counter = field(default_factory=Counter)  # type of record that is no page -> how often
    read: int = 0  # records and rows, whole or damaged: pages + damage + others
    files: int = 0
    saved: float = 0.0

    def count(self, rule: str, size: int) -> None:
        """Count a page under the rule that refuses it, or under "kept"."""
        self.pages[rule] += 1
        self.bytes[rule] += size

    def save(self, every: float = 0.0) -> None:
        """Write the counts; with `every`, only if the last time is that many seconds ago."""
        if time.monotonic() - self.saved >= every:
            self.saved = time.monotonic()
            counts = {k: v for k, v in vars(self).items() if k not in ("path", "saved")}
            write_whole(Path(self.path), json.dumps(counts, sort_keys=True))


def write_whole(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, "utf-8", "backslashreplace")
    os.replace(temporary, path)


def lost_unread(tally: Tally, damage: Callable) -> Callable:
    """Return a function that counts damage and one more record as read. Readers call it for a
    record or row that they cannot read at all, and `damage` for one that they have read."""
    def lost(*what) -> None:
        tally.read += 1
        damage(*what)

    return lost


def read_pages(stream, tally: Tally, damage: Callable, judge: "Judge") -> Iterator[dict]:
    """Yield the pages of a WET or WARC stream that neither header nor bytes refuse; with
    --save_rejected the refused ones as well, with the rule under "refused"."""
    save = judge.limits.save_rejected

    def wanted(header: bytes, length: int, start: bytes = b"") -> bool:
        kind = RECORD_TYPE.search(header)
        if kind is None:
            damage("record without a type")
            return False
        if kind[1] == b"response":
            return True
        if kind[1] != b"conversion":
            tally.others[kind[1].decode()] += 1
            return False
        refused = judge.glance(start) if start else "language" if FOREIGN.search(header) else None
        if refused and not save:
            tally.count(refused, length)
        return save or not refused

    lost = lost_unread(tally, damage)
    for data, at, length in stream_records(stream, wanted, lost, tally):
        header, page = data[:at].lower(), data[at : at + length]
        refused = "language" if FOREIGN.search(header) else None
        article = RECORD_TYPE.search(header)[1] == b"response"
        if article:
            try:
                page, unfit = html_page(page, judge)
            except Exception as error:  # whatever lxml and trafilatura raise at a broken page
                damage(f"page that does not parse ({type(error).__name__})")
                continue
            if page is None:
                tally.others["response without HTML"] += 1
                continue
            refused = refused or unfit
        refused = refused or judge.refuse_bytes(page)
        if refused and not save:
            tally.count(refused, len(page))
            continue
        known = header_fields(data[:at])
        yield {
            "text": page.decode("utf-8", "replace"), "id": known.get("warc-record-id"),
            "url": known.get("warc-target-uri"), "date": known.get("warc-date"), "refused": refused,
            "article": article}


def header_fields(head: bytes) -> dict[str, str]:
    """Return the fields of a WARC or HTTP header, their names in lower case."""
    pairs = (line.partition(":") for line in head.decode("utf-8", "replace").splitlines())
    return {name.strip().lower(): value.strip() for name, colon, value in pairs if colon}


def http_payload(block: bytes) -> tuple[dict[str, str], bytes]:
    """Return the fields and the body of an HTTP response. Archives often hold a body that is
    already joined and inflated below a header that says otherwise: the bytes decide."""
    fields, body = {}, block
    if re.match(rb"HTTP/\d", block):
        end = re.search(rb"\r?\n\r?\n|\Z", block)
        fields, body = header_fields(block[: end.start()]), block[end.end() :]
    chunked = "chunked" in fields.get("transfer-encoding", "").lower()
    if chunked or (CHUNK.match(body) and body.endswith(b"\r\n0\r\n\r\n")):
        body = join_chunks(body)
    while body.startswith(GZIP):  # some servers compress twice
        rest, body = body, b""
        while rest.startswith(GZIP):
            member = zlib.decompressobj(31)
            body += member.decompress(rest, MAX_RECORD)
            rest = member.unused_data
    if body.startswith(b"\x28\xb5\x2f\xfd"):
        body = zstandard.ZstdDecompressor().decompressobj().decompress(body)
    elif fields.get("content-encoding", "").lower() in ("br", "deflate"):
        raw_deflate = partial(zlib.decompress, wbits=-15)
        for inflate in (zlib.decompress, raw_deflate, brotli.decompress):
            with suppress(zlib.error, brotli.error):
                return fields, inflate(body)
    return fields, body


CHUNK = re.compile(rb"[ \t]*([0-9a-fA-F]{1,16})[^\r\n]{0,64}\r?\n")


def join_chunks(body: bytes) -> bytes:
    """Return a body without the sizes of its chunks, if it has any (RFC 9112, 7.1)."""
    at, parts = 0, []
    while size := CHUNK.match(body, at):
        length = int(size[1], 16)
        parts.append(body[size.end() : size.end() + length])
        at = size.end() + length + 2
        if not length:
            break
    return b"".join(parts) if parts else body


def html_page(block: bytes, judge: "Judge") -> tuple[bytes | None, str | None]:
    """Return the main text of an HTML response as UTF-8, and the rule that refuses the page. The
    text is None if the response is not HTML. Extraction takes 10 ms, so the scripts of the whole
    page are counted first, and a page that they refuse is not extracted."""
    fields, body = http_payload(block)
    kind = fields.get("content-type", "").lower()
    if "html" not in kind:
        markup = re.search(rb"(?i)<(?:!doctype\s+html|html|head|body)\b", body[:4096])
        if not markup or not re.match(r"$|text/plain|application/octet-stream|unknown", kind):
            return None, None
    if body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        body = body.decode("utf-16", "replace").encode("utf-8", "replace")
    high = np.count_nonzero(np.frombuffer(body, np.uint8) & 0x80)
    references = body.count(b"&#")
    if max(high, references) < judge.limits.min_length:
        return body, "han"
    page = decode_html(body, kind, judge)
    seen = html.unescape(page) if references else page
    if refused := judge.refuse_certain(judge.count(code_points(seen))):
        return body, refused
    text, index = extract(page)
    return text.encode("utf-8", "replace"), "index" if index else None


def decode_html(body: bytes, content_type: str, judge: "Judge") -> str:
    """Return a page as browsers read it (WHATWG Encoding, 4.2): header, meta, detection. Valid
    UTF-8 is UTF-8 whatever a label says; what no encoding explains becomes U+FFFD. A label is
    believed unless bytes do not fit it, or fit only as Han that nobody uses (Big5 read as GBK)."""
    from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

    with suppress(UnicodeDecodeError):
        return body.decode("utf-8-sig")
    meta = re.search(
        rb"(?i)<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]+)",
        re.sub(rb"(?s)<!--.*?-->", b"", body[:4096]))
    header = re.search(r"charset\s*=\s*[\"']?\s*([\w.:-]+)", content_type)
    told = [header[1] if header else "", meta[1].decode("ascii", "replace") if meta else ""]
    detected = map(detect_encoding, [body])  # only where no label explains the bytes
    best = None
    for label in chain(told, detected, ("utf-8", "big5", "gbk")):
        try:
            name = map_encoding_to_html5(label, fallback_utf8=False)
        except (LookupError, ValueError):
            name = None
        if not name or name == "cp1252":  # the label of servers that were never set up
            continue
        if name == "big5":
            codecs.register_error("luojiu_big5", big5_extension)
            page = body.decode("big5hkscs", "luojiu_big5")
        else:
            page = body.decode("gb18030" if name.startswith("gb") else name, "replace")
        counts = judge.count(code_points(page))
        lost = counts.broken + counts.rare
        if best is None or 4 * lost < best[0]:  # a later guess must be far better
            best = lost, page
        if lost < 0.005 * len(page) + 0.05 * han_characters(counts) and label in told:
            break
    return best[1]


def big5_extension(error: UnicodeError) -> tuple[str, int]:
    """Decode a pair that Big5-HKSCS lacks as code page 950 has it, or one U+FFFD; an ASCII byte
    after a stray lead byte stays (WHATWG Encoding, 12.1.1)."""
    pair = error.object[error.start : error.start + 2]
    with suppress(UnicodeDecodeError):
        return pair.decode("cp950"), error.start + 2
    return "\ufffd", error.start + (2 if len(pair) > 1 and pair[1] >= 0x80 else 1)


READINGS = re.compile(r"(?is)<r[tp]c?\b[^>]*>.*?(?=<r[tpb]c?\b|</r[tp]c?\s*>|</ruby)")
SILENT, BLOCKS = (frozenset(listed_words(name)) for name in ("html_silent", "html_blocks"))
# Classes of what a browser does not show as text: numbers of lines of code, names of icons.
UNREAD = re.compile(r"(?i)\b(?:gutter|line-?num(?:ber)?s?|linenos?|material-(?:icons|symbols))\b")
BESIDE = re.compile(  # names of elements, classes and ids beside an article
    r"(?i)(?:^|\s)(?:site-|page-)?header\b|"
    rf"(?:^|[\s_-])(?:{listed_pattern('html_beside').pattern})(?:$|[\s_-])")
TITLE = re.compile(r"(?i)h[1-6]\b|.* \S*(?:title|headline|subject)\b")
ELSEWHERE = re.compile(r"(?!javascript:)[^#]+")  # a link that leaves the page
WIDE = "[\u3000-\u9fff\uff00-\uffef]"
SOURCE_BREAK = re.compile(rf"(?<={WIDE})[ \t]*[\r\n]\s*(?={WIDE})")


def extract(page: str) -> tuple[str, bool]:
    """Return the article of an HTML page, whole, and whether it is an index of other pages.
    trafilatura (Barbaresi, ACL 2021) finds it, but loses what it does not know: text behind <wbr>
    and <rb>, tables, captions, short items, lines between <br>. So its text only says where the
    article is; all lines there are the article, but for menus and the like in which it found
    nothing."""
    import trafilatura
    from lxml import html
    from resiliparse.parse.html import HTMLTree

    # libxml2 stops at an early </html>, so an HTML5 parser reads the page first.
    tree = str(HTMLTree.parse(READINGS.sub("", page.replace("\x00", ""))))
    found = (trafilatura.extract(tree, include_comments=False) or "").split("\n")
    found = "".join("".join(line.removeprefix("- ").split()) for line in found)
    parser = html.HTMLParser(remove_comments=True, huge_tree=True)  # deeper than 255 elements
    body = html.fromstring(tree, parser=parser).find("body")
    lines = [] if body is None else page_lines(body)
    size, links, rows, hits = Counter(), Counter(), Counter(), Counter()  # of an element
    hit, end = [], 0
    for line, owner, linked in lines:
        words = "".join(line.removeprefix("- ").split())
        at = found.find(words, end, end + len(words) + 16)  # a short line only right behind
        if at < 0 and len(words) > 7:
            at = found.find(words)
        hit.append(at >= 0)
        end = at + len(words) if hit[-1] else end
        for element in (owner, *owner.iterancestors()):
            size[element] += len(line)
            links[element] += linked
            rows[element] += 1
            hits[element] += len(words) * hit[-1]
    if not hits[body]:
        return "\n".join(line for line, _, _ in lines), is_index(lines)
    place = body
    for element in body.iterdescendants(*BLOCKS):  # the innermost box that holds nearly all
        if hits[element] >= 0.9 * hits[body] and any(part.tag in BLOCKS for part in element):
            place = element
    inside = {place: True}  # is it a part of the article?
    for element in place.iterdescendants():
        name = f"{element.tag} {element.get('class', '')} {element.get('id', '')}"
        listed = rows[element] > 1 and 2 * links[element] > size[element]
        menu = links[element] and (listed or BESIDE.search(name))
        inside[element] = inside[element.getparent()] and not (menu and not hits[element])
    text = "\n".join(
        line for at, (line, owner, _) in enumerate(lines) if hit[at] or inside.get(owner))
    return text, is_index([line for line in lines if line[1] in inside])


def is_index(lines: list[tuple]) -> bool:
    """Whether most of the text stands in a few lines each below headings that link elsewhere."""
    headings = below = under = 0
    for line, owner, linked in lines:
        parts = [owner, *owner.iterchildren("span"), *owner.iterfind("a/*")]  # of a card too
        if any(TITLE.match(f"{part.tag} {part.get('class', '')}") for part in parts):
            inner = [*owner.iter("a"), *owner.iterancestors("a")]
            leads = any(ELSEWHERE.fullmatch(link.get("href", "")) for link in inner)
            under = leads and linked > 0.8 * len(line)
            headings += under
        below += under * len(line)
    total = sum(len(line) for line, _, _ in lines)
    return headings > 2 and 2 * below > total and below < 300 * headings


def page_lines(body) -> list[tuple]:
    """Return the lines of a page as a browser shows them, each with its element and the number of
    its characters that are links."""
    from lxml import etree

    lines, words, blocks, linked = [], [], [body], 0
    preformatted = link = 0  # how many such elements are open

    def end_line() -> None:
        nonlocal linked
        text = SOURCE_BREAK.sub("", "".join(words)) if not preformatted else "".join(words)
        for line in text.split("\n") if preformatted else [" ".join(text.split())]:
            if line.strip(" -\t\r"):
                lines.append((line.rstrip(), blocks[-1], min(linked, len(line))))
        words.clear()
        linked = 0

    walk = etree.iterwalk(body, events=("start", "end"))
    for event, element in walk:
        tag, text = element.tag, element.text if event == "start" else element.tail
        silent = tag in SILENT and not (tag == "button" and TITLE.match(blocks[-1].tag))
        if event == "start" and (silent or UNREAD.search(element.get("class", ""))):
            walk.skip_subtree()
            continue
        if event == "start":
            cell = tag in ("td", "th") and any(part.tag in BLOCKS for part in element.iter("*"))
            if cell or tag in BLOCKS or tag == "br":
                end_line()
            if cell or tag in BLOCKS:
                blocks.append(element)
            words.append({"li": "- ", "td": " ", "th": " "}.get(tag, ""))
        elif blocks[-1] is element:
            end_line()
            blocks.pop()
        opened = 1 if event == "start" else -1
        preformatted += opened * (tag == "pre")
        link += opened * (tag == "a")
        words.append(text or "")
        linked += link and len((text or "").strip())
    end_line()
    return lines


# --- Rows out of JSONL and Parquet ---------------------------------------------------------------


def as_text(value: Any) -> str | None:
    """Return a string of valid Unicode: UTF-8 bytes decoded, surrogate pairs joined and lone ones
    U+FFFD; None if the value is neither string nor bytes."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode(
            "utf-16", "replace")
    return None


def as_label(value: Any) -> str | None:
    """Return a date, an id or an address of any type as a string; None for null, NaN and empty."""
    if value is None or value != value or isinstance(value, list | dict):
        return None
    return as_text(value if isinstance(value, bytes) else str(value)) or None


def jsonl_rows(stream, damage: Callable) -> Iterator[tuple[int, dict]]:
    """Yield the objects of a file of JSON lines with their number. A row is damaged alone."""
    number, stream = 0, io.BufferedReader(stream, BLOCK)
    lines = decompressed(stream, stream.peek(6))
    with broken_compression(damage):
        while line := lines.readline(MAX_RECORD):
            number += 1
            rest = line
            while len(rest) == MAX_RECORD and not rest.endswith(b"\n"):  # go to the row's end
                rest = lines.readline(MAX_RECORD)
            if rest is not line:
                damage("oversized row", number)
                continue
            if not (line := line.strip().lstrip(codecs.BOM_UTF8)):
                continue
            text = line.decode("utf-8", "replace")
            if text.count("\ufffd") - line.count(b"\xef\xbf\xbd") > 0.002 * len(text) + 2:
                damage("row that is not UTF-8", number)
                continue
            try:
                row = json.loads(text, strict=False)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield number, row
            else:
                damage("row that is not a JSON object", number)


def parquet_rows(file, column: str | None, damage: Callable) -> Iterator[tuple[int, dict]]:
    """Yield the rows of a Parquet file with their number, the columns that are used alone. A row
    group is damaged alone."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parquet, number = pq.ParquetFile(file), 0
    used = {column, *TEXT_COLUMNS, "id", "url", "date", "metadata"}
    names = [name for name in parquet.schema_arrow.names if name in used]
    if not set(names) & {column, *TEXT_COLUMNS}:
        damage(f"no column of text (there are {', '.join(parquet.schema_arrow.names)[:200]})")
        return
    for group in range(parquet.num_row_groups):
        try:
            for batch in parquet.iter_batches(100, row_groups=[group], columns=names):
                columns = {name: plain_values(batch.column(name)) for name in batch.schema.names}
                for values in zip(*columns.values(), strict=True):
                    number += 1
                    yield number, dict(zip(columns, values, strict=True))
        except (pa.ArrowException, OSError, ValueError) as error:
            if getattr(error, "errno", None) is not None:
                raise
            damage(f"row group that does not read ({type(error).__name__})", number)


def text_rows(path: str, column: str | None, damage: Callable) -> Iterator[tuple[int, dict, Any]]:
    """Yield the rows of a JSONL or Parquet file, each with its number and what stands in its column
    of text: the one asked for, else the first of TEXT_COLUMNS that it has."""
    names = (column,) if column else TEXT_COLUMNS
    with fsspec.open(path, "rb") as stream:
        if path.endswith(".parquet"):
            rows = parquet_rows(stream, column, damage)
        else:
            rows = jsonl_rows(stream, damage)
        for number, row in rows:
            if isinstance(nested := row.get("metadata"), dict):
                row = nested | row
            yield number, row, next((row[n] for n in names if row.get(n) is not None), None)


def plain_values(column) -> list:
    """Return a column's values; strings as their bytes, whatever they hold, and other types as
    strings where Arrow has a way to write them."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    for kind in () if pa.types.is_nested(column.type) else (pa.large_binary(), pa.string()):
        with suppress(pa.ArrowException):
            return column.cast(kind).to_pylist()
    return column.to_pylist()


def row_pages(path: str, tally: Tally, damage: Callable, judge: "Judge") -> Iterator[dict]:
    """Yield the pages of a JSONL or Parquet file whose bytes no rule refuses; with --save_rejected
    the others as well, with the rule under "refused"."""
    for number, row, given in text_rows(
            path, judge.limits.text_column, lost_unread(tally, damage)):
        tally.read += 1
        text = as_text(given)
        if text is None:
            what = "without a text" if given is None else "whose text is no string"
            damage(f"row {what}", number)
            continue
        page = text.encode("utf-8", "replace")
        refused = judge.refuse_bytes(page)
        if refused and not judge.limits.save_rejected:
            tally.count(refused, len(page))
            continue
        name = row.get("id")
        name = as_text(name) if isinstance(name, str | bytes) else None
        if name and "\ufffd" in name:  # others may look the same
            name = None
        yield {
            "text": text, "id": name or f"{path}:{number}", "refused": refused,
            "url": as_label(row.get("url")), "date": as_label(row.get("date")), "article": False}


# --- Verdicts ------------------------------------------------------------------------------------


class Scripts(NamedTuple):
    """How many characters of each script a text has; the five of Han come in one run."""

    other: int
    common: int  # in Traditional and Simplified text alike
    traditional: int
    simplified: int
    rare: int
    cantonese: int
    kana: int
    hangul: int
    letter: int
    broken: int
    invisible: int  # no property here: dill, which takes this to the workers, would lose it


def han_characters(counts: Scripts) -> int:
    """Return the number of Han characters."""
    return sum(counts[1:6])


def script_table() -> np.ndarray:
    """Return for every code point the place of its script in Scripts.

    OpenCC's tables say which characters only Traditional or only Simplified text has. Simplified
    forms that Big5 holds as well (后, 里, 台) say nothing. Big5 level 1 (lead bytes A4 to C6) is
    the 5,401 characters that Taiwan's schools and newspapers use.
    """
    from opencc import OpenCC

    table = np.zeros(1 << 16, np.uint8)  # what lies beyond is rare: the last place stands for it
    table[0x3040:0x3100] = Scripts._fields.index("kana")
    table[0xAC00:0xD7A4] = table[0x1100:0x1200] = Scripts._fields.index("hangul")
    table[0xE000:0xF900] = table[0xFFFD] = Scripts._fields.index("broken")
    invisible = [code for code in range(1 << 16) if INVISIBLE.match(chr(code))]
    table[invisible] = Scripts._fields.index("invisible")
    table[0x3400:0x4E00] = table[0xF900:0xFB00] = Scripts._fields.index("rare")
    table[[code for code in range(0x1100) if chr(code).isalpha()]] = Scripts._fields.index("letter")
    han = [chr(code) for code in range(0x4E00, 0xA000)]
    to_simplified, to_traditional = (
        OpenCC(name).convert("\n".join(han)).split("\n") for name in ("t2s", "s2t"))
    for char, simple, full in zip(han, to_simplified, to_traditional, strict=True):
        big5 = char.encode("big5", errors="ignore")
        if simple != char:
            script = "traditional"
        elif char in "个":  # standard Hakka of Taiwan has it
            script = "rare"
        elif full != char and not big5:
            script = "simplified"
        else:
            script = "common" if big5 and big5[0] <= 0xC6 else "rare"
        table[ord(char)] = Scripts._fields.index(script)
    table[list(map(ord, CANTONESE))] = Scripts._fields.index("cantonese")
    return table


def opencc_table(name: str) -> dict[str, list[str]]:
    """Return one of OpenCC's dictionaries."""
    import opencc

    folder = Path(opencc.__file__).parent / "clib"
    command = [folder / "bin" / "opencc_dict", "-f", "ocd2", "-t", "text", "-o", "/dev/stdout"]
    command += ["-i", folder / "share" / "opencc" / f"{name}.ocd2"]
    table = subprocess.run(command, capture_output=True, check=True, encoding="utf-8").stdout
    rows = (line.partition("\t") for line in table.splitlines())
    return {word: values.split() for word, _, values in rows}


def word_kinds() -> dict[str, str]:
    """Return listed words and what each tells. OpenCC's TWPhrases pair mainland words, in
    Traditional glyphs, with Taiwan's."""
    import opencc

    to_taiwan = opencc.OpenCC("t2tw").convert
    words = {}
    for word, values in opencc_table("TWPhrases").items():
        if word not in values and len(word) > 1:
            words[to_taiwan(word)] = "mainland"
    for kind in (
        "shared", "mainland", "topic", "hongkong", "hongkong_topic", "taiwan", "report", "spam",
        "spun", "terms"):
        words |= dict.fromkeys(listed_words(kind), kind)
    for word, kind in words.items():
        if len(word) == 1:
            raise UserError(
                f"data/filter/{kind}.txt: {word}: a single character; expected two or more, for it"
                " is part of too many words; take it out")
    return words


def converted_words() -> tuple[dict[str, int], set[str]]:
    """Return words of two characters that only a wrong conversion writes (麵前, 隻聽, 嶽母), each
    with the place of the wrong one, and the right words that hold such a character. Of a Simplified
    character that stands for several Traditional ones, OpenCC's phrases say which is right; the
    others, where no phrase of OpenCC and no Big5 variant has them, are wrong."""
    import opencc

    to_taiwan = opencc.OpenCC("t2tw").convert
    several = opencc_table("STCharacters")
    phrases = opencc_table("STPhrases")
    right = {word for full in phrases.values() for word in full}
    right |= set(map(to_taiwan, right))
    right = {word[at : at + 2] for word in right for at in range(len(word) - 1)}
    wrong = {}
    for simple, full in phrases.items():
        if len(simple) != 2 or len(full) > 1:
            continue
        for at in (0, 1):
            # the first is the usual one; most characters that were not converted are in use
            others = {*several.get(simple[at], ())[1:], *simple[at]}
            for other in others - ({simple[at]} - {*UNCONVERTED}):
                wrong[full[0][:at] + other + full[0][at + 1 :]] = at
    words = to_taiwan("\n".join(wrong)).split("\n")
    wrong = {word: at for word, at in zip(words, wrong.values(), strict=True) if word not in right}
    chars = {word[at] for word, at in wrong.items()}
    return wrong, {word for word in right if chars.intersection(word)}


class Words:
    """Finds listed words, the longest first. A table of the hashes of their first two characters
    lets numpy point out the few places that are worth a look."""

    def __init__(self, kinds: dict[str, str], wrong: dict[str, int], right: set[str]):
        self.wrong, self.right = wrong, right
        self.kinds, self.lengths = dict.fromkeys(wrong, "converted") | kinds, {}
        self.starts = np.zeros(1 << 20, bool)
        for word in sorted(self.kinds, key=len, reverse=True):
            self.lengths.setdefault(word[:2], []).append(len(word))
            self.starts[self.hashes(code_points(word[:2]))] = True

    def hashes(self, codes: np.ndarray) -> np.ndarray:
        """Return 20 bits for every two characters."""
        return shingles(codes, 2) >> np.uint32(12)

    def count(self, text: str, codes: np.ndarray) -> Counter:
        """Return the listed words in the text and how often each is there."""
        found, end = Counter(), 0
        for at in self.starts.take(self.hashes(codes)).nonzero()[0].tolist():
            if at < end:
                continue
            for length in self.lengths.get(text[at : at + 2], ()):
                word = text[at : at + length]
                if word in self.kinds and not self.is_joint(text, at, word):
                    found[word] += 1
                    end = at + length
                    break
        return found

    def is_joint(self, text: str, at: int, word: str) -> bool:
        """Whether a word that looks wrongly converted is part of two right words: 要瞭 in 要瞭解,
        併時 in 合併時."""
        if self.kinds[word] != "converted":
            return False
        wrong = at + self.wrong[word]
        return (text[at - 1 : at + 1] if wrong == at else text[wrong : wrong + 2]) in self.right


class Judge:
    """The rules with their limits and tables."""

    def __init__(self, limits: Arguments):
        kinds = word_kinds()
        self.limits, self.scripts = limits, script_table()
        self.words = Words(kinds, *converted_words())
        spam = {word: kind for word, kind in kinds.items() if kind in ("spam", "report")}
        self.spam_words = Words(spam, {}, set())  # few, and so found in a quarter of the time

    def count(self, codes: np.ndarray) -> Scripts:
        """Count characters by script."""
        scripts = self.scripts.take(codes, mode="clip")
        return Scripts._make(np.bincount(scripts, minlength=len(Scripts._fields)).tolist())

    def refuse_bytes(self, page: bytes) -> str | None:
        """Return the rule that refuses a page for its UTF-8 bytes: E4 to E9 begin nearly all Han.
        Much of a page may be menus in English, so only a page nearly without Han is refused for
        its share; then its characters are counted."""
        leads = 0 if page.isascii() else lead_bytes(page)
        if not leads or 30 * leads < len(page):
            return "han"
        return self.refuse_certain(self.count(code_points(page.decode("utf-8", "replace"))))

    def glance(self, start: bytes) -> str | None:
        """Return the rule that refuses a page for its first 1,000 bytes or so, where Simplified
        characters leave no doubt. What else stands there may be a menu."""
        if start.isascii() or lead_bytes(start) < 100:
            return None
        counts = self.count(code_points(start.decode(errors="ignore")))
        return "simplified" if counts.simplified > 20 * counts.traditional + 20 else None

    def refuse_certain(self, counts: Scripts) -> str | None:
        """Return the rule that refuses a page even if only a part of it is the article."""
        han = han_characters(counts)
        if counts.simplified > 10 * counts.traditional:
            return "simplified"
        if counts.kana + counts.hangul > 2 * han:
            return "japanese_korean"
        if han < self.limits.min_length:
            return self.refuse_scripts(counts) or ("length" if han else "han")
        return None

    def refuse_scripts(self, counts: Scripts) -> str | None:
        """Return the rule that refuses a page for its scripts."""
        other = counts.kana + counts.hangul
        if other > self.limits.max_kana_hangul * (han_characters(counts) + other):
            return "japanese_korean"
        telling = counts.traditional + counts.simplified
        few = counts.traditional < self.limits.min_traditional * telling
        return "simplified" if few else None

    def verdict(
        self, text: str, article: bool = False, refused: str | None = None
    ) -> tuple[str, dict, str | None]:
        """Return a page's prose, its scores, and the rule that refuses it (None: it is good). The
        bytes of the page may have refused it before."""
        scores = {}
        if refused:
            return text, scores, refused
        counts = self.count(code_points(text))
        page = INVISIBLE.sub("", text) if counts.invisible else text
        text = clean_lines(page, article)
        for rule, broken in self.checks(text, page, han_characters(counts), scores):
            if broken:
                return text, scores, rule
        return hide_private(text), scores, None

    def checks(
        self, text: str, page: str, page_han: int, scores: dict
    ) -> Iterator[tuple[str | None, bool]]:
        """Yield the rules, cheap ones first, each with whether the text of the page breaks it; fill
        in `scores` on the way."""
        limits, codes = self.limits, code_points(text)
        counts = self.count(codes)
        han = han_characters(counts)
        lost = text.count("?") > 0.04 * len(text)  # characters that another encoding did not have
        yield "mojibake", lost or counts.broken > max(5, limits.max_broken * len(text))
        scripts = self.refuse_scripts(counts)
        yield scripts, scripts is not None
        yield "length", han < limits.min_length
        prose = "\n".join(filter(is_language, text.split("\n")))
        dense = code_points(prose)
        letters = self.scripts.take(dense, mode="clip") == Scripts._fields.index("letter")
        words = int(letters[:1].sum() + np.count_nonzero(letters[1:] & ~letters[:-1]))
        dense = dense[dense >= 0x3400]  # code, formulas and tables repeat themselves
        scores["han"] = han / (han + counts.kana + counts.hangul + words)
        scores["traditional"] = counts.traditional / max(1, counts.traditional + counts.simplified)
        yield "han", scores["han"] < limits.min_han
        spoken = counts.cantonese > limits.max_cantonese * han
        yield "cantonese", spoken and len(set(CANTONESE).intersection(text)) > 2
        yield "mojibake", counts.rare > limits.max_rare * han
        yield "mojibake", len(APART.findall(text)) > limits.max_apart * han
        scores["distinct"] = distinct_share(shingles(dense[:1000], 2))
        yield "repetition", scores["distinct"] < limits.min_distinct
        scores["repeated"] = 1 - distinct_share(shingles(dense, 10))
        scores["top"] = 4 * most_frequent(shingles(dense, 4)) / max(1, len(dense))
        yield "repetition", scores["repeated"] > limits.max_repeated
        yield "repetition", scores["top"] > limits.max_top
        scores["closing"] = closing_share(prose)
        yield "punctuation", scores["closing"] < limits.min_closing
        chinese = "\n".join(filter(HAN.search, prose.split("\n")))
        scores["digits"] = len(DIGIT.findall(chinese)) / max(1, len(chinese))
        yield "digits", scores["digits"] > limits.max_digits
        scores["pronouns"] = sum(map(text.count, PRONOUNS)) / han
        scores |= self.usage(text, codes, han)
        # Lists of search words went with the menus. Spam beside an article may be three times it.
        stuffed = self.spam(self.spam_words.count(page, code_points(page)), page_han)
        scores["spam"] = max(scores["spam"], stuffed / 3)
        for rule in SCORES[SCORES.index("pronouns") :]:
            yield rule, scores[rule] > getattr(limits, f"max_{rule}")

    def usage(self, text: str, codes: np.ndarray, han: int) -> dict[str, float]:
        """Return the scores of wording, per 1,000 Han: mainland, Hong Kong, converted, spam, spun
        and terms. A word counts once, however often it occurs (but for spam), so that no topic
        decides. Words of a topic (places, institutions) count at most as much as the other words of
        the same kind. Taiwan's own words are subtracted."""
        found = self.words.count(text, codes)
        kinds = Counter(map(self.words.kinds.get, found))
        curly = 0 if "「" in text else min(2, len(CURLY.findall(text)))
        mainland = kinds["mainland"] + curly + sum(map(text.count, VARIANTS))
        mainland += min(mainland, kinds["topic"]) - kinds["taiwan"]
        hongkong = kinds["hongkong"]
        hongkong += min(hongkong, kinds["hongkong_topic"]) - kinds["taiwan"]
        few = 1000 / min(han, 1000)
        return {
            "mainland": few * mainland if mainland > 1 else 0.0,
            "hongkong": few * hongkong if hongkong > 2 else 0.0,
            "converted": few * kinds["converted"] if kinds["converted"] > 2 else 0.0,
            "spam": self.spam(found, han),
            "spun": few * kinds["spun"] if kinds["spun"] > 2 else 0.0,
            "terms": few * kinds["terms"] if kinds["terms"] > 4 else 0.0}

    def spam(self, found: Counter, han: int) -> float:
        """Return the spam words per 1,000 Han, less those of a report about it."""
        kinds, times = Counter(map(self.words.kinds.get, found)), Counter()
        for word, number in found.items():
            times[self.words.kinds[word]] += number
        report = 2 * times["report"] if kinds["report"] >= kinds["spam"] else 0
        spam = times["spam"] - report if kinds["spam"] > 1 else 0
        return 1000 * max(0, spam) / han


def lead_bytes(text: bytes) -> int:
    """Count the bytes that begin Han characters in UTF-8, nearly all of them."""
    return len(text) - len(text.translate(None, HAN_LEADS))


def clean_lines(text: str, article: bool = False) -> str:
    """Return the lines that are prose, headings or verse, without menus, footers and notices. If
    the text is known to be an article, lines between paragraphs stay unless they look like a
    menu."""
    lines = text.splitlines()
    marks = [at for at, line in enumerate(lines) if line.lstrip().startswith(FENCES)]
    listings = zip(marks[::2], marks[1::2], strict=False)  # between two fences
    code = {at for first, last in listings for at in range(first, last + 1)}
    rows = [
        (line.rstrip(), "prose") if at in code else (single_spaced(line), None)
        for at, line in enumerate(lines)]
    subtitles = text.count(" --> ") > 3
    rows = [row for row in rows if row[0] and not (subtitles and TIMING.fullmatch(row[0]))]
    lines = [line for line, _ in rows]
    kinds = [kind or line_kind(line) for line, kind in rows]
    if {"furniture", "table", "short"}.intersection(kinds):
        drop_links(lines, kinds)
        drop_islands(lines, kinds)
    kept, start = [], 0
    for at, kind in enumerate([*kinds, "end"]):
        if kind in ("prose", "end"):
            if start < at:
                kept += block_lines(
                    lines[start:at], kinds[start:at], lead=lines[start - 1] if start else "",
                    before_prose=kind == "prose", article=article)
            kept += lines[at : at + 1]
            start = at + 1
    return "\n".join(kept)


def single_spaced(line: str) -> str:
    """Return a line with single spaces; indented code stays as it is."""
    words = " ".join(line.split())
    if "\u3000" in line.strip():  # Chinese sets words apart with it
        words = re.sub(r"[^\S\u3000]+", " ", line).strip()
    code = line[:1] in (" ", "\t") and CODE.search(words) and not HAN.search(words)
    return line.rstrip() if code else words


def drop_links(lines: list[str], kinds: list[str]) -> None:
    """Mark the lines below a heading like 延伸閱讀 or 留言 as furniture, to the next paragraph."""
    links = comments = False
    read = 0
    for at, line in enumerate(lines):
        if prose := kinds[at] == "prose":
            read += len(line)
            closed = not comments and line.endswith(PARAGRAPH)
        if prose and (closed or len(line) > (100 if comments else 45)):
            links = comments = False
        elif not prose and read >= 100 and COMMENTS.fullmatch(line.lower()):
            comments = True
        elif kinds[at] == "furniture" and PAYWALL.search(line.lower()):
            comments = True  # what follows are offers
        elif not prose and len(line) < 20 and RELATED.search(line.lower()):
            links, kinds[at] = True, "furniture"
        elif comments or (links and (prose or kinds[at + 1 : at + 2] != ["prose"])):
            kinds[at] = "furniture"


def drop_islands(lines: list[str], kinds: list[str]) -> None:
    """Mark short prose that stands alone among the menus below the article as furniture."""
    runs, at = [], 0
    for furniture, run in groupby(kinds, lambda kind: kind in ("furniture", "table")):
        place = range(at, at := at + len(list(run)))
        prose = [len(lines[line]) for line in place if kinds[line] == "prose"]
        runs.append((place, furniture, prose))
    ends = [number for number, (_, _, prose) in enumerate(runs) if sum(prose) >= 100]
    apart = 0
    for place, furniture, prose in runs[ends[-1] + 1 :] if ends else ():
        if furniture:
            apart += sum(kinds[line] != "table" or not DATA.search(lines[line]) for line in place)
        if apart > 3 and prose and max(prose) < 60:
            for line in place:
                kinds[line] = "furniture"


def line_kind(line: str) -> str:
    """Return "prose" for a line that holds a sentence, "furniture", "table" for what looks like
    furniture but may be data or code, or "short" for what may be a heading, a verse or a menu: its
    neighbours tell."""
    sentence = SENTENCE.search(line) or (
        len(line) > 60 and line.endswith(CLOSING) and not (HAN.search(line) and is_table(line)))
    if sentence and len(line) > 300:
        return "prose"
    low = line.lower()
    contacts = len(CONTACT.findall(low)) if ":" in line or "：" in line else 0
    if not contacts and " " in line[:8] and CONTACT_LINE.match(low):
        contacts = 1
    if not sentence and len(line) > 11 and line[-1] in ":：" and not contacts and HAN.search(line):
        return "prose"  # it leads to a list, a formula or a listing
    letters = len(line) if sentence or line.isalpha() else sum(map(str.isalpha, line))
    if not letters:
        return "table"
    heading = not sentence and NUMBERED.match(line)
    menu = 0 if sentence or heading else sum(map(len, FURNITURE.findall(low)))
    if (
        (menu and menu >= 0.4 * letters)
        or contacts > 1 or (contacts and len(line) < 60)
        or (len(line) < 160 and NOTICE.search(low) and is_notice(low))
        or (len(line) < 45 and not line.endswith("。") and PROMPT.search(low))
        or (len(line) < 60 and PAYWALL.search(low))
        or (len(line) < 11 and line[-1] == "*") or line.startswith("^ ")):
        return "furniture"
    about = len(line) < 60 and ABOUT.match(line) and not ENDED.search(line)
    if about and not heading and not FORMULA.search(line):
        return "table"
    foreign = len(line) < 30 and LATIN.search(low) and not HAN.search(line)
    if sentence and not foreign:
        card = len(line) < 120 and "。" not in line and len(PLACEHOLDER.findall(hide_private(line)))
        return "furniture" if card > 1 else "prose"
    if ITEM.match(line) and not menu and HAN.search(line):
        return "prose"  # of a list in an article, as trafilatura and Markdown mark it, or of a test
    if hide_private(line) != line or (menu and SEPARATORS.search(line)):
        return "furniture"
    if heading or FORMULA.search(line):
        return "short"
    return "table" if foreign or is_table(line) else "short"


def is_table(line: str) -> bool:
    """Whether a line is a row of short items."""
    items = SEPARATORS.split(line)
    return len(items) > 2 and len(line) < 7 * len(items)


def is_notice(line: str) -> bool:
    """Whether the sentences of a notice are half of a line; one in a paragraph leaves it prose."""
    return 2 * sum(len(part) for part in STOPS.split(line) if NOTICE.search(part)) >= len(line)


def block_lines(
    lines: list[str], kinds: list[str], lead: str, before_prose: bool, article: bool
) -> list[str]:
    """Return the lines to keep of a block between lines of prose: headings, verse, what the line of
    prose above it (`lead`) announces, and data and code. Data and code stay only in a block without
    words of menus."""
    plain = "furniture" not in kinds
    if plain and len(lines) < 30 and (lead.endswith(COLONS) or lines[0].endswith(COLONS)):
        return lines
    if plain and before_prose and not lead and len(lines) < 3:  # a title, however it looks
        return [line for line in lines if not ABOUT.match(line)]
    if plain and lead and (before_prose or article):
        data = [  # code, numbers, sentences of another language
            line for line in lines if not ABOUT.match(line) and (
                DATA.search(line) or (line.endswith(CLOSING) and not HAN.search(line)))]
        if article or 2 * len(data) >= len(lines):
            return lines
    if "short" not in kinds:
        return []
    pairs, verse = list(zip(lines, kinds, strict=True)), []
    for furniture, run in groupby(pairs, lambda pair: pair[1] == "furniture"):
        if furniture:
            continue
        run = list(run)
        while run and run[-1][1] == "table":
            run.pop()
        run = [line for line, kind in run if kind == "short" or not (
            DATA.search(line) or LATIN.search(line.lower()) or ABOUT.match(line))]
        if is_verse(run):
            verse += run
    if verse:
        return verse
    if not before_prose:
        return []
    while pairs and pairs[-1][1] == "table" and ABOUT.match(pairs[-1][0]):  # a byline
        pairs.pop()
    first = 1 + max((at for at, (_, kind) in enumerate(pairs) if kind != "short"), default=-1)
    first = first if len(pairs) - first < 4 else len(pairs) - 1  # more of them are a menu
    return [
        line for at, (line, kind) in enumerate(pairs) if kind == "short" and (
            NUMBERED.match(line) or (at >= first and (not first or len(line) > 5)))]


def hide_private(text: str) -> str:
    """Put placeholders in the place of e-mail and IP addresses, national ids and phone numbers,
    full-width ones too: they are sought where full-width characters are ASCII."""
    lines = text.split("\n")
    for at, line in enumerate(lines):
        if not (NUMBER.search(line) or "@" in line or "＠" in line):
            continue
        for pattern, placeholder in PRIVATE:
            plain = line.translate(HALF_WIDTH) if FULL_WIDTH.search(line) else line
            for match in reversed([*pattern.finditer(plain)]):
                line = line[: match.start()] + placeholder + line[match.end() :]
        lines[at] = line
    return "\n".join(lines)


def utf8_bytes(text: str) -> int:
    """Return the number of bytes of a text in UTF-8."""
    return len(text.encode("utf-8", errors="replace"))


def code_points(text: str) -> np.ndarray:
    """Return the text's characters as numbers."""
    return np.frombuffer(text.encode("utf-32-le", errors="replace"), np.uint32)


def distinct_share(hashes: np.ndarray) -> float:
    """Return the share of hashes that do not repeat an earlier one."""
    hashes = np.sort(hashes)
    return 1 - np.count_nonzero(hashes[1:] == hashes[:-1]) / max(1, len(hashes))


def is_language(line: str) -> bool:
    """Whether a line is language rather than code: it holds Han, or no sign of code."""
    return bool(HAN.search(line)) or not CODE.search(line)


def most_frequent(hashes: np.ndarray) -> int:
    """Return how often the most frequent hash occurs; 0 for three times or fewer."""
    hashes = np.sort(hashes)
    starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1], [True]]))
    most = int(np.diff(starts).max(initial=0))
    return most if most > 3 else 0


def closing_share(prose: str) -> float:
    """Return the share of characters in lines that are sentences, or verse without any mark. Lines
    of code are left out before."""
    lines = prose.split("\n")
    closed = 0
    for ends, run in groupby(lines, is_closed):
        run = list(run)
        if ends or (is_verse(run) and sum(map(len, run)) <= 20 * len(run)):
            closed += sum(map(len, run))
    return closed / max(1, sum(map(len, lines)))


def is_closed(line: str) -> bool:
    """Whether a line ends like a sentence, holds the end of one, or runs on after a comma, as in
    mail and on boards. A line that is cut, with ... or a link to the rest, is an excerpt."""
    if len(line) > 15 and EXCERPT.search(line[-60:].lower()):
        return False
    ended = line.endswith(CLOSING) or ENDED.search(line)
    return bool(ended) or (("，" in line or "," in line) and has_grammar(line))


def is_verse(lines: list[str]) -> bool:
    """Whether short lines are verse or talk: these have grammar, menus only names. A refrain may
    come again."""
    letters = "".join(lines)
    different = len(lines) > 3 and len(set(lines)) >= 0.7 * len(lines)
    contents = 2 * sum(NUMBERED.match(line) is not None for line in lines) > len(lines)
    return different and not contents and len(letters) >= 5 * len(lines) and has_grammar(letters)


def has_grammar(text: str) -> bool:
    """Whether 6 of 100 characters are function words."""
    return sum(map(text.count, FUNCTION_WORDS)) >= 0.06 * len(text)


def shingles(codes: np.ndarray, size: int) -> np.ndarray:
    """Return a 32-bit hash of every run of `size` characters: a polynomial in their mixed codes
    (Karp and Rabin 1987)."""
    mixed = codes * np.uint32(0x9E3779B1)
    mixed ^= mixed >> np.uint32(15)
    count = max(0, len(codes) - size + 1)
    hashes = mixed[:count].copy()
    for at in range(1, size):
        hashes *= np.uint32(0x85EBCA6B)
        hashes += mixed[at : at + count]
    return hashes


# --- Likeness to a trusted text ------------------------------------------------------------------


def gram_buckets(text: str) -> np.ndarray:
    """Return the bucket (20 bits of a hash) of every run of one and of two characters."""
    codes = code_points(text)
    codes = codes[codes > 32]
    return np.concatenate([shingles(codes, 1), shingles(codes, 2)]) >> np.uint32(12)


def gram_shares(texts: Iterator[str]) -> np.ndarray:
    """Return the share of each bucket among the runs of characters of all texts."""
    counts = np.zeros(1 << 20)
    for text in texts:
        counts += np.bincount(gram_buckets(text), minlength=len(counts))
    return counts / max(1, counts.sum())


def trusted_texts(path: str) -> Iterator[str]:
    """Yield the text of --like: the rows of JSON lines or Parquet, or a plain text in parts."""
    if READABLE.search(path):
        texts = (as_text(given) for _, _, given in text_rows(path, None, lambda *what: None))
        yield from filter(None, texts)
        return
    with open(path, encoding="utf-8", errors="replace") as text:
        yield from iter(lambda: text.read(1 << 20), "")


def like_scores(like: str, paths: list[Path]) -> list[np.ndarray]:
    """Return for each page of Parquet files how much more likely it is in the trusted text than in
    the crawl, as a logarithm: hashed n-grams as in DSIR (Xie et al. 2023, section 3). The model of
    the trusted text is half the crawl's (Jelinek and Mercer 1980), so that no bucket weighs less
    than log 1/2."""
    import pyarrow.parquet as pq

    def texts(path: Path) -> Iterator[list[str]]:
        for batch in pq.ParquetFile(path).iter_batches(1000, columns=["text"]):
            yield batch.column("text").to_pylist()

    trusted = gram_shares(trusted_texts(like))
    crawl = gram_shares("\n".join(batch) for path in paths for batch in texts(path))
    ratio = np.divide(trusted, crawl, out=np.ones_like(crawl), where=crawl > 0)
    table, scores = np.log((ratio + 1) / 2).astype(np.float32), []
    for path in tqdm(paths, desc="like", unit="file"):
        found = [table[gram_buckets(text)].mean() for batch in texts(path) for text in batch]
        scores.append(np.array(found, np.float32))
    return scores


# --- Steps for datatrove -------------------------------------------------------------------------

# A step is a generator, whose first arguments functools.partial fills in. datatrove calls it with
# what the step before it yields, with the task's number, and with the number of tasks.


def file_pages(path: str, tally: Tally, judge: Judge) -> Iterator[dict]:
    """Yield the pages of a file. A file that cannot be read is damage, if it is on this machine."""
    from datatrove.utils.logging import logger

    def damage(kind: str, row: int | None = None) -> None:
        tally.damage[kind] += 1
        logger.warning(f"{path}{f', row {row}' if row else ''}: {kind}")

    try:
        if re.search(r"\.(wet|warc)(\.\w+)?$", path):
            with fsspec.open(path, "rb") as stream:
                yield from read_pages(stream, tally, damage, judge)
        else:
            yield from row_pages(path, tally, damage, judge)
    except Exception as error:
        if "://" in path:  # the network's fault: the task fails, and runs again
            raise ConnectionError(f"{path} ({type(error).__name__}: {error})") from error
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        lost_unread(tally, damage)(f"unreadable file ({type(error).__name__})")


def judged_pages(
    listing: Path, tallies: str, judge: "Pickled", rejected: Any, data: None, rank: int,
    world_size: int
) -> Iterator:
    """Read the listed files, count what they hold, and yield the pages that no rule refuses, clean
    and with their scores; `rejected` gets the others."""
    from datatrove.data import Document
    from datatrove.utils.batching import batched

    tally, judge = Tally(tallies.format(rank)), judge.load()
    with rejected or nullcontext():
        for path in listing.read_text(encoding="utf-8").split("\n")[rank::world_size]:
            for batch in batched(file_pages(path, tally, judge), 100):  # the tables stay in cache
                verdicts = [judge.verdict(p["text"], p["article"], p["refused"]) for p in batch]
                for page, (text, scores, refused) in zip(batch, verdicts, strict=True):
                    known = {"url": page["url"], "date": page["date"]} | scores
                    document = Document(text, str(page["id"]), metadata=known)
                    before, after = utf8_bytes(page["text"]), utf8_bytes(text)
                    tally.count(refused or "kept", before if refused else after)
                    if not refused:
                        tally.bytes["lines"] += before - after
                        yield document
                    elif rejected:
                        document.text, known["filter_reason"] = page["text"], refused
                        rejected.write(document, rank)
                tally.save(every=1.0)
            tally.files += 1
    tally.save()


def kept_pages(
    folder: Path, names: list[str], data: None, rank: int, world_size: int) -> Iterator:
    """Read what a task of the first pass kept; it wrote no file if that was nothing."""
    import pyarrow.parquet as pq
    from datatrove.data import Document

    path = folder / names[rank]
    for batch in pq.ParquetFile(path).iter_batches(1000) if path.exists() else ():
        for row in batch.to_pylist():
            yield Document(row.pop("text"), row.pop("id"), metadata=row)


def one_of_each(
    clusters: str, tallies: str, rejected: Any, data: Iterator, rank: int, world_size: int
) -> Iterator:
    """Keep one page of each cluster of near duplicates and say how many copies it had."""
    def numbers(kind: str) -> np.ndarray:
        """Return what the clustering wrote of this task's pages; no file if that is nothing."""
        path = Path(f"{clusters}/{rank:06d}.{kind}")
        return np.fromfile(path, "<u4") if path.exists() else np.empty(0, "<u4")

    removed = set(numbers("remove").tolist())
    copies = dict(numbers("sizes").reshape(-1, 2).tolist())
    tally = Tally(tallies.format(rank))
    with rejected or nullcontext():
        for at, page in enumerate(data):
            if at not in removed:
                page.metadata["copies"] = copies.get(at, 1)
                tally.count("kept", utf8_bytes(page.text))
                yield page
            elif rejected:
                rejected.write(page, rank)
    tally.save()


def signatures_step(folder: str, config: Any) -> Any:
    """Return datatrove's first MinHash stage on runs of characters, where it has words."""
    from datatrove.io import get_datafolder
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.dedup import MinhashDedupSignature

    class CharacterSignatures(MinhashDedupSignature):
        """A value is the upper half of a * shingle + b modulo 2^64 (multiply-shift, Dietzfelbinger
        et al. 1997), which numpy does without a division."""

        def __init__(self):
            PipelineStep.__init__(self)  # datatrove's own would want a word tokenizer
            self.output_folder, self.config = get_datafolder(folder), config
            self.num_hashes = config.num_buckets * config.hashes_per_bucket
            self._parameters, self.skip_existing_sigs = None, False

        def get_shingles(self, text: str) -> np.ndarray:
            codes = code_points(text)
            hashes = np.unique(shingles(codes[codes > 32], self.config.n_grams))
            return hashes.astype(np.uint64).reshape(-1, 1)

        def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
            a, b = (part | np.uint64(1) for part in self.parameters)
            lowest = np.full(self.num_hashes, np.iinfo(np.uint64).max)
            for start in range(0, len(shingles), 256):  # a block that stays in the cache
                values = shingles[start : start + 256] * a + b
                np.minimum(lowest, values.min(axis=0), out=lowest)
            bands = np.split(lowest >> np.uint64(32), self.config.num_buckets)
            return [band.tolist() for band in bands]

    return CharacterSignatures()


class Pickled:
    """An object that was pickled once: datatrove pickles the steps anew for every task, and the
    tables of the judge take 0.2 s."""

    def __init__(self, value: Any):
        import dill

        self.bytes = dill.dumps(value, recurse=True)

    def load(self) -> Any:
        """Return the object anew."""
        import dill

        return dill.loads(self.bytes)


class TaskLock:
    """First step of every pipeline: wait until the same task of a killed run has ended."""

    def __init__(self, folder: str):
        self.folder = folder

    def __call__(self, data: None, rank: int, world_size: int) -> None:
        os.makedirs(self.folder, exist_ok=True)
        self.file = open(f"{self.folder}/{rank:05d}", "w")  # noqa: SIM115 (held on to)
        take_lock(self.file, self.folder, wait=True, kind="lockf")


# --- Stages --------------------------------------------------------------------------------------


def task_count(args: Arguments, files: list[str]) -> int:
    """Return the number of tasks. Not the workers' number: the corpus must not depend on that."""
    return min(len(files), args.tasks or MAX_TASKS)


def parquet_writer(folder: str, name: str, compression: str):
    """Return a step that writes the columns of the corpus."""
    import pyarrow as pa
    from datatrove.pipeline.writers import ParquetWriter

    columns = [pa.field(column, pa.string()) for column in ("text", "id", "url", "date")]
    columns += [pa.field(score, pa.float32()) for score in SCORES]
    schema = pa.schema([*columns, pa.field("copies", pa.int32())])
    return ParquetWriter(
        folder, name, compression,
        adapter=lambda _, page: {"text": page.text, "id": page.id} | page.metadata, schema=schema,
        batch_size=200, max_file_size=-1, use_content_defined_chunking=False)


def reject_writer(args: Arguments, name: str):
    """Return the step that saves refused pages; None without --save_rejected."""
    from datatrove.pipeline.writers import JsonlWriter

    folder = f"{args.output_dir}/rejected"
    return JsonlWriter(folder, name, compression=None) if args.save_rejected else None


def judging(args: Arguments, work: Path, turn: int, files: list[str]) -> tuple:
    """Return the stage that reads the files of a turn and keeps the good pages."""
    listing = work / f"inputs_{turn:02d}.txt"
    write_whole(listing, "\n".join(files))
    judge = Pickled(Judge(args))
    rejected = reject_writer(args, "${filter_reason}/" + f"{turn:02d}_${{rank}}.jsonl")
    tallies = f"{work}/tally/{turn:02d}_{{:05d}}.json"
    steps = [
        partial(judged_pages, listing, tallies, judge, rejected),
        parquet_writer(f"{work}/kept", f"{turn:02d}_${{rank}}.parquet", "lz4")]
    return (f"judge_{turn:02d}", steps, task_count(args, files))


def deduplication(args: Arguments, work: Path, kept: list[str], turn: int) -> list[tuple]:
    """Return the stages that find duplicates over all kept files and write what remains."""
    from datatrove.pipeline import dedup
    from datatrove.utils.hashing import HashConfig

    place, read = f"{work}/dedup_{turn:02d}", partial(kept_pages, work / "kept", kept)
    buckets, rows = args.minhash_buckets, args.minhash_rows
    minhash = dedup.MinhashConfig(5, buckets, rows, hash_config=HashConfig(precision=32))
    signatures, pairs, found = (f"{place}/{name}" for name in ("signatures", "pairs", "found"))
    stages = {
        "signatures": [read, signatures_step(signatures, minhash)],
        "buckets": [dedup.MinhashDedupBuckets(signatures, pairs, config=minhash)],
        "clusters": [dedup.MinhashDedupCluster(pairs, found, minhash, save_cluster_size=True)],
        "write": [
            read,
            partial(
                one_of_each, found, f"{place}/tally/{{:05d}}.json",
                reject_writer(args, "duplicate/${rank}.jsonl")),
            parquet_writer(f"{place}/final", "${rank}.parquet", "lz4")]}
    tasks = {"clusters": 1, "buckets": buckets}
    return [
        (f"{turn:02d}_{name}", steps, tasks.get(name, len(kept))) for name, steps in stages.items()]


def run_stages(stages: list[tuple], args: Arguments, work: Path) -> bool:
    """Run the stages one after another on the chosen executor; what an earlier run finished stays.
    False if Slurm has been given jobs that have still to run."""
    executor = None
    for name, steps, tasks in stages:
        steps = [TaskLock(f"{work}/locks/{name}"), *steps]
        executor = make_executor(args, steps, tasks, work / "logs" / name, executor)
        if args.executor == "slurm":
            continue
        with progress(executor, name, work / "tally" if "judge" in name else None):
            try:
                executor.run()
            except ConnectionError as error:
                raise UserError(
                    f"cannot read {error}; expected an answer from its server; check the network"
                    " and run the same command again: what is finished stays") from error
        if failed := executor.get_incomplete_ranks():
            logs = f"{work}/logs/{name}/logs"
            raise RuntimeError(f"{len(failed)} of {tasks} tasks of {name} failed; see {logs}")
    if args.executor == "slurm" and executor.get_incomplete_ranks():
        executor.run()
        return False
    return True


def make_executor(args: Arguments, steps: list, tasks: int, folder: Path, depends):
    """Return datatrove's executor for one stage."""
    import dill

    dill.settings["recurse"] = True  # workers get our functions by value: __main__ is not theirs
    common = {
        "pipeline": steps, "tasks": tasks, "workers": args.workers, "logging_dir": str(folder)}
    if args.executor == "slurm":
        from datatrove.executor import SlurmPipelineExecutor

        job = {"job_name": f"luojiu_{folder.name}", "partition": args.partition, "time": args.time}
        return SlurmPipelineExecutor(**common, **job, depends=depends)
    if args.executor == "ray":
        import ray
        from datatrove.executor.ray import RayPipelineExecutor

        if not ray.is_initialized():
            local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": args.workers}
            ray.init(log_to_driver=False, **local)

        class EndableExecutor(RayPipelineExecutor):
            def _run_for_rank(self, *args, **kwargs):
                # datatrove ends a task's process by SIGTERM; Ray's handler may make it wait
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                return super()._run_for_rank(*args, **kwargs)

        return EndableExecutor(**common)
    import multiprocess
    from datatrove.executor import LocalPipelineExecutor

    # every stage has workers of its own; they start from a process that has these imported
    heavy = "fsspec isal pandas pyarrow.parquet tqdm transformers.hf_argparser"
    heavy += " datatrove.executor datatrove.pipeline.dedup datatrove.pipeline.readers"
    heavy += " datatrove.pipeline.writers"
    multiprocess.set_forkserver_preload(heavy.split())

    class QuietExecutor(LocalPipelineExecutor):
        def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1):
            with redirect_stderr(io.StringIO()):  # its log goes to files only
                return super()._run_for_rank(rank, local_rank, node_rank)

    return QuietExecutor(**common)


@contextmanager
def progress(executor, name: str, tallies: Path | None) -> Iterator[None]:
    """Show a bar of tasks while a stage runs, and for the first pass files, MB/s, pages kept."""
    from datatrove.utils.logging import logger

    logger.remove()
    bar, ended = tqdm(total=executor.world_size, desc=name, unit="task"), threading.Event()
    before = sum_tallies(tallies).bytes.total() if tallies else 0

    def watch() -> None:
        last = False
        while not last:
            last = ended.wait(0.5)
            bar.n = executor.world_size - len(executor.get_incomplete_ranks())
            if tallies:
                tally = sum_tallies(tallies)
                speed = (tally.bytes.total() - before) / 1e6 / bar.format_dict["elapsed"]
                bar.set_postfix_str(
                    f"{tally.files:,} files, {speed:.0f} MB/s, {tally.pages['kept']:,} pages kept")
            bar.refresh()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        bar.close()


def sum_tallies(folder: Path) -> Tally:
    """Return the sum of the counts that tasks wrote."""
    total = Tally("")
    for path in sorted(folder.glob("*.json")):
        for name, counted in json.loads(path.read_text()).items():
            if isinstance(counted, dict):
                getattr(total, name).update(counted)
            else:
                setattr(total, name, getattr(total, name) + counted)
    return total


def filter_files(args: Arguments, files: list[str], work: Path) -> int | None:
    """Judge the files and deduplicate what is kept; with a target size in turns, each with as many
    more files as the yield so far lets expect, until it is there. Return the number of the last
    turn, None if Slurm has still to work."""
    target, kept, done, turn, size = parse_size(args.target_size), [], 0, 0, FIRST_TURN
    while True:
        chosen = files[done : done + size] if target else files
        done += len(chosen)
        kept += [f"{turn:02d}_{rank:05d}.parquet" for rank in range(task_count(args, chosen))]
        stages = [judging(args, work, turn, chosen), *deduplication(args, work, kept, turn)]
        if not run_stages(stages, args, work):
            return None
        have = sum_tallies(work / f"dedup_{turn:02d}" / "tally").bytes["kept"] * args.keep_best
        if target is None or have >= target or done == len(files):
            return turn
        size = math.ceil(done * min(3, 1.1 * target / max(1, have) - 1))
        turn += 1


# --- Input and output ----------------------------------------------------------------------------


def check(args: Arguments) -> None:
    """Expand ~ in every path; find mistakes before any work."""
    args.output_dir, args.picture = map(os.path.expanduser, (args.output_dir, args.picture))
    args.input = [name if "://" in name else os.path.expanduser(name) for name in args.input]
    parse_size(args.target_size)
    for name, value in asdict(args).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            usual = (0, 1) if isinstance(value, float) else (1, math.inf)
            if name.startswith("max_") and getattr(Arguments, name) > 1:  # per 1,000 Han
                usual = (0, math.inf)
            least, most = RANGES.get(name, usual)
            expected = f"at least {least}" if most == math.inf else f"{least} to {most}"
            if not least <= value <= most:  # a NaN lies in no range
                raise UserError(f"--{name} {value}: out of range; expected {expected}; change it")
    if args.like is None and args.keep_best < 1:
        raise UserError(
            f"--keep_best {args.keep_best}: needs a text to be like; expected --like FILE; add it")
    if args.like is not None:
        args.like = os.path.expanduser(args.like)
        if not Path(args.like).is_file() or not Path(args.like).stat().st_size:
            raise UserError(f"--like {args.like}: no file, or empty; expected a text; check it")
    if Path(args.output_dir).is_file():
        raise UserError(f"--output_dir {args.output_dir}: a file; expected a folder; give another")
    if Path(args.picture).suffix not in (".png", ".pdf", ".svg"):
        raise UserError(
            f"--picture {args.picture}: no picture's name; expected a file that ends in .png, .pdf"
            " or .svg; change it")
    if args.executor == "slurm" and not shutil.which("sbatch"):
        raise UserError(
            "--executor slurm: no sbatch on this machine; expected a Slurm cluster; use --executor"
            " local")
    if args.executor == "ray" and not importlib.util.find_spec("ray"):
        raise UserError("--executor ray: not installed; expected Ray; pip install ray")


def parse_size(text: str | None) -> int | None:
    """Return the bytes of a size such as 500MB or 6GB (decimal), None for None."""
    if text is None:
        return None
    match = re.fullmatch(r"(?i)\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text)
    if not match or not float(match[1]):
        raise UserError(f"--target_size {text}: no size; expected one such as 6GB; change it")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def list_inputs(args: Arguments) -> list[str]:
    """Return the files to read, in a fixed order."""
    if args.crawl is not None:
        files = crawl_files(args.crawl)
    else:
        files = list(dict.fromkeys(name for given in args.input for name in expand_input(given)))
    for name in files:
        if "://" not in name and Path(name).parent.resolve() == Path(args.output_dir).resolve():
            raise UserError(
                f"--output_dir {args.output_dir}: holds {name}, which is read;"
                " expected a folder of its own; choose another")
    return files[: args.limit_files]


def crawl_files(crawl: str) -> list[str]:
    """Return the URLs of a crawl's WET files, from its wet.paths.gz."""
    listing = f"{CRAWL_URL}crawl-data/{crawl}/wet.paths.gz"
    try:
        with fsspec.open(listing, "rt", compression="gzip") as lines:
            return [CRAWL_URL + line.strip() for line in lines if line.strip()]
    except Exception as error:  # each file system of fsspec raises its own
        raise UserError(
            f"--crawl {crawl}: cannot read {listing} ({type(error).__name__}); expected one like"
            " CC-MAIN-2026-30 and the internet; check both, or give files with --input") from error


def expand_input(given: str) -> list[str]:
    """Return the files that one --input names: a file, a folder, a glob, or a URL."""
    expected = (
        "expected .wet, .warc, .jsonl or .ndjson, plain or compressed (.wet.gz, .json.zst,"
        " .jsonl.xz, .bz2), .json with an object a line, or .parquet")
    remote = "://" in given
    try:
        system, path = fsspec.core.url_to_fs(given)
        if folder := system.isdir(path):
            names = read_folder(given, system, path)
        elif system.exists(path):  # a name with [1] in it is a name first
            names = [path]
        else:
            names = sorted(system.glob(path)) if any(sign in given for sign in "*?[") else []
    except Exception as error:  # each file system of fsspec raises its own
        remedy = "check the address and the network"
        if given.startswith("s3://"):
            remedy = f"set AWS credentials, or give {CRAWL_URL}... (the same files, without any)"
        why = str(error).partition("\n")[0]
        raise UserError(f"--input {given}: no access ({why}); {expected}; {remedy}") from error
    if not names:
        what = "no answer" if remote else "holds no such file" if folder else "does not exist"
        raise UserError(f"--input {given}: {what}; {expected}; check the path and the network")
    for name in names:
        if not READABLE.search(name):
            remedy = 'write other text as JSON lines, {"text": "..."} for each document'
            raise UserError(f"--input {given}: {name} is of another kind; {expected}; {remedy}")
    if names == [path] and remote:
        return [given]
    return [system.unstrip_protocol(name) if remote else name for name in names]


def read_folder(given: str, system: Any, path: str) -> list[str]:
    """Return the files of a folder that can be read, links to files too; say what it holds besides.
    """
    chosen, others = [], []
    for entry in sorted(system.ls(path, detail=True), key=lambda entry: entry["name"]):
        name = entry["name"]
        folder = entry["type"] != "file" and system.isdir(name)
        if READABLE.search(name) and not name.endswith(".json") and not folder:  # .json: settings
            chosen.append(name)
        elif not (short := name.rpartition("/")[2]).startswith("."):
            others.append(short + "/" * folder)
    if others:
        first = ", ".join(name.rpartition("/")[2] for name in chosen[:5])
        print(
            f"--input {given}: reads {len(chosen)} files ({first} ...); does not read"
            f" {', '.join(others[:9])} (folders and other kinds of files)")
    return chosen


def take_lock(file: Any, shown: str, wait: bool = False, kind: str = "flock") -> bool:
    """Lock an open file or folder until it is closed; return whether it is ours. Where the file
    system has no locks, say so and go on. With kind "lockf" forked processes do not hold it too."""
    try:
        getattr(fcntl, kind)(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"warning: {shown}: this file system has no locks; start no second run into the same "
              "folder", file=sys.stderr)
    return True


@contextmanager
def claimed(args: Arguments, files: list[str]) -> Iterator[Path]:
    """Hold the output folder: one run at a time, always with the same settings."""
    output, where = Path(args.output_dir), f"--output_dir {args.output_dir}:"
    work = output / ".work"
    known = work / "settings.json"
    if not known.exists() and any(output.glob("*.parquet")):
        raise UserError(f"{where} another program's Parquet; expected its own folder; choose one")
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        if not take_lock(lock, where[:-1], kind="lockf"):
            what = "another run is writing here; expected none; wait for it or choose another"
            raise UserError(f"{where} {what}")
        names = [
            name if "://" in name else [os.path.relpath(name, output), os.path.getsize(name)]
            for name in files if "://" in name or os.path.exists(name)]
        settings = {k: v for k, v in asdict(args).items() if k not in HERE_ONLY} | {"files": names}
        if not known.exists():
            write_whole(known, json.dumps(settings, ensure_ascii=False))
        before = earlier_record(known, args)
        changed = [
            "--input, or its files have changed" if name == "files" else
            f"--{name} ({before.get(name)} before, {value} now)"
            for name, value in settings.items() if value != before.get(name)]
        if changed:
            raise UserError(
                f"{where} begun with another {', '.join(changed)}; expected the same settings;"
                " choose another folder or delete this one")
        yield work


def earlier_record(path: Path, args: Arguments) -> dict:
    """Return a record of an earlier run."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"--output_dir {args.output_dir}: {path.name} is damaged ({error}); expected the record"
            " of an earlier run; delete the folder or choose another") from error


def is_done(args: Arguments) -> bool:
    """Whether an earlier run has finished; its corpus must be there as it was written."""
    record = Path(args.output_dir, "run.json")
    if not record.exists():
        return False
    for name, size in earlier_record(record, args)["corpus"].items():
        path = Path(args.output_dir, name)
        if not path.is_file() or path.stat().st_size != size:
            raise UserError(
                f"--output_dir {args.output_dir}: {name} is gone or was changed after the run;"
                " expected the corpus of run.json; delete the folder and run again")
    return True


def refuse_nothing(args: Arguments, work: Path, judged: Tally) -> None:
    """Say so where no page could be read, and let the next run begin anew."""
    if judged.pages:
        return
    tidy(work)
    (work / "settings.json").unlink()
    for completions in work.glob("logs/*/completions"):
        shutil.rmtree(completions)
    given = f"--crawl {args.crawl}" if args.crawl else f"--input {', '.join(args.input[:5])}"
    remedy = f"see {work}/logs"
    if judged.damage["row without a text"]:
        remedy = "name that column with --text_column"
    raise UserError(
        f"{given}: no page could be read ({', '.join(judged.damage) or 'none there'}); expected"
        f" WET, WARC, or rows with a column of text; {remedy}")


def write_corpus(args: Arguments, final: Path) -> tuple[dict[str, list[int]], int]:
    """Put the finished pages into the output folder: those most like the text of --like, with this
    score, up to --target_size. Return the pages and bytes that each of the two left, and the number
    of characters."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    output, limit = Path(args.output_dir), parse_size(args.target_size) or math.inf
    for old in output.glob("*.parquet"):
        old.unlink()
    left, characters = {"like": [0, 0], "target": [0, 0]}, 0
    paths = sorted(final.glob("*.parquet"))
    scores = like_scores(args.like, paths) if args.like else []
    ranked = np.sort(np.concatenate([*scores, []]))[::-1]
    best = ranked[: math.ceil(args.keep_best * len(ranked))]

    def count(rule: str, sizes: np.ndarray) -> None:
        left[rule][0] += len(sizes)
        left[rule][1] += int(sizes.sum())

    for at, path in enumerate(paths):
        table = pq.read_table(path)
        if scores:
            table = table.append_column("like", pa.array(scores[at]))
            table = table.filter(pa.array(scores[at] >= best.min(initial=math.inf)))
        sizes = pc.binary_length(table["text"].cast(pa.binary())).to_numpy()
        count("like", sizes)
        room = limit - left["target"][1]
        table = table.slice(0, int(np.searchsorted(np.cumsum(sizes), room)) + 1 if room > 0 else 0)
        if not len(table):
            continue
        count("target", sizes[: len(table)])
        characters += pc.sum(pc.utf8_length(table["text"])).as_py()
        pq.write_table(table, output / f".{path.name}", compression="zstd")
        os.replace(output / f".{path.name}", output / path.name)
    return left, characters


def publish(args: Arguments, work: Path, turn: int) -> dict:
    """Put the finished corpus into the output folder, cut at the target size; return its counts."""
    judged = sum_tallies(work / "tally")
    refuse_nothing(args, work, judged)
    place = work / f"dedup_{turn:02d}"
    unique = sum_tallies(place / "tally")
    later, characters = write_corpus(args, place / "final")
    later["duplicate"] = unique.pages["kept"], unique.bytes["kept"]
    pages, size = judged.pages.total(), judged.bytes.total()
    left_after, refused = {"read": {"pages": pages, "bytes": size}}, {}
    for rule in RULES:
        before = pages
        pages, size = later.get(rule, (pages - judged.pages[rule], size - judged.bytes[rule]))
        left_after[rule] = {"pages": pages, "bytes": size}
        refused[rule] = before - pages
    del refused["lines"]  # it takes lines from pages, no page
    account = {
        "read": judged.read, "kept": pages, "refused": refused,
        "damaged": dict(sorted(judged.damage.items())),
        "no_page": dict(sorted(judged.others.items()))}
    return {
        "files": judged.files, "account": account, "pages": pages, "characters": characters,
        "bytes": size, "left_after": left_after, "damage": account["damaged"]}


def report(args: Arguments, results: dict, work: Path, seconds: float) -> None:
    """Write stats.json, the card, the picture and, last, run.json; tidy up and print the counts."""
    output = Path(args.output_dir)
    write_whole(output / "stats.json", json.dumps(results, indent=2))
    write_whole(output / "README.md", card(args, results))
    draw_funnel(results["left_after"], Path(args.picture))
    packages = ("datatrove", "isal", "numpy", "opencc", "pyarrow", "resiliparse", "trafilatura")
    run = {
        "script": "filter_cc.py", "arguments": asdict(args),
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in packages},
        "results": results | {"seconds": round(seconds, 1)},
        "corpus": {path.name: path.stat().st_size for path in sorted(output.glob("*.parquet"))}}
    write_whole(output / "run.json", json.dumps(run, indent=2, ensure_ascii=False))
    tidy(work)
    for rule, left in results["left_after"].items():
        print(f"{rule:16} {left['pages']:>12,} pages {left['bytes']:>16,} bytes left")
    for kind, times in results["damage"].items():
        print(f"damage: {kind}: {times:,} (named in {work}/logs)")
    account = results["account"]
    print(
        f"{account['read']:,} records or rows read: {account['kept']:,} kept,"
        f" {sum(account['refused'].values()):,} refused by a rule,"
        f" {sum(account['damaged'].values()):,} damaged,"
        f" {sum(account['no_page'].values()):,} no pages ({', '.join(account['no_page']) or '-'})")
    if not results["pages"]:
        rule = max(account["refused"], key=account["refused"].get)
        print(f"every page was refused, most by {rule} ({RULES[rule]});"
              " --save_rejected, into another --output_dir, shows them")
    print(
        f"{results['pages']:,} pages, {results['characters']:,} characters in {args.output_dir},"
        f" {seconds:.0f} s; what each rule left: {args.picture}", flush=True)


def tidy(work: Path) -> None:
    """Remove what only an unfinished run needs; the logs stay."""
    for path in [work / "kept", work / "tally", work / "locks", *work.glob("dedup_*")]:
        shutil.rmtree(path, ignore_errors=True)


def draw_funnel(left_after: dict, path: Path) -> None:
    """Draw pages and bytes that were left after each rule, on a logarithmic scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    for axis, unit in zip(figure.subplots(1, 2, sharey=True), ("pages", "bytes"), strict=True):
        values = [counts[unit] for counts in left_after.values()]
        axis.barh(list(left_after), values, color="#4c72b0" if unit == "pages" else "#55a868")
        axis.set(xscale="symlog", xlim=(0, 9 * max(*values, 1)), xlabel=f"{unit} left")
        axis.spines[["top", "right"]].set_visible(False)
        for row, value in enumerate(values):
            axis.text(value * 1.1 + 0.1, row, f"{value:,}", va="center", fontsize=8)
    axis.invert_yaxis()
    figure.suptitle("What each rule left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def card(args: Arguments, results: dict) -> str:
    """Return the dataset card."""
    rows = [
        f"| {rule} | {RULES.get(rule, 'nothing yet')} | {left['pages']:,} | {left['bytes']:,} |"
        for rule, left in results["left_after"].items()]
    return f"""---
language: [zh]
task_categories: [text-generation]
configs: [{{config_name: default, data_files: "*.parquet"}}]
---
# Traditional Chinese web text in Taiwan usage

{results["pages"]:,} pages, {results["characters"]:,} characters, {results["bytes"]:,} bytes,
from {args.crawl or ", ".join(args.input)}, by `filter_cc.py` of the Luojiu project.
Columns: `text`, `id`, `url`, `date`, the scores {", ".join(f"`{name}`" for name in SCORES)},
and `copies`, the number of pages that had this text or nearly this.
run.json holds the settings and versions, stats.json the counts.

| after the rule | which refuses | pages left | bytes left |
| --- | --- | --- | --- |
{chr(10).join(rows)}

Personal data are placeholders: [EMAIL], [IP], [PHONE], [ID]. Pages remain their authors' work;
for Common Crawl its terms of use apply: https://commoncrawl.org/terms-of-use
"""


# --- Main ----------------------------------------------------------------------------------------


@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Filter web pages into a corpus."""
    args = parse_args(argv)
    check(args)
    files = list_inputs(args)
    with claimed(args, files) as work:
        if is_done(args):
            tidy(work)
            print(f"already done: {args.output_dir} (run.json has the settings)")
            return
        start = time.monotonic()
        turn = filter_files(args, files, work)
        if turn is None:
            print("jobs submitted; run the same command again when Slurm has ended them")
            return
        results = publish(args, work, turn)
        report(args, results, work, time.monotonic() - start)


if __name__ == "__main__" and "__file__" in globals():  # a pasted notebook cell only defines
    main()
