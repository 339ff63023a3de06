"""Bundles for serving: the graph in one precision or another, certified, with all that it needs to run."""

import ast
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smallgpt.bundle import CERTIFICATE, GENERATION, MODEL, TOKENIZER, BundleConfig, write_config
from smallgpt.certificate import Limits, certify
from smallgpt.checkpoint import load_checkpoint
from smallgpt.cli import MismatchError
from smallgpt.config import ExportConfig
from smallgpt.files import replace_folder, sha256_bytes, sha256_file, write_atomic, write_json
from smallgpt.graph import build_graph
from smallgpt.model import SmallGPT
from smallgpt.quantize import quantize_weights
from smallgpt.runtime import OrtGPT, check_golden
from smallgpt.sampling import GenerationConfig
from smallgpt.tokenizer import Tokenizer
from smallgpt.tokens import TokenFile

log = logging.getLogger(__name__)

LARGEST_GRAPH = 2**31 - 2**20  # bytes of one protobuf file
CALIBRATION_TOKENS = 32_768  # of the train split
HEADROOM = 2.0  # of an int8 cache's steps over the largest key and value of a sample (docs/experiments.md)


@dataclass(frozen=True)
class Variant:
    """One kind of bundle."""

    dtype: str
    devices: tuple[str, ...]
    limits: Limits
    bits: int | None = None  # of the quantised matrices
    small_cache: bool = False  # int8 in place of dtype


VARIANTS = {
    "fp32": Variant("float32", ("cpu",), Limits(1e-3, 1e-4, 1e-4, 1e-3)),
    # Rounded weights and inputs move every logit; what counts is the bits per byte, and few tokens tell it less well.
    "int8": Variant("float32", ("cpu",), Limits(2.0, 0.1, 2e-3, 2.0, 4e-3), bits=8),
    "int4": Variant("float32", ("cpu",), Limits(6.0, 0.5, 5e-3, 8.0, 1e-2), bits=4),
    "fp32-kv8": Variant("float32", ("cpu",), Limits(0.5, 0.05, 1e-4, 0.5, 1e-3), small_cache=True),
    "int8-kv8": Variant("float32", ("cpu",), Limits(2.0, 0.1, 2e-3, 2.0, 4e-3), bits=8, small_cache=True),
    "int4-kv8": Variant("float32", ("cpu",), Limits(6.0, 0.5, 5e-3, 8.0, 1e-2), bits=4, small_cache=True),
    # Half precision has 11 bits: logits around 10 are rounded by up to 0.004 in the last layer alone.
    "fp16": Variant("float16", ("cuda",), Limits(0.25, 0.025, 1e-3, 0.05)),
}


def export(
    model_dir: Path, tokens: Path, config: ExportConfig, generation: GenerationConfig, *, out: Path, report: Path
) -> dict[str, dict[str, Any]]:
    """Write `out/<variant>/` for each of config.variants, all or nothing, and the main figures to `report`.

    The certificates use the first config.certificate_tokens tokens of the test split in the folder `tokens`, or of
    valid where there is no test; 4-bit weights and int8 caches are fitted to the first CALIBRATION_TOKENS of train.
    Returns the figures by variant.

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
    ids = _read_ids(tokens, split, config.certificate_tokens + 1, model)
    moments, scales = {}, []
    chosen = [VARIANTS[name] for name in config.variants]
    if any(variant.bits == 4 for variant in chosen):
        moments = second_moments(model, _read_ids(tokens, "train", CALIBRATION_TOKENS, model))
    if any(variant.small_cache for variant in chosen):
        scales = cache_scales(model, _read_ids(tokens, "train", CALIBRATION_TOKENS, model))
    figures: dict[str, dict[str, Any]] = {}
    with replace_folder(out) as folder:
        for name in config.variants:
            settings = write_bundle(folder / name, name, model, model_dir, generation, moments, scales)
            served = OrtGPT(folder / name, device="cpu", threads=config.threads, verify=False)
            certificate = certify(served, model, model.tokenizer, ids, VARIANTS[name].limits)
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
    folder: Path,
    name: str,
    model: SmallGPT,
    model_dir: Path,
    generation: GenerationConfig,
    moments: Mapping[str, np.ndarray],
    scales: Sequence[tuple[np.ndarray, np.ndarray]] = (),
) -> BundleConfig:
    """Write a bundle that still lacks its certificate, and return the content of its config.json."""
    variant, config = VARIANTS[name], model.config
    weights: Any = {key: tensor.float().numpy() for key, tensor in model.state_dict().items()}
    if variant.bits is not None:
        weights = quantize_weights(weights, variant.bits, moments)
    rope = None if config.architecture == "gpt2" else (model.cos.numpy(), model.sin.numpy())
    small = scales if variant.small_cache else None
    graph = build_graph(weights, config, dtype=variant.dtype, rope=rope, cache_scales=small)
    write_atomic(folder / MODEL, graph.SerializeToString(deterministic=True))
    shutil.copyfile(model_dir / TOKENIZER, folder / TOKENIZER)
    write_json(folder / GENERATION, generation.to_dict())
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    settings = BundleConfig(
        variant=name,
        devices=list(variant.devices),
        dtype="int8" if small else variant.dtype,
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


def _read_ids(tokens: Path, split: str, count: int, model: SmallGPT) -> np.ndarray:
    """The first ids of a split, made with the model's tokenizer."""
    file = TokenFile.load(tokens, split)
    assert model.tokenizer is not None
    if file.tokenizer_sha256 != model.tokenizer.sha256:
        raise MismatchError(
            f"{tokens / split}.bin was not made with the model's tokenizer; run the tokenize stage again"
        )
    return file.ids[:count].astype(np.int64)


@torch.inference_mode()
def second_moments(model: SmallGPT, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Mean of x x^T over the inputs x of every linear layer on the text `ids` (N,): (K, K) by the weight's name."""
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor]], None]:
        def add(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            x = inputs[0].flatten(0, -2)  # (T, K)
            sums[name] = x.T @ x + sums.get(name, 0.0)

        return add

    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    hooks = [module.register_forward_pre_hook(watch(f"{name}.weight")) for name, module in layers.items()]
    for window in torch.from_numpy(ids).split(model.config.max_seq_len):
        model(window[None])
    for hook in hooks:
        hook.remove()
    return {name: (total / len(ids)).numpy() for name, total in sums.items()}


@torch.inference_mode()
def cache_scales(model: SmallGPT, ids: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Steps of an int8 cache, of keys and values (kv_heads, head_dim) a layer.

    They reach HEADROOM times as far as the largest ones of the text `ids` (N,): other texts have larger ones, and to
    cut those off costs more than coarser steps.
    """
    windows = torch.from_numpy(ids).split(model.config.max_seq_len)
    shape = (model.config.num_layers, 2, model.config.kv_heads, model.config.head_dim)
    largest = torch.full(shape, torch.finfo(torch.float32).tiny)
    for window in windows:
        cache = model(window[None])[1]
        found = [torch.stack([part[0].abs().amax(1) for part in layer]) for layer in cache]
        largest = torch.maximum(largest, torch.stack(found))
    return [(key, value) for key, value in (largest * HEADROOM / 127).numpy()]


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
