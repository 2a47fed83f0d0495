"""Who may import whom: the picture in the design, kept true."""

import ast
import pathlib
import subprocess
import sys

import pytest

import jaxdeep

PACKAGE = pathlib.Path(jaxdeep.__file__).parent
DEVICE_LIBRARIES = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}
COMMON = {
    "types",
    "errors",
    "config",
    "trace",
    "workdir",
    "metrics",
    "console",
    "signals",
    "boards",
}

# What each part may import beside itself and COMMON; "run" is in nobody's row.
HOST = {
    "chat": set(),
    "data": {"chat"},
    "agent": {"chat"},
    "tools": {"chat", "agent"},
    "rewards": {"chat", "agent", "tools"},
    "rl": {"chat", "data", "agent", "rewards"},
    "envs": {"chat", "data", "agent", "tools", "rewards"},
    "eval": {"chat", "data", "agent", "tools", "rewards", "envs"},
    "pages": {"chat", "data", "agent", "tools", "rewards", "rl", "eval"},
}
DEVICE = {
    "parallel": {"data"},
    "model": {"parallel"},
    "sample": {"parallel", "model"},
    "train": {"parallel", "model", "rl", "data"},
    "programs": {"parallel", "model", "sample", "train", "rl"},
    "plan": {"parallel", "model", "sample", "train", "rl", "programs"},
}
JOINED = {
    "setup": {*HOST, *DEVICE} - {"plan", "pages"},
    "serve": {*HOST, *DEVICE, "setup"},
    "run": {*HOST, *DEVICE, "setup", "serve"},
    "__main__": {"run"},
    "__init__": set(),
}
# The vocabulary leans on nothing, so that everything can lean on it.
ROOTS = {
    "types": set(),
    "errors": set(),
    "trace": set(),
    "workdir": {"errors"},
    "console": {"errors"},
    "signals": {"errors"},
    "metrics": {"errors", "workdir"},
    "boards": {"errors"},
    "config": {"errors", "workdir"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(source: str) -> set[str]:
    """The modules a source imports anywhere in it, as dotted names."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide the layer"
            names.add(node.module)
            if node.module == "jaxdeep":
                names |= {f"jaxdeep.{alias.name}" for alias in node.names}
    return names - {"jaxdeep", "jaxdeep.__version__"}


def violations(part: str, source: str) -> list[str]:
    """The imports that the part must not have."""
    allowed = ROOTS.get(part)
    if allowed is None:
        allowed = (HOST | DEVICE | JOINED)[part] | COMMON | {part}
    wrong = []
    for name in sorted(imported(source)):
        top, *rest = name.split(".")
        if top == "jaxdeep":
            wrong += [name] if rest[0] not in allowed else []
        elif top in DEVICE_LIBRARIES:
            wrong += [name] if part in {*HOST, *ROOTS} else []
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_what_lies_below_it(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert violations(part, path.read_text(encoding="utf-8")) == []


def test_the_check_finds_what_it_looks_for():
    source = """
from jaxdeep import parallel, types
import jaxdeep.train.grpo

def late():
    import jax.numpy as jnp
    from jaxdeep.run import sft
"""
    assert violations("agent", source) == [
        "jax.numpy",
        "jaxdeep.parallel",
        "jaxdeep.run",
        "jaxdeep.train.grpo",
    ]
    assert violations("train", source) == ["jaxdeep.run"]
    assert violations("types", "import numpy\nimport jaxdeep.errors") == ["jaxdeep.errors"]


def test_the_host_half_imports_where_there_is_no_jax():
    # Blocked rather than looked for afterwards: bm25s takes jax for itself wherever it finds it.
    host = [path for path in FILES if path.relative_to(PACKAGE).parts[0] in HOST]
    names = [
        ".".join(("jaxdeep", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in host
    ]
    names = [name.removesuffix(".__init__") for name in names]
    names += [f"jaxdeep.{name}" for name in ROOTS] + ["jaxdeep.run.cli"]
    program = (
        "import importlib, sys\n"
        f"for name in {sorted(DEVICE_LIBRARIES)}: sys.modules[name] = None\n"
        f"for name in {names}: importlib.import_module(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert done.returncode == 0, done.stderr
