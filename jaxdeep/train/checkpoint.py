"""Checkpoints of a run: what is trained, the optimizer, the step, and the position in the data.

Orbax writes each in the background to a temporary folder and renames it when it is complete (in a
bucket: marks it as complete), so a process that is killed leaves the last one whole. One that
cannot be read, or whose numbers are not finite, is passed over with a line, and the one before it
is taken. Only the run itself moves such a one aside: whoever reads another run's changes nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import json
import logging
import os
import pathlib
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from jaxdeep.errors import CheckpointError, ConfigError, JaxdeepError
from jaxdeep.model import identity, lora, tensors
from jaxdeep.model.config import Config
from jaxdeep.parallel import exchange
from jaxdeep.train import optim
from jaxdeep.train import state as states
from jaxdeep.workdir import home, lock_workdir

NO_SCORE = -sys.float_info.max  # of a step that was not evaluated: Orbax wants a number


class _Unreadable(CheckpointError):
    """A checkpoint that is damaged: the one before it may do."""


def shape_of(spec: states.Spec) -> dict[str, Any]:
    """What must be the same in a checkpoint and in the run that reads it."""
    model = spec.model
    return {
        **{k: getattr(model, k) for k in ("V", "D", "F", "L", "N", "K", "H", "tie")},
        "rank": spec.lora.rank,
        "targets": [] if spec.full else sorted(spec.lora.targets),
    }


def folder(path: str | os.PathLike) -> epath.Path:
    """The folder of a run's checkpoints in `path`, local or in a bucket (gs://, s3://). ConfigError
    if the library that reads such a bucket is not installed."""
    if "://" not in str(path):
        return epath.Path(home(path)).absolute() / "checkpoints"
    try:
        epath.Path(path).exists()
    except ImportError as error:
        raise ConfigError(f"{path} cannot be reached: {error}") from error
    return epath.Path(path) / "checkpoints"


class Checkpoints:
    """The checkpoints in `workdir/checkpoints`, `workdir` local or in a bucket; those of another
    run are opened with `read_only`.

    The last `keep` are kept, and the best of those saved with a score. Each describes itself: its
    shape, its base, and the `run` (configuration, command, commit). One over another base than
    `base` is refused; None (nothing is frozen, or the base is unknown) refuses none.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        spec: states.Spec,
        *,
        keep: int = 2,
        base: identity.Base | None = None,
        run: dict[str, Any] | None = None,
        read_only: bool = False,
    ) -> None:
        self.path, self.spec, self.base, self.run = folder(workdir), spec, base, run
        self.read_only = read_only
        last = ocp.checkpoint_managers.LatestN(keep)
        best = ocp.checkpoint_managers.BestN(
            get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy([last, best]),
            best_fn=_score,
            create=not read_only,
            read_only=read_only,
            save_interval_steps=0 if read_only else 1,
        )
        with _quiet() if read_only else contextlib.nullcontext():
            self.manager = ocp.CheckpointManager(self.path, options=options)

    def save(
        self,
        step: int,
        state: states.State,
        position: dict[str, Any],
        *,
        score: float | None = None,
    ) -> None:
        """Write the state after `step`, and the `position` in the data, in the background. It is
        complete after the next `save`, `wait` or `close`, which also raise what went wrong. The
        best checkpoint has the highest `score`. A step that is saved already stays."""
        if step == self.latest():
            return
        about = {
            "shape": shape_of(self.spec),
            "lora": dataclasses.asdict(self.spec.lora),
            "optim": self.spec.optim and dataclasses.asdict(self.spec.optim),
            "optimizer": _structure(state.opt),
            "position": position,
            "base": self.base and self.base._asdict(),
            "run": self.run,
        }
        with _disk(self.path):
            self.manager.save(
                step,
                metrics={"score": NO_SCORE if score is None else score},
                args=ocp.args.Composite(
                    trained=ocp.args.StandardSave(state.trained),
                    optimizer=ocp.args.StandardSave({"opt": state.opt, "step": state.step}),
                    about=ocp.args.JsonSave(about),
                ),
            )

    def wait(self) -> None:
        """Wait until everything that was saved is on disk."""
        with _disk(self.path):
            self.manager.wait_until_finished()

    def steps(self) -> list[int]:
        """The steps of all checkpoints, oldest first."""
        return sorted(self.manager.all_steps())

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints of later steps."""
        self.wait()
        for later in self.steps():
            if later > step:
                self.manager.delete(later)

    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self.manager.latest_step()

    def best(self) -> int:
        """The step of the checkpoint with the highest score; CheckpointError where none has one."""
        step = self.manager.best_step()
        if step is None or self.manager.metrics(step)["score"] == NO_SCORE:
            raise CheckpointError(
                f"no checkpoint in {self.path} has a score, so none is the best: grpo scores them by "
                "the section dev with grpo.eval_every, sft by data.eval. The newest is taken without "
                "train.best"
            )
        return step

    def restore(self, state: states.State) -> tuple[int, states.State, dict[str, Any]]:
        """The newest checkpoint that can be gone on from, in the shardings of `state`: (step,
        state, position). Newer ones are reported and moved to `checkpoints-torn`. CheckpointError
        where the optimizer is another one."""

        def read(step: int) -> tuple[int, states.State, dict[str, Any]]:
            self._check_optimizer(step, state.opt)
            optimizer = {"opt": state.opt, "step": state.step}
            back = self.manager.restore(
                step,
                args=ocp.args.Composite(
                    trained=ocp.args.StandardRestore(_abstract(state.trained)),
                    optimizer=ocp.args.StandardRestore(_abstract(optimizer)),
                    about=ocp.args.JsonRestore(),
                ),
            )
            opt = back["optimizer"]
            restored = states.State(back["trained"], opt["opt"], opt["step"])
            _refuse_not_finite((restored.trained, restored.opt))
            return step, restored, back["about"]["position"]

        return self._newest(read)

    def trained(self, like: Any, step: int | None = None) -> tuple[int, Any]:
        """The step and the trained tree of the newest checkpoint, or of that of `step`, in the
        shapes and shardings of `like`."""

        def read(step: int) -> tuple[int, Any]:
            args = ocp.args.Composite(trained=ocp.args.StandardRestore(_abstract(like)))
            tree = self.manager.restore(step, args=args)["trained"]
            _refuse_not_finite(tree)
            return step, tree

        if step is None:
            return self._newest(read)
        if step not in self.steps():
            raise CheckpointError(
                f"{self.path} holds no step {step}, only {', '.join(map(str, self.steps()))}"
            )
        self._check(step)
        return read(step)

    def _newest(self, read: Callable[[int], Any]) -> Any:
        """`read` of the newest step for which it succeeds in every process."""
        # a run that is going on may have removed a step, or added one, for one process only
        steps = exchange.broadcast(self.steps())[::-1]
        torn: dict[int, Exception] = {}
        for step in steps:
            failed: Exception | None = None
            try:
                self._check(step)
                result = read(step)
            except _Unreadable as error:
                failed = error
            except JaxdeepError:
                raise
            except Exception as error:  # Orbax has nothing narrower for arrays that it cannot read
                failed = error
            # all processes must go on from the same step
            if any(exchange.all_gather_objects([failed is not None])):
                torn[step] = failed or CheckpointError("another process cannot read it")
                continue
            for bad, error in torn.items():
                self._pass_over(bad, error, step)
            return result
        if self.read_only:
            self.manager.reload()
            if max(exchange.broadcast(self.steps()), default=0) > max(steps, default=0):
                return self._newest(read)  # its run has replaced all of them meanwhile
        if not steps:
            raise CheckpointError(
                f"{self.path} holds no checkpoint: has a run finished a step there?"
            )
        reason = torn[steps[0]]
        raise CheckpointError(
            f"no checkpoint in {self.path} can be read: {_first_line(reason)}"
        ) from reason

    def _pass_over(self, step: int, reason: Exception, taken: int) -> None:
        aside = self.path.with_name("checkpoints-torn")
        becomes = f"step {taken} is taken" if self.read_only else f"moved to {aside}"
        message = f"checkpoint {step} cannot be read ({_first_line(reason)}): {becomes}"
        print(message, file=sys.stderr)
        if self.read_only:
            return
        if jax.process_index() == 0:
            aside.mkdir(exist_ok=True)
            if not aside.exists():  # a bucket has no empty folders
                (aside / "README").write_text("Checkpoints that could not be read.\n")
            (aside / str(step)).rmtree(missing_ok=True)
            (self.path / str(step)).rename(aside / str(step))
        multihost_utils.sync_global_devices(f"checkpoint {step} is moved")
        self.manager.reload()

    def _check_optimizer(self, step: int, opt: Any) -> None:
        """CheckpointError if the optimizer's state in the checkpoint is that of another one."""
        about = _describe(self.path, step)
        if about.get("optimizer", _structure(opt)) == _structure(opt):
            return
        theirs, ours = about["optim"], dataclasses.asdict(self.spec.optim)
        # without weight decay there is nothing that decays, and so no state of it
        kinds = (("name", str), ("weight_decay", bool))
        differ = [
            f"optim.{key}={theirs[key]} there, {ours[key]} here"
            for key, kind in kinds
            if kind(theirs[key]) != kind(ours[key])
        ]
        raise CheckpointError(
            f"{self.path}/{step} holds the state of another optimizer: "
            f"{'; '.join(differ) or 'that of another version of the package'}. Use the "
            "configuration it was made with, or another --workdir with train.start"
        )

    def _check(self, step: int) -> None:
        """CheckpointError if the checkpoint is of another model, adapter or base."""
        about = _describe(self.path, step)
        theirs, ours = about["shape"], shape_of(self.spec)
        if not self.spec.full:
            # the same factors with another scale are another policy
            theirs = theirs | {"alpha": about["lora"]["alpha"]}
            ours["alpha"] = self.spec.lora.alpha
        differ = [
            f"{name}={theirs.get(name)} there, {value} here"
            for name, value in ours.items()
            if theirs.get(name) != value
        ]
        if differ:
            raise CheckpointError(
                f"{self.path}/{step} is a checkpoint of another shape: {'; '.join(differ)}. "
                "Use the configuration it was made with, or another --workdir"
            )
        identity.check(f"{self.path}/{step}", base_in(about), self.base)

    def close(self) -> None:
        """Wait until everything is on disk, and release the folder."""
        self.wait()
        self.manager.close()


def _structure(tree: Any) -> str:
    """A hash of the tree, and of the shapes and types of its leaves."""
    leaves = (f"{x.shape} {x.dtype}".encode() for x in jax.tree.leaves(tree))
    return identity.digest([str(jax.tree.structure(tree)).encode(), *leaves])


def _refuse_not_finite(tree: Any) -> None:
    """_Unreadable for a tree with an infinity or NaN in it: no step could be taken from it."""
    if not bool(tensors.on_host(states.finite(tree))):
        raise _Unreadable("it holds numbers that are not finite")


def _first_line(error: BaseException) -> str:
    return f"{(str(error).splitlines() or [repr(error)])[0]:.200}"


def _score(metrics: dict[str, float]) -> float:
    return metrics["score"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's warning that a folder that is read only is read only."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _is_full(error: object) -> bool:
    return "no space left" in str(error).lower()


def _not_of_a_full_disk(record: logging.LogRecord) -> bool:
    """Whether a log entry is of something else: each of Orbax's threads logs a full disk, a page
    each, before the next call can raise it."""
    return not (_is_full(record.getMessage()) or (record.exc_info and _is_full(record.exc_info[1])))


logging.getLogger("absl").addFilter(_not_of_a_full_disk)


@contextlib.contextmanager
def _disk(path: epath.Path) -> Iterator[None]:
    """Turns what Orbax raises on a full disk, a ValueError, into the OSError that it is."""
    try:
        yield
    except (ValueError, OSError) as error:
        if not _is_full(error):
            raise
        # tasks that Orbax leaves behind would log the same again, a page each
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def exists(workdir: str | os.PathLike) -> bool:
    """Whether a run has left a checkpoint in `workdir`."""
    path = folder(workdir)
    return path.is_dir() and bool(ocp.utils.checkpoint_steps(path))


def about(workdir: str | os.PathLike) -> dict[str, Any]:
    """The description in the newest checkpoint of a run that has one that can be read; no array is
    read."""
    path = folder(workdir)
    if not path.is_dir():
        raise CheckpointError(f"{workdir} holds no checkpoints: is it the --workdir of a run?")
    reasons = []
    for step in sorted(ocp.utils.checkpoint_steps(path), reverse=True):
        try:
            return _describe(path, step)
        except _Unreadable as error:
            reasons.append(str(error))
    raise CheckpointError(reasons[0] if reasons else f"{path} holds no checkpoint yet")


def _describe(path: epath.Path, step: int) -> dict[str, Any]:
    """The description of a checkpoint; _Unreadable where it is not there, or not whole."""
    file = path / str(step) / "about" / "metadata"
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        what = "is not whole" if isinstance(error, ValueError) else "cannot be read"
        raise _Unreadable(f"its description {file} {what}: {_first_line(error)}") from error


@contextlib.contextmanager
def hold(checkpoints: str, workdir: pathlib.Path) -> Iterator[None]:
    """Keeps other runs out of the folder `train.checkpoints` while this one uses it; JaxdeepError
    where another one does. The workdir itself, or none, is held already (`lock_workdir`).

    A bucket has no locks: a file there names the run, until it ends. The run with the same workdir
    may go on after it was killed; another one is refused, and told which file to remove.
    """
    if not checkpoints or jax.process_index():
        yield
    elif "://" not in checkpoints:
        path = home(checkpoints)
        same = path.absolute() == workdir.absolute()
        with contextlib.nullcontext() if same else lock_workdir(path, "train.checkpoints"):
            yield
    else:
        note = folder(checkpoints).parent / "owner.json"
        mine = {"workdir": str(workdir.absolute()), "host": socket.gethostname()}
        if note.exists():
            theirs = json.loads(note.read_text())
            if theirs["workdir"] != mine["workdir"]:
                raise JaxdeepError(
                    f"train.checkpoints={checkpoints} is in use by the run in {theirs['workdir']} on "
                    f"{theirs['host']}, since {theirs['since']}: choose another place, or remove "
                    f"{note} if that run is over"
                )
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(mine | {"since": since}))
        try:
            yield
        finally:
            note.unlink(missing_ok=True)


def base_in(about: dict[str, Any]) -> identity.Base | None:
    """The base that the description of a checkpoint names, if it does."""
    return identity.Base(**about["base"]) if about.get("base") else None


def load_adapter(
    workdir: str | os.PathLike,
    model: Config,
    mesh: jax.sharding.Mesh,
    base: identity.Base | None = None,
) -> lora.Adapter:
    """The adapter of a run's newest checkpoint on the mesh, with the rank, linears and scale it was
    trained with. CheckpointError if the run trained all weights, or if it is of another
    architecture or another base than `base`."""
    about_run = about(workdir)
    saved = {k: tuple(v) if isinstance(v, list) else v for k, v in about_run["lora"].items()}
    if not saved["rank"]:
        raise CheckpointError(f"{workdir} holds whole weights (lora.rank=0), not an adapter")
    config = lora.LoraConfig(**saved)
    spec = states.Spec(model, config, optim.OptimConfig(lr=1.0, steps=1))
    with contextlib.closing(Checkpoints(workdir, spec, base=base, read_only=True)) as checkpoints:
        _, factors = checkpoints.trained(states.trained_shapes(spec, mesh))
    return lora.Adapter(factors, config.scale, base_in(about_run))


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
