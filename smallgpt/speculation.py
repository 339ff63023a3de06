"""Guessing the next tokens from the text so far, and knowing when that does not pay."""

from collections.abc import Sequence


class Speculation:
    """Prompt lookup (Saxena 2023): guess that what followed the last tokens earlier follows them again.

    Guesses that are right grow to `size` tokens. After the n-th wrong one in a row the next 2 ** n steps, 64 at most,
    are plain. And the seconds that guesses have cost beyond the plain steps they replaced are kept account of: one is
    made only where its failure would leave them below 4 % of all.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.proposed = self.accepted = 0  # tokens
        self._length = min(2, size)  # of the next guess
        self._wrong = self._pause = 0
        self._plain = 0.0  # seconds of a plain step, a moving average
        self._extra = 0.0  # seconds that checking a guess takes beyond that, a moving average
        self._total = self._lost = 0.0
        self._ids: Sequence[int] = ()
        self._known = 0  # so many of the ids are in the index
        self._index: dict[tuple[int, ...], int] = {}  # 3 or 2 tokens: where what followed them last begins

    def propose(self, ids: Sequence[int], room: int) -> list[int]:
        """Up to `room` tokens that followed the latest earlier occurrence of the last 3 tokens, else of the last 2."""
        if ids is not self._ids:
            self._ids, self._known, self._index = ids, 0, {}
        for end in range(max(2, self._known), len(ids)):
            self._index[ids[end - 2], ids[end - 1]] = end
            if end > 2:
                self._index[ids[end - 3], ids[end - 2], ids[end - 1]] = end
        self._known = len(ids)
        self._pause -= 1
        length = min(self._length, room)
        if length < 1 or self._pause >= 0 or self._lost + self._extra >= 0.04 * self._total:
            return []
        start = self._index.get(tuple(ids[-3:])) or self._index.get(tuple(ids[-2:]))
        guess: list[int] = []
        while start is not None and len(guess) < length:  # a guess may go on with what it began with
            at = start + len(guess)
            guess.append(ids[at] if at < len(ids) else guess[at - len(ids)])
        return guess

    def plain(self, seconds: float) -> None:
        """Learn from a plain step."""
        self._extra = self._extra or seconds / 2
        self._plain = 0.9 * self._plain + 0.1 * seconds if self._plain else seconds
        self._total += seconds

    def checked(self, proposed: int, accepted: int, seconds: float) -> None:
        """Learn from a guess that was checked."""
        self.proposed += proposed
        self.accepted += accepted
        self._wrong = 0 if accepted else self._wrong + 1
        self._pause = 2 ** min(self._wrong, 6) if self._wrong else 0
        self._length = min(self.size, 2 * proposed) if accepted == proposed else min(2, self.size)
        self._extra = 0.7 * self._extra + 0.3 * max(0.0, seconds - self._plain)
        self._total += seconds
        # What guesses have won is remembered for ten steps: it shall not pay for a long time of losses.
        self._lost = max(self._lost + seconds - (1 + accepted) * self._plain, -10 * self._plain)
