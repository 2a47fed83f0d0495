"""What is compiled before a run is what the run calls: nothing large is compiled after it."""

import re

import jax
import pytest

from jaxdeep import config as configs
from jaxdeep import programs as lower
from jaxdeep.metrics import read_metrics
from jaxdeep.parallel import mesh as meshes
from jaxdeep.run import eval as evaluate
from jaxdeep.run import grpo, plan, sft
from tests.run import small

PROGRAMS = ["gradients", "before", "prefill", "decode"]
OURS = {f"jit({name})" for name in ("accumulate", "before", "update", "run")}
COMPILED: list[str] = []  # programs, since the module was loaded


def note(event, seconds, **about):
    if event == "/jax/core/compile/backend_compile_duration" and about.get("fun_name") in OURS:
        COMPILED.append(about["fun_name"])


jax.monitoring.register_event_duration_secs_listener(note)


@pytest.fixture
def at_first(monkeypatch):
    """How many programs each run had compiled when it began."""
    seen, ready = [], lower.compile_all

    def marked(*args):
        ready(*args)
        seen.append(len(COMPILED))

    monkeypatch.setattr(lower, "compile_all", marked)
    COMPILED.clear()
    return seen


def ran(verb, main, folder, *overrides):
    config = configs.load(small.config(folder, verb, steps=2), [f"--config.{o}" for o in overrides])
    assert main(config, folder / verb) == 0


def test_grpo_compiles_all_of_its_programs_before_its_first_rollout(tmp_path, at_first, capfd):
    mesh = ["mesh.data=2", "mesh.model=2", "mesh.context=2"]
    # another rate than those of other tests, whose programs would be found
    own = ["grpo.kl.coef=0.01", "grpo.passes=2", "optim.lr=2e-3", "rollout.slots=64"]
    luck = f"env.taskset={small.__file__}:Lucky"
    ran("grpo", grpo.main, tmp_path, *mesh, *own, luck, "rollout.chunk=1024")
    # three of the trainer, two sizes of two of the engine
    assert at_first == [len(COMPILED)] == [7]
    assert "compile: 7/7" in capfd.readouterr().err
    assert all(row["train/grad_norm"] > 0 for row in read_metrics(tmp_path / "grpo/metrics.jsonl"))


def test_sft_and_eval_do_too(tmp_path, at_first):
    ran("sft", sft.main, tmp_path, "optim.lr=3e-3")
    assert at_first == [len(COMPILED)] == [2]
    sizes = ["rollout.slots=64", "rollout.chunk=1024"]
    ran("eval", evaluate.main, tmp_path, "lora.rank=3", *sizes)
    assert at_first == [2, len(COMPILED)] == [2, 6]


def test_products_of_float32_are_of_all_their_bits(tmp_path):
    """By default GPUs and TPUs round what they multiply: trainer and sampler would not agree."""
    for dtype in ("float32", "bfloat16"):
        config = small.config(tmp_path, "grpo", steps=2)
        given = [f"--config.model.dtype={dtype}", "--config.grpo.passes=2"]
        ((work, axes),) = plan.works(configs.load(config, [*given, "--config.grpo.kl.coef=0.1"]))
        mesh = meshes.make_mesh(axes, jax.devices()[:1])
        programs = lower.listed(work, mesh, mesh)
        assert [name for name, _, _ in programs if name != "update"] == PROGRAMS
        for name, traced, _ in programs:
            products = re.findall(r"stablehlo.dot_general .*", traced.lower().as_text())
            whole = [line for line in products if "precision = [HIGHEST, HIGHEST]" in line]
            assert bool(products) == (name != "update")
            assert whole == (products if dtype == "float32" else []), (name, products)


def test_a_program_that_does_not_compile_ends_the_run(monkeypatch):
    def broken(traced, mesh):
        raise ValueError(f"{traced} does not compile")

    monkeypatch.setattr(lower, "listed", lambda *args, **more: [("update", 1, None)])
    monkeypatch.setattr(lower, "compiled", broken)
    with pytest.raises(ValueError, match="1 does not compile"):
        lower.compile_all(lower.Workload("sft", None), None)
