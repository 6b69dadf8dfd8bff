"""How fast filter_cc.py is, what its deduplication costs and how much of it scales.

    python benchmarks/bench_filter.py                # about ten minutes
    python benchmarks/bench_filter.py --only speed   # one table

speed    the first pass on one core against `igzip -dc` and against datatrove's WarcReader with the
         same verdicts, on a WET of which about 1% of the pages are good; two workers against one
memory   peak memory of a worker, input tenfold
dedup    time and memory for 100,000 and 400,000 generated pages; recall by Jaccard similarity

All figures of a table come from one run, side by side; ratios are what to read. The WET is mixed
from ../shared/data/labelled.wet.gz. Results go to benchmarks/results/filter.json.
"""

import argparse
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data" / "labelled.wet.gz"
RESULTS = ROOT / "benchmarks" / "results" / "filter.json"
WORK = ROOT / "outputs" / "bench_filter"
SEED = 0
sys.path.insert(0, str(ROOT))

import filter_cc as script  # noqa: E402

# --- Material ------------------------------------------------------------------------------------


def mixed_wet(path: Path, records: int) -> dict:
    """Write a WET whose pages are good in about 1 of 100 cases; return what is in it."""
    from isal import igzip

    data = DATA.read_bytes()
    cuts = [0, *script.member_starts(data), len(data)]
    members = [data[start:end] for start, end in pairwise(cuts)][1:]
    good, rest = [], []
    for member in members:
        header = igzip.decompress(member)[:400]
        (good if b"/tc/" in header or b"/tc_page/" in header else rest).append(member)
    draw = random.Random(SEED)
    chosen = [draw.choice(good if draw.random() < 0.01 else rest) for _ in range(records)]
    path.write_bytes(b"".join(chosen))
    unpacked = sum(int.from_bytes(member[-4:], "little") for member in chosen)
    return {"records": records, "packed": path.stat().st_size, "unpacked": unpacked}


def first_pass(name: str, files: list[Path], workers: int = 1, **settings):
    """Return datatrove's executor for the first pass over some files."""
    args = script.Arguments(output_dir=str(WORK / name), workers=workers, **settings)
    shutil.rmtree(args.output_dir, ignore_errors=True)
    work = Path(args.output_dir) / ".work"
    stage, steps, tasks = script.judging(args, work, 0, [str(file) for file in files])
    return script.make_executor(args, steps, tasks, work / "logs" / stage, None)


def cpu_seconds() -> float:
    """Processor time that this process and its children have used."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# --- Tables --------------------------------------------------------------------------------------


def speed(rounds: int) -> dict:
    """One core: gunzip, our first pass, and the same verdicts behind datatrove's WarcReader."""
    from datatrove.pipeline.readers import WarcReader

    wet, part = WORK / "mixed.wet.gz", WORK / "part.wet.gz"
    whole, slice_ = mixed_wet(wet, 100_000), mixed_wet(part, 1_000)
    os.sched_setaffinity(0, {0})
    times, cpu = {"igzip -dc": [], "filter_cc": []}, {"igzip -dc": [], "filter_cc": []}
    for _ in range(rounds):  # side by side, so that other work on the machine meets both
        runs = {
            "igzip -dc": lambda: subprocess.run(["igzip", "-dc", wet], stdout=subprocess.DEVNULL),
            "filter_cc": first_pass("ours", [wet]).run,
        }
        for name, run in runs.items():
            before = cpu_seconds()
            times[name].append(seconds(run))
            cpu[name].append(cpu_seconds() - before)

    executor = first_pass("theirs", [part])
    verdicts, writer = executor.pipeline[-2:]
    tally = script.Tally(str(WORK / "theirs.json"))

    def with_tally(data, rank, world_size):
        for document in data:
            document.metadata |= {"tally": tally, "refused": None}
            yield document

    reader = WarcReader(str(WORK), glob_pattern="part.wet.gz")
    executor.pipeline = [reader, with_tally, verdicts, writer]
    rate = {name: whole["unpacked"] / 1e6 / min(taken) for name, taken in times.items()}
    rate["WarcReader"] = slice_["unpacked"] / 1e6 / seconds(executor.run)
    return {
        "wet": whole,
        "MB/s": {name: round(value, 1) for name, value in rate.items()},
        "ratio to igzip -dc": round(rate["filter_cc"] / rate["igzip -dc"], 2),
        "ratio to igzip -dc in processor time": round(
            min(cpu["igzip -dc"]) / min(cpu["filter_cc"]), 2
        ),
        "ratio to WarcReader": round(rate["filter_cc"] / rate["WarcReader"], 1),
    }


def workers(rounds: int) -> dict:
    """Two workers against one, on six files each of the size of a crawl's (all the same)."""
    mixed_wet(WORK / "crawl_0.wet.gz", 120_000)
    files = [WORK / f"crawl_{number}.wet.gz" for number in range(6)]
    for file in files[1:]:
        file.unlink(missing_ok=True)
        file.symlink_to(files[0])
    os.sched_setaffinity(0, set(range(os.cpu_count())))
    times = {1: [], 2: []}
    for _ in range(rounds):
        for count, taken in times.items():
            executor = first_pass(f"workers_{count}", files, count)
            taken.append(seconds(executor.run))
    best = {count: min(taken) for count, taken in times.items()}
    return {"seconds": best, "ratio": round(best[1] / best[2], 2)}


def memory(rounds: int) -> dict:
    """Peak resident memory of a process that runs the first pass, input tenfold."""
    peaks = {}
    for records in (20_000, 200_000):
        wet = WORK / "memory.wet.gz"
        mixed_wet(wet, records)
        code = (
            "import sys; sys.path[:0] = sys.argv[1:3]; import bench_filter as b;"
            "b.first_pass('memory', [b.Path(sys.argv[3])]).run();"
            "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
        )
        command = [sys.executable, "-c", code, str(ROOT / "benchmarks"), str(ROOT), str(wet)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[records] = int(done.stdout.split()[-1]) / 1024
    return {"MB by records": {k: round(v) for k, v in peaks.items()}}


def dedup(rounds: int) -> dict:
    """Cost of the deduplication stages, and recall on planted near duplicates."""
    return {"cost": {n: dedup_cost(n) for n in (100_000, 400_000)}, "recall": dedup_recall()}


def write_kept(folder: Path, texts: list[str], files: int) -> list[str]:
    """Write pages as the first pass leaves them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "kept").mkdir(parents=True)
    names = [f"00_{number:05d}.parquet" for number in range(files)]
    for number, name in enumerate(names):
        part = texts[number::files]
        table = {"text": part, "id": [str(i) for i in range(len(part))], "url": [""] * len(part)}
        pq.write_table(pa.table(table), folder / "kept" / name)
    return names


def run_dedup(folder: Path, names: list[str]) -> list[str]:
    """Run the stages in this process and return the texts that are left."""
    import pyarrow.parquet as pq

    args = script.Arguments(output_dir=str(folder))
    for name, steps, tasks in script.deduplication(args, folder, names, 0):
        script.make_executor(args, steps, tasks, folder / "logs" / name, None).run()
    left = sorted((folder / "dedup_00" / "final").glob("*.parquet"))
    return [text for path in left for text in pq.read_table(path)["text"].to_pylist()]


def random_texts(count: int, length: int, seed: int) -> list[str]:
    """Return texts of characters that follow each other as in no language, but all differ."""
    draw = np.random.default_rng(seed)
    codes = draw.integers(0x4E00, 0x4E00 + 4000, (count, length)).astype("<u4")
    return [row.tobytes().decode("utf-32-le") for row in codes]


def dedup_cost(count: int) -> dict:
    """Time and peak memory of a process that deduplicates so many pages, 5% of them copies."""
    code = (
        "import resource, sys; sys.path[:0] = sys.argv[1:3]; import bench_filter as b;"
        f"texts = b.random_texts({count}, 400, 0); texts[:{count // 20}] = texts[-{count // 20}:];"
        "folder = b.WORK / 'dedup'; names = b.write_kept(folder, texts, 16); total = len(texts);"
        "del texts; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "start = b.time.perf_counter(); left = len(b.run_dedup(folder, names));"
        "print(left, b.time.perf_counter() - start)"
    )
    command = [sys.executable, "-c", code, str(ROOT / "benchmarks"), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    left, taken = done.stdout.split()[-2:]
    shutil.rmtree(WORK / "dedup")
    return {"left": int(left), "seconds": round(float(taken), 1)}


def dedup_recall() -> dict:
    """Plant copies with so many characters changed, and see which are found, by Jaccard."""
    draw = random.Random(SEED)
    texts = random_texts(2_000, 600, 1)
    pairs, planted = [], []
    for text in texts:
        copy = list(text)
        for at in draw.sample(range(len(copy)), draw.randint(1, 24)):
            copy[at] = chr(0x6000 + draw.randrange(4000))
        planted.append("".join(copy))
        grams = [{t[i : i + 5] for i in range(len(t) - 4)} for t in (text, planted[-1])]
        pairs.append(len(grams[0] & grams[1]) / len(grams[0] | grams[1]))
    folder = WORK / "recall"
    left = set(run_dedup(folder, write_kept(folder, texts + planted, 4)))
    both = zip(texts, planted, strict=True)
    found = [text not in left or copy not in left for text, copy in both]
    rows = {}
    for low, high in ((0.6, 0.7), (0.7, 0.8), (0.8, 0.9), (0.9, 1.0)):
        hits = [hit for hit, jaccard in zip(found, pairs, strict=True) if low <= jaccard < high]
        rows[f"{low} to {high}"] = {"pairs": len(hits), "found": round(sum(hits) / len(hits), 4)}
    hits = [hit for hit, jaccard in zip(found, pairs, strict=True) if jaccard >= 0.8]
    return rows | {"0.8 and over": {"pairs": len(hits), "found": round(sum(hits) / len(hits), 4)}}


# --- Main ----------------------------------------------------------------------------------------

TABLES = {"speed": speed, "workers": workers, "memory": memory, "dedup": dedup}


def main() -> None:
    """Measure, print, and store each table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=TABLES, help="one table instead of all")
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many rounds counts")
    options = parser.parse_args()
    if not DATA.exists():
        sys.exit(f"{DATA} is missing: nothing to measure on")
    WORK.mkdir(parents=True, exist_ok=True)
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"results": {}}
    for name in [options.only] if options.only else TABLES:
        table = TABLES[name](options.rounds)
        stored["results"][name] = table
        print(name, json.dumps(table, indent=2, ensure_ascii=False), flush=True)
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
        packages = ("datatrove", "fastwarc", "isal", "numpy", "pyarrow")
        stored |= {
            "commit": commit,
            "date": date.today().isoformat(),
            "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
            "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "seed": SEED,
            "command": "python benchmarks/bench_filter.py",
        }
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(stored, indent=2, ensure_ascii=False) + "\n")
    shutil.rmtree(WORK)


if __name__ == "__main__":
    main()
