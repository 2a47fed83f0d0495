"""The one place that knows where things lie in a run's folder; files that are replaced in one step;
the lock on the folder.

    config.json          every setting of the run, the command, the commit, the versions
    metrics.jsonl        a row a step; tensorboard/, trace.json.gz, profile/ beside it
    tokenizer.json       of the run's model, so that rollouts can be read; chat_template.jinja
    rollouts/000012.jsonl, gaps/000012.npy    of step 12
    checkpoints/         unless train.checkpoints names another place
    guard.json, collapsed-1/                  what a collapse of the policy was, and came after it
    eval.jsonl, eval.json, eval.html          an evaluation
    process-1/           config, metrics and lock of the second of several processes
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from jaxdeep.errors import ConfigError, JaxdeepError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclasses.dataclass(frozen=True)
class Workdir:
    """The folder of a run, and where each thing is in it."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def trace(self) -> Path:
        return self.path / "trace.json.gz"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def wandb_id(self) -> Path:
        return self.path / "wandb-id"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def guard(self) -> Path:
        return self.path / "guard.json"

    @property
    def model(self) -> Path:
        """The weights that SFT of all parameters leaves."""
        return self.path / "model"

    @property
    def evaluation(self) -> Path:
        """The rollouts of an evaluation."""
        return self.path / "eval.jsonl"

    @property
    def evaluation_summary(self) -> Path:
        return self.path / "eval.json"

    @property
    def evaluation_page(self) -> Path:
        return self.path / "eval.html"

    @property
    def evaluation_gaps(self) -> Path:
        return self.path / "gaps.npy"

    @property
    def pages(self) -> Path:
        """What `view` makes."""
        return self.path / "view"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def summary(self) -> Path:
        """What a quickstart came to."""
        return self.path / "summary.json"

    @property
    def index(self) -> Path:
        """The page of a quickstart."""
        return self.path / "index.html"

    def rollouts(self, step: int) -> Path:
        return self.path / "rollouts" / f"{step:06d}.jsonl"

    def gaps(self, step: int) -> Path:
        """Trainer less sampler, for the sampled tokens of a step's rollouts."""
        return self.path / "gaps" / f"{step:06d}.npy"

    def rollout_steps(self) -> list[int]:
        """The steps whose rollouts are there, in order."""
        paths = (self.path / "rollouts").glob("*.jsonl")
        return sorted(int(path.stem) for path in paths if path.stem.isdigit())

    def files_after(self, step: int) -> list[Path]:
        """Rollouts and gaps of later steps."""
        paths = [*self.path.glob("rollouts/*"), *self.path.glob("gaps/*")]
        return sorted(path for path in paths if int(path.name.split(".")[0]) > step)

    def collapsed(self, number: int) -> Path:
        """What came after the step that the guard went back to, the `number`-th time."""
        return self.path / f"collapsed-{number}"

    def of_process(self, index: int) -> Workdir:
        """Where a process keeps its configuration, lock and metrics: the first of several in the
        run's folder, where the rollouts of all are too, each other one in a folder of its own."""
        return Workdir(self.path / f"process-{index}") if index else self


def write_atomic(path: Path, text: str) -> None:
    """Replaces the file in one step: a reader, or a kill, sees the old text or the new, never
    half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def home(path: str | Path) -> Path:
    """The path with a leading `~` or `~name` replaced by that home folder; shells do not do it
    after `--workdir=`. ConfigError for the name of nobody here."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{path}: there is no home folder of that name") from None


def check_writable(path: Path, key: str = "--workdir") -> None:
    """ConfigError, with the `key` that named it, where a run cannot keep files in this folder: it
    is a file, lies below one, or may not be written to. Nothing is created."""
    place = path.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        what = "is a file" if place == path.absolute() else f"lies below {place}, which is a file"
        raise ConfigError(f"{key}={path} {what}: name a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}={path}: {place} may not be written to, choose another folder")


@contextlib.contextmanager
def lock_workdir(path: Path, key: str = "--workdir") -> Iterator[None]:
    """Holds the folder that `key` names for one run; JaxdeepError where another run holds it, or
    where nothing can be written there. The kernel drops the lock with the process, so a killed run
    leaves nothing to clean up."""
    check_writable(path, key)
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = (path / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise ConfigError(
            f"{key}={path} cannot be written to ({error.strerror}): choose another folder"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise JaxdeepError(
                f"{path} is in use by another run (process {owner}): "
                f"wait for it, stop it, or choose another {key}"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
