"""Generation with PyTorch, and the three public examples."""

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import smallgpt
from smallgpt import SmallGPT, generate_text, load_config
from smallgpt.decode import TorchDecoder, stream_text
from smallgpt.generation import generate
from smallgpt.sampling import GenerationConfig, sample
from smallgpt.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
GREEDY = GenerationConfig(temperature=0, max_new_tokens=100)


@pytest.fixture
def endless(models: dict[str, SmallGPT]) -> SmallGPT:
    """A model that never says <|eos|>: its logit is 0, and others are larger."""
    model = copy.deepcopy(models["llama"])
    with torch.no_grad():
        model.wte.weight[3] = 0
    return model


def new_ids(model: SmallGPT, prompt: list[int], config: GenerationConfig, sequence: int = 0) -> list[int]:
    """The ids that follow a prompt, without the `<|eos|>` that ends them."""
    pieces = [step[0] for step in generate(TorchDecoder(model), [prompt], config, sequences=[sequence])]
    return [piece.token for piece in pieces if piece.token is not None and piece.finish != "eos"]


def uncached(model: SmallGPT, prompt: list[int]) -> Iterator[int]:
    """The obvious loop: the whole text through the model for every token."""
    ids = list(prompt)
    while len(ids) <= model.config.max_seq_len:
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0][0, -1]
        logits[:3] = -torch.inf  # pad, unk, bos
        token = int(logits.argmax())
        if token == 3:
            return
        ids.append(token)
        yield token


@pytest.mark.parametrize("prompt", ["Ann", "Zo\u00eb saw\n", ""])
def test_greedy_equals_the_uncached_loop(model: SmallGPT, tokenizer: Tokenizer, prompt: str) -> None:
    ids = [3, *tokenizer.encode(prompt)]
    expected = list(uncached(model, ids))
    assert new_ids(model, ids, GREEDY) == expected
    assert "".join(stream_text(model, prompt, GREEDY)) == tokenizer.decode(expected)


def test_eos_ends_and_other_control_ids_are_never_drawn(endless: SmallGPT, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Ann saw")
    greedy = new_ids(endless, ids, GREEDY)
    with torch.no_grad():
        endless.wte.weight[:3] = 3 * endless.wte.weight[greedy[:3]]  # larger logits than any other
    assert new_ids(endless, ids, GREEDY) == greedy
    with torch.no_grad():
        endless.wte.weight[3] = 1.01 * endless.wte.weight[greedy[4]]
    expected = list(uncached(endless, ids))
    assert expected == greedy[: len(expected)]
    assert 0 < len(expected) <= 4
    assert new_ids(endless, ids, GREEDY) == expected


def test_the_context_is_used_to_its_end(endless: SmallGPT, tokenizer: Tokenizer) -> None:
    ids = [3, *tokenizer.encode("Ann saw")]
    new = new_ids(endless, ids, GREEDY)
    assert len(ids) + len(new) == 32 + 1  # the last token needs no place in the context
    assert len(new_ids(endless, [9] * 32, GREEDY)) == 1
    for prompt in ([9] * 33, []):
        with pytest.raises(ValueError, match=rf"the prompt has {len(prompt)} tokens; between 1 and 32 fit"):
            new_ids(endless, prompt, GREEDY)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_every_new_token_costs_one_call(endless: SmallGPT, count: int) -> None:
    shapes = []
    endless.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)))
    config = GenerationConfig(max_new_tokens=count)
    assert len(new_ids(endless, [3, 9, 10], config)) == count
    assert shapes == [(1, 3), *[(1, 1)] * 4][:count]


def test_a_seed_gives_the_same_text(endless: SmallGPT) -> None:
    def draw(seed: int, sequence: int = 0) -> str:
        config = GenerationConfig(temperature=1.5, top_k=0, top_p=1.0, seed=seed, max_new_tokens=12)
        return "".join(stream_text(endless, "Ann", config, sequence=sequence))

    texts = [draw(1), draw(2), draw(1, sequence=1)]
    torch.manual_seed(99)
    assert [draw(1), draw(2), draw(1, sequence=1)] == texts
    assert len(set(texts)) == 3


def test_every_position_draws_its_own_number(endless: SmallGPT, tokenizer: Tokenizer) -> None:
    config = GenerationConfig(temperature=1.5, top_k=0, top_p=1.0, max_new_tokens=12)
    ids = [3, *tokenizer.encode("Ann")]
    expected: list[int] = []
    for position in range(12):
        with torch.no_grad():
            logits = endless(torch.tensor([ids + expected]))[0][0, -1].numpy()
        expected.append(sample(logits, config, position=position, sequence=5, banned=(0, 1, 2)))
    assert 3 not in expected
    assert new_ids(endless, ids, config, sequence=5) == expected


def test_max_length_counts_the_prompt(endless: SmallGPT, tokenizer: Tokenizer) -> None:
    prompt = "Ann saw 7 eggs."
    length = len(tokenizer.encode(prompt))
    text = endless.generate(prompt, max_length=length + 4, temperature=0)
    new = new_ids(endless, [3, *tokenizer.encode(prompt)], GREEDY)[:4]
    assert text == prompt + tokenizer.decode(new)
    assert endless.generate(prompt, max_length=2) == prompt


def test_stop_strings(endless: SmallGPT) -> None:
    calls: list[int] = []
    endless.register_forward_hook(lambda module, args, output: calls.append(1))
    text = endless.generate("Ann", temperature=0)
    unstopped = len(calls)
    stop = text[6:8]
    expected = text[: text.index(stop, 3)]
    assert endless.generate("Ann", temperature=0, stop=[stop]) == expected
    assert len(calls) < 2 * unstopped  # the model stopped, not only the text
    assert endless.generate("Ann", temperature=0, stop=stop) == expected  # one text, not its letters
    assert endless.generate("Ann", temperature=0, stop=["not in there"]) == text
    assert endless.generate("Ann", temperature=0, stop=[text[-2:] + "!"]) == text  # what was held back comes at the end


def test_beams_give_the_best_text(models: dict[str, SmallGPT]) -> None:
    model, ids = models["llama"], [3, *models["llama"].tokenizer.encode("Ann")]

    def logprob(text: str) -> float:
        tokens = [*ids, *model.tokenizer.encode(text)]
        with torch.no_grad():
            logits = model(torch.tensor([tokens]))[0][0].log_softmax(-1)
        return float(sum(logits[i - 1, tokens[i]] for i in range(len(ids), len(tokens))))

    config = {"max_new_tokens": 6, "min_new_tokens": 6, "temperature": 0}
    greedy, best = ("".join(stream_text(model, "Ann", GenerationConfig(**config, num_beams=n))) for n in (1, 8))
    assert greedy != best
    assert logprob(best) > logprob(greedy)


def test_a_prompt_of_ids_is_taken_as_it_is(models: dict[str, SmallGPT]) -> None:
    model = models["gpt2"]
    text = "".join(stream_text(model, "Ann", GREEDY))
    assert "".join(stream_text(model, [3, *model.tokenizer.encode("Ann")], GREEDY)) == text
    assert "".join(stream_text(model, model.tokenizer.encode("Ann"), GREEDY)) != text


def test_rows_of_different_lengths_and_their_moves(model: SmallGPT) -> None:
    decoder = TorchDecoder(model)
    rows = [[3, 9, 40], [3], [3, *range(10, 20)]]

    def expect(tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([tokens]))[0][0].numpy()

    decoder.reserve(4)
    padded = np.zeros((3, 11), np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    logits = decoder.fill(0, padded, np.array([3, 1, 11]))
    for i, row in enumerate(rows):
        assert np.abs(logits[i] - expect(row)[-1]).max() < 1e-4
    logits = decoder.step(np.array([50, 51, 52]))
    rows = [[*row, 50 + i] for i, row in enumerate(rows)]
    for i, row in enumerate(rows):
        assert np.abs(logits[i] - expect(row)[-1]).max() < 1e-4
    decoder.select([2, 0, 0])
    assert decoder.lengths.tolist() == [12, 4, 4, 0]
    logits = decoder.extend(1, [60, 61])
    assert np.abs(logits - expect([*rows[0], 60, 61])[-2:]).max() < 1e-4
    decoder.lengths[1] = 5  # the last token is taken back
    logits = decoder.step(np.array([70, 71, 72]))
    for i, row in enumerate(([*rows[2], 70], [*rows[0], 60, 71], [*rows[0], 72])):
        assert np.abs(logits[i] - expect(row)[-1]).max() < 1e-4


def test_dropout_is_off_and_training_goes_on(models: dict[str, SmallGPT]) -> None:
    trained = models["gpt2"]
    model = SmallGPT(tokenizer=trained.tokenizer, **{**trained.config.model_dump(), "dropout": 0.6})
    model.load_state_dict(trained.state_dict())
    model.train()
    assert model.generate("Ann", temperature=0) == trained.generate("Ann", temperature=0)
    assert model.training
    assert model.h[0].training
    with pytest.raises(ValueError, match="unknown parameter temprature; did you mean temperature"):
        model.generate("Ann", temprature=0)
    assert model.training


def test_a_model_without_a_tokenizer_says_what_to_do(models: dict[str, SmallGPT]) -> None:
    model = SmallGPT(**models["gpt2"].config.model_dump())
    with pytest.raises(ValueError, match=r"model\.tokenizer = Tokenizer\.load\('models/tokenizer'\)"):
        model.generate("Ann")
    model.tokenizer = models["gpt2"].tokenizer
    assert model.generate("Ann").startswith("Ann")


def test_public_example_one() -> None:
    model = SmallGPT(vocab_size=10000, embed_dim=512, num_heads=8, num_layers=6, max_seq_len=1024, dropout=0.1)
    assert model.num_parameters() == 24_559_616


def test_public_example_two(project: Path) -> None:
    model = SmallGPT.from_pretrained(project / "models/gpt")
    text = model.generate("Hello world", max_length=50)
    assert text.startswith("Hello world")
    assert text == generate_text(model, prompt="Hello world", max_length=50, temperature=0.8)
    assert text != generate_text(model, prompt="Hello world", max_length=50, temperature=2.0, seed=3)


def test_public_example_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config("params.yaml")
    assert SmallGPT(**config.model.model_dump()).config == config.model
    assert set(smallgpt.__all__) == {"GPTTrainer", "SmallGPT", "__version__", "generate_text", "load_config"}
