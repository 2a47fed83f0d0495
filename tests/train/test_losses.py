"""The losses against numpy in double precision, in value and gradient."""

import functools

import jax
import numpy as np
import pytest

from jaxdeep.data.pack import pack, to_row
from jaxdeep.errors import ConfigError
from jaxdeep.train.losses import Clip, loss
from jaxdeep.types import Batch, Piece

CLIP = Clip(low=0.2, high=0.28)
CLIPS = [None, CLIP, Clip(0.5, 3.0)]


@functools.partial(jax.jit, static_argnames="clip")
def value_and_grad(logp_BT, entropy_BT, batch, *, clip):
    """((loss, metrics), gradient by log-probability)."""
    return jax.value_and_grad(loss, has_aux=True)(logp_BT, entropy_BT, batch, clip=clip)


def example(seed, *, B=3, T=40, n=9):
    """A packed batch, and what a model might give: log-probabilities off the sampler's, entropies."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        pieces = []
        for author in ("world", "policy", "world", "policy"):
            k = int(rng.integers(1, 5))
            logps = (-3 * rng.random(k)).tolist() if author == "policy" else None
            pieces.append(Piece(rng.integers(0, 50, k).tolist(), author, logps))
        rows.append(to_row(pieces, advantage=float(rng.normal())))
    (batch,) = pack(rows, B=B, T=T)
    assert (batch.segments_BT == 0).any() and batch.segments_BT.max() > 1
    gap_BT = rng.normal(0, 0.4, (B, T))
    for clip in CLIPS[1:]:  # no finite difference across a corner
        for edge in (np.log(1 - clip.low), np.log(1 + clip.high)):
            gap_BT = np.where(abs(gap_BT - edge) < 0.01, edge + 0.02, gap_BT)
    logp_BT = np.where(batch.learn_BT > 0, batch.logp_BT + gap_BT, -5 * rng.random((B, T)))
    return logp_BT.astype(np.float32), rng.random((B, T)).astype(np.float32), batch


def reference(logp_BT, batch, clip):
    """The loss and its metrics, one token after the other."""
    out = dict.fromkeys(("loss", "clipped", "mismatch_kl", "logp_diff"), 0.0) | {"max_logp_diff": 0}
    for b, t in zip(*np.nonzero(batch.learn_BT), strict=True):
        advantage, gap = float(batch.advantage_BT[b, t]), float(logp_BT[b, t] - batch.logp_BT[b, t])
        if clip is None:
            out["loss"] -= float(logp_BT[b, t]) * advantage
            continue
        ratio = np.exp(gap)
        bounded = min(max(ratio, 1 - clip.low), 1 + clip.high)
        out["loss"] -= min(ratio * advantage, bounded * advantage)
        out["clipped"] += (advantage > 0 and ratio > 1 + clip.high) or (
            advantage < 0 and ratio < 1 - clip.low
        )
        out["mismatch_kl"] += ratio - 1 - gap
        out["logp_diff"] += abs(gap)
        out["max_logp_diff"] = max(out["max_logp_diff"], abs(gap))
    return out


def double(batch):
    return Batch(*(np.asarray(part, np.float64) for part in batch))


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("seed", range(8))
def test_value_and_metrics_equal_numpy(seed, clip):
    logp_BT, entropy_BT, batch = example(seed)
    (total, metrics), _ = value_and_grad(logp_BT, entropy_BT, batch, clip=clip)
    want = reference(logp_BT.astype(np.float64), double(batch), clip)
    assert total == pytest.approx(want["loss"], rel=1e-5, abs=1e-4)
    want |= {
        "tokens": batch.learn_BT.sum(),
        "entropy": (entropy_BT * batch.learn_BT).astype(np.float64).sum(),
    }
    names = {"loss", "tokens", "entropy"}
    names |= set() if clip is None else {"clipped", "mismatch_kl", "logp_diff"}
    assert set(metrics["sum"]) == names
    for name in names:
        assert metrics["sum"][name] == pytest.approx(want[name], rel=1e-5, abs=1e-4), name
    if clip is None:
        assert metrics["max"] == {}
    else:
        assert want["clipped"] == metrics["sum"]["clipped"]
        assert metrics["max"]["max_logp_diff"] == pytest.approx(want["max_logp_diff"], rel=1e-5)


def test_the_examples_clip_some_tokens_and_not_others():
    for clip in CLIPS[1:]:
        clipped = tokens = 0
        for seed in range(8):
            logp_BT, _, batch = example(seed)
            clipped += reference(logp_BT, batch, clip)["clipped"]
            tokens += batch.learn_BT.sum()
        assert 0.01 * tokens < clipped < 0.5 * tokens


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_equals_finite_differences(seed, clip):
    logp_BT, entropy_BT, batch = example(seed)
    _, grad_BT = value_and_grad(logp_BT, entropy_BT, batch, clip=clip)
    exact, wide_BT, eps = double(batch), logp_BT.astype(np.float64), 1e-6
    want_BT = np.zeros(logp_BT.shape)
    for place in np.ndindex(logp_BT.shape):
        step_BT = np.zeros(logp_BT.shape)
        step_BT[place] = eps
        up, down = (reference(wide_BT + sign * step_BT, exact, clip)["loss"] for sign in (1, -1))
        want_BT[place] = (up - down) / (2 * eps)
    np.testing.assert_allclose(grad_BT, want_BT, rtol=1e-4, atol=1e-5)
    assert (want_BT != 0).sum() > 20


def one(ratio, advantage):
    """(loss, gradient, clipped) of a single learned token."""
    stored = -1.25
    (batch,) = pack(
        [to_row([Piece([1], "world"), Piece([2], "policy", [stored])], advantage=advantage)],
        B=1,
        T=3,
    )
    logp_BT = np.array([[-2.0, stored + np.log(ratio), -3.0]], np.float32)
    (total, metrics), grad_BT = value_and_grad(logp_BT, np.zeros_like(logp_BT), batch, clip=CLIP)
    assert grad_BT[0, 0] == grad_BT[0, 2] == 0
    return float(total), float(grad_BT[0, 1]), float(metrics["sum"]["clipped"])


@pytest.mark.parametrize(
    ("ratio", "advantage", "total", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, 0),  # on policy: the gradient of -A log p
        (1.0, -2.0, 2.0, 2.0, 0),
        (1.2, 1.0, -1.2, -1.2, 0),  # within
        (0.85, -1.0, 0.85, 0.85, 0),
        (2.0, 1.0, -1.28, 0.0, 1),  # more likely already, and good: enough
        (2.0, -1.0, 2.0, 2.0, 0),  # more likely, and bad: back
        (0.5, 1.0, -0.5, -0.5, 0),  # less likely, and good: back
        (0.5, -1.0, 0.8, 0.0, 1),  # less likely already, and bad: enough
        (2.0, 0.0, 0.0, 0.0, 0),
    ],
)
def test_clipping_on_both_sides_and_for_both_signs(ratio, advantage, total, gradient, clipped):
    assert one(ratio, advantage) == (
        pytest.approx(total, rel=1e-5, abs=1e-7),
        pytest.approx(gradient, rel=1e-5, abs=1e-7),
        clipped,
    )


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("stored", [0.0, 1e4, -1e4, -1e30, -np.inf])
def test_what_is_not_learned_has_no_gradient_whatever_is_stored(clip, stored):
    logp_BT, entropy_BT, batch = example(0)
    quiet_BT = batch.learn_BT == 0
    (calm, _), want_BT = value_and_grad(logp_BT, entropy_BT, batch, clip=clip)
    loud = batch._replace(logp_BT=np.where(quiet_BT, np.float32(stored), batch.logp_BT))
    odd_BT = np.where(quiet_BT, np.float32(-200.0), logp_BT)
    (total, metrics), grad_BT = value_and_grad(odd_BT, entropy_BT, loud, clip=clip)
    assert (grad_BT[quiet_BT] == 0).all()
    np.testing.assert_array_equal(grad_BT, want_BT)
    assert total == pytest.approx(float(calm), rel=1e-6)
    assert all(np.isfinite(x) for part in metrics.values() for x in part.values())


@pytest.mark.parametrize("clip", CLIPS)
def test_packing_and_microbatches_change_nothing(clip):
    rng = np.random.default_rng(1)
    by_token = -4 * rng.random(50)
    rows = []
    for _ in range(12):
        prompt, said = rng.integers(0, 50, 3).tolist(), rng.integers(0, 50, 5).tolist()
        logps = [float(by_token[t] + rng.normal(0, 0.3)) for t in said]
        pieces = [Piece(prompt, "world"), Piece(said, "policy", logps)]
        rows.append(to_row(pieces, advantage=float(rng.normal())))

    def sums(B, T):
        out = {}
        for batch in pack(rows, B=B, T=T):
            logp_BT = by_token[batch.tokens_BT].astype(np.float32)
            (_, metrics), _ = value_and_grad(logp_BT, -logp_BT, batch, clip=clip)
            for name, x in metrics["sum"].items():
                out[name] = out.get(name, 0.0) + float(x)
        return out

    alone = sums(1, 8)
    for shape in ((2, 17), (4, 40), (1, 96)):
        assert sums(*shape) == {name: pytest.approx(x, rel=1e-4) for name, x in alone.items()}


def test_sft_is_the_likelihood_of_what_was_written():
    logp_BT, entropy_BT, batch = example(2)
    batch = batch._replace(advantage_BT=batch.learn_BT)
    (total, _), grad_BT = value_and_grad(logp_BT, entropy_BT, batch, clip=None)
    assert total == pytest.approx(-logp_BT[batch.learn_BT > 0].sum(), rel=1e-5)
    np.testing.assert_array_equal(grad_BT, -batch.learn_BT)


@pytest.mark.parametrize(
    "bad",
    [
        *(dict(low=low) for low in (0.0, 1.0, -0.2, float("nan"))),
        *(dict(high=high) for high in (0.0, -1.0, float("nan"))),
    ],
)
def test_a_clip_that_is_no_range_around_one_is_refused(bad):
    with pytest.raises(ConfigError, match=r"clip low=.* high="):
        Clip(**bad)
