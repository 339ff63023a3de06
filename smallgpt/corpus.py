"""The text: its sources, checked downloads, splits, and how much of valid and test already stands in train.

`python -m smallgpt.corpus shakespeare` writes data/shakespeare.txt, for use by path.
"""

import argparse
import json
import logging
import math
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from smallgpt.cli import run
from smallgpt.config import PrepareConfig
from smallgpt.download import download, verify
from smallgpt.files import decode_text, expand, replace_folder, sha256_bytes, to_lf, write_atomic, write_json
from smallgpt.stories import generate_stories

log = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
WINDOW = 50  # characters
_SPLIT_FILE = re.compile(r"(?:wiki\.)?(train|valid|validation|val|test)\.(?:txt|jsonl|tokens|raw)")
_SPLIT_LIKE = re.compile(r"(train|val|valid|validation|dev|test)(?![a-z]).*\.(?:txt|jsonl)")

# Source: address, checksum, name in the data folder.
DOWNLOADS = {
    "shakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        "shakespeare.txt",
    ),
    "wikitext2": (
        "https://wikitext.smerity.com/wikitext-2-v1.zip",
        "md5:542ccefacc6c27f945fb54453812b3cd",
        "wikitext-2-v1.zip",
    ),
}
SOURCES = ("stories", *DOWNLOADS)
WIKITEXT2_CHECKSUMS = {
    "valid": "sha256:f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    "test": "sha256:d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
}


@dataclass(frozen=True)
class Corpus:
    """The documents of each split in file order, and -log P of a split in nats where the source knows it."""

    splits: dict[str, list[str]]
    nats: dict[str, float] = field(default_factory=dict)


def prepare(config: PrepareConfig, *, out: Path, report: Path) -> dict[str, Any]:
    """Write the splits to `out` and their measurements to `report`; both stay as they were when anything fails.

    `out` gets {split}.txt where every split is one document, else {split}.jsonl with {"text": ...} a line. The report
    has a dict for each split: documents, lines, words (between white space), characters, bytes of text, sha256 of the
    split's file; for valid and test the shares of their lines and windows that stand in train; for stories the floor.

    Raises:
        ValueError, FileNotFoundError, OSError: one line that names the file and the place in it.
    """
    corpus = load_corpus(config)
    layout = "txt" if all(len(documents) == 1 for documents in corpus.splits.values()) else "jsonl"
    path = Path(config.source)
    # The base name only: an absolute path would make the report differ from machine to machine.
    name = path.name or path.resolve().name
    if name in SOURCES and config.source not in SOURCES:
        name = f"own-{name}"  # results must not take it for that source
    result: dict[str, Any] = {"source": name, "layout": layout}
    with replace_folder(out) as folder:
        for split, documents in corpus.splits.items():
            data = "".join(documents) if layout == "txt" else "".join(map(_json_line, documents))
            write_atomic(folder / f"{split}.{layout}", data)
            result[split] = _measure(documents) | {"sha256": sha256_bytes(data.encode())}
            if split != "train":
                result[split] |= overlap(corpus.splits["train"], documents)
            if split in corpus.nats:
                # Rounded, so that another libm's last bit does not change the file.
                result[split]["floor_nats"] = round(corpus.nats[split], 6)
                bits = corpus.nats[split] / math.log(2)
                result[split]["floor_bits_per_byte"] = round(bits / result[split]["bytes"], 9)
        write_json(report, result)
    sizes = [f"{s} {result[s]['bytes']:,} bytes in {result[s]['documents']:,} document(s)" for s in corpus.splits]
    log.info("prepared %s from %s: %s", out, config.source, ", ".join(sizes))
    return result


def read_splits(folder: Path) -> dict[str, list[str]]:
    """The documents of train, valid and, where the corpus has one, test, each as `read_documents` gives them."""
    splits = [split for split in SPLITS if split != "test" or any(folder.glob("test.*"))]
    return {split: read_documents(folder, split) for split in splits}


def read_documents(folder: Path, split: str) -> list[str]:
    """Documents of one split of a prepared folder, exactly as they were written.

    Raises:
        FileNotFoundError: the split is not there.
    """
    if (lines := folder / f"{split}.jsonl").is_file():
        return [json.loads(line)["text"] for line in lines.read_bytes().decode().split("\n") if line]
    if (text := folder / f"{split}.txt").is_file():
        return [text.read_bytes().decode()]
    raise FileNotFoundError(
        f"{folder} has no {split}.jsonl or {split}.txt; run the stage prepare first: dvc repro prepare"
    )


def load_corpus(config: PrepareConfig) -> Corpus:
    """Read the configured source and split it: as the source says, else contiguously in file order.

    Fractions count documents; a corpus of one document is cut by characters, as karpathy's 90/10 of Tiny Shakespeare.

    Raises:
        ValueError, FileNotFoundError, OSError: as in `prepare`.
    """
    source, path = config.source, expand(config.source)
    nats: list[float] = []
    if source == "stories":
        stories = list(generate_stories(seed=config.seed, target_bytes=config.stories_bytes))
        documents, nats = [story.text for story in stories], [story.nats for story in stories]
    elif source == "shakespeare":
        documents = _read(_downloaded(source, data_dir()))
    elif source == "wikitext2":
        return Corpus(_wikitext2(data_dir()))
    elif path.exists():
        if path.is_dir() and (given := _split_files(path)):
            return Corpus({split: _read(file) for split, file in given.items()})
        documents = [document for file in _text_files(path) for document in _read(file)]
    else:
        raise FileNotFoundError(f"prepare.source is {source}: no such file or folder, and none of {', '.join(SOURCES)}")
    text = documents[0] if len(documents) == 1 else None
    cuts = _cuts(len(documents) if text is None else len(text), config)
    splits = {split: documents[part] if text is None else [text[part]] for split, part in cuts.items()}
    for split, part in splits.items():
        if not any(document.strip() for document in part):
            raise ValueError(
                f"{source} is too short: its {split} split would be empty; add text or change "
                f"prepare.valid_fraction {config.valid_fraction} and prepare.test_fraction {config.test_fraction}"
            )
    return Corpus(splits, {split: math.fsum(nats[part]) for split, part in cuts.items()} if nats else {})


def _cuts(length: int, config: PrepareConfig) -> dict[str, slice]:
    """Contiguous parts; by exact fractions, because 1 - 0.05 - 0.05 in floats is below 0.9."""
    valid, test = Fraction(str(config.valid_fraction)), Fraction(str(config.test_fraction))
    first, second = int(length * (1 - valid - test)), int(length * (1 - test))
    cuts = {"train": slice(first), "valid": slice(first, second), "test": slice(second, length)}
    return {split: part for split, part in cuts.items() if split != "test" or test}


def _split_files(folder: Path | zipfile.Path) -> dict[str, Any]:
    """Files of a folder that name their split: train, valid (or validation, val), test; none of them is no error."""
    found: dict[str, Path | zipfile.Path] = {}
    for file in folder.iterdir():
        if match := _SPLIT_FILE.fullmatch(file.name.lower()):
            split = "valid" if match[1].startswith("val") else match[1]
            if split in found:
                names = " and ".join(sorted((found[split].name, file.name)))
                raise ValueError(f"{folder} has {names} for one split; remove one of them")
            found[split] = file
    if found and not {"train", "valid"} <= set(found):
        names = ", ".join(sorted(file.name for file in found.values()))
        raise ValueError(f"{folder} has {names}, but given splits need train and valid; add or rename files")
    if not found:
        alike = sorted(file.name for file in folder.iterdir() if _SPLIT_LIKE.fullmatch(file.name.lower()))
        if len({_SPLIT_LIKE.fullmatch(name.lower())[1] for name in alike}) > 1:  # type: ignore[index]
            raise ValueError(
                f"{folder} has {', '.join(alike)}, which seem to be splits but would be read as one text; call them "
                "train, valid and test with .txt or .jsonl, or otherwise"
            )
    return {split: found[split] for split in SPLITS if split in found}


def _text_files(path: Path) -> list[Path]:
    """The file itself, or the .txt and .jsonl files of a folder by name; hidden ones are no text of the user's."""
    if not path.is_dir():
        return [path]
    files = sorted(path.iterdir(), key=lambda file: file.name)
    kept = [file for file in files if file.suffix.lower() in (".txt", ".jsonl") and not file.name.startswith(".")]
    if not kept:
        raise ValueError(f"{path} has no .txt or .jsonl file; put text there or change prepare.source")
    return kept


def _read(path: Path) -> list[str]:
    """Documents of a file that have text in them: the lines of a .jsonl, else the whole file."""
    text = decode_text(path.read_bytes(), str(path))
    documents = [text]
    if path.suffix.lower() == ".jsonl":
        lines = enumerate(text.split("\n"), 1)
        documents = [_document(line, f"{path} line {number}") for number, line in lines if line.strip()]
    kept = [document for document in documents if document.strip()]
    if not kept:
        raise ValueError(f"{path} is empty or only white space; put text in it or change prepare.source")
    if len(kept) < len(documents):
        log.warning("%s: left out %d document(s) without text", path, len(documents) - len(kept))
    return kept


def _document(line: str, place: str) -> str:
    remedy = 'write an object such as {"text": "..."} on each line'
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({getattr(error, 'msg', type(error).__name__)}); {remedy}") from None
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{place}: no string under "text"; {remedy}')
    if bad := re.search("[\0\ud800-\udfff]", text):
        raise ValueError(f"{place}: \\u{ord(bad[0]):04x}, a NUL or a lone surrogate, is no text; remove it")
    return to_lf(text)


def _json_line(document: str) -> str:
    return json.dumps({"text": document}, ensure_ascii=False) + "\n"


def _measure(documents: list[str]) -> dict[str, int]:
    return {
        "documents": len(documents),
        "lines": sum(text.count("\n") + (not text.endswith("\n")) for text in documents),
        "words": sum(len(text.split()) for text in documents),
        "characters": sum(map(len, documents)),
        "bytes": sum(len(text.encode()) for text in documents),
    }


def overlap(train: list[str], split: list[str]) -> dict[str, float | None]:
    """Shares of the non-blank lines and of the 50-character windows (step 1) of `split` that also stand in `train`.

    Repeated lines and windows count as often as they occur; no window crosses documents. Windows are compared by
    64-bit hashes. None where there is nothing to compare. Beside a copy of each text memory grows with `split` alone.
    """
    lines = [line for document in split for line in document.split("\n") if line.strip()]
    wanted = set(lines)
    known = {line for document in train for line in document.split("\n") if line in wanted}
    hashes, places = np.unique(np.concatenate([np.zeros(0, np.uint64), *_window_hashes(split)]), return_inverse=True)
    seen = np.zeros(len(hashes), bool)
    rough = np.zeros(1 << 24, bool)  # most windows of train are dropped by their top 24 bits, without a search
    rough[hashes >> np.uint64(40)] = True
    for found in _window_hashes(train):
        found = found[rough[found >> np.uint64(40)]]
        index = np.searchsorted(hashes, found)
        index[index == len(hashes)] = 0
        seen[index[hashes[index] == found]] = True
    return {
        "share_of_lines_in_train": round(sum(line in known for line in lines) / len(lines), 6) if lines else None,
        "share_of_windows_in_train": round(float(seen[places].mean()), 6) if len(places) else None,
    }


def _window_hashes(documents: list[str], chunk: int = 1 << 16) -> Iterator[npt.NDArray[np.uint64]]:
    """Yield 64-bit polynomial hashes of all windows, a chunk that fits the processor's cache at a time."""
    text = "\0".join(documents)  # no document holds a NUL: a window with one crosses documents
    for start in range(0, len(text) - WINDOW + 1, chunk):
        codes = np.frombuffer(text[start : start + chunk + WINDOW - 1].encode("utf-32-le"), np.uint32)
        mixed = (codes + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
        hashes = np.zeros(len(codes) - WINDOW + 1, np.uint64)
        for offset in range(WINDOW):
            hashes *= np.uint64(0x94D049BB133111EB)
            hashes += mixed[offset : offset + len(hashes)]
        ends = np.append(0, np.cumsum(codes == 0))
        yield hashes[ends[WINDOW:] == ends[:-WINDOW]]


def data_dir() -> Path:
    """Where downloads are kept: $SMALLGPT_DATA_DIR, else smallgpt/ in the user's cache."""
    if folder := os.environ.get("SMALLGPT_DATA_DIR"):
        return expand(folder)
    return expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "smallgpt"


def _downloaded(source: str, folder: Path) -> Path:
    url, checksum, name = DOWNLOADS[source]
    return download(url, folder / name, checksum=checksum)


def _wikitext2(folder: Path) -> dict[str, list[str]]:
    """The three texts, from `folder`/wikitext-2 where all three are there, else from the zip."""
    files = _split_files(folder / "wikitext-2") if (folder / "wikitext-2").is_dir() else {}
    if len(files) < len(SPLITS):
        files = _split_files(zipfile.Path(_downloaded("wikitext2", folder), "wikitext-2/"))
    for split, checksum in WIKITEXT2_CHECKSUMS.items():
        verify(files[split].read_bytes(), str(files[split]), checksum, "remove it to use the published file")
    return {split: [decode_text(file.read_bytes(), str(file))] for split, file in files.items()}


def main() -> None:
    """Command line: write a named source to files, for use by path."""
    parser = argparse.ArgumentParser(prog="python -m smallgpt.corpus", description="Write a named source under data/.")
    parser.add_argument("source", choices=SOURCES)
    parser.add_argument("--out", type=Path, help="default: data/shakespeare.txt, data/wikitext2/ or data/stories.jsonl")
    arguments = parser.parse_args()
    splits = load_corpus(PrepareConfig(source=arguments.source)).splits
    documents = [document for split in splits.values() for document in split]
    if arguments.source == "wikitext2":
        out = arguments.out or Path("data/wikitext2")
        for split, [text] in splits.items():
            write_atomic(out / f"{split}.txt", text)
    else:
        whole = arguments.source == "shakespeare"  # one text, which was cut into splits
        documents = ["".join(documents)] if whole else documents
        out = arguments.out or Path("data/shakespeare.txt" if whole else "data/stories.jsonl")
        write_atomic(out, "".join(map(_json_line, documents)) if out.suffix == ".jsonl" else "\n\n".join(documents))
    log.info("wrote %s", out)


if __name__ == "__main__":
    run(main)
