"""Eight CPU devices for the whole suite, and the folder of real data that some tests read."""

import atexit
import gc
import os
import pathlib
import shutil
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # compiling is most of what the tests do: less of it matters more than faster programs
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# the suite's processes, and those that tests start, share what they compile
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled")
    atexit.register(shutil.rmtree, COMPILED, ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
DATA = pathlib.Path(os.environ.get("JAXDEEP_TEST_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Compiled programs of a file are dropped after it: kept, they grow to gigabytes a process."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def shared():
    """A path in the folder of real data, or a skip that says what is missing."""

    def find(name: str) -> pathlib.Path:
        path = DATA / name
        if not path.exists():
            pytest.skip(f"{path} is absent: set JAXDEEP_TEST_DATA to the folder that has it")
        return path

    return find
