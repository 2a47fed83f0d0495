"""The terminal table fits; the page is whole, stands alone, and shows text as text."""

import html.parser
import re

import pytest

from jaxdeep.pages import report
from jaxdeep.types import Branch, Message, Piece, Stop, Task, ToolCall, Trajectory

HOSTILE = "<script>alert('x')</script> & \"quoted\" {{ 7 * 7 }} $a_b$"
ROWS = [
    {"name": "base", "n": 200, "em": 0.045, "em_low": 0.023, "em_high": 0.083, "failed": 0},
    {"name": "grpo", "n": 200, "em": 0.715, "em_low": 0.649, "em_high": 0.773, "failed": 3},
]
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}


def rollout(**changes):
    messages = [
        Message("system", "Use the tools."),
        Message("user", f"question {HOSTILE}"),
        Message(
            "assistant",
            reasoning=f"thought {HOSTILE}",
            calls=(
                ToolCall("search", {"query": f"query {HOSTILE}", "k": 3}),
                ToolCall("search", error=f"error {HOSTILE}"),
            ),
        ),
        Message("tool", f"result {HOSTILE}\nsecond line", name=f"name {HOSTILE}"),
        Message("assistant", f"answer {HOSTILE}"),
    ]
    return Trajectory(
        **{
            "task": Task("facts-1", f"question {HOSTILE}", (f"gold {HOSTILE}",)),
            "messages": messages,
            "branches": [Branch([Piece([1], "world"), Piece([2] * 1234, "policy", [0.0] * 1234)])],
            "stop": Stop.MAX_TURNS,
            "rewards": {f"reward {HOSTILE}": 0.25, "format": None},
            "reward": 0.25,
            **changes,
        }
    )


class Document(html.parser.HTMLParser):
    """Elements with their attributes, the text by element, and whether every tag is closed in
    order."""

    def __init__(self, source):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    report.page(
        path,
        title=f"title {HOSTILE}",
        rows=[*ROWS, {"name": f"row {HOSTILE}", "n": None}],
        curves={
            f"curve {HOSTILE}": [(0, 0.1), (10, 0.7)],
            "_loss": [(step, 1 / (1 + step)) for step in range(50)],
            "empty": [],
        },
        trajectories={
            f"heading {HOSTILE}": [rollout(), rollout(reward=1.0, stop=Stop.FINISHED)],
            "before": [rollout(reward=None, stop=Stop.FAILED, failure=f"failure {HOSTILE}")],
        },
        notes=[f"note {HOSTILE}"],
        along=f"along {HOSTILE}",
        links={f"link {HOSTILE}": 'deep/a "page".html'},
        commands={f"next {HOSTILE}": f"command {HOSTILE}"},
    )
    return path.read_text(encoding="utf-8")


def test_every_text_is_shown_as_it_was_written(page):
    document = Document(page)
    text = "".join(document.text)
    kinds = (
        "title row curve along heading note link next command question thought error result name "
        "answer gold reward failure"
    )
    for kind in kinds.split():
        assert f"{kind} {HOSTILE}" in text, kind
    assert "second line" in text
    assert '"query": "query <script>' in text  # the call's arguments, as JSON
    assert all(tag != "script" for tag, _ in document.elements)


def test_the_page_asks_nothing_of_anyone(page):
    document = Document(page)
    policy = next(a["content"] for _, a in document.elements if "http-equiv" in a)
    assert "default-src 'none'" in policy
    for tag, attributes in document.elements:
        assert tag not in {"script", "link", "iframe", "img", "object", "embed", "form"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"href", "src", "xlink:href", "action"}:
                assert value.startswith("#") or value == 'deep/a "page".html'  # beside it
    assert "url(" not in re.sub(r"url\(#\w+\)", "", page) and "@import" not in page


def test_results_curves_and_rollouts_are_there(page):
    document = Document(page)
    text = "".join(document.text)
    tags = [tag for tag, _ in document.elements]
    assert "0.715" in text and "0.649 to 0.773" in text
    # each quantity has axes of its own; a curve without a point has none
    assert tags.count("svg") == tags.count("figure") == 2 and "empty" not in text
    assert "0.100 to 0.700" in text and text.count(f"along {HOSTILE}") == 2
    rollouts = [a for _, a in document.elements if "rollout" in a.get("class", "").split()]
    assert len(rollouts) == 3 and ["open" in each for each in rollouts] == [True, False, True]
    # Folded: the thinking, both calls, the tool's result and the system message of each rollout.
    assert tags.count("details") == 3 + 3 * 5
    roles = ["system", "user", "assistant", "tool", "assistant"]
    shown = [a["class"] for _, a in document.elements if a.get("class", "").startswith("message ")]
    assert shown == [f"message {role}" for role in roles] * 3
    for said in ("max turns", "finished", "failed", "no reward", "reward 0.250", "1,234"):
        assert said in text


def test_the_plot_follows_the_pages_colours(page):
    svg = page[page.index("<svg") : page.rindex("</svg>")]
    used = set(re.findall(r"var\(--([\w-]+)\)", svg))
    assert {"series", "muted", "line"} == used
    # Nothing is painted black, which dark mode would hide.
    assert not re.search(r"#0[0-3]0[0-3]0[0-9]|#000000", svg)
    for name in used:
        assert page.count(f"--{name}: #") == 2, f"{name} has a light and a dark colour"


def test_a_point_before_training_is_marked(tmp_path):
    marks = []
    for begin in (0, 1):
        curves = {"em": [(begin, 0.25), (40, 0.5)]}
        path = tmp_path / f"{begin}.html"
        report.page(path, title="t", rows=[], curves=curves, trajectories={}, notes=[])
        marks.append(path.read_text().count("<use "))
    assert marks[0] == marks[1] + 1


def test_an_empty_page_is_a_page(tmp_path):
    report.page(tmp_path / "r.html", title="none", rows=[], curves={}, trajectories={}, notes=[])
    text = "".join(Document((tmp_path / "r.html").read_text()).text)
    assert "Results" not in text and "Curves" not in text and "Rollouts" not in text


def test_half_a_surrogate_pair_does_not_lose_the_page(tmp_path):
    path = tmp_path / "r.html"
    report.page(path, title="a \ud83d b", rows=[], curves={}, trajectories={}, notes=[])
    assert "a ? b" in path.read_text(encoding="utf-8")


def test_the_same_input_gives_the_same_page(tmp_path):
    pages = []
    for name in ("a", "b"):
        report.page(
            tmp_path / name,
            title="t",
            rows=ROWS,
            curves={"em": [(0, 0), (1, 1)]},
            trajectories={"after": [rollout()]},
            notes=[],
        )
        pages.append((tmp_path / name).read_text())
    assert pages[0] == pages[1]


def test_the_table_fits_and_loses_nothing():
    long = [{**row, "name": row["name"] * 30, "f1": 0.5, "p": 1e-7, "note": None} for row in ROWS]
    text = report.table(long, ["name", "n", "em", "f1", "failed", "p", "note"])
    assert max(map(len, text.split("\n"))) <= 80
    assert text.count("g") == 30  # folded, not cut
    for value in ("0.715", "[0.65,0.77]", "1.0e-07", "–"):
        assert value in text


def test_brackets_in_a_table_are_no_markup():
    assert "[bold]x[/bold] [0.5]" in report.table([{"name": "[bold]x[/bold] [0.5]"}], ["name"])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "True"),
        (1234, "1,234"),
        (0.0, "0.000"),
        (0.71549, "0.715"),
        (-2.5, "-2.500"),
        (12345.6, "12,346"),
        (0.00012, "1.2e-04"),
        ("x", "x"),
    ],
)
def test_numbers_are_written_for_people(value, text):
    assert report.table([{"v": value}], ["v"]).split("\n")[-1].strip() == text
