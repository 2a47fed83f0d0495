"""Checkpoints in and out: equal to what was saved and to transformers, whole or refused, in little
memory."""

import dataclasses
import json
import shutil
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model import models
from model.models import CONFIGS, DENSE, MIXTURE

from jaxdeep.errors import CheckpointError, ConfigError
from jaxdeep.model import layout, load, tensors
from jaxdeep.model import weights as model_weights
from jaxdeep.model.config import Config
from jaxdeep.model.identity import identity


def equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The models, one in a single file and the others in several."""
    path = tmp_path_factory.mktemp("saved")
    load.save(path / "dense", models.params("dense"), DENSE)
    for name in CONFIGS.keys() - {"dense"}:
        load.save(path / name, models.params(name), CONFIGS[name], max_shard=30_000)
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_saved_is_loaded_equal_on_one_device_and_on_many(name, saved):
    cfg = Config.from_hf(saved / name, dtype="float32", remat="dots")
    assert cfg == CONFIGS[name]
    files = sorted(file.name for file in (saved / name).iterdir())
    if name == "dense":
        assert files == ["config.json", "model.safetensors"]
    else:
        assert len(files) > 4 and layout.INDEX in files
        index = json.loads((saved / name / layout.INDEX).read_text())
        assert index["metadata"]["total_size"] == 4 * model_weights.count(cfg)
        shards = [file for file in (saved / name).glob("*.safetensors")]
        assert all(file.stat().st_size < 40_000 for file in shards)
    equal(load.load(str(saved / name), cfg, models.one_device()), models.params(name))
    sharded = load.load(str(saved / name), cfg, models.four_devices())
    equal(sharded, models.params(name))
    where = model_weights.shardings(cfg, models.four_devices())
    assert jax.tree.map(lambda x: x.sharding, sharded) == where
    again = saved / f"{name}-again"
    load.save(again, sharded, cfg)
    equal(load.load(str(again), cfg, models.one_device()), models.params(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_int8_and_bfloat16_are_made_on_the_way(name, saved):
    for mesh in (models.one_device(), models.four_devices()):
        small = dataclasses.replace(CONFIGS[name], quant="int8", dtype="bfloat16")
        got = load.load(str(saved / name), small, mesh)
        want = jax.tree.map(lambda x: x.astype(jnp.bfloat16), models.params(name))
        for leaf in model_weights.LINEARS:
            weight = np.asarray(want["layers"][leaf], np.float32)
            found = want["layers"][leaf] = got["layers"][leaf]
            scale = np.abs(weight).max(-2) / np.float32(127)
            np.testing.assert_allclose(found["scale"], scale, rtol=1e-6)
            apart = found["q"] * scale[..., None, :] - weight
            assert (np.abs(apart) <= 0.501 * scale[..., None, :]).all()
        equal(got, want)
        assert got["embed"].dtype == jnp.bfloat16
    with pytest.raises(ConfigError, match="int8"):
        load.save(saved / "int8", got, small)


@pytest.mark.parametrize("name", CONFIGS)  # one is tied and one is not
def test_transformers_computes_the_same_from_a_merged_checkpoint(name, tmp_path):
    params, adapter = models.params(name), models.adapter(name)
    load.save(tmp_path / "x", params, CONFIGS[name], adapter=adapter, max_shard=40_000)
    model, info = models.transformers_model(tmp_path / "x", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours = models.logits(name, adapter)
    np.testing.assert_allclose(models.their_logits(model), ours, atol=1e-4)
    assert np.abs(ours - models.logits(name, None)).max() > 0.1


def test_a_mixture_that_transformers_saved_is_read(saved, tmp_path):
    model = models.transformers_model(saved / "mixture")
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    cfg = Config.from_hf(tmp_path, dtype="float32", remat="dots")
    equal(load.load(str(tmp_path), cfg, models.one_device()), models.params("mixture"))


def test_float64_is_read_as_float32(saved, tmp_path):
    path = shutil.copytree(saved / "dense", tmp_path / "x")
    rewrite(path, lambda held: held.update({k: v.astype(np.float64) for k, v in held.items()}))
    equal(load.load(str(path), DENSE, models.one_device()), models.params("dense"))


def test_experts_are_put_in_place_without_talking(saved):
    mesh = models.four_devices()
    where = model_weights.shardings(MIXTURE, mesh)["layers"]["w_up"]
    leaf = jax.ShapeDtypeStruct((2, 4, 32, 24), jnp.float32, sharding=where)
    spec = jax.sharding.PartitionSpec("model", None, "data")
    x = jax.ShapeDtypeStruct(
        (2, 24, 32), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec)
    )
    insert = load._inserter((where,), "float32", True, True)
    text = insert.lower(leaf, x, np.int32(0), np.int32(0)).compile().as_text()
    assert "all-" not in text and "collective" not in text and "input_output_alias" in text


def rewrite(path, change):
    """The single file of a checkpoint with its tensors changed by `change`, a function of the
    dict."""
    held = {k: e.read() for k, e in tensors.header(path / "model.safetensors").items()}
    change(held)
    shapes = {k: (v.shape, v.dtype) for k, v in held.items()}
    tensors.write(path / "model.safetensors", shapes, held.values())


def truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def float8(path):
    file = path / "model.safetensors"
    text = file.read_bytes()
    size = int.from_bytes(text[:8], "little")
    head = json.loads(text[8 : 8 + size])
    head["model.layers.1.mlp.up_proj.weight"]["dtype"] = "F8_E4M3"
    head = json.dumps(head).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + text[8 + size :])


def other_architecture(path):
    about = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(about | {"model_type": "gpt2"}))


O_PROJ, MORE = "model.layers.1.self_attn.o_proj.weight", "model.layers.2.input_layernorm.weight"
BROKEN = {
    "truncated": (truncate, r"the file is not whole"),
    "not safetensors": (
        lambda path: (path / "model.safetensors").write_bytes(b"not a checkpoint"),
        "cannot be read as safetensors",
    ),
    "absent": (lambda path: (path / "model.safetensors").unlink(), "holds no model.safetensors"),
    "a tensor missing": (
        lambda path: rewrite(path, lambda held: held.pop(O_PROJ)),
        rf"no tensor {O_PROJ} \(1 are",
    ),
    "a layer too many": (
        lambda path: rewrite(path, lambda held: held.update({MORE: np.ones(32, np.float32)})),
        f"has {MORE}, which",
    ),
    "a wrong shape": (
        lambda path: rewrite(path, lambda held: held.update({O_PROJ: held[O_PROJ][1:]})),
        rf"{O_PROJ} has shape \(31, 64\), config.json asks for \(32, 64\)",
    ),
    "a wrong dtype": (float8, r"layers.1.mlp.up_proj.weight is F8_E4M3, not one of BF16"),
    "another architecture": (other_architecture, "model_type='gpt2'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_checkpoint_that_is_not_right_is_refused_before_anything_is_allocated(
    name, saved, tmp_path, monkeypatch
):
    spoil, said = BROKEN[name]
    path = shutil.copytree(saved / "dense", tmp_path / "x")
    spoil(path)
    monkeypatch.setattr(load, "_read", None)
    with pytest.raises(CheckpointError, match=said):
        load.load(str(path), Config.from_hf(path, dtype="float32"), models.one_device())


def test_a_missing_shard_and_a_broken_index_are_named(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "_read", None)
    path = shutil.copytree(saved / "mixture", tmp_path / "x")
    gone = sorted(path.glob("*.safetensors"))[2]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"not there: .*{gone.name}"):
        load.load(str(path), MIXTURE, models.one_device())
    (path / layout.INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="not a readable index"):
        load.load(str(path), MIXTURE, models.one_device())


def test_a_folder_in_use_is_refused_and_a_failure_leaves_nothing(saved, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="exists already"):
        load.save(saved / "dense", models.params("dense"), DENSE)
    written = []

    def fail(path, shapes, arrays):
        written.append(path)
        path.write_bytes(b"half")
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    old = shutil.copytree(saved / "dense", tmp_path / "old")
    monkeypatch.setattr(tensors, "write", fail)
    for name, replace in (("new", False), ("old", True)):
        written.clear()
        with pytest.raises(OSError, match="No space"):
            load.save(
                tmp_path / name, models.params("dense"), DENSE, max_shard=20_000, replace=replace
            )
    assert len(written) == 2
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    equal(load.load(str(old), DENSE, models.one_device()), models.params("dense"))
    (tmp_path / "empty").mkdir()
    for name, replace in (("empty", False), ("old", True)):
        load.save(tmp_path / name, models.params("dense"), DENSE, replace=replace)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "old"]


def test_tokenizer_files_come_along(saved, tmp_path):
    source = shutil.copytree(saved / "dense", tmp_path / "source")
    about = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(about | {"eos_token_id": 7, "vocab_size": 1}))
    (source / "tokenizer_config.json").write_text("{}")
    (source / "README.md").write_text("about another model")
    beside = {"tokenizer.json": "[]"}
    load.save(tmp_path / "x", models.params("dense"), DENSE, source=source, beside=beside)
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "x").iterdir()} == names
    about = json.loads((tmp_path / "x" / "config.json").read_text())
    assert about["eos_token_id"] == 7 and about["vocab_size"] == 96


LOAD = """
    import re, sys
    import jax
    from jaxdeep.parallel import mesh as meshes
    from jaxdeep.model import load
    from jaxdeep.model import weights as model_weights
    from jaxdeep.model.config import Config
    cfg = Config.from_hf(sys.argv[1])
    params = load.load(sys.argv[1], cfg, meshes.make_mesh())
    held = sum(x.nbytes for x in jax.tree.leaves(params))
    assert held == 2 * model_weights.count(cfg)
    peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
    print(int(peak) * 1024 - held)
"""


@pytest.fixture
def scratch(tmp_path):
    """A folder for gigabytes: it does not stay for the next runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_loading_takes_the_largest_tensor_and_a_gigabyte(devices, scratch):
    cfg = Config(
        **dict(V=300_000, D=2048, F=8192, L=22, N=16, K=8, H=128, theta=1e6, eps=1e-6, tie=False),
        limit=4096,
    )
    size, largest = 2 * model_weights.count(cfg), 2 * cfg.V * cfg.D
    assert size >= 4e9
    free = shutil.disk_usage(scratch).free
    if free < 2 * size:
        pytest.skip(f"{free / 1e9:.0f} GB of disk are free, {2 * size / 1e9:.0f} are needed")
    with open("/proc/meminfo") as file:
        memory = int(next(line for line in file if "MemAvailable" in line).split()[1]) * 1024
    if memory < 2 * size:
        pytest.skip(f"{memory / 1e9:.0f} GB of memory are free, {2 * size / 1e9:.0f} are needed")
    plan = layout.slots(cfg)
    rng, names, at = np.random.default_rng(0), list(plan), 0
    (scratch / "config.json").write_text(json.dumps(cfg.to_hf()))
    index = {}
    while at < len(names):  # files of about 2 GB
        file, held = f"model-{len(set(index.values()))}.safetensors", []
        while at < len(names) and sum(2 * np.prod(plan[n].shape) for n in held) < 2e9:
            held.append(names[at])
            at += 1
        index |= dict.fromkeys(held, file)
        dtype = jnp.dtype("bfloat16")
        shapes = {n: (plan[n].shape, dtype) for n in held}
        tensors.write(
            scratch / file,
            shapes,
            (
                np.frombuffer(rng.bytes(2 * int(np.prod(s))), "u2").view(dtype).reshape(s)
                for s, _ in shapes.values()
            ),
        )
    (scratch / layout.INDEX).write_text(json.dumps({"weight_map": index}))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOAD), str(scratch)],
        capture_output=True,
        text=True,
        env={
            **dict(PYTHONPATH=":".join(sys.path), JAX_PLATFORMS="cpu"),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        },
    )
    assert done.returncode == 0, done.stderr
    beyond = int(done.stdout)
    print(f"{size / 1e9:.2f} GB on {devices} devices: {beyond / 1e9:.2f} GB beyond the arrays")
    assert beyond <= largest + 1e9


PAIR = """
    import os, sys
    port, process, source, target = sys.argv[1:]
    import jax
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    import pathlib
    from jaxdeep.parallel import mesh as meshes
    from jaxdeep.model import identity, load
    from jaxdeep.model.config import Config
    cfg = Config.from_hf(source, dtype="float32")
    params = load.load(source, cfg, meshes.make_mesh(meshes.MeshConfig(data=2, model=2)))
    assert not params["embed"].is_fully_addressable
    load.save(pathlib.Path(target), params, cfg)
    print(identity.identity(params, cfg))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_load_and_save_together(name, saved, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = dict(PYTHONPATH=":".join(sys.path), JAX_PLATFORMS="cpu")
    env |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    args = [str(saved / name), str(tmp_path / "x")]
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PAIR), str(port), str(n), *args],
            **dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env),
        )
        for n in range(2)
    ]
    said = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    want = identity(models.params(name), CONFIGS[name])
    assert [out.strip().splitlines()[-1] for out, _ in said] == [want] * 2
    again = load.load(str(tmp_path / "x"), CONFIGS[name], models.one_device())
    equal(again, models.params(name))
