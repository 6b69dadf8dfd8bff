"""Common Crawl to a clean Traditional Chinese corpus.   <- one line: what it does

<paragraphs: the manual: what goes in, what comes out, how it works in a few sentences, sources>

A run of a minute on any CPU (this command was run):
    python filter_cc.py --input data/sample
The real run:
    python filter_cc.py --crawl CC-MAIN-2026-30 --target_size 6GB
Cost: <measured, or say that it was not measured>
"""

import argparse
import errno
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import HfArgumentParser

# --- Constants -----------------------------------------------------------------------------------

# --- Arguments -----------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the docstring as it is written and every option's default."""


@dataclass
class Arguments:
    """Every option of the command line; the help text is the documentation."""

    output_dir: str = field(default="outputs/xxx", metadata={"help": "Folder for ...; made if missing."})


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


# --- The model's folder ---------------------------------------------------------------------------


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
        folder = Path(snapshot_download(name_or_path, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except (GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        gated = isinstance(error, GatedRepoError)
        reason = "the model is gated" if gated else "the hub does not hand it out or is out of reach"
        raise UserError(
            f"{option} {name_or_path}: {reason}; accept the licence on "
            f"https://huggingface.co/{name_or_path}, run hf auth login and try again; without it, "
            f"{option} data/sample/tiny-llama tries the whole pipeline"
        ) from error
    if not (folder / "config.json").is_file():
        raise UserError(f"{option} {name_or_path}: the repository has no config.json; not a model")
    return folder


# --- Main ----------------------------------------------------------------------------------------
