"""A reader of formulas as people write short answers: LaTeX, plain text, and mixtures of them.

`parse` gives a tree of `Node`; `FormulaError` says why a text is none. Nothing is evaluated here,
and no text is ever given to Python to run. Where notations differ, a number right after another is
an error and not a product, so that "18 18" is not 324, and `2\\frac{1}{2}` is a mixed number.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

DEPTH = 40  # brackets inside brackets


class FormulaError(ValueError):
    """The text is no formula that can be read."""


class Node(NamedTuple):
    """One operation. `kind` is number, symbol, constant, add, neg, mul, div, pow, call, fact,
    binom, perm, abs, mixed, degree, percent, sum or prod; `text` is a number as written, or a name;
    `value` is the number's."""

    kind: str
    children: tuple[Node, ...] = ()
    text: str = ""
    value: Fraction | None = None


FUNCTIONS = {
    *(
        "sin",
        "cos",
        "tan",
        "sec",
        "csc",
        "cot",
        "arcsin",
        "arccos",
        "arctan",
        "sinh",
        "cosh",
        "tanh",
    ),
    *("ln", "log", "lg", "exp", "sqrt"),
}
INVERSES = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
_WORDS = {
    *(
        "the",
        "and",
        "for",
        "yes",
        "no",
        "not",
        "are",
        "is",
        "of",
        "to",
        "in",
        "at",
        "or",
        "if",
        "as",
    ),
    *("on", "by", "it", "be", "an", "was", "has", "one", "two", "six", "ten", "dne", "all", "but"),
}
_GREEK = set(
    [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "varepsilon",
        "zeta",
        "eta",
        "theta",
        "vartheta",
        "iota",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
        "rho",
        "sigma",
        "tau",
        "upsilon",
        "phi",
        "varphi",
        "chi",
        "psi",
        "omega",
        "Gamma",
        "Delta",
        "Theta",
        "Lambda",
        "Xi",
        "Sigma",
        "Phi",
        "Psi",
        "Omega",
    ]
)
_ACCENTS = {"bar", "hat", "vec", "overline", "tilde", "widehat", "dot"}

_NUMBER = re.compile(r"\d+(?:\.\d+)?|\.\d+|\d+\.(?!\d)")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:bar|overline)\s*\{?\s*(\d+)\s*\}?")
_DOTS = re.compile(r"(\d*)\.(\d*?)(\d+?)\3+\.\.\.")
_CHOOSE = re.compile(r"(\d+)\s*([CP])\s*_?\s*\{?\s*(\d+)\s*\}?")
_RAISED = re.compile(r"(?:\{\s*\}\s*)?[\^_]\s*\{?\s*(\d+)\s*\}?\s*([CP])\s*_\s*\{?\s*(\d+)\s*\}?")
_CALLED = re.compile(r"([CP])\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)")
_INFIX_CHOOSE = re.compile(r"\{\s*(\d+)\s*\\choose\s*(\d+)\s*\}")
_MIXED = re.compile(
    r"(\d+)(?:\s*\\frac\s*(?:\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)\s*(\d)(?!\d))|\s+(\d+)\s*/\s*(\d+))"
    r"(?![\d.])"
)
_SCIENTIFIC = re.compile(r"[eE][-+]?\d+(?![\w])")


def parse(text: str) -> Node:
    """The tree of a formula that `text.plain` has cleaned; FormulaError where it is none."""
    reader = _Reader(text)
    node = reader.sum()
    reader.spaces()
    if reader.at < len(reader.text):
        raise FormulaError(f"{reader.text[reader.at :][:20]!r} does not belong to a formula")
    return node


def symbols(node: Node) -> frozenset[str]:
    """The names of the free symbols."""
    bound = {node.text} if node.kind in ("sum", "prod") else set()
    own = {node.text} if node.kind == "symbol" else set()
    return frozenset(own.union(*map(symbols, node.children)) - bound)


def nodes(node: Node) -> list[Node]:
    """The node and all below it."""
    return [node, *(inner for child in node.children for inner in nodes(child))]


def number(value: Fraction | int, text: str = "") -> Node:
    """The node of a number."""
    return Node("number", text=text or str(value), value=Fraction(value))


class _Reader:
    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth = text, 0, 0

    # characters

    def spaces(self) -> None:
        while self.at < len(self.text) and self.text[self.at] == " ":
            self.at += 1

    def peek(self) -> str:
        self.spaces()
        return self.text[self.at : self.at + 1]

    def take(self, token: str) -> bool:
        self.spaces()
        found = self.text.startswith(token, self.at)
        if found and token[0] == "\\" and token[1:].isalpha():
            after = self.text[self.at + len(token) : self.at + len(token) + 1]
            found = not after.isalpha()
        if found:
            self.at += len(token)
        return found

    def match(self, pattern: re.Pattern) -> re.Match | None:
        self.spaces()
        found = pattern.match(self.text, self.at)
        if found:
            self.at = found.end()
        return found

    def command(self) -> str:
        """The name of the command here, without moving; "" if there is none."""
        self.spaces()
        found = re.compile(r"\\([A-Za-z]+)").match(self.text, self.at)
        return found[1] if found else ""

    def expect(self, token: str) -> None:
        if not self.take(token):
            raise FormulaError(f"{token!r} is missing in {self.text!r}")

    # grammar, loosest first

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > DEPTH:
            raise FormulaError(f"more than {DEPTH} brackets inside each other")
        terms = [self.product()]
        while True:
            if self.take("+"):
                terms.append(self.product())
            elif self.take("-"):
                terms.append(Node("neg", (self.product(),)))
            else:
                break
        self.depth -= 1
        return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

    def product(self) -> Node:
        left = self.signed()
        while True:
            if self.take(r"\times") or self.take(r"\cdot") or self.take("*"):
                left = _times(left, self.signed())
            elif self.take("/"):
                left = Node("div", (left, self.signed()))
            elif self.starts_factor():
                left = _times(left, self.power())
            else:
                return left

    def starts_factor(self) -> bool:
        """Whether a factor without a sign of multiplication follows. A digit never is one."""
        character = self.peek()
        if not character or character in "+-*/=<>,;:)]}|!%^_'\"&.⦄0123456789":
            return False
        return character not in "\\" or self.command() not in (
            *("times", "cdot", "le", "ge", "ne", "approx", "pm", "mp", "cup", "in", "to", "infty"),
        )

    def signed(self) -> Node:
        sign = 1
        while self.peek() in ("-", "+") and self.peek():
            sign = -sign if self.text[self.at] == "-" else sign
            self.at += 1
        node = self.power()
        return Node("neg", (node,)) if sign < 0 else node

    def power(self) -> Node:
        base = self.postfix()
        if self.take("^"):
            return self.after_power(Node("pow", (base, self.exponent())))
        return base

    def after_power(self, node: Node) -> Node:
        while True:
            if self.take("!"):
                node = Node("fact", (node,))
            elif self.take("%"):
                node = Node("percent", (node,))
            else:
                return node

    def exponent(self) -> Node:
        if self.peek() in ("{", "("):
            return self.group()
        if self.take("-"):
            return Node("neg", (self.exponent(),))
        if self.take("+"):
            return self.exponent()
        return self.power()

    def postfix(self) -> Node:
        node = self.primary()
        while True:
            if self.take("!"):
                node = Node("fact", (node,))
            elif self.take("%"):
                node = Node("percent", (node,))
            elif self.take("°"):
                node = Node("degree", (node,))
            else:
                return node

    def group(self) -> Node:
        closing = {"(": ")", "[": "]", "{": "}"}[self.peek()]
        self.at += 1
        node = self.sum()
        self.expect(closing)
        return node

    def argument(self) -> Node:
        """`{...}`, or one character as in `\\frac12`."""
        if self.peek() == "{":
            return self.group()
        character = self.peek()
        if character.isdigit():
            self.at += 1
            return number(int(character), character)
        return self.primary()

    def primary(self) -> Node:
        character = self.peek()
        combination = (
            self.match(_RAISED)
            or self.match(_CHOOSE)
            or self.match(_CALLED)
            or self.match(_INFIX_CHOOSE)
        )
        if combination:
            return _combination(combination)
        if character.isdigit() or character == ".":
            return self.number()
        if character in ("(", "[", "{") and character:
            return self.group()
        if self.take("|"):
            node = Node("abs", (self.sum(),))
            self.expect("|")
            return node
        if character == "\\":
            return self.backslash()
        if character.isalpha():
            return self.letters()
        raise FormulaError(f"{self.text[self.at :][:20]!r} does not begin a number or a symbol")

    def number(self) -> Node:
        mixed = _MIXED.match(self.text, self.at)
        if mixed:
            whole, top, bottom = [int(group) for group in mixed.groups() if group]
            if top < bottom:
                self.at = mixed.end()
                return Node("mixed", text=mixed[0], value=whole + Fraction(top, bottom))
        repeating = self.match(_REPEATING) or self.match(_DOTS)
        if repeating:
            return Node("number", text=repeating[0], value=_repeating(*repeating.groups()))
        found = self.match(_NUMBER)
        if not found:
            raise FormulaError(f"{self.text[self.at :][:20]!r} is no number")
        text, value = found[0], Fraction(found[0].rstrip("."))
        power = self.match(_SCIENTIFIC) if self.text[self.at : self.at + 1] in ("e", "E") else None
        if power:
            exponent = int(power[0][1:])
            if abs(exponent) > 400:
                raise FormulaError(f"{text}{power[0]} is out of range")
            text, value = text + power[0], value * Fraction(10) ** exponent
        return Node("number", text=text, value=value)

    def backslash(self) -> Node:
        name = self.command()
        self.at += 1 + len(name)
        if name == "frac":
            return Node("div", (self.argument(), self.argument()))
        if name == "sqrt":
            return self.root()
        if name == "binom":
            return Node("binom", (self.argument(), self.argument()))
        if name in ("pi", "infty"):
            return Node("constant", text=name)
        if name in FUNCTIONS:
            return self.call(name)
        if name in ("sum", "prod"):
            return self.series(name)
        if name in _GREEK:
            return self.subscripted(name)
        if name in _ACCENTS:
            inner = self.argument()
            if inner.kind != "symbol":
                raise FormulaError(f"\\{name} over something that is no symbol")
            return Node("symbol", text=f"{name} {inner.text}")
        raise FormulaError(f"\\{name} is no command of a formula")

    def root(self) -> Node:
        index = number(2)
        if self.take("["):
            index = self.sum()
            self.expect("]")
        inside = self.group() if self.peek() in ("{", "(") else self.primary()
        return Node("call", (inside, index), "sqrt")

    def call(self, name: str) -> Node:
        power = self.exponent() if self.take("^") else None
        base = None
        if self.take("_"):
            base = self.argument()
            if name != "log":
                raise FormulaError(f"{name} has no base")
            if power is None and self.take("^"):
                power = self.exponent()
        if self.peek() in ("(", "[", "{"):
            inside = self.group()
        else:
            inside = self.signed()
            while self.starts_factor() and not self.starts_function():
                inside = _times(inside, self.power())
        if power is not None and power == Node("neg", (number(1),)) and name in INVERSES:
            return Node("call", (inside,), INVERSES[name])
        node = Node("call", (inside,) if base is None else (inside, base), name)
        return node if power is None else Node("pow", (node, power))

    def starts_function(self) -> bool:
        if self.command() in FUNCTIONS - {"sqrt"}:
            return True
        run = re.compile(r"[A-Za-z]+").match(self.text, self.at)
        return bool(run) and run[0] in FUNCTIONS

    def series(self, name: str) -> Node:
        self.expect("_")
        self.expect("{")
        variable = self.letters()
        self.expect("=")
        low = self.sum()
        self.expect("}")
        self.expect("^")
        high = self.exponent()
        body = self.product()
        return Node(name, (low, high, body), variable.text)

    def letters(self) -> Node:
        run = re.compile(r"[A-Za-z]+").match(self.text, self.at)
        if not run:
            raise FormulaError(f"{self.text[self.at :][:20]!r} begins with no known letter")
        word = run[0]
        if word in FUNCTIONS:
            self.at = run.end()
            return self.root() if word == "sqrt" else self.call(word)
        if word in ("pi", "infinity"):
            self.at = run.end()
            return Node("constant", text="pi" if word == "pi" else "infty")
        if len(word) > 3 or word.lower() in _WORDS:
            raise FormulaError(f"{word!r} is a word")
        self.at += 1
        if word[0] == "e":
            return Node("constant", text="e")
        return self.subscripted(word[0])

    def subscripted(self, name: str) -> Node:
        if self.text[self.at : self.at + 1] == "_":
            self.at += 1
            below = re.compile(r"\{([^{}]{1,20})\}|([A-Za-z0-9])").match(self.text, self.at)
            if not below:
                raise FormulaError(f"{name}_ has nothing below it")
            self.at = below.end()
            name += "_" + (below[1] or below[2]).replace(" ", "")
        while self.text[self.at : self.at + 1] == "'":
            self.at += 1
            name += "'"
        return Node("symbol", text=name)


def _times(left: Node, right: Node) -> Node:
    return Node("mul", (*(left.children if left.kind == "mul" else (left,)), right))


def _combination(match: re.Match) -> Node:
    groups = match.groups()
    letters = [group for group in groups if not group.isdigit()]
    n, k = [number(int(group), group) for group in groups if group.isdigit()]
    return Node("perm" if letters == ["P"] else "binom", (n, k))


def _repeating(whole: str, fixed: str, repeated: str) -> Fraction:
    """16.0(45): the digits before the repetition, and the repetition as a fraction of nines."""
    start = Fraction(int(whole or 0)) + Fraction(int(fixed or 0), 10 ** len(fixed))
    return start + Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(fixed))
