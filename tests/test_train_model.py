"""The loss, trainable rows and norms, the adapter's file, NF4 on CPUs, against plain references."""

import copy
import os
from functools import partial
from inspect import unwrap

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
            if torch.is_tensor(out) and {53, 56} & {*out.shape}:
                largest = max(largest, out.numel())
            return out

    model = tiny_llama()
    train_pt.train_tail(model, 31)
    batch = batch_of([60, 60], 40)
    with Watch(), model.lm_head.inside_the_loss():
        model(**batch).loss.backward()
    assert largest == 7 * 56  # the rows of 53 pieces, filled up to a multiple of 8


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


def lora_layer(size: tuple[int, int], nf4: bool, dtype: torch.dtype, **changes):
    """One linear layer (K, M) with biases under PEFT's LoRA, its forward ours if not told else."""
    import bitsandbytes
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    plain = torch.nn.Linear(*size, dtype=dtype)
    if nf4:
        kind = {"compute_dtype": dtype, "quant_type": "nf4", "compress_statistics": True}
        layer = bitsandbytes.nn.Linear4bit(*size, **kind)
        layer.load_state_dict(plain.state_dict())
        layer.support_avx512bf16_for_cpu = False
        plain = layer.to("cpu")
    net = torch.nn.Sequential()
    net.add_module("linear", plain)
    lora = LoraConfig(r=3, lora_alpha=7, target_modules=["linear"], **changes)
    layer = get_peft_model(net, lora).base_model.model.linear
    for part in (layer.lora_A, layer.lora_B):
        part["default"].weight = torch.nn.Parameter(torch.randn(part["default"].weight.shape))
    layer.forward = partial(train_pt.lora_forward, layer)
    return layer.train()


def outcome(forward, layer, x: torch.Tensor, slope: torch.Tensor, autocast: bool) -> list:
    """The output and the gradients of x, A and B."""
    x = x.clone().requires_grad_()
    factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = forward(x)
    return [y, *torch.autograd.grad(y, [x, *factors], slope.to(y.dtype))]


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("size", [(64, 7), (192, 33)])
def test_lora_by_matrix_products_equals_peft_and_its_formula(nf4, size):
    x, slope = torch.randn(3, 11, size[0]), torch.randn(3, 11, size[1])
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
        autocast = dtype == torch.bfloat16
        layer = lora_layer(size, nf4, dtype)
        ours = outcome(layer, layer, x.to(dtype), slope, autocast)
        peft = outcome(partial(type(layer).forward, layer), layer, x.to(dtype), slope, autocast)
        weight, base = layer.base_layer.weight, layer.base_layer
        weight = train_pt.dense(weight, getattr(weight, "quant_state", None), torch.float64)
        A, B = (w["default"].weight.detach().double() for w in (layer.lora_A, layer.lora_B))
        exact = [w.requires_grad_() for w in (x.to(dtype).double(), A, B)]
        y = F.linear(exact[0], weight, base.bias.double()) + 7 / 3 * (exact[0] @ A.T @ B.T)
        exact = [y, *torch.autograd.grad(y, exact, slope.to(dtype).double())]
        for one, other, true in zip(ours, peft, exact, strict=True):
            assert one.dtype == other.dtype and one.shape == other.shape
            assert (one - true).abs().max() <= tolerance * true.abs().max()
            assert (one - other).abs().max() <= 2 * tolerance * true.abs().max()


def test_lora_keeps_its_input_and_the_product_of_rank_r_alone():
    layer, kept = lora_layer((64, 33), True, torch.bfloat16), []
    hooks = torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x)
    x = torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=True)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        layer(x)
    kept = [saved.shape for saved in kept if saved.shape[0] == 5]
    assert kept == [(5, 64), (5, 3)]


def test_a_recomputed_layer_skips_its_last_product_and_frees_its_largest_input(
    tmp_path, monkeypatch
):
    """down_proj's product is a layer's last: nothing in the backward pass needs it again. Its input
    is gone by the time its gradient, of the same size, is made."""
    import weakref

    model, head = build(tmp_path, "--activation_checkpointing", "true")
    layers, inputs, alive = model.base_model.model.model.layers, {}, []
    downs = [layer.mlp.down_proj.base_layer.weight for layer in layers]
    keep, product, dense = (
        train_pt.LoraGradients.forward, train_pt.LoraProduct.forward, train_pt.dense)
    products = []

    def kept(ctx, x, weight, *rest):
        inputs[id(weight)] = weakref.ref(x.untyped_storage())
        return keep(ctx, x, weight, *rest)

    def counted(ctx, *rest):
        products.append(1)
        return product(ctx, *rest)

    def watched(weight, *rest):
        if any(weight is down for down in downs):
            alive.append(inputs[id(weight)]() is not None)
        return dense(weight, *rest)

    monkeypatch.setattr(train_pt.LoraGradients, "forward", staticmethod(kept))
    monkeypatch.setattr(train_pt.LoraProduct, "forward", staticmethod(counted))
    monkeypatch.setattr(train_pt, "dense", watched)
    gradients(model, head)
    assert sum(products) == len(layers) * (7 + 6)
    assert alive == [True] * len(layers) + [False] * len(layers)


@pytest.mark.parametrize("way", ["evaluation", "disabled", "merged"])
def test_lora_leaves_other_ways_to_peft(way):
    layer, x = lora_layer((64, 7), False, torch.float32), torch.randn(5, 64)
    trained = layer(x)
    if way == "evaluation":
        layer.eval()
    elif way == "disabled":
        layer.enable_adapters(False)
    else:
        layer.merge()
    assert torch.equal(layer(x), type(layer).forward(layer, x))
    near = (layer(x) - trained).abs().max() <= 1e-5 * trained.abs().max()
    assert near == (way != "disabled")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_whole_model_learns_as_it_does_under_peft(quantization, tmp_path):
    words = ["--bf16", "false", "--quantization", quantization]
    model, head = build(tmp_path, *words)
    stir(model)

    def gradients():
        model.zero_grad()
        with head.inside_the_loss():
            loss = model.train()(**batch_of([30, 20, 14], 64, rows=1000)).loss
        loss.backward()
        return [loss, *(p.grad for p in model.parameters() if p.requires_grad)]

    ours = gradients()
    replaced = [m for m in model.modules() if vars(m).pop("forward", None)]
    assert len(replaced) == 4 * 7
    for one, other in zip(ours, gradients(), strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("variable", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_memory_of_a_gpu_grows_in_segments_unless_the_user_says_otherwise(
    variable, monkeypatch
):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    if variable:
        monkeypatch.setenv(variable, "max_split_size_mb:128")
    args, training = train_pt.parse_args(["--use_cpu", "true"])
    there = {name: os.environ[name] for name in names if name in os.environ}
    expected = {variable: "max_split_size_mb:128"} if variable else {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert there == expected
    assert args.use_liger_kernel is False
    assert training.use_liger_kernel is False, "the Trainer would patch Transformers itself"


def test_dropout_stays_with_peft(tmp_path):
    model, _ = build(tmp_path, "--lora_dropout", "0.1")
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("first", [0, 31, 32, 53])
def test_the_products_of_the_loss_have_sizes_that_are_multiples_of_8(first, monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "mm" in str(func):
                sizes.update(n for x in args if torch.is_tensor(x) for n in (*x.shape, x.stride(0)))
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(train_pt, "LOSS_CHUNK", 16)
    head = torch.randn(53, 24)
    function = train_pt.based_on(train_pt.ChunkedLoss, torch.autograd.Function)
    hidden, trained = torch.randn(32, 24, requires_grad=True), head[first:].requires_grad_()
    with Watch():
        function.apply(hidden, head[:first], trained, torch.arange(32), True).backward()
    assert sizes
    assert not [n for n in sizes if n % 8 and n != 1]  # 1: along a transposed matrix


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger's kernels need a GPU")
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}])
def test_liger_kernels_change_neither_loss_nor_gradients_and_no_other_model(changes, monkeypatch):
    from transformers.models.llama import modeling_llama

    pytest.importorskip("liger_kernel")
    stock = unwrap(modeling_llama.apply_rotary_pos_emb)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", stock)
    plain = tiny_llama(hidden_size=32, **changes).to("cuda")
    ours, batch, outcomes = copy.deepcopy(plain), batch_of([9, 30, 4, 19], 31), []
    words = {name: batch[name].to("cuda") for name in ("input_ids", "position_ids")}
    for model in (plain, ours):
        if model is ours:
            train_pt.use_liger_kernels(ours)
        loss = model.train()(**words).logits.square().mean()
        loss.backward()
        outcomes.append([loss, *(p.grad for p in model.parameters())])
    for one, other in zip(*outcomes, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()

    # A model on the CPU, made later in the same process, is Transformers' own.
    ids, later = words["input_ids"].cpu(), plain.to("cpu").eval()
    fresh = modeling_llama.LlamaForCausalLM(plain.config)
    assert not any("forward" in vars(module) for module in fresh.modules())
    logits = later(input_ids=ids).logits
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", stock)
    assert torch.equal(logits, later(input_ids=ids).logits)
