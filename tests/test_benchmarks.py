"""The benchmarks compare like with like, and say where and how their figures were measured."""

import json
import os
import re
from datetime import date
from importlib.util import module_from_spec, spec_from_file_location
from types import SimpleNamespace

import pytest
from conftest import ROOT

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def benchmark(name: str):
    """A benchmark's module; it is no package."""
    before = dict(os.environ)
    spec = spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    os.environ.clear()  # it asks for one thread
    os.environ.update(before)
    return module


@pytest.fixture(scope="module")
def bench_train():
    return benchmark("bench_train")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_table_carries_its_own_stamp(path):
    """So that one table can be measured again and the others stay true."""
    tables = json.loads(path.read_text(encoding="utf-8"))["results"]
    tables = list(tables.values()) if isinstance(tables, dict) else tables
    assert tables
    for table in tables:
        lacking = {"commit", "command", "date", "versions", "hardware", "seed"} - table.keys()
        assert not lacking, f"{path.name}: no {lacking} beside {[*table]}"
        assert date.fromisoformat(table["date"])
        assert re.match(r"[0-9a-f]{7}", table["commit"])
        script = re.search(r"python (benchmarks/\w+\.py)", table["command"])
        assert script and (ROOT / script[1]).is_file(), table["command"]


def test_the_plan_agrees_with_the_account_of_every_tensor():
    """What bench_plan.py traced, beside what --plan predicts now; a GPU may differ by a tenth."""
    import train_pt

    table = json.loads((ROOT / "benchmarks" / "results" / "plan.json").read_text())["results"]
    shape = {"vocab_size": 61_388, "hidden_size": 4096, "intermediate_size": 11_008}
    llama = SimpleNamespace(
        **shape, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32)
    assert {row["shape"] for row in table["memory"]["results"]} >= {"8x2048", "8x4096"}
    for row in table["memory"]["results"]:
        batch, block = map(int, row["shape"].split("x"))
        options = json.dumps({"offload": row["offload"]})
        for liger, traced in ((True, "traced_gb"), (False, "without_liger_gb")):
            args = train_pt.Arguments(
                optim="adamw_8bit", activation_checkpointing=True, use_liger_kernel=liger,
                activation_checkpointing_kwargs=options)
            items = train_pt.memory_items(llama, args, 32_000, batch, block)
            assert sum(items.values()) / 1e9 == pytest.approx(row[traced], rel=0.01), (liger, row)


@pytest.fixture(scope="module")
def bench_plan():
    return benchmark("bench_plan")


def table_of(file: str, table: str) -> list[dict]:
    path = ROOT / "benchmarks" / "results" / f"{file}.json"
    return json.loads(path.read_text(encoding="utf-8"))["results"][table]["results"]


def test_kernels_are_counted_with_their_flops_and_bytes(bench_plan):
    """Literal tensors: what a GPU computes, reads and writes for them."""
    import torch

    def launched(call):
        account = bench_plan.Traffic()
        account.phase = "forward"
        with account:
            call()
        return [
            (k.name, k.kind, k.flops, k.bytes, k.indexed)
            for k, n in account.kernels.items() for _ in range(n)]

    x, y, row = torch.ones(8, 16), torch.ones(8, 16), torch.ones(16)
    table, ids = torch.ones(1000, 16), torch.zeros(4, dtype=torch.long)
    element, copy = bench_plan.ELEMENTWISE, bench_plan.COPIES
    assert launched(lambda: x.view(16, 8).t()[1:].unsqueeze(0).detach()) == []
    assert launched(lambda: torch.empty(4)) == []
    assert launched(lambda: x * 2) == [("mul", element, 0, 2 * 512, False)]
    assert launched(lambda: x + y) == [("add", element, 0, 3 * 512, False)]
    assert launched(lambda: x.add_(y)) == [("add_", element, 0, 3 * 512, False)]
    assert launched(lambda: x.copy_(y)) == [("copy_", copy, 0, 2 * 512, False)]
    assert launched(lambda: x.new_zeros(4)) == [("new_zeros", element, 0, 16, False)]
    assert launched(lambda: x * row) == [("mul", element, 0, 2 * 512 + 64, True)]
    assert launched(lambda: x * row.expand(8, 16)) == [("mul", element, 0, 2 * 512 + 64, True)]
    assert launched(lambda: x.t() * y.t()) == [("mul", element, 0, 3 * 512, False)]
    assert launched(lambda: x.t().contiguous()) == [("clone", copy, 0, 2 * 512, True)]
    assert launched(lambda: x.bfloat16()) == [("_to_copy", copy, 0, 512 + 256, False)]
    assert launched(lambda: x.sum(1)) == [("sum", bench_plan.REDUCTIONS, 0, 512 + 32, False)]
    assert launched(lambda: torch.nn.functional.embedding(ids, table)) == [
        ("embedding", element, 0, 2 * 4 * 64, True)]
    flops, sizes = 2 * 8 * 16 * 8, 512 + 512 + 256
    assert launched(lambda: x @ y.t()) == [("mm", bench_plan.PRODUCTS, flops, sizes, False)]
    odd = torch.ones(16, 7)  # rows of 28 bytes
    ((_, kind, flops, _, _),) = launched(lambda: x @ odd)
    assert (kind, flops) == (bench_plan.UNALIGNED, 2 * 8 * 16 * 7)


def test_a_kernel_takes_the_larger_of_its_two_times(bench_plan):
    """On an H200: 0.86 of 0.8 PFLOP/s, 0.88 of 4.2 TB/s, 1.4 TB/s with an address a number."""
    def seconds(*figures):
        return bench_plan.Kernel(*figures).seconds("h200")

    assert seconds(bench_plan.PRODUCTS, "mm", 688e12, 1e9) == pytest.approx(1.0)
    assert seconds(bench_plan.PRODUCTS, "mm", 1e9, 3.696e12) == pytest.approx(1.0)
    assert seconds(bench_plan.ELEMENTWISE, "mul", 0, 1.4e12, True) == pytest.approx(1.0)
    a10 = bench_plan.Kernel(bench_plan.ELEMENTWISE, "mul", 0, 0.528e12, True)
    assert a10.seconds("a10") == pytest.approx(1.0), "its memory is slower than its addresses"


def test_every_layer_costs_the_same(bench_plan):
    """So that models of one and two layers say what 32 take. What is smaller than 1 KB is the norm
    of all parameters' norms, one kernel."""
    words = bench_plan.command_words(*bench_plan.SHAPE)
    one, two, three = (
        bench_plan.trace(words, bench_plan.Traffic(), layers, 1).kernels for layers in (1, 2, 3))
    for kernel in (k for k in three.keys() | one.keys() if k.bytes > 1024):
        assert three[kernel] - two[kernel] == two[kernel] - one[kernel], kernel
    assert sum(three.values()) > sum(two.values()) > sum(one.values())


def test_the_account_reproduces_what_an_h200_took():
    """The code that was measured: the whole step within 15%, and every variant of it."""
    gpu = {row["variant"]: row for row in table_of("gpu", "variants") if row["length"] == 2048}
    before = {row["variant"]: row for row in table_of("plan", "before")}
    assert before.keys() == gpu.keys() - {"compiled layers, one-kernel norm"}
    for variant, row in before.items():
        told = row["cards"]["h200"]["batch_tokens_per_second"]
        assert told == pytest.approx(gpu[variant]["tokens_per_second"], rel=0.15), variant
    operators = before["S²"]["operators"]
    for row in table_of("gpu", "kernels"):  # an operator by itself is rougher
        near = 0.05 if row["operator"] == "aten::mm" else 0.45
        told = operators[row["operator"]]
        assert told == pytest.approx(row["milliseconds"], rel=near), row["operator"]


def test_the_plan_predicts_the_seconds_of_the_account():
    """--plan_gpu's formula beside the count of every kernel, on every card."""
    import train_pt

    shape = {"vocab_size": 61_388, "hidden_size": 4096, "intermediate_size": 11_008}
    llama = SimpleNamespace(
        **shape, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32)
    for row in table_of("plan", "traffic"):
        near = {"S²": 0.05, "full attention": 0.08}.get(row["variant"])
        for card, told in row["cards"].items() if near else ():
            args = train_pt.Arguments(plan_gpu=card)
            seconds = train_pt.step_seconds(llama, args, 32_000)
            assert seconds == pytest.approx(told["step_seconds"], rel=near), card


def test_a_step_moves_a_third_of_what_it_moved():
    """Element-wise kernels, copies and reductions of 7B at 8 x 2,048, with Liger's kernels."""
    before, now = (
        {row["variant"]: row["overhead_gb"] for row in table_of("plan", table)}
        for table in ("before", "traffic"))
    assert now["S²"] <= 0.35 * before["S²"]
    assert now["full attention"] <= 0.35 * before["full attention"]


@pytest.mark.parametrize("length", [64, 256])
def test_ways_of_full_attention_over_packed_documents_give_the_same(bench_train, length):
    """The reference of the S² picture does the work that train_pt.py's own attention does."""
    import torch

    position = torch.cat([torch.arange(n) for n in (length // 3, length, length // 2)])
    position = position[: length // 4 * 4].view(1, -1)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 8, position.shape[1], 16)  # B = 1, H = 8, D = 16
    ways = bench_train.attention_ways(position)
    masked = ways["full causal, masked"](q, k, v)
    ours = ways["full causal, by document"](q, k, v).transpose(1, 2)
    torch.testing.assert_close(ours, masked)
    assert not torch.allclose(ways["S²"](q, k, v).transpose(1, 2), masked)


def test_flex_attention_is_asked_for_the_same_segments():
    """What bench_gpu.py times as FlexAttention joins the pairs that train_pt.py's cut points do."""
    import torch
    from torch.nn.attention.flex_attention import create_mask

    import train_pt

    bench_gpu = benchmark("bench_gpu")
    position = torch.cat([torch.arange(n) for n in (13, 40, 1, 26)]).view(2, 40)
    for shift in (0, 8):
        lengths = train_pt.cut_points(position, 16, True, shift)["bounds"].long().diff()
        segment = torch.arange(len(lengths)).repeat_interleave(lengths).view(2, 40)  # (B, T)
        rule = bench_gpu.same_segment(position, 16, shift)
        mask = create_mask(rule, 2, 1, 40, 40, device="cpu")[:, 0]
        expected = (segment[:, :, None] == segment[:, None]) & torch.ones(40, 40).tril().bool()
        assert torch.equal(mask, expected)


def test_packed_documents_have_the_lengths_that_the_docstring_says(bench_train):
    import numpy as np

    ends = bench_train.packed_documents(8192, 400).ends
    lengths = np.diff(ends)
    assert np.median(lengths) == pytest.approx(700, rel=0.05)
    assert np.percentile(lengths, [5, 95]) == pytest.approx([190, 2600], rel=0.08)


def test_the_sampled_softmax_estimates_the_whole_one(monkeypatch):
    """All columns drawn: the same. Fewer: exp(loss) of one label is right on average."""
    import torch

    bench_quality, generator = benchmark("bench_quality"), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    states, head = torch.randn(7, 5), torch.randn(61, 5)
    labels = torch.tensor([3, 60, 3, 0, 9, 9, 1])
    whole = torch.nn.functional.cross_entropy(states @ head.T, labels)
    monkeypatch.setattr(bench_quality, "COLUMNS", 61)
    found = bench_quality.sampled_loss(states, head.__getitem__, 61, labels, generator)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=0)
    monkeypatch.setattr(bench_quality, "COLUMNS", 30)
    one = [
        bench_quality.sampled_loss(states[:1], head.__getitem__, 61, labels[:1], generator).exp()
        for _ in range(3000)]
    whole = torch.nn.functional.cross_entropy(states[:1] @ head.T, labels[:1]).exp()
    torch.testing.assert_close(torch.stack(one).mean(), whole, rtol=0.02, atol=0)
    assert torch.stack(one).std() > 0.05 * whole, "the draws differ"


@pytest.mark.parametrize("table", ["attention", "memory", "quality"])
def test_pictures_are_drawn_from_the_results_alone(bench_train, table, tmp_path, monkeypatch):
    tables = json.loads((ROOT / "benchmarks" / "results" / "train.json").read_text())["results"]
    monkeypatch.setattr(bench_train, "PICTURES", tmp_path)
    getattr(bench_train, f"draw_{table}")(tables[table])
    (picture,) = tmp_path.iterdir()
    assert picture.name in bench_train.__doc__
    assert picture.stat().st_size > 10_000


def test_a_part_of_the_gpu_table_ends_at_its_limit_and_the_next_one_runs(tmp_path, monkeypatch):
    """What it has measured until then is kept."""
    bench_gpu = benchmark("bench_gpu")
    child = tmp_path / "child.py"
    child.write_text(
        "import sys, time\n"
        "print('a warning')\n"
        "print('{\"row\": \"' + sys.argv[2] + '\"}', flush=True)\n"
        "time.sleep(60 * (sys.argv[2] == 'slow'))\n")
    parts = {
        name: bench_gpu.Part(code, "", ("8x2048",), ("s2",), 3)
        for name, code in {"slow": "train_pt.py", "quick": "before", "Unsloth": "unsloth"}.items()}
    monkeypatch.setattr(bench_gpu, "__file__", str(child))
    monkeypatch.setattr(bench_gpu, "PARTS", parts)
    monkeypatch.setattr(bench_gpu, "SHORTEST", 0)
    monkeypatch.setattr(bench_gpu, "find_spec", lambda name: None)
    slow, killed, quick, done, without = bench_gpu.speed_table(tiny=False, unsloth=None)
    assert (slow["row"], quick["row"]) == ("slow", "quick")
    assert killed["exit_code"] == -9 and 3 <= killed["took_s"] < 30
    assert done["exit_code"] == 0
    assert without["skipped"] == "unsloth is not installed"


def test_the_picture_of_the_starts_is_drawn_from_the_results_alone(monkeypatch):
    bench_quality = benchmark("bench_quality")
    tables = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())["results"]
    monkeypatch.setattr(bench_quality, "PICTURE", ROOT / "pictures" / "readme_test.png")
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **_: drawn.append(
        [len(axis.lines) for axis in self.axes]))
    bench_quality.draw(tables["training"])
    starts = {row["start"] for row in tables["training"]["results"]}
    assert drawn == [[len(starts)] * 2]


def test_windows_of_english_have_the_asked_share(monkeypatch):
    """English tokens are odd here, Chinese ones even; every window is of one kind."""
    bench_quality = benchmark("bench_quality")
    texts = {"english": ["e" * 3000] * 3, "modern": ["m" * 2000], "novel": ["n" * 4000]}
    monkeypatch.setattr(bench_quality, "texts_by_use", lambda: {"training": texts})

    def encode(found: list[str]) -> list[list[int]]:
        return [[{"e": 5, "m": 4, "n": 6}[sign] for sign in text] for text in found]

    windows = bench_quality.stream_of(encode, bench_quality.Recipe(share=0.25), 0)
    assert len(windows) == bench_quality.TRAIN_STEPS * bench_quality.TRAIN_ROWS
    english = (windows == 5).any(1)
    assert english.sum() == len(windows) // 4
    assert not (windows[english] == 4).any() and not (windows[~english] == 5).any()
    first = english[: len(english) // 2].float().mean().item()
    assert first == pytest.approx(0.25, abs=0.06), "evenly along the run"


def test_merging_is_measured_and_compared(tmp_path, monkeypatch):
    """bench_merge.py as a whole, on a model of two small layers."""
    bench = benchmark("bench_merge")
    for name, value in (("WORK", tmp_path / "work"), ("ROWS", 900), ("NEW_FROM", 800),
                        ("SIZES", {"small": (2, 128, 256)})):
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "aside", lambda function, *given: function(*given))
    found = bench.measure("small", ["cp", "original", "dequantized", "chat", "PEFT"], 1)
    assert found["tensors_equal_to_peft"] == found["tensors"] == 2 * 9 + 3
    assert found["ways"].keys() == {"cp", "original", "dequantized", "chat", "PEFT"}
