"""Whether the answer to an exercise is right: numbers, formulas, lists, words, parts, each by its
type.

The gold decides the type. A number with units is compared by value and dimension, a decimal within
its rounding or 1 %, an exact value exactly, a formula at random points, a list without order, an
answer with labelled parts part by part. Nothing is given to Python to run, every evaluation is
bounded, and what none of the readers understands goes to math-verify in a process that can be
killed; where that does not answer the verdict is unknown."""

from __future__ import annotations

import re

from jaxdeep.rewards.checking import (
    equations,
    forms,
    last_resort,
    numbers,
    regions,
    units,
    values,
    words,
)
from jaxdeep.rewards.checking import text as texts
from jaxdeep.rewards.checking.formula import FormulaError, Node, nodes, parse, symbols
from jaxdeep.rewards.checking.units import Quantity
from jaxdeep.rewards.checking.verdict import Book, Verdict, right, unknown, wrong
from jaxdeep.types import Task, Trajectory

PLAIN = Book()
_NOT_GRADED = ("none", "image", "explanation")
_REMAINDER = re.compile(r"(\d+)\s*(?:r|R|remainder)\.?\s*(\d+)")
_CLOCK = re.compile(r"\d{1,2}:[0-5]\d")
_ROUGHLY = re.compile(
    r"^(?:\\approx|~|(?:about|approximately|approx\.?|around|roughly|nearly)\b)\s*", re.I
)
_SENTENCE = re.compile(
    r"^(?:(?:the|his|her|its|their|there)\s+)?(?:[a-z]+\s+){0,5}?(?:is|are|was|were|equals?)\s+(?:about |approximately )?"
    r"(?=[-\\$\d(.])",
    re.IGNORECASE,
)
_TRAILING = re.compile(
    r"\s+(?:to|for|of|from|by|during|after|before|when|per|more|less|above|below|away)\b[^\d]*$"
)


def check(gold: str, answer: str, *, question: str = "", book: Book = PLAIN) -> Verdict:
    """Whether `answer` is the gold answer to the question.

    `answer` may be a whole text: its last `<answer>` or `\\boxed{}` counts. `question` decides what
    form is asked for (simplified, in words), whether 23 may stand for 23 %, and whether a list has
    an order. A gold that cannot be graded, such as an explanation, gives an unknown verdict."""
    gold, question = texts.plain(texts.final(gold)), texts.plain(question)
    answer = texts.final(answer)
    if len(answer) > texts.LONGEST:
        return wrong(kind_of(gold), f"longer than {texts.LONGEST} characters")
    return _Check(question, book).whole(gold, texts.plain(answer))


def kind_of(gold: str) -> str:
    """The type that a gold is read as: parts, verdict, choice, nothing, interval, ratio, remainder,
    list, tuple, equation, number, expression, formula or words; image, explanation or none where no
    answer can be graded."""
    return _kind(texts.plain(texts.final(gold)))


def gradable(gold: str) -> bool:
    """Whether an answer can be compared with this gold, or with one of its parts."""
    gold = texts.plain(texts.final(gold))
    pieces = texts.parts(gold)
    return any(_kind(one) not in _NOT_GRADED for one in (pieces.values() if pieces else [gold]))


def answer_checked(task: Task, trajectory: Trajectory) -> float | None:
    """The reward: the largest credit of the last assistant message against one of the task's
    answers, in [0, 1]; None where no verdict was possible."""
    turns = [message for message in trajectory.messages if message.role == "assistant"]
    said = turns[-1].content if turns and not turns[-1].calls else ""
    verdicts = [check(gold, said, question=task.question) for gold in task.answers]
    known = [verdict.credit for verdict in verdicts if verdict.credit is not None]
    return max(known) if known and (max(known) == 1 or len(known) == len(verdicts)) else None


def _kind(gold: str) -> str:
    if not gold:
        return "none"
    if texts.parts(gold):
        return "parts"
    reason = words.ungradable(gold)
    if reason:
        return reason
    if words.verdict(gold):
        return "verdict"
    if words.nothing(gold) is not None:
        return "nothing"
    if texts.number_of_words(gold) is not None:
        return "words"
    if _REMAINDER.fullmatch(gold):
        return "remainder"
    if _ratio(gold) or _CLOCK.fullmatch(gold):
        return "ratio"
    if words.choice(gold):
        return "choice"
    return _kind_of_formula(gold)


def _kind_of_formula(gold: str) -> str:
    brackets = texts.bracketed(gold)
    region = regions.region(gold)
    if brackets and brackets[0] == "(" and brackets[2] == ")" and "infty" not in gold:
        region = None
        if len(texts.elements(brackets[1])) > 1:
            return "tuple"
    if brackets and brackets[0] == "⦃" and not region:
        return "list"
    if region or regions.general(gold):
        return "interval"
    _, sides, _ = equations.split(gold)
    if len(texts.plus_minus(gold)) > 1:
        return "list"
    if _quantity(gold, gold=True) or re.fullmatch(r"-?0,\d+", gold):
        return "number"
    pieces = texts.elements(gold)
    if len(pieces) > 1 and all(_is_value(piece) for piece in pieces):
        return "list"
    if len(sides) > 1 and all(_quantity(side, gold=True) for side in sides):
        return "number"
    if len(sides) > 1 or equations.split(gold)[0]:
        return "equation"
    if _formula(gold) is not None:
        return "expression"
    if re.search(r"[\\^=]", gold) and not re.search(r"[A-Za-z]{4,}", _commands_off(gold)):
        return "formula"
    return "words"


def _is_value(text: str) -> bool:
    """Whether an element of a list is a number, a formula or an equation rather than a word."""
    text = equations.split(text)[1][-1]
    brackets = texts.bracketed(text)
    if brackets and len(texts.elements(brackets[1])) > 1:
        return all(map(_is_value, texts.elements(brackets[1])))
    return _quantity(text, gold=True) is not None or _formula(text) is not None


def _formula(text: str) -> Node | None:
    try:
        return parse(texts.without_thousands(text))
    except FormulaError:
        return None


def _quantity(text: str, *, gold: bool = False) -> Quantity | None:
    """The number that a text gives: with a unit or noun, alone, after a name, or in a short
    sentence. Of a gold also with a phrase or a remark in brackets after it."""
    text = _ROUGHLY.sub("", text)
    found = units.quantity(text)
    if found is None and _SENTENCE.match(text):
        found = units.quantity(_SENTENCE.sub("", text))
    if found is None and _TRAILING.search(text):
        found = units.quantity(_TRAILING.sub("", text))
    remark = re.search(r" \(([^()]+)\)$", text) if found is None and gold else None
    if remark and _formula(remark[1]) is None:  # words: in 8 (y - 9) it is a factor
        found = units.quantity(text[: remark.start()])
    return found


def _ratio(text: str) -> list[Node] | None:
    """The terms of "3:4" or "3 to 4"."""
    sides = re.split(r"\s*:\s*|\s+to\s+", text)
    terms = [_formula(side) for side in sides]
    if len(terms) < 2 or any(term is None for term in terms):
        return None
    return terms if not any(symbols(term) for term in terms) else None


class _Check:
    """One comparison: the question's wishes and the book's conventions."""

    def __init__(self, question: str, book: Book) -> None:
        self.question, self.book = question, book
        self.asked = forms.asked(question)

    def whole(self, gold: str, answer: str) -> Verdict:
        """Gold and answer with all their parts."""
        parts = texts.parts(gold)
        if parts:
            return self.parts(parts, answer)
        kind = _kind(gold)
        if kind in _NOT_GRADED:
            return unknown(kind, "no answer can be compared with this gold")
        return self.one(kind, gold, answer) if answer else wrong(kind, "empty")

    def parts(self, golds: dict[str, str], answer: str) -> Verdict:
        graded = {label: one for label, one in golds.items() if _kind(one) not in _NOT_GRADED}
        if not graded:
            return unknown("parts", "no part of the gold can be graded")
        given = texts.parts(answer)
        if not given and len(graded) == 1:
            given = dict.fromkeys(graded, answer)
        elif not given:
            pieces = [texts.stripped(piece) for piece in re.split(r"[;\n]", answer)]
            if len(pieces) != len(graded):
                pieces = texts.elements(answer)
            given = dict(zip(graded, pieces, strict=True)) if len(pieces) == len(graded) else {}
        verdicts = {label: self.whole(one, given.get(label, "")) for label, one in graded.items()}
        surplus = sorted(given.keys() - golds.keys())
        known = {label: v for label, v in verdicts.items() if v.credit is not None}
        missing = any(verdict.unit_missing for verdict in verdicts.values())
        bad = [label for label, verdict in known.items() if not verdict.equal]
        if len(known) < len(verdicts) and not bad and not surplus:
            return unknown("parts", "a part could not be judged")
        credit = sum(verdict.credit for verdict in known.values()) / len(verdicts)
        if bad or surplus:
            note = f"wrong parts: {', '.join(bad)}" if bad else f"surplus parts: {surplus}"
            return Verdict(False, credit if bad else 0.0, "parts", note)
        return right("parts", unit_missing=missing)

    def one(self, kind: str, gold: str, answer: str) -> Verdict:
        """Gold and answer without parts. Only the last of one labelled part counts as answer."""
        labelled = texts.parts(answer)
        if len(labelled) == 1 and kind != "choice":
            answer = next(iter(labelled.values()))
        if gold.replace(" ", "") == answer.replace(" ", "") and kind not in ("interval", "ratio"):
            return right(kind)
        copied = self.copied(gold, answer)
        if copied:
            return wrong(kind, copied)
        compare = getattr(self, f"_{kind}")
        return compare(gold, answer)

    def copied(self, gold: str, answer: str) -> str:
        """Why an answer only repeats a calculation of the question; "" if it does not."""
        squeezed = answer.replace(" ", "")
        if (
            not re.search(r"\d\D*[-+*/^]|\\(?:times|cdot|frac|div|sqrt)", squeezed)
            or len(squeezed) < 3
        ):
            return ""
        if squeezed.lstrip("-") not in self.question.replace(" ", ""):
            return ""
        node, own = _formula(answer), _formula(gold)
        if node is None or own is None or len(nodes(node)) <= len(nodes(own)):
            return ""
        return "repeats the question"

    # by type of the gold

    def _verdict(self, gold: str, answer: str) -> Verdict:
        word, rest = words.verdict(gold)
        graded = rest and _kind(rest) not in (*_NOT_GRADED, "words", "verdict")
        found = words.verdict(answer)
        if found is None:
            if graded and self.one(_kind(rest), rest, answer).equal:
                return Verdict(False, 0.5, "verdict", f"does not say {word}")
            return wrong("verdict", f"does not say {word}")
        said, more = found
        if said != word or words.contradicts(said, more):
            return wrong("verdict", f"not {word}")
        if not graded:
            return right("verdict")
        value = self.one(_kind(rest), rest, more) if more else wrong("verdict", "no value")
        if value.equal is None:
            return unknown("verdict", value.note)
        if value.equal:
            return right("verdict", unit_missing=value.unit_missing)
        return Verdict(False, 0.5, "verdict", value.note)

    def _choice(self, gold: str, answer: str) -> Verdict:
        same = words.choice(answer) == words.choice(gold)
        return right("choice") if same else wrong("choice", "another choice")

    def _nothing(self, gold: str, answer: str) -> Verdict:
        same = words.nothing(answer) == words.nothing(gold)
        return right("nothing") if same else wrong("nothing", "says that there is a value")

    def _remainder(self, gold: str, answer: str) -> Verdict:
        match = _REMAINDER.fullmatch(answer)
        same = match and match.groups() == _REMAINDER.fullmatch(gold).groups()
        return right("remainder") if same else wrong("remainder", "another quotient or remainder")

    def _ratio(self, gold: str, answer: str) -> Verdict:
        if _CLOCK.fullmatch(gold) and not re.search(r"\bratio\b|\bscale\b", self.question, re.I):
            literal = gold.lstrip("0") == answer.lstrip("0")
            return right("ratio") if literal else wrong("ratio", "another time")
        terms, given = _ratio(gold), _ratio(answer)
        if given is None and len(terms) == 2:
            node = _formula(answer)
            given = list(node.children) if node is not None and node.kind == "div" else None
        if given is None or len(given) != len(terms):
            return wrong("ratio", "no ratio with as many terms")
        try:
            ours, theirs = ([values.evaluate(term) for term in one] for one in (terms, given))
        except FormulaError as error:
            return wrong("ratio", str(error))
        crossed = all(
            values.close(_product(ours[0], b), _product(theirs[0], a))
            for a, b in zip(ours, theirs, strict=True)
        )
        if not crossed or not all(theirs):
            return wrong("ratio", "another ratio")
        if "simplify" in self.asked and ours != theirs:
            return wrong("ratio", "not in lowest terms")
        return right("ratio")

    def _interval(self, gold: str, answer: str) -> Verdict:
        ours, theirs = regions.region(gold), regions.region(answer)
        if ours and theirs:
            names = {name for name, _ in (ours, theirs) if name}
            if len(names) < 2 and regions.same(ours[1], theirs[1]):
                return right("interval")
            return wrong("interval", "another set")
        general = regions.general(gold), regions.general(answer)
        same = all(general) and general[0][1] == general[1][1]
        if same and equations.positive_multiple(general[0][0], general[1][0], self.book.log):
            return right("interval")
        return wrong("interval", "another set")

    def _tuple(self, gold: str, answer: str) -> Verdict:
        brackets, given = texts.bracketed(gold), texts.bracketed(answer)
        if given and (given[0], given[2]) != ("(", ")"):
            return wrong("tuple", "other brackets")
        named, sides, _ = equations.split(answer)
        if not given and named and len(sides) == 1 and texts.bracketed(sides[0]):
            given = texts.bracketed(sides[0])
        ours = texts.elements(brackets[1])
        theirs = texts.elements(given[1] if given else answer)
        region = regions.region(answer)
        if region and not given:
            same = len(ours) == 2 and regions.same(region[1], regions.region(gold)[1])
            return right("tuple") if same else wrong("tuple", "another set")
        return self.ordered("tuple", ours, theirs)

    def ordered(self, kind: str, ours: list[str], theirs: list[str]) -> Verdict:
        """Elements one by one."""
        if len(ours) != len(theirs):
            return wrong(kind, f"{len(theirs)} elements for {len(ours)}")
        verdicts = [
            self.one(self.kind_of_element(a), a, b) for a, b in zip(ours, theirs, strict=True)
        ]
        if any(verdict.equal is False for verdict in verdicts):
            return wrong(kind, "another element")
        if any(verdict.equal is None for verdict in verdicts):
            return unknown(kind, "an element could not be judged")
        return right(kind, unit_missing=any(verdict.unit_missing for verdict in verdicts))

    def kind_of_element(self, gold: str) -> str:
        kind = _kind(gold)
        return "words" if kind in (*_NOT_GRADED, "parts", "choice", "list") else kind

    def _list(self, gold: str, answer: str) -> Verdict:
        if re.fullmatch(r"\d+,\d{1,2}", gold) and len(_elements(answer)) == 1:
            return self.number([gold], answer, False)  # a decimal comma
        ours, theirs = _elements(gold), _elements(answer)
        names = [equations.split(one)[0] for one in ours]
        if len(set(names)) > 1 and all(names):
            return self.assignments(ours, theirs)
        ours, theirs = _unnamed(ours), _unnamed(theirs)
        if ours is None or theirs is None:
            return wrong("list", "other names")
        if len({name for name, _ in (ours, theirs) if name}) > 1:
            return wrong("list", "another name")
        if "order" in self.asked:
            return self.ordered("list", ours[1], theirs[1])
        return self.matched(ours[1], theirs[1])

    def assignments(self, ours: list[str], theirs: list[str]) -> Verdict:
        """x = 2, y = 5: by name, or in the gold's order where the answer has no names."""
        golds = [equations.split(one) for one in ours]
        point = texts.bracketed(theirs[0]) if len(theirs) == 1 else None
        if point and point[0] == "(":  # (2, 5) for x = 2, y = 5
            return self.ordered(
                "list", [sides[-1] for _, sides, _ in golds], texts.elements(point[1])
            )
        by_name = {}
        for one in theirs:
            name, sides, _ = equations.split(one)
            if name in by_name:
                return wrong("list", f"two values of {name}")
            by_name[name or f"{len(by_name)}"] = sides[-1]
        order = [name for name, _, _ in golds]
        if len(by_name) != len(order):
            return wrong("list", f"{len(theirs)} values for {len(order)}")
        if set(by_name) == set(order):
            theirs = [by_name[name] for name in order]
        elif any(equations.split(one)[0] for one in theirs):
            return wrong("list", "other names")
        return self.ordered("list", [sides[-1] for _, sides, _ in golds], theirs)

    def matched(self, ours: list[str], theirs: list[str]) -> Verdict:
        """Elements in any order, each used once."""
        if len(ours) != len(theirs):
            return wrong("list", f"{len(theirs)} elements for {len(ours)}")
        left, missing = list(theirs), False
        for gold in ours:
            for given in left:
                verdict = self.one(self.kind_of_element(gold), gold, given)
                if verdict.equal:
                    left.remove(given)
                    missing |= verdict.unit_missing
                    break
            else:
                return wrong("list", f"{gold} is missing")
        return right("list", unit_missing=missing)

    def _equation(self, gold: str, answer: str) -> Verdict:
        name, sides, rough = equations.split(gold)
        given_name, given, _ = equations.split(answer)
        target = sides[-1]
        if name and _quantity(target, gold=True):
            if given_name and given_name != name and not _abbreviates(name, given_name):
                return wrong("equation", f"{given_name} is not {name}")
            return self.number(sides, answer, rough)
        if name and (not given_name or given_name == name):
            if len(given) == 1:
                return self._expression(target, given[0])
        elif name and not given_name and len(given) == 1:
            return self._expression(target, given[0])
        if len(sides) + bool(name) != 2 or len(given) + bool(given_name) != 2:
            return wrong("equation", "another equation")
        pair = [((n, s[0]) if n else (s[0], s[1])) for n, s in ((name, sides), (given_name, given))]
        same = equations.same(pair[0], pair[1], self.book.log)
        if same is None:
            return self.resort("equation", gold, answer)
        return right("equation") if same else wrong("equation", "other solutions")

    def _number(self, gold: str, answer: str) -> Verdict:
        _, sides, rough = equations.split(gold)
        return self.number(sides, answer, rough)

    def number(self, sides: list[str], answer: str, rough: bool) -> Verdict:
        """A quantity, of which the gold may give several forms: "1/3 = 0.33", "5 m (about 16
        ft)"."""
        golds = [one for side in sides for one in _readings(side)]
        rough = rough or any(_ROUGHLY.match(side) for side in sides)
        _, given, _ = equations.split(answer)
        answers = [self.answer_quantity(side) for side in given]
        if not golds or any(one is None for one in answers):
            pieces = texts.elements(answer)
            if len(pieces) > 1 and all(self.number(sides, one, rough).equal for one in pieces):
                return right("number")  # one value in several forms
            return wrong("number", "no number")
        verdicts: list[Verdict] = []
        for one in answers:
            tried = [numbers.compare(g, one, self.question, self.book, rough) for g in golds]
            verdicts.append(next((v for v in tried if v.equal), tried[0]))
        failed = [verdict for verdict in verdicts if not verdict.equal]
        return failed[0] if failed else verdicts[-1]

    def answer_quantity(self, text: str) -> Quantity | None:
        found = _quantity(text)
        if found is None and re.fullmatch(r"\d+,\d{1,2}|\d+,\d{4,}", text):
            found = units.quantity(text.replace(",", "."))  # a decimal comma
        return found

    def _expression(self, gold: str, answer: str) -> Verdict:
        name, given, _ = equations.split(answer)
        own, node = _formula(gold), _formula(given[-1])
        if name and own is not None and name in symbols(own):
            return wrong("expression", "an equation, not an expression")
        if own is None or (node is None and "\\" in answer):
            return self.resort("expression", gold, given[-1])
        if node is None:
            return wrong("expression", "no formula")
        if symbols(own) != symbols(node) and {s.lower() for s in symbols(own) ^ symbols(node)} == {
            "c"
        }:
            node = _formula(re.sub(r"[cC](?![a-zA-Z])", _constant(own), given[-1])) or node
        try:
            same = values.same(own, node, self.book.log)
            chain = [_formula(side) for side in given[:-1]]
            if same and any(s is None or not values.same(own, s, self.book.log) for s in chain):
                return wrong("expression", "sides that are not equal")
        except values.OutOfBounds as error:
            return wrong("expression", str(error))
        if same is None:
            return self.resort("expression", gold, given[-1])
        if not same:
            return wrong("expression", "another value")
        form = forms.mismatch(self.asked, own, node)
        return wrong("expression", form) if form else right("expression")

    def _words(self, gold: str, answer: str) -> Verdict:
        said, given = texts.number_of_words(gold), texts.number_of_words(answer)
        if said is not None and given is None and "words" not in self.asked:
            return self.number([gold], answer, False)
        if said is not None and given is not None:
            return right("words") if said == given else wrong("words", "another number")
        if words.same(gold, answer, self.book.synonyms):
            return right("words")
        return wrong("words", "other words")

    def _formula(self, gold: str, answer: str) -> Verdict:
        """A formula that the reader here does not know: an integral, a matrix."""
        return self.resort("formula", gold, answer)

    def resort(self, kind: str, gold: str, answer: str) -> Verdict:
        """math-verify, where both have the same letters and no words."""
        letters = [set(re.findall(r"[A-Za-z]", _commands_off(one))) for one in (gold, answer)]
        if letters[0] != letters[1] or re.search(r"[A-Za-z]{4,}", _commands_off(answer)):
            return wrong(kind, "other symbols")
        outcome = last_resort.verify(gold, answer)
        if outcome == "equal":
            return right(kind, "by math-verify")
        if outcome == "absent":
            return unknown(kind, "math-verify is not installed: pip install 'jaxdeep[textbook]'")
        if outcome == "timeout":
            return unknown(kind, "math-verify did not answer in time")
        return wrong(kind, "another value, by math-verify")


def _constant(node: Node) -> str:
    return next(iter(symbols(node) & {"c", "C"}), "C")


def _commands_off(text: str) -> str:
    return re.sub(r"\\[a-zA-Z]+", " ", text)


def _product(a: values.Value, b: values.Value) -> values.Value:
    return values.inexact(a) * values.inexact(b)


def _abbreviates(a: str, b: str) -> bool:
    """Whether one of two names is a word and the other its first letter."""
    short, long = sorted((a, b), key=len)
    return len(short) == 1 and len(long) > 2 and long[0].lower() == short.lower()


def _elements(text: str) -> list[str]:
    """The elements of a list or a set, `\\pm` written out."""
    name, sides, _ = equations.split(text)
    inside = texts.bracketed(sides[-1] if name and len(sides) == 1 else text)
    if inside and inside[0] == "⦃":
        text = inside[1]
    return [one for piece in texts.elements(text) for one in texts.plus_minus(piece)]


def _unnamed(elements: list[str]) -> tuple[str, list[str]] | None:
    """(name, values) of "x = 2, x = 3" or "x = 2, 3"; None where the names differ."""
    found = [equations.split(one) for one in elements]
    names = {name for name, _, _ in found if name}
    if len(names) > 1:
        return None
    return "".join(names), [
        sides[-1] if name else one for one, (name, sides, _) in zip(elements, found, strict=True)
    ]


def _readings(side: str) -> list[Quantity]:
    """The quantities that one side of a gold gives: itself, and what stands in brackets after
    it."""
    found = [_quantity(side, gold=True)]
    remark = re.search(r" \(([^()]+)\)$", side)
    if remark and _formula(remark[1]) is None:
        found.append(_quantity(remark[1], gold=True))
    if re.fullmatch(r"\d+,\d{1,2}|0,\d+", side):
        found.append(units.quantity(side.replace(",", ".")))
    return [one for one in found if one is not None]
