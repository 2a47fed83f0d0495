"""The model against transformers, and against itself computed another way."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import pages

from jaxdeep.errors import CheckpointError
from jaxdeep.model import decoder, families, head, layout, load, lora
from jaxdeep.model import weights as model_weights
from jaxdeep.model.config import Config
from jaxdeep.model.rope import Linear, Llama3, Yarn
from jaxdeep.parallel import mesh as meshes

SHAPES = {  # vocab, hidden, mlp, layers, heads, kv heads, head width, theta, tied
    "theta 1e4, tied, 1 kv head": (97, 64, 96, 2, 4, 1, 16, 1e4, True),
    "theta 1e6, untied, 4 kv heads": (97, 64, 96, 3, 4, 4, 16, 1e6, False),
    "theta 5e6, tied, 8 kv heads": (131, 64, 128, 2, 8, 8, 16, 5e6, True),
    "head 128, hidden 256": (97, 256, 256, 2, 4, 2, 128, 1e6, False),
    "head 8, hidden 96, tied": (97, 96, 64, 2, 6, 2, 8, 1e4, True),
    "one layer, wide groups": (97, 64, 96, 1, 8, 1, 32, 5e6, False),
}

WINDOWED = (True, True, False)
YARN = Yarn(4.0, 16, attention=1.2)
CHANGES = {
    "YaRN, 41 of 16 x 4 positions": dict(scaling=YARN, limit=64),
    "biases, a window in some layers": dict(biases=families.ATTENTION, window=9, windowed=WINDOWED),
    "3 of 8 experts": dict(E=8, top_k=3, F=32),
    "2 of 4 experts, weights as they are": dict(E=4, top_k=2, F=32, norm_top_k=False),
    "qwen2": dict(family="qwen2", biases=("wq", "wk", "wv"), tie=True, K=2),
    "qwen2, a window and YaRN": dict(
        family="qwen2", biases=("wq", "wk", "wv"), window=7, scaling=YARN, limit=64
    ),
    "llama 2, linear rope": dict(family="llama", scaling=Linear(2.5), theta=1e4),
    "llama 3": dict(family="llama", K=1, scaling=Llama3(8.0, 16), theta=5e5),
    "llama, all biases, tied": dict(
        family="llama", biases=(*families.ATTENTION, *families.MLP), tie=True, H=32
    ),
    "mistral, full attention": dict(family="mistral", K=2, H=32),
    "mistral, a window": dict(family="mistral", K=1, window=8),
    "olmo 2": dict(family="olmo2"),
    "olmo 2, grouped heads, tied": dict(
        family="olmo2", K=2, tie=True, biases=families.ATTENTION, scaling=Llama3(4.0, 16)
    ),
    "olmo 3": dict(family="olmo3", window=9, windowed=WINDOWED, theta=5e5),
    "olmo 3, YaRN where there is no window": dict(
        family="olmo3", K=2, window=5, windowed=WINDOWED, scaling=YARN, limit=64
    ),
}


def config(shape, **changes):
    V, D, F, L, N, K, H, theta, tie = shape
    fields = dict(V=V, D=D, F=F, L=L, N=N, K=K, H=H, theta=theta, tie=tie)
    return Config(**(fields | dict(eps=1e-6, limit=512, dtype="float32") | changes))


TINY = config((64, 32, 48, 2, 4, 2, 16, 1e4, True))


@pytest.fixture(scope="module")
def tiny():
    return jax.jit(lambda: model_weights.init(jax.random.key(0), TINY))()


def one_device():
    return meshes.make_mesh(devices=jax.devices()[:1])


# one of each family always; the other shapes are for the slow tests
QUICK = (
    *("theta 1e4, tied, 1 kv head", "theta 1e6, untied, 4 kv heads", "one layer, wide groups"),
    *("biases, a window in some layers", "3 of 8 experts", "qwen2, a window and YaRN"),
    *("llama 3", "mistral, a window", "olmo 2", "olmo 3, YaRN where there is no window"),
)
EVERY = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in (*SHAPES, *CHANGES)
]


@pytest.mark.parametrize("name", EVERY)
def test_equals_transformers(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    shape = SHAPES.get(name, SHAPES["theta 1e6, untied, 4 kv heads"])
    cfg = config(shape, **CHANGES.get(name, {}))
    torch.manual_seed(0)
    hf = {k: v for k, v in cfg.to_hf().items() if k not in ("architectures", "torch_dtype")}
    # a token for padding would get no gradient there
    about = transformers.AutoConfig.for_model(**hf, pad_token_id=None)
    peer = transformers.AutoModelForCausalLM.from_config(about)
    peer = peer.float().eval()
    with torch.no_grad():  # norms away from one, so that a swapped norm would show
        for key, value in peer.named_parameters():
            if "norm" in key:
                value.mul_(1 + 0.3 * torch.randn_like(value))
            elif "bias" in key:
                value.copy_(0.3 * torch.randn_like(value))
            else:
                value.mul_(4)
    peer.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1, "the sharded layout must be what is read"
    assert (
        Config.from_hf(tmp_path, dtype="float32")
        == cfg
        == Config.from_hf(cfg.to_hf(), dtype="float32")
    )

    params = load.load(str(tmp_path), cfg, one_device())
    assert model_weights.count(cfg) == sum(p.numel() for p in peer.parameters())
    tokens = np.random.default_rng(0).integers(0, cfg.V, (3, 41))

    @jax.jit
    def run(params):
        def loss(params):
            hidden, _ = decoder.forward(params, None, tokens, cfg=cfg)
            logps, _ = head.token_logps(params, hidden, tokens, cfg=cfg)
            return -logps.mean(), head.logits(params, hidden, cfg=cfg)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, ours), grads = run(params)
    ids = torch.tensor(tokens)
    theirs = peer(ids).logits
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-4)

    logps = torch.log_softmax(theirs[:, :-1], -1).gather(-1, ids[:, 1:, None])
    (-logps.sum() / tokens.size).backward()
    named, names = dict(peer.named_parameters()), layout.names(cfg)
    for leaf, ours in grads["layers"].items():
        if cfg.E and leaf in model_weights.EXPERTS:  # fused there; test_moe has their gradients
            continue
        for i in range(cfg.L):
            grad = named[layout.in_layer(names[leaf], i)].grad.numpy()
            close(np.asarray(ours[i]).T if grad.ndim == 2 else ours[i], grad)
    for leaf in grads.keys() - {"layers"}:
        grad = named[layout.TOP[leaf]].grad.numpy()
        close(np.asarray(grads[leaf]).T if leaf == "head" else grads[leaf], grad)


def test_bfloat16_chooses_the_tokens_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    cfg = config(SHAPES["head 128, hidden 256"], dtype="bfloat16")
    torch.manual_seed(0)
    hf_config = transformers.Qwen3Config(
        **{k: v for k, v in cfg.to_hf().items() if k not in ("architectures", "torch_dtype")}
    )
    peer = transformers.Qwen3ForCausalLM(hf_config)
    with torch.no_grad():
        for value in peer.parameters():
            if value.ndim == 2:
                value.mul_(3)
    peer = peer.bfloat16().eval()
    peer.save_pretrained(tmp_path)
    params = load.load(str(tmp_path), cfg, one_device())
    tokens = np.random.default_rng(0).integers(0, cfg.V, (6, 48))
    held = np.arange(48) < np.array([48, 31, 17, 48, 9, 40])[:, None]  # prompts of unequal length

    @jax.jit
    def run(tokens, segments):
        hidden, _ = decoder.forward(params, None, tokens, cfg=cfg, segments_BT=segments)
        return head.logits(params, hidden, cfg=cfg)

    got = np.asarray(run(tokens, held.astype(np.int32)))[held]
    with torch.no_grad():
        want = peer(torch.tensor(tokens), attention_mask=torch.tensor(held)).logits
    want = want.float().numpy()[held]
    assert (got.argmax(-1) == want.argmax(-1)).mean() >= 0.97
    assert np.abs(got - want).max() <= 0.03 * np.abs(want).max()


def close(ours, theirs):
    scale = np.abs(theirs).max()
    assert scale > 0
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-3 * scale


def test_no_position_sees_a_later_one(tiny):
    embed = tiny["embed"]

    @jax.jit
    def influence(t):
        def loss(x_VD):
            hidden, _ = decoder.forward(
                tiny | {"embed": x_VD}, None, jnp.arange(12)[None], cfg=TINY
            )
            return jnp.sum(jnp.where(jnp.arange(12) == t, hidden[0].sum(-1), 0))

        return jax.grad(loss)(embed)[:12]

    for t in range(12):  # the tokens are 0..11, so row i of the gradient is position i's
        reached = np.abs(influence(t)).max(-1)
        assert (reached[: t + 1] > 0).all() and (reached[t + 1 :] == 0).all()


def test_cache_equals_forward_with_unequal_rows(tiny):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, TINY.V, (3, 24))
    length = np.array([24, 9, 17])
    whole, _ = jax.jit(lambda x: decoder.forward(tiny, None, x, cfg=TINY))(tokens)
    extend = jax.jit(
        lambda cache, x, n: decoder.forward(tiny, None, x, cfg=TINY, cache=cache, count_B=n)
    )
    cache, at = pages(TINY, 3, 32), np.zeros(3, int)
    while (at < length).any():  # pieces of unequal size, each padded to 8
        count = np.minimum(rng.integers(0, 9, 3), length - at)
        piece = np.full((3, 8), 7)
        for b in range(3):
            piece[b, : count[b]] = tokens[b, at[b] : at[b] + count[b]]
        hidden, cache = extend(cache, piece, count)
        for b in range(3):
            want = whole[b, at[b] : at[b] + count[b]]
            np.testing.assert_allclose(hidden[b, : count[b]], want, atol=1e-5)
        at += count
    np.testing.assert_array_equal(cache.held_B, length)


def test_remat_and_chunks_change_nothing(tiny):
    tokens = np.random.default_rng(2).integers(0, TINY.V, (2, 23))

    def run(**changes):
        cfg = config((64, 32, 48, 2, 4, 2, 16, 1e4, True), **changes)

        def loss(params):
            hidden, _ = decoder.forward(params, None, tokens, cfg=cfg)
            logps, entropy = head.token_logps(params, hidden, tokens, cfg=cfg)
            return logps.sum(), entropy

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(tiny)

    plain = run(remat="dots", chunk=64)
    cfg = config((64, 32, 48, 2, 4, 2, 16, 1e4, True))
    hidden, _ = jax.jit(lambda params: decoder.forward(params, None, tokens, cfg=cfg))(tiny)
    logp_BTV = jax.nn.log_softmax(np.asarray(hidden) @ np.asarray(tiny["embed"]).T)
    logps, entropy = head.token_logps(tiny, hidden, tokens, cfg=cfg)
    picked = np.take_along_axis(logp_BTV[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(logps[:, 1:], picked, atol=1e-5)
    for found in (entropy, plain[0][1]):  # alone, and with a gradient
        want = -(np.exp(logp_BTV) * logp_BTV).sum(-1)
        np.testing.assert_allclose(found[:, 1:], want[:, :-1], atol=1e-5)
    for changes in (
        dict(remat="full", chunk=64),
        dict(remat="attention"),
        dict(remat="dots", chunk=5),
        dict(chunk=1),
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), plain, run(**changes)
        )


@pytest.mark.parametrize("chunk", [4, 64])
def test_tokens_that_nobody_wants_cost_nothing_and_change_nothing(tiny, chunk):
    rng = np.random.default_rng(2)
    tokens, cfg = rng.integers(0, TINY.V, (2, 23)), dataclasses.replace(TINY, chunk=chunk)
    hidden = rng.normal(size=(2, 23, TINY.D)).astype(np.float32)
    wanted = np.zeros((2, 23), bool)
    wanted[0, [3, 4, 22]] = wanted[1, [1, 9]] = True

    def loss(params, hidden, **given):
        logps, entropy = head.token_logps(params, hidden, tokens, cfg=cfg, **given)
        return (jnp.where(wanted, logps, 0.0) * tokens).sum(), (logps, entropy)

    run = jax.value_and_grad(loss, (0, 1), has_aux=True)
    (want, every), grads = run(tiny, hidden)
    (found, some), given = run(tiny, hidden, wanted_BT=wanted)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), given, grads)
    for a, b in zip(some, every, strict=True):
        np.testing.assert_allclose(a[wanted], b[wanted], rtol=1e-5)
    # a row has three of them: the first chunk holds all, and no other one is computed
    passed_over = 2 * (22 - 4) if chunk == 4 else 0
    assert (np.asarray(some[1])[:, 1:] == 0).sum() >= passed_over


def test_zero_adapter_is_the_base_and_merging_is_applying(tiny):
    cfg = config((64, 32, 48, 2, 4, 2, 16, 1e4, True))
    tokens = np.random.default_rng(3).integers(0, TINY.V, (2, 11))
    spec = lora.LoraConfig(rank=4, alpha=8.0)
    factors = lora.init(jax.random.key(1), cfg, spec)
    assert spec.scale == 2.0 and set(factors) == set(model_weights.LINEARS)
    run = jax.jit(lambda params, adapter: decoder.forward(params, adapter, tokens, cfg=cfg)[0])
    base = run(tiny, None)
    np.testing.assert_array_equal(run(tiny, lora.Adapter(factors, spec.scale)), base)
    factors = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), factors
    )
    adapter = lora.Adapter(factors, spec.scale)
    applied = run(tiny, adapter)
    assert np.abs(applied - base).max() > 0.1
    np.testing.assert_allclose(run(lora.merge(tiny, adapter), None), applied, atol=2e-5)
    for name in model_weights.LINEARS:  # each linear is reached by its own factors
        alone = lora.Adapter({name: factors[name]}, spec.scale)
        assert np.abs(run(tiny, alone) - base).max() > 1e-3


@pytest.mark.parametrize(
    "change, said",
    [
        (
            {"model_type": "gpt2"},
            "model_type='gpt2', which is not computed here. Computed are qwen3",
        ),
        (
            {"model_type": "gemma3_text"},
            "RNJ-1 is of this type",
        ),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4}}, "rope_scaling"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"hidden_size": None, "drop": "hidden_size"}, "hidden_size"),
    ],
)
def test_other_architectures_are_refused_by_name(change, said):
    hf = TINY.to_hf() | change
    hf.pop(hf.pop("drop", ""), None)
    with pytest.raises(CheckpointError, match=said):
        Config.from_hf(hf)


def test_null_kv_heads_are_as_many_as_query_heads():
    hf = TINY.to_hf() | {"num_key_value_heads": None, "head_dim": None, "hidden_size": 64}
    cfg = Config.from_hf(hf)
    assert (cfg.K, cfg.N, cfg.H) == (4, 4, 16)
    for key, value in (("num_hidden_layers", "2"), ("hidden_size", 0), ("rms_norm_eps", None)):
        with pytest.raises(CheckpointError, match=f"{key}={value!r}"):
            Config.from_hf(hf | {key: value})


def test_real_configs_give_the_published_counts(shared):
    published = {
        "0.6B": 596_049_920,
        "1.7B": 1_720_574_976,
        "4B": 4_022_468_096,
        "8B": 8_190_735_360,
        "14B": 14_768_307_200,
        "32B": 32_762_123_264,
        "30B-A3B": 30_532_122_624,
        "235B-A22B": 235_093_634_560,
        "Coder-480B-A35B-Instruct": 480_154_875_392,
    }
    found = sorted(shared("qwen3/configs").glob("*.json"))
    assert len(found) >= 12
    for path in found:
        size = path.name.removesuffix("_config.json").split("Qwen3-")[1]
        assert model_weights.count(Config.from_hf(path)) == published[size]
