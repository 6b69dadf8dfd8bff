"""What each start of the new rows is worth, on a small base that was really trained.

    python benchmarks/bench_quality.py                      # every table: hours on one core
    python benchmarks/bench_quality.py --only starts        # one of them
    python benchmarks/bench_quality.py --draw               # the picture again, from the results

The base is a Llama of 4 layers and width 256 with Llama 2's tokenizer, trained once on English web
pages and some Chinese, both scripts of CMRC, 150 articles of DRCD and half of the novel. It is
extended to 61,388 pieces. Bits per character are of articles and chapters that nothing saw.

starts      Before training: every start for both matrices, and crossed with two others.
training    The same before, after 60 and after 240 steps of LoRA, new rows and norms, as
            train_pt.py trains, on other articles and chapters than the base's.
replay      English mixed into that text: bits per character of Chinese and of English.
rates       Another learning rate for the new rows than for the rest.
recipes     Other rates for everything, the norms and LoRA's B, rsLoRA, a constant rate; and the
            mean of the last checkpoints' merged weights beside the last checkpoint.
chosen      As many characters of what filter_cc.py keeps of a crawl: the pages most like articles
            (--like, --keep_best 0.3), or any pages. Twice: of articles and chapters, and of your
            own crawl (--pages FILE, anything that filter_cc.py reads).
cost        Seconds and memory of extend_vocab.py with each start that it has.

Results: benchmarks/results/quality.json, table by table, pictures/readme_init.png and
pictures/readme_replay.png. The base and every finished run stay in outputs/bench_quality, so a
benchmark that was stopped goes on.
"""

import argparse
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
PICTURE = ROOT / "pictures" / "readme_init.png"
REPLAY_PICTURE = ROOT / "pictures" / "readme_replay.png"
WORK = ROOT / "outputs" / "bench_quality"  # kept: the base and every finished run
SEED, SEEDS, WINDOW, COLUMNS = 0, (0, 1, 2), 256, 3072
BASE = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 2048}
BASE_STEPS, BASE_ROWS, BASE_RATE = 420, 16, 3e-3
NEW_PIECES, EVAL_CHARS, DISTILL_TOKENS = 29_388, 6_000, 30_000
CONTEXT, NEAREST = 4, 8  # characters on either side; old pieces for a new one
TRAIN_STEPS, TRAIN_ROWS, TRAIN_RATE, CHECKED = 240, 2, 1e-3, (60, 240)
RULES = [
    "random", "multivariate", "mean", "first", "last", "weighted", "mean_subtoken", "aligned",
    "shared", "distilled"]
RULES += ["weighted, scaled", "mean_subtoken, scaled"]
DRAWN_RULES = ["random", "multivariate", "aligned", "shared"]  # a seed changes them; distilled: one
CROSSED = ("mean_subtoken", "shared")  # with each other rule, in either matrix
STARTS = {
    "random": ("random", "random"),
    "mean_subtoken": ("mean_subtoken", "mean_subtoken"),
    "last, weighted": ("last", "weighted"),
    "subtoken": ("subtoken", "subtoken"),
    "shared": ("last", "shared"),
    "distilled": ("distilled", "distilled")}
REPLAY_START, SHARES, FACTORS = "shared", (0, 0.05, 0.1, 0.25), (0.1, 1, 10)
CHOSEN_CHARS, KEEP_BEST = {"mixture": 30_000, "crawl": 200_000}, 0.3
AVERAGED = (160, 200, 240)  # the checkpoints whose mean is measured
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import common  # noqa: E402

import extend_vocab as script  # noqa: E402

# --- Material ------------------------------------------------------------------------------------


def read(name: str) -> list[str]:
    return list(script.documents(DATA / name, "--corpus"))


@functools.cache
def texts_by_use() -> dict[str, dict[str, list[str]]]:
    """Disjoint texts: what the base is trained on, what the extended model is, and held out."""
    from opencc import OpenCC

    english = [page.strip() for page in common.english_pages()]
    drcd, lines = read("drcd_dev.jsonl"), read("hongloumeng.txt")
    novel = ["\n".join(lines[i : i + 20]) for i in range(0, len(lines), 20)]
    half, end = len(novel) // 2, len(novel) * 19 // 20
    simplified = read("cmrc_trial.jsonl")
    taiwan = [OpenCC("s2tw").convert(text) for text in simplified]
    chinese = (simplified + taiwan + drcd[:150]) * 2 + novel[:half]
    return {
        "base": {"english": english[:-600], "chinese": chinese},
        "training": {"modern": drcd[150:300], "novel": novel[half:end],
                     "english": english[-600:-150]},
        "pieces": {"modern": drcd[:300], "novel": novel[:end]},
        "held_out": {"modern": drcd[300:], "novel": novel[end:], "english": english[-150:]}}


def packed(encode, texts: list[str], seed: int):
    """The documents in random order as one row of tokens, each between BOS and EOS."""
    import random

    import torch

    order = random.Random(seed).sample(texts, len(texts))
    return torch.tensor([i for ids in encode(order) for i in (1, *ids, 2)])


def look_up(old, new, ids):
    """Rows of two matrices that stand one behind the other, without joining them."""
    import torch

    added = (ids >= len(old))[..., None]
    return torch.where(added, new[(ids - len(old)).clamp(min=0)], old[ids.clamp(max=len(old) - 1)])


def sampled_loss(hidden, head, size: int, labels, generator):
    """Cross entropy of hidden states (N, H) under a head of V rows, from COLUMNS of them: all the
    labels, and others drawn at random, weighted so that the sum over V is estimated without bias.
    A whole softmax over 61,388 pieces would take most of a small model's time. The number is
    constant because oneDNN keeps a compiled kernel for every shape of a matrix."""
    import torch

    seen = labels.unique()
    rest = torch.ones(size, dtype=torch.bool)
    rest[seen] = False
    rest = rest.nonzero()[:, 0]
    drawn = rest[torch.randperm(len(rest), generator=generator)[: COLUMNS - len(seen)]]
    logits = (hidden @ head(torch.cat([seen, drawn])).T).float()  # (N, COLUMNS)
    logits = logits + torch.tensor([0.0, math.log(len(rest) / len(drawn))]).repeat_interleave(
        torch.tensor([len(seen), len(drawn)]))
    return torch.nn.functional.cross_entropy(logits, torch.searchsorted(seen, labels))


# --- The base ------------------------------------------------------------------------------------


def train_base(folder: Path) -> dict:
    """A small Llama with Llama 2's tokenizer, trained on English and a little Chinese."""
    import torch
    from sentencepiece import SentencePieceProcessor
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    encode = SentencePieceProcessor(str(DATA / "llama2-tokenizer.model")).encode
    share = BASE_STEPS * BASE_ROWS * WINDOW  # more text than that need not be encoded
    texts = {kind: script.sample(found, 3 * share if kind == "english" else share // 5, SEED)
             for kind, found in texts_by_use()["base"].items()}
    streams = {kind: packed(encode, found, SEED) for kind, found in texts.items()}
    counts = {kind: len(stream) for kind, stream in streams.items()}
    windows = torch.cat(list(streams.values()))
    windows = windows[: len(windows) // WINDOW * WINDOW].view(-1, WINDOW)
    windows = windows[torch.randperm(len(windows), generator=generator)]
    steps = min(BASE_STEPS, len(windows) // BASE_ROWS)
    print(counts, steps, "steps", flush=True)
    model = LlamaForCausalLM(LlamaConfig(**BASE, vocab_size=32_000))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    start = time.monotonic()
    for step in range(steps):
        progress = step / steps
        rate = BASE_RATE * min((step + 1) / 50, 0.55 + 0.45 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = windows[step * BASE_ROWS : (step + 1) * BASE_ROWS]
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(input_ids=batch).last_hidden_state[:, :-1].flatten(0, 1)
            head = model.lm_head.weight
            labels = batch[:, 1:].flatten()
            loss = sampled_loss(hidden, head.__getitem__, len(head), labels, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            print(step, round(loss.item(), 3), round(time.monotonic() - start), flush=True)
    partial = folder.with_name(folder.name + ".partial")
    model.to(torch.bfloat16).save_pretrained(partial)
    shutil.copy(DATA / "llama2-tokenizer.model", partial / "tokenizer.model")
    record = {"tokens": counts, "steps": steps, "tokens_per_step": BASE_ROWS * WINDOW,
              "rate": BASE_RATE, "loss": loss.item(), "seconds": time.monotonic() - start, **BASE}
    (partial / "training.json").write_text(json.dumps(record))
    partial.rename(folder)
    return record


# --- The extension -------------------------------------------------------------------------------


@functools.cache
def extension() -> tuple:
    """Llama 2's tokenizer, its extension to 61,388 pieces by the README's recipe (the novel and
    modern text, weighted 1:8), the spellings of the new pieces, and the weighted documents."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    texts, llama = texts_by_use(), ModelProto()
    llama.ParseFromString((DATA / "llama2-tokenizer.model").read_bytes())
    train = [(weight, text) for kind, weight in (("modern", 8), ("novel", 1))
             for text in texts["pieces"][kind]]
    candidates = script.train_pieces(train, script.Arguments(), NEW_PIECES)
    extended, _ = script.merge_pieces(llama, candidates, 32_000 + NEW_PIECES)
    new = [piece.piece for piece in extended.pieces][32_000:]
    return llama, extended, script.spellings(llama, new), train


def held_out(tokenizer, seed: int = SEED) -> dict:
    """Of each kind of text held out: windows of tokens, each behind BOS, and the characters."""
    import torch

    found = {}
    for kind, texts in texts_by_use()["held_out"].items():
        some = script.sample(texts, EVAL_CHARS, seed)
        windows = [
            torch.tensor([1, *ids[first : first + WINDOW]]) for ids in tokenizer.encode(some)
            for first in range(0, len(ids), WINDOW)]
        found[kind] = windows, sum(map(len, some))
    return found


# --- The starts ----------------------------------------------------------------------------------


def context_vectors(model, texts: list[str], signs) -> tuple:
    """For every piece of a tokenizer the sum of the random vectors of the CONTEXT characters before
    each place where it stands and of those behind it, (V, 2 D), and its number of places. Sums of
    characters do not depend on how the context is cut, so two tokenizers share one space."""
    import numpy as np

    tokenizer, dims = script.processor(model, prefix=False), signs.shape[1]
    widths = np.array([
        1 if p.type == p.BYTE else len(p.piece.replace(script.SPACE, " ").encode())
        for p in model.pieces])  # in bytes of UTF-8
    vectors = np.zeros((len(widths), 2 * dims), np.float32)
    places = np.zeros(len(widths), np.int64)
    for text in texts:
        for first in range(0, len(text), 20_000):
            part = text[first : first + 20_000]
            ids = np.array(tokenizer.encode(part))
            code = np.frombuffer(part.encode("utf-32-le"), np.uint32)
            sums = np.zeros((len(code) + 1, dims), np.float32)
            np.cumsum(signs[code % len(signs)], 0, out=sums[1:])
            size = 1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000)
            character = np.repeat(np.arange(len(code)), size)  # of each byte
            end = np.cumsum(widths[ids])
            begin, end = character[end - widths[ids]], character[end - 1] + 1
            before = sums[begin] - sums[np.maximum(begin - CONTEXT, 0)]
            behind = sums[np.minimum(end + CONTEXT, len(code))] - sums[end]
            np.add.at(vectors, ids, np.concatenate([before, behind], 1))
            places += np.bincount(ids, minlength=len(places))
    return vectors, places


def alignment(base, extended, documents: list, seed: int) -> tuple:
    """For every new piece the ids of the NEAREST old pieces that stand in the most similar contexts
    and their weights, (N, NEAREST): TokAlign (Li et al., ACL 2025) with random indexing."""
    import numpy as np

    texts, size = ["\n".join(text for _, text in documents)], 1 << 16
    code = np.frombuffer(texts[0].encode("utf-32-le"), np.uint32) % size
    often = np.maximum(np.bincount(code, minlength=size), 20)
    signs = np.random.default_rng(seed).choice([-1, 1], (size, 128)) / np.sqrt(often)[:, None]
    signs = signs.astype(np.float32)
    (old, often), (new, places) = (context_vectors(m, texts, signs) for m in (base, extended))
    mean = new.sum(0) / places.sum()
    known = np.flatnonzero(often >= 5)

    def directions(vectors, count):
        centred = vectors / np.maximum(count, 1)[:, None] - mean
        return centred / np.linalg.norm(centred, axis=1, keepdims=True).clip(1e-9)

    old = directions(old[known], often[known])
    new = directions(new[len(base.pieces) :], places[len(base.pieces) :])
    ids, weights = [], []
    for first in range(0, len(new), 2048):
        cosine = new[first : first + 2048] @ old.T
        best = np.argpartition(-cosine, NEAREST, 1)[:, :NEAREST]
        weight = np.exp(10 * np.take_along_axis(cosine, best, 1))
        ids.append(known[best])
        weights.append(weight / weight.sum(1, keepdims=True))
    return np.concatenate(ids), np.concatenate(weights).astype(np.float32)


@functools.cache
def alignment_of(seed: int) -> tuple:
    base, extended, _, documents = extension()
    return alignment(base, extended, documents, seed)


def matrices_of(llama) -> dict:
    """The base's embedding and head, by their names in the files."""
    return {script.EMBEDDING: llama.get_input_embeddings().weight.detach(),
            script.HEAD: llama.get_output_embeddings().weight.detach()}


def rows_by(rule: str, name: str, matrix, material: tuple, seed: int):
    """New rows of one matrix by a rule's name, as float32; ", scaled": to the old rows' norm."""
    import torch

    _, _, spelling, _ = material
    rule, scaled = rule.removesuffix(", scaled"), rule.endswith(", scaled")
    if rule == "aligned":
        ids, weights = map(torch.from_numpy, alignment_of(seed))
        return (weights[..., None] * matrix[ids]).sum(1)
    if rule in ("shared", "distilled"):
        return taught_rows(rule, seed)[name]
    rows = other_rows(name, matrix, spelling, rule, seed)
    norm = matrix.norm(dim=1).mean()
    return rows * norm / rows.norm(dim=1, keepdim=True) if scaled else rows


def other_rows(name: str, matrix, spelling: list[list[int]], rule: str, seed: int):
    """The script's own starts, and those that were tried and not kept: the first or last spelling
    row, weights that double towards the last (in the head towards the first), and a normal draw
    with the old rows' mean and covariance (Hewitt, 2021)."""
    import torch

    if rule == "multivariate":
        generator = torch.Generator().manual_seed(2 * seed + (name == script.HEAD))
        values, vectors = torch.linalg.eigh(torch.cov(matrix.T))
        noise = torch.randn(len(spelling), len(values), generator=generator)
        return matrix.mean(0) + noise * values.clamp_min(0).sqrt() @ vectors.T
    if rule in ("first", "last"):
        return matrix[[ids[-(rule == "last")] for ids in spelling]]
    if rule == "weighted":
        order = -1 if name == script.HEAD else 1
        weights = [2.0 ** (order * torch.arange(len(ids))) for ids in spelling]
        return torch.stack([
            w @ matrix[ids] / w.sum() for w, ids in zip(weights, spelling, strict=True)])
    return script.new_rows(name, matrix, spelling, rule, 0.02, seed)


@functools.cache
def taught_rows(init: str, seed: int) -> dict:
    """The script's rows for which the base reads text; distilled ones are kept on disk."""
    import torch

    path = WORK / f"{init}_{seed}.pt"
    if not path.is_file():
        args = script.Arguments(init=init, seed=seed, distill_tokens=DISTILL_TOKENS)
        torch.save(
            script.taught_rows(WORK / "base", WORK / f"state_{seed}", *extension(), args), path)
    return torch.load(path)


@functools.cache
def base_model():
    """The trained base, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(WORK / "base", dtype="float32").eval()


def bits_of_heads(llama, embedding, heads: dict, material: dict) -> dict:
    """Bits per character of every kind of text, for several heads' new rows on the same input rows:
    the body and the old rows' part of the softmax are computed once."""
    import torch

    nats = {name: dict.fromkeys(material, 0.0) for name in heads}
    old_head = llama.get_output_embeddings().weight.bfloat16()
    heads = {name: head.bfloat16() for name, head in heads.items()}
    with torch.inference_mode():
        for kind, (windows, _) in material.items():
            for window in windows:
                states = llama.model(inputs_embeds=embedding[window[None]]).last_hidden_state
                states, labels = states[0, :-1].bfloat16(), window[1:]
                known = (states @ old_head.T).float()  # (T, V)
                for name, head in heads.items():
                    logits = torch.cat([known, (states @ head.T).float()], 1)
                    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
                    nats[name][kind] += loss.item()
    chars = {kind: characters for kind, (_, characters) in material.items()}
    return {name: {kind: nats[name][kind] / math.log(2) / chars[kind] for kind in chars}
            for name in nats}


def starts() -> dict:
    """Bits per character before training: every rule for both matrices, and crossed with some."""
    import torch

    llama, material = base_model(), extension()
    base, extended, *_ = material
    texts = {kind: script.sample(found, EVAL_CHARS, SEED)
             for kind, found in texts_by_use()["held_out"].items()}
    of_base = {kind: script.bits_per_character(llama, base, found)
               for kind, found in texts.items()}
    print("base", of_base, flush=True)
    held = held_out(script.processor(extended))
    del held["english"]  # no new piece is in it
    matrices, results = matrices_of(llama), []
    for seed in SEEDS:
        rules = RULES if seed == SEED else DRAWN_RULES
        new = {rule: {name: rows_by(rule, name, matrix, material, seed).float()
                      for name, matrix in matrices.items()} for rule in rules}
        for rule, found in new.items():
            embedding = torch.cat([matrices[script.EMBEDDING], found[script.EMBEDDING]])
            every = rule in CROSSED and seed == SEED
            heads = rules if every else {rule, *CROSSED}.intersection(rules)
            heads = {head: new[head][script.HEAD] for head in heads}
            for head, bits in bits_of_heads(llama, embedding, heads, held).items():
                results.append({"input": rule, "output": head, "seed": seed, **bits})
                print(json.dumps(results[-1]), flush=True)
    return {"base": of_base, "characters": EVAL_CHARS, "starts": results}


# --- Training ------------------------------------------------------------------------------------


@dataclass
class Recipe:
    """How a run differs from train_pt.py's defaults. Rates of parts are multiples of `rate`."""

    share: float = 0.0  # of English
    rate: float = TRAIN_RATE
    rows_rate: float = 1.0
    norms_rate: float = 1.0
    lora_b_rate: float = 1.0  # LoRA+
    use_rslora: bool = False
    schedule: str = "cosine"
    texts: tuple[str, ...] = ()  # instead of the Chinese
    average: bool = False  # also measure the mean of AVERAGED


def stream_of(encode, recipe: Recipe, seed: int):
    """Windows (N, WINDOW) to train on, Chinese, and a share of all in English, evenly mixed."""
    import torch

    texts, order = texts_by_use()["training"], torch.Generator().manual_seed(seed)
    count = TRAIN_STEPS * TRAIN_ROWS
    english = round(recipe.share * count)
    chosen = []
    chinese = list(recipe.texts) or texts["modern"] * 2 + texts["novel"]
    for found, wanted in ((chinese, count - english), (texts["english"], english)):
        stream = packed(encode, found if wanted else found[:9], seed)
        windows = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW)
        passes = -(-wanted // len(windows))
        orders = [torch.randperm(len(windows), generator=order) for _ in range(passes)]
        chosen += [windows[torch.cat(orders)[:wanted]]] if passes else []
    mixed = torch.cat(chosen)
    return mixed[torch.randperm(len(mixed), generator=order)]


RECIPES = {
    "cosine": Recipe(average=True),
    "constant": Recipe(schedule="constant", average=True),
    "rate / 10": Recipe(rate=TRAIN_RATE / 10),
    "rate / 10, rows at rate": Recipe(rate=TRAIN_RATE / 10, rows_rate=10),
    "norms x 10": Recipe(norms_rate=10),
    "LoRA+, B x 4": Recipe(lora_b_rate=4),
    "rsLoRA": Recipe(use_rslora=True)}


def train(rules: tuple, material: tuple, seed: int, recipe: Recipe) -> list[dict]:
    """Train as train_pt.py does: LoRA of rank 32 on every linear layer, the new rows and the norms;
    bits per character before the first step and at CHECKED."""
    import copy

    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    _, extended, *_ = material
    llama, names = copy.deepcopy(base_model()), (script.EMBEDDING, script.HEAD)
    matrices = matrices_of(llama)
    new = [rows_by(rule, name, matrices[name], material, seed).float().clone().requires_grad_()
           for rule, name in zip(rules, names, strict=True)]
    linear = LoraConfig(
        r=32, lora_alpha=64, target_modules="all-linear", use_rslora=recipe.use_rslora)
    adapted = get_peft_model(llama, linear)
    body = adapted.base_model.model.model
    factors = {"lora_A": 1.0, "lora_B": recipe.lora_b_rate, "norm": recipe.norms_rate}
    groups = [{"params": new, "factor": recipe.rows_rate}]
    for part, factor in factors.items():
        found = [weight for name, weight in adapted.named_parameters() if part in name]
        groups.append({"params": found, "factor": factor})
    trained = [weight.requires_grad_() for group in groups for weight in group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    held = held_out(script.processor(extended))

    def measure(model=adapted.base_model.model, rows=new) -> dict:
        rows = [row.detach() for row in rows]
        embedding = torch.cat([matrices[script.EMBEDDING], rows[0]])
        return bits_of_heads(model, embedding, {"": rows[1]}, held)[""]

    points, merged, start = [{"step": 0, **measure()}], [], time.monotonic()
    windows = stream_of(script.processor(extended).encode, recipe, seed)
    for step in range(1, TRAIN_STEPS + 1):
        decay = 0.5 + 0.5 * math.cos(math.pi * step / TRAIN_STEPS)
        rate = recipe.rate * min(step / 20, decay if recipe.schedule == "cosine" else 1)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        batch = windows[(step - 1) * TRAIN_ROWS : step * TRAIN_ROWS]
        embeds, head = (functools.partial(look_up, matrices[n], rows)
                        for n, rows in zip(names, new, strict=True))
        with torch.autocast("cpu", torch.bfloat16):
            states = body(inputs_embeds=embeds(batch)).last_hidden_state[:, :-1].flatten(0, 1)
            labels = batch[:, 1:].flatten()
            loss = sampled_loss(states, head, len(extended.pieces), labels, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1)
        optimizer.step()
        if step in CHECKED:
            points.append({"step": step, "loss": loss.item(), **measure()})
            print(json.dumps(points[-1]), round(time.monotonic() - start), flush=True)
        if recipe.average and step in AVERAGED:
            whole = copy.deepcopy(adapted).merge_and_unload()
            merged.append((whole.state_dict(), [row.detach().clone() for row in new]))
    if recipe.average:
        states, rows = zip(*merged, strict=True)
        whole.load_state_dict(
            {name: sum(state[name] for state in states) / len(states) for name in states[0]})
        rows = [sum(found) / len(found) for found in zip(*rows, strict=True)]
        points.append({"step": TRAIN_STEPS, "mean_of": AVERAGED, **measure(whole, rows)})
        print(json.dumps(points[-1]), flush=True)
    return points


def run(
    key: str, rules: tuple, material: tuple, seed: int, recipe: Recipe | None = None
) -> list[dict]:
    """The points of one training run, kept on disk: a benchmark that was stopped goes on."""
    path = WORK / "runs" / f"{key}.json"
    if not path.is_file():
        print(f"--- {key}", flush=True)
        path.parent.mkdir(exist_ok=True)
        points = train(rules, material, seed, recipe or Recipe())
        path.write_text(json.dumps(points))
    return json.loads(path.read_text())


def training() -> list[dict]:
    """Some starts, trained with every seed; a seed's text and order are the same for all."""
    material = extension()
    return [
        {"start": name, "seed": seed, "points": run(f"{name}, seed {seed}", rules, material, seed)}
        for name, rules in STARTS.items() for seed in SEEDS]


def replay() -> list[dict]:
    """English mixed into the training text by tokens."""
    material, rules = extension(), STARTS[REPLAY_START]
    return [
        {"english": share, "seed": seed, "points": run(
            f"{REPLAY_START}, seed {seed}" + f", {share:.0%} English" * (share > 0),
            rules, material, seed, Recipe(share=share))}
        for seed in SEEDS for share in SHARES]


def rates() -> list[dict]:
    """Another learning rate for the new rows, as a multiple of the rest's."""
    material, rules = extension(), STARTS[REPLAY_START]
    return [
        {"rows_rate": factor, "seed": seed, "points": run(
            f"{REPLAY_START}, seed {seed}" + f", rows at {factor:g}" * (factor != 1),
            rules, material, seed, Recipe(rows_rate=factor))}
        for seed in SEEDS for factor in FACTORS]


def recipes() -> list[dict]:
    """Each of RECIPES with every seed."""
    material, rules = extension(), STARTS[REPLAY_START]
    return [
        {"recipe": name, "seed": seed, "points": run(
            f"{REPLAY_START}, seed {seed}, recipe {name.replace('/', 'by')}",
            rules, material, seed, recipe)}
        for seed in SEEDS for name, recipe in RECIPES.items()]


def written(name: str, texts: list[str]) -> Path:
    """Write texts as JSON lines and return the file."""
    path = WORK / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@functools.cache
def filtered(crawl: Path, *options: str) -> list[str]:
    """What filter_cc.py keeps of a crawl."""
    import pyarrow.parquet as pq

    output = WORK / "filtered"
    command = [sys.executable, ROOT / "filter_cc.py", "--input", crawl, *options]
    command += ["--output_dir", output, "--picture", WORK / "filter.png"]
    shutil.rmtree(output, ignore_errors=True)
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    tables = [pq.read_table(path, columns=["text"]) for path in sorted(output.glob("*.parquet"))]
    shutil.rmtree(output)
    return [text for table in tables for text in table.column("text").to_pylist()]


def chosen(pages: Path | None) -> list[dict]:
    """The same number of characters of any pages and of the chosen, trained on as often. The
    mixture is articles of DRCD and half of the novel, none of which the base has seen; the trusted
    text is articles of DRCD that are neither trained on nor measured."""
    material, rules, rows = extension(), STARTS[REPLAY_START], []
    unseen = texts_by_use()["training"]
    crawls = {"mixture": written("pool.jsonl", unseen["modern"] + unseen["novel"])}
    if pages:
        crawls["crawl"] = pages
    trusted = written("trusted.jsonl", read("drcd_dev.jsonl")[:150])
    like = ("--like", str(trusted), "--keep_best", str(KEEP_BEST))
    for name, crawl in crawls.items():
        for way, options in {"any pages": (), "--like": like}.items():
            kept = filtered(crawl, *options)
            for seed in SEEDS:
                texts = tuple(script.sample(kept, CHOSEN_CHARS[name], seed))
                rows.append({
                    "of": name, "pages": way, "seed": seed, "kept": len(kept),
                    "characters": sum(map(len, texts)),
                    "points": run(f"{REPLAY_START}, seed {seed}, {way} of {name}", rules, material,
                                  seed, Recipe(texts=texts))})
    return rows


def cost() -> list[dict]:
    """What a run of the script takes with each start: seconds of CPU, wall time, peak memory."""
    rows = []
    for init in ("mean_subtoken", "shared", "distilled"):
        result = WORK / "extended"
        words = [sys.executable, ROOT / "extend_vocab.py", "--base_model", WORK / "base"]
        words += ["--corpus", DATA / "hongloumeng.txt", "--eval_loss", "no", "--init", init]
        words += ["--output_dir", result, "--distill_tokens", DISTILL_TOKENS]
        words += ["--picture", WORK / "vocab.png"]
        start, words = time.monotonic(), [str(word) for word in words]
        pid = os.spawnve(os.P_NOWAIT, words[0], words, os.environ | {"OMP_NUM_THREADS": "1"})
        _, status, usage = os.wait4(pid, 0)
        assert status == 0, words
        shutil.rmtree(result)
        tokens = {"shared": script.SHARE_WINDOWS * script.LOSS_WINDOW, "distilled": DISTILL_TOKENS}
        rows.append({
            "init": init, "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "seconds": time.monotonic() - start, "peak_gb": usage.ru_maxrss / 1e6,
            "tokens": tokens.get(init, 0)})
        print(rows[-1], flush=True)
    return rows


# --- Main ----------------------------------------------------------------------------------------


def draw(table: dict) -> None:
    """Bits per character on modern text along the training, start by start, mean of the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, kind in zip(axes, ("modern", "novel"), strict=True):
        for name in STARTS:
            runs = [row["points"] for row in table["results"] if row["start"] == name]
            if runs:
                steps = [point["step"] for point in runs[0]]
                found = [sum(points) / len(runs) for points in
                         zip(*([p[kind] for p in points] for points in runs), strict=True)]
                axis.plot(steps, found, marker="o", label=name)
        axis.set_title({"modern": "modern text (DRCD)", "novel": "the novel"}[kind])
        axis.set_xlabel("training steps")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("bits per character")
    axes[1].legend(frameon=False)
    figure.savefig(PICTURE, dpi=120)
    print(f"drew {PICTURE.relative_to(ROOT)}")


def draw_replay(table: dict) -> None:
    """Bits per character of Chinese and of English after training, by the share of English: each
    seed, and their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    shares = sorted({row["english"] for row in table["results"]})
    before = table["results"][0]["points"][0]
    for axis, kind in zip(figure.subplots(1, 2), ("modern", "english"), strict=True):
        found = [[row["points"][-1][kind] for row in table["results"] if row["english"] == share]
                 for share in shares]
        for share, bits in zip(shares, found, strict=True):
            axis.plot([100 * share] * len(bits), bits, "o", color="0.6", markersize=4)
        axis.plot([100 * share for share in shares], [sum(b) / len(b) for b in found], marker="o")
        axis.axhline(before[kind], color="0.6", linestyle="--")
        axis.set_title({"modern": "Chinese (DRCD)", "english": "English web pages"}[kind])
        axis.set(xlabel="English in the training text (%)", ylabel="bits per character")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("After training; dashed: before", fontsize=10)
    figure.savefig(REPLAY_PICTURE, dpi=120)
    print(f"drew {REPLAY_PICTURE.relative_to(ROOT)}")


def main() -> None:
    """Measure the chosen tables; each keeps its own stamp when another is measured again."""
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {
        "starts": starts, "training": training, "replay": replay, "rates": rates,
        "recipes": recipes, "chosen": lambda: chosen(args.pages), "cost": cost}
    parser.add_argument("--only", nargs="+", choices=tables, help="these tables")
    parser.add_argument("--pages", type=Path, help="a crawl for the table `chosen`")
    parser.add_argument("--draw", action="store_true", help="only the picture, from the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.draw and not DATA.is_dir():
        print(f"skipped: {DATA} with its real material is missing")
        return
    WORK.mkdir(parents=True, exist_ok=True)
    if not args.draw and not (WORK / "base").is_dir():
        train_base(WORK / "base")
    for name in [] if args.draw else args.only or tables:
        packages = ("torch", "transformers", "peft", "tokenizers", "sentencepiece", "opencc")
        stamp = common.stamp(
            "bench_quality", packages, list(SEEDS), "one of {} cores", "no GPU")
        stamp["base"] = json.loads((WORK / "base" / "training.json").read_text())
        common.measure_table(RESULTS, name, tables[name], stamp)
    measured = json.loads(RESULTS.read_text())["results"] if RESULTS.is_file() else {}
    if "training" in measured:
        draw(measured["training"])
    if "replay" in measured:
        draw_replay(measured["replay"])


if __name__ == "__main__":
    main()
