"""The scripts for TPU VMs against a cloud of folders: what they send really runs, on two workers,
until the TPU is taken back, and then goes on."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from jobs.scripts import LAUNCH, stand_in

PATIENCE = 240.0  # seconds: the machine may be busy

# Counts until the file `finish` is there, saves every second number, and goes on from what it has
# saved; fails once where the file `fail` is there.
COUNT = """
import os, pathlib, signal, sys, time
runs = pathlib.Path(sys.argv[-1].removeprefix("--workdir="))
own, told = runs / pathlib.Path.home().name, []
own.mkdir(parents=True, exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
n = int((own / "saved").read_text()) if (own / "saved").exists() else 0
place = [os.environ[f"JAX_{x}"] for x in ("COORDINATOR_ADDRESS", "PROCESS_ID", "NUM_PROCESSES")]
print("from", n, *place, flush=True)
while not ((runs / "finish").exists() or told):
    time.sleep(0.1)
    n += 1
    with (own / "steps").open("a") as file:
        file.write(f"{n}\\n")
    if n % 2 == 0:
        (own / "saved").write_text(str(n))
    if (runs / "fail").exists() and not (own / "failed").exists():
        (own / "failed").touch()
        sys.exit(1)
(own / "saved").write_text(str(n))
"""


class Cloud:
    """The cloud, and the repository that is sent to it."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.tpus, self.repo, self.runs = folder / "tpus", folder / "repo", folder / "a run"
        self.started: list[subprocess.Popen] = []
        self.tpus.mkdir()
        (self.tpus / "asked").touch()
        shutil.copytree(LAUNCH, self.repo / "launch")
        (self.repo / "count.py").write_text(COUNT)
        git = ["git", "-C", self.repo, "-c", "user.name=a", "-c", "user.email=b"]
        for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
            subprocess.run([*git, *words], check=True)
        fake = pathlib.Path(__file__).with_name("gcloud.py")
        stand_in(folder / "bin", "gcloud", f'exec {sys.executable} -IS {fake} "$@"')
        # the installer makes a Python that is this one
        stand_in(
            folder / "bin",
            "uv",
            '[[ $1 == pip ]] && exit; mkdir -p "${!#}/bin"\n'
            f'printf \'#!/bin/sh\\nexec {sys.executable} -IS "$@"\' >"${{!#}}/bin/python"\n'
            'chmod +x "${!#}/bin/python"',
        )
        # and the metadata of a TPU VM speaks of two workers
        stand_in(
            folder / "bin",
            "curl",
            "case ${!#} in *number) echo ${HOME##*-} ;; *points) echo a:1:10.0.0.1,b:2:10.0.0.2 ;;\n"
            "*tpu-env) echo \"ZONE: 'zone-a'\" ;; *) exit 22 ;; esac",
        )
        self.env = {
            **{"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HOME": str(folder)},
            **{"TMPDIR": str(folder), "FAKE_TPUS": str(self.tpus), "FAKE_WORKERS": "2"},
            **{"NAME": "pod", "ZONE": "zone-a", "WORKDIR": str(self.runs), "PAUSE": "0.1"},
        }

    def start(self, script: str, *words: str) -> subprocess.Popen:
        process = subprocess.Popen(
            ["bash", self.repo / "launch/tpu" / script, *words],
            env=self.env,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(process)
        return process

    def call(self, script: str, *words: str) -> str:
        process = self.start(script, *words)
        said = process.communicate(timeout=PATIENCE)[0]
        assert process.returncode == 0, said
        return said

    def asked(self, what: str) -> int:
        return (self.tpus / "asked").read_text().split().count(what)

    def steps(self, worker: int) -> list[int]:
        path = self.runs / f"worker-{worker}/steps"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def wait(self, ready) -> None:
        end = time.monotonic() + PATIENCE
        while not ready():
            assert time.monotonic() < end
            time.sleep(0.05)

    def advance(self) -> None:
        """Until both workers are three steps further."""
        before = [len(self.steps(worker)) for worker in (0, 1)]
        self.wait(lambda: all(len(self.steps(w)) >= before[w] + 3 for w in (0, 1)))


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    for process in cloud.started:
        process.kill()
    for pid in cloud.tpus.glob("pod/worker-*/.jaxdeep/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


def preempt(cloud: Cloud) -> None:
    code = "import gcloud; gcloud.take_back(gcloud.CLOUD / 'pod')"
    (cloud.tpus / "pod/state").write_text("SUSPENDED")
    subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | cloud.env | {"PYTHONPATH": os.path.dirname(__file__)},
        check=True,
    )


@pytest.mark.slow
def test_created_set_up_run_stopped_and_run_again(cloud):
    cloud.env["PREPARE"] = "echo ${HOME##*-} >number"
    for script in ("create.sh", "setup.sh"):
        cloud.call(script)
    assert [(cloud.tpus / f"pod/worker-{n}/number").read_text() for n in (0, 1)] == ["0\n", "1\n"]
    command = ["python", "count.py"]
    cloud.call("run.sh", *command)
    cloud.advance()  # the scripts are long at their end, and it goes on
    busy = cloud.start("run.sh", *command)
    assert "running here already" in busy.communicate()[0] and busy.returncode != 0
    cloud.call("stop.sh")
    for worker in (0, 1):
        home = cloud.tpus / f"pod/worker-{worker}"
        assert (home / ".jaxdeep/status").read_text() == "143\n"
        assert (cloud.runs / f"worker-{worker}/saved").read_text() == str(cloud.steps(worker)[-1])
    cloud.call("run.sh", *command)
    cloud.advance()
    said = cloud.call("logs.sh", "-n", "9")
    assert "from 0 10.0.0.1:8476 0 2\n" in said and said.count("from ") == 2
    cloud.call("stop.sh")
    for worker in (0, 1):  # no step twice, none left out
        assert cloud.steps(worker) == list(range(1, len(cloud.steps(worker)) + 1))
    cloud.call("stop.sh", "--delete")
    assert not (cloud.tpus / "pod").exists()


def test_kept_through_a_preemption_and_a_failure(cloud):
    keep = cloud.start("keep.sh", "python", "count.py")
    cloud.advance()
    preempt(cloud)
    cloud.wait(lambda: cloud.asked("create") == 2)
    cloud.advance()
    (cloud.runs / "fail").touch()
    cloud.wait(lambda: all((cloud.runs / f"worker-{n}/failed").exists() for n in (0, 1)))
    cloud.advance()
    (cloud.runs / "finish").touch()
    said = keep.communicate(timeout=PATIENCE)[0]
    assert keep.returncode == 0, said
    assert cloud.asked("create") == 2 and "SUSPENDED" in said and "exited 1" in said
    for worker in (0, 1):
        steps = cloud.steps(worker)
        assert set(steps) == set(range(1, steps[-1] + 1))
        assert len(steps) <= steps[-1] + 3  # what was not saved is done again
    assert not (cloud.tpus / "pod").exists()


def log_of(cloud):
    """What keep.sh brought here of the workers' logs."""
    return (cloud.folder / "jaxdeep-pod.log").read_text()


@pytest.mark.parametrize(
    "command, says, told",
    [
        (["python", "-c", "print('no such key'); raise SystemExit(2)"], "cannot be run", "no such"),
        pytest.param(["none", "--x"], "cannot be run", "cannot run", marks=pytest.mark.slow),
        pytest.param(
            ["python", "-c", "raise SystemExit(3)"], "exited 3, 2 times", "", marks=pytest.mark.slow
        ),
    ],
    ids=["status 2", "no such command", "fails again and again"],
)
def test_what_cannot_succeed_leaves_nothing_that_bills(command, says, told, cloud):
    cloud.env["RETRIES"] = "2"
    keep = cloud.start("keep.sh", *command)
    said = keep.communicate(timeout=PATIENCE)[0]
    assert keep.returncode == 2 and says in said and "jaxdeep-pod.log" in said
    assert told in log_of(cloud) and log_of(cloud).count("==> ") == 0
    assert not (cloud.tpus / "pod").exists()
    assert cloud.asked("create") == cloud.asked("delete") == 1


@pytest.mark.slow
def test_a_tpu_that_is_to_stay_is_said_to_bill(cloud):
    cloud.env["KEEP"] = "1"
    stop = ["python", "-c", "raise SystemExit(2)"]
    said = cloud.start("keep.sh", *stop).communicate(timeout=PATIENCE)[0]
    assert (cloud.tpus / "pod").exists() and cloud.asked("delete") == 0
    assert "it bills: NAME=pod ZONE=zone-a QUEUED=1 launch/tpu/stop.sh --delete" in said
    # the next command is tried, whatever became of the one before
    done = cloud.start("keep.sh", "python", "-c", "pass").communicate(timeout=PATIENCE)[0]
    assert not (cloud.tpus / "pod").exists(), done


@pytest.mark.parametrize(
    "words, env, says",
    [
        (
            ["bash", "launch/recipes/none.sh"],
            {},
            "launch/recipes/none.sh is not in the last commit",
        ),
        (["python", "later.py"], {}, "later.py is not in the last commit"),
        (["python", "count.py", "--config.env.corpus=docs/"], {}, "docs is not in the last commit"),
        (["python", "count.py"], {"TPU": "tpu7x-8"}, "launch/gke has TPU7x"),
        (
            ["python", "count.py"],
            {"FAKE_ERROR": "INVALID_ARGUMENT: no such type"},
            "cannot be created",
        ),
    ],
)
def test_what_can_never_run_is_told_before_there_is_a_tpu(words, env, says, cloud):
    (cloud.repo / "docs").mkdir()
    for name in ("later.py", "docs/a.md"):
        (cloud.repo / name).write_text("not committed")
    cloud.env |= env
    keep = cloud.start("keep.sh", *words)
    said = keep.communicate(timeout=PATIENCE)[0]
    assert keep.returncode == 2 and says in said
    assert not (cloud.tpus / "pod").exists() and cloud.asked("ssh") == 0


def test_no_room_now_is_asked_for_again(cloud):
    cloud.env["FAKE_ERROR"] = "RESOURCE_EXHAUSTED: no capacity"
    keep = cloud.start("keep.sh", "python", "count.py")
    cloud.wait(lambda: cloud.asked("create") >= 3)
    assert keep.poll() is None


@pytest.mark.slow
def test_a_new_tpu_that_is_not_reached_is_deleted_a_used_one_is_not(cloud):
    cloud.env |= {"SILENT": "2"}
    keep = cloud.start("keep.sh", "python", "count.py")
    cloud.advance()
    (cloud.tpus / "unreachable").touch()
    asked = cloud.asked("ssh")
    cloud.wait(lambda: cloud.asked("ssh") > asked + 5)
    assert keep.poll() is None and (cloud.tpus / "pod").exists()
    keep.terminate()
    assert "pod was not reached 2 times; it bills" in keep.communicate(timeout=PATIENCE)[0]
    cloud.call("stop.sh", "--delete")
    said = cloud.start("keep.sh", "python", "count.py").communicate(timeout=PATIENCE)[0]
    assert "pod: not reached" in said and not (cloud.tpus / "pod").exists()
