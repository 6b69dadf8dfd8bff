"""What several benchmarks have in common: the stamp of a table, how one is kept, English pages."""

import gzip
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"


def stamp(
    script: str, packages: tuple[str, ...], seed: int | list[int], cores: str = "{} cores",
    gpu: str = "no GPU used",
) -> dict:
    """Where, when and how a table of benchmarks/<script>.py was measured; cores: how many of this
    machine's, {}."""
    commit = ["git", "rev-parse", "--short", "HEAD"]
    cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "commit": subprocess.check_output(commit, cwd=ROOT, text=True).strip(),
        "command": " ".join(["python", f"benchmarks/{script}.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version()} | {n: version(n) for n in packages},
        "hardware": f"{cpu[1] if cpu else platform.machine()}, {cores.format(os.cpu_count())}, "
        f"{memory:.0f} GB, {gpu}",
        "seed": seed}


def measure_table(path: Path, name: str, table: Callable[[], object], stamp: dict) -> None:
    """Measure a table and write it with its stamp, taken before; the others in the file stay."""
    print(f"--- {name}", flush=True)
    start = time.monotonic()
    measured = stamp | {"results": table(), "seconds": time.monotonic() - start}
    done = json.loads(path.read_text()) if path.is_file() else {"results": {}}
    done["results"][name] = measured
    path.write_text(json.dumps(done, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def english_pages() -> list[str]:
    """The pages of the labelled WET file whose label, the first path segment, is `en`."""
    records = gzip.decompress((DATA / "labelled.wet.gz").read_bytes()).split(b"WARC/1.0\r\n")
    parts = (record.partition(b"\r\n\r\n") for record in records)
    return [
        body.decode("utf-8", "replace") for head, _, body in parts
        if re.search(rb"WARC-Target-URI: https://[^/]+/en/", head)]
