"""Checkpoints of a run: what is trained, the optimizer, the step, and where the data stands.

Orbax writes each to a temporary folder and renames it, so a kill leaves the last good one whole.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxdeep.errors import CheckpointError
from jaxdeep.model import identity
from jaxdeep.train import state as states


def shape_of(spec: states.Spec) -> dict[str, Any]:
    """What a checkpoint must agree in with the run that reads it."""
    model = spec.model
    return {
        **{k: getattr(model, k) for k in ("V", "D", "F", "L", "N", "K", "H", "tie")},
        "rank": spec.lora.rank,
        "targets": [] if spec.full else sorted(spec.lora.targets),
    }


class Checkpoints:
    """The checkpoints in `workdir/checkpoints`, the last `keep` of them. Where something is trained over
    a frozen `base`, they remember it, and a run over another one is refused."""

    def __init__(
        self,
        workdir: pathlib.Path,
        spec: states.Spec,
        *,
        keep: int = 2,
        base: identity.Base | None = None,
    ) -> None:
        self.path, self.spec, self.base = workdir.absolute() / "checkpoints", spec, base
        self.manager = ocp.CheckpointManager(
            self.path,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=False, create=True
            ),
        )

    def save(self, step: int, state: states.State, position: dict[str, Any]) -> None:
        """Write the state after `step`; it is whole on disk when this returns."""
        self.manager.save(
            step,
            args=ocp.args.Composite(
                trained=ocp.args.StandardSave(state.trained),
                optimizer=ocp.args.StandardSave({"opt": state.opt, "step": state.step}),
                about=ocp.args.JsonSave(
                    {
                        "shape": shape_of(self.spec),
                        "lora": dataclasses.asdict(self.spec.lora),
                        "position": position,
                        "base": self.base and self.base._asdict(),
                    }
                ),
            ),
        )

    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self.manager.latest_step()

    def restore(self, state: states.State) -> tuple[int, states.State, dict[str, Any]]:
        """The newest checkpoint in the shardings of `state`: (step, state, position)."""
        step = self._newest()
        self._check(step)
        back = self.manager.restore(
            step,
            args=ocp.args.Composite(
                trained=ocp.args.StandardRestore(_abstract(state.trained)),
                optimizer=ocp.args.StandardRestore(
                    _abstract({"opt": state.opt, "step": state.step})
                ),
                about=ocp.args.JsonRestore(),
            ),
        )
        opt = back["optimizer"]
        return (
            step,
            states.State(back["trained"], opt["opt"], opt["step"]),
            back["about"]["position"],
        )

    def trained(self, like: Any) -> Any:
        """What the newest checkpoint trained, in the shardings of `like`."""
        step = self._newest()
        self._check(step)
        args = ocp.args.Composite(trained=ocp.args.StandardRestore(_abstract(like)))
        return self.manager.restore(step, args=args)["trained"]

    def _newest(self) -> int:
        step = self.latest()
        if step is None:
            raise CheckpointError(
                f"{self.path} holds no checkpoint: has a run finished a step there?"
            )
        return step

    def _check(self, step: int) -> None:
        about = self.manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))
        held, wanted = about["about"]["shape"], shape_of(self.spec)
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
        """Let go of the folder."""
        self.manager.close()


def exists(workdir: pathlib.Path) -> bool:
    """Whether a run has left a checkpoint in `workdir`."""
    path = workdir.absolute() / "checkpoints"
    return path.is_dir() and bool(ocp.utils.checkpoint_steps(path))


def about(workdir: pathlib.Path) -> dict[str, Any]:
    """The description kept with the newest checkpoint of a run, without reading any array."""
    path = workdir.absolute() / "checkpoints"
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
