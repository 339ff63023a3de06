"""What the benchmark drives: every engine feeds a prompt, copies it to a batch, and decodes greedily."""

import ctypes
import json
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Engine(ABC):
    """One engine with its model loaded. Prompts are arrays of ids (S,); nothing ends a text before its length."""

    @abstractmethod
    def first_token(self, ids: np.ndarray, capacity: int) -> float:
        """Seconds from a prompt to the first id after it."""

    @abstractmethod
    def decode(self, ids: np.ndarray, batch: int, steps: int, capacity: int) -> float:
        """Seconds of `steps` tokens for each of `batch` sequences, after a prompt and the first token."""

    @abstractmethod
    def text(self, ids: np.ndarray, count: int, capacity: int) -> list[int]:
        """The first `count` ids after a prompt."""

    @abstractmethod
    def logits(self, ids: np.ndarray) -> np.ndarray:
        """The logits after every token of a text, (S, V)."""


class Stepping(Engine):
    """An engine that hands out logits: the benchmark takes the largest itself."""

    @abstractmethod
    def prefill(self, ids: np.ndarray, batch: int, capacity: int) -> np.ndarray:
        """Drop what was there, feed one prompt and copy its cache to `batch` sequences; its logits (V,)."""

    @abstractmethod
    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Add a token to each sequence, (B,); the logits after it (B, V), until the next call."""

    def first_token(self, ids: np.ndarray, capacity: int) -> float:
        start = time.perf_counter()
        self.prefill(ids, 1, capacity).argmax()
        return time.perf_counter() - start

    def decode(self, ids: np.ndarray, batch: int, steps: int, capacity: int) -> float:
        tokens = np.full(batch, self.prefill(ids, batch, capacity).argmax())
        logits = self.step(tokens)  # binds, or plans, once
        if np.abs(logits - logits[0]).max() > 0.1:
            raise RuntimeError(f"the {batch} copies of a prompt's cache differ")
        tokens = logits.argmax(-1)
        start = time.perf_counter()
        for _ in range(steps):
            tokens = self.step(tokens).argmax(-1)
        return time.perf_counter() - start

    def text(self, ids: np.ndarray, count: int, capacity: int) -> list[int]:
        text = [int(self.prefill(ids, 1, capacity).argmax())]
        while len(text) < count:
            text.append(int(self.step(np.array(text[-1:]))[0].argmax()))
        return text


class Ours(Stepping):
    """This project's runtime, with configuration entries for its session."""

    def __init__(
        self, bundle: Path, threads: int, session: Sequence[tuple[str, str]] = (), *, device: str = "cpu"
    ) -> None:
        from smallgpt.runtime import OrtGPT

        self.model = OrtGPT(
            bundle, device=device, threads=threads, verify=False, session=session, batch_invariant=False
        )

    def prefill(self, ids: np.ndarray, batch: int, capacity: int) -> np.ndarray:
        self.model.reserve(batch, capacity)
        logits: np.ndarray = self.model.fill(0, ids[None])[0]
        if batch > 1:
            self.model.select([0] * batch)
        return logits

    def step(self, tokens: np.ndarray) -> np.ndarray:
        return self.model.step(tokens)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        return self.model.logits(ids)


class LlamaCpp(Stepping):
    """llama.cpp through its C interface, as it is fastest here: every sequence has a cache of its own, and attention is
    tiled ("flash") where a prompt is timed, and is not where steps are."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self.lib, self.threads, self.context = llama_cpp, threads, None
        self.silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.silence, ctypes.c_void_p(0))
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {path}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.shape, self.tiled = (0, 0, False), False

    def first_token(self, ids: np.ndarray, capacity: int) -> float:
        self.tiled = True
        try:
            return super().first_token(ids, capacity)
        finally:
            self.tiled = False

    def prefill(self, ids: np.ndarray, batch: int, capacity: int) -> np.ndarray:
        lib, tokens = self.lib, len(ids)
        memory = self._start(batch, capacity)
        self._feed(ids, np.arange(tokens), np.zeros(tokens, np.int32), [tokens - 1])
        logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, tokens - 1), (self.vocab_size,))
        for row in range(1, batch):
            lib.llama_memory_seq_cp(memory, 0, row, -1, -1)
        self.position = tokens
        return logits

    def logits(self, ids: np.ndarray) -> np.ndarray:
        self._start(1, len(ids))
        self._feed(ids, np.arange(len(ids)), np.zeros(len(ids), np.int32), slice(None))
        return np.ctypeslib.as_array(self.lib.llama_get_logits(self.context), (len(ids), self.vocab_size))

    def step(self, tokens: np.ndarray) -> np.ndarray:
        batch = len(tokens)
        self._feed(tokens, self.position, self.rows[:batch], slice(None))
        self.position += 1
        logits = self.lib.llama_get_logits(self.context)
        return np.ctypeslib.as_array(logits, (batch, self.vocab_size))

    def _start(self, batch: int, capacity: int) -> Any:
        lib = self.lib
        if self.shape == (batch, capacity, self.tiled):
            memory = lib.llama_get_memory(self.context)
            lib.llama_memory_clear(memory, False)  # the cache is free again; what it held need not become zeros
            return memory
        if self.context:
            lib.llama_free(self.context)
        settings = lib.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_seq_max = capacity * batch, 2048, batch
        settings.n_threads = settings.n_threads_batch = self.threads
        settings.kv_unified = False
        settings.flash_attn_type = int(self.tiled)
        self.context = lib.llama_init_from_model(self.model, settings)
        self.batch = lib.llama_batch_init(2048, 0, 1)
        view = np.ctypeslib.as_array
        self.token, self.pos, self.wanted = (view(getattr(self.batch, n), (2048,)) for n in ("token", "pos", "logits"))
        self.sequence = [self.batch.seq_id[i] for i in range(2048)]
        view(self.batch.n_seq_id, (2048,))[:] = 1
        self.rows, self.last = np.arange(batch, dtype=np.int32), np.full(2048, -1, np.int32)
        self.shape = (batch, capacity, self.tiled)
        return lib.llama_get_memory(self.context)

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


class Generating(Engine):
    """An engine that decodes by itself and calls back as it does."""

    @abstractmethod
    def generate(self, ids: np.ndarray, batch: int, count: int, tick: Callable[[], object] | None = None) -> list[int]:
        """The first `count` ids after a prompt, for one of `batch` equal sequences; `tick` is called at each."""

    def first_token(self, ids: np.ndarray, capacity: int) -> float:
        start = time.perf_counter()
        self.generate(ids, 1, 1)
        return time.perf_counter() - start

    def decode(self, ids: np.ndarray, batch: int, steps: int, capacity: int) -> float:
        self.generate(ids, batch, 1 + steps)  # plans, or compiles for a cache of this size
        times: list[float] = []
        self.generate(ids, batch, 1 + steps, lambda: times.append(time.perf_counter()))
        if len(times) != 1 + steps:
            raise RuntimeError(f"{len(times)} tokens were told in place of {1 + steps}")
        return times[-1] - times[0]

    def text(self, ids: np.ndarray, count: int, capacity: int) -> list[int]:
        return self.generate(ids, 1, count)


class CTranslate2(Generating):
    """CTranslate2's generator; `kind` is its compute type."""

    def __init__(self, folder: Path, threads: int, kind: str) -> None:
        import ctranslate2

        self.model = ctranslate2.Generator(str(folder), compute_type=kind, intra_threads=threads, inter_threads=1)

    def generate(self, ids: np.ndarray, batch: int, count: int, tick: Callable[[], object] | None = None) -> list[int]:
        def told(result: Any) -> bool:
            if tick and result.batch_id == 0:
                tick()
            return False  # do not stop

        result = self.model.generate_batch(
            [self.names(ids)] * batch,
            max_length=count,
            min_length=count,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[],
            callback=told if tick else None,
        )
        return [int(i) for i in result[0].sequences_ids[0]]

    def logits(self, ids: np.ndarray) -> np.ndarray:
        return np.array(self.model.forward_batch([self.names(ids)]))[0]

    @staticmethod
    def names(ids: np.ndarray) -> list[str]:
        """Ids as the tokens of the stand-in vocabulary."""
        return [f"token{i}" for i in ids.tolist()]


class Streamer:
    """What Transformers hands the prompt to, then the ids of each step."""

    def __init__(self, tick: Callable[[], object]) -> None:
        self.tick, self.puts = tick, 0

    def put(self, ids: Any) -> None:
        self.puts += 1
        if self.puts > 1:
            self.tick()

    def end(self) -> None:
        pass


class Transformers(Generating):
    """Transformers' generate; `kind` is the precision. The cache has a fixed size and a step is compiled.

    On a CPU it compiles only when told to, by a field of its settings that is not documented, and with a C++ compiler.
    """

    def __init__(self, folder: Path, threads: int, kind: str, device: str = "cpu") -> None:
        import torch
        from transformers import AutoModelForCausalLM, CompileConfig

        self.torch = torch
        torch._dynamo.config.recompile_limit = 64  # a step is compiled for each length of the cache
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, kind)).eval().to(device)
        self.settings: dict[str, Any] = {}
        if device == "cuda":
            self.settings = {"cache_implementation": "static"}
        elif shutil.which("g++"):
            compiling = CompileConfig(mode="default", dynamic=False)
            compiling._compile_all_devices = True
            self.settings = {"cache_implementation": "static", "compile_config": compiling}

    def generate(self, ids: np.ndarray, batch: int, count: int, tick: Callable[[], object] | None = None) -> list[int]:
        prompts = self.torch.from_numpy(np.tile(ids, (batch, 1))).to(self.model.device)
        fixed = self.settings if count > 1 else {}  # with no step to follow a prompt is faster without
        settings = {**fixed, "max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        if tick:
            settings["streamer"] = Streamer(tick)
        mask = self.torch.ones_like(prompts)
        out = self.model.generate(prompts, attention_mask=mask, eos_token_id=None, pad_token_id=0, **settings)
        return [int(i) for i in out[0, len(ids) :].tolist()]

    def logits(self, ids: np.ndarray) -> np.ndarray:
        return self.model(self.torch.from_numpy(ids)[None]).logits[0].float().numpy()


class Genai(Engine):
    """onnxruntime-genai's generator on our graph, with a cache of fixed size in place; it takes the largest itself.

    Its session has the settings of ours, so that only what drives the graph differs.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime_genai

        from smallgpt.session import SCORES_BYTES, products_overflow

        described = json.loads((folder / "genai_config.json").read_text())["model"]
        heads, context = described["decoder"]["num_attention_heads"], described["context_length"]
        small = 4 * heads * context * context <= SCORES_BYTES
        os.environ.setdefault("ORT_GQA_DISABLE_FLASH_ATTENTION", str(int(small)))
        self.lib = onnxruntime_genai
        config = onnxruntime_genai.Config(str(folder))
        # Its own choice is half of the processors.
        entries = {
            "session.disable_quant_qdq": "1",
            "session.x64quantprecision": str(int(products_overflow())),
            "optimization.disable_specified_optimizers": "SkipLayerNormFusion",
        }
        options = {"session_options": {"intra_op_num_threads": threads, **entries}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self.model = onnxruntime_genai.Model(config)
        self.shape, self.generator = (0, 0), None

    def start(self, ids: np.ndarray, batch: int, capacity: int) -> Any:
        """A generator that has read a prompt for each of `batch` sequences and has not chosen their next token."""
        if self.shape == (batch, capacity):
            self.generator.rewind_to(0)
        else:
            settings = self.lib.GeneratorParams(self.model)
            settings.set_search_options(min_length=capacity, max_length=capacity, batch_size=batch, do_sample=False)
            self.generator, self.shape = self.lib.Generator(self.model, settings), (batch, capacity)
        self.generator.append_tokens(np.tile(ids.astype(np.int32), (batch, 1)))
        return self.generator

    def first_token(self, ids: np.ndarray, capacity: int) -> float:
        start = time.perf_counter()
        self.start(ids, 1, capacity).generate_next_token()
        return time.perf_counter() - start

    def decode(self, ids: np.ndarray, batch: int, steps: int, capacity: int) -> float:
        generator = self.start(ids, batch, capacity + 1)  # the last token, which nothing reads, counts too
        for _ in range(2):
            generator.generate_next_token()
        start = time.perf_counter()
        for _ in range(steps):
            generator.generate_next_token()
        return time.perf_counter() - start

    def text(self, ids: np.ndarray, count: int, capacity: int) -> list[int]:
        generator = self.start(ids, 1, capacity)
        for _ in range(count):
            generator.generate_next_token()
        return [int(i) for i in generator.get_sequence(0)[len(ids) :]]

    def logits(self, ids: np.ndarray) -> np.ndarray:
        rows = [self.start(ids[:1], 1, len(ids)).get_logits().ravel().copy()]
        for i in range(1, len(ids)):
            self.generator.append_tokens(ids[None, i : i + 1].astype(np.int32))
            rows.append(self.generator.get_logits().ravel().copy())
        return np.stack(rows)
