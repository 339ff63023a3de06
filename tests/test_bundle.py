import json
from pathlib import Path

import pytest

from smallgpt.bundle import FILES, SHAPE, BundleConfig, load_bundle, write_config
from smallgpt.cli import MismatchError
from smallgpt.files import sha256_file, write_json

CONFIG = BundleConfig(
    variant="fp32",
    devices=["cpu"],
    dtype="float32",
    model=dict.fromkeys(SHAPE, 8),
    ids={"eos": 3},
    inputs=["input_ids"],
    outputs=["logits"],
    lineage={"model": "0" * 64},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.onnx").write_bytes(b"graph")
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    write_json(tmp_path / "generation_config.json", {"temperature": 0.5, "stop": ["\n"]})
    write_json(tmp_path / "parity.json", {"limits": {}})
    write_config(tmp_path, CONFIG)
    return tmp_path


def edit(folder: Path, **changes: object) -> None:
    write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | changes)


def test_a_bundle_reads_back_as_written(folder: Path) -> None:
    bundle = load_bundle(folder)
    assert bundle.config == CONFIG
    assert bundle.graph.read_bytes() == b"graph"
    assert bundle.tokenizer.read_bytes() == b"pieces"
    assert (bundle.generation.temperature, bundle.generation.stop) == (0.5, ("\n",))
    assert bundle.certificate() == {"limits": {}}
    (folder / "generation_config.json").unlink()  # a server does not read it again
    assert bundle.generation.temperature == 0.5
    write_json(folder / "generation_config.json", {"temperature": 0.5, "stop": ["\n"]})
    written = json.loads((folder / "config.json").read_text())
    assert written["contract"] == 3
    assert written["files"] == {name: sha256_file(folder / name) for name in FILES}


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_named(folder: Path, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(MismatchError, match=rf"{name} does not have the sha256 in config\.json"):
        load_bundle(folder)
    load_bundle(folder, verify=False)


@pytest.mark.parametrize("name", [*FILES, "config.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    expected = FileNotFoundError if name == "config.json" else MismatchError
    with pytest.raises(expected, match=f"{name} does not exist"):
        load_bundle(folder)


def test_a_model_folder_is_no_bundle(folder: Path) -> None:
    write_json(folder / "config.json", {"format": 1, "model": {}})
    with pytest.raises(MismatchError, match="is a model folder; name a bundle made from it"):
        load_bundle(folder)


def test_a_newer_contract_says_upgrade(folder: Path) -> None:
    edit(folder, contract=4, something_new=[])
    with pytest.raises(MismatchError, match="has contract 4, this smallgpt reads 3; upgrade smallgpt"):
        load_bundle(folder)


@pytest.mark.parametrize("contract", [None, 2, "3", True])
def test_other_contracts_are_refused(folder: Path, contract: object) -> None:
    edit(folder, contract=contract)
    with pytest.raises(MismatchError, match=rf"contract is {contract!r}, not 3"):
        load_bundle(folder)


def test_damaged_settings_are_refused(folder: Path) -> None:
    for hashes in (None, ["model.onnx"]):
        edit(folder, files=hashes)
        with pytest.raises(MismatchError, match="files is no object of hashes"):
            load_bundle(folder)
    edit(folder, files={}, extra=1)
    with pytest.raises(MismatchError, match="unexpected keyword argument 'extra'"):
        load_bundle(folder)
    write_config(folder, CONFIG)
    edit(folder, devices="cpu", model={})
    with pytest.raises(MismatchError, match="damaged: devices is no list; export"):
        load_bundle(folder)
    for width in (None, "8", 0, True):
        edit(folder, devices=["cpu"], model=CONFIG.model | {"head_dim": width})
        with pytest.raises(MismatchError, match=r"damaged: model\.head_dim is no positive number; export"):
            load_bundle(folder)
    write_json(folder / "config.json", {"contract": 3, "variant": "fp32"})
    with pytest.raises(MismatchError, match="missing 7 required keyword-only arguments"):
        load_bundle(folder)
    for text in ("{", "[]", "\udcff"):
        (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(MismatchError, match=r"config\.json is damaged") as caught:
            load_bundle(folder)
        assert "\n" not in str(caught.value)
