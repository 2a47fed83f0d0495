"""The sizes of an engine: how many pages, and the few shapes that its programs are called with."""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax

from jaxdeep.errors import ConfigError
from jaxdeep.model import paged
from jaxdeep.model.config import Config
from jaxdeep.parallel import mesh as meshes

TABLE = 3 * 2**18  # bytes that a call's table of pages may have: TPUs' kernel reads it from 1 MiB
STOPS, WIDTH = 8, 8  # stops a request may name, and tokens of one
CALL_FRACTIONS = (4, 1)  # calls are of all rows, or of a quarter where so few are left


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """At most `slots` conversations in progress, of at most `length` tokens each, in every process.

    `cache_gb` is the room for keys and values on all devices of a process together, 0 enough for all slots
    at full length. It is in pages of `page` tokens, 0 as few as the table of a call has room for. Prompts
    enter up to `chunk` tokens at a time, cut into tiles of `tile`; answers leave every `steps` tokens.
    `adapters` may be held at once.

    Log-probabilities depend in their last bits on the size of a call and on which call computed a key.
    `exact` makes both independent of time, as long as no row is paused: calls have one size, at the cost
    of speed where few rows are left, and a conversation that goes on computes up to a page again.
    """

    slots: int
    length: int
    cache_gb: float = 0.0
    page: int = 0
    chunk: int = 256
    tile: int = 16
    steps: int = 8
    adapters: int = 1
    exact: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < 0 or (value == 0 and field.name not in ("cache_gb", "page", "exact")):
                raise ConfigError(f"engine.{field.name} must be positive, got {value}")
        if self.chunk % self.tile:
            raise ConfigError(f"engine.chunk={self.chunk} must be tiles of engine.tile={self.tile}")
        if not self.page:
            sizes = (16 * 2**n for n in itertools.count())
            page = next(
                n for n in sizes if 4 * self._pages(n) * max(self.slots, self.tiles) < TABLE
            )
            object.__setattr__(self, "page", page)

    @property
    def tiles(self) -> int:
        """Of a call that takes in prompts."""
        return self.chunk // self.tile

    @property
    def table(self) -> int:
        """Pages that the table of a row has room for."""
        return self._pages(self.page)

    def _pages(self, page: int) -> int:
        return -(-(self.length + self.tile) // page)

    def rows(self, most: int, part: int, shards: int) -> int:
        """Rows of a call that has a part of the most, the same on each shard."""
        part = 1 if self.exact else part
        return max(most // part // shards, 1) * shards


def devices(cfg: Config, mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """Where an engine samples from a model that is trained on a mesh: see `mesh.local`."""
    return meshes.local(mesh, math.gcd(cfg.N, cfg.F, cfg.V, cfg.E))


def shards_of(mesh: jax.sharding.Mesh) -> int:
    """How many parts of a process's devices have rows and pages of their own."""
    return mesh.shape["replica"] * mesh.shape["data"] // meshes.processes_of(mesh)


def pages(engine: EngineConfig, cfg: Config, mesh: jax.sharding.Mesh) -> int:
    """Pages over all devices of a process. ConfigError where the sizes do not divide over them, or are too small."""
    shards = shards_of(mesh)
    for name, value in (("slots", engine.slots), ("chunk / engine.tile", engine.tiles)):
        if value % shards:
            raise ConfigError(
                f"engine.{name}={value} must divide over replica*data={shards} devices"
            )
    if engine.length > cfg.limit:
        raise ConfigError(
            f"engine.length={engine.length} is beyond the model's {cfg.limit} positions"
        )
    count = engine.slots * -(-engine.length // engine.page)
    if engine.cache_gb:
        count = int(engine.cache_gb * 1e9 / paged.page_bytes(cfg, mesh, engine.page))
    if count < shards:
        raise ConfigError(
            f"engine.cache_gb={engine.cache_gb} holds {count} pages of {engine.page} tokens: "
            f"each of {shards} replica*data devices needs one"
        )
    return count // shards * shards
