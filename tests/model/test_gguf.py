"""GGUF files made here: read back as they were written, block types by their published layout, and
refusals."""

import dataclasses

import gguf
import jax
import numpy as np
import pytest
from model import models

from jaxdeep.errors import CheckpointError, ConfigError
from jaxdeep.gguf_file import open_gguf
from jaxdeep.model import gguf as ggufs
from jaxdeep.model import identity, load, lora, rope
from jaxdeep.model import weights as model_weights
from jaxdeep.model.config import Config

LLAMA = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def shapes_of(hf):
    D, F, H = hf["hidden_size"], hf["intermediate_size"], hf["head_dim"]
    N, K, E = hf["num_attention_heads"], hf["num_key_value_heads"], hf.get("num_experts", 0)
    shapes = {"model.embed_tokens.weight": (hf["vocab_size"], D)}
    for i in range(hf["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (D,),
            f"{layer}.self_attn.q_proj.weight": (N * H, D),
            f"{layer}.self_attn.k_proj.weight": (K * H, D),
            f"{layer}.self_attn.v_proj.weight": (K * H, D),
            f"{layer}.self_attn.o_proj.weight": (D, N * H),
            f"{layer}.post_attention_layernorm.weight": (D,),
        }
        if hf["model_type"].startswith("qwen3"):
            shapes |= {f"{layer}.self_attn.{n}_norm.weight": (H,) for n in "qk"}
        if hf["model_type"] == "qwen2":
            shapes |= {
                f"{layer}.self_attn.{n}_proj.bias": (N * H if n == "q" else K * H,) for n in "qkv"
            }
        if E:
            F = hf["moe_intermediate_size"]
            shapes[f"{layer}.mlp.gate.weight"] = (E, D)
        for expert in range(E) if E else [None]:
            mlp = f"{layer}.mlp" if expert is None else f"{layer}.mlp.experts.{expert}"
            shapes |= {
                f"{mlp}.gate_proj.weight": (F, D),
                f"{mlp}.up_proj.weight": (F, D),
                f"{mlp}.down_proj.weight": (D, F),
            }
        if E:  # the layout groups experts by their linear
            gate = [k for k in shapes if k.startswith(f"{layer}.mlp.experts")]
            experts = {k: shapes.pop(k) for k in gate}
            order = ("gate_proj", "up_proj", "down_proj")
            shapes |= {k: v for name in order for k, v in experts.items() if name in k}
    shapes["model.norm.weight"] = (D,)
    return (
        shapes if hf["tie_word_embeddings"] else shapes | {"lm_head.weight": (hf["vocab_size"], D)}
    )


def write(path, hf, kind="F16", seed=0, **more):
    rng = np.random.default_rng(seed)
    shapes = shapes_of(hf)
    arrays = {
        n: rng.standard_normal(s).astype(np.float16).astype(np.float32) for n, s in shapes.items()
    }
    ggufs.write(path, hf, shapes, arrays.values(), kind=kind, **more)
    return arrays


MODELS = {
    "llama": LLAMA,
    "llama3": LLAMA | {"rope_scaling": LLAMA3},
    "linear": LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "untied": LLAMA | {"tie_word_embeddings": False},
    "qwen2": LLAMA | {"model_type": "qwen2"},
    "qwen3": LLAMA | {"model_type": "qwen3"},
    "qwen3_moe": LLAMA
    | {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_read(name, tmp_path):
    hf, path = MODELS[name], tmp_path / "m.gguf"
    arrays = write(path, hf)
    read = ggufs.hf_config(path)
    assert {k: v for k, v in read.items() if k in hf and k != "rope_scaling"} == {
        k: pytest.approx(v) if isinstance(v, float) else v
        for k, v in hf.items()
        if k != "rope_scaling"
    }
    for key, value in hf.get("rope_scaling", {}).items():
        assert (
            read["rope_scaling"][key] == pytest.approx(value) or value == read["rope_scaling"][key]
        )
    entries = ggufs.locate(path, shapes_of(hf))
    rng = np.random.default_rng(1)
    for key, array in arrays.items():
        np.testing.assert_array_equal(entries[key].read(), array)
        parts = [slice(*sorted(rng.choice(n + 1, 2, replace=False))) for n in array.shape]
        np.testing.assert_array_equal(entries[key].read(parts), array[tuple(parts)])


def test_rows_of_queries_and_keys_lie_in_the_file_as_llama_cpp_permutes_them(tmp_path):
    """By the two lines that its converter is known for."""
    arrays = write(tmp_path / "m.gguf", LLAMA)
    stored = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for ours, theirs, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        w = arrays[f"model.layers.1.self_attn.{ours}.weight"]
        permuted = w.reshape(heads, 2, w.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)
        np.testing.assert_array_equal(stored[f"blk.1.{theirs}.weight"], permuted)


def q8_0(block):
    scale = np.frombuffer(block[:2], "<f2")[0]
    return np.frombuffer(block[2:], "i1") * np.float32(scale)


def q4(block, least):
    scale = np.float32(np.frombuffer(block[:2], "<f2")[0])
    low = np.float32(np.frombuffer(block[2:4], "<f2")[0]) if least else -8 * scale
    data = np.frombuffer(block[4 if least else 2 :], "u1")
    return np.concatenate([data & 15, data >> 4]) * scale + low


def k_scales(packed):
    """Eight scales and eight minima of 6 bits each, from 12 bytes."""
    s = np.frombuffer(packed, "u1").astype(int)
    low = [s[i] & 63 for i in range(4)] + [(s[i + 8] & 15) | (s[i] >> 6) << 4 for i in range(4)]
    high = [s[i + 4] & 63 for i in range(4)]
    high += [(s[i + 8] >> 4) | (s[i + 4] >> 6) << 4 for i in range(4)]
    return low, high


def q45_k(block, bits):
    d, dmin = (np.float32(x) for x in np.frombuffer(block[:4], "<f2"))
    scales, minima = k_scales(block[4:16])
    high = np.frombuffer(block[16:48], "u1") if bits == 5 else np.zeros(32, "u1")
    data = np.frombuffer(block[48 if bits == 5 else 16 :], "u1")
    out = []
    for j in range(8):
        part = data[32 * (j // 2) : 32 * (j // 2) + 32]
        q = (part >> 4 if j % 2 else part & 15).astype(int) + 16 * ((high >> j) & 1)
        out.append(d * scales[j] * q - dmin * minima[j])
    return np.concatenate(out)


def q6_k(block):
    low, high = np.frombuffer(block[:128], "u1"), np.frombuffer(block[128:192], "u1")
    scales, d = (
        np.frombuffer(block[192:208], "i1"),
        np.float32(np.frombuffer(block[208:], "<f2")[0]),
    )
    out = np.empty(256, np.float32)
    for half in range(2):
        for quarter in range(4):
            a = low[64 * half + 32 * (quarter % 2) :][:32]
            a = (a >> 4 if quarter > 1 else a & 15).astype(int)
            q = (a | ((high[32 * half :][:32] >> (2 * quarter)) & 3).astype(int) << 4) - 32
            at = 128 * half + 32 * quarter
            s = scales[8 * half + 2 * quarter :][:2].repeat(16)
            out[at : at + 32] = d * s * q
    return out


BLOCKS = {
    "Q8_0": q8_0,
    "Q4_0": lambda b: q4(b, False),
    "Q4_1": lambda b: q4(b, True),
    "Q4_K": lambda b: q45_k(b, 4),
    "Q5_K": lambda b: q45_k(b, 5),
    "Q6_K": q6_k,
    "BF16": lambda b: (np.frombuffer(b, "<u2").astype("u4") << 16).view("f4"),
}
HALVES = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}


def raw_file(path, kind, rows=4, columns=512):
    """A llama whose embedding has these random bytes; the other tensors are left out."""
    type_ = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[type_]
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    for at in HALVES.get(kind, []):  # scales that are numbers
        scale = rng.standard_normal((rows, columns // block, 1)).astype("<f2")
        data[:, :, at : at + 2] = scale.view(np.uint8).reshape(rows, -1, 2)
    if kind == "BF16":
        data = (
            (rng.standard_normal((rows, columns)).astype("<f4").view("<u4") >> 16)
            .astype("<u2")
            .view("u1")
        )
        data = data.reshape(rows, columns, 2)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", data.reshape(rows, -1), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return data


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_dequantized_as_they_are_laid_out(kind, tmp_path):
    data = raw_file(tmp_path / "m.gguf", kind)
    want = np.stack([np.concatenate([BLOCKS[kind](b.tobytes()) for b in row]) for row in data])
    tensor = open_gguf(tmp_path / "m.gguf").tensors["token_embd.weight"]
    entry = ggufs.Entry(tensor, (4, 512))
    np.testing.assert_allclose(entry.read(), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        entry.read([slice(1, 3), slice(7, 300)]), want[1:3, 7:300], rtol=1e-5, atol=1e-5
    )


def test_q8_0_is_near_what_was_written(tmp_path):
    arrays = write(tmp_path / "m.gguf", LLAMA, kind="Q8_0")
    for key, entry in ggufs.locate(tmp_path / "m.gguf", shapes_of(LLAMA)).items():
        assert entry.dtype == ("F32" if arrays[key].ndim == 1 else "Q8_0")
        limit = np.abs(arrays[key]).max() / 127 if arrays[key].ndim > 1 else 0
        np.testing.assert_allclose(entry.read(), arrays[key], atol=limit)


def cut(path, n):
    path.write_bytes(path.read_bytes()[:n])


@pytest.mark.parametrize("left", [0, 3, 20, 700, -200])
def test_a_file_that_is_cut_short_is_refused(left, tmp_path):
    write(tmp_path / "m.gguf", LLAMA)
    cut(tmp_path / "m.gguf", left)
    with pytest.raises(CheckpointError, match=r"m.gguf .*(not whole|another kind)"):
        ggufs.hf_config(tmp_path / "m.gguf")


def changed(path, arch="llama", kind=None, drop=(), extra=(), more=()):
    """A file with one thing wrong."""
    rng, hf = np.random.default_rng(0), LLAMA
    writer = gguf.GGUFWriter(path, arch)
    ggufs._describe(writer, hf, "F16", "")
    for key, value in more:
        writer.add_float32(f"{arch}.{key}", value)
    names = ggufs._names("llama", 2, shapes_of(hf))
    for ours, shape in shapes_of(hf).items():
        if names[ours][0] not in drop:
            array = rng.standard_normal(shape).astype(np.float32)
            if kind and len(shape) > 1 and shape[-1] % 32 == 0:
                quantized = gguf.quantize(array, gguf.GGMLQuantizationType[kind])
                writer.add_tensor(
                    names[ours][0], quantized, raw_dtype=gguf.GGMLQuantizationType[kind]
                )
            else:
                writer.add_tensor(names[ours][0], array)
    for name in extra:
        writer.add_tensor(name, np.zeros(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


WRONG = {
    "architecture 'gemma3'": dict(arch="gemma3"),
    "quantized as Q5_0; those that are read are F32": dict(kind="Q5_0"),
    "no tensor blk.1.ffn_up.weight": dict(drop=["blk.1.ffn_up.weight"]),
    "has blk.0.attn_q.norm": dict(extra=["blk.0.attn_q.norm"]),
    "llama.logit_scale=2.0": dict(more=[("logit_scale", 2.0)]),
    "factors of its own": dict(extra=["rope_freqs.weight"]),
}


@pytest.mark.parametrize("said", WRONG)
def test_what_cannot_be_computed_is_named(said, tmp_path):
    changed(tmp_path / "m.gguf", **WRONG[said])
    with pytest.raises(CheckpointError, match=said):
        ggufs.locate(tmp_path / "m.gguf", shapes_of(LLAMA))


def test_files_in_parts_are_one(tmp_path):
    arrays = write(tmp_path / "whole.gguf", LLAMA)
    rng = list(arrays.items())
    names = ggufs._names("llama", 2, shapes_of(LLAMA))
    for n, part in enumerate((rng[:7], rng[7:])):
        writer = gguf.GGUFWriter(tmp_path / f"m-0000{n + 1}-of-00002.gguf", "llama")
        if n == 0:
            ggufs._describe(writer, LLAMA, "F16", "")
        for name, array in part:
            heads = ggufs._heads("llama", name, LLAMA)
            writer.add_tensor(names[name][0], ggufs._file_order(array, heads))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    entries = ggufs.locate(tmp_path / "m-00002-of-00002.gguf", shapes_of(LLAMA))
    assert all((entries[n].read() == a).all() for n, a in arrays.items())
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"there is no .*00002-of-00002"):
        ggufs.hf_config(tmp_path / "m-00001-of-00002.gguf")


def test_what_has_no_word_in_gguf_is_not_written(tmp_path):
    with pytest.raises(ConfigError, match="as Q4_K cannot be written"):
        write(tmp_path / "m.gguf", LLAMA, kind="Q4_K")
    with pytest.raises(ConfigError, match="'dynamic'"):
        write(tmp_path / "m.gguf", LLAMA | {"rope_scaling": {"rope_type": "dynamic"}})


@pytest.mark.parametrize("name", ["dense", "mixture", "llama", "qwen2", "olmo"])
def test_a_model_goes_out_and_in_again_with_its_adapter_merged(name, tmp_path):
    """By way of the package's own arrays, on one device and on four."""
    kinds = {
        "llama": dict(family="llama", scaling=rope.Llama3(8.0, 8192)),
        "qwen2": dict(family="qwen2", biases=("wq", "wk", "wv")),
    }
    cfg = dataclasses.replace(models.CONFIGS.get(name, models.DENSE), **kinds.get(name, {}))
    if name == "olmo":
        cfg = dataclasses.replace(cfg, biases=(), scaling=None)
    params = models._random(model_weights.leaves(cfg), 1, 0.4)
    path = tmp_path / "model.gguf"
    adapter = lora.Adapter(models._random(lora.leaves(cfg, models.LORA), 2, 0.15), 2.0)
    load.save_gguf(path, params, cfg, kind="F16", adapter=adapter)
    again = Config.from_hf(path, dtype="float32", remat="dots")
    assert again == dataclasses.replace(cfg, eps=again.eps) and again.eps == pytest.approx(cfg.eps)
    merged = jax.device_get(lora.merge(params, adapter))
    for mesh in (models.one_device(), models.four_devices()):
        loaded = load.load(str(path), again, mesh)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), merged, loaded
        )
    assert identity.of_files(str(path), again) == identity.identity(loaded, again).partition("-")[0]
    with pytest.raises(CheckpointError, match="exists already"):
        load.save_gguf(path, params, cfg, kind="F16")
