"""Nodes and weights of an ONNX graph, the ways in which it multiplies by a quantised matrix, and its cache in int8."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from smallgpt.quantize import Quantized

CONTRIB = "com.microsoft"  # the domain of ONNX Runtime's own operators
MOST_COLUMNS = 512  # of a row that share a scale in integer products: fewer round less and cost time
LEVELS_BELOW = 16  # of 256 where a row has a known least value close to zero


class GraphBuilder:
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

    def product(
        self, x: str, name: str, weight: Quantized, output: str, bias: str = "", least: float | None = None
    ) -> str:
        """x W^T (+ bias) for a matrix (N, K) that is stored: (..., K) -> (..., N); no x is below `least`, if given."""
        if self.integers:
            x = self.by_integers(x, name, weight, f"{name}.product" if bias else output, least)
            return self.add("Add", [x, bias], output) if bias else x
        inputs = [x, name, f"{name}.scales", *(["", "", bias] if bias else [])]
        shape = {"K": weight.columns, "N": len(weight.values), "bits": weight.bits, "block_size": weight.block}
        # Level 4 computes with inputs in 8 bits; the others turn the weights into floats first, which is slow.
        return self.add("MatMulNBits", inputs, output, domain=CONTRIB, accuracy_level=4, **shape)

    def by_integers(self, x: str, name: str, weight: Quantized, output: str, least: float | None) -> str:
        """x W^T in integers of 8 bits; the matrix gets new levels, one scale an output, when a session starts.

        A row of x has a scale of its own, or without `least` one for each MOST_COLUMNS, so its result depends on no
        other row.
        """
        levels, scales = self.columns(name, weight)
        count = -(-weight.columns // MOST_COLUMNS)
        if count == 1 or least is not None:
            return self.integers_of(x, levels, scales, output, least)
        sizes = [len(part) for part in np.array_split(np.arange(weight.columns), count)]
        self.constant(f"{name}.sizes", np.array(sizes))
        inputs, matrices = ([f"{of}.part{i}" for i in range(count)] for of in (output, name))
        self.add("Split", [x, f"{name}.sizes"], *inputs, axis=-1)
        self.add("Split", [levels, f"{name}.sizes"], *matrices, axis=0)
        pairs = zip(inputs, matrices, strict=True)
        return self.add("Sum", [self.integers_of(x, w, scales, f"{x}.product") for x, w in pairs], output)

    def integers_of(self, x: str, levels: str, scales: str, output: str, least: float | None = None) -> str:
        """Rows (..., K) with one scale each, times levels (K, N) int8 with scales (N,).

        Of the 256 levels of x half are for values below zero, or with `least` LEVELS_BELOW.
        """
        below = 128 if least is None else LEVELS_BELOW
        self.constant("last", np.array([-1]))
        self.constant("one", np.array(1, np.float32))
        zero = self.constant(f"level.{below}", np.array(below, np.uint8))
        share = self.constant(f"step.{below}", np.array(1 / (255 - below), np.float32))
        largest = x if least is not None else self.add("Abs", [x], f"{output}.abs")
        largest = self.add("ReduceMax", [largest, "last"], f"{output}.max")  # (..., 1)
        step = self.add("Mul", [largest, share], f"{output}.step")
        if least is not None:  # reach down to it
            floor = self.constant(f"{output}.least", np.array(-least / below, np.float32))
            step = self.add("Max", [step, floor], f"{output}.reach")
        scaled = self.add("Div", [x, step], f"{output}.scaled")
        rounded = self.add("QuantizeLinear", [scaled, "one", zero], f"{output}.rounded")
        inputs = [rounded, levels, "one", scales, zero]
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

    def find_places(self, kv_heads: int, head_dim: int) -> None:
        """Name the constants and shapes of `read_cache` and `write_cache`.

        `tokens_of_each` (1,) is S, `past` (1,) P, the tokens before the new ones, and `places` (B * KV * S, 3) are the
        indices of the new ones' heads in a cache (B, KV, M, head_dim).
        """
        self.constant("zero", np.array([0]))
        self.constant("last", np.array([-1]))
        self.constant("end", np.array([np.iinfo(np.int64).max]))
        self.constant("time", np.array([2]))  # the axis of a cache
        self.constant("heads.flat", np.array([-1, head_dim]))
        self.constant("one", np.array(1, np.float32))
        self.constant("centre", np.array(0, np.int8))
        total = self.add("Reshape", ["total_sequence_length", "last"], "total")
        total = self.add("Cast", [total], "total.wide", to=TensorProto.INT64)
        batch = self.add("Shape", ["input_ids"], "batch", end=1)
        tokens = self.add("Shape", ["input_ids"], "tokens_of_each", start=1)
        self.add("Sub", [total, tokens], "past")
        grid = self.add("Concat", [batch, self.constant("kv_heads", np.array([kv_heads])), tokens], "grid", axis=0)
        ones = self.add("ConstantOfShape", [grid], "ones", value=numpy_helper.from_array(np.ones(1, np.bool_)))
        places = self.add("Transpose", [self.add("NonZero", [ones], "axes")], "places.new")
        start = self.add("Concat", ["zero", "zero", "past"], "start", axis=0)
        self.add("Add", [places, start], "places")

    def read_cache(self, cache: str, scale: str) -> str:
        """What a cache in int8 holds from before the new tokens, as floats, (B, KV, P, head_dim)."""
        levels = self.add("Slice", [cache, "zero", "past", "time"], f"{cache}.levels")
        floats = self.add("Cast", [levels], f"{cache}.cast", to=TensorProto.FLOAT)
        return self.add("Mul", [floats, scale], f"{cache}.past")

    def write_cache(self, cache: str, values: str, scale: str, output: str) -> None:
        """Round the new ones among `values` (B, KV, P + S, head_dim) to levels and put them into a cache, in place."""
        new = self.add("Slice", [values, "past", "end", "time"], f"{cache}.new")  # (B, KV, S, head_dim)
        scaled = self.add("Div", [new, scale], f"{cache}.scaled")
        levels = self.add("QuantizeLinear", [scaled, "one", "centre"], f"{cache}.rounded")
        rows = self.add("Reshape", [levels, "heads.flat"], f"{cache}.rows")
        self.add("ScatterND", [cache, "places", rows], output)
