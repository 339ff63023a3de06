"""A model folder as a folder of CTranslate2: the same weights in float32, which it rounds to int8 itself when asked."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from ctranslate2.specs import common_spec, transformer_spec
from safetensors.numpy import load_file


def write_ct2(model: Path, folder: Path) -> None:
    """Write the weights of the folder `model` to `folder`; the head is tied to the embedding, ids stand for tokens."""
    config = json.loads((model / "config.json").read_text())["model"]
    weights = {name: array.astype(np.float32) for name, array in load_file(model / "model.safetensors").items()}
    gpt2 = config["architecture"] == "gpt2"
    head_dim = config["embed_dim"] // config["num_heads"]
    options: dict[str, Any] = {"activation": common_spec.Activation.GELUTanh}
    if not gpt2:
        options = {
            "activation": common_spec.Activation.SWISH,
            "ffn_glu": True,
            "rms_norm": True,
            "rotary_dim": head_dim,
            "rotary_interleave": False,
            "num_heads_kv": config["num_kv_heads"],
            "qk_norm": config["architecture"] == "qwen3",
        }
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        config["num_layers"], config["num_heads"], pre_norm=True, **options
    )

    def set_norm(part: Any, name: str) -> None:
        part.gamma = weights[f"{name}.weight"]
        if gpt2:
            part.beta = weights[f"{name}.bias"]

    def set_linear(part: Any, name: str, rows: slice = slice(None)) -> None:
        part.weight = weights[f"{name}.weight"][rows]
        if gpt2:
            part.bias = weights[f"{name}.bias"]

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = decoder.projection.weight = weights["wte.weight"]
    if gpt2:
        decoder.position_encodings.encodings = weights["wpe.weight"]
    set_norm(decoder.layer_norm, "ln_f")
    for i, layer in enumerate(decoder.layer):
        name = f"h.{i}"
        set_norm(layer.self_attention.layer_norm, f"{name}.ln_1")
        set_linear(layer.self_attention.linear[0], f"{name}.attn.qkv")
        if config["architecture"] == "qwen3":
            set_norm(layer.self_attention.q_norm, f"{name}.attn.q_norm")
            set_norm(layer.self_attention.k_norm, f"{name}.attn.k_norm")
        set_linear(layer.self_attention.linear[1], f"{name}.attn.proj")
        set_norm(layer.ffn.layer_norm, f"{name}.ln_2")
        half = len(weights[f"{name}.mlp.up.weight"]) // 2
        set_linear(layer.ffn.linear_0, f"{name}.mlp.up", slice(None) if gpt2 else slice(half))
        if not gpt2:
            set_linear(layer.ffn.linear_0_noact, f"{name}.mlp.up", slice(half, None))
        set_linear(layer.ffn.linear_1, f"{name}.mlp.down")
    spec.config.layer_norm_epsilon = 1e-5
    spec.register_vocabulary([f"token{i}" for i in range(config["vocab_size"])])
    spec.config.unk_token = spec.config.bos_token = spec.config.eos_token = "token0"
    spec.validate()
    folder.mkdir(parents=True, exist_ok=True)
    spec.save(str(folder))
