"""benchmarks/variants.py: every variant trains, and does what it is named after."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_run import ROOT, SEQ_LEN, configure, copy, run_loop, same, token_file, write_project

import smallgpt.model
import smallgpt.train
from smallgpt import loop, state
from smallgpt.model import SmallGPT
from smallgpt.tokenizer import Tokenizer
from smallgpt.tokens import batch

pytestmark = pytest.mark.usefixtures("one_thread")
QWEN3 = {"architecture": "qwen3"}
NAMES = [
    "squared ReLU",
    "layer drop 0.05",
    "layer drop 0.1",
    "mean of the last weights",
    "two tokens",
    "documents reshuffled",
]


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, and the library as it was once the test is over."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import variants

    for module, names in (
        (smallgpt.model, ("Block", "SwiGLU")),
        (state, ("SmallGPT",)),
        (loop, ("batch", "next_token_loss", "train_step", "validate")),
        (smallgpt.train, ("fingerprint",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name))
    return variants


def documents() -> np.ndarray:
    """A stream of nine documents of 40 ids, each of its own ids."""
    draw = np.random.Generator(np.random.Philox(3))
    texts = [10 + 20 * number + draw.integers(0, 20, 40) for number in range(9)]
    return np.concatenate([[2], *(np.append(text, 2) for text in texts)]).astype(np.uint16)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layer drop 0.1", "two tokens"])
def test_a_variant_is_compiled_into_the_same_losses(variants: ModuleType, tmp_path: Path, name: str) -> None:
    variants.VARIANTS[name]()
    losses = []
    for compiled in (False, True):
        config = configure(QWEN3, max_steps=6, eval_interval=6, compile=compiled)
        losses.append([row["loss"] for row in run_loop(config, tmp_path / str(compiled)).train_rows])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_trains_another_model(variants: ModuleType, tmp_path: Path, name: str) -> None:
    assert list(variants.VARIANTS) == NAMES
    config = configure(QWEN3, ema_decay=0.0, max_steps=30, warmup_steps=2, eval_interval=30)
    data = {"train": token_file(documents()), "valid": token_file(documents())}
    control = run_loop(config, tmp_path / "control", data=data)
    variants.VARIANTS[name]()
    changed = run_loop(config, tmp_path / "changed", data=data)
    first, last = (rows["loss"] for rows in (changed.valid_rows[0], changed.valid_rows[-1]))
    assert last < first - 0.5
    assert last != control.valid_rows[-1]["loss"]
    variants_of_the_loop = ("mean of the last weights", "documents reshuffled")
    assert (changed.train_rows[0]["loss"] == control.train_rows[0]["loss"]) == (name == variants_of_the_loop[0])


def test_squared_relu_has_as_many_parameters(variants: ModuleType) -> None:
    shape = configure({**QWEN3, "ffn_dim": 96}).model.model_dump()
    control = SmallGPT(**shape)
    variants.VARIANTS["squared ReLU"]()
    changed = SmallGPT(**shape)
    assert changed.num_parameters() == control.num_parameters()
    layer, x = changed.h[0].mlp, torch.randn(2, 3, 32)
    expected = ((x @ layer.up.weight.T).clamp(min=0) ** 2) @ layer.down.weight.T
    torch.testing.assert_close(layer(x), expected)


def test_a_dropped_layer_is_passed_by_and_its_mean_is_the_layer(variants: ModuleType) -> None:
    torch.manual_seed(0)
    shape = configure(QWEN3).model
    layer = variants.LayerDrop(shape)
    layer.rate = 0.25
    rotary = smallgpt.model.rotary_tables(SEQ_LEN, shape.head_dim)
    x = torch.randn(1, SEQ_LEN, 32).expand(4000, -1, -1)
    with torch.no_grad():
        all_of_it, _ = layer.eval()(x[:1], rotary, None)
        y, _ = layer.train()(x, rotary, None)
    passed_by = (y == x).all(dim=(1, 2))
    assert 900 < passed_by.sum() < 1100
    torch.testing.assert_close(y[~passed_by], (x + (all_of_it - x) / 0.75)[~passed_by])


def test_the_mean_is_that_of_the_last_weights_at_even_steps(variants: ModuleType, tmp_path: Path) -> None:
    config = configure(QWEN3, ema_decay=0.0, max_steps=9, eval_interval=9)
    variants.average_last(count=3, marks=4)  # after 2, 4, 6, 8 and 9 steps
    seen = []
    one_step = loop.train_step

    def step(*arguments: object) -> object:
        result = one_step(*arguments)
        seen.append(copy(arguments[1].model.state_dict()))
        return result

    loop.train_step = step
    at = run_loop(config, tmp_path)
    expected = {name: (seen[5][name] + seen[7][name] + seen[8][name]) / 3 for name in seen[0]}
    assert at.best_step == 9
    for name, value in at.best.items():
        torch.testing.assert_close(value, expected[name])
    assert same(at.model.state_dict(), seen[8])  # the training went on without the mean


def test_the_second_token_counts_less_and_less_and_never_on_valid(variants: ModuleType, tmp_path: Path) -> None:
    shape = configure(QWEN3).model.model_dump()
    torch.manual_seed(1)
    control = SmallGPT(**shape).state_dict()
    torch.manual_seed(1)
    model = variants.TwoTokens(**shape)
    assert same(control, {name: model.state_dict()[name] for name in control})  # of one seed, so they can be compared
    assert 0.01 < model.h[2].attn.qkv.weight.std() < 0.03
    ids = torch.from_numpy(np.random.default_rng(0).integers(4, 320, (2, SEQ_LEN + 1)))
    x, y = ids[:, :-1], ids[:, 1:]
    model.weight.fill_(0.3)
    (following, second, weight), _ = model.train()(x)
    one = F.cross_entropy(following.flatten(0, 1), y.flatten())
    two = F.cross_entropy(second[:, :-1].flatten(0, 1), ids[:, 2:].flatten())  # id t + 2 after ids up to t
    torch.testing.assert_close(variants.two_token_loss((following, second, weight), y), one + 0.3 * two)
    torch.testing.assert_close(model.eval()(x)[0], following)

    weights = []
    variants.VARIANTS["two tokens"]()
    one_step = loop.train_step

    def step(*arguments: object) -> object:
        result = one_step(*arguments)
        weights.append(arguments[1].model.weight.item())
        return result

    loop.train_step = step
    at = run_loop(configure(QWEN3, max_steps=4), tmp_path)
    assert weights == pytest.approx([0.3, 0.225, 0.15, 0.075])
    assert len(at.model.h) == 3


def test_documents_stay_whole_and_their_order_is_another_in_every_epoch(variants: ModuleType) -> None:
    ids = documents()
    streams = [variants.shuffle_documents(ids, 1, epoch) for epoch in (0, 1, 0)]
    texts = [tuple(text) for text in np.split(ids[1:], range(41, 369, 41))]
    assert [sorted(map(tuple, np.split(stream[1:], range(41, 369, 41)))) for stream in streams] == [sorted(texts)] * 3
    assert (streams[0] == streams[2]).all()
    assert (streams[0] != streams[1]).any()
    variants.VARIANTS["documents reshuffled"]()
    a_pass = (len(ids) - SEQ_LEN) // SEQ_LEN  # 22 windows; three steps of eight begin the next
    x, y = loop.batch(ids, seed=1, step=2, batch_size=8, seq_len=SEQ_LEN)
    assert (x[:, 1:] == y[:, :-1]).all()
    for row, index in enumerate(range(16, 24)):
        stream = streams[index // a_pass]
        assert (x[row] == batch(stream, seed=1, step=index, batch_size=1, seq_len=SEQ_LEN)[0]).all()
    with pytest.raises(ValueError, match="one document"):
        variants.shuffle_documents(ids[:42], 1, 0)


def test_the_command_trains_a_variant_or_says_what_is_wrong(
    variants: ModuleType, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_project(tmp_path, configure(QWEN3), tokenizer)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["variants.py", "squared ReLU"])
    variants.main()
    assert (tmp_path / "reports/train/summary.json").is_file()
    monkeypatch.setattr(sys, "argv", ["variants.py", "cubed ReLU"])
    with pytest.raises(SystemExit, match="name one of squared ReLU"):
        variants.main()
    write_project(tmp_path / "gpt2", configure({"architecture": "gpt2"}), tokenizer)
    monkeypatch.chdir(tmp_path / "gpt2")
    monkeypatch.setattr(sys, "argv", ["variants.py", "squared ReLU"])
    with pytest.raises(ValueError, match="llama and qwen3"):
        variants.main()
