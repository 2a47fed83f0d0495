"""A run's folder says what it was configured with, and its policy is used as it was trained."""

import json
import os
import pathlib

import pytest
from run import small
from run.small import described, made, typed

from jaxdeep import config as configs
from jaxdeep.errors import CheckpointError, ConfigError
from jaxdeep.run import quickstart
from jaxdeep.setup import past
from jaxdeep.setup.runs import EvalRun, GrpoRun
from jaxdeep.setup.sections import load_run
from jaxdeep.setup.tasksets import load_config, override
from jaxdeep.workdir import Workdir


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("search/sft", "sft"),
        ("search/grpo", "grpo"),
        ("search/eval", "eval"),
        ("toy/tiny_base", "sft"),
    ],
)
@pytest.mark.parametrize("by", ["folder", "file"])
def test_what_a_run_wrote_down_is_its_configuration(file, kind, by, tmp_path):
    config = load_config(f"configs/{file}.py", ["--config.lora.alpha=3.0"])
    run = typed(kind, config)
    configs.save(config, run, tmp_path, ["jaxdeep", kind])
    name = str(tmp_path if by == "folder" else tmp_path / "config.json")
    assert typed(kind, load_config(name)) == run
    assert typed(kind, load_config(name, ["--config.train.seed=5"])).train.seed == 5


def test_a_record_holds_defaults_and_settings_that_follow_others(tmp_path):
    run = made(tmp_path, "grpo", "run", "--config.grpo.algorithm=dapo")
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["config"]["model"]["tools_in_prompt"] is False
    assert record["config"]["optim"]["b2"] == run.optim.b2 and "dev" in record["config"]
    assert record["folder"] == os.getcwd()
    config = load_config(str(tmp_path / "run"), ["--config.train.steps=77"])
    assert config.optim.steps == 77 and config.grpo.clip.high == run.grpo.clip.high


def test_another_algorithm_takes_the_place_of_what_the_old_one_set(tmp_path, capsys):
    made(tmp_path, "grpo", "run", "--config.grpo.algorithm=dapo", "--config.grpo.clip.low=0.11")
    there = typed("grpo", load_config(str(tmp_path / "run"), ["--config.grpo.algorithm=gspo"]))
    fresh = typed(
        "grpo",
        load_config(
            small.config(tmp_path, "grpo"),
            ["--config.grpo.algorithm=gspo", "--config.grpo.clip.low=0.11"],
        ),
    )
    assert there.grpo == fresh.grpo


def test_a_quickstart_is_its_own_configuration_and_is_compared_setting_by_setting(tmp_path):
    config = load_config("configs/search/quickstart.py")
    stages = quickstart.stages_of(config)
    quickstart.same_run(config, stages, tmp_path)
    again = load_config(str(tmp_path), ["--config.seed=0"])
    quickstart.same_run(again, quickstart.stages_of(again), tmp_path)
    other = load_config(str(tmp_path), ["--config.seed=4", "--config.test.k=2"])
    assert other.sft.train.seed == other.grpo.train.seed == 4
    with pytest.raises(ConfigError, match=r"grpo.train.seed=0 there, 4 here.*test.k=1 there, 2 h"):
        quickstart.same_run(other, quickstart.stages_of(other), tmp_path)


def test_a_run_is_found_by_its_folder_and_by_its_checkpoints(tmp_path, monkeypatch):
    run = made(tmp_path, "grpo", "run")
    found = past.find(str(tmp_path / "run"))
    assert found.start == str(tmp_path / "run") and found.config == configs.plain(run)
    # its checkpoints alone, as in a bucket, and another workdir that only kept the record
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "checkpoints")
    alone = past.find(str(tmp_path))
    assert alone.start == str(tmp_path) and alone.trained == found.trained
    made(tmp_path, "sft", "kept", f"--config.train.checkpoints={tmp_path}", checkpoint=False)
    assert past.find(str(tmp_path / "kept")).start == str(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert past.find("~/run").trained == found.trained


def test_an_evaluation_leads_to_the_run_it_is_of(tmp_path):
    run = made(tmp_path, "grpo", "run")
    start = f"--config.train.start={tmp_path / 'run'}"
    made(tmp_path, "eval", "eval", start, "--config.env.k=4", checkpoint=False)
    found = past.find(str(tmp_path / "eval"))
    assert found.start == str(tmp_path / "run") and found.config["env"]["k"] == 4
    assert found.trained == configs.plain(run)


def test_a_quickstart_leads_to_its_last_stage_with_the_tasks_of_its_test(tmp_path):
    config = load_config("configs/search/quickstart.py")
    quickstart.same_run(config, quickstart.stages_of(config), tmp_path)
    with pytest.raises(ConfigError, match="has saved nothing yet"):
        past.find(str(tmp_path))
    for stage in ("sft", "grpo"):
        place = Workdir(tmp_path / stage)
        run = typed(stage, config[stage])
        described(place.path, 40, configs.save(config[stage], run, place.path, []))
        found = past.find(str(tmp_path))
        assert found.start == str(place.path) and configs.last_stage(tmp_path) == place.path
        policy = load_run(EvalRun, past.policy_config(str(tmp_path)))
        assert policy.env.settings.corpus == "all" and policy.env.settings.questions == "test"
        assert policy.model == run.model and policy.rollout.limits.max_tokens == 240
    said = past.differences(policy, found.trained)
    assert "env.corpus=all (trained with train)" in said


WRONG = {
    "nothing": ("nowhere", ConfigError, "there is no such run"),
    "a file": ("file", ConfigError, "there is no such run"),
    "an empty folder": ("empty", CheckpointError, "holds no checkpoints: is it the --workdir"),
    "a model": ("model", ConfigError, "that of a model, not of a run: name it by model.path"),
    "something else": ("other", ConfigError, "is not the configuration of a run"),
    "half a record": ("half", ConfigError, "cannot be read"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_run_is_refused_by_name(what, tmp_path):
    name, kind, says = WRONG[what]
    small.config(tmp_path, "sft")
    (tmp_path / "file").write_text("x")
    for folder, text in (("empty", None), ("other", "{}"), ("half", '{"config": {')):
        (tmp_path / folder).mkdir()
        if text:
            (tmp_path / folder / "config.json").write_text(text)
    with pytest.raises(kind, match=says):
        past.find(str(tmp_path / name))


def test_a_run_that_wrote_no_settings_down_needs_a_configuration(tmp_path):
    described(tmp_path, 2, None)
    assert past.find(str(tmp_path)).config is None
    with pytest.raises(ConfigError, match=r"give --config=FILE.py with --config.train.start="):
        past.policy_config(str(tmp_path))


def test_a_run_of_sft_gets_limits_from_its_rows(tmp_path, capsys):
    made(tmp_path, "sft", "run")
    run = load_run(EvalRun, past.policy_config(str(tmp_path / "run")))
    assert run.rollout.limits.max_tokens == 224 and run.train.start == str(tmp_path / "run")
    assert "rollout.limits.max_tokens=224" in capsys.readouterr().err


def test_every_difference_from_training_is_said_in_one_line(tmp_path, capsys):
    made(tmp_path, "grpo", "run")
    config = past.policy_config(str(tmp_path / "run"))
    past.start(EvalRun, config)
    assert capsys.readouterr().err == ""
    changes = {
        "model.thinking": "write",
        "model.tools_in_prompt": True,
        "env.k": 5,
        "env.system": "Stop.",
        "rollout.limits.max_calls": 1,
        "lora.alpha": 8.0,
    }
    others = {"model.chunk": 64, "env.count": 3, "rollout.slots": 16, "mesh.model": 2}
    flags = [f"--config.{key}={value}" for key, value in (changes | others).items()]
    past.start(EvalRun, override(config, flags))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("differs from the run: ") and "env.k=5 (trained with 1)" in line
    assert all(f"{key}={value} (trained with " in line for key, value in changes.items())
    assert line.count("trained with") == len(changes)


def test_the_best_of_nothing_is_refused(tmp_path):
    config = load_config(small.config(tmp_path, "eval"), ["--config.train.best=True"])
    with pytest.raises(ConfigError, match=r"train.best=True needs train.start"):
        past.start(EvalRun, config)


def test_another_task_set_is_one_difference(tmp_path, capsys):
    made(tmp_path, "grpo", "run")
    config = past.policy_config(str(tmp_path / "run"))
    past.start(EvalRun, override(config, ["--config.env.taskset=maze"]))
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "differs from the run: env.taskset=maze (trained with facts)"


def test_a_start_brings_what_a_configuration_leaves_open(tmp_path, capsys):
    settings = ("thinking", "tools_in_prompt", "remat")
    made(tmp_path, "sft", "run", "--config.env.k=3", "--config.lora.targets=('wq',)")
    config = load_config(small.config(tmp_path, "grpo"))
    with config.unlocked():
        for key in settings:
            del config.model[key]
        del config.lora
    config.env.system, config.train.start = "Other.", str(tmp_path / "run")
    config.lock()
    run = past.start(GrpoRun, config)
    assert run.model.thinking == "none" and not run.model.tools_in_prompt
    assert run.lora.targets == ("wq",) and run.lora.rank == 4
    assert run.env.settings.k == 1  # the file says so itself
    assert run.model.remat == "full"  # how fast, not what
    taken, differs = capsys.readouterr().err.splitlines()
    assert taken.startswith("taken from the run in") and taken.endswith(
        ": lora, model.thinking=none, model.tools_in_prompt=False"
    )
    assert differs == (
        "differs from the run: env.k=1 (trained with 3), env.system=Other. (trained with Go.)"
    )


def test_a_run_that_goes_on_keeps_what_it_took_and_does_not_read_its_start(tmp_path, capsys):
    config = load_config(small.config(tmp_path, "grpo"))
    with config.unlocked():
        del config.model.tools_in_prompt
    config.train.start = str(tmp_path / "gone")
    with pytest.raises(ConfigError, match="there is no such run"):
        past.start(GrpoRun, config, tmp_path / "run")
    made(tmp_path, "grpo", "run", f"--config.train.start={tmp_path / 'gone'}")
    run = past.start(GrpoRun, config, tmp_path / "run")
    assert run.model.tools_in_prompt is False
    assert capsys.readouterr().err == ""


def test_paths_of_a_run_are_read_from_where_it_was_started(tmp_path, monkeypatch, capsys):
    home = tmp_path / "home"
    (home / "docs").mkdir(parents=True)
    (home / "docs" / "a.md").write_text("x")
    (home / "q.jsonl").write_text('{"question": "Who?", "answer": "I"}')
    small.config(tmp_path, "sft")
    (tmp_path / "model").rename(home / "model")
    monkeypatch.chdir(home)
    flags = ["taskset=search", "corpus=docs/", "questions=q.jsonl"]
    flags = [f"--config.env.{flag}" for flag in flags] + ["--config.model.path=model"]
    made(home, "grpo", "run", *flags)
    monkeypatch.chdir(tmp_path)
    run = load_run(EvalRun, past.policy_config("home/run"))
    assert pathlib.Path(run.env.settings.corpus) == home / "docs"
    assert run.env.settings.questions == str(home / "q.jsonl")
    assert run.model.path == str(home / "model")
    said = capsys.readouterr().err.splitlines()[-1]
    where = "model.path, env.corpus, env.questions"
    assert said == f"read from {home}, where the run was started: {where}"
