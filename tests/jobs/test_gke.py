"""The manifest against the models that Kubeflow publishes of JobSet's and Kubernetes' own API."""

import pathlib

import pytest
import yaml
from jobs.scripts import LAUNCH, call

WORDS = ["python", "-m", "jaxdeep", "grpo", '--config.env.corpus=my "docs": ${HOME} $(date)']
RUN = {"NAME": "grpo", "IMAGE": "registry/jaxdeep:1", "WORKDIR": "gs://bucket/runs/grpo"}


@pytest.fixture(scope="module")
def jobset():
    return pytest.importorskip(
        "kubeflow_trainer_api.models.jobset_v1alpha2_job_set",
        reason="kubeflow-trainer-api is not installed: pip install -e '.[dev]'",
    ).JobsetV1alpha2JobSet


def manifest(folder: pathlib.Path, **env: str) -> dict:
    done = call("gke/submit.sh", *WORDS, **(RUN | env), DRY="1", TMPDIR=str(folder))
    assert done.returncode == 0, done.stderr
    path = folder / "jaxdeep-grpo.yaml"
    assert done.stdout == f"kubectl apply -f {path}\n"
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize(
    "tpu, slices, accelerator, hosts, chips",
    [
        ("v5e:4x4", 1, "tpu-v5-lite-podslice", 4, 4),
        ("v5e:2x2", 1, "tpu-v5-lite-podslice", 1, 4),
        ("v5e:1x1", 1, "tpu-v5-lite-podslice", 1, 1),
        ("v5e:16x16", 2, "tpu-v5-lite-podslice", 64, 4),
        ("v5p:2x2x4", 4, "tpu-v5p-slice", 4, 4),
        ("v6e:4x8", 1, "tpu-v6e-slice", 8, 4),
    ],
)
def test_the_manifest_is_of_the_published_form(
    tpu, slices, accelerator, hosts, chips, tmp_path, jobset
):
    made = manifest(tmp_path, TPU=tpu, SLICES=str(slices))
    assert jobset.from_dict(made).to_dict() == made  # each key is known and of the right type
    (job,) = made["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert job["replicas"] == slices and spec["parallelism"] == spec["completions"] == hosts
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": tpu.partition(":")[2],
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert container["command"] == [
        *("bash", "launch/tpu/task.sh"),
        *WORDS,
        "--workdir=/gcs/runs/grpo",
    ]
    volume = pod["volumes"][0]["csi"]["volumeAttributes"]
    assert volume["bucketName"] == "bucket" and "ttl-secs:0," in volume["mountOptions"]
    assert " " not in volume["mountOptions"]


def test_a_key_that_does_not_exist_is_found(tmp_path, jobset):
    made = manifest(tmp_path, TPU="v5e:4x4")
    made["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"] = 4
    assert jobset.from_dict(made).to_dict() != made
    made["spec"]["replicatedJobs"][0]["replicas"] = "two"
    with pytest.raises(ValueError, match="replicas"):
        jobset.from_dict(made)


def test_the_image_has_what_the_manifest_calls():
    dockerfile = (LAUNCH / "gke/Dockerfile").read_text()
    assert "COPY . /jaxdeep\nWORKDIR /jaxdeep\n" in dockerfile
