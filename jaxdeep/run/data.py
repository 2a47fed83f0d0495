"""Build a data set, such as the examples and exercises of a textbook, from what it is made of.

`data.builder` names what builds: `textbook`, or a frozen dataclass of your own with
`build(workdir)`; the other keys of the section are its settings. The data set, its report and a
page of it go to the workdir. The same command gives the same files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ml_collections import ConfigDict

from jaxdeep import config as configs
from jaxdeep.pages import report
from jaxdeep.setup.builders import load_builder
from jaxdeep.workdir import Workdir, lock_workdir, write_atomic

DEFAULT_CONFIG = None
EXAMPLE = (
    "python -m jaxdeep data --config=configs/textbook/data.py --config.data.source=book/ "
    "--workdir=runs/book"
)
NEEDS = "a folder or file of a textbook: CNXML, LaTeX, HTML, PDF or text of one, Markdown"


def main(config: ConfigDict, workdir: Path) -> int:
    """Build what `config.data` asks for, and print its table."""
    run = load_builder(config)
    place = Workdir(workdir)
    with lock_workdir(workdir):
        configs.save(config, {"data": run}, workdir, sys.argv)
        built = run.settings.build(workdir)
        write_atomic(place.summary, json.dumps(built.summary, indent=2, ensure_ascii=False) + "\n")
        report.page(
            place.index,
            title=built.title,
            rows=built.rows,
            curves={},
            trajectories={},
            notes=built.notes,
        )
    print(report.table(built.rows, list(built.rows[0]) if built.rows else []))
    for path in (*built.files, place.summary, place.index):
        print(path)
    return 0
