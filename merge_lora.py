"""Merge a LoRA adapter into its base: one usable model, exactly what was trained, on a laptop.

In: an adapter's folder (outputs/pt, a checkpoint in it, any PEFT LoRA adapter) or hub id. The
adapter names its base. Out, in outputs/merged: safetensors, config, generation config, model card,
run.json and the tokenizer. tokenizer.model is copied byte for byte: Transformers 5 does not save
it, and without it llama.cpp tokenises wrongly and gives no warning. --push_to_hub uploads all this.

Exact: equal to PEFT 0.21's merge_and_unload on CPU, bit for bit. Like PEFT we take A and B to fp32,
    delta = (B @ A) * scaling            # (out, r) @ (r, in)
    W     = round(W + delta)             # one rounding, at the sum
for one block of rows at a time. No model is built, so a few hundred MB of memory are enough for any
size. DoRA (Liu et al. 2024, section 4) scales each row to its trained length. An adapter that lacks
a tensor that its config promises is refused.

An adapter trained on a 4-bit base (QLoRA, Dettmers et al. 2023) fits that base's rounding errors.
So it is merged into the same values: the base, quantised and dequantised (--merge_into).

Several adapters of one base give the mean of their merged weights, in fp32. A chat model of the
same base gives merged + scale * (chat - base), in fp32: a chat vector (Huang et al. 2024). The
result may follow instructions without any instruction data; it was not tried on Llama 2.

A run of seconds on any CPU (this command was run, after the demo):
    python merge_lora.py --verify
The real run:
    python merge_lora.py --dtype bf16
    python merge_lora.py --dtype bf16 --chat_model meta-llama/Llama-2-7b-chat-hf
Cost on 2 cores for a model of 3.74 GB (benchmarks/bench_merge.py): --merge_into original 5.1 s
(2.4 times cp -r; PEFT's merge 27.1 s) and 0.31 GB of memory, dequantized 12.0 s (5.7 times)
and 0.34 GB.
"""

import argparse
import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

from tqdm import tqdm
from transformers import HfArgumentParser

if TYPE_CHECKING:  # heavy imports wait inside the functions that use them, so that --help is quick
    from torch import Tensor

# --- Constants -----------------------------------------------------------------------------------

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # safetensors' names, PyTorch's
SIZES = {"BF16": 2, "F16": 2, "F32": 4}  # bytes
BLOCK = 1 << 19  # values in a block of rows: 2 MB in fp32, about what a core's cache holds

EMBEDDING, HEAD = ENDS = "model.embed_tokens.weight", "lm_head.weight"
HUB_ID = r"\w[\w.-]*/\w[\w.-]*"
KINDS = {  # how the name of a tensor in an adapter's file ends, and how we call it
    "lora_A.weight": "lora_A", "lora_B.weight": "lora_B",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
    "token_adapter.trainable_tokens_delta": "new_rows",
    "base_layer.weight": "weight", "weight": "weight", "bias": "bias"}
ADAPTER_NAME = re.compile(rf"base_model\.model\.(.+?)\.({'|'.join(map(re.escape, KINDS))})")
# Fields of adapter_config.json that this script reads or that do not change the merged weights. Any
# other field that is set belongs to a kind of LoRA that this script does not know.
KNOWN_FIELDS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "lora_alpha", "lora_dropout", "megatron_core",
    "modules_to_save", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "trainable_token_indices", "use_dora",
    "use_rslora"}
KNOWN_VALUES = {
    "peft_type": ("LORA",), "bias": ("none", None),
    # These leave the base as it was; PiSSA, OLoRA, LoftQ, ... change it before training begins.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva")}
WEIGHTS = "adapter_model.safetensors"
RECORDED = ("arguments", "base", "files", "results", "settings", "versions")  # parts of run.json
TERMS = ["LICENSE*", "NOTICE*", "USE_POLICY*"]  # Llama 2's licence travels with its weights
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
TOKENIZER = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.jinja"]
NF4_BLOCK = 64  # values that share a scale
NOT_IN_4_BITS = {"lm_head", "embed_tokens"}
VERIFY_TOKENS = 512
# What --verify reads when no file is named.
PASSAGE = (
    "颱風過後的早晨，巷口的早餐店照常開門。老闆娘一邊煎蛋餅，一邊跟熟客聊起昨晚的停電：整條街黑了三個"
    "小時，隔壁的阿伯搬出收音機，小孩反而高興，說終於看得見星星。我端著熱豆漿站在騎樓下，看清潔隊把吹落"
    "的樹枝一截一截鋸開，搬上卡車。捷運已經恢復行駛，學校也公布下午照常上課，日子好像什麼都沒發生過；只"
    "有公園那棵倒下的老榕樹，提醒路過的人，夜裡的風有多大。")
# The key in the metadata of adapter_model.safetensors under which train_pt.py records how it held
# the base: JSON with the names of BitsAndBytesConfig, and the device (CUDA and CPU round
# differently).
QUANTIZATION = "luojiu_quantization"
# What a file manager, Jupyter or a file system leaves in a folder.
FOREIGN = {".DS_Store", ".ipynb_checkpoints", "lost+found"}
# Errors of a file system that has no locks.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
AGAIN = "copy or download it again"
INEXACT = "cannot be merged exactly"
NOT_HERE = f"{INEXACT} here; use PEFT's merge_and_unload"
OTHER_MODEL = (
    "is the file whole, and is this its base? save it again from the trained model, pass a "
    "checkpoint, or pass its base with --base_model")

Bounds = list[tuple[int, int]]  # of blocks of rows
Reader = Callable[[Bounds], Iterator["Tensor"]]

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

    adapter: list[str] = field(default_factory=lambda: ["outputs/pt"], metadata={"help":
        "The adapter: train_pt.py's output, a checkpoint in it, or a hub id. With several, the "
        "merged weights are averaged (averaging A and B would give another model)."})
    base_model: str | None = option(
        None, "Model to merge into, folder or hub id; None: the one the adapter names.")
    output_dir: str = option(
        "outputs/merged", "Folder for the merged model; replaces an earlier one once it is whole.")
    merge_into: Literal["dequantized", "original"] | None = option(
        None, "Merge into the base's 4-bit values, or into the base as it is on disk; None: "
        "dequantized if the adapter records a 4-bit base, else original.")
    device: Literal["cpu", "cuda"] | None = option(
        None, "Where the base is quantised. CPU and GPU differ in a few values of 10,000. None: "
        "the device of the training, if the adapter records it and this machine has it; else the "
        "GPU, if there is one.")
    dtype: Literal["bf16", "fp16", "fp32"] | None = option(
        None, "Number format of all merged weights; None: the base's.")
    chat_model: str | None = option(
        None, "A chat model trained from the same base, folder or hub id. The result is merged + "
        "chat_scale x (chat - base), a chat vector (Huang et al. 2024). None: no chat vector.")
    chat_scale: float = option(1.0, "How much of the chat vector is added.")
    chat_embeddings: bool = option(
        False, "Add it to embedding and head too, on the rows of the pieces that both models have.")
    max_shard_size: float = option(5.0, "Largest safetensors file in GB; more makes another file.")
    verify: str | None = field(default=None, metadata={"nargs": "?", "const": PASSAGE, "help":
        "UTF-8 text whose first 512 tokens compare base + adapter and the merged model (mean KL, "
        "bits per character). One whole model is in memory at a time. Without a value: a built-in "
        "passage. None: no comparison."})
    push_to_hub: str | None = option(
        None, "Hub repository (user/name) to upload to, private if new; None: none.")
    push_dry_run: bool = option(
        False, "With --push_to_hub: show the files and the model card, and upload nothing.")


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
    from huggingface_hub import get_token
    args.adapter = [os.path.expanduser(name) for name in args.adapter]
    for name in ("base_model", "output_dir", "verify", "chat_model"):
        if getattr(args, name):
            setattr(args, name, os.path.expanduser(getattr(args, name)))
    push = f"--push_to_hub {args.push_to_hub}"
    upload = args.push_to_hub and not args.push_dry_run
    refuse(
        (not args.max_shard_size > 0,
         f"--max_shard_size {args.max_shard_size}: expected a number of GB above 0"),
        (not 0 < args.chat_scale <= 10,
         f"--chat_scale {args.chat_scale}: expected a number above 0, to 10"),
        (args.chat_embeddings and not args.chat_model,
         "--chat_embeddings true: expected a chat model; pass --chat_model"),
        (args.verify and len(args.adapter) > 1,
         "--verify: one adapter expected, not several; PEFT does not average them"),
        (args.push_to_hub and not re.fullmatch(HUB_ID, args.push_to_hub),
         f"{push}: expected a repository as user/name"),
        (args.push_dry_run and not args.push_to_hub,
         "--push_dry_run true: expected a repository; pass --push_to_hub user/name"),
        (upload and not get_token(), f"{push}: no token; run hf auth login, or set HF_TOKEN"))


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


# --- Reading models and adapters -----------------------------------------------------------------


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


def pickled(folder: Path) -> str | None:
    """Of a model whose weights are in .bin files: what is wrong, and the command that mends it."""
    names = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    return names and (
        f"its weights are in {names[0]}; expected *.safetensors; convert them: python -c \"from "
        f"transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}', "
        f"dtype='auto').save_pretrained('{folder}')\"")


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: where it begins, and what the header says of it."""

    name: str
    path: Path
    start: int
    dtype: str  # as safetensors writes it: BF16
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:  # a vector is one row
        return math.prod(self.shape[:-1])

    def block(self, begin: int, end: int) -> "Tensor":
        """Rows begin to end."""
        import torch
        rows = torch.empty((end - begin, self.shape[-1]), dtype=getattr(torch, DTYPES[self.dtype]))
        data = rows.view(torch.uint8).numpy()
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start + begin * data.shape[1])
            if file.readinto(data) != data.nbytes:
                raise UserError(f"{self.path}: it ended early; is something writing to it? {AGAIN}")
        if not finite(rows):
            remedy = f"{AGAIN}, or pass an earlier checkpoint"
            raise UserError(f"{self.path}: {self.name} has NaN or inf; {remedy}")
        return rows

    def whole(self) -> "Tensor":
        """All rows, in fp32."""
        return self.block(0, self.rows).float()

    def read(self, bounds: Bounds) -> Iterator["Tensor"]:
        """Block by block."""
        return (self.block(begin, end) for begin, end in bounds)


def row_blocks(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Bounds that split the rows of a tensor evenly into blocks of about BLOCK values, but of at
    least 16 rows: on some CPUs, BLAS gives 1 to 3 rows to a kernel that rounds differently."""
    rows = math.prod(shape[:-1])
    count = min(-(-math.prod(shape) // BLOCK), rows // 16) or 1
    return list(pairwise(rows * i // count for i in range(count + 1)))


def finite(rows: "Tensor") -> bool:
    """Whether no value is NaN or infinite. A finite sum proves it in one pass; a sum may overflow,
    so then every value is looked at."""
    return math.isfinite(rows.sum().item()) or bool(rows.isfinite().all())


def read_tensors(folder: Path, shown: str, file: str = "model.safetensors") -> dict[str, Stored]:
    """The tensors of one safetensors file, or of the shards that its index names, in the order in
    which they are stored. The safetensors package would map whole files into memory, so we take
    the places from the headers and read the rows ourselves."""
    from huggingface_hub import parse_local_safetensors_file_metadata
    from safetensors import SafetensorError, safe_open
    paths, tensors = weight_files(folder, file), {}
    wrong = f"no {file} there, nor its index that can be read; {AGAIN}"
    refuse((not paths, f"{shown}: {pickled(folder) or wrong}"))
    for path in paths:
        try:
            safe_open(path, "np")  # checks the header against the file's size
        except (OSError, SafetensorError) as error:
            wrong = f"{path} is missing or broken ({error}); expected a safetensors file"
            raise UserError(f"{shown}: {wrong}; {AGAIN}") from error
        found = parse_local_safetensors_file_metadata(path).tensors
        end = max((info.data_offsets[1] for info in found.values()), default=0)
        data = path.stat().st_size - end  # where the header ends and the first tensor begins
        for name, info in sorted(found.items(), key=lambda item: item[1].data_offsets):
            if info.dtype not in DTYPES:
                wrong = f"{name} is stored as {info.dtype}; expected BF16, F16 or F32"
                remedy = "save it in one of these, or pass the model as it was before quantisation"
                raise UserError(f"{shown}: {wrong}; {remedy}")
            start = data + info.data_offsets[0]
            tensors[name] = Stored(name, path, start, info.dtype, tuple(info.shape))
    return tensors


@dataclass
class Model:
    """A base, a chat model or an adapter on the disk."""

    folder: Path
    shown: str  # the option that named it, and its value
    config: dict  # config.json; of an adapter, adapter_config.json
    tensors: dict[str, Stored]
    record: dict  # run.json


@dataclass
class Adapter(Model):
    """An adapter, and what it was trained on."""

    base: str  # as --base_model or adapter_config.json names it
    nf4: dict | None  # how its training held a 4-bit base; empty: 16 bits; None: not known


def run_record(folder: Path, shown: str) -> dict:
    """A folder's run.json. Its parts are empty where there is none, or one of another program."""
    path = folder / "run.json"
    record = load_json(path, shown) if path.is_file() else {}
    parts = {name: record.get(name) or {} for name in RECORDED}
    ours = all(isinstance(part, dict) for part in parts.values())
    return record | parts if ours else {name: {} for name in RECORDED}


def read_model(name: str, option: str) -> Model:
    """Find a model. It must have every tensor that its config asks for, in its shape, and no other;
    for a family other than Llama only the vocabulary is checked against the config."""
    folder, shown = find_model(name, option), f"{option} {name}"
    config = load_json(folder / "config.json", shown)
    if config.get("quantization_config"):
        raise UserError(f"{shown}: it is quantised; pass the 16-bit model that it was made from")
    # Old checkpoints hold inv_freq buffers, which models now compute.
    tensors = {n: t for n, t in read_tensors(folder, shown).items() if not n.endswith("inv_freq")}
    if EMBEDDING not in tensors:
        raise UserError(f"{shown}: no {EMBEDDING} in it; expected a Llama or a model like it")
    if config.setdefault("tie_word_embeddings", HEAD not in tensors):
        tensors.pop(HEAD, None)
    found = {name: tensor.shape for name, tensor in tensors.items()}
    rows = {name: (config.get("vocab_size"), *found[name][1:]) for name in found.keys() & ENDS}
    llama = config.get("model_type") == "llama"
    expected = llama_shapes(found, config) if llama else found | rows
    expect(found, expected, shown, "by config.json", AGAIN)
    return Model(folder, shown, config, tensors, run_record(folder, shown))


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


def find_adapter(name: str) -> Path:
    """The local folder of an adapter; without one, the error says what to run or to pass."""
    shown, folder = f"--adapter {name}", Path(name)
    if not folder.exists() and re.fullmatch(rf"(?!outputs/){HUB_ID}", name):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
        wanted = ["adapter_*", "run.json", "trainloss.png", *TOKENIZER]
        with suppress(HfHubHTTPError, LocalEntryNotFoundError, ConnectionError):
            folder = Path(snapshot_download(name, allow_patterns=wanted))
    missing = [file for file in ("adapter_config.json", WEIGHTS) if not (folder / file).is_file()]
    steps = [path.parent.name[11:] for path in folder.glob("checkpoint-*/run.json")]  # sealed
    last = max((int(step) for step in steps if step.isdecimal()), default=None)
    pickled, convert = folder / "adapter_model.bin", (
        "import sys, torch, safetensors.torch as s; s.save_file({k: v.clone() for k, v in "
        "torch.load(sys.argv[1], weights_only=True).items()}, sys.argv[2])")
    refuse(
        (missing and last,
         f"{shown}: training is not finished; pass --adapter {folder}/checkpoint-{last}"),
        (missing == [WEIGHTS] and pickled.is_file(),
         f"{shown}: its weights are in {pickled.name}; expected {WEIGHTS}; convert them: "
         f"python -c '{convert}' {pickled} {folder / WEIGHTS}"),
        (missing, f"{shown}: no {' and no '.join(missing)} there, nor on the hub if that can be "
         "reached; expected a PEFT LoRA adapter's folder; run python train_pt.py first"))
    return folder


def read_adapter(name: str, base: str | None) -> Adapter:
    """An adapter, its tensors by the module that they change. Its weights must have the sum that
    its run.json records."""
    folder, shown = find_adapter(name), f"--adapter {name}"
    lora, record = load_json(folder / "adapter_config.json", shown), run_record(folder, shown)
    base, tensors = base or lora.get("base_model_name_or_path"), {}
    known = record["files"].get(WEIGHTS)
    refuse(
        (not base, f"{shown}: it names no base; pass --base_model"),
        (known and known != file_sum(folder / WEIGHTS),
         f"{shown}: {WEIGHTS} is not as it was written: its sum differs from that in run.json; "
         f"{AGAIN}, or pass an earlier checkpoint"))
    for key, tensor in read_tensors(folder, shown, WEIGHTS).items():
        match = ADAPTER_NAME.fullmatch(key)
        if not match or "_fsdp_wrapped_module." in key or ".default." in key:
            remedy = "or save the adapter with PEFT's save_pretrained, if it was saved otherwise"
            raise UserError(f"{shown}: {key} {NOT_HERE}, {remedy}")
        tensors[f"{match[1]}.{KINDS[match[2]]}"] = tensor
    return Adapter(folder, shown, lora, tensors, record, base, read_quantization(folder, shown))


def file_sum(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_quantization(folder: Path, shown: str) -> dict | None:
    """How the base was held while the adapter was trained: the number format and the device of a
    4-bit base; empty for 16 bits; None if the file does not tell."""
    from safetensors import safe_open
    with safe_open(folder / WEIGHTS, "np") as file:
        told = (file.metadata() or {}).get(QUANTIZATION)
    if told is None:
        return None
    with suppress(ValueError, LookupError, TypeError, AttributeError):  # not as expected
        found = json.loads(told)
        if not found.get("load_in_4bit"):
            return {}
        settings = {"compute_dtype": found["bnb_4bit_compute_dtype"], "device": found.get("device")}
        if found["bnb_4bit_quant_type"] == "nf4" and settings["compute_dtype"] in DTYPES.values():
            return settings
    wrong = f"its 4-bit settings are {told}; expected NF4's in JSON, as train_pt.py writes them"
    raise UserError(f"{shown}: {wrong}; {AGAIN}")


def find_base(args: Arguments, adapters: list[Adapter]) -> Model:
    """The model that the adapters were trained on. It must be one, held in one way: else a mean of
    their merged weights means nothing."""
    first = adapters[0]
    shown, revision = f"--base_model {first.base}", first.config.get("revision")
    if not args.base_model and revision not in (None, "main") and not Path(first.base).exists():
        raise UserError(f"{shown}: trained on revision {revision}; download it and pass its folder")
    try:
        base = read_model(first.base, "--base_model")
    except UserError as error:
        if args.base_model:
            raise
        named = f"{first.shown}: it names {first.base} as its base"
        raise UserError(f"{named}; {error}; pass the model with --base_model") from error
    held = fingerprint(base.folder)
    for adapter in adapters:
        trained_on = adapter.record["base"]
        refuse(
            (adapter.base != first.base,
             f"{adapter.shown}: its base is {adapter.base}, that of {first.shown} is {first.base}; "
             "expected one base; pass it with --base_model"),
            (adapter.nf4 != first.nf4 and not args.merge_into,
             f"{adapter.shown}: trained on {adapter.nf4}, {first.shown} on {first.nf4}; expected "
             "one base; say it with --merge_into"),
            (trained_on.get("fingerprint") not in (None, held),
             f"{shown}: the adapter is of another model, {trained_on.get('model_name_or_path')} as "
             "it was; pass that one, or train again; if you know that this one belongs to it, pass "
             "a copy of the adapter's folder without run.json"))
    return base


def read_pieces(folder: Path, shown: str, names: Sequence[str] = TOKENIZERS) -> tuple[dict, dict]:
    """The pieces of a tokenizer and what was added to it, with their ids."""
    from sentencepiece import SentencePieceProcessor
    try:
        path = next(folder / name for name in names if (folder / name).is_file())
        if path.suffix == ".model":
            model = SentencePieceProcessor(str(path))
            return {model.id_to_piece(i): i for i in range(model.vocab_size())}, {}
        tokenizer = json.loads(path.read_text(encoding="utf-8-sig"))
        added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
        return tokenizer["model"]["vocab"], added
    except Exception as error:
        wrong = "no tokenizer.model or tokenizer.json that can be read"
        raise UserError(f"{shown}: {wrong}; copy the tokenizer's files there") from error


def all_pieces(model: Model) -> dict[str, int]:
    """A model's pieces and added tokens, with their ids; none if it has no tokenizer."""
    if not any((model.folder / name).is_file() for name in TOKENIZERS):
        return {}
    pieces, added = read_pieces(model.folder, model.shown)
    return pieces | added


def read_chat(args: Arguments, base: Model) -> tuple[Model | None, list[int]]:
    """The chat model, which must be the base, trained further, without tokens of its own; and the
    ids of the pieces that the two have in common."""
    import torch
    if not args.chat_model:
        return None, []
    chat, other = read_model(args.chat_model, "--chat_model"), "pass a chat model of the same base"
    keys = ("model_type", "num_attention_heads", "hidden_act")
    theirs, ours = (
        {name: tensor.shape for name, tensor in model.tensors.items() if name not in ENDS}
        | {key: model.config.get(key) for key in keys}
        | {"rope_theta": rope_theta(model.config)} for model in (chat, base))
    expect(theirs, ours, chat.shown, "as in the base", other)
    pieces, added = read_pieces(chat.folder, chat.shown)
    pieces, known, template = pieces | added, all_pieces(base), chat_template(chat) or ""
    shared = sorted(i for piece, i in pieces.items() if known.get(piece) == i)
    own = [piece for piece, i in added.items() if known.get(piece) != i and piece in template]
    name = next(n for n, tensor in base.tensors.items() if len(tensor.shape) == 2 and n not in ENDS)
    bounds = row_blocks(base.tensors[name].shape)[0]
    pair = (model.tensors[name].block(*bounds).float().view(-1) for model in (chat, base))
    alike = torch.cosine_similarity(*pair, 0)
    refuse(
        (len(shared) < 0.9 * len(pieces),
         f"{chat.shown}: {len(shared)} of its {len(pieces)} pieces have the same ids in the base; "
         f"expected nearly all; {other}"),
        (alike < 0.5,  # of two unrelated models it is near 0
         f"{chat.shown}: {name} has a cosine of {alike:.2f} to the base's; expected above 0.5: it "
         f"was not trained from this base; {other}"),
        (own, f"{chat.shown}: its template needs {', '.join(own[:3])}, which the base has not; "
         f"expected a chat model without tokens of its own, as Llama 2's; {other}"))
    return chat, shared


def rope_theta(config: dict) -> float:
    """The base of the rotary embedding. Transformers 4 has it at the top of the config."""
    return (config.get("rope_parameters") or config).get("rope_theta") or 10_000.0


# --- Readers: where the rows of a merged tensor come from ----------------------------------------
# A tensor of the merged model is read through a chain of generators: Stored.read or dequantized;
# then adapted, once for each adapter, and their mean; then with_chat. Each takes the bounds of the
# blocks of rows and yields the rows, block by block.


def dequantized(tensor: Stored, nf4: dict, bounds: Bounds) -> Iterator["Tensor"]:
    """A tensor as its 4-bit copy holds it, equal to bitsandbytes' quantize_4bit and
    dequantize_4bit of the whole. Each 64 values are quantised alone, and only the quantising of
    their scales looks at the tensor as one: so pack it all (half a byte a value), then unpack."""
    import bitsandbytes.functional as bnb
    import torch
    loaded_as = getattr(torch, nf4["compute_dtype"])  # as train_pt.py loads what it quantises
    width, device = tensor.shape[1], nf4["device"]
    packed = torch.empty((tensor.rows, width // 2), dtype=torch.uint8, device=device)
    scales = torch.empty((tensor.rows, width // NF4_BLOCK), device=device)
    for begin, end in bounds:
        rows = tensor.block(begin, end).to(device, loaded_as)
        quantize(rows, packed[begin:end], scales[begin:end])
    torch.set_num_threads(nf4["threads"])  # each sums a part, and this decides the last bit
    mean = scales.mean()
    torch.set_num_threads(1)
    scales = bnb.dequantize_blockwise(*bnb.quantize_blockwise(scales - mean, blocksize=256)) + mean
    for begin, end in bounds:
        values, shape = packed[begin:end].view(-1, 1), (end - begin, width)
        yield torch.ops.bitsandbytes.dequantize_4bit(
            values, scales[begin:end].view(-1), NF4_BLOCK, "nf4", shape, loaded_as).cpu()


def import_bitsandbytes() -> None:
    """Import it without PyTorch's compiler, which takes 3 s and 120 MB to load and is not used: a
    function is left as it is where bitsandbytes would have it compiled, or kept from being
    compiled. And without the warning about a kernel that is not used either."""
    import torch
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    unchanged = {"compile": lambda function, **_: function, "_disable_dynamo": lambda it: it}
    with mock.patch.multiple(torch, **unchanged):
        import bitsandbytes.functional  # noqa: F401


def quantize(rows: "Tensor", packed: "Tensor", scales: "Tensor") -> None:
    """bitsandbytes' quantize_4bit, written into two tensors: the packed values and the scale of
    each 64. On a CPU, bitsandbytes finds the nearest code by a binary search per value, which would
    take most of the merge. We count how many midpoints between codes lie below the value: the
    result is the same, in a tenth of the time."""
    import bitsandbytes.functional as bnb
    import numpy as np
    import torch
    if rows.is_cuda:
        values, state = bnb.quantize_4bit(rows, blocksize=NF4_BLOCK, quant_type="nf4")
        packed[:], scales[:] = values.view(packed.shape), state.absmax.view(scales.shape)
        return
    rows = rows.view(-1, NF4_BLOCK).float()
    torch.amax(rows.abs(), 1, out=scales.view(-1))
    rows *= (1 / scales.clamp(min=1e-38)).view(-1, 1)
    code = bnb.get_4bit_type("nf4", "cpu")
    nearest, below = np.zeros(rows.shape, np.uint8), np.empty(rows.shape, bool)
    for midpoint in ((code[:-1] + code[1:]) / 2).numpy():
        nearest += np.greater(rows.numpy(), midpoint, out=below).view(np.uint8)
    pairs = torch.from_numpy(nearest).view(torch.int16)  # of a pair, the first is the low byte
    packed[:] = ((pairs << 4) | (pairs >> 8)).view(packed.shape)


def adapted(
        read: Reader, tensors: dict[str, Stored], scaling: float, indices: list[int],
        bounds: Bounds) -> Iterator["Tensor"]:
    """Rows as one adapter changes them: LoRA and DoRA, then new rows at their indices."""
    import torch
    b, new = tensors.get("lora_B"), tensors.get("new_rows")  # (out, r), (len(indices), in)
    magnitude = tensors.get("lora_magnitude_vector")
    if b:
        a = tensors["lora_A"].whole()  # (r, in)
        # Room that all blocks share: asking the system for new memory each time takes longer.
        room = torch.empty((max(end - begin for begin, end in bounds), a.shape[1]))
    if magnitude:
        lengths = magnitude.whole().view(-1, 1)  # (out, 1)
    if new:
        position = torch.full((bounds[-1][1],), -1)  # which new row goes where; -1: none
        position[indices] = torch.arange(len(indices))
    for (begin, end), rows in zip(bounds, read(bounds), strict=True):
        if b:
            delta = torch.mm(b.block(begin, end).float(), a, out=room[: end - begin])
            rows = delta.mul_(scaling).add_(rows)
        if magnitude:
            rows = lengths[begin:end] / torch.linalg.norm(rows, dim=1, keepdim=True) * rows
        if new and (hit := position[begin:end] >= 0).any():
            which = position[begin:end][hit]
            first, last = int(which.min()), int(which.max())
            rows = rows.float()
            rows[hit] = new.block(first, last + 1)[which - first].float()
        yield rows


def mean(readers: list[Reader], bounds: Bounds) -> Iterator["Tensor"]:
    """The mean of what several adapters make of the same rows, in fp32."""
    for several in zip(*(read(bounds) for read in readers), strict=True):
        yield sum(rows.float() for rows in several) / len(several)


def with_chat(
        read: Reader, chat: Stored, base: Stored, scale: float, shared: list[int] | None,
        bounds: Bounds) -> Iterator["Tensor"]:
    """Rows + scale * (chat - base) in fp32, on the shared rows (None: on all). The base is the one
    on the disk, even if the adapter was trained on its 4-bit copy."""
    for (begin, end), rows in zip(bounds, read(bounds), strict=True):
        last = min(end, base.rows, chat.rows)
        if last > begin:
            rows = rows.float()
            vector = chat.block(begin, last).float() - base.block(begin, last).float()
            if shared is None:
                rows.add_(vector, alpha=scale)
            else:
                some = [i - begin for i in shared if begin <= i < last]
                rows[some] += scale * vector[some]
        yield rows


# --- The plan: a reader for every tensor ---------------------------------------------------------


@dataclass
class Part:
    """One tensor of the merged model."""

    name: str
    read: Reader
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * SIZES[self.dtype]


def choose_base(args: Arguments, adapter: Adapter) -> dict | None:
    """How to quantise the base that is merged into; None: not at all."""
    import torch
    if adapter.nf4 is None and not args.merge_into:
        print(f"warning: {adapter.shown}: its file does not record whether the base was in 4 bits; "
              "merging into the base as it is; after QLoRA, pass --merge_into dequantized",
              file=sys.stderr)
    if (args.merge_into or ("dequantized" if adapter.nf4 else "original")) == "original":
        return None
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" != here:
        raise UserError("--device cuda: PyTorch sees no GPU here; expected one; pass --device cpu")
    import_bitsandbytes()
    nf4 = {"compute_dtype": "bfloat16", "device": None} | (adapter.nf4 or {})
    trained_on, device = nf4["device"], args.device or ("cpu" if nf4["device"] == "cpu" else here)
    print(f"quantising on {device}; the adapter was trained on {trained_on or 'an unknown device'}"
          + ("" if trained_on == device else "; few values of 10,000 may differ"))
    return nf4 | {"device": device, "threads": torch.get_num_threads()}


def make_plan(
        args: Arguments, base: Model, adapters: list[Adapter], nf4: dict | None,
        chat: Model | None, shared: list[int]) -> dict[str, Part]:
    """Choose a reader for each tensor of the merged model, and refuse what cannot be merged
    exactly. Where the adapters or --dtype change the base's config, it is updated in place."""
    config, sources, plan = base.config, dict(base.tensors), {}
    if config["tie_word_embeddings"]:
        untied = {unties(adapter.config) for adapter in adapters}
        refuse((len(untied) > 1, f"--adapter {' '.join(args.adapter)}: they differ in "
                "modules_to_save on the tied embedding and head; merge them one by one"))
        if True in untied:
            config["tie_word_embeddings"] = False
            sources[HEAD] = sources[EMBEDDING]
    for adapter in adapters:
        check_promises(adapter, sources)
    dtype = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}.get(args.dtype)
    for name, stored in sources.items():
        read = partial(dequantized, stored, nf4) if in_4_bits(stored, nf4) else stored.read
        readers, shapes = [], []
        for adapter in adapters:
            own = adapter.tensors.get(name, stored)
            readers.append(reader(name, read if own is stored else own.read, adapter))
            shapes.append(own.shape)
        refuse((len({*shapes}) > 1, f"{name}: the adapters have {shapes}; expected one shape"))
        read = readers[0] if len({*readers}) == 1 else partial(mean, readers)
        if chat and (name not in ENDS or args.chat_embeddings):
            theirs = chat.tensors.get(name, chat.tensors[EMBEDDING])
            rows = shared if name in ENDS else None
            read = partial(with_chat, read, theirs, stored, args.chat_scale, rows)
        plan[name] = Part(name, read, shapes[0], dtype or stored.dtype)
    config["vocab_size"] = rows = plan[EMBEDDING].shape[0]  # which may have grown
    head_rows = plan.get(HEAD, plan[EMBEDDING]).shape[0]
    refuse((head_rows != rows, f"{adapters[0].shown}: the embedding has {rows} rows, the head "
            f"{head_rows}; {OTHER_MODEL}"))
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = DTYPES[plan[EMBEDDING].dtype]
    return plan


def unties(lora: dict) -> bool:
    """Whether the adapter unties embedding and head: with modules_to_save, PEFT trains a copy of
    each, unless ensure_weight_tying is set."""
    saved = tuple(f".{module}.weight" for module in lora.get("modules_to_save") or [])
    named = any(f".{name}".endswith(saved) for name in (EMBEDDING, HEAD))
    return named and not lora.get("ensure_weight_tying")


def in_4_bits(tensor: Stored, nf4: dict | None) -> bool:
    """Whether the base that the adapter was trained on held this tensor in 4 bits."""
    if not nf4 or len(tensor.shape) != 2 or NOT_IN_4_BITS & {*tensor.name.split(".")}:
        return False
    if tensor.shape[1] % NF4_BLOCK:  # 0.50's CPU kernel gives wrong values for, e.g., 96
        wrong = f"{tensor.name} has rows of {tensor.shape[1]}, no multiple of bitsandbytes' blocks"
        raise UserError(f"--merge_into dequantized: {wrong}; pass --merge_into original")
    return True


def check_promises(adapter: Adapter, sources: dict[str, Stored]) -> None:
    """Refuse a kind of LoRA that this script does not know, and an adapter that lacks a tensor that
    its config promises for this base, or has another shape or another tensor. PEFT would merge a
    part of it and give no error."""
    tensors, shown = adapter.tensors, adapter.shown
    for key, value in adapter.config.items():
        known = value in KNOWN_VALUES[key] if key in KNOWN_VALUES else key in KNOWN_FIELDS
        other = not known and (value or key in KNOWN_VALUES)
        refuse((other, f"{shown}: {key} = {value} {NOT_HERE}"))
    for key in ("r", "lora_alpha"):
        number = adapter.config.get(key)
        wrong = f"{shown}: {key} is {number!r}; expected a number; {AGAIN}"
        refuse((not isinstance(number, int | float), wrong))
    if HEAD not in sources:  # tied
        if EMBEDDING in tensors:
            tensors.pop(HEAD, None)  # the embedding once more
        for name in tensors:
            one = name.startswith(("lm_head.", "model.embed_tokens.lora"))
            refuse((one, f"{shown}: {name} changes one of two tied matrices, which {INEXACT}"))
    expected = promised_tensors(adapter, sources)
    refuse((not expected, f"{shown}: adapter_config.json promises no tensor; {OTHER_MODEL}"))
    found = {name: tensor.shape for name, tensor in tensors.items()}
    expect(found, expected, shown, "by adapter_config.json and the base", OTHER_MODEL)


def promised_tensors(adapter: Adapter, sources: dict[str, Stored]) -> dict[str, tuple[int, ...]]:
    """The tensors that the adapter must have by its config, and their shapes."""
    lora, promised = adapter.config, {}
    saved, named = tuple(lora.get("modules_to_save") or []), lora.get("target_modules")
    for name, source in sources.items():
        module, _, leaf = name.rpartition(".")
        own, shape = adapter.tensors.get(name), source.shape
        if own and name in ENDS:  # the vocabulary may have more rows than the base's
            shape = (own.rows, *shape[1:])
        parents = [module[: match.start()] for match in re.finditer(r"\.|$", module)]
        if own or any(parent.endswith(saved) for parent in parents):
            promised[name] = shape
        if leaf != "weight" or len(shape) != 2:
            continue
        target = is_target(module, lora) if named else f"{module}.lora_A" in adapter.tensors
        if target:
            rank = setting(lora.get("rank_pattern"), module, lora["r"])
            promised |= {f"{module}.lora_A": (rank, shape[1]), f"{module}.lora_B": (shape[0], rank)}
            if lora.get("use_dora"):
                promised[f"{module}.lora_magnitude_vector"] = shape[:1]
        if indices := token_indices(module, lora):
            promised[f"{module}.new_rows"] = (len({*indices}), shape[1])
            refuse(
                (target, f"{adapter.shown}: {module}: LoRA and trainable_token_indices on one "
                 f"matrix, which {INEXACT}"),
                (max(indices) >= shape[0],
                 f"{adapter.shown}: {module}: a new row {max(indices)}; the base has {shape[0]}; "
                 "pass the extended model with --base_model, or run python extend_vocab.py first"))
    return promised


def reader(name: str, read: Reader, adapter: Adapter) -> Reader:
    """Add an adapter's change of a tensor, if it has one, to the tensor's reader."""
    module, lora = name.removesuffix(".weight"), adapter.config
    kinds = ("lora_A", "lora_B", "lora_magnitude_vector", "new_rows")
    found = {kind: adapter.tensors.get(f"{module}.{kind}") for kind in kinds}
    if not any(found.values()):
        return read
    rank = setting(lora.get("rank_pattern"), module, lora["r"])
    alpha = setting(lora.get("alpha_pattern"), module, lora["lora_alpha"])
    scaling = alpha / (math.sqrt(rank) if lora.get("use_rslora") else rank)
    return partial(adapted, read, found, scaling, token_indices(module, lora))


def setting(patterns: dict | None, module: str, default: Any) -> Any:
    """A module's own rank, alpha or rows: of the first pattern that fits the end of its name."""
    fits = (v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(fits, default)


def token_indices(module: str, lora: dict) -> list[int]:
    """The rows of an embedding or a head that the adapter replaces."""
    rows = lora.get("trainable_token_indices") or {}
    return setting({"embed_tokens": rows} if isinstance(rows, list) else rows, module, [])


def is_target(module: str, lora: dict) -> bool:
    """Whether adapter_config.json puts LoRA on a module, by PEFT's rules."""

    def named(names: list[str] | str | None) -> bool:  # a string is a pattern of the whole name
        if isinstance(names, str):
            return bool(re.fullmatch(names, module))
        return any(f".{module}".endswith(f".{name}") for name in names or [])

    saved = "|".join(lora.get("modules_to_save") or [])
    if saved and re.match(rf"(^|.*\.)({saved})($|\..*)", module):
        return False
    return named(lora["target_modules"]) and not named(lora.get("exclude_modules"))


# --- Writing the weights -------------------------------------------------------------------------


def merged(part: Part) -> Iterator["Tensor"]:
    """The merged tensor, block by block, rounded once."""
    import torch
    bounds = row_blocks(part.shape)
    most = max(end - begin for begin, end in bounds)
    out = torch.empty((most, part.shape[-1]), dtype=getattr(torch, DTYPES[part.dtype]))
    for rows in part.read(bounds):
        rounded = out[: len(rows)].copy_(rows)
        if not finite(rounded):
            wrong = f"{part.name} goes beyond the range of {DTYPES[part.dtype]}"
            raise UserError(f"--dtype: {wrong}; pass --dtype bf16 or fp32")
        yield rounded


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next block. Asking the system for new pages took
    a quarter of the time, and more where they are scarce."""
    with suppress(AttributeError, OSError):  # a C library other than glibc
        set_option = ctypes.CDLL(None).mallopt
        set_option(-3, 32 << 20)  # M_MMAP_THRESHOLD: pages of their own from 32 MB on
        set_option(-1, 1 << 30)  # M_TRIM_THRESHOLD: returned from 1 GB on


def write_weights(folder: Path, plan: dict[str, Part], limit: float) -> None:
    """Write shards of at most limit bytes and their index: the headers, then each tensor at its
    offset."""
    import torch
    from huggingface_hub import split_state_dict_into_shards_factory
    by_size = sorted(plan.items(), key=lambda item: -SIZES[item[1].dtype])  # for alignment
    shards = split_state_dict_into_shards_factory(
        dict(by_size), get_storage_size=lambda part: part.nbytes, max_shard_size=int(limit),
        filename_pattern="model{suffix}.safetensors")
    for file_name, names in shards.filename_to_tensors.items():
        header, size = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            header[name] = {"dtype": plan[name].dtype, "shape": plan[name].shape}
            header[name]["data_offsets"] = [size, size := size + plan[name].nbytes]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
        with (folder / file_name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + size)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        save_json(folder / "model.safetensors.index.json", index)
    places = read_tensors(folder, f"--output_dir {folder}")  # where any reader will look for them
    assert places.keys() == plan.keys()

    def write(name: str) -> int:
        place, part = places[name], plan[name]
        with place.path.open("r+b") as file:
            file.seek(place.start)
            for rows in merged(part):
                file.write(rows.view(torch.uint8).numpy())
            assert file.tell() == place.start + part.nbytes, name
        return part.nbytes

    # A tensor a core at a time, each in its own thread: the blocks are too small for PyTorch's own
    # threads, and more than four would wait for Python's lock.
    threads = min(max(len(os.sched_getaffinity(0)), 2), 4)
    keep_freed_memory()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    total = shards.metadata["total_size"]
    with pool, tqdm(total=total, unit="B", unit_scale=True, desc="merging") as bar:
        for nbytes in pool.map(write, places):
            bar.update(nbytes)


# --- What goes with the weights ------------------------------------------------------------------


def save_json(path: Path, content: dict) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=2)
    path.write_text(text + "\n", "utf-8", "backslashreplace")


def copy_files(source: Path, folder: Path, *names: str) -> None:
    for path in (path for name in names for path in source.glob(name)):
        shutil.copyfile(path, folder / path.name)


def copy_rest(adapter: Adapter, base: Model, chat: Model | None, folder: Path) -> Model:
    """Copy tokenizer (the adapter's files replace the base's), generation config, licence terms and
    loss curve byte for byte, and a chat model's template. Return where the tokenizer is from."""
    copy_files(base.folder, folder, "generation_config.json", *TERMS, *TOKENIZER)
    copy_files(adapter.folder, folder, "trainloss.png", *TOKENIZER)
    if chat:
        copy_files(chat.folder, folder, "generation_config.json", *TERMS)
        if template := chat_template(chat):
            (folder / "chat_template.jinja").write_bytes(template.encode())
        else:
            print(f"warning: {chat.shown}: it has no chat template; the merged model takes no "
                  "messages; add chat_template.jinja to it", file=sys.stderr)
    own = any((adapter.folder / name).is_file() for name in TOKENIZERS)
    return adapter if own else base


def chat_template(chat: Model) -> str | None:
    """A chat model's template, from a file of its own or from the tokenizer's settings."""
    own, settings = chat.folder / "chat_template.jinja", chat.folder / "tokenizer_config.json"
    if own.is_file():
        return own.read_bytes().decode()
    return load_json(settings, chat.shown).get("chat_template") if settings.is_file() else None


def check_tokenizer(folder: Path, rows: int, shown: str, base: Model) -> int:
    """Return the number of tokens. Refuse a tokenizer whose two files differ, whose size is not the
    embedding's, or which lacks a piece of the base. Add tokenizer.json where it is missing."""
    made, model, of_model = folder / "tokenizer.json", folder / "tokenizer.model", None
    if model.is_file():
        of_model, _ = read_pieces(folder, shown, ["tokenizer.model"])
    if of_model and not made.is_file():
        from transformers import AutoTokenizer  # which takes some time and memory
        try:
            AutoTokenizer.from_pretrained(folder).backend_tokenizer.save(str(made))
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{shown}: no tokenizer of its files ({reason}); {AGAIN}") from error
    pieces, added = read_pieces(folder, shown)
    known, count = pieces | added, len(of_model or pieces)
    tokens = max([len(pieces), *(i + 1 for i in added.values())])
    remedy = "copy the tokenizer of this model there"
    if shown.startswith("--adapter"):
        remedy += ", or remove its tokenizer's files to take those of the base"
    refuse((
        count != len(pieces) or not rows - 512 <= tokens <= rows,  # rounded up
        f"{shown}: tokenizer.model has {len(of_model) if of_model else 'no'} pieces, "
        f"tokenizer.json {len(pieces)} and with added tokens {tokens}, the embedding {rows} rows; "
        f"{remedy}"))
    spelled = {piece: i for piece, i in (of_model or {}).items() if i not in added.values()}
    for where, theirs in (("tokenizer.model", spelled), ("the base's", all_pieces(base))):
        moved = [piece for piece, i in theirs.items() if known.get(piece) != i]
        refuse((moved, f"{shown}: its tokenizer.json lacks {len(moved)} pieces of {where} or gives "
                f"them other ids, {', '.join(moved[:3])}; {remedy}"))
    return tokens


def origin(base: Model, adapter: Adapter) -> str:
    """The published model at the start of the chain, also when a merged model was the base."""
    made_from = base.record["base"].get("origin") or base.record["arguments"].get("base_model")
    return made_from or adapter.base


def write_papers(
        folder: Path, args: Arguments, adapter: Adapter, base: Model, facts: dict) -> None:
    """run.json and the model card: where the weights came from, and how to use them."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "safetensors")
    written = {path.name for path in folder.iterdir()} | {"README.md", "config.json", "run.json"}
    source = {"model_name_or_path": adapter.base, "fingerprint": fingerprint(base.folder)}
    source["origin"] = origin(base, adapter)
    save_json(folder / "run.json", {
        "script": "merge_lora.py", "arguments": asdict(args), "base": source, "results": facts,
        "versions": {name: version(name) for name in packages}, "written": sorted(written)})
    card = model_card(folder, args, adapter, source["origin"], facts)
    (folder / "README.md").write_text(card, "utf-8", "backslashreplace")


def model_card(folder: Path, args: Arguments, adapter: Adapter, name: str, facts: dict) -> str:
    """README.md with the front matter that the hub reads, from the records of the training."""
    from huggingface_hub import EvalResult, ModelCardData
    title, run = Path(args.push_to_hub or args.output_dir).resolve().name, adapter.record
    results, hyperparameters = run["results"], dict(run["settings"])
    size = {key: results[key] for key in ("documents", "tokens") if key in results}
    dataset = ", ".join(Path(text).name for text in run["arguments"].get("dataset", ["unknown"]))
    kinds = ("loss", "train loss", "loss_last"), ("loss", "loss held out", "eval_loss"), (
        "bits_per_character", "bits per character held out", "eval_bits_per_character")
    losses = [
        EvalResult("text-generation", "text", dataset, kind, round(results[key], 4),
                   dataset_args=size, metric_name=shown)
        for kind, shown, key in kinds if results.get(key) is not None]
    data = ModelCardData(
        base_model=name if re.fullmatch(HUB_ID, name) and not Path(name).exists() else None,
        language="zh", license="llama2" if "llama-2" in name.lower() else "other",
        library_name="transformers", pipeline_tag="text-generation", model_name=title,
        tags=["llama", "traditional-chinese", "qlora" if adapter.nf4 else "lora"],
        eval_results=losses or None)
    for key in ("model", "dataset"):  # sums, which tell a reader nothing
        hyperparameters.pop(key, None)
    sections = {
        "Training": {"dataset": dataset} | size if size else {},
        "Results": {loss.metric_name: loss.metric_value for loss in losses},
        "Hyperparameters": hyperparameters, "Weights": facts, "Framework versions": run["versions"]}
    text = [f"---\n{data.to_yaml()}\n---", f"# {title}"]
    text += ["![training loss](trainloss.png)"] * (folder / "trainloss.png").is_file()
    text += [f"{name}, trained further on Traditional Chinese text: a LoRA adapter merged into its "
             "base by merge_lora.py of 落九 (Luojiu). The terms of the base hold for these weights "
             "too."]
    for heading, values in sections.items():
        lines = [f"- {key}: {value}" for key, value in values.items() if value is not None]
        text += [f"## {heading}", "\n".join(lines)] if lines else []
    return "\n\n".join(text) + "\n"


# --- The output folder ---------------------------------------------------------------------------


def check_output(output: Path, inputs: list[Path]) -> None:
    """Refuse to replace a folder that this script did not make, or that holds other files."""
    shown = f"--output_dir {output}"
    if output.is_symlink() and not output.exists():
        wrong = f"a link to {os.readlink(output)}, which is not there"
        raise UserError(f"{shown}: {wrong}; make that folder or remove the link")
    for folder in inputs:
        inside = folder.resolve().is_relative_to(output.resolve())
        refuse((inside, f"{shown}: {folder}, which is read, lies in it; pass another folder"))
    if output.exists() and not (output.is_dir() and FOREIGN.issuperset(os.listdir(output))):
        record = run_record(output, shown)
        ours = record.get("script") == "merge_lora.py"
        refuse((not ours, f"{shown}: merge_lora.py did not make it; pass a new or empty folder"))
        refuse_others(output, record, shown)


def refuse_others(output: Path, record: dict, shown: str) -> None:
    """Refuse to replace a folder that holds files besides those that run.json lists."""
    names = {*os.listdir(output)}
    others = sorted(names - {*record.get("written", names)} - FOREIGN)
    refuse((others, f"{shown}: {', '.join(others[:3])} there, {len(others)} in all, is not of the "
            "earlier run and would be lost; move it away, or pass another folder"))


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


# --- After the merge -----------------------------------------------------------------------------


def read_passage(verify: str | None) -> str:
    """The text of --verify, read before the merge, so that a wrong name is found at once."""
    if verify in (None, PASSAGE):
        return PASSAGE
    with suppress(OSError, ValueError):  # ValueError: not UTF-8
        if text := Path(verify).read_text(encoding="utf-8").strip():
            return text
    raise UserError(f"--verify {verify}: nothing to read; expected a UTF-8 text file")


def compare(output: Path, base: Path, adapter: Adapter, nf4: dict | None, text: str) -> dict:
    """Mean KL divergence from base + adapter (PEFT, in 4 bits if so trained) to the merged model,
    and both models' bits per character, -log2 p(text) / characters."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    nf4 = adapter.nf4 or nf4
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :VERIFY_TOKENS]  # (1, T)
    characters = len(tokenizer.decode(ids[0], skip_special_tokens=True)) or 1
    options = {"dtype": "auto", "device_map": {"": device}}

    def log_probabilities(model: torch.nn.Module) -> torch.Tensor:  # (T - 1, V)
        with torch.no_grad():
            return model.eval()(ids.to(device)).logits[0, :-1].float().log_softmax(-1).cpu()

    ours = log_probabilities(AutoModelForCausalLM.from_pretrained(output, **options))
    if nf4:
        options["dtype"] = getattr(torch, nf4["compute_dtype"])
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"], llm_int8_skip_modules=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    if model.config.vocab_size != ours.shape[1]:
        model.resize_token_embeddings(ours.shape[1], mean_resizing=False)
    trained = log_probabilities(PeftModel.from_pretrained(model, adapter.folder))
    bits = [-p.gather(1, ids[0, 1:, None]).sum().item() / math.log(2) for p in (ours, trained)]
    kl = (trained.exp() * (trained - ours)).sum(-1).mean().item()
    names = ("mean KL", "bits per character", "of base + adapter")
    values = (kl, bits[0] / characters, bits[1] / characters)
    return {name: float(f"{value:.4g}") for name, value in zip(names, values, strict=True)}


def push(folder: Path, repository: str, dry_run: bool) -> None:
    """Upload the folder, or show what would be uploaded. If the upload fails, the folder stays."""
    from huggingface_hub import HfApi
    if dry_run:
        print(f"\nwould go to {repository}, private if new:")
        for path in sorted(folder.iterdir()):
            print(f"{path.stat().st_size:16,} bytes  {path.name}")
        print("\n" + (folder / "README.md").read_text(encoding="utf-8"))
        return
    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = f"{folder} is whole; run hf auth login, then hf upload {repository} {folder}"
        raise UserError(f"--push_to_hub {repository}: {reason}; {remedy}") from error


# --- Main ----------------------------------------------------------------------------------------


@ignore_write_errors()
@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Find both models, plan every tensor, write them aside, put them in place, report."""
    args, began = parse_args(argv), time.time()
    check(args)
    text = read_passage(args.verify)
    adapters = [read_adapter(name, args.base_model) for name in args.adapter]
    base = find_base(args, adapters)
    nf4 = choose_base(args, adapters[0])
    chat, shared = read_chat(args, base)
    parts = make_plan(args, base, adapters, nf4, chat, shared)
    first, output, rows = adapters[0], Path(args.output_dir), base.config["vocab_size"]
    inputs, nbytes = [base, *adapters, *filter(None, [chat])], sum(p.nbytes for p in parts.values())
    check_output(output, [source.folder for source in inputs])
    with build_aside(output, nbytes + (64 << 20)) as folder:  # 64 MB for what is small
        tokenizer_from = copy_rest(first, base, chat, folder)
        tokens = check_tokenizer(folder, rows, tokenizer_from.shown, base)
        write_weights(folder, parts, args.max_shard_size * 1e9)
        facts = {
            "adapter": "mean of " * (len(adapters) > 1)
            + "; ".join(f"{adapter.folder}, rank {adapter.config['r']}" for adapter in adapters),
            "base": f"{base.folder}, {'quantised and dequantised' if nf4 else 'as it is'}",
            "chat vector": f"{chat.folder}, times {args.chat_scale}" if chat else None,
            "weights": f"{len(parts)} tensors, {nbytes / 1e9:.2f} GB",
            "vocabulary": f"{rows} rows, {tokens} tokens",
            # Of the first base: when the merged model is trained again, the rows behind it are new.
            "base_vocab_size": base.record["results"].get("base_vocab_size")
            or first.record["settings"].get("first_new_row")}
        write_papers(folder, args, first, base, facts)
        save_json(folder / "config.json", base.config)  # last: without it it is no model
    if args.verify:
        facts |= compare(output, base.folder, first, nf4, text)
        write_papers(output, args, first, base, facts)
    print("\n".join(f"{key}: {value}" for key, value in facts.items() if value is not None))
    print(f"merged into {output} in {time.time() - began:.1f} s", flush=True)
    if args.push_to_hub:
        push(output, args.push_to_hub, args.push_dry_run)


if __name__ == "__main__" and "__file__" in globals():  # a pasted notebook cell only defines
    main()
