import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from smallgpt.quantize import BLOCKS, Quantized, quantize, quantize_weights

SHAPES = [(320, 512), (7, 40), (33, 64), (16, 704), (1, 96), (3, 128), (5, 8), (2, 17)]


def matrix(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(rows * columns).standard_normal((rows, columns)).astype(np.float32)


def moment(inputs: np.ndarray) -> np.ndarray:
    return inputs.T @ inputs / len(inputs)


def correlated(count: int, columns: int) -> np.ndarray:
    """Inputs of very different power that depend on each other."""
    draw = np.random.default_rng(columns)
    mixing = draw.standard_normal((columns, columns))
    mixed = draw.standard_normal((count, columns)) @ mixing
    return (mixed * np.geomspace(1, 0.05, columns)).astype(np.float32)


def multiply(x: np.ndarray, weight: Quantized, level: int) -> np.ndarray:
    """x W^T by ONNX Runtime; at `level` 4 it rounds x to 8 bits, at 1 it does not."""
    rows, value = len(weight.values), helper.make_tensor_value_info
    sizes = {"K": weight.columns, "N": rows, "bits": weight.bits, "block_size": weight.block}
    node = helper.make_node("MatMulNBits", list("xbs"), ["y"], domain="com.microsoft", accuracy_level=level, **sizes)
    inputs, outputs = ([value(name, TensorProto.FLOAT, None)] for name in "xy")
    constants = [numpy_helper.from_array(weight.values, "b"), numpy_helper.from_array(weight.scales, "s")]
    graph = helper.make_graph([node], "product", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_runtime_multiplies_by_the_dequantised_matrix(shape: tuple[int, int], bits: int) -> None:
    quantized = quantize(matrix(*shape), bits, moment(correlated(50, shape[1])) if bits == 4 else None)
    weight = quantized.dequantized()
    assert weight.shape == shape
    for rows in (1, 2, 5, 33):  # single tokens have kernels of their own
        x = matrix(rows, shape[1])
        expected = x.astype(np.float64) @ weight.T
        np.testing.assert_allclose(multiply(x, quantized, 1), expected, rtol=1e-5, atol=1e-4)
        # Level 4 is off by up to half a step of each input, a 254th of the largest in the block.
        bound = np.abs(x).max() / 254 * np.abs(weight).sum(1)
        assert (np.abs(multiply(x, quantized, 4) - expected) <= bound + 1e-4).all()


@given(rows=st.integers(1, 5), columns=st.integers(1, 300), bits=st.sampled_from([8, 4]), seed=st.integers(0, 9))
def test_rounding_errs_by_half_a_step_or_clips_to_the_last_level(rows: int, columns: int, bits: int, seed: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    quantized = quantize(weight, bits)
    steps = np.repeat(quantized.scales, quantized.block, axis=1)[:, :columns]
    restored = quantized.dequantized()
    clipped = restored == (2 ** (bits - 1) - 1) * steps
    error = np.abs(restored - weight) / np.abs(steps)
    assert (error[~clipped] <= 0.501).all()
    assert (error[clipped] <= 1.001).all()
    blocks = np.pad(weight, ((0, 0), (0, -columns % quantized.block))).reshape(*quantized.scales.shape, -1)
    extremes = np.abs(blocks).max(-1)
    if bits == 8:  # one scale for the whole row
        extremes[:] = extremes.max(-1, keepdims=True)
    np.testing.assert_allclose(np.abs(quantized.scales) * 2 ** (bits - 1), extremes, rtol=1e-6)  # none is clipped
    again = quantize(restored, bits)
    np.testing.assert_allclose(again.dequantized(), restored, rtol=1e-6, atol=1e-7)


def test_the_block_is_the_largest_that_wastes_nothing() -> None:
    assert {columns: quantize(matrix(1, columns), 8).block for columns in (512, 704, 96, 48, 40, 8)} == {
        512: 128,
        704: 64,
        96: 32,
        48: 16,
        40: 16,
        8: 16,
    }
    assert BLOCKS[-1] == 16  # the smallest that MatMulNBits has
    assert quantize(matrix(3, 40), 4).values.shape == (3, 3, 8)
    assert quantize(matrix(3, 40), 8).scales.shape == (3, 3)


def test_four_bit_levels_lie_two_in_a_byte() -> None:
    quantized = quantize(np.array([[-8, 7, 1, 0] + 12 * [2]], np.float32), 4)
    assert quantized.scales.tolist() == [[1.0]]
    assert quantized.values.tolist() == [[[0xF0, 0x89] + 6 * [0xAA]]]
    assert quantized.dequantized().tolist() == [[-8, 7, 1, 0] + 12 * [2]]


def test_fitted_weights_keep_the_outputs_better_than_nearest_ones() -> None:
    weight, inputs, others = matrix(64, 384), correlated(3000, 384), correlated(6000, 384)[3000:]
    exact = others @ weight.T

    def error(quantized: Quantized) -> float:
        return float(((others @ quantized.dequantized().T - exact) ** 2).mean())

    nearest, searched = quantize(weight, 4), quantize(weight, 4, np.diag(np.diagonal(moment(inputs))))
    fitted = quantize(weight, 4, moment(inputs))
    assert error(searched) < 0.9 * error(nearest)
    assert error(fitted) < 0.5 * error(searched)


def test_independent_inputs_leave_nothing_to_make_up_for() -> None:
    weight = matrix(9, 256)
    power = np.geomspace(1, 9, 256, dtype=np.float32)
    quantized = quantize(weight, 4, np.diag(power))
    steps = np.repeat(quantized.scales, quantized.block, axis=1)
    assert np.array_equal(quantized.dequantized(), np.clip(np.rint(weight / steps), -8, 7) * steps)


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_stay_zeros_and_unused_inputs_do_no_harm(bits: int) -> None:
    assert not quantize(np.zeros((3, 40), np.float32), bits).dequantized().any()
    unused = np.zeros((40, 40), np.float32)
    assert not quantize(np.zeros((3, 40), np.float32), bits, unused).dequantized().any()
    assert np.isfinite(quantize(matrix(3, 40), bits, unused).dequantized()).all()
    weight, inputs = matrix(8, 64), correlated(500, 64)
    inputs[:, ::2] = 0
    change = inputs @ (quantize(weight, bits, moment(inputs)).dequantized() - weight).T
    assert np.linalg.norm(change) < (0.1 if bits == 4 else 0.006) * np.linalg.norm(inputs @ weight.T)


def test_embeddings_keep_eight_bits_and_vectors_all() -> None:
    weights = {"wte.weight": matrix(20, 32), "h.0.mlp.up.weight": matrix(8, 32), "ln_f.weight": matrix(1, 32)[0]}
    moments = {"h.0.mlp.up.weight": moment(correlated(100, 32))}
    for bits in (8, 4):
        quantized = quantize_weights(weights, bits, moments)
        kinds = {name: value.bits for name, value in quantized.items() if isinstance(value, Quantized)}
        assert kinds == {"wte.weight": 8, "h.0.mlp.up.weight": bits}
        assert quantized["ln_f.weight"] is weights["ln_f.weight"]
