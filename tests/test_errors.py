"""What a user with wrong hands sees: one line that names the argument, its value and the remedy.

Each row: the script, its options, what the line must say, the exit code. The working directory is
empty but for the files that `wrong_hands` lays out.
"""

import importlib
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

TINY = str(ROOT / "data" / "sample" / "tiny-llama")

TABLE = [
    # wrong order: the input is the output of a script that was not run yet
    ("train_pt.py", [], ["--model_name_or_path outputs/extended", "python extend_vocab.py"], 2),
    ("train_pt.py", ["--model_name_or_path", TINY], ["data/cc_filtered", "python filter_cc.py"], 2),
    ("merge_lora.py", [], ["--adapter outputs/pt", "python train_pt.py"], 2),
    # missing or wrong files and folders
    ("filter_cc.py", ["--input", "gone"], ["--input gone", ".wet.gz"], 2),
    ("filter_cc.py", ["--input", "empty"], ["--input empty", ".wet.gz"], 2),
    ("filter_cc.py", ["--input", "note.md"], ["note.md", ".wet.gz"], 2),
    ("extend_vocab.py", ["--base_model", TINY, "--corpus", "gone.txt"], ["--corpus gone.txt"], 2),
    ("extend_vocab.py", ["--base_model", "empty", "--corpus", "note.md"], ["config.json"], 2),
    ("extend_vocab.py", ["--base_model", TINY, "--corpus", "empty"], ["--corpus empty"], 2),
    ("train_pt.py", ["--model_name_or_path", "empty"], ["empty", "config.json"], 2),
    ("train_pt.py", ["--model_name_or_path", TINY, "--dataset", "empty"], [".parquet"], 2),
    ("merge_lora.py", ["--adapter", "empty"], ["--adapter empty", "adapter_config.json"], 2),
    # corrupt files
    ("extend_vocab.py", ["--base_model", TINY, "--corpus", "bad.parquet"], ["bad.parquet"], 2),
    ("train_pt.py", ["--model_name_or_path", TINY, "--dataset", "bad.parquet"], ["parquet"], 2),
    ("extend_vocab.py", ["--base_model", "cut", "--corpus", "bad.parquet"], ["cut"], 2),
    # values out of range, and words for numbers
    ("filter_cc.py", ["--min_han", "7"], ["--min_han 7", "0 to 1"], 2),
    ("filter_cc.py", ["--target_size", "lots"], ["--target_size lots", "6GB"], 2),
    ("filter_cc.py", ["--workers", "many"], ["--workers"], 2),
    ("extend_vocab.py", ["--base_model", TINY, "--vocab_size", "5"], ["--vocab_size 5"], 2),
    ("extend_vocab.py", ["--init", "zeros"], ["mean_subtoken"], 2),
    ("train_pt.py", ["--lora_rank", "0"], ["--lora_rank 0"], 2),
    ("train_pt.py", ["--block_size", "3"], ["--block_size 3"], 2),
    ("train_pt.py", ["--group_size", "9999"], ["--group_size 9999", "2048"], 2),
    ("merge_lora.py", ["--dtype", "int8"], ["bf16"], 2),
]


@pytest.fixture
def wrong_hands(tmp_path, monkeypatch):
    """A folder with what a user might point a script at by mistake."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.md").write_text("臺灣的山")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 is how it begins, and then nothing")
    shutil.copytree(TINY, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return tmp_path


@pytest.mark.parametrize(("script", "options", "says", "code"), TABLE)
def test_a_mistake_is_one_line(script, options, says, code, wrong_hands, capsys):
    module = importlib.import_module(script.removesuffix(".py"))
    with pytest.raises(SystemExit) as stop:
        module.main(options)
    assert stop.value.code == code
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in line
    for words in says:
        assert words in line
    assert not (wrong_hands / "outputs").exists(), "a refused run leaves nothing behind"


@pytest.mark.parametrize("script", ["filter_cc.py", "extend_vocab.py"])
def test_no_space_left_is_one_line_and_exit_code_1(script, tmp_path):
    """On a real file system of 64 KB, which only root can mount; skipped otherwise."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    options = {
        "filter_cc.py": ["--input", str(ROOT / "data" / "sample")],
        "extend_vocab.py": [
            *("--base_model", TINY, "--vocab_size", "7000", "--eval_loss", "no"),
            *("--corpus", str(tmp_path / "corpus.txt")),
        ],
    }[script]
    prose = [path.read_text() for path in (ROOT / "data" / "sample" / "pages").glob("good_[ab]*")]
    (tmp_path / "corpus.txt").write_text("".join(prose))
    try:
        done = subprocess.run(
            [sys.executable, ROOT / script, *options, "--output_dir", str(disk / "out")],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1, done.stderr
        assert "space" in done.stderr.strip().splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert not (disk / "out" / "run.json").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
