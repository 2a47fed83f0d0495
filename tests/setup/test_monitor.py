"""What a run says of itself: where its time goes, how much of the devices it uses, a profiler
window."""

import types

import jax
import numpy as np
import pytest

from jaxdeep.errors import ConfigError
from jaxdeep.metrics import read_metrics
from jaxdeep.setup import monitor


def mesh(kind="cpu", count=2):
    one = types.SimpleNamespace(device_kind=kind)
    return types.SimpleNamespace(devices=np.array([one] * count))


def test_where_time_goes_is_one_line():
    times = [
        {"time/total": 10.0, "time/rollout": 6.0, "time/rollout/tools": 2.0, "time/train": 3.0},
        {"time/total": 10.0, "time/rollout": 5.0, "time/train": 4.0, "time/eval": 2.0},
    ]
    assert monitor.spent(times) == (
        "10 s a step over 2: rollout 55 % (tools 10 %), train 35 %, eval 10 %, other 0 %"
    )


def test_it_is_said_every_so_often_and_at_the_end(tmp_path, capsys):
    settings = monitor.LogConfig(every=2)
    with monitor.Monitor(tmp_path, step=3, mesh=mesh(), settings=settings) as metrics:
        for step in range(4, 9):
            metrics.write(step, {"time/train": 1e-9})
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" ")[0:2] for line in said] == [
        ["step", "5:"],
        ["step", "7:"],
        ["the", "run:"],
    ]
    assert "over 2" in said[0] and "over 5" in said[-1] and "train 0 %" in said[0]


def test_use_of_the_devices_is_counted_where_their_peak_is_known(tmp_path):
    row = {"train/flops": 989.4e12, "time/train": 4.0}
    for name, kind in (("gpu", "NVIDIA H100 80GB HBM3"), ("cpu", "cpu")):
        with monitor.Monitor(tmp_path / name, step=0, mesh=mesh(kind)) as metrics:
            metrics.write(1, row)
            metrics.write(2, {"reward/mean": 1.0})  # a step that trained on nothing
    first, second = read_metrics(tmp_path / "gpu" / "metrics.jsonl")
    assert first["mfu"] == pytest.approx(1 / 8) and "mfu" not in second
    assert "mfu" not in read_metrics(tmp_path / "cpu" / "metrics.jsonl")[0]
    assert len(list((tmp_path / "cpu" / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize(
    ("steps", "done", "watched"),
    [("3:4", 0, [3, 4]), ("2", 0, [2]), (2, 0, [2]), ("", 0, []), ("2:9", 3, [4, 5]), ("1", 3, [])],
)
def test_the_profiler_watches_its_window(steps, done, watched, tmp_path, monkeypatch):
    on, seen, where = [False], [], []

    def start(path):
        where.append(path)
        on[0] = True

    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: on.__setitem__(0, False))
    profile = monitor.ProfileConfig(steps)
    with monitor.Monitor(tmp_path, step=done, mesh=mesh(), profile=profile) as metrics:
        for step in range(done + 1, 6):
            seen += [step] * on[0]
            metrics.write(step, {})
    assert seen == watched and not on[0]
    assert where == [str(tmp_path / "profile")] * bool(watched)


@pytest.mark.parametrize("steps", ["ten", "3:1", "0:2", "-1", "1:x"])
def test_a_window_that_is_none_is_refused(steps):
    with pytest.raises(ConfigError, match="is not like 10:12"):
        monitor.ProfileConfig(steps)
