"""The loss, trainable rows and norms, the adapter's file, NF4 on CPUs, against plain references."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import train_pt

TINY = ROOT / "data" / "sample" / "tiny-llama"
torch.set_num_threads(1)


@pytest.fixture
def chunk(monkeypatch):
    """A chunk that divides nothing evenly."""
    monkeypatch.setattr(train_pt, "LOSS_CHUNK", 7)


def tiny_llama(dtype=torch.float32, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    train_pt.register_attention()
    torch.manual_seed(0)
    sizes = {"vocab_size": 53, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes | {"num_attention_heads": 4} | changes, attn_implementation="s2")
    model = LlamaForCausalLM(config).to(dtype)
    model.config.group_size = 8
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def batch_of(lengths: list[int], block_size: int, rows: int = 53) -> dict:
    tokens = np.random.default_rng(0).integers(3, rows, sum(lengths))
    corpus = train_pt.Corpus(tokens, np.array(lengths), np.array(lengths))
    blocks = train_pt.PackedBlocks(corpus, np.arange(len(lengths)), block_size, padding=0)
    return train_pt.Collate(8, flash=False)([blocks[i] for i in range(len(blocks))])


def test_a_batch_without_any_target_has_no_loss():
    """As of a last block that holds one token alone; divided by none it would be NaN for ever."""
    llama = tiny_llama()
    train_pt.train_tail(llama, 31)
    batch = batch_of([8, 1], 8)
    last = {name: batch[name][1:] for name in ("input_ids", "position_ids", "labels")}
    with llama.lm_head.inside_the_loss():
        loss = llama(**last, num_items_in_batch=torch.tensor(0)).loss
    loss.backward()
    assert loss == 0
    assert not any(p.grad.any() for p in llama.parameters() if p.grad is not None)


@pytest.mark.parametrize("first", [0, 31, 53])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_the_chunked_loss_equals_the_plain_loss_with_its_gradients(chunk, first, dtype, tolerance):
    plain = tiny_llama(dtype)
    ours = copy.deepcopy(plain)
    train_pt.train_tail(ours, first)
    batch = batch_of([9, 30, 4, 19], 31)

    words = {name: batch[name] for name in ("input_ids", "position_ids", "cuts")}
    hidden = plain.model(**words)[0]
    hidden.retain_grad()
    logits = plain.lm_head(hidden)[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    expected.backward()
    with ours.lm_head.inside_the_loss():
        loss = ours(**batch).loss
    loss.backward()

    def near(a, b):
        return (a - b).abs().max() <= tolerance * b.abs().max()

    assert near(loss, expected)
    if first < 53:
        assert near(ours.lm_head.trained.grad, plain.lm_head.weight.grad[first:])
        expected = plain.model.embed_tokens.weight.grad[first:]
        assert near(ours.model.embed_tokens.trained.grad, expected)
    theirs = dict(plain.model.layers.named_parameters())
    for name, parameter in ours.model.layers.named_parameters():
        assert near(parameter.grad, theirs[name].grad), name
    assert ours.lm_head.frozen.grad is None

    # Outside the loss the head gives logits.
    assert near(ours(**words).logits, plain(**words).logits)


def test_no_logits_of_the_whole_batch_exist(chunk):
    """The largest tensor that the loss makes is one chunk of logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if torch.is_tensor(out) and 53 in out.shape:
                largest = max(largest, out.numel())
            return out

    model = tiny_llama()
    train_pt.train_tail(model, 31)
    batch = batch_of([60, 60], 40)
    with Watch(), model.lm_head.inside_the_loss():
        model(**batch).loss.backward()
    assert largest == 7 * 53


def test_loss_on_a_packed_batch_is_the_token_weighted_mean_of_the_documents_alone():
    model = tiny_llama(torch.float64).eval()
    train_pt.train_tail(model, 31)
    lengths = [9, 22, 4, 19, 8]
    packed = batch_of(lengths, 62)
    total = 0.0
    for ids in packed["input_ids"][0].split(lengths):
        logits = model(input_ids=ids[None]).logits[0, :-1]
        total += F.cross_entropy(logits, ids[1:], reduction="sum").item()
    with model.lm_head.inside_the_loss():
        loss = model(**packed).loss.item()
    assert loss == pytest.approx(total / (sum(lengths) - len(lengths)), rel=1e-12)


def build(tmp_path, *options: str, first: int = 800):
    """The model that train_pt.py trains, from its own command line."""
    words = ["--model_name_or_path", str(TINY), "--output_dir", str(tmp_path / "pt")]
    words += ["--block_size", "64", "--base_vocab_size", str(first), *options]
    args, training = train_pt.parse_args(words)
    return train_pt.build_model(args, training, TINY, first)


def stir(model) -> None:
    """Stand in for training: move every trained parameter."""
    torch.manual_seed(1)
    for parameter in train_pt.adapter_tensors(model).values():
        parameter.data += 0.05 * torch.randn_like(parameter)


@pytest.mark.parametrize("rows", ["new", "all", "none"])
@pytest.mark.parametrize("norms", ["true", "false"])
def test_stock_peft_loads_the_adapter_to_the_same_logits(rows, norms, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    options = ["--train_embeddings", rows, "--train_norms", norms]
    model, _ = build(tmp_path, *options, "--quantization", "none", "--bf16", "false")
    stir(model)
    train_pt.save_adapter(model, tmp_path / "adapter", str(TINY))
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    ids = torch.arange(0, 1000, 9)[None]
    plain = base(input_ids=ids).logits
    stock = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        ours, theirs = model.eval()(input_ids=ids).logits, stock(input_ids=ids).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert (ours - plain).abs().max() > 0.1, "the test is blind"


def test_a_saved_adapter_is_loaded_to_the_bit(tmp_path):
    model, _ = build(tmp_path)
    stir(model)
    train_pt.save_adapter(model, tmp_path / "adapter", str(TINY))
    other, _ = build(tmp_path)
    train_pt.load_adapter(other, tmp_path / "adapter")
    saved, loaded = train_pt.adapter_tensors(model), train_pt.adapter_tensors(other)
    assert len(saved) == 4 * 7 * 2 + 4 * 2 + 1 + 2  # LoRA pairs, norms, rows of embedding and head
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)


def gradients(model, head) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.train()
    batch = batch_of([30, 20, 14], 64, rows=1000)
    with head.inside_the_loss(), torch.autocast("cpu", torch.bfloat16):
        model(**batch).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_an_evaluation_leaves_the_gradients_of_nf4_as_they_were(checkpointing, tmp_path):
    model, head = build(tmp_path, "--activation_checkpointing", checkpointing)
    stir(model)
    assert "Linear4bit" in repr(model)
    before = gradients(model, head)
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(50)[None])
    after = gradients(model, head)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("options", [None, '{"offload": true}'])
def test_activation_checkpointing_changes_no_gradient(options, tmp_path):
    plain = gradients(*build(tmp_path, "--activation_checkpointing", "false"))
    words = [] if options is None else ["--activation_checkpointing_kwargs", options]
    ours = gradients(*build(tmp_path, "--activation_checkpointing", "true", *words))
    assert all(torch.equal(plain[name], ours[name]) for name in plain)


def test_the_stream_stays_in_16_bits_and_masters_in_32(tmp_path):
    model, _ = build(tmp_path)
    seen = []
    for layer in model.base_model.model.model.layers:
        layer.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
        layer.self_attn.q_proj.register_forward_hook(lambda _, i, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.arange(20)[None])
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in train_pt.adapter_tensors(model).values()} == {torch.float32}
