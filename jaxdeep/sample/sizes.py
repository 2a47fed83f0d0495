"""The sizes of an engine: its pages, and the few batch sizes that its programs are called with."""

from __future__ import annotations

import itertools
import math
from typing import Annotated

import jax

from jaxdeep.errors import ConfigError
from jaxdeep.model import paged
from jaxdeep.model.config import Config
from jaxdeep.parallel import mesh as meshes
from jaxdeep.settings import AtLeast, section

# the TPU kernel keeps the page table of a call in scalar memory, of which there is 1 MiB
TABLE_BYTES = 3 * 2**18
STOPS, WIDTH = 8, 8  # the most stops that a request may name, and the most tokens of one
# A call has its maximum of rows or a quarter of it: each batch size is one more program to compile,
# and the last few conversations of a step would otherwise pay for all the slots.
CALL_FRACTIONS = (4, 1)


@section(kw_only=True)
class EngineSettings:
    """What a run configures of its engines, one in each process (section `rollout`).

    Log-probabilities depend in their last bits on the batch size of a call and on which call
    computed a key. With `exact` they do not depend on timing, as long as no request is paused:
    calls have one batch size and only full pages are shared. That costs speed when few
    conversations are left, and a conversation that goes on computes up to a page again.
    """

    slots: Annotated[int, AtLeast(1), "conversations in progress at a time, at most"]
    cache_gb: Annotated[
        float,
        AtLeast(0),
        "GB for keys and values on all devices of a process together; 0: enough for all slots",
    ] = 0.0
    chunk: Annotated[int, AtLeast(1), "tokens of prompts that a prefill call takes in"] = 256
    steps: Annotated[int, AtLeast(1), "tokens that a decode call draws for a conversation"] = 8
    exact: Annotated[bool, "results repeat to the last bit on CPUs, for slower rollouts"] = False


@section(kw_only=True)
class EngineConfig(EngineSettings):
    """All sizes of an engine: its settings and what follows from a run."""

    length: Annotated[int, AtLeast(1), "tokens of a conversation: rollout.limits.max_tokens"]
    adapters: Annotated[int, AtLeast(1), "adapters held at once"] = 1
    page: Annotated[
        int, AtLeast(0), "tokens of a page of keys and values; 0: the fewest whose table fits"
    ] = 0
    tile: Annotated[int, AtLeast(1), "tokens of a prompt in one row of a prefill call"] = 16

    def __post_init__(self) -> None:
        if self.chunk % self.tile:
            raise ConfigError(
                f"rollout.chunk={self.chunk} must be a multiple of {self.tile}, the engine's tile"
            )
        if not self.page:
            pages = (16 * 2**n for n in itertools.count())
            rows = max(self.slots, self.tiles)
            page = next(n for n in pages if 4 * self._pages(n) * rows < TABLE_BYTES)
            object.__setattr__(self, "page", page)

    @property
    def tiles(self) -> int:
        """The most tiles of a prefill call."""
        return self.chunk // self.tile

    @property
    def table(self) -> int:
        """Columns of a call's page table: the most pages of a row."""
        return self._pages(self.page)

    def _pages(self, page: int) -> int:
        # the TPU kernel also reads the padding of a prompt's last tile
        return -(-(self.length + self.tile) // page)

    def rows(self, limit: int, fraction: int, shards: int) -> int:
        """The batch size of a call at 1 / `fraction` of its maximum `limit`: a multiple of
        `shards`, and `limit` itself with `exact`."""
        fraction = 1 if self.exact else fraction
        return max(limit // fraction // shards, 1) * shards

    def call_sizes(self, limit: int, shards: int) -> list[int]:
        """The batch sizes of a call whose maximum is `limit`, in ascending order."""
        return [self.rows(limit, fraction, shards) for fraction in CALL_FRACTIONS]


def devices(cfg: Config, mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The mesh to sample on, for a model that is trained on `mesh`: see `mesh.sampling_mesh`."""
    return meshes.sampling_mesh(mesh, math.gcd(cfg.N, cfg.F, cfg.V, cfg.E))


def shards_of(mesh: jax.sharding.Mesh) -> int:
    """Shards of a process: parts of its devices that have rows and pages of their own."""
    return mesh.shape["replica"] * mesh.shape["data"] // meshes.process_count(mesh)


def pages(engine: EngineConfig, cfg: Config, mesh: jax.sharding.Mesh) -> int:
    """Pages over all shards of a process. ConfigError if the sizes do not divide over the shards,
    if conversations are longer than the model's positions, or if a shard would have no page."""
    shards = shards_of(mesh)
    if engine.slots % shards:
        raise ConfigError(
            f"rollout.slots={engine.slots} must be a multiple of replica*data={shards} devices"
        )
    if engine.tiles % shards:
        raise ConfigError(
            f"rollout.chunk={engine.chunk} must be a multiple of {engine.tile * shards}: tiles of "
            f"{engine.tile} tokens on each of replica*data={shards} devices"
        )
    if engine.length > cfg.limit:
        raise ConfigError(
            f"rollout.limits.max_tokens={engine.length} is beyond the model's {cfg.limit} positions: "
            "lower it"
        )
    count = engine.slots * -(-engine.length // engine.page)
    if engine.cache_gb:
        count = int(engine.cache_gb * 1e9 / paged.page_bytes(cfg, mesh, engine.page))
    if count < shards:
        raise ConfigError(
            f"rollout.cache_gb={engine.cache_gb} holds {count} pages of {engine.page} tokens, and "
            f"each of replica*data={shards} devices needs one: raise it, or set 0 for enough"
        )
    return count // shards * shards
