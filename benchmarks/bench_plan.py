"""The peak memory of train_pt.py on a GPU, traced without one, beside what --plan foretells.

    python benchmarks/bench_plan.py                              # the README's table, minutes
    python benchmarks/bench_plan.py --shapes 8x1024 1x8192 --embeddings new all none
    python benchmarks/bench_plan.py --shapes 8x2048 --offload --detail 10  # the largest tensors
    python benchmarks/bench_plan.py --shapes 8x2048 --options --lora_rank 64  # any of train_pt.py's

The real code trains Llama 2 7B's shapes with 61,388 pieces, two steps of two batches, under
FakeTensorMode: tensors have shapes and types and no memory. So build_model's modules, PEFT, the
Trainer's step, Transformers' checkpointing, bitsandbytes' NF4 layers and 8-bit Adam, and
varlen_attn all run; storages are followed from birth to death, rounded up to 512 bytes as
PyTorch's allocator does. What kernels take besides their outputs is added from their sources
(WORKSPACE). The tensors say that they are on the CPU, for PyTorch built without CUDA differentiates
no others; what would then go another way than on a GPU is set right in like_a_gpu.

Not counted: CUDA's context, fragmentation, cuBLAS's workspace (8.5 MB; 32 MiB on Hopper). This is
no measurement on a GPU: bench_gpu.py makes that. Results: benchmarks/results/plan.json.
"""

import argparse
import json
import platform
import subprocess
import sys
import weakref
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import bitsandbytes as bnb
import numpy as np
import torch
import torch.nn.attention.varlen
import transformers.modeling_utils
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "train_pt.py").exists())
sys.path.insert(0, str(ROOT))

import train_pt as script  # noqa: E402

SIZES = {
    "vocab_size": 61_388, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 8192,
}  # fmt: skip
RESULTS = ROOT / "benchmarks" / "results" / "plan.json"
LENGTHS = {False: (1024, 2048, 4096), True: (2048, 4096)}  # offload: tokens of 8 sequences
LLAMA_2_PIECES, SEED, STEPS, ACCUMULATED = 32_000, 0, 2, 2
KEPT = "kept for the backward pass"

# --- What kernels take besides their outputs ------------------------------------------------------


def gemm_4bit(x, packed, shape, *_) -> int:
    """bitsandbytes, backends/cuda/ops.py: above 1,536 rows the weight is restored whole, its scales
    twice in fp32, then multiplied as any other."""
    weights = shape[0] * shape[1]
    return 0 if x.numel() // shape[1] <= 1536 else weights * x.itemsize + 2 * weights // 64 * 4


def flash_backward(grad, q, k, v, out, lse, bounds, *_) -> int:
    """PyTorch, cuda/flash_attn/flash_api.cpp, mha_varlen_bwd: dq in fp32 and a number a row, with
    room for 128 more tokens a segment."""
    tokens = q.shape[0] + 128 * (bounds.numel() - 1)
    size = -(-q.shape[2] // 32) * 32
    return tokens * q.shape[1] * (size + 1) * 4 + (0 if grad.is_contiguous() else grad.nbytes)


def embedding_backward(grad, ids, rows, *_) -> int:
    """PyTorch, cuda/EmbeddingBackwardKernel.cu: partial sums in fp32, at most one for each ten
    tokens and one for each row met; sorted indices."""
    partial = ids.numel() // 10 + min(ids.numel(), rows)
    return partial * grad.shape[-1] * 4 + ids.numel() * 64


WORKSPACE = {
    torch.ops.bitsandbytes.gemm_4bit.default: gemm_4bit,
    torch.ops.torch_attn._varlen_attn_backward.default: flash_backward,
    torch.ops.aten.embedding_dense_backward.default: embedding_backward,
}

# --- Accounting -----------------------------------------------------------------------------------


@dataclass
class Block:
    """A storage."""

    size: int
    number: int  # of the operation that made it
    made_by: str
    phase: str
    shape: tuple


class Memory(TorchDispatchMode):
    """Follows all storages; at operation number `stop` it takes down which live."""

    def __init__(self, stop: int | None):
        super().__init__()
        self.stop, self.phase, self.operations, self.live, self.peak = stop, "build", 0, 0, 0
        self.storages, self.phases = WeakIdKeyDictionary(), Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        sums_gradients = operation is torch.ops.aten.add.Tensor and self.phase == "backward"
        if sums_gradients and not is_forward():
            self.sum_in_place(args)
        self.operations += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.follow(tensor, str(operation))
        workspace = WORKSPACE[operation](*args) if operation in WORKSPACE else 0
        taken = self.live + workspace
        self.phases[self.phase] = max(self.phases[self.phase], taken)
        if taken > self.peak:
            self.peak, self.peak_at, self.workspace = taken, self.operations, workspace
            self.moment = f"{self.phase}, {operation}"
        if self.operations == self.stop:
            kinds = self.lasting()
            blocks = [(b, kinds.get(id(s))) for s, b in self.storages.items() if b.size]
            self.at_stop = [(replace(block), kind) for block, kind in blocks]
        return result

    def follow(self, tensor: torch.Tensor, operation: str) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.storages:
            size = -(-storage.nbytes() // 512) * 512
            block = Block(size, self.operations, operation, self.phase, tuple(tensor.shape))
            self.storages[storage] = block
            self.live += size
            weakref.finalize(storage, self.drop, block)

    def drop(self, block: Block) -> None:
        self.live -= block.size
        block.size = 0

    def sum_in_place(self, addends) -> None:
        """Where two gradients meet, autograd adds to the one that nobody else holds
        (input_buffer.cpp); not to a fake one, so the later one's room is given back here."""
        blocks = [self.storages.get(tensor.untyped_storage()) for tensor in addends]
        self.drop(max(filter(None, blocks), key=lambda block: block.number))


def is_forward() -> bool:
    """Whether the model's code is running: in the backward pass, a layer that is recomputed."""
    frame = sys._getframe(1)
    while frame and "modeling_llama" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None


def lasting(model, optimizer) -> dict[int, str]:
    """What each storage that outlives a batch is for."""
    kinds = {}
    for parameter in model.parameters():
        kind = "trained parameters" if parameter.requires_grad else "frozen parameters"
        kinds[parameter] = kind
        if parameter.grad is not None:
            kinds[parameter.grad] = "gradients"
        state = getattr(parameter, "quant_state", None)
        for part in (state, state.state2) if state else ():
            kinds |= {t: kind for t in vars(part).values() if torch.is_tensor(t)}
    for state in optimizer.state.values():
        kinds |= {t: "optimizer state" for t in state.values() if torch.is_tensor(t)}
    return {id(tensor.untyped_storage()): kind for tensor, kind in kinds.items()}


# --- A GPU that is not there ----------------------------------------------------------------------


class HostMemory(torch.autograd.graph.saved_tensors_hooks):
    """save_on_cpu: what is saved leaves the device, and comes back as a new tensor."""

    def __init__(self, *args, **kwargs):
        super().__init__(
            lambda x: (x.shape, x.stride(), x.dtype),
            lambda saved: torch.empty_strided(saved[0], saved[1], dtype=saved[2]))


def like_a_gpu(stack: ExitStack) -> None:
    """What would go another way on a CPU, or fails on tensors without content."""
    enabled, table = torch.is_autocast_enabled, bnb.functional.create_dynamic_map
    patches = [
        # PEFT asks whether autocast is on for GPUs, and casts its input to fp32 if not.
        mock.patch.object(torch, "is_autocast_enabled", lambda device="cpu": enabled(device)),
        mock.patch.object(transformers.modeling_utils, "save_on_cpu", HostMemory),
        mock.patch.object(torch.nn.Module, "to", lambda module, *a, **k: module),
        mock.patch.object(bnb.functional, table.__name__, lambda *a, **k: torch.empty(256)),
        mock.patch.dict(bnb.functional.name2qmap, clear=True),
    ]
    for patch in patches:
        stack.enter_context(patch)


def base_model(dtype: torch.dtype, nf4: bool):
    """What AutoModelForCausalLM.from_pretrained gives build_model, without content."""
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers import AutoHfQuantizer

    config = LlamaConfig(**SIZES, attn_implementation="s2", dtype=dtype)
    form = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["lm_head"],
    )  # fmt: skip
    with _disable_current_modes(), torch.device("meta"):
        model = LlamaForCausalLM(config)
        if nf4:
            model = replace_with_bnb_linear(model, ["lm_head"], form)
    if nf4:
        model.hf_quantizer, config.quantization_config = AutoHfQuantizer.from_config(form), form
        model.is_loaded_in_4bit, model.quantization_method = True, form.quant_method
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            weight, state = torch.empty(weight.shape, dtype=dtype), None
            if isinstance(module, bnb.nn.Linear4bit):
                weight, state = bnb.functional.quantize_4bit(
                    weight, blocksize=64, compress_statistics=True, quant_type="nf4")
            parameter = torch.nn.Parameter(weight, requires_grad=False)
            if state is not None:  # a Params4bit holds no fake tensor
                parameter.quant_state = module.quant_state = state
                parameter.compress_statistics, parameter.quant_type = True, "nf4"
            setattr(module, name, parameter)
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape))
    return model.eval()


# --- The trace ------------------------------------------------------------------------------------


def batches(args, batch: int) -> list[dict]:
    """Packed documents of 100 to 2,000 tokens, as in bench_gpu.py; cut points as for a GPU."""
    count = STEPS * ACCUMULATED
    rng = np.random.default_rng(SEED)
    lengths = rng.integers(100, 2000, 2 * count * batch * args.block_size // 1000 + 20)
    tokens = rng.integers(3, SIZES["vocab_size"], int(lengths.sum())).astype(np.uint16)
    corpus = script.Corpus(tokens, lengths, lengths)
    blocks = script.PackedBlocks(corpus, np.arange(len(lengths)), args.block_size, padding=0)
    collate = script.Collate(args.group_size, flash=True)
    return [collate([blocks[i * batch + j] for j in range(batch)]) for i in range(count)]


def faked(thing, mode: FakeTensorMode):
    if torch.is_tensor(thing):
        return mode.from_tensor(thing)
    return {k: faked(v, mode) for k, v in thing.items()} if isinstance(thing, dict) else thing


def trace(words: list[str], stop: int | None = None) -> Memory:
    """Build the model and train it; the accounts."""
    from transformers import Trainer

    args, training = script.parse_args(words)
    batch = training.per_device_train_batch_size
    data, memory = batches(args, batch), Memory(stop)
    with ExitStack() as stack:
        mode = stack.enter_context(FakeTensorMode())
        like_a_gpu(stack)
        stack.enter_context(memory)
        dtype, nf4 = torch.bfloat16 if training.bf16 else torch.float32, args.quantization == "nf4"
        load = "transformers.AutoModelForCausalLM.from_pretrained"
        with mock.patch(load, lambda *a, **k: base_model(dtype, nf4)):
            model, _ = script.build_model(args, training, Path(), LLAMA_2_PIECES)
        llama = model.base_model.model
        options = json.loads(args.activation_checkpointing_kwargs or "{}")
        if options.get("offload"):  # build_model wants a GPU
            llama.activation_checkpointing_enable({"use_reentrant": False}, offload=True)
        report = SimpleNamespace(args=args)
        trainer = script.build_trainer(training, model, [0], None, report)
        prepared, _ = trainer._prepare_for_training(STEPS, None, None)
        memory.lasting = lambda: lasting(model, trainer.optimizer.optimizer)
        memory.peak, memory.args = 0, args

        def enter(phase, function):
            def inside(*args, **kwargs):
                memory.phase = phase
                return function(*args, **kwargs)
            return inside

        def mark(layer, inputs):
            memory.storages[inputs[0].untyped_storage()].phase = KEPT

        for layer in llama.model.layers:
            layer.register_forward_pre_hook(mark)
        llama.loss_function = enter("loss", llama.loss_function)
        backward = enter("backward", torch.Tensor.backward)
        stack.enter_context(mock.patch.object(torch.Tensor, "backward", backward))
        trainer.current_gradient_accumulation_steps = ACCUMULATED
        for step in range(STEPS):
            for i in range(ACCUMULATED):
                memory.phase = "forward"
                inputs = faked(data[step * ACCUMULATED + i], mode)
                items = inputs["labels"].ne(script.IGNORED).sum()
                Trainer.training_step(trainer, prepared, inputs, items)  # ours looks at the loss
                del inputs
            memory.phase = "optimizer"
            trainer._clip_grad_norm(prepared)
            trainer.optimizer.step()
            prepared.zero_grad()
    return memory


def measured(shape: str, rows: str, offload: bool, detail: int, options: list[str]) -> dict:
    """Trace one shape twice, the second time to see what lives at the peak; print it."""
    batch, block = map(int, shape.split("x"))
    words = {
        "block_size": block, "per_device_train_batch_size": batch, "optim": "adamw_8bit",
        "gradient_accumulation_steps": ACCUMULATED, "train_embeddings": rows,
        "activation_checkpointing": "true",
        "activation_checkpointing_kwargs": json.dumps({"offload": offload})}
    words = [str(word) for name, value in words.items() for word in (f"--{name}", value)]
    first = trace(words + options)
    second = trace(words + options, first.peak_at)
    assert second.peak_at == first.peak_at, "two traces of the same differ"
    config = SimpleNamespace(**SIZES)
    planned = script.memory_items(config, first.args, LLAMA_2_PIECES, batch, block)
    total = sum(planned.values())
    title = f"{shape}, --train_embeddings {rows}{', offload' if offload else ''}"
    print(f"\n{title}: {first.peak / 1e9:.2f} GB, traced; the peak is in {first.moment}")
    kinds, groups = Counter({"workspace of that kernel": second.workspace}), Counter()
    for held, kind in second.at_stop:
        kind = kind or (KEPT if held.phase == KEPT else f"made in {held.phase}")
        kinds[kind] += held.size
        groups[f"{kind}: {held.made_by} {held.shape}"] += held.size
    for name, size in [*kinds.most_common(), ("--plan", total), *planned.items()]:
        note = f"  {total / first.peak - 1:+.1%}" if name == "--plan" else ""
        print(f"{name:>40}: {size / 1e9:7.2f} GB{note}")
    print("peaks: " + ", ".join(f"{phase} {n / 1e9:.2f}" for phase, n in first.phases.items()))
    for name, size in groups.most_common(detail):
        print(f"{size / 1e9:11.2f} GB  {name}")
    return {
        "shape": shape, "offload": offload, "train_embeddings": rows,
        "traced_gb": first.peak / 1e9, "plan_gb": total / 1e9, "moment": first.moment,
        "at_the_peak_gb": {name: size / 1e9 for name, size in kinds.most_common()}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", nargs="+", help="batch x tokens; none: the table, recorded")
    parser.add_argument("--embeddings", nargs="+", default=["new"], choices=["new", "all", "none"])
    parser.add_argument("--offload", action="store_true", help="checkpoints in the host's memory")
    parser.add_argument("--detail", type=int, default=0, help="so many of the largest tensors")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="of train_pt.py")
    given = parser.parse_args()
    for shape in given.shapes or ():
        for rows in given.embeddings:
            measured(shape, rows, given.offload, given.detail, given.options)
    if given.shapes:
        return
    commit = ["git", "rev-parse", "--short", "HEAD"]
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    record = {
        "commit": subprocess.check_output(commit, cwd=ROOT, text=True).strip(),
        "command": "python benchmarks/bench_plan.py", "date": date.today().isoformat(),
        "versions": {"python": platform.python_version()} | {n: version(n) for n in packages},
        "hardware": "none: tensors without memory, in the shapes of Llama 2 7B", "seed": SEED,
        "results": [
            measured(f"8x{length}", "new", offload, 0, [])
            for offload, lengths in LENGTHS.items() for length in lengths]}
    RESULTS.write_text(json.dumps({"results": {"memory": record}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
