"""Reports of other systems."""

import json
import re

import pytest

from jaxdeep.envs.research import readers, report
from jaxdeep.errors import DataError

TRACE = """<think>Search.</think><call_tool name="pubmed_search">x</call_tool>
<tool_output>
Found 2 results.
<snippet id="111">Title: First paper.
Abstract: Response was 40 % in ten patients.</snippet>
<webpage id=call_2-0>URL: https://x.org/a
It says so here.</webpage>
</tool_output>
<snippet id="999">Title: Made up. It was written by the model.</snippet>
<tool_output><snippet id="222">Title: Second.
Cut in the mid</tool_output>
<answer>
Response was <cite id="111">40 %</cite>, as <cite id="call_2-0, 222">said</cite>. <cite id="999">Invented.</cite>
<cite id="333">Never shown.</cite>
</answer>"""
STATUSES = {"exact": 3, "unknown_source": 2}


def rows(**fields):
    return [
        {"problem": "q", "final_response": "x", "full_traces": {"generated_text": TRACE}},
        {"problem": "q", "full_traces": {"tool_calls": [{"generated_text": TRACE[:300]}, {"generated_text": TRACE[300:]}]}},
        {"question": "q", "sample_id": "s", "trajectory": {"interleaved_text": TRACE, "final_answer": "x"}},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": TRACE}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": TRACE}]},
    ]  # fmt: skip


@pytest.mark.parametrize("row", rows())
def test_dr_tulu(row):
    found = readers.read_row(row)
    assert found.question == "q" and found.counts == STATUSES and found.failed
    assert {s.id: s.title for s in found.shelf} == {
        "111": "First paper.",
        "call_2-0": "",
        "222": "Second.",
    }


def test_a_trace_without_a_closed_answer():
    cut = readers.read_text(TRACE.removesuffix("</answer>") + '<cite id="11')
    assert cut.incomplete and cut.counts == STATUSES
    none = readers.from_trace(
        "q", TRACE.split("<answer>")[0], "By **one** <cite id='111'>a</cite>."
    )
    assert none.counts == {"exact": 1} and none.notes == ("the trace has no <answer>",)
    assert readers.from_trace("q", "<tool_output>x</tool_output>").answer == ""


def test_an_answer_cannot_cite_what_comes_after_it():
    late = TRACE + "\n<tool_output><snippet id='333'>Shown too late.</snippet></tool_output>"
    assert readers.read_text(late).counts == {"exact": 3, "unknown_source": 1, "not_yet_shown": 1}


def test_sqa():
    cite = {"id": "[7]", "title": "T", "snippets": ["Water boils at 100 degrees.", " "]}
    section = {"title": "Heat", "text": "Water boils at 100 degrees [7][8]. Ice melts [9].",
               "citations": [cite, {"id": "[8]", "snippets": []}]}  # fmt: skip
    found = readers.read_row({"question": "q", "response": {"sections": [section]}})
    assert found.counts == {"exact": 1, "no_text": 1, "unknown_source": 1}
    assert found.tree.title == "Heat" and found.measures()["citation_recall"] == 0.5


@pytest.mark.parametrize(
    ("output", "first", "statuses"),
    [
        ("A is b [0]. C is d [1-2].", 0, {"exact": 3}),
        ("A is b [1]. C is d [2, 3].", 1, {"exact": 3}),
        ("A is b [0]. C is d [3].", 0, {"exact": 1, "unknown_source": 1}),
    ],
)
def test_passages_are_counted_from_0_or_1(output, first, statuses):
    passages = [{"title": t, "text": f"Text of {t}."} for t in "abc"]
    found = readers.read_row({"input": "q", "output": output, "ctxs": passages})
    assert found.counts == statuses and str(first) in found.notes[0]


MARKDOWN = [
    ("A is b [1]. C is d [2][3].\n\n## References\n\n[1] https://a.org/x - Title A\n[2]. https://b.org\n", {"no_text": 2, "unknown_source": 1}),
    ("# R\n\nA is b [1].\n\n参考文献：\n[1] https://a.org - T", {"no_text": 1}),
    ("A is b [1].\n\n[1]: https://a.org", {"no_text": 1}),
    ("A is b.[^1]\n\n[^1]: https://a.org Title", {"no_text": 1}),
    ("A is b [1].\n\n**Sources:**\n- [1](https://a.org) Title\n", {"no_text": 1}),
    ("A is b [1]. In [2024] too.", {"unknown_source": 1}),
    ("A is b.", {}),
    ('A is b <qwen:cite id="id_1, id_2">quoted words of it</qwen:cite>.\n\nReferences:\n[1]. https://a.org\n', {"no_text": 1, "unknown_source": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "statuses"), MARKDOWN)
def test_markdown(text, statuses):
    found = readers.read_text(text)
    assert found.counts == statuses
    assert "https" not in found.text and "ources" not in found.text


def test_markdown_with_the_texts_of_its_sources():
    text = 'It fell <qwen:cite id="id_1">fell by 5 percent in May</qwen:cite>.\n\nReferences:\n[1]. https://a.org\n'
    found = readers.read_text(text)
    assert [found.text[c.start : c.end] for c in found.citations] == ["It fell."]
    for said, status in (
        ("Prices fell by 5 percent in May.", "exact"),
        ("Prices fell by 6 percent in May.", "altered"),
        ("Nothing of that sort is in this text.", "fabricated"),
    ):
        assert report.with_sources(found, {"id_1": said}).counts == {status: 1}
    assert found.shelf.get("id_1").url == "https://a.org"


def test_files(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows()) + "\n\n", encoding="utf-8-sig")
    assert [r.counts for r in readers.read(path)] == [STATUSES] * len(rows())
    path.write_text(json.dumps(rows()))
    assert len(readers.read(path)) == len(rows())
    (tmp_path / "trace.txt").write_text(TRACE)
    assert readers.read(tmp_path / "trace.txt")[0].counts == STATUSES
    (tmp_path / "own.json").write_text(json.dumps(report.to_json(readers.read_text(TRACE))))
    assert readers.read(tmp_path / "own.json")[0].counts == STATUSES


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.json", None, "cannot be read"),
        ("a.json", "", "is empty"),
        ("a.json", "{", "is not JSON"),
        ("a.jsonl", '{"question": "q", "answer": "a"}\n{', "a.jsonl:2 is not JSON"),
        ("a.json", "[]", "holds no report"),
        ("a.json", '{"x": 1}', "found x"),
        ("a.json", "3", "no report, found int"),
        ("a.json", '{"question": "q", "response": {"sections": [3]}}', "not a whole report"),
        ("a.json", '{"messages": [{"role": "robot"}]}', "not a whole report"),
        ("a.json", '{"format": 9, "answer": "", "sources": []}', "format 9"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message):
        readers.read(path)


def test_folders_of_sources(tmp_path):
    for place, message in ((tmp_path / "none", "not a folder"), (tmp_path, "holds no")):
        with pytest.raises(DataError, match=message):
            readers.source_texts(place)
    (tmp_path / "S1.txt").write_bytes(b"caf\xc3\xa9 \xff")
    (tmp_path / "x.pdf").write_bytes(b"")
    assert readers.source_texts(tmp_path) == {"S1": "café \ufffd"}


# On real data, against what a plain search finds.


def test_real_traces(shared):
    path = shared("traces/dr_tulu_pubmed.jsonl")
    found = readers.read(path)
    for row, one in zip(map(json.loads, path.open()), found, strict=True):
        text = row["trajectory"]["interleaved_text"]
        shown = set(re.findall(r'<snippet id="([^"]+)">', text))
        assert {s.id for s in one.shelf} == shown
        answer = text.rpartition("<answer>")[2] if "<answer>" in text else ""
        ids = re.findall(r'<cite id="([^"]*)">.*?</cite>', answer, re.S)
        never = [id for id in ids if id not in shown]
        assert one.counts["unknown_source"] == len(never)
    assert sum(one.failed for one in found) == 2 and report.totals(found)["exact"] == 48


def test_real_reports(shared):
    for number, count in ((1, 95), (2, 217), (3, 129), (4, 203)):
        path = shared(f"traces/webweaver/report_{number}.md")
        (found,) = readers.read(path)
        ids = re.findall(r'<qwen:cite id="([^"]*)">', path.read_text())
        assert len(ids) == count and sum(found.counts.values()) == sum(
            len(i.split(",")) for i in ids
        )
        assert not found.failed and found.tree.children
    found = readers.read(shared("scholarqa/sqa_multi_human_answers.json"))
    assert report.totals(found) == {"exact": 766, "unknown_source": 9}
    found = readers.read(shared("deep_research_bench/raw_claude-3-7-sonnet-latest.jsonl"))
    assert set(report.totals(found)) == {"no_text"} and len(found) == 100
