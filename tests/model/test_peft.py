"""Adapters against the real PEFT, in both directions; what has no place here is refused by name."""

import json
import shutil

import numpy as np
import pytest
from model import models
from model.models import CONFIGS, DENSE, LORA, MIXTURE

from jaxdeep.errors import CheckpointError
from jaxdeep.model import layout, load, lora, peft, tensors
from jaxdeep.model import weights as model_weights
from jaxdeep.model.identity import Base

BASE = Base("owner/base", "aaaa-bbbb")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Bases and adapters of both kinds."""
    path = tmp_path_factory.mktemp("saved")
    for name, cfg in CONFIGS.items():
        load.save(path / name, models.params(name), cfg)
        peft.save(path / f"{name}-adapter", models.adapter(name).replace(base=BASE), cfg)
    return path


def peft_model(base, path):
    """The adapter on its base as PEFT loads it; every tensor must find its place."""
    library = pytest.importorskip("peft")
    model = models.transformers_model(base)
    model = library.PeftModel.from_pretrained(model, path)
    result = model.load_adapter(path, "again")
    assert not [key for key in result.missing_keys if "lora_" in key], result
    assert not result.unexpected_keys, result
    for key, value in model.named_parameters():
        assert "lora_B" not in key or value.abs().max() > 0, key
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_computes_the_same_from_what_is_written_and_writes_what_is_read(name, saved, tmp_path):
    model = peft_model(saved / name, saved / f"{name}-adapter")
    ours = models.logits(name, models.adapter(name))
    np.testing.assert_allclose(models.their_logits(model), ours, atol=1e-4)
    assert np.abs(ours - models.logits(name, None)).max() > 0.1
    about = json.loads((saved / f"{name}-adapter" / peft.CONFIG).read_text())
    assert sorted(about["target_modules"]) == sorted(lora.LINEAR_OF)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    back = peft.load(tmp_path, CONFIGS[name])
    assert set(back.factors) == set(model_weights.LINEARS) and back.base is None
    for leaf, pair in models.adapter(name).factors.items():
        want = np.einsum("...ir,...ro->...io", pair["a"], pair["b"]) * LORA.scale
        pair = back.factors[leaf]
        got = np.einsum("...ir,...ro->...io", pair["a"], pair["b"]) * back.scale
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read_equal(name, saved):
    back = peft.load(saved / f"{name}-adapter", CONFIGS[name], BASE)
    assert back.config == LORA and back.scale == LORA.scale and back.base == BASE
    for leaf, pair in models.adapter(name).factors.items():
        for key, want in pair.items():
            np.testing.assert_array_equal(back.factors[leaf][key], want)


@pytest.mark.parametrize("targets", [("wk", "w_up"), ("w_down",)])
def test_an_adapter_of_some_linears_of_the_experts_loads_too(targets, saved, tmp_path):
    spec = lora.LoraConfig(LORA.rank, LORA.alpha, targets)
    factors = {k: models.adapter("mixture").factors[k] for k in targets}
    adapter = lora.Adapter(factors, spec.scale, BASE)
    peft.save(tmp_path / "x", adapter, MIXTURE)
    assert peft.load(tmp_path / "x", MIXTURE).config == spec
    library = pytest.importorskip("peft")
    base = models.transformers_model(saved / "mixture")
    model = library.PeftModel.from_pretrained(base, tmp_path / "x")
    load.save(tmp_path / "merged", models.params("mixture"), MIXTURE, adapter=adapter)
    want = models.their_logits(models.transformers_model(tmp_path / "merged"))
    np.testing.assert_allclose(models.their_logits(model), want, atol=1e-4)


WAYS = {  # what PEFT can be asked for, by the settings of its configuration
    "few modules": dict(r=4, lora_alpha=10, target_modules=["q_proj", "down_proj"]),
    "rslora": dict(r=4, lora_alpha=8, use_rslora=True, target_modules=["v_proj"]),
    "a regex": dict(r=2, lora_alpha=2, target_modules=r".*\.1\..*(gate|o)_proj"),
    "all linears": dict(r=2, lora_alpha=4, target_modules="all-linear"),
    "one layer": dict(r=2, lora_alpha=4, target_modules=["k_proj"], layers_to_transform=[1]),
    "excluded": dict(r=2, lora_alpha=4, target_modules="all-linear", exclude_modules=["up_proj"]),
    "patterns": dict(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj", "k_proj", "up_proj"],
        rank_pattern={"k_proj": 5, "layers.0.mlp.up_proj": 1},
        alpha_pattern={r".*\.1\.self_attn\.q_proj": 9},
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_adapters_that_peft_makes_are_read(way, saved, tmp_path):
    library, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    config = library.LoraConfig(task_type="CAUSAL_LM", **WAYS[way])
    model = library.get_peft_model(models.transformers_model(saved / "dense"), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_" in key:
                value.normal_(std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    back = peft.load(tmp_path / "adapter", DENSE)
    want = model.merge_and_unload().state_dict()
    ours = lora.merge(models.params("dense"), back)
    moved = 0
    for key, part in layout.slots(DENSE).items():
        if part.layer is not None and part.transposed:
            base = np.asarray(models.params("dense")["layers"][part.leaf][part.layer]).T
            got = np.asarray(ours["layers"][part.leaf][part.layer]).T
            np.testing.assert_allclose(got, want[key].numpy(), atol=1e-5)
            moved += np.abs(got - base).max() > 0.1
    counts = {"few modules": 4, "rslora": 2, "a regex": 2, "all linears": 14, "one layer": 1}
    assert moved == (counts | {"excluded": 12, "patterns": 6})[way]


def settings(**changes):
    def spoil(path):
        about = json.loads((path / peft.CONFIG).read_text())
        (path / peft.CONFIG).write_text(json.dumps(about | changes))

    return spoil


def truncate(path):
    file = path / peft.WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def integers(path):
    file = path / peft.WEIGHTS
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"I32"', 1))


def held(change):
    def spoil(path):
        file = path / peft.WEIGHTS
        found = {k: e.read() for k, e in tensors.header(file).items()}
        change(found)
        tensors.write(file, {k: (v.shape, v.dtype) for k, v in found.items()}, found.values())

    return spoil


def doubles(path):
    file = path / peft.WEIGHTS
    found = {k: e.read().astype(np.float64) for k, e in tensors.header(file).items()}
    tensors.write(file, {k: (v.shape, v.dtype) for k, v in found.items()}, found.values())


A = f"{peft.PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
ONE = np.ones((3, 3), np.float32)
REFUSED = {
    "dora": (settings(use_dora=True), "use_dora=True"),
    "bias": (settings(bias="all"), "bias='all'"),
    "modules to save": (settings(modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\]"),
    "lora bias": (settings(lora_bias=True), "lora_bias=True"),
    "a changed base": (settings(init_lora_weights="pissa_niter_4"), "pissa_niter_4"),
    "alpha of zero": (settings(lora_alpha=0), "lora_alpha=0 scales every factor to zero"),
    "alpha as text": (settings(lora_alpha="16"), "lora_alpha='16' in adapter_config.json is not"),
    "a pattern of no number": (
        settings(alpha_pattern={"q_proj": None}),
        r"alpha_pattern\['q_proj'\]=None",
    ),
    "a setting of the future": (settings(use_other=True), "use_other=True"),
    "another kind": (settings(peft_type="IA3"), "type IA3"),
    "another rank": (settings(r=4), "has rank 3, adapter_config.json says 4"),
    "not targeted": (settings(target_modules=["k_proj"]), "q_proj, which .* does not target"),
    "another layer": (settings(layers_to_transform=1), r"layers.0.* does not target"),
    "a tensor of the head": (
        held(lambda x: x.update({f"{peft.PREFIX}lm_head.lora_A.weight": ONE})),
        r"the tensor base_model.model.lm_head.lora_A.weight is no factor",
    ),
    "a router": (
        held(lambda x: x.update({A.replace("self_attn.q_proj", "mlp.gate"): ONE})),
        "mlp.gate has lora_A and not the other",
    ),
    "half a pair": (held(lambda x: x.pop(A)), "q_proj has lora_B and not the other"),
    "a wrong shape": (held(lambda x: x.update({A: ONE})), r"q_proj has factors \[3, 3\]"),
    "a wrong dtype": (
        integers,
        r"q_proj.lora_A.weight is I32\[3, 32\], .* BF16, F16, F32, F64: save .* float32",
    ),
    "truncated": (truncate, "the file is not whole"),
    "nothing": (held(dict.clear), "holds no factors"),
    "no weights": (lambda path: (path / peft.WEIGHTS).unlink(), "holds no adapter_model"),
    "no settings": (lambda path: (path / peft.CONFIG).write_text("{"), "not a readable"),
    "another base": (
        lambda path: (path / peft.BASE).write_text('{"base": {"name": "x/y", "identity": "cc"}}'),
        r"belongs to the base x/y \(cc\), but this one is owner/base",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_adapter_of_this_base_is_refused_by_name(name, saved, tmp_path):
    spoil, said = REFUSED[name]
    path = shutil.copytree(saved / "dense-adapter", tmp_path / "x")
    spoil(path)
    with pytest.raises(CheckpointError, match=said):
        peft.load(path, DENSE, BASE)


def test_factors_in_float64_are_read_and_a_module_scaled_to_zero_is_none(saved, tmp_path):
    path = shutil.copytree(saved / "dense-adapter", tmp_path / "x")
    doubles(path)
    settings(alpha_pattern={"q_proj": 0})(path)
    back = peft.load(path, DENSE, BASE)
    assert set(back.factors) == set(model_weights.LINEARS) - {"wq"}
    for leaf, pair in back.factors.items():
        for key, got in pair.items():
            assert got.dtype == np.float32
            np.testing.assert_array_equal(got, models.adapter("dense").factors[leaf][key])


def test_an_adapter_of_another_architecture_is_refused(saved):
    with pytest.raises(CheckpointError, match=r"which fit nothing in this base"):
        peft.load(saved / "mixture-adapter", DENSE)
    with pytest.raises(CheckpointError, match=r"which fit nothing in this base"):
        peft.load(saved / "dense-adapter", MIXTURE)
    with pytest.raises(CheckpointError, match="exists already"):
        peft.save(saved / "dense-adapter", models.adapter("dense").replace(base=BASE), DENSE)
