"""The export folder's contract: what a bundle holds, and how it is read and checked.

A bundle is a folder with `model.onnx`, `tokenizer.model`, `generation_config.json` (defaults), `parity.json` (the
certificate) and `config.json`, which names the contract's version, the devices, the shape, the graph's inputs and
outputs, where everything came from, and the sha256 of every other file.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_origin

from smallgpt.cli import MismatchError
from smallgpt.files import sha256_file, write_json
from smallgpt.sampling import GenerationConfig

CONTRACT = 3
CONFIG, MODEL, TOKENIZER = "config.json", "model.onnx", "tokenizer.model"
GENERATION, CERTIFICATE = "generation_config.json", "parity.json"
FILES = (MODEL, TOKENIZER, GENERATION, CERTIFICATE)
SHAPE = ("vocab_size", "max_seq_len", "num_layers", "num_heads", "num_kv_heads", "head_dim")  # of config.json's model


@dataclass(frozen=True, kw_only=True)
class BundleConfig:
    """The content of config.json, less the contract's version and the hashes of the files."""

    variant: str
    devices: list[str]  # the devices the graph has kernels for, of "cpu" and "cuda"
    dtype: str  # of the cache: "float32", "float16" or "int8"
    model: dict[str, Any]  # architecture, vocab_size, max_seq_len, num_layers, num_kv_heads, head_dim, ...
    ids: dict[str, int]  # pad, unk, bos, eos
    inputs: list[str]
    outputs: list[str]
    lineage: dict[str, Any]  # sha256 of model, data, tokenizer and of the library's files


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk."""

    folder: Path
    config: BundleConfig
    generation: GenerationConfig  # the defaults it was exported with

    @property
    def graph(self) -> Path:
        """The ONNX file."""
        return self.folder / MODEL

    @property
    def tokenizer(self) -> Path:
        """The SentencePiece model."""
        return self.folder / TOKENIZER

    def certificate(self) -> dict[str, Any]:
        """What the export measured against PyTorch."""
        return _read_json(self.folder / CERTIFICATE)


def write_config(folder: Path, config: BundleConfig) -> None:
    """Write config.json with the hashes of those bundle files that are already in `folder`."""
    hashes = {name: sha256_file(folder / name) for name in FILES if (folder / name).is_file()}
    write_json(folder / CONFIG, {"contract": CONTRACT, **asdict(config), "files": hashes})


def load_bundle(folder: str | Path, *, verify: bool = True) -> Bundle:
    """Read a bundle's config.json and, unless told not to, compare every file with its hash.

    Raises:
        FileNotFoundError: the folder or its config.json is missing.
        MismatchError: another file is missing or was changed, the contract is newer than this library, config.json is
            damaged, or the folder holds a model and no bundle.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder / CONFIG} does not exist; name a bundle such as exports/fp32, or export one")
    values = _read_json(folder / CONFIG)
    if "format" in values and "contract" not in values:
        raise MismatchError(f"{folder} is a model folder; name a bundle made from it, such as exports/fp32")
    contract = values.pop("contract", None)
    if type(contract) is int and contract > CONTRACT:
        raise MismatchError(f"{folder} has contract {contract}, this smallgpt reads {CONTRACT}; upgrade smallgpt")
    if type(contract) is not int or contract != CONTRACT:
        raise MismatchError(f"{folder / CONFIG}: contract is {contract!r}, not {CONTRACT}; export the bundle again")
    hashes = values.pop("files", {})
    if not isinstance(hashes, dict):
        raise MismatchError(f"{folder / CONFIG} is damaged: files is no object of hashes; export the bundle again")
    try:
        config = BundleConfig(**values)
        _check_types(config)
    except TypeError as error:
        message = str(error).removeprefix("BundleConfig.__init__() ")
        raise MismatchError(f"{folder / CONFIG} is damaged: {message}; export the bundle again") from None
    for name in FILES if verify else ():
        path = folder / name
        if not path.is_file():
            raise MismatchError(f"{path} does not exist; the bundle is not whole, copy or export it again")
        if sha256_file(path) != hashes.get(name):
            raise MismatchError(
                f"{path} does not have the sha256 in {CONFIG}: it was changed or cut short; copy it again"
            )
    return Bundle(folder, config, GenerationConfig.from_dict(_read_json(folder / GENERATION)))


def _check_types(config: BundleConfig) -> None:
    """Raise TypeError where config.json, which has no hash, was edited into what no export writes."""
    for field in fields(config):
        kind: Any = get_origin(field.type) or field.type
        if not isinstance(getattr(config, field.name), kind):
            raise TypeError(f"{field.name} is no {kind.__name__}")
    for key in SHAPE:
        if type(config.model.get(key)) is not int or config.model[key] < 1:
            raise TypeError(f"model.{key} is no positive number")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MismatchError(f"{path} is damaged: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise MismatchError(f"{path} is damaged: it holds no JSON object")
    return values
