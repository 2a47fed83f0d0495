"""How a process ended, as `launch/task.sh` says it, and how each `task.sh` tells jax its place."""

import os
import signal
import subprocess
import time

import pytest
from jobs.scripts import LAUNCH, call, stand_in

SAVES = 'trap "echo saved; exit {status}" TERM; echo ready; while true; do sleep 0.05; done'


@pytest.mark.parametrize("status", [0, 1, 2, 137])
def test_the_status_of_the_command(status):
    assert call("task.sh", "bash", "-c", f"exit {status}").returncode == status


def test_words_arrive_as_they_were():
    words = ["a b", "it's", '"$HOME"', "", "*"]
    assert call("task.sh", "printf", "%s\n", *words).stdout.splitlines() == words


@pytest.mark.parametrize(
    "status, forward, ends",
    [(0, True, 143), (2, True, 2), (137, True, 143), (0, False, 143)],
)
def test_told_to_stop(status, forward, ends):
    process = subprocess.Popen(
        ["bash", LAUNCH / "task.sh", "bash", "-c", SAVES.format(status=status)],
        env=os.environ | {"FORWARD": str(int(forward))},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    if forward:  # as a container is told: its first process alone
        process.send_signal(signal.SIGTERM)
    else:  # as Slurm tells all
        os.killpg(process.pid, signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "saved\n"
    assert process.returncode == ends


def test_it_waits_until_the_command_has_saved():
    slow = 'trap "sleep 0.5; echo saved; exit 0" TERM; echo ready; while true; do sleep 0.05; done'
    process = subprocess.Popen(
        ["bash", LAUNCH / "task.sh", "bash", "-c", slow],
        env=os.environ | {"FORWARD": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert process.communicate(timeout=20)[0].startswith("saved\n")
    assert process.returncode == 143


@pytest.mark.parametrize("recipe", ["sft", "grpo", "eval"])
def test_a_recipe_that_is_told_to_stop_saves(recipe, tmp_path):
    stand_in(tmp_path, "python", SAVES.format(status=0))
    process = subprocess.Popen(
        ["bash", LAUNCH / "task.sh", "bash", LAUNCH / f"recipes/{recipe}_qwen3_8b.sh"],
        env=os.environ | {"FORWARD": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "saved\n"
    assert process.returncode == 143


PLACE = "echo $JAX_COORDINATOR_ADDRESS $JAX_PROCESS_ID/$JAX_NUM_PROCESSES $JAX_LOCAL_DEVICE_IDS"


@pytest.mark.parametrize(
    "env, place",
    [
        ({"SLURM_NTASKS": "1"}, "/"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "3"}, "10.0.0.7:21234 3/4"),
        (
            {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_GPUS_ON_NODE": "4"},
            "10.0.0.7:21234 0/2 0,1,2,3",
        ),
    ],
)
def test_the_place_in_a_job_of_slurm(env, place):
    job = {"SLURM_JOB_ID": "61234", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"}
    said = call("slurm/task.sh", "bash", "-c", PLACE, **job, **env)
    assert said.stdout == place + "\n"


HOSTS = {"TPU_WORKER_HOSTNAMES": "run-0-0.run,run-0-1.run", "TPU_WORKER_ID": "1"}
SLICES = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2"}
SECOND = {"MEGASCALE_COORDINATOR_ADDRESS": "run-0-0.run:8080"}


@pytest.mark.parametrize(
    "env, place",
    [
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, "/"),
        (HOSTS, "run-0-0.run:8476 1/2"),
        (HOSTS | SLICES | SECOND, "run-0-0.run:8476 5/6"),
    ],
)
def test_the_place_among_pods(env, place):
    said = call("tpu/task.sh", "bash", "-c", PLACE, **env)
    assert said.stdout == place + "\n", said.stderr


@pytest.mark.parametrize(
    "workers, number, described, place",
    [
        ("a:1:10.0.0.1", 0, "ZONE: 'here'", "/"),
        ("a:1:10.0.0.1,b:2:10.0.0.2", 1, "ZONE: 'here'", "10.0.0.1:8476 1/2"),
        ("host-a,host-b", 0, "ZONE: 'here'", "host-a:8476 0/2"),
        (
            "a:1:10.0.1.1,b:2:10.0.1.2",
            1,
            "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1'\n"
            "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'",
            "10.0.0.1:8476 3/4",
        ),
    ],
)
def test_the_place_among_tpu_vms(workers, number, described, place, tmp_path):
    metadata = {
        "worker-network-endpoints": workers,
        "agent-worker-number": number,
        "tpu-env": described,
    }
    for name, value in metadata.items():
        (tmp_path / name).write_text(str(value))
    stand_in(
        tmp_path / "bin", "curl", f'[[ $* == *Metadata-Flavor* ]]; cat "{tmp_path}/${{!###*/}}"'
    )
    said = call("tpu/task.sh", "bash", "-c", PLACE, path=tmp_path / "bin")
    assert said.stdout == place + "\n", said.stderr
    (tmp_path / "tpu-env").unlink()
    assert call("tpu/task.sh", "true", path=tmp_path / "bin").returncode != 0
