"""Files that are either whole or absent, and their hashes."""

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sha256_bytes(data: bytes) -> str:
    """Hex digest of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def decode_utf8(data: bytes, name: str) -> str:
    """Text of the file `name`, or ValueError with the line and the offset of the first byte that is no UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"{name} line {line_of(data, error.start)}, byte {error.start}"
        raise ValueError(f"{place}: 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8") from None


def decode_text(data: bytes, name: str) -> str:
    """Text of a corpus file `name`: UTF-8 without its byte order mark, with LF line ends; else ValueError."""
    text = decode_utf8(data, name)
    if (start := data.find(b"\0")) >= 0:
        raise ValueError(f"{name} line {line_of(data, start)}, byte {start}: a NUL byte; save the file as UTF-8 text")
    return to_lf(text.removeprefix("\ufeff"))


def to_lf(text: str) -> str:
    """The text with LF line ends."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def line_of(data: bytes, offset: int) -> int:
    """Number of the line, from 1, in which the byte at `offset` stands."""
    return len(re.findall(rb"\r\n|\r|\n", data[:offset])) + 1


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one, never a part.

    What is there and no regular file, as /dev/null or a pipe, is written to and stays what it is.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        path.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name that is as long as may be has room for no more; others may begin in the same way.
    temporary = path.with_name(f".{path.name[:50]}.{sha256_bytes(os.fsencode(path.name))[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk names none
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with a final newline; NaN and infinity raise ValueError."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def to_csv(rows: list[dict[str, Any]]) -> str:
    """Rows with the keys of the first one as a header; floats keep their shortest exact form."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def expand(path: str) -> Path:
    """A path whose leading `~` is a home folder; where it names nobody's, it stays as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (Path.expanduser raises there)


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty sibling folder that takes the place of `folder` when the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (folder.with_name(f".{folder.name}.{end}") for end in ("tmp", "old"))
    if old.exists() and not folder.exists():
        old.rename(folder)  # an earlier call was killed between the two renames below
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
