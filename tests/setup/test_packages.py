"""What is needed and what is installed, by metadata of made-up packages."""

import sys

import pytest
from packaging.requirements import Requirement

from jaxdeep.setup import packages


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A function that installs the metadata of a package."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])

    def install(name, version, *requires, extras=()):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Provides-Extra: {extra}" for extra in extras]
        lines += [f"Requires-Dist: {one}" for one in requires]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")

    return install


def test_ranges_and_extras_of_extras(installed):
    installed(
        "jaxdeep",
        "0.1.0",
        *("jax>=2,<3", "numpy>=2", 'old; python_version < "3"', 'jax[fast]>=2; extra == "gpu"'),
        'ray>=1; extra == "ray"',
        extras=("gpu", "ray"),
    )
    installed(
        "jax", "2.5", "numpy", 'fastlib[deep]==2.5; extra == "fast"', extras=("fast", "other")
    )
    installed("fastlib", "2.5", 'deeplib>1; extra == "deep"', 'nolib; extra == "none"')
    installed("numpy", "1.9")
    needs = packages.needs()
    assert [one.name for one in needs.always] == ["jax", "numpy"]
    assert {extra: [str(r) for r in rs] for extra, rs in needs.extras.items()} == {
        "gpu": ['jax[fast]>=2; extra == "gpu"'],
        "ray": ['ray>=1; extra == "ray"'],
    }
    told = {str(one): packages.unmet(one) for one in needs.always}
    assert told == {"jax<3,>=2": [], "numpy>=2": ["numpy 1.9 is not in the range >=2"]}
    assert packages.unmet(needs.extras["gpu"][0]) == ["deeplib is not installed"]
    assert packages.unmet(needs.extras["ray"][0]) == ["ray is not installed"]
    assert packages.unmet(Requirement("jax<2.5")) == ["jax 2.5 is not in the range <2.5"]


def test_without_metadata_nothing_is_known(installed):
    assert packages.needs() is None and packages.version("jaxdeep") == ""
