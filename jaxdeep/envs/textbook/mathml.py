"""MathML to LaTeX, in the order of the source: each letter and digit once, none added."""

from __future__ import annotations

import re

from jaxdeep.envs.textbook.tree import Element

FUNCTIONS = set(
    [
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
        "ln",
        "log",
        "lim",
        "exp",
        "max",
        "min",
        "det",
        "gcd",
    ]
)
_OPERATORS = {
    "×": r"\times",
    "⋅": r"\cdot",
    "·": r"\cdot",
    "∙": r"\cdot",
    "÷": r"\div",
    "−": "-",
    "–": "-",
    "±": r"\pm",
    "∓": r"\mp",
    "≤": r"\le",
    "≥": r"\ge",
    "≠": r"\ne",
    "≈": r"\approx",
    "≡": r"\equiv",
    "∝": r"\propto",
    "→": r"\to",
    "⇒": r"\Rightarrow",
    "⇔": r"\Leftrightarrow",
    "∞": r"\infty",
    "∑": r"\sum",
    "∏": r"\prod",
    "∫": r"\int",
    "∂": r"\partial",
    "∇": r"\nabla",
    "√": r"\surd",
    "∈": r"\in",
    "∪": r"\cup",
    "∩": r"\cap",
    "⊂": r"\subset",
    "∅": r"\emptyset",
    "⊥": r"\perp",
    "∥": r"\parallel",
    "∠": r"\angle",
    "°": r"^\circ",
    "′": "'",
    "″": "''",
    "…": r"\ldots",
    "⋯": r"\cdots",
    "∴": r"\therefore",
    "∼": r"\sim",
    "≅": r"\cong",
    "{": r"\{",
    "}": r"\}",
    "%": r"\%",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "←": r"\leftarrow",
}
_GREEK = dict(
    zip(
        "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΥΦΨΩϕϵ",
        [
            "alpha",
            "beta",
            "gamma",
            "delta",
            "varepsilon",
            "zeta",
            "eta",
            "theta",
            "iota",
            "kappa",
            "lambda",
            "mu",
            "nu",
            "xi",
            "pi",
            "rho",
            "sigma",
            "tau",
            "upsilon",
            "varphi",
            "chi",
            "psi",
            "omega",
            "Gamma",
            "Delta",
            "Theta",
            "Lambda",
            "Xi",
            "Pi",
            "Sigma",
            "Upsilon",
            "Phi",
            "Psi",
            "Omega",
            "phi",
            "epsilon",
        ],
        strict=True,
    )
)
_ACCENTS = {
    "¯": "overline",
    "‾": "overline",
    "^": "hat",
    "ˆ": "hat",
    "→": "vec",
    "⇀": "vec",
    "~": "tilde",
    "˜": "tilde",
    "˙": "dot",
    "_": "underline",
    "̲": "underline",
    "-": "bar",
}
_SPACE = re.compile(r"\s+")


def latex(element: Element) -> str:
    """The formula of a `math` element as LaTeX, without delimiters."""
    text = _SPACE.sub(" ", _row(element)).strip()
    return re.sub(r"\s+(?=[,.;}\])])|(?<=[(\[])\s+", "", text)


def inline(element: Element) -> str:
    """The formula as it stands in a sentence: between dollar signs, or bare where it is only a
    number or a text."""
    text = latex(element)
    bare = text.replace(r"\$", "$").replace(r"\%", "%")
    words = re.fullmatch(r"((?:[^\\{}^_$]|\\[$%])*?)\\text\{([^{}\\]*)\}([\s.,;:]*)", text)
    if re.fullmatch(r"[-+\d\s.,;:$%()/]*", bare):
        return bare
    if words and re.fullmatch(r"[-+\d\s.,;:$%()/]*", words[1].replace("\\", "")):
        return (words[1] + words[2] + words[3]).replace(r"\$", "$").replace(r"\%", "%")
    return f"${text}$" if text else ""


def _row(element: Element) -> str:
    pieces = [
        _one(child) if isinstance(child, Element) else _text(child) for child in element.children
    ]
    out = ""
    for piece in pieces:
        glue = " " if re.search(r"\\[A-Za-z]+$", out) and piece[:1].isalpha() else ""
        out += glue + piece
    return out


def _text(text: str) -> str:
    return _SPACE.sub("", text)


def _one(element: Element) -> str:
    name = element.name
    made = _LEAVES.get(name)
    if made is not None:
        return made(element)
    parts = element.elements()
    if name == "mfrac" and len(parts) == 2:
        return rf"\frac{{{_one(parts[0])}}}{{{_one(parts[1])}}}"
    if name == "msqrt":
        return rf"\sqrt{{{_row(element)}}}"
    if name == "mroot" and len(parts) == 2:
        return rf"\sqrt[{_one(parts[1])}]{{{_one(parts[0])}}}"
    if name in ("msup", "msub", "msubsup", "munder", "mover", "munderover") and parts:
        return _scripts(name, parts)
    if name == "mfenced":
        return _fenced(element, parts)
    if name == "mtable":
        rows = " \\\\ ".join(_one(row) for row in parts)
        return rf"\begin{{array}} {rows} \end{{array}}"
    if name in ("mtr", "mlabeledtr"):
        return " & ".join(_row(cell) for cell in parts)
    if name == "mmultiscripts" and parts:
        return _multiscripts(parts)
    if name in ("annotation", "annotation-xml"):
        return ""
    return _row(element)


def _scripts(name: str, parts: list[Element]) -> str:
    base, rest = _one(parts[0]), [_one(part) for part in parts[1:]]
    if name in ("mover", "munder") and len(rest) == 1:
        mark = "".join(parts[1].text().split())
        accent = _ACCENTS.get(mark)
        if accent:
            return rf"\{'underline' if name == 'munder' else accent}{{{base}}}"
        if mark in ("︷", "⏞", "︸", "⏟"):
            return rf"\{'overbrace' if name == 'mover' else 'underbrace'}{{{base}}}"
    marks = {"msup": "^", "mover": "^", "msub": "_", "munder": "_"}.get(name, "_^")
    base = base if re.fullmatch(r"\w+|\\[A-Za-z]+|[)\]|]|.?", base) else f"{{{base}}}"
    if rest and rest[0] in ("^\\circ", "'", "''"):
        return base + rest[0]
    return base + "".join(f"{m}{{{one}}}" for m, one in zip(marks, rest, strict=False) if one)


def _multiscripts(parts: list[Element]) -> str:
    base, after, before, here = _one(parts[0]), [], [], None
    here = after
    for part in parts[1:]:
        if part.name == "mprescripts":
            here = before
        else:
            here.append(_one(part))

    def marks(scripts: list[str]) -> str:
        return "".join(f"{'_^'[n % 2]}{{{one}}}" for n, one in enumerate(scripts) if one)

    return base + marks(after) + ("{}" + marks(before) if before else "")


def _fenced(element: Element, parts: list[Element]) -> str:
    left, right = (
        element.attributes.get(key, default) for key, default in (("open", "("), ("close", ")"))
    )
    marks = (element.attributes.get("separators", ",").split() or [""]) if len(parts) > 1 else [""]
    inner = _one(parts[0]) if parts else ""
    for number, part in enumerate(parts[1:]):
        inner += marks[min(number, len(marks) - 1)] + _one(part)
    return _OPERATORS.get(left, left) + inner + _OPERATORS.get(right, right)


def _operator(element: Element) -> str:
    text = "".join(element.text().split()).replace("\u2061", "").replace("\u2062", "")
    text = text.replace("\u2063", "").replace("\u200b", "")
    if text in FUNCTIONS:
        return f"\\{text} "
    out = ""
    for character in text:
        command = _OPERATORS.get(character) or (
            "\\" + _GREEK[character] if character in _GREEK else character
        )
        out += command + (" " if re.search(r"[A-Za-z]$", command) and command[0] == "\\" else "")
    spaced = text in ("=", "+", "-", "−", "–", "<", ">", "×", "·", "⋅", "÷", "≤", "≥", "≠", "≈")
    return f" {out.strip()} " if spaced else out


def _identifier(element: Element) -> str:
    text = _SPACE.sub(" ", element.text()).strip()
    if text in FUNCTIONS:
        return f"\\{text} "
    if len(text) == 1:
        return _operator(element)
    if text.isalpha() and text.isascii():
        return rf"\mathrm{{{text}}}"
    return _words(element)


def _words(element: Element) -> str:
    """A text inside a formula. Digits that begin it belong to the number before it: 1.50 m/s is set
    as 1, a stop, and "50 m/s"."""
    text = _SPACE.sub(" ", element.text().replace("\u00a0", " "))
    lead = re.match(r"\s*[$]?[\d.,]*", text)[0]
    rest = text[len(lead) :]
    lead = lead.replace("$", r"\$")
    if not rest.strip():
        return lead + rest
    if re.fullmatch(r"\s*[^\w\s]\s*", rest) and rest.strip() in _OPERATORS:
        return lead + _OPERATORS[rest.strip()] + " "
    escaped = re.sub(r"([%&#_$])", r"\\\1", rest.replace("{", "(").replace("}", ")"))
    return rf"{lead}\text{{{escaped}}}"


_LEAVES = {
    "mn": lambda element: _text(element.text()).replace("$", r"\$").replace("%", r"\%"),
    "mi": _identifier,
    "mo": _operator,
    "mtext": _words,
    "ms": _words,
    "mspace": lambda element: r" ",
    "none": lambda element: "",
}
