"""The probes of an evaluation: Taiwan's wording, and tasks with examples in the context."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from matplotlib.figure import Figure
from train_support import DRAW, TINY, metrics, same, weights
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import filter_cc
import train_pt

pytest_plugins = ["train_support"]
torch.set_num_threads(1)
TASKS = {"copy": lambda words: words, "reverse": lambda words: words[::-1]}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def trainer_with(model, tokenizer, probes: dict | None = None) -> SimpleNamespace:
    """What the probes need of a trainer."""
    trainer = SimpleNamespace(
        model=model, args=SimpleNamespace(device=torch.device("cpu")), stopping=lambda: False,
        data_collator=train_pt.Collate(None, flash=False),
        accelerator=SimpleNamespace(autocast=nullcontext),
        report=SimpleNamespace(probes=train_pt.all_probes(tokenizer) if probes is None else probes))
    for name in ("answer_scores", "probe"):
        method = getattr(train_pt.PackedTraining, name).__get__(trainer)
        setattr(trainer, name, method)
    return trainer


class FromTable:
    """A model whose next token after a row's beginning is known: the logits are 5 there, else 0;
    a beginning that it does not know leaves all tokens alike."""

    def __init__(self, rows: list[list[int]], size: int = 1000):
        self.size = size
        self.next = {tuple(r[:n]): r[n] for r in rows for n in range(1, len(r))}

    def eval(self):
        return self

    def __call__(self, input_ids, **kwargs):
        logits = torch.zeros(*input_ids.shape, self.size)
        for b, ids in enumerate(input_ids.tolist()):
            for n in range(1, len(ids) + 1):
                if tuple(ids[:n]) in self.next:
                    logits[b, n - 1, self.next[tuple(ids[:n])]] = 5
        return SimpleNamespace(logits=logits)


# The pairs and the tasks.


def test_each_pair_is_one_sentence_in_two_wordings():
    lines = (ROOT / "data/probes/wording.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# Sentences in Taiwan's wording")
    pairs = train_pt.wording_pairs()
    assert len(lines) - 1 == len(pairs) / 2 == 200
    assert len({*pairs}) == 400
    elsewhere = {*filter_cc.listed_words("mainland"), *filter_cc.listed_words("hongkong")}
    for (_, taiwan), (_, other), line in zip(pairs[::2], pairs[1::2], lines[1:], strict=True):
        before, ours, theirs, after = line.replace("{", "|").replace("}", "|").split("|")
        assert (taiwan, other) == (before + ours + after, before + theirs + after)
        assert taiwan[-1] in "。？！"
        assert not [word for word in elsewhere if word in taiwan]


@pytest.mark.parametrize("task", ["copy", "reverse", "map"])
def test_an_answer_follows_from_the_examples(task):
    found = train_pt.in_context_tasks(task)
    assert found == train_pt.in_context_tasks(task), "not the same at each evaluation"
    assert len({*found}) == 32
    for prompt, answer in found:
        *examples, question = prompt.split("\n")
        pairs = [example.split(" = ") for example in examples]
        asked = question.removesuffix(" =")
        if task == "map":
            assert len(pairs) == 8
            assert answer == f" {dict(pairs)[asked]}"
            continue
        rule = TASKS[task]
        assert [rule(a.split()) for a, _ in pairs] == [b.split() for _, b in pairs]
        assert answer.split() == rule(asked.split())
        assert not {*asked.split()} & {*" ".join(examples).split()}, "it need not read the question"


# The figures.


def test_scores_are_those_of_transformers_row_by_row(tokenizer):
    """Against the plain model, one row at a time, without padding; odd lengths."""
    rows = train_pt.probe_rows(tokenizer, [
        ("", "請把這份報告列印出來。"), ("A = B\nC =", " D"), ("", "山"), ("A B =", " A B")])
    plain = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float64).eval()
    train_pt.register_attention()
    ours = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float64, attn_implementation="s2")
    trainer = trainer_with(ours, tokenizer)
    for (ids, begin), (likelihood, solved) in zip(rows, trainer.answer_scores(rows), strict=True):
        assert tokenizer.decode(ids[begin:]) in ("請把這份報告列印出來。", "D", "山", "A B")
        with torch.no_grad():
            logits = plain(torch.tensor([ids])).logits[0].double()
        places = range(begin, len(ids))
        of_answer = [logits[at - 1].softmax(-1)[ids[at]].log() for at in places]
        assert likelihood == pytest.approx(float(sum(of_answer)), rel=1e-5)
        assert solved == all(int(logits[at - 1].argmax()) == ids[at] for at in places)


@pytest.mark.parametrize(("preferred", "share"), [(0, 1.0), (1, 0.0), (None, 0.5)])
def test_a_model_that_always_prefers_one_wording(preferred, share, tokenizer):
    """It knows the sentences of one side; None: it knows both alike, and a tie counts half."""
    rows = train_pt.all_probes(tokenizer)["taiwan_wording"]
    chosen = rows[preferred::2] if preferred is not None else []
    longest = max(len(ids) for ids, _ in rows)
    if preferred is None:  # as many tokens in both: then nothing tells them apart
        rows = [([*ids, *[7] * (longest - len(ids))], begin) for ids, begin in rows]
    model = FromTable([ids for ids, _ in chosen])
    trainer = trainer_with(model, tokenizer, {"taiwan_wording": rows})
    assert trainer.probe() == {"eval_taiwan_wording": share}


def test_a_model_that_follows_its_context_solves_all_and_a_random_one_none(tokenizer):
    probes = train_pt.all_probes(tokenizer)
    tasks = {name: rows for name, rows in probes.items() if name.startswith("in_context")}
    oracle = trainer_with(FromTable([ids for rows in tasks.values() for ids, _ in rows]),
                          tokenizer, tasks)
    assert oracle.probe() == dict.fromkeys(
        ["eval_in_context_copy", "eval_in_context_reverse", "eval_in_context_map"], 1.0)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    train_pt.register_attention()
    untrained = LlamaForCausalLM(LlamaConfig(
        **sizes, vocab_size=1000, num_attention_heads=4, attn_implementation="s2"))
    assert 150_000 < untrained.num_parameters() < 250_000
    shares = trainer_with(untrained, tokenizer, tasks).probe()
    assert max(shares.values()) <= 1 / 8  # the chance of a guess among the letters of `map`


def test_half_an_answer_is_no_answer(tokenizer):
    rows = train_pt.all_probes(tokenizer)["in_context_copy"]
    trainer = trainer_with(
        FromTable([ids[:-1] for ids, _ in rows]), tokenizer, {"in_context_copy": rows})
    assert trainer.probe() == {"eval_in_context_copy": 0.0}


# Whole runs.


def test_probes_are_in_metrics_chart_and_card_and_change_nothing(command, monkeypatch):
    drawn = []

    def look(figure, *args, **kwargs):
        drawn.append({axes.get_ylabel(): [line.get_label() for line in axes.lines]
                      for axes in figure.axes})
        save(figure, *args, **kwargs)

    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", look)
    monkeypatch.setattr(train_pt.Report, "draw", DRAW)
    Path("more.txt").write_text("人們從早到晚走過河邊的小路")
    options = ["--max_steps", "2", "--eval_steps", "1", "--eval_dataset", "prose=more.txt"]
    train_pt.main(command(*options, "--probes", "true"))
    names = ["taiwan_wording", "in_context_copy", "in_context_reverse", "in_context_map"]
    for row in (row for row in metrics("pt") if "eval_loss" in row):
        assert all(0 <= row[f"eval_{name}"] <= 1 for name in names)
    card = Path("pt/README.md").read_text()
    assert "| taiwan wording | in context copy | in context reverse | in context map |" in card
    assert drawn[-1]["loss (nats per token)"] == ["train", "held out", "prose"]
    assert drawn[-1]["bits per character"] == ["held out", "prose"]
    assert drawn[-1]["probes (share right)"] == [name.replace("_", " ") for name in names]
    train_pt.main(command(*options, name="without"))
    assert not any(f"eval_{names[0]}" in row for row in metrics("without"))
    assert "probes (share right)" not in drawn[-1]
    assert same(weights("pt"), weights("without"))


def test_without_the_pairs_only_the_tasks_are_measured(command, monkeypatch, capsys):
    monkeypatch.delattr(train_pt, "__file__")  # as in a notebook: the working folder counts
    train_pt.main(command("--max_steps", "1", "--probes", "true"))
    assert "note: data/probes/wording.txt is not here" in capsys.readouterr().out
    measured = next(row for row in metrics("pt") if "eval_loss" in row)
    assert "eval_taiwan_wording" not in measured
    assert "eval_in_context_map" in measured
