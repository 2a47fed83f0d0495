"""Files to documents, documents to passages, passages to hits."""

import itertools
import json
import math
import random
import re
import subprocess
import sys
import time

import pytest

from jaxdeep.errors import DataError
from jaxdeep.rewards import answers
from jaxdeep.tools import corpus
from jaxdeep.tools.bm25 import BM25
from jaxdeep.tools.corpus import Document, Passage, chunk, read_corpus


def texts(count, seed=0):
    """Random texts of words, sentences, lines, paragraphs, odd spaces and long runs without any."""
    draw = random.Random(seed)
    glue = [" "] * 8 + [
        ". ",
        "! ",
        '." ',
        "\n",
        "\n\n",
        " \n \n\t",
        "   ",
        "\u00a0",
        "\u2003",
        "\r\n",
    ]
    for _ in range(count):
        words = ("x" * draw.choice([1, 3, 5, 8, 40]) for _ in range(draw.randrange(60)))
        parts = [w + (draw.choice(glue) * draw.choice([1, 1, 1, 30])) for w in words]
        yield draw.choice(["", " ", "\n\n"]) + "".join(parts)


def test_passages_cover_every_character_once():
    for number, text in enumerate(texts(300)):
        size = random.Random(number).randrange(1, 120)
        passages = chunk(Document("d", "t", text), size)
        covered = [0] * len(text)
        for passage in passages:
            assert 0 < len(passage.text) <= size
            assert text[passage.start : passage.end] == passage.text == passage.text.strip()
            for index in range(passage.start, passage.end):
                covered[index] += 1
        assert all(n == 1 for n, c in zip(covered, text, strict=True) if not c.isspace())
        assert max(covered, default=0) <= 1
        assert [p.id for p in passages] == [f"d#{n}" for n in range(len(passages))]


def test_overlapping_passages_cover_everything_and_move_on():
    for number, text in enumerate(texts(300, seed=1)):
        draw = random.Random(number)
        size = draw.randrange(2, 120)
        overlap = draw.randrange(1, size)
        passages = chunk(Document("d", "t", text), size, overlap)
        covered = [0] * len(text)
        for passage in passages:
            assert 0 < len(passage.text) <= size
            assert text[passage.start : passage.end] == passage.text == passage.text.strip()
            for index in range(passage.start, passage.end):
                covered[index] += 1
        assert all(n >= 1 for n, c in zip(covered, text, strict=True) if not c.isspace())
        for one, two in itertools.pairwise(passages):
            assert one.start < two.start and one.end < two.end
            assert two.start >= one.end - overlap


def test_cuts_fall_at_the_best_border():
    def parts(text, size, overlap=0):
        return [passage.text for passage in chunk(Document("d", "", text), size, overlap)]

    assert parts("aa bb.\ncc\n\ndd ee ff", 14) == ["aa bb.\ncc", "dd ee ff"]
    assert parts("aa bb. cc\ndd ee ff", 14) == ["aa bb. cc", "dd ee ff"]
    assert parts("aa bb! cc dd ee ff", 11) == ["aa bb!", "cc dd ee ff"]
    assert parts("aa bb cc dd ee ff", 11) == ["aa bb cc dd", "ee ff"]
    assert parts("aaaaaaaa bbb", 5) == ["aaaaa", "aaa", "bbb"]
    assert parts("a\n\nbb cc dd ee ff gg", 12) == ["a\n\nbb cc dd", "ee ff gg"]  # no crumbs
    assert parts("aa bb cc dd ee ff", 8, 4) == ["aa bb cc", "cc dd ee", "ee ff"]


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (5, 5), (5, -1)])
def test_sizes_that_cannot_work_are_refused(size, overlap):
    with pytest.raises(ValueError, match="need size >= 1"):
        chunk(Document("d", "", "a b"), size, overlap)


def test_headings_are_the_titles_of_what_stands_below(tmp_path):
    path = tmp_path / "report.md"
    path.write_text(
        "intro words here\n\n# First part\n\nalpha alpha alpha\n\n## C# ##\n\nbeta beta beta\n"
        "\n```\n# a comment\n```\n\ngamma gamma gamma\n"
    )
    (document,) = read_corpus(path)
    assert document.title == "First part" and document.source == document.id == "report.md"
    titles = {passage.text.split()[-1]: passage.title for passage in chunk(document, 20)}
    assert titles["here"] == "First part"  # above all headings: the document's
    assert titles["alpha"] == "First part"
    assert titles["beta"] == titles["gamma"] == "C#"


def test_a_folder_is_read_in_order_of_its_paths(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "page.txt").write_bytes("\ufeffplain\r\ntext".encode())
    (tmp_path / "a.md").write_text("# Title\ntext")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "picture.png").write_bytes(b"\xff")
    (tmp_path / ".git" / "hidden.txt").write_text("hidden")
    rows = [{"id": 7, "text": "seven"}, {"contents": "eight", "title": "VIII"}, {"text": ""}]
    (tmp_path / "c.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "d.json").write_text(json.dumps([{"paragraph_text": "nine", "title": None}]))
    documents = read_corpus(tmp_path)
    assert [(d.id, d.title, d.text, d.source) for d in documents] == [
        ("a.md", "Title", "# Title\ntext", "a.md"),
        ("b/page.txt", "page", "plain\ntext", "b/page.txt"),
        ("7", "", "seven", "c.jsonl"),
        ("c.jsonl:1", "VIII", "eight", "c.jsonl"),
        ("d.json:0", "", "nine", "d.json"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n[1]\n', r"a\.jsonl:3: expected an object"),
        ("a.jsonl", b'{"body": "a"}\n', r"a\.jsonl:1: no text under any of text, contents"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1: no text"),
        ("a.jsonl", b'{"id": 1, "text": "a"}\n{"id": "1", "text": "b"}\n', "'1' is taken"),
        ("a.json", b'{"text": "a"}', r"a\.json: expected a list"),
        ("a.json", b'[{"text": "a"}, 5]', r"a\.json\[1\]: expected an object"),
        ("a.json", b"[", r"a\.json is not JSON"),
        ("a.txt", b"\xff\xfe\xff", r"a\.txt cannot be read"),
        ("a.txt", b" \n", "is empty"),
        ("a.pdf", b"%PDF", r"a\.pdf is not one of \.md"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, told):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=told):
        read_corpus(path)


def test_nothing_there_and_an_empty_folder_are_named(tmp_path):
    with pytest.raises(DataError, match=r"there is no corpus at .*nowhere"):
        read_corpus(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is empty"):
        read_corpus(tmp_path)
    with pytest.raises(DataError, match="no passages"):
        BM25([])


def passages(*bodies, title=""):
    return [Passage(str(n), title, body, 0, len(body)) for n, body in enumerate(bodies)]


def test_scores_are_okapis():
    """Against the formula, with Lucene's idf, written out."""
    draw = random.Random(0)
    bodies = [" ".join(draw.choices("abcdefgh", k=draw.randrange(1, 12))) for _ in range(30)]
    words = [body.split() for body in bodies]
    mean = sum(map(len, words)) / len(words)
    index = BM25(passages(*bodies))

    def expected(query, doc):
        total = 0.0
        for word in query.split():
            df = sum(word in other for other in words)
            tf = doc.count(word)
            idf = math.log(1 + (len(words) - df + 0.5) / (df + 0.5))
            total += idf * tf / (tf + 1.5 * (0.25 + 0.75 * len(doc) / mean))
        return total

    for query in ("a", "a b", "c c d", "h g f e"):
        hits = {passage.id: score for passage, score in index.search(query, 30)}
        for number, doc in enumerate(words):
            assert hits.get(str(number), 0.0) == pytest.approx(expected(query, doc), rel=1e-5)


def test_hits_are_those_that_share_a_word_best_first():
    index = BM25(passages("red green", "blue", "red", "Rouge, RED!", "..."))
    hits = index.search("red?", 10)
    assert [passage.id for passage, _ in hits] == ["2", "0", "3"]
    scores = [score for _, score in hits]
    assert scores == sorted(scores, reverse=True) and min(scores) > 0
    assert [p.id for p, _ in index.search("red", 1)] == ["2"]
    assert index.search("", 3) == index.search("?!", 3) == index.search("yellow", 3) == []
    assert BM25(passages("...", "!")).search("a", 1) == []
    with pytest.raises(ValueError, match="k >= 1"):
        index.search("red", 0)


def test_ties_are_in_the_order_of_the_passages():
    index = BM25(passages(*["same words"] * 50, "other"))
    for k in (1, 7, 50, 60):
        assert [p.id for p, _ in index.search("same", k)] == [str(n) for n in range(min(k, 50))]


def test_many_ties_are_in_order_too():
    bodies = [f"same{' word' * (n % 7)}" for n in range(700)]
    index = BM25(passages(*bodies))
    shortest = sorted(range(700), key=lambda n: (n % 7, n))  # the shorter, the better
    for k in (5, 150, 700):
        assert [int(p.id) for p, _ in index.search("same", k)] == shortest[:k]


def test_titles_are_searched_and_words_can_be_stemmed():
    index = BM25(passages("it flew", "it fell", title="") + passages("it", title="Rocket"))
    assert index.search("rocket", 1)[0][0].title == "Rocket"
    assert index.search("rockets", 1) == []
    stemmed = BM25(index.passages, stem=lambda word: word.removesuffix("s"))
    assert stemmed.search("rockets", 1)[0][0].title == "Rocket"


def test_searching_and_indexing_do_not_start_jax():
    code = (
        "import sys; from jaxdeep.tools.bm25 import *; "
        "BM25([Passage('0', '', 'a b', 0, 3)]).search('a', 1); "
        "assert 'jax' not in sys.modules; import jax.lax; assert jax.lax.top_k"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_searching_is_quick():
    draw = random.Random(0)
    words = [f"w{n}" for n in range(4000)]
    index = BM25(passages(*(" ".join(draw.choices(words, k=120)) for _ in range(1000))))
    queries = [" ".join(draw.choices(words, k=8)) for _ in range(200)]
    best = min(_seconds(lambda: [index.search(query, 5) for query in queries]) for _ in range(3))
    assert best / len(queries) < 1e-3


def _seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def test_the_mission_report_answers_its_questions(shared):
    """Recall of the answer string within five passages: 0.79 when this was written, of at most 0.85
    (the other answers are not in the text as they stand)."""
    (document,) = read_corpus(shared("apollo13/mission_report.md"))
    cut = chunk(document, 1000)
    assert 300 <= len(cut) <= 400 and len({passage.title for passage in cut}) > 80
    held = "".join(passage.text for passage in cut)
    assert re.sub(r"\s", "", held) == re.sub(r"\s", "", document.text)
    index = BM25(cut)
    lines = shared("apollo13/rezero_questions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    found = [
        any(
            answers.contains_answer(p.text, [row["answer"]])
            for p, _ in index.search(row["question"], 5)
        )
        for row in rows
    ]
    recall = sum(found) / len(found)
    print(f"recall@5 of the answer string: {recall:.3f} of {len(rows)}")
    assert len(rows) == 318 and recall > 0.77


def test_the_multi_hop_world_is_read(shared):
    documents = read_corpus(shared("musique/corpus.json"))
    assert len(documents) == 1890 and all(document.title for document in documents)
    index = BM25([passage for document in documents for passage in chunk(document, 1000)])
    best = index.search("Who publishes the Journal of Mathematical Physics?", 1)[0][0]
    assert best.title == "Journal of Mathematical Physics" and best.source == "corpus.json"
    assert corpus.TEXT_FIELDS[0] == "text"
