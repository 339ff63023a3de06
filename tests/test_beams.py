"""Beam search: the sequences and scores of Transformers on the same weights, and what Transformers cannot do."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from smallgpt.beams import Hypothesis, beam_search
from smallgpt.decode import TorchDecoder
from smallgpt.interop import to_transformers
from smallgpt.model import SmallGPT
from smallgpt.runtime import OrtGPT
from smallgpt.sampling import GenerationConfig
from smallgpt.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ["", "Ann", "Zo\u00eb saw a red ball.\nBen", "\u674e\u96f7 found"]
MORE_ENDS = {3: 4.0}  # added to the logit of <|eos|>, so that some beams end


def search(model: Any, prompt: list[int], **settings: Any) -> tuple[list[str], tuple[Hypothesis, ...]]:
    """The texts of all steps, and the results."""
    steps = list(beam_search(model, prompt, GenerationConfig(**settings)))
    assert [step.done for step in steps[:-1]] == [()] * (len(steps) - 1)
    return [step.text for step in steps], steps[-1].done


@pytest.fixture(scope="session")
def peers(models: dict[str, SmallGPT]) -> dict[str, Any]:
    """The models of `models` as those of Transformers."""
    transformers = pytest.importorskip("transformers")
    made = {}
    for name, model in models.items():
        values, weights = to_transformers(model)
        kind = getattr(transformers, values["architectures"][0])
        config = kind.config_class(**{key: value for key, value in values.items() if key != "model_type"})
        made[name] = kind(config).eval()
        missing, unexpected = made[name].load_state_dict(weights, strict=False)
        assert unexpected == []
        assert missing == ["lm_head.weight"]  # tied to the embedding
    return made


def theirs(peer: Any, prompt: list[int], **settings: Any) -> list[tuple[tuple[int, ...], float]]:
    """Ids and score of each sequence of Transformers' beam search."""
    transformers = pytest.importorskip("transformers")
    bias = settings.pop("logit_bias", {})
    config = transformers.GenerationConfig(
        **settings,
        do_sample=False,
        sequence_bias=[[[token], value] for token, value in bias.items()] or None,
        suppress_tokens=[0, 1, 2],
        pad_token_id=0,
        eos_token_id=3,
        output_scores=True,
        return_dict_in_generate=True,
    )
    ids = torch.tensor([prompt])
    result = peer.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    found = []
    for row, score in zip(result.sequences[:, len(prompt) :].tolist(), result.sequences_scores.tolist(), strict=True):
        length = row.index(3) + 1 if 3 in row else len(row)
        found.append((tuple(row[:length]), score))
    return found


def compare(model: SmallGPT, peer: Any, prompts: list[str], **settings: Any) -> list[Hypothesis]:
    assert model.tokenizer is not None
    settings = {"early_stopping": True, **settings}  # Transformers' default is False
    results: list[Hypothesis] = []
    for prompt in prompts:
        ids = [3, *model.tokenizer.encode(prompt)]
        expected = theirs(peer, ids, **settings)
        _, ours = search(TorchDecoder(model), ids, **settings)
        assert [found.ids for found in ours] == [ids for ids, _ in expected]
        assert [found.score for found in ours] == pytest.approx([score for _, score in expected], rel=1e-4, abs=1e-4)
        results += ours
    return results


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
def test_same_as_transformers(
    models: dict[str, SmallGPT], peers: dict[str, Any], kind: str, early_stopping: bool | str, length_penalty: float
) -> None:
    settings = {"length_penalty": length_penalty, "early_stopping": early_stopping, "logit_bias": MORE_ENDS}
    more = {"max_new_tokens": 12, "num_return_sequences": 3}
    results = compare(models[kind], peers[kind], PROMPTS[1:3], num_beams=4, **settings, **more)
    assert len(results) == 6
    assert {found.finish for found in results} <= {"eos", "length"}


@pytest.mark.parametrize("num_beams", [2, 3, 8])
@pytest.mark.parametrize("max_new_tokens", [1, 2, 7])
def test_numbers_of_beams_and_lengths(
    models: dict[str, SmallGPT], peers: dict[str, Any], num_beams: int, max_new_tokens: int
) -> None:
    settings = {"num_beams": num_beams, "num_return_sequences": num_beams, "max_new_tokens": max_new_tokens}
    compare(models["grouped"], peers["grouped"], PROMPTS[:2], **settings, logit_bias=MORE_ENDS)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 8},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 5, "length_penalty": 0.5},
    ],
)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_with_processors(
    models: dict[str, SmallGPT], peers: dict[str, Any], kind: str, settings: dict[str, Any]
) -> None:
    common = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 10, "logit_bias": MORE_ENDS}
    compare(models[kind], peers[kind], PROMPTS[1:3], **{**common, **settings})


def test_both_kinds_of_end_were_compared(models: dict[str, SmallGPT], peers: dict[str, Any]) -> None:
    settings = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 6, "early_stopping": "never"}
    results = []
    for bias in (0.0, 2.0, 4.0):
        results += compare(models["gpt2"], peers["gpt2"], PROMPTS, logit_bias={3: bias}, **settings)
    assert {found.finish for found in results} == {"eos", "length"}
    assert len({len(found.ids) for found in results}) > 3


def exhaustive(model: SmallGPT, prompt: list[int], length: int, allowed: list[int]) -> list[tuple[float, tuple]]:
    """All continuations of `length` tokens that do not end before, best first."""
    found = []
    for ids in itertools.product(allowed, repeat=length):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]]))[0][0].log_softmax(-1)
        found.append((float(sum(logits[len(prompt) - 1 + i, ids[i]] for i in range(length))), ids))
    return sorted(found, reverse=True)


def test_with_enough_beams_the_best_of_all_is_found(models: dict[str, SmallGPT]) -> None:
    model = models["llama"]
    allowed = [50, 51, 52, 53]
    bias = {token: -1e6 for token in range(3, 320) if token not in allowed}
    settings = {"num_beams": 64, "max_new_tokens": 3, "length_penalty": 0.0, "num_return_sequences": 5}
    _, found = search(TorchDecoder(model), [3, 9], **settings, logit_bias=bias)
    expected = exhaustive(model, [3, 9], 3, allowed)[:5]
    assert [result.ids for result in found] == [ids for _, ids in expected]
    assert [result.score for result in found] == pytest.approx([score for score, _ in expected], abs=1e-4)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[SmallGPT, OrtGPT]]:
    pairs = {}
    for kind in ("gpt2", "llama"):
        model = tiny.random_model(kind)
        bundles = tiny.write_bundles(tmp_path_factory.mktemp(kind), model, ["fp32"])
        pairs[kind] = (model, OrtGPT(bundles / "fp32", threads=1))
    return pairs


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_onnx_gives_what_pytorch_gives(served: dict[str, Any], kind: str) -> None:
    model, runtime = served[kind]
    for prompt, beams in (("the cat", 2), ("", 4), ("a dog sat on the mat and", 7)):
        ids = [3, *runtime.tokenizer.encode(prompt)]
        for more in ({}, {"stop": ("a",)}, {"early_stopping": "never", "length_penalty": 2.0, "ignore_eos": True}):
            settings = {"num_beams": beams, "num_return_sequences": beams, "max_new_tokens": 20, **more}
            texts, expected = search(TorchDecoder(model), ids, **settings)
            found_texts, found = search(runtime, ids, **settings)
            assert found_texts == texts
            assert [(r.ids, r.text, r.finish) for r in found] == [(r.ids, r.text, r.finish) for r in expected]
            assert [r.score for r in found] == pytest.approx([r.score for r in expected], abs=1e-4)


def test_the_cache_of_beams_that_swap_places_is_right(served: dict[str, Any]) -> None:
    """The score of a result is that of its ids run alone."""
    model, runtime = served["llama"]
    _, found = search(runtime, [3, 9, 40], num_beams=6, num_return_sequences=6, max_new_tokens=25, length_penalty=0.0)
    for result in found:
        with torch.no_grad():
            logits = model(torch.tensor([[3, 9, 40, *result.ids]]))[0][0].log_softmax(-1)
        assert result.score == pytest.approx(
            float(sum(logits[2 + i, token] for i, token in enumerate(result.ids))), abs=1e-3
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("stop", [(), ("n",), ("a ", "ed"), ("e", "xyz")])
def test_what_is_streamed_is_never_taken_back(served: dict[str, Any], kind: str, stop: tuple[str, ...]) -> None:
    model, _ = served[kind]
    streamed_early = 0
    for prompt in ("", "the cat", "a dog sat on the", "happy and sad"):
        for early_stopping in (True, False, "never"):
            texts, found = search(
                TorchDecoder(model),
                [3, *tiny.tokenizer().encode(prompt)],
                num_beams=3,
                num_return_sequences=3,
                max_new_tokens=24,
                stop=stop,
                early_stopping=early_stopping,
            )
            assert "".join(texts) == found[0].text
            streamed_early += len("".join(texts[:-1]))
            assert [result.score for result in found] == sorted((r.score for r in found), reverse=True)
            for result in found:
                assert not any(text in result.text for text in stop)
                decoded = tiny.tokenizer().decode(token for token in result.ids if token != 3)
                assert decoded.startswith(result.text.rstrip("\ufffd"))
                if result.finish == "stop":
                    rest = decoded[len(result.text) :]
                    assert rest.startswith(stop)
                else:
                    assert not any(text in decoded for text in stop)
    assert streamed_early > 0


def test_a_stop_string_across_tokens_and_a_stop_token(models: dict[str, SmallGPT], tokenizer: Tokenizer) -> None:
    decoder, ids = TorchDecoder(models["llama"]), [3, *tokenizer.encode("Ann")]
    settings = {"num_beams": 3, "max_new_tokens": 10, "min_new_tokens": 10}
    _, (plain,) = search(decoder, ids, **settings)
    pieces = [tokenizer.decode([token]) for token in plain.ids]
    at = next(i for i in range(2, 9) if pieces[i].strip("\ufffd") and pieces[i + 1].strip("\ufffd"))
    across = pieces[at][-1] + pieces[at + 1][0]
    assert not any(across in piece for piece in pieces)
    stop = {"num_beams": 3, "max_new_tokens": 10, "length_penalty": 0.0, "num_return_sequences": 3}
    _, found = search(decoder, ids, **stop, stop=(across,), ignore_eos=True, early_stopping="never")
    assert all(across not in result.text for result in found)
    token = plain.ids[3]
    _, found = search(decoder, ids, **stop, stop_token_ids=(token,))
    ended = [result for result in found if result.finish == "stop"]
    assert all(result.ids[-1] == token and token not in result.ids[:-1] for result in ended)
    assert all(token not in result.ids for result in found if result.finish != "stop")
    assert ended


def test_limits(models: dict[str, SmallGPT]) -> None:
    decoder = TorchDecoder(models["gpt2"])
    texts, found = search(decoder, [3, 9], num_beams=3, max_new_tokens=0)
    assert (texts, found) == ([""], (Hypothesis((), "", 0.0, "length"),))
    _, found = search(decoder, [3, 9], num_beams=3, max_length=4, ignore_eos=True)  # <|eos|> in front does not count
    assert (len(found[0].ids), found[0].finish) == (3, "length")
    _, found = search(decoder, [9] * 32, num_beams=3, ignore_eos=True)
    assert (len(found[0].ids), found[0].finish) == (1, "length")
    _, found = search(decoder, [9] * 30, num_beams=3, num_return_sequences=3, ignore_eos=True)
    assert [(len(result.ids), result.finish) for result in found] == [(3, "length")] * 3
    _, found = search(decoder, [3], num_beams=3, max_time=1e-9, num_return_sequences=2)
    assert [(len(result.ids), result.finish) for result in found] == [(1, "time")] * 2


def test_control_ids_are_in_no_beam(models: dict[str, SmallGPT]) -> None:
    bias = {0: 50.0, 1: 50.0, 2: 50.0}
    _, found = search(TorchDecoder(models["llama"]), [3], num_beams=4, num_return_sequences=4, logit_bias=bias)
    assert not {0, 1, 2} & {token for result in found for token in result.ids}


def test_fewer_ways_on_than_beams(models: dict[str, SmallGPT]) -> None:
    decoder = TorchDecoder(models["llama"])
    settings = {"num_beams": 200, "num_return_sequences": 200, "max_new_tokens": 2, "no_repeat_ngram_size": 1}
    _, found = search(decoder, [3, *range(10, 25)], **settings, logit_bias={4: 9.0})
    assert len(found) == len({result.ids for result in found}) == 200
    assert np.isfinite([result.score for result in found]).all()


def test_wrong_requests(models: dict[str, SmallGPT]) -> None:
    decoder = TorchDecoder(models["llama"])
    for prompt, message in (([], "has 0 tokens"), ([9] * 33, "has 33 tokens"), ([320], "ids from 320 to 320")):
        with pytest.raises(ValueError, match=message):
            search(decoder, prompt, num_beams=2)
    with pytest.raises(ValueError, match="stop_token_ids names the token 320"):
        search(decoder, [3], num_beams=2, stop_token_ids=(320,))


def test_broken_logits_are_not_taken_for_forbidden_tokens(models: dict[str, SmallGPT]) -> None:
    decoder = TorchDecoder(models["llama"])
    decoder.step = lambda tokens: np.full((len(tokens), 320), np.nan)  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="logits that are not finite"):
        list(beam_search(decoder, [3, 9], GenerationConfig(num_beams=2, max_new_tokens=3, ignore_eos=True)))


def test_settings_of_sampling_do_not_act(served: dict[str, Any]) -> None:
    _, runtime = served["gpt2"]
    settings = {"num_beams": 3, "max_new_tokens": 10}
    other = {"temperature": 2.0, "top_k": 1, "top_p": 0.1, "min_p": 0.9, "seed": 7}
    assert search(runtime, [3, 9], **settings) == search(runtime, [3, 9], **settings, **other)
