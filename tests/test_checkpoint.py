"""Model folders: the same bytes twice, and nothing damaged or foreign is loaded."""

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from smallgpt.checkpoint import load_checkpoint, read_tensors, save_checkpoint, write_tensors
from smallgpt.cli import MismatchError
from smallgpt.model import SmallGPT
from smallgpt.tokenizer import Tokenizer, train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
ONE_LINE = r"^[^\n]+$"


@pytest.fixture
def folder(project: Path, tmp_path: Path) -> Path:
    """A copy of the model folder, to be damaged."""
    return Path(shutil.copytree(project / "models/gpt", tmp_path / "gpt"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def test_round_trip(model: SmallGPT, tokenizer: Tokenizer, tmp_path: Path) -> None:
    lineage = {"tokenizer_sha256": tokenizer.sha256, "data_sha256": {"train": "00"}, "step": 3}
    for name in ("a", "b"):
        save_checkpoint(tmp_path / name, model.config, model.state_dict(), lineage, tokenizer, last=model.state_dict())
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert list(contents(tmp_path / "a")) == [
        *("config.json", "last.safetensors"),
        *("model.safetensors", "tokenizer.model"),
    ]
    loaded = load_checkpoint(tmp_path / "a")
    assert loaded.config == model.config
    assert loaded.lineage == lineage
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.sha256 == tokenizer.sha256
    assert loaded.weights.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.weights[name], value)
        assert loaded.weights[name].dtype == value.dtype


def test_save_pretrained_and_back(model: SmallGPT, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "gpt")
    again = SmallGPT.from_pretrained(tmp_path / "gpt")
    assert not again.training
    ids = torch.arange(20)[None]
    assert torch.equal(again(ids)[0], model(ids)[0])
    again.save_pretrained(tmp_path / "gpt")  # over itself
    assert torch.equal(SmallGPT.from_pretrained(str(tmp_path / "gpt"))(ids)[0], model(ids)[0])


def test_the_last_weights_load_by_name(models: dict[str, SmallGPT], tmp_path: Path) -> None:
    model = models["gpt2"]
    last = {name: value + 1 for name, value in model.state_dict().items()}
    save_checkpoint(tmp_path / "gpt", model.config, model.state_dict(), {}, None, last=last)
    assert torch.equal(SmallGPT.from_pretrained(tmp_path / "gpt").wte.weight, model.wte.weight)
    loaded = SmallGPT.from_pretrained(tmp_path / "gpt", weights="last.safetensors")
    assert torch.equal(loaded.wte.weight, model.wte.weight + 1)
    assert loaded.tokenizer is None


def test_tensor_files_keep_dtypes_and_views(tmp_path: Path) -> None:
    base = torch.arange(12, dtype=torch.float64).view(3, 4)
    tensors = {"t": base.T, "row": base[1], "half": torch.tensor([1.5], dtype=torch.bfloat16), "step": torch.tensor(7)}
    write_tensors(tmp_path / "x.safetensors", tensors)
    loaded = read_tensors(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(loaded[name], value)
        assert loaded[name].dtype == value.dtype
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-1])
    with pytest.raises(MismatchError, match=r"x\.safetensors is damaged"):
        read_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist; the train stage writes it"):
        load_checkpoint(folder)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_weights(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(MismatchError, match=ONE_LINE) as error:
        SmallGPT.from_pretrained(folder)
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize("place", [0.0, 0.001, 0.01, 0.02, 0.5, 0.99])
def test_a_flipped_bit_in_the_weights(folder: Path, place: float) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 4
    path.write_bytes(data)
    with pytest.raises(MismatchError, match=ONE_LINE) as error:
        SmallGPT.from_pretrained(folder)
    assert "model.safetensors" in str(error.value)


def test_weights_of_another_shape(folder: Path, models: dict[str, SmallGPT]) -> None:
    edit(folder, lambda values: values["model"].update(num_layers=3))
    with pytest.raises(MismatchError, match=ONE_LINE):
        SmallGPT.from_pretrained(folder)
    edit(folder, lambda values: (values["model"].update(num_layers=2), values.pop("sha256")))
    save_file(models["gpt2"].state_dict(), folder / "model.safetensors")
    with pytest.raises(MismatchError, match=ONE_LINE):
        SmallGPT.from_pretrained(folder)


def test_a_foreign_tokenizer(folder: Path, corpus: dict[str, list[str]]) -> None:
    (folder / "tokenizer.model").write_bytes(train_tokenizer(corpus["valid"], vocab_size=320))
    with pytest.raises(MismatchError, match=r"is not the tokenizer the model was trained with"):
        load_checkpoint(folder)
    edit(folder, lambda values: values.update(tokenizer_sha256=5))
    with pytest.raises(MismatchError, match=r"config\.json says 5\)"):
        load_checkpoint(folder)
    (folder / "tokenizer.model").write_bytes(b"junk")
    with pytest.raises(MismatchError, match=ONE_LINE):
        load_checkpoint(folder)
    (folder / "tokenizer.model").unlink()
    assert load_checkpoint(folder).tokenizer is None


def test_a_newer_format(folder: Path) -> None:
    edit(folder, lambda values: values.update(format=2))
    with pytest.raises(MismatchError, match="has format 2; this smallgpt reads up to 1: upgrade it"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("format"),
        lambda values: values.pop("model"),
        lambda values: values.update(format="new"),
        lambda values: values["model"].update(num_heads=3),
        lambda values: values["model"].update(embed_dim="wide", colour="red"),
    ],
)
def test_a_configuration_that_is_none(folder: Path, change: Callable[[dict], object]) -> None:
    edit(folder, change)
    with pytest.raises(MismatchError, match=ONE_LINE) as error:
        load_checkpoint(folder)
    assert "config.json is no model configuration" in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\ufeff{}"])
def test_a_configuration_that_is_no_json_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(MismatchError, match=r"config\.json is no model configuration"):
        load_checkpoint(folder)


def test_no_pickle_anywhere() -> None:
    """Loading a file never runs code: no pickle, no torch.load or torch.save, no numpy object arrays."""
    banned_modules = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
    banned_calls = {("torch", "load"), ("torch", "save"), ("np", "load"), ("numpy", "load"), ("torch.jit", "load")}
    files = [*(ROOT / "smallgpt").glob("*.py"), *(ROOT / "stages").glob("*.py")]
    assert len(files) > 15
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                assert name.split(".")[0] not in banned_modules, file
                assert tuple(name.rsplit(".", 1)) not in banned_calls, file
            if isinstance(node, ast.Attribute):
                assert (ast.unparse(node.value), node.attr) not in banned_calls, f"{file}:{node.lineno}"
            if isinstance(node, ast.keyword):
                assert node.arg not in ("allow_pickle", "weights_only"), f"{file}:{node.lineno}"
