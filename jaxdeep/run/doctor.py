"""Say what this machine offers and what is missing: packages, devices, extras, caches, disk, cores.

Words name what must be there: an extra (`jaxdeep doctor gpu gs`); `gpu` and `tpu` also ask that jax
sees such devices. The exit status is 1 where something that is needed or was named is missing, else
0. Nothing is installed, changed or asked of the network."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxdeep import __version__, compiled
from jaxdeep import config as configs
from jaxdeep.errors import ConfigError
from jaxdeep.setup import machine, packages

ARGUMENTS = "[EXTRA ...]"
DEFAULT_CONFIG = None
EXAMPLE = "python -m jaxdeep doctor gpu"
FLAGS = {
    "json": "print the findings as JSON",
    "workdir": "the folder that runs will be in, whose disk is looked at (default runs)",
}
PYTHONS = ((3, 11), (3, 13))  # the first and the last that are supported
SHOWN = ("jax", "jaxlib", "flax", "optax", "transformers", "numpy")
PATIENCE = 60.0  # seconds for jax to find its devices, which may hang where they are in use
COUNTING = 1.0  # seconds for the size of a cache
LOW = 2**30  # bytes of disk, below which a run may end half way
DEVICE_OF = {"gpu": ("gpu", "cuda", "rocm"), "tpu": ("tpu",)}  # platforms, by extra
PROBE = """
import json, jax
def memory(device):
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except Exception:
        return None
print(json.dumps([{"platform": d.platform, "kind": d.device_kind, "memory": memory(d)}
                  for d in jax.local_devices()]))
"""


class Finding(NamedTuple):
    """A line of the report. `note` is worth a look, `missing` makes the exit status 1; `fix` is
    what to do."""

    level: Literal["ok", "note", "missing"]
    text: str
    fix: str = ""


class Section(NamedTuple):
    """A part of the report: lines for people, and the facts behind them for programs."""

    title: str
    findings: list[Finding]
    facts: Mapping[str, Any]


def main(*asked: str, json: str = "", workdir: str = "runs") -> int:
    """Print the report."""
    sections = examine(asked, Path(workdir))
    missing = any(f.level == "missing" for section in sections for f in section.findings)
    print(as_json(sections, not missing) if json else as_text(sections))
    return int(missing)


def examine(asked: Sequence[str], workdir: Path) -> list[Section]:
    """All sections of the report. ConfigError for a word that is no extra."""
    needs = packages.needs()
    known = set(needs.extras if needs else DEVICE_OF) | set(DEVICE_OF)
    for word in asked:
        if word not in known:
            raise ConfigError(
                f"doctor knows no {word!r}.{configs.suggest(word, known)} "
                f"The extras are {', '.join(sorted(known))}"
            )
    return [
        python(),
        of_packages(needs),
        devices(asked, needs, machine.accelerators()),
        of_extras(asked, needs),
        caches(),
        disks(workdir),
        cores_and_memory(),
    ]


def python() -> Section:
    """The interpreter."""
    version, (first, last) = sys.version_info[:2], PYTHONS
    text = f"{platform.python_version()} at {sys.executable}; jaxdeep {__version__}"
    found = Finding("ok", text)
    if not first <= version <= last:
        span = " to ".join(".".join(map(str, end)) for end in PYTHONS)
        found = Finding("missing", text, f"jaxdeep needs Python {span}")
    return Section("python", [found], {"version": platform.python_version(), "at": sys.executable})


def of_packages(needs: packages.Needs | None) -> Section:
    """The packages that jaxdeep always needs, against their ranges."""
    shown = {name: packages.version(name) for name in SHOWN}
    text = ", ".join(f"{name} {version or 'absent'}" for name, version in shown.items())
    if needs is None:
        note = Finding(
            "note",
            f"{text}; jaxdeep is not installed, so their ranges are not known",
            packages.install_line(),
        )
        return Section("packages", [note], {"installed": False, "versions": shown, "unmet": []})
    unmet = [line for requirement in needs.always for line in packages.unmet(requirement)]
    findings = [Finding("missing", line, packages.install_line()) for line in unmet]
    if not unmet:
        findings = [Finding("ok", f"{text}; all {len(needs.always)} in their ranges")]
    return Section("packages", findings, {"installed": True, "versions": shown, "unmet": unmet})


def probe() -> tuple[list[dict[str, Any]], str]:
    """The devices that jax sees, found by a process of its own, which may fail or hang; and what it
    said where it did."""
    command = [sys.executable, "-c", PROBE]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return [], f"no answer in {PATIENCE:.0f} s: another process may hold the devices"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        return [], lines[-1]
    return json.loads(done.stdout.splitlines()[-1]), ""


def devices(
    asked: Sequence[str], needs: packages.Needs | None, present: machine.Accelerators
) -> Section:
    """The devices of jax, beside what is plugged in."""
    seen, trouble = probe()
    findings = []
    if trouble:
        findings.append(Finding("missing", f"jax finds no devices: {trouble}"))
    elif seen:
        kinds = [f"{d['kind']} ({d['platform']}){_size(d['memory'], ' with ')}" for d in seen]
        counts = {kind: kinds.count(kind) for kind in kinds}
        text = ", ".join(f"{count} x {kind}" for kind, count in counts.items())
        findings.append(Finding("ok", f"jax uses {text}"))
    platforms = {device["platform"] for device in seen}
    for extra, count, name in (("gpu", present.nvidia, "NVIDIA GPU"), ("tpu", present.tpu, "TPU")):
        if platforms & set(DEVICE_OF[extra]):
            continue
        level = "missing" if extra in asked else "note"
        if count:
            text = f"this machine has {count} x {name}, and jax does not see it"
            findings.append(Finding(level, text, hint(extra, needs, present)))
        elif extra in asked:
            findings.append(Finding(level, f"no {name} on this machine, nor seen by jax"))
    facts = {"jax": seen, "trouble": trouble, "present": present._asdict()}
    return Section("devices", findings, facts)


def hint(extra: str, needs: packages.Needs | None, present: machine.Accelerators) -> str:
    """Why jax may not see an accelerator that is plugged in, and what to do."""
    chosen = os.environ.get("JAX_PLATFORMS", "")
    if chosen and not {*chosen.split(",")} & {*DEVICE_OF[extra]}:
        return f"JAX_PLATFORMS={chosen} hides it: unset that variable"
    lacking = needs and [x for r in needs.extras.get(extra, ()) for x in packages.unmet(r)]
    if lacking or needs is None:
        return packages.install_line(extra)
    if extra == "gpu" and not present.driver:
        return "its driver is not here: install it, or give the container its GPUs"
    if extra == "gpu":
        return "see what `python -c 'import jax; jax.devices(\"cuda\")'` says"
    return (
        "another process may hold it; see what `python -c 'import jax; jax.devices(\"tpu\")'` says"
    )


def of_extras(asked: Sequence[str], needs: packages.Needs | None) -> Section:
    """Which extras are installed."""
    state = {
        extra: [line for requirement in wanted for line in packages.unmet(requirement)]
        for extra, wanted in (needs.extras if needs else {}).items()
    }
    findings = []
    if present := sorted(extra for extra, unmet in state.items() if not unmet):
        findings.append(Finding("ok", f"installed: {', '.join(present)}"))
    for extra, unmet in sorted(state.items()):
        if unmet:
            more = f" and {len(unmet) - 1} more" if len(unmet) > 1 else ""
            level = "missing" if extra in asked else "ok"
            findings.append(
                Finding(level, f"{extra}: {unmet[0]}{more}", packages.install_line(extra))
            )
    if needs is None:
        level = "missing" if asked else "note"
        text = "not known, as jaxdeep is not installed"
        findings = [Finding(level, text, packages.install_line(",".join(asked)))]
    return Section("extras", findings, state)


def caches() -> Section:
    """Folders that grow from run to run, and what they hold."""
    off = os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "").lower() in ("0", "false")
    given = os.environ.get(compiled.FOLDER)
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    tables = os.environ.get("TFDS_DATA_DIR")
    places = {
        "compiled programs": Path(given) if given else compiled.folder(),
        "models of the Hugging Face hub": Path(os.environ.get("HF_HUB_CACHE") or hub / "hub"),
        "datasets": Path(os.environ.get("HF_DATASETS_CACHE") or hub / "datasets"),
        "TensorFlow datasets": Path(tables) if tables else Path.home() / "tensorflow_datasets",
    }
    findings, facts = [], {}
    for name, place in places.items():
        here = place.is_dir()
        total, whole = machine.size(place, COUNTING) if here else (0, True)
        facts[name] = {"at": str(place), "bytes": total if whole else None}
        text = f"{name}: {place}, {_size(total, '' if whole else 'more than ')}"
        if not here:
            text = f"{name}: {place}, not there yet"
        if name == "compiled programs" and off:
            text, facts[name] = f"{name}: not kept (JAX_ENABLE_COMPILATION_CACHE)", {"off": True}
        elif name == "compiled programs" and given is None:
            text += f", at most {_size(compiled.LIMIT)}"
        ok = "://" in str(place) or machine.writable(place)
        findings.append(
            Finding("ok", text) if ok else Finding("note", text, f"{place} cannot be written")
        )
    return Section("caches", findings, facts)


def disks(workdir: Path) -> Section:
    """Room for runs and caches."""
    findings, facts = [], {}
    for name, place in (("runs", workdir), ("caches", compiled.cache_folder())):
        free = machine.free(place)
        facts[name] = {"at": str(place), "free": free, "writable": machine.writable(place)}
        text = f"{_size(free)} free for {name} in {place}"
        if not facts[name]["writable"]:
            fix = f"{machine.existing(place)} cannot be written: choose another folder"
            findings.append(Finding("note", text, fix))
        else:
            low = free < LOW
            findings.append(Finding("note" if low else "ok", text, "free some space" * low))
    return Section("disk", findings, facts)


def cores_and_memory() -> Section:
    """Cores and memory, and their limits."""
    cores, memory = machine.cores(), machine.memory()
    limit = "" if cores.limit is None else f", limited to {cores.limit:g}"
    text = f"{cores.machine} cores, of which this process may use {cores.allowed}{limit}"
    size = _size(memory.machine) or "memory of unknown size"
    room = _size(memory.available, ", free: ") + _size(memory.limit, ", limited to ")
    findings = [Finding("ok", text), Finding("ok", f"{size} of memory{room}" if room else size)]
    facts = {"cores": cores._asdict(), "memory": memory._asdict()}
    return Section("cores and memory", findings, facts)


def _size(count: int | None, before: str = "") -> str:
    """Bytes for people; empty for None."""
    if count is None:
        return ""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{before}{count / size:.1f} {unit}"
    return f"{before}{count / 2**10:.0f} KiB"


def as_text(sections: Sequence[Section]) -> str:
    """The report for people: what is missing stands with a `!`, what is worth a look with a `?`."""
    signs = {"ok": " ", "note": "?", "missing": "!"}
    lines = []
    for section in sections:
        lines.append(section.title)
        for level, text, fix in section.findings:
            lines.append(f"{signs[level]} {text}")
            lines += [f"    {fix}"] if fix else []
    missing = sum(f.level == "missing" for section in sections for f in section.findings)
    end = "nothing that is needed is missing" if not missing else f"missing: {missing}, marked !"
    return "\n".join([*lines, "", end])


def as_json(sections: Sequence[Section], ok: bool) -> str:
    """The report for programs."""
    every = {
        section.title: {
            "findings": [finding._asdict() for finding in section.findings],
            "facts": dict(section.facts),
        }
        for section in sections
    }
    return json.dumps({"ok": ok, "sections": every}, indent=2)
