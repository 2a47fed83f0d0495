"""What a run leaves for other programs, and how it comes back."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from run import small

from jaxdeep import config as configs
from jaxdeep.model import load, lora, peft, tensors
from jaxdeep.model import weights as model_weights
from jaxdeep.model.config import Config
from jaxdeep.parallel import mesh as meshes
from jaxdeep.run import cli, sft
from jaxdeep.setup import past, weights
from jaxdeep.setup.runs import SftRun
from jaxdeep.setup.sections import load_run
from jaxdeep.train import checkpoint
from jaxdeep.train import state as states


def random(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32) / 6,
        tree,
        is_leaf=model_weights.is_leaf,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base with weights, another one, and the checkpoint and adapter of a run over the first."""
    path = tmp_path_factory.mktemp("export")
    small.config(path, "sft", steps=2)
    cfg = Config.from_hf(path / "model", dtype="float32")
    for seed, name in enumerate(("base", "other")):
        load.save(path / name, random(model_weights.leaves(cfg), seed), cfg, source=path / "model")
    checkpoint_of(path, "run")
    assert cli.main([*export(path), f"--to={path / 'adapter'}"]) == 0
    return path


def loaded(path, *more):
    config = configs.load(str(path / "sft.py"), [*flags(path)[1:], *more])
    return load_run(SftRun, config)


def checkpoint_of(path, workdir, *more):
    """What a run of `sft` over the base leaves after its second step, and its spec."""
    config = configs.load(str(path / "sft.py"), [*flags(path)[1:], *more])
    run = load_run(SftRun, config)
    about = configs.save(config, run, path / workdir, ["jaxdeep", "sft"])
    spec, mesh = run.spec(), meshes.make_mesh()
    tree = model_weights.leaves(spec.model) if spec.full else lora.leaves(spec.model, spec.lora)
    state = states.init(jax.random.key(0), spec, mesh, random(tree, 2))
    params = load.load(str(path / "base"), spec.model, mesh)
    base = weights.base_of(run.model, spec, states.Frozen(params))
    saved = checkpoint.Checkpoints(path / workdir, spec, base=base, run=about)
    saved.save(2, state, {})
    saved.close()
    return spec, state.trained


def flags(path, base="base"):
    return [
        f"--config={path / 'sft.py'}",
        f"--config.model.path={path / base}",
        "--config.model.weights=load",
    ]


def train(path, workdir, *more, base="base"):
    return cli.main(["sft", *flags(path, base), f"--workdir={path / workdir}", *more])


def export(path, workdir="run", base="base"):
    return ["export", *flags(path, base), f"--workdir={path / workdir}"]


def test_adapter_and_merged_weights_are_the_same_policy_elsewhere(place, capsys):
    assert cli.main([*export(place), f"--to={place / 'merged'}", "--what=merged"]) == 0
    assert "merged of" in capsys.readouterr().out
    names = {path.name for path in (place / "merged").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", past.EXPORTED}
    names = {path.name for path in (place / "adapter").iterdir()}
    assert names == {peft.CONFIG, peft.WEIGHTS, peft.BASE, "tokenizer.json", past.EXPORTED}
    text = (place / "model" / "tokenizer.json").read_text()
    assert (place / "adapter" / "tokenizer.json").read_text() == text
    base = json.loads((place / "adapter" / peft.BASE).read_text())["base"]
    assert base["name"] == str(place / "base") and len(base["identity"]) == 25

    library, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    auto = pytest.importorskip("transformers").AutoModelForCausalLM
    tokens = torch.tensor(np.random.default_rng(0).integers(0, small.VOCABULARY, (2, 31)))
    base, merged = (
        auto.from_pretrained(place / name, dtype=torch.float32) for name in ("base", "merged")
    )
    with torch.no_grad():
        plain, want = base(tokens).logits, merged(tokens).logits
        tuned = library.PeftModel.from_pretrained(base, place / "adapter")(tokens).logits
    np.testing.assert_allclose(tuned, want, atol=1e-4)
    assert (plain - want).abs().max() > 0.1


def test_a_run_is_exported_by_its_folder_and_the_export_is_a_run(place, capsys):
    run = place / "run"
    for what in ("adapter", "merged"):
        words = [str(run), f"--to={place / f'by-{what}'}", f"--what={what}"]
        assert cli.main(["export", *words]) == 0
        printed, told = capsys.readouterr()
        assert f"{what} of {run} in {place / f'by-{what}'}" in printed
        assert f"newest checkpoint of {run}: step 2" in told and "differs" not in told
        made = past.policy_config(str(place / f"by-{what}"))
        settings = json.loads((place / f"by-{what}" / past.EXPORTED).read_text())
        assert set(settings) == {"config", "references", "commit", "versions"}
        assert made.model.thinking == "none" and made.env.system == "Go."
        if what == "adapter":
            assert made.train.start == str(place / "by-adapter")
            assert made.model.path == str(place / "base")
            file = peft.WEIGHTS
            assert (place / "by-adapter" / file).read_bytes() == (
                place / "adapter" / file
            ).read_bytes()
        else:
            assert made.train.start == "" and made.model.path == str(place / "by-merged")
    assert cli.main(["export", str(place / "by-adapter"), f"--to={place / 'no'}"]) == 2
    assert "is an adapter or a model already" in capsys.readouterr().err
    assert (
        cli.main(
            ["export", str(run), f"--to={place / 'other-thinking'}", "--config.model.thinking=skip"]
        )
        == 0
    )
    said = capsys.readouterr().err
    assert "differs from the run: model.thinking=skip (trained with none)" in said


def test_an_adapter_folder_is_a_start_like_the_run_it_came_from(place):
    run = loaded(place)
    mesh = meshes.make_mesh()

    def effect(start, alpha):
        adapter = dataclasses.replace(run.lora, alpha=alpha)
        spec = weights.spec_of(run.model, adapter, run.optim)
        train = dataclasses.replace(run.train, start=str(place / start))
        _, state = weights.load_or_init(train, run.model, spec, mesh)
        assert (
            jax.tree.map(lambda x: x.sharding, state.trained)
            == states.shardings(spec, mesh).trained
        )
        return {
            k: np.asarray(p["a"]) @ np.asarray(p["b"]) * adapter.scale
            for k, p in state.trained.items()
        }

    want = effect("run", 4.0)
    assert all(np.abs(x).max() > 0.05 for x in want.values())
    got = effect("adapter", 16.0)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, want)


def test_directions_that_could_not_learn_are_made_new():
    """Zeros in both factors are a start without any gradient."""
    rng = np.random.default_rng(0)
    fresh = rng.standard_normal((2, 5, 3))
    a, b = rng.standard_normal((2, 5, 3)), rng.standard_normal((2, 3, 4))
    a[1, :, 2], b[1, 2] = 0, 0
    b[0, 1] = 0  # this one can: its other factor is not zero
    want = a.copy()
    want[1, :, 2] = fresh[1, :, 2]
    np.testing.assert_array_equal(weights.reinit_dead_directions({"a": a, "b": b}, fresh), want)


def test_a_run_of_all_weights_exports_what_it_left(place):
    spec, trained = checkpoint_of(place, "full", "--config.lora.rank=0")
    assert cli.main([*export(place, "full"), "--config.lora.rank=0", f"--to={place / 'all'}"]) == 0
    chat = weights.chat_of(loaded(place).model)
    for _ in range(2):  # a run that is continued writes its model again
        sft.export(place / "full" / "model", trained, spec, chat)
    for folder in (place / "all", place / "full" / "model"):
        again = load.load(str(folder), spec.model, meshes.make_mesh())
        jax.tree.map(np.testing.assert_array_equal, trained, again)
        assert (folder / "tokenizer.json").read_text() == chat.tokenizer.text


def test_another_base_is_refused_with_both_names_before_it_is_loaded(place, capsys, monkeypatch):
    monkeypatch.setattr(load, "load", lambda *_: pytest.fail("weights were loaded"))
    commands = {
        "an adapter": lambda: train(
            place, "x", f"--config.train.start={place / 'adapter'}", base="other"
        ),
        "the run itself": lambda: train(place, "run", "--config.train.steps=3", base="other"),
        "a merge": lambda: cli.main(
            [*export(place, base="other"), f"--to={place / 'no'}", "--what=merged"]
        ),
    }
    for what, command in commands.items():
        assert command() == 2, what
        said = capsys.readouterr().err
        assert "belongs to the base" in said and "Traceback" not in said, what
        assert f"{place / 'base'} (" in said and f"{place / 'other'} (" in said, what
    assert not (place / "no").exists()


WRONG = {
    "no target": ([], "export needs --to=DIR"),
    "a target in use": (["--to={place}/base"], "exists already"),
    "no such kind": (
        ["--to={place}/no", "--what=both"],
        "choose adapter, merged, gguf or gguf-q8_0",
    ),
    "a tokenizer without a name in GGUF": (["--to={place}/no", "--what=gguf"], "none of gpt-2"),
    "no run": (["--to={place}/no", "--workdir={place}/nowhere"], "there is no such run"),
    "no adapter": (
        ["--to={place}/no", "--what=adapter", "--config.lora.rank=0"],
        "use --what=merged",
    ),
    "another rank": (["--to={place}/no", "--config.lora.rank=2"], "rank=4 there, 2 here"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_export_says_why(name, place, capsys):
    more, said = WRONG[name]
    assert cli.main([*export(place), *(flag.format(place=place) for flag in more)]) == 2
    assert said in capsys.readouterr().err
    assert not (place / "no").exists() and not (place / "nowhere").exists()


def test_an_adapter_of_another_rank_is_no_start(place, capsys):
    start = f"--config.train.start={place / 'adapter'}"
    assert train(place, "x3", start, "--config.lora.rank=8") == 2
    assert "has lora.rank=4" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["adapter", "merged"])
def test_an_export_that_fails_midway_leaves_nothing(what, place, monkeypatch):
    before = sorted(place.iterdir())

    def fail(path, *_):
        path.write_bytes(b"half")
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(tensors, "write", fail)
    with pytest.raises(OSError):
        cli.main([*export(place), f"--to={place / 'no'}", f"--what={what}"])
    assert sorted(place.iterdir()) == before
