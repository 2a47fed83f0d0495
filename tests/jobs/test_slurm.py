"""The files for Slurm in a real Slurm: the test job, several nodes, signals, preemption,
cancelling."""

import json
import os
import sys

import pytest
from jobs import cluster
from jobs.scripts import LAUNCH, ROOT, stand_in
from run import small

from jaxdeep.metrics import read_metrics

pytestmark = pytest.mark.slow

# Counts in the workdir until it is told to stop, and goes on from there.
COUNT = """
dir=${!#} dir=${dir#--workdir=} own=$dir/$SLURM_PROCID told=
n=$(cat "$own" 2>/dev/null || echo 0)
trap told=1 TERM
echo "$SLURM_PROCID of $SLURM_NTASKS from $n ${JAX_COORDINATOR_ADDRESS:+as $JAX_PROCESS_ID of $JAX_NUM_PROCESSES}"
until ((n == $1)) || [[ $told ]]; do ((n += 1)); sleep 0.1; done
echo "$n" >"$own"
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if why := cluster.lacking():
        pytest.skip(why)
    with cluster.Slurm(tmp_path_factory.mktemp("slurm") / "s") as up:
        yield up


@pytest.fixture
def job(slurm, tmp_path):
    """A function that submits COUNT by the repository's file; it returns the job's number."""
    (tmp_path / "count.sh").write_text(COUNT)

    def submit(*flags, last=1000, **env):
        words = ["launch/slurm/train.sbatch", "bash", f"{tmp_path}/count.sh", str(last)]
        out = f"--output={tmp_path}/job.log"
        done = slurm.ask("env", "-C", ROOT, "sbatch", "--parsable", out, *flags, *words, **env)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    slurm_env = {"WORKDIR": f"{tmp_path}/a run", "SCRATCH": str(tmp_path)}
    return lambda *flags, **more: submit(*flags, **(slurm_env | more))


def printed(tmp_path):
    path = tmp_path / "job.log"
    return path.read_text() if path.exists() else ""


def test_two_steps_then_more_then_on(slurm, tmp_path):
    env = small.ALONE | {"SCRATCH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    env["JAX_COMPILATION_CACHE_DIR"] = ""  # the one under SCRATCH, not the suite's
    stand_in(tmp_path / "venv/bin", "python", f'exec {sys.executable} "$@"')
    run = tmp_path / "runs/test"

    def steps(count):
        say = {"STEPS": str(count), "VENV": str(tmp_path / "venv")}
        done = slurm.ask("bash", str(LAUNCH / "slurm/test.sh"), **env | say)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{count}/{count}" in done.stdout
        return [row["step"] for row in read_metrics(run / "metrics.jsonl")]

    assert steps(2) == [1, 2]
    first = (run / "metrics.jsonl").read_text()
    assert os.path.isdir(run / "checkpoints/2") and (tmp_path / "jaxdeep-cache/xla").is_dir()
    assert steps(3) == [1, 2, 3]  # it went on: the first rows are the same to the second
    assert (run / "metrics.jsonl").read_text().startswith(first)
    assert json.loads((run / "config.json").read_text())


def submitted(slurm, tmp_path, verb, steps, *flags):
    """The number of a job that runs a verb on the smallest model."""
    stand_in(tmp_path / "venv/bin", "python", f'exec {sys.executable} "$@"')
    env = {"WORKDIR": f"{tmp_path}/run", "SCRATCH": str(tmp_path), "VENV": f"{tmp_path}/venv"}
    config = small.config(tmp_path, verb, steps=steps)
    words = ["launch/slurm/train.sbatch", "python", "-m", "jaxdeep", verb, f"--config={config}"]
    out = f"--output={tmp_path}/job.log"
    done = slurm.ask(
        *("env", "-C", ROOT, "sbatch", "--parsable", out, *flags, *words),
        **(small.ALONE | env),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_two_nodes_train_one_adapter(slurm, tmp_path):
    number = submitted(slurm, tmp_path, "sft", 2, "--nodes=2")
    slurm.wait(lambda: slurm.state(number) not in ("PENDING", "RUNNING", "COMPLETING"), 300)
    assert slurm.state(number) == "COMPLETED", printed(tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl")] == [1, 2]
    assert (tmp_path / "run/checkpoints/2").is_dir() and (tmp_path / "run/process-1").is_dir()


def test_grpo_told_to_stop_goes_on(slurm, tmp_path):
    """The whole way: Slurm's signal, a checkpoint, the queue, the same command, no step twice."""
    number, workdir = submitted(slurm, tmp_path, "grpo", 40), tmp_path / "run"
    metrics = workdir / "metrics.jsonl"
    slurm.wait(lambda: metrics.exists() and len(read_metrics(metrics)) >= 3, 300)
    slurm.ask("scancel", "--signal=TERM", number)
    slurm.wait(lambda: slurm.state(number) == "PENDING")
    done = read_metrics(metrics)[-1]["step"]
    assert f"terminated after step {done}, which is saved" in printed(tmp_path)
    assert done < 40 and (workdir / f"checkpoints/{done}").is_dir()
    slurm.begin(number)
    slurm.wait(lambda: slurm.state(number) == "COMPLETED", 300)
    assert [row["step"] for row in read_metrics(metrics)] == list(range(1, 41))


def test_a_failure_ends_the_job(slurm, tmp_path):
    env = {"WORKDIR": str(tmp_path / "run"), "SCRATCH": str(tmp_path)}
    words = ["launch/slurm/train.sbatch", "bash", "-c", "exit 3"]
    out = f"--output={tmp_path}/job.log"
    done = slurm.ask("env", "-C", ROOT, "sbatch", "--wait", "--parsable", out, *words, **env)
    assert done.returncode == 3 and slurm.state(done.stdout.strip()) == "FAILED"


def test_told_to_stop_it_saves_and_goes_on(slurm, job, tmp_path):
    number = job("--nodes=2")
    slurm.wait(lambda: printed(tmp_path).count("from 0") == 2)
    assert "1 of 2 from 0 as 1 of 2" in printed(tmp_path)
    slurm.ask("scancel", "--signal=TERM", number)
    slurm.wait(lambda: slurm.state(number) == "PENDING")
    saved = [(tmp_path / f"a run/{n}").read_text().strip() for n in (0, 1)]
    assert all(int(n) > 0 for n in saved)
    slurm.begin(number)
    slurm.wait(lambda: f"0 of 2 from {saved[0]} " in printed(tmp_path))
    slurm.ask("scancel", number)  # now for good
    slurm.wait(lambda: not slurm.ask("squeue", "-h").stdout)
    assert slurm.state(number) == "CANCELLED"


def test_near_the_end_of_its_time_it_goes_back_to_the_queue(slurm, job, tmp_path):
    number = job("--time=2", "--signal=TERM@50")  # Slurm signals up to a minute too early
    slurm.wait(lambda: slurm.state(number) == "PENDING" and "from 0" in printed(tmp_path), 110)
    assert int((tmp_path / "a run/0").read_text()) > 0


def test_preempted_it_saves_and_waits(slurm, job, tmp_path):
    number = job("--nodes=2", "--exclusive")
    slurm.wait(lambda: printed(tmp_path).count("from 0") == 2)
    urgent = slurm.ask(
        *("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive"),
        *(f"--output={tmp_path}/urgent.log", "--wrap=srun hostname"),
    ).stdout.strip()
    slurm.wait(lambda: slurm.state(urgent) == "COMPLETED")
    assert slurm.state(number) == "PENDING"
    assert all(int((tmp_path / f"a run/{n}").read_text()) > 0 for n in (0, 1))


def test_in_a_container(slurm, job, tmp_path):
    stand_in(
        tmp_path / "bin",
        "apptainer",
        f'printf "%s|" "$@" >"{tmp_path}/asked"; while [[ $1 != *.sif ]]; do shift; done\n'
        'shift; exec "$@"',
    )
    path = f"{tmp_path / 'bin'}:{slurm.env['PATH']}"
    number = job("--wait", last=3, IMAGE=f"{tmp_path}/jaxdeep.sif", PATH=path)
    assert slurm.state(number) == "COMPLETED"
    asked = (tmp_path / "asked").read_text().split("|")
    assert asked[:2] == ["exec", "--bind"] and f"{tmp_path}/jaxdeep.sif" in asked
    assert (tmp_path / "a run/0").read_text() == "3\n"
