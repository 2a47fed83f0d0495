"""The scripts for TPU VMs against a cloud of folders: what they send really runs, on two workers, until the
TPU is taken back, and then goes on."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from jobs.scripts import LAUNCH, ROOT, stand_in

# Counts, saves at every second number, and goes on from what it has saved.
COUNT = """
import os, pathlib, signal, sys, time
fail, last = sys.argv[1:3]
own = pathlib.Path(sys.argv[-1].removeprefix("--workdir=")) / pathlib.Path.home().name
own.mkdir(parents=True, exist_ok=True)
saved, told = own / "saved", []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
n = int(saved.read_text()) if saved.exists() else 0
place = [os.environ[f"JAX_{x}"] for x in ("COORDINATOR_ADDRESS", "PROCESS_ID", "NUM_PROCESSES")]
print("from", n, *place, flush=True)
while n < int(last):
    time.sleep(0.1)
    n += 1
    with (own / "steps").open("a") as file:
        file.write(f"{n}\\n")
    if n % 2 == 0 or told:
        saved.write_text(str(n))
    if told:
        sys.exit(0)
    if fail == str(n) and not (own / "failed").exists():
        (own / "failed").touch()
        sys.exit(1)
sys.exit(2 if fail == "never" else 0)
"""


class Cloud:
    """The cloud, and the repository that is sent to it."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.tpus, self.repo, self.runs = folder / "tpus", folder / "repo", folder / "a run"
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
        return subprocess.Popen(
            ["bash", self.repo / "launch/tpu" / script, *words],
            env=self.env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def call(self, script: str, *words: str) -> str:
        process = self.start(script, *words)
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 0, said
        return said

    def asked(self, what: str) -> int:
        return (self.tpus / "asked").read_text().split().count(what)

    def steps(self, worker: int) -> list[int]:
        path = self.runs / f"worker-{worker}/steps"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def wait(self, step: int) -> None:
        end = time.monotonic() + 60
        while min(map(len, (self.steps(0), self.steps(1)))) < step:
            assert time.monotonic() < end
            time.sleep(0.05)

    def log(self, worker: int) -> list[str]:
        return (self.tpus / f"pod/worker-{worker}/.jaxdeep/log").read_text().splitlines()


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
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
    for script in ("create.sh", "setup.sh"):
        cloud.call(script)
    command = ["python", "count.py", "no", "1000"]
    cloud.call("run.sh", *command)
    cloud.wait(3)  # the scripts are long at their end, and it goes on
    busy = cloud.start("run.sh", *command)
    assert "running here already" in busy.communicate()[0] and busy.returncode != 0
    cloud.call("stop.sh")
    for worker in (0, 1):
        home = cloud.tpus / f"pod/worker-{worker}"
        assert (home / ".jaxdeep/status").read_text() == "143\n"
        assert (cloud.runs / f"worker-{worker}/saved").read_text() == str(cloud.steps(worker)[-1])
    cloud.call("run.sh", *command)
    cloud.wait(len(cloud.steps(0)) + 2)
    said = cloud.call("logs.sh", "-n", "9")
    assert "from 0 10.0.0.1:8476 0 2\n" in said and said.count("from ") == 2
    cloud.call("stop.sh")
    for worker in (0, 1):  # no step twice, none left out
        assert cloud.steps(worker) == list(range(1, len(cloud.steps(worker)) + 1))
    cloud.call("stop.sh", "--delete")
    assert not (cloud.tpus / "pod").exists()


def test_kept_through_a_preemption_and_a_failure(cloud):
    keep = cloud.start("keep.sh", "python", "count.py", "13", "16")
    cloud.wait(5)
    preempt(cloud)
    said = keep.communicate(timeout=60)[0]
    assert keep.returncode == 0, said
    assert cloud.asked("create") == 2 and "SUSPENDED" in said and "exited 1" in said
    for worker in (0, 1):
        steps = cloud.steps(worker)
        assert steps[-1] == 16 and set(steps) == set(range(1, 17))
        assert len(steps) <= 16 + 3  # what was not saved is done again
    assert not (cloud.tpus / "pod").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, says",
    [(["count.py", "never", "1"], "cannot be run"), (["-c", "raise SystemExit(3)"], "exited 3, 2")],
)
def test_what_cannot_succeed_is_given_up(command, says, cloud):
    cloud.env["RETRIES"] = "2"
    keep = cloud.start("keep.sh", "python", *command)
    said = keep.communicate(timeout=60)[0]
    assert keep.returncode == 2 and says in said
    assert (cloud.tpus / "pod").exists() and cloud.asked("create") == 1
