"""Answers as text: one spelling for signs, markup taken off, the final answer, parts, lists.

Everything here maps text to text. It decides what the pieces of an answer are, and never whether
they are right.
"""

from __future__ import annotations

import re
import unicodedata

LONGEST = 500  # characters of an answer; a longer one is not a short answer

_CHARACTERS = {
    **dict.fromkeys("−–—‒﹣－", "-"),
    **dict.fromkeys("×✕⨯", r"\times "),
    **dict.fromkeys("⋅·∙", r"\cdot "),
    **dict.fromkeys("\u2009\u202f\u200a", r"\,"),
    **dict.fromkeys("\u200b\u2060\ufeff\u2061\u2062", ""),
    **dict.fromkeys("º˚", "°"),
    **dict.fromkeys("’‘′´", "'"),
    **dict.fromkeys("“”″", '"'),
    **{"\u00a0": " ", "÷": "/", "∕": "/", "⁄": "/", "∶": ":", "≤": r"\le ", "≥": r"\ge "},
    **{"≠": r"\ne ", "∞": r"\infty ", "π": r"\pi ", "√": r"\sqrt ", "±": r"\pm ", "∪": r"\cup "},
    **{"≈": r"\approx ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "θ": r"\theta ", "℃": "°C"},
    **{"α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "σ": r"\sigma ", "Δ": r"\Delta "},
    **{"…": "...", "µ": "u", "μ": r"\mu ", "ø": r"\emptyset ", "∈": r"\in "},
}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SUBSCRIPT = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_VULGAR = re.compile("[¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]")
_CIRCLED = re.compile("[ⓐ-ⓩ]")

_COMMANDS = [
    (re.compile(r"\\(?:dfrac|tfrac|cfrac)\b"), r"\\frac"),
    (re.compile(r"\\(?:leqslant|leq)\b"), r"\\le "),
    (re.compile(r"\\(?:geqslant|geq)\b"), r"\\ge "),
    (re.compile(r"\\neq\b"), r"\\ne "),
    (re.compile(r"\\lt\b"), "<"),
    (re.compile(r"\\gt\b"), ">"),
    (re.compile(r"\\div\b"), "/"),
    (re.compile(r"\\(?:varnothing|o|O)(?![a-zA-Z])"), r"\\emptyset "),
    (
        re.compile(r"\\(?:left|right|bigl|bigr|Bigl|Bigr|big|Big|displaystyle|limits)(?![a-zA-Z])"),
        "",
    ),
    (re.compile(r"\\lvert\b|\\rvert\b|\\vert\b"), "|"),
    (re.compile(r"\\degree\b|\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-zA-Z])"), "°"),
    (re.compile(r"\\[;:!]|\\q?quad\b|~"), " "),
    (re.compile(r"(?<=\d)\{,\}(?=\d)"), ","),
    (re.compile(r"(?<=\d)\\,(?=\d{3}(?!\d))"), ""),
    (re.compile(r"\\[, ]"), " "),
    (re.compile(r"\\ldots\b|\\dots\b|\\cdots\b"), "..."),
    (re.compile(r"\\lbrace\b|\\\{"), "⦃"),  # a brace that is printed, apart from one that groups
    (re.compile(r"\\rbrace\b|\\\}"), "⦄"),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\cent(?![a-zA-Z])|¢"), " cents"),
    (re.compile(r"\\(?:infin|infty)\b"), r"\\infty "),
]
_WRAPPER = re.compile(
    r"\\(?:text|textrm|textit|textbf|textsf|textnormal|mbox|hbox|mathrm|mathit|mathbf|mathsf"
    r"|operatorname|emph|boldsymbol|bm|unit|fbox|boxed)\s*\{([^{}]*)\}"
)
_LEAD = re.compile(
    r"^(?:so|thus|hence|therefore|and)?,?\s*(?:the\s+)?(?:final\s+)?(?:correct\s+)?"
    r"(?:answer|solution|result)s?(?:\s+(?:is|are|=)\s*:?|\s*[:=])\s*",
    re.IGNORECASE,
)


def plain(text: str) -> str:
    """The answer in one spelling: ASCII signs, `^` and `_` for raised and lowered digits, `\\frac`,
    `\\le`, `\\ge`; without math delimiters, font commands, Markdown's bold, and a full stop at the
    end. `\\$` stays, and so does a dollar sign that means money; printed braces become ⦃ and ⦄."""
    text = _CIRCLED.sub(lambda match: f" ({chr(ord(match[0]) - ord('ⓐ') + ord('a'))}) ", text)
    text = _VULGAR.sub(_fraction, text)
    text = _SUPERSCRIPT.sub(lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = _SUBSCRIPT.sub(lambda m: "_{" + m[0].translate(_SUBSCRIPTS) + "}", text)
    text = "".join(_CHARACTERS.get(character, character) for character in text)
    text = unicodedata.normalize("NFKC", text)
    text = undelimited(text)
    for pattern, replacement in _COMMANDS:
        text = pattern.sub(replacement, text)
    for _ in range(5):
        text, found = _WRAPPER.subn(r"\1", text)
        if not found:
            break
    text = re.sub(r"\\mathbb\s*\{?R\}?", "all real numbers", text)
    text = re.sub(r"\*\*(.+?)\*\*|__(.+?)__|`([^`]+)`", lambda m: m[1] or m[2] or m[3], text)
    text = re.sub(r"\s+", " ", text).strip()
    text = stripped(_LEAD.sub("", text))
    return re.sub(r"^\{([^{}]*,[^{}]*)\}$", r"⦃\1⦄", text)


def stripped(text: str) -> str:
    """Without white space around it, and without the stop, comma or semicolon that ends it."""
    text = text.strip()
    while text and text[-1] in ".;, " and not text.endswith("..."):
        text = text[:-1]
    return text


def undelimited(text: str) -> str:
    """Without `$...$`, `$$...$$`, `\\(...\\)` and `\\[...\\]` around formulas. A dollar sign that
    is escaped, or that no other one closes as Pandoc wants it, is money."""
    text = re.sub(r"\\\(|\\\)|\\\[|\\\]", "", text)
    text = re.sub(r"(?<!\\)\$\$", "$", text) if text.count("$$") % 2 == 0 else text
    return re.sub(r"(?<!\\)\$(?=\S)([^$]*[^\s$\\])\$(?!\d)", r"\1", text)


def _fraction(match: re.Match) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", match[0]).partition("⁄")
    return rf"\frac{{{top}}}{{{bottom}}}"


def final(text: str) -> str:
    """The answer inside a longer text: the last closed `<answer>`, in it or else in the whole text
    the last `\\boxed{}`; else the text itself, stripped."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0:
        text = text[start + len("<answer>") : end]
    inside = boxed(text)
    return (text if inside is None else inside).strip()


def boxed(text: str) -> str | None:
    """What the last `\\boxed{...}` or `\\fbox{...}` holds, braces nested; None without one that is
    closed."""
    starts = [match.end() for match in re.finditer(r"\\f?boxed?\s*\{", text)]
    for start in reversed(starts):
        depth = 1
        for at in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if not depth:
                return text[start:at]
    return None


# Parts: (a) ... (b) ...

_LABEL = re.compile(
    r"(?:(?<=^)|(?<=[\s,;.]))"
    r"(?:\(\s*([a-z]|[ivx]{1,4}|\d{1,2}|[a-z][\s-]+[ivx]{1,4})\s*\)(?=\s|$)"
    r"|([a-z]|[ivx]{1,4}|[a-z][\s-]+[ivx]{1,4})\s*(?:\)|:)(?=\s)"
    r"|(\d{1,2})\)(?=\s))"
    r"\s*(?:[:.=]\s*)?"
)


def parts(text: str) -> dict[str, str]:
    """The parts of an answer that begins with a label, by label: "(a) 12 (b) 5" is {"a": "12", "b":
    "5"}. Labels are letters, roman numerals, numbers or both ("b-i"), and ascend; a mark that does
    not follow the one before is text of a part. Empty where there are no parts. A label that comes
    twice gets "2" with it, so that no part is lost."""
    found: list[tuple[str, int, int]] = []
    for match in _LABEL.finditer(text):
        label = re.sub(r"[\s-]+", "-", match[1] or match[2] or match[3])
        if (not found and match.start() == 0) or (found and _follows(found, label)):
            found.append((label, match.start(), match.end()))
    out: dict[str, str] = {}
    if not found:
        return out
    ends = [start for _, start, _ in found[1:]] + [len(text)]
    for (label, _, start), end in zip(found, ends, strict=True):
        name = label
        while name in out:
            name += "2"
        out[name] = stripped(text[start:end])
    return out


_ROMAN = ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x", "xi", "xii")


def _follows(found: list[tuple[str, int, int]], label: str) -> bool:
    """Whether a label can come after those found: the same kind, at most three further, or the
    same."""
    before = found[-1][0]
    if "-" in before and "-" in label:
        return label >= before
    if "-" in label or "-" in before:
        return label[0] >= before[0]
    if label.isdigit() or before.isdigit():
        return label.isdigit() and before.isdigit() and 0 <= int(label) - int(before) <= 3
    roman = before in _ROMAN and label in _ROMAN and found[0][0] == "i"
    if roman:
        return 0 <= _ROMAN.index(label) - _ROMAN.index(before) <= 3
    return len(label) == len(before) == 1 and 0 <= ord(label) - ord(before) <= 3


# Lists: 2, 9 and 241

_DIGITS = re.compile(r"\d[\d,]*\d|\d")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+")
_AND = re.compile(r"\s*(?:,\s*)?(?:\band\b|\bor\b|&|\\cup\b)\s*", re.IGNORECASE)


def without_thousands(text: str) -> str:
    """Without the commas that separate thousands: "1,234,567" is 1234567. In "2,9,241" they
    separate elements and stay."""
    return _DIGITS.sub(
        lambda m: m[0].replace(",", "") if _THOUSANDS.fullmatch(m[0]) else m[0], text
    )


def elements(text: str) -> list[str]:
    """The elements of a list, split at commas, semicolons, "and" and "or" that are in no bracket.
    One element where nothing separates."""
    text = without_thousands(text)
    out, depth, start, at = [], 0, 0, 0
    while at < len(text):
        character = text[at]
        if character in "([{⦃":
            depth += 1
        elif character in ")]}⦄":
            depth = max(0, depth - 1)
        match = _AND.match(text, at) if depth == 0 else None
        if depth == 0 and character in ",;" and not (match and match.end() > at + 1):
            out.append(text[start:at])
            start = at + 1
        elif match and match.end() > match.start():
            out.append(text[start:at])
            start = at = match.end()
            continue
        at += 1
    out.append(text[start:])
    return [element.strip() for element in out if element.strip()]


def bracketed(text: str) -> tuple[str, str, str] | None:
    """("(", "2, 3", ")") where one pair of brackets, round, square or printed braces, surrounds the
    whole text; else None. The two need not match: [2, 3) is an interval."""
    pairs = {"(": ")]", "[": ")]", "⦃": "⦄"}
    if len(text) < 2 or text[0] not in pairs or text[-1] not in pairs[text[0]]:
        return None
    depth = 0
    for at, character in enumerate(text):
        depth += (character in "([⦃") - (character in ")]⦄")
        if depth == 0 and at < len(text) - 1:
            return None
    return (text[0], text[1:-1].strip(), text[-1]) if depth == 0 else None


def plus_minus(text: str) -> list[str]:
    """The two texts that `\\pm` stands for; the text itself without one."""
    if r"\pm" not in text and r"\mp" not in text and "+/-" not in text:
        return [text]
    text = text.replace("+/-", r"\pm ")
    upper = text.replace(r"\pm", "+").replace(r"\mp", "-")
    lower = text.replace(r"\pm", "-").replace(r"\mp", "+")
    return [upper, lower]


# Number words

_UNITS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SMALL = {word: n for n, word in enumerate(_UNITS)} | {
    word: 10 * n for n, word in enumerate(_TENS, 2)
}
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


def number_of_words(text: str) -> int | None:
    """The number that English words say ("one thousand, seventy-eight" is 1078); None if they say
    none."""
    words = re.sub(r"[,\s-]+|\band\b", " ", text.lower()).split()
    if not words:
        return None
    sign = 1
    if words[0] in ("negative", "minus"):
        sign, words = -1, words[1:]
    total, group, any_word = 0, 0, False
    for word in words:
        if word in _SMALL:
            if group % 100 and not (
                group % 100 >= 20 and group % 10 == 0 and 0 < _SMALL[word] < 10
            ):
                return None
            group += _SMALL[word]
        elif word == "hundred" and 0 < group < 10:
            group *= 100
        elif word in SCALES and group:
            total += group * SCALES[word]
            group = 0
        else:
            return None
        any_word = True
    return sign * (total + group) if any_word else None
