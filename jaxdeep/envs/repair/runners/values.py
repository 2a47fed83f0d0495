"""Values as JSON, by their exact types; the same code on both sides of a box.

Numbers, texts, booleans, None, lists and dictionaries with keys of text are JSON as it is. All else
is `{"$type": NAME, "value": ...}`: tuple, set, frozenset, bytes, complex, dict (a list of pairs),
float (inf, nan), int (more than 64 bits, in hexadecimal), iterator (its items), and object, of
which only the name of its type goes out. A subclass of a plain type is an object: it could claim
to equal anything.

This file also runs inside boxes, in whatever Python is there: the standard library of 3.6.
"""

import math

DEPTH, ITEMS = 60, 100000


class _Budget:
    """How many values may still be written."""

    def __init__(self, items):
        self.left = items


def encode(value, depth=DEPTH, budget=None):
    """The JSON form of a value; too deep or too large a one is an object."""
    budget = budget or _Budget(ITEMS)
    budget.left -= 1
    kind = type(value)
    if depth <= 0 or budget.left < 0:
        return {"$type": "object", "value": "too large"}
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return value if -(2**63) <= value < 2**63 else _typed("int", hex(value))
    if kind is float:
        return value if math.isfinite(value) else _typed("float", repr(value))
    if kind is complex:
        return _typed("complex", [encode(value.real), encode(value.imag)])
    if kind in (bytes, bytearray):
        return _typed(kind.__name__, value.hex())

    def each(items):
        out = []
        for item in items:
            if budget.left < 0:
                break
            out.append(encode(item, depth - 1, budget))
        return out

    if kind is list:
        return each(value)
    if kind in (tuple, set, frozenset):
        return _typed(kind.__name__, each(value))
    if kind is dict:
        if all(type(key) is str for key in value) and "$type" not in value:
            return dict(zip(value, each(value.values())))  # noqa: B905
        return _typed("dict", [each(pair) for pair in value.items()])
    if hasattr(kind, "__next__"):
        return _typed("iterator", each(value))
    return _typed("object", kind.__name__)


def _typed(name, value):
    return {"$type": name, "value": value}


def decode(form):
    """The value of a JSON form; ValueError for one of a type that has no value."""
    if isinstance(form, list):
        return [decode(item) for item in form]
    if not isinstance(form, dict):
        return form
    if "$type" not in form:
        return {key: decode(item) for key, item in form.items()}
    name, value = form["$type"], form.get("value")
    if name in ("tuple", "set", "frozenset"):
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[name](map(decode, value))
    if name == "dict":
        return {decode(key): decode(item) for key, item in value}
    if name == "bytes":
        return bytes.fromhex(value)
    if name == "bytearray":
        return bytearray.fromhex(value)
    if name == "complex":
        return complex(decode(value[0]), decode(value[1]))
    if name == "int":
        return int(value, 16)
    if name == "float":
        return float(value)
    if name == "iterator":
        return iter([decode(item) for item in value])
    raise ValueError(f"no value of type {name!r}")
