"""Checkpoints of a run: what is trained, the optimizer, the step, and the position in the data.

Orbax writes each in the background to a temporary folder and renames it when it is complete (in a
bucket: marks it as complete), so a process that is killed leaves the last one whole. A checkpoint
that cannot be read is set aside, and the one before it is taken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from jaxdeep.errors import CheckpointError, ConfigError, JaxdeepError
from jaxdeep.model import identity, lora
from jaxdeep.model.config import Config
from jaxdeep.parallel import exchange
from jaxdeep.train import optim
from jaxdeep.train import state as states

NO_SCORE = -sys.float_info.max  # of a step that was not evaluated: Orbax wants a number


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
        return epath.Path(path).absolute() / "checkpoints"
    try:
        epath.Path(path).exists()
    except ImportError as error:
        raise ConfigError(f"{path} cannot be reached: {error}") from error
    return epath.Path(path) / "checkpoints"


class Checkpoints:
    """The checkpoints in `workdir/checkpoints`, `workdir` local or in a bucket.

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
    ) -> None:
        self.path, self.spec, self.base, self.run = folder(workdir), spec, base, run
        last = ocp.checkpoint_managers.LatestN(keep)
        best = ocp.checkpoint_managers.BestN(
            get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False
        )
        self.manager = ocp.CheckpointManager(
            self.path,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy([last, best]),
                best_fn=_score,
                create=True,
            ),
        )

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

    def best(self) -> int | None:
        """The step of the checkpoint with the highest score; None where none has one."""
        step = self.manager.best_step()
        return None if step is None or self.manager.metrics(step)["score"] == NO_SCORE else step

    def restore(self, state: states.State) -> tuple[int, states.State, dict[str, Any]]:
        """The newest checkpoint that can be read, in the shardings of `state`: (step, state,
        position). Newer ones are reported and moved to `checkpoints-torn`."""

        def read(step: int) -> tuple[int, states.State, dict[str, Any]]:
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
            return step, restored, back["about"]["position"]

        return self._newest(read)

    def trained(self, like: Any, step: int | None = None) -> Any:
        """The trained tree of the newest checkpoint, or of that of `step`, in the shapes and
        shardings of `like`."""

        def read(step: int) -> Any:
            args = ocp.args.Composite(trained=ocp.args.StandardRestore(_abstract(like)))
            return self.manager.restore(step, args=args)["trained"]

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
        steps = self.steps()[::-1]
        torn: dict[int, Exception] = {}
        for step in steps:
            failed: Exception | None = None
            try:
                self._check(step)
                result = read(step)
            except JaxdeepError:
                raise
            except Exception as error:  # Orbax has nothing narrower for arrays that it cannot read
                failed = error
            # all processes must go on from the same step
            if any(exchange.all_gather_objects([failed is not None])):
                torn[step] = failed or CheckpointError("another process cannot read it")
                continue
            for bad, error in torn.items():
                self._set_aside(bad, error)
            return result
        if not steps:
            raise CheckpointError(
                f"{self.path} holds no checkpoint: has a run finished a step there?"
            )
        reason = torn[steps[0]]
        raise CheckpointError(f"no checkpoint in {self.path} can be read: {reason}") from reason

    def _set_aside(self, step: int, reason: Exception) -> None:
        aside = self.path.with_name("checkpoints-torn")
        message = (str(reason).splitlines() or [repr(reason)])[0]
        print(
            f"checkpoint {step} cannot be read ({message:.200}): moved to {aside}", file=sys.stderr
        )
        if jax.process_index() == 0:
            aside.mkdir(exist_ok=True)
            if not aside.exists():  # a bucket has no empty folders
                (aside / "README").write_text("Checkpoints that could not be read.\n")
            (aside / str(step)).rmtree(missing_ok=True)
            (self.path / str(step)).rename(aside / str(step))
        multihost_utils.sync_global_devices(f"checkpoint {step} is moved")
        self.manager.reload()

    def _check(self, step: int) -> None:
        """CheckpointError if the checkpoint is of another model, adapter or base."""
        restored = self.manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))
        about = restored["about"]
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


def _score(metrics: dict[str, float]) -> float:
    return metrics["score"]


@contextlib.contextmanager
def _disk(path: epath.Path) -> Iterator[None]:
    """Turns what Orbax raises on a full disk, a ValueError, into the OSError that it is."""
    try:
        yield
    except (ValueError, OSError) as error:
        if "no space left" not in str(error).lower():
            raise
        # tasks that Orbax leaves behind would log the same again, a page each
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def exists(workdir: str | os.PathLike) -> bool:
    """Whether a run has left a checkpoint in `workdir`."""
    path = folder(workdir)
    return path.is_dir() and bool(ocp.utils.checkpoint_steps(path))


def about(workdir: str | os.PathLike) -> dict[str, Any]:
    """The description in the newest checkpoint of a run; no array is read."""
    path = folder(workdir)
    if not path.is_dir():
        raise CheckpointError(f"{workdir} holds no checkpoints: is it the --workdir of a run?")
    with ocp.CheckpointManager(path) as manager:
        step = manager.latest_step()
        if step is None:
            raise CheckpointError(f"{path} holds no checkpoint yet")
        args = ocp.args.Composite(about=ocp.args.JsonRestore())
        return manager.restore(step, args=args)["about"]


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
    with contextlib.closing(Checkpoints(workdir, spec, base=base)) as checkpoints:
        factors = checkpoints.trained(states.trained_shapes(spec, mesh))
    return lora.Adapter(factors, config.scale, base_in(about_run))


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
