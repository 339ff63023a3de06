"""Token files on disk, and the order in which training reads them."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from smallgpt.cli import MismatchError
from smallgpt.config import TokenizerConfig
from smallgpt.files import replace_folder, sha256_bytes, sha256_file, write_atomic, write_json
from smallgpt.score import count_words
from smallgpt.tokenizer import Tokenizer, train_tokenizer


@dataclass(frozen=True)
class TokenFile:
    """One split as a memory-mapped stream `<|eos|> doc <|eos|> doc <|eos|> ...` and the facts of its header.

    Every id but the first is scored; `text_bytes` and `words` are those of the documents' text.
    """

    ids: np.ndarray  # (N,), uint16 or uint32
    documents: int
    text_bytes: int
    words: int
    sha256: str
    text_sha256: str
    tokenizer_sha256: str

    @classmethod
    def load(cls, folder: str | Path, split: str) -> "TokenFile":
        """Map `folder/split.bin`; FileNotFoundError without it, MismatchError if it is not as its header says."""
        path = Path(folder) / f"{split}.bin"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; the tokenize stage writes it")
        try:
            header = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            dtype, count = np.dtype(header.pop("dtype")), int(header.pop("tokens"))
            file = cls(ids=np.zeros(0), **header)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MismatchError(
                f"{path.with_suffix('.json')} is damaged ({error}); run the tokenize stage again"
            ) from None
        if path.stat().st_size != count * dtype.itemsize:
            raise MismatchError(
                f"{path} has {path.stat().st_size} bytes; its header says {count} tokens of {dtype.itemsize} bytes"
            )
        if sha256_file(path) != file.sha256:
            raise MismatchError(f"{path} does not have the sha256 in its header; run the tokenize stage again")
        return replace(file, ids=np.memmap(path, dtype=dtype, mode="r"))


def token_stream(documents: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    """The stream of a list of documents, `(N,)`; N - 1 ids of it are scored."""
    encoded = tokenizer.encode_documents(documents)
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    stream = np.full(1 + sum(len(ids) + 1 for ids in encoded), tokenizer.eos_id, dtype=dtype)
    position = 1
    for ids in encoded:
        stream[position : position + len(ids)] = ids
        position += len(ids) + 1
    return stream


def write_tokens(folder: Path, split: str, documents: Sequence[str], tokenizer: Tokenizer) -> dict[str, int | str]:
    """Write `split.bin` and its header `split.json`, and return the header.

    Raises ValueError when the bytes of the tokens are not the bytes of the text: the tokenizer would lose text.
    """
    stream = token_stream(documents, tokenizer)
    lengths = np.array([len(piece) for piece in tokenizer.token_bytes])
    texts = [document.encode("utf-8") for document in documents]
    text_bytes = sum(len(text) for text in texts)
    if int(lengths[stream].sum()) != text_bytes:
        raise ValueError(f"{split}: the tokens hold {int(lengths[stream].sum())} bytes, the text {text_bytes}")
    header: dict[str, int | str] = {
        "dtype": stream.dtype.name,
        "tokens": len(stream),
        "documents": len(documents),
        "text_bytes": text_bytes,
        "words": sum(count_words(document) for document in documents),
        "sha256": sha256_bytes(stream.tobytes()),
        "text_sha256": sha256_bytes(b"\0".join(texts)),
        "tokenizer_sha256": tokenizer.sha256,
    }
    write_atomic(folder / f"{split}.bin", stream.tobytes())
    write_json(folder / f"{split}.json", header)
    return header


def tokenize(
    documents: dict[str, list[str]], *, vocab_size: int, options: TokenizerConfig, tokenizer: Path, tokens: Path
) -> tuple[Tokenizer, dict[str, dict[str, int | str]]]:
    """Train the tokenizer on the documents of `train` alone and encode every split.

    Writes `tokenizer/tokenizer.model` and the token files in `tokens`, each folder all or nothing; returns the
    tokenizer and the headers of the token files. Raises ValueError when the vocabulary does not fit the text.
    """
    trained = Tokenizer(train_tokenizer(documents["train"], vocab_size=vocab_size, **options.model_dump()))
    with replace_folder(tokens) as temporary:
        headers = {split: write_tokens(temporary, split, texts, trained) for split, texts in documents.items()}
    with replace_folder(tokenizer) as temporary:
        write_atomic(temporary / "tokenizer.model", trained.model)
    return trained, headers


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, windows: int, seq_len: int) -> tuple[int, np.ndarray]:
    rng = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, epoch]))
    return int(rng.integers(seq_len)), rng.permutation(windows)


def batch(ids: np.ndarray, *, seed: int, step: int, batch_size: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of one step, two int64 arrays `(batch_size, seq_len)`.

    A pure function of (seed, step): each epoch is a seeded permutation of all windows, shifted by a random offset,
    and an epoch always has the same number of windows, so the step alone determines the epoch. Resuming needs no
    state. Raises ValueError when the stream is shorter than two windows.
    """
    windows = (len(ids) - seq_len) // seq_len  # of an epoch, whatever its offset is
    if windows < 1:
        raise ValueError(
            f"the train split has {len(ids)} tokens; sequences of {seq_len} need at least {2 * seq_len}: "
            f"take a longer corpus or set training.seq_len to at most {len(ids) // 2}"
        )
    rows = []
    for index in range(step * batch_size, (step + 1) * batch_size):
        offset, order = _epoch_order(seed, index // windows, windows, seq_len)
        start = offset + int(order[index % windows]) * seq_len
        rows.append(ids[start : start + seq_len + 1])
    block = np.stack(rows).astype(np.int64)  # (B, T + 1)
    return block[:, :-1], block[:, 1:]
