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
from train_support import TINY, metrics, same, weights

import train_pt

pytest_plugins = ["train_support"]
torch.set_num_threads(1)

# The file that README.md gives.
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
import sys
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
    parts = {{type(p).__name__ for p in self.model.parameters()}}
    print("parameters of the model:", *parts)
    log(self, *args, **kwargs)

log, train_pt.PackedTraining.log = train_pt.PackedTraining.log, show
AcceleratorState.__init__ = sharded
train_pt.main(sys.argv[1:])
"""


def launch(words: list[str]) -> subprocess.CompletedProcess:
    Path("fsdp.yaml").write_text(CONFIG)
    Path("on_cpus.py").write_text(ON_CPUS)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "fsdp.yaml"]
    batch = ["--per_device_train_batch_size", "1", "--ddp_backend", "gloo"]
    return subprocess.run(
        [*launcher, "--main_process_port", "0", "on_cpus.py", *words, *batch],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)


def sharded(words: list[str]) -> str:
    done = launch(words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parameters of the model: DTensor\n" in done.stdout, "not everything is sharded"
    return done.stdout


def test_the_configuration_is_that_of_the_readme():
    given = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert set(given) <= {CONFIG}


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
def test_the_parts_train_as_one_process_does_with_the_same_global_batch(quantization, command):
    options = ["--max_steps", "5", "--quantization", quantization, "--bf16", "false"]
    options += ["--base_vocab_size", "801"]  # rows that two processes cannot share evenly
    train_pt.main(command(*options, name="one"))
    sharded(command(*options, name="parts"))
    assert losses("parts", "loss") == pytest.approx(losses("one", "loss"), rel=1e-4)
    assert losses("parts", "eval_loss") == pytest.approx(losses("one", "eval_loss"), rel=1e-4)
    one, parts = weights("one"), weights("parts")
    assert one.keys() == parts.keys()
    for key in one:
        assert (one[key] - parts[key]).abs().max() <= 0.01 * one[key].abs().max(), key
    assert (logits("one") - logits("parts")).abs().max() <= 0.01 * logits("one").abs().max()


def test_a_stopped_run_goes_on_to_the_same_weights_bit_for_bit(command):
    options = ["--lora_dropout", "0.3", "--activation_checkpointing", "true"]
    words = command(*options, "--max_steps", "8", "--save_total_limit", "5")
    sharded(words)
    # As a kill after step 5 leaves it.
    shutil.copytree("pt", "whole")
    shutil.rmtree("pt/checkpoint-8")
    Path("pt/adapter_model.safetensors").unlink()
    record = json.loads(Path("pt/run.json").read_text()) | {"results": None}
    Path("pt/run.json").write_text(json.dumps(record))
    sharded(words)
    assert same(weights("pt"), weights("whole"))
    assert losses("pt", "loss") == losses("whole", "loss")
    assert losses("pt", "eval_loss") == losses("whole", "eval_loss")


@pytest.mark.parametrize(
    ("environment", "options", "reason"),
    [
        ({"FSDP_VERSION": "1"}, [], "fsdp_version 1: expected 2"),
        ({"FSDP_VERSION": "2"}, ["--optim", "adamw_8bit"], "--optim adamw_8bit: "),
    ],
)
def test_what_cannot_be_sharded_is_refused(environment, options, reason, monkeypatch, capsys):
    for name, value in (environment | {"ACCELERATE_USE_FSDP": "true"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        train_pt.parse_args(options)
    assert stopped.value.code == 2
    assert reason in capsys.readouterr().err.strip().splitlines()[-1]
