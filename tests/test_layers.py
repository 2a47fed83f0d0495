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
    "settings",
    "files",
    "config",
    "trace",
    "workdir",
    "metrics",
    "console",
    "signals",
    "boards",
    "gguf_file",
    "compiled",
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
    "types": {"errors"},
    "errors": set(),
    "files": {"errors"},
    "trace": {"workdir"},
    "workdir": {"errors"},
    "console": {"errors"},
    "signals": {"errors"},
    "metrics": {"errors", "workdir"},
    "boards": {"errors", "workdir"},
    "compiled": {"console"},
    "settings": {"errors"},
    "gguf_file": {"errors"},
    "config": {"errors", "settings", "workdir"},
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
    assert violations("types", "import numpy\nimport jaxdeep.files") == ["jaxdeep.files"]


PRODUCTS = sorted(p.name for p in (PACKAGE / "envs").iterdir() if (p / "__init__.py").exists())


def product_violations(path: pathlib.Path, source: str) -> list[str]:
    """Imports of a product from another one, or from the core that serves all of them."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    own = parts[1] if parts[0] == "envs" and len(parts) > 2 else None
    if parts[0] in ("setup", "run", "serve") or parts[:2] == ("eval", "benchmarks"):
        return []
    wrong = []
    for name in sorted(imported(source)):
        _, top, *rest = [*name.split("."), "", ""]
        if top == "envs" and rest[0] in PRODUCTS and rest[0] != own:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_core_knows_no_product_and_no_product_another(path):
    assert product_violations(path, path.read_text(encoding="utf-8")) == []


def test_the_check_of_products_finds_what_it_looks_for():
    source = "from jaxdeep.envs.toy import facts\nfrom jaxdeep.envs import qa"
    assert {"search", "toy"} <= set(PRODUCTS)
    for place in ("rl/summary.py", "envs/qa.py", "envs/search/tasks.py", "eval/harness.py"):
        assert product_violations(PACKAGE / place, source) == ["jaxdeep.envs.toy"]
    for place in ("envs/toy/maze.py", "setup/sources.py", "run/sft.py"):
        assert product_violations(PACKAGE / place, source) == []


def module_of(path: pathlib.Path) -> str:
    parts = ("jaxdeep", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


def test_no_module_imports_itself_through_others():
    modules = {module_of(path): path for path in FILES}
    arrows: dict[str, set[str]] = {}
    for name, path in modules.items():
        # what is imported inside a function or for types alone is not imported when the module is
        nodes = [n for n in ast.parse(path.read_text(encoding="utf-8")).body]
        froms = [n for n in nodes if isinstance(n, ast.ImportFrom)]
        names = {n.module for n in froms} | {f"{n.module}.{a.name}" for n in froms for a in n.names}
        names |= {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
        arrows[name] = {other for other in names if other in modules and other != name}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for other in sorted(arrows[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in modules:
        visit(name, ())


LONGEST_FILE, LONGEST_FUNCTION = 600, 90  # lines


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LONGEST_FILE
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name


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


def test_a_module_has_one_name_wherever_it_is_imported():
    names: dict[str, set[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    if full in {module_of(file) for file in FILES}:
                        names.setdefault(full, set()).add(alias.asname or alias.name)
    assert {module: found for module, found in names.items() if len(found) > 1} == {}
