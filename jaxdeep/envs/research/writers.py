"""Reports for others: SQA-CS, BrowseComp-Plus, OpenAI's and Anthropic's citations, W3C selectors.

Only references with a place are written. What was dropped is in `statuses` of our own JSON.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jaxdeep.envs.research.cite import Citation
from jaxdeep.envs.research.pin import Pin
from jaxdeep.envs.research.report import Report
from jaxdeep.envs.research.sources import Source

CONTEXT = 32  # characters before and after a quotation in a selector


def pinned(report: Report) -> Iterator[tuple[Citation, Pin, Source]]:
    """Every reference that has a place, with its citation and source."""
    for citation, places in zip(report.citations, report.pins, strict=True):
        for place in places:
            if place.status.pinned:
                yield citation, place, report.shelf.get(place.source)


def sqa(report: Report) -> dict[str, Any]:
    """SQA-CS: a section for the top level and each node under it, whose text has `[ID]` after each
    claim, and the cited texts as snippets."""
    top = report.tree
    parts = [("", *top.gist)]
    for child in top.children:
        end = max(node.detail[1] for node in child.walk())
        parts.append((child.title, child.gist[0], end))
    sections = [
        {
            "title": title,
            "text": marked(report, start, end).strip(),
            "citations": _snippets(report, start, end),
        }
        for title, start, end in parts
        if report.text[start:end].strip()
    ]
    return {"question": report.question, "response": {"sections": sections}}


def marked(report: Report, start: int, end: int) -> str:
    """A part of the answer's text with `[ID]` after each claim."""
    marks = {
        (citation.end, source.id): None
        for citation, _, source in pinned(report)
        if start < citation.end <= end
    }
    pieces = []
    for place, id in sorted(marks, key=lambda mark: mark[0]):
        pieces += [report.text[start:place], f" [{id}]"]
        start = place
    return "".join([*pieces, report.text[start:end]])


def _snippets(report: Report, start: int, end: int) -> list[dict[str, Any]]:
    """The sources that are cited in a part of the answer, each with its cited texts once."""
    cited: dict[str, dict[str, Any]] = {}
    for citation, place, source in pinned(report):
        if start < citation.end <= end:
            entry = {"id": f"[{source.id}]", "title": source.title, "snippets": []}
            snippets = cited.setdefault(source.id, entry)["snippets"]
            text = source.text[place.start : place.end]
            snippets += [] if text in snippets else [text]
    return list(cited.values())


def run_file(report: Report, calls: Mapping[str, int]) -> dict[str, Any]:
    """A run of BrowseComp-Plus: the answer with `[docid]` after each claim, ids as strings.
    `calls` counts the calls of each tool."""
    return {
        "query_id": report.id,
        "tool_call_counts": dict(calls),
        "status": "incomplete" if report.incomplete else "completed",
        "retrieved_docids": [source.id for source in report.shelf],
        "result": [{"type": "output_text", "output": marked(report, 0, len(report.text))}],
    }


def openai_annotations(report: Report) -> list[dict[str, Any]]:
    """OpenAI's `message.annotations` over the answer's text, of sources that have an address."""
    return [
        {
            "type": "url_citation",
            "url_citation": {
                "start_index": citation.start,
                "end_index": citation.end,
                "url": source.url,
                "title": source.title,
            },
        }
        for citation, _, source in pinned(report)
        if source.url
    ]


def anthropic_citations(report: Report) -> list[dict[str, Any]]:
    """Anthropic's `char_location` of each reference, documents counted in order of appearance."""
    index = {source.id: n for n, source in enumerate(report.shelf)}
    return [
        {
            "type": "char_location",
            "cited_text": source.text[place.start : place.end],
            "document_index": index[source.id],
            "document_title": source.title or None,
            "start_char_index": place.start,
            "end_char_index": place.end,
        }
        for _, place, source in pinned(report)
    ]


def selectors(report: Report) -> list[dict[str, Any]]:
    """W3C selectors of each reference: the quotation with what is around it, and its place."""
    found = []
    for _, place, source in pinned(report):
        text, start, end = source.text, place.start, place.end
        quote = {
            "type": "TextQuoteSelector",
            "exact": text[start:end],
            "prefix": text[max(0, start - CONTEXT) : start],
            "suffix": text[end : end + CONTEXT],
        }
        position = {"type": "TextPositionSelector", "start": start, "end": end}
        found.append({"source": source.url or source.id, "selector": [quote, position]})
    return found
