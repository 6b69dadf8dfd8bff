"""Extend a Llama tokenizer and model with pieces for Traditional Chinese, none of them dead.

In: a base (Llama 2, or any Llama whose tokenizer is SentencePiece BPE) and a corpus. Out, in
outputs/extended: tokenizer.model, tokenizer.json and the model with a row for every new piece.

1. SentencePiece BPE learns pieces on the corpus, its variant glyphs turned into Taiwan's standard
   forms by OpenCC, all 5,401 characters of Big5 level 1 included. No new piece holds ASCII, so
   English, code and digits keep the base's ids.
2. The pieces follow the base's, in training order. Their scores are distinct and above the base's,
   so that the tokenizer can produce each of them. A dead candidate, which the tokenizer cannot
   produce, is replaced by the next one.
3. Every run proves, before anything is written: no piece is dead, SentencePiece and AutoTokenizer
   give the same ids, and decoding gives the text back.
4. Only embedding, head and config change. They are streamed, so memory does not grow
   with the model. New rows are made from the rows that spell the piece (--init).

A run of a minute on any CPU (this command was run):
    python extend_vocab.py --base_model data/sample/tiny-llama --corpus data/cc_filtered \\
        --vocab_size 8000
The real run (the novel is fetched from Project Gutenberg when data/hongloumeng.txt is missing):
    python extend_vocab.py
Far better on modern text, with what filter_cc.py kept weighted against the novel:
    python extend_vocab.py --corpus data/hongloumeng.txt data/cc_filtered --corpus_weight 1 8
New rows that start with fewer bits per character (README), where a GPU is there:
    python extend_vocab.py --init shared

Cost, measured on 2 cores: 29 s and 0.8 GB of memory for 13.5 GB of weights (1.3 to 3.8 times as
long as cp -r); 20 s of CPU and 1 GB for each 10 million characters of corpus.
"""

import argparse
import errno
import fcntl
import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
import urllib.request
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from importlib.metadata import version
from io import BytesIO
from itertools import accumulate, chain
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from tqdm import tqdm
from transformers import HfArgumentParser

# Heavy imports (torch, transformers' models, matplotlib) wait inside the functions that use them.

# --- Constants -----------------------------------------------------------------------------------

HONGLOUMENG = "data/hongloumeng.txt"
HONGLOUMENG_URL = "https://www.gutenberg.org/cache/epub/24264/pg24264.txt"
TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INDEX = "model.safetensors.index.json"
PAPERS = ("generation_config.json", "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*")
SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
HELD_OUT = 50  # one document in 50 is held out for the report
REPORT_CHARS, LOSS_CHARS, LOSS_WINDOW = 1_000_000, 8192, 512
DISTILL_RATE = 0.02  # Adam's, times the standard deviation of the old input rows
TAUGHT = ("shared", "distilled")  # for these starts the base reads text
SHARE_WINDOWS, DISTILL_SAVE = 16, 300  # seconds between two states on the disk
SIMPLIFIED_SHARE = 0.1  # above it, a corpus is said to be Simplified
CPU_LOSS_BYTES = 400_000_000  # the largest model that --eval_loss auto runs on a CPU
PACKAGES = ("sentencepiece", "transformers", "tokenizers", "safetensors", "torch", "opencc")
AGAIN = "copy or download it again"
# Errors of a file system that has no locks.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
# What a file manager, Jupyter or a file system leaves in a folder.
FOREIGN = {".DS_Store", ".ipynb_checkpoints", "lost+found"}

# Characters without a glyph: controls, soft hyphen, zero-width, line and paragraph separators,
# directions, variation selectors, tags. No new piece holds one.
INVISIBLE = (
    "\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff")
QUOTES = dict(zip(map(ord, "“”‘’"), "「」『』", strict=True))  # as Taiwan prints them

# Level 1 of Big5: what Taiwan's schools and newspapers use; lead bytes A4 to C6, C6 up to 7E.
BIG5_LEVEL_1 = [
    bytes([lead, trail]).decode("big5")
    for lead in range(0xA4, 0xC7)
    for trail in (*range(0x40, 0x7F), *range(0xA1, 0xFF))
    if lead < 0xC6 or trail < 0x7F]

TRAINER = {  # SentencePiece's own defaults elsewhere; the text arrives in segments, see there
    "model_type": "bpe", "input_format": "tsv", "hard_vocab_limit": False,
    "required_chars": "".join(BIG5_LEVEL_1), "character_coverage": 0.99999,
    "split_by_unicode_script": False,  # pieces may join characters and punctuation: fewer tokens
    "normalization_rule_name": "identity", "add_dummy_prefix": False,
    "remove_extra_whitespaces": False, "max_sentence_length": 1 << 16,
    "shuffle_input_sentence": False, "num_threads": 1, "minloglevel": 2}

# Texts on which tokenizers are known to differ. Every run is tested on them.
HARD_TEXTS = [
    *(" " * n for n in range(40)),
    *("\n" * n for n in range(1, 6)),
    *("中" * n + "。" * n for n in range(1, 20)),
    *(f"a{' ' * n}b{' ' * n}\n{' ' * n}中{' ' * n}文" for n in range(1, 20)),
    "The quick brown fox jumps over the lazy dog; it's 1,234.5 km (or 12%) away.",
    "def f(x: int) -> str:\n\tif x > 0:\n        return f'{x!r:>8}'\n\n    # 註解：回傳字串\n",
    '{"name": "落九", "size": [61388, 4096]}\r\n<div class="a">&nbsp;</div>\\n',
    "😀👍🏽👨‍👩‍👧 🇹🇼 emoji 和中文混排😂😂😂",
    "我用Python 3.11寫程式，在 GitHub 上 開源。ＦＵＬＬ　ｗｉｄｔｈ１２３！",
    "日本語のテキスト、한국어, ελληνικά, кириллица, ไทย, العربية, naïve café",
    "簡體：这个软件的质量。注音：ㄅㄆㄇ。罕用：𠮷𡈽龘㐂。\u200b\ufeff\u3000\xa0\x07"]

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

    base_model: str = option(
        "meta-llama/Llama-2-7b-hf", "Model to extend: a folder or a hub id; SentencePiece BPE.")
    corpus: list[str] = field(default_factory=lambda: [HONGLOUMENG], metadata={
        "help": "Texts to learn pieces from: .txt, .jsonl, .parquet (text), or folders."})
    corpus_weight: list[float] = field(default_factory=list, metadata={
        "help": "How many times each --corpus counts, in its order; none: 1 each."})
    vocab_size: int = option(61388, "Pieces of the new tokenizer, the base's included.")
    output_dir: str = option("outputs/extended", "Folder for tokenizer, model and report.")
    picture: str = option("pictures/vocab.png", "Where to draw the report.")
    init: Literal["subtoken", "mean_subtoken", "mean", "random", "shared", "distilled"] = option(
        "subtoken", "New rows, from the base's rows that spell the piece: the last (in the head "
        "above all the first), or their mean; or the mean of all rows, or normal noise of the "
        "config's initializer_range. For two the base reads some text (a GPU, or a small base): "
        "shared: the last row, and in the head the first one's probability, shared out as the "
        "corpus uses the pieces; distilled: input rows also fitted to the base's hidden states.")
    distill_tokens: int = option(1_000_000, "Tokens of the corpus that --init distilled reads.")
    eval_text: str | None = option(
        None, "Text to report on (file or folder); None: 2%% held out of the corpus.")
    eval_loss: Literal["auto", "yes", "no"] = option(
        "auto", "Report bits per character before training; auto: if the model fits the GPU or is "
        "under 0.4 GB.")
    max_chars: int = option(
        20_000_000, "Characters read of each --corpus at most, files in random order.")
    seed: int = option(0, "Seed of the file order and of --init random.")
    overwrite: bool = option(False, "Build anew even if --output_dir holds a finished run.")


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


def check(args: Arguments) -> None:
    """Expand ~ in every path; refuse what can be refused before anything is read."""
    args.corpus = [os.path.expanduser(name) for name in args.corpus]
    for name in ("base_model", "output_dir", "picture", "eval_text"):
        if getattr(args, name):
            setattr(args, name, os.path.expanduser(getattr(args, name)))
    count, weights = len(args.corpus), args.corpus_weight or [1.0] * len(args.corpus)
    args.corpus_weight = weights
    refuse(
        (Path(args.picture).suffix not in (".png", ".pdf", ".svg"),
         f"--picture {args.picture}: expected a file that ends in .png, .pdf or .svg"),
        (len(weights) != count or not all(0 < weight <= 1e6 for weight in weights),
         f"--corpus_weight {weights}: expected one number above 0, a million at most, for each "
         "--corpus"),
        (args.max_chars < 1000, f"--max_chars {args.max_chars}: expected 1000 or more"),
        (not 0 < args.distill_tokens <= 10**8,
         f"--distill_tokens {args.distill_tokens}: expected 1 to 100 million"),
        (not 0 <= args.seed < 2**32, f"--seed {args.seed}: expected 0 to {2**32 - 1}"))


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


class ForgivingStream:
    """A stream whose write errors are ignored: the terminal may be closed, the same Ctrl-C may have
    ended `tee`, or a signal may come in the middle of writing (RuntimeError)."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError, RuntimeError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, RuntimeError):
            self.stream.flush()


@contextmanager
def ignore_write_errors() -> Iterator[None]:
    """Let no run end because nobody reads what it prints."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    out, err = ForgivingStream(sys.stdout), ForgivingStream(sys.stderr)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            yield
    finally:
        for name in ("stdout", "stderr"):
            try:
                getattr(sys, name).flush()
            except OSError:  # it would fail again when Python ends
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def refuse(*findings: tuple[Any, str]) -> None:
    """Stop at the first finding that is true, with its message."""
    for wrong, message in findings:
        if wrong:
            raise UserError(message)


# --- The base ------------------------------------------------------------------------------------


def find_model(name_or_path: str, option: str) -> Path:
    """The local folder of a model: a folder with config.json as it is, else the hub's snapshot."""
    given, folder = f"{option} {name_or_path}", Path(name_or_path).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():
        raise UserError(f"{given}: no config.json in it; expected a model's folder or a hub id")
    if folder.parts[:1] == ("outputs",):
        raise UserError(f"{given}: no such folder; run python extend_vocab.py first")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name_or_path) or folder.parent.is_dir():
        raise UserError(f"{given}: no such folder; expected a model's folder or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "LICENSE*", "USE_POLICY*"]
    try:
        snapshot = snapshot_download(name_or_path, allow_patterns=wanted, ignore_patterns="*/*")
    except (GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        reason = "gated" if isinstance(error, GatedRepoError) else "missing or the hub out of reach"
        raise UserError(
            f"{given}: the model is {reason}; accept the licence on "
            f"https://huggingface.co/{name_or_path}, run hf auth login and try again; without it, "
            "make demo tries the whole pipeline on a tiny model") from error
    if not (Path(snapshot) / "config.json").is_file():
        raise UserError(f"{given}: the repository has no config.json; expected a model")
    return Path(snapshot)


def weight_files(folder: Path, name: str = "model.safetensors") -> list[Path]:
    """The files that Transformers loads: the single one, else those of the index, in name order.
    Empty if there is neither, or the index cannot be read."""
    index = folder / f"{name}.index.json"
    if (folder / name).is_file():
        return [folder / name]
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        names = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    return []


def fingerprint(folder: Path) -> str:
    """Name a model's weights without reading gigabytes: the sha256 of config.json and, for every
    weight file in name order, its name, its header and both ends (1,024 bytes) of each tensor."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in filter(Path.is_file, weight_files(folder)):
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
            digest.update(path.name.encode() + header)
            tensors = json.loads(header)
            tensors.pop("__metadata__", None)
            for begin, end in sorted(t["data_offsets"] for t in tensors.values()):
                for start in (begin, max(begin, end - 1024)):
                    file.seek(8 + len(header) + start)
                    digest.update(file.read(min(1024, end - begin)))
    return digest.hexdigest()


def load_json(path: Path, shown: str) -> dict:
    """A JSON object, or an error that names the option by which the file came."""
    with suppress(ValueError):  # not UTF-8, or not JSON
        found = json.loads(path.read_text(encoding="utf-8-sig"))
        if isinstance(found, dict):
            return found
    raise UserError(f"{shown}: {path} is broken; expected a JSON object; {AGAIN}")


def read_base(folder: Path, args: Arguments) -> tuple[Any, dict, dict[Path, dict]]:
    """The base's tokenizer, config and shards, refused unless they can be extended exactly."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    given, base = f"--base_model {args.base_model}", ModelProto()
    expected = "expected SentencePiece BPE as Llama 2, TinyLlama or Mistral 7B v0.1 have it"
    try:
        base.ParseFromString((folder / "tokenizer.model").read_bytes())
    except Exception as error:
        wrong = f"tokenizer.model is missing or not SentencePiece's ({error}); if it was cloned, "
        raise UserError(f"{given}: {wrong}run git lfs pull; {expected}") from error
    spec, normal, size = base.trainer_spec, base.normalizer_spec, len(base.pieces)
    rules = [spec.model_type == spec.BPE, min(spec.unk_id, spec.bos_id, spec.eos_id) >= 0]
    rules += [not normal.precompiled_charsmap, not normal.remove_extra_whitespaces]
    rules += [normal.add_dummy_prefix, all(p.type != p.USER_DEFINED for p in base.pieces)]
    piece, times = Counter(piece.piece for piece in base.pieces).most_common(1)[0]
    refuse(
        (not all(rules), f"{given}: its tokenizer.model is another kind; {expected}: no "
         "normalisation, a prefix space and no user-defined pieces"),
        (times > 1, f"{given}: its tokenizer.model holds the piece {piece!r} {times} times; "
         f"expected every piece once; {AGAIN}"),
        (not size < args.vocab_size < 10**7, f"--vocab_size {args.vocab_size}: expected more than "
         f"the base's {size} and less than 10 million"))
    config, shards = load_json(folder / "config.json", given), find_shards(folder, given)
    tensors = {name: found for inside in shards.values() for name, found in inside.items()}
    found = {name: shape for name, (shape, _) in tensors.items() if "inv_freq" not in name}
    dtypes, rows = {tensors[name][1] for name in found}, config.get("vocab_size")
    if config.get("tie_word_embeddings"):
        found.pop(HEAD, None)  # the embedding once more
    refuse(
        (config.get("quantization_config") or not dtypes <= {"BF16", "F16", "F32"},
         f"{given}: is quantised; expected weights in bf16, fp16 or fp32"),
        (EMBEDDING not in found, f"{given}: no {EMBEDDING} in it; expected a Llama"),
        (rows != size, f"{given}: its tokenizer.model has {size} pieces, its vocab_size is {rows}; "
         "expected the same number (no padding rows, no added tokens)"))
    expect(found, llama_shapes(found, config), given, "by config.json", AGAIN)
    if args.init == "subtoken" and HEAD not in tensors:
        args.init = "mean_subtoken"  # one matrix has to serve both ends
    if args.init in TAUGHT:
        import torch
        nbytes = sum(path.stat().st_size for path in shards)
        refuse(
            (HEAD not in tensors, f"--init {args.init}: the base's head is its embedding; "
             "expected two matrices; choose another --init"),
            (nbytes > CPU_LOSS_BYTES and not torch.cuda.is_available(),
             f"--init {args.init}: {nbytes / 1e9:.1f} GB of weights and no GPU; expected a GPU, or "
             f"a base of {CPU_LOSS_BYTES / 1e9} GB at most"))
    return base, config, shards


def expect(found: dict, expected: dict, shown: str, why: str, remedy: str) -> None:
    """Refuse a model whose tensors are not those expected; the first of them by name is shown."""
    names = sorted(found.keys() | expected.keys())
    if wrong := [name for name in names if found.get(name) != expected.get(name)]:
        has, due = found.get(wrong[0], "missing"), expected.get(wrong[0], "no such tensor")
        more = f" ({len(wrong) - 1} more differ)" if len(wrong) > 1 else ""
        raise UserError(f"{shown}: {wrong[0]} is {has}; expected {due} {why}{more}; {remedy}")


def llama_shapes(found: dict, config: dict) -> dict[str, tuple[int, ...]]:
    """The tensors that a Llama must have, and their shapes: what one layer has, every layer has."""
    rows, width = config.get("vocab_size"), found[EMBEDDING][1]
    shapes = {EMBEDDING: (rows, width), "model.norm.weight": (width,)}
    if not config.get("tie_word_embeddings"):
        shapes[HEAD] = (rows, width)
    layer = {}
    for name, shape in found.items():
        if match := re.match(r"model\.layers\.\d+\.", name):
            layer.setdefault(name[match.end() :], shape)
    return shapes | {
        f"model.layers.{i}.{name}": shape
        for i in range(int(config.get("num_hidden_layers") or 0)) for name, shape in layer.items()}


def pickled(folder: Path) -> str | None:
    """Of a model whose weights are in .bin files: what is wrong, and the command that mends it."""
    names = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    return names and (
        f"its weights are in {names[0]}; expected *.safetensors; convert them: python -c \"from "
        f"transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}', "
        f"dtype='auto').save_pretrained('{folder}')\"")


def find_shards(folder: Path, given: str) -> dict[Path, dict[str, tuple[tuple, str]]]:
    """The model's safetensors files, each whole: shape and dtype of every tensor in it."""
    from safetensors import SafetensorError, safe_open
    paths, shards = weight_files(folder), {}
    wrong = f"no model.safetensors there, nor its index that can be read; {AGAIN}"
    refuse((not paths, f"{given}: {pickled(folder) or wrong}"))
    for path in paths:
        try:
            with safe_open(path, "np") as file:  # it holds the header against the file's size
                inside = {name: file.get_slice(name) for name in file.offset_keys()}
                shards[path] = {
                    n: (tuple(p.get_shape()), p.get_dtype()) for n, p in inside.items()}
        except (SafetensorError, OSError) as error:
            wrong = f"is cut short, locked or is not a safetensors file ({error})"
            wrong = wrong if path.is_file() else "is missing"
            raise UserError(f"{given}: {path.name} {wrong}; {AGAIN}") from error
    return shards


# --- The corpus ----------------------------------------------------------------------------------


def file_sum(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def input_sums(base_folder: Path, files: dict[str, list[Path]]) -> dict[str, str]:
    """Checksums of all inputs: the fingerprint of the base's weights, as in the other scripts (a
    sha256 of 13.5 GB would take as long as copying them), and the sha256 of each other file."""
    papers = [path for name in ("tokenizer.model", "tokenizer_config.json", *PAPERS)
              for path in sorted(base_folder.glob(name))]
    read = filter(Path.is_file, chain(papers, *files.values()))
    return {"base": fingerprint(base_folder)} | {str(path): file_sum(path) for path in read}


def fetch_hongloumeng(path: Path) -> None:
    """Save the novel from Project Gutenberg (ebook 24264) without the licence before and after."""
    print(f"{path} is missing: fetching {HONGLOUMENG_URL}", flush=True)
    request = urllib.request.Request(HONGLOUMENG_URL, headers={"User-Agent": "Mozilla/5.0"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read().decode("utf-8-sig")
        novel = re.search(r"\*\*\* ?START OF .*\n([^*]*)\*\*\* ?END OF", text)[1].strip()
    except Exception as error:
        remedy = f"save {HONGLOUMENG_URL} there by hand, or name other texts with --corpus"
        wrong = f"is missing and could not be fetched ({error})"
        raise UserError(f"--corpus {path}: {wrong}; {remedy}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    part.write_text(novel + "\n", encoding="utf-8")
    part.replace(path)


def find_texts(name: str, option: str) -> list[Path]:
    """The text files that a --corpus or --eval_text names. What a folder holds besides is named;
    hidden files in it belong to other programs."""
    path = Path(name)
    if name == HONGLOUMENG and not os.path.lexists(path):
        fetch_hongloumeng(path)
    refuse_dead_link(path, option)
    inside = sorted(path.iterdir()) if path.is_dir() else []
    visible = [file for file in inside if not file.name.startswith(".")] if inside else [path]
    files = [file for file in visible
             if file.is_file() and file.suffix.lower() in TEXT_SUFFIXES]
    others = [file.name for file in inside if file not in files]
    names = ", ".join(others[:9]) + f" and {len(others) - 9} more" * (len(others) > 9)
    if not files:
        first = path.parts[:2] == ("data", "cc_filtered") and not path.exists()
        remedy = "run python filter_cc.py first" if first else "name such a file or folder"
        wanted = f"expected {', '.join(TEXT_SUFFIXES)} or a folder of them"
        found = f"; it holds {names}" if others else ""
        raise UserError(f"{option} {name}: no text there{found}; {wanted}; {remedy}")
    if others:
        print(f"{option} {name}: not read: {names}", flush=True)
    return files


def refuse_dead_link(path: Path, option: str) -> None:
    """Refuse a link whose target does not exist."""
    if path.is_symlink() and not path.exists():
        wrong = f"a link to {os.readlink(path)}, which is not there"
        raise UserError(f"{option} {path}: {wrong}; make it or remove the link")


def documents(path: Path, option: str) -> Iterator[str]:
    """The documents of one file, without blank ones: the lines of a .txt, or the `text` of each
    record. An error names the line or row."""
    import pyarrow.parquet
    kind, place = path.suffix.lower(), 0
    try:
        with path.open("rb") as file:
            rows = file
            if kind == ".parquet":
                batches = pyarrow.parquet.ParquetFile(file).iter_batches(256, columns=["text"])
                rows = (text for batch in batches for text in batch["text"].to_pylist())
            for text in rows:
                place += 1
                if isinstance(text, bytes):  # a line, or a row of a binary column
                    text = text.decode("utf-8-sig").rstrip("\r\n")
                if kind == ".jsonl":
                    text = json.loads(text)["text"] if text.strip() else None
                if text is not None and text.strip():
                    text.encode()  # fails at a lone surrogate, which JSON can spell
                    yield text
    except (ValueError, LookupError, TypeError, AttributeError, pyarrow.ArrowException) as error:
        at = f"{'row' if kind == '.parquet' else 'line'} {place} " if place else ""
        wrong = f"{at}cannot be read ({type(error).__name__}: {str(error)[:100]})"
        wanted = "UTF-8 text, or JSON Lines or Parquet with a column named text"
        raise UserError(f"{option} {path}: {wrong}; expected {wanted}") from error


def read_corpora(args: Arguments, files: dict[str, list[Path]]) -> tuple[list, list[str]]:
    """The training documents as (weight, text), and the documents to report on."""
    train, held_out = [], []
    for name, weight in zip(args.corpus, args.corpus_weight, strict=True):
        paths, chars = random.Random(args.seed).sample(files[name], len(files[name])), 0
        first = len(train)
        for number, text in enumerate(t for path in paths for t in documents(path, "--corpus")):
            if args.eval_text is None and number % HELD_OUT == HELD_OUT - 1:
                held_out.append(text)
            else:
                train.append((weight, text))
            chars += len(text)
            if chars >= args.max_chars:
                break
        print(f"corpus {name}: {chars:,} characters, weight {weight:g}", flush=True)
        share = simplified_share(sample([t for _, t in train[first:]], REPORT_CHARS, args.seed))
        if share > SIMPLIFIED_SHARE:
            print(f"warning: --corpus {name}: {share:.0%} of the characters that the two scripts "
                  "write differently are Simplified; expected Traditional Chinese; convert it with "
                  "OpenCC (s2tw), or leave it out", file=sys.stderr, flush=True)
    if args.eval_text is not None:
        held_out = [t for path in files[args.eval_text] for t in documents(path, "--eval_text")]
        if not held_out:
            raise UserError(f"--eval_text {args.eval_text}: holds no text; name one that does")
    if not held_out:
        print("the corpus is too small to hold some out: the report is on the training text")
    return train, sample(held_out or [text for _, text in train], REPORT_CHARS, args.seed)


def sample(texts: list[str], chars: int, seed: int) -> list[str]:
    """Random texts with about that many characters in all."""
    texts, chosen = random.Random(seed).sample(texts, len(texts)), []
    while texts and chars > 0:
        chosen.append(texts.pop()[:chars])
        chars -= len(chosen[-1])
    return chosen


def simplified_share(texts: list[str]) -> float:
    """Share of Simplified forms among the characters that the two scripts write differently.
    Simplified forms that are also in Big5 (后, 里, 台) are not counted."""
    from opencc import OpenCC
    to_simplified, to_traditional = (OpenCC(name).convert for name in ("t2s", "s2t"))
    simplified = traditional = 0
    for sign, count in Counter(chain.from_iterable(texts)).items():
        if to_simplified(sign) != sign:
            traditional += count
        elif to_traditional(sign) != sign and not sign.encode("big5", "ignore"):
            simplified += count
    return simplified / max(1, simplified + traditional)


@cache
def taiwan_forms() -> dict[int, str]:
    """Map variant glyphs and curly quotes to Taiwan's forms. Characters of Big5 level 1 stay:
    OpenCC would turn the common 污 of 污染 into 汙."""
    import opencc
    ideographs = set(map(chr, chain(range(0x3400, 0xA000), range(0xF900, 0xFB00))))
    convert = opencc.OpenCC("t2tw").convert
    return QUOTES | {ord(sign): convert(sign) for sign in ideographs.difference(BIG5_LEVEL_1)}


def segments(text: str) -> Iterator[str]:
    """Split a text, in Taiwan's glyphs, into the runs that pieces are learnt from: no ASCII, no
    invisible characters, and short, since the trainer's positions have 16 bits."""
    for run in re.split(rf"[!-~{INVISIBLE}{SPACE}]+", text.translate(taiwan_forms())):
        yield from filter(str.strip, (run[i : i + 1000] for i in range(0, len(run), 1000)))


# --- The pieces ----------------------------------------------------------------------------------


def train_pieces(documents: list, args: Arguments, wanted: int, **changes) -> list[str]:
    """Candidates for new pieces as SentencePiece ranks them, single characters last.

    Weights enter as sentence frequencies. The trainer is asked for more than wanted, since some
    candidates are in the base already; it gives fewer where the corpus holds no more. Changes to
    TRAINER are for experiments.
    """
    from sentencepiece import SentencePieceTrainer
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    lines = [
        f"{segment}\t{max(1, round(100 * weight))}"
        for weight, text in tqdm(documents, "segments", unit=" texts", mininterval=1)
        for segment in segments(text)]
    if not lines:
        raise UserError(f"--corpus {' '.join(args.corpus)}: holds no text but ASCII")
    print("training SentencePiece BPE", flush=True)
    model, settings = BytesIO(), TRAINER | {"vocab_size": wanted + 20_000} | changes
    SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **settings)
    trained = ModelProto.FromString(model.getvalue())
    pieces = [p.piece for p in trained.pieces if p.type == p.NORMAL and p.piece != SPACE]
    merged = [piece for piece in pieces if len(piece) > 1]
    single = [piece for piece in pieces if len(piece) == 1]
    return merged[: first_singleton(merged, "\n".join(lines))] + single


def first_singleton(pieces: list[str], text: str) -> int:
    """Index of the first piece that occurs only once in the text: it is an accident, not a word.
    The list is sorted by falling frequency, so a binary search finds it. Each step looks at 50
    pieces, because some of the rare ones occur again inside longer ones."""

    def once(start: int) -> list[bool]:
        return [text.count(p.replace(SPACE, " ")) < 2 for p in pieces[start : start + 50]]

    start = bisect_left(range(len(pieces)), True, key=lambda start: any(once(start)))
    return start + [*once(start), True].index(True)


def merge_pieces(base, candidates: list[str], vocab_size: int) -> tuple[Any, list[str]]:
    """The base's pieces, then new ones up to vocab_size, none dead; and the dead candidates.

    BPE merges the pair with the highest score first. Distinct scores above the base's, falling in
    training order, replay the trainer's own merges, so every piece is reached; with equal scores,
    or scores below the base's, other merges come first and cut pieces off.
    """
    known = {piece.piece for piece in base.pieces}
    merged = [piece for piece in candidates if len(piece) > 1 and piece not in known]
    single = [piece for piece in candidates if len(piece) == 1 and piece not in known]
    size, top, dead = len(base.pieces), max(piece.score for piece in base.pieces), []
    room, given = vocab_size - size - len(single), f"--vocab_size {vocab_size}"
    if room < 0:
        parts = f"the base's {size} pieces and {len(single)} single characters"
        raise UserError(f"{given}: expected {size + len(single)} or more, for {parts}")
    while room <= len(merged):
        extended = type(base)()
        extended.CopyFrom(base)
        extended.trainer_spec.vocab_size = vocab_size
        for rank, piece in enumerate(merged[:room] + single):
            score = top + vocab_size - size - rank
            extended.pieces.add(piece=piece, score=score, type=base.SentencePiece.NORMAL)
        cut_off = set(dead_pieces(extended, size))
        if not cut_off:
            return extended, dead
        dead += sorted(cut_off)
        merged = [piece for piece in merged if piece not in cut_off]
    most = vocab_size - room + len(merged)
    raise UserError(f"{given}: the corpus yields {most} at most; lower it or add to --corpus")


def processor(model, prefix: bool = True) -> Any:
    """SentencePiece's own runtime; without prefix, it adds no space before the text."""
    from sentencepiece import SentencePieceProcessor
    copy = type(model)()
    copy.CopyFrom(model)
    copy.normalizer_spec.add_dummy_prefix &= prefix
    return SentencePieceProcessor(model_proto=copy.SerializeToString())


def spellings(model, pieces: list[str]) -> list[list[int]]:
    """The ids to which the model encodes the text of each piece."""
    surfaces = [piece.replace(SPACE, " ") for piece in pieces]
    return processor(model, prefix=False).encode(surfaces, num_threads=1)


def dead_pieces(model, start: int) -> list[str]:
    """The pieces from id start on that the model does not produce for their own text."""
    pieces = [piece.piece for piece in model.pieces][start:]
    found = spellings(model, pieces)
    return [p for i, (p, ids) in enumerate(zip(pieces, found, strict=True)) if ids != [start + i]]


def special_pieces(model) -> list[str]:
    """The pieces that no text spells: <unk> and every control piece."""
    return [p.piece for p in model.pieces if p.type in (p.UNKNOWN, p.CONTROL)]


def write_tokenizer(folder: Path, base_folder: Path, model) -> None:
    """tokenizer.model for SentencePiece's runtimes, tokenizer.json and its settings for the others.

    Transformers 5 orders merges by id when it converts a tokenizer.model, and its LlamaTokenizer
    drops a leading space; neither gives SentencePiece's ids. So tokenizer.json is written here,
    merges by score, and the class named in the settings is the one that takes the file as it is.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    scores = {p.piece: p.score for p in model.pieces if p.type == p.NORMAL}
    vocab = {piece.piece: number for number, piece in enumerate(model.pieces)}
    splits = sorted(
        (-score, vocab[piece], cut, piece[:cut], piece[cut:])
        for piece, score in scores.items() for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores)
    merges = [(left, right) for *_, left, right in splits]
    spec = model.trainer_spec
    unk, bos, eos = (model.pieces[i].piece for i in (spec.unk_id, spec.bos_id, spec.eos_id))
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", left=1, right=0)])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special_pieces(model)])

    path = base_folder / "tokenizer_config.json"
    old = load_json(path, f"--base_model {base_folder}") if path.is_file() else {}
    settings = {"add_bos_token": True, "add_eos_token": False, "model_max_length": 4096}
    kept = (*settings, "padding_side", "chat_template")
    settings |= {name: old[name] for name in kept if old.get(name) is not None}
    settings |= {
        "bos_token": bos, "eos_token": eos, "unk_token": unk,
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if old.get("pad_token") in list(vocab):  # another would become a piece behind the last row
        settings["pad_token"] = old["pad_token"]
    single = [bos] * settings["add_bos_token"] + ["$A"] + [eos] * settings["add_eos_token"]
    pair = single + [token.replace("$A", "$B") for token in single]
    ids = [(bos, spec.bos_id), (eos, spec.eos_id)]
    tokenizer.post_processor = processors.TemplateProcessing(single, pair, ids)
    tokenizer.save(str(folder / "tokenizer.json"))
    save_json(folder / "tokenizer_config.json", settings)


# --- The proof -----------------------------------------------------------------------------------


def prove(folder: Path, base, model, texts: list[str], seed: int) -> dict[str, int]:
    """Stop unless the folder's tokenizer is exact; return the counts for the report. Two kinds of
    texts are left out: those with U+2581, which no SentencePiece tokenizer can give back, and those
    that spell a special token, which Transformers reads as the token itself."""
    from transformers import AutoTokenizer
    size, chance = len(base.pieces), random.Random(seed)
    new = [piece.piece.replace(SPACE, " ") for piece in model.pieces][size:]
    texts = HARD_TEXTS + texts + ["".join(chance.choices(new, k=20)) for _ in range(1000)]
    texts += [piece * 3 for piece in chance.sample(new, min(1000, len(new)))]
    left_out = "|".join(map(re.escape, [SPACE, *special_pieces(model)]))
    texts = [text for text in texts if not re.search(left_out, text)]
    ours, theirs = processor(model), AutoTokenizer.from_pretrained(folder)
    ids, old_ids = ours.encode(texts), processor(base).encode(texts)
    their_ids = theirs(texts, add_special_tokens=False, verbose=False)["input_ids"]
    rows = list(zip(texts, ids, their_ids, old_ids, strict=True))
    trials = {
        "dead_pieces": dead_pieces(model, size),
        "texts_differing": [t for t, a, b, _ in rows if a != b],
        "texts_not_restored": [t for t, a, *_ in rows if {ours.decode(a), theirs.decode(a)} != {t}],
        "ascii_texts_changed": [t for t, a, _, old in rows if t.isascii() and a != old],
        "sizes_differing": [n for n in (len(theirs), len(ours)) if n != len(model.pieces)]}
    for trial, failures in trials.items():
        if failures:
            found = f"{trial} {len(failures)}, the first {str(failures[0])[:60]!r}"
            remedy = "please report it with --base_model and --corpus"
            raise UserError(f"proof failed, nothing was written: {found}; {remedy}")
    return dict.fromkeys(trials, 0) | {"texts_compared": len(texts)}


# --- The rows ------------------------------------------------------------------------------------


def new_rows(name: str, matrix, spelling: list, init: str, std: float, seed: int) -> Any:
    """Rows (N, H) for the N new pieces of the matrix (V, H), computed in fp32.

    subtoken: after a piece, the base has just read its last spelling row: that is the input row.
    Before a piece, the base predicts its first spelling row: the output row is a sum whose weights
    halve from row to row, scaled to the mean norm of the old rows. mean: no new piece gets more
    probability than the old ones (Hewitt, 2021).
    """
    import torch
    rows, parts = matrix.new_empty(len(spelling), matrix.shape[1]), matrix.split(1024)
    mean = (sum(part.double().sum(0) for part in parts) / len(matrix)).float()  # (H,)
    norm = sum(part.float().norm(dim=1).sum() for part in parts) / len(matrix)
    generator = torch.Generator().manual_seed(2 * seed + (name == HEAD))  # not twice the same
    for first in range(0, len(rows), 1024):  # little at a time
        some = spelling[first : first + 1024]
        if init == "mean_subtoken":
            block = torch.stack([matrix[ids].float().mean(0) for ids in some])  # (B, H)
        elif init == "subtoken" and name == HEAD:
            weighted = [0.5 ** torch.arange(len(ids)) @ matrix[ids].float() for ids in some]
            block = torch.stack(weighted)
            block *= norm / block.norm(dim=1, keepdim=True).clamp_min(1e-12)
        elif init == "subtoken":
            block = matrix[[ids[-1] for ids in some]]
        elif init == "random":
            block = std * torch.randn(len(some), len(mean), generator=generator)
        else:
            block = mean
        rows[first : first + 1024] = block
    return rows


def count_uses(model, documents: list) -> Counter:
    """How often each piece occurs in the documents, counted by their weights."""
    uses, encode = Counter(), processor(model)
    for weight, text in documents:
        for number in encode.encode(text):
            uses[number] += weight
    return uses


def distill_windows(model, documents: list, args: Arguments) -> list[list[int]]:
    """Ids of documents drawn by their weights, --distill_tokens of them (or as many as shared_rows
    needs), in windows that start with BOS."""
    wanted = args.distill_tokens if args.init == "distilled" else SHARE_WINDOWS * LOSS_WINDOW
    chance, bos, encode = random.Random(args.seed), model.trainer_spec.bos_id, processor(model)
    totals, ids = list(accumulate(weight for weight, _ in documents)), []
    while len(ids) < wanted:
        (_, text), = chance.choices(documents, cum_weights=totals)
        ids += [bos, *encode.encode(text)]
    places = range(0, wanted, LOSS_WINDOW)
    return [[bos, *ids[place : place + LOSS_WINDOW]] for place in places]


def teacher_states(llama, window: list[int], table: list[list[int]]) -> Any:
    """The base's last hidden states (T, H), after the last old token of every piece."""
    import torch
    spelled = torch.tensor([[i for number in window for i in table[number]]], device=llama.device)
    ends = torch.tensor([len(table[number]) for number in window]).cumsum(0) - 1
    with torch.no_grad():
        return llama.model(input_ids=spelled).last_hidden_state[0, ends].float()


def shared_rows(matrix, spelling: list[list[int]], uses: Counter, states) -> Any:
    """Output rows (N, H). The base gives a probability to a piece's first old token; it is divided
    among all pieces that begin with this token, in proportion to their use in the corpus.

    A head has no bias; but there is a direction u on which all hidden states h are near 1 (least
    squares), and the row of the first token plus u log(share) has its logit plus log(share).
    """
    import torch
    gram = states.T @ states
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    u = torch.linalg.solve(gram, states.sum(0))  # (H,)
    count = [uses[len(matrix) + number] + 0.1 for number in range(len(spelling))]
    total = Counter()
    for ids, number in zip(spelling, count, strict=True):
        total[ids[0]] += number
    shares = [number / total[ids[0]] for ids, number in zip(spelling, count, strict=True)]
    first = matrix[[ids[0] for ids in spelling]].float()
    return first + torch.tensor(shares, device=u.device).log()[:, None] * u


def student_distance(llama, rows, window: list[int], table: list[list[int]]) -> Any:
    """Squared distance between the base's hidden states on the new pieces (student) and those on
    their old spelling (teacher), relative to the teacher's mean square."""
    import torch
    embedding, ids = llama.get_input_embeddings().weight, torch.tensor(window, device=llama.device)
    old, teacher = len(embedding), teacher_states(llama, window, table)
    new, inputs = ids >= old, embedding[ids.clamp(max=old - 1)].float()  # (T, H)
    inputs = inputs.index_put((new,), rows[ids[new] - old]).to(embedding.dtype)
    student = llama.model(inputs_embeds=inputs[None]).last_hidden_state[0].float()
    return (student - teacher).square().mean() / teacher.square().mean()


def distill(llama, rows, windows: list[list[int]], table: list[list[int]], state: Path) -> None:
    """Fit the input rows so that the frozen base's states on the new pieces (the student) become
    those on the old spelling (the teacher): Dobler et al., ICLR 2026. Frequent pieces come often,
    so they are learnt first. The state on disk lets a run that was stopped go on."""
    import torch
    peak, done = DISTILL_RATE * llama.get_input_embeddings().weight.float().std().item(), 0
    optimizer = torch.optim.Adam([rows.requires_grad_()], betas=(0.9, 0.95))
    key = hashlib.sha256(repr([llama.name_or_path, windows, table]).encode()).hexdigest()
    if state.is_file() and (saved := torch.load(state, map_location="cpu"))["key"] == key:
        done = saved["done"]
        optimizer.load_state_dict(saved["optimizer"])
        rows.data.copy_(saved["rows"])
        print(f"going on after {done} of {len(windows)} windows")
    saved_at = monotonic()
    for window in tqdm(windows[done:], "distilling", len(windows), initial=done, unit=" windows"):
        optimizer.param_groups[0]["lr"] = peak * (1 - done / len(windows))
        student_distance(llama, rows, window, table).backward()
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        if done == len(windows) or monotonic() - saved_at > DISTILL_SAVE:
            part = state.with_suffix(".part")
            content = {"done": done, "rows": rows.detach(), "optimizer": optimizer.state_dict()}
            torch.save({"key": key} | content, part)
            part.replace(state)
            saved_at = monotonic()


def taught_rows(
    folder: Path, state: Path, base, model, spelling: list, documents: list, args: Arguments,
) -> dict[str, Any]:
    """The rows for which the base has to read text: output rows by shared_rows; input rows are the
    last spelling row, and with --init distilled fitted from there."""
    if args.init not in TAUGHT:
        return {}
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    uses, windows = count_uses(model, documents), distill_windows(model, documents, args)
    table = [[number] for number in range(len(base.pieces))] + spelling
    settings = {"dtype": torch.float32}
    if torch.cuda.is_available():
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        nf4 = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=torch.bfloat16)
        settings = {"dtype": torch.bfloat16, "device_map": "cuda", "quantization_config": nf4}
    llama = AutoModelForCausalLM.from_pretrained(folder, **settings).requires_grad_(False)
    embedding, head = llama.get_input_embeddings().weight, llama.get_output_embeddings().weight
    states = torch.cat([teacher_states(llama, w, table) for w in windows[:SHARE_WINDOWS]])
    output_rows = shared_rows(head, spelling, uses, states).cpu()
    input_rows = embedding[[ids[-1] for ids in spelling]].float()
    if args.init == "distilled":
        spelled = sum(len(table[number]) for window in windows for number in window)
        found = set(chain.from_iterable(windows)).difference(range(len(base.pieces)))
        print(f"distilling: {args.distill_tokens:,} tokens, forward and backward, {spelled:,} "
              f"in old pieces, forward; in them {len(found):,} of {len(spelling):,} new pieces; "
              f"{16 * input_rows.numel() / 1e9:.2f} GB for rows and Adam's state", flush=True)
        distill(llama, input_rows, windows, table, state)
    return {EMBEDDING: input_rows.detach().cpu(), HEAD: output_rows}


# --- The model -----------------------------------------------------------------------------------


def resize_model(folder: Path, base_folder: Path, shards: dict, rows_of, more: int) -> None:
    """Copy the base into the folder and append that many rows to embedding and head."""
    total = 0
    for path, tensors in tqdm(shards.items(), "writing", unit=" files"):
        target = folder / path.name
        if tensors.keys() & {EMBEDDING, HEAD}:
            grow_shard(path, target, rows_of, more)
        else:
            shutil.copyfile(path, target)
        with target.open("rb") as file:
            total += target.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    for name in PAPERS:
        for path in filter(Path.is_file, base_folder.glob(name)):
            shutil.copyfile(path, folder / path.name)
    if base_folder / "model.safetensors" not in shards:
        index = load_json(base_folder / INDEX, f"--base_model {base_folder}")
        save_json(folder / INDEX, index | {"metadata": {"total_size": total}})


def grow_shard(source: Path, target: Path, rows_of, more: int) -> None:
    """Copy one safetensors file and append the new rows to the matrices in it. The safetensors
    package needs all tensors in memory, so the file is written here: the header's length (8 bytes),
    the header in JSON, the tensors. Memory holds one matrix and its new rows."""
    import torch
    from safetensors import safe_open

    def read(name: str) -> Any:  # opened anew: the pages that a memory map has read count as ours
        with safe_open(source, "pt") as file:
            return file.get_tensor(name)

    header, end = {"__metadata__": {"format": "pt"}}, 0
    with safe_open(source, "pt") as file:  # only mapped: no tensor is read yet
        for name in file.offset_keys():
            part, size = file.get_slice(name), file.get_tensor(name).nbytes
            dtype, shape = part.get_dtype(), part.get_shape()
            if name in (EMBEDDING, HEAD):
                size, shape = size + size // shape[0] * more, [shape[0] + more, shape[1]]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    with target.open("wb") as grown:
        grown.write(len(text).to_bytes(8, "little") + text)
        for name in list(header)[1:]:
            grown.write(read(name).flatten().view(torch.uint8).numpy())
            if name in (EMBEDDING, HEAD):
                grown.write(rows_of(name, read(name)).view(torch.uint8).numpy())


# --- The report ----------------------------------------------------------------------------------


def measure(model, texts: list[str]) -> dict[str, float]:
    """How well the tokenizer fits the texts. Line breaks are not counted as byte tokens, which they
    are in every Llama tokenizer."""
    tokenizer = processor(model)
    ids = [i for row in tokenizer.encode(texts) for i in row]
    spelled = sum(map(tokenizer.is_byte, ids)) - ids.count(tokenizer.piece_to_id("<0x0A>"))
    chars = sum(map(len, texts))
    return {"characters_per_token": chars / len(ids), "byte_token_share": spelled / len(ids)}


def add_bits(report: dict, folder: Path, base, model, texts: list[str], wanted: str) -> None:
    """Add bits per character, which compares across tokenizers as loss per token does not, of the
    base and the extended model, unless the model is too large for this machine, see --eval_loss."""
    import torch
    from transformers import AutoModelForCausalLM
    size = sum(path.stat().st_size for path in folder.glob("[!.]*.safetensors"))
    gpu = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.2 * size
    if wanted == "no" or (wanted == "auto" and not gpu and size > CPU_LOSS_BYTES):
        return
    print("measuring the loss before training", flush=True)
    dtype, device = ("auto", "cuda") if gpu else (torch.float32, "cpu")
    llama = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device).eval()
    for name, tokenizer in (("base", base), ("extended", model)):
        report[name]["bits_per_character"] = bits_per_character(llama, tokenizer, texts)


def bits_per_character(llama, model, texts: list[str]) -> float:
    """-log2 p of the texts over their characters, in windows that start with BOS. The softmax is
    over the tokenizer's own rows of the head: the base's score does not depend on the new rows."""
    import torch
    nats, bos, device = 0.0, model.trainer_spec.bos_id, llama.device
    for ids in processor(model).encode(texts):
        for first in range(0, len(ids), LOSS_WINDOW):
            window = torch.tensor([[bos, *ids[first : first + LOSS_WINDOW]]], device=device)
            with torch.inference_mode():
                logits = llama(input_ids=window).logits[0, :-1, : len(model.pieces)].float()
            nats += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    return nats / math.log(2) / sum(map(len, texts))


def show(report: dict, text: str, model, picture: Path) -> None:
    """The report as a table, with one sentence in the new pieces, and as a picture."""
    from matplotlib.figure import Figure
    old, new, panels = report["base_vocab_size"], report["vocab_size"], {}
    print(f"{'':24}{'base':>12}{'extended':>12}\n{'pieces':24}{old:12,}{new:12,}")
    for title, key, factor in [("characters per token", "characters_per_token", 1),
                               ("byte tokens, %", "byte_token_share", 100),
                               ("bits/char untrained", "bits_per_character", 1)]:
        if key in report["base"]:
            base, extended = factor * report["base"][key], factor * report["extended"][key]
            print(f"{title:24}{base:12.2f}{extended:12.2f}")
            panels[title] = {f"base\n{old:,}": base, f"extended\n{new:,}": extended}
    print(f"proof: {report['proof']}; {report['replaced_pieces']} dead candidates were replaced")
    print("sample: " + "|".join(processor(model).encode(text[:60], out_type=str)))
    figure = Figure(figsize=(4.5 * len(panels), 3.2), layout="constrained")
    for axis, (title, bars) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        drawn = axis.bar([*bars], [*bars.values()], color=["#9aa5b1", "#b5322a"], width=0.6)
        axis.bar_label(drawn, fmt="%.2f")
        axis.set_title(title)
        axis.spines[["top", "right"]].set_visible(False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)


# --- The output folder ---------------------------------------------------------------------------


def already_done(output: Path, record: dict) -> bool:
    """Whether the output folder holds this same run, finished. Another run is refused, and any
    other content."""
    refuse_dead_link(output, "--output_dir")
    given, now, path = f"--output_dir {output}", record["arguments"], output / "run.json"
    if not output.exists() or (output.is_dir() and FOREIGN.issuperset(os.listdir(output))):
        return False
    then = load_json(path, given) if path.is_file() else {}
    ours = then.get("script") == "extend_vocab.py"
    refuse((not ours, f"{given}: extend_vocab.py did not make it; pass a new or empty folder"))
    if now["overwrite"]:
        refuse_others(output, then, given)
        return False
    before = asdict(Arguments()) | (then.get("arguments") or {})
    before |= {name: now[name] for name in ("overwrite", "picture")}
    differing = [f"--{name}" for name in now if now[name] != before.get(name)]
    sums, sums_then = record["inputs"], then.get("inputs") or {}  # the keys are paths
    differing += ["the files it reads"] if [*sums.values()] != [*sums_then.values()] else []
    refuse((differing, f"{given}: it holds a run with other settings ({', '.join(differing)}); add "
            "--overwrite to replace it, or pass another folder"))
    print(f"already done: {output} (--overwrite builds it anew)")
    return True


def refuse_others(output: Path, record: dict, shown: str) -> None:
    """Refuse to replace a folder that holds files besides those that run.json lists."""
    names = {*os.listdir(output)}
    others = sorted(names - {*record.get("written", names)} - FOREIGN)
    refuse((others, f"{shown}: {', '.join(others[:3])} there, {len(others)} in all, is not of the "
            "earlier run and would be lost; move it away, or pass another folder"))


def save_json(path: Path, content: dict) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=2)
    path.write_text(text + "\n", "utf-8", "backslashreplace")


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
def build_aside(output: Path, nbytes: float = 0) -> Iterator[Path]:
    """Yield a hidden folder beside the output. On success it replaces the output, on failure it is
    removed. A lock refuses a second run; the next run clears what a killed one left. Refuse an
    output that cannot be renamed, and a disk with less than nbytes free."""
    shown, output = f"--output_dir {output}", output.resolve()  # beside what a link leads to
    fixed = f"{shown}: a mount or the current folder, which cannot be replaced; pass a folder in it"
    refuse((Path.cwd().is_relative_to(output), fixed))
    partial, old = (output.with_name(f".{output.name}.{word}") for word in ("partial", "old"))

    def tidy() -> None:
        if old.exists() and not output.exists():  # stopped between the two renames
            old.rename(output)
        shutil.rmtree(old, ignore_errors=True)

    with ExitStack() as leaving:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            lock = os.open(partial, os.O_RDONLY)
            leaving.callback(os.close, lock)  # the last step, when all is tidy
            held = False
            with suppress(FileNotFoundError):  # renamed by now
                held = take_lock(lock, shown) and os.path.samestat(os.fstat(lock), partial.stat())
            refuse((not held, f"{shown}: another run is writing it; wait, or pass another folder"))
            leaving.push(lambda wrong, *_: wrong and shutil.rmtree(partial, ignore_errors=True))
            leaving.callback(tidy)
            tidy()
            for path in partial.iterdir():
                path.unlink()
            if output.exists():  # try it now, not after the work
                output.rename(old)
                tidy()
            if nbytes > (free := shutil.disk_usage(partial).free):
                remedy = "make room or pass a folder on another disk"
                found = f"{nbytes / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; {remedy}"
                raise OSError(errno.ENOSPC, found)
            yield partial
            for path in partial.iterdir():
                with path.open("r+b") as file:
                    os.fsync(file.fileno())
            if output.exists():
                output.rename(old)
            partial.rename(output)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise UserError(f"{shown}: {error.filename} is in the way; move it away") from error
        except OSError as error:
            refuse((error.errno in (errno.EBUSY, errno.EXDEV), fixed))
            cause = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
            message = f"{shown}: {cause or error}; it is as it was before"
            raise OSError(error.errno, message) from error


# --- Main ----------------------------------------------------------------------------------------


@ignore_write_errors()
@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Read base and corpus, make the tokenizer, prove it, grow the model, report."""
    args = parse_args(argv)
    check(args)
    base_folder, output = find_model(args.base_model, "--base_model"), Path(args.output_dir)
    base, config, shards = read_base(base_folder, args)
    files = {name: find_texts(name, "--corpus") for name in args.corpus}
    if args.eval_text is not None:
        files[args.eval_text] = find_texts(args.eval_text, "--eval_text")
    record = {"script": "extend_vocab.py", "arguments": asdict(args)}
    record["inputs"] = input_sums(base_folder, files)
    if already_done(output, record):
        return

    state = output.resolve().with_name(f".{output.name}.distilled")
    with build_aside(output, 1.3 * sum(path.stat().st_size for path in shards)) as folder:
        train, report_texts = read_corpora(args, files)
        candidates = train_pieces(train, args, args.vocab_size - len(base.pieces))
        model, replaced = merge_pieces(base, candidates, args.vocab_size)
        spelling = spellings(base, [piece.piece for piece in model.pieces][len(base.pieces) :])
        std = config.get("initializer_range", 0.02)
        report = {"base_vocab_size": len(base.pieces), "vocab_size": len(model.pieces)}
        report |= {"base": measure(base, report_texts), "extended": measure(model, report_texts)}
        report["replaced_pieces"] = len(replaced)
        write_tokenizer(folder, base_folder, model)
        texts = report_texts + sample([text for _, text in train], REPORT_CHARS, args.seed)
        report["proof"] = prove(folder, base, model, texts, args.seed)
        taught = taught_rows(base_folder, state, base, model, spelling, train, args)

        def rows_of(name: str, matrix) -> Any:
            if name in taught:
                return taught[name].to(matrix.dtype)
            return new_rows(name, matrix, spelling, args.init, std, args.seed)

        resize_model(folder, base_folder, shards, rows_of, len(spelling))
        save_json(folder / "config.json", config | {"vocab_size": len(model.pieces)})
        texts = sample(report_texts, LOSS_CHARS, args.seed)
        add_bits(report, folder, base, model, texts, args.eval_loss)
        record |= {"versions": {name: version(name) for name in PACKAGES}, "results": report}
        record["written"] = [*sorted(os.listdir(folder)), "run.json"]
        save_json(folder / "run.json", record)
        show(report, report_texts[0], model, Path(args.picture))
    state.unlink(missing_ok=True)
    print(f"wrote {output} and {args.picture}; next: python train_pt.py")


if __name__ == "__main__" and "__file__" in globals():  # a pasted notebook cell only defines
    main()
