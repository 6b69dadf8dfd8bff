"""What the tests of whole training runs share: a little text, a short command, ways to stop it."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import train_pt

TINY = ROOT / "data" / "sample" / "tiny-llama"
DRAW = train_pt.Report.draw


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A little text: 24 documents of several lengths, some 33 blocks of 32 tokens."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    words = ["春天的花開在山上", "人們從早到晚走過河邊的小路", "看見雲影與水光。"]
    rows = [{"text": f"第{n}篇。" + words[n % 3] * (n % 4 + 1)} for n in range(24)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def short_run(text: Path, *options: object, name: object = "pt") -> list[str]:
    """The options of a run of 12 steps, a pass and a half."""
    words = {
        "--model_name_or_path": TINY,
        "--dataset": text,
        "--output_dir": name,
        "--base_vocab_size": 800,
        "--block_size": 32,
        "--per_device_train_batch_size": 2,
        "--gradient_accumulation_steps": 2,
        "--max_steps": 12,
        "--save_steps": 5,
        "--eval_steps": 4,
        "--logging_steps": 1,
        "--learning_rate": 0.01,
        "--sample_tokens": 4,
        "--probes": "false",  # as long as the whole run; test_train_probes.py turns them on
    }
    given = [str(option) for option in options]
    return [str(w) for pair in words.items() if pair[0] not in given for w in pair] + given


@pytest.fixture
def command(text, tmp_path, monkeypatch):
    """The options of a short run into a folder of this test. The chart, half the time of so short
    a run, is drawn only where a test puts DRAW back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_pt.Report, "draw", lambda *args: None)
    return partial(short_run, text)


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def metrics(folder: str) -> list[dict]:
    """Every line of a run's metrics.jsonl."""
    lines = Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


class Killed(BaseException):
    """Ends a run as kill -9 does: nothing is saved."""


def at_step(monkeypatch, step: int, action) -> None:
    """Do something once in a run, after the given step."""
    log = train_pt.PackedTraining.log

    def watch(self, logs, *args, **kwargs):
        log(self, logs, *args, **kwargs)
        if self.state.global_step == step and "loss" in logs:
            monkeypatch.setattr(train_pt.PackedTraining, "log", log)
            action()

    monkeypatch.setattr(train_pt.PackedTraining, "log", watch)


def kill():
    raise Killed


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def killed_at(monkeypatch, step: int, options: list[str]) -> None:
    """Train until the given step, then end as kill -9 does."""
    at_step(monkeypatch, step, kill)
    with pytest.raises(Killed):
        train_pt.main(options)


def default_signals() -> None:
    """In a new process: nohup, and a shell's & without job control, have it ignore these two."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def launch(options: list[str], saves: int, *launcher: str) -> subprocess.Popen:
    """The real program, in a process group of its own, once it has saved so many checkpoints more.
    """
    before = {*train_pt.checkpoints(Path("pt"))}
    running = subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "train_pt.py"), *options],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=default_signals, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.time() + 120
    while len({*train_pt.checkpoints(Path("pt"))} - before) < saves and time.time() < deadline:
        time.sleep(0.05)
    return running
