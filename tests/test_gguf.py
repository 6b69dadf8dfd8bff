"""The merged model in llama.cpp: the README's conversion, then the same tokens and the same words.

Needs llama-cpp-python and the converter in its source package, as requirements-gguf.txt says.
"""

import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT

CONVERTER = "vendor/llama.cpp/convert_hf_to_gguf.py"
BLOCKS = [  # of Unicode: letters of all sorts, signs, control and private characters
    (0x00, 0x1F), (0x20, 0x7E), (0x80, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF),
    (0x530, 0x58F), (0x590, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F),
    (0x1000, 0x109F), (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x1200, 0x137F), (0x2000, 0x206F),
    (0x2200, 0x22FF), (0x3000, 0x30FF), (0x3100, 0x312F), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3),
    (0xE000, 0xE0FF), (0xF900, 0xFAFF), (0xFF00, 0xFFEF), (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF),
    (0x20000, 0x2A6DF)]


# A mark, so that the demo is not made for nothing.
pytestmark = pytest.mark.skipif(
    find_spec("llama_cpp") is None, reason="no llama_cpp; see requirements-gguf.txt")


@pytest.fixture(scope="module")
def gguf(demo) -> Path:
    """The demo's merged model in fp32, converted by the README's command."""
    places = [Path(os.getenv("LLAMA_CPP_PYTHON", "")), *ROOT.glob("outputs/llama_cpp_python-*")]
    found = [folder / CONVERTER for folder in places if (folder / CONVERTER).is_file()]
    if not found:
        pytest.skip("no converter; see requirements-gguf.txt")
    out = demo / "outputs" / "luojiu-f32.gguf"
    subprocess.run(
        [sys.executable, found[0], "outputs/merged", "--outtype", "f32", "--outfile", out],
        cwd=demo, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def llama(gguf):
    from llama_cpp import Llama

    return Llama(str(gguf), n_ctx=512, n_threads=1, verbose=False)


def texts_of_all_scripts(count: int) -> list[str]:
    rng = random.Random(0)
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "data").glob("*.md")]
    while len(texts) < count:
        words = []
        for _ in range(rng.randint(1, 8)):
            block = rng.choice(BLOCKS)
            words.append("".join(chr(rng.randint(*block)) for _ in range(rng.randint(1, 12))))
            words.append(rng.choice(["", "", " ", "  ", "\n", "\n\n", "\t", "　", "，"]))
        texts.append("".join(words))
    return texts


def test_the_same_token_ids_on_texts_of_all_scripts(demo, llama):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo / "outputs" / "merged")
    texts = texts_of_all_scripts(1000)
    differing = [
        text for text in texts
        if llama.tokenize(text.encode(), add_bos=True) != tokenizer(text).input_ids]
    assert not differing, f"{len(differing)} of {len(texts)}, such as {differing[0]!r}"


@pytest.mark.parametrize("prompt", ["春天的早晨，", "臺灣的", "Hello, world", "我們「"])
def test_the_same_greedy_continuation(demo, llama, prompt):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = demo / "outputs" / "merged"
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(merged)(prompt, return_tensors="pt").input_ids
    theirs = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1]:].tolist()
    ours = []
    llama.reset()
    for token in llama.generate(ids[0].tolist(), temp=0.0, repeat_penalty=1.0):
        ours.append(token)
        if len(ours) == len(theirs):
            break
    assert ours == theirs
