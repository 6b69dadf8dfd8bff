"""Whole runs: refusals, the plan, what they leave to see, several processes."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from train_support import (
    DRAW,
    TINY,
    Killed,
    at_step,
    kill,
    killed_at,
    launch,
    metrics,
    weights,
)

import train_pt

pytest_plugins = ["train_support"]
torch.set_num_threads(1)
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def test_the_docstring_gives_the_command_of_the_demo():
    lines = (ROOT / "Makefile").read_text().splitlines()
    command = next(line.strip() for line in lines if "python train_pt.py" in line)
    assert command in " ".join(train_pt.__doc__.replace("\\\n", " ").split())


def spoil_the_loss(monkeypatch, step: int, factor: float) -> None:
    """From the given step on (two forward passes each), the loss is multiplied."""
    loss, calls = train_pt.TailHead.loss, []

    def spoilt(self, *args, **kwargs):
        calls.append(1)
        return loss(self, *args, **kwargs) * (factor if len(calls) > 2 * (step - 1) else 1)

    monkeypatch.setattr(train_pt.TailHead, "loss", spoilt)


@pytest.mark.parametrize(
    ("factor", "message"),
    [(float("nan"), "step 4: the loss is nan"), (3, "step 5: the loss explodes (")],
)
def test_a_loss_gone_wrong_stops_with_step_and_advice(
    factor, message, command, monkeypatch, capsys
):
    spoil_the_loss(monkeypatch, 4, factor)
    with pytest.raises(SystemExit) as stopped:
        train_pt.main(command("--eval_strategy", "no"))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2
    assert error.startswith(f"error: {message}")
    assert "--learning_rate (now 0.01)" in error


def test_the_same_run_again_is_done_and_another_is_refused(command, capsys):
    train_pt.main(command("--max_steps", "2"))
    before = sorted(Path("pt").rglob("*"))
    train_pt.main(command("--max_steps", "2"))
    assert "already done" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train_pt.main(command("--max_steps", "2", "--learning_rate", "0.02"))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "holds a run with other settings (learning_rate was 0.01, now 0.02)" in line
    assert "--adapter to start from this adapter" in line
    assert sorted(Path("pt").rglob("*")) == before


def test_an_unfinished_run_with_other_settings_is_refused_by_name(command, monkeypatch, capsys):
    killed_at(monkeypatch, 6, command())
    with pytest.raises(SystemExit) as stopped:
        train_pt.main(command("--learning_rate", "0.02"))
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "learning_rate was 0.01, now 0.02" in message
    assert "--output_dir" in message
    train_pt.main(command("--logging_steps", "2"))  # what changes no result may change


def copy_of_tiny(folder: Path, **changes) -> Path:
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--max_steps", "0"], "--max_steps 0: expected"),
        (["--optim", "galore_adamw"], "galore_torch"),
        (["--no_such_option", "1"], "unknown option: --no_such_option"),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--model_name_or_path", "outputs/extended"], "run python extend_vocab.py first"),
        (["--model_name_or_path", "."], "no config.json"),
        (["--dataset", "data/cc_filtered"], "run python filter_cc.py first"),
        (["--block_size", "4"], "--block_size 4: expected 8 to "),
        (["--block_size", "8192"], "longer than the model's 4096 positions"),
        (["--group_size", "65"], "--group_size 65: expected 2 to 64"),
        (["--eval_fraction", "2"], "--eval_fraction 2.0"),
        (["--lora_rank", "0"], "--lora_rank 0"),
        (["--activation_checkpointing_kwargs", "offload"], "expected a JSON object"),
        (["--train_embeddings", "none"], "rows 800 to 999 of embedding and head are new"),
        (["--resume_from_checkpoint", "nowhere"], "not a whole checkpoint"),
        (["--optim", "adam_of_tomorrow"], "adam_of_tomorrow"),
        (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor 0.1: expected 0"),
        (["--dataloader_num_workers", "2"], "--dataloader_num_workers 2: expected 0"),
        (["--use_liger_kernel"], "expected a GPU and liger-kernel; pip install liger-kernel"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(options, reason, command, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_pt.main(command(*options))
    assert stopped.value.code == 2
    assert reason in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "gpt2"}, "a gpt2; expected a Llama"),
        ({"tie_word_embeddings": True}, "tied"),
        ({"vocab_size": 900}, "the tokenizer has 1000 pieces and the model only 900 rows"),
        ({"hidden_size": 96}, "hidden_size 96; nf4 expects a multiple of 64; use --quantization"),
        ({"intermediate_size": 688}, "intermediate_size 688; nf4 expects a multiple of 64"),
    ],
)
def test_a_base_that_cannot_be_trained_is_refused(change, reason, command, tmp_path, capsys):
    base = copy_of_tiny(tmp_path / "base", **change)
    with pytest.raises(SystemExit) as stopped:
        train_pt.main(command("--model_name_or_path", base))
    assert stopped.value.code == 2
    assert reason in capsys.readouterr().err


def test_a_missing_shard_is_told_before_any_work(command, tmp_path, capsys):
    base = copy_of_tiny(tmp_path / "base")
    (base / "model.safetensors").rename(base / "model-00001.safetensors")
    index = {"weight_map": {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SystemExit) as stopped:
        train_pt.main(command("--model_name_or_path", base))
    assert stopped.value.code == 2
    assert f"{base}: model-00002.safetensors is not whole" in capsys.readouterr().err
    assert not Path("outputs").exists()


@pytest.mark.parametrize("name", ["thesis.txt", "run.json"])
@pytest.mark.parametrize("content", ["mine", "[]", '{"script": "train_pt.py"}'])
def test_a_folder_of_something_else_is_not_written_to(name, content, command, capsys):
    Path("pt").mkdir()
    Path("pt", name).write_text(content)
    with pytest.raises(SystemExit) as stopped:
        train_pt.main(command())
    assert stopped.value.code == 2
    assert "holds something else" in capsys.readouterr().err


def test_a_changed_text_is_told_in_words(command, text, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text(text.read_text() + '{"text": "一篇新的"}\n')
    killed_at(monkeypatch, 6, command())
    with pytest.raises(SystemExit):
        train_pt.main(command("--dataset", other))
    assert "(the text or the tokenizer changed); to" in capsys.readouterr().err


def test_no_limit_keeps_all_checkpoints_and_others_may_read_the_adapter(command, monkeypatch):
    monkeypatch.setattr(train_pt.Report, "draw", DRAW)
    options = ["--max_steps", "3", "--save_steps", "1", "--save_total_limit", "0"]
    train_pt.main(command(*options, "--picture", "loss.svg"))
    assert {path.name[-1] for path in Path("pt").glob("checkpoint-*")} == {"1", "2", "3"}
    modes = {path.stat().st_mode for path in Path("pt").glob("adapter_*")}
    assert len(modes) == 1, "the adapter is not as readable as its configuration"
    assert Path("loss.svg").read_text().startswith("<?xml")
    assert Path("pt/trainloss.png").read_bytes()[:4] == b"\x89PNG"


def test_one_document_is_trained_on_and_not_held_out(command, tmp_path):
    (tmp_path / "one.txt").write_text("春天的花開在山上")
    train_pt.main(command("--dataset", "one.txt", "--eval_fraction", "0.9", "--max_steps", "1"))
    assert json.loads(Path("pt/run.json").read_text())["results"]["eval_sequences"] == 0


def test_new_rows_come_from_the_record_of_extend_vocab(command, tmp_path, capsys):
    base = copy_of_tiny(tmp_path / "base")
    (base / "run.json").write_text(json.dumps({"results": {"base_vocab_size": 900}}))
    words = command("--model_name_or_path", base)
    del words[words.index("--base_vocab_size") : words.index("--base_vocab_size") + 2]
    train_pt.main([*words, "--max_steps", "1"])
    config = json.loads(Path("pt/adapter_config.json").read_text())
    assert config["trainable_token_indices"]["lm_head"] == list(range(900, 1000))


def test_a_large_model_without_a_gpu_is_noted_and_trained(command, monkeypatch, capsys):
    for limit, noted in ((1e4, True), (2e9, False)):
        monkeypatch.setattr(train_pt, "LARGE_FOR_A_CPU", limit)
        train_pt.main(command("--max_steps", "1", name=f"pt{limit}"))
        assert ("no GPU in use, so 0.0 GB of weights" in capsys.readouterr().out) == noted


@pytest.mark.parametrize(("capability", "noted"), [((7, 5), True), ((8, 0), False)])
def test_a_gpu_without_bfloat16_is_noted(capability, noted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    training = SimpleNamespace(use_cpu=False, bf16=True)
    for here in (True, False):
        monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda here=here: here)
        without = None if here else "liger-kernel is not installed; pip install liger-kernel trains"
        note = train_pt.slow_device(training, TINY)
        assert note == ("--bf16 true: Tesla T4 has no units for bfloat16; it has some for float16: "
                        "--bf16 false --fp16 true" if noted else without and f"{without} faster")


def test_what_would_fail_in_an_evaluation_fails_before_the_first_step(command, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("generate")

    monkeypatch.setattr(train_pt.Report, "sample", fail)
    with pytest.raises(RuntimeError, match="generate"):
        train_pt.main(command())
    assert not Path("pt/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--eval_strategy", "epoch", "--num_train_epochs", "1", "--max_steps", "-1"], [15]),
        (["--eval_on_start", "true", "--eval_fraction", "0"], []),
        (["--eval_on_start", "true"], [0, 4, 8, 12]),
        (["--load_best_model_at_end", "true", "--save_steps", "8"], [4, 8, 12]),
    ],
    ids=lambda value: value[0] if value and isinstance(value[0], str) else "",
)
def test_each_way_of_evaluating_evaluates_each_step_once(options, steps, command):
    train_pt.main(command(*options))
    assert [row["step"] for row in metrics("pt") if "eval_loss" in row] == steps


def test_documents_held_out_so_far_are_not_trained_on_later(command, monkeypatch, capsys):
    killed_at(monkeypatch, 6, command())
    with pytest.raises(SystemExit):
        train_pt.main(command("--eval_strategy", "no"))
    assert "--eval_strategy no trains on the documents held out too" in capsys.readouterr().err


def test_a_start_that_failed_before_it_wrote_anything_is_no_other_thing(command):
    Path("pt").mkdir()
    Path("pt/.lock").touch()
    train_pt.main(command("--max_steps", "1"))
    assert weights("pt")


def test_the_plan_counts_the_steps_of_the_card(monkeypatch):
    """落九's card: 92,928 sequences of 2,048 tokens, 8 x 4, three epochs: 8,712 steps."""
    args, training = train_pt.parse_args([])
    assert train_pt.total_steps(92_928, training) == 8712
    assert args.group_size == 512


@pytest.mark.parametrize("sequences", [1, 7, 12, 13, 25])
@pytest.mark.parametrize("epochs", [1, 1.5, 3])
def test_the_plan_counts_steps_as_trainer_does(sequences, epochs):
    words = "--per_device_train_batch_size 4 --gradient_accumulation_steps 3 --eval_strategy no"
    _, training = train_pt.parse_args([*words.split(), "--num_train_epochs", str(epochs)])
    from transformers import Trainer

    model = torch.nn.Linear(1, 1)
    trainer = Trainer(model=model, args=training, train_dataset=[{"x": 0}] * sequences)
    expected = trainer.set_initial_training_values(training, trainer.get_train_dataloader())[-1]
    assert train_pt.total_steps(sequences, training) == expected


def test_the_plan_trains_nothing_and_says_what_fits(command, capsys):
    train_pt.main(command("--plan", "--plan_gpu_gb", "24"))
    output = capsys.readouterr().out
    assert "documents: 24" in output
    assert "steps: 12" in output
    assert "the longest sequence is 4096 tokens" in output
    assert not Path("pt").exists()


def test_the_estimate_of_fixed_memory_is_what_the_model_takes(command, capsys):
    args, training = train_pt.parse_args(command("--optim", "adamw_torch"))
    folder, config, _, first_new = train_pt.load_base(args)
    model, _ = train_pt.build_model(args, training, folder, first_new)
    items = train_pt.memory_items(config, args, first_new, 1, 32)
    trained = sum(p.numel() for p in train_pt.adapter_tensors(model).values())
    norms = sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
    planned = items["trained rows, gradient, optimizer"] + items["LoRA, gradient, optimizer"]
    assert planned == 16 * (trained - norms)
    frozen = sum(p.numel() for n, p in model.named_parameters() if n.endswith("frozen"))
    assert items["frozen rows of embedding and head"] == 2 * frozen


def test_what_a_run_leaves_to_see(command, monkeypatch):
    monkeypatch.setattr(train_pt.Report, "draw", DRAW)
    train_pt.main(command())
    rows = metrics("pt")
    held = [r for r in rows if "eval_loss" in r]
    assert [r["step"] for r in held] == [4, 8, 12]
    assert all(r["eval_bits_per_character"] > 0 and "eval_sample" in r for r in held)
    train = [r for r in rows if "loss" in r]
    assert train[-1]["loss"] < train[0]["loss"]
    assert train[0]["tokens_seen"] == pytest.approx(4 * 32, abs=32)
    assert Path("pictures/trainloss.png").read_bytes()[:4] == b"\x89PNG"
    card = Path("pt/README.md").read_text()
    assert f"{held[-1]['eval_loss']:.4f}" in card
    assert "learning_rate: 0.01" in card
    record = json.loads(Path("pt/run.json").read_text())
    assert record["results"]["steps"] == 12
    fingerprint = train_pt.fingerprint(TINY)
    assert record["base"] == {"model_name_or_path": str(TINY), "fingerprint": fingerprint}
    assert record["quantization"]["bnb_4bit_quant_type"] == "nf4"
    for checkpoint in ("checkpoint-10", "checkpoint-12"):
        assert json.loads(Path("pt", checkpoint, "run.json").read_text())["base"] == record["base"]


def test_bits_per_character_are_those_of_each_document_alone(command, text):
    """A float64-free formula by hand: the mean loss of whole documents, over their characters."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = ["--block_size", "512", "--quantization", "none", "--bf16", "false"]
    once = ["--max_steps", "1", "--learning_rate", "1e-9", "--eval_steps", "1"]
    train_pt.main(command(*options, *once))
    row = metrics("pt")[1]
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    args, _ = train_pt.parse_args(command(*options))
    corpus = train_pt.tokenize([text], tokenizer, Path("cache"))
    _, held = train_pt.split_corpus(corpus, args, 0)
    bits, characters = 0.0, 0
    for start in held.starts:
        n = list(corpus.lengths.cumsum() - corpus.lengths).index(start)
        ids = torch.tensor(corpus.tokens[start : start + corpus.lengths[n]].astype(int))
        with torch.no_grad():
            bits += model(input_ids=ids[None], labels=ids[None]).loss.item() * (len(ids) - 1)
        characters += corpus.characters[n]
    expected = bits / torch.log(torch.tensor(2.0)).item() / characters
    assert row["eval_bits_per_character"] == pytest.approx(expected, rel=1e-3)


def test_wandb_takes_the_run_offline_and_goes_on_with_it(command, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in (("MODE", "offline"), ("SILENT", "true"), ("CONSOLE", "off")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    options = command("--report_to", "wandb", "--max_steps", "3", "--save_steps", "1")
    at_step(monkeypatch, 2, kill)
    for _ in range(2):
        with suppress(Killed):
            train_pt.main(options)
        wandb.finish()
    run = json.loads(Path("pt/run.json").read_text())["wandb_run_id"]
    logs = list(Path("wandb").glob("offline-run-*/run-*.wandb"))
    assert {path.name for path in logs} == {f"run-{run}.wandb"}
    deadline = time.time() + 60  # a process of its own writes it
    while not any(b"bits_per_character" in log.read_bytes() for log in logs):
        assert time.time() < deadline, "nothing was logged"
        time.sleep(0.1)
    wandb.teardown()  # it would stay offline for the tests that follow in this process


def test_two_processes_lose_as_one_with_the_same_global_batch(command):
    options = ["--max_steps", "5", "--quantization", "none", "--bf16", "false"]
    train_pt.main(command(*options, name="one"))
    words = command(
        *options, "--per_device_train_batch_size", "1", "--ddp_backend", "gloo", name="two")
    done = subprocess.run(
        [sys.executable, *TORCHRUN, str(ROOT / "train_pt.py"), *words],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    def losses(name: str, key: str) -> list[float]:
        return [row[key] for row in metrics(name) if key in row]

    assert losses("two", "loss") == pytest.approx(losses("one", "loss"), rel=1e-5)
    assert losses("two", "eval_loss") == pytest.approx(losses("one", "eval_loss"), rel=1e-5)


def test_a_signal_to_torchrun_stops_all_processes_at_the_same_step(command):
    options = ["--max_steps", "500", "--save_steps", "1", "--ddp_backend", "gloo"]
    running = launch(command(*options), 1, *TORCHRUN)
    running.terminate()
    output = running.communicate(timeout=120)[0]
    last = train_pt.checkpoints(Path("pt"))[0]
    assert output.count(f"stopped; step {last.name.split('-')[1]} is saved") == 1, output
    assert train_pt.is_whole(last)
    assert not Path("pt/adapter_model.safetensors").exists(), "looks finished"
