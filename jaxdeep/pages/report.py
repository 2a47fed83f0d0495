"""Results for people: a table for the terminal, and one HTML page with table, curves and rollouts.

The page stands alone: it has no script and requests nothing, and every text in it is escaped, so
that what a model or a web page wrote stays text. A value `em` that comes with `em_low` and
`em_high` in its row is shown with that interval.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jinja2
import markupsafe
import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxdeep.types import Message, ToolCall, Trajectory
from jaxdeep.workdir import write_atomic

WIDTH = 80
TITLES = {"em": "EM", "f1": "F1", "em_low": "EM low", "em_high": "EM high"}
# Placeholders: matplotlib writes these colours and the page's style variables replace them, so that
# the plot follows dark mode.
AXIS, GRID, SERIES = "#010101", "#020202", "#030000"


class Curve(NamedTuple):
    """A quantity over the steps: its first and last value, and its chart as an SVG element."""

    name: str
    first: float
    last: float
    chart: markupsafe.Markup


class Cell(NamedTuple):
    """One value of a table: its text, whether it is a number, and its interval or None."""

    text: str
    number: bool
    value: float
    interval: tuple[float, float] | None


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The rows as text of at most 80 columns. Longer values are folded, a missing one is a dash."""
    cells = [[_cell(row, column) for column in columns] for row in rows]
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        number = bool(cells) and all(line[index].number for line in cells)
        justify = "right" if number else "left"
        grid.add_column(Text(_title(column)), justify=justify, overflow="fold")
    for line in cells:
        grid.add_row(*(Text(_with_interval(cell)) for cell in line))
    console = Console(width=WIDTH, file=io.StringIO(), color_system=None)
    console.print(grid)
    lines = [line.rstrip() for line in console.file.getvalue().split("\n")]
    return "\n".join(lines).strip("\n")


def page(
    path: Path,
    *,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    curves: Mapping[str, Sequence[tuple[float, float]]],
    trajectories: Mapping[str, Sequence[Trajectory]],
    notes: Sequence[str],
    along: str = "step",
    links: Mapping[str, str] = MappingProxyType({}),
    commands: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write the page: `rows` as a table with the keys of the first row, `curves` as named series of
    (step, value), each with axes of its own whose horizontal one is called `along`, `trajectories`
    by heading, `notes` as paragraphs under the title. `links` are pages beside this one by what
    they show, `commands` what to run next by what it does."""
    columns = [key for key in rows[0] if not _is_bound(key, rows[0])] if rows else []
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number,
        "written": _arguments,
        "call": _call,
        "share": _share,
    }
    html = environment.get_template("report.html.jinja").render(
        title=title,
        notes=notes,
        columns=[_title(column) for column in columns],
        cells=[[_cell(row, column) for column in columns] for row in rows],
        curves=[
            Curve(name, points[0][1], points[-1][1], _chart(points, along))
            for name, points in curves.items()
            if points
        ],
        links=links,
        commands=commands,
        trajectories=trajectories,
        answer=_last_answer,
    )
    # Half of a surrogate pair, which a tool can return, has no UTF-8.
    write_atomic(path, html.encode("utf-8", "replace").decode("utf-8"))


def _is_bound(key: str, row: Mapping[str, Any]) -> bool:
    return any(key == f"{other}_{end}" for other in row for end in ("low", "high"))


def _title(column: str) -> str:
    return TITLES.get(column, column.replace("_", " "))


def _cell(row: Mapping[str, Any], column: str) -> Cell:
    value = row.get(column)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    low, high = row.get(f"{column}_low"), row.get(f"{column}_high")
    interval = None if low is None or high is None else (low, high)
    return Cell(_number(value), number or value is None, value if number else 0.0, interval)


def _with_interval(cell: Cell) -> str:
    if cell.interval is None:
        return cell.text
    low, high = cell.interval
    return f"{cell.text} [{low:.2f},{high:.2f}]"  # no space in it: folded as one


def _number(value: Any) -> str:
    """A value with as many digits as a person wants to read."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def _share(value: float) -> str:
    """A number from 0 to 1 as a CSS percentage; one outside is clipped."""
    return f"{100 * min(max(value, 0.0), 1.0):.2f}%"


def _arguments(call: ToolCall) -> str:
    return json.dumps(dict(call.arguments), ensure_ascii=False, indent=2, default=str)


def _call(call: ToolCall) -> str:
    """The call on one line, as a person would write it."""
    arguments = (
        f"{name}={json.dumps(value, ensure_ascii=False, default=str)}"
        for name, value in call.arguments.items()
    )
    return f"{call.name}({', '.join(arguments)})"


def _last_answer(messages: Sequence[Message]) -> str:
    turns = [message.content for message in messages if message.role == "assistant"]
    return turns[-1].strip() if turns else ""


def _chart(points: Sequence[tuple[float, float]], along: str) -> markupsafe.Markup:
    """One series as an SVG element whose colours are the page's variables. A point at 0, before
    anything was learned, is a ring."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jaxdeep"}):
        figure = Figure(figsize=(4.4, 2.4), layout="constrained")
        axes = figure.subplots()
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) <= 30 else ""
        axes.plot(steps, values, color=SERIES, marker=marker, markersize=3, linewidth=1.8)
        if steps[0] == 0:
            ring = dict(markersize=7, markerfacecolor="none", clip_on=False)
            axes.plot(steps[:1], values[:1], color=SERIES, marker="o", **ring)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GRID)
        axes.tick_params(color=GRID, labelcolor=AXIS, labelsize=9)
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(along, color=AXIS, fontsize=9, parse_math=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        # Without a date and with a fixed salt for its ids, the same curves give the same bytes.
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    variables = {AXIS: "var(--muted)", GRID: "var(--line)", SERIES: "var(--series)"}
    for colour, variable in variables.items():
        svg = svg.replace(colour, variable)
    return markupsafe.Markup(svg)
