"""Watches functions of the device half return, and notes every local whose shape suffix lies.

`x_BTD` must have rank 3, and within one function a letter is one size (`1` is size one). Works on
tracers, so it must see a fresh trace: jit in the test, on shapes nothing else uses.
"""

import contextlib
import pathlib
import re
import sys
from collections.abc import Iterator

import jaxdeep

PACKAGE = str(pathlib.Path(jaxdeep.__file__).parent)
SUFFIX = re.compile(r"_([A-Zb1]+)$")


def lies(names: dict) -> tuple[list[str], int]:
    """What is wrong with the suffixed arrays among these locals, and how many there are."""
    wrong, sizes, seen = [], {"1": 1}, 0
    for name, value in names.items():
        found, shape = SUFFIX.search(name), getattr(value, "shape", None)
        if not found or shape is None:
            continue
        seen += 1
        if len(found[1]) != len(shape):
            wrong.append(f"{name} has shape {shape}")
            continue
        for letter, size in zip(found[1], shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                wrong.append(f"{name} has shape {shape}, but {letter}={sizes[letter]}")
    return wrong, seen


@contextlib.contextmanager
def checked() -> Iterator[tuple[list[str], set[str]]]:
    """Collects the lies told inside, and the functions that were watched."""
    wrong: list[str] = []
    seen: set[str] = set()

    def call(frame, event, _):
        return leave if frame.f_code.co_filename.startswith(PACKAGE) else None

    def leave(frame, event, _):
        frame.f_trace_lines = False
        if event == "return":
            found, count = lies(frame.f_locals)
            wrong.extend(f"{frame.f_code.co_name}: {lie}" for lie in found)
            if count:
                seen.add(frame.f_code.co_name)
        return leave

    sys.settrace(call)
    try:
        yield wrong, seen
    finally:
        sys.settrace(None)
