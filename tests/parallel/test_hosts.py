"""What the environment of a launcher, a cluster or a cloud says about the processes of a run."""

import sys
import types
from types import SimpleNamespace as Thing

import pytest
from jax._src.clusters import cloud_tpu_cluster, k8s_cluster

from jaxdeep.errors import ConfigError
from jaxdeep.parallel import hosts

GIVEN = dict(zip(hosts.VARIABLES, ("first:1234", "4", "2"), strict=True))
STEP = {  # as srun sets them on the second of two nodes
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}
SLICE = {"TPU_WORKER_HOSTNAMES": "t0.svc,t1.svc", "TPU_WORKER_ID": "1"}
SLICES = {
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "s0-0.svc:8080",
}
METADATA = {  # of worker 2 of a TPU VM with four
    "agent-worker-number": "2",
    "worker-network-endpoints": "a:0:10.0.0.5,b:1:10.0.0.6,c:2:10.0.0.7,d:3:10.0.0.8",
    "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'\nZONE: 'us-west4-a'",
}


@pytest.fixture
def environ(monkeypatch):
    """A function that sets the environment to some variables, in a process like none of these."""
    known = (*GIVEN, *STEP, *POD, *SLICE, *SLICES, "JAX_LOCAL_DEVICE_IDS", "TPU_PROCESS_ADDRESSES")
    for name in (*known, "JAX_COORDINATOR_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("socket.gethostbyname", lambda name: "10.0.0.9")

    def setenv(*parts, **more):
        for part in (*parts, more):
            for name, value in part.items():
                monkeypatch.setenv(name, value)

    return setenv


@pytest.fixture
def tpu(monkeypatch):
    """As on a machine with TPUs; what it answers as metadata can be set."""
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    answers = {}

    def get(key):
        return (answers[key], 200) if key in answers else ("", 404)

    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", get)
    return answers


def test_nothing_said_is_a_run_of_its_own(environ):
    assert hosts.find_process() is None


def test_what_is_said_counts_before_any_cluster(environ):
    environ(STEP, GIVEN)
    assert hosts.find_process() == ("first:1234", 4, 2, None)
    environ(JAX_NUM_PROCESSES="1")
    assert hosts.find_process() is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"JAX_NUM_PROCESSES": "2"},
        {"JAX_COORDINATOR_ADDRESS": "first:1234", "JAX_PROCESS_ID": "0"},
        GIVEN | {"JAX_PROCESS_ID": "4"},
        GIVEN | {"JAX_NUM_PROCESSES": "two"},
        GIVEN | {"JAX_COORDINATOR_ADDRESS": "first"},
    ],
)
def test_half_of_it_is_refused(environ, wrong):
    environ(wrong)
    with pytest.raises(ConfigError) as refused:
        hosts.find_process()
    for name in hosts.VARIABLES:
        assert f"{name}={wrong.get(name, '')!r}" in str(refused.value)


def test_flags_count_before_what_the_environment_says(environ):
    environ(STEP, GIVEN)
    assert hosts.find_process("", "8", "7") == ("first:1234", 8, 7, None)
    assert hosts.find_process("other:99") == ("other:99", 4, 2, None)
    assert hosts.find_process(processes="1") is None
    with pytest.raises(ConfigError, match="JAX_PROCESS_ID='9'"):
        hosts.find_process(process="9")


def test_slurm(environ):
    environ(STEP)
    assert hosts.find_process() == ("gpu07:61441", 2, 1, None)  # all devices of the node
    environ(
        SLURM_STEP_TASKS_PER_NODE="4(x2)", SLURM_NTASKS="8", SLURM_PROCID="6", SLURM_LOCALID="2"
    )
    assert hosts.find_process() == ("gpu07:61441", 8, 6, [2])
    environ(JAX_LOCAL_DEVICE_IDS="2,3", JAX_COORDINATOR_ADDRESS="10.0.0.1:99")
    assert hosts.find_process() == ("10.0.0.1:99", 8, 6, None)


def test_a_step_of_one_task_and_a_batch_script_are_alone(environ, monkeypatch):
    environ(STEP, SLURM_NTASKS="1", SLURM_PROCID="0")
    assert hosts.find_process() is None
    environ(SLURM_NTASKS="2")
    monkeypatch.delenv("SLURM_STEP_NODELIST")
    assert hosts.find_process() is None


def test_tpus_on_gke(environ, tpu):
    environ(POD, SLICE)
    assert hosts.find_process() == ("t0.svc:8482", 2, 1, None)
    environ(SLICES)
    assert hosts.find_process() == ("s0-0.svc:8482", 4, 3, None)


@pytest.mark.parametrize("name", ["TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"])
def test_tpus_of_one_host_are_alone(environ, tpu, name):
    environ({name: "localhost", "TPU_WORKER_ID": "0"})
    assert hosts.find_process() is None


def test_tpu_vm(environ, tpu):
    tpu |= METADATA
    assert hosts.find_process() == ("10.0.0.5:8482", 4, 2, None)
    tpu["worker-network-endpoints"] = "a"
    assert hosts.find_process() is None


def test_a_pod_is_told_the_rest_by_its_manifest(environ):
    environ(POD, JAX_COORDINATOR_ADDRESS="grpo-host-0-0.grpo:1234", JAX_NUM_PROCESSES="4")
    assert hosts.find_process() == ("grpo-host-0-0.grpo:1234", 4, 3, None)
    environ(JAX_PROCESS_ID="1")
    assert hosts.find_process().index == 1


def test_a_pod_that_knows_nothing_of_the_others_is_refused(environ, monkeypatch):
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    environ(POD)
    with (
        pytest.warns(UserWarning, match="kubernetes"),
        pytest.raises(ConfigError, match=r"number 3 of a Job.*JAX_NUM_PROCESSES=1"),
    ):
        hosts.find_process()
    environ(JAX_NUM_PROCESSES="1")
    assert hosts.find_process() is None


def test_a_pod_asks_kubernetes(environ, monkeypatch):
    name = "jobset.sigs.k8s.io/jobset-name"
    job = Thing(metadata=Thing(name="grpo-host", labels={name: "grpo"}), spec=Thing(parallelism=4))
    client = types.ModuleType("client")
    client.CoreV1Api = client.BatchV1Api = lambda: None
    client.exceptions = Thing(ApiException=RuntimeError)
    kubernetes = types.ModuleType("kubernetes")
    kubernetes.config, kubernetes.client = Thing(load_incluster_config=lambda: None), client
    monkeypatch.setitem(sys.modules, "kubernetes", kubernetes)
    found = {"_job": job, "_pod": Thing(), "_controller": Thing(kind="Job")}
    for what, answer in found.items():
        monkeypatch.setattr(k8s_cluster.K8sCluster, what, lambda answer=answer: answer)
    environ(POD)
    assert hosts.find_process() == ("grpo-host-0.grpo:55527", 4, 3, None)
