"""Read a story back into its derivation: the check on smallgpt.stories, and a judge of what a model wrote.

It shares the text of the grammar with the generator and nothing else: it reads the rules in its own way, follows every
derivation instead of one, and multiplies fractions instead of adding logarithms.
"""

import math
import re
from collections.abc import Iterator
from fractions import Fraction
from functools import cache

from smallgpt.stories import PLOTS, WORDS

Rules = dict[str, list[tuple[Fraction, list[str]]]]


def story_nats(text: str) -> float:
    """-ln P of a story, the sum over its derivations.

    Raises ValueError when `text` is not a story of the grammar; the message has the position and what was expected.
    """
    derivations = story_derivations(text)
    total = sum(derivations, Fraction(0))
    return math.log(total.denominator) - math.log(total.numerator)


def story_derivations(text: str) -> list[Fraction]:
    """The probability of each derivation of `text`, of which an unambiguous grammar has one. Raises ValueError."""
    wrong_article = re.search(r"\b[Aa] (?=[aeiou])|\b[Aa]n (?![aeiou])", text)
    if wrong_article:
        raise ValueError(f"not a story at character {wrong_article.start()}: wrong article {wrong_article[0]!r}")
    plain = re.sub(r"\b([Aa])n (?=[aeiou])", r"\1 ", text)
    rules = read_rules()
    expected: dict[int, set[str]] = {}

    def follow(pieces: list[str], at: int, known: dict[str, str]) -> Iterator[tuple[int, dict[str, str], Fraction]]:
        """Yield where each way to read `pieces` from position `at` ends, what it made known, and its probability."""
        if not pieces:
            yield at, known, Fraction(1)
        elif pieces[0].startswith("<"):
            name, _, rule = pieces[0][1:-1].rpartition("=")
            for probability, alternative in rules[rule.format_map(known)]:
                for middle, inside, first in follow(alternative, at, known):
                    remembered = {**inside, name: plain[at:middle]} if name else inside
                    for end, after, second in follow(pieces[1:], middle, remembered):
                        yield end, after, probability * first * second
        elif pieces[0].startswith("["):
            name, _, words = pieces[0][1:-1].partition("=")
            yield from follow(pieces[1:], at, {**known, name: words.format_map(known)})
        else:
            words = known[pieces[0][1:-1]] if pieces[0].startswith("{") else pieces[0]
            if plain.startswith(words, at):
                yield from follow(pieces[1:], at + len(words), known)
            else:
                expected.setdefault(at + common_length(words, plain[at : at + len(words)]), set()).add(words)

    found = []
    for end, _, probability in follow(["<story>"], 0, {}):
        if end == len(plain):
            found.append(probability)
        else:
            expected.setdefault(end, set()).add("the end")
    if found:
        return found
    at = max(expected)
    options = sorted(expected[at])
    shown = " | ".join(map(repr, options[:8])) + (f" and {len(options) - 8} more" if len(options) > 8 else "")
    articles = len(re.findall(r"\b[Aa] (?=[aeiou])", plain[:at]))  # each was an `an` in the text
    raise ValueError(f"not a story at character {at + articles}: expected {shown}, found {plain[at : at + 20]!r}")


def entropy() -> float:
    """The entropy of one story in nats, exact up to rounding.

    By the chain rule it is the sum of the expected -ln P of every choice. Later choices depend on earlier ones only
    through the names that stand in the name of a rule, so the recursion runs over what is still to be told and the
    values of those names.
    """
    rules = read_rules()
    every_piece = [piece for alternatives in rules.values() for _, pieces in alternatives for piece in pieces]
    deciding = {name for piece in every_piece if piece[0] == "<" for name in re.findall(r"\{(\w+)\}", piece)}

    @cache
    def ahead(pieces: tuple[str, ...], known: frozenset[tuple[str, str]]) -> float:
        if not pieces:
            return 0.0
        name, _, words = pieces[0][1:-1].rpartition("=")
        if pieces[0][0] == "[":
            return ahead(pieces[1:], frozenset({**dict(known), name: words}.items()) if name in deciding else known)
        total = 0.0
        for probability, alternative in rules[words.format_map(dict(known))]:
            choices = (piece for piece in alternative if piece[0] in "<[")
            total += float(probability) * (ahead((*choices, *pieces[1:]), known) - math.log(probability))
        return total

    return ahead(("<story>",), frozenset())


def common_length(left: str, right: str) -> int:
    """Number of characters that two texts share at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


@cache
def read_rules() -> Rules:
    """The rules of the grammar: each alternative's probability and its pieces."""
    rules: Rules = {}
    lines: list[str] = []
    for line in (WORDS + PLOTS).splitlines():
        if line.startswith("    "):
            lines[-1] += " " + line.strip()
        elif line.strip():
            lines.append(line)
    weighted: dict[str, list[tuple[int, list[str]]]] = {}
    for line in lines:
        if not line.startswith(" "):
            name, separator = re.match(r"([\w.]+)(:| =)", line).groups()  # type: ignore[union-attr]
            line = line.removeprefix(name + separator)
        for text in line.split("|") if separator == ":" else line.split():
            weight, star, rest = text.strip().rpartition("*")
            body = rest.replace("_", " ").replace("/", "\n")
            pieces = [piece for piece in re.split(r"(<[^>]*>|\{\w+\}|\[[^]]*\])", body) if piece]
            if pieces:
                weighted.setdefault(name, []).append((int(weight) if star else 1, pieces))
    for name, alternatives in weighted.items():
        total = sum(weight for weight, _ in alternatives)
        rules[name] = [(Fraction(weight, total), pieces) for weight, pieces in alternatives]
    return rules
