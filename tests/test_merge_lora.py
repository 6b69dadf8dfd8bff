"""merge_lora.py against PEFT itself, bit for bit, and against everything that can go wrong."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import ROOT, HubAnswers, serving
from safetensors.torch import load_file, save_file

import merge_lora

TINY = ROOT / "data" / "sample" / "tiny-llama"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
ROWS = 1000  # of the embedding: the sample tokenizer's pieces
NEW_ROWS = list(range(977, 1000))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, tmp_path):
    """Make the blocks so small that every matrix is split, into blocks of unequal size."""
    monkeypatch.setattr(merge_lora, "BLOCK", 1777)
    monkeypatch.chdir(tmp_path)


def make_base(folder: Path, dtype=torch.bfloat16, **config) -> Path:
    """A random Llama of odd sizes with the sample's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 60, "intermediate_size": 131, "num_hidden_layers": 2, "head_dim": 12}
    heads = {"num_attention_heads": 5, "num_key_value_heads": 1, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(**{"vocab_size": ROWS, **sizes, **heads, **config}))
    model.to(dtype).save_pretrained(folder, max_shard_size="100KB")
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    return folder


def load(folder: Path, **kwargs):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto", **kwargs})


def make_adapter(base: Path, folder: Path, model=None, **config) -> Path:
    """A PEFT adapter whose every trainable number is random."""
    from peft import LoraConfig, get_peft_model

    defaults = {"r": 5, "lora_alpha": 7, "target_modules": LINEAR, "init_lora_weights": False}
    settings = LoraConfig(task_type="CAUSAL_LM", **{**defaults, **config})
    model = get_peft_model(model or load(base), settings)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.1 * noise.to(parameter.dtype)
    model.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def peft_merge(base: Path, adapter: Path, **kwargs):
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(load(base, **kwargs), adapter).merge_and_unload()


def read(folder: Path) -> dict[str, torch.Tensor]:
    files = map(load_file, sorted(folder.glob("*.safetensors")))
    return {name: tensor for file in files for name, tensor in file.items()}


def command(adapter: Path | str, options: tuple) -> list[str]:
    """The command line; another --adapter among the options takes the place of the first."""
    first = [] if "--adapter" in options else ["--adapter", str(adapter)]
    return [*first, "--output_dir", "merged", *map(str, options)]


def merge(adapter: Path, *options: object) -> dict[str, torch.Tensor]:
    """Run the script; return what it wrote to ./merged."""
    merge_lora.main(command(adapter, options))
    return read(Path("merged"))


def assert_same_bits(ours: dict[str, torch.Tensor], model) -> None:
    theirs = model.state_dict()
    if model.config.tie_word_embeddings:
        del theirs["lm_head.weight"]
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def refusal(capsys, adapter: Path | str, *options: object, code: int = 2) -> str:
    """Run the script, which must refuse; return its error line."""
    with pytest.raises(SystemExit) as stop:
        merge_lora.main(command(adapter, options))
    assert stop.value.code == code
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert not Path(".merged.partial").exists()
    return line


# --- Equal to PEFT -------------------------------------------------------------------------------

CASES = {
    "all linear layers": {},
    "alpha not a power of two": {"r": 3, "lora_alpha": 11},
    "rsLoRA": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 3, "down_proj": 9},
        "alpha_pattern": {".*q_proj": 3, "model.layers.0.mlp.up_proj": 31},
    },
    "DoRA": {"use_dora": True},
    "DoRA and rsLoRA": {"use_dora": True, "use_rslora": True, "target_modules": ["v_proj"]},
    "norms": {"modules_to_save": NORMS},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "embedding and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "kept tied": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "new rows, a list": {"trainable_token_indices": [998, 3, 50]},
    "new rows, both": {"trainable_token_indices": {"embed_tokens": NEW_ROWS, "lm_head": NEW_ROWS}},
    "as train_pt.py": {
        "modules_to_save": NORMS,
        "trainable_token_indices": {"embed_tokens": NEW_ROWS, "lm_head": NEW_ROWS},
    },
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_merged_weights_are_those_of_peft_bit_for_bit(tmp_path, case, tied):
    base = make_base(tmp_path / "base", tie_word_embeddings=tied)
    adapter = make_adapter(base, tmp_path / "adapter", **CASES[case])
    theirs = peft_merge(base, adapter)
    assert_same_bits(merge(adapter), theirs)
    config = json.loads(Path("merged/config.json").read_text())
    assert config["tie_word_embeddings"] == theirs.config.tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("case", ["patterns", "DoRA", "as train_pt.py"])
def test_other_number_formats_equal_peft_too(tmp_path, case, dtype):
    base = make_base(tmp_path / "base", dtype)
    adapter = make_adapter(base, tmp_path / "adapter", **CASES[case])
    assert_same_bits(merge(adapter), peft_merge(base, adapter))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_adapters_saved_in_any_format_equal_peft(tmp_path, dtype):
    """PEFT takes A and B to fp32, and whole tensors and new rows to the base's format."""
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", **CASES["as train_pt.py"])
    path = adapter / "adapter_model.safetensors"
    save_file({name: t.to(dtype) for name, t in load_file(path).items()}, path)
    assert_same_bits(merge(adapter), peft_merge(base, adapter))


def test_lora_on_an_untied_head_and_biases_in_the_base(tmp_path):
    base = make_base(tmp_path / "base", attention_bias=True, mlp_bias=True)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    assert_same_bits(merge(adapter), peft_merge(base, adapter))


@pytest.mark.parametrize("block", [64, 1000, 100_000, 1 << 30])
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_depend_neither_on_blocks_nor_on_threads(tmp_path, monkeypatch, block, threads):
    """257 rows of 129: a remainder of a few rows would take another BLAS kernel."""
    sizes = {"hidden_size": 129, "intermediate_size": 257, "num_attention_heads": 3}
    base = make_base(tmp_path / "base", num_hidden_layers=1, **sizes)
    targets = ["up_proj", "down_proj"]
    adapter = make_adapter(base, tmp_path / "adapter", r=31, target_modules=targets)
    monkeypatch.setattr(merge_lora, "BLOCK", block)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same_bits(merge(adapter), peft_merge(base, adapter))
    finally:
        torch.set_num_threads(before)


def test_an_adapter_with_more_rows_than_the_base_brings_its_own(tmp_path):
    base, grown = make_base(tmp_path / "base", vocab_size=900), make_base(tmp_path / "grown")
    adapter = make_adapter(grown, tmp_path / "adapter", **CASES["embedding and head"])
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, adapter / name)
    ours = merge(adapter, "--base_model", base)
    theirs = load(base)
    theirs.resize_token_embeddings(ROWS, mean_resizing=False)
    from peft import PeftModel

    assert_same_bits(ours, PeftModel.from_pretrained(theirs, adapter).merge_and_unload())
    assert json.loads(Path("merged/config.json").read_text())["vocab_size"] == ROWS


@pytest.mark.parametrize(("option", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_another_dtype_is_one_rounding_from_the_fp32_sum(tmp_path, option, dtype):
    """An fp16 base is not rounded to bf16 on the way."""
    base = make_base(tmp_path / "base", torch.float16)
    adapter = make_adapter(base, tmp_path / "adapter")
    ours = merge(adapter, "--dtype", option)
    in_fp32 = peft_merge(base, adapter, dtype=torch.float32).state_dict()
    for name, tensor in in_fp32.items():
        assert torch.equal(ours[name], tensor.to(dtype)), name
    assert json.loads(Path("merged/config.json").read_text())["dtype"] == f"{dtype}"[6:]


# --- The 4-bit base ------------------------------------------------------------------------------

WIDE = {"hidden_size": 128, "intermediate_size": 320, "head_dim": 32, "num_attention_heads": 4}


def load_4bit(base: Path):
    from transformers import BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )
    return load(base, quantization_config=nf4, dtype=torch.bfloat16)


@pytest.fixture
def qlora(tmp_path) -> tuple[Path, Path]:
    """An fp16 base and an adapter that was trained on its 4-bit copy, as train_pt.py leaves it."""
    base = make_base(tmp_path / "base", torch.float16, num_key_value_heads=4, **WIDE)
    adapter = make_adapter(base, tmp_path / "adapter", model=load_4bit(base), modules_to_save=NORMS)
    record_settings(adapter)
    return base, adapter


def record_settings(adapter: Path, text: str | None = None, **changes) -> None:
    """Put the 4-bit settings of a training, or another text, into the file's metadata."""
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "device": "cpu",
                "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}
    path, text = adapter / "adapter_model.safetensors", text or json.dumps(settings | changes)
    save_file(load_file(path), path, metadata={"luojiu_quantization": text})


def test_dequantized_is_what_linear4bit_holds_plus_the_same_delta(qlora):
    import bitsandbytes as bnb

    base, adapter = qlora
    ours = merge(adapter)
    held = load_4bit(base)
    for module in held.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            values = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            module.weight = torch.nn.Parameter(values, requires_grad=False)
    values = {name: tensor.to(torch.float16) for name, tensor in held.state_dict().items()}
    plain = load(base)
    values |= {n: t for n, t in plain.state_dict().items() if "embed" in n or "lm_head" in n}
    plain.load_state_dict(values)
    from peft import PeftModel

    assert_same_bits(ours, PeftModel.from_pretrained(plain, adapter).merge_and_unload())


def test_the_original_base_is_one_option_away(qlora):
    base, adapter = qlora
    assert_same_bits(merge(adapter, "--merge_into", "original"), peft_merge(base, adapter))


def test_dequantized_is_nearer_to_what_was_trained(qlora, capsys):
    """Mean KL at most 1e-4, and less than the original's, by the script's own --verify."""
    kl = {}
    for choice in ("dequantized", "original"):
        merge(qlora[1], "--merge_into", choice, "--verify")
        kl[choice] = json.loads(Path("merged/run.json").read_text())["results"]["mean KL"]
    assert 0 <= kl["dequantized"] <= 1e-4
    assert kl["dequantized"] < kl["original"]
    assert "bits per character" in capsys.readouterr().out


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_4bit_copy_is_that_of_bitsandbytes(tmp_path, dtype, threads):
    """Also where a mean depends on the number of threads, at ties and in blocks of zeros."""
    import bitsandbytes.functional as bnb

    tensor = 0.02 * torch.randn((2200, 2048), generator=torch.Generator().manual_seed(0))
    tensor[3], tensor[5, 7], tensor[5, 9] = 0, 1.0, -1.0
    tensor[6] = torch.arange(2048) / 128 - 8
    save_file({"it": tensor.to(torch.bfloat16)}, tmp_path / "it.safetensors")
    stored = merge_lora.read_tensors(tmp_path, "it", "it.safetensors")["it"]
    settings = {"compute_dtype": dtype, "device": "cpu", "threads": threads}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        whole = stored.block(0, stored.rows).to(getattr(torch, dtype))
        theirs = bnb.dequantize_4bit(*bnb.quantize_4bit(
            whole, blocksize=64, compress_statistics=True, quant_type="nf4"))
        torch.set_num_threads(1)  # as in a thread that merges
        bounds = merge_lora.row_blocks(stored.shape)
        ours = torch.cat([*merge_lora.dequantized(stored, settings, bounds)])
    finally:
        torch.set_num_threads(before)
    assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_widths_that_bitsandbytes_misreads_are_refused(tmp_path, capsys):
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    line = refusal(capsys, adapter, "--merge_into", "dequantized")
    assert "no multiple of bitsandbytes' blocks" in line and "--merge_into original" in line


# --- The mean of several, and a chat vector ------------------------------------------------------


def as_if_rounded_once(ours: torch.Tensor, exact: torch.Tensor) -> bool:
    """Half a unit in the last place of a float64 result, and what fp32 adds to it."""
    exact32 = exact.float()
    spacing = exact.abs().clamp(min=1e-30).log2().floor().exp2() * torch.finfo(ours.dtype).eps
    room = spacing.double() / 2 + 1e-6 * exact.abs().max()
    return bool(((ours.double() - exact).abs() <= room).all()) and ours.shape == exact32.shape


@pytest.mark.parametrize("case", ["all linear layers", "as train_pt.py", "DoRA", "rsLoRA"])
def test_several_adapters_are_the_mean_of_their_merged_weights(tmp_path, case):
    base = make_base(tmp_path / "base")
    names = [make_adapter(base, tmp_path / name, **CASES[case]) for name in ("a", "b", "c")]
    for number, adapter in enumerate(names):
        path = adapter / "adapter_model.safetensors"
        noise = torch.Generator().manual_seed(number)
        tensors = load_file(path)
        save_file({
            n: t + 0.1 * torch.randn(t.shape, generator=noise).to(t.dtype)
            for n, t in tensors.items()}, path)
    singles = [dict(merge(name, "--dtype", "fp32")) for name in names]
    ours = merge(names[0], "--adapter", *names)
    for name, tensor in ours.items():
        mean = sum(single[name].double() for single in singles) / 3
        assert as_if_rounded_once(tensor, mean), name
    for name, tensor in read(base).items():  # what no adapter changes stays as it was
        if all(torch.equal(single[name].to(tensor.dtype), tensor) for single in singles):
            assert torch.equal(ours[name], tensor), name
    alone = merge(names[0])
    again = merge(names[0], "--adapter", *4 * [names[0]])
    assert all(torch.equal(alone[name], tensor) for name, tensor in again.items())


def test_adapters_that_cannot_be_averaged(tmp_path, capsys):
    base, other = make_base(tmp_path / "base"), make_base(tmp_path / "other")
    first = make_adapter(base, tmp_path / "a")
    line = refusal(capsys, first, "--adapter", first, make_adapter(other, tmp_path / "b"))
    assert f"its base is {other}" in line and "--base_model" in line
    assert "--verify: one adapter expected" in refusal(
        capsys, first, "--adapter", first, first, "--verify")
    assert "--adapter gone" in refusal(capsys, first, "--adapter", first, "gone")


def make_chat(base: Path, folder: Path, dtype=torch.bfloat16) -> Path:
    """The base, trained further on something else."""
    shutil.copytree(base, folder)
    noise = torch.Generator().manual_seed(7)
    for path in folder.glob("*.safetensors"):
        tensors = {
            n: (t + 0.01 * torch.randn(t.shape, generator=noise)).to(dtype)
            for n, t in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true}')
    edit(folder / "tokenizer_config.json", chat_template="{{ messages[0]['content'] }}")
    return folder


ENDS = {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["as train_pt.py", "DoRA"])
def test_a_chat_vector_is_the_plain_formula_rounded_once(tmp_path, case, dtype, scale):
    base = make_base(tmp_path / "base", dtype)
    adapter = make_adapter(base, tmp_path / "adapter", **CASES[case])
    chat = make_chat(base, tmp_path / "chat")
    merge(adapter, "--dtype", "fp32", "--output_dir", "plain")
    plain, before, after = read(Path("plain")), read(base), read(chat)
    rounded = merge(adapter)
    for embeddings in ("false", "true"):
        ours = merge(
            adapter, "--chat_model", chat, "--chat_scale", scale, "--chat_embeddings", embeddings)
        for name, tensor in ours.items():
            exact = plain[name].double() + scale * (after[name].double() - before[name].double())
            if name in ENDS and embeddings == "false":
                assert torch.equal(tensor, rounded[name]), name
            else:
                assert as_if_rounded_once(tensor, exact), name
    assert Path("merged/chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"
    assert json.loads(Path("merged/generation_config.json").read_text())["temperature"] == 0.6
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "春天"}]
    said = AutoTokenizer.from_pretrained("merged").apply_chat_template(messages, tokenize=False)
    assert said == "春天"


def test_a_chat_model_of_fewer_rows_changes_only_those_that_both_have(tmp_path):
    """The base has 40 new pieces; the chat model's tokenizer has 960 of the 1,000, and a pad."""
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", **CASES["as train_pt.py"])
    rounded = merge(adapter)
    chat = make_chat(base, tmp_path / "chat")
    made = json.loads(Path("merged/tokenizer.json").read_text())
    made["model"]["vocab"] = {p: i for p, i in made["model"]["vocab"].items() if i < 960}
    pad = {"id": 960, "content": "<pad>", "special": True}
    (chat / "tokenizer.json").write_text(json.dumps(made | {"added_tokens": [pad]}))
    (chat / "tokenizer.model").unlink()
    for name in ENDS:
        edit_tensor_exactly(chat, name, lambda t: t[:961])
    edit(chat / "config.json", vocab_size=961)
    ours = merge(adapter, "--chat_model", chat, "--chat_embeddings")
    for name in ENDS:
        changed = (ours[name] != rounded[name]).any(1)
        assert changed[:960].all() and not changed[960:].any(), name


def edit_tensor_exactly(folder: Path, name: str, change) -> None:
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name] = change(tensors[name]).contiguous()
            save_file(tensors, path, metadata={"format": "pt"})


def test_chat_models_that_do_not_belong_to_the_base(pair, tmp_path, capsys):
    base, adapter = pair
    chat = make_chat(base, tmp_path / "chat")

    def line(*options) -> str:
        return refusal(capsys, adapter, "--chat_model", chat, *options)

    assert "--chat_scale 0.0: expected" in line("--chat_scale", "0.0")
    said = refusal(capsys, adapter, "--chat_embeddings")
    assert "--chat_embeddings true" in said and "--chat_model" in said
    assert "--chat_model gone: no such folder" in refusal(capsys, adapter, "--chat_model", "gone")
    assert "which is read, lies in it" in line("--output_dir", chat)
    edit(chat / "config.json", num_attention_heads=10, num_key_value_heads=2, head_dim=6)
    assert "num_attention_heads is 10; expected 5 as in the base" in line()
    shutil.copyfile(base / "config.json", chat / "config.json")
    edit(chat / "config.json", quantization_config={"bits": 4})
    assert "it is quantised" in line()
    edit(chat / "config.json", quantization_config=None)
    whole = read(chat)
    edit_tensor_exactly(chat, "model.norm.weight", lambda t: t[:59])
    assert "model.norm.weight is (59,); expected (60,) by config.json" in line()
    edit_tensor(chat, "model.norm.weight", lambda t: None)
    assert "model.norm.weight is missing; expected (60,)" in line()
    shutil.rmtree(chat)
    make_chat(base, chat)
    assert whole.keys() == read(chat).keys()
    for name in whole:
        edit_tensor_exactly(chat, name, lambda t: torch.randn_like(t))
    said = line()
    assert "not trained from this base" in said and "--chat_model" in said
    merge(adapter)
    made = json.loads(Path("merged/tokenizer.json").read_text())
    made["model"]["vocab"] = {p: (i + 1) % ROWS for p, i in made["model"]["vocab"].items()}
    made["added_tokens"] = []
    (chat / "tokenizer.json").write_text(json.dumps(made))
    assert "0 of its 1000 pieces have the same ids" in line()


@pytest.mark.parametrize(("change", "words"), [
    ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, "rope_theta is 1000000.0"),
    ({"rope_parameters": None, "rope_theta": 5e5}, "rope_theta is 500000.0; expected 10000.0"),
    ({"hidden_act": "gelu"}, "hidden_act is gelu; expected silu")])
def test_a_chat_model_that_computes_differently_is_refused(pair, tmp_path, capsys, change, words):
    chat = make_chat(pair[0], tmp_path / "chat")
    edit(chat / "config.json", **change)
    assert words in refusal(capsys, pair[1], "--chat_model", chat)


def test_a_chat_model_without_a_template_is_a_warning(pair, tmp_path, capsys):
    chat = make_chat(pair[0], tmp_path / "chat")
    edit(chat / "tokenizer_config.json", chat_template=None)
    merge(pair[1], "--chat_model", chat)
    assert "it has no chat template" in capsys.readouterr().err


def test_a_chat_vector_on_a_4bit_base_is_of_the_base_on_disk(qlora, tmp_path):
    base, adapter = qlora
    plain = merge(adapter, "--dtype", "fp32")
    chat = make_chat(base, tmp_path / "chat")
    ours, before, after = merge(adapter, "--chat_model", chat), read(base), read(chat)
    for name in ours.keys() - ENDS:
        exact = plain[name].double() + after[name].double() - before[name].double()
        assert as_if_rounded_once(ours[name], exact), name


# --- A usable model ------------------------------------------------------------------------------


def test_plain_transformers_loads_it_silently_and_goes_on_alike(tmp_path, caplog, capfd):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = make_base(tmp_path / "base", torch.float32, initializer_range=0.3)
    adapter = make_adapter(base, tmp_path / "adapter", **CASES["as train_pt.py"])
    merge(adapter)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModelForCausalLM.from_pretrained("merged")
        tokenizer = AutoTokenizer.from_pretrained("merged")
    said = caplog.text + capfd.readouterr().err.replace("Loading weights", "")
    assert "warn" not in said.lower()
    tokens = tokenizer("春天的早晨，", return_tensors="pt")
    trained = PeftModel.from_pretrained(load(base), adapter)
    greedy = {"max_new_tokens": 30, "do_sample": False}
    ours, theirs = (m.generate(**tokens, **greedy) for m in (model, trained))
    assert ours.tolist() == theirs.tolist()
    assert len(set(ours[0].tolist())) > 5  # it says something


def test_tokenizer_travels_byte_for_byte_and_gains_a_json(tmp_path):
    from transformers import AutoTokenizer

    base = make_base(tmp_path / "base")
    (base / "LICENSE.txt").write_text("terms")
    merge(make_adapter(base, tmp_path / "adapter"))
    settings = ("tokenizer_config.json", "generation_config.json")
    for name in ("tokenizer.model", *settings, "LICENSE.txt"):
        assert Path("merged", name).read_bytes() == (base / name).read_bytes()
    text = "春天的早晨，山上起霧了，OK？ 𠮷\n"
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in ("merged", base))
    assert ours(text).input_ids == theirs(text).input_ids


def test_shards_index_and_buffers(tmp_path):
    """The base is one file with an old inv_freq buffer; the result is sharded and has none."""
    base = make_base(tmp_path / "base")
    assert len(list(base.glob("*.safetensors"))) > 2
    whole = read(base)
    for path in base.glob("model*"):
        path.unlink()
    whole["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(whole, base / "model.safetensors", metadata={"format": "pt"})
    adapter = make_adapter(base, tmp_path / "adapter")
    ours = merge(adapter, "--max_shard_size", 1e-4)
    assert_same_bits(ours, peft_merge(base, adapter))
    index = json.loads(Path("merged/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == ours.keys()
    shards = {path.name for path in Path("merged").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == shards
    assert_same_bits(load(Path("merged")).state_dict(), peft_merge(base, adapter))


def test_mixed_number_formats_stay_as_they_are(tmp_path):
    base = make_base(tmp_path / "base")
    tensors = {n: t.float() if "norm" in n else t for n, t in read(base).items()}
    for path in base.glob("model*"):
        path.unlink()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    ours = merge(make_adapter(base, tmp_path / "adapter"))
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in tensors.items()}


def test_a_second_merge_replaces_the_first(tmp_path):
    base = make_base(tmp_path / "base")
    merge(make_adapter(base, tmp_path / "adapter"))
    record = json.loads(Path("merged/run.json").read_text())
    edit(Path("merged/run.json"), written=[*record["written"], "stale"])
    Path("merged", "stale").touch()
    adapter = make_adapter(base, tmp_path / "other", r=2)
    assert_same_bits(merge(adapter), peft_merge(base, adapter))
    assert not Path("merged", "stale").exists()
    assert sorted(p.name for p in Path().glob("*merged*")) == ["merged"]


def test_run_json_and_card_tell_where_the_weights_come_from(tmp_path):
    base = make_base(tmp_path / "base")
    merge(make_adapter(base, tmp_path / "adapter"))
    record = json.loads(Path("merged/run.json").read_text())
    assert record["script"] == "merge_lora.py"
    assert record["base"]["fingerprint"] == merge_lora.fingerprint(base)
    assert str(base) in Path("merged/README.md").read_text()


@pytest.fixture
def hub():
    """A stand-in for the hub's HTTP API, which remembers what it was asked: .commits has the files
    of each commit, .batches what went to large file storage, .created the repositories."""

    class Answer(HubAnswers):
        def do_GET(self):
            self.answer({"id": "me/luojiu", "sha": "0" * 40, "siblings": []})

        def do_PUT(self):
            self.server.stored[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
            self.answer()

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            here, server = f"http://127.0.0.1:{self.server.server_port}", self.server
            if self.headers.get("Authorization") != "Bearer hf_right":
                return self.answer({"error": "Invalid credentials"}, 401)
            if self.path == "/api/repos/create":
                server.created.append(json.loads(body))
                return self.answer({"url": f"{here}/me/luojiu"})
            if self.path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            if self.path.endswith("/preupload/main"):
                names = [file["path"] for file in json.loads(body)["files"]]
                return self.answer({"files": [
                    {"path": name, "shouldIgnore": False,
                     "uploadMode": "lfs" if name.endswith(".safetensors") else "regular"}
                    for name in names]})
            if self.path.endswith("/info/lfs/objects/batch"):
                objects = json.loads(body)["objects"]
                return self.answer({"transfer": "basic", "objects": [
                    {**it, "actions": {"upload": {"href": f"{here}/lfs/{it['oid']}"}}}
                    for it in objects]})
            if self.path.endswith("/commit/main"):
                lines = [json.loads(line) for line in body.splitlines()]
                server.commits.append({
                    line["value"]["path"]: line["value"] for line in lines
                    if line["key"] != "header"})
                url = f"{here}/me/luojiu/commit/{'1' * 40}"
                return self.answer({"commitUrl": url, "commitOid": "1" * 40})
            return self.answer({}, 404)

    with serving(Answer) as server:
        server.created, server.commits, server.stored = [], [], {}
        yield server


def push(hub, adapter: Path, *options: str, token: str = "hf_right"):
    """Run the script beside the stand-in, whose address is read when the hub's package loads."""
    environment = {
        **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token, "HF_HOME": str(Path("home").resolve())}
    return subprocess.run(
        [sys.executable, str(ROOT / "merge_lora.py"), "--adapter", str(adapter), "--output_dir",
         "merged", "--push_to_hub", "me/luojiu", *options],
        capture_output=True, text=True, env=environment, check=False)


RECORD = {  # of train_pt.py
    "arguments": {"dataset": ["data/cc_filtered"]}, "versions": {"torch": "2.13.0"},
    "settings": {"learning_rate": 0.003, "seed": 42},
    "results": {"documents": 137, "tokens": 39562, "loss_last": 4.5678, "eval_loss": 5.4321}}


def test_push_to_hub_uploads_every_file_and_a_card_that_the_hub_can_read(pair, hub):
    from base64 import b64decode

    from huggingface_hub import ModelCard

    base, adapter = pair
    (base / "run.json").write_text(
        '{"arguments": {"base_model": "meta-llama/Llama-2-7b-hf"}, "base": null}')
    (adapter / "run.json").write_text(json.dumps(RECORD))
    (adapter / "trainloss.png").write_bytes(b"a picture")
    done = push(hub, adapter)
    assert done.returncode == 0, done.stderr
    assert hub.created == [{"name": "luojiu", "organization": "me", "visibility": "private"}]
    (files,) = hub.commits
    assert files.keys() == {path.name for path in Path("merged").iterdir()}
    (weights,) = hub.stored.values()
    assert weights == Path("merged/model.safetensors").read_bytes()
    text = b64decode(files["README.md"]["content"]).decode()
    card = ModelCard(text)
    data = card.data.to_dict()
    assert data["base_model"] == "meta-llama/Llama-2-7b-hf" and data["license"] == "llama2"
    assert data["library_name"] == "transformers" and data["language"] == "zh"
    train, held = card.data.eval_results
    assert card.data.model_name == "luojiu"
    assert (train.dataset_name, train.dataset_args) == (
        "cc_filtered", {"documents": 137, "tokens": 39562})
    assert (train.metric_name, train.metric_value) == ("train loss", 4.5678)
    assert held.metric_value == 5.4321
    for words in ("![training loss](trainloss.png)", "## Hyperparameters", "- learning_rate: 0.003",
                  "## Framework versions", "- torch: 2.13.0", "- documents: 137"):
        assert words in text


def test_a_dry_run_shows_what_would_go_and_sends_nothing(pair, capsys):
    """The tests have no network: an upload would fail."""
    merge(pair[1], "--push_to_hub", "me/luojiu", "--push_dry_run")
    said = capsys.readouterr().out
    for path in Path("merged").iterdir():
        assert f"{path.stat().st_size:,} bytes  {path.name}\n" in said
    assert Path("merged/README.md").read_text() in said


def test_uploads_that_are_refused(pair, hub, capsys, monkeypatch):
    done = push(hub, pair[1], token="hf_wrong")
    assert done.returncode == 2 and Path("merged/config.json").is_file()
    line = done.stderr.splitlines()[-1]
    assert "--push_to_hub me/luojiu" in line and "401" in line and "merged is whole" in line
    assert "--push_dry_run true: expected" in refusal(capsys, pair[1], "--push_dry_run", "true")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "--push_to_hub me/luojiu: no token; run hf auth login, or set HF_TOKEN" in (
        refusal(capsys, "nowhere", "--push_to_hub", "me/luojiu"))


# --- What is refused -----------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    base = make_base(tmp_path / "base")
    return base, make_adapter(base, tmp_path / "adapter")


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensor(folder: Path, name: str, change) -> None:
    """Change the first tensor whose name ends so; None drops it."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for key in [key for key in tensors if key.endswith(name)][:1]:
            tensor = change(tensors.pop(key).clone())
            if tensor is not None:
                tensors[key] = tensor.contiguous()
            save_file(tensors, path, metadata={"format": "pt"})
            return


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bias", "all"),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa_niter_16"),
        ("lora_bias", True),
        ("layer_replication", [[0, 2]]),
        ("layers_to_transform", [1]),
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("target_parameters", ["experts.down_proj"]),
        ("a_field_of_tomorrow", True),
    ],
)
def test_kinds_of_adapter_that_cannot_be_merged_exactly_are_named(pair, capsys, field, value):
    edit(pair[1] / "adapter_config.json", **{field: value})
    line = refusal(capsys, pair[1])
    assert field in line and str(value) in line and "merge_and_unload" in line


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
@pytest.mark.parametrize("value", ["16", None])
def test_a_number_that_is_none_is_named(pair, capsys, field, value):
    edit(pair[1] / "adapter_config.json", **{field: value})
    assert f"{field} is {value!r}; expected a number" in refusal(capsys, pair[1])


def test_lora_on_embeddings_is_named(tmp_path, capsys):
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    assert "lora_embedding_A cannot be merged exactly" in refusal(capsys, adapter)


def test_lora_on_a_tied_head_is_named(tmp_path, capsys):
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["lm_head"])
    assert "one of two tied matrices" in refusal(capsys, adapter)


def poke(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("where", "name", "change", "expected"),
    [
        ("adapter", "k_proj.lora_B.weight", poke(float("nan")), "k_proj.lora_B.weight has NaN"),
        ("adapter", "up_proj.lora_A.weight", poke(float("inf")), "up_proj.lora_A.weight has NaN"),
        ("adapter", "up_proj.lora_A.weight", lambda t: None, "lora_A is missing; expected (5, 60)"),
        ("adapter", "up_proj.lora_A.weight", lambda t: t[:4], "lora_A is (4, 60); expected (5,"),
        ("adapter", "up_proj.lora_A.weight", lambda t: t[:, :9], "is this its base?"),
        ("base", "v_proj.weight", poke(float("-inf")), "v_proj.weight has NaN"),
        ("base", "v_proj.weight", lambda t: None, "v_proj.weight is missing; expected (12, 60)"),
        ("base", "model.norm.weight", lambda t: None, "model.norm.weight is missing"),
        ("base", "model.norm.weight", lambda t: t[:59], "(59,); expected (60,)"),
        ("base", "lm_head.weight", lambda t: t[:99], "(99, 60); expected (1000, 60)"),
        ("base", "lm_head.weight", lambda t: t.to(torch.int8), "is stored as I8"),
    ],
)
def test_broken_tensors(pair, capsys, where, name, change, expected):
    edit_tensor(pair[where == "adapter"], name, change)
    assert expected in refusal(capsys, pair[1])


def test_numbers_that_the_format_cannot_hold(pair, capsys):
    edit_tensor(pair[0], "v_proj.weight", poke(1e5))
    line = refusal(capsys, pair[1], "--dtype", "fp16")
    assert "v_proj.weight goes beyond the range of float16; pass --dtype bf16" in line
    assert merge(pair[1])


def test_settings_and_tensors_of_an_adapter_that_do_not_go_together(pair, tmp_path, capsys):
    edit(pair[1] / "adapter_config.json", use_dora=True)
    assert "down_proj.lora_magnitude_vector is missing; expected (60,)" in refusal(capsys, pair[1])
    edit(pair[1] / "adapter_config.json", use_dora=False, revision="v2")
    edit(pair[1] / "adapter_config.json", base_model_name_or_path="someone/model")
    assert "trained on revision v2; download it" in refusal(capsys, pair[1])
    new = make_adapter(pair[0], tmp_path / "new", trainable_token_indices=[7, 9])
    edit(new / "adapter_config.json", trainable_token_indices=[7])
    assert "embed_tokens.new_rows is (2, 60); expected (1, 60)" in refusal(capsys, new)


def test_an_adapter_of_another_model(pair, capsys):
    """Same shapes, other weights: only the fingerprint tells."""
    base, adapter = pair
    record = {"base": {"model_name_or_path": "base", "fingerprint": merge_lora.fingerprint(base)}}
    (adapter / "run.json").write_text(json.dumps(record))
    merge(adapter)
    edit_tensor(base, "q_proj.weight", poke(0.5))
    assert "the adapter is of another model" in refusal(capsys, adapter)


def test_the_fingerprint_sees_both_ends_of_every_tensor(pair):
    base = pair[0]
    prints = {merge_lora.fingerprint(base)}
    for name in ("embed_tokens.weight", "norm.weight"):
        for place in (0, -1):
            edit_tensor(base, name, lambda t, place=place: t.view(-1)[place].fill_(7) is None or t)
            prints.add(merge_lora.fingerprint(base))
    edit(base / "config.json", rope_theta=1.0)
    assert len(prints | {merge_lora.fingerprint(base)}) == 6


def test_what_macos_leaves_beside_a_file_is_not_counted(pair):
    base, adapter = pair
    print_of_base = merge_lora.fingerprint(base)
    for folder in pair:
        for path in [*folder.iterdir()]:
            path.with_name(f"._{path.name}").write_bytes(b"\0\5\26\7 of another program")
    (adapter / "checkpoint-old").mkdir()
    shutil.copy(adapter / "adapter_config.json", adapter / "checkpoint-old")
    assert merge_lora.fingerprint(base) == print_of_base
    assert merge(adapter)


def test_new_rows_beyond_the_base(tmp_path, capsys):
    grown, base = make_base(tmp_path / "grown"), make_base(tmp_path / "base", vocab_size=900)
    adapter = make_adapter(grown, tmp_path / "adapter", trainable_token_indices=[950])
    line = refusal(capsys, adapter, "--base_model", base)
    assert "new row 950; the base has 900" in line and "extend_vocab.py" in line


def test_truncated_missing_and_foreign_shards(pair, capsys):
    base, adapter = pair
    first, second = sorted(base.glob("*.safetensors"))[:2]
    whole = first.read_bytes()
    for size in (len(whole) - 1, 100, 5, 0):
        first.write_bytes(whole[:size])
        line = refusal(capsys, adapter)
        assert first.name in line and "copy or download it again" in line
    first.write_bytes(b"not a safetensors file at all")
    assert "expected a safetensors file" in refusal(capsys, adapter)
    first.write_bytes(whole)
    second.unlink()
    assert f"{second.name} is missing or broken (No such file" in refusal(capsys, adapter)
    (base / "config.json").write_text("{")
    assert "config.json is broken" in refusal(capsys, adapter)


def test_missing_models_say_what_to_run(pair, capsys, tmp_path):
    base, adapter = pair
    assert "run python train_pt.py first" in refusal(capsys, "outputs/pt")
    assert "expected a PEFT LoRA adapter" in refusal(capsys, base)
    edit(adapter / "adapter_config.json", base_model_name_or_path="outputs/extended")
    assert "run python extend_vocab.py first" in refusal(capsys, adapter)
    edit(adapter / "adapter_config.json", base_model_name_or_path=None)
    assert "pass --base_model" in refusal(capsys, adapter)
    edit(base / "config.json", quantization_config={"load_in_4bit": True})
    assert "it is quantised" in refusal(capsys, adapter, "--base_model", base)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "adapter_model.bin; expected adapter_model.safetensors" in refusal(capsys, adapter)


def test_unfinished_training_points_to_its_last_checkpoint(pair, capsys):
    for step in (9, 10):
        shutil.copytree(pair[1], Path("pt") / f"checkpoint-{step}")
        (Path("pt") / f"checkpoint-{step}" / "run.json").write_text("{}")
    shutil.copytree(pair[1], "pt/checkpoint-11")  # still being written: it has no run.json
    assert "training is not finished; pass --adapter pt/checkpoint-10" in refusal(capsys, "pt")
    assert merge(Path("pt/checkpoint-9"))


def test_tokenizers_that_do_not_fit(pair, capsys, tmp_path):
    base, adapter = pair
    merge(adapter)
    shutil.copyfile("merged/tokenizer.json", base / "tokenizer.json")
    made = json.loads((base / "tokenizer.json").read_text())
    made["model"]["vocab"]["one more"] = ROWS
    (base / "tokenizer.json").write_text(json.dumps(made))
    assert "tokenizer.model has 1000 pieces, tokenizer.json 1001" in refusal(capsys, adapter)
    (base / "tokenizer.model").unlink()
    assert "tokenizer.model has no pieces, tokenizer.json 1001" in refusal(capsys, adapter)
    (base / "tokenizer.json").unlink()
    assert "no tokenizer.model or tokenizer.json" in refusal(capsys, adapter)


def test_a_record_without_a_base_is_no_obstacle(pair):
    """The record of a run that has not finished names none yet."""
    (pair[1] / "run.json").write_text('{"base": null}')
    assert merge(pair[1])


def test_what_cannot_be_read_is_named(pair, capsys, monkeypatch):
    """Root may read any file, so the test raises the error itself."""

    def denied(source, target):
        raise PermissionError(errno.EACCES, "Permission denied", str(source))

    monkeypatch.setattr(merge_lora.shutil, "copyfile", denied)
    line = refusal(capsys, pair[1], code=1)
    assert f"--output_dir merged: {pair[0]}/" in line
    assert line.endswith(": Permission denied; it is as it was before")


def test_output_folders_that_are_not_ours(pair, capsys):
    base, adapter = pair
    Path("merged").mkdir()
    Path("merged/diary.txt").touch()
    assert "merge_lora.py did not make it" in refusal(capsys, adapter)
    assert Path("merged/diary.txt").exists()
    assert "lies in it" in refusal(capsys, adapter, "--output_dir", base)
    assert "lies in it" in refusal(capsys, adapter, "--output_dir", adapter.parent)


@pytest.mark.parametrize(("option", "value"), [
    ("--max_shard_size", "0.0"), ("--max_shard_size", "nan"), ("--push_to_hub", "my model")])
def test_values_that_are_refused_before_anything_is_read(capsys, option, value):
    assert f"{option} {value}: expected" in refusal(capsys, "nowhere", option, value)


def test_texts_that_cannot_be_read(pair, capsys):
    Path("latin").write_bytes(b"\xff\xfe\xfd")
    assert "expected a UTF-8 text" in refusal(capsys, pair[1], "--verify", "latin")
    assert "expected a UTF-8 text" in refusal(capsys, pair[1], "--verify", "nowhere")


# --- An adapter that is not whole, and what travels with it --------------------------------------


def drop(folder: Path, wanted) -> None:
    """Remove the tensors whose name fits."""
    path = folder / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if not wanted(n)}, path)


ROWS_OF_BOTH = {"embed_tokens": NEW_ROWS, "lm_head": NEW_ROWS}
TRUNCATED = {  # what the adapter promises, what is lost of it, the first tensor, how many more
    "everything": ({}, "", "model.layers.0.mlp.down_proj.lora_A is missing; expected (5, 131)", 27),
    "a layer": ({}, "layers.1.", "model.layers.1.mlp.down_proj.lora_A is missing", 13),
    "one pair": ({}, "0.mlp.up_proj.", "model.layers.0.mlp.up_proj.lora_A is missing", 1),
    "a pattern's": (
        {"target_modules": ".*_proj"}, "k_proj", "0.self_attn.k_proj.lora_A is missing", 3),
    "another rank's": (
        {"rank_pattern": {"down_proj": 9}}, "down_proj",
        "0.mlp.down_proj.lora_A is missing; expected (9, 131)", 3),
    "embedding and head": (
        {"modules_to_save": ["embed_tokens", "lm_head"]}, "embed_tokens",
        "model.embed_tokens.weight is missing; expected (1000, 60)", 0),
    "a norm": (
        {"modules_to_save": NORMS}, "model.norm",
        "model.norm.weight is missing; expected (60,)", 0),
    "new rows": (
        {"trainable_token_indices": ROWS_OF_BOTH}, "lm_head",
        "lm_head.new_rows is missing; expected (23, 60)", 0),
    "a whole block": (
        {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}, "1.mlp.up_proj",
        "model.layers.1.mlp.up_proj.weight is missing; expected (131, 60)", 0),
}  # fmt: skip


@pytest.mark.parametrize("case", TRUNCATED)
def test_an_adapter_that_lacks_what_it_promises_is_refused(tmp_path, capsys, case):
    promise, lost, first, more = TRUNCATED[case]
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", **promise)
    assert_same_bits(merge(adapter), peft_merge(base, adapter))
    drop(adapter, lambda name: lost in name)
    capsys.readouterr()
    line = refusal(capsys, adapter)
    assert first in line and "by adapter_config.json" in line
    assert f"({more} more differ)" in line if more else "more differ" not in line


@pytest.mark.parametrize("promise", [
    {"target_modules": ["q_proj", "model.layers.1.mlp.up_proj", "proj"]},
    {"target_modules": r".*layers\.[1-9]\d*\.self_attn\.[qv]_proj"},
    {"target_modules": LINEAR, "exclude_modules": ["k_proj", "layers.2.mlp.up_proj"]},
    {"target_modules": LINEAR, "exclude_modules": ".*mlp.*"},
    {"target_modules": [*LINEAR, "lm_head"], "modules_to_save": ["mlp", "lm_head"]},
])  # fmt: skip
def test_targets_are_those_of_peft(promise):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    modules = [
        f"model.layers.{i}.{'mlp' if name in LINEAR[4:] else 'self_attn'}.{name}"
        for i in (0, 1, 2, 12) for name in LINEAR]
    config = LoraConfig(**promise)
    for module in [*modules, "lm_head", "model.embed_tokens", "model.norm"]:
        theirs = check_target_module_exists(config, module)
        assert merge_lora.is_target(module, promise) == bool(theirs), module


def test_layers_that_are_not_promised_are_named(pair, capsys):
    """PEFT leaves them out with a warning."""
    edit(pair[1] / "adapter_config.json", exclude_modules=".*layers.1.*")
    line = refusal(capsys, pair[1])
    assert "model.layers.1.mlp.down_proj.lora_A is (5, 131); expected no such tensor" in line
    assert "(13 more differ)" in line


def test_an_adapter_that_promises_nothing_is_refused(pair, capsys):
    edit(pair[1] / "adapter_config.json", target_modules=None)
    drop(pair[1], lambda name: True)
    assert "adapter_config.json promises no tensor" in refusal(capsys, pair[1])


def test_settings_that_are_not_known_are_one_warning(qlora, capsys):
    base, adapter = qlora
    path = adapter / "adapter_model.safetensors"
    save_file(load_file(path), path)
    assert_same_bits(merge(adapter), peft_merge(base, adapter))
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning: ")]
    assert len(said) == 1 and "4 bits" in said[0] and "--merge_into dequantized" in said[0]
    record_settings(adapter, load_in_4bit=False)
    merge(adapter)
    merge(adapter, "--merge_into", "dequantized")
    assert "warning" not in capsys.readouterr().err


def test_it_says_where_it_quantises_and_where_the_adapter_was_trained(qlora, capsys, monkeypatch):
    adapter = qlora[1]
    for device, words in (("cpu", "trained on cpu"), ("cuda", "trained on cuda; few values of 10")):
        record_settings(adapter, device=device)
        merge(adapter, "--device", "cpu")
        assert f"quantising on cpu; the adapter was {words}" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda: PyTorch sees no GPU here" in refusal(capsys, adapter, "--device", "cuda")


@pytest.mark.parametrize("settings", [
    "{", "[4]", '{"load_in_4bit": true}', '{"load_in_4bit": true, "bnb_4bit_quant_type": "fp4", '
    '"bnb_4bit_compute_dtype": "bfloat16"}'])
def test_settings_that_cannot_be_read(pair, capsys, settings):
    record_settings(pair[1], settings)
    assert f"its 4-bit settings are {settings}; expected NF4's" in refusal(capsys, pair[1])


def test_paths_with_a_tilde_are_one_place(qlora, monkeypatch):
    base, adapter = qlora
    monkeypatch.setenv("HOME", str(base.parent))
    (base.parent / "text").write_text("春天的早晨", encoding="utf-8")
    merge_lora.main([
        "--adapter", "~/adapter", "--base_model=~/base", "--output_dir", "~/out", "--device", "cpu",
        "--verify", "~/text"])
    expected, ours = merge(adapter), read(base.parent / "out")
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    assert not Path("~").exists()
    edit(adapter / "adapter_config.json", base_model_name_or_path="~/base")
    assert merge(adapter)


def test_a_link_is_a_place(pair, tmp_path, capsys):
    (tmp_path / "disk").mkdir()
    Path("merged").symlink_to(tmp_path / "disk")
    before = merge(pair[1])
    assert Path("merged").is_symlink() and before.keys() == read(tmp_path / "disk").keys()
    shutil.rmtree(tmp_path / "disk")
    line = refusal(capsys, pair[1])
    assert f"--output_dir merged: a link to {tmp_path / 'disk'}, which is not there" in line
    Path("merged").unlink()
    Path("merged").symlink_to("merged")  # a link to itself
    assert "--output_dir merged: a link to merged" in refusal(capsys, pair[1])
    Path("here").symlink_to(pair[1])
    assert merge(Path("here"), "--output_dir", "elsewhere") == {}
    assert read(Path("elsewhere")).keys() == before.keys()


def test_pickled_weights_and_how_to_convert_them(pair, capsys):
    """The adapter's command is run as it is printed."""
    import shlex

    base, adapter = pair
    expected = merge(adapter)
    path = adapter / "adapter_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    line = refusal(capsys, adapter)
    command = shlex.split(line.partition("convert them: ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True)
    ours = merge(adapter)
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    for shard in base.glob("model*"):
        shard.unlink()
    assert "no model.safetensors there, nor its index" in refusal(capsys, adapter)
    (base / "pytorch_model.bin").touch()
    line = refusal(capsys, adapter)
    assert f"--base_model {base}: its weights are in pytorch_model.bin" in line
    assert "convert them: python -c" in line and f"save_pretrained('{base}')" in line


def test_a_base_that_has_moved_is_named_by_the_adapter(pair, capsys):
    base, adapter = pair
    base.rename(base.with_name("moved"))
    line = refusal(capsys, adapter)
    assert f"--adapter {adapter}: it names {base} as its base" in line
    assert "pass the model with --base_model" in line
    line = refusal(capsys, adapter, "--base_model", "m")
    assert "it names" not in line and "--base_model m: no such folder" in line
    assert merge(adapter, "--base_model", base.with_name("moved"))


def test_an_adapters_own_tokenizer_is_blamed(pair, capsys):
    adapter = pair[1]
    merge(adapter)
    made = json.loads(Path("merged/tokenizer.json").read_text())
    added = {"id": ROWS, "content": "<one more>", "special": False}
    made["added_tokens"].append(added)
    (adapter / "tokenizer.json").write_text(json.dumps(made))
    line = refusal(capsys, adapter)
    assert f"--adapter {adapter}: " in line and f"added tokens {ROWS + 1}" in line
    assert "or remove" in line


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(pair, capsys, monkeypatch, number):
    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(merge_lora.fcntl, "flock", flock)
    assert merge(pair[1])
    assert "warning: --output_dir merged: this file system has no locks" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_the_lock_ends_with_main(pair, monkeypatch, wrong):
    """As in a notebook, where the process goes on; nothing is left either."""
    def stop(*args):
        raise wrong

    with monkeypatch.context() as patch:
        patch.setattr(merge_lora, "write_weights", stop)
        with pytest.raises((SystemExit, RuntimeError)):
            merge(pair[1])
    assert not list(Path().glob("*merged*"))
    assert merge(pair[1])


def test_a_merged_model_tells_what_was_new_in_it(pair):
    base, adapter = pair
    (base / "run.json").write_text('{"results": {"base_vocab_size": 977}}')
    merge(adapter)
    assert json.loads(Path("merged/run.json").read_text())["results"]["base_vocab_size"] == 977
    second = make_adapter(Path("merged").resolve(), base.parent / "second")
    merge(second, "--output_dir", "again")
    assert json.loads(Path("again/run.json").read_text())["results"]["base_vocab_size"] == 977
    (base / "run.json").unlink()
    (adapter / "run.json").write_text('{"settings": {"first_new_row": 976}}')
    merge(adapter)
    assert json.loads(Path("merged/run.json").read_text())["results"]["base_vocab_size"] == 976


# --- Adapters, bases and folders that are not what they seem -------------------------------------


def seal(folder: Path, **record) -> None:
    """A checkpoint's run.json, with the sum of every file."""
    sums = {p.name: merge_lora.file_sum(p) for p in folder.iterdir() if p.name != "run.json"}
    (folder / "run.json").write_text(json.dumps({"files": sums, **record}))


def test_weights_that_differ_from_their_sum_are_refused(pair, capsys):
    adapter = pair[1]
    (adapter / "optimizer.pt").touch()
    seal(adapter)
    (adapter / "optimizer.pt").unlink()  # a file that no merge reads may be missing
    assert merge(adapter)
    path = adapter / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5000:-4000] = bytes(1000)
    path.write_bytes(content)
    line = refusal(capsys, adapter)
    assert f"--adapter {adapter}: adapter_model.safetensors is not as it was written" in line
    (adapter / "run.json").unlink()
    assert merge(adapter)


def test_files_that_the_model_does_not_name_do_not_count(pair):
    base, adapter = pair
    before, print_of_base = merge(adapter), merge_lora.fingerprint(base)
    (base / "model-00099-of-00099.safetensors").touch()
    (base / "consolidated.safetensors").write_bytes(b"not even safetensors")
    assert merge_lora.fingerprint(base) == print_of_base
    ours = merge(adapter)
    assert all(torch.equal(ours[name], tensor) for name, tensor in before.items())


def test_the_single_file_comes_before_the_index(pair):
    """As in Transformers; an index may be left from an earlier model."""
    base, adapter = pair
    tensors = {name: tensor + 1 for name, tensor in read(base).items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert (base / "model.safetensors.index.json").is_file()
    print_of_base = merge_lora.fingerprint(base)
    assert_same_bits(merge(adapter), peft_merge(base, adapter))
    for path in (*base.glob("model-*"), base / "model.safetensors.index.json"):
        path.unlink()
    assert merge_lora.fingerprint(base) == print_of_base


@pytest.mark.parametrize("content", ['{"weight_map": null}', '{"weight_map": [1]}', "[]", "{"])
def test_an_index_that_makes_no_sense(pair, capsys, content):
    (pair[0] / "model.safetensors.index.json").write_text(content)
    line = refusal(capsys, pair[1])
    assert f"--base_model {pair[0]}: no model.safetensors there, nor its index that can" in line


@pytest.mark.parametrize(("layers", "words"), [
    (None, "input_layernorm.weight is (60,); expected no such tensor"),
    (1, "layers.1.input_layernorm.weight is (60,); expected no such tensor"),
    (3, "layers.2.input_layernorm.weight is missing; expected (60,)")])
def test_layers_that_the_config_does_not_count_are_named(pair, capsys, layers, words):
    edit(pair[0] / "config.json", num_hidden_layers=layers)
    line = refusal(capsys, pair[1])
    assert f"--base_model {pair[0]}: model.layers" in line and f"{words} by config.json" in line


def test_json_that_begins_with_a_mark_of_byte_order(pair):
    base, adapter = pair
    before = merge(adapter)
    shutil.copyfile("merged/tokenizer.json", base / "tokenizer.json")
    (adapter / "run.json").write_text("{}")
    for path in [*base.glob("*.json"), *adapter.glob("*.json")]:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    ours = merge(adapter)
    assert all(torch.equal(ours[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("record", [
    {"base": "llama", "status": "ok"}, {"results": "ok"}, {"settings": [1]}, {"arguments": "a b"},
    {"files": ["a"]}, {"base": {"fingerprint": None}}])
@pytest.mark.parametrize("place", [0, 1])
def test_a_record_of_another_program_does_not_count(pair, record, place):
    (pair[place] / "run.json").write_text(json.dumps(record))
    assert merge(pair[1])


def changed_tokenizer(source: Path, target: Path, change) -> None:
    made = json.loads(source.read_text())
    change(made["model"]["vocab"], made["added_tokens"])
    target.write_text(json.dumps(made))


def test_an_adapters_tokenizer_must_have_the_bases_pieces(pair, capsys):
    """The base has 23 tokens that were added to its tokenizer; the adapter's lacks them."""
    base, adapter = pair
    merge(adapter)
    (base / "tokenizer.model").unlink()

    def extend(vocab: dict, added: list) -> None:
        for i in range(977, 1000):
            del vocab[next(piece for piece, number in vocab.items() if number == i)]
            added.append({"id": i, "content": f"新{i}", "special": False})

    def forget(vocab: dict, added: list) -> None:
        extend(vocab, added)
        del added[-23:]

    def swap(vocab: dict, added: list) -> None:
        extend(vocab, added)
        ids = [i for i in vocab.values() if i >= 400]
        vocab.update(zip([p for p, i in vocab.items() if i >= 400], ids[::-1], strict=True))

    made = Path("merged/tokenizer.json")
    changed_tokenizer(made, base / "tokenizer.json", extend)
    merge(adapter, "--output_dir", "other")
    for change, words in ((forget, "lacks 23 pieces of the base's"), (swap, "pieces of the base")):
        changed_tokenizer(made, adapter / "tokenizer.json", change)
        line = refusal(capsys, adapter)
        assert f"--adapter {adapter}: its tokenizer.json" in line and words in line
        assert "remove its tokenizer's files to take those of the base" in line
    changed_tokenizer(made, adapter / "tokenizer.json", extend)
    merge(adapter, "--output_dir", "other")


def test_the_two_files_of_a_tokenizer_must_have_the_same_pieces(pair, capsys):
    base, adapter = pair
    merge(adapter)

    def swap(vocab: dict, added: list) -> None:
        pieces = {i: piece for piece, i in vocab.items()}
        vocab[pieces[500]], vocab[pieces[501]] = 501, 500

    changed_tokenizer(Path("merged/tokenizer.json"), base / "tokenizer.json", swap)
    line = refusal(capsys, adapter)
    assert "its tokenizer.json lacks 2 pieces of tokenizer.model or gives them other ids" in line


def test_a_chat_model_with_tokens_of_its_own_is_refused(pair, tmp_path, capsys):
    """Its <|im_end|> would be a word of the extended base."""
    base, adapter = pair
    merge(adapter)
    chat = make_chat(base, tmp_path / "chat")
    end = {"id": 1000, "content": "<|im_end|>", "special": True}
    made = Path("merged/tokenizer.json")
    changed_tokenizer(made, chat / "tokenizer.json", lambda vocab, added: added.append(end))
    for name in ENDS:
        edit_tensor_exactly(chat, name, lambda t: torch.cat([t, t[:1]]))
    edit(chat / "config.json", vocab_size=1001)
    assert merge(adapter, "--chat_model", chat)
    edit(chat / "tokenizer_config.json", chat_template="{{ messages }}<|im_end|>")
    line = refusal(capsys, adapter, "--chat_model", chat)
    assert f"--chat_model {chat}: " in line and "needs <|im_end|>, which the base has" in line


def test_files_of_the_user_in_the_output_are_named_and_kept(pair, capsys):
    adapter = pair[1]
    merge(adapter)
    for name in ("merged-7B-F16.gguf", "notes.md"):
        Path("merged", name).write_text("mine")
    line = refusal(capsys, adapter)
    assert "--output_dir merged: merged-7B-F16.gguf, notes.md there, 2 in all" in line
    assert Path("merged/merged-7B-F16.gguf").read_text() == "mine"
    for name in ("merged-7B-F16.gguf", "notes.md"):
        Path("merged", name).unlink()
    Path("merged/.DS_Store").touch()
    Path("merged/lost+found").mkdir()
    assert merge(adapter)
    assert merge(adapter, "--verify") and merge(adapter)  # run.json is written twice


@pytest.mark.parametrize("second", [["--adapter", "b"], ["--adapter=b"]])
def test_a_list_given_twice_is_refused(capsys, second):
    with pytest.raises(SystemExit) as stop:
        merge_lora.main(["--adapter", "a", *second])
    assert stop.value.code == 2
    assert "--adapter is given twice; give it once, with all values: --adapter A B" in (
        capsys.readouterr().err)


def test_an_output_that_cannot_be_renamed_is_refused_before_the_work(pair, capsys, monkeypatch):
    """A mount (docker -v) gives EBUSY, a folder of an image's lower layer EXDEV."""
    Path("merged").mkdir()
    rename = Path.rename

    def merging(*args):
        raise AssertionError("it merges")

    monkeypatch.setattr(merge_lora, "write_weights", merging)
    for number in (errno.EBUSY, errno.EXDEV):
        def busy(path, target, number=number):
            if path.name == "merged":
                raise OSError(number, os.strerror(number), str(path))
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", busy)
        line = refusal(capsys, pair[1])
        assert line.startswith("error: --output_dir merged: a mount or the current folder, which")
    monkeypatch.chdir("merged")
    line = refusal(capsys, pair[1], "--output_dir", ".")
    assert line.startswith("error: --output_dir .: a mount or the current folder")


@pytest.mark.parametrize("closed", ["| true", ">&- 2>&-"])
def test_nobody_need_read_what_is_printed(pair, closed):
    """The pipe's reader is gone before the first line is printed."""
    script = [sys.executable, str(ROOT / "merge_lora.py"), "--adapter", str(pair[1]),
              "--merge_into", "original", "--output_dir", "merged"]
    line = f"(sleep 1; exec {' '.join(script)}) {closed}"
    subprocess.run(["bash", "-o", "pipefail", "-c", line], check=True)
    assert Path("merged/config.json").is_file()


def test_the_title_of_a_card_is_the_folders_name(pair):
    merge(pair[1], "--output_dir", "there/")
    assert "\n# there\n" in Path("there/README.md").read_text()


@pytest.mark.parametrize(("place", "other"), [
    ("layers.", "layers._fsdp_wrapped_module."), (".weight", ".default.weight")])
def test_names_of_a_raw_state_dict(pair, capsys, place, other):
    path = pair[1] / "adapter_model.safetensors"
    save_file({name.replace(place, other): t for name, t in load_file(path).items()}, path)
    assert "save the adapter with PEFT's save_pretrained" in refusal(capsys, pair[1])


def test_an_adapter_in_float64_says_what_to_save(pair, capsys):
    path = pair[1] / "adapter_model.safetensors"
    save_file({name: t.double() for name, t in load_file(path).items()}, path)
    assert "stored as F64; expected BF16, F16 or F32; save it in one" in refusal(capsys, pair[1])


# --- A full disk, a kill -------------------------------------------------------------------------


def test_a_disk_too_small_is_seen_before_the_first_byte(pair, capsys, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=65_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "free; make room" in refusal(capsys, pair[1], code=1)


def test_a_disk_that_fills_up_leaves_the_earlier_model(pair, capsys, monkeypatch):
    adapter = pair[1]
    before = merge(adapter)
    original, calls = merge_lora.merged, iter(range(1000))

    def failing(part):
        if next(calls) == 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield from original(part)

    monkeypatch.setattr(merge_lora, "merged", failing)
    assert "No space left on device; it is as it was before" in refusal(capsys, adapter, code=1)
    after = read(Path("merged"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("moment", ["merged", "write_papers"])
def test_a_killed_run_leaves_nothing_that_looks_finished(pair, moment):
    """kill -9 from within; what is left has no config.json, and the next run clears it away."""
    adapter = pair[1]
    before = merge(adapter)
    code = f"""if True:
        import os, signal, sys
        sys.path.insert(0, {str(ROOT)!r})
        import merge_lora
        def die(*args): os.kill(os.getpid(), signal.SIGKILL)
        merge_lora.{moment} = die
        merge_lora.main(sys.argv[1:])"""
    command = [sys.executable, "-c", code, "--adapter", str(adapter), "--output_dir", "merged"]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert Path(".merged.partial").is_dir() and not Path(".merged.partial/config.json").exists()
    after = read(Path("merged"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    merge(adapter)
    assert sorted(p.name for p in Path().glob("*merged*")) == ["merged"]


