"""Patches: read from a model's text, applied to files in memory, made from two versions of files.

    patch = parse(text, "blocks")           # or "unified"; raises DiffError
    after = patch.apply({"a.py": "..."})    # a new map of all files, or DiffError: all or nothing
    between(before, after, "unified").text()

A change is placed where its text is found, in exactly one place, or it is refused with a
`DiffError` that has a code. Nothing is ever placed by similarity.
"""

from __future__ import annotations

from typing import Literal

from jaxdeep.envs.repair.diff import blocks, unified
from jaxdeep.envs.repair.diff.blocks import Block, BlockPatch
from jaxdeep.envs.repair.diff.common import Code, DiffError, Files, check_path, split_lines
from jaxdeep.envs.repair.diff.unified import FileDiff, Hunk, UnifiedPatch

__all__ = [
    "Block",
    "BlockPatch",
    "Code",
    "DiffError",
    "FileDiff",
    "Files",
    "Form",
    "Hunk",
    "Patch",
    "UnifiedPatch",
    "between",
    "check_path",
    "parse",
    "split_lines",
]

Form = Literal["blocks", "unified"]
Patch = BlockPatch | UnifiedPatch

_FORMS = {"blocks": blocks, "unified": unified}


def parse(text: str, form: Form) -> Patch:
    """The patch in a text, which may have prose and code fences around it. `blocks` are
    search/replace blocks, `unified` is what `diff -u` and `git diff` write.

    Raises `DiffError`, most often "unparsable": also for a text without any change in it."""
    return _FORMS[form].parse(text)


def between(before: Files, after: Files, form: Form) -> Patch:
    """The patch that makes `after` of `before`; it has no changes where they are equal. A unified
    one is what `git apply` takes; renames appear as a deletion and a new file.

    Raises `DiffError("inexpressible")` where the form has no words for a change: `blocks` cannot
    delete a file."""
    return _FORMS[form].between(before, after)
