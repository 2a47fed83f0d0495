"""Low-rank adapters (LoRA, arXiv 2106.09685): float32 factors beside frozen weights.

The factors of an adapter are a dictionary from the name of a linear to a pair, stacked over layers:
`{"wq": {"a": [L, in, R], "b": [L, R, out]}}`; experts have a dimension E after L. This dictionary
is what is trained, optimized and checkpointed. With its scale it becomes an `Adapter`, the form in
which the model, the engine and the files take it; the effect on a linear is `x @ a @ b * scale`.

`decoder.forward` takes None (the weights alone), an Adapter, a `Bank` (several adapters, of which
each row of a batch uses any weighted mixture), or a tuple of these, whose effects add up.
`linear.Layer` applies them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxdeep.errors import ConfigError
from jaxdeep.model import tensors
from jaxdeep.model import weights as model_weights
from jaxdeep.model.config import Config
from jaxdeep.model.families import LINEARS
from jaxdeep.model.identity import Base, check, digest
from jaxdeep.parallel import mesh as meshes
from jaxdeep.settings import Above, AtLeast, section

LINEAR_OF = {module.rpartition(".")[2]: name for name, module in LINEARS.items()}
"""A linear by the last part of its published name, by which PEFT calls it."""


@section
class LoraConfig:
    """The adapter to train, and frozen ones under it."""

    rank: Annotated[int, AtLeast(0), "its rank; 0 trains every weight of the base instead"]
    alpha: Annotated[float, Above(0), "its scale times its rank"]
    targets: Annotated[
        tuple[str, ...],
        "the linears that it is added to, by their names here or in PEFT; all-linear is all",
    ] = model_weights.LINEARS
    under: Annotated[
        tuple[str, ...],
        "frozen adapters between the base and the trained one: folders of runs or of PEFT adapters",
    ] = ()

    def __post_init__(self) -> None:
        names = model_weights.LINEARS
        given = tuple(dict.fromkeys(LINEAR_OF.get(name, name) for name in self.targets))
        given = names if given == ("all-linear",) else given
        if not given or not set(given) <= set(names):
            raise ConfigError(
                f"lora.targets={self.targets}: choose some of {', '.join(names)} (or by their "
                f"names in PEFT, {', '.join(LINEAR_OF)}, or all-linear)"
            )
        object.__setattr__(self, "targets", given)
        if self.under and not self.rank:
            raise ConfigError(
                f"lora.under={self.under} lies under an adapter, and lora.rank=0 trains none: "
                "merge it into the base (export --what=merged), or set lora.rank"
            )

    @property
    def scale(self) -> float:
        """The factor on the product `a @ b`."""
        return self.alpha / max(self.rank, 1)


@struct.dataclass
class Adapter:
    """One adapter as it is handed around.

    `scale` is alpha / rank. Passed into a jitted function it is data, and another one compiles
    nothing; made inside one from a number, it is a constant. `base` is the base the adapter belongs
    to, None if that is not known.
    """

    factors: dict[str, Any]
    scale: float | jax.Array
    base: Base | None = struct.field(pytree_node=False, default=None)

    @property
    def config(self) -> LoraConfig:
        """Its rank, alpha and linears. Not inside jit."""
        rank = next(iter(self.factors.values()))["a"].shape[-1]
        targets = tuple(name for name in model_weights.LINEARS if name in self.factors)
        # alpha / rank * rank can miss alpha in the last digit
        return LoraConfig(rank, float(f"{float(self.scale) * rank:.12g}"), targets)


@struct.dataclass
class Bank:
    """Adapters of the same linears and rank, and how much of each every row uses.

    `factors` is as in one adapter with a dimension A after L: {"wq": {"a": [L, A, in, R], ...}}.
    `mix_BA` [B, A] float32 is the weight of each adapter times its scale: a row of zeros is the
    base, a single entry chooses an adapter, several compose. Both are data: a change compiles
    nothing.
    """

    factors: dict[str, Any]
    mix_BA: jax.Array


def leaves(
    cfg: Config, lora: LoraConfig, *, adapters: int = 0
) -> dict[str, dict[str, model_weights.Leaf]]:
    """The factors' shapes and axes, derived from the weights they stand beside; with `adapters`,
    those of a Bank of that many."""
    layers = model_weights.published(cfg)["layers"]
    A, none = ((adapters,), (None,)) if adapters else ((), ())
    out = {}
    for name in lora.targets:
        L, *E, inputs, outputs = layers[name].shape
        layer, *expert, i, o = layers[name].axes
        out[name] = {
            "a": model_weights.Leaf(
                (L, *A, *E, inputs, lora.rank), (layer, *none, *expert, i, "rank"), inputs
            ),
            "b": model_weights.Leaf(
                (L, *A, *E, lora.rank, outputs), (layer, *none, *expert, "rank", o), 0
            ),
        }
    return out


def init(key: jax.Array, cfg: Config, lora: LoraConfig) -> dict:
    """Fresh factors: `a` uniform as in PEFT's default (Kaiming with a = sqrt 5), `b` zero, so that
    a new adapter changes nothing."""
    names = leaves(cfg, lora)
    keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    return {
        name: {
            "a": jax.random.uniform(keys[name], pair["a"].shape, jnp.float32, -1, 1)
            * pair["a"].fan_in ** -0.5,
            "b": jnp.zeros(pair["b"].shape, jnp.float32),
        }
        for name, pair in names.items()
    }


def place(adapter: Adapter, cfg: Config, mesh: jax.sharding.Mesh) -> Adapter:
    """A frozen adapter on the mesh, to be handed to programs again and again: each factor sharded
    as the weight it stands beside, the scale a float32 on every device."""
    tree = leaves(cfg, adapter.config)
    return adapter.replace(
        factors=jax.device_put(adapter.factors, model_weights.shardings(cfg, mesh, tree)),
        scale=jax.device_put(np.float32(adapter.scale), meshes.replicated(mesh)),
    )


def placed_shapes(cfg: Config, lora: LoraConfig, mesh: jax.sharding.Mesh) -> Adapter:
    """The shapes of what `place` makes of an adapter with these settings."""
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=meshes.replicated(mesh))
    return Adapter(model_weights.shapes(cfg, mesh, leaves(cfg, lora), "float32"), scale)


def stack(adapters: Sequence[Adapter], weights_BA: jax.Array) -> Bank:
    """A Bank of these adapters, of which each row uses so much of each as `weights_BA` says.
    ConfigError where their linears or ranks differ."""
    shapes = [jax.tree.map(jnp.shape, adapter.factors) for adapter in adapters]
    if any(shape != shapes[0] for shape in shapes):
        raise ConfigError(
            "a bank needs adapters of the same linears and rank: pad the smaller ones"
        )
    factors = jax.tree.map(lambda *x: jnp.stack(x, 1), *(adapter.factors for adapter in adapters))
    scale_A = jnp.stack([jnp.float32(adapter.scale) for adapter in adapters])
    return Bank(factors, weights_BA * scale_A)


def concatenate(adapters: Sequence[Adapter]) -> Adapter:
    """The one adapter, of scale 1, whose effect is the sum of theirs: what an engine samples from,
    or a folder holds, where several lie over each other. Ranks add up; a linear that one of them
    does not have gets zeros of its rank."""
    ranks = [adapter.config.rank for adapter in adapters]
    factors = {}
    for name in model_weights.LINEARS:
        some = next((x.factors[name] for x in adapters if name in x.factors), None)
        if some is None:
            continue
        lead, inputs, outputs = some["a"].shape[:-2], some["a"].shape[-2], some["b"].shape[-1]
        a, b = [], []
        for adapter, rank in zip(adapters, ranks, strict=True):
            pair = adapter.factors.get(name)
            a.append(pair["a"] if pair else jnp.zeros((*lead, inputs, rank)))
            b.append(pair["b"] if pair else jnp.zeros((*lead, rank, outputs)))
            b[-1] = b[-1] * jnp.float32(adapter.scale)
        factors[name] = {"a": jnp.concatenate(a, axis=-1), "b": jnp.concatenate(b, axis=-2)}
    return Adapter(factors, 1.0, adapters[0].base)


def concatenated(configs: Sequence[LoraConfig]) -> LoraConfig:
    """The settings of what `concatenate` makes of adapters with these settings."""
    rank = sum(config.rank for config in configs)
    targets = {name for config in configs for name in config.targets}
    return LoraConfig(
        rank, float(rank), tuple(name for name in model_weights.LINEARS if name in targets)
    )


def merge(params: dict, adapter: Adapter) -> dict:
    """The base with the adapter's effect added to its weights; one of the opposite scale takes it
    out again. ConfigError for int8 weights, whose rounding would swallow it."""
    layers = dict(params["layers"])
    for name, pair in adapter.factors.items():
        if isinstance(layers[name], dict):
            raise ConfigError(f"{name} is int8: merge into the base as published, then quantize")
        delta = jnp.einsum("...ir,...ro->...io", pair["a"], pair["b"]) * adapter.scale
        layers[name] = (layers[name].astype(jnp.float32) + delta).astype(layers[name].dtype)
    return {**params, "layers": layers}


def base_over(base: Base | None, under: Sequence[Adapter]) -> Base | None:
    """What an adapter that is trained over `base` and these frozen adapters belongs to."""
    if base is None or not under:
        return base
    content = []
    for adapter in under:
        for name, pair in sorted(adapter.factors.items()):
            content += [
                name.encode(),
                *(tensors.on_host(pair[key]).tobytes() for key in ("a", "b")),
            ]
        content.append(np.float32(adapter.scale).tobytes())
    return base._replace(identity=f"{base.identity}+{digest(content)}")


def check_under(under: Sequence[Adapter], base: Base | None) -> None:
    """CheckpointError for a frozen adapter of another base than `base`, or one that was trained
    over other adapters than those before it."""
    for i, adapter in enumerate(under):
        if adapter.base is not None:
            over = "+" in adapter.base.identity
            check(f"lora.under[{i}]", adapter.base, base_over(base, under[:i]) if over else base)


def factors_and_scales(lora: Any) -> tuple[tuple[dict, ...], tuple[float | jax.Array, ...]]:
    """What `linear.Layer` needs of what `forward` is given: the factors of each adapter, to scan
    over layers, and the scale of each, [B, A] for a Bank."""
    adapters = () if lora is None else lora if isinstance(lora, tuple) else (lora,)
    return (
        tuple(adapter.factors for adapter in adapters),
        tuple(x.mix_BA if isinstance(x, Bank) else x.scale for x in adapters),
    )
