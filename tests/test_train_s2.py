"""S² attention against its definition: an explicit boolean mask, in float64."""

from types import SimpleNamespace

import pytest
import torch

import train_pt

torch.set_num_threads(1)


def packed_positions(rows: list[list[int]]) -> torch.Tensor:
    """position_ids (B, T) of rows that hold documents of the given lengths."""
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def allowed(position: torch.Tensor, heads: int, group: int | None) -> torch.Tensor:
    """Definition: (B, H, T, T), query sees key if both are of one document, the key is not later,
    and both fall into one group of their half of the heads."""
    B, T = position.shape
    document, place = (position == 0).cumsum(1).tolist(), position.tolist()
    mask = torch.zeros(B, heads, T, T, dtype=torch.bool)
    for b in range(B):
        for h in range(heads):
            shift = 0 if group is None or h < (heads + 1) // 2 else group // 2
            size = group or 10**9
            for q in range(T):
                for k in range(q + 1):
                    one_group = (place[b][q] + shift) // size == (place[b][k] + shift) // size
                    mask[b, h, q, k] = document[b][q] == document[b][k] and one_group
    return mask


def attend_by_mask(q, k, v, mask, scale=None):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "heads, kv_heads, size, group, rows",
    [
        (4, 4, 8, 8, [[32]]),  # one document, whole groups
        (4, 2, 6, 8, [[5, 20, 7], [32]]),  # grouped queries, documents below and above a group
        (4, 1, 5, 7, [[1, 1, 29], [13, 18]]),  # odd group, documents of one token
        (3, 3, 4, 4, [[17, 2]]),  # an odd number of heads
        (6, 3, 3, 5, [[9, 14], [23], [3, 20]]),  # halves that cut through the key heads' groups
        (1, 1, 7, 2, [[11]]),
        (4, 2, 6, 64, [[32], [12, 20]]),  # twice the row's length: full attention
    ],
)
def test_forward_and_gradients_equal_the_boolean_mask(heads, kv_heads, size, group, rows, training):
    torch.manual_seed(heads * size)
    position = packed_positions(rows)
    B, T = position.shape
    q, k, v = (
        torch.randn(B, n, T, size, dtype=torch.float64, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )
    module = SimpleNamespace(training=training, config=SimpleNamespace(group_size=group))
    cuts = train_pt.all_cut_points(position, group, flash=False)
    output, _ = train_pt.s2_attention(module, q, k, v, None, scaling=0.3, cuts=cuts)
    mask = allowed(position, heads, group if training else None)
    expected = attend_by_mask(q, k, v, mask, scale=0.3).transpose(1, 2)
    assert (output - expected).abs().max() <= 1e-12

    slope = torch.randn_like(expected)
    ours = torch.autograd.grad(output, (q, k, v), slope)
    theirs = torch.autograd.grad(expected, (q, k, v), slope)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-12

    derived, _ = train_pt.s2_attention(module, q, k, v, None, scaling=0.3, position_ids=position)
    assert torch.equal(derived, output), "the cut points derived from position_ids are others"


def test_a_hundred_random_packings_equal_the_boolean_mask():
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(100):
        kv_heads, T = draw(1, 3), draw(2, 40)
        heads, group = kv_heads * draw(1, 3), draw(2, T)
        rows = []
        for _ in range(draw(1, 2)):
            row: list[int] = []
            while sum(row) < T:
                row.append(draw(1, T - sum(row)))
            rows.append(row)
        position = packed_positions(rows)
        q, k, v = (
            torch.randn(len(rows), n, T, 4, dtype=torch.float64, generator=generator)
            for n in (heads, kv_heads, kv_heads)
        )
        module = SimpleNamespace(training=True, config=SimpleNamespace(group_size=group))
        output, _ = train_pt.s2_attention(module, q, k, v, None, position_ids=position)
        expected = attend_by_mask(q, k, v, allowed(position, heads, group)).transpose(1, 2)
        assert (output - expected).abs().max() <= 1e-12

        # One call for all heads exactly where no group cuts a document.
        sets = [train_pt.cut_points(position, g, True, s) for g, s in ((None, 0), (group, 0))]
        sets.append(train_pt.cut_points(position, group, True, group // 2))
        full, groups, shifted = (points["bounds"].tolist() for points in sets)
        cut = "groups" in train_pt.all_cut_points(position, group, True)
        assert cut == (groups != full or shifted != full)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_in_lower_precision_it_stays_as_near_as_the_type_allows(dtype, tolerance):
    torch.manual_seed(0)
    position = packed_positions([[19, 14], [33]])
    q, k, v = (torch.randn(2, n, 33, 16, dtype=dtype, requires_grad=True) for n in (6, 2, 2))
    module = SimpleNamespace(training=True, config=SimpleNamespace(group_size=8))
    output, _ = train_pt.s2_attention(module, q, k, v, None, position_ids=position)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = attend_by_mask(*exact, allowed(position, 6, 8)).transpose(1, 2)
    slope = torch.randn_like(output)
    ours = [output, *torch.autograd.grad(output, (q, k, v), slope)]
    theirs = [expected, *torch.autograd.grad(expected, exact, slope.double())]
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("heads", [4, 3, 1])
def test_flash_attention_reads_each_half_of_the_heads_where_it_lies(heads, monkeypatch):
    """varlen_attn is stood in for by its definition; it must get views, not copies."""
    import torch.nn.attention.varlen

    torch.manual_seed(0)
    position = packed_positions([[5, 20, 7], [32]])
    # As projections and the rope leave them: (B, T, H, D) in memory, (B, H, T, D) to look at.
    memory = [torch.randn(2, 32, heads, 8, dtype=torch.float64) for _ in range(3)]
    q, k, v = (x.transpose(1, 2) for x in memory)
    calls = []

    def varlen_attn(q, k, v, starts, ends, longest, also_longest, window_size, scale):
        assert window_size == (-1, 0), "not causal"
        calls.append([x.data_ptr() for x in (q, k, v)])
        lengths = starts.diff().tolist()
        assert longest == also_longest == max(lengths)
        parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        outputs = []
        for part in parts:
            rows = (x.transpose(0, 1) for x in part)  # (heads, length, D)
            outputs.append(torch.nn.functional.scaled_dot_product_attention(
                *rows, is_causal=True, scale=scale).transpose(0, 1))
        return torch.cat(outputs)

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    module = SimpleNamespace(training=True, config=SimpleNamespace(group_size=8))
    cuts = train_pt.all_cut_points(position, 8, flash=True)
    output, _ = train_pt.s2_attention(module, q, k, v, None, cuts=cuts)
    expected = attend_by_mask(q, k, v, allowed(position, heads, 8)).transpose(1, 2)
    assert (output - expected).abs().max() <= 1e-12
    starts = [0, (heads + 1) // 2] if heads > 1 else [0]
    assert calls == [[x[0, 0, start:].data_ptr() for x in memory] for start in starts]


def test_cut_points_for_the_gpu_are_the_same_segments():
    position = packed_positions([[5, 20, 7], [32]])
    cuts = train_pt.all_cut_points(position, 8, flash=True)
    on_cpu = train_pt.all_cut_points(position, 8, flash=False)
    for name, longest in (("documents", 32), ("groups", 8), ("shifted", 8)):
        bounds, lengths = cuts[name]["bounds"], cuts[name]["bounds"].diff()
        assert bounds.dtype == torch.int32
        assert bounds[0] == 0 and bounds[-1] == 64
        assert cuts[name]["longest"] == lengths.max() == longest
        runs = on_cpu[name]["runs"]
        assert sorted(lengths.tolist()) == [size for size, count in runs for _ in range(count)]
    assert cuts["groups"]["bounds"].diff()[:5].tolist() == [5, 8, 8, 4, 7]
    assert cuts["shifted"]["bounds"].diff()[:7].tolist() == [4, 1, 4, 8, 8, 4, 3]


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    train_pt.register_attention()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=3, attn_implementation="s2")
    model = LlamaForCausalLM(config).double()
    model.config.group_size = 8
    return model


@pytest.mark.parametrize("training", [True, False])
def test_a_token_changes_no_earlier_logit_and_no_other_document(llama, training):
    llama.train(training)
    lengths = [21, 13, 6]
    position = packed_positions([lengths])
    ids = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(1))
    document = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    before = llama(input_ids=ids, position_ids=position).logits
    for t in range(40):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % 97
        after = llama(input_ids=changed, position_ids=position).logits
        differs = (after != before).any(-1)[0]
        assert differs[t], "the test is blind"
        assert not differs[:t].any(), f"token {t} changed an earlier logit"
        assert not differs[document != document[t]].any(), f"token {t} changed another document"


@pytest.fixture(scope="module")
def stock(llama):
    """The same weights under Transformers' own attention."""
    from transformers import LlamaForCausalLM

    config = llama.config.from_dict(llama.config.to_dict())
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").double()
    model.load_state_dict(llama.state_dict())
    return model.eval()


def test_full_reach_in_evaluation_equals_the_stock_model_on_each_document_alone(llama, stock):
    llama.eval()
    lengths = [21, 13, 6]
    ids = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(2))
    packed = llama(input_ids=ids, position_ids=packed_positions([lengths])).logits
    alone = [stock(input_ids=part).logits for part in ids.split(lengths, dim=1)]
    assert (packed - torch.cat(alone, 1)).abs().max() <= 1e-12


def test_generation_equals_the_stock_model_with_cache_and_left_padding(llama, stock):
    llama.eval()
    ids = torch.randint(3, 97, (2, 30), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    words = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for attention_mask in (mask, torch.ones_like(ids)):
        ours = llama.generate(input_ids=ids, attention_mask=attention_mask, **words)
        theirs = stock.generate(input_ids=ids, attention_mask=attention_mask, **words)
        assert torch.equal(ours, theirs)


def test_padding_in_training_is_refused(llama):
    llama.train()
    ids = torch.ones(1, 12, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="no padding mask"):
        llama(input_ids=ids, attention_mask=mask)
