"""The text: every source, exact splits, overlaps, bad input, and downloads from a server that misbehaves."""

import hashlib
import io
import json
import logging
import math
import os
import random
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from smallgpt import corpus
from smallgpt.config import PrepareConfig
from smallgpt.corpus import overlap, prepare, read_documents, read_splits
from smallgpt.download import download
from smallgpt.stories import generate_stories
from stages.prepare import main as run_stage

ROOT = Path(__file__).parent.parent
CUT = 3 << 16  # bytes before a connection breaks
LINES = "".join(f"line {number} of the text\n" for number in range(100))


def run_prepare(folder: Path, source: Path | str, **values: Any) -> dict[str, Any]:
    config = PrepareConfig(source=str(source), **values)
    return prepare(config, out=folder / "prepared", report=folder / "prepare.json")


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_one_text_is_cut_by_characters(tmp_path: Path) -> None:
    text = "".join(random.Random(1).choices("ab \né中", k=1003))
    (tmp_path / "my.txt").write_bytes(text.encode())
    report = run_prepare(tmp_path, tmp_path / "my.txt", valid_fraction=0.1, test_fraction=0.0)
    assert list(read_splits(tmp_path / "prepared")) == ["train", "valid"]
    # the convention: train = text[:int(0.9 * n)]
    assert (tmp_path / "prepared" / "train.txt").read_bytes() == text[:902].encode()
    assert (tmp_path / "prepared" / "valid.txt").read_bytes() == text[902:].encode()
    assert read_documents(tmp_path / "prepared", "valid") == [text[902:]]
    assert report["train"]["characters"] == 902
    assert report["train"]["bytes"] == len(text[:902].encode())
    assert (report["source"], report["layout"]) == ("my.txt", "txt")
    with pytest.raises(FileNotFoundError, match=r"prepared has no test\.jsonl or test\.txt; run the stage prepare"):
        read_documents(tmp_path / "prepared", "test")
    with pytest.raises(FileNotFoundError, match=r"nowhere has no train\.jsonl or train\.txt; run the stage prepare"):
        read_splits(tmp_path / "nowhere")


@pytest.mark.parametrize("length", [1000, 1_115_394, 999])
def test_fractions_are_exact(length: int) -> None:
    cuts = corpus._cuts(length, PrepareConfig(valid_fraction=0.05, test_fraction=0.05))
    assert [cuts[split].stop for split in corpus.SPLITS] == [length * 90 // 100, length * 95 // 100, length]
    cuts = corpus._cuts(length, PrepareConfig(valid_fraction=0.1, test_fraction=0.0))
    assert [cuts[split].stop for split in ("train", "valid")] == [int(length * 0.9), length]


def test_report_measures_each_split(tmp_path: Path) -> None:
    texts = ["one two\nthree\n", "vier fünf", "six  \n\n seven", "eight"]
    report = run_prepare(tmp_path, write_jsonl(tmp_path / "a.jsonl", texts), valid_fraction=0.25, test_fraction=0.25)
    train = (tmp_path / "prepared" / "train.jsonl").read_bytes()
    assert train == '{"text": "one two\\nthree\\n"}\n{"text": "vier fünf"}\n'.encode()
    assert report["train"] == {
        "documents": 2,
        "lines": 3,
        "words": 5,
        "characters": 23,
        "bytes": 24,
        "sha256": hashlib.sha256(train).hexdigest(),
    }
    assert report["valid"]["lines"] == 3
    assert report["valid"]["share_of_lines_in_train"] == 0.0
    assert report["valid"]["share_of_windows_in_train"] is None
    assert json.loads((tmp_path / "prepare.json").read_text()) == report


def test_jsonl_is_split_by_document(tmp_path: Path) -> None:
    texts = [f"document {number}\u2028with\x85odd\tspace é😀" for number in range(40)]
    report = run_prepare(tmp_path, write_jsonl(tmp_path / "a.jsonl", texts))
    assert [report[split]["documents"] for split in corpus.SPLITS] == [36, 2, 2]
    read = [document for split in corpus.SPLITS for document in read_documents(tmp_path / "prepared", split)]
    assert read == texts
    assert report["layout"] == "jsonl"


def test_folder_of_files_is_read_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "b.txt").write_text("second\nbook\n")
    write_jsonl(folder / "c.jsonl", ["third", " \n", "fourth"])
    (folder / "a.TXT").write_text("first")
    (folder / "._a.txt").write_bytes(b"\xff")
    (folder / "notes.md").write_text("not a document")
    report = run_prepare(tmp_path, folder, valid_fraction=0.25, test_fraction=0.25)
    documents = [read_documents(tmp_path / "prepared", split) for split in corpus.SPLITS]
    assert documents == [["first", "second\nbook\n"], ["third"], ["fourth"]]
    assert report["source"] == "books"


@pytest.mark.parametrize(
    ("train", "valid", "test"),
    [
        ("train.txt", "valid.txt", "test.txt"),
        ("train.txt", "validation.txt", None),
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("Train.txt", "Valid.TXT", "TEST.txt"),
    ],
)
def test_given_splits_are_honoured(tmp_path: Path, train: str, valid: str, test: str | None) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    names = {"train": train, "valid": valid, **({"test": test} if test else {})}
    for split, name in names.items():
        (folder / name).write_text(f"\n the {split} text\n")
    report = run_prepare(tmp_path, folder)
    assert list(read_splits(tmp_path / "prepared")) == list(names)
    for split in names:
        assert (tmp_path / "prepared" / f"{split}.txt").read_text() == f"\n the {split} text\n"
        assert report[split]["documents"] == 1


def test_files_whose_names_only_begin_like_splits_are_one_text(tmp_path: Path) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    for name in ("testament.txt", "trains and boats.txt", "value.txt", "test.txt.txt"):
        (folder / name).write_text(f"the text of {name}\n" * 3)
    report = run_prepare(tmp_path, folder, valid_fraction=0.25, test_fraction=0.25)
    assert report["train"]["documents"] == 2


def test_a_path_is_never_taken_for_a_source_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "stories").mkdir()
    (tmp_path / "stories" / "a.txt").write_text(LINES)
    assert run_prepare(tmp_path, tmp_path / "stories")["source"] == "own-stories"


def test_given_splits_may_have_documents(tmp_path: Path) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ["a", "b"])
    write_jsonl(folder / "val.jsonl", ["c"])
    assert run_prepare(tmp_path, folder)["layout"] == "jsonl"
    assert read_documents(tmp_path / "prepared", "train") == ["a", "b"]
    assert read_documents(tmp_path / "prepared", "valid") == ["c"]


def test_stories_come_with_their_floor(tmp_path: Path) -> None:
    report = run_prepare(tmp_path, "stories", stories_bytes=100_000, seed=3)
    stories = list(generate_stories(seed=3, target_bytes=100_000))
    start = 0
    for split in corpus.SPLITS:
        part = stories[start : start + report[split]["documents"]]
        start += len(part)
        assert read_documents(tmp_path / "prepared", split) == [story.text for story in part]
        nats = math.fsum(story.nats for story in part)
        assert report[split]["floor_nats"] == pytest.approx(nats, abs=1e-6)
        size = sum(len(story.text.encode()) for story in part)
        assert report[split]["bytes"] == size
        assert report[split]["floor_bits_per_byte"] == pytest.approx(nats / math.log(2) / size, abs=1e-9)
    assert start == len(stories)
    first = contents(tmp_path)
    run_prepare(tmp_path, "stories", stories_bytes=100_000, seed=3)
    assert contents(tmp_path) == first
    run_prepare(tmp_path, "stories", stories_bytes=100_000, seed=4)
    assert contents(tmp_path) != first


def test_newlines_and_byte_order_mark_are_normalised(tmp_path: Path) -> None:
    (tmp_path / "unix.txt").write_bytes(LINES.encode())
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode())
    (tmp_path / "mac.txt").write_bytes(LINES.replace("\n", "\r").encode())
    reports = [run_prepare(tmp_path, tmp_path / f"{name}.txt") for name in ("unix", "dos", "mac")]
    assert [report["train"] for report in reports] == [reports[0]["train"]] * 3
    assert (tmp_path / "prepared" / "train.txt").read_text() == LINES[: len(LINES) * 9 // 10]
    write_jsonl(tmp_path / "a.jsonl", ["a\r\nb\rc", "d", "e", "f"])
    run_prepare(tmp_path, tmp_path / "a.jsonl", valid_fraction=0.25, test_fraction=0.25)
    assert read_documents(tmp_path / "prepared", "train") == ["a\nb\nc", "d"]


def test_the_stage_says_that_dvc_does_not_watch_a_source(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMALLGPT_TRACKING", "off")
    Path("my.txt").write_text(LINES)
    Path("mine.yaml").write_text("prepare:\n  source: my.txt\n")
    Path("grammar.yaml").write_text("prepare:\n  stories_bytes: 20000\n")
    with caplog.at_level(logging.INFO):
        run_stage("mine.yaml")
    assert "train 1,791 bytes in 1 document(s), valid 99 bytes in 1" in caplog.messages[-2]
    assert "DVC does not watch my.txt" in caplog.messages[-1]
    assert "dvc repro -f prepare" in caplog.messages[-1]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        run_stage("grammar.yaml")
    assert "DVC" not in caplog.text


def test_overlap_of_known_shares() -> None:
    train = ["a line\nanother\n", "x" * 60]
    assert overlap(train, ["a line\nnew\n \n\nanother", "a line"]) == {
        "share_of_lines_in_train": 0.75,
        "share_of_windows_in_train": None,
    }
    # 50 + 11 windows: the first document has one of its 50 in train, the second all of its 11
    body = "".join(map(chr, range(0x100, 0x100 + 99)))
    shares = overlap([body[:50], "x" * 70], [body, "x" * 60])
    assert shares["share_of_windows_in_train"] == round(12 / 61, 6)


def test_windows_do_not_cross_documents() -> None:
    text = "".join(map(chr, range(0x100, 0x100 + 80)))
    assert overlap([text], [text[:49], text[49:]])["share_of_windows_in_train"] is None
    assert overlap([text[:49], text[49:]], [text])["share_of_windows_in_train"] == 0.0


def test_windows_are_found_across_chunks() -> None:
    text = "".join(map(chr, random.Random(2).choices(range(0x100, 0x4000), k=70_000)))
    assert overlap([text], [text[65_460:65_610]])["share_of_windows_in_train"] == 1.0


def test_windows_agree_with_a_plain_search() -> None:
    source = random.Random(7)
    passages = ["".join(source.choices("abc é\n", k=source.randrange(20, 200))) for _ in range(60)]
    train = ["".join(source.choices(passages, k=30)) for _ in range(40)]  # more than one chunk of hashes
    split = ["".join(source.choices(passages, k=5)) + "new" * 30 for _ in range(20)]
    assert sum(map(len, train)) > 1 << 16
    windows = [document[i : i + 50] for document in split for i in range(len(document) - 49)]
    known = {document[i : i + 50] for document in train for i in range(len(document) - 49)}
    share = sum(window in known for window in windows) / len(windows)
    assert 0.2 < share < 0.8
    assert overlap(train, split)["share_of_windows_in_train"] == round(share, 6)


BAD_FILES = [
    ("a.txt", b"", "a.txt is empty or only white space"),
    ("a.txt", b" \n\t\r\n", "a.txt is empty or only white space"),
    ("a.txt", b"caf\xc3\xa9\r\nok\rcaf\xe9\n", "a.txt line 3, byte 13: 0xe9 is not UTF-8"),
    ("a.txt", b"cut \xe4\xb8", "a.txt line 1, byte 4: 0xe4 is not UTF-8"),
    ("a.txt", b"one\ntwo\0\n", "a.txt line 2, byte 7: a NUL byte"),
    (
        "a.txt",
        b"x",
        "a.txt is too short: its train split would be empty; add text or change prepare.valid_fraction 0.05",
    ),
    ("a.txt", b"text" + b"\n" * 100, "a.txt is too short: its valid split would be empty"),
    ("a.jsonl", b'{"text": "a"}\n' * 9, "a.jsonl is too short: its valid split would be empty"),
    ("a.jsonl", b'{"text": " "}\n', "a.jsonl is empty or only white space"),
    ("a.jsonl", b'{"text": "a"}\n\n{"txt": "b"}\n', 'a.jsonl line 3: no string under "text"'),
    ("a.jsonl", b'{"text": 5}\n', 'a.jsonl line 1: no string under "text"'),
    ("a.jsonl", b'["text"]\n', 'a.jsonl line 1: no string under "text"'),
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl line 2: not JSON (Expecting value)"),
    ("a.jsonl", b"[" * 100_000, "a.jsonl line 1: not JSON (RecursionError)"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b \\ud800 c"}\n', "a.jsonl line 2: \\ud800, a NUL or a lone surrogate"),
    ("a.jsonl", b'{"text": "a\\u0000"}\n', "a.jsonl line 1: \\u0000, a NUL or a lone surrogate"),
]


@pytest.mark.parametrize(("name", "data", "message"), BAD_FILES)
def test_bad_text_names_the_place_and_spoils_nothing(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / "good.txt").write_text(LINES)
    run_prepare(tmp_path, tmp_path / "good.txt")
    before = contents(tmp_path)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        run_prepare(tmp_path, tmp_path / name)
    assert f"{tmp_path}/{message}" in str(caught.value)
    (tmp_path / name).unlink()
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "given has no .txt or .jsonl file"),
        (["notes.md"], "given has no .txt or .jsonl file"),
        (["train.txt", "test.txt"], "given has test.txt, train.txt, but given splits need train and valid"),
        (["train.txt", "val.txt", "validation.txt"], "has val.txt and validation.txt for one split"),
        (["train_0.jsonl", "test_0.jsonl"], "has test_0.jsonl, train_0.jsonl, which seem to be splits but would be"),
        (["train.a.txt", "Dev.txt"], "has Dev.txt, train.a.txt, which seem to be splits but would be read as one text"),
    ],
)
def test_bad_folders(tmp_path: Path, files: list[str], message: str) -> None:
    (tmp_path / "given").mkdir()
    for name in files:
        (tmp_path / "given" / name).write_text("text")
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        run_prepare(tmp_path, tmp_path / "given")
    assert message in str(caught.value)


def test_a_given_split_without_text(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("text")
    (tmp_path / "valid.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"valid\.txt is empty or only white space"):
        run_prepare(tmp_path, tmp_path)


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        run_prepare(tmp_path, "shakespear")
    assert str(caught.value) == (
        "prepare.source is shakespear: no such file or folder, and none of stories, shakespeare, wikitext2"
    )
    with pytest.raises(FileNotFoundError, match=r"prepare\.source is ~nobody-has-this-name/x\.txt: no such file"):
        run_prepare(tmp_path, "~nobody-has-this-name/x.txt")


STAGE = """
import encodings.utf_32_le, os  # a codec is read from disk on first use: the other user may not see root's Python
from smallgpt.cli import run
from stages.prepare import main
if os.geteuid() == 0:  # root may write and read everywhere
    os.setgid(65534)
    os.setuid(65534)
run(main)
"""


@pytest.mark.parametrize("locked", ["data", "reports", "my.txt"])
def test_no_permission_is_one_line_and_spoils_nothing(tmp_path: Path, locked: str) -> None:
    site = tmp_path / "site"
    for name in ("data/prepared", "reports"):
        (site / name).mkdir(parents=True)
        (site / name).chmod(0o777)
    (site / "data").chmod(0o777)
    (site / "data" / "prepared" / "train.txt").write_text("earlier")
    (site / "reports" / "prepare.json").write_text("{}")
    (site / "my.txt").write_text(LINES)
    (site / "params.yaml").write_text("prepare:\n  source: my.txt\n")
    before = contents(site)
    (site / locked).chmod(0o555 if (site / locked).is_dir() else 0o000)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", STAGE]
    result = subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True, check=False)
    (site / locked).chmod(0o777)
    assert result.returncode == 2, result.stderr
    [last] = result.stderr.splitlines()
    assert last.startswith(f"error: {locked}")
    assert last.endswith(": permission denied; give this user access to it or name another place")
    assert contents(site) == before


def test_stage_writes_the_default_paths(tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_text(LINES)
    (tmp_path / "params.yaml").write_text("prepare:\n  source: my.txt\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "stages.prepare"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == ""
    assert read_documents(tmp_path / "data" / "prepared", "train") == [LINES[: len(LINES) * 9 // 10]]
    assert json.loads((tmp_path / "reports" / "prepare.json").read_text())["source"] == "my.txt"


class Server(ThreadingHTTPServer):
    """Serves `body`; `faults` are used up one a request, then it behaves. `ranges` records what was asked."""

    def __init__(self, body: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.faults = body, list[str]()
        self.honours_ranges = True
        self.ranges: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/file.bin"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked, body = self.headers["Range"], self.server.body
        self.server.ranges.append(asked)
        fault = self.server.faults.pop(0) if self.server.faults else ""
        start = int(asked[6:-1]) if asked and self.server.honours_ranges else 0
        if fault.isdigit() or start >= len(body):
            self.send_error(int(fault or 416))
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = CUT if fault == "cut" else len(body)
        self.wfile.write(body[start:end])
        self.close_connection = True

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server(random.Random(5).randbytes(300_000)) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def test_download_is_kept(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "cache" / "file.bin"
    for _ in range(2):
        assert download(server.url, target, checksum=sha256(server.body)) == target
    assert contents(tmp_path) == {"cache/file.bin": server.body}
    assert server.ranges == [None]
    target.write_bytes(b"changed")
    with pytest.raises(
        ValueError, match=f"file.bin has sha256 {sha256(b'changed')[7:]}, not .*; remove it to download"
    ):
        download(server.url, target, checksum=sha256(server.body))
    assert target.read_bytes() == b"changed"


def test_download_resumes_where_it_broke_off(server: Server, tmp_path: Path) -> None:
    server.faults = ["cut", "503"]
    target = tmp_path / "file.bin"
    download(server.url, target, checksum=sha256(server.body), backoff=0)
    assert server.ranges == [None, "bytes=196608-", "bytes=196608-"]
    assert contents(tmp_path) == {"file.bin": server.body}


def test_download_resumes_the_part_of_an_earlier_run(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(server.body[:1234])
    md5 = f"md5:{hashlib.md5(server.body).hexdigest()}"
    download(server.url, tmp_path / "file.bin", checksum=md5)
    assert server.ranges == ["bytes=1234-"]
    assert contents(tmp_path) == {"file.bin": server.body}


def test_download_starts_over_when_ranges_are_ignored(server: Server, tmp_path: Path) -> None:
    server.faults, server.honours_ranges = ["cut"], False
    download(server.url, tmp_path / "file.bin", checksum=sha256(server.body), backoff=0)
    assert server.ranges == [None, "bytes=196608-"]
    assert contents(tmp_path) == {"file.bin": server.body}


def test_download_starts_over_when_the_part_is_too_long(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(server.body + b"more")
    download(server.url, tmp_path / "file.bin", checksum=sha256(server.body))
    assert server.ranges == ["bytes=300004-", None]
    assert contents(tmp_path) == {"file.bin": server.body}


def test_download_of_other_bytes_leaves_nothing(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        download(server.url, tmp_path / "file.bin", checksum=sha256(b"what was published"))
    assert f"has {sha256(server.body).replace(':', ' ')}, not {sha256(b'what was published')[7:]}" in str(caught.value)
    assert contents(tmp_path) == {}


def test_download_that_keeps_breaking_keeps_its_part(server: Server, tmp_path: Path) -> None:
    server.faults = ["cut", "500", "500"]
    with pytest.raises(OSError, match=r"cannot download .* \(HTTP 500\); fetch it by hand"):
        download(server.url, tmp_path / "file.bin", checksum=sha256(server.body), attempts=3, backoff=0)
    assert contents(tmp_path) == {"file.bin.part": server.body[:CUT]}


def test_a_missing_page_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    server.faults = ["404"]
    with pytest.raises(OSError, match=r"^[^\n]+$") as caught:
        download(server.url, tmp_path / "file.bin", checksum=sha256(server.body))
    by_hand = f"fetch it by hand where there is a network and save it as {tmp_path / 'file.bin'}"
    assert str(caught.value) == f"cannot download {server.url} (HTTP 404); {by_hand}"
    assert server.ranges == [None]


def test_no_network_says_what_to_fetch_by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server(b"") as closed:
        url = closed.url
    with pytest.raises(OSError, match=r"^[^\n]+$") as caught:
        download(url, tmp_path / "file.bin", checksum="md5:0", attempts=2, backoff=0)
    by_hand = f"fetch it by hand where there is a network and save it as {tmp_path / 'file.bin'}"
    assert str(caught.value) == f"cannot download {url} (ConnectionError); {by_hand}"


def wikitext(seed: int) -> bytes:
    words = random.Random(seed).choices(["the", "<unk>", "@-@", ","], k=300)
    return f" \n = Title {seed} = \n \n {' '.join(words)} \n".encode()


@pytest.fixture
def published(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, bytes]:
    """The server stands for the publishers': both named sources with stand-in texts and their checksums."""
    texts = {split: wikitext(number) for number, split in enumerate(corpus.SPLITS)}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for split, text in texts.items():
            archive.writestr(f"wikitext-2/wiki.{split}.tokens", text)
    server.body = buffer.getvalue()
    md5 = f"md5:{hashlib.md5(server.body).hexdigest()}"
    monkeypatch.setitem(corpus.DOWNLOADS, "wikitext2", (server.url, md5, "wikitext-2-v1.zip"))
    for split in corpus.WIKITEXT2_CHECKSUMS:
        monkeypatch.setitem(corpus.WIKITEXT2_CHECKSUMS, split, sha256(texts[split]))
    monkeypatch.setenv("SMALLGPT_DATA_DIR", str(tmp_path / "cache"))
    return texts


def test_wikitext2_comes_from_the_zip(published: dict[str, bytes], server: Server, tmp_path: Path) -> None:
    for _ in range(2):
        report = run_prepare(tmp_path, "wikitext2")
        assert contents(tmp_path / "prepared") == {f"{split}.txt": text for split, text in published.items()}
    assert report["valid"]["sha256"] == corpus.WIKITEXT2_CHECKSUMS["valid"][7:]
    assert len(server.ranges) == 1
    assert list(contents(tmp_path / "cache")) == ["wikitext-2-v1.zip"]


@pytest.mark.parametrize("name", ["{}.txt", "wiki.{}.tokens"])
def test_wikitext2_may_lie_there_already(
    published: dict[str, bytes], server: Server, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "cache" / "wikitext-2"
    folder.mkdir(parents=True)
    for split, text in published.items():
        (folder / name.format(split)).write_bytes(text)
    run_prepare(tmp_path, "wikitext2")
    assert contents(tmp_path / "prepared") == {f"{split}.txt": text for split, text in published.items()}
    assert server.ranges == []
    (folder / name.format("test")).write_bytes(b"another text\n")
    with pytest.raises(ValueError, match=f"has {sha256(b'another text' + bytes([10])).replace(':', ' ')}, not"):
        run_prepare(tmp_path, "wikitext2")


def test_shakespeare_is_checked(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server.body = LINES.encode()
    monkeypatch.setenv("SMALLGPT_DATA_DIR", str(tmp_path / "cache"))
    _, checksum, name = corpus.DOWNLOADS["shakespeare"]
    monkeypatch.setitem(corpus.DOWNLOADS, "shakespeare", (server.url, checksum, name))
    with pytest.raises(ValueError, match=f"{checksum[7:]}; try again, or fetch it by hand and save it as"):
        run_prepare(tmp_path, "shakespeare")
    monkeypatch.setitem(corpus.DOWNLOADS, "shakespeare", (server.url, sha256(server.body), name))
    run_prepare(tmp_path, "shakespeare", valid_fraction=0.1, test_fraction=0.0)
    assert read_documents(tmp_path / "prepared", "valid") == [LINES[-len(LINES) // 10 :]]


def test_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    monkeypatch.delenv("SMALLGPT_DATA_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert corpus.data_dir() == Path("/home/anna/.cache/smallgpt")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch/cache")
    assert corpus.data_dir() == Path("/scratch/cache/smallgpt")
    monkeypatch.setenv("SMALLGPT_DATA_DIR", "~/texts")
    assert corpus.data_dir() == Path("/home/anna/texts")


@pytest.mark.slow
def test_command_line_writes_sources_as_files(
    published: dict[str, bytes], server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "shakespeare.txt").write_text(LINES)
    monkeypatch.setitem(corpus.DOWNLOADS, "shakespeare", (server.url, sha256(LINES.encode()), "shakespeare.txt"))
    for arguments in (
        ["shakespeare"],
        ["shakespeare", "--out", "my/shakespeare.jsonl"],
        ["wikitext2"],
        ["stories"],
        ["stories", "--out", "my/stories.txt"],
    ):
        monkeypatch.setattr(sys, "argv", ["corpus", *arguments])
        corpus.main()
    assert (tmp_path / "data" / "shakespeare.txt").read_text() == LINES
    assert json.loads((tmp_path / "my" / "shakespeare.jsonl").read_text()) == {"text": LINES}
    assert contents(tmp_path / "data" / "wikitext2") == {f"{split}.txt": text for split, text in published.items()}
    default = PrepareConfig()
    stories = [story.text for story in generate_stories(seed=default.seed, target_bytes=default.stories_bytes)]
    lines = (tmp_path / "data" / "stories.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == stories
    assert (tmp_path / "my" / "stories.txt").read_text() == "\n\n".join(stories)
