"""Stopped runs go on to the same weights, bit for bit; what breaks falls back."""

import io
import os
import pty
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from train_support import (
    Killed,
    at_step,
    default_signals,
    kill,
    killed_at,
    launch,
    metrics,
    same,
    terminate,
    weights,
)

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
        assert f"stopped; step {step} is saved" in capsys.readouterr().out
        assert Path(f"pt/checkpoint-{step}").is_dir()
    assert not Path("pt/adapter_model.safetensors").exists(), "looks finished"
    train_pt.main(command(*options))
    assert same(weights("pt"), expected)
    assert [row["step"] for row in metrics("pt") if "loss" in row] == list(range(1, 13))


def ended_by_a_signal(monkeypatch, options: list[str], name: str, watch, owner=None) -> None:
    """Train with a method replaced by one that terminates the run."""
    with monkeypatch.context() as patch:
        patch.setattr(owner or train_pt.PackedTraining, name, watch)
        with pytest.raises(SystemExit) as stopped:
            train_pt.main(options)
    assert stopped.value.code == 143


def test_signals_and_kill_9_on_the_real_program(command, whole):
    for signum, code in ((signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGKILL, -9)):
        running = launch(command("--save_steps", "1"), 1)
        running.send_signal(signum)
        output = running.communicate()[0]
        assert running.returncode == code, output
        assert "Traceback" not in output, output
    train_pt.main(command("--save_steps", "1"))
    assert same(weights("pt"), whole())


def test_a_reader_of_the_log_that_ends_first_takes_no_work_with_it(command):
    """As tee does, which the same Ctrl-C ends."""
    running = launch(command("--save_steps", "1", "--max_steps", "200"), 1)
    running.stdout.close()
    running.terminate()
    assert running.wait(60) == 143
    assert train_pt.is_whole(train_pt.checkpoints(Path("pt"))[0])


def test_writing_to_nobody_fails_nowhere(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise RuntimeError("reentrant call") if text == "twice" else BrokenPipeError

        def flush(self):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(sys, "stderr", Gone())
    with pytest.raises(SystemExit), train_pt.ignore_write_errors():
        print("once", flush=True)
        print("twice", end="")
        print("error", file=sys.stderr)
        raise SystemExit(2)
    assert sys.stdout.name == sys.stderr.name == os.devnull


def test_a_signal_in_the_last_batch_saves_whatever_the_strategy(command, whole, monkeypatch):
    step, options = train_pt.PackedTraining.training_step, ["--eval_strategy", "no"]
    expected = whole(*options)

    def watch(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        if self.state.global_step == 11:  # the twelfth and last is under way
            terminate()
        return loss

    unsaved = command(*options, "--save_strategy", "no")
    ended_by_a_signal(monkeypatch, unsaved, "training_step", watch)
    train_pt.main(command(*options))
    assert same(weights("pt"), expected)


def test_a_terminal_that_is_closed_takes_no_work_with_it(command):
    options = command("--save_steps", "1", "--max_steps", "200")
    child, terminal = pty.fork()
    if child == 0:
        default_signals()
        os.execv(sys.executable, [sys.executable, str(ROOT / "train_pt.py"), *options])
    while b"'loss'" not in os.read(terminal, 1 << 16):
        pass
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129
    assert train_pt.is_whole(train_pt.checkpoints(Path("pt"))[0])


def test_a_second_ctrl_c_is_not_waited_for_but_a_signal_that_comes_twice_is(monkeypatch):
    with train_pt.collect_signals() as caught:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):  # of torchrun, and its own
            os.kill(os.getpid(), signum)
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 5)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert caught == [signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGTERM]


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train_pt.collect_signals() as caught:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_between_the_batches_of_a_step_saves_the_step_before(command, whole, monkeypatch):
    options = ["--lora_dropout", "0.3"]
    expected, taken = whole(*options), []
    step = train_pt.PackedTraining.training_step

    def watch(self, *args, **kwargs):
        taken.append(self.state.global_step)
        loss = step(self, *args, **kwargs)
        if taken.count(7) == 1 and taken[-1] == 7:
            terminate()
        return loss

    ended_by_a_signal(monkeypatch, command(*options), "training_step", watch)
    assert taken.count(7) == 2, "the second is not trained"
    assert [p.name for p in train_pt.checkpoints(Path("pt"))] == ["checkpoint-7", "checkpoint-5"]
    train_pt.main(command(*options))
    assert same(weights("pt"), expected)


def test_a_signal_before_the_first_step_ends_is_no_error(command, whole, monkeypatch, capsys):
    def watch(*args, **kwargs):
        terminate()
        return {}

    ended_by_a_signal(monkeypatch, command(), "sample", watch, train_pt.Report)
    assert "stopped before the first step" in capsys.readouterr().out
    assert train_pt.checkpoints(Path("pt")) == []
    train_pt.main(command())
    assert same(weights("pt"), whole())


def test_how_often_to_save_can_be_changed_in_an_unfinished_run(command, whole, monkeypatch):
    killed_at(monkeypatch, 8, command())
    changed = ["--save_steps", "2", "--eval_steps", "3", "--save_total_limit", "0"]
    train_pt.main(command(*changed))
    saved = [path.name for path in train_pt.checkpoints(Path("pt"))]
    assert saved == [f"checkpoint-{n}" for n in (12, 10, 8, 6, 5)]
    assert [row["step"] for row in metrics("pt") if "eval_loss" in row] == [4, 6, 9, 12]
    assert same(weights("pt"), whole())


def test_going_back_to_an_earlier_checkpoint_keeps_what_comes_from_there(
    command, whole, monkeypatch, capsys
):
    killed_at(monkeypatch, 11, command())
    earlier = ["--resume_from_checkpoint", "pt/checkpoint-5", "--save_steps", "7"]
    killed_at(monkeypatch, 8, command(*earlier))
    said = capsys.readouterr().out
    assert "pt/checkpoint-10 is broken or superseded, renamed to pt/checkpoint-10.1" in said
    assert [p.name for p in train_pt.checkpoints(Path("pt"))] == ["checkpoint-7", "checkpoint-5"]
    train_pt.main(command())
    assert same(weights("pt"), whole())


def test_a_checkpoint_of_a_run_with_other_settings_is_refused(command, monkeypatch, capsys):
    killed_at(monkeypatch, 6, command())
    options = ["--resume_from_checkpoint", "pt/checkpoint-5", "--lora_rank", "16"]
    with pytest.raises(SystemExit) as refused:
        train_pt.main(command(*options, name="other"))
    assert refused.value.code == 2
    message = capsys.readouterr().err
    assert "--resume_from_checkpoint pt/checkpoint-5: is of a run with other settings" in message
    assert "lora_rank was 32, now 16" in message
    assert not Path("other").exists()


def test_the_last_evaluation_competes_for_the_best_though_it_comes_later(command, monkeypatch):
    options = ["--load_best_model_at_end", "true", "--eval_steps", "4", "--save_steps", "4"]
    train_pt.main(command(*options, name="whole"))
    evaluate = train_pt.PackedTraining.evaluate

    def interrupted(trainer, *args, **kwargs):
        if trainer.state.global_step == 12:
            terminate()
        return evaluate(trainer, *args, **kwargs)

    ended_by_a_signal(monkeypatch, command(*options), "evaluate", interrupted)
    train_pt.main(command(*options))
    assert same(weights("pt"), weights("whole"))
    losses = [
        [row["eval_loss"] for row in metrics(n) if "eval_loss" in row] for n in ("pt", "whole")]
    assert losses[0] == losses[1]


def test_a_broken_checkpoint_falls_back_to_the_one_before(command, whole, monkeypatch, capsys):
    killed_at(monkeypatch, 11, command())
    optimizer = Path("pt/checkpoint-10/optimizer.pt")
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1
    optimizer.write_bytes(content)
    train_pt.main(command())
    said = capsys.readouterr().out
    assert "resuming at step 5: pt/checkpoint-10 is broken or superseded, renamed" in said
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

    ended_by_a_signal(monkeypatch, command(*options), "evaluate", interrupted)
    monkeypatch.setattr(train_pt.Collate, "__call__", collate)
    assert batches == [1, 1], "it went on evaluating"
    assert Path(f"pt/checkpoint-{step}").is_dir()
    assert not Path("pt/adapter_model.safetensors").exists(), "looks finished"
    train_pt.main(command(*options))
    assert same(weights("pt"), expected)
    measured = [row["step"] for row in metrics("pt") if "eval_loss" in row]
    assert measured == ([4, 12] if step == 8 else [4, 8, 12])
