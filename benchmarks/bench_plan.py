"""Memory and time of train_pt.py on a GPU, from a trace without one.

    python benchmarks/bench_plan.py                   # the README's tables, minutes
    python benchmarks/bench_plan.py --only traffic    # what a step computes and moves, and how long
    python benchmarks/bench_plan.py --only before     # the same, recorded as what was before
    python benchmarks/bench_plan.py --shapes 8x1024 1x8192 --embeddings new all none
    python benchmarks/bench_plan.py --shapes 8x2048 --offload --detail 10  # the largest tensors
    python benchmarks/bench_plan.py --shapes 8x2048 --options --lora_rank 64  # any of train_pt.py's

The real code trains Llama 2 7B's shapes with 61,388 pieces, two steps of two batches, under
FakeTensorMode: tensors have shapes and types and no memory. So build_model's modules, PEFT, the
Trainer's step, Transformers' checkpointing, bitsandbytes' NF4 layers and 8-bit Adam, and
varlen_attn all run. The tensors say that they are on the CPU, for PyTorch built without CUDA
differentiates no others; what would then go another way than on a GPU is set right in like_a_gpu.

memory   Storages are followed from birth to death, rounded up to 512 bytes as PyTorch's allocator
         does. What kernels take besides their outputs is added from their sources (WORKSPACE).
         The peak stands beside what --plan predicts.
traffic  Every kernel of a step: its flops and its bytes (inputs read, outputs written; views are
         free), by kind. Seconds on a card: for each kernel the larger of flops by its rate and
         bytes by its bandwidth (CARDS, SHARES). Liger's kernels count as one read of each input
         and one write of each output. Every layer costs the same, so models of one and two layers
         say what 32 take. benchmarks/results/gpu.json holds what an H200 took for the same.

Not counted: CUDA's context, fragmentation, cuBLAS's workspace (8.5 MB; 32 MiB on Hopper). This is
no measurement on a GPU: bench_gpu.py makes that. Results: benchmarks/results/plan.json.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple
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
from transformers.models.llama import modeling_llama

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
SHAPE, REAL_BATCHES, REAL_STEPS = (8, 2048), 4, 8712  # the card's
VARIANTS = {
    "S²": {}, "full attention": {"full": True}, "S², without Liger": {"with_liger": False}}
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
    """One storage: its bytes and where it was made."""

    size: int
    number: int  # of the operation that made it
    made_by: str
    phase: str
    shape: tuple


class Account(TorchDispatchMode):
    """Watch every operation of a training run."""

    phase = "build"

    def begin(self, model, trainer, args) -> None:
        """Note that the model is built."""

    def begin_batch(self, step: int, batch: dict) -> None:
        """Note that this batch, which has content, goes into the model next."""

    def fused(self, name: str, tensors: list[torch.Tensor]) -> None:
        """Count a kernel that PyTorch does not see; it reads and writes these tensors."""


class Memory(Account):
    """Track every storage; at operation number `stop` record which are alive."""

    def __init__(self, stop: int | None):
        super().__init__()
        self.stop, self.operations, self.live, self.peak = stop, 0, 0, 0
        self.storages, self.phases = WeakIdKeyDictionary(), Counter()

    def begin(self, model, trainer, args) -> None:
        def mark(layer, inputs):
            self.storages[inputs[0].untyped_storage()].phase = KEPT

        for layer in model.base_model.model.model.layers:
            layer.register_forward_pre_hook(mark)
        self.lasting = lambda: lasting(model, trainer.optimizer.optimizer)
        self.peak, self.args = 0, args

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
        """Autograd adds the second of two gradients in place to the one without another owner
        (input_buffer.cpp). It does not do so for fake tensors, so free the second one here."""
        blocks = [self.storages.get(tensor.untyped_storage()) for tensor in addends]
        self.drop(max(filter(None, blocks), key=lambda block: block.number))


def is_forward() -> bool:
    """Whether the model's code is running. In the backward pass it runs to recompute a layer."""
    frame = sys._getframe(1)
    while frame and "modeling_llama" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None


def lasting(model, optimizer) -> dict[int, str]:
    """Return the purpose of each storage that outlives a batch."""
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


# --- What kernels compute and move ----------------------------------------------------------------

PRODUCTS, UNALIGNED, ATTENTION = "matrix products", "matrix products, unaligned", "attention"
DEQUANTISE, OPTIMIZER = "dequantisation", "clipping and optimizer"
ELEMENTWISE, COPIES, REDUCTIONS = "element-wise", "copies", "reductions"
OVERHEAD = (ELEMENTWISE, COPIES, REDUCTIONS)
KINDS = (PRODUCTS, UNALIGNED, ATTENTION, DEQUANTISE, ELEMENTWISE, COPIES, REDUCTIONS, OPTIMIZER)
# PFLOP/s of products in bfloat16, TB/s, and SMs x GHz. Assumed, not measured: the H200's are 0.81
# and 0.875 of its public figures, and so are the H100's and A100's of theirs; an A10's products
# reach little more than half of its figure, a 4090's nearly all. SMs x GHz are public figures.
CARDS = {
    "a10": (0.07, 0.6, 72 * 1.695), "4090": (0.16, 1.0, 128 * 2.52),
    "a100": (0.25, 1.78, 108 * 1.41), "h100": (0.8, 2.93, 132 * 1.98),
    "h200": (0.8, 4.2, 132 * 1.98)}
# The share of a card's rate that a training step reaches: fitted to gpu.json's kernels on the H200.
# Its variants there (full attention, one-kernel norm, Liger) were not fitted, and are the check.
# Products whose rows are no multiple of 16 bytes run as kernels of an older kind.
SHARES = {PRODUCTS: 0.86, UNALIGNED: 0.28, ATTENTION: 0.25, DEQUANTISE: 0.45}
STREAMED = 0.88  # of the bandwidth, where a kernel's operands all lie alike
# A kernel whose operands lie differently computes an address for each number: TB/s for an SM x GHz.
INDEXED = 1.4 / CARDS["h200"][2]
SYNCHRONIZED = 0.12e-3  # seconds; bitsandbytes waits for the GPU after each parameter's update
TILE = 128  # rows of a tile of flash attention


class Kernel(NamedTuple):
    """A kernel: its kind, flops and bytes, and whether its operands have the same layout."""

    kind: str
    name: str
    flops: float
    bytes: float
    indexed: bool = False

    def seconds(self, card: str) -> float:
        products, bandwidth, processors = CARDS[card]
        if self.kind == OPTIMIZER and "optimizer_update" in self.name:
            return SYNCHRONIZED
        streamed = 1e12 * bandwidth * (SHARES[DEQUANTISE] if self.kind == DEQUANTISE else STREAMED)
        speed = min(streamed, 1e12 * INDEXED * processors) if self.indexed else streamed
        flops = self.flops / (1e15 * products * SHARES.get(self.kind, 1))
        return max(flops, self.bytes / speed)


def size(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements. An expanded dimension counts as one element."""
    numbers = [n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step]
    return math.prod(numbers) * tensor.itemsize


def lie_alike(tensors: list[torch.Tensor]) -> bool:
    """Whether the tensors have the same shape and strides, without gaps, so that one index serves
    all of them. A single number is held in a register."""
    large = [t for t in tensors if t.numel() > 1]
    forms = {(t.shape, t.stride()) for t in large}
    spans = (sum((n - 1) * step for n, step in zip(*form, strict=True)) + 1 for form in forms)
    return len(forms) < 2 and all(span == large[0].numel() for span in spans)


def product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, name: str, *more) -> Kernel:
    """(M, K) times (K, N)."""
    rows = [max(t.stride()) * t.itemsize for t in (x, weight, out)]
    kind = UNALIGNED if any(row % 16 for row in rows) else PRODUCTS
    moved = sum(map(size, (x, weight, out, *more)))
    return Kernel(kind, name, 2 * out.numel() * x.shape[-1], moved)


def product_4bit(x, packed, *scales, shape, out) -> list[Kernel]:
    """bitsandbytes' product above 1,536 rows (see gemm_4bit): scales, weight, product."""
    numbers, rows = math.prod(shape), out.numel() // shape[0]
    wide, whole = numbers // 64 * 4, numbers * x.itemsize
    return [
        Kernel(DEQUANTISE, "dequantize_blockwise", 0, sum(map(size, scales)) + wide),
        Kernel(ELEMENTWISE, "add_", 0, 2 * wide),
        Kernel(DEQUANTISE, "dequantize_4bit", 0, size(packed) + wide + whole),
        Kernel(PRODUCTS, "mm", 2 * rows * numbers, size(x) + whole + size(out))]


FREE = {"_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided", "promote_types"}
COPYING = {"_to_copy", "clone", "copy_", "cat", "slice_backward", "stack", "index_select"}
REDUCING = {"sum", "mean", "amax", "linalg_vector_norm"}
OPERATOR = {  # as the profiler names them on a GPU
    "mm": "aten::mm", "addmm": "aten::mm", "mul": "aten::mul", "pow": "aten::pow",
    "add": "aten::add", "add_": "aten::add", "_to_copy": "aten::copy_", "clone": "aten::copy_",
    "copy_": "aten::copy_", "cat": "aten::cat", "neg": "aten::neg", "mean": "aten::mean",
    "_varlen_attn": "aten::_flash_attention_forward",
    "_varlen_attn_backward": "aten::_flash_attention_backward",
    "dequantize_4bit": "dequantize", "dequantize_blockwise": "dequantize",
    "optimizer_update_8bit_blockwise": "optimizer"}
OVERWRITING = {  # does not read its first argument
    "copy_", "fill_", "zero_", "zeros_like", "ones_like", "full_like", "new_zeros", "new_full"}
LOOKING_UP = {"embedding", "gather", "index_select"}  # reads no more of the table than it writes


class Traffic(Account):
    """Counts the kernels of the last optimizer step."""

    def __init__(self):
        super().__init__()
        self.kernels, self.step, self.pairs = Counter(), 0, {}

    def begin_batch(self, step: int, batch: dict) -> None:
        if step != self.step:
            self.kernels.clear()
        self.step = step
        for cuts in batch["cuts"].values():  # flash attention works in whole tiles
            with _disable_current_modes():
                tiles = (cuts["bounds"].long().diff() + TILE - 1) // TILE
                pairs = int((tiles * (tiles + 1) // 2).sum()) * TILE**2
            self.pairs[len(cuts["bounds"]), cuts["longest"]] = pairs

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if self.phase != "build":
            self.kernels.update(self.launched(operation, args, kwargs or {}, result))
        return result

    def fused(self, name: str, tensors: list[torch.Tensor]) -> None:
        self.kernels[Kernel(ELEMENTWISE, f"one kernel: {name}", 0, sum(map(size, tensors)))] += 1

    def launched(self, operation, args, kwargs, result) -> Iterator[Kernel]:
        """The kernels of an operation on a GPU."""
        space, _, name = operation.name().partition("::")
        name = name.partition(".")[0]
        if space in ("prim", "profiler") or name in FREE or operation.is_view:
            return
        inputs = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        inputs = inputs[name in OVERWRITING :]
        outputs = [x for x in tree_leaves(result) if torch.is_tensor(x)]
        if result is None:  # it writes into its arguments
            written = zip(operation._schema.arguments, args, strict=False)
            written = [x for form, x in written if form.alias_info and form.alias_info.is_write]
            outputs = [x for x in tree_leaves(written) if torch.is_tensor(x)]
        moved = sum(map(size, inputs + outputs))
        if name in LOOKING_UP:
            moved = 2 * size(outputs[0])
        elif name == "scatter_add_":
            moved = 3 * size(kwargs["src"] if "src" in kwargs else args[3])
        if name == "gemm_4bit":
            yield from product_4bit(*inputs, shape=args[2], out=outputs[0])
        elif name in ("mm", "addmm", "addmm_"):
            *more, x, weight = inputs
            yield product(x, weight, outputs[0], name, *more)
        elif name.startswith("dequantize"):
            yield Kernel(DEQUANTISE, name, 0, moved)
        elif name == "_varlen_attn":
            yield Kernel(ATTENTION, name, self.attention(args[0], args[3], args[5]), moved)
        elif name == "_varlen_attn_backward":  # five products instead of two
            yield Kernel(ATTENTION, name, 2.5 * self.attention(args[1], args[6], args[8]), moved)
        elif self.phase == "optimizer":
            yield Kernel(OPTIMIZER, name, 0, moved)
        elif name in REDUCING:
            yield Kernel(REDUCTIONS, name, 0, moved)
        else:
            kind = COPIES if name in COPYING else ELEMENTWISE
            yield Kernel(kind, name, 0, moved, not lie_alike(inputs + outputs))

    def attention(self, query: torch.Tensor, bounds: torch.Tensor, longest: int) -> float:
        """Flops of both products; query (tokens, heads, D)."""
        return 4 * self.pairs[len(bounds), longest] * math.prod(query.shape[1:])


# --- Kernels that take the place of several -------------------------------------------------------


def one_kernel(account: Account, name: str, kept: slice, forward, backward):
    """An autograd function that is one kernel each way, and which of its inputs it keeps."""

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs[kept])
            ctx.others = [None] * (len(inputs) - 2)
            made = forward(*inputs)
            account.fused(name, [*inputs, *made])
            return made[0] if len(made) == 1 else tuple(made)

        @staticmethod
        def backward(ctx, *gradients):
            saved = ctx.saved_tensors
            made = backward(gradients, saved)
            account.fused(name, [*gradients, *saved, *made])
            return *made, *ctx.others

    return lambda *inputs: Fused.apply(*inputs)


def liger(account: Account) -> dict[str, ModuleType]:
    """Modules in the place of Liger's. As in Liger's own, rope writes over its inputs, SwiGLU's
    backward pass over gate and up, the norm's over the gradient."""
    def turn(x):  # its rope works on (B, T, H, D)
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    norm = one_kernel(
        account, "norm", slice(2), lambda x, weight: [torch.empty_like(x)],
        lambda gradients, saved: [*gradients, torch.empty_like(saved[1])])
    swiglu = one_kernel(
        account, "SwiGLU", slice(2), lambda gate, up: [torch.empty_like(gate)],
        lambda gradients, saved: [x.view_as(x) for x in saved])
    rope = one_kernel(
        account, "rope", slice(2, 4), lambda q, k, cos, sin: [x.view_as(x) for x in (q, k)],
        lambda gradients, saved: [turn(x) for x in gradients])
    names = "liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.functional"
    modules = {name: ModuleType(name) for name in names}
    vars(modules[names[-1]]).update(
        liger_rms_norm=lambda x, weight, eps: norm(x, weight), liger_rope=rope,
        liger_swiglu=swiglu)
    return modules


# --- A GPU that is not there ----------------------------------------------------------------------


class HostMemory(torch.autograd.graph.saved_tensors_hooks):
    """save_on_cpu: what is saved leaves the device, and comes back as a new tensor."""

    def __init__(self, *args, **kwargs):
        super().__init__(
            lambda x: (x.shape, x.stride(), x.dtype),
            lambda saved: torch.empty_strided(saved[0], saved[1], dtype=saved[2]))


def like_a_gpu(stack: ExitStack) -> None:
    """Patch what takes another path on a CPU, or fails on tensors without content."""
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


def base_model(dtype: torch.dtype, nf4: bool, layers: int):
    """What AutoModelForCausalLM.from_pretrained gives build_model, without content."""
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers import AutoHfQuantizer

    sizes = SIZES | {"num_hidden_layers": layers}
    config = LlamaConfig(**sizes, attn_implementation="s2", dtype=dtype)
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


def trace(
    words: list[str], account: Account, layers: int = SIZES["num_hidden_layers"],
    accumulated: int = ACCUMULATED, full: bool = False, with_liger: bool = True,
) -> Account:
    """Build the model and train it for STEPS steps of `accumulated` batches. `full`: attention
    within whole documents instead of S²; `with_liger`: as where liger-kernel is installed."""
    from transformers import Trainer

    args, training = script.parse_args(words)
    data = batches(args, training.per_device_train_batch_size)
    with ExitStack() as stack:
        mode = stack.enter_context(FakeTensorMode())
        like_a_gpu(stack)
        args.use_liger_kernel = with_liger  # parse_args wants a GPU
        stack.enter_context(mock.patch.dict(sys.modules, liger(account)))
        rope = modeling_llama.apply_rotary_pos_emb  # build_model may put Liger's in its place
        stack.enter_context(mock.patch.object(modeling_llama, rope.__name__, rope))
        stack.enter_context(account)
        dtype, nf4 = torch.bfloat16 if training.bf16 else torch.float32, args.quantization == "nf4"
        load = "transformers.AutoModelForCausalLM.from_pretrained"
        with mock.patch(load, lambda *a, **k: base_model(dtype, nf4, layers)):
            model, _ = script.build_model(args, training, Path(), LLAMA_2_PIECES)
        llama = model.base_model.model
        if full:
            llama.config.group_size = None
        options = json.loads(args.activation_checkpointing_kwargs or "{}")
        if options.get("offload"):  # build_model wants a GPU
            llama.activation_checkpointing_enable({"use_reentrant": False}, offload=True)
        report = SimpleNamespace(args=args)
        trainer = script.build_trainer(training, model, [0], None, report)
        prepared, _ = trainer._prepare_for_training(STEPS, None, None)
        account.begin(model, trainer, args)

        def enter(phase, function):
            def inside(*args, **kwargs):
                account.phase = phase
                return function(*args, **kwargs)
            return inside

        llama.loss_function = enter("loss", llama.loss_function)
        backward = enter("backward", torch.Tensor.backward)
        stack.enter_context(mock.patch.object(torch.Tensor, "backward", backward))
        trainer.current_gradient_accumulation_steps = accumulated
        for step in range(STEPS):
            for i in range(accumulated):
                batch = data[step * ACCUMULATED + i]
                account.begin_batch(step, batch)
                account.phase = "forward"
                inputs = faked(batch, mode)
                items = inputs["labels"].ne(script.IGNORED).sum()
                Trainer.training_step(trainer, prepared, inputs, items)  # ours looks at the loss
                del inputs
            account.phase = "optimizer"
            trainer._clip_grad_norm(prepared)
            trainer.optimizer.step()
            prepared.zero_grad()
    return account


def command_words(batch: int, block: int, rows: str = "new", offload: bool = False) -> list[str]:
    """The options of train_pt.py for a shape."""
    words = {
        "block_size": block, "per_device_train_batch_size": batch, "optim": "adamw_8bit",
        "gradient_accumulation_steps": ACCUMULATED, "train_embeddings": rows,
        "activation_checkpointing": "true",
        "activation_checkpointing_kwargs": json.dumps({"offload": offload})}
    return [str(word) for name, value in words.items() for word in (f"--{name}", value)]


def measured(shape: str, rows: str, offload: bool, detail: int, options: list[str]) -> dict:
    """Trace one shape as where liger-kernel is installed, and again to see what lives at the peak;
    then without it. Print it."""
    batch, block = map(int, shape.split("x"))
    words = command_words(batch, block, rows, offload) + options
    first = trace(words, Memory(None))
    second = trace(words, Memory(first.peak_at))
    assert second.peak_at == first.peak_at, "two traces of the same differ"
    without = trace(words, Memory(None), with_liger=False)
    config = SimpleNamespace(**SIZES)
    planned, other = (
        script.memory_items(config, account.args, LLAMA_2_PIECES, batch, block)
        for account in (first, without))
    total, total_without = sum(planned.values()), sum(other.values())
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
    off = f"{total_without / without.peak - 1:+.1%}; the peak is in {without.moment}"
    print(f"without Liger: {without.peak / 1e9:.2f} GB, --plan {total_without / 1e9:.2f} GB {off}")
    print("peaks: " + ", ".join(f"{phase} {n / 1e9:.2f}" for phase, n in first.phases.items()))
    for name, size in groups.most_common(detail):
        print(f"{size / 1e9:11.2f} GB  {name}")
    return {
        "shape": shape, "offload": offload, "train_embeddings": rows,
        "traced_gb": first.peak / 1e9, "plan_gb": total / 1e9, "moment": first.moment,
        "without_liger_gb": without.peak / 1e9, "plan_without_liger_gb": total_without / 1e9,
        "at_the_peak_gb": {name: size / 1e9 for name, size in kinds.most_common()}}


def step(words: list[str], accumulated: int, **options) -> Counter:
    """The kernels of an optimizer step of all layers."""
    one, two = (trace(words, Traffic(), n, accumulated, **options).kernels for n in (1, 2))
    layer = Counter(two)
    layer.subtract(one)
    for kernel, count in layer.items():
        one[kernel] += (SIZES["num_hidden_layers"] - 1) * count
    return one


def seconds(kernels: Counter, card: str) -> float:
    return sum(kernel.seconds(card) * count for kernel, count in kernels.items())


def moved(variant: str, options: dict) -> dict:
    """Account for a step of one batch, and from it and one of two for a step of the real run."""
    words, tokens = command_words(*SHAPE), SHAPE[0] * SHAPE[1]
    once, twice = (step(words, n, **options) for n in (1, 2))
    row = {"variant": variant, "shape": "{}x{}".format(*SHAPE), "kinds": {}, "cards": {}}
    for kind in KINDS:
        mine = Counter({kernel: n for kernel, n in once.items() if kernel.kind == kind})
        row["kinds"][kind] = {
            "launches": sum(mine.values()),
            "tflop": sum(k.flops * n for k, n in mine.items()) / 1e12,
            "gb": sum(k.bytes * n for k, n in mine.items()) / 1e9,
            "seconds": {card: seconds(mine, card) for card in CARDS}}
    for card in CARDS:
        batch = seconds(twice, card) - seconds(once, card)  # adds to gradients that are there
        whole = seconds(once, card) + (REAL_BATCHES - 1) * batch
        row["cards"][card] = {
            "batch_tokens_per_second": tokens / seconds(once, card), "step_seconds": whole,
            "tokens_per_second": REAL_BATCHES * tokens / whole,
            "days": whole * REAL_STEPS / 86_400}
    row["overhead_gb"] = sum(row["kinds"][kind]["gb"] for kind in OVERHEAD)
    row["operators"] = Counter()
    for kernel, count in once.items():
        named = OPERATOR.get(kernel.name, kernel.name)
        row["operators"][named] += 1e3 * kernel.seconds("h200") * count
    row["operators"] = {name: n for name, n in row["operators"].most_common() if n > 10}
    return row


def beside_h200(rows: list[dict]) -> None:
    """Print what was predicted for the code that an H200 ran, beside what it took (gpu.json)."""
    gpu = json.loads(RESULTS.with_name("gpu.json").read_text())["results"]
    pairs = [
        (f"{took['operator']}, ms", took["milliseconds"], rows[0]["operators"][took["operator"]])
        for took in gpu["kernels"]["results"]]
    told = {(row["variant"], row["shape"]): row["cards"]["h200"] for row in rows}
    for took in gpu["variants"]["results"]:
        if card := told.get((took["variant"], f"{took['batch']}x{took['length']}")):
            speeds = took["tokens_per_second"], card["batch_tokens_per_second"]
            pairs.append((f"{took['variant']}, tokens/s", *speeds))
    print(f"\n{'the code before, on an H200':>44} measured predicted")
    for name, took, predicted in pairs:
        print(f"{name:>44} {took:8,.0f} {predicted:9,.0f} {predicted / took - 1:+7.0%}")


def show(row: dict, before: dict | None) -> None:
    """Print a row, beside the same of before."""
    print(f"\n{row['shape']}, {row['variant']}")
    print(f"{'':>28} launches     TFLOP        GB  before   ratio" + "".join(
        f"{card + ' s':>9}" for card in CARDS))
    for kind, figures in row["kinds"].items():
        gb = before["kinds"][kind]["gb"] if before else math.nan
        print(f"{kind:>28} {figures['launches']:8,} {figures['tflop']:9.1f} {figures['gb']:9.1f}"
              f"{gb:9.1f} {figures['gb'] / gb if gb else math.nan:6.2f}" + "".join(
                  f"{n:9.3f}" for n in figures["seconds"].values()))
    for name, unit in (("batch_tokens_per_second", "tokens/s, a batch a step"),
                       ("tokens_per_second", f"tokens/s, {REAL_BATCHES} batches a step"),
                       ("step_seconds", "seconds of such a step"),
                       ("days", f"days for {REAL_STEPS:,} of them")):
        print(f"{unit:>70}" + "".join(f"{row['cards'][c][name]:9,.5g}" for c in CARDS))
    if before:
        ratio = row["overhead_gb"] / before["overhead_gb"]
        print(f"{' + '.join(OVERHEAD)}: {row['overhead_gb']:,.0f} GB, {ratio:.2f} x before")


def recorded(table: str, commit: str, rows: list[dict]) -> None:
    """Write a table with its stamp, keeping the others."""
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    stamp = {
        "commit": commit,
        "command": f"python benchmarks/bench_plan.py --only {table}",
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version()} | {n: version(n) for n in packages},
        "hardware": "none: tensors without memory, in the shapes of Llama 2 7B", "seed": SEED,
        "results": rows}
    whole = json.loads(RESULTS.read_text())
    whole["results"][table] = stamp
    RESULTS.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")


def traffic(before: list[dict]) -> list[dict]:
    """Account for each variant; print it beside the one of before with the same attention."""
    rows = []
    for variant, options in VARIANTS.items():
        rows.append(moved(variant, options))
        same = (row for row in before if row["variant"] == variant.split(",")[0])
        show(rows[-1], next(same, None))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=["memory", "traffic", "before"])
    parser.add_argument("--shapes", nargs="+", help="memory of these batch x tokens; not recorded")
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
    words = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.check_output(words, cwd=ROOT, text=True).strip()  # it may move meanwhile
    if given.only in (None, "memory"):
        rows = [
            measured(f"8x{length}", "new", offload, 0, [])
            for offload, lengths in LENGTHS.items() for length in lengths]
        recorded("memory", commit, rows)
    if given.only != "memory":
        before = json.loads(RESULTS.read_text())["results"]["before"]["results"]
        recorded(given.only or "traffic", commit, traffic(before))
        beside_h200(before)


if __name__ == "__main__":
    main()
