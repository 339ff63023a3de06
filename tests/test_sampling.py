"""The sampler: each processor on logits written by hand and against Transformers, and draws against exact odds."""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smallgpt import sampling
from smallgpt.sampling import (
    GenerationConfig,
    block_ngrams,
    candidates,
    keep_min_p,
    keep_top_p,
    log_softmax,
    penalize,
    penalize_presence,
    penalize_repetition,
    sample,
    softmax,
    top_k_ids,
    uniform,
)

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}  # draw from the model's own distribution
INF = float("inf")


def logs(*probabilities: float) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities))


def kept(logits: np.ndarray) -> list[int]:
    return np.flatnonzero(np.isfinite(logits)).tolist()


def process(logits: np.ndarray, config: GenerationConfig, previous: Sequence[int] = (), **more: Any) -> np.ndarray:
    """Logits (V,) after every processor, -inf for what they leave out."""
    result = np.full(logits.shape, -INF)
    ids, left = candidates(penalize(logits, config, previous, **more), config)
    assert (np.diff(ids) > 0).all()
    result[ids] = left
    return result


def test_softmax() -> None:
    assert softmax(np.array([0.0, np.log(3.0), -INF])).tolist() == pytest.approx([0.25, 0.75, 0.0])
    assert softmax(np.array([1e30, 1e30], dtype=np.float32)).tolist() == [0.5, 0.5]
    assert softmax(np.zeros((2, 4))).tolist() == [[0.25] * 4] * 2
    assert softmax(np.zeros(3, dtype=np.float16)).dtype == np.float64


def test_log_softmax() -> None:
    logits = np.array([[0.0, np.log(3.0), -INF], [1e30, 1e30, 0]], dtype=np.float32)
    assert np.exp(log_softmax(logits)).tolist() == [pytest.approx([0.25, 0.75, 0.0]), [0.5, 0.5, 0.0]]
    assert log_softmax(np.zeros(3, dtype=np.float16)).dtype == np.float64


def test_repetition_penalty_pulls_both_signs_down() -> None:
    logits = np.array([2.0, -2.0, 4.0, 0.0])
    penalize_repetition(logits, [0, 1, 1, 3], 2.0)
    assert logits.tolist() == [1.0, -4.0, 4.0, 0.0]


def test_presence_counts_once_and_frequency_every_time() -> None:
    logits = np.zeros(4)
    penalize_presence(logits, [2, 0, 2, 2], 0.5, 0.25)
    assert logits.tolist() == [-0.75, 0, -1.25, 0]


def test_ngrams() -> None:
    def blocked(previous: list[int], size: int) -> list[int]:
        logits = np.zeros(6)
        block_ngrams(logits, previous, size)
        return np.flatnonzero(logits == -INF).tolist()

    assert blocked([1, 2, 3, 1, 2], 3) == [3]
    assert blocked([1, 2, 3, 1, 2, 4, 1, 2], 3) == [3, 4]
    assert blocked([1, 2, 3, 1, 2], 2) == [3]
    assert blocked([1, 2, 3, 1], 1) == [1, 2, 3]
    assert blocked([1, 2], 3) == blocked([], 1) == blocked([1, 2, 3], 3) == []
    assert blocked([5, 5, 5], 2) == blocked([5, 5], 2) == [5]


def test_top_k() -> None:
    logits = np.array([1.0, 4.0, 2.0, 3.0])
    assert top_k_ids(logits, 2).tolist() == [1, 3]
    assert top_k_ids(logits, 1).tolist() == [1]
    assert top_k_ids(logits, 4).tolist() == top_k_ids(logits, 1000).tolist() == [0, 1, 2, 3]


def test_top_k_keeps_ties_with_the_last_one() -> None:
    assert top_k_ids(np.array([3.0, 1.0, 2.0, 2.0, 0.0]), 2).tolist() == [0, 2, 3]


@pytest.mark.parametrize("size", [2047, 2048, 2500, 10_000])
def test_top_k_of_a_large_vocabulary(size: int) -> None:
    draw = np.random.default_rng(size)
    for top_k in (1, 2, 50, 256, 257):
        for digits in (0, 1, 6):  # from many ties to none
            logits = draw.normal(size=size).round(digits).astype(np.float32)
            for forbidden in (0.0, 0.5, 0.99):
                logits[draw.random(size) < forbidden] = -INF
                least = np.sort(logits)[-top_k]
                assert top_k_ids(logits, top_k).tolist() == np.flatnonzero(logits >= least).tolist()


def test_top_p() -> None:
    logits = logs(0.5, 0.1, 0.3, 0.06, 0.04)
    for top_p, expected in ((0.7, [0, 2]), (0.85, [0, 1, 2]), (0.45, [0]), (0.999, [0, 1, 2, 3, 4])):
        assert np.flatnonzero(keep_top_p(logits, top_p)).tolist() == expected


def test_top_p_keeps_at_least_one() -> None:
    assert keep_top_p(logs(0.4, 0.6), 1e-300).tolist() == [False, True]
    assert keep_top_p(np.zeros(4), 1e-9).tolist() == [True, False, False, False]  # of equal ones the smallest id


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 3.0, 10.0])
def test_top_p_of_a_large_vocabulary(spread: float) -> None:
    """What is kept is the shortest beginning of the sorted tokens that reaches top_p, however long that is."""
    draw = np.random.default_rng(5)
    for top_p in (0.05, 0.5, 0.9, 0.999):
        logits = spread * draw.normal(size=3000).round(1)  # many ties
        order = np.argsort(-logits, kind="stable")
        total = np.cumsum(softmax(logits)[order])
        length = int(np.searchsorted(total, top_p)) + 1
        expected = np.zeros(3000, bool)
        expected[order[:length]] = True
        differing = np.flatnonzero(keep_top_p(logits, top_p) != expected)
        assert all(abs(total[order.tolist().index(i)] - top_p) < 1 / 3000 + 1e-9 for i in differing)
        assert len(differing) <= 1  # rounding at the border


def test_min_p() -> None:
    logits = logs(0.5, 0.24, 0.26)
    assert keep_min_p(logits, 0.5).tolist() == [True, False, True]
    assert keep_min_p(logits, 1.0).tolist() == [True, False, False]
    assert keep_min_p(np.zeros(3), 1.0).tolist() == [True, True, True]


def test_processors_are_applied_one_after_the_other() -> None:
    logits = logs(0.4, 0.3, 0.2, 0.1)
    config = GenerationConfig(temperature=0.5, top_k=3, top_p=0.6, min_p=0.0)
    # Temperature 0.5 squares the odds: 16, 9, 4 of 29 are left by top-k; 16/29 < 0.6 <= 25/29 by top-p.
    assert softmax(process(logits, config)).tolist() == pytest.approx([16 / 25, 9 / 25, 0, 0])
    config = GenerationConfig(temperature=0.5, top_k=0, top_p=1.0, min_p=0.5)
    assert kept(process(logits, config)) == [0, 1]  # 9/16 passes, 4/16 does not; before squaring 2/4 would
    config = GenerationConfig(**OFF, repetition_penalty=2.0)
    assert process(logits, config, previous=[0]).tolist() == pytest.approx([2 * logits[0], *logits[1:]])
    assert process(logits, config, previous=[]).tolist() == logits.tolist()
    # The bias comes first: 0.5 is halved, not added after halving.
    config = GenerationConfig(**OFF, repetition_penalty=2.0, logit_bias={1: 0.5})
    assert process(np.zeros(3), config, previous=[1]).tolist() == [0, 0.25, 0]


def test_the_window_of_the_penalties() -> None:
    previous = [0, 1, 2, 1]
    for window, seen in (
        (-1, {0, 1, 2}),
        (0, set()),
        (1, {1}),
        (2, {1, 2}),
        (3, {1, 2}),
        (4, {0, 1, 2}),
        (9, {0, 1, 2}),
    ):
        config = GenerationConfig(**OFF, repetition_penalty=2.0, repeat_last_n=window)
        assert set(np.flatnonzero(process(np.ones(5), config, previous) == 0.5).tolist()) == seen
        config = GenerationConfig(**OFF, presence_penalty=1.0, repeat_last_n=window)
        assert set(np.flatnonzero(process(np.ones(5), config, previous) == 0).tolist()) == seen
    config = GenerationConfig(**OFF, frequency_penalty=0.5, repeat_last_n=3)
    assert process(np.ones(4), config, previous).tolist() == [1, 0, 0.5, 1]
    config = GenerationConfig(**OFF, no_repeat_ngram_size=1, repeat_last_n=1)  # the block looks at everything
    assert kept(process(np.ones(5), config, previous)) == [3, 4]


def test_no_end_before_min_new_tokens() -> None:
    config = GenerationConfig(temperature=0, min_new_tokens=2)
    logits = np.array([0.0, 5.0, 4.0, 1.0])
    assert [sample(logits, config, position=i, ends=[1, 2]) for i in range(4)] == [3, 3, 1, 1]


def test_processing_leaves_the_logits_alone() -> None:
    logits = np.arange(5, dtype=np.float32)
    more = {"no_repeat_ngram_size": 1, "min_new_tokens": 3, "logit_bias": {0: 1.0}, "presence_penalty": 1.0}
    for settings in ({}, {"repetition_penalty": 1.5, **more}):
        config = GenerationConfig(temperature=0.7, top_k=2, top_p=0.5, min_p=0.5, **settings)
        process(logits, config, previous=[1, 4])
        sample(logits, config, position=0, previous=[1, 4], banned=[4], ends=[2])
        assert logits.tolist() == [0, 1, 2, 3, 4]


def test_float32_logits_give_what_their_float64_twins_give() -> None:
    draw = np.random.default_rng(2)
    for settings in ({}, {"temperature": 0}, {"top_k": 0, "min_p": 0.01}, {"top_k": 3, "top_p": 1.0}):
        config = GenerationConfig(**settings)
        for position in range(50):
            logits = (3 * draw.normal(size=300)).astype(np.float32)
            logits[draw.integers(300, size=100)] = logits.max()  # ties
            one, two = (
                sample(x, config, position=position, banned=[0, 7]) for x in (logits, logits.astype(np.float64))
            )
            assert one == two


PROCESSORS = {  # ours: Transformers' class, and its arguments
    "logit_bias": ("SequenceBiasLogitsProcessor", lambda value: ({(i,): bias for i, bias in value.items()},)),
    "repetition_penalty": ("RepetitionPenaltyLogitsProcessor", lambda value: (value,)),
    "no_repeat_ngram_size": ("NoRepeatNGramLogitsProcessor", lambda value: (value,)),
    "min_new_tokens": ("MinNewTokensLengthLogitsProcessor", lambda value: (PROMPT, value, [3, 9])),
    "temperature": ("TemperatureLogitsWarper", lambda value: (float(value),)),
    "top_k": ("TopKLogitsWarper", lambda value: (value,)),
    "top_p": ("TopPLogitsWarper", lambda value: (value,)),
    "min_p": ("MinPLogitsWarper", lambda value: (value,)),
}  # in the order in which Transformers puts them into its list
PROMPT = 25  # tokens of the 30 that are there


@pytest.mark.parametrize(
    "settings",
    [
        {"logit_bias": {0: 2.5, 17: -3.0, 199: 1e6}},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 3},
        {"min_new_tokens": 5},
        {"min_new_tokens": 6},
        {"temperature": 0.7},
        {"top_k": 7},
        {"top_k": 500},
        {"top_p": 0.9},
        {"top_p": 0.3},
        {"min_p": 0.05},
        {"temperature": 1.4, "top_k": 40, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.2},
        {"temperature": 0.6, "top_k": 25, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.1},
        {
            **{"logit_bias": {3: 4.0, 50: 2.0}, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
            **{"min_new_tokens": 9, "temperature": 1.3, "top_k": 60, "top_p": 0.9, "min_p": 0.01},
        },
    ],
)
def test_same_as_transformers(settings: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    draw = np.random.default_rng(0)
    batch = draw.normal(size=(50, 200)) * draw.uniform(0.5, 4, size=(50, 1))
    previous = draw.integers(12, size=(50, 30))  # few kinds, so that n-grams return
    expected = torch.from_numpy(batch)
    for name, (kind, arguments) in PROCESSORS.items():
        if name in settings:
            processor = getattr(transformers, kind)(*arguments(settings[name]))
            expected = processor(torch.from_numpy(previous), expected.clone())
    config = GenerationConfig(**{**OFF, **settings})
    for row in range(50):
        ours = process(batch[row], config, previous[row].tolist(), position=30 - PROMPT, ends=[3, 9])
        theirs = expected[row].numpy()
        assert kept(ours) == kept(theirs)
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    assert not np.array_equal(expected.numpy(), batch) or settings in ({"top_k": 500}, {"min_new_tokens": 5})


def test_presence_and_frequency_by_their_definition() -> None:
    draw = np.random.default_rng(3)
    for _ in range(50):
        logits, previous = draw.normal(size=40), draw.integers(40, size=60).tolist()
        window = int(draw.integers(-1, 70))
        presence, frequency = draw.uniform(-2, 2, size=2).tolist()
        # https://platform.openai.com: logit - count * frequency_penalty - (count > 0) * presence_penalty
        seen = previous if window == -1 else previous[60 - min(window, 60) :]
        expected = [x - seen.count(i) * frequency - (i in seen) * presence for i, x in enumerate(logits.tolist())]
        more = {"presence_penalty": presence, "frequency_penalty": frequency, "repeat_last_n": window}
        np.testing.assert_allclose(process(logits, GenerationConfig(**OFF, **more), previous), expected, rtol=1e-12)


def test_the_whole_list_of_transformers_in_its_order() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    shape = transformers.GPT2Config(vocab_size=200, n_embd=4, n_head=1, n_layer=1, n_positions=64)
    shape.eos_token_id = shape.bos_token_id = None
    model = transformers.GPT2LMHeadModel(shape)
    settings = {"temperature": 1.5, "top_k": 30, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.2}
    settings |= {"no_repeat_ngram_size": 2, "min_new_tokens": 10}
    theirs = transformers.GenerationConfig(
        do_sample=True, eos_token_id=3, sequence_bias=[[[5], 3.0], [[8], -1.0]], **settings
    )
    model._prepare_special_tokens(theirs, kwargs_has_attention_mask=True)
    processors = model._get_logits_processor(theirs, input_ids_seq_length=PROMPT)
    assert [type(processor).__name__ for processor in processors] == [kind for kind, _ in PROCESSORS.values()]
    config = GenerationConfig(**settings, logit_bias={5: 3.0, 8: -1.0})
    draw = np.random.default_rng(4)
    for _ in range(50):
        logits, previous = 3 * draw.normal(size=200), draw.integers(15, size=30)
        expected = processors(torch.from_numpy(previous)[None], torch.from_numpy(logits)[None])[0].numpy()
        ours = process(logits, config, previous.tolist(), position=30 - PROMPT, ends=[3])
        assert kept(ours) == kept(expected)
        np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_temperature_zero_takes_the_most_likely() -> None:
    config = GenerationConfig(temperature=0, top_k=1, top_p=0.1, min_p=0.9)
    logits = np.array([0.0, 2.0, 1.0, 2.0])
    assert {sample(logits, config, position=i, sequence=i) for i in range(20)} == {1}  # the smaller of the equal two
    assert sample(logits, config, position=0, banned=[1]) == 3
    repeated = GenerationConfig(temperature=0, repetition_penalty=4.0)
    assert sample(logits, repeated, position=0, previous=[1, 3]) == 2


# Tokens 0 to 4 have the odds 8 : 5 : 4 : 2 : 1; before them stood 0 0 1.
ODDS = np.array([8, 5, 4, 2, 1]) / 20


@pytest.mark.parametrize(
    ("settings", "exact"),
    [
        ({}, ODDS),
        ({"temperature": 0.5}, ODDS**2),
        ({"temperature": 2}, ODDS**0.5),
        ({"top_k": 3}, ODDS * [1, 1, 1, 0, 0]),
        ({"top_p": 0.8}, ODDS * [1, 1, 1, 0, 0]),
        ({"min_p": 0.3}, ODDS * [1, 1, 1, 0, 0]),
        ({"logit_bias": {3: math.log(4), 1: -1e6}}, ODDS * [1, 0, 1, 4, 1]),
        ({"repetition_penalty": 2.0}, ODDS ** [2, 2, 1, 1, 1]),  # the logits are logs of odds below 1
        ({"repetition_penalty": 2.0, "repeat_last_n": 1}, ODDS ** [1, 2, 1, 1, 1]),
        ({"presence_penalty": 1.0}, ODDS * np.exp([-1, -1, 0, 0, 0])),
        ({"frequency_penalty": 0.5}, ODDS * np.exp([-1, -0.5, 0, 0, 0])),
        ({"frequency_penalty": -0.5, "repeat_last_n": 2}, ODDS * np.exp([0.5, 0.5, 0, 0, 0])),
        ({"no_repeat_ngram_size": 1}, ODDS * [0, 0, 1, 1, 1]),
        ({"min_new_tokens": 10**6}, ODDS * [1, 1, 0, 1, 0]),  # 2 and 4 end
        ({"temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.2}, [64, 25, 16, 0, 0]),
    ],
)
def test_draws_have_the_exact_odds(settings: dict[str, Any], exact: Any) -> None:
    stats = pytest.importorskip("scipy.stats")
    config = GenerationConfig(**{**OFF, **settings, "seed": 5})
    draws = [
        sample(np.log(ODDS), config, position=i // 4, sequence=i % 4, previous=[0, 0, 1], ends=[2, 4])
        for i in range(10_000)
    ]
    counts = np.bincount(draws, minlength=5)
    possible = np.flatnonzero(exact)
    assert counts.sum() == counts[possible].sum()  # nothing impossible is drawn
    expected = np.array(exact, float)[possible]
    assert stats.chisquare(counts[possible], expected / expected.sum() * len(draws)).pvalue > 1e-3


def test_a_wrong_distribution_would_be_noticed() -> None:
    stats = pytest.importorskip("scipy.stats")
    draws = [sample(np.log(ODDS), GenerationConfig(**OFF, seed=5), position=i) for i in range(10_000)]
    counts = np.bincount(draws, minlength=5)
    wrong = ODDS * [0.9, 1, 1, 1, 1]
    assert stats.chisquare(counts, wrong / wrong.sum() * len(draws)).pvalue < 1e-3


def test_when_nothing_is_left() -> None:
    for temperature in (0, 1):
        config = GenerationConfig(temperature=temperature, no_repeat_ngram_size=1)
        with pytest.raises(ValueError, match="no token is left: no_repeat_ngram_size"):
            sample(np.zeros(4), config, position=0, previous=[1, 2, 3], banned=[0])


def test_banned_ids_are_never_drawn() -> None:
    logits = np.array([50.0, 40.0, 30.0, 0.0, 0.0])
    config = GenerationConfig(**OFF)
    draws = {sample(logits, config, position=i, banned=(0, 1, 2)) for i in range(2000)}
    assert draws == {3, 4}


@pytest.mark.parametrize("number", [0.0, 0.25, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_possible_ids(monkeypatch: pytest.MonkeyPatch, number: float) -> None:
    monkeypatch.setattr(sampling, "uniform", lambda *key: number)
    draw = np.random.default_rng(1)
    config = GenerationConfig(**OFF)
    for position in range(200):
        logits = draw.normal(size=40).astype(np.float32)
        token = sample(logits, config, position=position, banned=(0, 1, 38, 39))
        assert 2 <= token <= 37
        if number != 0.25:
            assert token == (2 if number == 0 else 37)


def test_uniform_numbers_are_pinned() -> None:
    # Another value here makes every published sample unrepeatable.
    assert uniform(0, 0, 0) == 0.011546754286331562
    assert uniform(1, 0, 0) == 0.3035680343067586
    assert uniform(0, 1, 0) == 0.8133540609793564
    assert uniform(0, 0, 1) == 0.5023796042735054
    assert uniform(2**63 - 1, 3, 1000) == 0.6389801778280383


def test_uniform_numbers_do_not_depend_on_order_or_batch() -> None:
    keys = [(seed, sequence, position) for seed in (0, 7) for sequence in range(8) for position in range(50)]
    forwards = {key: uniform(*key) for key in keys}
    backwards = {key: uniform(*key) for key in reversed(keys)}
    assert forwards == backwards
    assert len(set(forwards.values())) == len(keys)  # each of the three makes a difference
    assert all(0 <= number < 1 for number in forwards.values())
    # seed and sequence are not added up or swapped
    assert uniform(1, 2, 0) != uniform(2, 1, 0)
    assert uniform(1, 2, 3) != uniform(1, 3, 2)


def test_uniform_numbers_are_uniform() -> None:
    stats = pytest.importorskip("scipy.stats")
    along_positions = [uniform(3, 0, position) for position in range(2000)]
    along_sequences = [uniform(3, sequence, 0) for sequence in range(2000)]
    assert stats.kstest(along_positions, "uniform").pvalue > 1e-3
    assert stats.kstest(along_sequences, "uniform").pvalue > 1e-3


def test_a_sample_depends_on_seed_sequence_and_position_alone() -> None:
    logits = np.zeros(1000)
    one, other = GenerationConfig(**OFF, seed=1), GenerationConfig(**OFF, seed=2)
    first = [sample(logits, one, position=i, sequence=3) for i in range(20)]
    assert [sample(logits, one, position=i, sequence=3) for i in reversed(range(20))] == first[::-1]
    assert [sample(logits, other, position=i, sequence=3) for i in range(20)] != first
    assert [sample(logits, one, position=i, sequence=4) for i in range(20)] != first
    assert len(set(first)) > 10


@pytest.mark.parametrize("more", [{}, {"top_p": 1.0}, {"min_p": 0.1}, {"logit_bias": {0: 1e6}}])
def test_the_smallest_temperature_is_greedy(more: dict[str, Any]) -> None:
    config = GenerationConfig(temperature=5e-324, **more)
    logits = np.array([-60.0, 1.0, 70.0, 69.9])
    assert sample(logits, config, position=0) == (0 if "logit_bias" in more else 2)


@pytest.mark.parametrize("bad", [float("nan"), INF, -INF])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    config = GenerationConfig(temperature=temperature)
    with pytest.raises(FloatingPointError, match="the model returned logits that are not finite"):
        sample(np.array([0.0, bad, 1.0]), config, position=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be between 0 and 100"),
        ({"temperature": 101}, "temperature is 101; it must be between 0 and 100"),
        ({"temperature": float("nan")}, "temperature is nan; it must be between 0 and 100"),
        ({"temperature": "0.8"}, "temperature is '0.8'; it must be a number"),
        ({"temperature": True}, "temperature is True; it must be a number"),
        ({"top_k": -1}, "top_k is -1; it must be between 0 and 2147483648"),
        ({"top_k": 5.0}, "top_k is 5.0; it must be a whole number"),
        ({"top_k": True}, "top_k is True; it must be a whole number"),
        ({"top_p": 1.1}, "top_p is 1.1; it must be between 0 and 1"),
        ({"top_p": 0}, "top_p is 0, which keeps no token; use temperature 0 for greedy"),
        ({"min_p": -1}, "min_p is -1; it must be between 0 and 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be between 0.001 and 1000"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1; it must be between 0 and"),
        ({"max_new_tokens": None}, "max_new_tokens is None; it must be a whole number"),
        ({"seed": -1}, "seed is -1; it must be between 0 and"),
        ({"seed": 2**63}, f"seed is {2**63}; it must be between 0 and"),
        ({"stop": ["a", ""]}, r"stop is ['a', '']; it must be a list of texts, none of them empty"),
        ({"stop": [1]}, "stop is [1]; it must be a list of texts"),
        ({"stop": ["a\udce9"]}, r"stop is ['a\udce9'], which is no Unicode text"),
        ({"stop": 5}, "stop is 5; it must be a list of texts"),
        ({"stop": {"a": 1}}, "stop is {'a': 1}; it must be a list of texts"),
        ({"repeat_last_n": -2}, "repeat_last_n is -2; it must be between -1 and"),
        ({"presence_penalty": float("inf")}, "presence_penalty is inf; it must be between -100 and 100"),
        ({"max_time": -1}, "max_time is -1; it must be between 0 and"),
        ({"num_beams": 0}, "num_beams is 0; it must be between 1 and 256"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences is 3; 2 beams give no more than that"),
        ({"early_stopping": "always"}, "early_stopping is 'always'; it must be true, false or never"),
        ({"ignore_eos": 1}, "ignore_eos is 1; it must be true or false"),
        ({"stop_token_ids": 3}, "stop_token_ids is 3; it must be a list of token ids"),
        ({"stop_token_ids": [True]}, "stop_token_ids is [True]; it must be a list of token ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids is [-1]; it must be a list of token ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias is {'x': 1}; it must give a number between -1e6 and 1e6"),
        ({"logit_bias": {"1": float("nan")}}, "logit_bias is {'1': nan}; it must give a number"),
        ({"logit_bias": {-1: 1}}, "logit_bias is {-1: 1}; it must give a number"),
        ({"logit_bias": [1]}, "logit_bias is [1]; it must give a number"),
        ({"top_kk": 5}, "unknown parameter top_kk; did you mean top_k?"),
        ({"xyz": 5}, "unknown parameter xyz; known are temperature, top_k, top_p, "),
        ({5: 5}, "unknown parameter 5; known are temperature, "),
    ],
)
def test_wrong_settings_are_named(settings: dict[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^(?!.*\n)") as caught:
        GenerationConfig.from_dict(settings)
    assert str(caught.value).startswith(message)


def test_limits_of_the_ranges() -> None:
    lowest = {"temperature": 0, "top_k": 0, "top_p": 1e-9, "min_p": 0, "max_new_tokens": 0, "seed": 0}
    highest = {"temperature": 100, "top_k": 2**31, "top_p": 1, "min_p": 1, "max_new_tokens": 2**31, "seed": 2**63 - 1}
    assert GenerationConfig.from_dict(lowest).seed == 0
    assert GenerationConfig.from_dict(highest).seed == 2**63 - 1


def test_settings_as_plain_values() -> None:
    config = GenerationConfig(
        temperature=0.5, stop=("\n\n", "end"), stop_token_ids=(7,), seed=3, logit_bias={5: 1, 9: -2.5}
    )
    values = config.to_dict()
    assert values["temperature"] == 0.5
    assert (values["stop"], values["stop_token_ids"]) == (["\n\n", "end"], [7])
    assert values["logit_bias"] == {"5": 1.0, "9": -2.5}
    assert json.loads(json.dumps(values)) == values
    assert values.keys() == {field.name for field in dataclasses.fields(GenerationConfig)}
    assert GenerationConfig.from_dict(values) == config
    assert GenerationConfig.from_dict({}) == GenerationConfig()


def test_ids_must_be_in_the_vocabulary() -> None:
    GenerationConfig(stop_token_ids=(9,), logit_bias={9: 1}).check_ids(10)
    with pytest.raises(ValueError, match="stop_token_ids names the token 10; the vocabulary has 0 to 9"):
        GenerationConfig(stop_token_ids=(3, 10)).check_ids(10)
    with pytest.raises(ValueError, match="logit_bias names the token 11; the vocabulary has 0 to 9"):
        GenerationConfig(logit_bias={11: 1}).check_ids(10)


def test_one_stop_text_is_not_its_characters() -> None:
    assert GenerationConfig(stop="end").stop == ("end",)  # type: ignore[arg-type]
    assert GenerationConfig.from_dict({"stop": "end"}).stop == ("end",)
    assert GenerationConfig.from_dict({"stop": None}).stop == ()
    assert GenerationConfig(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def test_imports_only_numpy() -> None:
    code = "import sys, smallgpt.sampling; print([m for m in ('torch', 'pydantic', 'yaml') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
