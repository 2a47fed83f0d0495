"""Which of the packages that jaxdeep needs are installed, by the ranges that its own metadata
declares."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from typing import NamedTuple

from packaging.requirements import Requirement

NAME = "jaxdeep"


class Needs(NamedTuple):
    """What the installed metadata asks for: always, and by extra."""

    always: list[Requirement]
    extras: dict[str, list[Requirement]]


def needs() -> Needs | None:
    """What jaxdeep needs; None where it is run from a folder without being installed."""
    try:
        distribution = importlib.metadata.distribution(NAME)
    except importlib.metadata.PackageNotFoundError:
        return None
    wanted = [Requirement(line) for line in distribution.requires or ()]
    extras = distribution.metadata.get_all("Provides-Extra") or []
    return Needs(
        [one for one in wanted if _applies(one, "")],
        {
            extra: [one for one in wanted if _applies(one, extra) and not _applies(one, "")]
            for extra in extras
        },
    )


def version(name: str) -> str:
    """The installed version of a package; empty where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def unmet(requirement: Requirement) -> list[str]:
    """What is missing of a requirement, and of the extras that it asks for, a sentence each."""
    return list(_unmet(requirement, set()))


def _unmet(requirement: Requirement, seen: set[str]) -> Iterator[str]:
    found = version(requirement.name)
    if not found:
        yield f"{requirement.name} is not installed"
    elif not requirement.specifier.contains(found, prereleases=True):
        yield f"{requirement.name} {found} is not in the range {requirement.specifier}"
    elif requirement.extras and str(requirement) not in seen:
        seen.add(str(requirement))
        for line in importlib.metadata.requires(requirement.name) or ():
            inner = Requirement(line)
            if any(_applies(inner, e) for e in requirement.extras) and not _applies(inner, ""):
                yield from _unmet(inner, seen)


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def install_line(extra: str = "") -> str:
    """The command that installs jaxdeep with an extra, from here where this is a checkout."""
    from jaxdeep.config import ROOT

    place = f"-e '{ROOT}" if (ROOT / "setup.py").exists() else f"'{NAME}"
    return f"pip install {place}{f'[{extra}]' if extra else ''}'"
