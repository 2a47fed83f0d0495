"""What is installed is whole: the wheel has every file that the code reads, and works without a
checkout."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOT_INSTALLED = (".md", ".png")  # of the repository alone
NAMES = """
import sys
from jaxdeep import Env, Message, Policy, Reward, Task, Taskset, Tool, ToolError, ToolResult, tool
from jaxdeep import load_config, run_verb
assert load_config("search/grpo", "train.steps=5").train.steps == 5
assert load_config("quickstart").sft.model.path == "tiny"
assert load_config("configs/search/eval.py").env.taskset == "search"
loaded = [name for name in ("jax", "transformers", "datasets", "torch") if name in sys.modules]
print(loaded, sys.modules["jaxdeep"].__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built from a copy of what git would send."""
    pytest.importorskip("setuptools")
    copy, built = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("built")
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("jaxdeep", "configs"):
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", f"--dist-dir={built}"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = built.iterdir()
    return path


def test_every_file_that_the_code_reads_is_in_the_wheel(wheel):
    listed = set(zipfile.ZipFile(wheel).namelist())
    files = [
        path
        for name in ("jaxdeep", "configs")
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in NOT_INSTALLED
    ]
    wanted = {path.relative_to(ROOT).as_posix() for path in files}
    wanted = {f"jaxdeep/{name}" if name.startswith("configs/") else name for name in wanted}
    assert {"jaxdeep/configs/search/grpo.py", "jaxdeep/assets/tiny/model.safetensors"} <= wanted
    assert {name for name in listed if ".dist-info/" not in name} == wanted


def test_it_works_without_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    here = tmp_path / "elsewhere"
    here.mkdir()
    done = subprocess.run(
        [sys.executable, "-P", "-c", NAMES],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        cwd=here,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"[] {tmp_path / 'site/jaxdeep/__init__.py'}"
