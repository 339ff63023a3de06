"""The sampler: each processor on logits written by hand and against Transformers, and draws against exact odds."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smallgpt import sampling
from smallgpt.sampling import (
    GenerationConfig,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    process_logits,
    sample,
    softmax,
    uniform,
)

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}  # draw from the model's own distribution
INF = float("inf")


def logs(*probabilities: float) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities))


def kept(logits: np.ndarray) -> list[int]:
    return np.flatnonzero(np.isfinite(logits)).tolist()


def test_softmax() -> None:
    assert softmax(np.array([0.0, np.log(3.0), -INF])).tolist() == pytest.approx([0.25, 0.75, 0.0])
    assert softmax(np.array([1e30, 1e30], dtype=np.float32)).tolist() == [0.5, 0.5]
    assert softmax(np.zeros((2, 4))).tolist() == [[0.25] * 4] * 2
    assert softmax(np.zeros(3, dtype=np.float16)).dtype == np.float64


def test_repetition_penalty_pulls_both_signs_down() -> None:
    logits = np.array([2.0, -2.0, 4.0, 0.0])
    assert penalize_repetition(logits, [0, 1, 1, 3], 2.0).tolist() == [1.0, -4.0, 4.0, 0.0]
    assert logits.tolist() == [2.0, -2.0, 4.0, 0.0]  # the caller's array stays as it was


def test_top_k() -> None:
    logits = np.array([1.0, 4.0, 2.0, 3.0])
    assert keep_top_k(logits, 2).tolist() == [-INF, 4.0, -INF, 3.0]
    assert kept(keep_top_k(logits, 1)) == [1]
    assert keep_top_k(logits, 4).tolist() == logits.tolist()
    assert keep_top_k(logits, 1000).tolist() == logits.tolist()


def test_top_k_keeps_ties_with_the_last_one() -> None:
    assert kept(keep_top_k(np.array([3.0, 1.0, 2.0, 2.0, 0.0]), 2)) == [0, 2, 3]


def test_top_p() -> None:
    logits = logs(0.5, 0.1, 0.3, 0.06, 0.04)
    assert kept(keep_top_p(logits, 0.7)) == [0, 2]
    assert kept(keep_top_p(logits, 0.85)) == [0, 1, 2]
    assert kept(keep_top_p(logits, 0.45)) == [0]
    assert kept(keep_top_p(logits, 0.999)) == [0, 1, 2, 3, 4]
    assert keep_top_p(logits, 0.7)[[0, 2]].tolist() == logits[[0, 2]].tolist()


def test_top_p_keeps_at_least_one() -> None:
    assert kept(keep_top_p(logs(0.4, 0.6), 1e-300)) == [1]
    assert kept(keep_top_p(np.zeros(4), 1e-9)) == [0]  # of equal ones the smallest id


def test_min_p() -> None:
    logits = logs(0.5, 0.24, 0.26)
    assert kept(keep_min_p(logits, 0.5)) == [0, 2]
    assert kept(keep_min_p(logits, 1.0)) == [0]
    assert kept(keep_min_p(np.zeros(3), 1.0)) == [0, 1, 2]


def test_processors_are_applied_one_after_the_other() -> None:
    logits = logs(0.4, 0.3, 0.2, 0.1)
    config = GenerationConfig(temperature=0.5, top_k=3, top_p=0.6, min_p=0.0)
    # Temperature 0.5 squares the odds: 16, 9, 4 of 29 are left by top-k; 16/29 < 0.6 <= 25/29 by top-p.
    assert softmax(process_logits(logits, config)).tolist() == pytest.approx([16 / 25, 9 / 25, 0, 0])
    config = GenerationConfig(temperature=0.5, top_k=0, top_p=1.0, min_p=0.5)
    assert kept(process_logits(logits, config)) == [0, 1]  # 9/16 passes, 4/16 does not; before squaring 2/4 would
    config = GenerationConfig(**OFF, repetition_penalty=2.0)
    assert process_logits(logits, config, previous=[0]).tolist() == pytest.approx([2 * logits[0], *logits[1:]])
    assert process_logits(logits, config, previous=[]).tolist() == logits.tolist()


def test_processing_leaves_the_logits_alone() -> None:
    logits = np.arange(5, dtype=np.float32)
    config = GenerationConfig(temperature=0.7, top_k=2, top_p=0.5, min_p=0.5, repetition_penalty=1.5)
    process_logits(logits, config, previous=[1, 4])
    sample(logits, config, position=0, previous=[1, 4], banned=[4])
    assert logits.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"top_k": 7},
        {"top_k": 500},
        {"top_p": 0.9},
        {"top_p": 0.3},
        {"min_p": 0.05},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8},
        {"temperature": 1.4, "top_k": 40, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.2},
        {"temperature": 0.6, "top_k": 25, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.1},
    ],
)
def test_same_as_transformers(settings: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    draw = np.random.default_rng(0)
    batch = draw.normal(size=(50, 200)) * draw.uniform(0.5, 4, size=(50, 1))
    previous = draw.integers(200, size=(50, 30))
    expected = torch.from_numpy(batch)
    kinds = {  # in the order in which Transformers puts them into its list
        "repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    for name, kind in kinds.items():
        if name in settings:
            expected = kind(settings[name])(torch.from_numpy(previous), expected.clone())
    config = GenerationConfig(**{**OFF, **settings})
    for row in range(50):
        ours = process_logits(batch[row], config, previous[row].tolist())
        theirs = expected[row].numpy()
        assert kept(ours) == kept(theirs)
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_transformers_applies_the_processors_in_this_order() -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    shape = transformers.GPT2Config(vocab_size=8, n_embd=4, n_head=1, n_layer=1, n_positions=8)
    model = transformers.GPT2LMHeadModel(shape)
    config = transformers.GenerationConfig(
        do_sample=True, temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=1.2
    )
    processors = model._get_logits_processor(config, input_ids_seq_length=1)
    assert [type(processor).__name__ for processor in processors] == [
        "RepetitionPenaltyLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
    ]


def test_temperature_zero_takes_the_most_likely() -> None:
    config = GenerationConfig(temperature=0, top_k=1, top_p=0.1, min_p=0.9)
    logits = np.array([0.0, 2.0, 1.0, 2.0])
    assert {sample(logits, config, position=i, sequence=i) for i in range(20)} == {1}  # the smaller of the equal two
    assert sample(logits, config, position=0, banned=[1]) == 3
    repeated = GenerationConfig(temperature=0, repetition_penalty=4.0)
    assert sample(logits, repeated, position=0, previous=[1, 3]) == 2


@pytest.mark.parametrize(
    ("settings", "exact"),
    [
        ({}, [0.4, 0.25, 0.2, 0.1, 0.05]),
        ({"temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.2}, [64 / 105, 25 / 105, 16 / 105, 0, 0]),
    ],
)
def test_draws_have_the_exact_odds(settings: dict[str, Any], exact: list[float]) -> None:
    stats = pytest.importorskip("scipy.stats")
    logits = logs(0.4, 0.25, 0.2, 0.1, 0.05)
    config = GenerationConfig(**{**OFF, **settings, "seed": 5})
    draws = [sample(logits, config, position=i // 4, sequence=i % 4) for i in range(20_000)]
    counts = np.bincount(draws, minlength=5)
    possible = [i for i, p in enumerate(exact) if p > 0]
    assert counts.sum() == counts[possible].sum()  # nothing impossible is drawn
    assert stats.chisquare(counts[possible], np.array(exact)[possible] * 20_000).pvalue > 1e-3


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


@pytest.mark.parametrize("bad", [float("nan"), INF, -INF])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    config = GenerationConfig(temperature=temperature)
    with pytest.raises(ValueError, match="the model returned logits that are not finite"):
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
        ({"stop": 5}, "stop is 5; it must be a list of texts"),
        ({"stop": {"a": 1}}, "stop is {'a': 1}; it must be a list of texts"),
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
    config = GenerationConfig(temperature=0.5, stop=("\n\n", "end"), seed=3)
    values = config.to_dict()
    assert values == {
        "temperature": 0.5,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_new_tokens": 128,
        "stop": ["\n\n", "end"],
        "seed": 3,
    }
    assert GenerationConfig.from_dict(values) == config
    assert GenerationConfig.from_dict({}) == GenerationConfig()


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
