"""Does a chat vector bring a format into Chinese? Small models, really trained.

    nice python benchmarks/bench_chat.py          # three seeds; needs ../shared/data

For each seed: a small Llama learns English from web pages (the base). A copy of it learns 400 turns
of English questions and answers, each answer between << and >> (the chat model). The base is
extended with extend_vocab.py and trained on Chinese articles with train_pt.py (the adapter), which
see no question, no << and no >>. merge_lora.py merges without and with --chat_model.

Then 100 questions in Chinese. An answer is well formed if it begins with <<, closes with >>, ends
there by itself, and most of the letters within are Han. For comparison: the chat model on 100
English questions that it has not seen, whatever the letters.

Results: benchmarks/results/chat.json.
"""

import argparse
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from sentencepiece import SentencePieceTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results" / "chat.json"
WORK = ROOT / "outputs" / "bench_chat"
SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
         "num_attention_heads": 4, "tie_word_embeddings": False}
PIECES, EXTENDED, LENGTH, BATCH, TURNS, ASKED = 2000, 8000, 128, 16, 400, 100
STEPS = {"base": 400, "chat": 120, "continued": 200}
RATES = {"base": 3e-3, "chat": 1e-3, "continued": 3e-3}
# Each way's options of merge_lora.py, beside those of the plain merge.
WAYS = {
    "without": [],
    "scale 1": ["--chat_scale", "1.0"],
    "scale 2": ["--chat_scale", "2.0"],
    "scale 1, embeddings": ["--chat_scale", "1.0", "--chat_embeddings", "true"]}

sys.path.insert(0, str(ROOT / "benchmarks"))

import common  # noqa: E402

# --- Material ------------------------------------------------------------------------------------

THINGS = ["dog", "cat", "bird", "fish", "horse", "book", "chair", "table", "lamp", "door", "car",
          "train", "house", "garden", "river", "mountain", "apple", "cup", "shoe", "coat", "letter",
          "window", "ship", "bridge", "flower", "tree", "stone", "cake", "key", "clock"]
PLACES = ["in the garden", "on the table", "near the river", "behind the house", "under the tree",
          "in the kitchen", "at the station", "by the window", "on the hill", "in the box"]
COLORS = ["red", "green", "blue", "white", "black", "yellow", "brown", "gray"]
ASKS = [("Where is the {thing}?", "The {thing} is {place}."),
        ("What color is the {thing}?", "The {thing} is {color}."),
        ("How many things are {place}?", "There are {number} things {place}."),
        ("Is the {thing} {color}?", "No, the {thing} is not {color}."),
        ("Tell me about the {thing}.", "It is a {color} {thing} and it is {place}.")]
FORMAT = "Q: {}\nA:"
ZH_THINGS = [
    "狗", "貓", "鳥", "魚", "馬", "書", "椅子", "桌子", "門", "車", "火車", "房子", "花園", "河",
    "山", "杯子", "衣服", "信", "船", "橋", "花", "樹", "石頭", "鐘", "學校"]
ZH_ASKS = ["{}在哪裡？", "{}是什麼顏色？", "{}是什麼時候出現的？", "請介紹{}。"]


def english_letters() -> list[str]:
    """Web pages in English, ASCII alone."""
    return ["".join(c for c in page if c.isascii()) for page in common.english_pages()[:400]]


def turns(dice: random.Random, count: int) -> list[tuple[str, str]]:
    found = []
    for _ in range(count):
        ask, answer = dice.choice(ASKS)
        words = {"thing": dice.choice(THINGS), "place": dice.choice(PLACES),
                 "color": dice.choice(COLORS), "number": dice.randint(2, 9)}
        found.append((FORMAT.format(ask.format(**words)), f" << {answer.format(**words)} >>"))
    return found


def make_tokenizer(folder: Path, pages: list[str]) -> None:
    """A SentencePiece BPE laid out as Llama 2's."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line for page in pages for line in page.splitlines()][:40_000]
    with (folder / "tokenizer.model").open("wb") as model:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=PIECES, model_type="bpe",
            byte_fallback=True, character_coverage=1.0, split_digits=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, minloglevel=2)
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False,
                "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


# --- Training ------------------------------------------------------------------------------------


def train(model, batches, steps: int, rate: float) -> float:
    """AdamW with a warmup and a linear end; the mean loss of the last 20 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20, 1.05 - step / steps)
        ids, labels = next(batches)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()
        losses.append(loss.item())
    return statistics.mean(losses[-20:])


def page_batches(tokenizer, pages: list[str]):
    stream = torch.tensor([i for page in pages for i in tokenizer(page).input_ids])
    while True:
        starts = torch.randint(len(stream) - LENGTH, (BATCH,)).tolist()
        ids = torch.stack([stream[start : start + LENGTH] for start in starts])
        yield ids, ids


def turn_batches(tokenizer, pairs: list[tuple[str, str]]):
    """Whole turns, with the loss on the answers."""
    rows = []
    for ask, answer in pairs:
        asked = len(tokenizer(ask).input_ids)
        ids = [*tokenizer(ask + answer).input_ids, tokenizer.eos_token_id]
        rows.append((ids, [-100] * asked + ids[asked:]))
    while True:
        chosen = random.sample(rows, BATCH)
        width = max(len(ids) for ids, _ in chosen)
        yield tuple(
            torch.tensor([row[part] + [pad] * (width - len(row[part])) for row in chosen])
            for part, pad in ((0, tokenizer.eos_token_id), (1, -100)))


def save(model, folder: Path, tokenizer_from: Path) -> None:
    model.save_pretrained(folder)
    for path in tokenizer_from.glob("tokenizer*"):
        if path.parent != folder:
            shutil.copy(path, folder)


# --- Measuring -----------------------------------------------------------------------------------


def answers(folder: Path, asked: list[str]) -> list[str]:
    """Greedy answers, with </s> where the model ends by itself."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", pad_token="<unk>")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    given = tokenizer(asked, return_tensors="pt", padding=True)
    out = model.generate(**given, max_new_tokens=48, do_sample=False, pad_token_id=0)
    texts = tokenizer.batch_decode(out[:, given.input_ids.shape[1]:])
    return [text.replace("<unk>", "") for text in texts]


def well_formed(answer: str, chinese: bool) -> bool:
    match = re.fullmatch(r"\s*<<([^<>]+)>>\s*</s>", answer)
    letters = [c for c in match[1] if c.isalpha()] if match else []
    han = sum("\u4e00" <= c <= "\u9fff" for c in letters)
    return bool(letters) and (not chinese or han > len(letters) / 2)


def run(script: str, *options: object) -> None:
    command = [sys.executable, str(ROOT / script), *map(str, options)]
    with (WORK / "log").open("a") as log:
        subprocess.run(command, check=True, cwd=WORK, stdout=log, stderr=log)


def measure(seed: int, pages: list[str]) -> dict:
    """One seed, from the first weight to the shares."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    torch.manual_seed(seed)
    random.seed(seed)
    dice, base, chat = random.Random(seed), WORK / "base", WORK / "chat"
    make_tokenizer(base, pages)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=PIECES, **SIZES))
    row = {"seed": seed, "loss": {}}
    row["loss"]["base"] = train(
        model, page_batches(tokenizer, pages), STEPS["base"], RATES["base"])
    save(model, base, base)
    row["loss"]["chat"] = train(
        model, turn_batches(tokenizer, turns(dice, TURNS)), STEPS["chat"], RATES["chat"])
    save(model, chat, base)
    shutil.copy(DATA / "drcd_dev.jsonl", WORK / "zh.jsonl")
    run("extend_vocab.py", "--base_model", base, "--corpus", "zh.jsonl", "--vocab_size", EXTENDED)
    run("train_pt.py", "--dataset", "zh.jsonl", "--quantization", "none", "--lora_rank", 32,
        "--block_size", LENGTH, "--per_device_train_batch_size", BATCH, "--report_to", "none",
        "--gradient_accumulation_steps", 1, "--learning_rate", RATES["continued"], "--max_steps",
        STEPS["continued"], "--seed", seed, "--sample_tokens", 0)
    results = json.loads((WORK / "outputs/pt/run.json").read_text())["results"]
    row["loss"]["continued"] = results["loss_last"]
    asked = [FORMAT.format(ask.format(thing)) for ask in ZH_ASKS for thing in ZH_THINGS][:ASKED]
    english = [ask for ask, _ in turns(random.Random(seed + 1000), ASKED)]
    given = answers(chat, english)
    row["chat model, in English"] = sum(well_formed(a, False) for a in given) / len(given)
    for way, options in WAYS.items():
        with_chat = ["--chat_model", chat, *options] if options else []
        run("merge_lora.py", *with_chat)
        given = answers(WORK / "outputs/merged", asked)
        row[way] = {
            "well formed": sum(well_formed(a, True) for a in given) / len(given),
            "whatever the letters": sum(well_formed(a, False) for a in given) / len(given),
            "examples": [ask + answer for ask, answer in zip(asked, given, strict=True)][::34]}
        print(seed, way, row[way], flush=True)
    shutil.rmtree(WORK)
    return row


# --- Main ----------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="these seeds")
    args = parser.parse_args()
    if not DATA.is_dir():
        sys.exit(f"skipped: {DATA} is missing")
    pages = english_letters()
    stamp = common.stamp("bench_chat", ("torch", "transformers", "peft"), args.seeds) | {
        "model": SIZES | {"pieces": PIECES, "extended": EXTENDED},
        "training": {"steps": STEPS, "learning_rates": RATES, "batch": [BATCH, LENGTH],
                     "turns": TURNS, "english_pages": len(pages)},
        "questions": ASKED}
    done = json.loads(RESULTS.read_text())["results"] if RESULTS.is_file() else []
    rows = [row for row in done if row["seed"] not in args.seeds]
    rows += [stamp | measure(seed, pages) for seed in args.seeds]
    rows.sort(key=lambda row: row["seed"])
    text = json.dumps({"results": rows}, ensure_ascii=False, indent=2) + "\n"
    RESULTS.write_text(text, encoding="utf-8")
    shares = {way: [row[way]["well formed"] for row in rows] for way in WAYS}
    for way, values in shares.items():
        print(f"{way}: {', '.join(f'{value:.2f}' for value in values)}")


if __name__ == "__main__":
    main()
