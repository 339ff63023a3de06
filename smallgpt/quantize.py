"""Matrices in 8 or 4 bits, laid out as ONNX Runtime's MatMulNBits and GatherBlockQuantized read them.

A matrix is N outputs by K inputs. Each row is cut into blocks of neighbouring columns with one float32 scale each, in 8
bits the same for the whole row: weight = level * scale, with signed levels that are stored as unsigned ones, their
zero in the middle.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

BLOCKS = (128, 64, 32, 16)  # the larger, the fewer scales to read: 128 columns cost 3 % on top of 8 bits
STEPS = np.linspace(0.6, 1.0, 17)  # scales to try, as shares of the one that clips nothing
DAMPING = 0.01


@dataclass(frozen=True)
class Quantized:
    """A quantised (N, K) matrix; the last block is filled up with zeros when K is no multiple of the block."""

    bits: int
    columns: int  # K
    values: np.ndarray  # (N, blocks, block * bits / 8) uint8; of two 4-bit levels the first has the lower bits
    scales: np.ndarray  # (N, blocks) float32, of either sign

    @property
    def block(self) -> int:
        """Columns that share a scale."""
        return int(self.values.shape[2]) * 8 // self.bits

    def dequantized(self) -> np.ndarray:
        """The matrix that the stored levels stand for, (N, K) float32."""
        stored = self.values
        if self.bits == 4:
            stored = np.stack([stored & 15, stored >> 4], axis=-1).reshape(*stored.shape[:2], -1)
        levels = stored.astype(np.float32) - 2 ** (self.bits - 1)
        return (levels * self.scales[..., None]).reshape(len(levels), -1)[:, : self.columns]


def quantize_weights(
    weights: Mapping[str, np.ndarray], bits: int, moments: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray | Quantized]:
    """Quantise every matrix of a model; vectors stay as they are.

    With 4 bits the matrices that have second moments of their inputs in `moments` are fitted to them, see `quantize`;
    the others, the embeddings, keep 8: the output head suffers most (docs/experiments.md).
    """
    fitted = moments if bits == 4 else {}
    return {
        name: array if array.ndim == 1 else quantize(array, 4 if name in fitted else 8, fitted.get(name))
        for name, array in weights.items()
    }


def quantize(weight: np.ndarray, bits: int, moment: np.ndarray | None = None) -> Quantized:
    """Quantise a matrix (N, K) with the largest of BLOCKS that divides K, or the smallest of them if none does.

    With `moment` (K, K), the mean of x x^T over inputs x of the layer, scales and levels are chosen so that the
    layer's outputs change little; without, each weight is rounded to the nearest level.
    """
    columns = weight.shape[1]
    block = next((size for size in BLOCKS if columns % size == 0), BLOCKS[-1])
    power = np.ones(columns) if moment is None else np.diagonal(moment)
    importance = power + DAMPING * power.mean()
    padding = (0, -columns % block)
    blocks = np.pad(weight.astype(np.float32), ((0, 0), padding)).reshape(len(weight), -1, block)
    # With 8 bits a row has one scale, so that integer products can sum it up whole.
    parts = blocks if bits == 4 else blocks.reshape(len(weight), 1, -1)
    scales = _scales(parts, np.pad(importance, padding).reshape(parts.shape[1:]), bits, search=moment is not None)
    scales = np.repeat(scales, blocks.shape[1] // parts.shape[1], axis=1)
    of_columns = np.repeat(scales, block, axis=1)[:, :columns]
    levels = _nearest(weight, of_columns, bits) if moment is None else _fit(weight, of_columns, moment, bits)
    levels = np.pad(levels, ((0, 0), padding)).reshape(blocks.shape)
    return Quantized(bits, columns, _pack(levels, bits), scales)


def _pack(levels: np.ndarray, bits: int) -> np.ndarray:
    stored = (levels + 2 ** (bits - 1)).astype(np.uint8)
    return stored if bits == 8 else stored[..., ::2] | np.left_shift(stored[..., 1::2], 4)


def _nearest(weight: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    return np.clip(np.rint(weight / scales), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _scales(blocks: np.ndarray, importance: np.ndarray, bits: int, *, search: bool) -> np.ndarray:
    """A scale for each of the blocks (N, blocks, block): the extreme weight takes the extreme level, or is clipped.

    Levels reach one further below zero than above, so the sign of the scale puts the extreme weight there. The
    search weighs squared errors by `importance` (blocks, block).
    """
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], axis=-1)
    widest = np.where(extreme == 0, 1, extreme / -(2 ** (bits - 1))).astype(np.float32)  # (N, blocks, 1)
    if not search:
        return widest[..., 0]
    best, least = widest, np.full(widest.shape, np.inf, np.float32)
    for step in STEPS.astype(np.float32):
        scales = widest * step
        errors = (blocks - _nearest(blocks, scales, bits) * scales) ** 2
        error = np.einsum("nbk,bk->nb", errors, importance.astype(np.float32))[..., None]
        best, least = np.where(error < least, scales, best), np.minimum(error, least)
    return best[..., 0]


def _fit(weight: np.ndarray, scales: np.ndarray, moment: np.ndarray, bits: int) -> np.ndarray:
    """Levels (N, K) that keep the layer's outputs: each column's rounding error is made up for by later columns.

    GPTQ (Frantar et al. 2022) with the columns in falling order of their inputs' power and scales fixed beforehand.
    """
    power = np.diagonal(moment)
    order = np.argsort(-power, kind="stable")
    damped = moment[np.ix_(order, order)].astype(np.float64)
    damped[np.diag_indices_from(damped)] += DAMPING * power.mean() or 1.0
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)  # inverse = upper^T upper
    rest = np.ascontiguousarray(weight.T[order], dtype=np.float32)  # (K, N): what is still to be represented
    steps = np.ascontiguousarray(scales.T[order])
    levels = np.empty_like(rest)
    for start in range(0, len(rest), 128):
        end = min(start + 128, len(rest))
        errors = np.empty_like(rest[start:end])
        for i in range(start, end):
            levels[order[i]] = level = _nearest(rest[i], steps[i], bits)
            errors[i - start] = (rest[i] - level * steps[i]) / upper[i, i]
            rest[i + 1 : end] -= np.outer(upper[i, i + 1 : end], errors[i - start])
        rest[end:] -= upper[start:end, end:].T @ errors
    return levels.T
