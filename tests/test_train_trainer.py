"""What train_pt.py leans on in transformers.Trainer: public hooks, and two private methods."""

import ast
import inspect
import json
from pathlib import Path

from conftest import ROOT
from train_support import kill, killed_at
from transformers import Trainer, TrainerCallback

import train_pt

pytest_plugins = ["train_support"]
PRIVATE = {"_save_checkpoint", "_load_from_checkpoint"}


def test_two_private_methods_of_trainer_are_used_and_no_more():
    overridden = {name for name in vars(train_pt.PackedTraining) if hasattr(Trainer, name)}
    assert {name for name in overridden if name[0] == "_" and name[1] != "_"} == PRIVATE
    tree = ast.parse((ROOT / "train_pt.py").read_text())
    (cls,) = (n for n in tree.body if getattr(n, "name", "") == "PackedTraining")
    used = {n.attr for n in ast.walk(cls) if isinstance(n, ast.Attribute) and n.attr[0] == "_"}
    assert {name for name in used if hasattr(Trainer, name)} <= PRIVATE | {"__name__", "__module__"}


def test_trainer_still_has_what_is_overridden():
    """A method that Trainer has renamed would never run here."""
    ours = set(vars(train_pt.RunCallback)) - {"__init__"}
    assert {name for name in ours if name.startswith("on_")} <= set(vars(TrainerCallback))
    own = {"head", "report", "signals", "keep"}  # no name of ours shadows one of Trainer's
    assert not {name for name in own if hasattr(Trainer, name)}
    for name, parameters in {
        "_save_checkpoint": ["self", "model", "trial"],
        "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
        "save_model": ["self", "output_dir", "_internal_call"],
        "evaluate": ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
        "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    }.items():
        assert list(inspect.signature(getattr(Trainer, name)).parameters) == parameters
    train = inspect.getsource(Trainer)
    assert "self._save_checkpoint(model, trial)" in train
    assert "self._load_from_checkpoint(resume_from_checkpoint" in train


def test_a_checkpoint_counts_once_its_seal_is_there(command, monkeypatch, capsys):
    """Killed while it writes step 10: the folder is there, without run.json."""
    def killed_before_the_seal(folder, record):
        if folder.name == "checkpoint-10":
            kill()
        seal(folder, record)

    seal = train_pt.finalize_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(train_pt, "finalize_checkpoint", killed_before_the_seal)
        killed_at(patch, 12, command())  # it does not come so far
    unsealed = Path("pt/checkpoint-10")
    assert (unsealed / "optimizer.pt").is_file()
    assert [p.name for p in train_pt.checkpoints(Path("pt"))] == ["checkpoint-5"]
    (unsealed / "of the killed run").touch()
    train_pt.main(command())
    assert train_pt.is_whole(unsealed)
    sealed = json.loads((unsealed / "run.json").read_text())["files"]
    assert "of the killed run" not in sealed
    assert not (unsealed / "of the killed run").exists()
    assert "renamed" not in capsys.readouterr().out
