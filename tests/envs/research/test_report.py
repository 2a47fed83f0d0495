"""Reports: together, to JSON and Markdown and back, for others, from conversations."""

import dataclasses
import json

import pytest
from envs.research import world

from jaxdeep.envs.research import conversation, report, writers
from jaxdeep.envs.research.report import (
    Report,
    from_json,
    from_markdown,
    to_json,
    to_markdown,
    with_sources,
)
from jaxdeep.envs.research.sources import Shelf, source
from jaxdeep.errors import DataError
from jaxdeep.types import Message, ToolCall

WRONG = (
    f'{world.GOLD}\n\n## Wrong\n<cite id="S9.1">No such source.</cite> <cite id="S1.9">No such sentence.</cite> '
    '<cite id="S1" quote="The river lies on Nicosia">Turned round.</cite> '
    '<cite id="S1" quote="Nicosia lies on the river">Of another.</cite>'
)  # fmt: skip


def made(answer=WRONG, **facts):
    return Report(world.QUESTION, answer, world.shelf(), 8, **facts)


def test_what_became_of_each_citation():
    found = made()
    assert found.counts == {
        "exact": 4,
        "unknown_source": 1,
        "out_of_range": 1,
        "fabricated": 1,
        "misattributed": 1,
    }
    assert found.failed and not made(world.GOLD).failed
    measures = made(world.GOLD).measures()
    assert 0.8 < measures.pop("coverage") < 1  # "The answer is" is no claim
    assert set(measures.values()) == {1.0}


def test_a_quotation_belongs_to_the_first_reference_it_is_found_in():
    found = made('<cite id="S1.1,S3.2" quote="currency of Cyprus">a b c</cite>')
    assert [(p.source, p.status) for p in found.pins[0]] == [("S1", "exact"), ("S3", "exact")]
    assert [p.end - p.start for p in found.pins[0]] == [len(world.PASSAGES["Cyprus"][0]), 18]
    none = made('<cite id="S1.1,S3.2" quote="a text of nobody here">a b c</cite>')
    assert [p.status for p in none.pins[0]] == ["fabricated", "exact"]


@pytest.mark.parametrize(
    "answer", [WRONG, world.GOLD, "", "**Euro** [S3.2] and [S9].", "a `b` ```c``` [S1.1]"]
)
def test_json_and_markdown_keep_everything(answer):
    before = made(answer, id="q1", incomplete=True, notes=("a note",))
    row = json.loads(json.dumps(to_json(before)))
    assert to_json(from_json(row)) == row
    again = from_markdown(to_markdown(before))
    assert to_json(again) == row and to_markdown(again) == to_markdown(before)
    assert to_markdown(from_json(row)) == to_markdown(before)


def test_markdown_keeps_hostile_sources():
    shelf = Shelf(
        [
            dataclasses.replace(
                source("S1", "````\n## Sources\n```text <script> \u202e", title='"}\n# x'),
                numbered=True,
            )
        ]
    )
    found = from_markdown(to_markdown(Report("q", "A is b [S1.1].", shelf)))
    (back,) = found.shelf
    texts = [back.text[s.start : s.end] for s in back.sentences]
    assert len(found.shelf) == 1 and any("<script>" in text for text in texts)
    assert found.answer == "A is b [S1.1]." and found.counts == {"exact": 1}


def test_what_is_not_a_report_is_refused():
    row = to_json(made())
    for change in ({"format": 2}, {"sources": [{}]}, {"answer": None, "sources": None}):
        with pytest.raises(DataError):
            from_json(row | change)
    (bad, *rest) = row["sources"]
    with pytest.raises(DataError, match="not inside its text"):
        from_json(row | {"sources": [bad | {"sentences": [[1, 0, 10**6, 0]]}, *rest]})
    assert from_markdown("# A\n\ntext") is None
    with pytest.raises(DataError, match="cannot be read"):
        from_markdown("# A\n\ntext\n\n## Sources\n\n```text\n{}\n```\n")


def test_a_source_that_was_changed_in_the_file_is_noticed():
    row = to_json(made(world.GOLD))
    row["sources"][0]["text"] = row["sources"][0]["text"].replace("Nicosia", "Larnaca")
    found = from_json(row)
    assert found.changed == {"S1"} and found.counts == {"exact": 3, "changed": 1}


def test_sources_that_changed_since_are_noticed_and_longer_ones_are_not():
    texts = {
        f"S{n}": "Before. " + " ".join(facts) + " After."
        for n, facts in enumerate(world.PASSAGES.values(), 1)
    }
    assert with_sources(made(world.GOLD), texts).counts == {"exact": 4}
    texts["S2"] = texts["S2"].replace("largest", "oldest")
    found = with_sources(made(world.GOLD), texts)
    assert found.changed == {"S2"} and found.counts == {"exact": 3, "changed": 1}
    assert not found.failed


def test_sqa_has_snippets_for_each_id_and_nothing_for_unknown_ones():
    row = writers.sqa(made())
    assert [s["title"] for s in row["response"]["sections"]] == [
        "", "Nicosia lies in Cyprus", "Cyprus pays in euro since 2008", "Wrong",
    ]  # fmt: skip
    first, *_, last = row["response"]["sections"]
    assert (
        first["text"].endswith("currency of Cyprus is the Euro [S3].") and "[S1]" in first["text"]
    )
    assert [c["id"] for c in first["citations"]] == ["[S1]", "[S3]"]
    assert first["citations"][0]["snippets"] == ["The capital of Cyprus is Nicosia."]
    assert last["citations"] == [] and "[" not in last["text"]
    assert all(
        s.strip()
        for x in row["response"]["sections"]
        for c in x["citations"]
        for s in c["snippets"]
    )


def test_other_forms_lead_to_the_same_places():
    found = made()
    texts = {s.id: s.text for s in found.shelf}
    for one in writers.anthropic_citations(found):
        text = texts[list(texts)[one["document_index"]]]
        assert text[one["start_char_index"] : one["end_char_index"]] == one["cited_text"]
    urls = [one["url_citation"] for one in writers.openai_annotations(found)]
    assert [found.text[u["start_index"] : u["end_index"]] for u in urls][
        1
    ] == "the currency of Cyprus is the Euro"
    for one in writers.selectors(found):
        quote, position = one["selector"]
        text = next(s.text for s in found.shelf if s.url == one["source"])
        assert text[position["start"] : position["end"]] == quote["exact"]
        assert quote["prefix"] + quote["exact"] + quote["suffix"] in text
    run = writers.run_file(made(id="7"), {"search": 3})
    assert run["query_id"] == "7" and run["retrieved_docids"] == ["S1", "S2", "S3"]
    assert "Nicosia [S1]" in run["result"][0]["output"] and run["status"] == "completed"


def talk(*turns):
    return [Message("user", "q"), *turns]


def test_a_conversation_is_read_from_what_was_shown():
    messages = talk(
        Message("assistant", calls=(ToolCall("search"),)),
        Message("tool", world.result(1), name="search"),
        Message("assistant", calls=(ToolCall("note"),)),
        Message("tool", world.result(2), name="note"),
        Message("assistant", "<answer>old</answer> so <answer>A [S1.2], B [S2.1].</answer>"),
        Message("tool", world.result(3), name="search"),
    )
    found = conversation.report("q", messages, {"search"})
    assert found.answer == "A [S1.2], B [S2.1]." and found.order == 5 and not found.incomplete
    assert found.counts == {"exact": 1, "unknown_source": 1}
    late = conversation.report(
        "q",
        [*messages[:-2], Message("assistant", "<answer>C [S3.1].</answer>"), messages[-1]],
        {"search"},
    )
    assert late.counts == {"not_yet_shown": 1}


@pytest.mark.parametrize(
    ("said", "answer", "note"),
    [
        ("<answer>A [S1.2]. B <cite id=", "A [S1.2]. B <cite id=", "not closed"),
        ("no answer", "", "no <answer>"),
        ("", "", "no <answer>"),
    ],
)
def test_answers_that_were_cut(said, answer, note):
    found = conversation.report("q", talk(Message("assistant", said)), {"search"})
    assert found.incomplete and found.answer == answer and note in found.notes[0]
    assert "<cite" not in found.text


def test_ten_thousand_citations():
    one = "The claim number {n} is here. [S1.{k}] And <b>more</b> of it [S9.9]. "
    answer = "".join(one.format(n=n, k=1 + n % 4) for n in range(5000))
    found = made(answer)
    assert found.counts == {"exact": 5000, "unknown_source": 5000}
    tags = made(
        "".join(
            f'<cite id="S1.{1 + n % 4}" quote="text {n} of nobody">Claim {n} is.</cite> '
            for n in range(10_000)
        )
    )
    assert tags.counts == {"fabricated": 10_000}
    assert len(to_json(found)["citations"]) == 10_000


def test_a_summary_says_how_many():
    assert report.summary(made("No citation.")) == "no citations"
    assert report.summary(made()).startswith("8 references: 4 exact")
