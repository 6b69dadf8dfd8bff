"""Runs that go on: prolonged, branched into a decay, begun from an adapter; rates by parameter."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from test_train_hands import refusal
from test_train_run import copy_of_tiny
from train_support import killed_at, metrics, same, short_run, weights

import train_pt

pytest_plugins = ["train_support"]
torch.set_num_threads(1)

WSD = ["--lr_scheduler_type", "warmup_stable_decay", "--warmup_steps", "2",
       "--lr_scheduler_kwargs", '{"num_decay_steps": 3}']
CONSTANT = ["--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "2"]


@pytest.mark.parametrize(
    ("schedule", "first", "begins_at"),
    [
        (["--lr_scheduler_type", "constant"], 6, 6),
        (CONSTANT, 7, 7),
        (WSD, 8, 5),  # its decay begins after step 5
    ],
    ids=["constant", "constant_with_warmup", "warmup_stable_decay"],
)
def test_a_prolonged_run_is_one_long_run_bit_for_bit(schedule, first, begins_at, command, capsys):
    options = [*schedule, "--lora_dropout", "0.3"]
    train_pt.main(command(*options, "--max_steps", 12, name="whole"))
    train_pt.main(command(*options, "--max_steps", first))
    short = weights("pt")
    train_pt.main(command(*options, "--max_steps", 12))
    rows = [row for row in metrics("pt") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert same(weights("pt"), weights("whole"))
    assert not same(weights("pt"), short)
    assert [r["loss"] for r in rows] == [r["loss"] for r in metrics("whole") if "loss" in r]
    if begins_at < first:
        said = capsys.readouterr().out
        assert f"resuming at step {begins_at}: pt/checkpoint-{first} is broken or" in said
    train_pt.main(command(*options, "--max_steps", 12))
    assert "already done" in capsys.readouterr().out


def test_an_unfinished_run_is_prolonged_too_and_by_epochs(command, monkeypatch):
    options = ["--lr_scheduler_type", "constant", "--max_steps", -1]
    train_pt.main(command(*options, "--num_train_epochs", 2, name="whole"))
    killed_at(monkeypatch, 7, command(*options, "--num_train_epochs", 1))
    train_pt.main(command(*options, "--num_train_epochs", 2))
    assert same(weights("pt"), weights("whole"))


def test_while_it_is_prolonged_it_does_not_look_finished(command, monkeypatch):
    options = ["--lr_scheduler_type", "constant"]
    train_pt.main(command(*options, "--max_steps", 5))
    killed_at(monkeypatch, 6, command(*options))
    assert not Path("pt/adapter_model.safetensors").exists()
    assert json.loads(Path("pt/run.json").read_text())["results"] is None


def test_a_decay_branches_off_a_run_with_a_constant_rate(command):
    """One long run with the decay at its end, and the same decay from a constant run."""
    train_pt.main(command(*WSD, "--max_steps", 8, name="whole"))
    train_pt.main(command(*CONSTANT, "--max_steps", 6))
    branch = ["--resume_from_checkpoint", "pt/checkpoint-5", "--max_steps", 8]
    train_pt.main(command(*WSD, *branch, name="decayed"))
    assert same(weights("decayed"), weights("whole"))
    assert Path("pt/checkpoint-6").is_dir(), "the run it came from stays as it was"


@pytest.mark.parametrize("finished", [True, False])
def test_a_schedule_of_a_fixed_length_is_not_prolonged(finished, command, monkeypatch, capsys):
    if finished:
        train_pt.main(command("--max_steps", 8))
    else:
        killed_at(monkeypatch, 6, command("--max_steps", 8))
    before = sorted(Path("pt").rglob("*"))
    line = refusal(command("--max_steps", 12), capsys)
    assert "cannot go on to step 12 (max_steps was 8, now 12)" in line
    assert "--adapter pt/checkpoint-" in line
    assert sorted(Path("pt").rglob("*")) == before


def test_a_stable_run_in_its_decay_without_an_earlier_checkpoint_is_refused(command, capsys):
    train_pt.main(command(*WSD, "--max_steps", 8, "--save_steps", 7))
    assert "before its decay" in refusal(command(*WSD, "--max_steps", 12), capsys)


# From an adapter.


def test_an_adapter_starts_where_its_last_evaluation_stood(command, text, tmp_path):
    train_pt.main(command())
    last = [row["eval_loss"] for row in metrics("pt") if "eval_loss" in row][-1]
    more = tmp_path / "more.jsonl"
    more.write_text(text.read_text() + '{"text": "一篇新的"}\n')
    anew = ["--eval_on_start", "true", "--learning_rate", "0.001", "--max_steps", 4]
    train_pt.main(command("--adapter", "pt", *anew, name="next"))
    rows = metrics("next")
    assert next(row["eval_loss"] for row in rows if "eval_loss" in row) == last
    assert next(r["learning_rate"] for r in rows if "loss" in r) == 0.001, "a schedule of its own"
    train_pt.main(command("--adapter", "pt/checkpoint-10", "--dataset", more, *anew, name="third"))
    assert weights("third").keys() == weights("pt").keys()


def test_a_run_from_an_adapter_goes_on_bit_for_bit_and_is_not_mixed(command, monkeypatch, capsys):
    train_pt.main(command("--max_steps", 3))
    train_pt.main(command("--max_steps", 2, name="other"))
    options = command("--adapter", "pt", name="next")
    train_pt.main(command("--adapter", "pt", name="whole"))
    killed_at(monkeypatch, 8, options)
    assert "--adapter changed" in refusal(command("--adapter", "other", name="next"), capsys)
    assert "--adapter changed" in refusal(command(name="next"), capsys)
    train_pt.main(options)
    assert same(weights("next"), weights("whole"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--lora_rank", 16], "settings (lora_rank was 32, now 16; lora_alpha was"),
        (["--lora_alpha", 8], "lora_alpha was 64, now 8"),
        (["--use_rslora", "true"], "use_rslora was False, now True"),
        (["--quantization", "none"], "quantization was nf4, now none"),
        (["--train_norms", "false"], "train_norms was True, now False"),
        (["--base_vocab_size", 900], "first_new_row was 800, now 900"),
        (["--adapter", "gone"], "--adapter gone: expected what train_pt.py has written"),
        (["--output_dir", "pt"], "--adapter pt: lies in --output_dir pt"),
        (["--model_name_or_path", "base"], "the base changed"),
    ],
)
def test_an_adapter_that_does_not_fit_is_a_line(
    options, says, command, tmp_path, monkeypatch, capsys, trained
):
    shutil.copytree(trained, "pt")
    base = copy_of_tiny(tmp_path / "base", rms_norm_eps=1e-4)
    assert base.is_dir()
    monkeypatch.setattr(train_pt, "build_model", None)
    assert says in refusal(command("--adapter", "pt", *options, name="next")
                           if "--output_dir" not in options
                           else command("--adapter", "pt", *options), capsys)


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "pt"
    train_pt.main(short_run(text, "--max_steps", 1, "--eval_strategy", "no", "--picture",
                            folder.parent / "a.png", "--cache_dir", folder.parent, name=folder))
    return folder


# Rates by parameter.


def trained_groups(command, *options: object) -> tuple[list[dict], dict]:
    args, training = train_pt.parse_args(command(*options))
    folder, _, _, first_new = train_pt.load_base(args)
    model, _ = train_pt.build_model(args, training, folder, first_new)
    from types import SimpleNamespace

    trainer = train_pt.build_trainer(training, model, [0], {}, SimpleNamespace(args=args))
    names = {parameter: name for name, parameter in model.named_parameters()}
    return trainer.create_optimizer().param_groups, names


def test_rows_norms_and_b_learn_at_their_own_rates(command):
    rates = ["--embedding_learning_rate", "1e-3", "--norm_learning_rate", "2e-3",
             "--loraplus_lr_ratio", "4"]
    groups, names = trained_groups(command, *rates)
    found = {names[p]: group["lr"] for group in groups for p in group["params"]}
    assert len(found) == sum(p.requires_grad for p in names)
    for name, rate in found.items():
        if name.endswith(".trained"):
            assert rate == 1e-3
        elif "norm" in name:
            assert rate == 2e-3
        else:
            assert rate == (0.04 if "lora_B" in name else 0.01), name
    assert groups[0]["lr"] == 0.01, "what Trainer logs"


def test_without_them_the_groups_are_trainers(command):
    groups, _ = trained_groups(command)
    assert [group["lr"] for group in groups] == [0.01, 0.01]


def test_a_run_with_own_rates_resumes_bit_for_bit(command, monkeypatch):
    options = ["--embedding_learning_rate", "1e-3", "--optim", "adamw_8bit", "--use_rslora", "true"]
    train_pt.main(command(*options, name="whole"))
    killed_at(monkeypatch, 8, command(*options))
    train_pt.main(command(*options))
    assert same(weights("pt"), weights("whole"))
    config = json.loads(Path("pt/adapter_config.json").read_text())
    assert config["use_rslora"] is True
    assert math.isclose(metrics("pt")[0]["learning_rate"], 0.01)
