"""A Slurm of two nodes on this machine: its daemons, keys, ports and folders are its own."""

import contextlib
import os
import pathlib
import secrets
import shutil
import socket
import subprocess
import time

DAEMONS = ("munged", "slurmctld", "slurmd")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
MpiDefault=none
ReturnToService=2
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=normal Nodes=n1,n2 Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 State=UP PriorityTier=2 PreemptMode=OFF
"""


def lacking() -> str:
    """Why there can be no Slurm here; empty where there can."""
    path = os.environ["PATH"] + ":/usr/sbin"
    missing = [name for name in (*DAEMONS, "sbatch") if not shutil.which(name, path=path)]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install slurmctld slurmd munge"
    return "" if os.geteuid() == 0 else "the daemons need root"


class Slurm:
    """The cluster while it is up, in the folder `folder`."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.running = folder, []
        self.env = os.environ | {
            "PATH": os.environ["PATH"] + ":/usr/sbin",
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        (folder / "state").mkdir(parents=True)
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o400)
        conf = CONF.format(host=socket.gethostname().split(".")[0], folder=folder, ports=ports(3))
        (folder / "slurm.conf").write_text(conf)

    def __enter__(self) -> "Slurm":
        at = self.folder
        files = [f"--{kind}-file={at}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
        try:
            self.daemon("munged", "--foreground", "--force", f"--socket={at}/munge.sock", *files)
            self.wait(lambda: (at / "munge.sock").exists())
            self.daemon("slurmctld", "-D", "-i")
            for node in ("n1", "n2"):
                self.daemon("slurmd", "-D", "-N", node)
            self.wait(lambda: self.ask("sinfo", "-h", "-o", "%T %D").stdout == "idle 2\n")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.ask("scancel", "--user=root")
            self.wait(lambda: not self.ask("squeue", "-h").stdout, seconds=30)
        for process in reversed(self.running):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def daemon(self, name: str, *words: str) -> None:
        log = (self.folder / f"{name}.out").open("a")
        self.running.append(subprocess.Popen([name, *words], env=self.env, stdout=log, stderr=log))

    def wait(self, ready, seconds: float = 120.0) -> None:
        """Until something is so; the seconds are this process's own, not those it was stopped
        for."""
        tries = int(seconds / 0.2)
        while not ready():
            died, tries = [p.args for p in self.running if p.poll() is not None], tries - 1
            if died or tries < 0:
                logs = [path.read_text()[-2000:] for path in self.folder.glob("*.log")]
                raise subprocess.TimeoutExpired(str(died), seconds, "\n".join(logs))
            time.sleep(0.2)

    def ask(self, *words: str, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            words, env=self.env | env, capture_output=True, text=True, timeout=600
        )

    def begin(self, job: str) -> None:
        """Let a job that went back to the queue start: not in the second that it was ended in,
        whose credentials a node refuses."""
        assert self.ask("scontrol", "update", f"jobid={job}", "starttime=now+3").returncode == 0

    def state(self, job: str) -> str:
        shown = self.ask("scontrol", "show", "job", job).stdout
        return shown.partition("JobState=")[2].partition(" ")[0]


def ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    found = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    numbers = [one.getsockname()[1] for one in found]
    for one in found:
        one.close()
    return numbers
