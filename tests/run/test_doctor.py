"""What `doctor` says of machines that have something, lack it, or have it without jax seeing it."""

import json

import pytest
from packaging.requirements import Requirement

from jaxdeep import compiled
from jaxdeep.run import cli, doctor
from jaxdeep.setup import machine, packages

CPU = [{"platform": "cpu", "kind": "cpu", "memory": None}]
H100 = [{"platform": "gpu", "kind": "NVIDIA H100", "memory": 80 * 2**30}] * 2


@pytest.fixture
def here(monkeypatch, tmp_path):
    """A function that says what the machine has; all is well without a word."""
    for name in ("JAX_PLATFORMS", compiled.FOLDER, "JAX_ENABLE_COMPILATION_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def have(seen=CPU, trouble="", nvidia=0, tpu=0, driver=True, gpu_extra=True, always=()):
        extra = [] if gpu_extra else [Requirement("jax-cuda-plugin-of-nobody")]
        needs = packages.Needs(
            [Requirement(r) for r in always], {"gpu": extra, "tpu": [], "gs": []}
        )
        monkeypatch.setattr(packages, "needs", lambda: needs)
        monkeypatch.setattr(doctor, "probe", lambda: (seen, trouble))
        plugged = machine.Accelerators(nvidia, tpu, driver)
        monkeypatch.setattr(machine, "accelerators", lambda: plugged)

    have()
    return have


def said(capsys, *words):
    status = cli.main(["doctor", *words])
    return status, capsys.readouterr().out


def test_a_machine_where_all_is_well(here, capsys):
    status, out = said(capsys)
    assert status == 0 and "nothing that is needed is missing" in out
    assert not [line for line in out.splitlines() if line.startswith(("!", "?"))]
    here(seen=H100, nvidia=2)
    status, out = said(capsys, "gpu")
    assert status == 0 and "2 x NVIDIA H100 (gpu) with 80.0 GiB" in out


@pytest.mark.parametrize(
    ("has", "environment", "says"),
    [
        ({"gpu_extra": False}, {}, "jaxdeep[gpu]|install -e"),
        ({}, {"JAX_PLATFORMS": "cpu"}, "JAX_PLATFORMS=cpu hides it"),
        ({"driver": False}, {}, "give the container its GPUs"),
        ({}, {}, 'jax.devices("cuda")'),
    ],
)
def test_an_accelerator_that_jax_does_not_see_gets_a_hint(
    here, capsys, monkeypatch, has, environment, says
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    here(nvidia=1, **has)
    status, out = said(capsys)
    assert status == 0 and "? this machine has 1 x NVIDIA GPU, and jax does not see it" in out
    fix = out.split("does not see it\n")[1].splitlines()[0]
    assert any(part in fix for part in says.split("|"))
    assert said(capsys, "gpu")[0] == 1


@pytest.mark.parametrize(
    ("has", "words", "says"),
    [
        ({"always": ["numpy>999"]}, [], "is not in the range >999"),
        ({"always": ["no-such-package"]}, [], "no-such-package is not installed"),
        ({"trouble": "the TPU is in use", "seen": []}, [], "finds no devices: the TPU is in use"),
        ({}, ["tpu"], "no TPU on this machine"),
        ({"gpu_extra": False, "seen": H100}, ["gpu"], "gpu: jax-cuda-plugin-of-nobody is not"),
    ],
)
def test_what_is_missing_makes_the_status_1(here, capsys, has, words, says):
    here(**has)
    status, out = said(capsys, *words)
    assert status == 1 and "missing: 1, marked !" in out
    (line,) = [line for line in out.splitlines() if line.startswith("!")]
    assert says in line


def test_json_has_the_same_findings(here, capsys, monkeypatch, tmp_path):
    (tmp_path / "hf/hub").mkdir(parents=True)
    (tmp_path / "hf/hub/weights").write_bytes(bytes(3000))
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    status, out = said(capsys, "--json", "gpu")
    found = json.loads(out)
    assert status == 1 and found["ok"] is False
    sections = found["sections"]
    assert list(sections) == [
        *("python", "packages", "devices", "extras", "caches", "disk", "cores and memory")
    ]
    levels = [f["level"] for section in sections.values() for f in section["findings"]]
    assert levels.count("missing") == 1
    facts = sections["caches"]["facts"]
    assert facts["models of the Hugging Face hub"]["bytes"] == 3000
    assert facts["compiled programs"] == {"off": True}
    assert sections["disk"]["facts"]["runs"]["free"] > 0


def test_a_word_that_is_no_extra(here, capsys):
    assert cli.main(["doctor", "gpux"]) == 2
    assert "doctor knows no 'gpux'. Did you mean \"gpu\"?" in capsys.readouterr().err


def test_jax_is_asked_in_a_process_of_its_own():
    seen, trouble = doctor.probe()
    assert not trouble and {device["platform"] for device in seen} == {"cpu"}
