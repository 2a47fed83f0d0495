"""The adapters of an engine, and the names that requests choose them by.

All adapters are stacked in one array for each factor, so that the rows of one call can use
different ones. Adapters of other ranks and linears are padded with zeros, which add nothing to the
result. The arrays have the largest rank and all the linears seen so far: an adapter that fits
compiles nothing, a larger one makes each program compile once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdeep.errors import ConfigError
from jaxdeep.model import lora
from jaxdeep.model.config import Config
from jaxdeep.sample.request import AdapterMix

RANK_AXIS = {"a": -1, "b": -2}


class AdapterBank:
    """Slots for adapters of a model, and what each name stands for. The name "" stands for the base
    until it is given an adapter.

    `factors` are those of a `lora.Bank`, None before the first adapter. If several processes share
    the arrays, `all_gather` takes a value and returns those of all processes; all of them make the
    same changes in the same order.
    """

    def __init__(
        self, cfg: Config, slots: int, all_gather: Callable[[Any], list[Any]] | None = None
    ) -> None:
        self.cfg, self.slots = cfg, slots
        self.factors: dict[str, Any] | None = None
        self.mixes = {"": AdapterMix(np.zeros(slots, np.float32))}
        self._all_gather = all_gather

    def __getitem__(self, name: str) -> AdapterMix:
        """What the name stands for. ValueError for an unknown name, with those that are known."""
        if name not in self.mixes:
            known = ", ".join(map(repr, self.mixes))
            raise ValueError(f"there is no adapter {name!r}, only {known}")
        return self.mixes[name]

    def put(
        self,
        name: str,
        adapter: lora.Adapter | None,
        version: int,
        in_flight: Iterable[AdapterMix],
    ) -> AdapterMix | None:
        """Let `name` stand for this adapter (None: the base). Returns what it stood for before.

        The adapter goes into a slot that no other name and none of the mixes `in_flight` use.
        RuntimeError if there is none, ConfigError if its factors do not fit the model.
        """
        mix_A = np.zeros(self.slots, np.float32)
        if adapter is not None:
            check_shapes(self.cfg, adapter.factors)
            slot = self._free_slot(name, in_flight)
            mix_A[slot] = adapter.scale
            self.factors = write_slot(self.factors, adapter.factors, slot, self.slots)
        return self._name(name, AdapterMix(mix_A, version))

    def compose(self, name: str, weights: Mapping[str, float]) -> AdapterMix | None:
        """Let `name` stand for the weighted sum of what other names stand for now. Returns what it
        stood for before."""
        mixes = [weight * self[other].mix_A for other, weight in weights.items()]
        return self._name(name, AdapterMix(np.sum(mixes, axis=0, dtype=np.float32)))

    def remove(self, name: str) -> AdapterMix:
        """Let `name` stand for nothing. Returns what it stood for. ValueError for an unknown name,
        and for ""."""
        mix = self[name]
        if not name:
            raise ValueError("the name '' always stands for something: let it stand for the base")
        mix.named = False
        return self.mixes.pop(name)

    def _name(self, name: str, mix: AdapterMix) -> AdapterMix | None:
        replaced = self.mixes.get(name)
        if replaced is not None:
            replaced.named = False
        self.mixes[name] = mix
        return replaced

    def _free_slot(self, name: str, in_flight: Iterable[AdapterMix]) -> int:
        mixes = [mix for other, mix in self.mixes.items() if other != name]
        mixes += in_flight
        used = np.any([np.zeros(self.slots), *(mix.mix_A for mix in mixes)], axis=0)
        if self._all_gather is not None:
            # the arrays are shared, but each process knows only its own requests
            used = np.any(self._all_gather(used.tolist()), axis=0)
        free = np.flatnonzero(~used)
        if not len(free):
            raise RuntimeError(
                f"no room for adapter {name!r}: {len(self.mixes)} names and the requests in flight "
                f"use all of EngineConfig.adapters={self.slots}; raise it, or wait for the requests"
            )
        return int(free[0])


def rank_of(factors: Mapping[str, Any]) -> int:
    """The rank of an adapter, or of a bank of them."""
    return max(pair["a"].shape[-1] for pair in factors.values())


def check_shapes(cfg: Config, factors: Mapping[str, Any]) -> None:
    """ConfigError if an adapter's factors do not have the shapes of this model's linears."""
    rank = rank_of(factors)
    # alpha is not part of the shapes: any will do
    shapes = lora.leaves(cfg, lora.LoraConfig(rank, alpha=1.0, targets=tuple(factors)))
    for name, pair in shapes.items():
        for key, leaf in pair.items():
            if (shape := factors[name][key].shape) != leaf.shape:
                raise ConfigError(
                    f"the adapter's factor {name}.{key} is {shape}, and the model takes "
                    f"{leaf.shape} at rank {rank}: the adapter is of another model"
                )


def write_slot(
    bank: Mapping[str, Any] | None, factors: Mapping[str, Any], slot: int, slots: int
) -> dict[str, Any]:
    """The arrays of a bank (None: an empty one) with an adapter's factors in one of its `slots`.
    They are larger than before if the adapter has a larger rank or linears that the bank lacks."""
    bank = dict(bank or {})
    bank |= {name: _empty(pair, slots) for name, pair in factors.items() if name not in bank}
    rank = max(rank_of(bank), rank_of(factors))

    def written(name: str, key: str) -> jax.Array:
        # a linear that this adapter lacks may still have the factors of the slot's last adapter
        new = _widen(factors[name][key], key, rank) if name in factors else 0.0
        return _widen(bank[name][key], key, rank).at[:, slot].set(new)

    return {name: {key: written(name, key) for key in pair} for name, pair in bank.items()}


def _empty(pair: Mapping[str, jax.Array], slots: int) -> dict[str, jax.Array]:
    """Zeros for `slots` adapters, [L, slots, ...], with the shardings of this pair, [L, ...]."""

    def zeros(x: jax.Array) -> jax.Array:
        sharding = None
        if isinstance(x.sharding, NamedSharding):
            layers, *rest = x.sharding.spec or (None,)
            sharding = NamedSharding(x.sharding.mesh, P(layers, None, *rest))
        return jnp.zeros((len(x), slots, *x.shape[1:]), x.dtype, device=sharding)

    return {key: zeros(x) for key, x in pair.items()}


def _widen(x: jax.Array, key: str, rank: int) -> jax.Array:
    """A factor `key` with zeros up to a rank; the same array if it has that rank."""
    missing = rank - x.shape[RANK_AXIS[key]]
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[RANK_AXIS[key]] = (0, missing)
    wide = jnp.pad(x, widths)
    # programs are compiled for this sharding, and XLA chooses the one of a result itself
    return jax.device_put(wide, x.sharding) if isinstance(x.sharding, NamedSharding) else wide
