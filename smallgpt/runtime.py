"""A bundle at work: ONNX Runtime with everything bound once.

The cache has rows, one for each sequence in work, and every call runs on a contiguous range of them. Inputs, logits
and the cache are arrays that are allocated and bound once for each shape of a call; a step writes a few numbers into
them and runs. Prompts that start together are padded on the right and share one prefill; several tokens on top of a
past are possible for a single sequence only (GroupQueryAttention's rule).
"""

import base64
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from smallgpt.bundle import CERTIFICATE, load_bundle
from smallgpt.cli import MismatchError
from smallgpt.generation import MANY_TOKENS
from smallgpt.session import SCORES_BYTES, open_session, scores_bytes
from smallgpt.tokenizer import Tokenizer

MANY_ROWS = 8  # from so many sequences on a step of a quantised graph is faster in integers
CALLS = 64  # shapes of calls whose arrays are kept
CACHE_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "int8": "tensor(int8)"}


@dataclass(frozen=True)
class _Call:
    """The arrays and the binding of calls with one shape; B sequences, S new tokens each, N wanted logits."""

    arrays: dict[str, np.ndarray]  # the graph's small inputs by name
    uploads: list[tuple[Any, np.ndarray]]  # device copies of them that need refreshing before a run
    logits: np.ndarray  # (N, V)
    binding: Any


class OrtGPT:
    """The model of a bundle, its tokenizer and the sequences it is working on.

    Args:
        bundle: the folder.
        device: "cpu", "cuda", "cuda:N" for the N-th GPU, or "auto": CUDA where the bundle and the machine have it.
        threads: 0 takes the cores this process may use, at most 8.
        verify: compare the sha256 of every file first.
        session: configuration entries for onnxruntime, such as ("session.intra_op.allow_spinning", "0").
        batch_invariant: steps multiply by quantised matrices in one way, whatever the number of sequences (`Batch` has
            more on that). Without it, from MANY_ROWS sequences on, in another, whose last digits differ, and faster.

    Raises:
        FileNotFoundError, MismatchError: see `load_bundle`.
        DeviceError: CUDA was asked for and is not there, or not for this bundle.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        device: str = "auto",
        threads: int = 0,
        verify: bool = True,
        session: Sequence[tuple[str, str]] = (),
        batch_invariant: bool = True,
    ) -> None:
        self.batch_invariant = batch_invariant
        self.bundle = load_bundle(bundle, verify=verify)
        self.session, self.device, self.device_number = open_session(self.bundle, device, threads, session)
        self.tokenizer = Tokenizer.load(self.bundle.tokenizer)
        self.max_seq_len: int = self.bundle.config.model["max_seq_len"]
        self.vocab_size: int = self.bundle.config.model["vocab_size"]
        names = [value.name for value in self.session.get_inputs()]
        if names != self.bundle.config.inputs or self.tokenizer.vocab_size != self.vocab_size:
            raise MismatchError(f"{self.bundle.folder}: graph, tokenizer and config.json do not belong together")
        cache, model = self.session.get_inputs()[-1], self.bundle.config.model
        shape = [model["num_kv_heads"], model["head_dim"]]
        if cache.type != CACHE_TYPES.get(self.bundle.config.dtype) or [cache.shape[1], cache.shape[3]] != shape:
            raise MismatchError(f"{self.bundle.folder}: the cache of the graph is not that of config.json")
        self.lengths = np.zeros(0, np.int64)  # (R,) tokens in the cache of each row
        self.capacity = 0
        self._cache: list[Any] = []  # OrtValues (R, kv_heads, capacity, head_dim): keys and values of every layer
        self._block: np.ndarray = np.zeros(0)  # on the CPU the memory of all of them, one more dimension in front
        self._calls: dict[tuple[int, int, int, int], _Call] = {}

    @property
    def pairs(self) -> bool:
        """Whether its kernels compute rows in pairs and an odd last one in another way, and many tokens in another."""
        return self.bundle.config.variant not in ("fp32", "fp16")

    def fork(self) -> "OrtGPT":
        """The same model with rows of its own; weights and session are shared."""
        other = copy.copy(self)
        other.lengths, other.capacity = np.zeros(0, np.int64), 0
        other._cache, other._block, other._calls = [], np.zeros(0), {}
        return other

    def reserve(self, rows: int, capacity: int | None = None) -> None:
        """Make room for `rows` sequences of `capacity` tokens, max_seq_len by default; all rows are empty then."""
        capacity = self.max_seq_len if capacity is None else capacity
        if not 1 <= capacity <= self.max_seq_len:
            raise ValueError(f"{capacity} tokens do not fit into the context of {self.max_seq_len}")
        if (len(self.lengths), self.capacity) == (rows, capacity):
            self.lengths[:] = 0
            return
        self.lengths, self.capacity, self._calls = np.zeros(rows, np.int64), capacity, {}
        model, dtype = self.bundle.config.model, np.dtype(self.bundle.config.dtype)
        shape = (2 * model["num_layers"], rows, model["num_kv_heads"], capacity, model["head_dim"])
        if self.device == "cuda":
            make = onnxruntime.OrtValue.ortvalue_from_shape_and_type
            self._cache = [make(shape[1:], dtype, "cuda", self.device_number) for _ in range(shape[0])]
        else:
            self._block = np.zeros(shape, dtype)
            self._cache = [_share(self._block[i]) for i in range(shape[0])]

    def prefill(self, ids: np.ndarray, lengths: np.ndarray | None = None, *, capacity: int | None = None) -> np.ndarray:
        """`reserve` a row for each of the prompts `ids` (B, S) and `fill` them; the logits after each, (B, V)."""
        self.reserve(len(ids), capacity)
        return self.fill(0, ids, lengths)

    def fill(self, first: int, ids: np.ndarray, lengths: np.ndarray | None = None) -> np.ndarray:
        """Start the rows from `first` on with prompts `ids` (B, S), padded on the right; logits after each, (B, V).

        `lengths` (B,) are the prompts' own lengths, S for all by default. The result is overwritten by the next
        call. Raises ValueError for an empty prompt and for one that does not fit.
        """
        batch, tokens = ids.shape
        lengths = np.full(batch, tokens) if lengths is None else np.asarray(lengths)
        if lengths.min() < 1 or lengths.max() > tokens:
            raise ValueError(f"lengths are {lengths.tolist()}; each must be between 1 and {tokens}")
        self.lengths[first : first + batch] = 0
        # In even parts, because quantised rows are multiplied in pairs.
        room = max(2, SCORES_BYTES // (scores_bytes(self.bundle, self.capacity) * tokens) // 2 * 2)
        if batch > room:
            parts = [slice(i, i + room) for i in range(0, batch, room)]
            return np.concatenate([self.fill(first + part.start, ids[part], lengths[part]) for part in parts])
        return self._run(first, ids, lengths, np.arange(batch) * tokens + lengths - 1)

    def extend(self, row: int, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Add tokens (S,) to one sequence; the logits after each, (S, V), until the next call.

        Set `lengths[row]` to a smaller number to take tokens back.
        """
        ids = np.asarray(ids, np.int64)
        return self._run(row, ids[None], self.lengths[row : row + 1] + len(ids), np.arange(len(ids)))

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Add one token to each of the first B rows, `tokens` (B,); logits after it, (B, V), until the next call.

        Raises ValueError when a sequence is full.
        """
        batch = len(tokens)
        return self._run(0, tokens[:, None], self.lengths[:batch] + 1, np.arange(batch))

    def logits(self, ids: Sequence[int] | np.ndarray, cuts: Sequence[int] = ()) -> np.ndarray:
        """Logits after every token of one sequence, (T,) -> (T, V); `cuts` are positions where it is cut in pieces.

        Ends the sequences in work. Raises ValueError when `ids` is empty or does not fit into the context.
        """
        ids = np.asarray(ids, np.int64)
        self.reserve(1, len(ids))
        return np.concatenate([self.extend(0, ids[a:b]).copy() for a, b in pairwise([0, *cuts, len(ids)])])

    def select(self, sources: Sequence[int]) -> None:
        """Let row i hold what row `sources[i]` held."""
        moved = [i for i, source in enumerate(sources) if i != source]
        if not moved:
            return
        rows = [sources[i] for i in moved]
        self.lengths[moved] = self.lengths[rows]
        longest = int(self.lengths[moved].max())
        if self.device == "cpu":
            for part in self._block:  # one after the other: what is copied is held twice
                part[moved, :, :longest] = part[rows, :, :longest]
            return
        for value in self._cache:
            array = value.numpy()
            array[moved] = array[rows]
            value.update_inplace(array)

    def _run(self, first: int, ids: np.ndarray, lengths: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Feed `ids` (B, S) so that the rows have `lengths` (B,) tokens; logits of the positions `wanted` (N,)."""
        batch, tokens = ids.shape
        if lengths.max() > self.capacity or tokens > self.capacity:
            raise ValueError(f"{max(lengths.max(), tokens)} tokens do not fit into the context of {self.capacity}")
        call = self._call(first, batch, tokens, len(wanted))
        arrays, rows = call.arrays, self.lengths[first : first + batch]
        arrays["input_ids"][:] = ids
        arrays["seqlens_k"][:] = lengths - 1
        # A batch's prefill must name its padded length; with a past it is the longest sequence.
        arrays["total_sequence_length"][...] = max(lengths.max(), tokens)
        arrays["logit_index"][:] = wanted
        if "integers" in arrays:
            many = tokens == 1 and batch >= MANY_ROWS and not self.batch_invariant
            arrays["integers"][...] = many or tokens >= MANY_TOKENS
        if "position_ids" in arrays:
            arrays["position_ids"][:] = rows[:, None] + np.arange(tokens)
        for value, array in call.uploads:
            value.update_inplace(array)
        self.session.run_with_iobinding(call.binding)
        rows[:] = lengths
        return call.logits

    def _call(self, first: int, batch: int, tokens: int, wanted: int) -> _Call:
        """The binding for calls of one shape; the last ones of short calls are kept."""
        key = (first, batch, tokens, wanted)
        call = self._calls.pop(key, None) or self._bind(*key)
        if tokens <= 16:
            self._calls[key] = call
            if len(self._calls) > CALLS:
                del self._calls[next(iter(self._calls))]
        return call

    def _bind(self, first: int, batch: int, tokens: int, wanted: int) -> _Call:
        binding = self.session.io_binding()
        arrays: dict[str, np.ndarray] = {
            "input_ids": np.zeros((batch, tokens), np.int64),
            "position_ids": np.zeros((batch, tokens), np.int64),
            "seqlens_k": np.zeros(batch, np.int32),
            "total_sequence_length": np.zeros((), np.int32),
            "logit_index": np.zeros(wanted, np.int64),
            "integers": np.zeros((), np.bool_),
        }
        arrays = {name: array for name, array in arrays.items() if name in self.bundle.config.inputs}
        uploads: list[tuple[Any, np.ndarray]] = []
        for name, array in arrays.items():
            if self.device == "cpu" or name == "total_sequence_length":  # GroupQueryAttention reads it on the host
                value = _share(array)
            else:
                value = onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", self.device_number)
                uploads.append((value, array))
            binding.bind_ortvalue_input(name, value)
        # A view of the rows: past and present share the memory from the first of them on.
        dtype = np.dtype(self.bundle.config.dtype)
        names = [name for name in self.bundle.config.inputs if name.startswith("past_key_values.")]
        for name, value in zip(names, self._cache, strict=True):
            shape = [batch, *value.shape()[1:]]
            pointer = value.data_ptr() + first * math.prod(shape[1:]) * dtype.itemsize
            place = (self.device, self.device_number, dtype, shape, pointer)
            binding.bind_input(name, *place)
            binding.bind_output(name.replace("past_key_values", "present"), *place)
        logits = np.zeros((wanted, self.vocab_size), np.float32)
        binding.bind_ortvalue_output("logits", _share(logits))
        return _Call(arrays, uploads, logits, binding)


def _share(array: np.ndarray) -> Any:
    """An OrtValue on the memory of `array`."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def golden_logits(model: OrtGPT, ids: np.ndarray) -> list[np.ndarray]:
    """Logits (V,) after `ids` (N,) in one piece and, of more than one, with the last as a step of its own."""
    results = [model.prefill(ids[None])[0].copy()]
    if len(ids) > 1:
        model.prefill(ids[None, :-1])
        results.append(model.step(ids[-1:])[0].copy())
    return results


def check_golden(model: OrtGPT) -> tuple[int, float]:
    """Recompute the golden logits of the bundle's certificate: how many vectors, and the largest difference.

    Each stored sequence is run in one piece and, again, with its last token as a step of its own. Raises
    MismatchError when a difference is above the certificate's limit.
    """
    certificate = model.bundle.certificate()
    limit = certificate["golden_limit"]
    largest = 0.0
    for golden in certificate["golden"]:
        found = golden_logits(model, np.array(golden["ids"]))
        stored = [np.frombuffer(base64.b64decode(text), "<f4") for text in golden["logits"]]
        differences = [np.abs(one - other).max() for one, other in zip(found, stored, strict=True)]
        largest = float(np.max([largest, *differences]))  # NaN stays
        if not largest <= limit:
            raise MismatchError(
                f"{model.bundle.folder}: logits differ by {largest:.3g} from those in {CERTIFICATE}, limit {limit:g}; "
                f"this machine's {model.device} does not compute what was certified"
            )
    return len(certificate["golden"]), largest
