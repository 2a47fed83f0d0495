"""The losses that TRL has too, against its own code: `GRPOTrainer._compute_loss` as installed,
called with given log-probabilities in place of a model's. (`make test-slow` installs TRL by the
extra `bench`.)"""

import collections
import dataclasses
import types

import jax
import numpy as np
import pytest

from jaxdeep.data.pack import pack, to_row
from jaxdeep.rl.objective import Clip, Correction, Kl, Objective
from jaxdeep.train import losses
from jaxdeep.train.losses import ReferenceLogps
from jaxdeep.types import Piece

pytestmark = pytest.mark.slow

LONGEST = 30  # tokens of a completion, what dr_grpo divides by
CASES = {
    "grpo": (Objective(clip=Clip(0.2, 0.2), aggregate="sequence"), dict(loss_type="grpo")),
    "grpo with kl": (
        Objective(clip=Clip(0.2, 0.2), aggregate="sequence", kl=Kl("k3", 0.04)),
        dict(loss_type="grpo", beta=0.04),
    ),
    "two-sided": (
        Objective(clip=Clip(0.2, 0.28, dual=1.5)),
        dict(loss_type="dapo", epsilon_high=0.28, delta=1.5),
    ),
    "dr_grpo": (
        Objective(clip=Clip(0.2, 0.2), aggregate="constant", length=LONGEST),
        dict(loss_type="dr_grpo"),
    ),
    "dapo": (Objective(clip=Clip(0.2, 0.28)), dict(loss_type="dapo", epsilon_high=0.28)),
    "bnpo": (Objective(clip=Clip(0.2, 0.2)), dict(loss_type="bnpo")),
    "gspo": (
        Objective("gspo", clip=Clip(0.03, 0.04), aggregate="sequence"),
        dict(loss_type="grpo", level="sequence", epsilon_low=0.03, epsilon_high=0.04),
    ),
    "cispo": (Objective("cispo", clip=Clip(None, 0.3)), dict(loss_type="cispo", epsilon_high=1.3)),
    "truncated": (
        Objective(clip=Clip(0.2, 0.28), correction=Correction("truncate", high=1.2)),
        dict(loss_type="dapo", epsilon_high=0.28, mode="token_truncate", bounds=(0.0, 1.2)),
    ),
    "masked, with kl": (
        Objective(clip=Clip(0.2, 0.28), kl=Kl("k3", 0.1), correction=Correction("mask", 0.8, 1.25)),
        dict(loss_type="dapo", epsilon_high=0.28, mode="token_mask", bounds=(0.8, 1.25), beta=0.1),
    ),
}


@dataclasses.dataclass
class Rollouts:
    """Rollouts in TRL's layout: completions in rows, padded on the right."""

    mask: np.ndarray  # 0 at tool results and padding
    real: np.ndarray  # 0 at padding
    sampler: np.ndarray
    own: np.ndarray
    base: np.ndarray
    now: np.ndarray
    advantage: np.ndarray


def rollouts(seed, n=8, prompt=3):
    rng = np.random.default_rng(seed)
    mask, real = np.zeros((2, n, LONGEST))
    for i in range(n):
        length = rng.integers(8, LONGEST + 1)
        real[i, :length] = 1
        mask[i, :length] = rng.random(length) < 0.7
        mask[i, 0] = 1
    sampler = -3 * rng.random((n, LONGEST))
    own = sampler + rng.normal(0, 0.2, (n, LONGEST))
    base, now = (own + rng.normal(0, by, (n, LONGEST)) for by in (0.3, 0.2))
    return Rollouts(mask, real, sampler, own, base, now, rng.normal(0, 1, n))


def trl_loss(
    r,
    *,
    loss_type,
    level="token",
    mode=None,
    bounds=None,
    beta=0.0,
    delta=None,
    epsilon_low=0.2,
    epsilon_high=0.2,
):
    """(loss, its gradient by log-probability)"""
    torch = pytest.importorskip("torch")
    trainer = pytest.importorskip("trl").GRPOTrainer

    def tensor(x):
        return torch.tensor(x, dtype=torch.float64)

    now = tensor(r.now).requires_grad_()
    alone = types.SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
    )
    stub = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (now, torch.zeros_like(now), None),
        model=types.SimpleNamespace(training=True),
        args=types.SimpleNamespace(
            delta=delta, use_bias_correction_kl=False, steps_per_generation=1
        ),
        accelerator=alone,
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=beta,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        use_vllm=mode is not None,
        vllm_importance_sampling_correction=mode is not None,
        max_completion_length=LONGEST,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
    )
    n = len(r.mask)
    inputs = dict(
        prompt_ids=torch.zeros((n, 1), dtype=torch.long),
        prompt_mask=torch.ones((n, 1)),
        completion_ids=torch.zeros(r.real.shape, dtype=torch.long),
        completion_mask=tensor(r.real),
        tool_mask=tensor(r.mask),
        advantages=tensor(r.advantage),
        old_per_token_logps=tensor(r.own),
        ref_per_token_logps=tensor(r.base),
        num_items_in_batch=tensor(r.mask.sum()),
    )
    if mode is not None:
        ratio = torch.exp((tensor(r.own) - tensor(r.sampler)) * tensor(r.mask))
        low, high = bounds
        inputs["importance_sampling_ratio"] = (
            ratio.clamp(low, high)
            if mode == "token_truncate"
            else ratio.masked_fill((ratio < low) | (ratio > high), 0.0)
        )
    loss = trainer._compute_loss(stub, stub.model, inputs)
    loss.backward()
    return loss.item(), (now.grad * tensor(r.mask)).numpy()


def our_loss(r, objective, *, prompt=3):
    """(loss, its gradient in TRL's layout), packed three to a row."""
    rows, spots = [], {}
    for i, (mask, real) in enumerate(zip(r.mask, r.real, strict=True)):
        said = np.flatnonzero(real)
        pieces = [Piece([100 + i] * prompt, "world")]
        for t in said:
            author = "policy" if mask[t] else "world"
            pieces.append(Piece([100 + i], author, [r.sampler[i, t]] if mask[t] else None))
        rows.append(to_row(pieces, advantage=r.advantage[i]))
    (batch,) = pack(rows, B=4, T=3 * (LONGEST + prompt))
    own_BT, base_BT, now_BT = np.zeros((3, *batch.learn_BT.shape), np.float32)
    for i in range(len(rows)):
        at = np.argwhere(batch.tokens_BT == 100 + i)[prompt:]
        for t, (b, k) in enumerate(at):
            spots[i, t] = b, k
            own_BT[b, k], base_BT[b, k], now_BT[b, k] = r.own[i, t], r.base[i, t], r.now[i, t]
    graded = jax.value_and_grad(losses.loss, has_aux=True)
    (total, _), grad_BT = graded(
        now_BT, np.zeros_like(now_BT), batch, ReferenceLogps(own_BT, base_BT), objective=objective
    )
    count, grad = losses.denominator([batch], objective), np.zeros(r.mask.shape)
    for (i, t), place in spots.items():
        grad[i, t] = grad_BT[place] / count
    return float(total) / count, grad


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_those_of_trl(case):
    objective, settings = CASES[case]
    for seed in range(4):
        r = rollouts(seed)
        theirs, their_grad = trl_loss(r, **settings)
        ours, our_grad = our_loss(r, objective)
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
        np.testing.assert_allclose(our_grad, their_grad, rtol=1e-5, atol=1e-6)
        assert np.count_nonzero(their_grad) > 30
