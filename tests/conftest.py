"""What every test file may ask for: the scripts as programs, real material, the demo's outputs."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real material beside the repository; tests that ask for it skip without it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real material: {folder} is missing")
    return folder


@pytest.fixture(scope="session")
def run_script() -> Callable[..., subprocess.CompletedProcess]:
    """Run a script of the repository as its user does; a failure shows what it printed."""

    def run(name: str, *args: object, cwd: Path = ROOT, check: bool = True, **kwargs):
        command = [sys.executable, str(ROOT / name), *map(str, args)]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, **kwargs)
        if check and done.returncode:
            pytest.fail(
                f"{' '.join(command)}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}"
            )
        return done

    return run


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, run_script: Callable) -> Path:
    """The folder that `make demo` leaves, from the commands that it would type, trained briefly."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "data").mkdir()
    (folder / "data" / "sample").symlink_to(ROOT / "data" / "sample")
    printed = subprocess.check_output(["make", "-n", "demo"], cwd=ROOT, text=True)
    commands = [line for line in printed.splitlines() if re.match(r"python \w+\.py", line)]
    assert len(commands) == 4, printed
    for command in commands:
        _, script, *options = shlex.split(command)
        options += ["--max_steps", "20"] if script == "train_pt.py" else []
        run_script(script, *options, cwd=folder)
    return folder
