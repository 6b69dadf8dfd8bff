"""How fast filter_cc.py is, what its deduplication costs and how much of it scales.

    python benchmarks/bench_filter.py                # every table, ten minutes
    python benchmarks/bench_filter.py --only speed   # some of them
    python benchmarks/bench_filter.py --draw         # the picture again, from the results

speed    The first pass on one core against `igzip -dc` and against datatrove's WarcReader with the
         same verdicts, on a WET of which about 1% of the pages are good.
warc     The first pass on a WARC of HTML, 1% of its pages good, against datatrove's WarcReader and
         its Trafilatura block. The pages of the WET in plain HTML: menu, paragraphs, footer.
workers  Two workers against one, on twelve such files.
memory   Peak memory of a worker, input tenfold.
dedup    Time and peak memory for 100,000 and 400,000 generated pages; recall by Jaccard similarity.
like     Seconds that --like takes for each GB of the corpus.
disk     Bytes of the corpus, and of its folder at its largest, over those of the kept text.

All figures of a table come from one run, side by side; ratios are what to read. The WET is mixed
from ../shared/data/labelled.wet.gz. Results: benchmarks/results/filter.json and
pictures/readme_filter.png.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data" / "labelled.wet.gz"
RESULTS = ROOT / "benchmarks" / "results" / "filter.json"
PICTURE = ROOT / "pictures" / "readme_filter.png"
WORK = ROOT / "outputs" / "bench_filter"
SEED = 0
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import common  # noqa: E402

import filter_cc as script  # noqa: E402

# --- Material ------------------------------------------------------------------------------------


def members(path: Path) -> list[bytes]:
    """The gzip members of a file."""
    data = path.read_bytes()
    cuts = [*(found.start() for found in script.MEMBER.finditer(data)), len(data)]
    return [data[start:end] for start, end in pairwise(cuts)]


def mixed_wet(path: Path, records: int) -> dict:
    """Write a WET whose pages are good in about 1 of 100 cases; return what is in it."""
    from isal import igzip

    good, rest = [], []
    for member in members(DATA)[1:]:
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


@contextmanager
def one_core() -> Iterator[None]:
    """Let this process and its children run on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


def cpu_seconds() -> float:
    """Processor time that this process and its children have used."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def seconds(run) -> float:
    """Time that a function takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_mb() -> float:
    """Largest resident memory of this process so far."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def in_a_process(statement: str) -> dict:
    """Run a statement on this module, `b`, in a process of its own; return what it prints."""
    code = "import json, sys; sys.path.insert(0, sys.argv[1]); import bench_filter as b; "
    command = [sys.executable, "-c", code + statement, str(ROOT / "benchmarks")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# --- Tables --------------------------------------------------------------------------------------


@one_core()
def speed(rounds: int) -> dict:
    """One core: gunzip, our first pass, and the same verdicts behind datatrove's WarcReader."""
    from datatrove.pipeline.readers import WarcReader

    wet, part = WORK / "mixed.wet.gz", WORK / "part.wet.gz"
    whole, slice_ = mixed_wet(wet, 100_000), mixed_wet(part, 1_000)
    times, cpu = {"igzip -dc": [], "filter_cc": []}, {"igzip -dc": [], "filter_cc": []}
    for _ in range(rounds):  # side by side, so that other work on the machine meets both
        runs = {
            "igzip -dc": lambda: subprocess.run(["igzip", "-dc", wet], stdout=subprocess.DEVNULL),
            "filter_cc": first_pass("ours", [wet]).run}
        for name, run in runs.items():
            before = cpu_seconds()
            times[name].append(seconds(run))
            cpu[name].append(cpu_seconds() - before)

    executor = first_pass("theirs", [part])
    judge = script.Judge(script.Arguments())

    def verdicts(data, rank, world_size):
        for document in data:
            document.text, scores, refused = judge.verdict(document.text)
            document.metadata |= scores
            if not refused:
                yield document

    reader = WarcReader(str(WORK), glob_pattern="part.wet.gz")
    executor.pipeline = [reader, verdicts, executor.pipeline[-1]]
    rate = {name: whole["unpacked"] / 1e6 / min(taken) for name, taken in times.items()}
    rate["WarcReader"] = slice_["unpacked"] / 1e6 / seconds(executor.run)
    return {
        "wet": whole,
        "MB/s": {name: round(value, 1) for name, value in rate.items()},
        "ratio to igzip -dc": round(rate["filter_cc"] / rate["igzip -dc"], 2),
        "ratio to igzip -dc in processor time": round(
            min(cpu["igzip -dc"]) / min(cpu["filter_cc"]), 2),
        "ratio to WarcReader": round(rate["filter_cc"] / rate["WarcReader"], 1)}


def as_warc(wet: Path, warc: Path) -> int:
    """Write the pages of a WET as responses in HTML; return their bytes, unpacked."""
    from html import escape

    from isal import igzip

    size = 0
    menu = "<nav><ul>" + '<li><a href="/">Home</a></li>' * 12 + "</ul></nav>"
    with open(warc, "wb") as out:
        for number, member in enumerate(members(wet)):
            header, _, text = igzip.decompress(member).partition(b"\r\n\r\n")
            lines = text.decode("utf-8", "replace").splitlines()
            body = "".join(f"<p>{escape(line)}</p>\n" for line in lines if line.strip())
            title = escape(lines[0] if lines else "")
            page = (
                "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n<!DOCTYPE html>"
                f"<html><head><title>{title}</title></head><body>{menu}<main>{body}</main>"
                f"<footer>© {title}</footer></body></html>").encode()
            address = re.search(rb"WARC-Target-URI: (.+)\r", header)[1]
            record = (
                b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:%d>\r\n"
                b"WARC-Target-URI: %s\r\nContent-Type: application/http; msgtype=response\r\n"
                b"WARC-Date: 2026-01-01T00:00:00Z\r\nContent-Length: %d\r\n\r\n%s\r\n\r\n"
            ) % (number, address, len(page), page)
            out.write(igzip.compress(record))
            size += len(record)
    return size


@one_core()
def warc(rounds: int) -> dict:
    """One core: our first pass over HTML, and datatrove's WarcReader with its Trafilatura block,
    which extracts every page."""
    from datatrove.pipeline.extractors import Trafilatura
    from datatrove.pipeline.readers import WarcReader

    sizes, files = {}, {}
    for name, records in (("filter_cc", 10_000), ("Trafilatura", 300)):
        mixed_wet(WORK / f"{name}.wet.gz", records)
        files[name] = WORK / f"{name}.warc.gz"
        sizes[name] = as_warc(WORK / f"{name}.wet.gz", files[name])
    taken = {"filter_cc": [], "Trafilatura": []}
    for _ in range(rounds):
        taken["filter_cc"].append(seconds(first_pass("warc", [files["filter_cc"]]).run))
        theirs = first_pass("theirs", [files["Trafilatura"]])
        reader = WarcReader(str(WORK), glob_pattern="Trafilatura.warc.gz")
        theirs.pipeline = [reader, Trafilatura(timeout=60)]
        taken["Trafilatura"].append(seconds(theirs.run))
    rate = {name: sizes[name] / 1e6 / min(times) for name, times in taken.items()}
    return {
        "records": 10_000, "unpacked": sizes["filter_cc"],
        "MB/s": {name: round(value, 1) for name, value in rate.items()},
        "ratio": round(rate["filter_cc"] / rate["Trafilatura"], 1)}


def workers(rounds: int) -> dict:
    """Two workers against one, on twelve files each of the size of a crawl's (all the same). That
    workers start once costs the same for any number of files."""
    size = mixed_wet(WORK / "crawl_0.wet.gz", 120_000)
    files = [WORK / f"crawl_{number}.wet.gz" for number in range(12)]
    for file in files[1:]:
        file.unlink(missing_ok=True)
        file.symlink_to(files[0])
    times = {1: [], 2: []}
    for _ in range(rounds):
        for count, taken in times.items():
            taken.append(seconds(first_pass(f"workers_{count}", files, count).run))
    best = {count: round(min(taken), 2) for count, taken in times.items()}
    ratio = round(best[1] / best[2], 2)
    return {"files": len(files), "each": size, "seconds": best, "ratio": ratio}


def memory(rounds: int) -> dict:
    """Peak memory of a process that runs the first pass, input tenfold."""
    wet, peaks = WORK / "memory.wet.gz", {}
    for records in (20_000, 200_000):
        mixed_wet(wet, records)
        peaks[records] = round(in_a_process(
            f"b.first_pass('memory', [b.Path('{wet}')]).run(); print(b.peak_mb())"))
    return {"MB by records": peaks}


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


def run_dedup(folder: Path, names: list[str]) -> None:
    """Run the stages in this process."""
    args = script.Arguments(output_dir=str(folder))
    for name, steps, tasks in script.deduplication(args, folder, names, 0):
        script.make_executor(args, steps, tasks, folder / "logs" / name, None).run()


def random_texts(count: int, length: int, seed: int) -> list[str]:
    """Return texts of characters that follow each other as in no language, but all differ."""
    draw = np.random.default_rng(seed)
    codes = draw.integers(0x4E00, 0x4E00 + 4000, (count, length)).astype("<u4")
    return [row.tobytes().decode("utf-32-le") for row in codes]


def dedup_cost(count: int) -> dict:
    """Time and peak memory of a process that deduplicates so many pages, 5% of them copies."""
    texts = random_texts(count, 400, SEED)
    texts[: count // 20] = texts[-(count // 20) :]
    folder = WORK / "dedup"
    names = write_kept(folder, texts, 16)
    del texts
    row = in_a_process(f"print(json.dumps(b.timed_dedup(b.Path('{folder}'), {names})))")
    shutil.rmtree(folder)
    return row


def timed_dedup(folder: Path, names: list[str]) -> dict:
    """Deduplicate in this process, and say what that took."""
    import datatrove.pipeline.dedup  # noqa: F401 (its memory is not the pages')
    import pyarrow.parquet as pq

    before = peak_mb()
    taken = seconds(lambda: run_dedup(folder, names))
    final = (folder / "dedup_00" / "final").glob("*.parquet")
    left = sum(pq.ParquetFile(path).metadata.num_rows for path in final)
    return {
        "left": left, "seconds": round(taken, 1), "peak_mb": round(peak_mb()),
        "imports_mb": round(before)}


def dedup_recall() -> dict:
    """Plant copies with so many characters changed, and see which are found, by Jaccard."""
    import pyarrow.parquet as pq

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
    run_dedup(folder, write_kept(folder, texts + planted, 4))
    final = (folder / "dedup_00" / "final").glob("*.parquet")
    left = {text for path in final for text in pq.read_table(path)["text"].to_pylist()}
    both = zip(texts, planted, strict=True)
    found = [text not in left or copy not in left for text, copy in both]
    rows = {}
    for low, high in ((0.6, 0.7), (0.7, 0.8), (0.8, 0.9), (0.9, 1.0)):
        hits = [hit for hit, jaccard in zip(found, pairs, strict=True) if low <= jaccard < high]
        rows[f"{low} to {high}"] = {"pairs": len(hits), "found": round(sum(hits) / len(hits), 4)}
    hits = [hit for hit, jaccard in zip(found, pairs, strict=True) if jaccard >= 0.8]
    return rows | {"0.8 and over": {"pairs": len(hits), "found": round(sum(hits) / len(hits), 4)}}


@one_core()
def like(rounds: int) -> dict:
    """The scores of 40,000 generated pages; the trusted text has 400,000 characters."""
    texts, folder, trusted = random_texts(40_000, 400, SEED), WORK / "like", WORK / "trusted.txt"
    names = write_kept(folder, texts, 1)
    trusted.write_text("\n".join(random_texts(1_000, 400, 1)), encoding="utf-8")
    paths = [folder / "kept" / name for name in names]
    taken = min(seconds(lambda: script.like_scores(str(trusted), paths)) for _ in range(rounds))
    size = sum(map(script.utf8_bytes, texts))
    return {"bytes": size, "seconds": round(taken, 2), "seconds per GB": round(taken / size * 1e9)}


def disk(rounds: int) -> dict:
    """Result and largest size of the output folder of a whole run, over the kept text. The pages
    are the good ones of the labelled file, their sentences drawn anew from all of them."""
    from isal import igzip

    whole = igzip.decompress(DATA.read_bytes())
    records = [record.partition(b"\r\n\r\n") for record in whole.split(b"WARC/1.0\r\n")]
    good = [page.decode().strip() for header, _, page in records if b"/tc/" in header]
    sentences = sorted({s for page in good for s in re.findall("[^。！？\n]{8,}[。！？]", page)})
    draw, folder = random.Random(SEED), WORK / "disk"
    with open(WORK / "disk.jsonl", "w", encoding="utf-8") as lines:
        for number in range(12_000):
            page = {"text": "".join(draw.choices(sentences, k=15)), "id": str(number)}
            lines.write(json.dumps(page, ensure_ascii=False) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    ended, largest = threading.Event(), 0

    def poll() -> None:
        nonlocal largest
        while not ended.wait(0.02):
            largest = max(largest, folder_bytes(folder))

    thread = threading.Thread(target=poll)
    thread.start()
    script.main([
        "--input", str(WORK / "disk.jsonl"), "--output_dir", str(folder),
        "--picture", str(WORK / "disk.png")])
    ended.set()
    thread.join()
    kept = json.loads((folder / "stats.json").read_text())["bytes"]
    result = sum(path.stat().st_size for path in folder.glob("*.parquet"))
    return {"result to text": round(result / kept, 2), "peak to text": round(largest / kept, 2)}


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder, while others write and delete there."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name)).st_size
            except FileNotFoundError:
                continue
    return total


# --- Picture -------------------------------------------------------------------------------------


def draw(table: dict) -> None:
    """Throughput of the three on one core, on a logarithmic scale."""
    from matplotlib.figure import Figure

    labels = {
        "igzip -dc": "igzip -dc\n(decompression alone)",
        "filter_cc": "filter_cc.py\n(reads, judges, writes)",
        "WarcReader": "datatrove's WarcReader,\nthe same verdicts"}
    values = [table["MB/s"][name] for name in labels]
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axis = figure.subplots()
    colors = ["#9aa5b1", "#b5322a", "#9aa5b1"]
    bars = axis.barh(list(labels.values()), values, color=colors, height=0.6)
    axis.bar_label(bars, [f"{value:,.3g} MB/s" for value in values], padding=4)
    axis.set(
        xscale="log", xlim=(min(values) / 4, 4 * max(values)),
        xlabel="MB/s of unpacked WET on one core")
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"First pass over {table['wet']['unpacked'] / 1e6:.0f} MB of pages, 1% of them good",
        fontsize="medium")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=120)
    print(f"drew {PICTURE.relative_to(ROOT)}")


# --- Main ----------------------------------------------------------------------------------------

TABLES = {
    "speed": speed, "warc": warc, "workers": workers, "memory": memory, "dedup": dedup,
    "like": like, "disk": disk}


def main() -> None:
    """Measure the chosen tables; each keeps its own stamp when another is measured again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TABLES, help="these tables")
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many rounds counts")
    parser.add_argument("--draw", action="store_true", help="only the picture, from the results")
    args = parser.parse_args()
    if not args.draw and not DATA.exists():
        sys.exit(f"{DATA} is missing: nothing to measure on")
    if not args.draw and not shutil.which("igzip"):
        sys.exit("igzip is missing: apt-get install isal")
    WORK.mkdir(parents=True, exist_ok=True)
    for name in [] if args.draw else args.only or TABLES:
        print(f"--- {name}", flush=True)
        start = time.monotonic()
        packages = ("datatrove", "fastwarc", "isal", "numpy", "pyarrow")
        table = common.stamp("bench_filter", packages, SEED) | TABLES[name](args.rounds)
        table["measured_in_seconds"] = round(time.monotonic() - start)
        print(json.dumps(table, indent=2, ensure_ascii=False), flush=True)
        done = json.loads(RESULTS.read_text())["results"] if RESULTS.exists() else {}
        RESULTS.parent.mkdir(exist_ok=True)
        measured = {"results": done | {name: table}}
        RESULTS.write_text(json.dumps(measured, indent=2, ensure_ascii=False) + "\n")
    shutil.rmtree(WORK)
    measured = json.loads(RESULTS.read_text())["results"] if RESULTS.exists() else {}
    if "speed" in measured:
        draw(measured["speed"])


if __name__ == "__main__":
    main()
