"""Files that are whole or absent."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import ROOT

from smallgpt.files import expand, replace_folder, sha256_bytes, sha256_file, to_csv, write_atomic, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_hashes(tmp_path: Path) -> None:
    assert sha256_bytes(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    data = bytes(range(256)) * 5000  # larger than one buffer
    (tmp_path / "file").write_bytes(data)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(data).hexdigest() == sha256_bytes(data)


def test_write_atomic_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_atomic(path, "é\r\n")
    assert path.read_bytes() == b"\xc3\xa9\r\n"
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert names(path.parent) == ["b.txt"]


def test_the_longest_name_is_written(tmp_path: Path) -> None:
    name = "é" * 127 + "x"  # 255 bytes
    write_atomic(tmp_path / name, "text")
    assert names(tmp_path) == [name]


def test_a_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"loss": 1.5})
    for value, error in (({"loss": float("nan")}, ValueError), ({"loss": {1, 2}}, TypeError)):
        with pytest.raises(error):
            write_json(path, value)
        with pytest.raises(UnicodeEncodeError):
            write_atomic(path, "\ud800")
        assert path.read_text() == '{\n  "loss": 1.5\n}\n'


def test_what_is_no_regular_file_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pipe.open("rb+", buffering=0) as reader:
        write_atomic(pipe, "a text")
        assert reader.read(6) == b"a text"
    assert pipe.is_fifo()
    assert names(tmp_path) == ["pipe"]


def test_a_home_that_is_nobodys_is_a_name() -> None:
    assert expand("~nobody-has-this-name/x") == Path("~nobody-has-this-name/x")
    assert expand("~/x") == Path.home() / "x"


def test_json_keeps_text_readable_and_floats_exact(tmp_path: Path) -> None:
    value = {"name": "Zoë 🐈", "third": 1 / 3, "list": [1, None]}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert "Zoë 🐈" in text
    assert text.endswith("}\n")
    assert json.loads(text) == value


def test_csv() -> None:
    rows = [{"step": 1, "loss": 0.1 + 0.2, "note": "a, b"}, {"step": 2, "loss": 1e-9, "note": ""}]
    assert to_csv(rows) == 'step,loss,note\n1,0.30000000000000004,"a, b"\n2,1e-09,\n'
    assert to_csv([]) == ""
    with pytest.raises(ValueError, match="extra"):
        to_csv([{"step": 1}, {"step": 2, "extra": 3}])


def test_replace_folder_swaps_the_whole_folder(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    for generation in ("one", "two"):
        with replace_folder(folder) as temporary:
            assert names(temporary) == []
            (temporary / generation).write_text(generation)
    assert names(folder) == ["two"]
    assert names(folder.parent) == ["model"]


def test_a_write_that_fails_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    code = f"""
import resource
from pathlib import Path
from smallgpt.cli import run
from smallgpt.files import write_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))  # as on a full disk, the error of the write names no file
run(lambda: write_atomic(Path({str(tmp_path / "a.json")!r}), "new" * 10))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == f"error: {tmp_path / 'a.json'}: file too large; name another path\n"
    assert done.returncode == 2
    assert names(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_names_that_begin_alike_do_not_share_a_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    monkeypatch.setattr(Path, "replace", lambda self, target: written.append(self))
    for seed in (1, 2):
        write_atomic(tmp_path / f"{'stories-25m-temperature-0.80-' * 3}seed-{seed}.json", "text")
    assert len(set(written)) == 2


def test_replace_folder_keeps_the_old_one_on_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        with replace_folder(tmp_path / "model") as temporary:
            (temporary / "half").touch()
            raise RuntimeError("stop")

    with replace_folder(tmp_path / "model") as temporary:
        (temporary / "whole").touch()
    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["whole"]


def test_what_a_kill_left_behind_is_swept_away(tmp_path: Path) -> None:
    for leftover in (".model.tmp", ".model.old", "model"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "junk").touch()
    with replace_folder(tmp_path / "model") as temporary:
        assert names(temporary) == []
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == []
