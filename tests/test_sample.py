"""The embedded sample is what data/README.md says, and can be made again."""

import collections
import importlib.util
import sys

import pytest
from conftest import ROOT

SAMPLE = ROOT / "data" / "sample"
GOOD = {"tc", "tc_page"}
BAD = {"en", "ja", "ko", "sc", "mainland", "tc_nav", "tc_spam", "repeat", "tc_short", "mixed"}


@pytest.fixture(scope="module")
def make_sample():
    spec = importlib.util.spec_from_file_location("make_sample", SAMPLE / "make_sample.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_sample"] = module
    spec.loader.exec_module(module)
    return module


def read_records(name: str) -> dict[str, bytes]:
    """Return {label/slug: content} of a container of the sample."""
    from fastwarc.warc import ArchiveIterator

    with (SAMPLE / name).open("rb") as file:
        return {
            record.headers["WARC-Target-URI"].split("/", 3)[3]: record.reader.read()
            for record in ArchiveIterator(file, parse_http=False)
        }


def test_the_containers_hold_the_pages(make_sample):
    """A page edited without running make_sample.py again would fail here."""
    wet = read_records("luojiu-sample.warc.wet.gz")
    warc = read_records("luojiu-sample.warc.gz")
    for name, text in make_sample.read_pages().items():
        if name.startswith("html/"):
            assert warc[name].endswith(text.encode()), name
        else:
            assert wet[name] == text.encode(), name


def test_the_sample_has_enough_of_everything():
    wet = read_records("luojiu-sample.warc.wet.gz")
    count = collections.Counter(name.partition("/")[0] for name in wet)
    assert len(wet) >= 150
    assert sum(count[label] for label in GOOD) >= 100
    assert all(count[label] >= 2 for label in BAD | {"dup", "broken", "pii"})
    prose = "".join(text.decode() for name, text in wet.items() if name.startswith("tc/"))
    assert sum("\u4e00" <= character <= "\u9fff" for character in prose) >= 30_000
    assert len(read_records("luojiu-sample.warc.gz")) in (2, 3)


def test_the_tiny_llama_is_small_and_whole():
    import sentencepiece
    from transformers import AutoModelForCausalLM

    folder = SAMPLE / "tiny-llama"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4_000_000
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert model.config.vocab_size == tokenizer.vocab_size() == 1000
