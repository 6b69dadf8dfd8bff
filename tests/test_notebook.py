"""notebooks/luojiu.ipynb holds the scripts and the sample as they are, and runs from nothing."""

import base64
import importlib.util
import io
import re
import tarfile
from copy import deepcopy

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

SCRIPTS = {"filter_cc", "extend_vocab", "train_pt", "merge_lora"}
CHARTS = {"filter_cc-chart", "extend_vocab-chart", "train_pt-chart"}


@pytest.fixture(scope="module")
def maker():
    path = ROOT / "notebooks" / "make_notebook.py"
    spec = importlib.util.spec_from_file_location("make_notebook", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def notebook(maker):
    return nbformat.read(maker.NOTEBOOK, as_version=4)


def split_archive(source):
    """Return a cell's source without its archive, and what that holds: compression may differ."""
    found = re.search(r'(?<=ARCHIVE = """\n)[\w+/=\n]+', source)
    if not found:
        return source, {}
    packed = io.BytesIO(base64.b64decode(found[0]))
    with tarfile.open(fileobj=packed, mode="r:xz") as tar:
        files = {entry.name: tar.extractfile(entry).read() for entry in tar}
    return source.replace(found[0], ""), files


def snapshot(folder):
    """Return the files below a folder with their times of change."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def test_the_notebook_holds_what_the_repository_holds(maker, notebook):
    built = {cell.id: cell for cell in maker.build().cells}
    assert [cell.id for cell in notebook.cells] == list(built), "run make notebook"
    for cell in notebook.cells:
        same = split_archive(cell.source) == split_archive(built[cell.id].source)
        assert same, f"the cell {cell.id} is not what the repository holds; run make notebook"
        if cell.id in SCRIPTS:
            assert cell.source.partition("\n")[2] == (ROOT / f"{cell.id}.py").read_text()


def test_the_committed_notebook_was_run_and_is_small(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert bool(cell.outputs) == (cell.id not in SCRIPTS), cell.id
        assert (cell.id in CHARTS) == any("image/png" in o.get("data", {}) for o in cell.outputs)
        assert all(o.get("name") != "stderr" and o.output_type != "error" for o in cell.outputs)
        cell.outputs = []
    assert len(nbformat.writes(notebook).encode()) < 1_000_000


@pytest.mark.timeout(900)
def test_the_notebook_runs_from_an_empty_folder(maker, tmp_path):
    """In one kernel, as its readers run it, but with fewer steps; then one goes back to an earlier
    script."""
    notebook = maker.build(tiny_steps=20, epochs=1)
    cells = {cell.id: cell for cell in notebook.cells}
    again = deepcopy(cells["filter_cc"]), nbformat.v4.new_code_cell("main()")
    notebook.cells += again
    start = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=start)
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            before = snapshot(tmp_path)
            client.execute_cell(cell, index)
            if cell.id in SCRIPTS:
                assert snapshot(tmp_path) == before, f"pasting {cell.id} wrote files"
                assert not printed(cell), f"pasting {cell.id} printed"
    assert "already" in printed(cells["install"])
    for name in CHARTS:
        assert cells[name].outputs[0].data["image/png"], name
    text = printed(cells["result"]).strip()
    assert text.startswith("春天的")
    assert len(text) > len("春天的")
    assert "already done" in printed(again[1])  # not Jupyter's sys.argv, but the defaults
