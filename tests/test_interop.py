"""Our weights in Transformers' own classes, loaded from the folder we write."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from smallgpt.interop import main, save_transformers, to_transformers
from smallgpt.model import SmallGPT

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()

    def load(model: SmallGPT, folder: Path) -> torch.nn.Module:
        cls = getattr(transformers, CLASSES[model.config.architecture])
        theirs, report = cls.from_pretrained(folder, output_loading_info=True)
        assert {name: list(names) for name, names in report.items() if names} == {}
        return theirs.eval()

    return load


@pytest.mark.slow
def test_logits_equal_those_of_transformers(model: SmallGPT, tmp_path: Path, load) -> None:
    save_transformers(model, tmp_path)
    theirs = load(model, tmp_path)
    ids = torch.randint(model.config.vocab_size, (3, 32), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours, expected = model(ids)[0], theirs(ids).logits
    assert expected.std() > 1  # logits that say something
    assert (ours - expected).abs().max() < 1e-5
    assert sum(parameter.numel() for parameter in theirs.parameters()) == model.num_parameters()


@pytest.mark.slow
def test_training_settings_travel(tmp_path: Path, load) -> None:
    model = SmallGPT(
        vocab_size=300, embed_dim=16, num_heads=2, num_layers=1, max_seq_len=8, ffn_dim=24, dropout=0.25
    ).eval()
    save_transformers(model, tmp_path)
    theirs = load(model, tmp_path)
    config = theirs.config
    assert (config.embd_pdrop, config.resid_pdrop, config.attn_pdrop) == (0.25, 0.25, 0.0)
    assert (config.bos_token_id, config.eos_token_id) == (3, 3)
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        assert (model(ids)[0] - theirs(ids).logits).abs().max() < 1e-5


def test_the_shape_of_a_config(models: dict[str, SmallGPT]) -> None:
    assert to_transformers(models["llama"])[0]["architectures"] == ["LlamaForCausalLM"]
    config, weights = to_transformers(models["grouped"])
    assert (config["architectures"], config["model_type"]) == (["Qwen3ForCausalLM"], "qwen3")
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 8)
    assert (config["hidden_size"], config["intermediate_size"], config["max_position_embeddings"]) == (32, 128, 32)
    assert weights["model.layers.1.self_attn.k_proj.weight"].shape == (16, 32)
    assert "lm_head.weight" not in weights
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 10_000)
    config, weights = to_transformers(models["gpt2"])
    assert (config["n_embd"], config["n_inner"], config["n_positions"]) == (32, 128, 32)
    assert (config["layer_norm_epsilon"], config["activation_function"]) == (1e-5, "gelu_new")
    assert weights["transformer.h.0.mlp.c_fc.weight"].shape == (32, 128)


def test_command_line(project: Path, models: dict[str, SmallGPT], tmp_path: Path) -> None:
    assert main([str(project / "models/gpt"), "--out", str(tmp_path / "cli")]) == 0
    save_transformers(models["llama"], tmp_path / "api")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "cli" / name).read_bytes() == (tmp_path / "api" / name).read_bytes()
    with safe_open(tmp_path / "cli" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # Transformers 4 refuses a file without it
    with pytest.raises(ValueError, match="the model folder itself"):
        main([str(project / "models/gpt"), "--out", str(project / "data/../models/gpt")])
