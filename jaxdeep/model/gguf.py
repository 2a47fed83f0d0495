"""Models in GGUF files: what `config.json` would say, tensors under their Hugging Face names, and
the way out.

Quantized tensors are dequantized a block of rows at a time. The llama architecture's GGUF files
hold the rows of the query and key projections in another order, for a rotary embedding of
neighbouring pairs; reading puts them back.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdeep.errors import CheckpointError, ConfigError
from jaxdeep.gguf_file import GgufFile, Tensor, open_gguf

READABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")
WRITABLE = ("F16", "Q8_0")
BLOCK = 32 * 2**20  # bytes of dequantized rows at one time

MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "olmo2": "olmo2",
}
"""The `model_type` of an architecture; Mistral is written as llama, OLMo 3 as olmo2."""
ARCHITECTURES = {theirs: ours for ours, theirs in MODEL_TYPES.items()} | {
    "mistral": "llama",
    "olmo3": "olmo2",
}

# Keys below the architecture's name that are read, or that change nothing that is computed.
KNOWN = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attention.causal",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
    "tensor_data_layout",
}


class Entry(NamedTuple):
    """A tensor, or one expert of it, as the layout of Hugging Face has it: `shape` is [out, in],
    `first` the row of the file's tensor where it begins. Of `heads` above 0 the rows lie pair by
    pair within each head, in the file only."""

    tensor: Tensor
    shape: tuple[int, ...]
    first: int = 0
    heads: int = 0

    @property
    def dtype(self) -> str:
        """The name of its GGML type."""
        return self.tensor.type

    @property
    def file(self) -> pathlib.Path:
        return self.tensor.file

    @property
    def read_as(self) -> np.dtype:
        """The dtype that `read` gives."""
        return np.dtype(np.float32)

    @property
    def start(self) -> int:
        return self.tensor.start + self.first * _row_bytes(self.tensor)

    def read(self, slices: Sequence[slice] | None = None) -> np.ndarray:
        """The tensor, or the part that `slices`, one a dimension, choose, in float32."""
        slices = slices or [slice(None)] * len(self.shape)
        bounds = [s.indices(n)[:2] for s, n in zip(slices, self.shape, strict=True)]
        if len(self.shape) == 1:
            (whole,) = _rows(self.tensor, [0])
            return self._published_order(whole[None].T)[bounds[0][0] : bounds[0][1], 0]
        (first, last), (left, right) = bounds
        rows = self.first + self._file_rows(np.arange(first, last))
        out = np.empty((last - first, right - left), np.float32)
        step = max(1, BLOCK // (4 * self.shape[1]))
        for at in range(0, len(rows), step):
            out[at : at + step] = _rows(self.tensor, rows[at : at + step])[:, left:right]
        return out

    def _file_rows(self, rows: np.ndarray) -> np.ndarray:
        """Where these rows lie in the file. Within a head, row (half, i) of the published order is
        row (i, half) there."""
        if not self.heads:
            return rows
        width = self.shape[0] // self.heads
        head, inside = rows // width, rows % width
        half, i = inside // (width // 2), inside % (width // 2)
        return head * width + 2 * i + half

    def _published_order(self, column: np.ndarray) -> np.ndarray:
        return column[self._file_rows(np.arange(self.shape[0]))] if self.heads else column


def _row_bytes(tensor: Tensor) -> int:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.type]]
    return tensor.shape[-1] // block * size


def _rows(tensor: Tensor, rows: Sequence[int]) -> np.ndarray:
    """These rows of a tensor (all its dimensions but the last as one), dequantized, in float32."""
    import gguf

    count = math.prod(tensor.shape[:-1])
    data = np.memmap(tensor.file, np.uint8, "r", tensor.start, shape=(count, _row_bytes(tensor)))
    found = np.ascontiguousarray(data[np.asarray(rows)])
    kind = gguf.GGMLQuantizationType[tensor.type]
    if tensor.type in ("F32", "F16"):
        return found.view(np.dtype({"F32": "<f4", "F16": "<f2"}[tensor.type])).astype(np.float32)
    return gguf.dequantize(found, kind)


def hf_config(path: str | pathlib.Path) -> dict[str, Any]:
    """The content that the model's `config.json` would have. CheckpointError for an architecture,
    or a value in its metadata, that this package does not know."""
    file = open_gguf(path)
    name = file.get("general.architecture")
    if name not in MODEL_TYPES:
        raise CheckpointError(
            f"{path} is a model of the architecture {name!r}; those that are read are "
            f"{', '.join(MODEL_TYPES)}"
        )
    given = {
        key.removeprefix(f"{name}."): value
        for key, value in file.metadata.items()
        if key.startswith(f"{name}.")
    }
    unknown = sorted(given.keys() - KNOWN)
    if unknown:
        said = ", ".join(f"{name}.{key}={given[key]!r}" for key in unknown)
        raise CheckpointError(f"{path} is a model that this package does not compute: {said}")

    def need(key: str) -> Any:
        value = file.get(f"{name}.{key}")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise CheckpointError(f"{path}: {name}.{key} differs between layers: {value}")
            value = value[0]
        return value

    heads, width = need("attention.head_count"), need("embedding_length")
    head_dim = given.get("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if given.get(key, head_dim) != head_dim:
            raise CheckpointError(
                f"{path}: {name}.{key}={given[key]}, where heads are {head_dim} wide, is not computed"
            )
    theta = float(given.get("rope.freq_base", 10000.0))
    window = given.get("attention.sliding_window")
    hf: dict[str, Any] = {
        "model_type": "olmo3" if name == "olmo2" and window else MODEL_TYPES[name],
        "vocab_size": file.tensors["token_embd.weight"].shape[0]
        if "token_embd.weight" in file.tensors
        else need("vocab_size"),
        "hidden_size": width,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": given.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "max_position_embeddings": need("context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in file.tensors and name != "qwen2",
    }
    if isinstance(hf["num_key_value_heads"], list):
        hf["num_key_value_heads"] = need("attention.head_count_kv")
    if window:
        hf["sliding_window"] = window
        pattern = given.get("attention.sliding_window_pattern")
        if isinstance(pattern, list):
            kinds = {True: "sliding_attention", False: "full_attention"}
            hf["layer_types"] = [kinds[bool(windowed)] for windowed in pattern]
    if name == "qwen3moe":
        hf |= {
            "num_experts": need("expert_count"),
            "num_experts_per_tok": need("expert_used_count"),
            "moe_intermediate_size": need("expert_feed_forward_length"),
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    scaling = _rope_scaling(file, given, head_dim, theta)
    return hf | ({"rope_scaling": scaling} if scaling else {})


def _rope_scaling(
    file: GgufFile, given: Mapping[str, Any], head_dim: int, theta: float
) -> dict[str, Any] | None:
    kind = given.get("rope.scaling.type", "none")
    if "rope_freqs.weight" in file.tensors:
        return _llama3_scaling(file, head_dim, theta)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f"{file.path}: the rotary scaling {kind!r} is not computed")
    out = {"rope_type": kind, "factor": float(given["rope.scaling.factor"])}
    if kind == "yarn":
        out["original_max_position_embeddings"] = int(given["rope.scaling.original_context_length"])
        for theirs, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if f"rope.scaling.{theirs}" in given:
                out[ours] = float(given[f"rope.scaling.{theirs}"])
    return out


def llama3_factors(
    factor: float, low: float, high: float, original: int, head_dim: int, theta: float
) -> np.ndarray:
    """What Llama 3.1 divides each rotary frequency by, [head_dim / 2]: 1 for wavelengths below
    original / high positions, `factor` above original / low, and between them by interpolation of
    the frequency."""
    frequency = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelength = 2 * math.pi / frequency
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _llama3_scaling(file: GgufFile, head_dim: int, theta: float) -> dict[str, Any]:
    """The scaling whose divisors the file holds. Files do not name its parameters: those that Meta
    published are compared with."""
    (divisors,) = _rows(file.tensors["rope_freqs.weight"], [0])
    factor = float(divisors.max())
    low, high, original = 1.0, 4.0, 8192
    if (
        len(divisors) != head_dim // 2
        or factor < 1
        or not np.allclose(
            divisors, llama3_factors(factor, low, high, original, head_dim, theta), rtol=1e-4
        )
    ):
        raise CheckpointError(
            f"{file.path} divides its rotary frequencies by factors of its own (up to {factor:g}), "
            "which are not those of Llama 3"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def locate(path: str | pathlib.Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Entry]:
    """Where each tensor lies, by its Hugging Face name, from the header alone. CheckpointError for
    one that is missing, left over, of another shape, or of a type that is not read."""
    file = open_gguf(path)
    config = hf_config(path)
    arch = file.get("general.architecture")
    names = _names(arch, config["num_hidden_layers"], shapes)
    entries, used = {}, {"rope_freqs.weight"}
    for name, shape in shapes.items():
        theirs, expert = names[name]
        tensor = file.tensors.get(theirs)
        if tensor is None:
            raise CheckpointError(f"{path} has no tensor {theirs}: it is not whole")
        used.add(theirs)
        whole = shape if expert is None else (config["num_experts"], *shape)
        if tensor.shape != whole:
            raise CheckpointError(
                f"{path}: {theirs} has shape {tensor.shape}, its metadata asks for {whole}"
            )
        if tensor.type not in READABLE:
            raise CheckpointError(
                f"{path}: {theirs} is quantized as {tensor.type}; those that are read are "
                f"{', '.join(READABLE)}: take a file with one of them"
            )
        heads = _heads(arch, name, config)
        entries[name] = Entry(tensor, tuple(shape), (expert or 0) * shape[0], heads)
    left = sorted(file.tensors.keys() - used)
    if left:
        raise CheckpointError(
            f"{path} has {left[0]} ({len(left)} such tensors), which a {config['model_type']} does "
            "not have"
        )
    return entries


def _heads(arch: str, name: str, config: Mapping[str, Any]) -> int:
    """In how many heads the rows of a tensor are in the file's own order; 0: in none."""
    if arch != "llama":
        return 0
    if ".q_proj." in name:
        return config["num_attention_heads"]
    return config["num_key_value_heads"] if ".k_proj." in name else 0


def _names(arch: str, layers: int, published: Iterable[str]) -> dict[str, tuple[str, int | None]]:
    """The name in a GGUF file of each published tensor, and the expert's number where the file has
    all experts in one."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[arch], layers)
    out = {}
    for name in published:
        module, _, suffix = name.rpartition(".")
        before, experts, after = module.partition(".experts.")
        number, _, linear = after.partition(".")
        theirs = table.get_name(f"{before}.experts.{linear}" if experts else module)
        if theirs is None:
            raise ConfigError(f"GGUF has no name for {name} in models of the architecture {arch}")
        out[name] = (f"{theirs}.{suffix}", int(number) if experts else None)
    return out


def write(
    path: pathlib.Path,
    hf: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    arrays: Iterable[np.ndarray],
    *,
    kind: str,
    tokenizer: Mapping[str, Any] | None = None,
    template: str = "",
    name: str = "",
) -> None:
    """Write a model as one GGUF file, that of `hf`, the content of its config.json.

    `arrays` yields the tensors under their Hugging Face names in the order of `shapes`; one is held
    at a time (of experts, those of one linear). Matrices are written as `kind`, "F16" or "Q8_0"
    (those whose rows are no multiple of 32 as F16), vectors in float32. `tokenizer` is what
    `chat.gguf_tokenizer.metadata` gives, `template` the chat template. ConfigError for a model that
    GGUF cannot express.
    """
    import gguf

    arch = ARCHITECTURES.get(hf["model_type"])
    if arch is None or kind not in WRITABLE:
        raise ConfigError(
            f"a {hf['model_type']} as {kind} cannot be written: the kinds are "
            f"{', '.join(WRITABLE)}, the models {', '.join(ARCHITECTURES)}"
        )
    writer = gguf.GGUFWriter(path, arch)
    _describe(writer, hf, kind, name)
    _describe_tokenizer(writer, tokenizer or {}, template)
    targets = _targets(arch, hf, shapes)
    divisors = _divisors(hf)
    for theirs, (shape, _) in targets.items():
        type_ = gguf.GGMLQuantizationType[_kind(theirs, shape, kind)]
        block, size = gguf.GGML_QUANT_SIZES[type_]
        count = math.prod(shape) // block * size
        # the writer takes the shape of bytes where a type is in blocks
        stored = shape if block == 1 else (*shape[:-1], shape[-1] // block * size)
        dtype = {"F32": np.float32, "F16": np.float16}.get(type_.name, np.uint8)
        writer.add_tensor_info(theirs, stored, np.dtype(dtype), count, type_)
    if divisors is not None:
        type_ = gguf.GGMLQuantizationType.F32
        writer.add_tensor_info(
            "rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes, type_
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for theirs, (shape, array) in _stacked(arch, hf, shapes, arrays, targets):
            type_ = gguf.GGMLQuantizationType[_kind(theirs, shape, kind)]
            writer.write_tensor_data(gguf.quantize(np.ascontiguousarray(array), type_))
        if divisors is not None:
            writer.write_tensor_data(divisors)
    finally:
        writer.close()


def _kind(name: str, shape: Sequence[int], kind: str) -> str:
    if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):  # as llama.cpp keeps routers
        return "F32"
    return kind if shape[-1] % 32 == 0 else "F16"


def _targets(
    arch: str, hf: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and number of parts of each tensor of the file, in order."""
    names = _names(arch, hf["num_hidden_layers"], shapes)
    out: dict[str, tuple[tuple[int, ...], int]] = {}
    for name, shape in shapes.items():
        theirs, expert = names[name]
        parts = out[theirs][1] + 1 if theirs in out else 1
        out[theirs] = (tuple(shape) if expert is None else (parts, *shape), parts)
    return out


def _stacked(
    arch: str,
    hf: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    arrays: Iterable[np.ndarray],
    targets: Mapping[str, tuple[tuple[int, ...], int]],
) -> Iterable[tuple[str, tuple[tuple[int, ...], np.ndarray]]]:
    """The arrays as the file has them: rows in its order, the experts of a linear together."""
    names = _names(arch, hf["num_hidden_layers"], shapes)
    parts: dict[int, np.ndarray] = {}
    for (name, _), array in zip(shapes.items(), arrays, strict=True):
        theirs, expert = names[name]
        shape, count = targets[theirs]
        array = _file_order(np.asarray(array, np.float32), _heads(arch, name, hf))
        if expert is None:
            yield theirs, (shape, array)
            continue
        parts[expert] = array
        if len(parts) == count:
            yield theirs, (shape, np.stack([parts[i] for i in range(count)]))
            parts = {}


def _file_order(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of published order, (head, half, i), as the file has them, (head, i, half)."""
    if not heads:
        return array
    split = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return split.swapaxes(1, 2).reshape(array.shape)


def _describe(writer: Any, hf: Mapping[str, Any], kind: str, name: str) -> None:
    """The architecture's metadata."""
    import gguf

    writer.add_name(name or "model")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_feed_forward_length(hf.get("intermediate_size") or hf["moe_intermediate_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_vocab_size(hf["vocab_size"])
    rope = hf.get("rope_scaling") or {}
    writer.add_rope_freq_base(rope.get("rope_theta") or hf["rope_theta"])
    if hf.get("sliding_window") and hf.get("use_sliding_window", True):
        if hf["model_type"] != "olmo3":
            raise ConfigError(
                f"GGUF has no word for the sliding window of a {hf['model_type']} "
                f"(sliding_window={hf['sliding_window']})"
            )
        writer.add_sliding_window(hf["sliding_window"])
        writer.add_sliding_window_pattern(
            [kind == "sliding_attention" for kind in hf["layer_types"]]
        )
    if hf.get("num_experts"):
        writer.add_expert_count(hf["num_experts"])
        writer.add_expert_used_count(hf["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(hf["moe_intermediate_size"])
        if not hf.get("norm_topk_prob"):
            raise ConfigError("GGUF has no word for a mixture whose weights are not normalised")
    rope_type = rope.get("rope_type", "default")
    if rope_type in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[rope_type.upper()])
        writer.add_rope_scaling_factor(rope["factor"])
        if rope_type == "yarn":
            _describe_yarn(writer, rope)
    elif rope_type not in ("default", "llama3"):
        raise ConfigError(f"GGUF has no word for the rotary embedding {rope_type!r}")


def _describe_yarn(writer: Any, rope: Mapping[str, Any]) -> None:
    factor = rope["factor"]
    usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    attention, truncate = rope.get("attention_factor"), rope.get("truncate", True)
    if not truncate or (attention is not None and not math.isclose(attention, usual, rel_tol=1e-4)):
        raise ConfigError(
            f"GGUF has no word for YaRN with attention_factor={attention} and truncate={truncate}: "
            f"there it is {usual:.4f}, with truncation"
        )
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
    writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)


def _divisors(hf: Mapping[str, Any]) -> np.ndarray | None:
    """What the rotary frequencies of a Llama 3.1 are divided by; of others None."""
    rope = hf.get("rope_scaling") or {}
    if rope.get("rope_type") != "llama3":
        return None
    divisors = llama3_factors(
        rope["factor"],
        rope["low_freq_factor"],
        rope["high_freq_factor"],
        rope["original_max_position_embeddings"],
        hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        rope.get("rope_theta") or hf["rope_theta"],
    )
    return divisors.astype(np.float32)


def _describe_tokenizer(writer: Any, tokenizer: Mapping[str, Any], template: str) -> None:
    if tokenizer:
        writer.add_tokenizer_model(tokenizer["model"])
        writer.add_tokenizer_pre(tokenizer["pre"])
        writer.add_token_list(tokenizer["tokens"])
        writer.add_token_types(tokenizer["token_type"])
        writer.add_token_merges(tokenizer["merges"])
        writer.add_add_bos_token(False)
    for key in ("bos", "eos", "padding", "unknown"):
        if tokenizer.get(f"{key}_token_id") is not None:
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", tokenizer[f"{key}_token_id"])
    if template:
        writer.add_chat_template(template)
