"""A SentencePiece BPE tokenizer that gives back every UTF-8 text exactly as it was."""

import codecs
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from smallgpt.cli import MismatchError
from smallgpt.files import sha256_bytes

CONTROL_PIECES = ("<|pad|>", "<|unk|>", "<|bos|>", "<|eos|>")  # ids 0 to 3; as text they are ordinary text
SPACE = "\u2581"  # how SentencePiece writes a space inside a piece


class Tokenizer:
    """Encodes text to ids and back. Raises MismatchError for a file that is no such tokenizer."""

    def __init__(self, model: bytes, name: str = "the tokenizer file") -> None:
        self.sha256 = sha256_bytes(model)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            pieces = [self._processor.id_to_piece(i) for i in range(len(CONTROL_PIECES))]
        except (RuntimeError, IndexError) as error:
            raise MismatchError(f"{name} is damaged or no SentencePiece model: {error}") from None
        if pieces != list(CONTROL_PIECES):
            raise MismatchError(f"{name} begins with the pieces {pieces}; expected {list(CONTROL_PIECES)}")
        self.model = model
        self.pad_id, self.unk_id, self.bos_id, self.eos_id = range(4)
        self.banned_ids = (self.pad_id, self.unk_id, self.bos_id)
        self.vocab_size: int = self._processor.get_piece_size()
        self.token_bytes = [self._bytes_of(i) for i in range(self.vocab_size)]
        self._newline = self._processor.piece_to_id("\n")
        self._space_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read `tokenizer.model`, or the folder that holds it."""
        path = Path(path)
        path = path / "tokenizer.model" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; the tokenize stage writes it")
        return cls(path.read_bytes(), str(path))

    def _bytes_of(self, index: int) -> bytes:
        piece: str = self._processor.id_to_piece(index)
        if index < len(CONTROL_PIECES):
            return b""
        if self._processor.is_byte(index):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()

    def encode(self, text: str) -> list[int]:
        """Ids of a text; a lone surrogate raises ValueError."""
        return self.encode_documents([text])[0]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, encoded line by line on all cores.

        The newline is a piece of its own, so a line's ids do not depend on its neighbours; U+2581, which
        SentencePiece would read as a space, is cut out and spelled in bytes.
        """
        marks = {"\n": [self._newline], SPACE: self._space_ids}
        split: list[list[str]] = []  # of each text the marks and the parts between them
        for text in texts:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(f"the text holds a lone surrogate, which is no UTF-8: {error}") from None
            split.append(re.split(f"([\n{SPACE}])", text))
        # One flat list, for SentencePiece's own threads.
        parts = [piece for pieces in split for piece in pieces if piece not in marks]
        encoded = iter(self._processor.encode(parts, out_type=int))
        ids: list[list[int]] = []
        for pieces in split:
            document: list[int] = []
            for piece in pieces:
                document += marks[piece] if piece in marks else next(encoded)
            ids.append(document)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bytes that are no UTF-8 (a sample can hold such) become U+FFFD."""
        return b"".join(self.token_bytes[i] for i in ids).decode("utf-8", errors="replace")

    def stream(self, stop: Sequence[str] = ()) -> "TextStream":
        """A decoder for ids that come one after the other."""
        return TextStream(self.token_bytes, stop)


class TextStream:
    """The text of a growing continuation: only whole characters, and nothing from a stop string on.

    `stopped` becomes true when a stop string is complete; what may still become one is held back.
    """

    def __init__(self, token_bytes: Sequence[bytes], stop: Sequence[str] = ()) -> None:
        self._token_bytes = token_bytes
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def copy(self) -> "TextStream":
        """A stream that goes on from here on its own."""
        other = TextStream(self._token_bytes, self._stop)
        other._decoder.setstate(self._decoder.getstate())
        other._held, other.stopped = self._held, self.stopped
        return other

    def feed(self, token: int) -> str:
        """Take one more id and return the text that is now certain."""
        return self._release(self._decoder.decode(self._token_bytes[token]), final=False)

    def finish(self) -> str:
        """Return what was held back; an unfinished character becomes U+FFFD."""
        return self._release(self._decoder.decode(b"", final=True), final=True)

    def _release(self, text: str, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += text
        # The stop string that is complete first, so that the result does not depend on where tokens end.
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            keep = min(found)[1]
        elif final:
            keep = len(self._held)
        else:
            keep = min([self._safe_length(stop) for stop in self._stop], default=len(self._held))
        text, self._held = self._held[:keep], "" if self.stopped else self._held[keep:]
        return text

    def _safe_length(self, stop: str) -> int:
        """How much of the held text cannot be the beginning of `stop`."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return len(self._held) - length
        return len(self._held)


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, split_digits: bool = True, max_piece_length: int = 16
) -> bytes:
    """Train SentencePiece BPE and return the bytes of its model file, the same on every run.

    Identity normalisation, byte fallback, no dummy prefix and no whitespace removal keep it lossless. The number
    of threads is constant because it is stored in the file. Raises ValueError when the vocabulary does not fit
    the text, with the largest (or smallest) size that does.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            split_digits=split_digits,
            max_sentencepiece_length=max_piece_length,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            max_sentence_length=4 * _LONGEST_LINE,
            num_threads=4,
            minloglevel=2,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=CONTROL_PIECES[0],
            unk_piece=CONTROL_PIECES[1],
            bos_piece=CONTROL_PIECES[2],
            eos_piece=CONTROL_PIECES[3],
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), vocab_size)) from None
    return model.getvalue()


_LONGEST_LINE = 4096  # characters; SentencePiece drops longer lines, so they are cut


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            # SentencePiece skips every line with U+2585 and reads U+2581 as a space.
            line = line.replace("\u2585", "").replace(SPACE, " ")
            for start in range(0, len(line), _LONGEST_LINE):
                yield line[start : start + _LONGEST_LINE]


def _explain(message: str, vocab_size: int) -> str:
    if match := re.search(r"value <= (\d+)", message):
        return (
            f"model.vocab_size is {vocab_size}, more than this training text supports; "
            f"take a longer corpus, or at most {match[1]}"
        )
    if match := re.search(r"required_chars\D+(\d+) vs (\d+)", message):
        return (
            f"model.vocab_size is {vocab_size}, fewer than the characters of the training text and the 256 bytes "
            f"need; the smallest that works is {match[2]}"
        )
    return f"the tokenizer could not be trained: {' '.join(message.split())}"
