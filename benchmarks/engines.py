"""What the benchmark drives: each engine feeds prompts, copies them to a batch, and steps."""

import ctypes
from pathlib import Path
from typing import Protocol

import numpy as np


class Engine(Protocol):
    """B sequences at work. The logits are overwritten by the next call."""

    def prefill(self, ids: np.ndarray, batch: int, capacity: int) -> np.ndarray:
        """Drop what was there, feed one prompt (S,) and copy its cache to `batch` sequences; its logits (V,)."""

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Add a token to each sequence, (B,); the logits after it (B, V)."""


class Ours:
    """This project's runtime."""

    def __init__(self, bundle: Path, threads: int) -> None:
        from smallgpt.runtime import OrtGPT

        self.model = OrtGPT(bundle, device="cpu", threads=threads, verify=False)

    def prefill(self, ids: np.ndarray, batch: int, capacity: int) -> np.ndarray:
        self.model.reserve(batch, capacity)
        logits: np.ndarray = self.model.fill(0, ids[None])[0]
        if batch > 1:
            self.model.select([0] * batch)
        return logits

    def step(self, tokens: np.ndarray) -> np.ndarray:
        return self.model.step(tokens)


class LlamaCpp:
    """llama.cpp through its C interface. Every sequence has a cache of its own, which is its faster mode here."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self.lib, self.threads, self.context = llama_cpp, threads, None
        self.silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.silence, ctypes.c_void_p(0))
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {path}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.shape = (0, 0)

    def prefill(self, ids: np.ndarray, batch: int, capacity: int) -> np.ndarray:
        lib, tokens = self.lib, len(ids)
        if self.shape != (batch, capacity):
            self._open(batch, capacity)
        memory = lib.llama_get_memory(self.context)
        lib.llama_memory_clear(memory, True)
        self._feed(ids, np.arange(tokens), np.zeros(tokens, np.int32), [tokens - 1])
        logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, tokens - 1), (self.vocab_size,))
        for row in range(1, batch):
            lib.llama_memory_seq_cp(memory, 0, row, -1, -1)
        self.position = tokens
        return logits

    def step(self, tokens: np.ndarray) -> np.ndarray:
        batch = len(tokens)
        self._feed(tokens, self.position, self.rows[:batch], slice(None))
        self.position += 1
        logits = self.lib.llama_get_logits(self.context)
        return np.ctypeslib.as_array(logits, (batch, self.vocab_size))

    def _open(self, batch: int, capacity: int) -> None:
        lib = self.lib
        if self.context:
            lib.llama_free(self.context)
        settings = lib.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_seq_max = capacity * batch, 2048, batch
        settings.n_threads = settings.n_threads_batch = self.threads
        settings.kv_unified = False
        self.context = lib.llama_init_from_model(self.model, settings)
        self.batch = lib.llama_batch_init(2048, 0, 1)
        view = np.ctypeslib.as_array
        self.token, self.pos, self.wanted = (view(getattr(self.batch, n), (2048,)) for n in ("token", "pos", "logits"))
        self.sequence = [self.batch.seq_id[i] for i in range(2048)]
        view(self.batch.n_seq_id, (2048,))[:] = 1
        self.rows, self.last = np.arange(batch, dtype=np.int32), np.full(2048, -1, np.int32)
        self.shape = (batch, capacity)

    def _feed(self, ids: np.ndarray, positions: np.ndarray | int, rows: np.ndarray, wanted: list[int] | slice) -> None:
        count = len(ids)
        self.batch.n_tokens = count
        self.token[:count], self.pos[:count] = ids, positions
        self.wanted[:count] = 0
        self.wanted[:count][wanted] = 1
        if not np.array_equal(self.last[:count], rows):  # in a run of steps they stay the same
            for i, row in enumerate(rows.tolist()):
                self.sequence[i][0] = row
            self.last[:count] = rows
        if self.lib.llama_decode(self.context, self.batch) != 0:
            raise RuntimeError("llama_decode failed")
