"""Each script, pasted whole into one cell of a real Jupyter kernel, and main([...]) in the next."""

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

CALLS = {
    "filter_cc.py": 'main(["--output_dir", "outputs/notebook_cc", "--workers", "1"])',
    "extend_vocab.py": (
        'main(["--base_model", "data/sample/tiny-llama", "--corpus", "data/cc_filtered",'
        ' "--vocab_size", "7500", "--output_dir", "outputs/notebook_extended"])'
    ),
    "train_pt.py": "main([])",
    "merge_lora.py": "main([])",
}


@pytest.mark.parametrize("script", CALLS)
def test_a_pasted_script_defines_and_main_runs(script, demo):
    before = snapshot(demo)
    cells = [(ROOT / script).read_text(), "print('only defined')", CALLS[script]]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(demo)}}
    )
    with client.setup_kernel():
        client.execute_cell(notebook.cells[0], 0)
        client.execute_cell(notebook.cells[1], 1)
        assert snapshot(demo) == before, "pasting alone wrote files"
        client.execute_cell(notebook.cells[2], 2)
    printed = [output for output in notebook.cells[0].outputs if output.get("name") != "stderr"]
    assert printed == []
    assert snapshot(demo) != before


def snapshot(folder):
    """Return the files below a folder with their times of change."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
