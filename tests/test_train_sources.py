"""Several sources: their ratio in tokens, evenly mixed, exact to resume, counted to the token."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train_data import random_corpus
from test_train_hands import refusal
from train_support import at_step, kill, killed_at, metrics, same, terminate, weights

import train_pt

pytest_plugins = ["train_support"]
torch.set_num_threads(1)


def packed(lengths: list[int], first: int = 0) -> train_pt.PackedBlocks:
    corpus = random_corpus(lengths)
    corpus.tokens[:] = corpus.tokens + first
    return train_pt.PackedBlocks(corpus, np.arange(len(lengths)), 8, padding=7)


def read(mixture: train_pt.Mixture, sequences: int) -> list[dict]:
    """The first sequences of a run, as the data loader asks for them."""
    found = []
    for number in range(sequences):
        epoch, index = divmod(number, len(mixture))
        if index == 0:
            mixture.set_epoch(epoch)
        found.append(mixture[index])
    return found


SIZES = {"first": [40, 33, 9, 50, 21], "second": [19, 6, 11], "third": [30, 90, 77, 13, 60]}


@pytest.fixture
def mixture() -> train_pt.Mixture:
    blocks = [packed(lengths, 1000 * n) for n, lengths in enumerate(SIZES.values())]
    return train_pt.Mixture(blocks, [4, 2, 1], seed=5)


def test_tokens_seen_are_those_that_were_read(mixture):
    seen = np.zeros(3, int)
    for number, block in enumerate(read(mixture, 100), 1):
        filled = block["input_ids"][block["position_ids"] >= 0]
        real = filled[block["input_ids"][block["position_ids"] >= 0] >= 1000]
        source = 0 if real[0] < 2000 else 1 if real[0] < 3000 else 2
        last = mixture.sources[source]
        padding = 8 - (last.total % 8 or 8)
        is_last = real[-1] == last.tokens[-1]
        seen[source] += 8 - padding * is_last
        assert mixture.tokens_seen(number) == seen.tolist()


def test_an_epoch_is_of_the_first_source_and_the_others_go_on(mixture):
    first = len(mixture.sources[0])
    assert mixture.counts == [first, round(first / 2), round(first / 4)]
    reads = read(mixture, 12 * len(mixture))
    for source, blocks in enumerate(mixture.sources):
        low = 1000 * (source + 1)
        starts = [b["input_ids"][0] for b in reads if low <= b["input_ids"][0] < low + 1000]
        whole = {blocks[i]["input_ids"][0] for i in range(len(blocks))}
        passes = [starts[i : i + len(blocks)] for i in range(0, len(starts), len(blocks))]
        for times in passes[:-1]:
            assert set(times) == whole, "each block once before any comes again"
        assert len(passes) > 1
        assert passes[0] != passes[1], "every pass in an order of its own"


def test_sources_are_mixed_evenly(mixture):
    order = [source for source, _ in mixture.order.tolist()]
    for source, count in enumerate(mixture.counts):
        at = np.flatnonzero(np.array(order) == source)
        assert np.abs(at / len(order) - (np.arange(count) + 0.5) / count).max() < 1.5 / count


def test_one_source_comes_as_trainer_shuffled_it_before():
    blocks = packed(SIZES["third"])
    mixture = train_pt.Mixture([blocks], None, seed=5)
    for epoch in (0, 3):
        mixture.set_epoch(epoch)
        generator = torch.Generator().manual_seed(5 + epoch)
        assert mixture.order[:, 1].tolist() == torch.randperm(
            len(blocks), generator=generator).tolist()


@pytest.fixture
def english(tmp_path) -> Path:
    path = tmp_path / "english.jsonl"
    rows = [{"text": f"Page {n}. " + "The hills are green in spring. " * (n % 3 + 1)}
            for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def mixed(command, text, english):
    """The options of a run on both sources."""
    def options(*more: object, name: str = "pt") -> list[str]:
        weight = [] if "--dataset_weight" in more else ["--dataset_weight", 3, 1]
        sources = ["--dataset", text, english, *weight]
        return command(*sources, "--lora_dropout", "0.3", *more, name=name)
    return options


@pytest.mark.parametrize("stop", [kill, terminate])
def test_a_stopped_run_goes_on_bit_for_bit_and_counts_exactly(stop, mixed, monkeypatch):
    train_pt.main(mixed(name="whole"))
    if stop is kill:
        killed_at(monkeypatch, 8, mixed())
    else:
        at_step(monkeypatch, 7, stop)
        with pytest.raises(SystemExit):
            train_pt.main(mixed())
    train_pt.main(mixed())
    assert same(weights("pt"), weights("whole"))
    ours, theirs = ([r for r in metrics(name) if "loss" in r] for name in ("pt", "whole"))
    assert ours == theirs
    last = ours[-1]
    assert last["tokens_seen"] == last["tokens_seen_text"] + last["tokens_seen_english"]
    assert last["tokens_seen_english"] / last["tokens_seen"] == pytest.approx(0.25, abs=0.03)
    results = json.loads(Path("pt/run.json").read_text())["results"]
    assert results["tokens_seen_english"] == last["tokens_seen_english"]


def test_each_source_is_measured_apart(mixed):
    train_pt.main(mixed("--max_steps", "4"))
    row = next(row for row in metrics("pt") if "eval_loss" in row)
    assert row["eval_loss_english"] != row["eval_loss"]
    assert row["eval_bits_per_character_english"] > 0
    card = Path("pt/README.md").read_text()
    assert "| epoch | step | loss | bits per character | loss english | bits per" in card
    assert f"{row['eval_bits_per_character_english']:.4f} |" in card


def test_more_text_is_evaluated_and_not_trained_on(command, text, english):
    train_pt.main(command("--max_steps", "4", name="alone"))
    train_pt.main(command("--max_steps", "4", "--eval_dataset", f"wiki={english}"))
    assert same(weights("pt"), weights("alone"))
    row = next(row for row in metrics("pt") if "eval_loss" in row)
    assert row["eval_bits_per_character_wiki"] > 0
    assert row["eval_loss"] == next(r["eval_loss"] for r in metrics("alone") if "eval_loss" in r)
    assert "bits per character wiki |" in Path("pt/README.md").read_text()


def test_the_plan_says_tokens_share_and_epochs_of_each(mixed, capsys):
    train_pt.main(mixed("--plan", "--max_steps", "-1", "--num_train_epochs", "2"))
    said = capsys.readouterr().out
    assert "text: " in said
    assert "2.00 epochs" in said
    assert "english: " in said
    assert "documents: 36" in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--dataset", "{text}", "{text}"], "named twice"),
        (["--dataset", "{text}", "{text.parent}/../{text.parent.name}/text.jsonl"], "named twice"),
        (["--dataset_weight", "9", "1"], "--dataset_weight 9 1: expected a number for each"),
        (["--dataset", "{text}", "{english}", "--dataset_weight", "9"], "--dataset_weight 9: "),
        (["--dataset", "{text}", "{english}", "--dataset_weight", "9", "0"], "9 0: expected num"),
        (["--dataset", "{text}", "{english}", "--dataset_weight", "-1", "2"], "-1 2: expected"),
        (["--dataset", "{text}", "{english}", "--dataset_weight", "nan", "1"], "nan 1: expected"),
        (["--dataset", "{text}", "{english}", "--dataset_weight", "1", "inf"], "1 inf: expected"),
        (["--dataset", "{text}", "empty.jsonl"], "--dataset empty.jsonl: holds no text"),
        (["--dataset", "{text}", "gone"], "--dataset gone: there is no such file"),
        (["--eval_dataset", "{text}"], "text.jsonl: expected name=path"),
        (["--eval_dataset", "text={text}"], "expected name=path, each name once and none of text"),
        (["--eval_dataset", "wiki=gone"], "--eval_dataset gone: there is no such file"),
        (["--eval_dataset", "wiki=empty.jsonl"], "empty.jsonl: holds no text"),
    ],
)
def test_wrong_sources_and_weights_are_a_line_each(
    options, says, command, text, english, capsys
):
    Path("empty.jsonl").write_text("\n")
    options = [word.format(text=text, english=english) for word in options]
    assert says in refusal(command(*options), capsys)
    assert not Path("pt").exists()


def test_another_ratio_is_another_run(mixed, monkeypatch, capsys):
    killed_at(monkeypatch, 6, mixed())
    said = refusal(mixed("--dataset_weight", "1", "1"), capsys)
    assert "dataset_weight was [3.0, 1.0], now [1.0, 1.0]" in said
