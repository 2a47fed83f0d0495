"""The launch scripts as tests call them, with stand-ins for the commands of clouds and clusters."""

import os
import pathlib
import shlex
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
CLOUD = ("gcloud", "kubectl", "docker", "xpk", "srun", "sbatch", "scontrol", "squeue", "apptainer")
KEPT = ("PATH", "HOME", "TMPDIR", "LANG")  # of this process's environment


def call(
    script: str, *words: str, path: pathlib.Path | None = None, **env: str
) -> subprocess.CompletedProcess:
    """Runs `launch/SCRIPT WORDS`, with the folder `path` before all others in PATH."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    if path:
        kept["PATH"] = f"{path}:{kept['PATH']}"
    return subprocess.run(
        ["bash", str(LAUNCH / script), *words],
        env=kept | env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def lines(printed: str) -> list[list[str]]:
    """What DRY=1 printed, a command a line, each as its words."""
    return [shlex.split(line) for line in printed.splitlines()]


def stand_in(folder: pathlib.Path, name: str, body: str) -> None:
    """An executable `name` that runs `body` in bash."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\nset -euo pipefail\n{body}\n")
    path.chmod(0o755)
