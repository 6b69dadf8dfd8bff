"""What a user with wrong hands sees: one line that names the argument, its value and the remedy.

TABLE reads as documentation: what the user did, the command, what the line says, the exit code (2
for a mistake, 1 for a disk that is full or may not be written, 130 for Ctrl-C). The working
directory holds what `wrong_hands` lays out. Further mistakes stand with the script that they belong
to: killed in the middle in test_filter_cc.py, test_extend_vocab.py, test_train_resume.py and
test_merge_lora.py ("killed", "ctrl_c"), a server that stops answering in test_filter_cc.py, a loss
gone wrong in test_train_run.py, an old Python in the Makefile.
"""

import ctypes
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import fields
from typing import get_args, get_type_hints

import huggingface_hub
import pytest
import torch
from conftest import ROOT
from datatrove.io import DataFolder
from safetensors.torch import save_file

SCRIPTS = ["filter_cc.py", "extend_vocab.py", "train_pt.py", "merge_lora.py"]
TINY = str(ROOT / "data" / "sample" / "tiny-llama")
EXTEND = ["--base_model", TINY, "--corpus", "prose.txt", "--vocab_size", "6500"]
TRAIN = ["--model_name_or_path", TINY, "--dataset", "prose.txt", "--block_size", "64"]
MERGE = ["--adapter", "adapter"]


def row(script: str, did: str, options: list[str], says: list[str], code: int = 2):
    """A row of the table, named after what the user did."""
    return pytest.param(script, options, says, code, id=f"{script[:-3]}: {did}")


F, E, T, M = SCRIPTS
TABLE = [
    # Wrong order: the input is the output of a script that was not run yet.
    row(E, "before filter_cc.py", ["--base_model", TINY, "--corpus", "data/cc_filtered"],
        ["--corpus data/cc_filtered", "python filter_cc.py"]),
    row(T, "before extend_vocab.py", [], ["outputs/extended", "python extend_vocab.py"]),
    row(T, "before filter_cc.py", TRAIN[:2], ["data/cc_filtered", "python filter_cc.py"]),
    row(M, "before train_pt.py", [], ["--adapter outputs/pt", "python train_pt.py"]),
    row(M, "before training ended", ["--adapter", "unfinished"], ["unfinished/checkpoint-100"]),
    # Wrong folders and files.
    row(F, "a path that is not there", ["--input", "gone"], ["--input gone", ".wet.gz"]),
    row(F, "an empty folder", ["--input", "empty"], ["--input empty", ".wet.gz"]),
    row(F, "a file of another kind", ["--input", "note.md"], ["note.md", ".wet.gz"]),
    row(F, "a model instead of pages", ["--input", TINY], [f"--input {TINY}", ".wet.gz"]),
    row(F, "a pattern that fits nothing", ["--input", "*.warc"],
        ["--input *.warc", "check the path"]),
    row(E, "a path that is not there", [*EXTEND[:3], "gone.txt"], ["--corpus gone.txt"]),
    row(E, "an empty folder", [*EXTEND[:3], "empty"], ["--corpus empty"]),
    row(E, "a PDF", [*EXTEND[:3], "book.pdf"], ["--corpus book.pdf", ".txt"]),
    row(E, "a folder that is no model", ["--base_model", "empty"], ["config.json"]),
    row(E, "an adapter as base", ["--base_model", "adapter"],
        ["--base_model adapter", "config.json"]),
    row(E, "a report text that is not there", [*EXTEND, "--eval_text", "gone"],
        ["--eval_text gone"]),
    row(T, "a folder that is no model", ["--model_name_or_path", "empty"],
        ["empty", "config.json"]),
    row(T, "a folder without text", [*TRAIN[:2], "--dataset", "empty"], ["empty", ".parquet"]),
    row(T, "a model instead of text", [*TRAIN[:2], "--dataset", TINY], ["--dataset", ".parquet"]),
    row(T, "a checkpoint that is not there", [*TRAIN, "--resume_from_checkpoint", "gone"],
        ["--resume_from_checkpoint gone", "auto"]),
    row(M, "a folder that is no adapter", ["--adapter", "empty"], ["empty", "adapter_config.json"]),
    row(M, "a model as adapter", ["--adapter", TINY], [f"--adapter {TINY}", "adapter_config.json"]),
    row(M, "an adapter as base", [*MERGE, "--base_model", "adapter"], ["adapter", "config.json"]),
    row(M, "a text that is not there", [*MERGE, "--verify", "gone.txt"], ["--verify gone.txt"]),
    # Broken contents.
    row(F, "a file that only ends in .wet", ["--input", "note.wet"],
        ["--input note.wet", "no page could be read", "foreign bytes"]),
    row(F, "JSON Lines without text", ["--input", "untold.jsonl"],
        ["--input untold.jsonl", "row without a text"]),
    row(F, "a broken Parquet file", ["--input", "bad.parquet"],
        ["--input bad.parquet", "unreadable"]),
    row(E, "a broken Parquet file", [*EXTEND[:3], "bad.parquet"], ["--corpus bad.parquet"]),
    row(E, "JSON Lines without text", [*EXTEND[:3], "untold.jsonl"], ["untold.jsonl", "text"]),
    row(E, "text in Big5", [*EXTEND[:3], "big5.txt"], ["big5.txt", "UTF-8"]),
    row(E, "English only", [*EXTEND[:3], "english.txt"], ["--corpus english.txt", "ASCII"]),
    row(E, "half a download", ["--base_model", "cut", *EXTEND[2:]], ["--base_model cut", "cut"]),
    row(T, "a broken Parquet file", [*TRAIN[:3], "bad.parquet"], ["--dataset bad.parquet"]),
    row(T, "JSON Lines without text", [*TRAIN[:3], "untold.jsonl"], ["untold.jsonl", "text"]),
    row(T, "numbers for text", [*TRAIN[:3], "numbers.jsonl"], ["--dataset numbers.jsonl"]),
    row(T, "text in Big5", [*TRAIN[:3], "big5.txt"], ["--dataset big5.txt"]),
    row(T, "an empty file", [*TRAIN[:3], "empty.txt"], ["--dataset empty.txt", "no text"]),
    row(T, "half a download", ["--model_name_or_path", "cut", *TRAIN[2:]],
        ["--model_name_or_path cut", "model.safetensors"]),
    row(M, "half a download", [*MERGE, "--base_model", "cut"], ["--base_model cut", "again"]),
    row(M, "an adapter that names no base", ["--adapter", "nameless"], ["pass --base_model"]),
    # Output folders.
    row(F, "output to a file", ["--output_dir", "note.md"], ["--output_dir note.md", "a file"]),
    row(F, "output into another program's Parquet",
        ["--input", "note.wet", "--output_dir", "theirs"],
        ["--output_dir theirs", "another program's"]),
    row(F, "output = input", ["--input", "pages", "--output_dir", "pages"], ["--output_dir pages"]),
    row(E, "output to a file", [*EXTEND, "--output_dir", "note.md"], ["--output_dir note.md"]),
    row(E, "output = input", [*EXTEND, "--output_dir", TINY], [f"--output_dir {TINY}"]),
    row(T, "output to a file", [*TRAIN, "--output_dir", "note.md"], ["--output_dir note.md"]),
    row(T, "output = input", [*TRAIN, "--output_dir", TINY], [f"--output_dir {TINY}"]),
    row(T, "cache in a file", [*TRAIN, "--cache_dir", "note.md"], ["--cache_dir note.md"]),
    row(M, "output to a file", [*MERGE, "--output_dir", "note.md"], ["--output_dir note.md"]),
    row(M, "output = adapter", [*MERGE, "--output_dir", "adapter"], ["adapter, which is read"]),
    row(M, "output = base", [*MERGE, "--output_dir", TINY], [f"--output_dir {TINY}"]),
    row(M, "output above the input", [*MERGE, "--output_dir", "."], ["--output_dir .", "read"]),
    # No network, and no access to what lies behind it.
    row(F, "a crawl that cannot be reached", ["--crawl", "CC-MAIN-2099-99"],
        ["--crawl CC-MAIN-2099-99", "wet.paths.gz", "internet"]),
    row(F, "an address out of reach", ["--input", "https://data.commoncrawl.org/a.warc.wet.gz"],
        ["--input https://", "network"]),
    row(F, "S3 without credentials", ["--input", "s3://commoncrawl/a.warc.wet.gz"],
        ["--input s3://", "https://data.commoncrawl.org/"]),
    row(F, "a protocol that nobody knows", ["--input", "xyz://a/b.wet"], ["--input xyz://", "xyz"]),
    row(E, "no network", [], ["meta-llama/Llama-2-7b-hf", "hf auth login", "make demo"]),
    row(E, "a model's web page", ["--base_model", "https://huggingface.co/a/b"], ["a hub id"]),
    row(T, "no network", ["--model_name_or_path", "a/b"], ["--model_name_or_path a/b", "hf auth"]),
    row(M, "no network", ["--adapter", "a/b"], ["--adapter a/b", "hub"]),
    row(M, "no network for the base", [*MERGE, "--base_model", "a/b"],
        ["--base_model a/b", "hf auth"]),
    # What the machine lacks.
    row(F, "Slurm where there is none", ["--input", "pages", "--executor", "slurm"],
        ["--executor slurm", "sbatch"]),
    row(T, "TF32 without a GPU", [*TRAIN, "--tf32", "true"], ["--tf32", "GPU"]),
    row(T, "both bf16 and fp16", [*TRAIN, "--fp16", "true"], ["fp16 and bf16"]),
    row(T, "DeepSpeed", [*TRAIN, "--deepspeed", "ds.json"], ["deepspeed"]),
    row(T, "a logger that is not installed", [*TRAIN, "--report_to", "clearml"], ["clearml"]),
    row(T, "a logger that nobody knows", [*TRAIN, "--report_to", "nowhere"], ["nowhere"]),
    # Values out of range, words for numbers, words for choices.
    row(F, "a share above 1", ["--min_han", "7"], ["--min_han 7", "0 to 1"]),
    row(F, "a size without number", ["--target_size", "lots"], ["--target_size lots", "6GB"]),
    row(F, "a size of nothing", ["--target_size", "0GB"], ["--target_size 0GB", "6GB"]),
    row(F, "an executor that nobody knows", ["--executor", "k8s"], ["--executor", "slurm"]),
    row(F, "a picture of no known format", ["--input", "pages", "--picture", "a.xyz"], ["a.xyz"]),
    row(E, "too small a vocabulary", [*EXTEND[:5], "5"], ["--vocab_size 5", "1000"]),
    row(E, "more pieces than the corpus has", [*EXTEND[:5], "61388"],
        ["--vocab_size 61388", "lower"]),
    row(E, "an init that nobody knows", ["--init", "zeros"], ["mean_subtoken"]),
    row(E, "a weight too many", [*EXTEND, "--corpus_weight", "1", "2"], ["--corpus_weight"]),
    row(T, "a block of 3", [*TRAIN[:4], "--block_size", "3"], ["--block_size 3"]),
    row(T, "a block longer than the model", [*TRAIN[:4], "--block_size", "99999"],
        ["99999", "4096"]),
    row(T, "a group longer than two blocks", [*TRAIN, "--group_size", "129"],
        ["--group_size 129", "128"]),
    row(T, "a schedule that nobody knows", [*TRAIN, "--lr_scheduler_type", "up"], ["up", "cosine"]),
    row(T, "an optimizer that nobody knows", [*TRAIN, "--optim", "best"], ["best", "adamw_torch"]),
    row(T, "a word for yes or no", [*TRAIN, "--train_norms", "maybe"], ["--train_norms", "maybe"]),
    row(T, "no JSON", [*TRAIN, "--activation_checkpointing_kwargs", "{"], ["JSON object"]),
    row(T, "a picture of no known format", [*TRAIN, "--picture", "a.xyz", "--max_steps", "1",
        "--gradient_accumulation_steps", "1", "--sample_tokens", "0", "--eval_strategy", "no"],
        ["a.xyz"]),
    row(M, "a format that nobody knows", ["--dtype", "int8"], ["bf16"]),
    row(M, "a repository's name with blanks", [*MERGE, "--push_to_hub", "my model"],
        ["--push_to_hub my model"]),
    # Typing.
    row(F, "an option of another program", ["--inputs", "pages"],
        ["unknown option: --inputs", "--input?"]),
    row(E, "an option of another program", ["--vocab", "8000"],
        ["unknown option: --vocab", "--vocab_size?"]),
    row(T, "an option of another program", ["--lora_r", "8"],
        ["unknown option: --lora_r", "--lora_rank?"]),
    row(M, "an option of another program", ["--base", "a"],
        ["unknown option: --base", "--base_model?"]),
    row(T, "a path without its option", ["outputs/extended"], ["unknown option: outputs/extended"]),
]  # fmt: skip


@pytest.fixture
def wrong_hands(tmp_path, monkeypatch):
    """A folder with what a user might point a script at by mistake, and no network."""
    def unreachable(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    DataFolder.clear_instance_cache()  # it remembers what a relative path was elsewhere
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "adapter", "nameless", "unfinished/checkpoint-100", "theirs"):
        (tmp_path / folder).mkdir(parents=True)
    for name, content in {
        "note.md": "臺灣的山", "note.wet": "臺灣的山", "book.pdf": "%PDF", "empty.txt": "",
        "bad.parquet": "PAR1 is how it begins, and then nothing", "english.txt": "no Han\n",
        "untold.jsonl": '{"title": "山"}\n', "numbers.jsonl": '{"text": 5}\n',
        "theirs/a.parquet": "PAR1", "unfinished/checkpoint-100/run.json": "{}",
        "nameless/adapter_config.json": "{}", "nameless/adapter_model.safetensors": "",
    }.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "big5.txt").write_bytes("臺灣的山".encode("big5"))
    prose = sorted((ROOT / "data" / "sample" / "pages").glob("good_[ab]*"))
    (tmp_path / "prose.txt").write_text("".join(page.read_text() for page in prose))
    shutil.copytree(TINY, tmp_path / "cut")
    config = {"peft_type": "LORA", "base_model_name_or_path": TINY, "r": 2, "lora_alpha": 4}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    layer, width = "base_model.model.model.layers.0.self_attn.q_proj", 128
    shapes = {f"{layer}.lora_A.weight": (2, width), f"{layer}.lora_B.weight": (width, 2)}
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "pages").mkdir()
    shutil.copy(next((ROOT / "data" / "sample").glob("*.wet.gz")), tmp_path / "pages")
    return tmp_path


def refused(script: str, options: list[str], capsys) -> tuple[str, int]:
    """The last line that a user sees and the exit code; a traceback fails the test."""
    module = importlib.import_module(script.removesuffix(".py"))
    with pytest.raises(SystemExit) as stop:
        module.main(options)
    return capsys.readouterr().err.strip().splitlines()[-1], stop.value.code


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("script", "options", "says", "code"), TABLE)
def test_a_mistake_is_one_line(script, options, says, code, wrong_hands, capsys):
    line, ended = refused(script, options, capsys)
    assert "error: " in line
    for words in says:
        assert words in line
    assert ended == code
    assert not [*wrong_hands.glob("outputs/*")], "a refused run leaves nothing behind"


# --- Numbers -------------------------------------------------------------------------------------

NUMBERS = {"a word": "many", "negative": "-1", "zero": "0", "huge": "9" * 18, "not a number": "nan"}
# What is accepted beside the ordinary, and why that is right; all else is refused with code 2.
ACCEPTED = {
    # A limit that no page, file or text reaches is no limit.
    F: {"limit_files": ["huge"], "tasks": ["huge"], "min_length": ["huge"],
        "max_mainland": ["negative", "zero", "huge"],  # Taiwan's words count against mainland ones
        "max_hongkong": ["negative", "zero", "huge"],
        "max_converted": ["zero", "huge"], "max_spam": ["zero", "huge"],
        "max_spun": ["zero", "huge"], "max_terms": ["zero", "huge"]} | {
        share: ["zero"] for share in (
            "min_han", "max_kana_hangul", "min_traditional", "max_broken", "max_rare", "max_apart",
            "max_cantonese", "max_top", "max_digits", "max_pronouns", "max_repeated",
            "min_distinct", "min_closing")},
    E: {"max_chars": ["huge"], "seed": ["zero"]},
    T: {"eval_fraction": ["zero"], "lora_dropout": ["zero"], "seed": ["zero"],
        "learning_rate": ["zero"], "embedding_learning_rate": ["zero"],
        "norm_learning_rate": ["zero"], "sample_tokens": ["zero"], "lora_alpha": ["huge"],
        "per_device_train_batch_size": ["huge"], "per_device_eval_batch_size": ["huge"],
        "gradient_accumulation_steps": ["huge"],
        "save_total_limit": ["negative", "zero", "huge"],  # Transformers' way to say: keep all
        "eval_steps": ["huge"], "save_steps": ["huge"],
        "logging_steps": ["huge"]},
    M: {"max_shard_size": ["huge"]},
}  # fmt: skip
FIRST_WORK = {F: "list_inputs", E: "read_corpora", T: "tokenize", M: "make_plan"}
ORDINARY = {F: [], E: EXTEND, T: TRAIN, M: MERGE}


def numbers() -> list:
    """Every numeric option of the four scripts with every odd value."""
    rows = []
    for script in SCRIPTS:
        module = importlib.import_module(script.removesuffix(".py"))
        hints = get_type_hints(module.Arguments)
        for option in (option.name for option in fields(module.Arguments)):
            kinds = {hints[option], *get_args(hints[option])}
            for value in NUMBERS if kinds & {int, float} else []:
                rows.append(pytest.param(script, option, value))
    return rows


@pytest.mark.parametrize(("script", "option", "value"), numbers())
def test_a_number_out_of_range_is_refused_before_any_work(
    script, option, value, wrong_hands, monkeypatch, capsys
):
    class Begun(BaseException):
        """All checks are passed: the work would begin."""

    def begin(*args, **kwargs):
        raise Begun

    module = importlib.import_module(script.removesuffix(".py"))
    monkeypatch.setattr(module, FIRST_WORK[script], begin)
    options = [*ORDINARY[script], f"--{option}", NUMBERS[value]]
    if value in ACCEPTED[script].get(option, []):
        with pytest.raises(Begun):
            module.main(options)
        return
    line, code = refused(script, options, capsys)
    assert code == 2
    assert "error: " in line
    assert f"--{option}" in line


# --- Access --------------------------------------------------------------------------------------


@contextmanager
def permissions_bite():
    """Root may read and write everything, but for two capabilities; without them it is a user."""
    if os.geteuid():
        yield
        return
    if not sys.platform.startswith("linux"):
        pytest.skip("root reads and writes everything here")
    libc, header = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice
    assert libc.capget(header, sets) == 0
    before, sets[0] = sets[0], sets[0] & ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = before
        assert libc.capset(header, sets) == 0


LOCKED = [  # what is locked: unreadable, or, where it ends in a slash, not to be written to
    row(F, "pages", ["--input", "pages"], ["--input pages", "Permission denied"]),
    row(F, "ro/", ["--input", "pages", "--output_dir", "ro/o"], ["ro/o", "denied"], 1),
    row(E, "prose.txt", EXTEND, ["prose.txt", "denied"], 1),
    row(E, "own/model.safetensors", ["--base_model", "own", *EXTEND[2:]],
        ["--base_model own", "model.safetensors"]),
    row(E, "ro/", [*EXTEND, "--output_dir", "ro/n"], ["--output_dir ro/n", "denied"], 1),
    row(T, "prose.txt", TRAIN, ["prose.txt", "denied"], 1),
    row(T, "own/config.json", ["--model_name_or_path", "own", *TRAIN[2:]],
        ["--model_name_or_path own", "denied"]),
    row(T, "empty/", [*TRAIN, "--cache_dir", "empty/cache"], ["empty/cache", "denied"], 1),
    row(T, "ro/", [*TRAIN, "--output_dir", "ro/n", "--cache_dir", "c"], ["ro/n"], 1),
    row(M, "adapter/adapter_config.json", MERGE, ["adapter_config.json", "denied"], 1),
    row(M, "adapter/adapter_model.safetensors", MERGE, ["adapter_model.safetensors"]),
    row(M, "ro/", [*MERGE, "--output_dir", "ro/n"], ["--output_dir ro/n", "denied"], 1),
]  # fmt: skip


@pytest.mark.parametrize(("script", "options", "says", "code"), LOCKED)
def test_no_access_is_one_line(script, options, says, code, wrong_hands, capsys, request):
    locked = request.node.callspec.id.split(": ")[1]
    shutil.copytree(TINY, wrong_hands / "own")
    (wrong_hands / "ro").mkdir()
    (wrong_hands / locked).chmod(0o555 if locked.endswith("/") else 0)
    try:
        with permissions_bite():
            line, ended = refused(script, options, capsys)
    finally:
        (wrong_hands / locked).chmod(0o755)
    assert "error: " in line
    for words in says:
        assert words in line
    assert ended == code


def test_a_gated_model_says_where_to_accept_the_licence(wrong_hands, monkeypatch, capsys):
    """The hub's answer to someone who has not accepted Llama 2's licence."""
    from huggingface_hub.errors import GatedRepoError

    def gated(*args, **kwargs):
        error = GatedRepoError.__new__(GatedRepoError)  # made by the hub from an HTTP answer
        Exception.__init__(error, "403")
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    for script, option in ((E, "--base_model"), (T, "--model_name_or_path")):
        line, code = refused(script, [option, "meta-llama/Llama-2-7b-hf"], capsys)
        assert code == 2
        for words in ("gated", "https://huggingface.co/meta-llama/Llama-2-7b-hf", "hf auth login"):
            assert words in line


def test_no_network_for_the_upload_keeps_the_merged_model(wrong_hands, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_some")
    line, code = refused(M, [*MERGE, "--push_to_hub", "nobody/luojiu"], capsys)
    assert code == 2
    assert "--push_to_hub nobody/luojiu" in line
    assert "hf upload nobody/luojiu" in line


# --- Packages ------------------------------------------------------------------------------------


def test_an_older_transformers_is_one_line_with_the_remedy(wrong_hands, monkeypatch, capsys):
    import transformers

    look_up = type(transformers).__getattr__

    def older(module, name):
        if name == "AttentionInterface":  # new in 4.48
            raise AttributeError(name)
        return look_up(module, name)

    monkeypatch.delattr(transformers, "AttentionInterface", raising=False)
    monkeypatch.setattr(type(transformers), "__getattr__", older)
    line, code = refused(T, [*TRAIN, *SMALL], capsys)
    assert code == 2
    assert "AttentionInterface" in line
    assert "pip install -r requirements.txt" in line


OPTIONAL = [  # a package that is not there, and what the line must advise
    row(E, "pyarrow.parquet", EXTEND, ["pyarrow", "pip install -r requirements.txt"]),
    row(T, "peft", TRAIN, ["peft", "pip install -r requirements.txt"]),
    row(M, "sentencepiece", MERGE, ["sentencepiece", "pip install -r requirements.txt"]),
    row(F, "ray", ["--input", "pages", "--executor", "ray"], ["pip install ray"]),
    row(T, "liger_kernel", [*TRAIN, "--use_liger_kernel", "true"], ["pip install liger-kernel"]),
]  # fmt: skip


@pytest.mark.parametrize(("script", "options", "says", "code"), OPTIONAL)
def test_a_missing_package_is_one_line(
    script, options, says, code, wrong_hands, monkeypatch, capsys, request
):
    monkeypatch.setitem(sys.modules, request.node.callspec.id.split(": ")[1], None)
    line, ended = refused(script, options, capsys)
    assert ended == code
    for words in says:
        assert words in line


# --- The disk, and other runs --------------------------------------------------------------------


@contextmanager
def small_disk(folder, size):
    """A real file system, which only root can mount; the test is skipped otherwise."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


SMALL = ["--max_steps", "2", "--gradient_accumulation_steps", "1", "--eval_strategy", "no"]
FULL = {  # the disk's size, and what is written to it
    F: ("64k", ["--input", "pages"]),
    E: ("64k", [*EXTEND, "--eval_loss", "no"]),
    T: ("3m", [*TRAIN, *SMALL, "--lora_rank", "64"]),
    M: ("1m", MERGE),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_space_left_is_one_line_and_exit_code_1(script, wrong_hands, run_script):
    size, options = FULL[script]
    with small_disk(wrong_hands / "disk", size):
        done = run_script(
            script, *options, "--output_dir", "disk/out", cwd=wrong_hands, check=False)
        assert done.returncode == 1, done.stderr
        line = done.stderr.partition("error: ")[2].splitlines()[0]  # a bar may stand around it
        assert any(word in line for word in ("space", "room", "free")), line
        assert "Traceback" not in done.stderr
        record = wrong_hands / "disk" / "out" / "run.json"
        assert not record.exists() or json.loads(record.read_text())["results"] is None


@pytest.mark.parametrize(
    ("script", "held"),  # what is there once the first run holds the folder
    [(F, "out/.work/settings.json"), (E, ".out.partial/*"), (T, "out/run.json"),
     (M, ".out.partial/*")],
)
def test_a_second_run_into_the_same_folder_is_refused(script, held, wrong_hands):
    """The first is stopped in the middle, as by Ctrl-Z, so that the second finds it at work."""
    options = FULL[script][1]
    command = [sys.executable, str(ROOT / script), *options, "--output_dir", "out"]
    errors = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while first.poll() is None and not any(wrong_hands.glob(held)):
            time.sleep(0.001)
        first.send_signal(signal.SIGSTOP)
        second = subprocess.run(command, timeout=120, check=False, **errors)
        first.send_signal(signal.SIGCONT)
        assert first.wait(120) == 0
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 2
    assert "--output_dir out: another run" in second.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("script", [E, M])
def test_a_folder_that_the_user_has_put_aside_is_left_alone(script, wrong_hands, run_script):
    options = [*FULL[script][1], "--output_dir", "out"]
    (wrong_hands / "out.old").mkdir()
    (wrong_hands / "out.old" / "mine.txt").write_text("last week's")
    run_script(script, *options, cwd=wrong_hands)
    assert (wrong_hands / "out.old" / "mine.txt").exists()
