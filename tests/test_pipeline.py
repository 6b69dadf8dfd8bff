"""The four scripts as one chain: on the sample, and on real text with the real tokenizer."""

import json
import shutil

import pytest


def write_with(folder, prompt: str) -> str:
    """Continue a prompt greedily with nothing but Transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    return tokenizer.decode(model.generate(**inputs, max_new_tokens=20, do_sample=False)[0])


def losses(folder) -> list[float]:
    """Return the training losses that a run logged, first to last."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def test_the_demo_leaves_every_product(demo):
    for product in (
        "data/cc_filtered/run.json",
        "outputs/extended/tokenizer.model",
        "outputs/extended/tokenizer.json",
        "outputs/pt/adapter_model.safetensors",
        "outputs/merged/tokenizer.model",
        "pictures/filter.png",
        "pictures/vocab.png",
        "pictures/trainloss.png",
    ):
        assert (demo / product).stat().st_size > 0, product
    history = losses(demo / "outputs" / "pt")
    assert history[-1] < history[0] - 0.5
    assert len(write_with(demo / "outputs" / "merged", "春天的")) > len("春天的")


def test_the_demo_twice_does_nothing_twice(demo, run_script):
    before = {p: p.stat().st_mtime_ns for p in (demo / "data" / "cc_filtered").rglob("*.parquet")}
    done = run_script("filter_cc.py", cwd=demo)
    assert "already" in done.stdout
    assert before == {p: p.stat().st_mtime_ns for p in before}


@pytest.mark.parametrize(
    ("script", "remedy"),
    [
        ("train_pt.py", "python extend_vocab.py"),
        ("merge_lora.py", "python train_pt.py"),
    ],
)
def test_a_missing_input_names_the_command_to_run_first(script, remedy, run_script, tmp_path):
    done = run_script(script, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert remedy in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.timeout(900)
def test_real_text_and_the_real_tokenizer(shared_data, run_script, tmp_path):
    """The Llama 2 tokenizer, 紅樓夢, 40 MB of crawl, a small Llama in NF4: pages to words."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    base = tmp_path / "base"
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        rms_norm_eps=1e-5,
    )
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(base)
    shutil.copy(shared_data / "llama2-tokenizer.model", base / "tokenizer.model")

    run_script("filter_cc.py", "--input", shared_data / "labelled.wet.gz", cwd=tmp_path)
    run_script(
        "extend_vocab.py",
        *("--base_model", base, "--corpus", shared_data / "hongloumeng.txt"),
        cwd=tmp_path,
    )
    run_script(
        "train_pt.py",
        *("--lora_rank", 32, "--block_size", 256, "--per_device_train_batch_size", 2),
        *("--gradient_accumulation_steps", 1, "--learning_rate", 2e-3, "--max_steps", 16),
        *("--logging_steps", 1, "--eval_steps", 16),
        cwd=tmp_path,
    )
    run_script("merge_lora.py", cwd=tmp_path)

    merged = tmp_path / "outputs" / "merged"
    assert json.loads((merged / "config.json").read_text())["vocab_size"] == 61388
    history = losses(tmp_path / "outputs" / "pt")
    print(f"loss {history[0]:.3f} at the first step, {history[-1]:.3f} at the last")
    assert history[0] > 9  # a random model: about ln 61,388 = 11.0
    assert history[-1] < history[0] - 0.5
    assert len(write_with(merged, "臺灣的")) > len("臺灣的")
