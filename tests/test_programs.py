"""Every large program of a run is compiled before it begins, and none after."""

import re

import jax
import pytest

from jaxdeep import config as configs
from jaxdeep import programs
from jaxdeep.metrics import read_metrics
from jaxdeep.parallel import mesh as meshes
from jaxdeep.run import eval as evaluate
from jaxdeep.run import grpo, plan, sft
from tests.run import small

PROGRAMS = ["gradients", "before", "prefill", "decode"]
OURS = {f"jit({name})" for name in ("accumulate", "reference_logps", "update", "run")}
COMPILED: list[str] = []  # names of the programs compiled since the test began


def note(event, seconds, **about):
    if event == "/jax/core/compile/backend_compile_duration" and about.get("fun_name") in OURS:
        COMPILED.append(about["fun_name"])


jax.monitoring.register_event_duration_secs_listener(note)


@pytest.fixture
def compiled_at_start(monkeypatch):
    """How many programs had been compiled when each run began."""
    counts, compile_all = [], programs.compile_all

    def counted(*args):
        compile_all(*args)
        counts.append(len(COMPILED))

    monkeypatch.setattr(programs, "compile_all", counted)
    COMPILED.clear()
    return counts


def run(verb, main, folder, *overrides):
    config = configs.load(small.config(folder, verb, steps=2), [f"--config.{o}" for o in overrides])
    assert main(config, folder / verb) == 0


def test_grpo_compiles_all_of_its_programs_before_its_first_rollout(
    tmp_path, compiled_at_start, capfd
):
    mesh = ["mesh.data=2", "mesh.model=2", "mesh.context=2"]
    # a learning rate of its own: programs of other tests would be found in the cache
    settings = ["grpo.kl.coef=0.01", "grpo.passes=2", "optim.lr=2e-3", "rollout.slots=64"]
    taskset = f"env.taskset={small.__file__}:Lucky"
    run("grpo", grpo.main, tmp_path, *mesh, *settings, taskset, "rollout.chunk=1024")
    # three programs of the trainer; of the engine, two programs of two sizes each
    assert compiled_at_start == [len(COMPILED)] == [7]
    assert "compile: 7/7" in capfd.readouterr().err
    assert all(row["train/grad_norm"] > 0 for row in read_metrics(tmp_path / "grpo/metrics.jsonl"))


def test_sft_and_eval_do_too(tmp_path, compiled_at_start):
    run("sft", sft.main, tmp_path, "optim.lr=3e-3")
    assert compiled_at_start == [len(COMPILED)] == [2]
    sizes = ["rollout.slots=64", "rollout.chunk=1024"]
    run("eval", evaluate.main, tmp_path, "lora.rank=3", *sizes)
    assert compiled_at_start == [2, len(COMPILED)] == [2, 6]


def test_float32_models_multiply_in_full_precision(tmp_path):
    """The default of GPUs and TPUs truncates inputs: trainer and sampler would not agree."""
    for dtype in ("float32", "bfloat16"):
        config = small.config(tmp_path, "grpo", steps=2)
        given = [f"--config.model.dtype={dtype}", "--config.grpo.passes=2"]
        ((work, axes),) = plan.works(configs.load(config, [*given, "--config.grpo.kl.coef=0.1"]))
        mesh = meshes.make_mesh(axes, jax.devices()[:1])
        traces = programs.trace_all(work, mesh, mesh)
        assert [name for name, _, _ in traces if name != "update"] == PROGRAMS
        for name, traced, _ in traces:
            products = re.findall(r"stablehlo.dot_general .*", traced.lower().as_text())
            full = [line for line in products if "precision = [HIGHEST, HIGHEST]" in line]
            assert bool(products) == (name != "update")
            assert full == (products if dtype == "float32" else []), (name, products)


def test_a_program_that_does_not_compile_ends_the_run(monkeypatch):
    def broken(traced, mesh):
        raise ValueError(f"{traced} does not compile")

    monkeypatch.setattr(programs, "trace_all", lambda *args, **kwargs: [("update", 1, None)])
    monkeypatch.setattr(programs, "compile_traced", broken)
    with pytest.raises(ValueError, match="1 does not compile"):
        programs.compile_all(programs.Workload("sft", None), None)
