"""train_pt.py in the world: damaged inputs and outputs, and options that would fail late."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_train_hands import refusal
from test_train_run import copy_of_tiny
from train_support import DRAW, at_step, killed_at, metrics, same, terminate, weights

import train_pt

pytest_plugins = ["train_support"]
torch.set_num_threads(1)
ADAPTER = "pt/adapter_model.safetensors"


def edit(path: Path | str, change) -> None:
    """Rewrite a safetensors file, its tensors changed by a function."""
    save_file(change(load_file(path)), path, {"format": "pt"})


# The best weights: whether more or less is better follows from the kind of the metric.


@pytest.mark.parametrize(
    ("metric", "options", "best"),
    [("eval_bits_per_character", [], min), ("loss_wiki", ["--eval_dataset"], min),
     ("in_context_copy", ["--probes", "true"], max), ("eval_loss", [], min)])
def test_the_best_is_the_lowest_loss_and_the_highest_share(
    metric, options, best, command, text, monkeypatch
):
    probe = train_pt.PackedTraining.probe  # rises and falls, as no real one would in 12 steps
    monkeypatch.setattr(train_pt.PackedTraining, "probe", lambda self, rows: {
        name: 1 / (abs(self.state.global_step - 8) + 1) for name in probe(self)})
    options = [*options, *([f"wiki={text}"] if options == ["--eval_dataset"] else [])]
    train_pt.main(command(
        "--load_best_model_at_end", "true", "--metric_for_best_model", metric, "--save_steps", "4",
        "--learning_rate", "0.3", *options))
    key = "eval_" + metric.removeprefix("eval_")
    measured = {row["step"]: row[key] for row in metrics("pt") if key in row}
    assert len({*measured.values()}) > 1
    results = json.loads(Path("pt/run.json").read_text())["results"]
    assert measured[results["adapter_step"]] == best(measured.values())


def test_greater_is_better_as_the_user_says():
    words = ["--metric_for_best_model", "bits_per_character", "--greater_is_better", "true"]
    assert train_pt.parse_args(words)[1].greater_is_better is True
    assert train_pt.parse_args(words[:2])[1].greater_is_better is False
    assert train_pt.parse_args([])[1].greater_is_better is None


@pytest.mark.parametrize("options", [
    ["--load_best_model_at_end", "true", "--save_steps", "4"], ["--save_strategy", "best"]])
@pytest.mark.parametrize("metric", ["accuracy", "eval_loss_wiki", "traditional"])
def test_a_metric_that_no_evaluation_has_is_refused(options, metric, command, capsys):
    line = refusal(command(*options, "--metric_for_best_model", metric), capsys)
    assert f"--metric_for_best_model {metric.removeprefix('eval_')}: expected" in line
    assert "loss, bits_per_character" in line


# The base: what is missing would be made up.

UP = "model.layers.1.mlp.up_proj.weight"
BROKEN_BASES = {
    "a layer": (lambda t: {n: x for n, x in t.items() if n != UP}, f"{UP} is missing"),
    "the head": (
        lambda t: {n: x for n, x in t.items() if n != "lm_head.weight"}, "lm_head.weight is mis"),
    "a norm": (
        lambda t: {n: x for n, x in t.items() if n != "model.norm.weight"}, "model.norm.weight is"),
    "names without model.": (
        lambda t: {n.removeprefix("model."): x for n, x in t.items()}, "expected no such tensor"),
    "one more": (lambda t: t | {"model.norm.bias": t["model.norm.weight"].clone()},
                 "model.norm.bias is (128,); expected no such tensor"),
    "a shape": (lambda t: t | {UP: t[UP].T.contiguous()}, "expected (384, 128) by config.json"),
}


@pytest.mark.parametrize("what", BROKEN_BASES)
def test_a_base_that_lacks_tensors_is_refused_before_it_loads(
    what, command, tmp_path, monkeypatch, capsys
):
    change, says = BROKEN_BASES[what]
    base = copy_of_tiny(tmp_path / "base")
    edit(base / "model.safetensors", change)
    monkeypatch.setattr(train_pt, "build_model", None)
    line = refusal(command("--model_name_or_path", base), capsys)
    assert f"--model_name_or_path {base}" in line
    assert says in line
    assert not Path("pt").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [({"vocab_size": 1064}, "expected (1064, 128) by config.json"),
     ({"num_hidden_layers": 5}, "model.layers.4.input_layernorm.weight is missing"),
     ({"num_key_value_heads": 1}, "k_proj.weight is"),
     ({"pad_token_id": 1000}, "config.json is not whole; fetch it again: Padding_idx"),
     ({"num_attention_heads": 0}, "is not whole; fetch it again: integer modulo by zero"),
     ({"hidden_size": "wide"}, "is not whole; fetch it again: ")])
def test_a_configuration_that_the_weights_contradict(
    change, says, command, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(train_pt, "build_model", None)
    base = copy_of_tiny(tmp_path / "base", **change)
    assert says in refusal(command("--model_name_or_path", base), capsys)


def test_old_buffers_and_a_stale_index_are_no_mistake(command, tmp_path):
    base = copy_of_tiny(tmp_path / "base")
    edit(base / "model.safetensors",
         lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})
    stale = {"weight_map": {"lm_head.weight": "gone.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(stale))
    train_pt.main(command("--model_name_or_path", base, "--max_steps", "1"))
    assert weights("pt")


def test_the_bases_generation_settings_do_not_count(command, tmp_path):
    settings = {"do_sample": False, "temperature": 0.0, "return_dict_in_generate": True,
                "stop_strings": ["</s>"], "eos_token_id": [5, 6], "max_length": 3}
    base = copy_of_tiny(tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps(settings))
    train_pt.main(command("--max_steps", "1"))
    train_pt.main(command("--model_name_or_path", base, "--max_steps", "1", name="own"))
    (one, two) = ([row.get("eval_sample") for row in metrics(name)] for name in ("pt", "own"))
    assert one == two


@pytest.mark.parametrize("what", ["base", "adapter"])
def test_numbers_that_are_not_finite_are_told_before_the_first_step(
    what, command, tmp_path, capsys
):
    base, options = copy_of_tiny(tmp_path / "base"), []
    if what == "adapter":
        train_pt.main(command("--model_name_or_path", base, "--max_steps", "1"))
        record = json.loads(Path("pt/run.json").read_text())
        del record["files"]  # else the sum would tell
        Path("pt/run.json").write_text(json.dumps(record))
        edit(ADAPTER, lambda t: {name: x * float("nan") for name, x in t.items()})
        options = ["--adapter", "pt"]
    else:
        edit(base / "model.safetensors", lambda t: t | {UP: t[UP] * float("nan")})
    line = refusal(command("--model_name_or_path", base, *options, name="new"), capsys)
    assert "before the first step: the base or --adapter holds numbers that are not" in line


# Options that argparse, Transformers or Accelerate would take, and a run would fail of.


@pytest.mark.parametrize("option", ["--dataset", "--eval_dataset", "--dataset_weight"])
def test_a_list_given_in_two_places_is_refused(option, text, capsys):
    line = refusal([option, "1", f"{option}=2"], capsys)
    assert f"{option} is given twice" in line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--adam_beta1", "1.5"], "Invalid beta parameter at index 0: 1.5"),
        (["--adam_epsilon", "-1"], "Invalid epsilon value: -1.0"),
        (["--dataloader_persistent_workers", "true"], "persistent_workers option needs"),
        (["--dataloader_prefetch_factor", "2"], "prefetch_factor"),
        (["--fsdp", "full_shard"], "--fsdp full_shard: expected several processes"),
        (["--accelerator_config", '{"split_batches": true}'], "true}: expected none"),
        (["--torch_compile_backend", "foo"], "'FOO' is not a valid DynamoBackend"),
        (["--optim", "galore_adamw"], "galore_torch"),
        (["--optim", "lomo"], "lomo"),
        (["--optim", "schedule_free_adamw"], "schedulefree"),
        (["--optim", "adamw_torch_4bit"], "torchao"),
        (["--optim_args", "no_such"], "values to unpack"),
        (["--ignore_data_skip", "true"], "--ignore_data_skip True: expected false"),
        (["--base_vocab_size", "5000"], "--base_vocab_size 5000: the model has only 1000 rows"),
        (["--dataloader_drop_last", "true"], "--dataloader_drop_last True: expected false"),
        (["--activation_checkpointing_kwargs", '{"offlaod": true}'],
         '--activation_checkpointing_kwargs {"offlaod": true}: expected a JSON object'),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value).strip("-"),
)
def test_what_would_fail_later_is_refused_first(options, says, command, monkeypatch, capsys):
    monkeypatch.setattr(train_pt, "build_model", None)
    assert says in refusal(command(*options), capsys)
    assert not Path("pt").exists()


def test_offloading_and_non_reentrant_checkpoints_are_accepted():
    for given in ('{"offload": true}', '{"use_reentrant": false}', "{}"):
        train_pt.check(train_pt.parse_args(["--activation_checkpointing_kwargs", given])[0])


def test_wandb_without_a_key_is_told_before_the_model_loads(command, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.setattr(train_pt, "build_model", None)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", os.getcwd())  # where a key may lie
    assert "--report_to wandb: " in refusal(command("--report_to", "wandb"), capsys)


# The text.


def test_files_that_are_not_read_are_named(command, text, tmp_path, capsys):
    folder = tmp_path / "t"
    folder.mkdir()
    for name in ("a.jsonl", "b.JSONL", "c.json", "d.jsonl.gz"):
        shutil.copy(text, folder / name)
    (folder / "e.jsonl").symlink_to("gone.jsonl")
    (folder / "sub").mkdir()
    train_pt.main(command("--plan", "--dataset", folder, "--eval_dataset", f"all={folder}"))
    said = capsys.readouterr().out
    not_read = "4 are not read: c.json, d.jsonl.gz, e.jsonl, sub"
    assert f"note: --dataset {folder}: {not_read}\n" in said
    assert f"note: --eval_dataset {folder}: {not_read}\n" in said
    assert "documents: 48" in said, "b.JSONL is read"


def test_a_pipe_and_a_dead_link_are_refused(command, capsys):
    os.mkfifo("pipe.jsonl")
    Path("dead.jsonl").symlink_to("gone.jsonl")
    line = refusal(command("--dataset", "pipe.jsonl"), capsys)
    assert "--dataset pipe.jsonl: no text there; expected .txt" in line
    line = refusal(command("--dataset", "dead.jsonl"), capsys)
    assert "--dataset dead.jsonl: there is no such file or folder" in line


@pytest.mark.parametrize("damage", [
    lambda cached: os.truncate(cached / "tokens.bin", 1000),
    lambda cached: os.truncate(cached / "documents.npy", 0),
    lambda cached: (cached / "documents.npy").write_bytes(b"\x93NUMPY nothing"),
    lambda cached: (cached / "tokens.bin").unlink(),
    lambda cached: (shutil.rmtree(cached), cached.mkdir())])
def test_a_damaged_token_cache_is_made_again(damage, command):
    train_pt.main(command("--max_steps", "1", "--eval_strategy", "no"))
    (cached,) = (path for path in Path("outputs/cache").iterdir() if path.is_dir())
    whole = (cached / "tokens.bin").read_bytes()
    damage(cached)
    train_pt.main(command("--max_steps", "1", "--eval_strategy", "no", name="again"))
    assert same(weights("pt"), weights("again"))
    assert (cached / "tokens.bin").read_bytes() == whole
    assert [path.name for path in cached.parent.iterdir()] == [cached.name]


# The run's folder.


@pytest.mark.parametrize("damage", [os.remove, lambda path: os.truncate(path, 100)])
def test_a_finished_run_whose_adapter_is_damaged_is_finished_again(damage, command, capsys):
    train_pt.main(command())
    whole = {name: tensor.clone() for name, tensor in weights("pt").items()}  # it is a map
    damage(ADAPTER)
    train_pt.main(command())
    assert "already done" not in capsys.readouterr().out
    assert same(weights("pt"), whole)
    assert [row["step"] for row in metrics("pt") if "loss" in row] == list(range(1, 13))
    train_pt.main(command())
    assert "already done" in capsys.readouterr().out


def test_a_text_to_evaluate_on_may_be_added_in_the_middle(command, text, monkeypatch):
    monkeypatch.setattr(train_pt.Report, "draw", DRAW)
    killed_at(monkeypatch, 6, command())
    train_pt.main(command("--eval_dataset", f"wiki={text}"))
    train_pt.main(command(name="whole"))
    assert same(weights("pt"), weights("whole"))
    table = [line.split("|") for line in Path("pt/README.md").read_text().splitlines()
             if line.startswith("| 0") or "loss wiki" in line]
    column = next(n for n, title in enumerate(table[0]) if title.strip() == "loss wiki")
    filled = [bool(row[column].strip()) for row in table]
    assert filled == [True, False, True, True], "measured at steps 8 and 12 alone"


def test_a_checkpoint_may_be_called_anything(command, monkeypatch):
    killed_at(monkeypatch, 7, command())
    Path("pt/checkpoint-5").rename("checkpoint-5.bak")
    train_pt.main(command("--resume_from_checkpoint", "checkpoint-5.bak", name="new"))
    train_pt.main(command(name="whole"))
    assert same(weights("new"), weights("whole"))
    assert [row["step"] for row in metrics("new") if "loss" in row] == list(range(1, 13))


@pytest.mark.parametrize("damage", ["removed", "emptied"])
def test_a_lost_record_is_taken_from_the_last_checkpoint(damage, command, monkeypatch):
    killed_at(monkeypatch, 7, command())
    Path("pt/run.json").unlink() if damage == "removed" else Path("pt/run.json").write_text("")
    at_step(monkeypatch, 8, terminate)
    with pytest.raises(SystemExit) as stopped:
        train_pt.main(command())
    assert stopped.value.code == 143
    assert [row["step"] for row in metrics("pt") if "loss" in row] == list(range(1, 9))


def test_without_a_checkpoint_the_run_says_where_it_begins(command, monkeypatch, capsys):
    killed_at(monkeypatch, 6, command())
    shutil.rmtree("pt/checkpoint-5")
    train_pt.main(command("--eval_strategy", "steps"))
    assert "no checkpoint in pt: the run begins at its first step" in capsys.readouterr().out


def test_the_root_of_a_file_system_is_an_empty_folder(command):
    Path("pt/lost+found").mkdir(parents=True)
    train_pt.main(command("--max_steps", "1", "--eval_strategy", "no"))
    assert weights("pt")


@pytest.mark.parametrize("option", ["--output_dir", "--cache_dir"])
@pytest.mark.parametrize("place", ["file/x/y", "dead", "dead/x"])
def test_an_output_under_a_file_or_a_dead_link_is_refused(option, place, command, capsys):
    Path("file").touch()
    Path("dead").symlink_to("/gone/x")
    line = refusal(command(option, place), capsys)
    assert f"{option} {place}: cannot be written there ({place.partition('/')[0]} is no f" in line


@pytest.mark.parametrize("damage", ["cut", "missing tensors"])
def test_an_adapter_that_is_not_as_it_was_written_is_refused(damage, command, monkeypatch, capsys):
    train_pt.main(command("--max_steps", "1"))
    if damage == "cut":
        os.truncate(ADAPTER, 5000)
    else:
        edit(ADAPTER, lambda tensors: dict([*tensors.items()][3:]))
    monkeypatch.setattr(train_pt, "build_model", None)
    line = refusal(command("--adapter", "pt", name="new"), capsys)
    assert "--adapter pt: adapter_model.safetensors is not as it was written; copy it" in line


def test_closed_streams_end_no_run(command):
    words = [sys.executable, str(ROOT / "train_pt.py"),
             *command("--max_steps", "1", "--eval_strategy", "no")]
    subprocess.run(["bash", "-c", '"$@" >&- 2>&-', "bash", *words], check=True, timeout=300)
    assert weights("pt")
