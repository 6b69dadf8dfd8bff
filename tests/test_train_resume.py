"""Stopped runs go on to the same weights, bit for bit; what breaks falls back."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from train_support import Killed, at_step, kill, metrics, same, terminate, weights

import train_pt

pytest_plugins = ["train_support"]
torch.set_num_threads(1)
WHOLE: dict[tuple, dict[str, torch.Tensor]] = {}


@pytest.fixture
def whole(command):
    """The weights of the undisturbed run, trained once for each set of options."""

    def run(*options: str) -> dict[str, torch.Tensor]:
        if options not in WHOLE:
            train_pt.main(command(*options, name="whole"))
            WHOLE[options] = weights("whole")
        return WHOLE[options]

    return run


@pytest.mark.parametrize(
    ("stop", "step", "options"),
    [
        (kill, 8, []),  # goes on from step 5
        (kill, 11, ["--lora_dropout", "0.3"]),  # from step 10, in the second pass
        (terminate, 11, []),  # on the last step
        (kill, 7, ["--optim", "adamw_8bit", "--lora_dropout", "0.3"]),
        (kill, 7, ["--optim", "paged_adamw_8bit"]),
        (terminate, 7, ["--lora_dropout", "0.3"]),
        (terminate, 3, ["--optim", "adamw_8bit", "--activation_checkpointing", "true"]),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_stopped_run_goes_on_to_the_same_weights_bit_for_bit(
    stop, step, options, command, whole, monkeypatch, capsys
):
    expected = whole(*options)
    at_step(monkeypatch, step, stop)
    with pytest.raises((Killed, SystemExit)) as stopped:
        train_pt.main(command(*options))
    if stop is terminate:
        assert stopped.value.code == 143
        assert f"stopped at step {step + 1} and saved" in capsys.readouterr().out
        assert Path(f"pt/checkpoint-{step + 1}").is_dir()
    assert not Path("pt/adapter_model.safetensors").exists(), "looks finished"
    train_pt.main(command(*options))
    assert same(weights("pt"), expected)
    assert [row["step"] for row in metrics("pt") if "loss" in row] == list(range(1, 13))


def test_kill_9_and_ctrl_c_on_the_real_program(command, whole):
    program = [sys.executable, str(ROOT / "train_pt.py"), *command("--save_steps", "1")]
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        saved = len(list(Path("pt").glob("checkpoint-*")))
        running = subprocess.Popen(
            program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        deadline = time.time() + 120
        before = set(Path("pt").glob("checkpoint-*"))
        while set(Path("pt").glob("checkpoint-*")) <= before and time.time() < deadline:
            time.sleep(0.05)
        running.send_signal(number)
        output = running.communicate()[0]
        assert running.returncode == code, output
        assert "Traceback" not in output, (output, saved)
    train_pt.main(command("--save_steps", "1"))
    assert same(weights("pt"), whole())


def test_a_broken_checkpoint_falls_back_to_the_one_before(command, whole, monkeypatch, capsys):
    at_step(monkeypatch, 11, kill)
    with pytest.raises(Killed):
        train_pt.main(command())
    optimizer = Path("pt/checkpoint-10/optimizer.pt")
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1
    optimizer.write_bytes(content)
    train_pt.main(command())
    assert "checkpoint-10 is broken" in capsys.readouterr().out
    assert same(weights("pt"), whole())


def test_a_full_disk_keeps_the_last_good_checkpoint(command, whole, monkeypatch, capsys):
    save = torch.save

    def full(thing, path, *args, **kwargs):
        if "checkpoint-10" in str(path):
            raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")
        save(thing, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(SystemExit) as stopped:
            train_pt.main(command())
    assert stopped.value.code == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "checkpoint-10 cannot be written" in message
    assert "the last good checkpoint is pt/checkpoint-5" in message
    assert [p.name for p in Path("pt").glob("checkpoint*")] == ["checkpoint-5"]
    train_pt.main(command())
    assert same(weights("pt"), whole())


@pytest.mark.parametrize("step", [8, 12], ids=["in the middle", "at the end"])
def test_a_signal_during_an_evaluation_saves_at_once_and_the_end_is_measured_later(
    step, command, whole, monkeypatch
):
    options = ["--per_device_eval_batch_size", "1", "--eval_fraction", "0.2"]
    expected, batches = whole(*options), []
    evaluate, collate = train_pt.PackedTraining.evaluate, train_pt.Collate.__call__

    def interrupted(trainer, *args, **kwargs):
        def watch(self, blocks):
            batches.append(len(blocks))
            if len(batches) == 2:
                terminate()
            return collate(self, blocks)

        if trainer.state.global_step == step:
            monkeypatch.setattr(train_pt.Collate, "__call__", watch)
        return evaluate(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train_pt.PackedTraining, "evaluate", interrupted)
        with pytest.raises(SystemExit) as stopped:
            train_pt.main(command(*options))
    monkeypatch.setattr(train_pt.Collate, "__call__", collate)
    assert stopped.value.code == 143
    assert batches == [1, 1], "it went on evaluating"
    assert Path(f"pt/checkpoint-{step}").is_dir()
    assert not Path("pt/adapter_model.safetensors").exists(), "looks finished"
    train_pt.main(command(*options))
    assert same(weights("pt"), expected)
    measured = [row["step"] for row in metrics("pt") if "eval_loss" in row]
    assert measured == ([4, 12] if step == 8 else [4, 8, 12])
