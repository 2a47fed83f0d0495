"""What a run says when it goes on, and what may not have changed."""

import json

import pytest
from run import small
from run.small import described, made, typed

from jaxdeep.errors import CheckpointError
from jaxdeep.setup import resume
from jaxdeep.setup.tasksets import load_config

ALLOWED = {
    "optim.lr=0.5": "optim.lr 0.001 -> 0.5",
    "train.steps=9": "train.steps 4 -> 9",
    "train.start=other": "train.start  -> other",
    "env.k=3": "env.k 1 -> 3",
    "model.path={tmp}/copy": "model.path {tmp}/model -> {tmp}/copy",
    "grpo.algorithm=dr_grpo": "grpo.algorithm default -> dr_grpo",
    "rollout.limits.max_turns=2": "rollout.limits.max_turns 3 -> 2",
    "log.wandb=mine": "log.wandb  -> mine",
}
REFUSED = {
    "model.thinking=write": "model.thinking=none there, write here",
    "model.tools_in_prompt=True": "model.tools_in_prompt=False there, True here",
    "model.dtype=bfloat16": "model.dtype=float32 there, bfloat16 here",
    "lora.rank=8": "lora.rank=4 there, 8 here",
    "lora.targets=('wq',)": "lora.targets=[",
    "optim.name=muon": "optim.name=adamw there, muon here",
    "train.seed=7": "train.seed=0 there, 7 here",
    "grpo.passes=2": "grpo.passes=1 there, 2 here",
}


def changed(tmp_path, *overrides):
    flags = [f"--config.{o.format(tmp=tmp_path)}" for o in overrides]
    run = typed("grpo", load_config(small.config(tmp_path, "grpo"), flags))
    return resume.compare(run, tmp_path / "run")


@pytest.fixture
def place(tmp_path):
    made(tmp_path, "grpo", "run")
    (tmp_path / "copy").symlink_to(tmp_path / "model")
    return tmp_path


def test_nothing_is_said_of_a_run_that_begins_or_goes_on_unchanged(place):
    run = typed("grpo", load_config(small.config(place, "grpo")))
    assert resume.compare(run, place / "nowhere") == [] == changed(place)


@pytest.mark.parametrize("override", ALLOWED)
def test_what_has_changed_is_named_old_and_new(override, place):
    assert ALLOWED[override].format(tmp=place) in changed(place, override)


@pytest.mark.parametrize("override", REFUSED)
def test_what_may_not_change_is_refused_with_key_and_values(override, place):
    with pytest.raises(CheckpointError) as refused:
        changed(place, "optim.lr=0.5", override)
    said = str(refused.value)
    assert REFUSED[override] in said and "optim.lr" not in said and "\n" not in said
    assert "--config.train.start" in said


def test_settings_that_an_older_record_lacks_are_no_changes(place):
    file = place / "run" / "checkpoints" / "2" / "about" / "metadata"
    about = json.loads(file.read_text())
    del about["run"]["references"], about["run"]["config"]["model"]["quant"]
    file.write_text(json.dumps(about))
    assert changed(place) == []


def test_the_newest_description_that_can_be_read_counts(place):
    described(place / "run", 4, None)
    (place / "run" / "checkpoints" / "4" / "about" / "metadata").write_text('{"run": {"config"')
    assert changed(place, "optim.lr=0.5") == ["optim.lr 0.001 -> 0.5"]


@pytest.mark.parametrize(
    ("done", "steps", "changes", "lines"),
    [
        (0, 5, [], []),
        (2, 5, [], ["goes on from step 2 of 5"]),
        (2, 5, ["a 1 -> 2"], ["goes on from step 2 of 5", "changed since: a 1 -> 2"]),
        (5, 5, [], ["step 5 of 5 is done: nothing is left to do (train.steps=5)"]),
        (7, 5, [], ["step 7 is done, beyond train.steps=5: nothing is left to do"]),
    ],
)
def test_a_run_says_where_it_goes_on(done, steps, changes, lines, capsys):
    resume.tell(done, steps, changes)
    assert capsys.readouterr().err.splitlines() == lines
