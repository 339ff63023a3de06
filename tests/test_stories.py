"""The story grammar against an independent parser, its analytic entropy against samples, and its promises on length."""

import hashlib
import io
import math
import re
import statistics
from collections.abc import Callable
from functools import cache

import pytest
import sentencepiece
from story_parser import entropy, read_rules, story_derivations, story_nats

from smallgpt.stories import Story, generate_stories


@pytest.fixture(scope="module")
def stories() -> list[Story]:
    return list(generate_stories(seed=7, target_bytes=120_000))


@pytest.fixture(scope="module")
def corpus() -> list[Story]:
    """What `prepare` makes by default: 3 MB."""
    return list(generate_stories(seed=1, target_bytes=3_000_000))


def longest(rule: str, count: Callable[[str], int]) -> int:
    """The largest `count` of all that a rule can say, with each repeated name at its longest."""

    def of_pieces(pieces: list[str]) -> int:
        return sum(of_piece(piece) for piece in pieces if piece and not piece.startswith("["))

    def of_piece(piece: str) -> int:
        if piece.startswith("<"):
            return max(of_rule(rule) for rule in matching(piece))
        return of_name(piece[1:-1]) if piece.startswith("{") else count(piece)

    @cache
    def of_rule(rule: str) -> int:
        return max(of_pieces(pieces) for _, pieces in read_rules()[rule])

    @cache
    def of_name(name: str) -> int:
        every_piece = {
            piece for alternatives in read_rules().values() for _, pieces in alternatives for piece in pieces
        }
        picked = [of_piece(piece) for piece in every_piece if piece.startswith(f"<{name}=")]
        settled = [p[len(name) + 2 : -1] for p in every_piece if p.startswith(f"[{name}=")]
        return max(picked + [of_pieces(re.split(r"(\{\w+\})", words)) for words in settled])

    return of_rule(rule)


def matching(pick: str) -> list[str]:
    """The rules that a piece such as <x=wear.{w}> may choose from."""
    pattern = re.sub(r"\{\w+\}", r"\\w+", pick[1:-1].rpartition("=")[2].replace(".", r"\."))
    return [rule for rule in read_rules() if re.fullmatch(pattern, rule)]


def heads(pieces: list[str]) -> list[str]:
    """How an alternative begins: the words up to its first choice, or how that begins if it comes first."""
    spoken = ""
    for piece in pieces:
        if piece.startswith("<"):
            if spoken:
                return [spoken]
            rules = matching(piece)
            return [head for rule in rules for _, inner in read_rules()[rule] for head in heads(inner)]
        if not piece.startswith("["):
            spoken += piece
    return [spoken]


def test_parser_finds_one_derivation_with_the_same_probability(stories: list[Story]) -> None:
    for story in stories:
        (probability,) = story_derivations(story.text)
        assert math.log(probability.denominator) - math.log(probability.numerator) == pytest.approx(
            story.nats, rel=1e-9
        )


def test_no_alternative_begins_like_another() -> None:
    for name, alternatives in read_rules().items():
        beginnings = [head for _, pieces in alternatives for head in heads(pieces)]
        for i, one in enumerate(beginnings):
            for other in beginnings[:i]:
                differ = next(((a, b) for a, b in zip(one, other, strict=False) if a != b), None)
                assert differ, f"{name}: {one!r} and {other!r} begin alike"
                assert "{" not in differ, f"{name}: {one!r} and {other!r} differ only by a name"


def test_every_rule_is_used_and_exists() -> None:
    used, todo = set(), ["story"]
    while todo:
        name = todo.pop()
        used.add(name)
        for _, pieces in read_rules()[name]:
            for piece in pieces:
                if piece.startswith("<"):
                    rules = matching(piece)
                    assert rules, f"{name} asks for {piece}, which no rule is named after"
                    todo += set(rules) - used
    assert used == set(read_rules())


def test_entropy_agrees_with_the_mean_of_samples(corpus: list[Story]) -> None:
    nats = [story.nats for story in corpus]
    error = statistics.stdev(nats) / math.sqrt(len(nats))
    assert abs(statistics.mean(nats) - entropy()) < 4 * error
    assert error < 0.3  # so that the line above says something


def test_entropy_is_this_number() -> None:
    assert entropy() == pytest.approx(108.63981883354816, rel=1e-12)


def test_same_seed_same_bytes() -> None:
    def digest(seed: int) -> str:
        text = "\n\n".join(story.text for story in generate_stories(seed=seed, target_bytes=20_000))
        return hashlib.sha256(text.encode("utf-8")).hexdigest()

    assert digest(1) == "d7afa0e1506dd5423b1a0f4465521dedfbc25486254942b7a26513b065b68864"
    assert digest(2) != digest(1)


def test_generation_stops_at_the_target() -> None:
    lengths = [len(story.text.encode("utf-8")) for story in generate_stories(seed=1, target_bytes=20_000)]
    assert sum(lengths) >= 20_000 > sum(lengths[:-1])
    assert list(generate_stories(seed=1, target_bytes=0)) == []


def test_a_longer_corpus_begins_with_the_shorter_one() -> None:
    short = list(generate_stories(seed=3, target_bytes=5_000))
    assert list(generate_stories(seed=3, target_bytes=10_000))[: len(short)] == short


def test_text_is_clean(corpus: list[Story]) -> None:
    for story in corpus:
        assert re.fullmatch(r"[A-Z][ -~]+[.!\"]\n[A-Z][ -~]+[.!\"]\n[A-Z][ -~]+[.!\"]", story.text), story.text
        assert "  " not in story.text
        assert not set(story.text) & set("<>{}[]_*|/")
    share = sum(story.text.startswith("Once upon a time") for story in corpus) / len(corpus)
    assert share == pytest.approx(0.4, abs=0.03)


def test_stories_are_short_and_all_different(corpus: list[Story]) -> None:
    assert len({story.text for story in corpus}) == len(corpus)
    assert len({part for story in corpus for part in story.text.split("\n")[1:2]}) == len(corpus)
    bound = longest("story", lambda words: len(words.encode("utf-8")) + bool(re.search(r"\b[Aa] $", words)))
    assert max(len(story.text.encode("utf-8")) for story in corpus) <= bound == 614


def test_no_story_is_longer_than_128_words_and_marks() -> None:
    assert longest("story", lambda words: len(re.findall(r"\w+|[^\w\s]|\n", words))) <= 115


@pytest.mark.slow
def test_no_story_is_longer_than_128_tokens(corpus: list[Story]) -> None:
    model, texts = io.BytesIO(), [story.text for story in corpus]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=2048,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_digits=True,
        user_defined_symbols=["\n"],
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    tokens = [len(ids) for ids in sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).encode(texts)]
    assert max(tokens) <= 120
    assert 85 <= statistics.median(tokens) <= 97


def test_parser_refuses_a_wrong_pronoun(stories: list[Story]) -> None:
    swaps = {"she": "he", "he": "she", "her": "his", "his": "her", "him": "her"}
    tried = 0
    for story in stories[:60]:
        for match in re.finditer(r"\b(she|he|her|his|him)\b", story.text):
            changed = story.text[: match.start()] + swaps[match[0]] + story.text[match.end() :]
            with pytest.raises(ValueError, match=r"not a story at character \d+: expected"):
                story_nats(changed)
            tried += 1
    assert tried > 150


def test_parser_refuses_another_object_name_or_weather(stories: list[Story]) -> None:
    rules = {name: [pieces[0] for _, pieces in alternatives] for name, alternatives in read_rules().items()}
    names, things = rules["girl"] + rules["boy"], rules["thing"]
    for story in stories[:60]:
        body, ending = story.text.rsplit("\n", 1)
        for words in (names, things, rules["animal"]):
            spoken = [word for word in re.findall(r"\w+", ending) if word in words and f" {word}" in body]
            for word in spoken:
                other = next(w for w in words if w not in body and (w[0] in "AEIOU") == (word[0] in "AEIOU"))
                changed = re.sub(rf"\b{word}\b", other, ending)
                with pytest.raises(ValueError, match="expected"):
                    story_nats(f"{body}\n{changed}")
    sunny = next(story.text for story in stories if re.search(r"\b(sandals|sunhat)\b", story.text))
    with pytest.raises(ValueError, match="expected"):
        story_nats(re.sub(r"\b(sandals|sunhat)\b", "mittens", sunny))


def test_parser_refuses_every_truncation_and_extension(stories: list[Story]) -> None:
    text = stories[0].text
    for end in range(len(text)):
        with pytest.raises(ValueError, match="not a story"):
            story_nats(text[:end])
    for tail in (".", " ", "\n", " The end."):
        with pytest.raises(ValueError, match=f"at character {len(text)}: expected 'the end'"):
            story_nats(text + tail)


def test_parser_names_place_and_remedy(stories: list[Story]) -> None:
    with pytest.raises(ValueError, match=r"at character 10: expected 'Once upon a time', found 'the sea'"):
        story_nats("Once upon the sea")
    with pytest.raises(ValueError, match=r"at character 27: wrong article 'a '"):
        story_nats("Once upon a time there was a eager girl named Mia who loved baking buns.")
