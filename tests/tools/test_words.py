"""Words are found in any script, and a text is the same in both forms of Unicode."""

import unicodedata

import pytest

from jaxdeep.rewards import answers
from jaxdeep.tools.bm25 import BM25
from jaxdeep.tools.corpus import Document, Passage, chunk
from jaxdeep.tools.words import index_words, query_words, tokens

SAID = {
    "zh": "北京是中华人民共和国的首都。",
    "ja": "東京は日本の首都である。",
    "th": "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย",
    "ko": "서울은 대한민국의 수도이다.",
    "hi": "नई दिल्ली भारत की राजधानी है।",
    "de": "Zürich liegt an der Limmat.",
}
ASKED = [
    ("zh", "北京 首都"),
    ("zh", "华"),
    ("ja", "日本の首都"),
    ("th", "เมืองหลวง"),
    ("ko", "서울"),
    ("hi", "दिल्ली"),
    ("de", unicodedata.normalize("NFD", "ZÜRICH")),
]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("key, query", ASKED)
def test_search_finds_words_in_any_script(key, query, form):
    said = {k: unicodedata.normalize(form, text) for k, text in SAID.items()}
    index = BM25([Passage(k, "", text, 0, len(text)) for k, text in said.items()])
    assert index.search(query, 4)[0][0].id == key
    assert index.search("完全", 4) == index.search("दिल", 4) == []


def test_words_of_scripts_with_spaces_are_runs_and_of_others_characters_and_pairs():
    assert index_words("The U.S. snake_case 10.8") == ["the", "u", "s", "snake_case", "10", "8"]
    assert index_words("東京tower") == ["東", "京", "東京", "tower"]
    assert query_words("東京tower 北") == ["東京", "tower", "北"]
    assert index_words("Running", lambda word: word[:3]) == ["run"]
    assert tokens("東京 tower!") == ["東", "京", "tower!"]


@pytest.mark.parametrize(
    "text, part, there",
    [
        (SAID["zh"], "北京", True),
        (SAID["ja"], "日本の首都", True),
        (SAID["th"], "เมืองหลวง", True),
        (SAID["ko"], "서울", True),
        (SAID["zh"], "南京", False),
        ("東京tower", "tower", True),
        ("the towers", "tower", False),
        ("It is “Paris”.", "Paris", True),
        ("दिल्ली", "दिल", False),  # inside a word, and before a mark of its last letter
    ],
)
def test_an_answer_inside_a_text(text, part, there):
    assert answers.contains_answer(text, [part]) == there


@pytest.mark.parametrize(
    "said, right, em, f1",
    [
        ("北京。", "北京", 1, 1),
        ("「北京」", "北京", 1, 1),
        ("在北京", "北京", 0, 0.8),
        ("서울은", "서울", 0, 0.8),
        (*(unicodedata.normalize(form, "Zürich") for form in ("NFC", "NFD")), 1, 1),
        (*(unicodedata.normalize(form, "한국") for form in ("NFD", "NFC")), 1, 1),
        ("P", "Paris", 0, 0),
    ],
)
def test_answers_in_any_script(said, right, em, f1):
    for given in ([right], right):  # a text is one answer, not its letters
        assert answers.exact_match(said, given) == em
        assert answers.f1(said, given) == pytest.approx(f1)


def test_passages_end_with_sentences_that_no_space_follows():
    text = "北京是首都。" * 30
    passages = chunk(Document("d", "", text), 40)
    assert "".join(p.text for p in passages) == text
    assert all(p.text.endswith("。") and len(p.text) <= 40 for p in passages)
