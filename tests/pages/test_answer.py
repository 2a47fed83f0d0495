"""The page of a report: what it shows, what it never does, and in a browser that it works."""

import base64
import hashlib
import html.parser
import json
import re
import shutil

import pytest
from envs.research import world

from jaxdeep.envs.research.report import Report, to_json
from jaxdeep.envs.research.sources import Shelf, source
from jaxdeep.errors import DataError
from jaxdeep.pages import answer

EVIL = "</pre></script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
HOSTILE = (
    f'<cite id="S1.1">{EVIL}</cite> **x** [a](javascript:alert(1)) [b](data:text/html,x) ![i](https://x.org/i.png) '
    '<a class="claim" href="#p1" onclick="x()">forged</a> <a href="https://x.org/" style="x">good</a> '
    '<iframe src="https://x.org"></iframe><style>*{}</style><svg onload="x()"></svg> \ue0000\ue002 \ue0010\ue002\n\n'
    f'## {EVIL}\n<table><tr><td colspan="2" onclick="x">cell <cite id="S1.2">é🎉 second</cite></td></tr></table>\n\n'
    '[t \ue0000\ue002](https://x.org/\ue0000\ue002 "\ue0000\ue002")\n'
)  # fmt: skip


@pytest.fixture
def hostile():
    shelf = Shelf([source("S1", f"🎉 First. 🎉 é second.\n\n{EVIL} third.", title=EVIL, url="https://x.org/a#b"),
                   source("S2", "x", url="javascript:alert(1)")])  # fmt: skip
    return to_json(Report(EVIL, HOSTILE, shelf, notes=(EVIL,)))


class Parsed(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


ALLOWED = {"class", "id", "href", "target", "rel", "data-source", "data-start", "data-end", "lang", "charset",
           "name", "content", "http-equiv", "type", "aria-label", "aria-live", "aria-pressed", "tabindex", "hidden",
           "method", "colspan"}  # fmt: skip


def test_nothing_of_a_hostile_report_is_code(hostile):
    text = answer.render(hostile)
    tags = Parsed(text).tags
    names = [tag for tag, _ in tags]
    assert names.count("script") == 1 and names.count("style") == 1
    assert not {"img", "iframe", "svg", "link", "object", "embed", "base"} & set(names)
    assert {key for _, attributes in tags for key in attributes} <= ALLOWED
    links = [a["href"] for tag, a in tags if tag == "a" and "href" in a]
    assert all(link.startswith(("https://x.org/", "#p")) for link in links), links
    claims = [a for tag, a in tags if tag == "a" and a.get("class", "").startswith("claim")]
    assert len(claims) == len(hostile["citations"]) == 2  # none was forged
    for tag, attributes in tags:
        if tag == "a" and attributes.get("href", "").startswith("http"):
            assert "noopener" in attributes["rel"]


def test_the_policy_allows_the_own_style_and_script_by_hash_and_nothing_else(hostile):
    text = answer.render(hostile)
    policy = next(a["content"] for t, a in Parsed(text).tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    for tag in ("style", "script"):
        (body,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_the_script_makes_no_markup_and_asks_nobody():
    script = (answer.FOLDER / "answer.js").read_text()
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(|XMLHttp|import\(",
        script,
    )
    assert (
        "<" not in script.replace(" < ", "")
        and "url(" not in (answer.FOLDER / "answer.css").read_text()
    )


def test_the_levels_and_the_places():
    text = answer.render(to_json(Report(world.QUESTION, world.GOLD, world.shelf(), 8)))
    assert text.count('<details class="node">') == 2 and text.count('<a class="claim"') == 4
    assert text.count("<li id=") == 4 and "4 exact" in text
    assert "https://example.org/Cyprus#:~:text=The%20capital%20of%20Cyprus%20is%20Nicosia." in text
    assert '<a class="claim" href="#p1">the capital of Cyprus is Nicosia</a><sup>' in text
    order = [
        text.index(words)
        for words in ("The answer is the", "Nicosia lies in Cyprus", "Citations", "Sources as")
    ]
    assert order == sorted(order)


def test_places_are_counted_as_a_script_counts(hostile):
    text = hostile["sources"][0]["text"]
    for tag, attributes in Parsed(answer.render(hostile)).tags:
        if tag == "li" and attributes.get("data-source"):
            units = text.encode("utf-16-le")
            place = units[
                2 * int(attributes["data-start"]) : 2 * int(attributes["data-end"])
            ].decode("utf-16-le")
            assert place in ("🎉 First.", "🎉 é second.")


@pytest.mark.parametrize(
    ("address", "good"),
    [
        ("https://x.org/a?b=c#d", True),
        ("http://x.org", True),
        ("HTTPS://x.org", True),
        ("javascript:alert(1)", False),
        ("java\nscript:x", False),
        ("data:text/html,x", False),
        ("file:///etc/passwd", False),
        ("//x.org", False),
        ("https://", False),
        ("https://x.org/ a", False),
        ('https://x.org/"onclick', False),
        ("http://[", False),
        ("", False),
    ],
)
def test_only_addresses_of_the_web_are_links(address, good):
    assert bool(answer.web(address)) == good


@pytest.mark.parametrize(
    ("text", "span", "expected"),
    [
        ("A well-known, good & old place.", "well-known, good & old", "#:~:text=well%2Dknown%2C%20good%20%26%20old"),
        ("one two three four five six seven eight nine.", "one two three four five six seven eight nine.",
         "#:~:text=one%20two%20three%20four,six%20seven%20eight%20nine."),
        ("It is so. Then it is so again.", "it is so again", "#:~:text=it%20is%20so%20again"),
    ],
)  # fmt: skip
def test_text_fragments(text, span, expected):
    start = text.index(span)
    assert (
        answer.fragment("https://x.org/", text, start, start + len(span))
        == "https://x.org/" + expected
    )


def test_a_text_fragment_of_words_that_stand_twice_has_what_comes_before():
    text = "He won it in May. She won it in June."
    start = text.rindex("won it in")
    found = answer.fragment("https://x.org/#old", text, start, start + 9)
    assert found == "https://x.org/#old:~:text=in%20May.%20She-,won%20it%20in"


def test_what_is_no_report_is_refused(tmp_path):
    with pytest.raises(DataError, match="not a whole report"):
        answer.page(tmp_path / "a.html", {"text": ""})


def test_halves_of_characters_and_an_empty_report_are_written(tmp_path):
    for said in ("", "\ud800 [S1.1] x"):
        answer.page(tmp_path / "a.html", to_json(Report("", said, world.shelf())))
        assert "Citations" in (tmp_path / "a.html").read_text()


@pytest.fixture
def browser():
    """Chromium, driven by playwright."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no chromium here")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )


@pytest.mark.slow
def test_a_browser_shows_the_source_beside_the_claim(browser, tmp_path):
    path = tmp_path / "report.html"
    answer.page(path, to_json(Report(world.QUESTION, world.GOLD, world.shelf(), 8)))
    page = browser.new_page(viewport={"width": 1300, "height": 800})
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(path.as_uri())
    mark, detail = page.locator("#beside mark"), page.locator("details.node")
    assert page.locator("#beside").is_hidden() and not page.evaluate(
        "document.querySelector('details.node').open"
    )
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    assert mark.text_content() == "The capital of Cyprus is Nicosia."
    assert "Cyprus is an island country." in page.locator("#beside .text").text_content()
    for _ in range(3):
        page.keyboard.press("j")
    assert mark.text_content() == "Cyprus adopted the Euro on 1 January 2008."
    page.keyboard.press("Escape")
    assert page.locator("#beside").is_hidden()
    assert page.evaluate("document.activeElement.className") == "claim"
    page.keyboard.press("o")
    assert page.evaluate("[...document.querySelectorAll('details.node')].every(d => d.open)")
    page.keyboard.press("o")
    page.locator("details.node a.claim").first.click()  # a link inside a summary does not fold it
    assert mark.text_content() == "Nicosia is the largest city of Cyprus."
    assert not detail.first.evaluate("node => node.open")
    page.emulate_media(media="print")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("#beside").is_hidden() and detail.first.evaluate("node => node.open")
    assert len(page.pdf()) > 10_000
    assert asked == [path.as_uri()] and said == []


@pytest.mark.slow
def test_a_browser_runs_nothing_of_a_hostile_report(browser, hostile, tmp_path):
    path = tmp_path / "report.html"
    answer.page(path, hostile)
    page = browser.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    page.keyboard.press("o")
    for link in page.locator("a.claim").all():
        link.evaluate("link => link.click()")  # what the first one held was removed
    assert page.title() == hostile["question"] != "owned" and asked == [path.as_uri()]
    assert page.locator("#beside mark").text_content() == "🎉 é second."
    assert (
        json.dumps(page.evaluate("[document.scripts.length, document.images.length]")) == "[1, 0]"
    )
