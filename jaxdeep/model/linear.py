"""The linears of a layer: weights, in the model's dtype or int8, and the adapters beside them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxdeep.model.weights import bias_of
from jaxdeep.parallel import mesh as meshes


@jax.custom_vjp
def low_rank(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`x @ a @ b` in the dtype of `x`, [..., out]; the factors' gradients are in their own."""
    return _low_rank_forward(x, a, b)[0]


def _low_rank_forward(x: jax.Array, a: jax.Array, b: jax.Array) -> tuple:
    low = x @ a.astype(x.dtype)
    return low @ b.astype(x.dtype), (x, low, a, b)


def _low_rank_backward(saved: tuple, grad: jax.Array) -> tuple:
    # The narrow operand comes first in each product: XLA's CPU backend transposes, and so copies,
    # the first one. The order of automatic differentiation would have it copy the wide one.
    x, low, a, b = saved
    back = grad @ b.astype(x.dtype).T
    da = jnp.einsum("...r,...i->ri", back, x, preferred_element_type=a.dtype).T
    db = jnp.einsum("...r,...o->ro", low, grad, preferred_element_type=b.dtype)
    return back @ a.astype(x.dtype).T, da, db


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer's weights and adapters, as functions: `layer(x, "wq")` is a linear.

    `factors` are those of each adapter for this layer, `scales` a number for each, or [B, A] for a
    Bank. With `gathered` every device gathers a linear whole and applies it to positions of its own
    (`context.sequence_parallel`): in training that moves a quarter to a half of the bytes that
    summing hidden states over the axis `model` would.
    """

    weights: dict[str, Any]
    factors: tuple[dict, ...]
    scales: tuple[float | jax.Array, ...]
    gathered: bool = False

    def __call__(self, x_BTi: jax.Array, name: str) -> jax.Array:
        """`x_BTi` through the linear `name`, its bias and the adapters beside it; [B, T, out]."""
        weight, dtype = self._gather(self.weights[name]), x_BTi.dtype
        if isinstance(weight, dict):
            # the scale belongs to an output, so it comes after the product, which stays in `dtype`
            y_BTo = (x_BTi @ weight["q"].astype(dtype)) * weight["scale"].astype(dtype)
        else:
            y_BTo = x_BTi @ weight
        if (bias := bias_of(name)) in self.weights:
            y_BTo = y_BTo + self._gather(self.weights[bias])
        for factors, scale in zip(self.factors, self.scales, strict=True):
            if name not in factors:
                continue
            a, b = self._gather((factors[name]["a"], factors[name]["b"]))
            if jnp.ndim(scale) == 0:
                y_BTo = y_BTo + low_rank(x_BTi, a, b) * jnp.asarray(scale, dtype)
            else:
                low_BTAR = jnp.einsum("bti,air->btar", x_BTi, a.astype(dtype))
                low_BTAR = low_BTAR * scale[:, None, :, None].astype(dtype)
                y_BTo = y_BTo + jnp.einsum("btar,aro->bto", low_BTAR, b.astype(dtype))
        return checkpoint_name(y_BTo, "linear")

    def _gather(self, weight: Any) -> Any:
        return jax.tree.map(meshes.constrain, weight) if self.gathered else weight
