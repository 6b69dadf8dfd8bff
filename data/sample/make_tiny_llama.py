"""Build tiny-llama/: a Llama of a few hundred thousand weights that stands in for Llama 2.

It has what the pipeline needs of the real one: the architecture, fp16 weights in safetensors, and
a SentencePiece BPE `tokenizer.model` with byte fallback that knows English and almost no Chinese.
Tokenizer and weights are trained on the English pages of the sample alone, a minute on a CPU.

    python data/sample/make_tiny_llama.py
"""

import json
from io import BytesIO
from pathlib import Path

import sentencepiece
import torch
from make_sample import read_pages
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaTokenizer, set_seed

HERE = Path(__file__).resolve().parent
TARGET = HERE / "tiny-llama"
VOCAB_SIZE, BLOCK, BATCH, STEPS = 1000, 128, 16, 600


def train_tokenizer(text: str) -> None:
    """Train with the settings that Llama 2's own tokenizer.model records in its trainer_spec."""
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=1,
    )
    (TARGET / "tokenizer.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (TARGET / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def train_model(ids: torch.Tensor) -> LlamaForCausalLM:
    """Train on random windows of one sequence of token ids, (N,) int64, long enough to memorise."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        starts = torch.randint(len(ids) - BLOCK, (BATCH,)).tolist()
        batch = torch.stack([ids[start : start + BLOCK] for start in starts])  # (B, T)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == STEPS - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}", flush=True)
    return model


def main() -> None:
    set_seed(0)
    TARGET.mkdir(exist_ok=True)
    text = "\n".join(page for name, page in read_pages().items() if name.startswith("en/"))
    train_tokenizer(text)
    tokenizer = LlamaTokenizer.from_pretrained(TARGET)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    print(f"{len(text):,} characters, {len(ids):,} tokens")
    model = train_model(ids).half()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, do_sample=False)
    model.save_pretrained(TARGET)
    print(tokenizer.decode(model.float().generate(ids[None, :4], max_new_tokens=40)[0]))


if __name__ == "__main__":
    main()
