"""Compiled programs are kept by default in a folder of the user's, bounded, and where the
environment says so elsewhere or not at all."""

import os
import subprocess
import sys
import time

import pytest

from jaxdeep import compiled

COMPILE = """
import sys
{first}
from jaxdeep import compiled
place = compiled.keep()
import jax
seconds = jax.config.jax_persistent_cache_min_compile_time_secs
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x * 3 + 1)(2.0).block_until_ready()
print(place, jax.config.jax_compilation_cache_dir, jax.config.jax_compilation_cache_max_size,
      seconds)
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user with an empty cache folder, whose environment says nothing of compiled programs."""
    for name in (compiled.FOLDER, *map(str.upper, compiled.SETTINGS)):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # so that what keep() sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "jax", None)
    return tmp_path


def test_the_folder_is_of_the_user_and_the_cpu(home, monkeypatch):
    one = compiled.folder()
    assert one.parent == home / "cache/jaxdeep/xla" and not one.exists()
    monkeypatch.setattr(compiled, "_cpu", lambda: "another CPU")
    assert compiled.folder().parent == one.parent and compiled.folder() != one
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(home))
    assert compiled.cache_folder() == home / ".cache/jaxdeep"


def test_the_environment_comes_first(home, monkeypatch):
    monkeypatch.setenv(compiled.FOLDER, str(home / "mine"))
    assert compiled.keep() is None
    assert os.environ[compiled.FOLDER] == str(home / "mine")
    assert (
        not {*map(str.upper, compiled.SETTINGS)} & {*os.environ} and not (home / "cache").exists()
    )


def test_a_folder_that_cannot_be_written_is_said(home, monkeypatch, capsys):
    (home / "cache").write_text("a file")
    assert compiled.keep() is None
    assert "are not kept" in capsys.readouterr().err and compiled.FOLDER not in os.environ


def test_what_a_kill_left_half_written_goes(home):
    place = compiled.keep()
    assert os.environ[compiled.FOLDER] == str(place)
    assert os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] == str(compiled.LIMIT)
    old = time.time() - 10 * compiled.UNFINISHED
    for name in ("whole", "killed", "being-written"):
        (place / f"{name}-cache").write_bytes(b"program")
    (place / "whole-atime").write_bytes(bytes(8))
    for name in ("whole", "killed"):
        os.utime(place / f"{name}-cache", (old, old))
    del os.environ[compiled.FOLDER]
    assert compiled.keep() == place
    assert sorted(path.name for path in place.glob("*-cache")) == [
        "being-written-cache",
        "whole-cache",
    ]


@pytest.mark.parametrize("first", ["", "import jax"], ids=["before jax", "after jax"])
def test_jax_writes_there_and_finds_it_again(home, first):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", COMPILE.format(first=first)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    place, used, limit, seconds = done.stdout.split()
    assert place == used == str(compiled.folder())
    assert int(limit) == compiled.LIMIT and float(seconds) == 0.2
    assert {path.name.rpartition("-")[2] for path in compiled.folder().iterdir()} >= {
        "cache",
        "atime",
    }
