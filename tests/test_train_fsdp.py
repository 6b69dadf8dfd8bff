"""FSDP through `accelerate launch` on two processes: the parts train as the whole does."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from train_support import TINY, metrics, same, short_run, weights

import train_pt

pytest_plugins = ["train_support"]
torch.set_num_threads(1)

# The file that docs/clusters.md gives.
CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_machines: 1
num_processes: 2
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_cpu_ram_efficient_loading: false
"""

# Accelerate knows FSDP on accelerators alone: here two CPUs say that they are such.
ON_CPUS = f"""\
import json, os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from accelerate.state import AcceleratorState, DistributedType, PartialState
import train_pt

first = AcceleratorState.__init__

def sharded(self, *args, fsdp_plugin=None, **kwargs):
    first(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP

def show(self, *args, **kwargs):
    parts = " ".join({{type(p).__name__ for p in self.model.parameters()}})
    os.write(1, f"parameters of {{self.args.output_dir}}: {{parts}}\\n".encode())  # in one piece
    log(self, *args, **kwargs)

def signalled(self, *args, **kwargs):  # between the batches of the fourth step
    loss = step(self, *args, **kwargs)
    if self.state.global_step == 3 and self.args.process_index == 0 and not self.signals:
        os.kill(os.getpid(), signal.SIGTERM)
    return loss

if "STOP" in os.environ:
    step, train_pt.PackedTraining.training_step = train_pt.PackedTraining.training_step, signalled
log, train_pt.PackedTraining.log = train_pt.PackedTraining.log, show
AcceleratorState.__init__ = sharded
for words in json.loads(sys.argv[1]):
    train_pt.main(words)
    AcceleratorState._reset_state()
"""


def train_sharded(folder: Path, *runs: list[str], stop: bool = False) -> None:
    """One launch on two processes for all runs: it takes longer than they do."""
    (folder / "fsdp.yaml").write_text(CONFIG)
    (folder / "on_cpus.py").write_text(ON_CPUS)
    batch = ["--per_device_train_batch_size", "1", "--ddp_backend", "gloo"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "fsdp.yaml"]
    launcher += ["--main_process_port", "0", "on_cpus.py"]
    done = subprocess.run(
        [*launcher, json.dumps([words + batch for words in runs])], cwd=folder,
        capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | ({"STOP": "1"} if stop else {}))
    assert bool(done.returncode) == stop, done.stdout + done.stderr
    for words in runs:
        name = words[words.index("--output_dir") + 1]
        assert f"parameters of {name}: DTensor\n" in done.stdout, "not everything is sharded"


# Rows that two processes cannot share evenly.
BRIEF = ["--max_steps", "5", "--bf16", "false", "--base_vocab_size", "801"]
RUNS = {
    "none": [*BRIEF, "--quantization", "none", "--probes", "true"],
    "nf4": [*BRIEF, "--quantization", "nf4"],
    "whole": ["--max_steps", "8", "--save_total_limit", "5", "--lora_dropout", "0.3",
              "--activation_checkpointing", "true"],
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(text, tmp_path_factory) -> Path:
    """The folder of all RUNS, trained on two processes."""
    folder = tmp_path_factory.mktemp("parts")
    train_sharded(folder, *(short_run(text, *RUNS[name], name=name) for name in RUNS))
    return folder


def test_the_configuration_is_that_of_the_docs():
    page = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    assert set(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)) == {CONFIG}


def losses(name: str, key: str) -> list[float]:
    return [row[key] for row in metrics(name) if key in row]


def logits(name: str) -> torch.Tensor:
    """What stock PEFT makes of a saved adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(base, name).eval()(torch.arange(0, 1000, 9)[None]).logits


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_parts_train_as_one_process_does_with_the_same_global_batch(
    quantization, parts, command
):
    train_pt.main(command(*RUNS[quantization], name="one"))
    folder = str(parts / quantization)
    assert losses(folder, "loss") == pytest.approx(losses("one", "loss"), rel=1e-4)
    assert losses(folder, "eval_loss") == pytest.approx(losses("one", "eval_loss"), rel=1e-4)
    probed = "eval_taiwan_wording"
    assert losses(folder, probed) == pytest.approx(losses("one", probed), abs=0.01)
    assert bool(losses(folder, probed)) == (quantization == "none")
    one, sharded = weights("one"), weights(folder)
    assert one.keys() == sharded.keys()
    for key in one:
        assert (one[key] - sharded[key]).abs().max() <= 0.01 * one[key].abs().max(), key
    assert (logits("one") - logits(folder)).abs().max() <= 0.01 * logits("one").abs().max()


def test_a_stopped_run_goes_on_to_the_same_weights_bit_for_bit(parts, command):
    whole = str(parts / "whole")
    # As a kill after step 5 leaves it.
    shutil.copytree(whole, "pt")
    shutil.rmtree("pt/checkpoint-8")
    Path("pt/adapter_model.safetensors").unlink()
    record = json.loads(Path("pt/run.json").read_text()) | {"results": None}
    Path("pt/run.json").write_text(json.dumps(record))
    train_sharded(Path(), command(*RUNS["whole"]))
    assert same(weights("pt"), weights(whole))
    assert losses("pt", "loss") == losses(whole, "loss")
    assert losses("pt", "eval_loss") == losses(whole, "eval_loss")


def test_a_signal_between_the_batches_of_a_step_saves_the_step_before(parts, command):
    train_sharded(Path(), command(*RUNS["whole"]), stop=True)
    assert [p.name for p in train_pt.checkpoints(Path("pt"))] == ["checkpoint-3"]
    train_sharded(Path(), command(*RUNS["whole"]))
    assert same(weights("pt"), weights(str(parts / "whole")))


@pytest.mark.parametrize(
    ("environment", "options", "reason"),
    [
        ({"FSDP_VERSION": "1"}, [], "fsdp_version 1: expected 2"),
        ({"FSDP_VERSION": "2"}, ["--optim", "adamw_8bit"], "--optim adamw_8bit: "),
    ],
)
def test_what_cannot_be_sharded_is_refused(environment, options, reason, monkeypatch):
    for name, value in (environment | {"ACCELERATE_USE_FSDP": "true"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(train_pt.UserError, match=reason):
        train_pt.parse_args(options)
