"""Citations as models write them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdeep.envs.research.cite import parse_marks, parse_tags, reference, references


def found(parsed):
    return [
        (",".join(f"{r.source}:{r.first}-{r.last}" if r.first is not None else r.source for r in c.references),
         parsed.text[c.start : c.end], c.quote)
        for c in parsed.citations
    ]  # fmt: skip


FORMS = [
    ('<cite id="S2.2">a b</cite>', [("S2:2-2", "a b", "")]),
    ("<cite id='S2.2'>a b</cite>", [("S2:2-2", "a b", "")]),
    ("<cite id=S2.2>a b</cite>", [("S2:2-2", "a b", "")]),
    ('<cite ids="S2">a b</cite>', [("S2", "a b", "")]),
    ('<CITE ID="s2.2">a b</CITE>', [("S2:2-2", "a b", "")]),
    ('<cite id = "S2.2" >a b</cite >', [("S2:2-2", "a b", "")]),
    ('< cite id="S2.2">a b</ cite>', [("S2:2-2", "a b", "")]),
    ('<cite\nid="S2.2">a b</cite>', [("S2:2-2", "a b", "")]),
    ('<qwen:cite id="id_3, id_7">a b</qwen:cite>', [("id_3,id_7", "a b", "")]),
    ('<cite id="S1.1,S2.2-4">a b</cite>', [("S1:1-1,S2:2-4", "a b", "")]),
    ('<cite id="S1.1; S2.2">a b</cite>', [("S1:1-1,S2:2-2", "a b", "")]),
    ('<cite id="S1.1 S2.2">a b</cite>', [("S1:1-1,S2:2-2", "a b", "")]),
    ('<cite id="[S2.2]">a b</cite>', [("S2:2-2", "a b", "")]),
    ('<cite id="S2.2–4">a b</cite>', [("S2:2-4", "a b", "")]),
    ('<cite id="S2.2 - 4">a b</cite>', [("S2:2-4", "a b", "")]),
    ('<cite id="S2.2-S2.4">a b</cite>', [("S2:2-4", "a b", "")]),
    ('<cite id="S2.2-S3.4">a b</cite>', [("S2.2-S3.4", "a b", "")]),
    ('<cite id="S02.02">a b</cite>', [("S2:2-2", "a b", "")]),
    ('<cite id="S2.2" quote="x > y &quot;z&quot;">a b</cite>', [("S2:2-2", "a b", 'x > y "z"')]),
    ('<cite id="S2.2" quote="it \\"is\\" so">a b</cite>', [("S2:2-2", "a b", 'it "is" so')]),
    ('<cite quote="q r s" id="S2.2">a b</cite>', [("S2:2-2", "a b", "q r s")]),
    ("<cite id=“S2.2”>a b</cite>", [("S2:2-2", "a b", "")]),
    ('<cite id="S2.2>a b</cite> and "c"', [("S2:2-2", "a b", "")]),
    ('<cite id="27822323-1">a b</cite>', [("27822323-1", "a b", "")]),
    ('<cite id="PMID:23515142">a b</cite>', [("PMID:23515142", "a b", "")]),
    ("<cite>a b</cite>", [("", "a b", "")]),
    ('<cite id="">a b</cite>', [("", "a b", "")]),
    ('A fact. <cite id="S1.1"/> More.', [("S1:1-1", "A fact.", "")]),
    ('A fact <cite id="S1.1"></cite>. More.', [("S1:1-1", "A fact .", "")]),
    ('<cite id="S1.1">a <cite id="S2.1">b</cite> c</cite>', [("S1:1-1", "a b c", ""), ("S2:1-1", "b", "")]),
    ('<cite id="S1.1">open\n\nnext block', [("S1:1-1", "open", "")]),
    ('<cite id="S1.1">one\n\ntwo</cite> x', [("S1:1-1", "one", "")]),
    ('`<cite id="S9">code</cite>` x', []),
    ('```\n<cite id="S9">code</cite>\n```\nx', []),
    ('a cut answer <cite id="S1.1">in the midd', []),
    ('a cut tag <cite id="S1.', []),
    ("a cut tag <ci", []),
    ("<citation id='S1'>no</citation> a < b and c > d", []),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "expected"), FORMS)
def test_forms_of_tags(answer, expected):
    parsed = parse_tags(answer)
    assert found(parsed) == expected
    assert "<cite" not in parsed.text or "`" in answer


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("<cite>a</cite>", "without an id"),
        ("a</cite>", "without an opening"),
        ('<cite id="S1">a', "not closed"),
        ('<cite id="S1', "does not end"),
        ('<cite id="S1">a\n\nb</cite>', "more than one block"),
        ('<cite id="S1">a</cite> b [S1.2]', "beside tags"),
        ('<cite id="S1">' * 10 + "</cite>" * 10, "inside 8 others"),
    ],
)
def test_what_cannot_be_read_is_told(answer, problem):
    assert any(problem in told for told in parse_tags(answer).problems)


MARKS = [
    ("A is b. [1] C is d.", [("1", "A is b.", "")]),
    ("A is b [1]. C is d.", [("1", "A is b.", "")]),
    ("A is b [1][2].", [("1,2", "A is b.", "")]),
    ("A is b [1] [2].", [("1,2", "A is b.", "")]),
    ("A is b [1, 3-5].", [("1,3,4,5", "A is b.", "")]),
    ("A is b [[1]](https://x.org).", [("1", "A is b.", "")]),
    ("A is b [1](https://x.org).", [("1", "A is b.", "")]),
    ("A is b.[^2]\nC is d.", [("2", "A is b.", "")]),
    ("A is b [S2.2-3].", [("S2:2-3", "A is b.", "")]),
    ("A is b [doc-7].", [("doc-7", "A is b.", "")]),
    ("[0] measures it.", [("0", " measures it.", "")]),
    ("- one [1]\n- two [2]", [("1", "- one", ""), ("2", "- two", "")]),
    ("| a [1] | b |\n| c [2] | d |", [("1", "| a | b |", ""), ("2", "| c | d |", "")]),
    ("# Head\nText is here [1].", [("1", "Text is here.", "")]),
    ("In [2019] it was [Apollo 13, 1970] and [link](x) ![4](y) `[5]`.", []),
    ("x [1-900] y", []),
]


@pytest.mark.parametrize(("answer", "expected"), MARKS)
def test_marks_belong_to_the_sentence_before_them(answer, expected):
    found_ = [(a, b.strip(), c) for a, b, c in found(parse_marks(answer, {"doc-7"}))]
    assert found_ == [(a, b.strip(), c) for a, b, c in expected]


def test_years_are_told_unless_a_source_has_the_number():
    assert "1 numbers" in parse_marks("It was so [2019].").problems[0]
    assert len(parse_marks("It was so [2019].", {"2019"}).citations) == 1


def test_references_by_themselves():
    assert [r.source for r in references("1, 2;3")] == ["1", "2", "3"]
    assert reference("S3.2-1")[1:] == ("S3", 2, 1)


PIECES = st.sampled_from(
    ["<cite ", 'id="S1.2"', "id=S1", "ids='a,b'", ">", "/>", "</cite>", "<", '"', "'", "\\", "quote=", "=",
     "[", "]", "S1.2", "[1-3]", "^", "\n", "\n\n", "# ", "`", "```\n", "word ", ". ", "é", "&quot;", "\0",
     "<qwen:cite", "\u202e", "(", ")"]
)  # fmt: skip


@given(st.lists(PIECES, max_size=40).map("".join))
@settings(max_examples=400, deadline=None)
def test_nothing_raises_and_claims_lie_in_the_text(answer):
    for parsed in (parse_tags(answer), parse_marks(answer, {"S1"})):
        for citation in parsed.citations:
            assert 0 <= citation.start <= citation.end <= len(parsed.text)
            assert citation.references


@pytest.mark.parametrize(
    "part",
    ['<cite id="S1.1">x</cite> ', "<cite ", '<cite id="', "</cite>", '<cite id="S1">', "x [1]", "[1", "`", "x [1].\n"],
)  # fmt: skip
def test_time_is_linear(part):
    answer = part * 20_000  # quadratic time would be minutes
    for parsed in (parse_tags(answer), parse_marks(answer)):
        assert len(parsed.text) <= len(answer)
