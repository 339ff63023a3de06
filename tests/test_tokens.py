"""Token files are what their header says; a batch is a pure function of seed and step."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from smallgpt.cli import MismatchError
from smallgpt.config import TokenizerConfig
from smallgpt.files import sha256_bytes, sha256_file
from smallgpt.tokenizer import Tokenizer
from smallgpt.tokens import TokenFile, batch, count_words, token_stream, tokenize, write_tokens


def test_the_stream_is_eos_document_eos(tokenizer: Tokenizer) -> None:
    documents = ["Ann saw\n7 eggs.", "", "<|eos|>\u2581"]
    stream = token_stream(documents, tokenizer)
    expected = [3]
    for document in documents:
        expected += [*tokenizer.encode(document), 3]
    assert stream.dtype == np.uint16
    assert stream.tolist() == expected
    assert (stream == 3).sum() == 4  # the literal text <|eos|> is text
    assert token_stream([], tokenizer).tolist() == [3]


def test_the_header_states_facts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    documents = ["Ann saw\n7 eggs.\n", "Zo\u00eb\t drew"]
    header = write_tokens(tmp_path, "valid", documents, tokenizer)
    assert json.loads((tmp_path / "valid.json").read_text()) == header
    stream = token_stream(documents, tokenizer)
    assert (tmp_path / "valid.bin").read_bytes() == stream.astype("<u2").tobytes()
    assert header == {
        "dtype": "uint16",
        "tokens": len(stream),
        "documents": 2,
        "text_bytes": 16 + 10,
        "words": 6 + 2,  # Ann saw 7 eggs., two line ends; Zoe drew
        "sha256": sha256_file(tmp_path / "valid.bin"),
        "text_sha256": sha256_bytes("\0".join(documents).encode()),
        "tokenizer_sha256": tokenizer.sha256,
    }
    file = TokenFile.load(tmp_path, "valid")
    assert isinstance(file.ids, np.memmap)
    assert file.ids.tolist() == stream.tolist()
    assert (file.documents, file.text_bytes, file.words, file.sha256) == (2, 26, 8, header["sha256"])
    assert file.tokenizer_sha256 == tokenizer.sha256


def test_words_count_line_ends() -> None:
    assert count_words(" = Title = \n\n one two , three \n") == 3 + 4 + 3
    assert count_words("") == 0


def test_files_that_do_not_fit_their_header(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train\.bin does not exist"):
        TokenFile.load(tmp_path, "train")
    write_tokens(tmp_path, "train", ["Ann saw 7 eggs."], tokenizer)
    path = tmp_path / "train.bin"
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:-2], whole + b"\0\0", b""):
        path.write_bytes(data)
        with pytest.raises(MismatchError, match=rf"train\.bin has {len(data)} bytes; its header says"):
            TokenFile.load(tmp_path, "train")
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(MismatchError, match=r"train\.bin does not have the sha256 in its header; run the tokenize"):
        TokenFile.load(tmp_path, "train")
    path.write_bytes(whole)
    header = path.with_suffix(".json")
    values = json.loads(header.read_text())
    damaged = ["", "{", "[]", "{}", json.dumps(values | {"dtype": "text"}), json.dumps(values | {"tokens": "many"})]
    damaged += [json.dumps({k: v for k, v in values.items() if k != "words"}), json.dumps(values | {"more": 1})]
    for text in damaged:
        header.write_text(text)
        with pytest.raises(MismatchError, match=r"train\.json is damaged .*; run the tokenize stage again"):
            TokenFile.load(tmp_path, "train")
    header.write_text(json.dumps(values))
    assert TokenFile.load(tmp_path, "train").words == 4


def test_tokenize_trains_on_train_alone(corpus: dict[str, list[str]], tmp_path: Path) -> None:
    def run(folder: Path, documents: dict[str, list[str]]) -> dict[str, bytes]:
        out = {"tokenizer": folder / "tokenizer", "tokens": folder / "tokens"}
        trained, headers = tokenize(documents, vocab_size=320, options=TokenizerConfig(), **out)
        assert trained.model == (folder / "tokenizer" / "tokenizer.model").read_bytes()
        assert list(headers) == list(documents)
        return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.*")) if path.is_file()}

    first, again = run(tmp_path / "a", corpus), run(tmp_path / "b", corpus)
    assert first == again
    assert sorted(first) == [
        *("test.bin", "test.json", "tokenizer.model", "train.bin", "train.json", "valid.bin", "valid.json"),
    ]
    other = run(tmp_path / "a", {**corpus, "valid": ["something else entirely"] * 50})
    assert other["tokenizer.model"] == first["tokenizer.model"]
    assert other["valid.bin"] != first["valid.bin"]


def test_a_failed_tokenize_leaves_the_old_folders(corpus: dict[str, list[str]], tmp_path: Path) -> None:
    out = {"tokenizer": tmp_path / "tokenizer", "tokens": tmp_path / "tokens"}
    tokenize(corpus, vocab_size=320, options=TokenizerConfig(), **out)
    before = sha256_file(tmp_path / "tokens" / "train.bin")
    with pytest.raises(ValueError, match=r"model\.vocab_size is 9000, more than"):
        tokenize(corpus, vocab_size=9000, options=TokenizerConfig(), **out)
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenize({**corpus, "valid": ["\ud800"]}, vocab_size=330, options=TokenizerConfig(), **out)
    assert sha256_file(tmp_path / "tokens" / "train.bin") == before
    assert Tokenizer.load(tmp_path / "tokenizer").vocab_size == 320


@given(tokens=st.integers(4, 400), seq_len=st.integers(2, 50), batch_size=st.integers(1, 5), seed=st.integers(0, 2**63))
def test_an_epoch_has_every_window_once(tokens: int, seq_len: int, batch_size: int, seed: int) -> None:
    assume(tokens >= 2 * seq_len)
    ids = np.arange(tokens, dtype=np.uint16)
    windows = (tokens - seq_len) // seq_len
    starts = []
    for step in range(-(-2 * windows // batch_size)):
        x, y = batch(ids, seed=seed, step=step, batch_size=batch_size, seq_len=seq_len)
        assert x.shape == y.shape == (batch_size, seq_len)
        assert x.dtype == y.dtype == np.int64
        assert (y == x + 1).all()
        assert (x == x[:, :1] + np.arange(seq_len)).all()  # consecutive, hence within bounds
        starts += x[:, 0].tolist()
    for epoch in (sorted(starts[:windows]), sorted(starts[windows : 2 * windows])):
        assert 0 <= epoch[0] < seq_len
        assert epoch[-1] + seq_len < tokens
        assert np.diff(epoch).tolist() == [seq_len] * (windows - 1)


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    ids = np.arange(5000, dtype=np.uint16)

    def draw(seed: int, step: int) -> list[list[int]]:
        return batch(ids, seed=seed, step=step, batch_size=4, seq_len=16)[0].tolist()

    first = [draw(1, step) for step in range(200)]  # 311 windows: two and a half epochs
    np.random.seed(5)
    assert [draw(1, step) for step in reversed(range(200))] == first[::-1]
    assert draw(2, 0) != first[0]
    flat = [row[0] for rows in first for row in rows]
    assert len({start % 16 for start in flat[:311]}) == 1
    assert flat[0] % 16 != flat[311] % 16  # another offset in the next epoch (for this seed)
    assert [start // 16 for start in flat[:311]] != [start // 16 for start in flat[311:622]]  # and another order


def test_a_stream_too_short_names_the_longest_sequence() -> None:
    ids = np.zeros(41, dtype=np.uint16)
    with pytest.raises(ValueError, match=r"the train split has 41 tokens; sequences of 21 need at least 42") as error:
        batch(ids, seed=0, step=0, batch_size=1, seq_len=21)
    match = re.search(r"training\.seq_len to at most (\d+)", str(error.value))
    assert match is not None
    assert match[1] == "20"
    assert batch(ids, seed=0, step=0, batch_size=1, seq_len=20)[0].shape == (1, 20)
