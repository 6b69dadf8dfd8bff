"""A LoRA adapter and its base to one usable model, bit for bit what was trained, on a laptop.

In: an adapter's folder (outputs/pt, a checkpoint in it, any PEFT LoRA adapter, or a hub id). It names
its base; --base_model says otherwise. Out, in outputs/merged: safetensors (sharded, with an index),
config, generation config, tokenizer (tokenizer.model byte for byte: Transformers 5 leaves it out when
it saves, and llama.cpp then splits most lines wrongly without a word), a model card and run.json.

Streaming: no model is built. Each tensor flows from the base's file to the merged file in blocks of
rows, so memory stays at a few hundred MB for any size, most of it PyTorch itself, and the time is near
that of a copy. Blocks are read and written as plain bytes: the safetensors package writes a file only
from tensors that are all in memory, and pages of its memory map would count as ours. The format is an
8-byte length, a JSON header and the tensors.

Exact: the result equals PEFT 0.21's merge_and_unload on CPU bit for bit. PEFT takes A and B to fp32,
    delta = (B @ A) * scaling            # (out, r) @ (r, in), fp32
    W     = round(W + delta)             # one rounding, at the sum
and a product's rows do not depend on one another, so blocks of rows give the same bits (except for a
block of a single row, which BLAS hands to another kernel; there is none here). DoRA (Liu et al., 2024,
section 4) then scales each row to its trained length; modules_to_save and trainable_token_indices
replace whole tensors and rows. What cannot be merged exactly is refused by name.

An adapter trained on a 4-bit base (QLoRA; train_pt.py writes down how) learned to mend that base's
rounding, so it is merged into what it saw: the base quantised and dequantised, in 16 bits. The
original is one option away, and is a slightly different model. See --merge_into.

A run of seconds on any CPU (this command was run):
    python merge_lora.py --adapter outputs/pt --verify
The real run, after train_pt.py:
    python merge_lora.py
Cost: see benchmarks/bench_merge.py, which measures it beside PEFT and cp.
"""

import argparse
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tqdm import tqdm
from transformers import HfArgumentParser

if TYPE_CHECKING:  # PyTorch takes a second to import: the functions that use it import it
    import torch

# --- Constants -----------------------------------------------------------------------------------

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # safetensors' names, PyTorch's
ITEM_SIZE = {"BF16": 2, "F16": 2, "F32": 4}  # bytes
BLOCK = 1 << 21  # values in a block of rows: 8 MB in fp32, a few of which are alive at a time

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# What an adapter tensor is called: base_model.model.<module>.<part>
ADAPTER_NAME = re.compile(
    r"base_model\.model\.(.+?)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?"
    r"|token_adapter\.trainable_tokens_delta|(?:base_layer\.)?weight|bias)"
)

# Fields of adapter_config.json that do not change the merged weights, or that are read here. Any
# other field that is set names a variant of LoRA that this script does not know, and is refused.
KNOWN_FIELDS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "task_type", "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip
# Initialisations that leave the base as it was. PiSSA, OLoRA, LoftQ, ... change it while they start.
HARMLESS_INITS = (True, False, None, "gaussian", "orthogonal", "eva")

TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
TERMS = ("LICENSE*", "NOTICE*", "USE_POLICY*")  # Llama 2's licence travels with its weights

# QLoRA (Dettmers et al., 2023), for --merge_into dequantized when the adapter does not say how.
NF4 = {
    "quant_type": "nf4", "double_quant": True, "blocksize": 64, "compute_dtype": "bfloat16",
    "skip_modules": ["lm_head"],
}  # fmt: skip

# The opening of 紅樓夢 (public domain), which --verify reads when no file is named.
PASSAGE = (
    "此開卷第一回也。作者自云：因曾歷過一番夢幻之後，故將真事隱去，而借「通靈」之說，撰此《石頭記》一書也。"
    "故曰「甄士隱」云云。但書中所記何事何人？自又云：「今風塵碌碌，一事無成，忽念及當日所有之女子，"
    "一一細考較去，覺其行止見識，皆出於我之上。何我堂堂鬚眉，誠不若彼裙釵哉？實愧則有餘，悔又無益之大無可如何之日也！"
)

# --- Arguments -----------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the docstring as it is written and every option's default."""


@dataclass
class Arguments:
    """Every option of the command line; the help text is the documentation."""

    adapter: str = field(
        default="outputs/pt",
        metadata={
            "help": "The adapter: train_pt.py's output, a checkpoint in it, a PEFT folder or a hub id."
        },
    )
    base_model: str | None = field(
        default=None,
        metadata={
            "help": "The model to merge into, a folder or hub id; None takes the one the adapter names."
        },
    )
    output_dir: str = field(
        default="outputs/merged",
        metadata={
            "help": "Folder for the merged model; an earlier one is replaced when this one is whole."
        },
    )
    merge_into: Literal["dequantized", "original"] | None = field(
        default=None,
        metadata={
            "help": "The base as its 4-bit copy held it, or as it is on disk; None: dequantized when the "
            "adapter's run.json says that it was trained on a 4-bit base, else original."
        },
    )
    dtype: Literal["bf16", "fp16", "fp32"] | None = field(
        default=None,
        metadata={"help": "Number format of the merged weights; None keeps the base's."},
    )
    max_shard_size: float = field(
        default=5.0, metadata={"help": "Largest safetensors file in GB; a larger model is split."}
    )
    verify: str | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": PASSAGE,
            "help": "After merging, run base + adapter and then the merged model on this UTF-8 text file "
            "(without a value: the opening of 紅樓夢) and print their mean KL divergence and bits per "
            "character. It holds one whole model in memory at a time. None: do not.",
        },
    )
    verify_tokens: int = field(
        default=512, metadata={"help": "How many tokens of the text --verify reads."}
    )
    push_to_hub: str | None = field(
        default=None,
        metadata={
            "help": "Hub repository (user/name) to upload to, private if new; None: stay local."
        },
    )


def parse_args(argv: list[str] | None) -> Arguments:
    """Read the command line (None: sys.argv); an unknown option ends the program with exit code 2."""
    parser = HfArgumentParser(
        Arguments,
        description=__doc__,
        formatter_class=HelpFormatter,
        usage="%(prog)s [options]",
        allow_abbrev=False,
    )
    args, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unknown option: {' '.join(unknown)}; --help lists the options")
    return args


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


# --- The models' folders -------------------------------------------------------------------------


def find_model(name_or_path: str, option: str) -> Path:
    """The local folder of a model: a folder with a config.json as it is, else the hub's snapshot."""
    folder = Path(name_or_path).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():
        raise UserError(
            f"{option} {name_or_path}: no config.json in it; expected a model's folder (config.json, "
            "*.safetensors, tokenizer.model) or a hub id such as meta-llama/Llama-2-7b-hf"
        )
    if folder.parts[:1] == ("outputs",):
        raise UserError(
            f"{option} {name_or_path}: there is no such folder; run python extend_vocab.py first"
        )
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name_or_path) or folder.parent.is_dir():
        raise UserError(
            f"{option} {name_or_path}: there is no such folder; expected a model's folder or a hub id "
            "such as meta-llama/Llama-2-7b-hf"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "LICENSE*", "USE_POLICY*"]
    try:
        folder = Path(
            snapshot_download(name_or_path, allow_patterns=wanted, ignore_patterns=["*/*"])
        )
    except (GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        gated = isinstance(error, GatedRepoError)
        reason = (
            "the model is gated" if gated else "the hub does not hand it out or is out of reach"
        )
        raise UserError(
            f"{option} {name_or_path}: {reason}; accept the licence on "
            f"https://huggingface.co/{name_or_path}, run hf auth login and try again; without it, "
            f"{option} data/sample/tiny-llama tries the whole pipeline"
        ) from error
    if not (folder / "config.json").is_file():
        raise UserError(f"{option} {name_or_path}: the repository has no config.json; not a model")
    return folder


def find_adapter(name_or_path: str) -> Path:
    """The local folder of an adapter; without one, the error says what to run or to pass."""
    folder, shown = Path(name_or_path).expanduser(), f"--adapter {name_or_path}"
    if not folder.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name_or_path):
        if folder.parts[0] == "outputs":
            raise UserError(f"{shown}: there is no such folder; run python train_pt.py first")
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        wanted = ["adapter_*", "run.json", *TOKENIZER_FILES]
        try:
            folder = Path(snapshot_download(name_or_path, allow_patterns=wanted))
        except (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError) as error:
            raise UserError(
                f"{shown}: no such folder, and the hub does not hand it out or is out of reach; run "
                "python train_pt.py first, or hf auth login if the adapter is private"
            ) from error
    if not (folder / "adapter_config.json").is_file():
        found = [path.parent for path in folder.glob("checkpoint-*/adapter_config.json")]
        if found:
            last = max(found, key=lambda path: int(path.name.rpartition("-")[2]))
            raise UserError(
                f"{shown}: training has not finished here; pass a checkpoint: --adapter {last}"
            )
        raise UserError(
            f"{shown}: no adapter_config.json; expected a PEFT LoRA adapter; run python train_pt.py first"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(
            f"{shown}: no adapter_model.safetensors; expected weights as safetensors; save the adapter "
            "again with save_pretrained of a current PEFT"
        )
    return folder


# --- Files of tensors ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its file, its first byte there, and what the header says of it."""

    path: Path
    start: int
    dtype: str  # as safetensors writes it: BF16
    shape: tuple[int, ...]

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:  # a vector is one row
        return math.prod(self.shape[:-1])


def fingerprint(folder: Path) -> str:
    """Name a model's weights without reading gigabytes: the sha256 of config.json and, for every
    *.safetensors in name order, its name, its header, and both ends (1,024 bytes) of each tensor."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
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


def read_json(path: Path, option: str) -> dict:
    """A JSON object, or an error that names the option the file came by."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    except ValueError:  # not UTF-8, or not JSON
        pass
    raise UserError(
        f"{option}: {path} is no JSON object; the file is broken; copy or download it again"
    )


def read_header(path: Path, option: str) -> dict[str, Stored]:
    """The tensors of one safetensors file, in the order of their bytes; all of them must be there."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if 0 < length <= size else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise UserError(
            f"{option}: {path} is no safetensors file; it is broken; copy or download it again"
        )
    header.pop("__metadata__", None)
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    due = 8 + length + max((entry["data_offsets"][1] for _, entry in entries), default=0)
    if size != due:
        raise UserError(
            f"{option}: {path} has {size:,} bytes; expected {due:,} by its header; it is truncated or "
            "broken; copy or download it again"
        )
    return {
        name: Stored(path, 8 + length + e["data_offsets"][0], e["dtype"], tuple(e["shape"]))
        for name, e in entries
    }


def read_folder(folder: Path, option: str) -> dict[str, Stored]:
    """The tensors of a model: model.safetensors, or the shards that the index names."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file() and not (folder / names[0]).is_file():
        names = sorted(set(read_json(index, option).get("weight_map", {}).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{option}: {folder / missing[0]} is missing; expected the model's weights as safetensors; "
            "copy or download it again"
        )
    tensors = {}
    for name in names:
        tensors.update(read_header(folder / name, option))
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("inv_freq")}


def read_rows(tensor: Stored, begin: int, end: int) -> "torch.Tensor":
    """Rows begin to end, in memory of our own."""
    import torch

    rows = torch.empty((end - begin, tensor.columns), dtype=getattr(torch, DTYPES[tensor.dtype]))
    data = rows.view(torch.uint8).numpy()
    with tensor.path.open("rb", buffering=0) as file:
        file.seek(tensor.start + begin * tensor.columns * ITEM_SIZE[tensor.dtype])
        if file.readinto(data) != data.nbytes:
            raise UserError(
                f"{tensor.path} ended early while it was read; is something writing to it?"
            )
    return rows


def row_blocks(tensor: Stored) -> list[tuple[int, int]]:
    """Split a tensor's rows evenly into blocks of at most about BLOCK values and at least 2 rows: a
    product with one row goes to another BLAS kernel, whose last bit may differ."""
    count = min(-(-tensor.rows * tensor.columns // BLOCK), tensor.rows // 2) or 1
    bounds = [tensor.rows * i // count for i in range(count + 1)]
    return list(zip(bounds, bounds[1:], strict=False))


def read_base(
    args: Arguments, lora_config: dict, run: dict
) -> tuple[Path, dict, dict[str, Stored]]:
    """The base's folder, config and tensors; it must be the model that the adapter was trained on."""
    name = args.base_model or lora_config.get("base_model_name_or_path")
    if not name:
        raise UserError(f"--adapter {args.adapter}: it names no base; pass --base_model")
    shown = f"--base_model {name}"
    revision = lora_config.get("revision") or "main"
    if not args.base_model and revision != "main" and not Path(name).exists():
        raise UserError(
            f"{shown}: the adapter wants revision {revision}; download it and pass its folder"
        )
    folder = find_model(name, "--base_model")
    config = read_json(folder / "config.json", shown)
    if config.get("quantization_config"):
        raise UserError(
            f"{shown}: it is quantised; expected 16 or 32 bits; pass the model it was made from"
        )
    tensors = read_folder(folder, shown)
    for key, tensor in tensors.items():
        check_dtype(key, tensor, shown)
    trained_on = run.get("base", {})
    if trained_on.get("fingerprint") not in (None, fingerprint(folder)):
        raise UserError(
            f"{shown}: the adapter of another model; it was trained on {trained_on['model_name_or_path']} "
            "with other weights; pass that model with --base_model, or train again"
        )
    return folder, config, tensors


# --- The plan: what each tensor of the merged model is made of -----------------------------------


@dataclass
class Part:
    """One tensor of the merged model: a source, and what the adapter does to it."""

    name: str
    source: Stored  # the base's tensor, or the adapter's where that has the whole
    dtype: str  # of the merged tensor, as safetensors writes it
    a: Stored | None = None  # (r, in)
    b: Stored | None = None  # (out, r)
    scaling: float = 1.0
    magnitude: Stored | None = None  # DoRA: (out,)
    replaced: Stored | None = None  # rows that take the place of the source's,
    indices: list[int] = field(default_factory=list)  # and where they go
    quantized: bool = False  # take the source as its 4-bit copy holds it

    @property
    def nbytes(self) -> int:
        return self.source.rows * self.source.columns * ITEM_SIZE[self.dtype]


def check_adapter(config: dict, tensors: dict[str, Stored], shown: str) -> None:
    """Refuse, by name, what cannot be merged exactly."""
    import torch

    if config.get("peft_type") != "LORA":
        raise UserError(f"{shown}: peft_type {config.get('peft_type')}; expected LORA")
    bias = {"bias": config.get("bias", "none")} if config.get("bias", "none") != "none" else {}
    other = {
        key: value for key, value in config.items() if value and key not in KNOWN_FIELDS | {"bias"}
    }
    if config.get("init_lora_weights", True) not in HARMLESS_INITS:
        other["init_lora_weights"] = config["init_lora_weights"]
    for key, value in {**bias, **other}.items():
        raise UserError(
            f"{shown}: {key} = {value} in adapter_config.json cannot be merged exactly here; merge it "
            "with PEFT's merge_and_unload"
        )
    for name, tensor in tensors.items():
        if not ADAPTER_NAME.fullmatch(name):
            raise UserError(
                f"{shown}: tensor {name} is of a kind that cannot be merged exactly here; merge it with "
                "PEFT's merge_and_unload"
            )
        check_dtype(name, tensor, shown)
        for begin, end in row_blocks(tensor):
            if not torch.isfinite(read_rows(tensor, begin, end)).all():
                raise UserError(
                    f"{shown}: tensor {name} has NaN or infinite values; training went astray; pass an "
                    "earlier checkpoint"
                )


def check_dtype(name: str, tensor: Stored, shown: str) -> None:
    if tensor.dtype not in DTYPES:
        raise UserError(
            f"{shown}: tensor {name} is stored as {tensor.dtype}; expected BF16, F16 or F32; pass the "
            "model as it was before quantisation"
        )


def pattern_value(patterns: dict, module: str, default: float) -> float:
    """alpha_pattern and rank_pattern: the first pattern that fits the end of the module's name."""
    fits = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(fits, default)


def token_indices(config: dict, module: str) -> list[int]:
    """The rows that trainable_token_indices names for a module; a bare list is the embedding's."""
    named = config.get("trainable_token_indices") or {}
    if isinstance(named, list):
        named = {"embed_tokens": named}
    return next((rows for key, rows in named.items() if f".{module}".endswith(f".{key}")), [])


def make_plan(
    base: dict[str, Stored],
    adapter: dict[str, Stored],
    config: dict,
    model_config: dict,
    shown: str,
) -> dict[str, Part]:
    """Lay the adapter over the base. The model's config follows where the adapter changes it."""
    parts = {name: Part(name, tensor, tensor.dtype) for name, tensor in base.items()}
    tied = model_config.get("tie_word_embeddings", HEAD not in base)
    changed = {f"{ADAPTER_NAME.fullmatch(name)[1]}.weight" for name in adapter}
    if tied and {EMBEDDING, HEAD} & changed:
        saved = [f".{module}" for module in config.get("modules_to_save") or []]
        if any(
            f".{name}".endswith(f"{module}.weight")
            for name in (EMBEDDING, HEAD)
            for module in saved
        ):
            # PEFT trained copies of its own: the two part unless it was told to keep them tied
            tied = model_config["tie_word_embeddings"] = bool(config.get("ensure_weight_tying"))
            parts.setdefault(HEAD, Part(HEAD, base[EMBEDDING], base[EMBEDDING].dtype))
    if tied:
        parts.pop(HEAD, None)

    for name, tensor in adapter.items():
        module, kind = ADAPTER_NAME.fullmatch(name).groups()
        target = f"{module}.bias" if kind == "bias" else f"{module}.weight"
        whole = kind in ("weight", "base_layer.weight", "bias")
        if tied and target == HEAD and whole and f"base_model.model.{EMBEDDING}" in adapter:
            continue  # the same tensor once more
        if tied and target in (EMBEDDING, HEAD) and (kind.startswith("lora") or target == HEAD):
            raise UserError(
                f"{shown}: {name} changes one of two tied matrices (tie_word_embeddings), which cannot be "
                "merged exactly; train with ensure_weight_tying or untie the base"
            )
        if target not in parts:
            raise UserError(
                f"{shown}: tensor {name} has no counterpart in the base; is it another model's?"
            )
        part = parts[target]
        if whole:
            rows_may_differ = target in (EMBEDDING, HEAD)
            if tensor.shape[rows_may_differ:] != part.source.shape[rows_may_differ:]:
                raise UserError(
                    f"{shown}: {name} is {tensor.shape}; the base has {part.source.shape}; is it another model's?"
                )
            part.source = Stored(tensor.path, tensor.start, tensor.dtype, tensor.shape)
            if target == EMBEDDING:
                model_config["vocab_size"] = tensor.rows
        elif kind == "lora_A.weight":
            part.a = tensor
        elif kind == "lora_B.weight":
            part.b = tensor
        elif kind.startswith("lora_magnitude_vector"):
            part.magnitude = tensor
        else:
            part.replaced, part.indices = tensor, token_indices(config, module)
    for part in parts.values():
        check_part(part, config, shown)
        if part.a:
            module = part.name.removesuffix(".weight")
            alpha = pattern_value(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
            rank = part.a.rows
            part.scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return parts


def check_part(part: Part, config: dict, shown: str) -> None:
    """The shapes must fit together; otherwise the adapter and the base are not of one model."""
    shape, module = part.source.shape, part.name.removesuffix(".weight")
    if part.a or part.b or part.magnitude:
        rank = pattern_value(config.get("rank_pattern") or {}, module, config["r"])
        found = [tensor and tensor.shape for tensor in (part.a, part.b)]
        if len(shape) != 2 or found != [(rank, shape[1]), (shape[0], rank)]:
            raise UserError(
                f"{shown}: {module} has LoRA A and B of {found}; expected rank {rank} on the base's {shape}; "
                "is it another model's?"
            )
        if bool(config.get("use_dora")) != (part.magnitude is not None):
            raise UserError(
                f"{shown}: {module}: use_dora and its magnitude vector do not go together"
            )
        if part.replaced:
            raise UserError(
                f"{shown}: {module} has LoRA and replaced rows, which cannot be merged exactly"
            )
    if part.replaced:
        if part.replaced.shape != (len(part.indices), *shape[1:]) or len(set(part.indices)) != len(
            part.indices
        ):
            raise UserError(
                f"{shown}: {module} has {part.replaced.shape} new rows for {len(part.indices)} "
                f"trainable_token_indices and rows of {shape[1:]}; the adapter is broken"
            )
        if max(part.indices) >= shape[0]:
            raise UserError(
                f"{shown}: {module} replaces row {max(part.indices)}; the base has {shape[0]}; pass the "
                "extended model with --base_model, or run python extend_vocab.py first"
            )


def llama_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor that a Llama of this config has."""
    width, inner, vocabulary = (
        config[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or width // heads
    queries, keys = heads * size, (config.get("num_key_value_heads") or heads) * size
    linear = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    shapes = {EMBEDDING: (vocabulary, width), "model.norm.weight": (width,)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, shape in linear.items():
            shapes[f"{prefix}{name}.weight"] = shape
            if config.get("attention_bias" if "attn" in name else "mlp_bias"):
                shapes[f"{prefix}{name}.bias"] = shape[:1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{norm}.weight"] = (width,)
    if not config.get("tie_word_embeddings"):
        shapes[HEAD] = (vocabulary, width)
    return shapes


def check_shapes(shapes: dict[str, tuple[int, ...]], config: dict, shown: str) -> None:
    """Every tensor that the config asks for is there, with its shape, and no other."""
    if config.get("model_type") != "llama":  # of other families only the vocabulary is known here
        expected = {
            name: (config["vocab_size"], *shape[1:]) if name in (EMBEDDING, HEAD) else shape
            for name, shape in shapes.items()
        }
    else:
        expected = llama_shapes(config)
    for name in sorted(expected.keys() | shapes.keys()):
        if shapes.get(name) != expected.get(name):
            raise UserError(
                f"{shown}: tensor {name} is {shapes.get(name, 'missing')}; expected "
                f"{expected.get(name, 'no such tensor')} by config.json; the folder is not whole"
            )


def choose_base(parts: dict[str, Part], args: Arguments, run: dict) -> dict | None:
    """Which base to merge into: mark what a 4-bit base quantises; return the flags, None: original."""
    trained = run.get("quantization")
    choice = args.merge_into or ("dequantized" if trained else "original")
    if choice == "original":
        return None
    flags = {**NF4, **(trained or {})}
    skipped = {*(flags["skip_modules"] or []), "lm_head", "embed_tokens"}
    for part in parts.values():
        of_base = not {*part.name.split(".")} & skipped and len(part.source.shape) == 2
        if of_base and part.source.path.name != "adapter_model.safetensors":
            part.quantized = True
            if part.source.columns % flags["blocksize"]:
                raise UserError(
                    f"--merge_into dequantized: {part.name} has rows of {part.source.columns}; expected a "
                    f"multiple of the quantisation block, {flags['blocksize']} (bitsandbytes' kernels read "
                    "other widths differently); pass --merge_into original"
                )
    return flags


def choose_dtypes(parts: dict[str, Part], config: dict, args: Arguments) -> None:
    """The number format of each merged tensor: the base's own, or --dtype for all."""
    for part in parts.values():
        part.dtype = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", None: part.dtype}[args.dtype]
    key = next((key for key in ("torch_dtype", "dtype") if key in config), "dtype")
    config[key] = DTYPES[parts[EMBEDDING].dtype]


# --- Merging, block by block ---------------------------------------------------------------------


def dequantized_rows(tensor: Stored, flags: dict) -> Iterator["torch.Tensor"]:
    """The tensor as its 4-bit copy holds it, in row blocks, equal to quantize_4bit and dequantize_4bit
    of the whole. Blocks of 64 values are quantised on their own; only the double quantisation of
    their scales takes a mean over the tensor. So: pack all (half a byte a value), then unpack."""
    import torch

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels not used here
    import bitsandbytes.functional as bnb

    loaded_as = getattr(torch, flags["compute_dtype"])
    flavour = {"blocksize": flags["blocksize"], "quant_type": flags["quant_type"]}
    packed = [
        bnb.quantize_4bit(read_rows(tensor, begin, end).to(loaded_as), **flavour)
        for begin, end in row_blocks(tensor)
    ]
    scales = torch.cat([state.absmax for _, state in packed])
    if flags["double_quant"]:
        mean = scales.mean()
        scales = (
            bnb.dequantize_blockwise(*bnb.quantize_blockwise(scales - mean, blocksize=256)) + mean
        )
    for values, state in packed:
        state.absmax, scales = scales.split([len(state.absmax), len(scales) - len(state.absmax)])
        yield bnb.dequantize_4bit(values, state)


def merged_rows(part: Part, flags: dict | None) -> Iterator["torch.Tensor"]:
    """The part's tensor as it will lie in the file, in row blocks."""
    import torch

    dtype = getattr(torch, DTYPES[part.dtype])
    blocks = row_blocks(part.source)
    base = dequantized_rows(part.source, flags) if part.quantized else None
    if part.a:
        a = read_rows(part.a, 0, part.a.rows).float()
    if part.magnitude:
        magnitude = read_rows(part.magnitude, 0, 1).float().view(-1, 1)
    if part.replaced:
        position = torch.full((part.source.rows,), -1)  # which new row goes here; -1: none
        position[part.indices] = torch.arange(len(part.indices))
    for begin, end in blocks:
        rows = next(base) if base else read_rows(part.source, begin, end)
        if part.a:
            delta = (read_rows(part.b, begin, end).float() @ a).mul_(part.scaling)
            rows = delta.add_(rows)
        if part.magnitude:
            rows = magnitude[begin:end] / torch.linalg.norm(rows, dim=1, keepdim=True) * rows
        rows = rows.to(dtype)
        if part.replaced and (hit := position[begin:end] >= 0).any():
            new = position[begin:end][hit]
            first = int(new.min())
            rows[hit] = read_rows(part.replaced, first, int(new.max()) + 1)[new - first].to(dtype)
        # One pass: a sum is finite only if all values are, and overflows only in absurd models
        if not rows.sum(dtype=torch.float32).isfinite() and not rows.isfinite().all():
            raise UserError(
                f"{part.name} has NaN or infinite values after merging, from {part.source.path} or the range "
                f"of {DTYPES[part.dtype]}; download the base again, or pass another --dtype"
            )
        yield rows


def write_shard(path: Path, parts: list[Part], flags: dict | None, bar: tqdm) -> None:
    """One safetensors file, written block by block and put on the disk for certain."""
    import torch

    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for part in parts:
        span = [offset, offset + part.nbytes]
        header[part.name] = {"dtype": part.dtype, "shape": part.source.shape, "data_offsets": span}
        offset = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            for rows in merged_rows(part, flags):
                file.write(rows.view(torch.uint8).numpy())
                bar.update(rows.nbytes)
        file.flush()
        os.fsync(file.fileno())


def write_weights(
    folder: Path, parts: list[Part], flags: dict | None, shard_bytes: float
) -> list[str]:
    """All shards and their index, in the base's order (wide numbers first, for their alignment)."""
    shards: list[list[Part]] = [[]]
    for part in sorted(parts, key=lambda part: -ITEM_SIZE[part.dtype]):
        if shards[-1] and sum(p.nbytes for p in shards[-1]) + part.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(part)
    count, total = len(shards), sum(part.nbytes for part in parts)
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    names = names if count > 1 else ["model.safetensors"]
    with tqdm(total=total, unit="B", unit_scale=True, desc="merging") as bar:
        for name, shard in zip(names, shards, strict=True):
            write_shard(folder / name, shard, flags, bar)
    if count > 1:
        where = {
            part.name: name for name, shard in zip(names, shards, strict=True) for part in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_json(folder / "model.safetensors.index.json", index)
    return names


def check_written(folder: Path, parts: dict[str, Part]) -> None:
    """What lies on the disk is what was planned: every tensor, its shape and number format."""
    found = read_folder(folder, f"--output_dir {folder}")
    planned = {name: (part.dtype, part.source.shape) for name, part in parts.items()}
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == planned


# --- What goes with the weights ------------------------------------------------------------------


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_tokenizer(adapter: Path, base: Path, folder: Path, rows: int) -> int:
    """Copy the tokenizer's files byte for byte, the adapter's before the base's, and check that its
    files agree with each other and with the embedding's rows. Returns the number of its tokens."""
    import sentencepiece

    for name in TOKENIZER_FILES:
        source = next((f / name for f in (adapter, base) if (f / name).is_file()), None)
        if source:
            shutil.copyfile(source, folder / name)
    if not (folder / "tokenizer.json").is_file():  # only then is the slow library worth its memory
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except Exception as error:
            raise UserError(
                f"--base_model {base}: no tokenizer in it, nor in {adapter} ({error}); copy the model's "
                "tokenizer.model or tokenizer.json there"
            ) from error
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    made = read_json(folder / "tokenizer.json", "--base_model")
    count = len(made["model"]["vocab"])
    tokens = max([count, *(token["id"] + 1 for token in made.get("added_tokens", []))])
    if (folder / "tokenizer.model").is_file():
        pieces = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")).vocab_size()
        if pieces != count:
            raise UserError(
                f"--base_model {base}: tokenizer.model has {pieces} pieces, tokenizer.json {count}; expected "
                "one vocabulary; copy both files from the tokenizer that the adapter was trained with"
            )
    if tokens > rows:
        raise UserError(
            f"--base_model {base}: the tokenizer has {tokens} tokens, the merged embedding {rows} rows; "
            "expected a row for every token; pass the model that belongs to this tokenizer"
        )
    return tokens


def write_card(folder: Path, facts: dict[str, object]) -> None:
    """The model card: where the weights came from and how to use them."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "language: zh"]
    lines += ["---", "", "# Merged model", "", "Made by `merge_lora.py` of 落九 (Luojiu).", ""]
    lines += ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in facts.items())]
    lines += [
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'name = "."  # this folder',
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        "model = AutoModelForCausalLM.from_pretrained(name)",
        'tokens = tokenizer("卻說", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=100)[0]))",
        "```",
        "",
        "The terms of the base model apply to these weights too.",
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def copy_rest(base: Path, folder: Path, config: dict) -> None:
    """The generation config (made from the model's config if the base has none) and the terms."""
    if (base / "generation_config.json").is_file():
        shutil.copyfile(base / "generation_config.json", folder / "generation_config.json")
    else:
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        kept = {key: config[key] for key in keys if config.get(key) is not None}
        write_json(folder / "generation_config.json", kept)
    for pattern in TERMS:
        for path in base.glob(pattern):
            shutil.copyfile(path, folder / path.name)


def describe(flags: dict | None) -> str:
    """In words: which base the adapter was merged into."""
    if not flags:
        return "as it is"
    double = " with double quantisation" if flags["double_quant"] else ""
    return f"quantised to {flags['quant_type']}{double} and dequantised"


def write_run(folder: Path, args: Arguments, base: Path, results: dict[str, object]) -> None:
    """run.json: what was asked for, with which versions, and what came of it."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "safetensors")
    record = {
        "script": "merge_lora.py",
        "arguments": asdict(args),
        "versions": {name: version(name) for name in packages},
        "base": {"model_name_or_path": str(base), "fingerprint": fingerprint(base)},
        "results": results,
    }
    write_json(folder / "run.json", record)


# --- The output folder ---------------------------------------------------------------------------


def check_output(output: Path, inputs: list[Path], nbytes: int) -> Path:
    """Refuse to replace a folder that is not ours, and to start what the disk cannot hold."""
    shown = f"--output_dir {output}"
    for folder in inputs:
        if folder.resolve().is_relative_to(output.resolve()):
            raise UserError(
                f"{shown}: {folder}, which is to be read, lies in it; pass another folder"
            )
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        try:
            ours = json.loads((output / "run.json").read_text())["script"] == "merge_lora.py"
        except (OSError, ValueError, KeyError):
            ours = False
        if not ours:
            raise UserError(
                f"{shown}: it holds something that merge_lora.py did not write; pass a new or empty folder"
            )
    nearest = next(folder for folder in output.resolve().parents if folder.exists())
    needed, free = (
        nbytes + (64 << 20),
        shutil.disk_usage(nearest).free,
    )  # 64 MB for all but the weights
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{shown}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; make room or pass a folder "
            "on another disk",
        )
    return output


@contextmanager
def built_aside(output: Path) -> Iterator[Path]:
    """A sibling folder to write into, which takes the output's place when all is well and goes away
    when it is not. What a killed run left of it, the next run removes."""
    partial, old = (output.with_name(f"{output.name}.{word}") for word in ("partial", "old"))
    for folder in (partial, old):
        shutil.rmtree(folder, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if output.exists():
            output.rename(old)
        partial.rename(output)
    finally:
        for folder in (partial, old):
            shutil.rmtree(folder, ignore_errors=True)


# --- After the merge -----------------------------------------------------------------------------


def read_passage(args: Arguments) -> str:
    """The text of --verify, read before the merge so that a wrong name costs nothing."""
    if args.verify in (None, PASSAGE):
        return PASSAGE
    try:
        text = Path(args.verify).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--verify {args.verify}: expected a UTF-8 text file ({error})") from error
    if not text.strip():
        raise UserError(f"--verify {args.verify}: the file is empty; expected a UTF-8 text")
    return text


def compare(
    base: Path, adapter: Path, merged: Path, flags: dict | None, text: str, tokens: int
) -> dict[str, float]:
    """Mean KL divergence from base + adapter (through PEFT, 4-bit if so trained) to the merged model,
    and bits per character of both: -log2 p(text) / characters."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(merged)
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :tokens].to(device)  # (1, T)
    characters = len(tokenizer.decode(ids[0], skip_special_tokens=True))

    def log_probabilities(
        adapted: bool,
    ) -> torch.Tensor:  # (T - 1, V); the model is freed on return
        kwargs = {"dtype": "auto", "device_map": {"": device}}
        if adapted and flags:
            dtype = kwargs["dtype"] = getattr(torch, flags["compute_dtype"])
            kwargs["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=flags["quant_type"],
                bnb_4bit_use_double_quant=flags["double_quant"],
                bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=flags["skip_modules"],
            )
        model = AutoModelForCausalLM.from_pretrained(base if adapted else merged, **kwargs)
        if adapted:
            rows = read_json(merged / "config.json", "--verify")["vocab_size"]
            if model.get_input_embeddings().weight.shape[0] != rows:
                model.resize_token_embeddings(rows, mean_resizing=False)
            model = PeftModel.from_pretrained(model, adapter)
        with torch.no_grad():
            return model.eval()(ids).logits[0, :-1].float().log_softmax(-1).cpu()

    ours, theirs = log_probabilities(False), log_probabilities(True)
    target = ids[0, 1:, None].cpu()
    bits = [-p.gather(1, target).sum().item() / math.log(2) / characters for p in (theirs, ours)]
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    return {
        "mean_kl": kl,
        "bits_per_character_adapter": bits[0],
        "bits_per_character_merged": bits[1],
    }


def push(folder: Path, repository: str) -> None:
    """Upload the folder; what goes wrong on the way leaves the local folder as it is."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, LocalTokenNotFoundError, ConnectionError, ValueError) as error:
        raise UserError(
            f"--push_to_hub {repository}: {str(error).splitlines()[0]}; {folder} is whole; run hf auth "
            f"login, then hf upload {repository} {folder}"
        ) from error


# --- Main ----------------------------------------------------------------------------------------


@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Find both models, plan every tensor, write them aside, put them in place, report."""
    args, began = parse_args(argv), time.time()
    text = read_passage(args)
    adapter, shown = find_adapter(args.adapter), f"--adapter {args.adapter}"
    lora_config = read_json(adapter / "adapter_config.json", shown)
    run = read_json(adapter / "run.json", shown) if (adapter / "run.json").is_file() else {}
    lora = read_header(adapter / "adapter_model.safetensors", shown)
    check_adapter(lora_config, lora, shown)
    base, config, stored = read_base(args, lora_config, run)

    parts = make_plan(stored, lora, lora_config, config, shown)
    flags = choose_base(parts, args, run)
    choose_dtypes(parts, config, args)
    check_shapes({name: part.source.shape for name, part in parts.items()}, config, f"base {base}")
    nbytes, rows = sum(part.nbytes for part in parts.values()), parts[EMBEDDING].source.rows
    output = check_output(Path(args.output_dir), [adapter, base], nbytes)

    with built_aside(output) as folder:
        write_json(folder / "config.json", config)
        tokens = copy_tokenizer(adapter, base, folder, rows)
        copy_rest(base, folder, config)
        write_weights(folder, list(parts.values()), flags, args.max_shard_size * 1e9)
        check_written(folder, parts)
        facts = {
            "base": f"{base}, {describe(flags)}",
            "adapter": f"{adapter}, rank {lora_config['r']}",
            "weights": f"{len(parts)} tensors, {nbytes / 1e9:.2f} GB, {DTYPES[parts[EMBEDDING].dtype]}",
            "vocabulary": f"{rows} rows, {tokens} tokens",
        }
        write_card(folder, facts)
        write_run(folder, args, base, facts)
    print("\n".join(f"{key:>12}: {value}" for key, value in facts.items()))
    print(f"merged into {output} in {time.time() - began:.1f} s", flush=True)
    if args.verify:
        trained = run.get("quantization") or flags
        facts |= compare(base, adapter, output, trained, text, args.verify_tokens)
        write_run(output, args, base, facts)
    if args.push_to_hub:
        push(output, args.push_to_hub)


if __name__ == "__main__" and "__file__" in globals():  # a pasted notebook cell only defines
    main()
