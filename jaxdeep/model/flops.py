"""Model FLOPs of a training step, counted from shapes, and the peak of a device.

Model FLOPs are those of PaLM's appendix B (arXiv 2204.02311): what the architecture asks for,
without what is recomputed to save memory. A multiply-add counts two. Per token, a linear costs 2
for each weight forward, 2 for the gradient of its input and 2 for the gradient of the weight, which
a frozen weight does not have. Per pair of tokens, attention costs 4 for each dimension of a head
forward and 8 backward.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Sequence

import jax
import numpy as np

from jaxdeep.model import lora
from jaxdeep.model import weights as model_weights
from jaxdeep.model.config import Config
from jaxdeep.types import Batch

PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,  # v6e
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # a device is half a chip
    "NVIDIA H100": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA A100": 312e12,
}
"""Dense bfloat16 FLOP/s of a device by the beginning of its kind, from the vendors' data sheets."""


def peak(kind: str) -> float | None:
    """The peak of a `jax.Device.device_kind` in FLOP/s; None if it is unknown, as for a CPU."""
    known = [name for name in PEAK if re.match(rf"{name}( |-|$)", kind)]
    return PEAK[max(known, key=len)] if known else None


def peak_of(mesh: jax.sharding.Mesh) -> float | None:
    """The peak of all devices of the mesh together, in FLOP/s; None if it is unknown."""
    one = peak(mesh.devices.flat[0].device_kind)
    return one and one * mesh.devices.size


def per_token(cfg: Config) -> int:
    """Weights that a token is multiplied by: all linears and the head, of a mixture those of its
    `top_k` experts."""
    tree = model_weights.published(cfg)
    head = cfg.V * cfg.D  # tied or not; the embedding is a lookup, not a product
    return head + sum(_used(cfg, leaf) for leaf in tree["layers"].values() if leaf.fan_in)


def of_adapter(cfg: Config, adapter: lora.LoraConfig) -> int:
    """The same for the factors of an adapter."""
    pairs = lora.leaves(cfg, adapter).values()
    return sum(_used(cfg, leaf) for pair in pairs for leaf in pair.values())


def of_step(
    cfg: Config,
    adapter: lora.LoraConfig,
    batches: Sequence[Batch],
    *,
    passes: int = 1,
    forwards: int = 0,
) -> float:
    """FLOPs of `passes` gradients over the (numpy) microbatches of a step, and of `forwards`
    forward passes beside them. Padding is not counted. With `adapter.rank` 0 the base itself is
    trained."""
    tokens = sum(int(np.count_nonzero(batch.segments_BT)) for batch in batches)

    def pairs(window: int) -> int:
        """Of a layer: each token with those it attends to."""
        seen = [batch.positions_BT + 1 for batch in batches]
        seen = [np.minimum(x, window) if window else x for x in seen]
        return sum(
            int((x * (batch.segments_BT > 0)).sum()) for x, batch in zip(seen, batches, strict=True)
        )

    layers = collections.Counter(cfg.windows).items()
    base = 2 * per_token(cfg) * tokens
    attention = 4 * cfg.N * cfg.H * sum(count * pairs(window) for window, count in layers)
    factors = 2 * of_adapter(cfg, adapter) * tokens if adapter.rank else 0
    forward = base + attention + factors
    backward = (base if adapter.rank else 2 * base) + 2 * attention + 2 * factors
    return float(passes * (forward + backward) + forwards * forward)


def _used(cfg: Config, leaf: model_weights.Leaf) -> int:
    size = math.prod(leaf.shape)
    return size * cfg.top_k // cfg.E if "experts" in leaf.axes else size
