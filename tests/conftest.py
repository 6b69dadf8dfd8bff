"""What every test file may ask for: the scripts as programs, and real material where it is at hand."""

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
            pytest.fail(f"{' '.join(command)}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    return run
