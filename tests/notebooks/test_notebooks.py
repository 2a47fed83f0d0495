"""The notebooks run to their end, with fewer steps, and are committed without outputs."""

import os
import pathlib

import nbformat
import pytest
from run import small

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICK = [
    *("sft.train.steps=2", "sft.optim.warmup=0", "grpo.train.steps=1", "grpo.optim.warmup=0"),
    "test.count=8",
]
SMALL = 'CONFIG, TOPOLOGY, CHANGES = "search/quickstart", "v5e:1x1", []'
FEWER = {"quickstart": f"CHANGES = {QUICK!r}", "your_tool": "STEPS = 3", "plan_a_pod": SMALL}
SEEN = {
    "quickstart": ("after GRPO", "<iframe", "--- reward"),
    "your_tool": ("Desk(", "step  2"),
    "plan_a_pod": ("grpo on v5e:1x1", "keys and values", "bound by"),
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_clean(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    for cell in book.cells:
        assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None)
    settings = next(cell for cell in book.cells if cell.cell_type == "code")
    assert settings.source.startswith("REPOSITORY = ") and "\nWORKDIR = " in settings.source


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    if path.stem == "plan_a_pod":
        pytest.importorskip("libtpu")
    for name, value in small.environment().items():
        if os.environ.get(name) != value:
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    book = nbformat.read(path, as_version=4)
    settings = next(i for i, cell in enumerate(book.cells) if cell.cell_type == "code")
    fewer = f"WORKDIR = {str(tmp_path / 'run')!r}\n{FEWER[path.stem]}"
    book.cells.insert(settings + 1, nbformat.v4.new_code_cell(fewer))
    client = nbclient.NotebookClient(
        book, timeout=1800, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
    outputs = str([cell.outputs for cell in book.cells if cell.cell_type == "code"])
    assert all(text in outputs for text in SEEN[path.stem])
