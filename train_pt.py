"""Continued pretraining of an extended Llama on one GPU: QLoRA with shifted sparse (S²) attention.

In: the model of extend_vocab.py (outputs/extended) and a folder of text (data/cc_filtered: Parquet
with a column `text`; JSON Lines and .txt work too), or several in a ratio of tokens. Out:
outputs/pt with the adapter (stock PEFT: LoRA, the new rows of embedding and head, the norms),
checkpoints, metrics.jsonl, a model card, and pictures/trainloss.png, redrawn as it runs.

The weights are NF4 (QLoRA, Dettmers et al. 2023). In training half of the heads attend within
groups of --group_size tokens and half within groups shifted by half a group (LongLoRA, Chen et al.
2023, section 3.2), never across documents; evaluation is full causal attention. The same command
resumes an interrupted run bit for bit (but for flash attention's backward pass on a GPU, which
differs a little each time). SIGTERM, SIGHUP and Ctrl-C end the run after the batch at hand: it
saves the last whole step and exits with 143, 129 or 130. A mistake or an exploding loss exits with
2, a full disk with 1.

Minutes on any CPU, after the first two steps of `make demo`:
    python train_pt.py --block_size 256 --gradient_accumulation_steps 1 --learning_rate 3e-3 \\
        --warmup_steps 20 --num_train_epochs 15
The real run, and first what it will take (config.json is enough for that):
    python train_pt.py --plan --plan_gpu 4090
    python train_pt.py --max_steps 8712
With a tenth of English mixed in; and a run that goes on from a trained adapter:
    python train_pt.py --dataset data/cc_filtered english.parquet --dataset_weight 9 1
    python train_pt.py --adapter outputs/pt --output_dir longer
Several GPUs, a copy of the model on each (DDP), or a part of it on each (FSDP; docs/clusters.md):
    torchrun --shutdown_timeout 600 --nproc_per_node 4 train_pt.py --lora_rank 32
    accelerate launch --config_file fsdp.yaml train_pt.py --lora_rank 32
Cost: for 8 x 2,048 tokens --plan says 13.8 GB; an H200 took 14.06 without Liger's kernels.

Every option of transformers.TrainingArguments is accepted too; --help_trainer lists them.
"""

from __future__ import annotations

import argparse
import atexit
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from copy import copy, deepcopy
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from functools import cache, partial, wraps
from importlib.metadata import version
from inspect import unwrap
from itertools import chain, islice
from pathlib import Path
from string import ascii_uppercase
from tempfile import TemporaryDirectory
from types import new_class
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

import numpy as np
from transformers import HfArgumentParser

if TYPE_CHECKING:  # heavy imports wait inside the functions that use them, so that --help is quick
    import torch

# --- Constants -----------------------------------------------------------------------------------

STOPPING = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
LLAMA_2_PIECES = 32_000
LARGE_FOR_A_CPU = 2e9  # bytes of weights
TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
IGNORED = -100  # the label of a token that is not predicted
# Options of TrainingArguments that are refused, and why.
UNSUPPORTED = {
    "deepspeed": "expected no DeepSpeed; several GPUs: accelerate launch --config_file fsdp.yaml",
    "push_to_hub": "expected false; when the run is done: hf upload NAME OUTPUT_DIR",
    "save_only_model": "expected false; without its optimizer a checkpoint cannot go on",
    "auto_find_batch_size": "expected false; --plan says which batch fits",
    "enable_jit_checkpoint": "expected false; SIGTERM already saves the last whole step",
    "ignore_data_skip": "expected false; a resumed run would train on the same text twice",
    "dataloader_num_workers": "expected 0; the signal that makes a run save would kill workers",
    "label_smoothing_factor": "expected 0; the logits that it smooths never leave the loss",
    "dataloader_drop_last": "expected false; a short last batch is trained on too",
    "accelerator_config": "expected none; each process looks up its own sequences"}
PART, BATCH = 1 << 16, 1 << 20  # characters in a part of a long text, in a call of the tokenizer
SHARES = ("taiwan_wording", "in_context_")  # metrics that should be high
SURROGATES = re.compile("[\ud800-\udfff]")
# What a file manager, Jupyter or a file system leaves in a folder.
FOREIGN = {".DS_Store", ".ipynb_checkpoints", "lost+found"}
# What a file system without locks answers.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
LOSS_CHUNK = 1024  # tokens whose logits exist at one time: 1,024 x 61,388 x 4 bytes = 0.25 GB
# Settings that may change in a run if the learning rates of its steps so far stay the same.
SCHEDULE = {"max_steps", "num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs",
            "warmup_steps"}
# Settings that must be those of the adapter from which training starts.
ADAPTER_SETTINGS = ("model", "lora_rank", "lora_alpha", "use_rslora", "quantization",
                    "train_embeddings", "train_norms", "first_new_row")
# The Trainer's options that change the result, beside our own Settings.
TRAINER_SETTINGS = re.compile(
    "adam_|data(_seed|loader_drop)|fp16$|greater_is|load_best|lr_scheduler|max_(steps|grad)|"
    "metric_for|neftune|optim_|train_sampling|w(armup|eight)"
)

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
class Settings:
    """Options that change the result: a run resumes only with the same ones."""

    block_size: int = option(2048, "Tokens in a training sequence, packed with documents.")
    group_size: int | None = option(
        None, "Tokens in a group of S²; None: a quarter of block_size. Twice block_size: full "
        "causal attention within documents.")
    eval_fraction: float = option(
        0.01, "Share of the documents held out (at least 4, or a tenth if fewer than 40); 0: none.")
    quantization: Literal["nf4", "none"] = option("nf4", "How the frozen weights are held.")
    lora_rank: int = option(32, "Rank of the LoRA matrices on all linear layers.")
    lora_alpha: int | None = option(None, "LoRA's scale times its rank; None: twice the rank.")
    use_rslora: bool = option(False, "Scale LoRA by lora_alpha / sqrt(rank), not / rank.")
    lora_dropout: float = option(0.0, "Dropout before the LoRA matrices.")
    train_embeddings: Literal["new", "all", "none"] = option(
        "new", "Rows of embedding and head to train: the added pieces, all, or none.")
    base_vocab_size: int | None = option(
        None, "First new row; None: as extend_vocab.py wrote it, else 32000.")
    train_norms: bool = option(
        True, "Train the norms too, which LongLoRA found decisive; else they are frozen.")
    learning_rate: float = option(5e-5, "Peak learning rate.")
    embedding_learning_rate: float | None = option(
        None, "Peak rate of the rows of embedding and head; None: learning_rate.")
    norm_learning_rate: float | None = option(
        None, "Peak rate of the norms; None: learning_rate.")
    loraplus_lr_ratio: float | None = option(
        None, "LoRA+: the rate of B is so many times learning_rate; None: the same.")
    lr_scheduler_type: str = option("cosine", "Learning rate schedule.")
    num_train_epochs: float = option(3.0, "Passes over the data.")
    per_device_train_batch_size: int = option(8, "Sequences per device and forward pass.")
    gradient_accumulation_steps: int = option(4, "Forward passes per optimizer step.")
    optim: str | None = option(None, "Optimizer; None: adamw_8bit on a GPU, else adamw_torch.")
    bf16: bool = option(True, "Compute in bfloat16; --no_bf16: in float32.")
    dataset_weight: list[float] | None = field(default=None, metadata={
        "help": "The sources' shares of the tokens trained on, as in 9 1; None: by their sizes."})
    seed: int = option(42, "Seed of order, initial weights and dropout.")


@dataclass
class Arguments(Settings):
    """Every option of the command line; the help text is the documentation."""

    model_name_or_path: str = option("outputs/extended", "Base model: a folder or a hub id.")
    dataset: list[str] = field(default_factory=lambda: ["data/cc_filtered"], metadata={
        "help": "Text: .parquet, .jsonl, .txt, or folders. An epoch is a pass over the first; the "
        "others repeat or stop short, as --dataset_weight asks."})
    eval_dataset: list[str] | None = field(default=None, metadata={
        "help": "More text to evaluate on, as name=path; beside what is held out of each source."})
    output_dir: str = option("outputs/pt", "Folder of adapter, checkpoints and metrics.")
    picture: str = option("pictures/trainloss.png", "The loss chart, redrawn as it runs.")
    cache_dir: str = option("outputs/cache", "Where the tokenised documents are kept.")
    sample_tokens: int = option(64, "Length of the sample written at each evaluation; 0: none.")
    probes: bool = option(
        True, "Measure also how often the model prefers Taiwan's wording, and solves tasks from "
        "examples in its context: as many tokens to read as in 10 sequences of 2,048.")
    plan: bool = option(
        False, "Print sizes, steps and a GPU's memory; train nothing. It needs no weights, and "
        "without a text it leaves the steps out.")
    plan_gpu: Literal["a10", "3090", "4090", "5090", "a100", "h100", "h200"] | None = option(
        None, "GPU whose speed a plan predicts; its memory too, where plan_gpu_gb is None.")
    plan_gpu_gb: float | None = option(None, "GPU memory to plan for, in GB; None: the GPU here.")
    activation_checkpointing: bool | None = option(
        None, "Recompute activations in the backward pass; None: on a GPU.")
    activation_checkpointing_kwargs: str | None = option(
        None, """JSON; '{"offload": true}' keeps the layers' inputs in the memory of the host.""")
    use_liger_kernel: bool | None = field(default=None, metadata={
        "help": "Liger's kernels for norm, rope, SwiGLU; None: in a plan, and on a GPU with them.",
        "nargs": "?", "const": True})
    adapter: str | None = option(
        None, "Start from this adapter of train_pt.py, with a new optimizer and schedule.")
    resume_from_checkpoint: str = option(
        "auto", "The folder of a checkpoint to go on from; auto: the last of output_dir.")
    per_device_eval_batch_size: int = option(8, "Sequences per device in evaluation.")
    eval_strategy: str = option("steps", "When to evaluate: steps, epoch or no.")
    eval_steps: float = option(0.1, "Steps between evaluations; under 1: a share of all steps.")
    save_steps: float = option(100, "Steps between checkpoints; under 1: a share of all steps.")
    save_total_limit: int = option(2, "Checkpoints kept; 0: all.")
    logging_steps: float = option(5, "Steps between points of the loss curve.")
    report_to: str = option("none", "Also log to: wandb, tensorboard, ... or none.")

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, str):
                setattr(self, name, os.path.expanduser(value))
        self.dataset = [os.path.expanduser(path) for path in self.dataset]


def refuse_twice(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Refuse a list given in two places: argparse would drop the first without a word."""
    given = [str(word).partition("=")[0].replace("-", "_") for word in argv]
    for setting in fields(Arguments):
        if "list[" in str(setting.type) and given.count(f"__{setting.name}") > 1:
            name = f"--{setting.name}"
            parser.error(f"{name} is given twice; give it once, with all values: {name} A B")


def parse_args(argv: list[str] | None) -> tuple[Arguments, Any]:
    """Read the command line (None: sys.argv) into our Arguments and transformers.TrainingArguments.
    Refuse unknown options, and those that Trainer accepts but under which a run would fail."""
    form = {"formatter_class": HelpFormatter, "usage": "%(prog)s [options]", "allow_abbrev": False}
    parse = {"return_remaining_strings": True, "look_for_args_file": False}
    parser = HfArgumentParser(Arguments, description=__doc__, **form)
    parser.add_argument("--help_trainer", action="store_true", help="List the Trainer's options.")
    if argv is None:  # a notebook's sys.argv is Jupyter's own
        argv = sys.argv[1:] if "__file__" in globals() else []
    refuse_twice(parser, argv)
    args, extra, rest = parser.parse_args_into_dataclasses(argv, **parse)
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # read when CUDA starts
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional package
    import torch
    from transformers import TrainingArguments
    from transformers.utils import is_liger_kernel_available
    trainer_parser = HfArgumentParser(TrainingArguments, **form)
    if extra.help_trainer:
        trainer_parser.print_help()
        raise SystemExit(0)
    on_gpu = torch.cuda.is_available()
    for_gpu = on_gpu or args.plan  # a plan is of a GPU, wherever it is made
    eight_bit = for_gpu and os.environ.get("ACCELERATE_USE_FSDP") != "true"
    computed = {
        "optim": "adamw_8bit" if eight_bit else "adamw_torch", "group_size": args.block_size // 4,
        "lora_alpha": 2 * args.lora_rank, "activation_checkpointing": for_gpu}
    vars(args).update({n: value for n, value in computed.items() if getattr(args, n) is None})
    known = TrainingArguments.__dataclass_fields__
    ours = vars(args) | {
        "activation_checkpointing": False, "use_liger_kernel": False,  # build_model turns them on
        "activation_checkpointing_kwargs": None, "use_cpu": not on_gpu, "label_names": ["labels"],
        "save_total_limit": None,  # a broken checkpoint would count as one
        "remove_unused_columns": False,  # it would drop the cut points before the collator
        "logging_nan_inf_filter": False,  # a loss that is not finite stops the run instead
        "ddp_find_unused_parameters": False, "logging_first_step": True, "save_strategy": "steps"}
    trainer_parser.set_defaults(**{name: value for name, value in ours.items() if name in known})
    asked, unknown = trainer_parser.parse_known_args(rest)
    # Before TrainingArguments is built: a half-made DeepSpeed or FSDP would stay in global state
    # and break every later run of this process.
    for name, reason in UNSUPPORTED.items():
        refuse((value := getattr(asked, name), f"--{name} {value}: {reason}"))
    names = [f"--{name}" for name in {**vars(args), **known}]
    near = get_close_matches(unknown[0].partition("=")[0], names, 1) if unknown else []
    hint = f"did you mean {near[0]}? " if near else ""
    refuse(
        (asked.fsdp and os.environ.get("WORLD_SIZE", "1") == "1", f"--fsdp {asked.fsdp}: expected "
         "several processes: torchrun --nproc_per_node 4 train_pt.py"),
        (unknown,
         f"unknown option: {' '.join(unknown)}; {hint}--help and --help_trainer list them"))
    with refusals_of():
        training, _ = trainer_parser.parse_args_into_dataclasses(rest, **parse)
    training._n_gpu = min(1, training.n_gpu)  # several: torchrun, not DataParallel
    if asked.greater_is_better is None and training.metric_for_best_model:  # Trainer knows losses
        name = training.metric_for_best_model.removeprefix("eval_")
        training.greater_is_better = name.startswith(SHARES)
    liger_runs = is_liger_kernel_available() and not training.use_cpu
    if args.use_liger_kernel is None:
        args.use_liger_kernel = args.plan or liger_runs
    fsdp, blockwise = fsdp_version(training), ("8bit", "bnb", "paged")
    refuse(
        (args.use_liger_kernel and not (args.plan or liger_runs), "--use_liger_kernel: expected a "
         "GPU and liger-kernel; pip install liger-kernel"),
        (fsdp == 1, "fsdp_version 1: expected 2; set it in accelerate's configuration"),
        (fsdp and any(word in args.optim for word in blockwise), f"--optim {args.optim}: "
         "bitsandbytes' optimizers cannot be sharded; use --optim adamw_torch with FSDP"),
        (training.max_steps == 0,
         "--max_steps 0: expected a number of steps, or -1 for --num_train_epochs"))
    return args, training


def try_trainer(args: Arguments, training: Any) -> None:
    """Build a Trainer around a model of one weight, so that options which it refuses are refused
    before the real weights load. A plan trains nothing."""
    if args.plan:
        return
    import torch
    from transformers import Trainer
    options, rows = copy(training), [{"labels": 0}]
    with TemporaryDirectory() as options.output_dir, refusals_of():  # Trainer makes the folder
        trainer = Trainer(torch.nn.Linear(1, 1), options, train_dataset=rows, eval_dataset=rows)
        trainer.create_optimizer()
        trainer.get_train_dataloader()
    kwargs = json.dumps(training.lr_scheduler_kwargs or {})
    schedule = f"--lr_scheduler_type {args.lr_scheduler_type} --lr_scheduler_kwargs {kwargs}: "
    with refusals_of(schedule):
        learning_rate_schedule(training.to_dict(), max(training.max_steps, 1))


def learning_rate_schedule(settings: dict[str, Any], steps: int) -> Any:
    """The schedule of a run of so many steps, as Trainer makes it. Its `lr_lambdas` give the share
    of the peak at each step; a schedule that follows the evaluations has none."""
    import torch
    from transformers import get_scheduler
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=abs(settings["learning_rate"]))
    warmup = settings["warmup_steps"]
    warmup = int(warmup) if warmup >= 1 else math.ceil(steps * warmup)
    kwargs = dict(settings["lr_scheduler_kwargs"] or {})
    return get_scheduler(
        settings["lr_scheduler_type"], optimizer, warmup, steps, scheduler_specific_kwargs=kwargs)


def fsdp_version(training: Any) -> int:
    """The FSDP that accelerate's configuration or --fsdp asks for; 0: none."""
    if training.fsdp:
        return training.fsdp_plugin_args["fsdp_version"]
    asked = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    return int(os.environ.get("FSDP_VERSION", 1)) if asked else 0


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


@contextmanager
def refusals_of(what: str = "") -> Iterator[None]:
    """Turn an exception of another library into a UserError: `what`, then its text in one line."""
    try:
        yield
    except Exception as error:  # a damaged file can raise anything
        raise UserError(what + " ".join(str(error).split())[:300]) from error


def refuse(*findings: tuple[Any, str]) -> None:
    """Stop at the first finding that is true, with its message."""
    for wrong, message in findings:
        if wrong:
            raise UserError(message)


# --- The base model ------------------------------------------------------------------------------


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


def pickled(folder: Path) -> str | None:
    """Of a model whose weights are in .bin files: what is wrong, and the command that mends it."""
    names = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    return names and (
        f"its weights are in {names[0]}; expected *.safetensors; convert them: python -c \"from "
        f"transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}', "
        f"dtype='auto').save_pretrained('{folder}')\"")


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


def find_shapes(name_or_path: str, option: str) -> Path:
    """find_model without the weights: a plan fetches configuration and tokenizer alone."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name_or_path)
    if hub_id and not Path(name_or_path).parent.is_dir():
        small = {"allow_patterns": ["config.json", "tokenizer*"], "ignore_patterns": "*/*"}
        with suppress(HfHubHTTPError, LocalEntryNotFoundError, ConnectionError):
            return Path(snapshot_download(name_or_path, **small))
    return find_model(name_or_path, option)  # it raises the right error


def load_base(args: Arguments) -> tuple[Path, Any, Any, int]:
    """Folder, configuration and tokenizer of the base, and the first of its rows that are new."""
    from transformers import AutoConfig, AutoTokenizer
    option = "--model_name_or_path"
    folder = (find_shapes if args.plan else find_model)(args.model_name_or_path, option)
    model = f"{option} {folder}"
    with refusals_of(f"{model}: is not whole; fetch it again: "):
        config = AutoConfig.from_pretrained(folder)
        bare = args.plan and not any(folder.glob("tokenizer.*"))
        tokenizer = None if bare else AutoTokenizer.from_pretrained(folder)
    rows, pieces, longest = config.vocab_size, len(tokenizer or ()), config.max_position_embeddings
    recorded = (read_record(folder).get("results") or {}).get("base_vocab_size")
    first = min(args.base_vocab_size or recorded or LLAMA_2_PIECES, rows)
    widths = {name: getattr(config, name, 0) for name in ("hidden_size", "intermediate_size")}
    # bitsandbytes 0.50 on CPUs dequantises wrongly where a block of 64 runs into the next row.
    uneven = " and ".join(f"{name} {size}" for name, size in widths.items() if size % 64)
    refuse(
        (config.model_type != "llama", f"{model}: a {config.model_type}; expected a Llama"),
        (config.tie_word_embeddings, f"{model}: embedding and head are tied; expected two"),
        (getattr(config, "quantization_config", None), f"{model}: it is quantised, and its adapter "
         "could not be merged; pass the 16-bit model that it was made from"),
        (uneven and args.quantization == "nf4",
         f"{model}: {uneven}; nf4 expects a multiple of 64; use --quantization none"),
        (pieces > rows, f"{model}: the tokenizer has {pieces} pieces and the model only {rows} "
         "rows; run python extend_vocab.py, which makes both"),
        ((args.base_vocab_size or 0) > rows, f"--base_vocab_size {args.base_vocab_size}: the model "
         f"has only {rows} rows; leave the option out"),
        (args.block_size > longest, f"--block_size {args.block_size}: longer than the model's "
         f"{longest} positions; choose a smaller one, or set rope scaling in its config.json"),
        (args.train_embeddings == "none" and first < rows,
         f"--train_embeddings none: rows {first} to {rows - 1} of embedding and head are new "
         f"and would never be trained; use new, or --base_vocab_size {rows} if none is new"))
    if not args.plan:
        check_weights(folder, config, model)
    return folder, config, tokenizer, first


def check_weights(folder: Path, config: Any, model: str) -> None:
    """Refuse weights whose names or shapes differ from those of config.json: Transformers would
    fill what is missing with random numbers."""
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM
    paths, found = weight_files(folder), {}
    refuse((not paths, f"{model}: {pickled(folder) or 'no *.safetensors, so no weights in it'}"))
    with refusals_of(f"{model}: config.json is not whole; fetch it again: "), torch.device("meta"):
        llama = AutoModelForCausalLM.from_config(deepcopy(config))
    for path in paths:
        with (refusals_of(f"{model}: {path.name} is not whole; fetch it again: "),
              safe_open(path, "np") as file):  # it checks the header against the file's size
            names = file.keys()
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
    expected = {name: tuple(tensor.shape) for name, tensor in llama.state_dict().items()}
    differ = sorted(name for name in found.keys() | expected.keys()
                    if not name.endswith("inv_freq") and found.get(name) != expected.get(name))
    for name in differ[:1]:
        has, due = found.get(name, "missing"), expected.get(name, "no such tensor")
        raise UserError(f"{model}: {name} is {has}; expected {due} by config.json ({len(differ)} "
                        "tensors differ); fetch it again")


# --- S² attention --------------------------------------------------------------------------------
#
# B sequences of T tokens, N = B·T, H heads of size D. S² attention is causal attention within
# segments of at most G tokens. The segments of the second half of the heads are shifted by G/2.
# After the rope q, k and v lie in memory as (B, T, H, D), so that half of the heads is a view.


def cut_points(
    position_ids: torch.Tensor, group: int | None, flash: bool, shift: int = 0
) -> dict[str, Any]:
    """Where segments start in N packed tokens: at each document and, unless group is None, at each
    group of a document. position_ids (B, T) count from each document's first token. This runs on
    the CPU, so that a GPU need not wait for the lengths."""
    import torch
    position = position_ids.cpu().clone()
    position[:, 0] = 0  # attention ends with a row, even where its document goes on
    position = position.flatten()
    start = position == 0
    if group is not None:
        start |= (position + shift) % group == 0
    starts = start.nonzero().flatten()  # (segments,)
    ends = torch.cat([starts[1:], torch.tensor([len(start)])])
    lengths = ends - starts
    if flash:
        return {"bounds": torch.cat([starts, ends[-1:]]).int(), "longest": int(lengths.max())}
    # Segments of one length stand together: each length is one call without a mask.
    by_length = lengths.argsort(stable=True)
    size, count = torch.unique_consecutive(lengths[by_length], return_counts=True)
    inside = torch.arange(len(start)) - starts.repeat_interleave(lengths)  # token in its segment
    new_starts = (lengths[by_length].cumsum(0) - lengths[by_length])[by_length.argsort()]
    inverse = new_starts.repeat_interleave(lengths) + inside
    runs = list(zip(size.tolist(), count.tolist(), strict=True))
    return {"order": inverse.argsort(), "inverse": inverse, "runs": runs}


def all_cut_points(position_ids: torch.Tensor, group: int | None, flash: bool) -> dict[str, Any]:
    """Cut points of `documents`, and of `groups` and `shifted` groups for S². Where no document is
    longer than the first shifted group S² is full attention, and the latter two are left out."""
    cuts = {"documents": cut_points(position_ids, None, flash)}
    if group is not None and int(position_ids.max()) >= group - group // 2:
        cuts["groups"] = cut_points(position_ids, group, flash)
        cuts["shifted"] = cut_points(position_ids, group, flash, shift=group // 2)
    return cuts


def flash_is_here(head_size: int) -> bool:
    """Whether PyTorch's variable-length flash attention runs on the GPU in use. Its kernels need a
    head size that is a multiple of 8."""
    import torch
    ampere = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return ampere and head_size % 8 == 0


def segment_attention(q, k, v, cuts: dict, scale: float | None) -> torch.Tensor:
    """Causal attention within each segment; q, k, v: (N, heads, D), with any strides."""
    import torch
    if "bounds" in cuts:
        from torch.nn.attention.varlen import varlen_attn
        lengths = (cuts["bounds"], cuts["bounds"], cuts["longest"], cuts["longest"])
        return varlen_attn(q, k, v, *lengths, window_size=(-1, 0), scale=scale)
    q, k, v = (x.index_select(0, cuts["order"]) for x in (q, k, v))
    done, outputs = 0, []
    for length, count in cuts["runs"]:
        part = slice(done, done + length * count)
        done = part.stop
        shape = (count, length, *q.shape[1:])
        rows = [x[part].view(shape).transpose(1, 2) for x in (q, k, v)]  # (count, heads, length, D)
        output = torch.nn.functional.scaled_dot_product_attention(
            *rows, is_causal=True, scale=scale)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, cuts["inverse"])


def s2_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, cuts=None, **kwargs
) -> tuple[torch.Tensor, None]:
    """The attention function that Transformers calls: S² in training, full causal attention within
    documents in evaluation, Transformers' own with a KV cache or a padding mask."""
    import torch
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        from transformers import AttentionInterface
        if module.training:
            raise ValueError("S² attention trains on packed rows: no padding mask, no KV cache")
        stock = AttentionInterface()["sdpa"]
        return stock(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    assert dropout == 0.0, "attention dropout is not part of Llama"
    B, H, T, D = query.shape
    group = module.config.group_size if module.training else None
    if cuts is None:
        half = query.dtype in (torch.float16, torch.bfloat16)
        flash = query.is_cuda and half and flash_is_here(D)
        cuts = all_cut_points(kwargs["position_ids"].expand(B, T), group, flash)
        for points in cuts.values():
            points |= {n: x.to(query.device) for n, x in points.items() if torch.is_tensor(x)}
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (N, H, D)
    if k.shape[1] < H:  # grouped queries: each key serves several heads
        k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    if group is None or "groups" not in cuts:
        output = segment_attention(q, k, v, cuts["documents"], scaling)
    else:
        halves = zip(*(x.chunk(2, dim=1) for x in (q, k, v)), strict=True)
        points = cuts["groups"], cuts["shifted"]
        calls = zip(halves, points, strict=False)  # a single head has no second half
        outputs = [segment_attention(*qkv, p, scaling) for qkv, p in calls]
        output = torch.cat(outputs, dim=1)
    return output.view(B, T, H, D), None


def s2_mask(*args, attention_mask=None, q_length=None, kv_length=None, **kwargs):
    """No mask for packed rows, which have cut points; Transformers' own for padding or a cache."""
    if attention_mask is None and q_length == kv_length:
        return None
    from transformers.masking_utils import sdpa_mask
    return sdpa_mask(
        *args, attention_mask=attention_mask, q_length=q_length, kv_length=kv_length, **kwargs)


def register_attention() -> None:
    """Let Transformers know attn_implementation="s2"."""
    from transformers import AttentionInterface, AttentionMaskInterface
    AttentionInterface.register("s2", s2_attention)
    AttentionMaskInterface.register("s2", s2_mask)


# --- Data ----------------------------------------------------------------------------------------


def text_files(dataset: str, option: str = "--dataset") -> list[Path]:
    """The files to read, in name order. Of a folder only the top level is read: below it
    filter_cc.py keeps its work and rejected pages. Hidden files belong to other programs."""
    root = Path(dataset)
    if not root.exists():
        hint = "run python filter_cc.py first" if "cc_filtered" in dataset else "check the path"
        raise UserError(f"{option} {dataset}: there is no such file or folder; {hint}")
    inside = root.glob("[!.]*") if root.is_dir() else [root]
    found = sorted(p for p in inside if p.suffix.lower() in TEXT_SUFFIXES and p.is_file())
    refuse((not found, f"{option} {dataset}: no text there; expected {', '.join(TEXT_SUFFIXES)} or "
            "a folder of them"))
    return found


def read_texts(path: Path) -> Iterator[str]:
    """Every document of a file."""
    row, kind = 0, path.suffix.lower()
    try:
        if kind == ".txt":
            yield path.read_text(encoding="utf-8-sig")
        elif kind == ".jsonl":
            with path.open(encoding="utf-8-sig") as lines:
                for row, line in enumerate(lines, 1):  # noqa: B007 (the error below names it)
                    if line.strip():
                        yield checked_text(json.loads(line)["text"])
        else:
            from pyarrow.parquet import ParquetFile
            for batch in ParquetFile(path).iter_batches(256, columns=["text"]):
                for text in batch.column("text").to_pylist():
                    row += 1
                    yield checked_text(text)
    except (ValueError, KeyError, TypeError) as error:  # pyarrow's errors are ValueErrors
        reason = str(error) if not isinstance(error, KeyError) else f"there is no {error}"
        reason = " ".join(getattr(error, "msg", reason).split())[:160]
        at = f"{path}, row {row}" if row else path
        raise UserError(f"--dataset {at}: cannot be read ({reason}); expected text") from error


def checked_text(text: Any) -> str | None:
    """A row's text; of a Parquet file it may be missing."""
    if not isinstance(text, str | None):
        raise TypeError(f"the text {text} is no string")
    return text


@dataclass
class Corpus:
    """Tokenised documents, one after the other, BOS and EOS around each."""

    tokens: np.ndarray  # (all tokens,)
    lengths: np.ndarray  # (documents,), in tokens
    characters: np.ndarray  # (documents,)


def dataset_key(files: list[Path], base: Path) -> str:
    """A checksum of text and tokenizer by content: touched, copied or renamed files have the same.
    The cache is found by it."""
    digest = hashlib.sha256(b"2")  # to be raised when the same text gives other tokens
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        if (base / name).is_file():
            digest.update(name.encode() + (base / name).read_bytes())
    for path in files:
        digest.update(f"{path.suffix.lower()} {file_sum(path)}\n".encode())
    return digest.hexdigest()


def tokenize(files: list[Path], tokenizer: Any, cached: Path) -> Corpus:
    """Tokenise every document, once: the next run finds the result in the cache."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    corpus = read_tokens(cached, dtype)
    if not corpus:
        write_tokens(files, tokenizer, cached, dtype)
        corpus = read_tokens(cached, dtype)
    return corpus


def read_tokens(cached: Path, dtype: type) -> Corpus | None:
    """What the cache holds; None where it is missing or damaged."""
    try:
        sizes = np.load(cached / "documents.npy")
        corpus = Corpus(np.memmap(cached / "tokens.bin", dtype, "r"), sizes[:, 0], sizes[:, 1])
    except (OSError, ValueError, EOFError, IndexError):
        return None
    return corpus if len(corpus.tokens) == corpus.lengths.sum() else None


def cut_text(text: str) -> list[str]:
    """Cut a text into parts of at most PART characters, at the end of a line if possible, else of a
    sentence, else before a space: the tokenizer takes 100 bytes of memory a byte of text."""
    parts, start = [], 0
    while len(text) - start > PART:
        within = (start + 1, start + PART)
        end = text.rfind("\n", *within) + 1 or text.rfind("。", *within) + 1
        end = end or max(0, text.rfind(" ", *within)) or start + PART
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def batches_of_text(texts: Iterator[str]) -> Iterator[list[tuple[str, bool, bool]]]:
    """(part, is it its document's first, its last), about BATCH characters at a time."""
    batch, size, repaired = [], 0, 0
    for text in texts:
        text, lone = SURROGATES.subn("\ufffd", text)
        repaired += lone
        parts = cut_text(text)
        for number, part in enumerate(parts):
            batch.append((part, number == 0, number == len(parts) - 1))
            size += len(part)
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
    if repaired:
        print(f"note: {repaired} lone surrogates in the text are U+FFFD now")


def write_tokens(files: list[Path], tokenizer: Any, cached: Path, dtype: type) -> None:
    """Make tokenize's cache, in a folder aside first; the next run takes over what a killed one has
    left of it. The tokenizer works on all cores."""
    from tqdm import tqdm

    def encode(texts: list[str]) -> list[list[int]]:  # <s> and </s> in a page are plain text
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return tokenizer(texts, **options)["input_ids"]

    # A Llama tokenizer puts a space before its text, but a later part of a text must have none. So
    # it is encoded behind a line break, and the tokens of space and line break are cut off.
    lead = encode(["\n"])[0]
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    bos, eos = ([] if piece is None else [piece] for piece in ends)
    texts = (text for file in files for text in read_texts(file) if text)
    batches = batches_of_text(tqdm(texts, desc="tokenising", unit=" documents"))
    start = next(batches, None)  # read before a folder is made: a refused text leaves none behind
    refuse((not start, f"--dataset {files[0]}: holds no text; expected some documents"))
    sizes, building = [], cached.with_name(f"{cached.name}.building")
    building.mkdir(parents=True, exist_ok=True)  # or what a killed run has left
    lock = os.open(building, os.O_RDONLY)
    with ExitStack() as leaving:
        leaving.callback(os.close, lock)
        take_lock(lock, f"--dataset: {building}", wait=True)
        if read_tokens(cached, dtype):  # another run was faster
            return
        leaving.callback(shutil.rmtree, building, ignore_errors=True)
        with (building / "tokens.bin").open("wb") as out:
            for batch in chain([start], batches):
                pieces = encode([part if first else "\n" + part for part, first, _ in batch])
                for (part, first, last), ids in zip(batch, pieces, strict=True):
                    if not first and ids[: len(lead)] == lead:
                        ids = ids[len(lead) :]
                    ids = [*(bos if first else []), *ids, *(eos if last else [])]
                    out.write(np.array(ids, dtype).tobytes())
                    if first:
                        sizes.append([0, 0])
                    sizes[-1][0] += len(ids)
                    sizes[-1][1] += len(part)
        np.save(building / "documents.npy", np.array(sizes))
        shutil.rmtree(cached, ignore_errors=True)  # damaged
        building.rename(cached)


class PackedBlocks:
    """The chosen documents in the given order, cut into blocks of exactly block_size tokens. A
    block is looked up, not stored; positions count from 0 in each piece of a document; only the
    last block's end is padded."""

    def __init__(self, corpus: Corpus, order: np.ndarray, block_size: int, padding: int):
        self.tokens, self.block_size, self.padding = corpus.tokens, block_size, padding
        self.starts = (np.cumsum(corpus.lengths) - corpus.lengths)[order]
        self.ends = np.cumsum(corpus.lengths[order])  # in the packed stream
        self.begins = self.ends - corpus.lengths[order]
        self.total = int(self.ends[-1])
        self.documents = len(order)
        predicted = self.total - len(order)  # all but each document's first token
        self.tokens_per_character = float(predicted / max(1, corpus.characters[order].sum()))

    def __len__(self) -> int:
        return math.ceil(self.total / self.block_size)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        at, size = index * self.block_size, self.block_size
        stream = np.arange(at, min(at + size, self.total))  # where its tokens stand, packed
        document, filled = np.searchsorted(self.ends, stream, side="right"), len(stream)
        ids, position = np.full(size, self.padding), np.arange(size) - filled  # of the padding
        ids[:filled] = self.tokens[stream - self.begins[document] + self.starts[document]]
        position[:filled] = stream - np.maximum(self.begins[document], at)
        labels = np.where(position > 0, ids, IGNORED)  # nothing predicts a document's first token
        labels[filled:] = IGNORED
        return {"input_ids": ids, "position_ids": position, "labels": labels}


class Mixture:
    """The sequences of an epoch in order. It has all blocks of the first source, shuffled, and
    spread evenly between them the blocks of the others, as many as their weights ask for. The next
    epoch takes the others up where they stopped; a source that ends begins anew."""

    def __init__(self, sources: list[PackedBlocks], weights: list[float] | None, seed: int):
        self.sources, self.seed = sources, seed
        sizes = [len(blocks) for blocks in sources]
        shares = weights or sizes
        self.counts = [max(1, round(sizes[0] * share / shares[0])) for share in shares]
        self.set_epoch(0)

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        source, block = self.order[index]
        return self.sources[source][block]

    def shuffled(self, source: int, times: int) -> np.ndarray:
        """The order of a source's blocks in a pass, after so many passes before it."""
        import torch
        generator = torch.Generator().manual_seed(self.seed + times)
        return torch.randperm(len(self.sources[source]), generator=generator).numpy()

    def set_epoch(self, epoch: int) -> None:
        """Make an epoch's order; accelerate's data loader calls it. The order follows from seed
        and epoch alone, so a resumed run has the same."""
        chosen, places = [], []
        for source, count in enumerate(self.counts):
            size = len(self.sources[source])
            first, last = epoch * count, (epoch + 1) * count  # of a source that never ends
            passes = range(first // size, (last - 1) // size + 1)
            blocks = np.concatenate([self.shuffled(source, n) for n in passes])
            blocks = blocks[first % size :][:count]
            chosen.append(np.stack([np.full(count, source), blocks], axis=1))
            places.append((np.arange(count) + 0.5) / count)
        evenly = np.argsort(np.concatenate(places), kind="stable")
        self.order, self.epoch = np.concatenate(chosen)[evenly], epoch  # (sequences, 2)

    def tokens_seen(self, sequences: int) -> list[int]:
        """The tokens of each source in the first so many sequences of a run."""
        epoch, rest = divmod(sequences, len(self))
        if rest and epoch != self.epoch:
            self.set_epoch(epoch)
        within = np.bincount(self.order[:rest, 0], minlength=len(self.sources))
        seen = []
        for source, blocks in enumerate(self.sources):
            times, begun = divmod(epoch * self.counts[source] + int(within[source]), len(blocks))
            padding = len(blocks) * blocks.block_size - blocks.total  # in the last block
            padded = len(blocks) - 1 in self.shuffled(source, times)[:begun]
            tokens = times * blocks.total + begun * blocks.block_size - padded * padding
            seen.append(tokens)
        return seen


def split_corpus(
    corpus: Corpus, args: Arguments, padding: int
) -> tuple[PackedBlocks, PackedBlocks | None]:
    """Shuffle the documents by seed and hold some out, whole: (training, held out or None)."""
    documents = len(corpus.lengths)
    order = np.random.default_rng(args.seed).permutation(documents)
    held = max(round(args.eval_fraction * documents), min(4, documents // 10))
    held = 0 if args.eval_fraction == 0 or args.eval_strategy == "no" else min(held, documents - 1)
    train, held_out = order[held:], order[:held]
    blocks = PackedBlocks(corpus, train, args.block_size, padding)
    return blocks, PackedBlocks(corpus, held_out, args.block_size, padding) if held else None


def all_texts(args: Arguments) -> list[tuple[str, str, str]]:
    """(option, name in metrics and chart, path) of each text: those to train on, called after file
    or folder if that tells them apart, then those of --eval_dataset."""
    short = [Path(path).stem for path in args.dataset]
    names = short if len({*short}) == len(short) else args.dataset
    texts = [("--dataset", name, path) for name, path in zip(names, args.dataset, strict=True)]
    for text in args.eval_dataset or []:
        name, _, path = text.partition("=")
        texts.append(("--eval_dataset", name, os.path.expanduser(path)))
    return texts


def pack_sources(
    corpora: list[Corpus], args: Arguments, training: Any, padding: int
) -> tuple[Mixture, dict[str, PackedBlocks]]:
    """The training text; and by name the texts to evaluate on: those held out of each source, then
    those of --eval_dataset."""
    train, held_out = [], {}
    for (option, name, _), corpus in zip(all_texts(args), corpora, strict=True):
        if option == "--dataset":
            blocks, held = split_corpus(corpus, args, padding)
            train.append(blocks)
        else:
            held = PackedBlocks(corpus, np.arange(len(corpus.lengths)), args.block_size, padding)
        if held:
            held_out[name] = held
    seed = args.seed if training.data_seed is None else training.data_seed
    return Mixture(train, args.dataset_weight, seed), held_out


def count(corpora: list[Corpus], blocks: Mixture, held_out: dict, training: Any) -> dict[str, int]:
    """Documents, tokens, sequences and steps of the run."""
    return {
        "documents": sum(len(corpus.lengths) for corpus in corpora[: len(blocks.sources)]),
        "tokens": sum(source.total for source in blocks.sources), "sequences": len(blocks),
        "eval_sequences": sum(len(held) for held in held_out.values()),
        "steps": total_steps(len(blocks), training)}


@dataclass
class Collate:
    """Make a batch with cut points. Trainer takes its size from the first entry, input_ids."""

    group_size: int
    flash: bool

    def __call__(self, blocks: list[dict[str, np.ndarray]]) -> dict[str, Any]:
        import torch
        batch = {name: torch.from_numpy(np.stack([b[name] for b in blocks])) for name in blocks[0]}
        return batch | {"cuts": all_cut_points(batch["position_ids"], self.group_size, self.flash)}


# --- Probes --------------------------------------------------------------------------------------
#
# What no held-out text shows: whose wording the model prefers, and whether it still learns from
# examples in its context. A probe is pairs of a prompt and the answer that should follow.


def wording_pairs() -> list[tuple[str, str]]:
    """The sentences of data/probes/wording.txt, each in Taiwan's wording and then in the other's,
    behind an empty prompt; none where the file is missing."""
    here = Path(__file__).parent if "__file__" in globals() else Path()
    path = here / "data" / "probes" / "wording.txt"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    pairs = re.findall(r"^(.*){(.+)\|(.+)}(.*)$", text, re.MULTILINE)
    return [("", before + word + after) for before, *words, after in pairs for word in words]


def in_context_tasks(task: str, count: int = 32) -> list[tuple[str, str]]:
    """Prompts of examples and a question, each with its answer: `copy` three letters, `reverse`
    them (4 examples, other letters), or `map` a letter to the one beside it (8 examples)."""
    draw, found = np.random.default_rng(0), []
    for _ in range(count):
        letters = draw.permutation(list(ascii_uppercase))  # any tokenizer has a piece for each
        if task == "map":
            lines = list(zip(letters[:8], letters[8:16], strict=True))
            lines.append(lines[draw.integers(8)])
        else:
            words = letters[:15].reshape(5, 3)
            lines = [(" ".join(w), " ".join(w if task == "copy" else w[::-1])) for w in words]
        answer = f" {lines[-1][1]}"
        prompt = "\n".join(f"{given} = {wanted}" for given, wanted in lines)
        found.append((prompt.removesuffix(answer), answer))
    return found


def probe_rows(tokenizer: Any, pairs: list[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """Prompt and answer as tokens behind BOS, and the place where the answer begins."""
    rows, bos = [], [tokenizer.bos_token_id or 0]
    for prompt, answer in pairs:
        texts = [prompt, prompt + answer]
        alone, both = tokenizer(texts, add_special_tokens=False)["input_ids"]
        same = [one == other for one, other in zip(alone, both, strict=False)]
        rows.append((bos + both, 1 + [*same, False].index(False)))
    return rows


def all_probes(tokenizer: Any) -> dict[str, list[tuple[list[int], int]]]:
    """The rows of each probe, by its name in metrics, chart and card."""
    probes = {f"in_context_{task}": in_context_tasks(task) for task in ("copy", "reverse", "map")}
    probes = {"taiwan_wording": wording_pairs()} | probes
    return {name: probe_rows(tokenizer, pairs) for name, pairs in probes.items() if pairs}


# --- Model ---------------------------------------------------------------------------------------


@cache
def based_on(cls: type, base: type) -> type:
    """Build a class with its base class on demand, so that --help need not import torch."""
    return new_class(cls.__name__, (cls, base))


class LoraProduct:
    """y = x W^T + s (x A^T) B^T for x (N, K), frozen W (M, K), A (r, K) and B (M, r), as matrix
    products that add to each other's results. PEFT copies x W^T, scales and adds in three passes
    over (N, M). The backward pass is LoraGradients': its output `outlet` receives the slope."""

    @staticmethod
    def forward(ctx, outlet, x, low, weight, nf4, bias, B, scaling):
        import torch
        y = torch.nn.functional.linear(x, dense(weight, nf4, x.dtype), bias)
        return y.addmm_(low, (scaling * B).to(x.dtype).T)

    @staticmethod
    def backward(ctx, slope):
        return slope, *[None] * 7


class LoraGradients:
    """The backward pass of LoraProduct; it saves x and x A^T. It runs before the product: when
    PyTorch recomputes a layer it stops once all saved tensors are there again, and so skips the
    layer's last product."""

    @staticmethod
    def forward(ctx, x, weight, nf4, A, B, scaling):
        low = x @ A.to(x.dtype).T  # (N, r)
        ctx.nf4, ctx.scaling = nf4, scaling
        ctx.save_for_backward(x, low, weight, A, B)
        ctx.mark_non_differentiable(low)
        return low, x.new_zeros(()).expand(len(x), len(B))  # (N, M), without memory

    @staticmethod
    def backward(ctx, _, slope):
        x, low, weight, A, B = ctx.saved_tensors
        d_low = slope @ (ctx.scaling * B).to(slope.dtype)  # (N, r)
        d_A, d_B = (d_low.T @ x).to(A.dtype), (slope.T @ low).to(B.dtype) * ctx.scaling
        x = d_x = None  # where x was recomputed nothing else holds it: make room for d_x
        if ctx.needs_input_grad[0]:
            d_x = (slope @ dense(weight, ctx.nf4, slope.dtype)).addmm_(d_low, A.to(slope.dtype))
        return d_x, None, None, d_A, d_B, None


def dense(weight: torch.Tensor, nf4: Any, dtype: torch.dtype) -> torch.Tensor:
    """A layer's weight (M, K); nf4: its quantisation state in bitsandbytes, or None."""
    from bitsandbytes.functional import dequantize_4bit
    return weight.to(dtype) if nf4 is None else dequantize_4bit(weight, nf4).to(dtype)


def lora_forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The forward pass of a PEFT layer without dropout: LoraProduct in training, else PEFT's."""
    import torch
    if not layer.training or layer.disable_adapters or layer.merged:
        return type(layer).forward(layer, x, *args, **kwargs)
    base, device, (name,) = layer.get_base_layer(), x.device.type, layer.active_adapters
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    # FSDP puts a plain parameter in the weight's place; the state stays with the module.
    nf4 = getattr(base.weight, "quant_state", None) or getattr(base, "quant_state", None)
    A, B, scaling = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    gradients, product = (
        based_on(cls, torch.autograd.Function) for cls in (LoraGradients, LoraProduct))
    rows = x.flatten(0, -2).to(dtype)
    low, outlet = gradients.apply(rows, base.weight, nf4, A, B, scaling)
    y = product.apply(outlet, rows, low, base.weight, nf4, base.bias, B, scaling)
    return y.view(*x.shape[:-1], -1)


class TailEmbedding:
    """An embedding whose last rows are trained: `frozen` (V0, D) in 16 bits, `trained` (V1, D) in
    fp32. Two small lookups; no copy of the matrix."""

    def __init__(self, frozen: torch.Tensor, trained: torch.Tensor):
        import torch
        super().__init__()
        self.frozen = torch.nn.Parameter(frozen, requires_grad=False)
        self.trained = torch.nn.Parameter(trained, requires_grad=len(trained) > 0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        from torch.nn.functional import embedding
        first = len(self.frozen)
        if not len(self.trained):
            return embedding(ids, self.frozen)
        new = embedding((ids - first).clamp(min=0), self.trained).to(self.frozen.dtype)
        if not first:
            return new
        old = embedding(ids.clamp(max=first - 1), self.frozen)
        return old.where((ids < first).unsqueeze(-1), new)  # (B, T, D)


class ChunkedLoss:
    """Sum of the cross entropy of hidden (N, D) against labels (N,), with V head rows: `frozen`
    (V0, D), then `trained` (V1, D). Only C of the N rows have logits at one time, (C, V). Their
    gradient is softmax - onehot times a factor from above: so each chunk adds to the gradients
    while its logits exist, and the backward pass multiplies by the factor.

    Matrix products are fast where sizes are multiples of 8. So the last V0 % 8 frozen rows join the
    trained ones in `tail`, which zeros fill up to such a size; their logits are set to -inf."""

    @staticmethod
    def forward(ctx, hidden, frozen, trained, labels, train):
        import torch
        dtype, V = hidden.dtype, len(frozen) + len(trained)
        wide = torch.promote_types(dtype, torch.float32)
        split = len(frozen) // 8 * 8
        mine = slice(len(frozen) - split, V - split)  # the trained rows' place in the tail
        body, tail = frozen[:split], hidden.new_zeros(-(-(V - split) // 8) * 8, hidden.shape[1])
        tail[: mine.start], tail[mine] = frozen[split:], trained
        total = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if train else None
        d_tail = torch.zeros_like(tail, dtype=wide) if train and len(trained) else None
        for start in range(0, len(hidden), LOSS_CHUNK):
            part = slice(start, start + LOSS_CHUNK)
            x, y = hidden[part], labels[part, None]
            kept, y = (y != IGNORED).to(wide), y.clamp(min=0)
            logits = x.new_empty(len(x), split + len(tail), dtype=wide)  # (C, V), filled up
            logits[:, :split], logits[:, split:] = x @ body.T, x @ tail.T
            logits[:, V:] = -math.inf
            top = logits.amax(-1, keepdim=True)
            right = logits.gather(1, y) - top
            mass = logits.sub_(top).exp_().sum(-1, keepdim=True)
            total += ((mass.log() - right) * kept).sum()
            if train:
                slope = logits.mul_(kept / mass).scatter_add_(1, y, -kept).to(dtype)
                logits = None  # free the memory
                d_hidden[part] = (slope[:, :split] @ body).addmm_(slope[:, split:], tail)
                if d_tail is not None:
                    d_tail += slope[:, split:].T @ x
                slope = None
        ctx.gradients = d_hidden, None if d_tail is None else d_tail[mine]
        return total

    @staticmethod
    def backward(ctx, factor):
        gradients, ctx.gradients = ctx.gradients, None  # ctx lives on until the backward pass ends
        d_hidden, d_trained = (g if g is None else g.mul_(factor) for g in gradients)
        return d_hidden, None, d_trained, None, None


class TailHead(TailEmbedding):
    """The head in the same two parts. Inside the loss it returns the hidden states, and `loss`
    applies the head in chunks."""

    in_loss = False

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        import torch
        if self.in_loss:
            return hidden
        return torch.cat([hidden @ self.frozen.T, hidden @ self.trained.to(hidden.dtype).T], dim=-1)

    @contextmanager
    def inside_the_loss(self) -> Iterator[None]:
        self.in_loss = True
        try:
            yield
        finally:
            self.in_loss = False

    def loss(self, logits, labels, num_items_in_batch=None, **kwargs) -> torch.Tensor:
        """Transformers' loss_function: `logits` are the hidden states (B, T, D)."""
        import torch
        hidden, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        items = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        items = torch.as_tensor(items).clamp(min=1)  # a last block of one token has no target
        function, rows = based_on(ChunkedLoss, torch.autograd.Function), (self.frozen, self.trained)
        with torch.autocast(hidden.device.type, enabled=False):
            return function.apply(hidden, *rows, targets, torch.is_grad_enabled()) / items


def train_tail(llama: Any, first: int) -> None:
    """Put TailEmbedding and TailHead in place of a Llama's matrices: rows from `first` on train."""
    import torch

    def tail(cls: type, weight: torch.Tensor) -> Any:
        wide = torch.promote_types(weight.dtype, torch.float32)
        parts = weight[:first].detach().clone(), weight[first:].detach().to(wide, copy=True)
        return based_on(cls, torch.nn.Module)(*parts)

    llama.model.embed_tokens = tail(TailEmbedding, llama.model.embed_tokens.weight)
    llama.lm_head = tail(TailHead, llama.lm_head.weight)
    llama.loss_function = llama.lm_head.loss


def use_liger_kernels(llama: Any) -> None:
    """Norm, rope and SwiGLU of this model as one kernel each. Liger's own patch would put its
    classes into Transformers, and later models of this process would fail on a CPU."""
    from liger_kernel.transformers.functional import liger_rms_norm, liger_rope, liger_swiglu
    from transformers.models.llama import modeling_llama
    device, stock = llama.device.type, unwrap(modeling_llama.apply_rotary_pos_emb)

    @wraps(stock)
    def rope(q, k, cos, sin):
        return (liger_rope if q.device.type == device else stock)(q, k, cos, sin)

    def norm(module, x):
        return liger_rms_norm(x, module.weight, module.variance_epsilon)

    def mlp(module, x):
        return module.down_proj(liger_swiglu(module.gate_proj(x), module.up_proj(x)))

    modeling_llama.apply_rotary_pos_emb = rope  # a function of that file, which all Llamas share
    for module in llama.modules():
        if isinstance(module, modeling_llama.LlamaRMSNorm):
            module.forward = partial(norm, module)
        elif isinstance(module, modeling_llama.LlamaMLP):
            module.forward = partial(mlp, module)


def build_model(args: Arguments, training: Any, folder: Path, first_new: int) -> tuple[Any, Any]:
    """The base in NF4 with LoRA on its linear layers, trainable rows and norms; and its head. We do
    without PEFT's prepare_model_for_kbit_training: it would turn embeddings, norms and the residual
    stream to fp32, which doubles the memory of activation checkpoints."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    from torch.utils.checkpoint import checkpoint
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig, set_seed
    register_attention()
    # PEFT asks for activation checkpointing under its former name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
    dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["lm_head"],
        bnb_4bit_quant_storage=dtype if fsdp_version(training) else None)  # FSDP shards only floats
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="s2",
        quantization_config=nf4 if args.quantization == "nf4" else None,
        device_map={"": training.device})
    model.config.group_size = args.group_size
    model.generation_config = GenerationConfig()  # the base's own could stop the samples early
    for module in model.modules():
        # bitsandbytes repacks the weights at the first eval on a CPU with AVX512-BF16, and training
        # goes on with wrong gradients (seen with 0.50).
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    set_seed(args.seed)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=args.lora_rank, lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout, target_modules=LINEAR_LAYERS, use_rslora=args.use_rslora)
    model = get_peft_model(model, lora)
    llama = model.base_model.model
    for module in model.modules():
        if isinstance(module, LoraLayer) and not args.lora_dropout:
            module.forward = partial(lora_forward, module)
    first = {"new": first_new, "all": 0, "none": llama.config.vocab_size}
    train_tail(llama, first[args.train_embeddings])
    norms = [module for name, module in llama.named_modules() if name.endswith(tuple(NORMS))]
    if args.train_norms:
        for norm in norms:
            norm.weight = torch.nn.Parameter(norm.weight.detach().float())
            # The stream stays in 16 bits: flash kernels refuse fp32.
            norm.register_forward_hook(lambda _, inputs, output: output.to(inputs[0].dtype))
    if args.use_liger_kernel:
        use_liger_kernels(llama)
    elif args.activation_checkpointing:  # else a norm saves 6 bytes a number, most of it fp32
        for norm in norms:
            again = {"use_reentrant": False, "preserve_rng_state": False}
            norm.forward = partial(checkpoint, norm.forward, **again)
    if args.activation_checkpointing:
        options = json.loads(args.activation_checkpointing_kwargs or "{}")
        offload = options.pop("offload", False) and torch.cuda.is_available()
        llama.activation_checkpointing_enable({"use_reentrant": False} | options, offload=offload)
    return model, llama.lm_head


def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The trained parameters by their names in PEFT's adapter file."""
    whole = not len(model.base_model.model.lm_head.frozen)
    rows = ".weight" if whole else ".token_adapter.trainable_tokens_delta"
    for module in model.modules():
        if hasattr(module, "reshard"):  # FSDP leaves the head whole after an evaluation
            module.reshard()
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {n.replace(".default.", ".").replace(".trained", rows): p for n, p in trained}


def save_adapter(model: Any, folder: Path, base: str, quantization: dict | None = None) -> None:
    """Write what stock PeftModel.from_pretrained loads: rows replaced, norms as modules_to_save.
    Every process calls it, for FSDP gathers the parameters from all; the first one writes."""
    import torch.distributed as dist
    from safetensors.torch import save_file
    from torch.distributed.tensor import DTensor
    tensors, head = adapter_tensors(model), model.base_model.model.lm_head
    for key, tensor in tensors.items():
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        tensors[key] = tensor.detach().contiguous().cpu()
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = deepcopy(model.peft_config["default"])
    config.base_model_name_or_path, config.inference_mode = base, True
    saved = NORMS if any(key.endswith("norm.weight") for key in tensors) else []
    if head.trained.requires_grad and not len(head.frozen):
        saved = [*saved, "embed_tokens", "lm_head"]
    elif head.trained.requires_grad:
        rows = list(range(len(head.frozen), len(head.frozen) + len(head.trained)))
        config.trainable_token_indices = {"embed_tokens": rows, "lm_head": rows}
    config.modules_to_save = saved or None
    config.save_pretrained(str(folder))
    building = folder / "adapter_model.building"
    metadata = {"luojiu_quantization": json.dumps(quantization)} if quantization else {}
    save_file(tensors, building, {"format": "pt"} | metadata)
    building.chmod((folder / "adapter_config.json").stat().st_mode)  # else the owner's alone
    building.rename(folder / "adapter_model.safetensors")


def load_adapter(model: Any, folder: Path) -> None:
    """Load the weights of an adapter or a checkpoint into the model, bit for bit."""
    from safetensors.torch import load_file
    from torch.distributed.tensor import DTensor, distribute_tensor
    saved, tensors = load_file(folder / "adapter_model.safetensors"), adapter_tensors(model)
    refuse((saved.keys() != tensors.keys(), f"{folder}/adapter_model.safetensors: holds other "
            "parameters than the model; copy it again"))
    for key, tensor in tensors.items():
        if isinstance(tensor, DTensor):  # FSDP: this process's part
            part = saved[key].to(tensor.device), tensor.device_mesh, tensor.placements
            saved[key] = distribute_tensor(*part, src_data_rank=None)
        tensor.data.copy_(saved[key])


# --- Training ------------------------------------------------------------------------------------
#
# How a run resumes bit for bit. Trainer writes a checkpoint: adapter, optimizer, schedule, random
# states, its own state. Then we write its seal: run.json with the checksum of every file. A
# checkpoint without a seal does not count. After a signal the step under way is dropped, the random
# states of the end of the last whole step are restored, and that step is saved.


class LeaveTraining(Exception):
    """Leave Trainer's loop: a signal came, or a resumed run has no step left."""


class RunCallback:
    """Our callbacks. build_trainer adds TrainerCallback as the base class."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)  # a checkpoint brings its own save_steps
        if self.trainer.eval_dataset is not None:
            self.trainer.rehearse()
        if state.global_step >= state.max_steps:  # Trainer would train one step too many
            raise LeaveTraining

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.rng_states = [g.get_rng_state() for g in self.trainer.generators()]
        if state.global_step == state.max_steps:  # the last step is always logged and measured
            control.should_log = True
            by_epoch = args.eval_strategy == "epoch"  # it comes when the epoch ends
            control.should_evaluate = self.trainer.eval_dataset is not None and not by_epoch


class PackedTraining:
    """Our methods of the Trainer. build_trainer adds Trainer as the base class."""

    head: TailHead
    report: Report
    signals: list[int]  # caught so far
    load_best: bool
    rng_states: list = []  # noqa: RUF012 (random states after the last optimizer step)
    saved_step = 0
    lowest_loss, high_losses_in_a_row = math.inf, 0

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """Train, measure the end, put the best weights back. After a signal save the last whole
        step, with the random states that it ended with."""
        try:
            with suppress(LeaveTraining):
                super().train(resume_from_checkpoint)
            with suppress(LeaveTraining):  # a run that was stopped in its last evaluation
                measured = [row["step"] for row in self.state.log_history if "eval_loss" in row]
                open_end = self.eval_dataset is not None and self.state.global_step not in measured
                if open_end and not self.stopping():
                    self.evaluate()
            if not self.stopping():
                if best := self.best_checkpoint():
                    load_adapter(self.model, best)
            elif self.rng_states:
                for generator, state in zip(self.generators(), self.rng_states, strict=True):
                    generator.set_rng_state(state)
                self._save_checkpoint(self.model_wrapped)
        finally:  # what is printed next stands below the progress bar
            for callback in self.callback_handler.callbacks:
                if bar := getattr(callback, "training_bar", None):
                    bar.close()

    def rehearse(self) -> None:
        """Evaluate a little before the first step, so that errors come now and not after hours."""
        import torch
        try:
            metrics = self.measure(batches=1, rows=2, tokens=1)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"--per_device_eval_batch_size {self.args.per_device_eval_batch_size}: an "
                "evaluation runs out of memory; choose a smaller one") from error
        known = [name.removeprefix("eval_") for name in metrics if name != "eval_sample"]
        best = (self.args.metric_for_best_model or "loss").removeprefix("eval_")
        refuse((best not in known, f"--metric_for_best_model {best}: expected a figure of the "
                f"evaluations: {', '.join(known)}"))

    def compute_loss(self, model, inputs, *args, **kwargs):
        with self.head.inside_the_loss(), self.accelerator.autocast():  # FSDP: without autocast
            return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs):
        if self.stopping():
            raise LeaveTraining
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not loss.isfinite():
            self.give_up(self.state.global_step + 1, f"the loss is {loss.item()}")
        return loss

    def stopping(self) -> bool:
        """Whether any process has received a signal: all stop at the same step."""
        if self.args.world_size == 1:
            return bool(self.signals)
        import torch
        signals = torch.tensor(len(self.signals), device=self.args.device)
        return bool(self.accelerator.reduce(signals, "sum"))

    def generators(self) -> list[Any]:
        """Where random numbers come from on this device."""
        import torch
        return [torch.random, *[torch.cuda] * (self.args.device.type == "cuda")]

    def give_up(self, step: int, reason: str) -> None:
        refuse((step == 0, f"{reason} before the first step: the base or --adapter holds numbers "
                "that are not finite; fetch it again"))
        raise UserError(
            f"step {step}: {reason}; the last checkpoint is of an earlier step. Try a lower "
            f"--learning_rate (now {self.args.learning_rate:g}), --warmup_steps 100 or a lower "
            "--max_grad_norm, in another --output_dir, and look at the text of that step")

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add the tokens seen, write metrics.jsonl, and stop a loss that explodes."""
        blocks = self.train_dataset
        sequences = sequences_after(self.state.global_step, len(blocks), self.args)
        seen = blocks.tokens_seen(sequences)
        logs = logs | {"tokens_seen": sum(seen)}
        if len(seen) > 1:
            for (_, name, _), tokens in zip(all_texts(self.report.args), seen, strict=False):
                logs[f"tokens_seen_{name}"] = tokens
        figures = {name: value for name, value in logs.items() if name != "eval_sample"}
        super().log(figures, *args, **kwargs)
        self.state.log_history[-1].update(logs)
        if self.is_world_process_zero():
            self.report.write(self.state.log_history)
        if "loss" in logs:
            high = logs["loss"] > self.lowest_loss + 2
            self.high_losses_in_a_row = self.high_losses_in_a_row + 1 if high else 0
            self.lowest_loss = min(self.lowest_loss, logs["loss"])
            if self.high_losses_in_a_row > 1:
                explosion = f"the loss explodes ({logs['loss']:.2f} after {self.lowest_loss:.2f})"
                self.give_up(self.state.global_step, explosion)

    def held_out_loss(self, blocks: PackedBlocks, batches: int = sys.maxsize) -> tuple[float, int]:
        """The summed loss of documents held out, and the number of tokens predicted."""
        import torch
        from accelerate.utils import send_to_device
        size = self.args.per_device_eval_batch_size
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        self.model.eval()
        rank, ranks = self.args.process_index, self.args.world_size
        for start in islice(range(0, len(blocks), ranks * size), batches):
            if self.stopping():
                raise LeaveTraining
            chosen = range(len(blocks))[start : start + ranks * size][rank::ranks]
            batch = self.data_collator([blocks[i] for i in chosen or [0]])
            if not chosen:  # with FSDP all processes take part in each forward pass
                batch["labels"].fill_(IGNORED)
            batch = send_to_device(batch, self.args.device)
            with torch.no_grad(), self.accelerator.autocast(), self.head.inside_the_loss():
                sums[0] += self.model(**batch, num_items_in_batch=1).loss
            sums[1] += (batch["labels"] != IGNORED).sum()
        total, predicted = self.accelerator.reduce(sums, "sum").tolist()
        if not math.isfinite(total):
            self.give_up(self.state.global_step, f"the loss of the text held out is {total}")
        return total, max(1, int(predicted))

    def answer_scores(self, rows: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Of each row's answer: its log probability, and whether greedy decoding would write it."""
        import torch
        from accelerate.utils import send_to_device
        scores, longest = [], max(len(ids) for ids, _ in rows)
        size = max(1, LOSS_CHUNK // longest)
        self.model.eval()
        for start in range(0, len(rows), size):
            if self.stopping():
                raise LeaveTraining
            part = rows[start : start + size]
            filled = [np.array(ids + [0] * (longest - len(ids))) for ids, _ in part]
            position = np.arange(longest)
            batch = self.data_collator([{"input_ids": f, "position_ids": position} for f in filled])
            with torch.no_grad(), self.accelerator.autocast():
                logits = self.model(**send_to_device(batch, self.args.device)).logits  # (B, T, V)
            for (ids, begin), row in zip(part, logits, strict=True):
                answer = torch.tensor(ids[begin:], device=row.device)
                predicted = row[begin - 1 : len(ids) - 1].float().log_softmax(-1)
                total = predicted.gather(1, answer[:, None]).sum().item()
                scores.append((total, bool((predicted.argmax(-1) == answer).all())))
        return scores

    def probe(self, rows: int | None = None) -> dict[str, float]:
        """The share of pairs in which Taiwan's sentence is the likelier (a tie counts half), and of
        tasks solved. Whole sentences are compared, not means per token, for the two wordings may
        have different numbers of tokens. rows None: all."""
        metrics = {}
        for name, pairs in self.report.probes.items():
            likelihoods, solved = np.array(self.answer_scores(pairs[:rows])).T
            if name == "taiwan_wording":
                solved = np.sign(likelihoods[::2] - likelihoods[1::2]) / 2 + 0.5
            metrics[f"eval_{name}"] = float(solved.mean())
        return metrics

    def measure(
        self, batches: int = sys.maxsize, rows: int | None = None, tokens: int | None = None
    ) -> dict[str, Any]:
        """Loss per token and bits per character of each text held out (the first has the plain
        names), the probes and a sample. Every process calls it, for FSDP."""
        metrics = {}
        for name, blocks in self.eval_dataset.items():
            total, predicted = self.held_out_loss(blocks, batches)
            # The first token of a document that a block cuts has no loss: the mean stands for it.
            bits = total / predicted / math.log(2) * blocks.tokens_per_character
            of = f"_{name}" if metrics else ""
            metrics[f"eval_loss{of}"] = total / predicted
            metrics[f"eval_bits_per_character{of}"] = bits
        return metrics | self.probe(rows) | self.report.sample(self, tokens)

    def evaluate(self, *args, **kwargs) -> dict[str, Any]:
        """Measure, print and log."""
        from tqdm import tqdm
        metrics = self.measure()
        if self.is_world_process_zero():
            bits = [f"{metrics[name]:.3f}" for name in metrics if "bits_per_character" in name]
            tqdm.write(f"{', '.join(bits)} bits per character; it writes: "
                       f"{metrics.get('eval_sample')}")
        self.log(metrics)
        told = self.callback_handler.on_evaluate
        self.control = told(self.args, self.state, self.control, metrics)
        return metrics

    def create_optimizer(self, model: Any = None) -> Any:
        """Trainer's optimizer; parameters with a learning rate of their own in own groups."""
        optimizer, args = super().create_optimizer(model), self.report.args
        lora_b = args.loraplus_lr_ratio and args.loraplus_lr_ratio * args.learning_rate
        parts = {".trained": args.embedding_learning_rate, "norm.weight": args.norm_learning_rate,
                 ".lora_B.": lora_b}
        rates = {
            parameter: rate for name, parameter in (model or self.model).named_parameters()
            for part, rate in parts.items() if part in name and rate is not None}
        groups = []
        for group in optimizer.param_groups:
            kinds: dict[float, list] = {}
            for parameter in group["params"]:
                kinds.setdefault(rates.get(parameter, group["lr"]), []).append(parameter)
            groups += [group | {"params": chosen, "lr": rate} for rate, chosen in kinds.items()]
        # The first group's rate is the one that Trainer logs.
        groups.sort(key=lambda group: group["lr"] != args.learning_rate)
        optimizer.param_groups[:] = groups
        return optimizer

    def floating_point_ops(self, inputs) -> int:
        return 0  # the stock estimate counts every parameter at each step

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter as stock PEFT reads it; Trainer calls this for a checkpoint too."""
        # With FSDP each process sees its own part; if one gives up, the launcher ends the others.
        if not all(p.isfinite().all() for p in adapter_tensors(self.model).values()):
            self.give_up(self.state.global_step, "weights are no longer finite")
        record, model = self.report.record, self.accelerator.unwrap_model(self.model)
        base = record["base"]["model_name_or_path"]
        # A merge must quantise the base in the same way, even where run.json is lost.
        held = record["quantization"] | {"device": self.args.device.type}
        save_adapter(model, Path(output_dir or self.args.output_dir), base, held)

    def _save_checkpoint(self, model, trial=None) -> None:
        """Write Trainer's checkpoint and its seal, then delete the oldest. This private method is
        overridden because Trainer has no public way to save after a signal."""
        output, step = Path(self.args.output_dir), self.state.global_step
        if step == self.saved_step:
            return
        folder = output / f"checkpoint-{step}"
        if self.args.should_save:  # left without a seal by a run that was killed
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                finalize_checkpoint(folder, self.report.record)
                limit = self.report.args.save_total_limit
                old = checkpoints(output)[limit:] if limit > 0 else []
                for path in {*old} - {self.best_checkpoint()}:
                    shutil.rmtree(path)
        except Exception as error:  # torch and safetensors have their own errors for a full disk
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            full = shutil.disk_usage(output).free < 1 << 26 or "No space left" in str(error)
            if not (full or isinstance(error, OSError)):
                raise
            last = next(iter(checkpoints(output)), "none")
            raise OSError(errno.ENOSPC, f"{folder} cannot be written ({error}); the last good "
                          f"checkpoint is {last}; make room and run the same command") from error
        self.accelerator.wait_for_everyone()
        self.saved_step = step

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Overridden because PEFT cannot load into our rows of embedding and head."""
        load_adapter(model or self.model, Path(resume_from_checkpoint))

    def best_checkpoint(self) -> Path | None:
        """With --load_best_model_at_end the kept checkpoint whose evaluation was the best."""
        if not self.load_best:
            return None
        metric = "eval_" + self.args.metric_for_best_model.removeprefix("eval_")
        kept = {step_of(path): path for path in checkpoints(Path(self.args.output_dir))}
        found = {row["step"]: row[metric] for row in self.state.log_history
                 if row["step"] in kept and metric in row}
        best = max if self.args.greater_is_better else min
        return kept[best(found, key=found.get)] if found else None


def build_trainer(
    training: Any, model: Any, blocks: Mixture, held_out: dict[str, PackedBlocks], report: Report
) -> Any:
    """transformers.Trainer with PackedTraining in front."""
    from transformers import Trainer, TrainerCallback
    load_best, training.load_best_model_at_end = training.load_best_model_at_end, False
    training.train_sampling_strategy = "sequential"  # the blocks come in their order
    if not held_out:
        training.eval_strategy, training.eval_on_start = "no", False
    head_size = model.config.hidden_size // model.config.num_attention_heads
    flash = not training.use_cpu and (training.bf16 or training.fp16) and flash_is_here(head_size)
    trainer = based_on(PackedTraining, Trainer)(
        model=model, args=training, train_dataset=blocks, eval_dataset=held_out or None,
        data_collator=Collate(report.args.group_size, flash))
    trainer.add_callback(based_on(RunCallback, TrainerCallback)(trainer))
    trainer.head, trainer.report = model.base_model.model.lm_head, report
    trainer.load_best = load_best
    if trainer.is_fsdp_enabled:
        from torch.distributed.fsdp import MixedPrecisionPolicy
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # not changed
        # Each parameter keeps its own type; autocast does the rest, as on one GPU.
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    if trainer.accelerator.ddp_handler:  # no second copy of the gradients in DDP's buckets
        trainer.accelerator.ddp_handler.gradient_as_bucket_view = True
    # Trainer warns where options differ from a checkpoint's. Those that matter have been refused;
    # how often to log, save and evaluate may change in a run.
    differ = "The following arguments do not match"
    trainer_log = logging.getLogger("transformers.trainer_utils")
    trainer_log.addFilter(lambda record: differ not in record.getMessage())
    return trainer


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


@contextmanager
def collect_signals() -> Iterator[list[int]]:
    """Collect the signals of STOPPING, so that the run can save first. A Ctrl-C more than a second
    after the first signal ends the run at once; earlier it may be the first one, passed on by
    torchrun. A signal that nohup ignores stays ignored."""
    caught: list[int] = []
    first = math.inf

    def note(signum, frame):
        nonlocal first
        if signum == signal.SIGINT and time.monotonic() - first > 1:
            raise KeyboardInterrupt
        caught.append(signum)
        if len(caught) == 1:
            first = time.monotonic()
            print(f"{signal.Signals(signum).name}: saving after the batch at hand", flush=True)

    heard = [s for s in STOPPING if signal.getsignal(s) != signal.SIG_IGN]
    previous = {s: signal.signal(s, note) for s in heard}
    try:
        yield caught
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


# --- Run folder ----------------------------------------------------------------------------------


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
def lock_output_dir(output: Path) -> Iterator[None]:
    """Make a folder and keep other runs out of it; refuse one that another run is writing."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("a") as file:
        if not take_lock(file, f"--output_dir {output}"):
            raise UserError(f"--output_dir {output}: another run is writing it; wait for it, or "
                            "pass another folder")
        yield


def write_json(path: Path, content: Any) -> None:
    """Write the whole file or none of it."""
    building = path.with_name(path.name + ".building")
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    building.write_text(text + "\n", "utf-8", "backslashreplace")
    building.replace(path)


def read_record(folder: Path) -> dict:
    """A folder's run.json; empty where there is none."""
    try:
        found = json.loads((folder / "run.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("results") or {}, dict) else {}


def file_sum(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finalize_checkpoint(folder: Path, record: dict) -> None:
    """Seal a checkpoint: run.json with the sum of every file, written last."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {str(path.relative_to(folder)): file_sum(path) for path in files}
    write_json(folder / "run.json", record | {"files": sums})


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, whatever its folder is called."""
    return json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]


def checkpoints(output: Path) -> list[Path]:
    """The sealed checkpoints of a run, the last first."""
    sealed = [path.parent for path in output.glob("checkpoint-*/run.json")]
    sealed = [path for path in sealed if path.name[11:].isdecimal()]
    return sorted(sealed, key=lambda path: int(path.name[11:]), reverse=True)


def is_whole(checkpoint: Path) -> bool:
    """Whether every recorded file still has its checksum; other files do not count."""
    sums = read_record(checkpoint).get("files")
    try:
        return bool(sums) and all(file_sum(checkpoint / name) == sums[name] for name in sums)
    except FileNotFoundError:
        return False


def describe_run(
    args: Arguments, training: Any, folder: Path, first_new: int, keys: list[str]
) -> dict:
    """The content of run.json at the start of a run. Its settings identify the run."""
    settings = {setting.name: getattr(args, setting.name) for setting in fields(Settings)}
    settings |= {n: v for n, v in training.to_dict().items() if TRAINER_SETTINGS.match(n)}
    settings |= {
        "processes": training.world_size, "fsdp": fsdp_version(training),
        "held_out": args.eval_strategy != "no",  # else those documents are trained on
        "first_new_row": first_new, "model": fingerprint(folder), "dataset": " ".join(keys)}
    compute = "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32"
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
           "bnb_4bit_compute_dtype": compute}  # in the words of BitsAndBytesConfig
    packages = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "numpy")
    return {
        "script": "train_pt.py", "arguments": asdict(args),
        "versions": {package: version(package) for package in packages}, "results": None,
        "base": {"model_name_or_path": args.model_name_or_path, "fingerprint": settings["model"]},
        "quantization": nf4 if args.quantization == "nf4" else {"load_in_4bit": False},
        "settings": json.loads(json.dumps(settings, default=str))}


def changed_settings(record: dict, old: dict) -> dict[str, str]:
    """The settings that differ from an older record's, each with words that say how."""
    new, was = record["settings"], old["settings"]
    words = {"dataset": "the text or the tokenizer changed", "model": "the base changed",
             "adapter": "--adapter changed",
             "held_out": "--eval_strategy no trains on the documents held out too"}
    return {n: words.get(n, f"{n} was {was.get(n)}, now {new.get(n)}")
            for n in sorted(new | was) if new.get(n) != was.get(n)}


def open_run(args: Arguments, record: dict) -> str | None:
    """What output_dir holds: "done", a checkpoint to resume from, or None for a new run. Refuses
    another run's folder, and one in which every checkpoint is broken."""
    output, wanted = Path(args.output_dir), args.resume_from_checkpoint
    begun = {".lock", "run.json.building"} | FOREIGN  # left by a start that failed
    held = output.iterdir() if output.is_dir() else [output] if output.exists() else []
    names = sorted({path.name for path in held} - begun)
    old = read_record(output) or next(map(read_record, checkpoints(output)), {})  # without run.json
    foreign = old.get("script") != "train_pt.py" or not {"settings", "results"} <= old.keys()
    refuse((names and foreign, f"--output_dir {output}: holds something else "
            f"({', '.join(names[:3])}); choose another folder"))
    if old:
        refuse_other(record, old, f"--output_dir {output}: holds a run")
        if old["results"] and not changed_settings(record, old) and is_whole(output):
            return "done"
    if wanted != "auto":
        refuse((not is_whole(Path(wanted)), f"--resume_from_checkpoint {wanted}: not a whole "
                "checkpoint; use auto"))
        refuse_other(record, read_record(Path(wanted)), f"--resume_from_checkpoint {wanted}: is "
                     "of a run")
        return wanted
    saved = checkpoints(output)
    last = next((str(folder) for folder in saved if is_whole(folder)), None)
    refuse((saved and not last, f"--output_dir {output}: a file of each of its checkpoints is "
            f"missing or not as it was written ({', '.join(path.name for path in saved)}); copy "
            "them again, or begin anew in another --output_dir"))
    if old and not last:
        print(f"no checkpoint in {output}: the run begins at its first step")
    return last


def refuse_other(record: dict, old: dict, what: str) -> None:
    """Refuse to resume if other settings than the schedule's differ."""
    changed = changed_settings(record, old)
    refuse((not SCHEDULE.issuperset(changed), f"{what} with other settings "
            f"({'; '.join(changed.values())}); to resume give the same settings; for a new run "
            "choose another --output_dir, and --adapter to start from this adapter"))


def move_later_aside(output: Path, step: int) -> None:
    """Rename the checkpoints after the step at which a run resumes; nothing is deleted."""
    for later in checkpoints(output):
        if int(later.name[11:]) > step:  # its trainer_state.json may be broken
            names = (Path(f"{later}.{number}") for number in range(1, 10**6))
            aside = later.rename(next(name for name in names if not name.exists()))
            print(f"resuming at step {step}: {later} is broken or superseded, renamed to {aside}")


def check_schedule(args: Arguments, record: dict, checkpoint: str, steps: int) -> str:
    """The last checkpoint up to which the new schedule has the learning rates of the old. From it a
    run can be prolonged, or a decay branch off a constant rate, bit for bit as in one long run."""
    auto = args.resume_from_checkpoint == "auto"
    saved = filter(is_whole, checkpoints(Path(args.output_dir))) if auto else [Path(checkpoint)]
    for folder in saved:
        if same_schedule_so_far(record, folder, steps):
            return str(folder)
    other = changed_settings(record, read_record(Path(checkpoint))).values()
    raise UserError(
        f"{checkpoint}: cannot go on to step {steps} ({'; '.join(other)}): the new schedule has "
        "other learning rates before this checkpoint, or ends before it. A constant schedule, "
        "constant_with_warmup or, before its decay, warmup_stable_decay can be prolonged; else "
        f"train this adapter further: --adapter {checkpoint} --output_dir ANOTHER")


def same_schedule_so_far(record: dict, checkpoint: Path, steps: int) -> bool:
    """Whether this run has the same learning rates as the checkpoint up to its step."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    new, old = record["settings"], read_record(checkpoint)["settings"]
    if steps == state["max_steps"] and all(new.get(n) == old.get(n) for n in SCHEDULE):
        return True
    now, then = learning_rate_schedule(new, steps), learning_rate_schedule(old, state["max_steps"])
    if not (hasattr(now, "lr_lambdas") and hasattr(then, "lr_lambdas")):
        return False
    rate, was = now.lr_lambdas[0], then.lr_lambdas[0]
    so_far = range(state["global_step"] + 1)
    return all(rate(step) == was(step) for step in so_far) and state["global_step"] <= steps


def check_adapter(args: Arguments, record: dict) -> None:
    """Refuse an adapter that does not fit; its checksum becomes one of the run's settings."""
    if not args.adapter:
        return
    adapter = Path(args.adapter)
    weights, old = adapter / "adapter_model.safetensors", read_record(adapter)
    refuse((not (weights.is_file() and old.get("script") == "train_pt.py"), f"--adapter {adapter}: "
            "expected what train_pt.py has written, an output_dir or a checkpoint, with run.json "
            "and adapter_model.safetensors"))
    changed = changed_settings(record, old)
    other = [changed[name] for name in ADAPTER_SETTINGS if name in changed]
    now = record["settings"]["adapter"] = file_sum(weights)
    refuse(
        (adapter.resolve().is_relative_to(Path(args.output_dir).resolve()), f"--adapter {adapter}: "
         f"lies in --output_dir {args.output_dir}; expected another --output_dir"),
        (other, f"--adapter {adapter}: trained with other settings ({'; '.join(other)}); give the "
         "same"),
        ((old.get("files") or {}).get(weights.name, now) != now, f"--adapter {adapter}: "
         f"{weights.name} is not as it was written; copy it again, or pass a checkpoint"))


# --- Plan ----------------------------------------------------------------------------------------


def steps_per_epoch(sequences: int, training: Any) -> int:
    """Optimizer steps in an epoch, as Trainer counts them."""
    batch = training.per_device_train_batch_size * training.world_size
    return math.ceil(math.ceil(sequences / batch) / training.gradient_accumulation_steps)


def total_steps(sequences: int, training: Any) -> int:
    """Optimizer steps of the run."""
    if training.max_steps > 0:
        return training.max_steps
    return math.ceil(training.num_train_epochs * steps_per_epoch(sequences, training))


def sequences_after(step: int, sequences: int, training: Any) -> int:
    """How many sequences were trained on after so many steps, of so many in an epoch."""
    epochs, rest = divmod(step, steps_per_epoch(sequences, training))
    batch = training.per_device_train_batch_size * training.world_size
    return epochs * sequences + min(rest * batch * training.gradient_accumulation_steps, sequences)


def sizes(config: Any, args: Arguments, first_new: int) -> tuple[int, int, int]:
    """Numbers in all linear layers, in their LoRA matrices; rows of a matrix that are trained."""
    D, M, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    kv = config.num_key_value_heads * D // config.num_attention_heads
    shapes = [(D, D), (D, kv), (D, kv), (D, D), (D, M), (D, M), (M, D)]
    rows = {"new": config.vocab_size - first_new, "all": config.vocab_size, "none": 0}
    weights, lora = sum(a * b for a, b in shapes), args.lora_rank * sum(a + b for a, b in shapes)
    return L * weights, L * lora, rows[args.train_embeddings]


def offloads(args: Arguments) -> bool:
    """Whether a layer's input waits for its recomputation in the CPU's memory."""
    return bool(json.loads(args.activation_checkpointing_kwargs or "{}").get("offload"))


def memory_items(config: Any, args: Arguments, first_new: int, batch: int, block: int) -> dict:
    """Bytes on the GPU at the peak, derived from the shapes and compared with a trace of every
    allocation (benchmarks/bench_plan.py)."""
    D, M, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    V, tokens = config.vocab_size, batch * block
    weights, lora, rows = sizes(config, args, first_new)
    # fp32 weight and gradient; Adam's two moments, in 8 bits with two fp32 scales for 256 numbers.
    state = 4 + 4 + (2 + 8 / 256 if "8bit" in args.optim else 8)
    # Of each token a layer holds 9 rows of D numbers in 16 bits: what attention reads and writes,
    # the inputs of projections and of the second norm, the gradient. In the MLP six rows of M
    # numbers meet: gate, up, silu(gate), the gradient of their product, the two it splits into.
    # Liger's SwiGLU makes no silu(gate) and writes the last two over gate and up; then a layer's
    # weight in 16 bits counts.
    liger = args.use_liger_kernel
    mlp = tokens * 6 * M + 2 * D * M if liger else tokens * 12 * M
    layer, inputs, kept = tokens * 18 * D + mlp, (1 if offloads(args) else L) * tokens * D * 2, 0
    if not args.activation_checkpointing:  # then the norms' fp32 and 16 bits stay too
        kept = tokens * (18 * D + 6 * M + (0 if liger else 8 * D + 2 * M))
        layer, inputs = layer + tokens * (0 if liger else 10 * D), (L - 1) * kept
    if args.quantization == "none":  # PEFT's plain layers cast each input to fp32 and back
        layer += tokens * (6 * D + 4 * M)
    # Hidden states and gradients, the trained rows' gradient and copy, and a chunk of logits with
    # its slope, or the slope with its share of that gradient.
    chunk = LOSS_CHUNK * V * 2 + max(LOSS_CHUNK * V * 4, rows * D * 2)
    loss = kept + tokens * D * 8 + rows * D * 6 + chunk
    return {
        "frozen linear layers": weights * (4.127 / 8 if args.quantization == "nf4" else 2),
        "frozen rows of embedding and head": 2 * (V - rows) * D * 2,
        "trained rows, gradient, optimizer": 2 * rows * D * state,
        "LoRA, gradient, optimizer": lora * state,
        "kept for the backward pass": inputs,
        "backward pass of a layer, or loss": max(layer, loss)}


# A card's memory (GB), and what a training step sustains on it: PFLOP/s of matrix products, TB/s.
# The H200's as measured; the others' by their public figures at its share of its own.
CARDS = {"a10": (24, 0.060, 0.53), "3090": (24, 0.061, 0.82), "4090": (24, 0.138, 0.88),
         "5090": (32, 0.180, 1.58), "a100": (80, 0.215, 1.57), "h100": (80, 0.688, 2.58),
         "h200": (141, 0.688, 3.7)}


def step_seconds(config: Any, args: Arguments, first_new: int) -> float:
    """Seconds of an optimizer step on args.plan_gpu, with recomputation and Liger's kernels. Fitted
    to a count of what every kernel computes and moves (benchmarks/bench_plan.py)."""
    D, M, L, V = (getattr(config, name) for name in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"))
    weights, lora, rows = sizes(config, args, first_new)
    tokens = args.per_device_train_batch_size * args.block_size
    # Each weight works forward, again in recomputation (but for the layer's last product) and
    # backward; attention counts as 1,000 keys a token, for it runs at a quarter of the rate.
    flops = 2 * (3 * weights - L * D * M) + 8 * lora + (4 * V + 2 * rows + 18_000 * L) * D
    moved = tokens * L * (276 * D + 56 * M) + 15 * weights * (args.quantization == "nf4")
    _, products, bandwidth = CARDS[args.plan_gpu]
    batch = tokens * flops / (products * 1e15) + moved / (bandwidth * 1e12)
    return args.gradient_accumulation_steps * batch + 2e-3 * L  # 8-bit Adam waits 16 times a layer


def print_plan(
    args: Arguments, training: Any, config: Any, first_new: int, facts: dict, *lines: str
) -> None:
    """Sizes, steps, and what fits."""
    import torch
    if training.process_index:
        return
    batch, block = args.per_device_train_batch_size, args.block_size

    def in_all(batch: int, block: int) -> float:
        return sum(memory_items(config, args, first_new, batch, block).values())

    for name, value in facts.items():
        print(f"{name.replace('_', ' '):>36}: {value:,}")
    if not facts:
        print(f"no text at --dataset {' '.join(args.dataset)}, or no tokenizer with the model: "
              "steps are not counted")
    for line in lines:
        print(line)
    liger = "with" if args.use_liger_kernel else "without"
    print(f"memory on a GPU {liger} liger-kernel, estimated from the shapes, at batch {batch} "
          f"x {block} tokens:")
    items = memory_items(config, args, first_new, batch, block)
    for name, size in (items | {"in all": in_all(batch, block)}).items():
        print(f"{name:>36}: {size / 1e9:7.2f} GB")
    if args.plan_gpu:
        seconds = step_seconds(config, args, first_new)
        speed = args.gradient_accumulation_steps * batch * block / seconds
        steps = facts.get("steps", max(training.max_steps, 0))
        days = f", {steps * seconds / 86_400:.1f} days for {steps:,} steps" if steps else ""
        more = "; the copies of offload are not counted" if offloads(args) else ""
        print(f"on one {args.plan_gpu}, predicted, not measured, with liger-kernel: "
              f"{seconds:.1f} s a step, {speed:,.0f} tokens/s{days}{more}")
    size = (args.plan_gpu_gb or CARDS.get(args.plan_gpu, (0,))[0]) * 1e9
    if torch.cuda.is_available() and not size:
        size = torch.cuda.get_device_properties(0).total_memory
    if not size:
        return print("no GPU here: --plan_gpu_gb 24 says what fits on one of 24 GB")
    room = size - 0.8e9  # CUDA's context and fragmentation
    blocks = range(256, config.max_position_embeddings + 1, 256)
    longest = max((b for b in blocks if in_all(batch, b) <= room), default=0)
    widest = max((b for b in range(1, 257) if in_all(b, block) <= room), default=0)
    limit = " (the model's limit)" if longest + 256 > config.max_position_embeddings else ""
    print(f"on {size / 1e9:.0f} GB: at batch {batch} the longest sequence is {longest} tokens"
          f"{limit}; at {block} tokens the largest batch is {widest}")


# --- Report --------------------------------------------------------------------------------------

# Panels of the chart, with a pattern of the metrics in each; its group is the line's label.
PANELS = {
    "loss (nats per token)": "loss|eval_loss_?(.*)",
    "bits per character": "eval_bits_per_character_?(.*)",
    "probes (share right)": "eval_(taiwan_wording|in_context_.+)",
    "learning rate": "learning_(rate)"}


class Report:
    """metrics.jsonl, the chart, the samples and the model card of a run."""

    def __init__(self, args: Arguments, record: dict, tokenizer: Any, facts: dict, source: Any):
        self.args, self.record, self.tokenizer, self.facts = args, record, tokenizer, facts
        self.prompt = source[0]["input_ids"][:32].tolist()
        self.probes = all_probes(tokenizer) if args.probes else {}
        self.output, self.drawn = Path(args.output_dir), -math.inf

    def begin(self, training: Any, blocks: Mixture, *lines: str) -> None:
        """Write run.json and print what the run will do."""
        run = os.getenv("WANDB_RUN_ID") or read_record(self.output).get("wandb_run_id")
        self.record["wandb_run_id"] = run or uuid4().hex[:8]
        if "wandb" in training.report_to:  # Trainer logs to the run that it finds begun
            import wandb
            project = os.getenv("WANDB_PROJECT", "huggingface")
            known = {"id": self.record["wandb_run_id"], "name": training.run_name}
            with refusals_of("--report_to wandb: "):
                wandb.init(project=project, resume="allow", **known)
        write_json(self.output / "run.json", self.record)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (self.output / name).unlink(missing_ok=True)  # of a run that is prolonged
        print(", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in self.facts.items()))
        for line in lines:
            print(line)
        first = blocks[0]["input_ids"][blocks[0]["position_ids"] >= 0]  # no padding
        print("a sample:", self.tokenizer.decode(first[:128]), flush=True)

    def write(self, history: list[dict]) -> None:
        """Write the whole history; checkpoints hold it too, so a resumed run has all of it. An
        error does not end the run: the next call writes everything again."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in history)
        building = self.output / "metrics.building"
        try:
            building.write_text(lines, encoding="utf-8")
            building.replace(self.output / "metrics.jsonl")
            if time.monotonic() - self.drawn > 20 or "eval_loss" in history[-1]:
                self.draw(history)
        except OSError as error:
            print(f"warning: metrics or chart not written ({error})", flush=True)

    def draw(self, history: list[dict]) -> None:
        """Draw the PANELS that have data, into --picture and beside the adapter."""
        from matplotlib.figure import Figure
        train = [row for row in history if "loss" in row]
        if not train or not train[-1]["tokens_seen"]:
            return
        panels = {}
        for title, pattern in PANELS.items():
            found = (re.fullmatch(pattern, name) for row in history for name in row)
            if lines := {match[0]: match[1] for match in found if match}:
                panels[title] = lines
        figure = Figure(figsize=(8, 1 + 2 * len(panels)), layout="constrained")
        all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
            for name, label in lines.items():
                rows = [row for row in history if name in row]
                steps, values = [r["step"] for r in rows], [r[name] for r in rows]
                look = {"marker": "o"} if name.startswith("eval_") else {"color": "gray"}
                label = "train" if label is None else label.replace("_", " ") or "held out"
                axes.plot(steps, values, label=label, **look)
            axes.set(ylabel=title)
            axes.legend()
            axes.grid(alpha=0.3)
        all_axes[-1].set(xlabel="step")
        all_axes[0].set_title(
            f"{self.facts['steps']} steps, sequences of {self.args.block_size} tokens")
        millions = train[-1]["tokens_seen"] / train[-1]["step"] / 1e6
        top = all_axes[0].secondary_xaxis("top", (lambda x: x * millions, lambda x: x / millions))
        top.set_xlabel("million tokens seen")
        for picture in (self.output / "trainloss.png", Path(self.args.picture)):
            picture.parent.mkdir(parents=True, exist_ok=True)
            building = picture.with_name("building." + picture.name)
            figure.savefig(building, dpi=120)
            building.replace(picture)
        self.drawn = time.monotonic()

    def sample(self, trainer: Any, tokens: int | None = None) -> dict[str, Any]:
        """Text that the model writes after a held-out beginning; the run's random states are left
        unchanged. tokens None: --sample_tokens."""
        if not self.args.sample_tokens:
            return {}
        import torch
        device, model = trainer.args.device, trainer.accelerator.unwrap_model(trainer.model)
        prompt = torch.tensor([self.prompt], device=device)
        own_states = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with own_states, trainer.accelerator.autocast():
            torch.manual_seed(self.args.seed)
            ids = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), use_cache=True,
                do_sample=True, top_p=0.9, max_new_tokens=tokens or self.args.sample_tokens,
                eos_token_id=self.tokenizer.eos_token_id, pad_token_id=self.tokenizer.eos_token_id)
        new = ids[0, prompt.shape[1] :]
        return {"eval_sample": self.tokenizer.decode(new, skip_special_tokens=True)}

    def stopped(self, trainer: Any) -> None:
        """Print which step is saved after a signal."""
        step, auto = trainer.state.global_step, self.args.resume_from_checkpoint == "auto"
        how = "the same command" if auto else "--resume_from_checkpoint auto"
        said = f"stopped; step {step} is saved" if step else "stopped before the first step"
        if trainer.is_world_process_zero():
            print(f"{said}; {how} goes on", flush=True)

    def finish(self, history: list[dict], best: Path | None) -> None:
        """Write chart and model card, then run.json, which marks the run as finished. best: the
        checkpoint whose weights were taken, if not the last step's."""
        from huggingface_hub import ModelCardData
        train, held = ([row for row in history if n in row] for n in ("loss", "eval_loss"))
        steps = history[-1]["step"]
        adapter_step = step_of(best) if best else steps
        measured = next((row for row in held if row["step"] == adapter_step), {})
        results = self.facts | {
            "steps": steps, "adapter_step": adapter_step,
            "loss_first": train[0]["loss"], "loss_last": train[-1]["loss"],
            "eval_loss": measured.get("eval_loss"),
            "eval_bits_per_character": measured.get("eval_bits_per_character")}
        results |= {n: v for n, v in history[-1].items() if n.startswith("tokens_seen_")}
        self.drawn = -math.inf
        self.write(history)
        base = self.record["base"]["model_name_or_path"]
        tags = ["llama", "lora", "qlora", "traditional-chinese"]
        data = ModelCardData(library_name="peft", base_model=base, language="zh", tags=tags)
        card = [
            f"---\n{data.to_yaml()}\n---", f"# Adapter of {base}",
            "Trained on Traditional Chinese text by train_pt.py of 落九 (Luojiu).",
            "![training loss](trainloss.png)", as_list("Results", results),
            f"## Evaluations\n\n{table_of_evaluations(held)}",
            as_list("Settings", self.record["settings"]),
            as_list("Versions", self.record["versions"])]
        (self.output / "README.md").write_text(
            "\n\n".join(card) + "\n", "utf-8", "backslashreplace")
        names = ("adapter_config.json", "adapter_model.safetensors")
        sums = {name: file_sum(self.output / name) for name in names}
        write_json(self.output / "run.json", self.record | {"results": results, "files": sums})
        losses = f"loss {results['loss_first']:.3f} to {results['loss_last']:.3f}"
        chosen = f" (of step {adapter_step}, the best)" if best else ""
        print(f"{steps} steps, {losses}; wrote {self.output}{chosen}; next: python merge_lora.py "
              f"--adapter {self.output}")


def as_list(title: str, figures: dict[str, Any]) -> str:
    """A section of the model card: figures in Markdown, a line each."""
    rounded = {n: f"{v:.5g}" if isinstance(v, float) else v for n, v in figures.items()}
    return f"## {title}\n\n" + "\n".join(f"- {name}: {value}" for name, value in rounded.items())


def table_of_evaluations(held: list[dict]) -> str:
    """Each evaluation's figures, a row each, in Markdown."""
    columns = [name for name, value in (held[-1] if held else {}).items()
               if name.startswith("eval_") and isinstance(value, float)]
    titles = ["epoch", "step", *(name[5:].replace("_", " ") for name in columns)]
    rows = [titles, ["---"] * len(titles)]
    for row in held:
        figures = [f"{row[name]:.4f}" if name in row else "" for name in columns]
        rows.append([f"{row['epoch']:.2f}", str(row["step"]), *figures])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# --- Main ----------------------------------------------------------------------------------------


def check(args: Arguments) -> None:
    """Refuse impossible values before anything heavy."""
    ranges = {  # for the rest: integers 1 or more, fractions above 0; a NaN is in no range
        "block_size": (8, math.inf), "group_size": (2, 2 * args.block_size),
        "eval_fraction": (0, 0.9), "lora_rank": (1, 8192), "lora_dropout": (0, 0.99),
        "learning_rate": (0, 100), "embedding_learning_rate": (0, 100),
        "norm_learning_rate": (0, 100), "loraplus_lr_ratio": (0.01, 1000),
        "num_train_epochs": (1e-6, 10**4), "seed": (0, 2**32 - 1), "sample_tokens": (0, 4096),
        "save_total_limit": (-math.inf, math.inf), "plan_gpu_gb": (1, 10**4)}
    for name, value in vars(args).items():
        least, most = ranges.get(name, (1 if type(value) is int else 1e-6, math.inf))
        refuse((type(value) in (int, float) and not least <= value <= most,
                f"--{name} {value}: expected {least} to {most}"))
    options, parsed = args.activation_checkpointing_kwargs, None
    with suppress(ValueError):
        parsed = json.loads(options or "{}")
    kwargs = {"offload", "use_reentrant", "preserve_rng_state"}
    names, texts = [name for _, name, _ in all_texts(args)], args.eval_dataset or []
    places, weights = [Path(path).resolve() for path in args.dataset], args.dataset_weight
    shown = " ".join(f"{weight:g}" for weight in weights or ())
    refuse(
        (len({*places}) < len(places), f"--dataset {' '.join(args.dataset)}: one is named twice; "
         "expected each source once, and --dataset_weight for its share"),
        (not all(re.fullmatch(r"[\w-]+=.+", text) for text in texts) or len({*names}) < len(names),
         f"--eval_dataset {' '.join(texts)}: expected name=path, each name once and none of "
         f"{', '.join(names[: len(places)])}"),
        (weights and len(weights) != len(places), f"--dataset_weight {shown}: expected a number "
         f"for each --dataset, which are {len(places)}"),
        (weights and not all(0 < w <= 1000 * min(weights) for w in weights),
         f"--dataset_weight {shown}: expected numbers above 0, as in 9 1, the largest at most 1000 "
         "times the smallest"),
        (Path(args.picture).suffix not in (".png", ".pdf", ".svg"),
         f"--picture {args.picture}: expected a file that ends in .png, .pdf or .svg"),
        (not isinstance(parsed, dict) or parsed.keys() - kwargs,
         f"--activation_checkpointing_kwargs {options}: expected a JSON object such as "
         f"""'{{"offload": true}}', of {', '.join(sorted(kwargs))} alone"""))
    for name, file in {"output_dir": "run.json", "cache_dir": "tokens", "picture": ""}.items():
        path = Path(getattr(args, name))
        refuse((wrong := unusable(path / file), f"--{name} {path}: cannot be written there "
                f"({wrong}); choose another place"))


def unusable(file: Path) -> str | None:
    """Why a file cannot be written, before anything is."""
    above = next(p for p in (file.parent, *file.parent.parents) if os.path.lexists(p))
    if file.is_dir():
        return f"{file} is a folder"
    if not above.is_dir():
        return f"{above} is no folder"
    return None if os.access(above, os.W_OK | os.X_OK) else f"{above} may not be written"


def slow_device(training: Any, folder: Path) -> str | None:
    """Why training is slow on this device; None if it is not."""
    import torch
    from transformers.utils import is_liger_kernel_available
    if training.use_cpu:
        size = sum(path.stat().st_size for path in folder.glob("[!.]*.safetensors"))
        return (f"no GPU in use, so {size / 1e9:.1f} GB of weights train on the CPU, slowly; see "
                "nvidia-smi and torch.version.cuda") if size > LARGE_FOR_A_CPU else None
    if training.bf16 and torch.cuda.get_device_capability() < (8, 0):
        return (f"--bf16 true: {torch.cuda.get_device_name()} has no units for bfloat16; it has "
                "some for float16: --bf16 false --fp16 true")
    without = "liger-kernel is not installed; pip install liger-kernel trains faster"
    return None if is_liger_kernel_available() else without


def first_lines(
    args: Arguments, training: Any, folder: Path, blocks: Mixture, held_out: dict, files: list
) -> list[str]:
    """Notes on device and sources to print first; of several sources the tokens, share and epochs
    of each in the whole run."""
    notes = [None if args.plan else slow_device(training, folder)]  # a plan: of another machine
    evaluated = args.eval_fraction > 0 and args.eval_strategy != "no"
    for (option, name, path), found in zip(all_texts(args), files, strict=True):
        others = sorted(file.name for file in Path(path).glob("[!.]*") if file not in found)
        if others:
            notes.append(f"{option} {path}: {len(others)} are not read: {', '.join(others[:9])}")
        if evaluated and name not in held_out:
            notes.append(f"{option} {path}: too few documents to hold one out, so nothing of it is "
                         "evaluated; a .txt is one document, JSON Lines hold one a row")
    if args.probes and held_out and not wording_pairs():
        notes.append("data/probes/wording.txt is not here, so Taiwan's wording is not probed")
    lines = [f"note: {note}" for note in notes if note]
    sequences = sequences_after(total_steps(len(blocks), training), len(blocks), training)
    seen, sources = blocks.tokens_seen(sequences), blocks.sources
    for (_, name, _), source, tokens in zip(all_texts(args), sources, seen, strict=False):
        if len(sources) > 1:
            lines.append(f"{name}: {tokens:,} tokens, {tokens / sum(seen):.1%}, "
                         f"{tokens / source.total:.2f} epochs")
    return lines


@ignore_write_errors()
@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Read, check, tokenise, pack, build, train, report."""
    args, training = parse_args(argv)
    check(args)
    try_trainer(args, training)
    folder, config, tokenizer, first_new = load_base(args)
    if args.plan and not (tokenizer and all(Path(path).exists() for path in args.dataset)):
        return print_plan(args, training, config, first_new, {})
    files = [text_files(path, option) for option, _, path in all_texts(args)]
    keys = [dataset_key(found, folder) for found in files]
    record = describe_run(args, training, folder, first_new, keys[: len(args.dataset)])
    check_adapter(args, record)
    with training.main_process_first():  # one of several processes tokenises
        checkpoint = None if args.plan else open_run(args, record)
        if checkpoint == "done":
            return print(f"already done: {args.output_dir} holds this very run, finished")
        corpora = [tokenize(found, tokenizer, Path(args.cache_dir, key[:16]))
                   for found, key in zip(files, keys, strict=True)]
    blocks, held_out = pack_sources(corpora, args, training, tokenizer.eos_token_id or 0)
    facts = count(corpora, blocks, held_out, training)
    lines = first_lines(args, training, folder, blocks, held_out, files)
    if args.plan:
        return print_plan(args, training, config, first_new, facts, *lines)
    if checkpoint:
        checkpoint = check_schedule(args, record, checkpoint, facts["steps"])
    report = Report(args, record, tokenizer, facts, next(iter(held_out.values()), blocks))
    with ExitStack() as run:
        if training.process_index == 0:
            run.enter_context(lock_output_dir(report.output))
            if checkpoint:
                move_later_aside(report.output, step_of(Path(checkpoint)))
            report.begin(training, blocks, *lines)
        model, _ = build_model(args, training, folder, first_new)
        if args.adapter:
            load_adapter(model, Path(args.adapter))
        trainer = build_trainer(training, model, blocks, held_out, report)
        trainer.signals = run.enter_context(collect_signals())
        trainer.train(checkpoint)
        atexit.register(training.distributed_state.destroy_process_group)  # an exit may abort else
        if trainer.stopping():
            report.stopped(trainer)
            raise SystemExit(128 + (trainer.signals or STOPPING)[0])
        trainer.save_model()
        if training.process_index == 0:
            report.finish(trainer.state.log_history, trainer.best_checkpoint())


if __name__ == "__main__" and "__file__" in globals():
    main()
