"""The answer checker: a table of pairs, bounds on hostile text, rewards, the last resort."""

import pathlib
import random
import string

import pytest

from jaxdeep.rewards import checker
from jaxdeep.rewards.checking import formula, last_resort, regions, text, units, values
from jaxdeep.rewards.checking.verdict import Book
from jaxdeep.types import Message, Task, Trajectory

PAIRS = pathlib.Path(__file__).with_name("answer_pairs.txt")
VERDICTS = {"right": (True, 1.0), "wrong": (False, 0.0), "unknown": (None, None)}


def pairs():
    """(gold, answer, equal, credit, question) of each line of the table."""
    for line in PAIRS.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            gold, answer, verdict, question = [
                part.strip() for part in [*line.split(" | "), ""][:4]
            ]
            known = VERDICTS.get(verdict)
            yield gold, answer, *(known or (False, float(verdict))), question


TABLE = list(pairs())


@pytest.mark.parametrize(("gold", "answer", "equal", "credit", "question"), TABLE)
def test_the_verdict_is_that_of_the_table(gold, answer, equal, credit, question):
    verdict = checker.check(gold, answer, question=question)
    assert verdict.equal == equal, verdict
    assert verdict.credit == (None if credit is None else pytest.approx(credit, abs=1e-4))


def test_the_table_is_long_and_an_accepted_answer_is_accepted_with_its_gold_given_for_it():
    assert len(TABLE) >= 150 and sum(equal is False for _, _, equal, _, _ in TABLE) >= 75
    golds = sorted({(gold, question) for gold, _, equal, _, question in TABLE if equal is not None})
    for gold, question in golds:
        verdict = checker.check(gold, gold, question=question)
        assert verdict.equal, (gold, verdict)


def test_a_missing_unit_is_accepted_and_counted():
    assert checker.check("10.8 m/s", "10.8").unit_missing
    assert not checker.check("10.8 m/s", "10.8 m/s").unit_missing
    assert checker.check("(a) 3 m (b) 2", "(a) 3 (b) 2").unit_missing


def test_a_book_has_its_own_logarithm_and_its_own_synonyms():
    assert not checker.check("2", r"\log 100").equal
    assert checker.check("2", r"\log 100", book=Book(log=10)).equal
    assert not checker.check("mean", "average").equal
    assert checker.check("mean", "the average", book=Book(synonyms=[["mean", "average"]])).equal


@pytest.mark.parametrize(
    ("gold", "kind"),
    [
        *(("5", "number"), ("5 m", "number"), ("1/2", "number"), ("x+1", "expression")),
        *(("x+y=1", "equation"), ("1, 2", "list"), ("(1, 2)", "tuple"), ("x > 2", "interval")),
        *(("3:4", "ratio"), ("12 r 3", "remainder"), ("Yes", "verdict"), ("B", "choice")),
        *(("prime", "words"), ("no solution", "nothing"), ("(a) 1 (b) 2", "parts"), ("", "none")),
        *(("Answers will vary.", "explanation"), ("[image: a line]", "image")),
    ],
)
def test_the_gold_decides_the_type(gold, kind):
    assert checker.kind_of(gold) == kind
    assert checker.gradable(gold) == (kind not in ("none", "explanation", "image"))


def test_the_reward_is_the_credit_of_the_last_turn_against_the_best_answer():
    task = Task("1", "How fast?", ("10.8 m/s", "(a) 1 (b) 2"))

    def reward(*turns):
        return checker.answer_checked(task, Trajectory(task, messages=list(turns)))

    assert reward(Message("assistant", r"I say \boxed{10.8}.")) == 1.0
    assert reward(Message("assistant", "(a) 1 (b) 3")) == 0.5
    assert reward(Message("assistant", "10.8"), Message("assistant", "7")) == 0.0
    assert reward() == 0.0
    vague = Task("2", "Why?", ("Answers may vary.",))
    said = [Message("assistant", "Because.")]
    assert checker.answer_checked(vague, Trajectory(vague, messages=said)) is None


# Hostile text: bounded work, counted in operations and not in seconds.

TOWERS = [
    *("9^{9^{9^{9}}}", "9**9**9**9", "10000!" * 30, "(" * 400 + "1" + ")" * 400, "1" * 500),
    *(r"\sum_{k=1}^{10000} k^{10000}", r"\prod_{k=1}^{10000} k!", r"\sqrt[99]{10^{9999}}" * 20),
    *("((((((2^99)^99)^99)^99)^99)^99)", r"\frac{1}{10000!}+" * 40 + "1", "2^" * 200 + "2"),
    *(r"\binom{10000}{5000}" * 25, "-" * 499 + "1", "|" * 400, "{" * 500, r"\frac" * 90, "," * 500),
    *("a)" * 200, "(a) " * 120, "=" * 400, r"\pm 1" * 80, "1 or " * 90, r"\sin" * 100 + "1"),
    *("exec('1')", "().__class__.__bases__", "lambda: 0", "\x00\x01", "e^{e^{e^{e^{e}}}}"),
]


@pytest.mark.parametrize("hostile", TOWERS, ids=range(len(TOWERS)))
def test_hostile_answers_are_wrong_and_cost_little(hostile, monkeypatch):
    monkeypatch.setattr(last_resort, "verify", lambda *_: "different")
    spent = []
    spend = values._Evaluation.spend
    monkeypatch.setattr(
        values._Evaluation, "spend", lambda self, *v: (spend(self, *v), spent.append(self.spent))[0]
    )
    for gold in ("7", "x^2+1", "1, 2", "(a) 1 (b) 2", "x > 3", "prime", "y = 2x"):
        assert not checker.check(gold, hostile).equal
    assert max(spent, default=0) <= 2 * values.BUDGET


def test_random_text_never_raises_and_is_never_right():
    draw = random.Random(0)
    alphabet = string.digits + "+-*/^(){}[]|\\,.;:=<>%$ xyeE!_'°" + "frac sqrt"
    for _ in range(400):
        answer = "".join(draw.choice(alphabet) for _ in range(draw.randrange(1, 60)))
        for gold in ("73", "13x^{12}", "(a) 61 (b) 52", "2, 9, 241", r"x \ge 47", "10.8 m/s"):
            assert not checker.check(gold, answer).equal, (gold, answer)


# The parts of the pipeline where they have values of their own.


def test_values_are_exact_where_they_can_be():
    pairs = [
        ("1/3+1/6", "1/2"),
        (r"\sqrt{\frac{4}{9}}", "2/3"),
        ("8^{2/3}", "4"),
        ("2^{-3}", "1/8"),
    ]
    pairs += [(r"\log_{2} 8", "3"), ("5!/(3!2!)", None), ("0.1+0.2", "3/10")]
    for given, expected in pairs:
        if expected is None:
            with pytest.raises(formula.FormulaError):
                formula.parse(given)
            continue
        one, other = (values.evaluate(formula.parse(side)) for side in (given, expected))
        assert one == other, given


@pytest.mark.parametrize(
    ("given", "base", "powers"),
    [
        *(
            ("3 km/h", "5/6", (1, 0, -1)),
            ("2 kW h", "7200000", (2, 1, -2)),
            ("5 N m", "5", (2, 1, -2)),
        ),
        *(
            ("7 in^2", "0.00451612", (2, 0, 0)),
            ("20 °C", "293.15", (0, 0, 0)),
            ("1 lb", "0.45359237", (0, 1, 0)),
        ),
        *(("1 gal", "0.003785411784", (3, 0, 0)), ("1 atm", "101325", (-1, 1, -2))),
        *(
            ("1 L", "1/1000", (3, 0, 0)),
            ("2 days", "172800", (0, 0, 1)),
            ("3 ms", "3/1000", (0, 0, 1)),
        ),
    ],
)
def test_units_have_the_factors_of_their_definitions(given, base, powers):
    quantity = units.quantity(given)
    value = values.evaluate(quantity.value) * quantity.unit.factor + quantity.unit.offset
    assert value == values.evaluate(formula.parse(base))
    assert quantity.unit.powers[:3] == powers


def test_parts_ascend_and_a_mark_inside_a_part_is_text():
    assert text.parts("(a) 12 (b) 5") == {"a": "12", "b": "5"}
    assert text.parts("(a) f(x) (b) (a) + 1") == {"a": "f(x)", "b": "(a) + 1"}
    assert text.parts("(b-i) 0.21. (b-ii) 0.79.") == {"b-i": "0.21", "b-ii": "0.79"}
    assert text.parts("(2)(x+1)") == text.parts("x (a) 1") == {}


def test_regions_are_sets():
    for one, other in (("x > 4", r"(4, \infty)"), (r"-1 < x \le 3", "(-1, 3]"), ("4 < x", "x > 4")):
        assert regions.same(regions.region(one)[1], regions.region(other)[1])
    assert regions.region("(2,3), (4,5)") is None
    assert regions.region("x < 2 and x > 1") is None


# The last resort.


def test_math_verify_is_asked_only_about_the_same_letters(monkeypatch):
    asked = []
    monkeypatch.setattr(last_resort, "verify", lambda *pair: asked.append(pair) or "equal")
    gold = r"\int_0^1 x\,dx"
    assert checker.check(gold, r"\int_{0}^{1} x dx").equal
    assert not checker.check(gold, r"\int_0^1 y\,dy").equal
    assert not checker.check("7", r"\int_0^7 1").equal
    assert len(asked) == 1


@pytest.mark.parametrize("outcome", ["timeout", "absent"])
def test_no_answer_of_math_verify_is_unknown_and_never_right(outcome, monkeypatch):
    monkeypatch.setattr(last_resort, "verify", lambda *_: outcome)
    verdict = checker.check(r"\int_0^1 x\,dx", r"\int_{0}^{1} x dx")
    assert verdict.equal is None and verdict.credit is None and "math-verify" in verdict.note


def test_a_process_of_the_last_resort_is_killed_and_replaced():
    pytest.importorskip("math_verify")
    gold, same = (
        r"\begin{pmatrix} 1 & 2 \end{pmatrix}",
        r"\begin{pmatrix} 1 & \frac{4}{2} \end{pmatrix}",
    )
    assert last_resort.verify(gold, same, seconds=100) == "equal"
    first = [process.child for process in last_resort._all if process.child]
    assert last_resort.verify("9^{9^{9^{9^{9}}}}+x", "x", seconds=0.0) == "timeout"
    assert any(child.returncode is not None for child in first)
    assert (
        last_resort.verify(gold, r"\begin{pmatrix} 1 & 3 \end{pmatrix}", seconds=100) == "different"
    )
    last_resort.close()


def test_real_golds_are_equal_to_themselves(shared):
    import json

    rows = [json.loads(line) for line in shared("math/math500.jsonl").open(encoding="utf-8")]
    wrong = [
        row["answer"] for row in rows[::4] if not checker.check(row["answer"], row["answer"]).equal
    ]
    assert wrong == []


def test_the_shared_pairs_have_their_verdicts(shared):
    import json

    rows = [json.loads(line) for line in shared("answers.jsonl").open(encoding="utf-8")]
    for row in rows:
        verdict = checker.check(row["gold"], row["answer"], question=row.get("question", ""))
        assert verdict.equal == row["equal"], (row, verdict)
        assert "credit" not in row or verdict.credit == pytest.approx(row["credit"], abs=1e-3)
