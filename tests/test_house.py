"""What holds the four standalone scripts together as one author's work."""

import argparse
import ast
import importlib
import inspect
import io
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = ["filter_cc.py", "extend_vocab.py", "train_pt.py", "merge_lora.py"]


def definitions(script: str) -> dict[str, str]:
    """Return {name: source} of a script's top-level functions and classes."""
    source = (ROOT / script).read_text()
    nodes = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    return {node.name: ast.get_source_segment(source, node) for node in nodes}


@pytest.mark.parametrize(
    ("name", "scripts"),
    [
        ("HelpFormatter", SCRIPTS),
        ("UserError", SCRIPTS),
        ("user_errors", SCRIPTS),
        ("parse_args", ["filter_cc.py", "extend_vocab.py", "merge_lora.py"]),
        ("find_model", ["extend_vocab.py", "train_pt.py", "merge_lora.py"]),
        ("refuse_twice", ["filter_cc.py", "extend_vocab.py", "merge_lora.py"]),
        ("ignore_write_errors", ["extend_vocab.py", "train_pt.py", "merge_lora.py"]),
        ("weight_files", ["extend_vocab.py", "train_pt.py", "merge_lora.py"]),
        ("fingerprint", ["extend_vocab.py", "train_pt.py", "merge_lora.py"]),
        ("llama_shapes", ["extend_vocab.py", "merge_lora.py"]),
        ("refuse_others", ["extend_vocab.py", "merge_lora.py"]),
        ("refuse", ["extend_vocab.py", "train_pt.py", "merge_lora.py"]),
        ("pickled", ["extend_vocab.py", "train_pt.py", "merge_lora.py"]),
        ("build_aside", ["extend_vocab.py", "merge_lora.py"]),
        ("take_lock", SCRIPTS),
    ],
)
def test_a_helper_that_scripts_share_stands_identically_in_each(name, scripts):
    copies = {definitions(script)[name] for script in scripts}
    assert len(copies) == 1, f"{name} differs between {', '.join(scripts)}"


@pytest.mark.parametrize(
    ("name", "scripts"),
    [
        ("NO_LOCKS", SCRIPTS),
        ("FOREIGN", ["extend_vocab.py", "train_pt.py", "merge_lora.py"]),
        ("TEXT_SUFFIXES", ["extend_vocab.py", "train_pt.py"]),
        ("AGAIN", ["extend_vocab.py", "merge_lora.py"]),
    ],
)
def test_a_constant_that_scripts_share_stands_identically_in_each(name, scripts):
    lines = {re.search(f"^{name} = .+", (ROOT / s).read_text(), re.MULTILINE) for s in scripts}
    assert len({line.group() for line in lines}) == 1


@pytest.mark.parametrize(
    ("script", "writer"),
    [("filter_cc", lambda m, path, text: m.write_whole(path, json.dumps(text, ensure_ascii=False))),
     ("extend_vocab", lambda m, path, text: m.save_json(path, text)),
     ("train_pt", lambda m, path, text: m.write_json(path, text)),
     ("merge_lora", lambda m, path, text: m.save_json(path, text))])
def test_a_name_that_is_not_utf_8_is_printed_and_recorded(script, writer, tmp_path, monkeypatch):
    """A file named in Big5, or any Chinese name under LC_ALL=C."""
    module, name = importlib.import_module(script), os.fsdecode("中文.jsonl".encode("big5"))
    printed = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", printed)
    with module.user_errors():
        print(name, flush=True)
    assert rb"\udca4" in printed.buffer.getvalue()
    writer(module, tmp_path / "run.json", name)
    assert json.loads((tmp_path / "run.json").read_text("utf-8")) == name


def test_every_name_defined_in_several_scripts_is_a_known_copy():
    """A second author's version of the same helper would show up here."""
    seen: dict[str, set[str]] = {}
    for script in SCRIPTS:
        for name, source in definitions(script).items():
            seen.setdefault(name, set()).add(source)
    differing = {name for name, sources in seen.items() if len(sources) > 1}
    assert differing <= {"main", "check", "Arguments", "parse_args"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_sections_come_in_the_same_order(script):
    titles = re.findall(r"^# --- (.+?) -+$", (ROOT / script).read_text(), flags=re.MULTILINE)
    assert titles[:3] == ["Constants", "Arguments", "Errors"]
    assert titles[-1] == "Main"


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_imports_another_or_a_local_module(script):
    tree = ast.parse((ROOT / script).read_text())
    local = {path.stem for path in ROOT.glob("*.py")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not local & {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module.split(".")[0] not in local


def private_names() -> dict[str, list]:
    """The private names of dependencies that the scripts use, and all that must have them."""
    import torch
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.executor.ray import RayPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from transformers import Trainer, TrainingArguments

    return {
        "_disable_dynamo": [torch],
        "_get_help_string": [argparse.ArgumentDefaultsHelpFormatter],
        "_internal_call": [Trainer],
        "_load_from_checkpoint": [Trainer],
        "_n_gpu": [TrainingArguments],
        "_parameters": [MinhashDedupSignature],
        "_run_for_rank": [LocalPipelineExecutor, RayPipelineExecutor],
        "_save_checkpoint": [Trainer]}


def test_every_private_name_of_a_dependency_is_listed_and_still_there():
    """A name that a dependency has renamed would be set or overridden to no effect."""
    found = set()
    for script in SCRIPTS:
        for node in ast.walk(ast.parse((ROOT / script).read_text())):
            used = [getattr(node, key, None) for key in ("attr", "arg", "name", "value")]
            found |= {name for name in used if re.fullmatch(r"_[a-z]\w+", str(name))}
    known = private_names()
    assert found - {"_fields", "_make"} == known.keys()  # those two, namedtuple promises
    for name, owners in known.items():
        for owner in owners:
            assert hasattr(owner, name) or re.search(rf"\b{name}\b", inspect.getsource(owner))


@pytest.mark.parametrize("script", SCRIPTS)
def test_main_is_a_table_of_contents(script):
    main = definitions(script)["main"]
    assert len(main.splitlines()) <= 45


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_teaches_without_loading_torch(script):
    """--help answers at once because nothing heavy is imported for it."""
    code = f"""if True:
        import runpy, sys
        sys.argv = [{script!r}, "--help"]
        try:
            runpy.run_path({script!r}, run_name="__main__")
        except SystemExit as done:
            assert not done.code
        heavy = {{"torch", "datasets", "peft", "datatrove", "matplotlib", "ray"}} & set(sys.modules)
        assert not heavy, heavy
    """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for option in ("--output_dir", "--help"):
        assert option in done.stdout
    assert "(default: " in done.stdout
    for option in re.findall(r"--no_\w+", done.stdout):
        assert f"The opposite of --{option[5:]}." in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_option_is_two_lines_and_exit_code_2(script, run_script):
    done = run_script(script, "--no_such_option", "1", check=False)
    assert done.returncode == 2
    assert "--no_such_option" in done.stderr
    assert "Traceback" not in done.stderr
