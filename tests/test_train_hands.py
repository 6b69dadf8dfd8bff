"""train_pt.py in real hands: situations from public bug reports, and others of their kinds."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_train_run import copy_of_tiny
from train_support import DRAW, TINY, at_step, killed_at, metrics, same, weights

import train_pt

pytest_plugins = ["train_support"]
torch.set_num_threads(1)


def refusal(options: list[str], capsys) -> str:
    """The one line with which a run is refused."""
    with pytest.raises(SystemExit) as stopped:
        train_pt.main(options)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


# Paths as typed: ~ is one place for everything that a run writes.


def test_a_tilde_means_the_home_folder_in_every_path(command, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(train_pt.Report, "draw", DRAW)
    (tmp_path / "home").mkdir()
    shutil.copytree(TINY, tmp_path / "home/base")
    options = command("--max_steps", "2", "--picture", "~/loss.png", name="~/pt")
    train_pt.main([*options, "--cache_dir=~/cache", "--model_name_or_path", "~/base"])
    assert not Path("~").exists()
    home = tmp_path / "home"
    written = {p.name for p in home.iterdir() if not p.name.startswith(".")}  # a library's own
    assert written == {"pt", "cache", "loss.png", "base"}
    assert {"run.json", "adapter_model.safetensors"} <= {p.name for p in (home / "pt").iterdir()}
    config = json.loads((home / "pt/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(home / "base")


def test_a_tilde_in_a_checkpoints_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args, training = train_pt.parse_args(
        ["--resume_from_checkpoint", "~/pt/checkpoint-5", "--output_dir", "~/pt"])
    assert args.resume_from_checkpoint == f"{tmp_path}/pt/checkpoint-5"
    assert training.output_dir == args.output_dir == f"{tmp_path}/pt"


# The same bytes are the same run.


def test_touched_and_copied_text_goes_on_and_is_done(command, text, tmp_path, monkeypatch, capsys):
    mine = tmp_path / "mine.jsonl"
    shutil.copy(text, mine)
    options = command("--dataset", mine)
    killed_at(monkeypatch, 6, options)
    os.utime(mine, (1, 1))
    killed_at(monkeypatch, 8, options)
    steps = [row["step"] for row in metrics("pt") if "loss" in row]
    assert steps == list(range(1, 9)), "it went on from step 5"
    copied = tmp_path / "elsewhere/renamed.jsonl"
    copied.parent.mkdir()
    shutil.copy(text, copied)
    train_pt.main(command("--dataset", copied, "--cache_dir", "other"))
    mine.touch()
    train_pt.main(options)
    assert "already done" in capsys.readouterr().out


def test_foreign_files_of_a_text_folder_are_not_read(tmp_path):
    for name in (".DS_Store", "._a.txt", "a.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    assert [path.name for path in train_pt.text_files(str(tmp_path))] == ["a.txt"]


def test_foreign_files_of_a_model_do_not_count(command, tmp_path):
    """A copy by macOS: ._model.safetensors beside model.safetensors holds no weights."""
    base = copy_of_tiny(tmp_path / "base")
    before = train_pt.fingerprint(base)
    (base / "._model.safetensors").write_bytes(b"\x00\x05\x16\x07" + bytes(60))
    assert train_pt.fingerprint(base) == before
    train_pt.main(command("--max_steps", "1", "--model_name_or_path", base))
    assert weights("pt")


# Checkpoints: only recorded files count; nothing is lost.


def test_foreign_files_break_no_checkpoint(command, monkeypatch):
    killed_at(monkeypatch, 6, command())
    Path("pt/checkpoint-5/.DS_Store").touch()
    Path("pt/checkpoint-5/.ipynb_checkpoints").mkdir()
    Path("pt/checkpoint-5/.ipynb_checkpoints/a.json").write_text("{}")
    assert train_pt.is_whole(Path("pt/checkpoint-5"))
    Path("pt/checkpoint-5/optimizer.pt").unlink()
    assert not train_pt.is_whole(Path("pt/checkpoint-5"))


def test_without_a_whole_checkpoint_the_run_asks_and_deletes_nothing(command, monkeypatch, capsys):
    killed_at(monkeypatch, 11, command())
    for number in (5, 10):
        with Path(f"pt/checkpoint-{number}/optimizer.pt").open("r+b") as file:
            file.truncate(1000)
    before = sorted(Path("pt").rglob("*"))
    line = refusal(command(), capsys)
    assert "--output_dir pt" in line
    assert "checkpoint-10, checkpoint-5" in line
    assert "begin anew in another --output_dir" in line
    assert sorted(Path("pt").rglob("*")) == before


def test_a_broken_checkpoint_in_the_way_is_moved_and_saved_again(command, monkeypatch, capsys):
    killed_at(monkeypatch, 11, command())
    with Path("pt/checkpoint-10/optimizer.pt").open("r+b") as file:
        file.truncate(1000)
    killed_at(monkeypatch, 11, command())
    said = capsys.readouterr().out
    assert "resuming at step 5: pt/checkpoint-10 is broken or superseded, renamed" in said
    assert Path("pt/checkpoint-10.1/optimizer.pt").stat().st_size == 1000
    assert train_pt.is_whole(Path("pt/checkpoint-10"))
    assert train_pt.is_whole(Path("pt/checkpoint-5")), "the broken one counted as one of those kept"


def test_a_folder_of_the_same_name_that_appears_meanwhile_is_replaced(command, monkeypatch):
    at_step(monkeypatch, 4, lambda: Path("pt/checkpoint-5").mkdir())
    train_pt.main(command("--max_steps", "6"))
    assert train_pt.is_whole(Path("pt/checkpoint-5"))


# What will fail, fails first.


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--save_only_model", "true"], ["--save_only_model True", "expected false"]),
        (["--push_to_hub", "true"], ["--push_to_hub True", "hf upload"]),
        (["--deepspeed", "ds.json"], ["--deepspeed", "accelerate launch"]),
        (["--auto_find_batch_size", "true"], ["--auto_find_batch_size True", "--plan"]),
        (["--warmup_ratio", "0.1"],
         ["unknown option: --warmup_ratio 0.1", "--warmup_steps?", "--help_trainer"]),
        (["--lr_scheduler_type", "warmup_stable_decay"],
         ["--lr_scheduler_type warmup_stable_decay", "num_decay_steps"]),
        (["--lr_scheduler_type", "cosine_with_min_lr"],
         ["--lr_scheduler_type cosine_with_min_lr", "min_lr"]),
        (["--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"floor": 1}'], ["floor"]),
        (["--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "no"],
         ["lr_scheduler_type reduce_lr_on_plateau requires an eval strategy"]),
        (["--picture", "afile/x.png"], ["--picture afile/x.png", "afile is no folder"]),
        (["--picture", "dir.png"], ["--picture dir.png", "is a folder"]),
    ],
    ids=lambda value: value[0].strip("-") if value[0].startswith("--") else "",
)
def test_what_cannot_go_well_is_refused_before_the_model_loads(
    options, says, command, monkeypatch, capsys
):
    Path("afile").touch()
    Path("dir.png").mkdir()
    monkeypatch.setattr(train_pt, "build_model", None)
    line = refusal(command(*options), capsys)
    assert all(word in line for word in says), line
    assert not Path("pt").exists()


def test_deepspeed_leaves_nothing_behind(command, capsys):
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    refusal(command("--deepspeed", '{"zero_optimization": {"stage": 3}}'), capsys)
    assert not is_deepspeed_zero3_enabled()


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "awq"])
def test_a_quantised_base_is_refused(method, command, tmp_path, capsys):
    quantised = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    base = copy_of_tiny(tmp_path / "base", quantization_config=quantised)
    line = refusal(command("--model_name_or_path", base), capsys)
    assert f"--model_name_or_path {base}: it is quantised" in line
    assert "pass the 16-bit model" in line


def test_weights_as_bin_are_told_with_the_conversion(command, tmp_path, capsys):
    from transformers import LlamaForCausalLM

    base = copy_of_tiny(tmp_path / "base")
    torch.save(LlamaForCausalLM.from_pretrained(TINY).state_dict(), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    line = refusal(command("--model_name_or_path", base), capsys)
    assert "its weights are in pytorch_model.bin; expected *.safetensors" in line
    code = line.partition('-c "')[2].rpartition('"')[0]
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert (base / "model.safetensors").is_file()


def test_weights_that_explode_before_an_evaluation_give_up_in_a_line(command, monkeypatch, capsys):
    def explode(trainer, *args, **kwargs):
        if trainer.state.global_step == 4:
            next(iter(train_pt.adapter_tensors(trainer.model).values())).data.fill_(float("inf"))
        return evaluate(trainer, *args, **kwargs)

    evaluate = train_pt.PackedTraining.evaluate
    monkeypatch.setattr(train_pt.PackedTraining, "evaluate", explode)
    line = refusal(command(), capsys)
    assert "step 4: the loss of the text held out is nan" in line
    assert "--learning_rate (now 0.01)" in line


def test_a_chart_that_fails_at_the_end_is_a_warning(command, monkeypatch, capsys):
    monkeypatch.setattr(train_pt.Report, "draw", DRAW)
    at_step(monkeypatch, 1, lambda: Path("pictures").rename("p") and Path("pictures").touch())
    train_pt.main(command("--max_steps", "2", "--eval_strategy", "no"))
    assert "warning: metrics or chart not written" in capsys.readouterr().out
    assert Path("pt/trainloss.png").is_file()
    assert json.loads(Path("pt/run.json").read_text())["results"]["steps"] == 2


# Text is text.


def encoded(texts: list[str], tokenizer, folder: Path) -> list[list[int]]:
    folder.mkdir()
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "a.jsonl").write_text(rows)
    corpus = train_pt.tokenize([folder / "a.jsonl"], tokenizer, folder / "cache/key")
    ends = corpus.lengths.cumsum()
    return [corpus.tokens[e - n : e].tolist() for e, n in zip(ends, corpus.lengths, strict=True)]


def test_control_tokens_in_a_page_stay_text(tokenizer, tmp_path):
    page = "春天 <s> 的 </s> <unk>花"
    (ids,) = encoded([page], tokenizer, tmp_path / "a")
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert not {0, 1, 2} & set(ids[1:-1])
    assert tokenizer.decode(ids[1:-1]) == page


def test_lone_surrogates_are_replaced_and_counted(tokenizer, tmp_path, capsys):
    one, two = encoded(["a\ud83db\ud83d", "😀"], tokenizer, tmp_path / "a")
    assert tokenizer.decode(one[1:-1]) == "a\ufffdb\ufffd"
    assert tokenizer.decode(two[1:-1]) == "😀", "a pair is no lone one"
    assert "2 lone surrogates in the text are U+FFFD now" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bad", "reason"),
    [('{"text": "a\x01"}', "control character"), ('{"body": "x"}', "there is no 'text'"),
     ('{"text": 7}', "the text 7 is no string"), ("[]", "cannot be read")])
def test_a_broken_line_is_named_by_its_row(bad, reason, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "x"}\n\n{"text": "x"}\n' + bad + "\n")
    with pytest.raises(train_pt.UserError, match=rf"--dataset {path}, row 4: cannot be") as error:
        list(train_pt.read_texts(path))
    assert reason in str(error.value)
    assert "line 1" not in str(error.value)


def test_a_binary_column_is_named_by_its_row(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": [None, b"x"]}), tmp_path / "a.parquet")
    with pytest.raises(train_pt.UserError, match=r"a\.parquet, row 2: cannot be read"):
        list(train_pt.read_texts(tmp_path / "a.parquet"))


def test_long_documents_are_cut_and_give_the_same_tokens(tokenizer, tmp_path, monkeypatch):
    line = "春天的花開在山上。a second  one\n"
    texts = [line * 9, "\n\n" + line * 4, "word " * 40, "第。" * 70, "無" * 101, "short"]
    whole = encoded(texts, tokenizer, tmp_path / "whole")
    monkeypatch.setattr(train_pt, "PART", 50)
    monkeypatch.setattr(train_pt, "BATCH", 120)
    for text in texts:
        parts = train_pt.cut_text(text)
        assert "".join(parts) == text
        assert max(map(len, parts)) <= 50
    assert encoded(texts, tokenizer, tmp_path / "cut") == whole


def test_one_txt_alone_says_that_nothing_is_held_out(command, tmp_path, capsys):
    (tmp_path / "one.txt").write_text("春天的花開在山上\n" * 20)
    options = command("--dataset", "one.txt", "--max_steps", "1")
    for plan in (["--plan"], []):
        train_pt.main([*options, *plan])
        said = capsys.readouterr().out
        assert "note: --dataset one.txt: too few documents to hold one out" in said
        assert "a .txt is one document" in said


# Locks.


def test_a_file_system_without_locks_is_a_warning(command, monkeypatch, capsys):
    def no_locks(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    train_pt.main(command("--max_steps", "1", "--eval_strategy", "no"))
    warning = "warning: --output_dir pt: this file system has no locks; start no second run"
    assert warning in capsys.readouterr().err
    assert weights("pt")


@pytest.mark.parametrize("ends", ["well", "interrupted", "failed"])
def test_the_lock_ends_with_main(ends, command, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt if ends == "interrupted" else ValueError

    if ends != "well":
        at_step(monkeypatch, 2, interrupt)
    try:
        train_pt.main(command("--max_steps", "3", "--eval_strategy", "no"))
    except (SystemExit, ValueError) as error:
        kept = error  # a notebook keeps the traceback, and with it every local variable
    code = """if True:
        import fcntl
        fcntl.flock(open("pt/.lock"), fcntl.LOCK_EX | fcntl.LOCK_NB)
    """
    subprocess.run([sys.executable, "-c", code], check=True)
    assert ends == "well" or kept


# The plan.

SHAPES_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 61388,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096}


def test_a_plan_needs_a_configuration_alone_and_is_of_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = copy_of_tiny(tmp_path / "base", **SHAPES_7B)
    for path in base.iterdir():
        if path.name != "config.json":
            path.unlink()
    train_pt.main(["--plan", "--plan_gpu_gb", "24", "--model_name_or_path", "base"])
    said = capsys.readouterr().out
    assert "memory on a GPU with liger-kernel" in said
    assert "in all:   13.76 GB" in said
    assert "the longest sequence is 4096 tokens (the model's limit); at 2048 tokens the largest " \
        "batch is 19" in said
    assert "no text at --dataset data/cc_filtered" in said
    assert [path.name for path in tmp_path.iterdir()] == ["base"], "it leaves nothing"
    without = ["--model_name_or_path", "base", "--use_liger_kernel", "false"]
    train_pt.main(["--plan", "--plan_gpu_gb", "24", *without])
    said = capsys.readouterr().out
    assert "memory on a GPU without liger-kernel" in said
    assert "in all:   14.75 GB" in said


def test_a_plan_for_a_gpu_predicts_its_seconds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    copy_of_tiny(tmp_path / "base", **SHAPES_7B)
    train_pt.main([
        "--plan", "--plan_gpu", "a10", "--max_steps", "8712", "--model_name_or_path", "base"])
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if "predicted" in line)
    assert "on one a10, predicted, not measured, with liger-kernel: 51.6 s a step" in line
    assert "1,269 tokens/s, 5.2 days for 8,712 steps" in line
    assert "on 24 GB: at batch 8" in said


def test_a_plan_of_a_hub_model_fetches_no_weights(tmp_path, monkeypatch, capsys):
    import huggingface_hub

    def fetch(name, allow_patterns, ignore_patterns):
        assert not any("safetensors" in pattern for pattern in allow_patterns)
        return str(TINY)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    train_pt.main(["--plan", "--plan_gpu_gb", "16", "--model_name_or_path", "someone/llama"])
    assert "on 16 GB: at batch 8" in capsys.readouterr().out


# What is reported, and what travels with the adapter.


def test_the_adapters_file_says_how_its_base_was_held(command):
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    train_pt.main(command("--max_steps", "1", "--save_steps", "1"))
    train_pt.main(command("--max_steps", "1", "--quantization", "none", name="plain"))

    def held(folder: str) -> dict:
        with safe_open(f"{folder}/adapter_model.safetensors", "pt") as file:
            return json.loads(file.metadata()["luojiu_quantization"])

    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
           "bnb_4bit_compute_dtype": "bfloat16", "device": "cpu"}  # merge_lora.py reads these names
    assert held("pt") == held("pt/checkpoint-1") == nf4
    assert held("plain") == {"load_in_4bit": False, "device": "cpu"}
    assert PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(TINY), "pt")


def test_the_best_adapter_is_reported_with_its_own_figures(command, monkeypatch, capsys):
    def worse_and_worse(trainer, *args, **kwargs):
        total, predicted = measure(trainer, *args, **kwargs)
        return total + predicted * trainer.state.global_step, predicted

    measure = train_pt.PackedTraining.held_out_loss
    monkeypatch.setattr(train_pt.PackedTraining, "held_out_loss", worse_and_worse)
    options = ["--load_best_model_at_end", "true", "--save_steps", "4"]
    train_pt.main(command(*options))
    results = json.loads(Path("pt/run.json").read_text())["results"]
    first = next(row for row in metrics("pt") if "eval_loss" in row)
    assert (first["step"], results["adapter_step"], results["steps"]) == (4, 4, 12)
    assert results["eval_loss"] == first["eval_loss"]
    card = Path("pt/README.md").read_text()
    assert "- adapter_step: 4\n" in card
    assert f"- eval_loss: {first['eval_loss']:.5g}\n" in card
    assert same(weights("pt"), weights("pt/checkpoint-4"))
    assert "(of step 4, the best)" in capsys.readouterr().out


def test_a_folder_in_the_way_is_named(command, capsys):
    Path("pt").mkdir()
    Path("pt/train.log").touch()
    assert "--output_dir pt: holds something else (train.log)" in refusal(command(), capsys)


def test_a_resumed_run_says_nothing_of_transformers(command, tmp_path, run_script):
    words = command("--save_steps", "1", "--max_steps", "3", "--eval_steps", "0.5")
    train_pt.main(words)
    (tmp_path / "pt/run.json").write_text(
        (tmp_path / "pt/checkpoint-3/run.json").read_text())
    shutil.rmtree(tmp_path / "pt/checkpoint-3")
    words += ["--save_steps", "2", "--logging_steps", "2"]
    done = run_script("train_pt.py", *words, cwd=tmp_path)
    assert "FutureWarning" not in done.stderr
    assert "do not match" not in done.stderr + done.stdout
