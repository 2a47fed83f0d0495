"""The losses against numpy in double precision, in value and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdeep.data.pack import pack, to_row
from jaxdeep.errors import ConfigError
from jaxdeep.rl.objective import SFT, Clip, Correction, Kl, Objective
from jaxdeep.train import losses
from jaxdeep.train.losses import ReferenceLogps, loss
from jaxdeep.types import Piece

CLIP = Clip(low=0.2, high=0.28)
OBJECTIVES = {
    "sft": SFT,
    "sft by sequence": Objective("likelihood", aggregate="sequence"),
    "sft with kl": Objective("likelihood", kl=Kl("k3", 0.3)),
    "clip": Objective(clip=CLIP),
    "wide clip": Objective(clip=Clip(0.5, 3.0)),
    "dual clip": Objective(clip=Clip(0.2, 0.28, dual=1.4)),
    "no clip": Objective(clip=Clip(None, None)),
    "clip by sequence": Objective(clip=CLIP, aggregate="sequence"),
    "constant": Objective(clip=CLIP, aggregate="constant", length=17),
    "gspo": Objective("gspo", clip=Clip(0.15, 0.2), aggregate="sequence"),
    "gspo by token": Objective("gspo", clip=Clip(0.15, 0.2, dual=1.25)),
    "cispo": Objective("cispo", clip=Clip(None, 0.3)),
    "cispo by sequence": Objective("cispo", clip=Clip(0.3, 0.5), aggregate="sequence"),
    "binary_tv": Objective("binary_tv", clip=Clip(0.05, 0.07)),
    "binary_tv, dual": Objective(
        "binary_tv", clip=Clip(0.05, 0.07, dual=1.3), aggregate="sequence"
    ),
    "k1": Objective(kl=Kl("k1", 0.3)),
    "k2": Objective(kl=Kl("k2", 0.3), aggregate="sequence"),
    "k3": Objective(kl=Kl("k3", 0.3)),
    "truncate": Objective(correction=Correction("truncate", high=1.2)),
    "mask": Objective("gspo", clip=Clip(0.1, 0.1), correction=Correction("mask", 0.7, 1.5)),
    "entropy": Objective(entropy=0.3),
}
OWN = {  # the ratio is against the trainer's own log-probabilities of before
    f"{name}, own": OBJECTIVES[name]
    for name in ("clip", "gspo", "cispo", "binary_tv", "truncate", "mask", "entropy")
}
CASES = OBJECTIVES | OWN


@functools.partial(jax.jit, static_argnames="objective")
def value_and_grad(logp_BT, entropy_BT, batch, before, *, objective):
    """((loss, metrics), gradient by log-probability)."""
    return jax.value_and_grad(loss, has_aux=True)(
        logp_BT, entropy_BT, batch, before, objective=objective
    )


def example(seed, case="clip", *, B=3, T=40, n=9):
    """A packed batch with random log-probabilities near the sampler's, entropies, and reference
    log-probabilities from before the step."""
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

    def off(by):
        apart_BT = batch.logp_BT + rng.normal(0, by, (B, T))
        odd_BT = np.where(batch.learn_BT > 0, apart_BT, -5 * rng.random((B, T)))
        return odd_BT.astype(np.float32)

    logp_BT, entropy_BT, own_BT, base_BT = off(0.4), rng.random((B, T)), off(0.2), off(0.5)
    before = ReferenceLogps(own_BT if case in OWN else None, base_BT)
    return logp_BT, entropy_BT.astype(np.float32), batch, before


def sequences(*arrays, batch):
    """The learned tokens of each sequence: tuples of one float64 array from each of `arrays`."""
    for b, segments in enumerate(batch.segments_BT):
        for segment in range(1, segments.max() + 1):
            at = (segments == segment) & (batch.learn_BT[b] > 0)
            if at.any():
                yield tuple(np.asarray(x, np.float64)[b, at] for x in arrays)


def reference(logp_BT, entropy_BT, batch, before, objective, held_BT=None):
    """The loss divided by its denominator, and summed metrics, sequence by sequence. `held_BT`
    stands in for log-probabilities under a stop_gradient."""
    held_BT = logp_BT if held_BT is None else held_BT
    own_BT = before.old_BT
    if objective.kind == "binary_tv" or (own_BT is None and objective.correction.kind == "none"):
        own_BT = batch.logp_BT
    elif own_BT is None:
        own_BT = held_BT
    low, high = objective.clip.low, objective.clip.high
    low, high = np.inf if low is None else low, np.inf if high is None else high
    dual = np.inf if objective.clip.dual is None else objective.clip.dual
    total, found, count = 0.0, {}, 0.0

    def note(**values):
        for name, value in values.items():
            found[name] = found.get(name, 0.0) + float(np.sum(value))

    parts = (
        logp_BT,
        held_BT,
        own_BT,
        batch.logp_BT,
        before.base_BT,
        batch.advantage_BT,
        entropy_BT,
    )
    for now, held, own, stored, base, A, H in sequences(*parts, batch=batch):
        ratio, before_now = np.exp(now - own), np.exp(held - own)
        if objective.kind == "likelihood":
            each, ratio, before_now = -now * A, np.ones_like(now), np.ones_like(now)
        elif objective.kind == "cispo":
            weight = np.minimum(np.maximum(before_now, 1 - low), 1 + high)
            each, cut = -weight * A * now, weight != before_now
        else:
            r = (
                np.full_like(ratio, np.exp(np.mean(now - own)))
                if objective.kind == "gspo"
                else ratio
            )
            r_down = np.minimum(r, dual)
            cut = (A < 0) & (r > dual)
            if objective.kind == "binary_tv":
                moved = np.exp(held) - np.exp(stored)
                out = ((A > 0) & (moved > high)) | ((A < 0) & (moved < -low))
                each, cut = np.where(out, 0.0, np.where(A < 0, -r_down * A, -r * A)), cut | out
            else:
                up, down = np.minimum(r, 1 + high) * A, np.maximum(r_down, 1 - low) * A
                each = -np.where(A > 0, up, down)
                cut |= ((A > 0) & (r > 1 + high)) | ((A < 0) & (r < 1 - low))
        if objective.kind != "likelihood":
            gap = held - stored
            r = np.exp(gap)
            note(
                mismatch_kl=r - 1 - gap,
                logp_diff=abs(gap),
                ratio=r,
                ratio_squared=r * r,
                clipped=cut,
            )
            most = dict(max_logp_diff=abs(gap), max_prob_diff=abs(np.exp(held) - np.exp(stored)))
            for name, values in most.items():
                found[name] = max(found.get(name, 0.0), values.max())
        correction = objective.correction
        if correction.kind != "none":
            trust = np.exp(own - stored)
            fine = (trust >= correction.low) & (trust <= correction.high)
            note(corrected=~fine)
            if correction.kind == "mask":
                each = each * np.where(fine, trust, 0.0)
            else:
                each = each * np.minimum(np.maximum(trust, correction.low), correction.high)
        if objective.kl.coef:
            d = now - base
            kl = {"k1": d, "k2": d * d / 2, "k3": np.exp(-d) - 1 + d}[objective.kl.kind]
            each = each + objective.kl.coef * kl
            note(kl=kl)
        if objective.entropy:
            each = each - objective.entropy * (H - before_now * (held + H) * (now - held))
        note(tokens=len(now), entropy=H)
        total += each.mean() if objective.aggregate == "sequence" else each.sum()
        each_counts = dict(token=len(now), sequence=1, constant=objective.length)
        count += each_counts[objective.aggregate]
    found["loss"] = total
    return total / count, found


@pytest.mark.parametrize("case", CASES)
def test_value_and_metrics_equal_numpy(case):
    objective = CASES[case]
    for seed in range(8):
        logp_BT, entropy_BT, batch, before = example(seed, case)
        (total, metrics), _ = value_and_grad(
            logp_BT, entropy_BT, batch, before, objective=objective
        )
        value, want = reference(logp_BT, entropy_BT, batch, before, objective)
        assert total / losses.denominator([batch], objective) == pytest.approx(
            value, rel=1e-5, abs=1e-5
        )
        assert set(metrics["sum"]) | set(metrics["max"]) == set(want)
        for name, x in (metrics["sum"] | metrics["max"]).items():
            assert x == pytest.approx(want[name], rel=1e-5, abs=1e-4), name
        assert metrics["sum"]["tokens"] == batch.learn_BT.sum()
        if objective.kind != "likelihood":
            assert metrics["sum"]["clipped"] == want["clipped"]


def test_the_examples_cut_some_tokens_and_not_others():
    cut, tokens = {}, 0
    for seed in range(8):
        for case, objective in CASES.items():
            found = reference(*example(seed, case), objective)[1]
            for name in {"clipped", "corrected"} & set(found):
                cut[case, name] = cut.get((case, name), 0.0) + found[name]
        tokens += found["tokens"]
    # with a correction and nothing moved since the step began, the ratio is 1
    for case in ("no clip", "truncate", "mask"):
        assert cut.pop((case, "clipped")) == 0
    for key, count in cut.items():
        assert 0.01 * tokens < count < 0.5 * tokens, key


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_equals_finite_differences(case):
    objective = CASES[case]
    for seed in range(2):
        logp_BT, entropy_BT, batch, before = example(seed, case)
        _, grad_BT = value_and_grad(logp_BT, entropy_BT, batch, before, objective=objective)
        wide_BT, eps = logp_BT.astype(np.float64), 1e-6
        want_BT = np.zeros(logp_BT.shape)
        for place in np.argwhere(batch.learn_BT):
            step_BT = np.zeros(logp_BT.shape)
            step_BT[tuple(place)] = eps
            up, down = (
                reference(wide_BT + sign * step_BT, entropy_BT, batch, before, objective, wide_BT)[
                    0
                ]
                for sign in (1, -1)
            )
            want_BT[tuple(place)] = (up - down) / (2 * eps)
        found_BT = np.asarray(grad_BT) / losses.denominator([batch], objective)
        np.testing.assert_allclose(found_BT, want_BT, rtol=1e-4, atol=1e-6)
        assert (want_BT != 0).sum() > 20


def one(ratio, advantage, objective=CASES["clip"], stored=-1.25):
    """(loss, gradient, clipped) of a single learned token."""
    (batch,) = pack(
        [to_row([Piece([1], "world"), Piece([2], "policy", [stored])], advantage=advantage)],
        B=1,
        T=3,
    )
    logp_BT = np.array([[-2.0, stored + np.log(ratio), -3.0]], np.float32)
    before = ReferenceLogps(None, logp_BT)
    (total, metrics), grad_BT = value_and_grad(
        logp_BT, np.zeros_like(logp_BT), batch, before, objective=objective
    )
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


@pytest.mark.parametrize(
    ("ratio", "advantage", "total", "gradient", "clipped"),
    [
        (1.5, -1.0, 1.3, 0.0, 1),  # far too likely, and bad: it weighs no more than `dual`
        (1.2, -1.0, 1.2, 1.2, 0),
        (1.2, 1.0, -1.2, -1.2, 0),  # by 0.057 in probability: within 0.07
        (1.5, 1.0, 0.0, 0.0, 1),
        (0.9, -1.0, 0.9, 0.9, 0),
        (0.8, -1.0, 0.0, 0.0, 1),
        (0.8, 1.0, -0.8, -0.8, 0),  # far, but on the way back
    ],
)
def test_a_trust_region_in_probabilities(ratio, advantage, total, gradient, clipped):
    assert one(ratio, advantage, CASES["binary_tv, dual"]) == (
        pytest.approx(total, rel=1e-5, abs=1e-7),
        pytest.approx(gradient, rel=1e-5, abs=1e-7),
        clipped,
    )
    # the same ratios of an unlikely token change little, and are let through
    _, gradient, clipped = one(ratio, advantage, CASES["binary_tv"], stored=-6.0)
    assert gradient == pytest.approx(-ratio * advantage, rel=1e-4) and clipped == 0


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("far", [30.0, 100.0, 1e4, -100.0, -1e4])
def test_a_token_far_from_its_sampler_has_a_loss_and_a_gradient(case, far):
    objective = CASES[case]
    logp_BT, entropy_BT, batch, before = example(0, case)
    for sign in (1, -1):
        b, t = np.argwhere(batch.advantage_BT * sign > 0)[0]
        if far > 0:  # the sampler thought it next to impossible, or the trainer does now
            batch.logp_BT[b, t] = logp_BT[b, t] - far
        else:
            logp_BT[b, t] += far
    (total, metrics), grad_BT = value_and_grad(
        logp_BT, entropy_BT, batch, before, objective=objective
    )
    assert np.isfinite(total) and np.isfinite(grad_BT).all()
    assert all(np.isfinite(x) for part in metrics.values() for x in part.values())
    assert np.abs(grad_BT).max() > 0


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_learned_has_no_gradient_whatever_is_stored(case):
    objective = CASES[case]
    logp_BT, entropy_BT, batch, before = example(0, case)
    quiet_BT = batch.learn_BT == 0
    (calm, _), want_BT = value_and_grad(logp_BT, entropy_BT, batch, before, objective=objective)
    odd_BT = np.where(quiet_BT, np.float32(-200.0), logp_BT)
    for stored in (0.0, 1e4, -1e4, -1e30, -np.inf):
        loud = batch._replace(logp_BT=np.where(quiet_BT, np.float32(stored), batch.logp_BT))
        (total, metrics), grad_BT = value_and_grad(
            odd_BT, entropy_BT, loud, before, objective=objective
        )
        assert (grad_BT[quiet_BT] == 0).all()
        np.testing.assert_array_equal(grad_BT, want_BT)
        assert total == pytest.approx(float(calm), rel=1e-6)
        assert all(np.isfinite(x) for part in metrics.values() for x in part.values())


PACKED = (
    "sft",
    "clip",
    "clip by sequence",
    "gspo",
    "gspo, own",
    "cispo",
    "binary_tv",
    "k2",
    "mask",
)


@pytest.mark.parametrize("case", PACKED)
def test_packing_and_microbatches_change_nothing(case):
    objective = CASES[case]
    rng = np.random.default_rng(1)
    by_token, own, base = (-4 * rng.random(50) for _ in range(3))
    rows = []
    for _ in range(12):
        prompt, said = rng.integers(0, 50, 3).tolist(), rng.integers(0, 50, 5).tolist()
        logps = [float(by_token[t] + rng.normal(0, 0.3)) for t in said]
        pieces = [Piece(prompt, "world"), Piece(said[: rng.integers(1, 6)], "policy")]
        pieces[1] = pieces[1]._replace(logps=logps[: len(pieces[1].tokens)])
        rows.append(to_row(pieces, advantage=float(rng.normal())))

    def sums(B, T):
        batches, out = pack(rows, B=B, T=T), {}
        for batch in batches:
            logp_BT, own_BT, base_BT = (
                table[batch.tokens_BT].astype(np.float32) for table in (by_token, own, base)
            )
            before = ReferenceLogps(own_BT if case in OWN else None, base_BT)
            (_, metrics), _ = value_and_grad(logp_BT, -logp_BT, batch, before, objective=objective)
            for name, x in metrics["sum"].items():
                out[name] = out.get(name, 0.0) + float(x)
        return out | {"count": losses.denominator(batches, objective)}

    alone = sums(1, 8)
    for shape in ((2, 17), (1, 96)):
        assert sums(*shape) == {name: pytest.approx(x, rel=1e-4) for name, x in alone.items()}


def test_the_count_is_of_tokens_of_sequences_or_of_their_room():
    batches = [example(seed)[2] for seed in range(3)]
    tokens = sum(float(b.learn_BT.sum()) for b in batches)
    assert losses.denominator(batches, Objective()) == tokens
    assert losses.denominator(batches, Objective(aggregate="sequence")) == 27
    assert losses.denominator(batches, Objective(aggregate="constant", length=100)) == 2700
    batches[0].learn_BT[batches[0].segments_BT == 1] = 0  # three rollouts with nothing to learn
    assert losses.denominator(batches, Objective(aggregate="sequence")) == 24


def test_the_summary_has_means_and_the_effective_sample_size():
    totals = {"sum": dict(loss=6.0, tokens=4.0, clipped=1.0), "max": dict(max_prob_diff=0.5)}
    weights = np.array([1.0, 1.0, 0.5, 3.0])
    totals["sum"] |= dict(ratio=weights.sum(), ratio_squared=(weights**2).sum())
    assert losses.summary(totals, 2.0) == {
        "loss": 3.0,
        "clipped": 0.25,
        "ess": weights.sum() ** 2 / (weights**2).sum() / 4,
        "max_prob_diff": 0.5,
        "tokens": 4.0,
    }


def test_sft_is_the_likelihood_of_what_was_written():
    logp_BT, entropy_BT, batch, before = example(2)
    batch = batch._replace(advantage_BT=batch.learn_BT)
    (total, _), grad_BT = value_and_grad(logp_BT, entropy_BT, batch, before, objective=SFT)
    assert total == pytest.approx(-logp_BT[batch.learn_BT > 0].sum(), rel=1e-5)
    np.testing.assert_array_equal(grad_BT, -batch.learn_BT)


def test_the_gradients_of_bonus_and_kl_are_right_on_average_over_the_vocabulary():
    rng = np.random.default_rng(0)
    V = 7
    scores, base, old = (rng.normal(0, 1, V).astype(np.float32) for _ in range(3))

    def entropy(scores):
        logp = jax.nn.log_softmax(scores)
        return -jnp.sum(jnp.exp(logp) * logp)

    def expected(scores, term, drawn):
        """The mean of a token's term over tokens drawn from `drawn`, which has no gradient."""
        logp = jax.nn.log_softmax(scores)
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(drawn)) * term(logp))

    def bonus(drawn):
        def term(logp):
            flat = jnp.full(V, jax.lax.stop_gradient(entropy(scores)))
            return losses.entropy_bonus(logp, flat, jnp.exp(jax.lax.stop_gradient(logp) - drawn))

        return jax.grad(expected)(scores, term, drawn)

    want = jax.grad(entropy)(scores)
    for drawn in (jax.nn.log_softmax(scores), jax.nn.log_softmax(old)):
        np.testing.assert_allclose(bonus(drawn), want, atol=1e-5)

    reference = jax.nn.log_softmax(base)
    drawn = jax.nn.log_softmax(scores)

    def kl(scores):
        logp = jax.nn.log_softmax(scores)
        return jnp.sum(jnp.exp(logp) * (logp - reference))

    def gradient(kind):
        return jax.grad(expected)(scores, lambda x: losses.kl_estimate(x, reference, kind), drawn)

    values = [
        expected(scores, functools.partial(losses.kl_estimate, base_BT=reference, kind=k), drawn)
        for k in ("k1", "k3")
    ]
    np.testing.assert_allclose(values, kl(scores), rtol=1e-5)
    np.testing.assert_allclose(gradient("k2"), jax.grad(kl)(scores), atol=1e-6)
    np.testing.assert_allclose(gradient("k1"), np.zeros(V), atol=1e-6)


@pytest.mark.parametrize(
    "bad",
    [
        *(dict(low=low) for low in (0.0, 1.0, -0.2, float("nan"))),
        *(dict(high=high) for high in (0.0, -1.0, float("nan"))),
    ],
)
def test_a_clip_that_is_no_range_around_one_is_refused(bad):
    with pytest.raises(ConfigError, match=r"Clip\.(low|high)=.* must be .*above 0"):
        Clip(**bad)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Clip(dual=1.28), "dual=1.28 must be above"),
        (lambda: Clip(high=None, dual=0.5), "dual=0.5"),
        (lambda: Kl("k3", -0.1), "Kl.coef=-0.1"),
        (lambda: Kl("k3", float("nan")), "Kl.coef=nan"),
        (lambda: Correction("mask", 1.2), "Correction.low=1.2"),
        (lambda: Correction("truncate", high=0.9), "high=0.9"),
        (lambda: Objective(length=0), "length=0"),
        (lambda: Objective(entropy=float("inf")), "entropy=inf"),
        (lambda: Objective("binary_tv", correction=Correction("mask")), "binary_tv"),
        (lambda: Objective("cispo", clip=Clip(dual=3.0)), "cispo"),
    ],
)
def test_settings_out_of_range_or_without_an_effect_are_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()
