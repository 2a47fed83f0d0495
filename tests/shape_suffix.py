"""Watches functions of the device half return, and notes every array whose shape suffix is wrong.

`x_BTD` must have rank 3, and within one function a letter is one size. A small letter is a size of
its own; where its capital is also there, it is a part of it, so at most as large. A digit is a
dimension of that size. The letters are those of `jaxdeep.model.config`.

Works on tracers, so it must see a fresh trace: jit in the test, on shapes nothing else uses.
"""

import contextlib
import pathlib
import re
import sys
from collections.abc import Iterator

import jaxdeep
from jaxdeep.model import config

PACKAGE = str(pathlib.Path(jaxdeep.__file__).parent)
CAPITALS = "".join(re.findall(r"(?:^ {4}|  )([A-Z]) {2}", config.__doc__, re.M))
LETTERS = {*CAPITALS, *CAPITALS.lower(), *"io", *"0123456789"}
WITH_CAPITALS = re.compile(r"_([a-z0-9]*[A-Z][A-Za-z0-9]*)$")
SMALL = re.compile(r"_([a-z]{1,3}|[0-9])$")  # longer ones are words


def suffix(name: str) -> str:
    """The dimensions at the end of a name: `tokens_bt` and `x_BTD` have some, `last_block` has
    none."""
    if found := WITH_CAPITALS.search(name):
        return found[1]
    found = SMALL.search(name)
    return found[1] if found and set(found[1]) <= LETTERS else ""


def lies(names: dict) -> tuple[list[str], int]:
    """What is wrong with the suffixed arrays among these locals, and how many there are."""
    wrong, sizes, seen = [], {}, 0
    for name, value in names.items():
        letters, shape = suffix(name), getattr(value, "shape", None)
        if not letters or not isinstance(shape, tuple):
            continue
        seen += 1
        if not set(letters) <= LETTERS:
            wrong.append(f"{name} has letters that the legend lacks")
            continue
        if len(letters) != len(shape):
            wrong.append(f"{name} has shape {shape}")
            continue
        for letter, size in zip(letters, shape, strict=True):
            expected = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
            if expected != size:
                wrong.append(f"{name} has shape {shape}, but {letter}={expected}")
    for letter, size in sizes.items():
        whole = sizes.get(letter.upper(), size)
        if size > whole:
            wrong.append(f"{letter}={size} is no part of {letter.upper()}={whole}")
    return wrong, seen


@contextlib.contextmanager
def checked() -> Iterator[tuple[list[str], set[str]]]:
    """Collects what is wrong inside, and the functions that were watched."""
    wrong: list[str] = []
    seen: set[str] = set()

    def call(frame, event, _):
        return leave if frame.f_code.co_filename.startswith(PACKAGE) else None

    def leave(frame, event, _):
        frame.f_trace_lines = False
        if event == "return":
            found, count = lies(frame.f_locals)
            wrong.extend(f"{frame.f_code.co_qualname}: {lie}" for lie in found)
            if count:
                seen.add(frame.f_code.co_name)
        return leave

    sys.settrace(call)
    try:
        yield wrong, seen
    finally:
        sys.settrace(None)
