"""Bundles for serving, each with a certificate: what its graph computes, measured against PyTorch on real text."""

import ast
import base64
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smallgpt.bundle import CERTIFICATE, GENERATION, MODEL, TOKENIZER, BundleConfig, write_config
from smallgpt.checkpoint import load_checkpoint
from smallgpt.cli import MismatchError
from smallgpt.config import ExportConfig
from smallgpt.files import replace_folder, sha256_bytes, sha256_file, write_atomic, write_json
from smallgpt.graph import build_graph
from smallgpt.model import SmallGPT
from smallgpt.runtime import OrtGPT, check_golden
from smallgpt.sampling import GenerationConfig
from smallgpt.tokenizer import Tokenizer
from smallgpt.tokens import TokenFile

log = logging.getLogger(__name__)

BATCHES = (1, 2, 5)
DECODE_STEPS = 32
GREEDY_PROMPTS, GREEDY_PROMPT_TOKENS, GREEDY_TOKENS = 5, 8, 64
LARGEST_GRAPH = 2**31 - 2**20  # bytes of one protobuf file


@dataclass(frozen=True)
class Limits:
    """What a certificate must keep; differences are absolute and of logits, unless said."""

    max_difference: float
    mean_difference: float
    bits_per_byte_difference: float  # relative
    greedy_gap: float  # where the greedy texts part, how much PyTorch prefers its own token


@dataclass(frozen=True)
class Variant:
    """One kind of bundle."""

    dtype: str
    devices: tuple[str, ...]
    limits: Limits


VARIANTS = {
    "fp32": Variant("float32", ("cpu",), Limits(1e-3, 1e-4, 1e-4, 1e-3)),
    # Half precision has 11 bits: logits around 10 are rounded by up to 0.004 in the last layer alone.
    "fp16": Variant("float16", ("cuda",), Limits(0.25, 0.025, 1e-3, 0.05)),
}


def export(
    model_dir: Path, tokens: Path, config: ExportConfig, generation: GenerationConfig, *, out: Path, report: Path
) -> dict[str, dict[str, Any]]:
    """Write `out/<variant>/` for each of config.variants, all or nothing, and the main figures to `report`.

    The certificates use the first config.certificate_tokens tokens of the test split in the folder `tokens`, or of
    valid where there is no test. Returns the figures by variant.

    Raises:
        FileNotFoundError: the model folder, its tokenizer or the token files are missing.
        MismatchError: the tokens were not made with the model's tokenizer.
        ValueError: a certificate fails (names the check, its value and the limit), or the model is above 2 GB.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    model = SmallGPT.from_pretrained(model_dir)
    if model.tokenizer is None:
        raise FileNotFoundError(f"{model_dir / TOKENIZER} does not exist; the train stage writes it")
    if model.num_parameters() * 4 > LARGEST_GRAPH:
        raise ValueError(f"{model_dir} has {model.num_parameters():,} parameters; one ONNX file holds 2 GB")
    split = "test" if (tokens / "test.bin").is_file() else "valid"
    text = TokenFile.load(tokens, split)
    if text.tokenizer_sha256 != model.tokenizer.sha256:
        raise MismatchError(f"{tokens} was not made with the tokenizer of {model_dir}; run the tokenize stage again")
    ids = text.ids[: config.certificate_tokens + 1].astype(np.int64)
    figures: dict[str, dict[str, Any]] = {}
    with replace_folder(out) as folder:
        for name in config.variants:
            settings = write_bundle(folder / name, name, model, model_dir, generation)
            served = OrtGPT(folder / name, device="cpu", threads=config.threads, verify=False)
            certificate = certify(served, model, model.tokenizer, ids)
            certificate["text"] = {"split": split, "tokens": len(ids) - 1, "sha256": sha256_bytes(ids.tobytes())}
            write_json(folder / name / CERTIFICATE, certificate)
            write_config(folder / name, settings)  # now with the certificate's hash
            check_golden(OrtGPT(folder / name, device="cpu", threads=config.threads))
            graph = folder / name / MODEL
            figures[name] = {**certificate["figures"], "bytes": graph.stat().st_size, "sha256": sha256_file(graph)}
            log.info("%s: certified, largest difference of logits %.2g", name, figures[name]["max_difference"])
    write_json(report, figures)
    return figures


def write_bundle(
    folder: Path, name: str, model: SmallGPT, model_dir: Path, generation: GenerationConfig
) -> BundleConfig:
    """Write a bundle that still lacks its certificate, and return the content of its config.json."""
    variant, config = VARIANTS[name], model.config
    weights = {key: tensor.float().numpy() for key, tensor in model.state_dict().items()}
    rope = None if config.architecture == "gpt2" else (model.cos.numpy(), model.sin.numpy())
    graph = build_graph(weights, config, dtype=variant.dtype, rope=rope)
    write_atomic(folder / MODEL, graph.SerializeToString(deterministic=True))
    shutil.copyfile(model_dir / TOKENIZER, folder / TOKENIZER)
    write_json(folder / GENERATION, generation.to_dict())
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    settings = BundleConfig(
        variant=name,
        devices=list(variant.devices),
        dtype=variant.dtype,
        model=config.model_dump(exclude={"dropout"})
        | {"num_kv_heads": config.kv_heads, "ffn_dim": config.hidden_dim, "head_dim": config.head_dim},
        ids={key: getattr(tokenizer, f"{key}_id") for key in ("pad", "unk", "bos", "eos")},
        inputs=[value.name for value in graph.graph.input],
        outputs=[value.name for value in graph.graph.output],
        lineage={
            "model": sha256_file(model_dir / "model.safetensors"),
            "data": load_checkpoint(model_dir).lineage.get("data_sha256"),
            "tokenizer": tokenizer.sha256,
            "library": library_hashes(),
        },
    )
    write_config(folder, settings)
    return settings


def library_hashes() -> dict[str, str]:
    """sha256 of this file and of every file of the library that it imports, directly or not."""
    folder = Path(__file__).parent
    pending, hashes = [Path(__file__).stem], dict[str, str]()
    while pending:
        name = pending.pop()
        source = (folder / f"{name}.py").read_bytes()
        hashes[f"smallgpt/{name}.py"] = sha256_bytes(source)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("smallgpt."):
                imported = node.module.split(".")[1]
                pending += [imported] if f"smallgpt/{imported}.py" not in hashes else []
    return dict(sorted(hashes.items()))


@torch.inference_mode()
def certify(served: OrtGPT, model: SmallGPT, tokenizer: Tokenizer, ids: np.ndarray) -> dict[str, Any]:
    """Compare a bundle with the model on the text `ids` (N,) and return the certificate.

    Logits are compared over the whole text in windows of the context; for the batches of BATCHES through a prefill of
    prompts of different lengths and DECODE_STEPS single tokens up to the end of the context; and for one context cut
    into pieces. Then come greedy texts, bits per byte, and golden logits for machines without PyTorch.
    Raises ValueError, naming the check, its value and its limit, when a limit is broken.
    """
    name = served.bundle.config.variant
    limits = VARIANTS[name].limits
    scores, differences = _compare_text(served, model, tokenizer, ids)
    differences |= _compare_batches(served, model, ids) | {"cuts": _compare_cuts(served, model, ids)}
    splits = _compare_greedy(served, model, tokenizer, ids)
    figures = {
        "max_difference": float(np.max([part["max"] for part in differences.values()])),
        "mean_difference": float(np.max([part["mean"] for part in differences.values()])),
        "greedy_gap": max([split["gap"] for split in splits], default=0.0),
        "greedy_splits": len(splits),
        **scores,
    }
    for check, limit in asdict(limits).items():
        if not figures[check] <= limit:  # also when it is NaN
            raise ValueError(
                f"the certificate of {name} fails: {check} is {figures[check]:.3g}, the limit is {limit:g}; "
                "the exported graph does not compute what PyTorch does"
            )
    return {
        "variant": name,
        "limits": asdict(limits),
        "figures": figures,
        "differences": differences,
        "greedy_splits": splits,
        "versions": {package: _version(package) for package in ("torch", "onnx", "onnxruntime", "numpy")},
        "sha256": {
            MODEL: sha256_file(served.bundle.graph),
            "model.safetensors": served.bundle.config.lineage["model"],
            TOKENIZER: tokenizer.sha256,
        },
        "golden": list(_golden(model, ids)),
    }


class _Difference:
    """Largest and mean absolute difference of logits, collected over many arrays."""

    def __init__(self) -> None:
        self.largest, self.total, self.count = 0.0, 0.0, 0

    def add(self, expected: np.ndarray, actual: np.ndarray) -> None:
        difference = np.abs(expected - actual, dtype=np.float64)
        self.largest = float(np.maximum(self.largest, difference.max()))  # NaN stays
        self.total += float(difference.sum())
        self.count += difference.size

    def to_dict(self) -> dict[str, float]:
        return {"max": _rounded(self.largest), "mean": _rounded(self.total / self.count), "logits": self.count}


def _torch_logits(model: SmallGPT, ids: np.ndarray) -> np.ndarray:
    logits: np.ndarray = model(torch.from_numpy(ids[None]))[0][0].float().numpy()
    return logits  # (T, V)


def _excerpt(ids: np.ndarray, start: int, length: int) -> np.ndarray:
    """`length` ids from `start` on; a short text is read again from its beginning."""
    return ids.take(np.arange(start, start + length), mode="wrap")


def _compare_text(
    served: OrtGPT, model: SmallGPT, tokenizer: Tokenizer, ids: np.ndarray
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    context = served.max_seq_len
    difference, same, nats = _Difference(), 0, np.zeros(2)
    for start in range(0, len(ids) - 1, context):
        window = ids[start : start + context + 1]
        expected, actual = _torch_logits(model, window[:-1]), served.logits(window[:-1])
        difference.add(expected, actual)
        same += int((expected.argmax(-1) == actual.argmax(-1)).sum())
        nats += [_nats(expected, window[1:]), _nats(actual, window[1:])]
    text_bytes = sum(len(tokenizer.token_bytes[i]) for i in ids[1:])
    of_torch, of_onnx = (float(value) / math.log(2) / text_bytes for value in nats)
    scores = {
        "top1_agreement": _rounded(same / (len(ids) - 1)),
        "bits_per_byte_torch": of_torch,
        "bits_per_byte_onnx": of_onnx,
        "bits_per_byte_difference": _rounded(abs(of_onnx / of_torch - 1)),
    }
    return scores, {"text": difference.to_dict()}


def _nats(logits: np.ndarray, targets: np.ndarray) -> float:
    """Sum of -ln p of the targets (T,) under the logits (T, V)."""
    exact = logits.astype(np.float64)
    top = exact.max(-1)
    return float((np.log(np.exp(exact - top[:, None]).sum(-1)) + top - exact[np.arange(len(targets)), targets]).sum())


def _compare_batches(served: OrtGPT, model: SmallGPT, ids: np.ndarray) -> dict[str, dict[str, float]]:
    """Ragged prompts, the longest of which ends DECODE_STEPS before the end of the context, and then those steps."""
    context = served.max_seq_len
    steps = min(DECODE_STEPS, context - 1)
    result = {}
    for batch in BATCHES:
        lengths = np.linspace(context - steps, 1, batch).astype(np.int64)
        rows = np.stack([_excerpt(ids, i * context, context) for i in range(batch)])
        expected = np.stack(
            [
                _torch_logits(model, row[: length + steps])[length - 1 :]
                for row, length in zip(rows, lengths, strict=True)
            ]
        )  # (B, steps + 1, V)
        prefill, decode = _Difference(), _Difference()
        prefill.add(expected[:, 0], served.prefill(rows[:, : lengths.max()], lengths))
        for step in range(steps):
            decode.add(expected[:, step + 1], served.step(rows[np.arange(batch), lengths + step]))
        result[f"batch_{batch}_prefill"] = prefill.to_dict()
        result[f"batch_{batch}_decode"] = decode.to_dict()
    return result


def _compare_cuts(served: OrtGPT, model: SmallGPT, ids: np.ndarray) -> dict[str, float]:
    """One whole context, fed in two pieces or in many."""
    context = served.max_seq_len
    row = _excerpt(ids, 0, context)
    expected, difference = _torch_logits(model, row), _Difference()
    cuts: list[Sequence[int]] = [(1,), (context // 2,), (context - 1,), range(37, context, 37)]
    for cut in cuts:
        difference.add(expected, served.logits(row, cut))
    return difference.to_dict()


def _compare_greedy(
    served: OrtGPT, model: SmallGPT, tokenizer: Tokenizer, ids: np.ndarray
) -> list[dict[str, int | float]]:
    """Where PyTorch would not have chosen the token that the bundle chose, in the bundle's own greedy texts."""
    context = served.max_seq_len
    start = min(GREEDY_PROMPT_TOKENS, context // 2)
    banned = list(tokenizer.banned_ids)
    prompts = np.stack([_excerpt(ids, i * context, start) for i in range(GREEDY_PROMPTS)])
    texts, logits = prompts, served.prefill(prompts)
    for _ in range(min(GREEDY_TOKENS, context - start)):
        logits[:, banned] = -np.inf
        texts = np.concatenate([texts, logits.argmax(-1)[:, None]], axis=1)
        logits = served.step(texts[:, -1])
    splits: list[dict[str, int | float]] = []
    for i, row in enumerate(texts):
        expected = _torch_logits(model, row)[start - 1 : -1]
        expected[:, banned] = -np.inf
        gaps = expected.max(-1) - expected[np.arange(len(row) - start), row[start:]]
        splits += [{"prompt": i, "position": int(j), "gap": _rounded(gaps[j])} for j in np.flatnonzero(gaps)]
    return splits


def _golden(model: SmallGPT, ids: np.ndarray) -> Iterator[dict[str, Any]]:
    """PyTorch's logits after short, longer and context-long excerpts, for `check_golden`."""
    context = model.config.max_seq_len
    for length in (1, min(16, context), context):
        row = _excerpt(ids, length, length)
        logits = _torch_logits(model, row)[-1].astype("<f4")
        yield {"ids": row.tolist(), "logits": base64.b64encode(logits.tobytes()).decode("ascii")}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _version(package: str) -> str:
    """Installed version; ONNX Runtime has one of two names."""
    try:
        return version(package)
    except PackageNotFoundError:
        return version(f"{package}-gpu")
