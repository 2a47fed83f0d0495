"""The cost of a compiled program on one device, read from the text of its optimized HLO:
collectives, bytes of memory traffic and compute cycles, each times the trip counts of the loops
around it.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs.
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

WIDTHS = {"pred": 1, "token": 0, "opaque": 0}  # bytes of types that do not name their bits
SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{[^}]*\})?")
HEAD = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
LINE = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
NAME = re.compile(r"%?([\w.-]+)\s*$")
COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"),
    *("collective-broadcast", "ragged-all-to-all"),
)
FREE = {  # opcodes that neither compute nor move anything themselves
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"),
    *("partition-id", "replica-id", "iota", "opt-barrier", "copy-done", "async-done"),
    *("while", "conditional", "call"),
}
SLICES = ("dynamic-slice", "slice", "gather")  # read only the part of the operand they return
IN_PLACE = ("dynamic-update-slice", "scatter")  # write only the part of operand 0 they change
ALIAS = "output_to_operand_aliasing"  # on a fusion inside a fusion that only changes the layout


class Op(NamedTuple):
    """An instruction: the text of its shape, its opcode, the text between its parentheses and the
    attributes after them."""

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """The names of the instructions it reads."""
        return [match[1] for text in _split(self.arguments) if (match := NAME.search(text))]

    def called(self, key: str) -> str:
        """The computation named by an attribute, or ''."""
        match = re.search(rf"\b{key}=%?([\w.-]+)", self.attributes)
        return match[1] if match else ""


class Computation(NamedTuple):
    """Instructions by name, and the name of the one whose value it returns."""

    ops: dict[str, Op]
    root: str


class Collective(NamedTuple):
    """A collective operation within groups of devices."""

    kind: str
    size: float  # bytes on one device: of the result, or for a reduce-scatter of the input
    group: tuple[int, ...]  # the devices of one of its groups
    trips: int  # times it runs
    hidden: bool  # whether it runs behind computation; else the device waits for it

    @property
    def moved(self) -> float:
        """Bytes that a device sends in all trips, by the best algorithm on a ring."""
        n = len(self.group)
        others = (n - 1) / n
        # an all-reduce is a reduce-scatter and an all-gather
        share = {"all-reduce": 2 * others, "collective-permute": 1.0}.get(self.kind, others)
        return self.trips * self.size * share


class Cost(NamedTuple):
    """What a device does in one run of the program."""

    collectives: tuple[Collective, ...]
    memory: float  # bytes read and written
    cycles: (
        float  # the compiler's estimate, without custom kernels and collectives; 0 if it has none
    )


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Computations by name, and the entry's name."""
    computations: dict[str, Computation] = {}
    entry, name, ops, root = "", "", {}, ""
    for line in text.splitlines():
        if not name:
            head = HEAD.match(line)
            if head:
                name, ops, root = head[1], {}, ""
                entry = name if line.startswith("ENTRY") else entry
        elif line.rstrip() == "}":
            computations[name] = Computation(ops, root)
            name = ""
        elif match := LINE.match(line):
            op = _op(match[2], match[3])
            ops[op.name] = op
            root = op.name if match[1] else root
    return computations, entry


def _op(name: str, text: str) -> Op:
    # a tuple's shape is in parentheses and has spaces, an array's has none
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opcode, _, _ = text[end:].strip().partition("(")
    start = text.index("(", end)
    close = _closing(text, start)
    return Op(name, text[:end], opcode, text[start + 1 : close], text[close + 1 :])


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    return len(text)


def _split(text: str) -> Iterator[str]:
    """The text cut at commas that are outside of all brackets."""
    depth, start = 0, 0
    for i, letter in enumerate(text):
        depth += letter in "([{"
        depth -= letter in ")]}"
        if letter == "," and not depth:
            yield text[start:i]
            start = i + 1
    yield text[start:]


def array_bytes(shape: str, *, memory_only: bool = False) -> list[float]:
    """Bytes of each array of a shape; with `memory_only`, 0 for arrays in on-chip memory."""
    sizes = []
    for match in SHAPE.finditer(shape):
        kind, dims = match[1], match[2]
        bits = re.search(r"\d+", kind)
        width = WIDTHS.get(kind, int(bits[0]) / 8 if bits else 0)
        count = math.prod(int(n) for n in dims.split(",") if n)
        # S(n) in a layout is memory space n; the device's main memory is 0, and not written
        on_chip = memory_only and re.search(r"S\([1-9]\)", match[0])
        sizes.append(0.0 if on_chip else count * width)
    return sizes


def cost(text: str, *, trips: int = 1, live_blocks: float = 1.0) -> Cost:
    """The cost of a compiled program. `trips` is assumed of loops that do not say how often they
    run; `live_blocks` is the share of a mixture's blocks of tokens that are computed."""
    return _CostWalk(*parse(text), trips, live_blocks).cost()


class _CostWalk:
    """Adds up the cost of each instruction times the trips of the loops it is in."""

    def __init__(
        self,
        computations: dict[str, Computation],
        entry: str,
        default_trips: int,
        live_blocks: float,
    ) -> None:
        self.computations, self.entry = computations, entry
        self.default_trips, self.live_blocks = default_trips, live_blocks
        self.collectives: dict[tuple, Collective] = {}
        self.memory = self.cycles = 0.0

    def cost(self) -> Cost:
        self.add_body(self.entry, 1)
        return Cost(tuple(self.collectives.values()), self.memory, self.cycles)

    def add_body(self, name: str, trips: float) -> None:
        """Add a computation whose instructions run one after another."""
        computation = self.computations[name]
        for op in computation.ops.values():
            if op.opcode == "while":
                inner = op.called("body")
                self.add_body(inner, trips * self.trips(computation, op))
            elif op.opcode == "conditional":
                branches = sorted(_branches(op), key=lambda name: len(self.computations[name].ops))
                if LIVE_BLOCK_SCOPE in op.attributes:
                    self.add_body(branches[-1], trips * self.live_blocks)
                else:
                    # the sampler's cut-offs (top-k, top-p), which training rollouts do not use
                    self.add_body(branches[0], trips)
            elif op.opcode == "call":
                self.add_body(op.called("to_apply"), trips)
            else:
                self.add_op(name, computation, op, trips)

    def add_op(self, name: str, computation: Computation, op: Op, trips: float) -> None:
        """Add an instruction that is not control flow, of the computation `name`."""
        self.add_collective(name, op, trips)
        if op.opcode in FREE or op.opcode.endswith("-done"):
            return
        inner = op.called("calls") if op.opcode in ("fusion", "async-start") else ""
        if inner in self.computations:
            self.add_fused_collectives(name, inner, trips)
        cycles = re.search(r'"estimated_cycles":"(\d+)"', op.attributes)
        self.cycles += trips * int(cycles[1]) if cycles else 0
        self.memory += trips * self.traffic(computation, op, inner)

    def add_fused_collectives(self, name: str, fused: str, trips: float) -> None:
        """Add the collectives that the compiler fused with computation."""
        for op in self.computations[fused].ops.values():
            self.add_collective(name, op, trips, fused=fused)
            inner = op.called("calls")
            if inner in self.computations:
                self.add_fused_collectives(name, inner, trips)

    def add_collective(self, name: str, op: Op, trips: float, fused: str = "") -> None:
        """Add the instruction if it is a collective, of the computation `name` or fused there."""
        kind = op.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return
        arrays = array_bytes(op.shape)
        if op.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
            size = arrays[1]  # the shape is (operand, result, context to wait with)
        else:
            size = sum(arrays)
        group = _group(op.attributes)
        if kind == "all-reduce" and "all-reduce-scatter" in fused:
            kind = "reduce-scatter"
        elif kind == "reduce-scatter":
            size *= len(group)
        if len(group) < 2:
            return
        # the compiler cuts one collective into steps between computation, which share a channel
        channel = re.search(r"channel_id=(\d+)", op.attributes)
        key = (name, kind, channel[1]) if channel else (name, fused, op.name)
        present = self.collectives.get(key)
        if present is None or present.trips < trips:
            hidden = op.opcode.endswith("-start") or "async" in fused
            self.collectives[key] = Collective(kind, size, group, trips, hidden)

    def traffic(self, computation: Computation, op: Op, inner: str) -> float:
        """Bytes that the instruction reads from and writes to the device's main memory; `inner` is
        the computation that it fuses, or ''."""
        written = sum(array_bytes(op.shape, memory_only=True))
        operands = [computation.ops.get(name) for name in op.operands]
        read = [sum(array_bytes(x.shape, memory_only=True)) if x else 0.0 for x in operands]
        if op.opcode in SLICES:
            return 2 * written
        if op.opcode in IN_PLACE:
            return 2 * sum(read[1:])
        if op.opcode in ("slice-start", "dynamic-slice-start"):
            # the shape is (operand, result, context to wait with)
            return array_bytes(op.shape)[1] + array_bytes(op.shape, memory_only=True)[1]
        if op.opcode == "copy-start":
            return sum(array_bytes(op.shape, memory_only=True))
        if op.opcode == "custom-call" and ("ragged_paged" in op.name or not read):
            # paged attention reads the pages of its table, which `count.flops` counts; a call
            # without operands only allocates
            return 0.0
        if inner in self.computations:
            sliced, updated = self.fused_traffic(inner)
            read = [min(size, sliced.get(i, size)) for i, size in enumerate(read)]
            written = min(written, updated) if updated is not None else written
        return written + sum(read)

    @functools.cache  # noqa: B019 - lives as long as one call of `cost`
    def fused_traffic(self, name: str) -> tuple[dict[int, float], float | None]:
        """Of a fused computation: the bytes it reads of each parameter, by the parameter's number,
        where infinity stands for the whole array; and the bytes read and written of a result that
        is an array updated in place, else None.

        A layer's weights are a slice of one stacked array, and a page is written in place: without
        this each layer would seem to read and write the arrays of all layers.
        """
        ops, root = self.computations[name]
        users = collections.defaultdict(list)
        for op in ops.values():
            for operand in op.operands:
                users[operand].append(op)
        read = {
            int(op.arguments): sum(
                self._read_by(user, value, root) for user, value in _uses(op, users)
            )
            for op in ops.values()
            if op.opcode == "parameter"
        }
        last = ops.get(root)
        while last is not None and last.opcode in ("bitcast", "copy", "convert") and last.operands:
            last = ops.get(last.operands[0])
        if last is not None and last.opcode in IN_PLACE:
            update = ops.get(last.operands[{"scatter": 2}.get(last.opcode, 1)])
            return read, 2 * sum(array_bytes(update.shape)) if update else None
        return read, None

    def _read_by(self, user: Op, value: str, root: str) -> float:
        """Bytes that an instruction reads of its operand `value`, as `_uses` gives both; `root`
        names the result of their computation."""
        if user.name == value:  # without a user: read if it is the result, else not at all
            return math.inf if value == root else 0.0
        inner = user.called("calls") if user.opcode == "fusion" else ""
        if user.opcode in SLICES:
            return sum(array_bytes(user.shape))
        if inner in self.computations:
            places = [i for i, name in enumerate(user.operands) if name == value]
            return sum(self.fused_traffic(inner)[0].get(i, math.inf) for i in places)
        updated = user.opcode in IN_PLACE and user.operands[0] == value
        return 0.0 if updated else math.inf

    def trips(self, computation: Computation, loop: Op) -> int:
        """How often a loop runs: from the compiler's annotation, else from its counter."""
        if known := re.search(r'known_trip_count[^\d]*"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition = self.computations[loop.called("condition")]
        body = self.computations[loop.called("body")]
        test = condition.ops[condition.root]
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return self.default_trips
        counter, limit = (condition.ops.get(name) for name in test.operands)
        place = re.search(r"index=(\d+)", counter.attributes) if counter else None
        end = _constant(condition, limit)
        if end is None or place is None:
            return self.default_trips
        index = int(place[1])
        step = _step(body, index)
        initial = computation.ops.get(loop.operands[0])
        start = None
        if initial is not None and initial.opcode == "tuple":
            start = _constant(computation, computation.ops.get(initial.operands[index]))
        return max(math.ceil((end - (start or 0)) / step), 0)


def _branches(op: Op) -> list[str]:
    """The computations that a conditional chooses from."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", op.attributes)
    names = listed[1].split(",") if listed else []
    names += [op.called(f"{which}_computation") for which in ("true", "false")]
    return [name.strip().removeprefix("%") for name in names if name]


def _uses(op: Op, users: dict[str, list[Op]]) -> Iterator[tuple[Op, str]]:
    """The instructions that use a value, each with the operand's name there; the value itself if it
    has no user. Changes of layout and type are looked through: fused with a slice, they change the
    slice."""
    if not users[op.name]:
        yield op, op.name
    for user in users[op.name]:
        if user.opcode in ("bitcast", "reshape", "copy", "convert") or ALIAS in user.attributes:
            yield from _uses(user, users)
        else:
            yield user, op.name


def _constant(computation: Computation, op: Op | None) -> int | None:
    """The integer that an instruction is, or None."""
    while op is not None and op.opcode in ("copy", "bitcast", "convert"):
        op = computation.ops.get(op.operands[0])
    if op is not None and op.opcode == "constant" and re.fullmatch(r"-?\d+", op.arguments):
        return int(op.arguments)
    return None


def _step(body: Computation, index: int) -> int:
    """What the body of a loop adds to its counter, which is element `index` of the loop's state."""
    root = body.ops[body.root]
    op = body.ops.get(root.operands[index]) if root.opcode == "tuple" else None
    while op is not None and op.opcode in ("copy", "bitcast"):
        op = body.ops.get(op.operands[0])
    if op is not None and op.opcode == "add":
        constants = [_constant(body, body.ops.get(name)) for name in op.operands]
        return next((n for n in constants if n), 1)
    return 1


def _group(attributes: str) -> tuple[int, ...]:
    """The devices of one group of a collective, by their number in the program. HLO writes groups
    in four ways: pairs, lists, an iota that is reshaped, axes of a mesh."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return int(pairs[1]), int(pairs[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(map(int, listed[1].split(",")))
    iota = r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if match := re.search(iota, attributes):
        shape, dims = (tuple(map(int, match[i].split(","))) for i in (1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if match[3]:
            ids = ids.transpose(tuple(map(int, match[3].split(","))))
        return tuple(ids.reshape(shape)[0].tolist())
    mesh = r"replica_groups=mesh\[([^\]]*)\]\s*(?:device_ids=\S+\s*)?\{([^}]*)\}"
    if match := re.search(mesh, attributes):
        axes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", match[1])}
        used = re.findall(r"'(\w+)'", match[2])
        ids = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
        index = tuple(slice(None) if name in used else 0 for name in axes)
        return tuple(ids[index].reshape(-1).tolist())
    return ()


def by_kind(
    collectives: Sequence[Collective], seconds: Callable[[Collective], float]
) -> list[dict]:
    """A table row for each kind of collective and size of group, most bytes first: how many the
    program has, how often they run, bytes that a device sends, and seconds."""
    rows: dict[tuple[str, int], dict] = {}
    for one in collectives:
        empty = dict(
            kind=one.kind, devices=len(one.group), count=0, trips=0, bytes=0.0, seconds=0.0
        )
        row = rows.setdefault((one.kind, len(one.group)), empty)
        row["count"] += 1
        row["trips"] += one.trips
        row["bytes"] += one.moved
        row["seconds"] += seconds(one)
    return sorted(rows.values(), key=lambda row: -row["bytes"])
