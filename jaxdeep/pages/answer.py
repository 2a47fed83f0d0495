"""A report as a page: its levels open one by one, and each claim opens the text it rests on.

    page(path, report)    one file of HTML from what `report.json` holds

The page stands alone. What a model or a source wrote is sanitised or escaped; links go to http and
https only; a policy (CSP) allows the page's own style and script, by their hashes, and nothing
else: no request, no other script, no form. Without the script it is a readable page whose claims
link to a list of the places that they cite.
"""

from __future__ import annotations

import base64
import bisect
import functools
import hashlib
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import markupsafe
import nh3
from markdown_it import MarkdownIt

from jaxdeep.errors import DataError
from jaxdeep.workdir import write_atomic

FOLDER = Path(__file__).parent
PINNED = ("exact", "normalised", "ambiguous", "repaired")

_TAGS = {
    *("p", "br", "hr", "strong", "em", "del", "sup", "sub", "a", "code", "pre", "blockquote"),
    *("ul", "ol", "li", "h1", "h2", "h3", "h4", "h5", "h6"),
    *("table", "caption", "thead", "tbody", "tr", "th", "td"),
}
# Marks in the text of an answer where a claim begins and ends, which nothing else may hold.
_PRIVATE = re.compile("[\ue000-\uf8ff]")
_BEGIN, _END, _DONE = "\ue000", "\ue001", "\ue002"
_MARK = re.compile(f"([{_BEGIN}{_END}])([0-9]+){_DONE}")
_BLOCK = re.compile(r"\s*(?:[-*+>]\s+|#{1,6}\s+|\d{1,9}[.)]\s+|\|\s*)*")


class Place(NamedTuple):
    """One reference of the report: what was found of it, and how the page says so. `kind` is its
    class of style: "good" with a place, "open" where the source's text is not here, else "bad"."""

    number: int
    status: str
    reference: str
    kind: str
    note: str
    text: str
    title: str
    link: str
    source: int | None  # index of the source, where there is a place
    start: int  # in UTF-16 units, as the script counts
    end: int


def page(path: Path, report: Mapping[str, Any]) -> None:
    """Write the page of a report as `report.json` has it. DataError: a field is missing."""
    try:
        html = render(report)
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(f"not a whole report: {type(error).__name__}: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, html.encode("utf-8", "replace").decode("utf-8"))


def render(report: Mapping[str, Any]) -> str:
    """The page as text."""
    places, claims = _places(report)
    style = (FOLDER / "answer.css").read_text(encoding="utf-8")
    script = (FOLDER / "answer.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    body = _Body(report["text"], claims, places)
    return environment.get_template("answer.html.jinja").render(
        question=report["question"] or report["tree"]["title"] or "A report",
        notes=[*report["notes"], *(["the answer was cut"] if report["incomplete"] else [])],
        problems=report["problems"],
        statuses=report["statuses"],
        kind_of=kind_of,
        tree=report["tree"],
        markdown=body.html,
        title_of=body.title,
        places=places,
        sources=[dict(source, link=web(source["url"])) for source in report["sources"]],
        style=markupsafe.Markup(style),
        script=markupsafe.Markup(script),
        policy=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'",
    )


def kind_of(status: str) -> str:
    """The class of style of a status."""
    return "good" if status in PINNED else "open" if status == "no_text" else "bad"


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _places(
    report: Mapping[str, Any],
) -> tuple[list[Place], list[tuple[int, int, list[int]]]]:
    """Every reference, numbered from 1, and the claims: start, end, numbers of their references."""
    index = {source["id"]: n for n, source in enumerate(report["sources"])}
    places: list[Place] = []
    claims = []
    for citation in report["citations"]:
        first = len(places)
        for found in citation["references"]:
            n = index.get(found["source"])
            source = report["sources"][n] if n is not None else {}
            pinned = found["status"] in PINNED
            start, end = (found["start"], found["end"]) if pinned else (0, 0)
            url = web(source.get("url", ""))
            places.append(
                Place(
                    len(places) + 1,
                    found["status"].replace("_", " "),
                    found["reference"],
                    kind_of(found["status"]),
                    found["note"],
                    found["text"],
                    source.get("title", "") or found["source"],
                    url and (fragment(url, source["text"], start, end) if pinned else url),
                    n if pinned else None,
                    *(_units(source["text"], start, end) if pinned else (0, 0)),
                )
            )
        numbers = [place.number for place in places[first:]]
        claims.append((citation["claim_start"], citation["claim_end"], numbers))
    return places, claims


@functools.lru_cache(maxsize=64)
def _astral(text: str) -> tuple[int, ...]:
    """The places of characters that are two units in UTF-16."""
    return tuple(match.start() for match in re.finditer("[\U00010000-\U0010ffff]", text))


def _units(text: str, start: int, end: int) -> tuple[int, int]:
    wide = _astral(text)
    return start + bisect.bisect_left(wide, start), end + bisect.bisect_left(wide, end)


def web(url: str) -> str:
    """The address where it is one of http or https, else ""."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return ""
    printable = url.isprintable() and not re.search(r"[\s<>\"']", url)
    return url if parts.scheme in ("http", "https") and parts.hostname and printable else ""


def fragment(url: str, text: str, start: int, end: int) -> str:
    """The address with a text fragment that leads to `text[start:end]`: the words themselves, or of
    more than eight the first and the last four. Where they stand in the text before as well, the
    words before the place are given too."""
    said = text[start:end].split()
    if not said:
        return url
    exact = _encoded(said) if len(said) <= 8 else f"{_encoded(said[:4])},{_encoded(said[-4:])}"
    before = text[max(0, start - 200) : start].rsplit("\n", 1)[-1].split()[-3:]
    again = text.find(text[start:end]) < start
    prefix = f"{_encoded(before)}-," if again and before else ""
    base, hash, old = url.partition("#")
    return f"{base}#{old.partition(':~:')[0] if hash else ''}:~:text={prefix}{exact}"


def _encoded(words: Sequence[str]) -> str:
    return urllib.parse.quote(" ".join(words), safe="", errors="replace").replace("-", "%2D")


class _Body:
    """The answer's text as HTML, part by part, with its claims as links."""

    def __init__(
        self, text: str, claims: Sequence[tuple[int, int, list[int]]], places: Sequence[Place]
    ) -> None:
        text = text.encode("utf-8", "replace").decode("utf-8")  # halves of characters become "?"
        self.text, self.claims, self.places = text, claims, places
        marks = []
        for n, (start, end, _) in enumerate(claims):
            start += len(_BLOCK.match(text, start, end)[0])
            end = start + len(text[start:end].rstrip(" \t\n|"))
            if start < end:
                marks += [(start, 1, f"{_BEGIN}{n}{_DONE}"), (end, 0, f"{_END}{n}{_DONE}")]
        self.marks = sorted(marks)
        self.starts = [place for place, *_ in self.marks]
        self.parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
        self.parser.disable("image")

    def html(self, span: Sequence[int]) -> markupsafe.Markup:
        """A part of the text, sanitised."""
        start, end = span
        first = bisect.bisect_left(self.starts, start)
        last = bisect.bisect_right(self.starts, end)
        pieces = []
        for place, begins, mark in self.marks[first:last]:
            if place == (end if begins else start):
                continue  # it belongs to the part beside this one
            pieces += [_PRIVATE.sub("\ufffd", self.text[start:place]), mark]
            start = place
        pieces.append(_PRIVATE.sub("\ufffd", self.text[start:end]))
        clean = nh3.clean(
            self.parser.render("".join(pieces)),
            tags=_TAGS,
            attributes={"a": {"href"}, "td": {"colspan", "rowspan"}, "th": {"colspan", "rowspan"}},
            attribute_filter=_attribute,
            url_schemes={"http", "https"},
            link_rel="noopener noreferrer nofollow",
        )
        return markupsafe.Markup(_MARK.sub(self._link, clean))

    def title(self, text: str) -> str:
        """A title without what only this page may write."""
        return _PRIVATE.sub("\ufffd", text)

    def _link(self, match: re.Match[str]) -> str:
        """What a mark becomes: the claim as a link to its first place, then a number for each."""
        n = int(match[2])
        if n >= len(self.claims):
            return ""
        numbers = self.claims[n][2]
        places = [self.places[number - 1] for number in numbers]
        if match[1] == _BEGIN:
            kinds = {place.kind for place in places}
            kind = "claim bad" if "bad" in kinds else "claim open" if "open" in kinds else "claim"
            return f'<a class="{kind}" href="#p{numbers[0]}">'
        links = (
            f'<a class="number" href="#p{place.number}">{place.number}</a>' for place in places
        )
        return f"</a><sup>{' '.join(links)}</sup>"


def _attribute(tag: str, name: str, value: str) -> str | None:
    if name == "href":
        return value if web(value) and not _PRIVATE.search(value) else None
    if name == "rel":  # nh3's own; one that was written is not among the attributes
        return value
    return value if value.isdigit() and len(value) < 3 else None
