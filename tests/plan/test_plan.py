"""A plan adds up, on virtual devices in place of described ones; what cannot be planned is
refused."""

import ast
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import pytest
from bench import pods

from jaxdeep import config as configs
from jaxdeep import programs
from jaxdeep.parallel import mesh as meshes
from jaxdeep.plan import chips, estimate, report
from jaxdeep.run import cli
from jaxdeep.run import plan as verb

SMALL = [
    "--config.grpo.rollout.slots=8",
    "--config.grpo.rollout.chunk=64",
    "--config.grpo.batch.rows=8",
    "--config.grpo.mesh.data=-1",
]


@pytest.fixture(scope="module")
def work():
    config = configs.load("configs/search/quickstart.py", SMALL)
    (_, _), (found, axes) = verb.works(config)
    # two layers of the tiny base compile sooner than all
    spec = dataclasses.replace(found.spec, model=dataclasses.replace(found.spec.model, L=2))
    return dataclasses.replace(found, spec=spec), axes


@pytest.fixture(scope="module")
def described():
    """Four virtual devices as a topology of chips with little memory."""
    chip = dataclasses.replace(chips.CHIPS["v5e"], memory=2e8)
    return chips.Topology("v5e:2x2", chip, tuple(jax.devices()[:4]))


@pytest.fixture(scope="module")
def made(work, described):
    return estimate.plan(*(work[0], described, work[1]))


def test_memory_adds_up_and_what_is_left_holds_pages(made, work):
    spec = work[0].spec
    assert made.fits and made.used == sum(made.memory.values())
    mesh = meshes.make_mesh(work[1], jax.devices()[:4])
    # one process: the engine reads the trainer's own weights
    assert "base once more, for the engine" not in made.memory
    assert made.memory["base"] == programs.device_bytes(programs.param_shapes(spec.model, mesh))
    assert made.memory["optimizer"] > 2 * made.memory["adapter"]
    assert made.memory["gradients"] == made.memory["adapter"]
    engine = made.engine
    assert engine["rows_asked"] == 8 < engine["rows_possible"]
    page = made.memory["keys and values"] / (8 * 15 / 4)  # 240 tokens a row, pages of 16, 4 devices
    assert engine["pages_left"] == 4 * int(engine["bytes_left"] / page)
    assert engine["rows_possible"] == 4 * int(engine["bytes_left"] / (15 * page))


def test_a_step_and_its_time(made, work):
    step, costs = made.step, made.programs
    assert list(costs) == ["gradients", "update", "prefill", "decode"]
    assert step["tokens"] == 64 / 8 * 8 * 240  # a row holds one rollout
    # rows as long as this are padded to whole blocks by the plain computation
    assert 1 < step["device_flops"] * 4 / step["model_flops"] < 1.6
    assert step["bound_seconds"] <= step["estimated_seconds"]
    assert 0 < step["mfu"] <= step["most_mfu"] <= 1
    kinds = {line["kind"] for line in costs["gradients"].collectives}
    assert "all-gather" in kinds or "all-to-all" in kinds
    assert {cost.binding for cost in costs.values()} <= {"compute", "memory", "interconnect"}


def test_what_does_not_fit_says_by_how_much_and_what_would(made):
    tight = dataclasses.replace(made, limit=made.used - 1e6)
    assert not tight.fits
    assert "does not fit: 0.00 GB more than" in report.verdict(tight)
    assert any("more chips (8 of them)" in line for line in report.advice(tight))
    large = dataclasses.replace(made.programs["gradients"], fits=False, temporary=3e8)
    worse = dataclasses.replace(
        made,
        programs=made.programs | {"gradients": large},
        memory=made.memory | {"activations and other temporaries": 3e8},
        step={},
    )
    assert "gradients alone, with 0.30 GB" in report.verdict(worse)
    assert "model.remat=full" in report.text(worse)
    model = dataclasses.replace(worse.work.spec.model, remat="full")
    spec = dataclasses.replace(worse.work.spec, model=model)
    worse.work = dataclasses.replace(worse.work, spec=spec)
    assert "batch.rows=4 would about halve" in report.text(worse)
    assert report.dollars_per_million_tokens(worse) == float("inf")


def test_the_page_and_the_facts_say_the_same(made):
    facts = json.loads(json.dumps(report.facts(made)))
    assert facts["fits"] is True and facts["programs"]["decode"]["binding"]
    page = report.page([made])
    assert report.verdict(made) in page and "<script" not in page
    assert "keys and values" in page and "%" in report.text(made)


@pytest.fixture
def virtual(monkeypatch, described):
    monkeypatch.setattr(
        verb.chips, "topology", lambda name: dataclasses.replace(described, name=name)
    )
    monkeypatch.setattr(verb.jax.config, "update", lambda *_: None)


def test_the_verb_sweeps_meshes_and_names_the_cheapest(
    virtual, made, tmp_path, capsys, monkeypatch
):
    memory = made.memory | {"keys and values": 0}

    def plan(work, place, axes, largest_only):
        mesh = dict(meshes.make_mesh(axes, place.devices).shape)
        limit = made.limit if axes.model > 1 else 1.0
        changed = dict(
            work=work, mesh=mesh, topology=place.name, limit=limit, engine={}, memory=memory
        )
        return dataclasses.replace(made, **changed)

    monkeypatch.setattr(verb.estimate, "plan", plan)
    argv = ["plan", "--topology=v5e:2x2,v6e:2x2", "--sweep=model,context", f"--workdir={tmp_path}"]
    argv += ["--config=configs/search/sft.py", "--config.model.path=tiny"]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert (
        "cheapest that fits: sft on v5e:2x2 (4 devices, " in out
    )  # the same work at a lower price
    assert "data=4" in out and "data=2 model=2" in out and "context=2 model=2" in out
    plans = json.loads((tmp_path / "plan.json").read_text())
    assert len(plans) == 2 * 6 and [one["fits"] for one in plans].count(True) == 2 * 3
    assert (tmp_path / "plan.html").read_text().count("<h2") == 12
    monkeypatch.setattr(
        verb.estimate,
        "plan",
        lambda *a, **k: dataclasses.replace(made, limit=1.0, engine={}, memory=memory),
    )
    assert cli.main(argv) == 2 and "none of them fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--config.sft.mesh.data=3"], "the product of its axes must be the number of devices"),
        (
            ["--config.sft.batch.rows=7", "--config.sft.mesh.data=-1"],
            "does not divide over replica*data=4",
        ),
        (["--sweep=data"], "data is not an axis that is tried"),
        (["--config.grpo.batch.length=100"], "must hold a whole rollout"),
        (["--config.sft.model.path=Qwen/Qwen3-9B"], 'Did you mean "Qwen/Qwen3-'),
    ],
)
def test_what_cannot_be_planned_is_refused(virtual, tmp_path, capsys, flags, says):
    assert cli.main(["plan", f"--workdir={tmp_path}", *flags]) == 2
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error


def test_a_row_of_the_table_of_pods_is_planned_once(made, described, monkeypatch, tmp_path):
    planned = []

    def plan(work, place, axes, *, largest_only):
        planned.append((work.name, work.rows, axes.model, largest_only))
        return made

    monkeypatch.setattr(pods.chips, "topology", lambda name: described)
    monkeypatch.setattr(pods.estimate, "plan", plan)
    for _ in range(2):
        facts = pods.plan_of("8B-32k-grpo/v5e:4x4", tmp_path)
    assert planned == [("grpo", 4, 4, True)]
    assert facts["fits"] and facts["says"][0] == report.verdict(made)


def test_a_configuration_of_another_verb_is_refused(virtual, tmp_path, capsys):
    assert cli.main(["plan", "--config=configs/search/eval.py", f"--workdir={tmp_path}"]) == 2
    assert "a plan is of a configuration of sft, grpo or the quickstart" in capsys.readouterr().err


# runs that fit, and the least rows of full length that GRPO's engines hold beside the training
# state
FITS = (
    ("8B-32k-sft/v5e:4x4", 0),
    ("8B-32k-grpo/v5e:4x4", 8),
    ("8B-32k-grpo/v5e:8x8", 32),
    ("8B-128k-sft/v5e:8x8", 0),
    ("8B-128k-grpo-int8/v5e:8x8", 16),
    ("8B-128k-grpo/v5p:2x2x4", 16),
    ("32B-32k-sft/v5e:8x8", 0),
    ("32B-32k-grpo-int8/v5e:8x8", 0),
    ("32B-32k-grpo-int8/v6e:4x4", 8),
    ("32B-32k-grpo/v5p:2x2x2", 32),
    ("30B-A3B-32k-sft/v5e:4x8", 0),
    ("30B-A3B-32k-grpo-int8/v5e:4x8", 0),
)
MOST = {"8B-32k-sft/v5e:4x4": 8e9, "8B-128k-sft/v5e:8x8": 13e9, "32B-32k-sft/v5e:8x8": 15e9}
SAME_WORK = ("8B-8k/v5e:4x4", "8B-8k/v5e:8x8", "8B-8k/v5e:16x16", "8B-8k/v5e:16x16*2")


EVERY = """
from jaxdeep.plan import chips
for kind, chip in chips.CHIPS.items():
    for shape in chip.shapes:
        sides = [int(side) for side in shape.split("x")]
        found = chips.topology(f"{kind}:{shape}")
        cores = 2 if kind == "tpu7x" else 1
        assert len(found.devices) == cores * np.prod(sides), (kind, shape, len(found.devices))
        assert found.devices[0].platform == "tpu"
print("all are described")
"""


def test_every_shape_that_is_listed_can_be_described():
    pytest.importorskip("libtpu")
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(configs.ROOT)}
    command = [sys.executable, "-c", f"import numpy as np\n{EVERY}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert "all are described" in done.stdout, done.stderr[-2000:]


def planned(names, folder):
    """The plans of rows of `pods.ROWS` by the TPU compiler, in a process of its own."""
    pytest.importorskip("libtpu")
    paths = [str(configs.ROOT), *filter(None, sys.path)]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "tests/bench/pods.py", f"--rows={','.join(names)}"]
    command += [f"--out={folder}"]
    done = subprocess.run(command, env=env, cwd=configs.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(pods.path(name, folder).read_text()) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rows"), FITS)
def test_a_step_of_a_large_model_fits_where_it_should(name, rows, tmp_path):
    (facts,) = planned([name], tmp_path)
    assert facts["fits"] and facts["used"] < MOST.get(name, facts["limit"]), facts["says"]
    if name in MOST:
        assert facts["programs"]["gradients"]["binding"] == "compute"
    assert facts["step"]["bound_seconds"] < facts["step"]["estimated_seconds"]
    assert facts["step"]["tokens"] >= pods.ROWS[name].rows * pods.ROWS[name].length
    if pods.ROWS[name].cache:
        engine = facts["engine"]
        assert engine["rows_possible"] >= max(rows, engine["engines"])
        assert engine["rows_asked"] <= engine["rows_possible"]


@pytest.mark.slow
def test_a_step_takes_as_long_on_16_chips_as_on_512(tmp_path):
    """Weak scaling: the same work a chip on a part of a slice, on all of it, and on two."""
    seconds = [facts["step"]["estimated_seconds"] for facts in planned(SAME_WORK, tmp_path)]
    assert max(seconds) < 1.1 * min(seconds), seconds


ROOT = pathlib.Path(__file__).resolve().parents[2]
PLANS = {
    f"{path.parent.name}/{path.stem}": shlex.split(command)[3:]
    for path in sorted((ROOT / "configs").rglob("*.py"))
    for command in re.findall(
        r"^ {4}(python -m jaxdeep plan .+)$",
        ast.get_docstring(ast.parse(path.read_text())).replace("\\\n", " "),
        re.MULTILINE,
    )
}


def test_what_names_a_slice_has_a_plan_for_it():
    for path in sorted((ROOT / "configs").rglob("*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text()))
        planned = f"{path.parent.name}/{path.stem}" in PLANS
        assert planned == ("meant for a TPU" in doc), path
    assert PLANS["search/grpo"][1:] == shlex.split(verb.EXAMPLE)[4:]


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_a_configuration_fits_the_slice_that_it_names(name, tmp_path):
    """By the TPU compiler, with the command that the configuration shows."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU compiler is not installed: pip install -e '.[tpu]'")
    command = [sys.executable, "-m", "jaxdeep", *PLANS[name], f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    plans = json.loads((tmp_path / "plan.json").read_text())
    assert plans and all(plan["fits"] for plan in plans)
