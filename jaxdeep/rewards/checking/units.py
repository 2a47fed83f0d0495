"""Units of measurement in answers: a fixed list with exact factors, and quantities read with it.

A unit is a factor and the powers of seven base quantities, angle and money. Factors are those of
the international definitions (1 inch = 2.54 cm, 1 lb = 0.45359237 kg), as fractions, so that 10.8
m/s is 1080 cm/s exactly."""

from __future__ import annotations

import functools
import re
from fractions import Fraction
from typing import NamedTuple

from jaxdeep.rewards.checking import text as texts
from jaxdeep.rewards.checking.formula import FormulaError, Node, number, parse, symbols

BASE = ("m", "kg", "s", "A", "K", "mol", "cd", "rad", "$", "bit")


class Unit(NamedTuple):
    """`factor` to the base units, the powers of `BASE`, and what is added after it
    (temperatures)."""

    factor: Fraction
    powers: tuple[int, ...]
    offset: Fraction = Fraction(0)
    exact: bool = True  # within one system: cm and m are, miles and km are not

    def times(self, other: Unit, sign: int = 1) -> Unit:
        """The product with the other unit, or the quotient for sign -1."""
        powers = tuple(a + sign * b for a, b in zip(self.powers, other.powers, strict=True))
        return Unit(self.factor * other.factor**sign, powers, exact=self.exact and other.exact)

    def raised(self, power: int) -> Unit:
        """The unit to a power."""
        return Unit(self.factor**power, tuple(power * p for p in self.powers), exact=self.exact)


class Quantity(NamedTuple):
    """A number with what follows it: a unit, a counted noun, or neither."""

    value: Node
    unit: Unit | None = None
    noun: str = ""
    written: str = ""  # the unit as it is written


ONE = Unit(Fraction(1), (0,) * len(BASE))


# names, of which those with a bar take prefixes before "|" as symbols and after it as words; the
# definition in earlier units; the prefixes. A "~" after it: of another system than the SI, so that
# converted values are rounded.
_DEFINITIONS = """
m | meter meters metre metres = m ; k c m u n d p
kg kgs kilos = kg
g | gram grams = 1/1000 kg ; k m u n
s | second seconds = s ; m u n p
sec secs = s
A | ampere amperes amp amps = A ; m u k
K kelvin kelvins = K
mol | mole moles = mol ; m k
cd | candela candelas = cd ; m
rad radian radians rads = rad
min mins minute minutes = 60 s
h hr hrs hour hours = 60 min
d day days = 24 h
week weeks wk wks = 7 d
year years yr yrs y = 365.25 d
month months mo mos = 1/12 year
inch inches in = 0.0254 m ~
ft foot feet = 12 inch ~
yd yds yard yards = 3 ft ~
mi mile miles = 5280 ft ~
nmi = 1852 m ~
mph = mi/h ~
kph kmh = km/h
L l | liter liters litre litres = 1/1000 m^3 ; m d c u
gal gallon gallons = 231 inch^3 ~
qt quart quarts = 1/4 gal ~
pt pint pints = 1/2 qt ~
cup cups = 1/2 pt ~
floz = 1/8 cup ~
tbsp tablespoon tablespoons = 1/16 cup ~
tsp teaspoon teaspoons = 1/48 cup ~
lb lbs pound pounds = 0.45359237 kg ~
oz ounce ounces = 1/16 lb ~
ton tons = 2000 lb ~
tonne tonnes = 1000 kg
acre acres = 43560 ft^2 ~
ha hectare hectares = 10000 m^2
N | newton newtons = kg m/s^2 ; k m M
J | joule joules = N m ; k M m G
cal | calorie calories = 4.184 J ; k
Cal = 4184 J
eV | electronvolt electronvolts = 1.602176634e-19 J ; k M G
W | watt watts = J/s ; k M m G
Wh | watthour watthours = W h ; k M
hp horsepower = 745.7 W ~
Pa | pascal pascals = N/m^2 ; k M h
atm atmosphere atmospheres = 101325 Pa ~
bar bars = 100000 Pa
psi = 6894.757293 Pa ~
mmHg torr = 133.322368 Pa ~
Hz | hertz = s^-1 ; k M G
C | coulomb coulombs = A s ; m u n
V | volt volts = J/C ; k m M u
ohm Ω | ohm ohms = V/A ; k M m
F | farad farads = C/V ; u n p m
T | tesla teslas = V s/m^2 ; m u
Wb | weber webers = V s ; m
H | henry henries henrys = V s/A ; m u
° deg degree degrees = 3.14159265358979323846264338327950288419716939937510/180 rad ~
rev revolution revolutions = 360 deg ~
rpm = rev/min
$ usd dollar dollars = $
cent cents = 1/100 $
bit | bits = bit ; k M G
B | byte bytes = 8 bit ; k M G
"""
_LINE = re.compile(r"(.+?) = (?:([\d./e-]+) )?(.+?)(?: ; (.+?))?( ~)?")


def _fill() -> None:
    """Put the units into `UNITS`, by every spelling."""
    UNITS.update({name: Unit(Fraction(1), _powers(name)) for name in BASE})
    for line in _DEFINITIONS.strip().splitlines():
        names, factor, definition, prefixes, other = _LINE.fullmatch(line).groups()
        top, _, bottom = (factor or "1").partition("/")
        whole = _product(definition)
        whole = Unit(
            whole.factor * Fraction(top) / Fraction(bottom or 1),
            whole.powers,
            exact=whole.exact and not other,
        )
        short, _, long = names.partition("|")
        for prefix, word, power in _PREFIXES:
            if not prefix or prefix in (prefixes or "").split():
                spellings = [prefix + one for one in short.split()]
                spellings += [word + one for one in long.split()]
                scaled = whole._replace(factor=whole.factor * Fraction(10) ** power)
                UNITS.update(dict.fromkeys(spellings, scaled))
    kelvin, zero = UNITS["K"], Fraction("273.15")
    UNITS.update(dict.fromkeys(("°C", "degC", "celsius"), kelvin._replace(offset=zero)))
    degree = Fraction(5, 9)
    fahrenheit = Unit(degree, kelvin.powers, Fraction("459.67") * degree, exact=False)
    UNITS.update(dict.fromkeys(("°F", "degF", "fahrenheit"), fahrenheit))
    # a base of its own for every other currency: no rate leads from one to another
    for number_of_base, names in ((5, "€ euro euros eur"), (7, "£ gbp")):
        powers = tuple(number_of_base * power for power in _powers("$"))
        UNITS.update(dict.fromkeys(names.split(), Unit(Fraction(1), powers)))


def _powers(name: str) -> tuple[int, ...]:
    return tuple(int(name == other) for other in BASE)


_PREFIXES = (
    *(("", "", 0), ("k", "kilo", 3), ("c", "centi", -2), ("m", "milli", -3), ("u", "micro", -6)),
    *(("n", "nano", -9), ("d", "deci", -1), ("p", "pico", -12), ("M", "mega", 6), ("G", "giga", 9)),
    ("h", "hecto", 2),
)
UNITS: dict[str, Unit] = {}
LARGE = {"hundred": 100, "dozen": 12, **texts.SCALES}
_SINGLE = re.compile(
    r"(?P<name>°\s?[CF](?![A-Za-z])|[A-Za-zΩ]+|[°$€£])\s*(?:\^\s*\{?\s*(?P<power>-?\d)\s*\}?)?"
)
_CURRENCY = re.compile(r"^(-?)\s*(\\?\$|€|£)\s*(-?)\s*(?=[\d.\\])")
_STOP = set(
    [
        "and",
        "or",
        "if",
        "because",
        "not",
        "but",
        "than",
        "when",
        "since",
        "to",
        "minus",
        "plus",
        "times",
        "over",
        "more",
        "less",
        "is",
        "are",
        "was",
        "of",
        "by",
        "from",
        "with",
        "for",
        "then",
        "so",
        "no",
        "only",
        "about",
        "between",
        "each",
        "other",
        "another",
        "therefore",
        "the",
    ]
)


@functools.lru_cache(4096)
def unit(text: str) -> Unit | None:
    """The unit that a text names, such as "m/s^2", "miles per hour", "square feet", "kg m s^-1";
    None if it names none of the list."""
    text = re.sub(
        r"\bdegrees?\s+((?i:celsius|fahrenheit)|C|F)\b", lambda m: "°" + m[1][0].upper(), text
    )
    text = re.sub(r"\bfl\.?\s*oz\b\.?|\bfluid ounces?\b", "floz", text)
    text = re.sub(r"\b(ft|in|mi|lb|lbs|oz|hr|min|sec|yd|gal|mo|yr|sq|cu)\.", r"\1", text)
    text = re.sub(r"\bper\b|\ba(?=\s+(?:second|hour|minute|day|week|month|year)\b)", "/", text)
    text = re.sub(r"\b(?:square|sq)\s+([A-Za-z]+)", r"\1^2", text)
    text = re.sub(r"\b(?:cubic|cu)\s+([A-Za-z]+)", r"\1^3", text)
    text = re.sub(r"([A-Za-z]+)\s+squared\b", r"\1^2", text)
    text = re.sub(r"([A-Za-z]+)\s+cubed\b", r"\1^3", text)
    text = text.replace(r"\cdot", "*").replace(r"\times", "*").replace(r"\Omega", "Ω").strip()
    return _product(text)


def _product(text: str) -> Unit | None:
    """The unit that names with powers, products and quotients make; after a quotient all that
    follows divides."""
    result, sign, at, depth = ONE, 1, 0, 0
    expecting = True
    while at < len(text):
        character = text[at]
        match = _SINGLE.match(text, at)
        if match:
            one = _named(match["name"])
            if one is None:
                return None
            result = _join(result, one.raised(int(match["power"])) if match["power"] else one, sign)
            at, expecting = match.end(), False
        elif character == "/" and sign == -1 and not depth:
            at, expecting = at + 1, True
        elif character == "/":
            sign, at, expecting = -1, at + 1, True
        elif character == "(" and sign == -1:
            depth, at = depth + 1, at + 1
        elif character == ")" and depth:
            depth, at = depth - 1, at + 1
        elif character in "* -":
            at += 1
        else:
            return None
    return None if expecting or depth else result


def _join(a: Unit, b: Unit, sign: int) -> Unit:
    return b if a == ONE and sign == 1 else a.times(b, sign)


def _named(name: str) -> Unit | None:
    name = name.replace(" ", "")
    return UNITS.get(name) or (UNITS.get(name.lower()) if len(name) > 3 else None)


def quantity(text: str) -> Quantity | None:
    """A number with its unit or counted noun; None if the text is none. A sum of units of one kind
    ("5 ft 3 in", "2 hours 30 minutes") is one quantity."""
    text = texts.without_thousands(texts.stripped(text))
    text = re.sub(r"(?<=[\d)}])\s*per\s?cent\b", "%", text)
    value = None if "°" in text else _number(text)
    if value is not None:
        return Quantity(value)
    money = _CURRENCY.match(text)
    if money:
        inner = quantity(money[1] + money[3] + text[money.end() :])
        if inner is None or inner.unit is not None or inner.noun not in ("", "dollars"):
            return None
        name = money[2].lstrip("\\")
        return Quantity(inner.value, UNITS[name], written=name)
    for match in re.finditer(r"(?<![A-Za-z\\])(?=[A-Za-z°$€£Ω]|\\Omega)", text):
        head, tail = text[: match.start()].strip(), text[match.start() :].strip()
        if not head or len(tail) > 60:
            continue
        value = _number(head)
        if value is None:
            continue
        found = _with_tail(value, head, tail)
        if found is not None:
            return found
    return None


def _with_tail(value: Node, head: str, tail: str) -> Quantity | None:
    word = re.match(r"([A-Za-z]+)\b\s*(.*)$", tail)
    if word and word[1].lower() in LARGE:
        value = Node("mul", (value, number(LARGE[word[1].lower()])))
        tail = word[2]
        if not tail:
            return Quantity(value)
    single_letter = re.fullmatch(r"[A-Za-z]", tail) and head[-1:] not in (" ",)
    one = unit(tail)
    if one is not None and single_letter and one.powers == (0,) * len(BASE):
        return None
    if one is not None:
        return Quantity(value, one, written=tail)
    compound = _compound(value, tail)
    if compound is not None:
        return compound
    words = re.fullmatch(r"[A-Za-z]{2,}(?:[\s-]+[A-Za-z]{2,}){0,3}", tail)
    if words and not set(tail.lower().split()) & _STOP and not _is_formula(tail):
        return Quantity(value, noun=tail.lower())
    return None


def _compound(value: Node, tail: str) -> Quantity | None:
    """ "ft 3 in" after 5."""
    match = re.fullmatch(r"([A-Za-z]+)\.?,?\s*(?:and\s+)?(\d[\d./ ]*?)\s*([A-Za-z]+)\.?", tail)
    first, second = (unit(match[1]), unit(match[3])) if match else (None, None)
    more = _number(match[2]) if match else None
    if not first or not second or more is None or first.powers != second.powers:
        return None
    if first.factor <= second.factor or first.offset or second.offset:
        return None
    part = Node("mul", (more, number(second.factor / first.factor)))
    return Quantity(Node("add", (value, part)), first, written=match[1])


def _number(text: str) -> Node | None:
    """A formula without symbols, or the number that words say."""
    try:
        node = parse(text)
    except FormulaError:
        said = texts.number_of_words(text)
        return None if said is None else number(said)
    return None if symbols(node) else node


def _is_formula(text: str) -> bool:
    try:
        parse(text)
    except FormulaError:
        return False
    return True


_fill()
