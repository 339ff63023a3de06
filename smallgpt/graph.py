"""The decoder as an ONNX graph, built node by node: exact nodes, stable names, the same bytes every time.

The nodes are those ONNX Runtime decodes fastest with: GroupQueryAttention on packed q, k and v with a cache that past
and present share in place, SkipLayerNormalization that takes the bias of the linear layer before it and hands on the
residual sum, and FastGelu (tanh) with its bias. Operators: onnxruntime, docs/ContribOperators.md.

Shapes: B sequences, S new tokens each, D = embed_dim, V = vocab_size, M = capacity of the cache, N = wanted logits.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from smallgpt.config import ModelConfig

CONTRIB = "com.microsoft"
EPSILON = 1e-5


class _Builder:
    """Collects nodes and weights; every node is named after its first output."""

    def __init__(self, dtype: str) -> None:
        self.dtype = np.dtype(dtype)
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def weight(self, name: str, array: np.ndarray) -> str:
        """Store a float array under `name` in the graph's precision."""
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array, dtype=self.dtype), name))
        return name

    def add(self, op: str, inputs: Sequence[str], *outputs: str, domain: str = "", **attributes: Any) -> str:
        """Append a node and return its first output."""
        self.nodes.append(helper.make_node(op, inputs, outputs, outputs[0], domain=domain, **attributes))
        return outputs[0]


def build_graph(
    weights: Mapping[str, np.ndarray], config: ModelConfig, *, dtype: str, rope: tuple[np.ndarray, np.ndarray] | None
) -> ModelProto:
    """Build the graph of one model.

    Inputs: `input_ids` and, for gpt2, `position_ids` (B, S) int64; `seqlens_k` (B,) int32, the tokens of each
    sequence after this call less one; `total_sequence_length` () int32, the longest of them; `logit_index` (N,)
    int64, the rows of the flattened (B * S) positions that get logits; `past_key_values.I.key|value`
    (B, kv_heads, M, head_dim), bound to the same memory as the outputs `present.I.key|value`. Output: `logits`
    (N, V) float32. The embedding is stored once and serves as the head too.

    Args:
        weights: the parameters by their names in SmallGPT, linear layers as (out, in).
        dtype: "float32" or "float16": weights, activations and cache.
        rope: for llama the cosines and sines (max_seq_len, head_dim / 2), else None.

    Raises:
        ValueError: GroupQueryAttention has no kernel for heads of this width.
    """
    width = 8 if rope is None else 16
    if config.head_dim % width:
        raise ValueError(
            f"embed_dim / num_heads is {config.head_dim}; ONNX Runtime's attention needs a multiple of {width} "
            f"for architecture {config.architecture}"
        )
    graph = _Builder(dtype)
    linear = {name: array.T for name, array in weights.items() if array.ndim == 2}  # MatMul wants (in, out)
    gpt2 = config.architecture == "gpt2"
    if rope is not None:
        graph.weight("rope.cos", rope[0])
        graph.weight("rope.sin", rope[1])

    def matmul(x: str, name: str) -> str:
        graph.weight(f"{name}.weight", linear[f"{name}.weight"])
        return graph.add("MatMul", [x, f"{name}.weight"], f"{name}.matmul")

    def skip_norm(x: str, residual: str, name: str, bias: str = "") -> tuple[str, str]:
        """The norm of x + residual + bias, and that sum for the next residual."""
        inputs = [x, residual, graph.weight(f"{name}.weight", weights[f"{name}.weight"])]
        if gpt2:
            inputs.append(graph.weight(f"{name}.bias", weights[f"{name}.bias"]))
            inputs += [graph.weight(bias, weights[bias])] if bias else []
        op = "SkipLayerNormalization" if gpt2 else "SkipSimplifiedLayerNormalization"
        outputs = [f"{name}.norm", "", "", f"{name}.residual"]
        graph.add(op, inputs, *outputs, domain=CONTRIB, epsilon=EPSILON)
        return outputs[0], outputs[3]

    def attention(x: str, layer: str, index: int) -> str:
        qkv = matmul(x, f"{layer}.attn.qkv")  # (B, S, (H + 2 KV) * head_dim)
        if gpt2:
            bias = graph.weight(f"{layer}.attn.qkv.bias", weights[f"{layer}.attn.qkv.bias"])
            qkv = graph.add("Add", [qkv, bias], f"{layer}.attn.qkv")
        past = [f"past_key_values.{index}.{kind}" for kind in ("key", "value")]
        present = [f"present.{index}.{kind}" for kind in ("key", "value")]
        graph.add(
            "GroupQueryAttention",
            [qkv, "", "", *past, "seqlens_k", "total_sequence_length", *(["rope.cos", "rope.sin"] if rope else [])],
            *(f"{layer}.attn", *present),
            domain=CONTRIB,
            num_heads=config.num_heads,
            kv_num_heads=config.kv_heads,
            do_rotary=int(rope is not None),
        )
        return matmul(f"{layer}.attn", f"{layer}.attn.proj")  # (B, S, D)

    def mlp(x: str, layer: str) -> str:
        up = matmul(x, f"{layer}.mlp.up")
        if gpt2:
            bias = graph.weight(f"{layer}.mlp.up.bias", weights[f"{layer}.mlp.up.bias"])
            hidden = graph.add("FastGelu", [up, bias], f"{layer}.mlp.gelu", domain=CONTRIB)
        else:
            graph.add("Split", [up], f"{layer}.mlp.gate", f"{layer}.mlp.value", axis=-1, num_outputs=2)
            gate = graph.add("QuickGelu", [f"{layer}.mlp.gate"], f"{layer}.mlp.silu", domain=CONTRIB, alpha=1.0)
            hidden = graph.add("Mul", [gate, f"{layer}.mlp.value"], f"{layer}.mlp.hidden")
        return matmul(hidden, f"{layer}.mlp.down")  # (B, S, D)

    graph.weight("wte.weight", weights["wte.weight"])
    residual = graph.add("Gather", ["wte.weight", "input_ids"], "tokens")  # (B, S, D)
    if gpt2:
        graph.weight("wpe.weight", weights["wpe.weight"])
        positions = graph.add("Gather", ["wpe.weight", "position_ids"], "positions")
        x, residual = skip_norm(residual, positions, "h.0.ln_1")
    else:
        scale = graph.weight("h.0.ln_1.weight", weights["h.0.ln_1.weight"])
        x = graph.add("SimplifiedLayerNormalization", [residual, scale], "h.0.ln_1.norm", axis=-1, epsilon=EPSILON)
    for i in range(config.num_layers):
        layer = f"h.{i}"
        x, residual = skip_norm(attention(x, layer, i), residual, f"{layer}.ln_2", f"{layer}.attn.proj.bias")
        after = f"h.{i + 1}.ln_1" if i + 1 < config.num_layers else "ln_f"
        x, residual = skip_norm(mlp(x, layer), residual, after, f"{layer}.mlp.down.bias")
    graph.constants.append(numpy_helper.from_array(np.array([-1, config.embed_dim], np.int64), "flat"))
    x = graph.add("Reshape", [x, "flat"], "hidden")  # (B * S, D)
    x = graph.add("Gather", [x, "logit_index"], "wanted")  # (N, D)
    half = dtype == "float16"
    logits = graph.add("Gemm", [x, "wte.weight"], "head" if half else "logits", transB=1)  # (N, V)
    if half:
        graph.add("Cast", [logits], "logits", to=TensorProto.FLOAT)
    return _model(graph, config)


def _model(graph: _Builder, config: ModelConfig) -> ModelProto:
    """Put inputs and outputs around the nodes. Opset 21 and IR 10 are the newest that ONNX Runtime 1.28 reads."""
    kind = helper.np_dtype_to_tensor_dtype(graph.dtype)
    value = helper.make_tensor_value_info
    cache = ["batch", config.kv_heads, "capacity", config.head_dim]
    names = [f"{i}.{part}" for i in range(config.num_layers) for part in ("key", "value")]
    inputs = [value("input_ids", TensorProto.INT64, ["batch", "tokens"])]
    if config.architecture == "gpt2":
        inputs.append(value("position_ids", TensorProto.INT64, ["batch", "tokens"]))
    inputs += [
        value("seqlens_k", TensorProto.INT32, ["batch"]),
        value("total_sequence_length", TensorProto.INT32, []),
        value("logit_index", TensorProto.INT64, ["wanted"]),
        *(value(f"past_key_values.{name}", kind, cache) for name in names),
    ]
    outputs = [
        value("logits", TensorProto.FLOAT, ["wanted", config.vocab_size]),
        *(value(f"present.{name}", kind, cache) for name in names),
    ]
    return helper.make_model(
        helper.make_graph(graph.nodes, f"smallgpt-{config.architecture}", inputs, outputs, graph.constants),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)],
        ir_version=10,
        producer_name="smallgpt",
    )
