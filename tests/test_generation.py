"""The decoding engine on both models: who joins, leaves, stops or slides never changes what the others say."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from smallgpt.decode import TorchDecoder
from smallgpt.generation import Batch, Piece, generate, logprobs_of
from smallgpt.runtime import OrtGPT
from smallgpt.sampling import GenerationConfig

pytestmark = pytest.mark.usefixtures("one_thread")
SONG = "the dog sat \u65e5\u672c \U0001f642 happy"  # with characters that the tokenizer spells in bytes
PROMPTS = [[3, 9, 40], [3], [3, *range(10, 60)], [3, 77], [3, 40, 9]]
FREE = {"temperature": 1.2, "top_k": 0, "top_p": 0.95, "seed": 7}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_bundles(tmp_path_factory.mktemp("random"), tiny.random_model("llama"), ["fp32"]) / "fp32"


@pytest.fixture(params=["onnx", "torch"])
def model(request: pytest.FixtureRequest, bundle: Path) -> Any:
    """The same weights behind both decoders, 64 positions."""
    return OrtGPT(bundle, threads=1) if request.param == "onnx" else TorchDecoder(tiny.random_model("llama"))


@pytest.fixture
def parrot() -> TorchDecoder:
    """Says SONG after an empty prompt."""
    return TorchDecoder(tiny.parrot(SONG))


def alone(model: Any, prompt: Sequence[int], config: GenerationConfig, number: int = 0, **more: Any) -> list[Piece]:
    return [piece for step in generate(model, [prompt], config, sequences=[number], **more) for piece in step]


def tokens(pieces: list[Piece]) -> list[int]:
    return [piece.token for piece in pieces if piece.token is not None]


def text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def drain(batch: Batch) -> dict[Any, list[Piece]]:
    found: dict[Any, list[Piece]] = {}
    while batch.busy:
        for piece in batch.step():
            found.setdefault(piece.sequence, []).append(piece)
    return found


def test_what_a_sequence_says_does_not_depend_on_its_company(model: Any) -> None:
    configs = [
        GenerationConfig(**FREE, max_new_tokens=30, repetition_penalty=1.1),
        GenerationConfig(**FREE, max_new_tokens=5, presence_penalty=0.5),
        GenerationConfig(**{**FREE, "seed": 8}, max_new_tokens=100),  # reaches the end of the context
        GenerationConfig(temperature=0, max_new_tokens=20),
        GenerationConfig(**FREE, max_new_tokens=12, ignore_eos=True),
    ]
    expected = [alone(model, prompt, configs[i], i) for i, prompt in enumerate(PROMPTS)]
    for rows in (1, 2, 3, 5, 8):
        for even in (False, True):
            batch = Batch(model, rows, even=even)
            for i, prompt in enumerate(PROMPTS):
                batch.add(i, prompt, configs[i], number=i)
            found = drain(batch)
            for i in range(5):
                assert tokens(found[i]) == tokens(expected[i])
                assert text(found[i]) == text(expected[i])
                assert found[i][-1].finish == expected[i][-1].finish
    assert len({len(pieces) for pieces in expected}) > 2


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["int8", "int4", "int8-kv8", "fp32-kv8"])
def test_nor_with_quantised_weights_in_an_even_batch(tmp_path: Path, variant: str) -> None:
    """Kernels for pairs of rows: whoever comes or goes, and however odd their number and their prompts are."""
    model = OrtGPT(tiny.write_bundles(tmp_path, tiny.random_model("llama"), [variant]) / variant, threads=1)
    draw = np.random.default_rng(0)
    prompts = [[3, *draw.integers(10, 300, draw.integers(0, 30)).tolist()] for _ in range(60)]
    configs = [GenerationConfig(**{**FREE, "seed": i}, max_new_tokens=int(draw.integers(1, 30))) for i in range(60)]
    expected = [tokens(alone(model, *asked, even=True)) for asked in zip(prompts, configs, strict=True)]
    batch = Batch(model, 7, even=True)
    found: dict[int, list[int]] = {i: [] for i in range(60)}
    left = list(range(60))
    while left or batch.busy:
        for _ in range(min(len(left), int(draw.integers(0, 4)))):
            batch.add(left[0], prompts[left[0]], configs[left.pop(0)])
        for piece in batch.step() if batch.busy else ():
            found[piece.sequence].append(piece.token)
    assert [found[i] for i in range(60)] == expected


def test_they_join_and_leave_in_the_middle(model: Any) -> None:
    config = GenerationConfig(**FREE, max_new_tokens=25, ignore_eos=True)
    expected = {i: tokens(alone(model, prompt, config, i)) for i, prompt in enumerate(PROMPTS)}
    batch = Batch(model, 3, even=True)
    found: dict[int, list[int]] = {i: [] for i in range(5)}
    for step in range(200):
        if step in (0, 1, 4, 9, 15):
            i = (0, 1, 4, 9, 15).index(step)
            batch.add(i, PROMPTS[i], config, number=i)
        if step == 12:
            last = batch.cancel(1)
            assert last is not None
            assert (last.sequence, last.token, last.finish) == (1, None, "interrupted")
        if step > 15 and not batch.busy:
            break
        for piece in batch.step():
            found[piece.sequence].append(piece.token)
    assert found[1] == expected[1][: len(found[1])]
    assert 8 <= len(found[1]) < 25
    for i in (0, 2, 3, 4):
        assert found[i] == expected[i]


def test_more_sequences_than_rows_wait_in_order(model: Any) -> None:
    config = GenerationConfig(**FREE, max_new_tokens=4, ignore_eos=True)
    batch = Batch(model, 2)
    for i in range(5):
        batch.add(i, PROMPTS[i], config, number=i)
    first = [{piece.sequence for piece in batch.step()} for _ in range(13)]
    assert first[0] == {0, 1}
    assert batch.busy == 0
    assert [sorted(keys) for keys in first[4:6]] == [[2, 3], [2, 3]]
    assert first[8] == {4}


def test_cancelling(model: Any) -> None:
    config = GenerationConfig(**FREE, max_new_tokens=50, ignore_eos=True)
    batch = Batch(model, 1)
    batch.add("running", [3], config)
    batch.add("waiting", [3], config)
    batch.add("empty", [3], GenerationConfig(max_new_tokens=0))
    assert batch.cancel("empty") == Piece("empty", None, "", "interrupted")
    assert [piece.sequence for piece in batch.step()] == ["running"]
    assert batch.cancel("waiting") == Piece("waiting", None, "", "interrupted")
    assert batch.cancel("unknown") is None
    assert batch.busy == 1
    last = batch.cancel("running")
    assert last is not None
    assert last.finish == "interrupted"
    assert batch.busy == 0
    assert batch.step() == []


def test_cancelling_gives_the_text_that_was_held_back(parrot: TorchDecoder) -> None:
    batch = Batch(parrot, 1)
    batch.add(0, [3], GenerationConfig(temperature=0, stop=("the dog ran",)))
    shown = "".join(batch.step()[0].text for _ in range(2))
    last = batch.cancel(0)
    assert last is not None
    assert shown == ""
    assert last.text
    assert SONG.startswith(last.text)


def test_stop_strings_across_token_borders(parrot: TorchDecoder) -> None:
    pieces = [parrot.tokenizer.decode([i]) for i in parrot.tokenizer.encode(SONG)]
    for start in range(len(SONG)):
        for end in range(start + 1, min(start + 9, len(SONG) + 1)):
            stop = SONG[start:end]
            found = alone(parrot, [3], GenerationConfig(temperature=0, stop=(stop, "not there")))
            assert text(found) == SONG[: SONG.index(stop)]
            assert found[-1].finish == "stop"
    assert not any("g sat" in piece for piece in pieces)  # some of them did cross a border


def test_stop_token_ids_and_eos(parrot: TorchDecoder) -> None:
    ids = parrot.tokenizer.encode(SONG)
    found = alone(parrot, [3], GenerationConfig(temperature=0, stop_token_ids=(ids[3], 5)))
    assert (tokens(found), found[-1].finish) == (ids[:4], "stop")
    assert text(found) == parrot.tokenizer.decode(ids[:3])  # the text of the token that stops is not shown
    found = alone(parrot, [3], GenerationConfig(temperature=0))
    assert (tokens(found), found[-1].finish, text(found)) == ([*ids, 3], "eos", SONG)
    found = alone(parrot, [3], GenerationConfig(temperature=0, ignore_eos=True, max_new_tokens=len(ids) + 4))
    assert (len(found), found[-1].finish) == (len(ids) + 4, "length")
    assert 3 not in tokens(found)


def test_min_new_tokens(parrot: TorchDecoder) -> None:
    ids = parrot.tokenizer.encode(SONG)
    config = GenerationConfig(temperature=0, min_new_tokens=len(ids) + 3)
    found = alone(parrot, [3], config)
    assert tokens(found)[: len(ids)] == ids
    assert 3 not in tokens(found)[:-1]
    assert (len(found), found[-1].finish) == (len(ids) + 4, "eos")
    found = alone(parrot, [3], GenerationConfig(temperature=0, min_new_tokens=5, stop_token_ids=(ids[2],)))
    assert ids[2] not in tokens(found)[:5]


def test_max_length_counts_the_prompt(parrot: TorchDecoder) -> None:
    for prompt, length in (([3], 4), ([9], 3), ([3, 9, 9], 2)):  # <|eos|> in front does not count
        found = alone(parrot, prompt, GenerationConfig(temperature=0, max_length=4))
        assert (len(tokens(found)), found[-1].finish) == (length, "length")
    found = alone(parrot, [3, 9, 9], GenerationConfig(max_length=2))
    assert found == [Piece(0, None, "", "length")]
    found = alone(parrot, [3], GenerationConfig(temperature=0, max_length=40, max_new_tokens=2))
    assert len(found) == 2


def test_max_time(model: Any) -> None:
    found = alone(model, [3], GenerationConfig(**FREE, max_time=1e-9, ignore_eos=True))
    assert (len(found), found[0].finish) == (1, "time")


def test_the_time_of_a_sequence_counts_from_its_row(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("smallgpt.generation.time.perf_counter", lambda: float(next(ticks)))
    config = GenerationConfig(**FREE, max_time=4, ignore_eos=True)
    batch = Batch(model, 1)
    for key in ("first", "second"):
        batch.add(key, [3], config)
    batch.add("late", [3], config, started=0.0)
    found = drain(batch)
    assert {key: pieces[-1].finish for key, pieces in found.items()} == dict.fromkeys(found, "time")
    assert len(found["first"]) == len(found["second"]) == 5
    assert len(found["late"]) == 1


def test_broken_logits_end_the_one_sequence_that_has_them(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(model, 2, tolerant=True)
    for key in ("whole", "broken"):
        batch.add(key, [3], GenerationConfig(**FREE, max_new_tokens=4, ignore_eos=True))
    pieces = batch.step()
    step = model.step

    def broken(tokens: np.ndarray) -> np.ndarray:
        logits = step(tokens).copy()
        logits[1] = np.nan
        return logits

    monkeypatch.setattr(model, "step", broken)
    _, piece = batch.step()
    assert (piece.sequence, piece.token, piece.finish) == ("broken", None, "interrupted")
    assert isinstance(piece.error, FloatingPointError)
    monkeypatch.undo()
    assert len(pieces) == 2
    assert [key for key, rest in drain(batch).items() if rest[-1].finish == "length"] == ["whole"]


def test_nothing_may_follow(model: Any) -> None:
    config = GenerationConfig(max_new_tokens=0)
    assert list(generate(model, [[3], [4]], config)) == [[Piece(0, None, "", "length"), Piece(1, None, "", "length")]]
    assert list(generate(model, [], config)) == []
    batch = Batch(model, 2)
    batch.add("none", [3], config)
    batch.add("one", [3], GenerationConfig(max_new_tokens=1))
    first = batch.step()
    assert [(piece.sequence, piece.finish) for piece in first if piece.token is None] == [("none", "length")]
    assert batch.busy == 0


def test_the_context_ends_a_text(model: Any) -> None:
    config = GenerationConfig(**FREE, max_new_tokens=1000, ignore_eos=True)
    for prompt, expected in ((1, 64), (63, 2), (64, 1)):
        found = alone(model, [5] * prompt, config)
        assert (len(found), found[-1].finish) == (expected, "length")


def test_sliding_reads_the_last_half_again(model: Any) -> None:
    """Every token equals the one that its window alone would give."""
    config = GenerationConfig(temperature=0, max_new_tokens=150, ignore_eos=True, repetition_penalty=1.2)
    prompt = [3, *range(10, 60)]
    found = alone(model, prompt, config, slide=True)
    assert (len(found), found[-1].finish) == (150, "length")
    ids, window = list(prompt), list(prompt)
    reference = TorchDecoder(tiny.random_model("llama"))
    slides = 0
    for i in range(150):
        if len(window) > 64:
            window, slides = ids[-32:], slides + 1
        reference.reserve(1)
        logits = reference.fill(0, np.array([window]), np.array([len(window)]))[0]
        seen = np.unique(ids)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.2, logits[seen] * 1.2)
        logits[:4] = -np.inf
        assert found[i].token == int(logits.argmax())
        ids.append(int(logits.argmax()))
        window.append(ids[-1])
    assert slides == 5
    assert tokens(alone(model, prompt, config))[:14] == tokens(found)[:14]


def test_some_slide_while_others_do_not(model: Any) -> None:
    long = GenerationConfig(**FREE, max_new_tokens=90, ignore_eos=True)
    expected = {i: tokens(alone(model, PROMPTS[i], long, i, slide=True)) for i in range(3)}
    batch = Batch(model, 2, slide=True, even=True)
    for i in range(3):
        batch.add(i, PROMPTS[i], long, number=i)
    found = drain(batch)
    assert {i: tokens(pieces) for i, pieces in found.items()} == expected


def test_logprobs(model: Any) -> None:
    config = GenerationConfig(**FREE, max_new_tokens=8, ignore_eos=True, presence_penalty=1.0)
    found = alone(model, [3, 9], config, logprobs=3)
    ids = [3, 9, *tokens(found)]
    with torch.no_grad():
        expected = tiny.random_model("llama")(torch.tensor([ids]))[0][0].log_softmax(-1).numpy()
    for i, piece in enumerate(found):
        row = expected[1 + i]  # by the model itself: no penalty, no temperature
        assert piece.logprob == pytest.approx(row[piece.token], abs=1e-4)
        best = np.argsort(-row, kind="stable")[:3]
        assert [token for token, _ in piece.top] == best.tolist()
        assert [value for _, value in piece.top] == pytest.approx(row[best].tolist(), abs=1e-4)
    assert alone(model, [3, 9], config)[0].logprob is None
    assert alone(model, [3, 9], config, logprobs=0)[0].top == ()


def test_logprobs_by_hand() -> None:
    logits = np.log(np.array([0.1, 0.4, 0.1, 0.4]))
    logprob, top = logprobs_of(logits, 2, 3)
    assert logprob == pytest.approx(math.log(0.1))
    assert [token for token, _ in top] == [1, 3, 0]  # of equal ones the smallest id first
    assert len(logprobs_of(logits, 0, 99)[1]) == 4
    assert logprobs_of(logits, 0, 0)[1] == ()


def test_both_models_say_the_same(bundle: Path) -> None:
    runtime, decoder = OrtGPT(bundle, threads=1), TorchDecoder(tiny.random_model("llama"))
    for seed in range(5):
        config = GenerationConfig(temperature=0.7, max_new_tokens=40, seed=seed, frequency_penalty=0.2)
        for i, prompt in enumerate(PROMPTS):
            assert alone(runtime, prompt, config, i) == alone(decoder, prompt, config, i)


def test_wrong_requests(model: Any) -> None:
    for prompt, message in (
        ([], "the prompt has 0 tokens; between 1 and 64 fit"),
        ([5] * 65, "the prompt has 65 tokens; between 1 and 64 fit"),
        ([5, 320], "the prompt has ids from 5 to 320; the vocabulary has 0 to 319"),
        ([-1], "the prompt has ids from -1 to -1"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, [[3], prompt], GenerationConfig())
    with pytest.raises(ValueError, match="logit_bias names the token 320"):
        generate(model, [[3]], GenerationConfig(logit_bias={320: 1}))
    with pytest.raises(ValueError, match="the prompt has 9 tokens; this batch has room for 8"):
        Batch(model, 1, capacity=8).add(0, [5] * 9, GenerationConfig())


def test_a_batch_with_less_room(model: Any) -> None:
    batch = Batch(model, 1, capacity=8)
    batch.add(0, [3, 9, 9], GenerationConfig(**FREE, ignore_eos=True))
    found = drain(batch)[0]
    assert (len(found), found[-1].finish) == (6, "length")


def repeating(number: int) -> list[int]:
    """A prompt that says again what it said, as stories do with names."""
    part = tiny.tokenizer().encode(tiny.text(number, 12))[:20]
    return [3, *part, *part[: 1 + number % 15]]


@pytest.mark.slow
def test_guessing_ahead_changes_no_text(model: Any) -> None:
    proposed = accepted = 0
    for number in range(10):
        for settings in ({"temperature": 0}, FREE, {"temperature": 0, "stop": ("a",)}, {"repetition_penalty": 1.3}):
            config = GenerationConfig(**settings, max_new_tokens=1000)
            expected = alone(model, repeating(number), config, number, logprobs=2)
            batch = Batch(model, 1, speculate=5)
            batch.add(0, repeating(number), config, number=number, logprobs=2)
            found = drain(batch)[0]
            assert tokens(found) == tokens(expected)
            assert text(found) == text(expected)
            assert found[-1].finish == expected[-1].finish
            assert [p.logprob for p in found] == pytest.approx([p.logprob for p in expected], abs=1e-4)
            proposed += batch.speculation.proposed
            accepted += batch.speculation.accepted
    assert proposed > accepted > 0


@pytest.mark.slow
def test_greedy_texts_of_200_prompts_are_the_same(bundle: Path) -> None:
    """Where a text differs, two tokens must have been equally likely up to rounding."""
    model = OrtGPT(bundle, threads=1)
    config = GenerationConfig(temperature=0, max_new_tokens=30)
    same = 0
    for number in range(200):
        plain = alone(model, repeating(number), config, logprobs=2)
        batch = Batch(model, 1, speculate=8)
        batch.add(0, repeating(number), config, logprobs=2)
        guessed = drain(batch)[0]
        at = next((i for i, (a, b) in enumerate(zip(plain, guessed, strict=False)) if a.token != b.token), None)
        same += at is None
        if at is not None:
            (_, best), (_, second) = plain[at].top
            assert best - second < 1e-4
        else:
            assert text(guessed) == text(plain)
    assert same >= 198


def test_guessing_ahead_goes_on_after_sliding() -> None:
    model = TorchDecoder(tiny.random_model("gpt2"))  # falls into a loop, which is easy to guess
    config = GenerationConfig(temperature=0, max_new_tokens=300, ignore_eos=True)
    expected = alone(model, [3, 9], config, slide=True)
    batch = Batch(model, 1, slide=True, speculate=6)
    batch.add(0, [3, 9], config)
    assert tokens(drain(batch)[0]) == tokens(expected)
    assert batch.speculation.accepted > 100


@pytest.mark.parametrize("variant", ["fp32", "int8", "int4"])
def test_long_guesses_are_checked_as_single_tokens_are(tmp_path: Path, variant: str) -> None:
    """On a quantised graph too, which multiplies more than a few tokens with their inputs rounded in another way."""
    model = OrtGPT(tiny.write_bundles(tmp_path, tiny.random_model("gpt2"), [variant]) / variant, threads=1)
    config = GenerationConfig(temperature=0, max_new_tokens=60, ignore_eos=True)
    expected = alone(model, [3, 9], config, logprobs=1)
    batch = Batch(model, 1, speculate=30)
    known = [3, 9, *tokens(expected)]
    batch.speculation.propose = lambda ids, room: known[len(ids) : len(ids) + min(30, room)]  # type: ignore[method-assign]
    batch.add(0, [3, 9], config, logprobs=1)
    found = drain(batch)[0]
    assert tokens(found) == tokens(expected)
    assert max(abs(a.logprob - b.logprob) for a, b in zip(found, expected, strict=True)) < 1e-4
    assert batch.speculation.accepted > 50


def test_guesses_wait_while_several_sequences_run(model: Any) -> None:
    config = GenerationConfig(temperature=0, max_new_tokens=20, ignore_eos=True)
    batch = Batch(model, 2, speculate=6)
    batch.add(0, repeating(0), config)
    batch.add(1, repeating(1), config)
    drain(batch)
    assert batch.speculation.proposed == 0
