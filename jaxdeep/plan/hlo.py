"""What a compiled program does on each of its devices, read from its optimized HLO: collectives, bytes of
memory that are read and written, and cycles, all times the trips of the loops around them.

The compiler's own `cost_analysis` counts the body of a loop once.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxdeep.model.moe import LIVE_BLOCK_SCOPE

WIDTHS = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "token": 0, "opaque": 0}
SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{[^}]*\})?")
HEAD = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
LINE = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
NAME = re.compile(r"%?([\w.-]+)\s*$")
COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"),
    *("collective-broadcast", "ragged-all-to-all"),
)
FREE = {  # neither computes nor moves anything
    *(
        "parameter",
        "constant",
        "get-tuple-element",
        "tuple",
        "bitcast",
        "after-all",
        "partition-id",
    ),
    *(
        "while",
        "conditional",
        "call",
        "opt-barrier",
        "copy-done",
        "async-done",
        "iota",
        "replica-id",
    ),
}

CHANGED = ("dynamic-update-slice", "scatter")  # in place
ALIAS = "output_to_operand_aliasing"  # of a fusion in a fusion: only the layout is another


class Op(NamedTuple):
    """An instruction: `shape` as written, `inner` what stands in its brackets, `rest` after them."""

    name: str
    shape: str
    code: str
    inner: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """The names of what it reads."""
        return [found[1] for part in _split(self.inner) if (found := NAME.search(part))]

    def called(self, key: str) -> str:
        """The computation named by an attribute, or ''."""
        found = re.search(rf"\b{key}=%?([\w.-]+)", self.rest)
        return found[1] if found else ""


class Computation(NamedTuple):
    """A list of instructions with the last one's name."""

    ops: dict[str, Op]
    root: str


class Collective(NamedTuple):
    """Exchange within groups of devices, one of which is `group`: `size` bytes are what a device has after
    it (of a reduce-scatter: before it), `trips` how often it happens; `hidden` behind computation, or the
    device waits."""

    kind: str
    size: float
    group: tuple[int, ...]
    trips: int
    hidden: bool

    @property
    def moved(self) -> float:
        """Bytes that a device sends, all trips together, by the best algorithm on a ring."""
        n = len(self.group)
        part = (n - 1) / n
        share = {"all-reduce": 2 * part, "collective-permute": 1.0}.get(self.kind, part)
        return self.trips * self.size * share


class Cost(NamedTuple):
    """What a device does in one run of the program. `cycles` are the compiler's estimate for what it
    wrote itself, so without custom kernels and collectives; 0 where it gives none."""

    collectives: tuple[Collective, ...]
    memory: float
    cycles: float


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Computations by name, and the entry's name."""
    found: dict[str, Computation] = {}
    entry, name, ops, root = "", "", {}, ""
    for line in text.splitlines():
        if not name:
            head = HEAD.match(line)
            if head:
                name, ops, root = head[1], {}, ""
                entry = name if line.startswith("ENTRY") else entry
        elif line.rstrip() == "}":
            found[name] = Computation(ops, root)
            name = ""
        elif match := LINE.match(line):
            op = _op(match[2], match[3])
            ops[op.name] = op
            root = op.name if match[1] else root
    return found, entry


def _op(name: str, text: str) -> Op:
    end = _close(text, 0) + 1 if text.startswith("(") else text.index(" ")
    code, _, _ = text[end:].strip().partition("(")
    start = text.index("(", end)
    close = _close(text, start)
    return Op(name, text[:end], code, text[start + 1 : close], text[close + 1 :])


def _close(text: str, start: int) -> int:
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if not depth:
            return at
    return len(text)


def _split(text: str) -> Iterator[str]:
    """At the commas outside of brackets."""
    depth, start = 0, 0
    for at, letter in enumerate(text):
        depth += letter in "([{"
        depth -= letter in ")]}"
        if letter == "," and not depth:
            yield text[start:at]
            start = at + 1
    yield text[start:]


def sizes(shape: str, *, memory_only: bool = False) -> list[float]:
    """Bytes of each array of a shape; with `memory_only`, 0 for one that the compiler put elsewhere than
    in the device's main memory."""
    found = []
    for match in SHAPE.finditer(shape):
        kind, dims = match[1], match[2]
        bits = re.search(r"\d+", kind)
        width = WIDTHS.get(kind, int(bits[0]) / 8 if bits else 0)
        count = math.prod(int(n) for n in dims.split(",") if n)
        away = memory_only and re.search(r"S\([1-9]\)", match[0])
        found.append(0.0 if away else count * width)
    return found


def cost(text: str, *, trips: int = 1, live: float = 1.0) -> Cost:
    """The cost of a compiled program; `trips` is for loops that do not say how often they run, `live` the
    share of a mixture's blocks of experts that are computed."""
    return _Walk(*parse(text), trips, live).cost()


class _Walk:
    def __init__(self, found: dict[str, Computation], entry: str, trips: int, live: float) -> None:
        self.found, self.entry, self.unknown, self.live = found, entry, trips, live
        self.collectives: dict[tuple, Collective] = {}
        self.memory = self.cycles = 0.0

    def cost(self) -> Cost:
        self.body(self.entry, 1)
        return Cost(tuple(self.collectives.values()), self.memory, self.cycles)

    def body(self, name: str, trips: float) -> None:
        """A computation whose instructions run one after the other."""
        computation = self.found[name]
        for op in computation.ops.values():
            if op.code == "while":
                inner = op.called("body")
                self.body(inner, trips * self.trips(computation, op))
            elif op.code == "conditional":
                # what training asks for is the short way: others are cut-offs of the sampler
                ways = sorted(_branches(op), key=lambda name: len(self.found[name].ops))
                if LIVE_BLOCK_SCOPE in op.rest:
                    self.body(ways[-1], trips * self.live)
                else:
                    self.body(ways[0], trips)
            elif op.code == "call":
                self.body(op.called("to_apply"), trips)
            else:
                self.one(name, computation, op, trips)

    def one(self, where: str, computation: Computation, op: Op, trips: int) -> None:
        """An instruction that is no control flow."""
        self.exchange(where, op, trips)
        if op.code in FREE or op.code.endswith("-done"):
            return
        inner = op.called("calls") if op.code in ("fusion", "async-start") else ""
        if inner in self.found:
            self.inside(where, inner, trips)
        found = re.search(r'"estimated_cycles":"(\d+)"', op.rest)
        self.cycles += trips * int(found[1]) if found else 0
        self.memory += trips * self.traffic(computation, op, inner)

    def inside(self, where: str, name: str, trips: int) -> None:
        """Collectives that the compiler fused with computation."""
        for op in self.found[name].ops.values():
            self.exchange(where, op, trips, fused=name)
            inner = op.called("calls")
            if inner in self.found:
                self.inside(where, inner, trips)

    def exchange(self, where: str, op: Op, trips: int, fused: str = "") -> None:
        kind = op.code.removesuffix("-start")
        if kind not in COLLECTIVES:
            return
        parts = sizes(op.shape)
        if op.code.endswith("-start") and kind in ("all-gather", "collective-permute"):
            size = parts[1]  # operand, result, and what is needed to wait for it
        else:
            size = sum(parts)
        group = _group(op.rest)
        if kind == "all-reduce" and "all-reduce-scatter" in fused:
            kind = "reduce-scatter"
        elif kind == "reduce-scatter":
            size *= len(group)
        if len(group) < 2:
            return
        # one exchange that was cut into steps between computation has one channel
        channel = re.search(r"channel_id=(\d+)", op.rest)
        key = (where, kind, channel[1]) if channel else (where, fused, op.name)
        held = self.collectives.get(key)
        if held is None or held.trips < trips:
            hidden = op.code.endswith("-start") or "async" in fused
            self.collectives[key] = Collective(kind, size, group, trips, hidden)

    def traffic(self, computation: Computation, op: Op, inner: str) -> float:
        """Bytes that the instruction reads from and writes to the device's memory."""
        out = sum(sizes(op.shape, memory_only=True))
        operands = [computation.ops.get(name) for name in op.operands]
        read = [sum(sizes(x.shape, memory_only=True)) if x else 0.0 for x in operands]
        if op.code in ("dynamic-slice", "slice", "gather"):
            return 2 * out
        if op.code in CHANGED:
            return 2 * sum(read[1:])
        if op.code in (
            "slice-start",
            "dynamic-slice-start",
        ):  # operand, result, and what waits for it
            return sizes(op.shape)[1] + sizes(op.shape, memory_only=True)[1]
        if op.code == "copy-start":
            return sum(sizes(op.shape, memory_only=True))
        if op.code == "custom-call" and ("ragged_paged" in op.name or not read):
            return 0.0  # reads what its table says, which is counted elsewhere; allocates
        if inner in self.found:
            seen, written = self.slices(inner)
            read = [min(r, seen.get(i, r)) for i, r in enumerate(read)]
            out = min(out, written) if written is not None else out
        return out + sum(read)

    @functools.cache  # noqa: B019 - lives as long as one call of `cost`
    def slices(self, name: str) -> tuple[dict[int, float], float | None]:
        """Of a fused computation: bytes that are read of each parameter of which only a slice is used, and
        bytes that are written where the result is a large array changed in place."""
        ops, root = self.found[name]
        users = collections.defaultdict(list)
        for op in ops.values():
            for operand in op.operands:
                users[operand].append(op)
        seen = {}
        for op in ops.values():
            if op.code != "parameter":
                continue
            total = 0.0
            for user, as_ in _through(op, users):
                if user.name == as_:  # nobody: it is the result, laid out anew or of another type
                    total = math.inf if as_ == root else total
                    continue
                inner = user.called("calls") if user.code == "fusion" else ""
                if user.code in ("dynamic-slice", "slice", "gather"):
                    total += sum(sizes(user.shape))
                elif inner in self.found:
                    places = [i for i, name in enumerate(user.operands) if name == as_]
                    total += sum(self.slices(inner)[0].get(i, math.inf) for i in places)
                elif user.code not in CHANGED or user.operands[0] != as_:
                    total = math.inf
            seen[int(op.inner)] = total
        last = ops.get(root)
        while last is not None and last.code in ("bitcast", "copy", "convert") and last.operands:
            last = ops.get(last.operands[0])
        if last is not None and last.code in CHANGED:
            update = ops.get(last.operands[{"scatter": 2}.get(last.code, 1)])
            return seen, 2 * sum(sizes(update.shape)) if update else None
        return seen, None

    def trips(self, computation: Computation, loop: Op) -> int:
        """How often a loop runs, from what the compiler says or from its counter."""
        if known := re.search(r'known_trip_count[^\d]*"n":"(\d+)"', loop.rest):
            return int(known[1])
        condition = self.found[loop.called("condition")]
        body = self.found[loop.called("body")]
        test = condition.ops[condition.root]
        if test.code != "compare" or "direction=LT" not in test.rest:
            return self.unknown
        counter, limit = (condition.ops.get(name) for name in test.operands)
        place = re.search(r"index=(\d+)", counter.rest) if counter else None
        most = _constant(condition, limit)
        if most is None or place is None:
            return self.unknown
        index = int(place[1])
        step = _step(body, index)
        start = computation.ops.get(loop.operands[0])
        first = None
        if start is not None and start.code == "tuple":
            first = _constant(computation, computation.ops.get(start.operands[index]))
        return max(math.ceil((most - (first or 0)) / step), 0)


def _branches(op: Op) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", op.rest)
    names = listed[1].split(",") if listed else []
    names += [op.called(f"{which}_computation") for which in ("true", "false")]
    return [name.strip().removeprefix("%") for name in names if name]


def _through(op: Op, users: dict[str, list[Op]]) -> Iterator[tuple[Op, str]]:
    """Who uses a value and under which name, seen through what a fusion does to what is used of it only; the
    value itself where nobody does."""
    if not users[op.name]:
        yield op, op.name
    for user in users[op.name]:
        if user.code in ("bitcast", "reshape", "copy", "convert") or ALIAS in user.rest:
            yield from _through(user, users)
        else:
            yield user, op.name


def _constant(computation: Computation, op: Op | None) -> int | None:
    while op is not None and op.code in ("copy", "bitcast", "convert"):
        op = computation.ops.get(op.operands[0])
    if op is not None and op.code == "constant" and re.fullmatch(r"-?\d+", op.inner):
        return int(op.inner)
    return None


def _step(body: Computation, index: int) -> int:
    """What a loop adds to its counter."""
    root = body.ops[body.root]
    op = body.ops.get(root.operands[index]) if root.code == "tuple" else None
    while op is not None and op.code in ("copy", "bitcast"):
        op = body.ops.get(op.operands[0])
    if op is not None and op.code == "add":
        found = [_constant(body, body.ops.get(name)) for name in op.operands]
        return next((n for n in found if n), 1)
    return 1


def _group(rest: str) -> tuple[int, ...]:
    """The devices of one of the groups that exchange among themselves, as the program numbers them."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
        return int(pairs[1]), int(pairs[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return tuple(map(int, listed[1].split(",")))
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape, dims = (tuple(map(int, counted[i].split(","))) for i in (1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if counted[3]:
            ids = ids.transpose(tuple(map(int, counted[3].split(","))))
        return tuple(ids.reshape(shape)[0].tolist())
    if meshed := re.search(
        r"replica_groups=mesh\[([^\]]*)\]\s*(?:device_ids=\S+\s*)?\{([^}]*)\}", rest
    ):
        sizes_ = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", meshed[1])}
        used = re.findall(r"'(\w+)'", meshed[2])
        ids = np.arange(math.prod(sizes_.values())).reshape(tuple(sizes_.values()))
        at = tuple(slice(None) if name in used else 0 for name in sizes_)
        return tuple(ids[at].reshape(-1).tolist())
    return ()


def moved(collectives: Sequence[Collective], seconds: Callable[[Collective], float]) -> list[dict]:
    """A line for each kind of exchange: how many there are in the program, how often they happen, bytes
    that a device sends, and seconds."""
    lines: dict[tuple[str, int], dict] = {}
    for one in collectives:
        start = dict(
            kind=one.kind, devices=len(one.group), count=0, trips=0, bytes=0.0, seconds=0.0
        )
        line = lines.setdefault((one.kind, len(one.group)), start)
        line["count"] += 1
        line["trips"] += one.trips
        line["bytes"] += one.moved
        line["seconds"] += seconds(one)
    return sorted(lines.values(), key=lambda line: -line["bytes"])
