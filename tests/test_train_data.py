"""Documents to tokens to blocks: nothing lost, nothing twice, nothing across documents."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT

import train_pt

TINY = ROOT / "data" / "sample" / "tiny-llama"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


def random_corpus(lengths: list[int]) -> train_pt.Corpus:
    tokens = np.arange(1000, 1000 + sum(lengths)).astype(np.uint16)  # every token is told apart
    return train_pt.Corpus(tokens, np.array(lengths), np.array(lengths) * 2)


@pytest.mark.parametrize("block_size", [8, 13, 64, 1000])
def test_every_token_of_every_document_appears_once_and_in_order(block_size):
    lengths = [3, 40, 1, 13, 8, 100, 2, 26]
    corpus = random_corpus(lengths)
    order = np.random.default_rng(1).permutation(len(lengths))
    blocks = train_pt.PackedBlocks(corpus, order, block_size, padding=7)
    documents = np.split(corpus.tokens, np.cumsum(lengths)[:-1])
    expected = np.concatenate([documents[i] for i in order])

    seen = np.concatenate([blocks[i]["input_ids"] for i in range(len(blocks))])
    assert all(len(blocks[i]["input_ids"]) == block_size for i in range(len(blocks)))
    assert (seen[: len(expected)] == expected).all()
    assert (seen[len(expected) :] == 7).all()
    assert len(seen) - len(expected) < block_size
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_positions_restart_with_each_document_and_its_first_token_is_no_target():
    corpus = random_corpus([3, 6, 2])
    blocks = train_pt.PackedBlocks(corpus, np.arange(3), 8, padding=7)
    first, second = blocks[0], blocks[1]
    assert first["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    ignored = first["labels"] == train_pt.IGNORED
    assert ignored.tolist() == [True, False, False, True, False, False, False, False]
    # The rest of the second document, the third, padding.
    assert second["position_ids"].tolist() == [0, 0, 1, 0, 1, 2, 3, 4]
    assert second["labels"].tolist() == [-100, -100, 1010, -100, -100, -100, -100, -100]


def test_bos_and_eos_stand_around_each_document(tokenizer, tmp_path):
    texts = ["春天的花", "a second one, somewhat longer", "第三"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    corpus = train_pt.tokenize([tmp_path / "a.jsonl"], tokenizer, tmp_path / "cache")
    documents = np.split(corpus.tokens, np.cumsum(corpus.lengths)[:-1])
    for text, ids in zip(texts, documents, strict=True):
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids.tolist() == [tokenizer.bos_token_id, *plain, tokenizer.eos_token_id]
    assert corpus.characters.tolist() == [len(t) for t in texts]


def test_parquet_jsonl_and_txt_are_read_alike_and_the_cache_is_used(tokenizer, tmp_path):
    texts = ["春天的花\n第二行", "第三"]
    folder = tmp_path / "text"
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "id": [1, 2]}), folder / "a.parquet")
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    for number, text in enumerate(texts):
        (folder / f"c{number}.txt").write_text(text)
    for below in (".work", "rejected"):  # filter_cc.py's own, not text to learn from
        (folder / below).mkdir()
        (folder / below / "refused.txt").write_text("垃圾")
    files = train_pt.text_files(str(folder))
    assert [t for f in files for t in train_pt.read_texts(f)] == texts * 3
    corpus = train_pt.tokenize(files, tokenizer, tmp_path / "cache")
    third = len(corpus.tokens) // 3
    assert (corpus.tokens[:third] == corpus.tokens[-third:]).all()
    again = train_pt.tokenize([], tokenizer, tmp_path / "cache")  # reads no file
    assert (again.tokens == corpus.tokens).all()
    assert (again.lengths == corpus.lengths).all()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "cannot be read"),
        ("a.jsonl", b'{"body": "x"}\n', "cannot be read"),
        ("a.txt", b"\xff\xfe\xfa", "cannot be read"),
        ("a.parquet", b"no parquet at all", "cannot be read"),
        ("a.csv", b"x", "no text there; expected .txt, .jsonl, .parquet"),
        ("a.txt", b"", "holds no text"),
    ],
)
def test_bad_text_is_refused_by_name(name, content, reason, tokenizer, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(train_pt.UserError, match=reason) as error:
        train_pt.tokenize(train_pt.text_files(str(tmp_path)), tokenizer, tmp_path / "out/cache/a")
    assert "--dataset" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [name], "a refused file leaves nothing"


def test_of_two_runs_that_tokenise_at_once_the_second_waits(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("春天的花")
    batches, reached, go_on = train_pt.batches_of_text, threading.Event(), threading.Event()

    def slowly(texts):
        yield from batches(texts)
        reached.set()
        go_on.wait()

    def tokens() -> list[int]:
        return train_pt.tokenize([tmp_path / "a.txt"], tokenizer, tmp_path / "two/key").tokens

    monkeypatch.setattr(train_pt, "batches_of_text", slowly)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(tokens)
        assert reached.wait(10)
        second = pool.submit(tokens)
        time.sleep(0.3)
        assert not second.done()
        go_on.set()
        assert np.array_equal(first.result(10), second.result(10))
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["key"]


def test_a_missing_dataset_names_the_script_to_run_first():
    with pytest.raises(train_pt.UserError, match=r"run python filter_cc\.py first"):
        train_pt.text_files("data/cc_filtered_nowhere")


@pytest.mark.parametrize(
    ("documents", "fraction", "held"),
    [(1000, 0.01, 10), (150, 0.01, 4), (30, 0.01, 3), (3, 0.01, 0)],
)
def test_validation_is_held_out_by_whole_documents(documents, fraction, held):
    corpus = random_corpus([5] * documents)
    args = SimpleNamespace(seed=1, eval_fraction=fraction, eval_strategy="steps", block_size=16)
    train, held_out = train_pt.split_corpus(corpus, args, padding=0)

    def tokens(blocks):
        if blocks is None:
            return set()
        every = np.concatenate([blocks[i]["input_ids"] for i in range(len(blocks))])
        return set(every.tolist()) - {0}

    assert len(tokens(held_out)) == 5 * held
    assert not tokens(train) & tokens(held_out)
    assert len(tokens(train) | tokens(held_out)) == 5 * documents


def test_the_batch_carries_its_cut_points():
    corpus = random_corpus([3, 6, 2, 9])
    blocks = train_pt.PackedBlocks(corpus, np.arange(4), 10, padding=7)
    batch = train_pt.Collate(group_size=4, flash=False)([blocks[0], blocks[1]])
    assert next(iter(batch)) == "input_ids"
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 10)
    assert batch["cuts"]["documents"]["runs"] == [(1, 2), (3, 1), (6, 1), (9, 1)]
    assert torch.equal(batch["cuts"]["documents"]["order"].sort().values, torch.arange(20))
    for half in ("groups", "shifted"):
        assert torch.equal(batch["cuts"][half]["order"].sort().values, torch.arange(20))


def test_what_a_killed_run_left_of_the_cache_is_taken_over(tokenizer, tmp_path, monkeypatch):
    """After kill -9 a part of it is there; another exception takes its own part away."""
    text, cached = tmp_path / "a.jsonl", tmp_path / "cache" / "key"
    text.write_text(json.dumps({"text": "春眠不覺曉"}) + "\n")
    left = tmp_path / "cache" / "key.building"
    left.mkdir(parents=True)
    (left / "tokens.bin").write_bytes(bytes(10**6))
    whole = train_pt.tokenize([text], tokenizer, cached).tokens.tolist()
    assert tokenizer.decode(whole[1:-1]) == "春眠不覺曉"
    assert [path.name for path in cached.parent.iterdir()] == ["key"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        def interrupted(*args):
            raise KeyboardInterrupt

        patch.setattr(np, "save", interrupted)
        train_pt.tokenize([text], tokenizer, cached.with_name("other"))
    assert [path.name for path in cached.parent.iterdir()] == ["key"]
