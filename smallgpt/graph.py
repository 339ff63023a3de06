"""The decoder as an ONNX graph, built node by node: exact nodes, stable names, the same bytes every time.

The nodes are those ONNX Runtime is fastest with: GroupQueryAttention on packed q, k and v (apart for qwen3) with a
cache that past and present share in place, FastGelu (tanh) with its bias, on a GPU SkipLayerNormalization, and for
quantised weights GatherBlockQuantized, MatMulNBits, which rounds its inputs to 8 bits by blocks, and where there are
many rows MatMulIntegerToFloat. Operators: onnxruntime, docs/ContribOperators.md.

Shapes: B sequences, S new tokens each, D = embed_dim, V = vocab_size, M = capacity of the cache, N = wanted logits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from smallgpt.builder import CONTRIB, GraphBuilder
from smallgpt.config import ModelConfig
from smallgpt.generation import MANY_TOKENS
from smallgpt.quantize import Quantized

EPSILON = 1e-5
LEAST_GELU = -0.1701  # of its values, in the approximation by tanh: -0.17004 at -0.7525


def build_graph(
    weights: Mapping[str, np.ndarray | Quantized],
    config: ModelConfig,
    *,
    dtype: str,
    rope: tuple[np.ndarray, np.ndarray] | None,
    cache_scales: Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
) -> ModelProto:
    """Build the graph of one model.

    Inputs: `input_ids` and, for gpt2, `position_ids` (B, S) int64; `seqlens_k` (B,) int32, the tokens of each
    sequence after this call less one; `total_sequence_length` () int32, the longest of them; `logit_index` (N,)
    int64, the rows of the flattened (B * S) positions that get logits; `past_key_values.I.key|value`
    (B, kv_heads, M, head_dim), bound to the same memory as the outputs `present.I.key|value`. With quantised matrices
    also `integers` () bool: whether to multiply by them in integers, which is faster where there are many rows. Output:
    `logits` (N, V) float32. The embedding is stored once and serves as the head too.

    Args:
        weights: the parameters by their names in SmallGPT, linear layers as (out, in); the matrices among them,
            embeddings included, may be quantised where dtype is "float32".
        dtype: "float32" or "float16": weights that are not quantised, activations and cache.
        rope: the cosines and sines (max_seq_len, head_dim / 2); None for gpt2.
        cache_scales: for a cache in int8 the steps between its levels, of keys and values (kv_heads, head_dim) for
            each layer.

    Raises:
        ValueError: GroupQueryAttention has no kernel for heads of this width.
    """
    width = 8 if rope is None else 16
    if config.head_dim % width:
        raise ValueError(
            f"embed_dim / num_heads is {config.head_dim}; ONNX Runtime's attention needs a multiple of {width} "
            f"for architecture {config.architecture}"
        )
    # The scores' factor, 1 / sqrt(head_dim), is in what makes the queries: products without one are faster.
    weights, queries = dict(weights), ".attn.q_norm." if config.architecture == "qwen3" else ".attn.qkv."
    for name in [name for name in weights if queries in name]:
        weights[name] = _scaled(weights[name], config.num_heads * config.head_dim, config.head_dim**-0.5)

    graph = GraphBuilder(dtype)
    cache_dtype = np.dtype("int8") if cache_scales else graph.dtype
    quantized = any(isinstance(weight, Quantized) for weight in weights.values())
    if not quantized and not cache_scales:
        _add_decoder(graph, weights, config, rope, cache_scales)
        return _model(graph, config, cache_dtype)
    # MatMulNBits multiplies few rows fastest, integers many; attention with a cache in int8 is slow for many tokens.
    # Without quantised matrices the number of tokens of each sequence decides.
    condition = "integers"
    if not quantized:
        tokens = graph.add("Shape", ["input_ids"], "tokens_each", start=1)
        many = graph.constant("many", np.array([MANY_TOKENS]))
        condition = graph.add("GreaterOrEqual", [tokens, many], "many_each")
    branches = {}
    for branch, integers in (("then_branch", True), ("else_branch", False)):
        part = GraphBuilder(dtype, graph.constants, integers=integers)
        _add_decoder(part, weights, config, rope, cache_scales, prefix=f"{branch}.")
        values = _outputs(config, cache_dtype, prefix=f"{branch}.")
        branches[branch] = helper.make_graph(part.nodes, branch, [], values)
    graph.add("If", [condition], *(value.name for value in _outputs(config, cache_dtype)), **branches)
    return _model(graph, config, cache_dtype, quantized=quantized)


def _add_decoder(
    graph: GraphBuilder,
    weights: Mapping[str, np.ndarray | Quantized],
    config: ModelConfig,
    rope: tuple[np.ndarray, np.ndarray] | None,
    cache_scales: Sequence[tuple[np.ndarray, np.ndarray]] | None,
    prefix: str = "",
) -> None:
    """Add the nodes from the graph's inputs to its outputs, whose names begin with `prefix`."""
    gpt2, half = config.architecture == "gpt2", graph.dtype == np.float16
    head = weights["wte.weight"]
    quantized = isinstance(head, Quantized)
    in_floats = graph.integers and bool(cache_scales)  # attention of prompts; the cache is read and written apart
    if rope is not None:
        graph.weight("rope.cos", rope[0])
        graph.weight("rope.sin", rope[1])

    def vector(name: str) -> str:
        array = weights[name]
        assert isinstance(array, np.ndarray)
        return graph.weight(name, array)

    def matmul(x: str, name: str, bias: str = "", least: float | None = None) -> str:
        key, weight = f"{name}.weight", weights[f"{name}.weight"]
        if isinstance(weight, Quantized):
            graph.quantized(key, weight)
            return graph.product(x, key, weight, f"{name}.matmul", vector(bias) if bias else "", least)
        graph.weight(key, weight.T)  # MatMul wants (in, out)
        x = graph.add("MatMul", [x, key], f"{name}.matmul")
        return graph.add("Add", [x, vector(bias)], name) if bias else x

    def norm(x: str, name: str) -> str:
        vectors = [vector(f"{name}.weight"), *([vector(f"{name}.bias")] if gpt2 else [])]
        op = "LayerNormalization" if gpt2 else "SimplifiedLayerNormalization"
        return graph.add(op, [x, *vectors], f"{name}.norm", axis=-1, epsilon=EPSILON)

    def skip_norm(x: str, residual: str, name: str, bias: str = "") -> tuple[str, str]:
        """The norm of x + residual + bias, and that sum for the next residual."""
        if not half:  # the fused operator is the slower one on a CPU
            x = graph.add("Add", [x, vector(bias)], f"{name}.biased") if gpt2 and bias else x
            x = graph.add("Add", [x, residual], f"{name}.residual")
            return norm(x, name), x
        inputs = [x, residual, vector(f"{name}.weight")]
        if gpt2:
            inputs.append(vector(f"{name}.bias"))
            inputs += [vector(bias)] if bias else []
        op = "SkipLayerNormalization" if gpt2 else "SkipSimplifiedLayerNormalization"
        outputs = [f"{name}.norm", "", "", f"{name}.residual"]
        graph.add(op, inputs, *outputs, domain=CONTRIB, epsilon=EPSILON)
        return outputs[0], outputs[3]

    def normed_heads(qkv: str, name: str) -> list[str]:
        """Queries, keys and values apart, the first two brought to one length head by head."""
        sizes = np.array([config.num_heads, config.kv_heads, config.kv_heads]) * config.head_dim
        parts = [f"{name}.q", f"{name}.k", f"{name}.v"]
        graph.add("Split", [qkv, graph.constant("qkv.sizes", sizes)], *parts, axis=-1)
        for i, part in enumerate(parts[:2]):
            x = graph.add(
                "Reshape", [part, graph.constant("heads", np.array([0, 0, -1, config.head_dim]))], f"{part}.heads"
            )
            x = norm(x, f"{part}_norm")
            parts[i] = graph.add("Reshape", [x, graph.constant("row", np.array([0, 0, -1]))], f"{part}.row")
        return parts

    def attend(
        graph: GraphBuilder,
        packed: list[str],
        past: list[str],
        output: str,
        present: list[str],
        scales: Sequence[str] = (),
    ) -> None:
        """Attention over the cache `past`, with the new tokens' keys and values put into `present`."""
        inputs = [*packed, *past, "seqlens_k", "total_sequence_length", *(["rope.cos", "rope.sin"] if rope else [])]
        heads: dict[str, Any] = {"num_heads": config.num_heads, "kv_num_heads": config.kv_heads}
        heads |= {"do_rotary": int(rope is not None), "scale": 1.0}
        if scales:
            inputs += [""] * (12 - len(inputs)) + list(scales)
            heads |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        graph.add("GroupQueryAttention", inputs, output, *present, domain=CONTRIB, **heads)

    def attend_in_floats(
        graph: GraphBuilder, packed: list[str], past: list[str], output: str, present: list[str], scales: Sequence[str]
    ) -> None:
        """The same with a cache in int8 that is read and written apart."""
        floats = [graph.read_cache(*pair) for pair in zip(past, scales, strict=True)]
        both = [f"{name}.all" for name in past]
        attend(graph, packed, floats, output, both)
        for name, values, scale, out in zip(past, both, scales, present, strict=True):
            graph.write_cache(name, values, scale, out)

    def attention(x: str, layer: str, index: int) -> str:
        qkv = matmul(x, f"{layer}.attn.qkv", f"{layer}.attn.qkv.bias" if gpt2 else "")  # (B, S, (H + 2 KV) * head_dim)
        packed = normed_heads(qkv, f"{layer}.attn") if config.architecture == "qwen3" else [qkv, "", ""]
        cache = [f"past_key_values.{index}.{kind}" for kind in ("key", "value")]
        present = [f"{prefix}present.{index}.{kind}" for kind in ("key", "value")]
        if not cache_scales:
            attend(graph, packed, cache, f"{layer}.attn", present)
        else:
            both = zip(("k_scale", "v_scale"), cache_scales[index], strict=True)
            scales = [graph.constant(f"{layer}.attn.{key}", array[:, None]) for key, array in both]  # (KV, 1, head_dim)
            if not in_floats:
                attend(graph, packed, cache, f"{layer}.attn", present, scales)
            elif not quantized:
                attend_in_floats(graph, packed, cache, f"{layer}.attn", present, scales)
            else:
                ways: dict[str, Any] = {}  # single tokens of many sequences come here too
                for branch, way in (("then_branch", attend), ("else_branch", attend_in_floats)):
                    part = GraphBuilder(graph.dtype.name, graph.constants)
                    names = [f"{branch}.{layer}.{name}" for name in ("attn", "present.key", "present.value")]
                    way(part, packed, cache, names[0], names[1:], scales)
                    values = [helper.make_empty_tensor_value_info(name) for name in names]
                    ways[branch] = helper.make_graph(part.nodes, f"{branch}.{layer}", [], values)
                graph.add("If", ["single"], f"{layer}.attn", *present, **ways)
        return matmul(f"{layer}.attn", f"{layer}.attn.proj")  # (B, S, D)

    def mlp(x: str, layer: str) -> str:
        up = matmul(x, f"{layer}.mlp.up")
        if gpt2:
            hidden = graph.add("FastGelu", [up, vector(f"{layer}.mlp.up.bias")], f"{layer}.mlp.gelu", domain=CONTRIB)
        else:
            graph.add("Split", [up], f"{layer}.mlp.gate", f"{layer}.mlp.value", axis=-1, num_outputs=2)
            gate = graph.add("QuickGelu", [f"{layer}.mlp.gate"], f"{layer}.mlp.silu", domain=CONTRIB, alpha=1.0)
            hidden = graph.add("Mul", [gate, f"{layer}.mlp.value"], f"{layer}.mlp.hidden")
        return matmul(hidden, f"{layer}.mlp.down", least=LEAST_GELU if gpt2 else None)  # (B, S, D)

    if in_floats:
        graph.find_places(config.kv_heads, config.head_dim)
        if quantized:
            graph.add("Equal", ["tokens_of_each", graph.constant("token", np.array([1]))], "single")
    residual = graph.table("wte.weight", head, "input_ids", "tokens")  # (B, S, D)
    if gpt2:
        positions = graph.table("wpe.weight", weights["wpe.weight"], "position_ids", "positions")
        x, residual = skip_norm(residual, positions, "h.0.ln_1")
    else:
        x = norm(residual, "h.0.ln_1")
    for i in range(config.num_layers):
        layer = f"h.{i}"
        x, residual = skip_norm(attention(x, layer, i), residual, f"{layer}.ln_2", f"{layer}.attn.proj.bias")
        after = f"h.{i + 1}.ln_1" if i + 1 < config.num_layers else "ln_f"
        x, residual = skip_norm(mlp(x, layer), residual, after, f"{layer}.mlp.down.bias")
    x = graph.add("Reshape", [x, graph.constant("flat", np.array([-1, config.embed_dim]))], "hidden")  # (B * S, D)
    x = graph.add("Gather", [x, "logit_index"], "wanted")  # (N, D)
    if isinstance(head, Quantized):
        graph.product(x, "wte.weight", head, f"{prefix}logits")  # (N, V)
    else:
        logits = f"{prefix}logits"
        graph.add("Gemm", [x, "wte.weight"], "head" if half else logits, transB=1)  # (N, V)
        if half:
            graph.add("Cast", ["head"], logits, to=TensorProto.FLOAT)


def _scaled(weight: np.ndarray | Quantized, rows: int, factor: float) -> np.ndarray | Quantized:
    """A copy with the first rows times a factor; of a quantised matrix, their scales."""
    array = (weight.scales if isinstance(weight, Quantized) else weight).copy()
    array[:rows] *= factor
    return replace(weight, scales=array) if isinstance(weight, Quantized) else array


def _cache(config: ModelConfig, dtype: np.dtype, prefix: str) -> list[ValueInfoProto]:
    """Keys and values of every layer."""
    kind, shape = helper.np_dtype_to_tensor_dtype(dtype), ["batch", config.kv_heads, "capacity", config.head_dim]
    names = [f"{prefix}{i}.{part}" for i in range(config.num_layers) for part in ("key", "value")]
    return [helper.make_tensor_value_info(name, kind, shape) for name in names]


def _outputs(config: ModelConfig, cache_dtype: np.dtype, prefix: str = "") -> list[ValueInfoProto]:
    logits = helper.make_tensor_value_info(f"{prefix}logits", TensorProto.FLOAT, ["wanted", config.vocab_size])
    return [logits, *_cache(config, cache_dtype, f"{prefix}present.")]


def _model(graph: GraphBuilder, config: ModelConfig, cache_dtype: np.dtype, *, quantized: bool = False) -> ModelProto:
    """Put inputs and outputs around the nodes. Opset 21 and IR 10 are older than every ONNX Runtime allowed."""
    value = helper.make_tensor_value_info
    inputs = [value("input_ids", TensorProto.INT64, ["batch", "tokens"])]
    if config.architecture == "gpt2":
        inputs.append(value("position_ids", TensorProto.INT64, ["batch", "tokens"]))
    inputs += [
        value("seqlens_k", TensorProto.INT32, ["batch"]),
        value("total_sequence_length", TensorProto.INT32, []),
        value("logit_index", TensorProto.INT64, ["wanted"]),
        *([value("integers", TensorProto.BOOL, [])] if quantized else []),
        *_cache(config, cache_dtype, "past_key_values."),
    ]
    outputs, constants = _outputs(config, cache_dtype), list(graph.constants.values())
    return helper.make_model(
        helper.make_graph(graph.nodes, f"smallgpt-{config.architecture}", inputs, outputs, constants),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)],
        ir_version=10,
        producer_name="smallgpt",
    )
