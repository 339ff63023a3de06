"""The decoder as an ONNX graph, built node by node: exact nodes, stable names, the same bytes every time.

The nodes are those ONNX Runtime is fastest with: GroupQueryAttention on packed q, k and v with a cache that past and
present share in place, FastGelu (tanh) with its bias, on a GPU SkipLayerNormalization, and for quantised weights
GatherBlockQuantized, MatMulNBits, which rounds its inputs to 8 bits by blocks, and where there are many tokens
MatMulIntegerToFloat. Operators: onnxruntime, docs/ContribOperators.md.

Shapes: B sequences, S new tokens each, D = embed_dim, V = vocab_size, M = capacity of the cache, N = wanted logits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from smallgpt.config import ModelConfig
from smallgpt.generation import MANY_TOKENS
from smallgpt.quantize import Quantized

CONTRIB = "com.microsoft"
EPSILON = 1e-5
MOST_COLUMNS = 512  # of a row that share a scale in integer products: fewer round less and cost time


class _Builder:
    """Collects nodes and weights; every node is named after its first output."""

    def __init__(self, dtype: str, constants: dict[str, TensorProto] | None = None, *, integers: bool = False) -> None:
        """`constants` may be another builder's; `integers` multiplies quantised matrices as `by_integers` does."""
        self.dtype, self.integers = np.dtype(dtype), integers
        self.nodes: list[NodeProto] = []
        self.constants = {} if constants is None else constants

    def weight(self, name: str, array: np.ndarray) -> str:
        """Store a float array under `name` in the graph's precision."""
        return self.constant(name, array.astype(self.dtype))

    def constant(self, name: str, array: np.ndarray) -> str:
        """Store an array under `name` as it is."""
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def add(self, op: str, inputs: Sequence[str], *outputs: str, domain: str = "", **attributes: Any) -> str:
        """Append a node and return its first output."""
        self.nodes.append(helper.make_node(op, inputs, outputs, outputs[0], domain=domain, **attributes))
        return outputs[0]

    def table(self, name: str, table: np.ndarray | Quantized, rows: str, output: str) -> str:
        """Store a table (N, D) and look up `rows` of it, (B, S) -> (B, S, D)."""
        if not isinstance(table, Quantized):
            return self.add("Gather", [self.weight(name, table), rows], output)
        self.quantized(name, table)
        # MatMulNBits wants its blocks in three dimensions, the look-up in two. This is folded when a session starts.
        flat = self.add("Reshape", [name, self.constant(f"{name}.flat", np.array([0, -1]))], f"{name}.rows")
        width, inputs = len(table.scales[0]) * table.block, [flat, rows, f"{name}.scales"]
        layout = {"bits": table.bits, "block_size": table.block, "gather_axis": 0, "quantize_axis": 1}
        if width == table.columns:
            return self.add("GatherBlockQuantized", inputs, output, domain=CONTRIB, **layout)
        padded = self.add("GatherBlockQuantized", inputs, f"{output}.padded", domain=CONTRIB, **layout)
        bounds = {"start": 0, "end": table.columns, "axis": 2}
        ends = [self.constant(f"{output}.{key}", np.array([value])) for key, value in bounds.items()]
        return self.add("Slice", [padded, *ends], output)

    def quantized(self, name: str, weight: Quantized) -> None:
        """Store the levels and scales of a matrix."""
        self.constant(name, weight.values)
        self.constant(f"{name}.scales", weight.scales)

    def product(self, x: str, name: str, weight: Quantized, output: str, bias: str = "") -> str:
        """x W^T (+ bias) for a matrix (N, K) that is stored: (..., K) -> (..., N)."""
        if self.integers:
            x = self.by_integers(x, name, weight, f"{name}.product" if bias else output)
            return self.add("Add", [x, bias], output) if bias else x
        inputs = [x, name, f"{name}.scales", *(["", "", bias] if bias else [])]
        shape = {"K": weight.columns, "N": len(weight.values), "bits": weight.bits, "block_size": weight.block}
        # Level 4 computes with inputs in 8 bits; the others turn the weights into floats first, which is slow.
        return self.add("MatMulNBits", inputs, output, domain=CONTRIB, accuracy_level=4, **shape)

    def by_integers(self, x: str, name: str, weight: Quantized, output: str) -> str:
        """x W^T in integers of 8 bits; the matrix gets new levels, one scale an output, when a session starts.

        A row of x has scales of its own, one for each MOST_COLUMNS, so its result depends on no other row.
        """
        levels, scales = self.columns(name, weight)
        count = -(-weight.columns // MOST_COLUMNS)
        if count == 1:
            return self.integers_of(x, levels, scales, output)
        sizes = [len(part) for part in np.array_split(np.arange(weight.columns), count)]
        self.constant(f"{name}.sizes", np.array(sizes))
        inputs, matrices = ([f"{of}.part{i}" for i in range(count)] for of in (output, name))
        self.add("Split", [x, f"{name}.sizes"], *inputs, axis=-1)
        self.add("Split", [levels, f"{name}.sizes"], *matrices, axis=0)
        pairs = zip(inputs, matrices, strict=True)
        return self.add("Sum", [self.integers_of(x, w, scales, f"{x}.product") for x, w in pairs], output)

    def integers_of(self, x: str, levels: str, scales: str, output: str) -> str:
        """Rows (..., K) with one scale each, times levels (K, N) int8 with scales (N,)."""
        self.constant("last", np.array([-1]))
        self.constant("level", np.array(1 / 127, np.float32))
        self.constant("one", np.array(1, np.float32))
        self.constant("middle", np.array(128, np.uint8))
        largest = self.add("Abs", [x], f"{output}.abs")
        largest = self.add("ReduceMax", [largest, "last"], f"{output}.max")  # (..., 1)
        step = self.add("Mul", [largest, "level"], f"{output}.step")
        scaled = self.add("Div", [x, step], f"{output}.scaled")
        rounded = self.add("QuantizeLinear", [scaled, "one", "middle"], f"{output}.rounded")
        inputs = [rounded, levels, "one", scales, "middle"]
        product = self.add("MatMulIntegerToFloat", inputs, f"{output}.integers", domain=CONTRIB)
        return self.add("Mul", [product, step], output)

    def columns(self, name: str, weight: Quantized) -> tuple[str, str]:
        """The stored matrix as levels (K, N) int8 and scales (N,); all of it is folded when a session starts."""
        outputs, blocks = weight.scales.shape
        x = name
        if weight.bits == 4:
            low = self.add("BitwiseAnd", [x, self.constant("fifteen", np.array([15], np.uint8))], f"{name}.low")
            high = self.add(
                "BitShift", [x, self.constant("four", np.array([4], np.uint8))], f"{name}.high", direction="RIGHT"
            )
            pairs = [self.add("Unsqueeze", [part, "last"], f"{part}.pair") for part in (low, high)]
            x = self.add("Concat", pairs, f"{name}.pairs", axis=-1)
        x = self.add("Reshape", [x, self.constant(f"{name}.shape", np.array([outputs, -1]))], f"{name}.matrix")
        zeros = self.constant(f"{name}.zeros", np.full(weight.scales.shape, 2 ** (weight.bits - 1), np.uint8))
        x = self.add(
            "DequantizeLinear", [x, f"{name}.scales", zeros], f"{name}.floats", axis=1, block_size=weight.block
        )
        if weight.block * blocks > weight.columns:
            bounds = {"start": 0, "end": weight.columns, "axis": 1}
            ends = [self.constant(f"{name}.{key}", np.array([value])) for key, value in bounds.items()]
            x = self.add("Slice", [x, *ends], f"{name}.sliced")
        scales = weight.scales[:, 0] if weight.bits == 8 else np.abs(weight.dequantized()).max(1) / 127
        scales = np.where(scales == 0, 1, scales).astype(np.float32)
        zeros = self.constant(f"{name}.column_zeros", np.zeros(outputs, np.int8))
        x = self.add("QuantizeLinear", [x, self.constant(f"{name}.columns", scales), zeros], f"{name}.levels", axis=0)
        return self.add("Transpose", [x], f"{name}.integers"), f"{name}.columns"


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
    (B, kv_heads, M, head_dim), bound to the same memory as the outputs `present.I.key|value`. Output: `logits`
    (N, V) float32. The embedding is stored once and serves as the head too.

    Args:
        weights: the parameters by their names in SmallGPT, linear layers as (out, in); the matrices among them,
            embeddings included, may be quantised where dtype is "float32".
        dtype: "float32" or "float16": weights that are not quantised, activations and cache.
        rope: for llama the cosines and sines (max_seq_len, head_dim / 2), else None.
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
    # Queries are stored with the scores' factor, 1 / sqrt(head_dim), in them: products without one are faster.
    weights = dict(weights)
    for name in [name for name in weights if ".attn.qkv." in name]:
        weights[name] = _scaled(weights[name], config.num_heads * config.head_dim, config.head_dim**-0.5)

    graph = _Builder(dtype)
    cache_dtype = np.dtype("int8") if cache_scales else graph.dtype
    if not any(isinstance(weight, Quantized) for weight in weights.values()):
        _add_decoder(graph, weights, config, rope, cache_scales)
        return _model(graph, config, cache_dtype)
    # MatMulNBits multiplies few rows fastest, integers many. Which way a sequence goes depends on the number of its own
    # tokens alone, because long prompts and short ones are filled apart.
    tokens = graph.add("Shape", ["input_ids"], "tokens_each", start=1)
    condition = graph.add("Less", [tokens, graph.constant("many", np.array([MANY_TOKENS]))], "few")
    branches = {}
    for branch, integers in (("then_branch", False), ("else_branch", True)):
        part = _Builder(dtype, graph.constants, integers=integers)
        _add_decoder(part, weights, config, rope, cache_scales, prefix=f"{branch}.")
        values = _outputs(config, cache_dtype, prefix=f"{branch}.")
        branches[branch] = helper.make_graph(part.nodes, branch, [], values)
    graph.add("If", [condition], *(value.name for value in _outputs(config, cache_dtype)), **branches)
    return _model(graph, config, cache_dtype)


def _add_decoder(
    graph: _Builder,
    weights: Mapping[str, np.ndarray | Quantized],
    config: ModelConfig,
    rope: tuple[np.ndarray, np.ndarray] | None,
    cache_scales: Sequence[tuple[np.ndarray, np.ndarray]] | None,
    prefix: str = "",
) -> None:
    """Add the nodes from the graph's inputs to its outputs, whose names begin with `prefix`."""
    gpt2, half = config.architecture == "gpt2", graph.dtype == np.float16
    if rope is not None:
        graph.weight("rope.cos", rope[0])
        graph.weight("rope.sin", rope[1])

    def vector(name: str) -> str:
        array = weights[name]
        assert isinstance(array, np.ndarray)
        return graph.weight(name, array)

    def matmul(x: str, name: str, bias: str = "") -> str:
        key, weight = f"{name}.weight", weights[f"{name}.weight"]
        if isinstance(weight, Quantized):
            graph.quantized(key, weight)
            return graph.product(x, key, weight, f"{name}.matmul", vector(bias) if bias else "")
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

    def attention(x: str, layer: str, index: int) -> str:
        qkv = matmul(x, f"{layer}.attn.qkv", f"{layer}.attn.qkv.bias" if gpt2 else "")  # (B, S, (H + 2 KV) * head_dim)
        past = [f"past_key_values.{index}.{kind}" for kind in ("key", "value")]
        present = [f"{prefix}present.{index}.{kind}" for kind in ("key", "value")]
        inputs = [qkv, "", "", *past, "seqlens_k", "total_sequence_length", *(["rope.cos", "rope.sin"] if rope else [])]
        heads: dict[str, Any] = {"num_heads": config.num_heads, "kv_num_heads": config.kv_heads}
        if cache_scales:
            scales = zip(("k_scale", "v_scale"), cache_scales[index], strict=True)
            inputs += [""] * (12 - len(inputs)) + [
                graph.constant(f"{layer}.attn.{key}", array) for key, array in scales
            ]
            heads |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        heads |= {"do_rotary": int(rope is not None), "scale": 1.0}
        graph.add("GroupQueryAttention", inputs, f"{layer}.attn", *present, domain=CONTRIB, **heads)
        return matmul(f"{layer}.attn", f"{layer}.attn.proj")  # (B, S, D)

    def mlp(x: str, layer: str) -> str:
        up = matmul(x, f"{layer}.mlp.up")
        if gpt2:
            hidden = graph.add("FastGelu", [up, vector(f"{layer}.mlp.up.bias")], f"{layer}.mlp.gelu", domain=CONTRIB)
        else:
            graph.add("Split", [up], f"{layer}.mlp.gate", f"{layer}.mlp.value", axis=-1, num_outputs=2)
            gate = graph.add("QuickGelu", [f"{layer}.mlp.gate"], f"{layer}.mlp.silu", domain=CONTRIB, alpha=1.0)
            hidden = graph.add("Mul", [gate, f"{layer}.mlp.value"], f"{layer}.mlp.hidden")
        return matmul(hidden, f"{layer}.mlp.down")  # (B, S, D)

    head = weights["wte.weight"]
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
        logits = graph.add("Gemm", [x, "wte.weight"], "head" if half else "logits", transB=1)  # (N, V)
        if half:
            graph.add("Cast", [logits], "logits", to=TensorProto.FLOAT)


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


def _model(graph: _Builder, config: ModelConfig, cache_dtype: np.dtype) -> ModelProto:
    """Put inputs and outputs around the nodes. Opset 21 and IR 10 are the newest that ONNX Runtime 1.28 reads."""
    value = helper.make_tensor_value_info
    inputs = [value("input_ids", TensorProto.INT64, ["batch", "tokens"])]
    if config.architecture == "gpt2":
        inputs.append(value("position_ids", TensorProto.INT64, ["batch", "tokens"]))
    inputs += [
        value("seqlens_k", TensorProto.INT32, ["batch"]),
        value("total_sequence_length", TensorProto.INT32, []),
        value("logit_index", TensorProto.INT64, ["wanted"]),
        *_cache(config, cache_dtype, "past_key_values."),
    ]
    outputs, constants = _outputs(config, cache_dtype), list(graph.constants.values())
    return helper.make_model(
        helper.make_graph(graph.nodes, f"smallgpt-{config.architecture}", inputs, outputs, constants),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)],
        ir_version=10,
        producer_name="smallgpt",
    )
