"""The learning study: what a row changes, what is shared, and what the table says of runs that are
there."""

import json
import pathlib
import sys

import pytest

from jaxdeep import config as configs
from jaxdeep.agent import record
from jaxdeep.eval import statistics
from jaxdeep.rl import algorithms
from jaxdeep.run import quickstart
from jaxdeep.setup.runs import EvalRun, GrpoRun, SftRun
from jaxdeep.setup.sections import load_run
from jaxdeep.types import Stop, Task, Trajectory

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "bench"))
import study


def evaluated(place, right):
    seen = [
        Trajectory(Task(str(n), "?"), stop=Stop.FINISHED, rewards={"answer": float(worth)})
        for n, worth in enumerate(right)
    ]
    record.write(place / "eval.jsonl", seen)


def ran(out, row, seed, before, after):
    """A finished run, as the verbs leave it."""
    place = out / row / str(seed)
    evaluated(out / "sft" / f"s{seed}" / "test", before)
    evaluated(place / "test", after)
    (place / "sft").write_text(f"sft/s{seed}")
    (place / "metrics.jsonl").write_text('{"step": 1, "time/train": 60.0, "time/total": 90.0}\n')


def test_the_table_of_what_is_there(tmp_path, capsys, monkeypatch):
    ran(tmp_path, "maze/default", 0, [0] * 10, [1] * 6 + [0] * 4)
    ran(tmp_path, "maze/default", 1, [0] * 10, [1] * 8 + [0] * 2)
    ran(tmp_path, "maze/gspo", 1, [0] * 10, [0] * 7 + [1] * 3)
    evaluated(tmp_path / "search/default/0/other", [1])  # not finished
    monkeypatch.setattr(study, "run", lambda *run: pytest.fail(f"{run} again"))
    study.main([f"--out={tmp_path}", "--rows=maze/default", "--seeds=0,1"])
    base, gspo = json.loads((tmp_path / "study.json").read_text())
    assert (base["row"], base["seeds"], base["each"]) == ("maze/default", 2, {"0": 0.6, "1": 0.8})
    assert (base["em_low"], base["em_high"]) == statistics.student([0.6, 0.8]) and "p" not in base
    assert (gspo["em_low"], gspo["em_high"]) == statistics.wilson(3, 10)
    assert gspo["difference"] == pytest.approx(-0.5) and gspo["minutes"] == 1.5
    assert gspo["p"] == statistics.mcnemar([True] * 8 + [False] * 2, [False] * 7 + [True] * 3)
    shown = capsys.readouterr().out
    assert "maze/gspo" in shown and max(map(len, shown.splitlines())) <= 100


def test_only_what_is_missing_is_run_and_nothing_begins_after_the_time(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(study, "run", lambda config, out, row, seed: begun.append((row, seed)))
    ran(tmp_path, "maze/default", 0, [0], [1])
    flags = [f"--out={tmp_path}", "--rows=maze/default,maze/rloo", "--seeds=0,1"]
    study.main([*flags, "--minutes=0"])
    assert begun == []
    study.main(flags)
    assert begun == [("maze/rloo", 0), ("maze/default", 1), ("maze/rloo", 1)]
    with pytest.raises(SystemExit):
        study.main(["--rows=maze/nothing"])


def test_rows_of_one_adapter_shape_share_their_sft(tmp_path):
    places = {
        (row, seed): study.shared_sft(study.configuration(row, seed), tmp_path)
        for row in study.CHANGES
        for seed in (0, 1)
    }
    assert places["search/default", 0] == places["search/retry", 0] == places["search/gspo", 0]
    assert places["search/default", 0] != places["search/default", 1]
    assert len(set(places.values())) == 2 * (1 + 4 + 1)  # ranks 16, 1, 8, 64, all; maze


@pytest.mark.parametrize("row", study.CHANGES)
def test_every_row_is_a_configuration_that_the_verbs_take(row):
    config = study.configuration(row, 2)
    assert load_run(SftRun, config.sft).train.seed == 2
    run = load_run(GrpoRun, algorithms.expand(config.grpo))
    assert run.train.seed == 2 and run.grpo.eval_every == 0
    name = row.split("/")[1]
    assert run.grpo.algorithm == (name if name in study.ALGORITHMS else "default")
    start = quickstart.go_on(config, pathlib.Path("there"))
    test = load_run(EvalRun, quickstart.test_config(config, start))
    assert (start or test.model.path) == ("there" if start else "there/model")
    assert bool(start) == row.startswith("search")
    assert test.env.count >= 200 or test.env.settings.number >= 200


def test_a_change_of_the_command_line_goes_over_a_rows(tmp_path):
    config = study.configuration("search/full", 0, ["--config.grpo.optim.lr=0.5"])
    assert config.grpo.optim.lr == 0.5 and config.grpo.lora.rank == 0
    assert isinstance(config, configs.ConfigDict)
