"""The tokenizer loses nothing, trains to the same bytes, and streams whole characters."""

import codecs
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from smallgpt.cli import MismatchError
from smallgpt.tokenizer import CONTROL_PIECES, TextStream, Tokenizer, train_tokenizer

ROOT = Path(__file__).parents[1]
ODD = ["\u2581", "\u2585", "\0", "\t", "\n", "\r", " ", "  ", *CONTROL_PIECES, "<unk>", "<0x41>", "\u2047", "\ufeff"]
ODD += ["a", "Ann saw", "e\u0301", "\u00e9", "\U0001f408", "\ufffd", "\u200d", "\u2028", "7"]
texts = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(st.sampled_from(ODD)).map("".join)


@given(texts)
@example("".join(ODD))
@example("\n\n\u2581\u2581\n")
@example(" leading and trailing ")
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes[i] for i in ids) == text.encode()
    assert all(3 < i < tokenizer.vocab_size for i in ids)  # control ids never come from text


@given(st.lists(texts, max_size=4))
def test_documents_are_encoded_one_by_one(tokenizer: Tokenizer, documents: list[str]) -> None:
    assert tokenizer.encode_documents(documents) == [tokenizer.encode(text) for text in documents]


def test_a_line_does_not_depend_on_its_neighbours(tokenizer: Tokenizer, corpus: dict[str, list[str]]) -> None:
    newline = tokenizer.encode("\n")
    assert len(newline) == 1
    for text in corpus["test"]:
        joined: list[int] = []
        for line in text.split("\n"):
            joined += [*newline, *tokenizer.encode(line)]
        assert tokenizer.encode(text) == joined[1:]


def test_ids_and_pieces(tokenizer: Tokenizer, corpus: dict[str, list[str]]) -> None:
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2, 3)
    assert tokenizer.banned_ids == (0, 1, 2)
    assert tokenizer.vocab_size == len(tokenizer.token_bytes) == 320
    assert tokenizer.token_bytes[:4] == [b""] * 4
    assert {bytes([byte]) for byte in range(256)} <= set(tokenizer.token_bytes)
    text = "".join(corpus["test"])
    assert len(tokenizer.encode(text)) < 0.6 * len(text.encode())  # it does compress


@pytest.mark.parametrize("text", ["\ud800", "fine until \udfff here"])
def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.encode(text)


def test_bytes_that_are_no_text_become_replacement_characters(tokenizer: Tokenizer) -> None:
    cat = tokenizer.encode("\U0001f431")  # not in the corpus: four byte pieces
    assert len(cat) == 4
    assert tokenizer.decode(cat[:3]) == "\ufffd"
    assert tokenizer.decode([3, *cat, 0]) == "\U0001f431"


def test_training_gives_the_same_bytes_here_and_in_another_process(
    tokenizer: Tokenizer, corpus: dict[str, list[str]]
) -> None:
    assert train_tokenizer(corpus["train"], vocab_size=320) == tokenizer.model
    code = (
        "from conftest import make_corpus; from smallgpt.files import sha256_bytes\n"
        "from smallgpt.tokenizer import train_tokenizer\n"
        "print(sha256_bytes(train_tokenizer(make_corpus(1, 300), vocab_size=320)))"
    )
    command = [sys.executable, "-c", code]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PYTHONHASHSEED": "7"}
    result = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=True)
    assert result.stdout.strip() == tokenizer.sha256


def test_options_reach_the_trainer(corpus: dict[str, list[str]]) -> None:
    numbers = [f"{n} {n}{n} 1234567890" for n in range(200)]
    together = Tokenizer(train_tokenizer(numbers, vocab_size=300, split_digits=False))
    apart = Tokenizer(train_tokenizer(numbers * 2 + corpus["train"], vocab_size=300))
    assert len(together.encode("1234567890")) < 10
    assert len(apart.encode("1234567890")) == 10
    short = Tokenizer(train_tokenizer(corpus["train"], vocab_size=300, max_piece_length=2))
    assert max(len(piece.decode(errors="replace")) for piece in short.token_bytes) == 2


def test_long_lines_count_in_training() -> None:
    line = "xyz " * 20_000 + "abcdefgh " * 1000  # far beyond what SentencePiece reads as one sentence
    assert b"abcdefgh" in b"|".join(Tokenizer(train_tokenizer([line], vocab_size=285)).token_bytes)


@pytest.mark.parametrize(
    "text", ["one", "the cat sat on the mat\n" * 3, "a\u2581b\u2585c \t\n" * 5, "\u4e2d\u6587 abc"]
)
def test_a_vocabulary_too_large_names_one_that_works(text: str) -> None:
    with pytest.raises(ValueError, match="take a longer corpus, or at most") as error:
        train_tokenizer([text], vocab_size=5000)
    largest = int(str(error.value).rsplit(" ", 1)[1])
    assert Tokenizer(train_tokenizer([text], vocab_size=largest)).vocab_size == largest
    with pytest.raises(ValueError, match=f"take a longer corpus, or at most {largest}"):
        train_tokenizer([text], vocab_size=largest + 1)


def test_a_vocabulary_too_small_names_one_that_works() -> None:
    text = "".join(chr(code) for code in range(0x4E00, 0x4E40)) * 3
    with pytest.raises(ValueError, match="the smallest that works is") as error:
        train_tokenizer([text], vocab_size=270)
    smallest = int(str(error.value).rsplit(" ", 1)[1])
    assert Tokenizer(train_tokenizer([text], vocab_size=smallest)).vocab_size == smallest
    with pytest.raises(ValueError, match=f"the smallest that works is {smallest}"):
        train_tokenizer([text], vocab_size=smallest - 1)


@pytest.mark.parametrize("texts", [[], [""], ["\n\n"], ["\u2585"]])
def test_nothing_to_train_on(texts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        train_tokenizer(texts, vocab_size=300)


def test_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model does not exist"):
        Tokenizer.load(path)
    path.write_bytes(tokenizer.model)
    assert Tokenizer.load(path).sha256 == Tokenizer.load(tmp_path).sha256 == tokenizer.sha256
    for data in (b"", b"\0" * 100, tokenizer.model[: len(tokenizer.model) // 2], tokenizer.model[:40]):
        path.write_bytes(data)
        with pytest.raises(MismatchError, match=r"^[^\n]*tokenizer[^\n]*$"):
            Tokenizer.load(path)


def expected(data: bytes, stop: list[str]) -> str:
    """The text up to the stop string that is complete first; of several, the longest."""
    text = data.decode("utf-8", errors="replace")
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    return text[: min(ends)[1]] if ends else text


def whole_characters(data: bytes) -> str:
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


abc = st.text("abc", max_size=12) | st.text("ab\n\u00e9\U0001f408", max_size=12)
pieces = abc.map(str.encode) | st.binary(max_size=3) | st.just(b"")


@given(st.lists(pieces, max_size=10), st.lists(abc.filter(bool), max_size=3))
@example([b"a", b"b", b"c"], ["abc", "b"])
@example([b"abc"], ["abc", "b"])
@example([b"xabcd"], ["bc", "abc"])
@example([b"\xc3", b"\xa9", b"\xf0\x9f"], [])
@example([b"aa", b"ab"], ["aab"])
def test_a_stream_is_the_text_up_to_the_first_stop(cuts: list[bytes], stop: list[str]) -> None:
    stream = TextStream(cuts, stop)
    text, full = "", expected(b"".join(cuts), stop)
    for token, _ in enumerate(cuts):
        if stream.stopped:
            break
        text += stream.feed(token)
        assert full.startswith(text)  # nothing too early, never half a character
        if not stop:
            assert text.startswith(whole_characters(b"".join(cuts[: token + 1])))  # and nothing too late
    text += stream.finish()
    assert text == full
    joined = b"".join(cuts).decode("utf-8", errors="replace")
    assert stream.stopped == any(s in joined for s in stop)


@given(st.lists(pieces, max_size=8), st.lists(pieces, max_size=4), st.lists(abc.filter(bool), max_size=2))
@example([b"xa\xc3"], [b"\xa9b"], ["ab"])
@example([b"xa"], [b"b"], ["ab"])
def test_a_copied_stream_goes_on_alone(before: list[bytes], after: list[bytes], stop: list[str]) -> None:
    def rest(stream: TextStream) -> tuple[str, bool]:
        text = "".join(stream.feed(len(before) + i) for i in range(len(after))) + stream.finish()
        return text, stream.stopped

    stream, same = TextStream([*before, *after], stop), TextStream([*before, *after], stop)
    for token in range(len(before)):
        assert stream.feed(token) == same.feed(token)
    first, second = stream.copy(), stream.copy()
    assert rest(first) == rest(second) == rest(stream) == rest(same)


@given(st.data())
def test_a_stream_of_real_tokens(tokenizer: Tokenizer, data: st.DataObject) -> None:
    text = data.draw(texts)
    start = data.draw(st.integers(0, max(0, len(text) - 1)))
    stop = [text[start : start + data.draw(st.integers(1, 4))]] if text else []
    stream = tokenizer.stream(stop)
    streamed = ""
    for token in tokenizer.encode(text):
        piece = stream.feed(token)
        assert "\ufffd" not in piece or "\ufffd" in text
        streamed += piece
        if stream.stopped:
            break
    streamed += stream.finish()
    assert streamed == (text[: text.find(stop[0])] if stop else text)


def test_a_stream_holds_back_no_more_than_it_must() -> None:
    stream = TextStream([b"Hi", b" E", b"N", b"x END", b"!"], ["END"])
    assert [stream.feed(token) for token in (0, 1, 2, 3)] == ["Hi", " ", "", "ENx "]
    assert stream.stopped
    assert (stream.feed(4), stream.finish()) == ("", "")
