"""Extend a Llama tokenizer and model with pieces for Traditional Chinese, every one of them alive.

In goes a base (Llama 2, or any Llama whose tokenizer is SentencePiece BPE) and a corpus; out comes
outputs/extended: tokenizer.model, tokenizer.json and the model with a row for every new piece.

1. SentencePiece BPE learns pieces on the corpus, its variant glyphs turned into Taiwan's standard
   forms by OpenCC, all 5,401 characters of Big5 level 1 included. No new piece holds ASCII, so
   English, code and digits keep the base's ids.
2. The pieces go behind the base's, in training order, their scores distinct and above the base's:
   then each can be produced. One that cannot makes way for the next candidate.
3. Proof, every run, before anything is written: no dead piece, SentencePiece and AutoTokenizer give
   the same ids, decoding gives the text back.
4. Only embedding, head and config change. They are streamed: 13.5 GB pass in under 2 GB of memory.

A run of a minute on any CPU (this command was run):
    python extend_vocab.py --base_model data/sample/tiny-llama --corpus data/cc_filtered \\
        --vocab_size 8000
The real run (the novel is fetched from Project Gutenberg when data/hongloumeng.txt is missing):
    python extend_vocab.py
Far better on modern text, with what filter_cc.py kept weighted against the novel:
    python extend_vocab.py --corpus data/hongloumeng.txt data/cc_filtered --corpus_weight 1 8

Cost, measured on 2 busy cores: 66 s and 0.9 GB of memory for 13.5 GB of weights (2.6 times as long
as cp -r); 20 s of CPU and 1 GB for each 10 million characters of corpus.
"""

import argparse
import errno
import hashlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
import urllib.request
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from http.client import HTTPException
from importlib.metadata import version
from io import BytesIO
from math import log, prod
from pathlib import Path
from typing import Literal

from tqdm import tqdm
from transformers import HfArgumentParser

# Heavy imports (torch, transformers' models, matplotlib) wait inside the functions that use them.

# --- Constants -----------------------------------------------------------------------------------

HONGLOUMENG = "data/hongloumeng.txt"
HONGLOUMENG_URL = "https://www.gutenberg.org/cache/epub/24264/pg24264.txt"
TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
NORMAL, USER_DEFINED, BPE = 1, 4, 2  # SentencePiece's piece types and its model type
INITS = ("mean_subtoken", "mean", "random")
HELD_OUT = 50  # one document in so many is kept out of training, for the report
REPORT_CHARS, LOSS_CHARS, LOSS_WINDOW = 1_000_000, 8192, 512
CPU_LOSS_BYTES = 400_000_000  # the largest model that --eval_loss auto runs on a CPU
BLOCK_ROWS, BLOCK_BYTES = 1024, 16 << 20
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
PICTURE = "pictures/vocab.png"
PACKAGES = ("sentencepiece", "transformers", "tokenizers", "safetensors", "torch", "opencc")
KINDS = {"base": "base_vocab_size", "extended": "vocab_size"}
MEASURES = [  # key in the report, title, factor
    ("characters_per_token", "characters per token", 1),
    ("byte_token_share", "byte tokens, %", 100),
]

# Level 1 of Big5: what Taiwan's schools and newspapers use; lead bytes A4 to C6, C6 up to 7E.
BIG5_LEVEL_1 = [
    bytes([lead, trail]).decode("big5")
    for lead in range(0xA4, 0xC7)
    for trail in (*range(0x40, 0x7F), *range(0xA1, 0xFF))
    if lead < 0xC6 or trail < 0x7F
]

TRAINER = {  # SentencePiece's own defaults elsewhere; the text arrives in segments, see there
    "model_type": "bpe",
    "input_format": "tsv",
    "hard_vocab_limit": False,
    "required_chars": "".join(BIG5_LEVEL_1),
    "character_coverage": 0.99999,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "max_sentence_length": 1 << 16,
    "shuffle_input_sentence": False,
    "num_threads": 1,
    "minloglevel": 2,
}

# Texts on which tokenizers are known to part ways; every run proves itself on them.
HARD_TEXTS = [
    "",
    *(" " * n for n in range(1, 40)),
    *("\n" * n for n in range(1, 6)),
    *("中" * n + "。" * n for n in range(1, 20)),
    *(f"a{' ' * n}b{' ' * n}\n{' ' * n}中{' ' * n}文" for n in range(1, 20)),
    "The quick brown fox jumps over the lazy dog; it's 1,234.5 km (or 12%) away.",
    "def f(x: int) -> str:\n\tif x > 0:\n        return f'{x!r:>8}'\n\n    # 註解：回傳字串\n",
    '{"name": "落九", "size": [61388, 4096]}\r\n<div class="a">&nbsp;</div>\\n',
    "😀👍🏽👨‍👩‍👧 🇹🇼 emoji 和中文混排😂😂😂",
    "我用Python 3.11寫程式，在 GitHub 上 開源。ＦＵＬＬ　ｗｉｄｔｈ１２３！",
    "日本語のテキスト、한국어, ελληνικά, кириллица, ไทย, العربية, naïve café",
    "簡體：这个软件的质量。注音：ㄅㄆㄇ。罕用：𠮷𡈽龘㐂。\u200b\ufeff\u3000\xa0\x07",
]

# --- Arguments -----------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the docstring as it is written and every option's default."""


@dataclass
class Arguments:
    """Every option of the command line; the help text is the documentation."""

    base_model: str = field(
        default="meta-llama/Llama-2-7b-hf",
        metadata={"help": "Model to extend: a folder or a hub id; safetensors, SentencePiece BPE."},
    )
    corpus: list[str] = field(
        default_factory=lambda: [HONGLOUMENG],
        metadata={"help": "Texts to learn pieces from: .txt, .jsonl, .parquet (text), or folders."},
    )
    corpus_weight: list[float] = field(
        default_factory=list,
        metadata={"help": "How many times each --corpus counts, in its order; none: 1 each."},
    )
    vocab_size: int = field(
        default=61388, metadata={"help": "Pieces of the new tokenizer, the base's included."}
    )
    output_dir: str = field(
        default="outputs/extended", metadata={"help": "Folder for tokenizer, model and report."}
    )
    init: Literal["mean_subtoken", "mean", "random"] = field(
        default="mean_subtoken",
        metadata={
            "help": "New rows: the mean of the base's rows that spell the piece, the mean of all "
            "rows (Hewitt 2021), or normal noise of the config's initializer_range."
        },
    )
    eval_text: str | None = field(
        default=None,
        metadata={"help": "Text to report on (file or folder); None: 2%% held out of the corpus."},
    )
    eval_loss: Literal["auto", "yes", "no"] = field(
        default="auto",
        metadata={
            "help": "Report the loss before training for every --init; auto: when the model fits "
            "the GPU, or is under 0.4 GB."
        },
    )
    max_chars: int = field(
        default=20_000_000,
        metadata={"help": "Characters read of each --corpus at most, files in random order."},
    )
    split_by_unicode_script: bool = field(
        default=False,
        metadata={"help": "Keep punctuation out of pieces with characters (fewer chars a token)."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the file order and of --init random."})
    overwrite: bool = field(
        default=False, metadata={"help": "Build anew even if --output_dir holds a finished run."}
    )


def parse_args(argv: list[str] | None) -> Arguments:
    """Read the command line (None: sys.argv; in a notebook nothing); exit code 2 if it is wrong."""
    parser = HfArgumentParser(
        Arguments,
        description=__doc__,
        formatter_class=HelpFormatter,
        usage="%(prog)s [options]",
        allow_abbrev=False,
    )
    if argv is None and "__file__" not in globals():
        argv = []  # a notebook's sys.argv is Jupyter's own
    args, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unknown option: {' '.join(unknown)}; --help lists the options")
    return args


def check(args: Arguments) -> None:
    """Refuse what can be refused before anything is read."""
    args.corpus_weight = args.corpus_weight or [1.0] * len(args.corpus)
    if len(args.corpus_weight) != len(args.corpus) or min(args.corpus_weight) <= 0:
        raise UserError(
            f"--corpus_weight {args.corpus_weight}: expected {len(args.corpus)} numbers above 0, "
            "one for each --corpus"
        )
    for name, least in (("max_chars", 1000), ("vocab_size", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: expected {least} or more")
    if Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        raise UserError(f"--output_dir {args.output_dir}: is a file; name a folder")


# --- Errors --------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake that the user can mend: the argument, its value, what was expected, what to do."""


@contextmanager
def user_errors() -> Iterator[None]:
    """End mistakes and refusals in one line: exit code 2 for a UserError, 1 for a full or read-only
    disk, 130 for Ctrl-C. Anything else is our bug and keeps its traceback."""
    refusals = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
    try:
        yield
        return
    except UserError as error:
        message, code = f"error: {error}", 2
    except KeyboardInterrupt:
        message, code = "interrupted; run the same command again to go on", 130
    except Exception as error:
        if getattr(error, "errno", None) not in refusals and "No space left" not in str(error):
            raise
        message, code = f"error: {error}", 1
    print(message, file=sys.stderr)
    raise SystemExit(code)


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
            f"{option} data/sample/tiny-llama tries the whole pipeline"
        ) from error
    if not (Path(snapshot) / "config.json").is_file():
        raise UserError(f"{given}: the repository has no config.json; expected a model")
    return Path(snapshot)


def read_base(folder: Path, args: Arguments):
    """The base's tokenizer (ModelProto), config and shards, refused unless exactly extensible."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    option = f"--base_model {args.base_model}"
    base = ModelProto()
    try:
        base.ParseFromString((folder / "tokenizer.model").read_bytes())
    except Exception as error:
        raise UserError(
            f"{option}: tokenizer.model is missing or not SentencePiece's; expected a model with a "
            "SentencePiece BPE tokenizer, such as Llama 2, TinyLlama or Mistral 7B v0.1"
        ) from error
    spec, normal = base.trainer_spec, base.normalizer_spec
    if (
        spec.model_type != BPE
        or normal.precompiled_charsmap
        or normal.remove_extra_whitespaces
        or not normal.add_dummy_prefix
        or any(piece.type == USER_DEFINED for piece in base.pieces)
        or min(spec.unk_id, spec.bos_id, spec.eos_id) < 0
    ):
        raise UserError(
            f"{option}: its tokenizer.model is not like Llama 2's; expected SentencePiece BPE, no "
            "normalisation, a prefix space and no user-defined pieces"
        )
    size = len(base.pieces)
    if args.vocab_size <= size:
        raise UserError(f"--vocab_size {args.vocab_size}: expected more than the base's {size}")
    config = read_json(folder / "config.json", option)
    shards = read_shards(folder, option)
    items = {name: item for _, header in shards.values() for name, item in header.items()}
    tied = config.get("tie_word_embeddings", False)
    matrices = [EMBEDDING] if tied and HEAD not in items else [EMBEDDING, HEAD]
    rows = {name: items[name]["shape"][0] if name in items else None for name in matrices}
    rows["config.json"] = config.get("vocab_size")
    if set(rows.values()) != {size}:
        raise UserError(
            f"{option}: its tokenizer.model has {size} pieces, its rows are {rows}; expected the "
            "same number everywhere (no padding rows, no added tokens)"
        )
    kinds = {items[name]["dtype"] for name in matrices}
    if "quantization_config" in config or not kinds <= {"BF16", "F16", "F32"}:
        raise UserError(f"{option}: is quantised; expected weights in bf16, fp16 or fp32")
    return base, config, shards


def read_shards(folder: Path, option: str) -> dict[Path, tuple[int, dict]]:
    """Each safetensors file with the offset of its data and its header, whole files only."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(read_json(index, option)["weight_map"].values())
    elif next(folder.glob("*.bin"), None) and not (folder / "model.safetensors").is_file():
        raise UserError(
            f"{option}: has .bin weights only; expected safetensors; load it with "
            "AutoModelForCausalLM and save it with save_pretrained(folder), then name that folder"
        )
    shards = {}
    for path in (folder / name for name in sorted(names)):
        if not path.is_file():
            raise UserError(f"{option}: {path.name} is missing; fetch the model again")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            head = file.read(length) if length < path.stat().st_size else b""
        try:
            header = json.loads(head)
            end = max(item["data_offsets"][1] for item in tensors(header).values())
        except (ValueError, AttributeError, KeyError) as error:
            raise UserError(f"{option}: {path.name} is not a safetensors file") from error
        if path.stat().st_size != 8 + length + end:
            raise UserError(f"{option}: {path.name} is cut short; fetch the model again")
        shards[path] = (8 + length, header)
    return shards


def tensors(header: dict) -> dict[str, dict]:
    """The tensors of a safetensors header, in the order in which their bytes lie."""
    items = [(name, item) for name, item in header.items() if name != "__metadata__"]
    return dict(sorted(items, key=lambda entry: entry[1]["data_offsets"]))


# --- The corpus ----------------------------------------------------------------------------------


def fetch_hongloumeng(path: Path) -> None:
    """Save the novel from Project Gutenberg (ebook 24264) without the licence before and after."""
    print(f"{path} is missing: fetching {HONGLOUMENG_URL}", flush=True)
    request = urllib.request.Request(HONGLOUMENG_URL, headers={"User-Agent": "Mozilla/5.0"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read().decode("utf-8-sig")
        start, end = (re.search(rf"\*\*\* ?{word} OF .*", text) for word in ("START", "END"))
        body = text[start.end() : end.start()].strip()
    except (OSError, ValueError, AttributeError, HTTPException) as error:
        raise UserError(
            f"--corpus {path}: is missing and could not be fetched ({error}); save "
            f"{HONGLOUMENG_URL} there by hand, or name other texts with --corpus"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    part.write_text(body + "\n", encoding="utf-8")
    part.replace(path)


def find_texts(name: str, option: str) -> list[Path]:
    """The text files that a --corpus or --eval_text names."""
    path = Path(name)
    if name == HONGLOUMENG and not path.exists():
        fetch_hongloumeng(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in TEXT_SUFFIXES)
    else:
        files = [path] if path.is_file() and path.suffix in TEXT_SUFFIXES else []
    if not files:
        first = path.parts[:2] == ("data", "cc_filtered") and not path.exists()
        remedy = "run python filter_cc.py first" if first else "name such a file or folder"
        kinds = ", ".join(TEXT_SUFFIXES)
        raise UserError(
            f"{option} {name}: no text there; expected {kinds} or a folder of them; {remedy}"
        )
    return files


def documents(path: Path, option: str) -> Iterator[str]:
    """The documents of one file: lines of a .txt, the `text` of each record of the others."""
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(256, columns=["text"]):
                yield from filter(None, batch.column("text").to_pylist())
            return
        with path.open(encoding="utf-8") as file:
            for line in file:
                text = json.loads(line)["text"] if path.suffix == ".jsonl" else line.rstrip("\n")
                if text.strip():
                    yield text
    except (ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{option} {path}: cannot be read ({type(error).__name__}: {str(error)[:100]}); "
            "expected UTF-8 text, or JSON Lines or Parquet with a column named text"
        ) from error


def read_corpora(args: Arguments, files: dict[str, list[Path]]) -> tuple[list, list[str]]:
    """The training documents as (weight, text), and the documents that the report is about."""
    train, held_out = [], []
    for name, weight in zip(args.corpus, args.corpus_weight, strict=True):
        paths = list(files[name])
        random.Random(args.seed).shuffle(paths)
        chars = 0
        for number, text in enumerate(t for path in paths for t in documents(path, "--corpus")):
            if args.eval_text is None and number % HELD_OUT == HELD_OUT - 1:
                held_out.append(text)
            else:
                train.append((weight, text))
            chars += len(text)
            if chars >= args.max_chars:
                break
        print(f"corpus {name}: {chars:,} characters, weight {weight:g}", flush=True)
    if args.eval_text is not None:
        held_out = [t for path in files[args.eval_text] for t in documents(path, "--eval_text")]
    if not held_out:
        print("the corpus is too small to hold some out: the report is on the training text")
    return train, sample(held_out or [text for _, text in train], REPORT_CHARS, args.seed)


def sample(texts: list[str], chars: int, seed: int) -> list[str]:
    """As many of the texts, shuffled, as hold about so many characters."""
    texts, chosen = random.Random(seed).sample(texts, len(texts)), []
    while texts and chars > 0:
        chosen.append(texts.pop()[:chars])
        chars -= len(chosen[-1])
    return chosen


@cache
def taiwan_forms():
    import opencc

    return opencc.OpenCC("t2tw"), frozenset(BIG5_LEVEL_1)


def standard_glyphs(text: str) -> str:
    """Variant glyphs as Taiwan writes them. Characters of Big5 level 1 stay: OpenCC would turn the
    everyday 污 of 污染 into 汙."""
    converter, level_1 = taiwan_forms()
    converted = converter.convert(text)
    if converted == text or len(converted) != len(text):
        return converted
    return "".join(a if a in level_1 else b for a, b in zip(text, converted, strict=True))


# --- The tokenizer -------------------------------------------------------------------------------


def segments(text: str) -> Iterator[str]:
    """What pieces may come from: runs without ASCII signs, short enough for the trainer (its
    positions have 16 bits)."""
    for run in re.split(rf"[!-~\x00-\x1f\x7f{SPACE}]+", standard_glyphs(text)):
        for start in range(0, len(run), 1000):
            if not run[start : start + 1000].isspace() and run:
                yield run[start : start + 1000]


def train_pieces(documents: list, args: Arguments, wanted: int, **changes) -> list[str]:
    """Candidates for new pieces as SentencePiece ranks them, single characters last.

    Weights enter as sentence frequencies. The trainer is asked for more than wanted, since some
    candidates will be in the base already, and gives fewer where the corpus holds no more.
    Changes to TRAINER are for experiments.
    """
    import sentencepiece
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model, trained = BytesIO(), ModelProto()
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "segments.tsv"
        with table.open("w", encoding="utf-8") as file:
            for weight, text in tqdm(documents, "segments", unit=" texts", mininterval=1):
                file.writelines(f"{s}\t{max(1, round(100 * weight))}\n" for s in segments(text))
        if not table.stat().st_size:
            raise UserError(f"--corpus {' '.join(args.corpus)}: holds no text but ASCII")
        print("training SentencePiece BPE", flush=True)
        settings = TRAINER | {"split_by_unicode_script": args.split_by_unicode_script} | changes
        sentencepiece.SentencePieceTrainer.train(
            input=str(table), model_writer=model, vocab_size=wanted + 20_000, **settings
        )
        lines = table.read_text(encoding="utf-8")
    trained.ParseFromString(model.getvalue())
    pieces = [piece.piece for piece in trained.pieces if piece.type == NORMAL]
    merged = [piece for piece in pieces if len(piece) > 1]
    single = [piece for piece in pieces if len(piece) == 1 and piece != SPACE]
    return merged[: first_singleton(merged, lines)] + single


def first_singleton(pieces: list[str], text: str) -> int:
    """Where the pieces begin that the text has only once, which are accidents and no words.

    The trainer's frequencies fall along the list: before that place every piece occurs twice, and
    after it some still seem to, inside others, but hardly fifty in a row.
    """

    def once(start: int) -> int | None:
        block = enumerate(pieces[start : start + 50], start)
        return next((i for i, p in block if text.count(p.replace(SPACE, " ")) < 2), None)

    start = bisect_left(range(len(pieces)), True, key=lambda start: once(start) is not None)
    return len(pieces) if start == len(pieces) else once(start)


def merge_pieces(base, candidates: list[str], vocab_size: int):
    """The base's pieces, then new ones up to vocab_size, each alive; and the candidates that died.

    BPE merges the pair with the highest score first. Distinct scores above the base's, falling in
    training order, replay the trainer's own merges, so every piece is reached; with equal scores,
    or scores below the base's, other merges come first and cut pieces off.
    """
    known = {piece.piece for piece in base.pieces}
    merged = [piece for piece in candidates if len(piece) > 1 and piece not in known]
    single = [piece for piece in candidates if len(piece) == 1 and piece not in known]
    size, dead = len(base.pieces), []
    room, top = vocab_size - size - len(single), max(piece.score for piece in base.pieces)
    if room < 0:
        raise UserError(
            f"--vocab_size {vocab_size}: expected {size + len(single)} or more, for the base's "
            f"{size} pieces and {len(single)} single characters"
        )
    while True:
        if room > len(merged):
            raise UserError(
                f"--vocab_size {vocab_size}: the corpus yields {vocab_size - room + len(merged)} "
                "at most; lower it or add to --corpus"
            )
        extended = type(base)()
        extended.CopyFrom(base)
        extended.trainer_spec.vocab_size = vocab_size
        for rank, piece in enumerate(merged[:room] + single):
            extended.pieces.add(piece=piece, score=top + vocab_size - size - rank, type=NORMAL)
        cut_off = set(dead_pieces(extended, size))
        if not cut_off:
            return extended, dead
        dead += sorted(cut_off)
        merged = [piece for piece in merged if piece not in cut_off]


def processor(model, prefix: bool = True):
    """SentencePiece's own runtime; without prefix, a text is encoded as if inside another."""
    import sentencepiece

    copy = type(model)()
    copy.CopyFrom(model)
    copy.normalizer_spec.add_dummy_prefix &= prefix
    return sentencepiece.SentencePieceProcessor(model_proto=copy.SerializeToString())


def spellings(model, pieces: list[str]) -> list[list[int]]:
    """The ids to which the model encodes the surface of each piece."""
    surfaces = [piece.replace(SPACE, " ") for piece in pieces]
    return processor(model, prefix=False).encode(surfaces, num_threads=1)


def dead_pieces(model, start: int) -> list[str]:
    """The pieces from id start on that their own surface does not encode to."""
    pieces = [piece.piece for piece in model.pieces][start:]
    found = spellings(model, pieces)
    return [p for i, (p, ids) in enumerate(zip(pieces, found, strict=True)) if ids != [start + i]]


def write_tokenizer(folder: Path, base_folder: Path, model) -> None:
    """tokenizer.model for SentencePiece's runtimes, tokenizer.json and its settings for the others.

    Transformers 5 orders merges by id when it converts a tokenizer.model, and its LlamaTokenizer
    drops a leading space; neither gives SentencePiece's ids. So tokenizer.json is written here,
    merges by score, and the class named in the settings is the one that takes the file as it is.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL}
    vocab = {piece.piece: number for number, piece in enumerate(model.pieces)}
    splits = [
        (-score, vocab[piece], cut, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    merges = [(left, right) for *_, left, right in sorted(splits)]
    spec = model.trainer_spec
    unk, bos, eos = (model.pieces[i].piece for i in (spec.unk_id, spec.bos_id, spec.eos_id))
    bpe = models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", left=1, right=0)])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in (unk, bos, eos)])

    settings = {"add_bos_token": True, "add_eos_token": False, "model_max_length": 4096}
    settings |= {"bos_token": bos, "eos_token": eos, "unk_token": unk}
    old = base_folder / "tokenizer_config.json"
    old = read_json(old, f"--base_model {base_folder}") if old.is_file() else {}
    kept = (*settings, "pad_token", "padding_side", "chat_template")
    settings |= {name: old[name] for name in kept if old.get(name) is not None}
    pad = settings.get("pad_token")
    if (pad["content"] if isinstance(pad, dict) else pad) not in vocab:
        settings.pop("pad_token", None)  # it would become a piece behind the last row
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["clean_up_tokenization_spaces"] = False
    before = f"{bos} " if settings["add_bos_token"] else ""
    after = f" {eos}" if settings["add_eos_token"] else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before}$A{after}",
        pair=f"{before}$A{after} {before}$B{after}",
        special_tokens=[(bos, spec.bos_id), (eos, spec.eos_id)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    save_json(folder / "tokenizer_config.json", settings)
    specials = {name: settings[name] for name in settings if name in SPECIAL_TOKENS}
    save_json(folder / "special_tokens_map.json", specials)


# --- The proof -----------------------------------------------------------------------------------


def prove(folder: Path, base, model, texts: list[str], seed: int) -> dict:
    """Stop unless the folder's tokenizer is exact; what was counted goes into the report.

    Left out are texts that no SentencePiece tokenizer can give back (with U+2581 in them) or that
    spell a special token, which Transformers takes for the token itself.
    """
    from transformers import AutoTokenizer

    size = len(base.pieces)
    new = [piece.piece.replace(SPACE, " ") for piece in model.pieces][size:]
    chance = random.Random(seed)
    texts = HARD_TEXTS + texts + ["".join(chance.choices(new, k=20)) for _ in range(1000)]
    texts += [piece * 3 for piece in chance.sample(new, min(1000, len(new)))]
    texts = [text for text in texts if not re.search(rf"{SPACE}|<unk>|</?s>", text)]
    ours = processor(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = ours.encode(texts)
    theirs = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    plain = [text for text in texts if text.isascii()]
    plain_ids = zip(processor(base).encode(plain), ours.encode(plain), strict=True)
    both = list(zip(texts, ids, strict=True))
    trials = {
        "dead_pieces": dead_pieces(model, size),
        "texts_differing": [t for (t, a), b in zip(both, theirs, strict=True) if a != b],
        "texts_not_restored": [
            t for t, a in both if not t == ours.decode(a) == tokenizer.decode(a)
        ],
        "ascii_texts_changed": [t for t, (a, b) in zip(plain, plain_ids, strict=True) if a != b],
        "sizes_differing": [n for n in (len(tokenizer), len(ours)) if n != len(model.pieces)],
    }
    for trial, failures in trials.items():
        if failures:
            raise UserError(
                f"proof failed, nothing was written: {trial} {len(failures)}, the first "
                f"{failures[0][:60]!r}; please report it with the --corpus and --base_model used"
            )
    return dict.fromkeys(trials, 0) | {"texts_compared": len(texts)}


def measure(model, texts: list[str]) -> dict[str, float]:
    """How well the tokenizer fits the texts. A line break is a byte token in every Llama tokenizer
    and no failure, so the share of byte tokens leaves it out."""
    tokenizer = processor(model)
    ids = [i for row in tokenizer.encode(texts) for i in row]
    spelled = sum(map(tokenizer.is_byte, ids)) - ids.count(tokenizer.piece_to_id("<0x0A>"))
    chars = sum(map(len, texts))
    return {"characters_per_token": chars / len(ids), "byte_token_share": spelled / len(ids)}


# --- The model -----------------------------------------------------------------------------------


def new_rows(name: str, matrix, spelling: list[list[int]], init: str, std: float, seed: int):
    """Yield rows for the new pieces, in blocks (B, H) of the matrix (V, H), computed in fp32.

    mean_subtoken: the mean of the rows that spell the piece, so it starts amid its parts. mean: the
    mean of all rows, so that no new piece outweighs the old ones (Hewitt, 2021).
    """
    import torch

    generator = torch.Generator().manual_seed(2 * seed + (name == HEAD))  # not twice the same
    if init == "mean":
        total = sum(block.float().sum(0, dtype=torch.float64) for block in matrix.split(BLOCK_ROWS))
        mean = (total / len(matrix)).to(matrix.dtype)
    for start in range(0, len(spelling), BLOCK_ROWS):
        block = spelling[start : start + BLOCK_ROWS]
        if init == "mean":
            yield mean.expand(len(block), -1)
        elif init == "random":
            noise = torch.randn(len(block), matrix.shape[1], generator=generator)
            yield (std * noise).to(matrix.dtype)
        else:
            parts = matrix[torch.tensor([i for ids in block for i in ids])].float()
            lengths = torch.tensor([len(ids) for ids in block])
            yield torch.segment_reduce(parts, "mean", lengths=lengths).to(matrix.dtype)


def resize_model(folder: Path, base_folder: Path, shards: dict, rows_of, more: int) -> None:
    """Stream the base into the folder: more rows behind embedding and head, the rest unchanged."""
    total = sum(path.stat().st_size for path in shards)
    if total * 1.3 > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, f"--output_dir: {total * 1.3 / 1e9:.1f} GB of disk are needed")
    with tqdm(total=total, desc="writing", unit="B", unit_scale=True, mininterval=1) as bar:
        for path, (start, header) in shards.items():
            target = folder / path.name
            if {EMBEDDING, HEAD} & header.keys():
                grow_shard(path, target, start, header, rows_of, more)
            else:
                shutil.copyfile(path, target)
            bar.update(path.stat().st_size)
    for path in shards:  # only now, so that the disk was busy all the while
        sync(folder / path.name)
    for pattern in (
        "model.*.index.json",
        "generation_config.json",
        "*.jinja",
        "LICENSE*",
        "USE_POLICY*",
    ):
        for path in base_folder.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = read_json(index, f"--base_model {base_folder}")
        items = [i for _, h in read_shards(folder, "result").values() for i in tensors(h).values()]
        sizes = {"total_size": sum(i["data_offsets"][1] - i["data_offsets"][0] for i in items)}
        sizes["total_parameters"] = sum(prod(i["shape"]) for i in items)
        content["metadata"] = {**content.get("metadata", {}), **sizes}
        save_json(index, content)


def grow_shard(source: Path, target: Path, start: int, header: dict, rows_of, more: int) -> None:
    """Copy one safetensors file (data from offset start), growing the matrices that are in it; in
    blocks, front to back, so memory holds the touched pages of one matrix and no more."""
    import torch
    from safetensors import safe_open

    new_header, end = {key: value for key, value in header.items() if key == "__metadata__"}, 0
    for name, item in tensors(header).items():
        begin, shape = end, list(item["shape"])
        size = item["data_offsets"][1] - item["data_offsets"][0]
        if name in (EMBEDDING, HEAD):
            size += size // shape[0] * more
            shape[0] += more
        end += size
        new_header[name] = {"dtype": item["dtype"], "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(new_header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with source.open("rb") as old, target.open("wb") as new, safe_open(source, "pt") as reader:
        new.write(len(head).to_bytes(8, "little") + head)
        for name, item in tensors(header).items():
            first, last = item["data_offsets"]
            old.seek(start + first)
            for offset in range(first, last, BLOCK_BYTES):
                new.write(old.read(min(BLOCK_BYTES, last - offset)))
            if name in (EMBEDDING, HEAD):
                for rows in rows_of(name, reader.get_tensor(name)):
                    new.write(rows.contiguous().view(torch.uint8).numpy().data)


# --- The report ----------------------------------------------------------------------------------


def starting_losses(folder: Path, base, model, texts: list[str], rows_of, eval_loss: str) -> dict:
    """Bits per character before any training: the base with its own tokenizer, then every --init.

    Bits per character compares across tokenizers, as loss per token does not. Empty where the
    model is too large for this machine (see --eval_loss).
    """
    import torch

    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    gpu = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.2 * size
    if eval_loss == "no" or (eval_loss == "auto" and not gpu and size > CPU_LOSS_BYTES):
        return {}
    from transformers import AutoModelForCausalLM

    print("measuring the loss before training for each --init", flush=True)
    dtype, device = ("auto", "cuda") if gpu else (torch.float32, "cpu")
    llama = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device).eval()
    matrices = {EMBEDDING: llama.get_input_embeddings().weight}
    if not llama.config.tie_word_embeddings:
        matrices[HEAD] = llama.get_output_embeddings().weight
    bos, start = base.trainer_spec.bos_id, len(base.pieces)
    with torch.inference_mode():
        losses = {"base": bits_per_character(llama, processor(base), texts, bos, start)}
        for init in INITS:
            for name, matrix in matrices.items():
                matrix[start:] = torch.cat(list(rows_of(name, matrix[:start].cpu(), init=init)))
            losses[init] = bits_per_character(llama, processor(model), texts, bos, len(matrix))
    return losses


def bits_per_character(llama, tokenizer, texts: list[str], bos: int, rows: int) -> float:
    """-log2 p of the texts over their characters, in windows that start with BOS; only the first
    rows of the head count, so that a base is not charged for pieces that it does not have."""
    import torch

    nats, device = 0.0, llama.device
    for ids in tokenizer.encode(texts):
        for first in range(0, len(ids), LOSS_WINDOW):
            window = torch.tensor([[bos, *ids[first : first + LOSS_WINDOW]]], device=device)
            logits = llama(input_ids=window).logits[0, :-1, :rows].float()  # (T, V)
            nats += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    return nats / log(2) / sum(map(len, texts))


def draw(report: dict, path: Path) -> None:
    """The report as a picture: base beside extended."""
    from matplotlib.figure import Figure

    losses = report["bits_per_character_before_training"]
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots(1, 3 if losses else 2)
    names = [f"{kind}\n{report[size]:,}" for kind, size in KINDS.items()]
    for axis, (key, title, scale) in zip(axes, MEASURES, strict=False):
        values = [scale * report[kind][key] for kind in KINDS]
        bars = axis.bar(names, values, color=["#9aa5b1", "#b5322a"], width=0.6)
        axis.bar_label(bars, fmt="%.2f")
        axis.set_title(title)
    if losses:
        bars = axes[2].barh(list(losses)[::-1], list(losses.values())[::-1], color="#9aa5b1")
        axes[2].bar_label(bars, fmt="%.2f", padding=-30)
        axes[2].set_title("bits/character before training")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)


def show(report: dict, text: str, model) -> None:
    """The report as a table, and one sentence in the new pieces."""
    print(f"{'':24}{'base':>12}{'extended':>12}")
    print(f"{'pieces':24}" + "".join(f"{report[size]:12,}" for size in KINDS.values()))
    for key, title, scale in MEASURES:
        print(f"{title:24}" + "".join(f"{scale * report[kind][key]:12.2f}" for kind in KINDS))
    for name, bits in report["bits_per_character_before_training"].items():
        print(f"bits per character before training, {name}: {bits:.2f}")
    print(f"proof: {report['proof']}; {report['replaced_pieces']} dead candidates were replaced")
    print("sample: " + "|".join(processor(model).encode(text[:60], out_type=str)))


# --- Files ---------------------------------------------------------------------------------------


def read_json(path: Path, option: str) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{option}: {path.name} is not JSON; fetch the model again") from error


def save_json(path: Path, content: dict) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until the file is on the disk: the folder's name must not outlive a power cut alone."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of path, which takes its name when the block ends well."""
    part, old = (path.with_name(f"{path.name}.{end}") for end in ("tmp", "old"))
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        part.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def identity(base_folder: Path, shards: dict, files: dict[str, list[Path]]) -> dict:
    """What the result depends on besides the arguments: the tokenizer, and every file's size."""
    model = (base_folder / "tokenizer.model").read_bytes()
    paths = [*shards, *(path for paths in files.values() for path in paths)]
    sizes = {str(path): path.stat().st_size for path in paths}
    return {"tokenizer.model": hashlib.sha256(model).hexdigest(), "sizes": sizes}


def already_done(args: Arguments, inputs: dict) -> bool:
    """Whether the output is this very run, finished; anything else in its place is refused."""
    folder = Path(args.output_dir)
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        run = {}
    if run.get("script") != "extend_vocab.py":
        raise UserError(f"--output_dir {folder}: holds something else; name another folder")
    if args.overwrite:
        return False
    wanted = json.loads(json.dumps(asdict(args)))
    names = [name for name in wanted if wanted[name] != run["arguments"].get(name)]
    names = [f"--{name}" for name in names if name != "overwrite"]
    names += ["the files it reads"] if inputs != run["inputs"] else []
    if names:
        raise UserError(
            f"--output_dir {folder}: holds a run with other settings ({', '.join(names)}); add "
            "--overwrite to replace it, or name another folder"
        )
    print(f"already done: {folder} (--overwrite builds it anew)")
    return True


# --- Main ----------------------------------------------------------------------------------------


@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Read base and corpus, make the tokenizer, prove it, grow the model, report."""
    args = parse_args(argv)
    check(args)
    base_folder = find_model(args.base_model, "--base_model")
    base, config, shards = read_base(base_folder, args)
    files = {name: find_texts(name, "--corpus") for name in args.corpus}
    if args.eval_text is not None:
        files[args.eval_text] = find_texts(args.eval_text, "--eval_text")
    inputs = identity(base_folder, shards, files)
    if already_done(args, inputs):
        return

    train, report_texts = read_corpora(args, files)
    candidates = train_pieces(train, args, args.vocab_size - len(base.pieces))
    model, replaced = merge_pieces(base, candidates, args.vocab_size)
    spelling = spellings(base, [piece.piece for piece in model.pieces][len(base.pieces) :])
    std = config.get("initializer_range", 0.02)
    rows_of = partial(new_rows, spelling=spelling, init=args.init, std=std, seed=args.seed)
    report = {"base_vocab_size": len(base.pieces), "vocab_size": len(model.pieces)}
    report |= {"replaced_pieces": len(replaced)}
    report |= {"base": measure(base, report_texts), "extended": measure(model, report_texts)}
    with whole_folder(Path(args.output_dir)) as folder:
        save_json(folder / "config.json", config | {"vocab_size": len(model.pieces)})
        write_tokenizer(folder, base_folder, model)
        proof_texts = report_texts + sample([text for _, text in train], REPORT_CHARS, args.seed)
        report["proof"] = prove(folder, base, model, proof_texts, args.seed)
        resize_model(folder, base_folder, shards, rows_of, len(spelling))
        texts = sample(report_texts, LOSS_CHARS, args.seed)
        report["bits_per_character_before_training"] = starting_losses(
            folder, base, model, texts, rows_of, args.eval_loss
        )
        run = {"script": "extend_vocab.py", "arguments": asdict(args), "inputs": inputs}
        run |= {"versions": {name: version(name) for name in PACKAGES}, "results": report}
        save_json(folder / "run.json", run)
    draw(report, Path(PICTURE))
    show(report, report_texts[0], model)
    print(f"wrote {args.output_dir} and {PICTURE}; next: python train_pt.py")


if __name__ == "__main__" and "__file__" in globals():  # a pasted notebook cell only defines
    main()
