"""A plan as text for the terminal, as JSON, and as an HTML page without scripts or requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from jaxdeep.plan import chips
from jaxdeep.plan.estimate import KERNEL_PEAK_SHARE, Plan

BASIS = (
    "At least: the roofline of the chip's published peak, memory and links. Estimated: the "
    f"compiler's own cycles, attention kernels at {100 * KERNEL_PEAK_SHARE:.0f} % of the peak, "
    "and collectives that the chip waits for. Neither has been compared with a run of this "
    "package on a TPU."
)


def facts(plan: Plan) -> dict[str, Any]:
    """The plan as JSON; bytes, seconds and FLOPs are of one device unless their name says
    otherwise."""
    fields = {k: v for k, v in dataclasses.asdict(plan).items() if k not in ("work", "programs")}
    batch = dict(rows=plan.work.rows, length=plan.work.length, microbatches=plan.work.microbatches)
    costs = {
        name: dataclasses.asdict(cost) | {"binding": cost.binding}
        for name, cost in plan.programs.items()
    }
    return {
        "name": plan.work.name,
        "fits": plan.fits,
        "used": plan.used,
        "advice": advice(plan),
        "batch": batch | {"rollouts": plan.work.rollouts},
        **fields,
        "programs": costs,
    }


def advice(plan: Plan) -> list[str]:
    """Changes that would make the plan fit, a sentence each; empty if it fits."""
    if plan.fits:
        return []
    memory, axes, out = plan.memory, plan.mesh, []
    large = max(plan.programs.values(), key=lambda p: p.temporary)
    rows = plan.work.rows // (axes["replica"] * axes["data"])  # of a microbatch, on one device
    temporary = f"{gb(large.temporary)} GB are temporary, in {large.name}"
    if large.name in ("gradients", "before") and large.temporary > plan.limit / 4:
        if plan.work.spec.model.remat != "full":
            out.append(f"{temporary}: model.remat=full keeps less for the backward pass")
        elif rows > 1:
            out.append(f"{temporary}: batch.rows={plan.work.rows // 2} would about halve them")
        else:
            out.append(
                f"{temporary}: mesh.context={2 * axes['context']} or "
                f"mesh.model={2 * axes['model']} would about halve them, with batch.rows to match"
            )
    asked = memory.get("keys and values", 0.0)
    possible = plan.engine.get("gb_possible", 0.0)
    if asked and plan.engine["rows_possible"] and asked > plan.engine["bytes_left"]:
        out.append(
            f"keys and values take {gb(asked)} GB: rollout.cache_gb={int(possible)} holds "
            f"{plan.engine['rows_possible']} rows of full length at once, the others wait"
        )
    base = memory["base"] + memory.get("base once more, for the engine", 0.0)
    if base > plan.limit / 3 and not plan.work.spec.model.quant:
        out.append(f"{gb(base)} GB are the base: model.quant=int8 takes about half")
    bigger = plan.devices * max(2, -(-int(plan.used) // int(plan.limit)))
    out.append(f"more chips ({bigger} of them), or chips with more memory: compare with --sweep")
    return out


def gb(size: float) -> str:
    """Bytes in GB of 1e9 bytes."""
    return f"{size / 1e9:,.2f}"


def verdict(plan: Plan) -> str:
    """Whether it fits, in a sentence."""
    shape = " ".join(f"{name}={n}" for name, n in plan.mesh.items() if n > 1) or "one device"
    run = f"{plan.work.name} on {plan.topology} ({plan.devices} devices, {shape})"
    large = [p for p in plan.programs.values() if not p.fits]
    if large:
        worst = max(large, key=lambda p: p.temporary)
        over = plan.used - plan.limit
        return (
            f"{run} does not fit: {gb(over)} GB more than the {gb(plan.limit)} GB of a chip; "
            f"{worst.name} alone, with {gb(worst.temporary)} GB beside its arguments, is too large"
        )
    if not plan.fits:
        over = plan.used - plan.limit
        return f"{run} does not fit: {gb(over)} GB more than the {gb(plan.limit)} GB"
    return f"{run} fits: {gb(plan.used)} of {gb(plan.limit)} GB a chip"


def tables(plan: Plan) -> dict[str, tuple[list[str], list[list[str]]]]:
    """The header and rows of each table, by title."""
    memory = [[name, gb(size)] for name, size in plan.memory.items() if size]
    memory.append(["together", gb(plan.used)])
    memory.append(["of", gb(plan.limit)])
    programs = [
        [
            name,
            f"{p.flops / 1e12:,.2f}",
            *(f"{p.seconds.get(kind, 0):.3g}" for kind in ("compute", "memory", "interconnect")),
            p.binding,
            f"{p.estimated:.3g}",
            f"{p.compile_seconds:.0f}",
        ]
        for name, p in plan.programs.items()
        if p.fits
    ]
    collectives = [
        [
            name,
            c["kind"],
            f"{c['devices']}",
            f"{c['trips']:,}",
            gb(c["bytes"]),
            f"{c['seconds']:.3g}",
        ]
        for name, p in plan.programs.items()
        for c in p.collectives
    ]
    return {
        "memory of a chip, GB": (["", "GB"], memory),
        "programs, a chip": (
            [
                "",
                "TFLOP",
                "compute s",
                "memory s",
                "links s",
                "bound by",
                "estimated s",
                "compiled in s",
            ],
            programs,
        ),
        "exchange between chips": (["", "kind", "devices", "times", "GB sent", "s"], collectives),
    }


def sentences(plan: Plan) -> list[str]:
    """Speed, room for keys and values, and advice."""
    out = []
    if step := plan.step:
        out.append(
            f"a step of {step['tokens']:,} tokens: {step['bound_seconds']:.3g} s at least, "
            f"{step['estimated_seconds']:.3g} s estimated; tokens a second and chip: "
            f"{step['most_tokens_per_second_and_device']:,.0f} at most, "
            f"{step['tokens_per_second_and_device']:,.0f} estimated; MFU "
            f"{100 * step['most_mfu']:.1f} % at most, {100 * step['mfu']:.1f} % estimated"
        )
    if engine := plan.engine:
        out.append(
            f"{engine['engines']} engine(s) of {engine['devices']} chips: "
            f"{gb(engine['bytes_left'])} GB a chip are left for keys and values, "
            f"{engine['pages_left']:,} pages over all, {engine['rows_possible']:,} rows of "
            f"{plan.work.engine.length:,} tokens in flight; asked for: {engine['rows_asked']:,}"
        )
        if "tokens_per_second_and_device" in engine:
            out.append(
                f"sampled tokens a second and chip, all rows half full: "
                f"{engine['most_tokens_per_second_and_device']:,.0f} at most, "
                f"{engine['tokens_per_second_and_device']:,.0f} estimated"
            )
    return out + [f"to make it fit: {line}" for line in advice(plan)]


def text(plan: Plan) -> str:
    """The plan for the terminal."""
    out = [verdict(plan), "", *sentences(plan)]
    for title, (head, rows) in tables(plan).items():
        if rows:
            out += ["", title, *grid(head, rows)]
    return "\n".join(out)


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns, columns of numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    right = [all(_number(cell) for cell in column) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            f"{cell:>{width}}" if to_right else f"{cell:<{width}}"
            for cell, width, to_right in zip(cells, widths, right, strict=True)
        )
        return "  " + "  ".join(padded).rstrip()

    return [line(head), *map(line, rows)]


def _number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] == "-"


def comparison(
    plans: Sequence[Plan], refused: Mapping[str, str]
) -> tuple[list[str], list[list[str]]]:
    """The header and rows of a sweep's table, the cheapest plan that fits first; `refused` are
    meshes that could not be planned, with the reason."""
    head = [
        "topology",
        "mesh",
        "GB a chip",
        "fits",
        "s a step",
        "tokens/s/chip",
        "rows",
        "$ a M tokens",
    ]
    rows = []
    for plan in sorted(plans, key=dollars_per_million_tokens):
        shape = " ".join(f"{name}={n}" for name, n in plan.mesh.items() if n > 1) or "1"
        step = plan.step
        rows.append(
            [
                plan.topology,
                shape,
                f"{gb(plan.used)} of {gb(plan.limit)}",
                "yes" if plan.fits else "no",
                f"{step['estimated_seconds']:.3g}" if step else "-",
                f"{step['tokens_per_second_and_device']:,.0f}" if step else "-",
                f"{plan.engine['rows_possible']:,}" if plan.engine else "-",
                f"{dollars_per_million_tokens(plan):.3f}"
                if plan.fits and step and chips.price(plan.topology)
                else "-",
            ]
        )
    rows += [
        [*name.split(" ", 1), "-", "no: " + why.partition(":")[0], "-", "-", "-", "-"]
        for name, why in refused.items()
    ]
    return head, rows


def dollars_per_million_tokens(plan: Plan) -> float:
    """Cost of training on a million tokens at list price; infinite if the plan does not fit.
    For chips without a known price a large number, so that these plans are listed last."""
    if not plan.fits or not plan.step:
        return float("inf")
    hours = 1e6 / plan.step["tokens_per_second_and_device"] / 3600
    return hours * (chips.price(plan.topology) or 1e6)


def page(plans: Sequence[Plan]) -> str:
    """All plans as one HTML page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    contexts = [
        dict(
            verdict=verdict(plan),
            fits=plan.fits,
            lines=sentences(plan),
            tables={title: table for title, table in tables(plan).items() if table[1]},
            bars=[
                (name, size, 100 * size / max(plan.used, plan.limit))
                for name, size in plan.memory.items()
                if size
            ],
        )
        for plan in plans
    ]
    return environment.get_template("page.html.jinja").render(plans=contexts, basis=BASIS, gb=gb)
