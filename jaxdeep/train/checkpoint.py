"""Checkpoints of a run: what is trained, the optimizer, the step, and where the data stands.

Orbax writes each in the background to a temporary folder and renames it (in a bucket: marks it as whole),
so a kill leaves the last good one whole. One that a disk has damaged is passed over.
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
from jaxdeep.model import identity
from jaxdeep.parallel import exchange
from jaxdeep.train import state as states

NONE = -sys.float_info.max  # the score of what was not evaluated: Orbax wants a number


def shape_of(spec: states.Spec) -> dict[str, Any]:
    """What a checkpoint must agree in with the run that reads it."""
    model = spec.model
    return {
        **{k: getattr(model, k) for k in ("V", "D", "F", "L", "N", "K", "H", "tie")},
        "rank": spec.lora.rank,
        "targets": [] if spec.full else sorted(spec.lora.targets),
    }


def folder(path: str | os.PathLike) -> epath.Path:
    """The folder of a run's checkpoints, from a local path or one in a bucket (gs://, s3://); ConfigError
    where what reads such a bucket is not installed."""
    if "://" not in str(path):
        return epath.Path(path).absolute() / "checkpoints"
    try:
        epath.Path(path).exists()
    except ImportError as error:
        raise ConfigError(f"{path} cannot be reached: {error}") from error
    return epath.Path(path) / "checkpoints"


class Checkpoints:
    """The checkpoints in `workdir/checkpoints`, `workdir` local or in a bucket: the last `keep` of them, and
    the best of those saved with a score. Each describes itself: shape, base, and the `run` (configuration,
    command, commit). Where something is trained over a frozen `base`, a run over another one is refused."""

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
        """Write the state after `step`, in the background: it is whole on disk after the next `save`,
        `wait` or `close`, which also raise what went wrong. The best has the highest `score`. A step that
        is saved already stays as it is."""
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
                metrics={"score": NONE if score is None else score},
                args=ocp.args.Composite(
                    trained=ocp.args.StandardSave(state.trained),
                    optimizer=ocp.args.StandardSave({"opt": state.opt, "step": state.step}),
                    about=ocp.args.JsonSave(about),
                ),
            )

    def wait(self) -> None:
        """Until all that was saved is on disk."""
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
        return None if step is None or self.manager.metrics(step)["score"] == NONE else step

    def restore(self, state: states.State) -> tuple[int, states.State, dict[str, Any]]:
        """The newest checkpoint in the shardings of `state`: (step, state, position). One that cannot be
        read, where an older one can, is named, and moved to `checkpoints-torn`."""

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
            held = states.State(back["trained"], opt["opt"], opt["step"])
            return step, held, back["about"]["position"]

        return self._newest(read)

    def trained(self, like: Any, step: int | None = None) -> Any:
        """What the newest checkpoint trained, or that of `step`, in the shardings of `like`."""

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
        """What `read` makes of the newest checkpoint that can be read."""
        steps = self.steps()[::-1]
        torn: dict[int, Exception] = {}
        for step in steps:
            failed: Exception | None = None
            try:
                self._check(step)
                found = read(step)
            except JaxdeepError:
                raise
            except Exception as error:  # Orbax has nothing narrower for arrays that it cannot read
                failed = error
            if any(exchange.all_gather_objects([failed is not None])):  # all go on from the same
                torn[step] = failed or CheckpointError("another process cannot read it")
                continue
            for bad, error in torn.items():
                self._set_aside(bad, error)
            return found
        if not steps:
            raise CheckpointError(
                f"{self.path} holds no checkpoint: has a run finished a step there?"
            )
        reason = torn[steps[0]]
        raise CheckpointError(f"no checkpoint in {self.path} can be read: {reason}") from reason

    def _set_aside(self, step: int, reason: Exception) -> None:
        place = self.path.with_name("checkpoints-torn")
        said = (str(reason).splitlines() or [repr(reason)])[0]
        print(f"checkpoint {step} cannot be read ({said:.200}): moved to {place}", file=sys.stderr)
        if jax.process_index() == 0:
            place.mkdir(exist_ok=True)
            if not place.exists():  # in a bucket no folder is empty
                (place / "README").write_text("Checkpoints that could not be read.\n")
            (place / str(step)).rmtree(missing_ok=True)
            (self.path / str(step)).rename(place / str(step))
        multihost_utils.sync_global_devices(f"checkpoint {step} is moved")
        self.manager.reload()

    def _check(self, step: int) -> None:
        about = self.manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))
        held, wanted = about["about"]["shape"], shape_of(self.spec)
        if not self.spec.full:  # the factors alone do not say how much they count
            held = held | {"alpha": about["about"]["lora"]["alpha"]}
            wanted["alpha"] = self.spec.lora.alpha
        differ = [
            f"{name}={held.get(name)} there, {value} here"
            for name, value in wanted.items()
            if held.get(name) != value
        ]
        if differ:
            raise CheckpointError(
                f"{self.path}/{step} is a checkpoint of another shape: {'; '.join(differ)}. "
                "Use the configuration it was made with, or another --workdir"
            )
        identity.check(f"{self.path}/{step}", base_in(about["about"]), self.base)

    def close(self) -> None:
        """Let go of the folder, when all is on disk."""
        self.wait()
        self.manager.close()


def _score(metrics: dict[str, float]) -> float:
    return metrics["score"]


@contextlib.contextmanager
def _disk(path: epath.Path) -> Iterator[None]:
    """A full disk is said by Orbax in the words of an error of another kind."""
    try:
        yield
    except (ValueError, OSError) as error:
        if "no space left" not in str(error).lower():
            raise
        # Orbax leaves tasks behind that say the same again, a page each
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def exists(workdir: str | os.PathLike) -> bool:
    """Whether a run has left a checkpoint in `workdir`."""
    path = folder(workdir)
    return path.is_dir() and bool(ocp.utils.checkpoint_steps(path))


def about(workdir: str | os.PathLike) -> dict[str, Any]:
    """The description kept with the newest checkpoint of a run, without reading any array."""
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
    """The base that the description of a checkpoint names."""
    return identity.Base(**about["base"]) if about.get("base") else None


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
