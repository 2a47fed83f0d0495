"""How a GRPO run learns: algorithms by name, which tasks it draws, what it does with a bad step."""

import dataclasses
import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from run import small

from jaxdeep import config as configs
from jaxdeep.agent.rollout import Limits
from jaxdeep.data.pack import pack, to_row
from jaxdeep.errors import ConfigError, MismatchError
from jaxdeep.metrics import read_metrics
from jaxdeep.rl import algorithms
from jaxdeep.rl.advantages import Norm
from jaxdeep.rl.curriculum import SolveRateFilter
from jaxdeep.rl.objective import Clip, Kl, Objective
from jaxdeep.run import cli, grpo
from jaxdeep.setup.sections import BatchConfig
from jaxdeep.train import losses, passes
from jaxdeep.train.optim import OptimConfig
from jaxdeep.types import Piece

LIMITS = Limits(
    max_turns=2, max_calls=1, turn_tokens=20, max_tokens=90, result_tokens=9, seconds=9.0
)
REQUIRED = dict(prompts=4, group=4, tolerance=1e-4)


def built(**settings):
    config = algorithms.expand(ConfigDict({"grpo": REQUIRED | settings}))
    return configs.build(algorithms.GrpoConfig, config.grpo, "grpo")


GROUP = Norm(std="group")
WANT = {  # what each paper states: norm, groups of equal rewards, objective
    "default": (Norm(), "drop", Objective()),
    "grpo": (
        GROUP,
        "keep",
        Objective(clip=Clip(0.2, 0.2), aggregate="sequence", kl=Kl("k3", 0.04)),
    ),
    "dr_grpo": (Norm(), "keep", Objective(clip=Clip(0.2, 0.2), aggregate="constant", length=90)),
    "dapo": (GROUP, "resample", Objective(clip=Clip(0.2, 0.28))),
    "rloo": (
        Norm(leave_one_out=True),
        "keep",
        Objective(clip=Clip(None, None), aggregate="constant", length=1),
    ),
    "gspo": (GROUP, "keep", Objective("gspo", clip=Clip(3e-4, 4e-4), aggregate="sequence")),
    "cispo": (GROUP, "keep", Objective("cispo", clip=Clip(None, 4.0))),
    "binary_tv": (Norm(), "drop", Objective("binary_tv", clip=Clip(0.2, 0.2))),
    "reinforce_pp": (Norm("batch", "batch"), "keep", Objective(clip=Clip(0.2, 0.2))),
}


@pytest.mark.parametrize("name", algorithms.PRESETS)
def test_an_algorithm_is_what_its_paper_states(name):
    found = built(algorithm=name)
    rules, loss = found.rules(LIMITS), found.loss(LIMITS)
    if loss.aggregate != "constant":
        loss = dataclasses.replace(loss, length=1)
    assert (rules.norm, rules.flat, loss) == WANT[name]
    assert rules.shaping.overlong == (name == "dapo") and rules.limit == 90
    assert rules.truncated == "keep" and rules.failed == "drop" and found.passes == 1


def test_what_is_set_goes_over_the_algorithm_to_the_last_field():
    found = built(algorithm="grpo", kl=dict(coef=0.0), clip=dict(high=0.3), flat="drop")
    assert found.kl == Kl("k3", 0.0) and found.clip == Clip(0.2, 0.3) and found.flat == "drop"
    assert found.norm == GROUP and found.aggregate == "sequence"
    assert built(curriculum=dict(low=0.2)).curriculum == SolveRateFilter(low=0.2)
    assert built().curriculum is None


def test_an_unknown_algorithm_is_refused_with_all_names():
    with pytest.raises(
        ConfigError, match=r"grpo.algorithm='gpso' is none of default, grpo, .*gspo"
    ):
        built(algorithm="gpso")
    with pytest.raises(ConfigError, match=r"grpo\.norm\.mean is 'groups', none of 'group'"):
        built(norm=dict(mean="groups"))
    for bad in (dict(passes=0), dict(tries=0), dict(length=-1), dict(ahead=-1)):
        with pytest.raises(ConfigError, match=f"grpo.{next(iter(bad))}="):
            built(**bad)


def test_the_schedule_of_the_optimizer_follows_the_passes():
    optimizer = OptimConfig(lr=1.0, steps=10, warmup=2)
    found = optimizer.in_updates(3)
    assert (found.steps, found.warmup) == (30, 6) and optimizer.in_updates(1) == optimizer


# What a step does.


class Step:
    """A step whose numbers are scripted: (loss, gradient's norm, largest difference) for each
    call."""

    def __init__(self, *numbers):
        self.numbers, self.updates, self.old = list(numbers), 0, None

    def reference_logps(self, state, frozen, batches, *, old):
        self.old = old
        return [losses.NO_REFERENCE for _ in batches]

    def gradients(self, state, frozen, batches, references, logps=None, sequences=None):
        assert len(batches) == len(references)
        loss, norm, apart = self.numbers.pop(0)
        same = dict.fromkeys(losses.MISMATCH, apart)
        return "grads", same | {"loss": loss, "grad_norm": norm, "tokens": 5.0}

    def update(self, state, grads):
        self.updates += 1
        return state + 1, {"lr": 0.1, "finite": True}

    def flops(self, batches, passes):
        return 0.0


GOOD, NAN = (0.5, 1.0, 1e-6), float("nan")


def batches(count=2):
    pieces = [Piece([1, 2], "world"), Piece([3, 4], "policy", [-1.0, -1.0])]
    rows = [to_row(pieces, advantage=1.0)] * count
    return [batch for row in rows for batch in pack([row], B=1, T=8)]


def test_several_passes_are_several_updates_and_compare_with_the_sampler_once():
    step = Step(GOOD, (0.25, 2.0, 0.7))
    state, found, trouble = passes.learn(step, 10, None, batches(), 1e-4, passes=2)
    assert (state, trouble, step.updates, step.old) == (12, "", 2, True)
    assert found["loss"] == 0.25 and found["max_logp_diff"] == 1e-6 and found["lr"] == 0.1
    step = Step(GOOD)
    assert passes.learn(step, 10, None, batches(), 1e-4, passes=1)[0] == 11 and step.old is False


def test_trainer_and_sampler_apart_stop_before_the_first_update():
    step = Step((0.5, 1.0, 0.2))
    with pytest.raises(MismatchError, match=r"up to 0.2, more than grpo.tolerance=0.0001"):
        passes.learn(step, 0, None, batches(), 1e-4, passes=2)
    assert step.updates == 0
    assert passes.learn(Step((0.5, 1.0, 0.2)), 0, None, batches(), None, passes=1)[0] == 1


@pytest.mark.parametrize("bad", [(NAN, 1.0, 0.0), (0.5, NAN, 0.0), (float("inf"), 1.0, 0.0)])
def test_a_loss_or_gradient_that_is_no_number_is_not_applied_and_names_the_microbatch(bad):
    step = Step(bad, GOOD, bad)
    state, _, trouble = passes.learn(step, 10, None, batches(), 1e-4, passes=1)
    assert state == 10 and step.updates == 0
    assert "microbatch 2 (tokens 5) of 2" in trouble and "optim.lr" in trouble
    step = Step(GOOD, bad, GOOD, GOOD)  # in the second pass; no microbatch alone
    state, _, trouble = passes.learn(step, 10, None, batches(), 1e-4, passes=2)
    assert state is None and "microbatch none alone of 2" in trouble  # the one before is used up


def test_masks_that_are_not_what_was_sampled_are_refused():
    rows = [to_row([Piece([1, 2], "world"), Piece([3, 4], "policy", [-1.0, -1.0])])]
    size = BatchConfig(rows=1, length=8)
    assert len(grpo.batches_of(rows, size, 2.0)) == 1
    with pytest.raises(ValueError, match="hold 2 tokens, but its rollouts sampled 3"):
        grpo.batches_of(rows, size, 3.0)


def test_a_step_that_explodes_keeps_the_last_good_state_and_the_run_goes_on_from_it(
    tmp_path, capsys
):
    config, workdir = small.config(tmp_path, "grpo", steps=5), tmp_path / "run"
    flags = [
        f"--config={config}",
        f"--workdir={workdir}",
        f"--config.env.taskset={small.__file__}:Explosive",
        "--config.train.save_every=5",
        "--config.grpo.algorithm=grpo",
        "--config.grpo.norm.std=none",
        "--config.grpo.passes=2",
        "--config.grpo.correction.kind=truncate",
        "--config.grpo.curriculum.high=1.0",
        "--config.grpo.solved=2.0",
    ]
    assert cli.main(["grpo", *flags]) == 2
    said = capsys.readouterr().err
    assert "step 4: the loss is" in said and "microbatch 1 (tokens" in said
    assert [row["step"] for row in read_metrics(workdir / "metrics.jsonl")] == [1, 2, 3]
    saved = json.loads((workdir / "config.json").read_text())["config"]["grpo"]
    assert saved["kl"] == {"kind": "k3", "coef": 0.04}  # what the algorithm stands for
    assert cli.main(["grpo", *flags]) == 0  # from step 3: the judge is itself for three more
    rows = read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for row in rows:
        assert row["train/max_logp_diff"] < 1e-4 and row["train/ess"] == pytest.approx(1, abs=1e-3)
        assert row["train/kl"] >= 0 and row["train/corrected"] == 0
        assert row["train/max_prob_diff"] < 1e-4 and row["grpo/void_rollouts"] == 0
    assert rows[-1]["train/lr"] > 0 and np.isclose(rows[-1]["grpo/epochs"], 20 / 16)
