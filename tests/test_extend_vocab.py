"""extend_vocab.py: ids kept, pieces alive, runtimes agreed, rows exact, refusals clear."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from io import BytesIO
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import extend_vocab as script

BASE_SIZE, NEW_SIZE = 359, 6239  # odd on purpose; 5,401 characters and some 400 words are new
HIDDEN = 36

# --- Material ------------------------------------------------------------------------------------


def words(seed: int, count: int = 900) -> list[str]:
    """Made-up words of two to four characters, the same for the same seed."""
    chance = random.Random(seed)
    common = script.BIG5_LEVEL_1[:1200]
    return ["".join(chance.choices(common, k=chance.choice([2, 2, 3, 4]))) for _ in range(count)]


def write_corpus(path: Path, seed: int = 0, lines: int = 800) -> Path:
    """Write lines of made-up words with some ASCII; words late in the list are rarer."""
    chance, vocabulary = random.Random(seed), words(seed)
    ranks = [1 / (rank + 10) for rank in range(len(vocabulary))]
    rows = []
    for _ in range(lines):
        row = chance.choices(vocabulary, ranks, k=chance.randint(8, 20))
        row.insert(3, chance.choice(["，", "。", " GPU ", "2026", "\u3000", "👍"]))
        rows.append("".join(row))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def train_base(**changes) -> bytes:
    """A SentencePiece model with the settings of Llama 2's, on a little English."""
    chance, text = random.Random(0), BytesIO()
    stems = ["token", "model", "train", "layer", "the", "of", "and", "text", "return", "self"]
    lines = [" ".join(chance.choices(stems, k=12)) + ", 3 x\n    y" for _ in range(300)]
    settings = {"model_type": "bpe", "vocab_size": BASE_SIZE, "required_chars": "中文的一"}
    settings |= {"byte_fallback": True, "split_digits": True, "allow_whitespace_only_pieces": True}
    settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=text, minloglevel=2, **settings | changes)
    return text.getvalue()


def write_base(folder: Path, tied: bool = False, dtype=torch.bfloat16, shard: str = "1GB") -> Path:
    """A small random Llama in the files that a publisher provides."""
    torch.manual_seed(0)
    tokenizer = train_base()
    sizes = {"intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {"vocab_size": BASE_SIZE, "hidden_size": HIDDEN, "tie_word_embeddings": tied}
    config = LlamaConfig(**sizes)
    model = LlamaForCausalLM(config).to(dtype)
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, True
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    (folder / "LICENSE.txt").write_text("terms\n")
    return folder


@pytest.fixture(autouse=True)
def _working_directory(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("vocab") / "base")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("vocab") / "corpus.txt")


@pytest.fixture(scope="module")
def extended(base, corpus, tmp_path_factory) -> Path:
    """A finished run with the default settings on the small base."""
    home = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        script.main(options(base, corpus, "--eval_loss", "yes"))
    return home / "outputs" / "extended"


def options(base: Path, corpus: Path, *more: object) -> list[str]:
    """A short run; another --corpus among the further options takes the place of the first."""
    start = ["--base_model", base, "--vocab_size", NEW_SIZE, "--eval_loss", "no"]
    start += [] if "--corpus" in more else ["--corpus", corpus]
    return [str(word) for word in (*start, *more)]


def proto(folder: Path) -> ModelProto:
    model = ModelProto()
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    return model


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def refusal(capsys, *argv: object, code: int = 2) -> str:
    """What the script says when it refuses: one line, and the exit code of a user's mistake."""
    with pytest.raises(SystemExit) as stop:
        script.main([str(word) for word in argv])
    assert stop.value.code == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


# --- The tokenizer -------------------------------------------------------------------------------


def test_the_base_keeps_its_ids_and_everything_has_the_asked_size(base, extended):
    old, new = ([(p.piece, p.score, p.type) for p in proto(f).pieces] for f in (base, extended))
    assert new[: len(old)] == old
    assert len(new) == NEW_SIZE
    assert len({piece for piece, _, _ in new}) == NEW_SIZE
    assert len(AutoTokenizer.from_pretrained(extended)) == NEW_SIZE
    assert json.loads((extended / "config.json").read_text())["vocab_size"] == NEW_SIZE
    assert weights(extended)[script.EMBEDDING].shape == (NEW_SIZE, HIDDEN)
    assert weights(extended)[script.HEAD].shape == (NEW_SIZE, HIDDEN)


def test_new_scores_are_distinct_falling_and_above_the_base(base, extended):
    size = len(proto(base).pieces)
    scores = [piece.score for piece in proto(extended).pieces]
    assert scores[size:] == sorted(set(scores[size:]), reverse=True)
    assert min(scores[size:]) > max(scores[:size])


def test_every_new_piece_is_alive_inside_a_text(base, extended):
    """Counted without the script: an ASCII character keeps the prefix space away from the piece."""
    tokenizer = sentencepiece.SentencePieceProcessor(str(extended / "tokenizer.model"))
    size = len(proto(base).pieces)
    for number in range(size, NEW_SIZE):
        surface = tokenizer.id_to_piece(number).replace("▁", " ")
        assert tokenizer.encode(f"={surface}")[-1] == number
        assert not any("!" <= sign <= "~" for sign in surface)


def test_all_of_big5_level_1_is_in(extended):
    assert len(script.BIG5_LEVEL_1) == 5401
    assert (script.BIG5_LEVEL_1[0], script.BIG5_LEVEL_1[-1]) == ("一", "籲")
    assert set(script.BIG5_LEVEL_1) <= {piece.piece for piece in proto(extended).pieces}


def test_transformers_and_sentencepiece_agree_and_give_the_text_back(extended):
    chance = random.Random(5)
    signs = [" ", "  ", "\n", "\t", "a", "the ", " token", "42", "，", "😀", "é", "ㄅ"]
    signs += words(0, 300)
    texts = ["".join(chance.choices(signs, k=chance.randint(1, 40))) for _ in range(2000)]
    texts += [" 中", "  中", "中 ", "中  \n\n  文", ""]
    ours = sentencepiece.SentencePieceProcessor(str(extended / "tokenizer.model"))
    theirs = AutoTokenizer.from_pretrained(extended)
    for text in texts:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids) == text
    assert theirs("中")["input_ids"][0] == theirs.bos_token_id == 1


def test_a_saved_and_loaded_tokenizer_gives_the_same_ids(extended, tmp_path):
    AutoTokenizer.from_pretrained(extended).save_pretrained(tmp_path)
    text = "  中" + "".join(words(0, 50)) + " the token"
    one, two = (AutoTokenizer.from_pretrained(folder)(text) for folder in (extended, tmp_path))
    assert one["input_ids"] == two["input_ids"]


def test_the_bases_settings_are_kept(base, corpus, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    settings = {"model_max_length": 777, "add_eos_token": True, "chat_template": "{{ messages }}"}
    settings |= {"pad_token": "<pad>", "bos_token": {"content": "<s>", "__type": "AddedToken"}}
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(settings))
    script.main(options(tmp_path / "base", corpus))
    tokenizer = AutoTokenizer.from_pretrained("outputs/extended")
    assert (tokenizer.model_max_length, tokenizer.chat_template) == (777, "{{ messages }}")
    assert tokenizer.pad_token is None  # the base has no such piece, so there is no row for it
    ids = tokenizer("中")["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_a_dead_candidate_makes_way_for_the_next(base):
    base = proto(base)
    candidates = ["乙丙", "甲乙丙丁", "戊己", "庚辛", *"甲乙丙丁戊己庚辛"]
    model, dead = script.merge_pieces(base, candidates, len(base.pieces) + 10)
    assert dead == ["甲乙丙丁"]  # only 乙丙 forms first, then 甲乙 and 丙丁 would be needed
    new = [piece.piece for piece in model.pieces][len(base.pieces) :]
    assert new == ["乙丙", "戊己", *"甲乙丙丁戊己庚辛"]


def test_equal_scores_would_leave_dead_pieces(base):
    """The usual recipe, and the reason for ours: with equal scores the leftmost pair goes first."""
    base = proto(base)
    size, candidates = len(base.pieces), ["乙丙", "乙丙丁", "甲乙丙丁", "甲乙", *"甲乙丙丁"]
    model, dead = script.merge_pieces(base, candidates, size + len(candidates))
    assert dead == [] == script.dead_pieces(model, size)
    for piece in model.pieces[size:]:
        piece.score = 0
    assert script.dead_pieces(model, size) == ["甲乙丙丁"]


def test_pieces_that_occur_once_are_left_out():
    text = "甲乙，甲乙丙。甲乙丙丁戊己庚辛壬癸"
    assert script.first_singleton(["甲乙", "甲乙丙", "丁戊", "己庚"], text) == 2
    assert script.first_singleton(["甲乙", "甲乙丙"], text) == 2
    assert script.first_singleton([], text) == 0


def test_variant_glyphs_become_taiwans_but_common_characters_stay():
    forms = script.taiwan_forms()
    assert "爲了山峯裏的羣衆".translate(forms) == "為了山峰裡的群眾"
    assert "空氣污染、祕密、嘴脣".translate(forms) == "空氣污染、祕密、嘴脣"


def test_segments_hold_no_ascii_and_are_short():
    text = "中文abc，再 中文\n" + "長" * 2500 + " 3.5 \u2581尾"
    found = list(script.segments(text))
    assert found == ["中文", "，再 中文", "長" * 1000, "長" * 1000, "長" * 500 + " ", "尾"]


def test_no_piece_holds_an_invisible_sign_or_a_curly_quote():
    signs = "\u200b\u200c\u200d\u2060\ufeff\xad\x85\u2028\u2029\ufe0f\u202e\U000e0100"
    text = "".join(f"甲乙{sign}丙丁" for sign in signs)
    assert set(script.segments(text)) == {"甲乙", "丙丁甲乙", "丙丁"}
    assert list(script.segments("他說：“好‘的’。”")) == ["他說：「好『的』。」"]


def test_the_share_of_simplified_text():
    assert script.simplified_share(["這個軟體的品質，後面里長台灣"]) == 0
    assert script.simplified_share(["这个软件的质量"]) == 1
    assert script.simplified_share(["這个", "个個"]) == 0.5  # 这 and 個 twice, 个 twice
    assert script.simplified_share(["abc 中文"]) == 0


def test_a_simplified_corpus_is_said_to_be_one(tmp_path, capsys):
    texts = {"simple.txt": "这个软件的质量\n" * 99, "full.txt": "這個軟體的品質\n" * 99}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    args = script.Arguments(corpus=list(texts), corpus_weight=[1, 1])
    script.read_corpora(args, {name: [tmp_path / name] for name in texts})
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: --corpus simple.txt: 100% ") and "s2tw" in warning


def test_control_pieces_of_the_base_stay_special(base, corpus, tmp_path):
    """<pad> and <mask> as the trainer puts them in; text that spells one is left out of the
    proof, since only Transformers takes it for the token."""
    shutil.copytree(base, tmp_path / "base")
    controlled = train_base(control_symbols="<mask>,<sep>", pad_id=3)
    (tmp_path / "base" / "tokenizer.model").write_bytes(controlled)
    with corpus.open(encoding="utf-8") as file:
        (tmp_path / "corpus.txt").write_text(file.read() + "中<mask>文\n" * 200, encoding="utf-8")
    script.main(options(tmp_path / "base", tmp_path / "corpus.txt"))
    tokenizer = AutoTokenizer.from_pretrained("outputs/extended")
    for piece in ("<unk>", "<s>", "</s>", "<pad>", "<mask>", "<sep>"):
        number = tokenizer.convert_tokens_to_ids(piece)
        assert tokenizer.added_tokens_decoder[number].special
        assert tokenizer.decode([number], skip_special_tokens=True) == ""


def test_weights_decide_whose_words_get_in(tmp_path):
    one = write_corpus(tmp_path / "one.txt", seed=1)
    two = write_corpus(tmp_path / "two.txt", seed=2)

    def share_of_two(weight: float) -> float:
        args = script.Arguments(corpus=[str(one), str(two)], corpus_weight=[1, weight])
        train, _ = script.read_corpora(args, {str(one): [one], str(two): [two]})
        pieces = script.train_pieces(train, args, 100)
        top = [piece for piece in pieces if len(piece) > 1][:300]
        return sum(any(piece in word for word in words(2)) for piece in top) / len(top)

    assert share_of_two(0.1) < 0.4 < 0.6 < share_of_two(10)


def test_the_report_is_on_text_that_was_not_trained_on(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.txt", lines=500)
    args = script.Arguments(corpus=[str(corpus)], corpus_weight=[1])
    train, held_out = script.read_corpora(args, {str(corpus): [corpus]})
    assert len(train) == 490 and len(held_out) == 10
    assert not {text for _, text in train} & set(held_out)


def test_measures_by_hand(base):
    """中 is a piece of the base, 甲 three bytes, a line break one byte that does not count."""
    figures = script.measure(proto(base), ["中甲\n", "中"])
    assert figures["characters_per_token"] == 4 / 8  # two prefix spaces, 中 3 1, 中
    assert figures["byte_token_share"] == 3 / 8


def test_text_parquet_and_jsonl_read_alike(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = ["第一篇，文字。", "第二篇 text"]
    (tmp_path / "a.txt").write_text("\n".join(texts), encoding="utf-8")
    lines = [json.dumps({"text": text, "id": 1}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    for path in script.find_texts(str(tmp_path), "--corpus"):
        assert list(script.documents(path, "--corpus")) == texts


def test_text_as_it_comes(tmp_path):
    """A BOM, Windows' line ends, blank lines and records, a binary column, suffixes in capitals."""
    import pyarrow
    import pyarrow.parquet

    bom = b"\xef\xbb\xbf"
    (tmp_path / "a.TXT").write_bytes(bom + "甲\r\n\r\n \r\n乙".encode())
    lines = ['{"text": "甲"}', "", "  ", '{"text": null}', '{"text": " "}', '{"text": "乙"}', ""]
    (tmp_path / "a.jsonl").write_bytes(bom + "\r\n".join(lines).encode())
    column = pyarrow.array(["甲".encode(), None, b"", "乙".encode()], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("甲\x85\u2028甲\n乙", encoding="utf-8")
    files = script.find_texts(str(tmp_path), "--corpus")
    found = {path.name: list(script.documents(path, "--corpus")) for path in files}
    assert found.pop("b.txt") == ["甲\x85\u2028甲", "乙"]
    assert found == {name: ["甲", "乙"] for name in ("a.TXT", "a.jsonl", "a.parquet")}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "\\ud83d"}\n', "line 3 cannot be read (Unicode"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "line 2 cannot be read (JSONDecodeError"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "line 2 cannot be read (TypeError"),
        ("a.jsonl", b'{"text": 5}\n', "line 1 cannot be read (AttributeError"),
        ("a.txt", "甲\n乙\n".encode() + b"\xa4\xa4\n", "line 3 cannot be read (UnicodeDecode"),
        ("a.txt", "甲\n".encode("utf-16"), "line 1 cannot be read (UnicodeDecode"),
        ("a.parquet", ["甲".encode(), b"\xa4\xa4"], "row 2 cannot be read (UnicodeDecode"),
        ("a.parquet", [["甲"]], "row 1 cannot be read (AttributeError")])
def test_an_unreadable_line_is_named(name, content, said, tmp_path):
    import pyarrow
    import pyarrow.parquet

    if isinstance(content, list):
        pyarrow.parquet.write_table(pyarrow.table({"text": content}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(script.UserError) as refused:
        list(script.documents(tmp_path / name, "--corpus"))
    assert f"--corpus {tmp_path / name}: {said}" in str(refused.value)


def test_what_a_folder_holds_besides_text_is_named(tmp_path, capsys):
    folder = tmp_path / "texts"
    for name in ("sub", ".ipynb_checkpoints"):
        (folder / name).mkdir(parents=True)
    for name in ("a.txt", ".DS_Store", "._a.txt", "notes.md"):
        (folder / name).write_bytes(b"\0\xff")
    (folder / "gone.txt").symlink_to("nowhere")
    (folder / "link.txt").symlink_to("a.txt")
    (tmp_path / "place").symlink_to(folder)  # a link to a folder is a place
    files = script.find_texts(str(tmp_path / "place"), "--corpus")
    assert [file.name for file in files] == ["a.txt", "link.txt"]
    said = capsys.readouterr().out
    assert ": not read: .DS_Store, ._a.txt, .ipynb_checkpoints, gone.txt, notes.md, sub\n" in said


# --- The model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_mean_subtoken_is_the_mean_of_the_spelling_rows(dtype):
    torch.manual_seed(1)
    matrix = torch.randn(37, 11, dtype=torch.float64).to(dtype)
    chance = random.Random(1)
    spelling = [chance.choices(range(37), k=chance.randint(1, 48)) for _ in range(2051)]
    rows = script.new_rows("", matrix, spelling, "mean_subtoken", 0.02, 0)
    assert rows.shape == (2051, 11) and rows.dtype == dtype
    for row, ids in zip(rows, spelling, strict=True):
        total = torch.zeros(11, dtype=torch.float64)
        for number in ids:
            total += matrix[number].double()
        expected = total / len(ids)
        # one rounding of the result: half a unit in the last place, and fp32's sums below that
        assert torch.all((row.double() - expected).abs() <= ulp(dtype) * expected.abs() + 2e-6)


def ulp(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2 * 1.001


def smallest(dtype: torch.dtype) -> float:
    """Half the distance of the numbers next to zero (6e-8 in fp16)."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2


def test_subtoken_by_plain_formulas():
    """The last row; in the head 1, 1/2, 1/4, ... from the first row, at the old rows' mean norm."""
    torch.manual_seed(3)
    matrix, chance = torch.randn(1051, 13), random.Random(3)
    spelling = [chance.choices(range(1051), k=count) for count in (*range(1, 49), *[3] * 1000)]
    rows = {name: script.new_rows(name, matrix, spelling, "subtoken", 0.02, 0)
            for name in (script.EMBEDDING, script.HEAD)}
    norm = sum(row.double().norm() for row in matrix) / 1051
    for number, ids in enumerate(spelling):
        assert torch.equal(rows[script.EMBEDDING][number], matrix[ids[-1]])
        leaning = sum(matrix[i].double() / 2**place for place, i in enumerate(ids))
        expected = leaning * norm / leaning.norm()
        torch.testing.assert_close(
            rows[script.HEAD][number].double(), expected, rtol=0, atol=1e-5)


def test_a_tied_matrix_gets_the_mean(corpus, tmp_path):
    base = write_base(tmp_path / "base", tied=True, dtype=torch.float32)
    found = []
    for init in ("subtoken", "mean_subtoken"):
        script.main(options(base, corpus, "--init", init, "--overwrite"))
        found.append(weights(tmp_path / "outputs" / "extended")[script.EMBEDDING])
    assert torch.equal(*found)


def test_mean_is_the_mean_of_all_rows_and_random_has_the_configs_width():
    torch.manual_seed(2)
    matrix = torch.randn(1501, 7)
    mean = script.new_rows("", matrix, [[0]] * 1030, "mean", 0.02, 0)
    assert torch.equal(mean, matrix.double().mean(0).float().expand(1030, 7))
    names = (script.EMBEDDING, script.EMBEDDING, script.HEAD)
    draw = [script.new_rows(n, matrix, [[0]] * 5001, "random", 0.3, 0) for n in names]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    assert draw[0].std().item() == pytest.approx(0.3, rel=0.02)
    assert abs(draw[0].mean().item()) < 0.01


def test_the_distance_to_the_teacher_by_hand(tmp_path):
    """The teacher's state after a piece's last old token, the student's after the piece."""
    folder = write_base(tmp_path / "base", dtype=torch.float32)
    llama = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(6)
    rows = torch.randn(3, HIDDEN)
    table = [[number] for number in range(BASE_SIZE)]
    table += [[5, 6, 7], [8, 9], [300, 301, 302, 303]]
    window = [1, BASE_SIZE, 44, BASE_SIZE + 2, BASE_SIZE + 1, 45]
    distance = script.student_distance(llama, rows, window, table)
    with torch.no_grad():
        taught = llama.model(torch.tensor([[1, 5, 6, 7, 44, 300, 301, 302, 303, 8, 9, 45]]))
        llama.resize_token_embeddings(BASE_SIZE + 3, mean_resizing=False)
        llama.get_input_embeddings().weight[BASE_SIZE:] = rows
        student = llama.model(torch.tensor([window])).last_hidden_state[0]
    teacher = taught.last_hidden_state[0][[0, 3, 4, 8, 10, 11]]
    expected = ((student - teacher) ** 2).sum() / (teacher**2).sum()
    torch.testing.assert_close(distance, expected, rtol=1e-4, atol=0)


def test_shared_rows_share_out_what_the_first_token_has():
    """Where a direction with 1 for every state exists, the logits are exact: the first token's plus
    the logarithm of the piece's share."""
    torch.manual_seed(7)
    matrix, states = torch.randn(19, 11), torch.randn(501, 11)
    states[:, 4] = 1
    spelling = [[3, 5], [3], [8, 1, 1], [3, 9]]
    uses = Counter({19: 60, 20: 30, 21: 7, 22: 0, 3: 1000})
    logits = states @ script.shared_rows(matrix, spelling, uses, states).T
    for piece, (ids, share) in enumerate(
        zip(spelling, [60.1 / 90.3, 30.1 / 90.3, 1, 0.1 / 90.3], strict=True)):
        expected = states @ matrix[ids[0]] + torch.tensor(share).log()
        torch.testing.assert_close(logits[:, piece], expected, rtol=0, atol=0.03)


def test_uses_are_counted_by_weight(base):
    uses = script.count_uses(proto(base), [(2, "the token"), (0.5, "token token")])
    ids = [script.processor(proto(base)).encode(text) for text in ("the token", "token token")]
    for number in range(BASE_SIZE):
        assert uses[number] == 2 * ids[0].count(number) + 0.5 * ids[1].count(number)


def test_distilled_rows_learn_and_nothing_else_changes(corpus, tmp_path, monkeypatch):
    """Distilling brings the student nearer to the teacher than mean_subtoken does; the base's own
    rows stay as they were."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(script, "DISTILL_RATE", 0.2)  # a random base and a short budget
    base = write_base(tmp_path / "base", dtype=torch.float32)
    llama = AutoModelForCausalLM.from_pretrained(base)
    old, found, budget = weights(base), {}, ["--distill_tokens", "20000"]
    for init in ("mean_subtoken", "distilled"):
        script.main(options(base, corpus, "--init", init, *budget, "--overwrite"))
        result = tmp_path / "outputs" / "extended"
        new, pieces = weights(result), [piece.piece for piece in proto(result).pieces]
        for name, tensor in old.items():
            assert torch.equal(new[name][: len(tensor)], tensor)
        table = [[number] for number in range(BASE_SIZE)]
        table += script.spellings(proto(base), pieces[BASE_SIZE:])
        texts = list(script.documents(corpus, "--corpus"))
        args = script.Arguments(init="distilled", distill_tokens=900, seed=1)
        windows = script.distill_windows(proto(result), [(1, text) for text in texts], args)
        rows = new[script.EMBEDDING][BASE_SIZE:]
        distances = [script.student_distance(llama, rows, w, table).item() for w in windows]
        found[init] = sum(distances) / len(distances)
    assert found["distilled"] < 0.5 * found["mean_subtoken"], found


def test_distilling_that_is_stopped_goes_on_to_the_same_bytes(base, corpus, tmp_path, monkeypatch):
    words = options(base, corpus, "--init", "distilled", "--distill_tokens", 3000)
    script.main(words)
    expected = weights(tmp_path / "outputs" / "extended")
    shutil.rmtree(tmp_path / "outputs")
    monkeypatch.setattr(script, "DISTILL_SAVE", 0)
    distance, calls = script.student_distance, []

    def stop_at_the_fourth(*given):
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return distance(*given)

    monkeypatch.setattr(script, "student_distance", stop_at_the_fourth)
    with pytest.raises(SystemExit) as stop:
        script.main(words)
    assert stop.value.code == 130
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == [".extended.distilled"]
    script.main(words)
    assert len(calls) == 4 + 3, "six windows, the fourth begun twice"
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["extended"]
    for name, tensor in weights(tmp_path / "outputs" / "extended").items():
        assert torch.equal(tensor, expected[name])


def test_shared_rows_are_what_the_run_writes(base, corpus, tmp_path, monkeypatch):
    """Input rows: the last old row. Output rows: along the corpus, a piece has the logit of its
    first old token and, roughly, the logarithm of its share."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    script.main(options(base, corpus, "--init", "shared"))
    result = tmp_path / "outputs" / "extended"
    old, new, model = weights(base), weights(result), proto(result)
    pieces = [piece.piece for piece in model.pieces][BASE_SIZE:]
    spelling = script.spellings(proto(base), pieces)
    last = old[script.EMBEDDING][[ids[-1] for ids in spelling]]
    assert torch.equal(new[script.EMBEDDING][BASE_SIZE:], last)
    llama = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    text, encode = corpus.read_text(encoding="utf-8").splitlines(), script.processor(model).encode
    table = [[number] for number in range(BASE_SIZE)] + spelling
    states = torch.cat([script.teacher_states(llama, [1, *encode(line)], table) for line in text])
    logits = states.mean(0) @ new[script.HEAD].float().T
    uses = Counter(i for line in text for i in encode(line) if i >= BASE_SIZE)
    errors, shares = [], []
    for number in (number for number, count in uses.items() if count > 50):
        first = spelling[number - BASE_SIZE][0]
        siblings = [BASE_SIZE + n for n, ids in enumerate(spelling) if ids[0] == first]
        shares.append(torch.tensor(uses[number] / sum(uses[n] for n in siblings)).log())
        errors.append(logits[number] - logits[first] - shares[-1])
    error, size = (torch.stack(found).abs().mean().item() for found in (errors, shares))
    assert error < 0.5 * size, "a random base has no direction on which every state is 1"


def test_bases_that_no_rows_can_be_learnt_from(base, corpus, tmp_path, monkeypatch, capsys):
    tied = write_base(tmp_path / "tied", tied=True)
    said = refusal(capsys, *options(tied, corpus, "--init", "distilled"))
    assert "its embedding; expected two matrices" in said
    monkeypatch.setattr(script, "CPU_LOSS_BYTES", 1000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refusal(capsys, *options(base, corpus, "--init", "shared"))
    assert "GB of weights and no GPU; expected a GPU" in said


@pytest.mark.parametrize(
    ("tied", "dtype", "shard"),
    [(False, torch.bfloat16, "1GB"), (False, torch.float16, "40KB"), (True, torch.float32, "40KB")])
def test_only_embedding_and_head_change(tied, dtype, shard, corpus, tmp_path):
    base = write_base(tmp_path / "base", tied, dtype, shard)
    script.main(options(base, corpus, "--init", "mean_subtoken"))
    result = tmp_path / "outputs" / "extended"
    old, new = weights(base), weights(result)
    size = len(proto(base).pieces)
    assert old.keys() == new.keys() and (script.HEAD in new) == (not tied)
    spelling = script.spellings(proto(base), [p.piece for p in proto(result).pieces][size:])
    for name, tensor in new.items():
        assert torch.equal(tensor[: len(old[name])], old[name])
        if name in (script.EMBEDDING, script.HEAD):
            rows = [sum(old[name][i].double() for i in ids) / len(ids) for ids in spelling]
            expected = torch.stack(rows)
            error = (tensor[size:].double() - expected).abs()
            assert torch.all(error <= ulp(dtype) * expected.abs() + smallest(dtype) + 1e-8)
        else:
            assert tensor.shape == old[name].shape
    names = [path.name for path in sorted(base.glob("*.safetensors"))]
    assert [path.name for path in sorted(result.glob("*.safetensors"))] == names
    if len(names) > 1:
        index = json.loads((result / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in new.values())
        assert index["weight_map"].keys() == new.keys()
    generation = "generation_config.json"
    assert (result / generation).read_bytes() == (base / generation).read_bytes()
    assert (result / "LICENSE.txt").is_file()  # Llama 2's terms travel with its weights


def test_a_shard_of_any_tensors_is_grown_in_its_matrix_alone(tmp_path):
    """A scalar, an empty tensor and integers; the bytes are those that safetensors writes."""
    old, rows = {script.HEAD: torch.randn(5, 3).half()}, torch.randn(2, 3).half()
    old |= {"number": torch.tensor(1.5), "none": torch.zeros(0, 4), "count": torch.arange(7)}
    save_file(old, tmp_path / "old", metadata={"format": "pt"})
    script.grow_shard(tmp_path / "old", tmp_path / "new", lambda name, matrix: rows, 2)
    grown = old | {script.HEAD: torch.cat([old[script.HEAD], rows])}
    save_file(grown, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / "new").read_bytes() == (tmp_path / "expected").read_bytes()


def test_the_model_loads_and_scores_old_tokens_as_before(base, extended):
    size, ids = len(proto(base).pieces), torch.tensor([[1, 300, 358, 7, 299]])
    old, new = (AutoModelForCausalLM.from_pretrained(f, dtype="float32") for f in (base, extended))
    with torch.no_grad():
        one, two = (model(input_ids=ids).logits for model in (old, new))
    assert two.shape[-1] == NEW_SIZE
    torch.testing.assert_close(two[..., :size], one, rtol=0, atol=1e-6)


def test_the_report_says_what_was_done(extended):
    run = json.loads((extended / "run.json").read_text())
    assert run["script"] == "extend_vocab.py" and run["arguments"]["init"] == "subtoken"
    results = run["results"]
    assert (results["base_vocab_size"], results["vocab_size"]) == (BASE_SIZE, NEW_SIZE)
    assert results["extended"]["characters_per_token"] > results["base"]["characters_per_token"]
    assert results["extended"]["byte_token_share"] < 0.1 < results["base"]["byte_token_share"]
    assert [v for k, v in results["proof"].items() if k != "texts_compared"] == [0] * 5
    assert all(0 < results[name]["bits_per_character"] < 100 for name in ("base", "extended"))
    assert (extended.parent.parent / "pictures" / "vocab.png").stat().st_size > 10_000


def test_bits_per_character_equal_a_plain_loop(base):
    """By hand: BOS before each window, the softmax over the tokenizer's own rows only."""
    llama = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    smaller = proto(base)
    del smaller.pieces[-1]  # the model has a row more
    tokenizer = script.processor(smaller)
    texts, rows, nats = ["the token of 中文", "xy" * 350], BASE_SIZE - 1, 0.0
    for text in texts:
        ids = tokenizer.encode(text)
        assert max(ids) < rows
        for first in range(0, len(ids), script.LOSS_WINDOW):
            window = [1, *ids[first : first + script.LOSS_WINDOW]]
            with torch.no_grad():
                logits = llama(input_ids=torch.tensor([window])).logits[0]
            for position, target in enumerate(window[1:]):
                scores = logits[position, :rows]
                nats -= (scores[target] - scores.exp().sum().log()).item()
    expected = nats / torch.log(torch.tensor(2.0)).item() / sum(map(len, texts))
    found = script.bits_per_character(llama, smaller, texts)
    assert found == pytest.approx(expected, rel=1e-5)


# --- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--corpus", "nothing.txt", "no text there"),
        ("--corpus", "data/cc_filtered", "run python filter_cc.py first"),
        ("--corpus", "empty", "no text there"),
        ("--corpus", "zipped", "no text there; it holds a.jsonl.gz; expected .txt"),
        ("--corpus", "gone", "a link to nowhere, which is not there"),
        ("--output_dir", "gone", "a link to nowhere, which is not there"),
        ("--picture", "vocab", "expected a file that ends in .png, .pdf or .svg"),
        ("--corpus", "ascii.txt", "holds no text but ASCII"),
        ("--corpus", "latin.txt", "cannot be read (UnicodeDecodeError"),
        ("--corpus", "broken.jsonl", "cannot be read (JSONDecodeError"),
        ("--corpus", "no_text.jsonl", "cannot be read (KeyError"),
        ("--corpus", "broken.parquet", "cannot be read (ArrowInvalid"),
        ("--corpus_weight", "0", "expected one number above 0"),
        ("--corpus_weight", "inf", "a million at most"),
        ("--eval_text", "blank.txt", "holds no text"),
        ("--vocab_size", "359", "expected more than the base's 359"),
        ("--vocab_size", "900", "or more, for the base's 359 pieces"),
        ("--vocab_size", "99999999999", "less than 10 million"),
        ("--distill_tokens", "0", "--distill_tokens 0: expected 1 to 100 million"),
        ("--seed", "-1", "expected 0 to 4294967295"),
        ("--max_chars", "3", "expected 1000 or more"),
        ("--output_dir", "ascii.txt", "extend_vocab.py did not make it"),
        ("--output_dir", "data", "extend_vocab.py did not make it"),
        ("--base_model", "nowhere/at/all", "no such folder"),
        ("--base_model", "outputs/other", "run python extend_vocab.py first"),
        ("--base_model", "data", "no config.json in it"),
        ("--base_model", "some-owner/some-model", "make demo tries the whole")])
def test_wrong_values(option, value, said, base, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "zipped").mkdir()
    (tmp_path / "zipped" / "a.jsonl.gz").write_bytes(b"")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").write_text("precious")
    (tmp_path / "ascii.txt").write_text("only ascii\n" * 9)
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    (tmp_path / "no_text.jsonl").write_text('{"content": "a"}\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but no more")
    line = refusal(capsys, *options(base, corpus, option, value))
    assert line.startswith(f"error: {option} ") and said in line
    assert not [*tmp_path.glob("outputs/*")]
    assert (tmp_path / "data" / "mine").read_text() == "precious"


def test_too_large_a_vocabulary_says_how_many_pieces_there_are(base, corpus, tmp_path, capsys):
    line = refusal(capsys, *options(base, corpus, "--vocab_size", 50_000))
    most = int(line.split("the corpus yields ")[1].split()[0])
    assert NEW_SIZE < most < 50_000
    script.main(options(base, corpus, "--vocab_size", most))
    assert len(proto(tmp_path / "outputs" / "extended").pieces) == most


def spoil(folder: Path, how: str) -> None:
    """Damage a good base so that it must be refused."""
    tokenizer, shard = folder / "tokenizer.model", folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text())
    if how == "no tokenizer.model":
        tokenizer.unlink()
    elif how == "not sentencepiece":
        tokenizer.write_bytes(b"\xff\xffIQ== 0\n")
    elif how == "unigram":
        tokenizer.write_bytes(train_base(model_type="unigram", vocab_size=290))
    elif how == "normalises":
        tokenizer.write_bytes(train_base(normalization_rule_name="nmt_nfkc"))
    elif how == "padded rows":
        config["vocab_size"] += 3
    elif how == "quantised":
        config["quantization_config"] = {"quant_method": "gptq"}
    elif how == "doubled piece":
        doubled = proto(folder)
        doubled.pieces[-1].piece = doubled.pieces[300].piece
        tokenizer.write_bytes(doubled.SerializeToString())
    elif how == "bin only":
        shard.rename(folder / "pytorch_model.bin")
    elif how == "cut short":
        shard.write_bytes(shard.read_bytes()[:-5])
    elif how == "not safetensors":
        shard.write_bytes(b"\x10\0\0\0\0\0\0\0{'not': json!}  ")
    elif how == "a tensor missing":
        tensors = load_file(shard)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, shard)
    elif how == "another shape":
        tensors = load_file(shard)
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
        save_file(tensors, shard)
    elif how == "no size":
        config["num_hidden_layers"] = None
    elif how == "a bare model":
        tensors = {name.removeprefix("model."): t for name, t in load_file(shard).items()}
        save_file(tensors, shard)
    elif how == "an index of nothing":
        shard.unlink()
        (folder / "model.safetensors.index.json").write_text('{"weight_map": null}')
    elif how == "a pointer":
        tokenizer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 9\n")
    elif how == "no head":
        tensors = load_file(shard)
        del tensors[script.HEAD]
        save_file(tensors, shard)
    elif how == "shard missing":
        shard.unlink()
        index = {"weight_map": {script.EMBEDDING: "model-00002-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "config cut short":
        (folder / "config.json").write_text('{"vocab_size": ')
        return
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no tokenizer.model", "tokenizer.model is missing"),
        ("not sentencepiece", "not SentencePiece's"),
        ("unigram", "expected SentencePiece BPE"),
        ("normalises", "expected SentencePiece BPE"),
        ("padded rows", "expected the same number (no padding rows"),
        ("quantised", "is quantised"),
        ("doubled piece", "2 times; expected every piece once"),
        ("bin only", "its weights are in pytorch_model.bin; expected *.safetensors"),
        ("bin only", "convert them: python -c"),
        ("cut short", "is cut short"),
        ("not safetensors", "is not a safetensors file"),
        ("a tensor missing", "layers.1.mlp.up_proj.weight is missing; expected (52, 36) by config"),
        ("another shape", "model.norm.weight is (35,); expected (36,) by config.json"),
        ("no size", "layers.0.input_layernorm.weight is (36,); expected no such tensor by config"),
        ("a bare model", "no model.embed_tokens.weight in it"),
        ("an index of nothing", "no model.safetensors there, nor its index that can be read"),
        ("a pointer", "if it was cloned, run git lfs pull"),
        ("no head", "lm_head.weight is missing; expected (359, 36) by config.json"),
        ("shard missing", "model-00002-of-00002.safetensors is missing"),
        ("config cut short", "config.json is broken")])
def test_bases_that_cannot_be_extended(how, said, base, corpus, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "base")
    spoil(tmp_path / "base", how)
    line = refusal(capsys, *options(tmp_path / "base", corpus))
    assert "--base_model" in line and said in line
    assert not [*tmp_path.glob("outputs/*")]


def test_a_base_that_says_it_is_not_quantised(base, corpus, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": None}
    (tmp_path / "base" / "config.json").write_text("\ufeff" + json.dumps(config), encoding="utf-8")
    script.main(options(tmp_path / "base", corpus))


def test_a_failed_proof_writes_nothing(base, corpus, tmp_path, monkeypatch, capsys):
    """With the merges in the order of ids, as Transformers itself would put them."""
    write = script.write_tokenizer

    def reversed_merges(folder: Path, *rest) -> None:
        write(folder, *rest)
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        content["model"]["merges"].reverse()
        (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")

    monkeypatch.setattr(script, "write_tokenizer", reversed_merges)
    line = refusal(capsys, *options(base, corpus))
    assert "proof failed, nothing was written: texts_differing" in line
    assert not [*tmp_path.glob("outputs/*")]


# --- Runs ----------------------------------------------------------------------------------------


def test_a_finished_run_is_kept_and_another_needs_overwrite(base, corpus, tmp_path, capsys):
    script.main(options(base, corpus))
    run = tmp_path / "outputs" / "extended" / "run.json"
    before = run.stat().st_mtime_ns
    capsys.readouterr()
    script.main(options(base, corpus))
    assert capsys.readouterr().out.startswith("already done: outputs/extended")
    assert run.stat().st_mtime_ns == before

    line = refusal(capsys, *options(base, corpus, "--init", "mean"))
    assert "other settings (--init)" in line and "--overwrite" in line
    script.main(options(base, corpus, "--init", "mean", "--overwrite"))
    assert json.loads(run.read_text())["arguments"]["init"] == "mean"
    assert [path.name for path in run.parent.parent.iterdir()] == ["extended"]

    other = write_corpus(tmp_path / "corpus.txt", seed=3, lines=900)
    script.main(options(base, other, "--init", "mean", "--overwrite"))
    write_corpus(other, seed=3, lines=901)
    assert "the files it reads" in refusal(capsys, *options(base, other, "--init", "mean"))


KILLED = """
import os, signal, sys
import extend_vocab
extend_vocab.os.fsync = lambda number: os.kill(os.getpid(), signal.SIGKILL)
extend_vocab.main(sys.argv[1:])
"""


def test_killed_in_the_middle_leaves_nothing_that_looks_whole(base, corpus, tmp_path):
    outputs = tmp_path / "outputs"
    root = str(Path(script.__file__).parent)
    environment = {"PYTHONPATH": root, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}

    script.main(options(base, corpus))
    before = (outputs / "extended" / "run.json").read_bytes()
    more = options(base, corpus, "--init", "mean", "--overwrite")
    command = [sys.executable, "-c", KILLED, *more]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (outputs / ".extended.partial" / "model.safetensors").is_file()  # in the middle
    assert sorted(path.name for path in outputs.iterdir()) == [".extended.partial", "extended"]
    assert (outputs / "extended" / "run.json").read_bytes() == before
    script.main(more)
    assert [path.name for path in outputs.iterdir()] == ["extended"]


def test_killed_between_the_two_renames_gives_the_earlier_result_back(tmp_path):
    outputs = tmp_path / "outputs"
    (outputs / ".extended.old").mkdir(parents=True)
    (outputs / ".extended.old" / "run.json").write_text("{}")
    (outputs / ".extended.partial").mkdir()
    (outputs / ".extended.partial" / "config.json").write_text("{}")
    with pytest.raises(ZeroDivisionError), script.build_aside(outputs / "extended") as folder:
        assert not list(folder.iterdir())
        raise ZeroDivisionError
    assert [path.name for path in outputs.iterdir()] == ["extended"]
    assert (outputs / "extended" / "run.json").is_file()


def test_a_second_run_is_refused_and_does_no_harm(tmp_path):
    output = tmp_path / "extended"
    with script.build_aside(output) as folder:
        (folder / "config.json").write_text("{}")
        with pytest.raises(script.UserError, match="another run"), script.build_aside(output):
            pass
    assert (output / "config.json").is_file()
    with script.build_aside(output):  # the lock is let go of, though the process lives on
        pass
    assert not list(output.iterdir())


def test_another_failure_of_the_lock_is_no_warning(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(script.fcntl, "flock", refuse)
    with pytest.raises(OSError, match="output error"), script.build_aside(tmp_path / "extended"):
        pass


@pytest.mark.parametrize("place", [".extended.partial", "folder/extended"])
def test_a_file_in_the_way_is_named(place, tmp_path):
    (tmp_path / place.split("/")[0]).write_text("mine")
    output = tmp_path / place.replace(".extended.partial", "extended")
    with pytest.raises(script.UserError, match="is in the way"), script.build_aside(output):
        pass
    assert (tmp_path / place.split("/")[0]).read_text() == "mine"


def test_no_place_for_the_picture_leaves_the_earlier_result(base, corpus, tmp_path, capsys):
    (tmp_path / "pictures").write_text("mine")
    line = refusal(capsys, *options(base, corpus))
    assert "pictures is in the way" in line
    assert not [*tmp_path.glob("outputs/*")]
    (tmp_path / "pictures").unlink()
    script.main(options(base, corpus))  # and not "already done"
    assert (tmp_path / "pictures" / "vocab.png").is_file()


def test_a_record_without_arguments_needs_overwrite(base, corpus, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text('{"script": "extend_vocab.py"}')
    line = refusal(capsys, *options(base, corpus, "--output_dir", "mine"))
    assert "it holds a run with other settings" in line and "--overwrite" in line


def test_paths_as_typed(base, corpus, tmp_path, monkeypatch, capsys):
    """~ is expanded for every path, so both spellings are the same run; .DS_Store is no result."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "base").symlink_to(base)
    shutil.copy(corpus, home / "corpus.txt")
    (home / "out" / ".ipynb_checkpoints").mkdir(parents=True)
    (home / "out" / ".DS_Store").write_text("")
    typed = options(Path("~/base"), Path("~/corpus.txt"), "--eval_text", "~/corpus.txt")
    script.main([*typed, "--output_dir", "~/out", "--picture", "~/new/a.svg"])
    assert (home / "out" / "run.json").is_file() and (home / "new" / "a.svg").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]  # none is called ~
    capsys.readouterr()
    long = options(home / "base", home / "corpus.txt", "--eval_text", home / "corpus.txt")
    script.main([*long, "--output_dir", str(home / "out"), "--picture", "other.png"])
    assert capsys.readouterr().out.startswith("already done")


def test_other_content_of_the_same_size_is_another_run(base, corpus, tmp_path, capsys):
    own, text = tmp_path / "base", tmp_path / "corpus.txt"
    shutil.copytree(base, own)
    shutil.copy(corpus, text)
    run = [str(word) for word in options(own, text)]
    script.main(run)
    os.utime(text, (1, 1))  # the same bytes are the same run
    os.utime(own / "model.safetensors", (1, 1))
    capsys.readouterr()
    script.main(run)
    assert capsys.readouterr().out.startswith("already done")
    content = text.read_bytes()
    text.write_bytes(content[::-1] if len(content) % 2 else content[1:] + content[:1])
    assert "the files it reads" in refusal(capsys, *run)
    text.write_bytes(content)
    tensors = load_file(own / "model.safetensors")
    changed = {n: t * 2 if "up_proj" in n else t for n, t in tensors.items()}
    for weights in (changed, tensors):
        save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
        if weights is changed:
            assert "the files it reads" in refusal(capsys, *run)
    capsys.readouterr()
    script.main(run)
    assert capsys.readouterr().out.startswith("already done")


def test_the_weights_are_those_that_transformers_loads(base, corpus, tmp_path):
    """One file and, from an earlier model, an index with shards."""
    own = tmp_path / "base"
    shutil.copytree(base, own)
    tensors = load_file(own / "model.safetensors")
    save_file({n: t * 0 for n, t in tensors.items()}, own / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (own / script.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert len(AutoModelForCausalLM.from_pretrained(own).model.norm.weight.unique()) == 1
    script.main(options(own, corpus))
    output = tmp_path / "outputs" / "extended"
    assert sorted(path.name for path in output.glob("model*")) == ["model.safetensors"]
    for name, tensor in weights(output).items():
        assert torch.equal(tensor[: len(tensors[name])], tensors[name]), name


def test_files_of_the_user_in_the_output_are_named_and_kept(base, corpus, tmp_path, capsys):
    script.main(options(base, corpus))
    (tmp_path / "outputs" / "extended" / "model-F16.gguf").write_text("mine")
    line = refusal(capsys, *options(base, corpus, "--overwrite"))
    assert "--output_dir outputs/extended: model-F16.gguf there, 1 in all, is not of the" in line
    assert (tmp_path / "outputs" / "extended" / "model-F16.gguf").read_text() == "mine"
    (tmp_path / "outputs" / "extended" / "model-F16.gguf").rename("model-F16.gguf")
    script.main(options(base, corpus, "--overwrite"))


def test_a_disk_too_small_is_seen_before_the_work(base, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
    monkeypatch.setattr(script, "read_corpora", lambda *_: pytest.fail("it works"))
    assert "make room or pass a folder on" in refusal(capsys, *options(base, corpus), code=1)


def test_nobody_need_read_what_is_printed():
    line = f"(sleep 1; exec {sys.executable} {script.__file__} --help) | true"
    subprocess.run(["bash", "-o", "pipefail", "-c", line], check=True)


def test_a_file_too_large_for_the_disk_is_one_line(base, corpus, tmp_path):
    code = f"""if True:
        import resource, sys
        sys.path.insert(0, {str(Path(script.__file__).parent)!r})
        import extend_vocab
        extend_vocab.prove = lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (90000, 90000))
        extend_vocab.main(sys.argv[1:])"""
    command = [sys.executable, "-c", code, *options(base, corpus)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "too large" in done.stderr


def test_two_runs_give_the_same_bytes(base, corpus, extended):
    script.main(options(base, corpus))
    for name in ("tokenizer.model", "tokenizer.json", "model.safetensors", "config.json"):
        one, two = ((f / name).read_bytes() for f in (extended, Path("outputs/extended")))
        assert hashlib.sha256(one).digest() == hashlib.sha256(two).digest(), name


def test_hongloumeng_is_fetched_without_the_licence(tmp_path, monkeypatch):
    page = tmp_path / "pg24264.txt"
    page.write_text(
        "\ufeffThe Project Gutenberg eBook\n*** START OF THE PROJECT GUTENBERG EBOOK 24264 ***\n\n"
        "紅樓夢\n第一回\n\n*** END OF THE PROJECT GUTENBERG EBOOK 24264 ***\nlicence\n",
        encoding="utf-8")
    monkeypatch.setattr(script, "HONGLOUMENG_URL", page.as_uri())
    assert script.find_texts(script.HONGLOUMENG, "--corpus") == [Path(script.HONGLOUMENG)]
    assert Path(script.HONGLOUMENG).read_text(encoding="utf-8") == "紅樓夢\n第一回\n"


def test_hongloumeng_out_of_reach(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "HONGLOUMENG_URL", (tmp_path / "not-there.txt").as_uri())
    line = refusal(capsys, *options(base, Path(script.HONGLOUMENG)))
    assert "could not be fetched" in line and "not-there.txt" in line
    assert not Path(script.HONGLOUMENG).exists()


# --- Real material -------------------------------------------------------------------------------


def test_hongloumeng_on_llama_2(shared_data):
    """61,388 pieces, none dead; both runtimes give the same ids on all paragraphs."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=32000, num_hidden_layers=1, **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained("base")
    shutil.copy(shared_data / "llama2-tokenizer.model", "base/tokenizer.model")
    drcd = shared_data / "drcd_dev.jsonl"
    words = ["--base_model", "base", "--corpus", shared_data / "hongloumeng.txt"]
    words += ["--eval_text", drcd, "--eval_loss", "no"]
    script.main([str(word) for word in words])
    results = json.loads(Path("outputs/extended/run.json").read_text())["results"]
    assert results["vocab_size"] == len(proto(Path("outputs/extended")).pieces) == 61_388
    assert results["extended"]["characters_per_token"] >= 1.09
    assert results["extended"]["byte_token_share"] <= 0.006
    ours = sentencepiece.SentencePieceProcessor("outputs/extended/tokenizer.model")
    theirs = AutoTokenizer.from_pretrained("outputs/extended")
    for path in (drcd, shared_data / "cmrc_trial.jsonl"):
        texts = list(script.documents(path, "--corpus"))
        assert theirs(texts, add_special_tokens=False)["input_ids"] == ours.encode(texts)


def test_our_count_of_dead_pieces_is_the_published_one(shared_data):
    """Of Chinese-LLaMA-2's pieces 657 are dead: a count made apart from this script."""
    model = ModelProto()
    model.ParseFromString((shared_data / "chinese-llama-2-tokenizer.model").read_bytes())
    assert len(script.dead_pieces(model, 32_000)) == 657


def test_a_folder_that_another_run_has_just_put_in_place_is_not_written(tmp_path, monkeypatch):
    """Between making the folder and locking it, another run locked, filled and renamed it."""
    flock = script.fcntl.flock

    def late(lock, how):
        (tmp_path / ".out.partial").rename(tmp_path / "out")
        flock(lock, how)

    monkeypatch.setattr(script.fcntl, "flock", late)
    refused = pytest.raises(script.UserError, match="another run is writing it")
    with refused, script.build_aside(tmp_path / "out"):
        pass
    assert (tmp_path / "out").is_dir()
