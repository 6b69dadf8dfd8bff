"""What every test file may ask for: the scripts as programs, real material, the demo's outputs."""

import json
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Files of minutes begin first, so that no worker is left alone with one at the end.
LONGEST = (
    "test_notebook.py", "test_train_resume.py", "test_pipeline.py", "test_train_fsdp.py",
    "test_merge_lora.py", "test_train_hands.py", "test_errors.py", "test_filter_cc.py",
    "test_extend_vocab.py", "test_train_run.py", "test_gguf.py")


def pytest_collection_modifyitems(items: list) -> None:
    order = {name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


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


class HubAnswers(BaseHTTPRequestHandler):
    """What stand-ins for the hub's HTTP API have in common."""

    def log_message(self, *args):
        pass

    def answer(self, body: object = None, status: int = 200, headers: dict | None = None) -> None:
        """Send bytes as they are, anything else as JSON; nothing: an empty object."""
        body = {} if body is None else body
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serving(answers: type[HubAnswers]) -> Iterator[ThreadingHTTPServer]:
    """A server on a free port of this machine, while the test runs."""
    with ThreadingHTTPServer(("127.0.0.1", 0), answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
