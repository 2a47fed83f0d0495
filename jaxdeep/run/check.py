"""Check the citations of a report against what it was shown; no model is needed.

Reads reports of this package (report.json, report.md, recorded rollouts), DR-Tulu traces, SQA-CS
JSON, BrowseComp-Plus run files, and Markdown with marks such as [1] and a list of references; a
file may hold many. Prints the status of each citation. The exit status is 1 where one is
fabricated, misattributed, or of a source that was not shown, and 2 where a file cannot be read."""

from __future__ import annotations

import collections
from pathlib import Path

from jaxdeep.envs.research import readers
from jaxdeep.envs.research.report import FAILED, Report, summary, to_json, totals, with_sources
from jaxdeep.errors import ConfigError
from jaxdeep.pages import answer

ARGUMENTS = "REPORT..."
DEFAULT_CONFIG = None
EXAMPLE = "python -m jaxdeep check runs/ask/report.json"
NEEDS = "the report of the example of ask"
FLAGS = {
    "sources": "a folder with the texts of the sources, ID.txt or ID.md, to check against",
    "page": "also write the report as this HTML file, each claim beside its source",
}

WIDTH = 60  # characters of a claim that are shown


def main(*paths: str, sources: str = "", page: str = "") -> int:
    """Print what became of each citation."""
    if not paths:
        raise ConfigError("check needs the file of a report, as in check report.json")
    texts = readers.source_texts(sources) if sources else {}
    found = [(path, report) for path in paths for report in readers.read(path)]
    if texts:
        found = [(path, with_sources(report, texts)) for path, report in found]
    if page and len(found) != 1:
        raise ConfigError(f"--page={page} is for one report, and there are {len(found)}")
    for path, report in found:
        print(f"{path}{f' ({clean(report.id)})' if report.id else ''}: {summary(report)}")
        for line in lines(report):
            print(f"  {line}")
    if page:
        answer.page(Path(page), to_json(found[0][1]))
    reports = [report for _, report in found]
    return verdict(reports)


def verdict(reports: list[Report]) -> int:
    """Print the verdict on all reports; returns the exit status."""
    counts = totals(reports)
    failed = {status: counts[status] for status in FAILED if counts[status]}
    if failed:
        reasons = ", ".join(f"{n} {status.value}" for status, n in failed.items())
        wrong = sum(report.failed for report in reports)
        print(f"failed: {reasons} (in {wrong} of {len(reports)} reports)")
        return 1
    unpinned = sum(n for status, n in counts.items() if not status.pinned)
    total = sum(counts.values())
    print(f"passed: {total - unpinned} of {total} references have a place in a source")
    return 0


def lines(report: Report) -> list[str]:
    """What there is to say of a report: its notes and problems, then each reference."""
    said = [f"note: {clean(note)}" for note in report.notes]
    for problem, times in collections.Counter(report.parsed.problems).items():
        said.append(f"problem: {clean(problem)}" + (f" ({times} times)" if times > 1 else ""))
    for citation, places in zip(report.citations, report.pins, strict=True):
        claim = clean(report.text[citation.start : citation.end])
        claim = claim if len(claim) <= WIDTH else f"{claim[: WIDTH - 1]}…"
        for place in places:
            note = f" - {clean(place.note)}" if place.note else ""
            written = clean(place.reference.written)
            said.append(f'{place.status.value:<15} {written:<12} "{claim}"{note}')
    return said


def clean(text: str) -> str:
    """The text on one line, without what a terminal or a model would take for a command."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
