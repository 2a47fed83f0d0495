"""What is the same base, and what is another."""

import dataclasses

import jax
import pytest
from model import models
from model.models import CONFIGS, DENSE

from jaxdeep.errors import CheckpointError
from jaxdeep.model import load, lora
from jaxdeep.model.identity import Base, check, identity, of_files
from jaxdeep.model.rope import Linear, Llama3, Yarn


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_same_in_every_dtype_on_every_mesh_and_in_half_as_int8(name, tmp_path):
    cfg, params = CONFIGS[name], models.params(name)
    found = identity(params, cfg)
    assert len(found) == 25
    load.save(tmp_path / "x", params, cfg)
    assert of_files(str(tmp_path / "x"), cfg) == found.split("-")[0]
    for mesh, dtype, quant in (
        (models.four_devices(), "bfloat16", ""),
        (models.four_devices(), "float32", "int8"),
    ):
        other = dataclasses.replace(cfg, dtype=dtype, quant=quant, remat="full", chunk=8)
        got = identity(load.load(str(tmp_path / "x"), other, mesh), other)
        assert got == (found.split("-")[0] if quant else found)
        check("it", Base("a", found), Base("b", got))


def test_another_weight_or_another_shape_is_another_base():
    params = models.params("dense")
    found = identity(params, DENSE)
    other = dataclasses.replace(DENSE, theta=1e6)
    wk = {"wk": models.adapter("dense").factors["wk"]}
    merged = lora.merge(params, lora.Adapter(wk, 1.0))
    moved = params | {"norm": params["norm"] * 1.1}
    fresh = jax.tree.map(lambda x: x[..., ::-1], params)
    stretched = [
        dataclasses.replace(DENSE, scaling=scaling)
        for scaling in (Yarn(4.0, 128), Yarn(8.0, 128), Linear(4.0), Llama3(4.0, 128))
    ]
    stretched += [
        dataclasses.replace(DENSE, window=4),
        dataclasses.replace(DENSE, window=4, windowed=(True, False)),
    ]
    others = {identity(p, DENSE) for p in (merged, moved, fresh)}
    others |= {identity(params, cfg) for cfg in (other, *stretched)}
    assert len(others) == 10 and found not in others
    for hash in others:
        with pytest.raises(CheckpointError, match=f"base one .{found}.*two .{hash}"):
            check("it", Base("one", found), Base("two", hash))
    check("it", None, Base("two", found))
