"""A stand-in for `gcloud compute tpus`: a TPU is a folder, a worker's home a folder in it, and what
is sent by ssh really runs there. FAKE_TPUS names the folder of all; FAKE_WORKERS says how many
hosts a slice has. FAKE_ERROR is what `create` fails with; where the file `unreachable` is in the
folder, no worker answers."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys

CLOUD = pathlib.Path(os.environ["FAKE_TPUS"])
WORKERS = int(os.environ["FAKE_WORKERS"])


def main(argv):
    assert argv[:2] == ["compute", "tpus"] and argv[2] in ("queued-resources", "tpu-vm"), argv
    with (CLOUD / "asked").open("a") as file:
        file.write(argv[3] + "\n")
    words = [word for word in argv[4:] if not word.startswith("--")]
    flags = dict(word[2:].partition("=")[::2] for word in argv[4:] if word.startswith("--"))
    assert flags.pop("zone") == "zone-a"
    return globals()[argv[3]](*words, **{k.replace("-", "_"): v for k, v in flags.items()})


def list(format):
    for tpu in sorted(CLOUD.glob("*/state")):
        print(tpu.parent.name, tpu.read_text(), sep="\t")


def create(name, node_count="1", **_):
    if error := os.environ.get("FAKE_ERROR"):
        print(f"ERROR: (gcloud) {error}", file=sys.stderr)
        return 1
    (CLOUD / name).mkdir()
    for worker in range(WORKERS * int(node_count)):
        (CLOUD / name / f"worker-{worker}").mkdir()
    (CLOUD / name / "state").write_text("ACTIVE")


def delete(name, force="", quiet=""):
    take_back(CLOUD / name)
    shutil.rmtree(CLOUD / name)


def scp(source, target, **where):
    name, _, place = target.partition(":")
    for home in homes(name, **where):
        shutil.copy(source, home / place)


def ssh(name, command, **where):
    if (CLOUD / "unreachable").exists():
        return 255
    status = 0
    for home in homes(name, **where):
        env = os.environ | {"HOME": str(home)}
        status |= subprocess.run(["bash", "-c", command], cwd=home, env=env).returncode
    return status


def homes(name, worker, node="0"):
    assert (CLOUD / name / "state").read_text() == "ACTIVE"
    if worker == "all":
        assert node == "all"
        return sorted((CLOUD / name).glob("worker-*"))
    return [CLOUD / name / f"worker-{worker}"]


def take_back(tpu):
    """The machines are gone, and all that runs on them, without a word."""
    for pid in tpu.glob("worker-*/.jaxdeep/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)
    for home in tpu.glob("worker-*"):
        shutil.rmtree(home)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
