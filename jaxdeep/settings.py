"""Settings: each declares its type, default, bounds and meaning in one line of a frozen dataclass.

    @section
    class OptimConfig:
        lr: Annotated[float, Above(0), "the peak learning rate"]
        clip: Annotated[float, AtLeast(0), "the largest norm of the gradients; 0: any"] = 1.0

A text is the meaning, the other marks are bounds. They are checked wherever such a dataclass is
made: by `build` from a section of a configuration, with the section's key in the message, and by
its constructor. Numbers are finite in any case and integers have at most 31 bits, unless a bound
says otherwise. `describe` reads the declarations back, for help and documentation.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import functools
import math
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from ml_collections import ConfigDict

from jaxdeep.errors import ConfigError

T = TypeVar("T")

SECTIONS = (Mapping, ConfigDict)
LARGEST = 2**31 - 1  # of an integer that has no upper bound of its own
TINY, HUGE = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # what float32 holds without loss of precision
NOT_FINITE = {"nan", "inf", "-inf"}  # texts that stand for no number, wherever one is expected


# Bounds.


@dataclasses.dataclass(frozen=True)
class Bound:
    """A condition on a number, or on each number of a union; `str()` is how a message says it."""

    limit: float
    words = ""

    def holds(self, value: float) -> bool:
        """Whether the value is within the bound."""
        raise NotImplementedError

    def outside(self, kind: type) -> list[float]:
        """The values of this type (int or float) that are nearest to the bound and outside it."""
        raise NotImplementedError

    def __str__(self) -> str:
        return f"{self.words} {self.limit}"


def _next(value: float, kind: type, step: int) -> float:
    return value + step if kind is int else math.nextafter(value, step * math.inf)


class AtLeast(Bound):
    """`limit` or more."""

    words = "at least"

    def holds(self, value: float) -> bool:
        return value >= self.limit

    def outside(self, kind: type) -> list[float]:
        return [_next(self.limit, kind, -1)]


class AtMost(Bound):
    """`limit` or less."""

    words = "at most"

    def holds(self, value: float) -> bool:
        return value <= self.limit

    def outside(self, kind: type) -> list[float]:
        return [_next(self.limit, kind, 1)]


class Above(Bound):
    """More than `limit`."""

    words = "above"

    def holds(self, value: float) -> bool:
        return value > self.limit

    def outside(self, kind: type) -> list[float]:
        return [kind(self.limit)]


class Below(Bound):
    """Less than `limit`."""

    words = "below"

    def holds(self, value: float) -> bool:
        return value < self.limit

    def outside(self, kind: type) -> list[float]:
        return [kind(self.limit)]


@dataclasses.dataclass(frozen=True)
class Finite(Bound):
    """Any finite number."""

    limit: float = math.inf

    def holds(self, value: float) -> bool:
        return math.isfinite(value)

    def outside(self, kind: type) -> list[float]:
        return [] if kind is int else [math.inf, -math.inf]

    def __str__(self) -> str:
        return "any number"


@dataclasses.dataclass(frozen=True)
class Or:
    """A value that has a meaning of its own outside the bounds, such as -1."""

    value: float

    def __str__(self) -> str:
        return f"or {self.value}"


SEED = (AtLeast(0), AtMost(2**32 - 1))
"""The bounds of a seed: `Annotated[int, *SEED, "..."]`."""


def bounds_text(marks: Iterable[Any]) -> str:
    """The bounds among the marks of an annotation, as words; '' if there are none."""
    marks = list(marks)
    bounds = " and ".join(str(mark) for mark in marks if isinstance(mark, Bound))
    return " ".join([bounds, *(str(mark) for mark in marks if isinstance(mark, Or))]).strip()


# Dataclasses of settings.


@typing.dataclass_transform(frozen_default=True)
def section(cls: type[T] | None = None, /, **options: Any) -> Any:
    """Class decorator: a frozen dataclass that checks its values against their annotations when it
    is made, before its own `__post_init__`. `options` are those of `dataclasses.dataclass`."""

    def make(cls: type[T]) -> type[T]:
        own: Callable[[Any], None] | None = cls.__dict__.get("__post_init__")

        def __post_init__(self: Any) -> None:
            check(self)
            if own is not None:
                own(self)

        if own is not None or not hasattr(cls, "__post_init__"):
            cls.__post_init__ = __post_init__
        return dataclasses.dataclass(frozen=True, **options)(cls)

    return make if cls is None else make(cls)


def check(instance: Any) -> None:
    """Checks every field of a frozen dataclass of settings and gives it the type it is declared
    with, as `convert` does; ConfigError names CLASS.FIELD."""
    for setting in describe(type(instance)):
        value = getattr(instance, setting.name)
        converted = convert(value, setting.hint, f"{type(instance).__name__}.{setting.name}")
        object.__setattr__(instance, setting.name, converted)


class Setting(NamedTuple):
    """A declared setting. `hint` is its whole annotation, `default` its default, MISSING of
    `dataclasses` where it must be set."""

    name: str
    hint: Any
    default: Any

    @property
    def kind(self) -> Any:
        """Its type, without marks."""
        return split(self.hint)[0]

    @property
    def bounds(self) -> str:
        """Its bounds as words."""
        return bounds_text(split(self.hint)[1])

    @property
    def meaning(self) -> str:
        """What it is."""
        return next((mark for mark in split(self.hint)[1] if isinstance(mark, str)), "")


@functools.cache
def describe(cls: type) -> tuple[Setting, ...]:
    """The settings of a dataclass, in order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    out = []
    for field in dataclasses.fields(cls):
        if field.init:
            made = field.default_factory is not dataclasses.MISSING
            default = field.default_factory() if made else field.default
            out.append(Setting(field.name, hints[field.name], default))
    return tuple(out)


def split(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """The type of an annotation, and its marks."""
    if typing.get_origin(hint) is not Annotated:
        return hint, ()
    kind, *marks = typing.get_args(hint)
    return kind, tuple(marks)


def members(kind: Any) -> tuple[Any, ...]:
    """The members of a union; of another type, itself."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)


def nested(kind: Any) -> type | None:
    """The dataclass of the section that a setting of this type is; None for a plain value."""
    return next((c for c in members(kind) if dataclasses.is_dataclass(c)), None)


def type_text(kind: Any) -> str:
    """A type as a message or a help page says it."""
    kind, _ = split(kind)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return ", ".join(map(repr, args))
    if len(members(kind)) > 1:
        return " or ".join(type_text(member) for member in members(kind))
    if kind is type(None):
        return "None"
    if origin is tuple and args:
        several = args[-1] is Ellipsis
        inside = ", ".join(type_text(arg) for arg in (args[:1] if several else args))
        return f"tuple of {inside}" if several else f"tuple ({inside})"
    if origin in (dict, collections.abc.Mapping) and args:
        return f"by name: {type_text(args[1])}"
    return getattr(kind, "__name__", str(kind))


# From a section to a frozen dataclass.


def build(cls: type[T], section: Mapping | ConfigDict, key: str = "config") -> T:
    """The dataclass `cls` with the values of the section, and of the sections inside it; lists
    become tuples. ConfigError for an unknown key, a missing one without a default, or a value of
    the wrong type or outside its bounds; `key` is the section's own, to name them by."""
    fields = {setting.name: setting for setting in describe(cls)}
    values = dict(section.items())
    for name in values:
        if name not in fields:
            whole = [f"{key}.{field}" for field in fields]
            raise ConfigError(f"{key}.{name} is not a setting.{suggest(f'{key}.{name}', whole)}")
    missing = [
        f"{key}.{name}"
        for name, setting in fields.items()
        if name not in values and setting.default is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be set")
    values = {n: convert(value, fields[n].hint, f"{key}.{n}") for n, value in values.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {error}") from error


def convert(value: Any, hint: Any, key: str) -> Any:
    """The value in the type of an annotation. ConfigError with the `key` if it is of another type
    or outside the bounds."""
    kind, marks = split(hint)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return _choice(value, args, key)
    if len(members(kind)) > 1:
        return _member(value, kind, marks, key)
    if kind is int or kind is float:
        return _number(value, kind, marks, key)
    if dataclasses.is_dataclass(kind) and isinstance(value, SECTIONS):
        return build(kind, value, key)
    if (origin or kind) is tuple and isinstance(value, str):
        # as the command line gives it for a key that the file leaves at its default
        value = [part.strip() for part in value.split(",") if part.strip()]
    if (origin or kind) is tuple and isinstance(value, (tuple, list)):
        return _tuple(tuple(value), args, key)
    if (origin or kind) in (dict, collections.abc.Mapping) and isinstance(value, SECTIONS):
        inside = args[1] if args else Any
        return {name: convert(element, inside, f"{key}.{name}") for name, element in value.items()}
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if kind is Any or isinstance(value, origin or kind):
        return value
    raise _wrong(value, kind, key)


def _wrong(value: Any, kind: Any, key: str) -> ConfigError:
    return ConfigError(f"{key} is {value!r}, a {type(value).__name__}; expected {type_text(kind)}")


def _choice(value: Any, choices: tuple, key: str) -> Any:
    # to Python True is 1, but it is never meant as that
    if any(value == choice and isinstance(value, type(choice)) for choice in choices):
        return value
    raise ConfigError(
        f"{key} is {value!r}, none of {', '.join(map(repr, choices))}."
        f"{suggest(str(value), map(str, choices))}"
    )


def _member(value: Any, kind: Any, marks: tuple, key: str) -> Any:
    """The value in the first type of a union that takes it. A number outside its bounds is told
    as such."""
    for choice in members(kind):
        if choice is type(None):
            if value is None:
                return None
            continue
        number = choice in (int, float) and _is_number(value)
        section_like = dataclasses.is_dataclass(choice) and isinstance(value, SECTIONS)
        try:
            return convert(value, Annotated[choice, *marks] if marks else choice, key)
        except ConfigError:
            if section_like or (number and not (choice is int and float in members(kind))):
                raise
    raise _wrong(value, kind, key)


def _is_number(value: Any) -> bool:
    text = isinstance(value, str) and value.lower() in NOT_FINITE
    return text or (isinstance(value, numbers.Real) and not isinstance(value, bool))


def _number(value: Any, kind: type, marks: tuple, key: str) -> int | float:
    whole = isinstance(value, numbers.Integral)
    # to Python a bool is an int, but True is never meant as a count or a size
    if not _is_number(value) or (kind is int and not whole):
        raise _wrong(value, kind, key)
    try:
        number = int(value) if kind is int else float(value)
    except OverflowError:
        number = math.inf
    meaning = next((f" ({mark})" for mark in marks if isinstance(mark, str)), "")
    bounds = [mark for mark in marks if isinstance(mark, Bound)]
    said = bounds_text(marks)
    if any(mark.value == number for mark in marks if isinstance(mark, Or)):
        return number
    if kind is float and not math.isfinite(number):
        said = f"a finite number, {said}" if said else "a finite number"
    elif kind is float and number and not TINY <= abs(number) <= HUGE:
        said = f"0 or between {TINY:.2g} and {HUGE:.2g} in size, as float32 has it"
    elif all(bound.holds(number) for bound in bounds):
        if kind is float or abs(number) <= LARGEST or any(isinstance(b, AtMost) for b in bounds):
            return number
        said = f"at most {LARGEST}" if number > 0 else f"at least {-LARGEST}"
    raise ConfigError(f"{key}={value} must be {said}{meaning}")


def _tuple(value: tuple, args: tuple, key: str) -> tuple:
    if not args:
        return value
    if args[-1] is Ellipsis:
        args = args[:1] * len(value)
    if len(args) != len(value):
        raise ConfigError(f"{key} is {value!r}, of {len(value)} elements; expected {len(args)}")
    pairs = enumerate(zip(value, args, strict=True))
    return tuple(convert(element, arg, f"{key}[{i}]") for i, (element, arg) in pairs)


def suggest(name: str, names: Iterable[str]) -> str:
    """' Did you mean "..."?' with the closest of `names`, or '' if none is close. Of dotted keys
    and paths the last parts must be alike, the same ones are closest, else the whole counts."""
    parts = "/" if "/" in name else "."

    def likeness(other: str) -> float:
        last, its = name.rpartition(parts)[2], other.rpartition(parts)[2]
        whole = difflib.SequenceMatcher(None, name, other).ratio()
        if last == its:
            return 1 + whole
        return whole if difflib.SequenceMatcher(None, last, its).ratio() >= 0.5 else 0.0

    best = max(((likeness(other), other) for other in names), default=(0.0, ""))
    return f' Did you mean "{best[1]}"?' if best[0] >= 0.5 else ""
