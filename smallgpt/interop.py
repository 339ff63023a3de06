"""Weights that travel: a SmallGPT as Transformers' GPT2LMHeadModel, LlamaForCausalLM or Qwen3ForCausalLM."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from smallgpt.cli import run
from smallgpt.files import write_atomic, write_json
from smallgpt.model import NORM_EPS, ROPE_THETA, SmallGPT


def to_transformers(model: SmallGPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The values of config.json and the weights under Hugging Face's names.

    The head is tied to the embedding in both, so it has no weights of its own. Texts begin and end with `<|eos|>`.
    """
    c = model.config
    common = {"vocab_size": c.vocab_size, "tie_word_embeddings": True, "bos_token_id": 3, "eos_token_id": 3}
    make = _gpt2 if c.architecture == "gpt2" else _llama
    values, weights = make(model)
    return {**values, **common}, {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}


def _gpt2(model: SmallGPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    c = model.config
    values: dict[str, Any] = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
    }
    values |= {"n_embd": c.embed_dim, "n_head": c.num_heads, "n_layer": c.num_layers, "n_positions": c.max_seq_len}
    values |= {"n_inner": c.hidden_dim, "layer_norm_epsilon": NORM_EPS}
    values |= {"embd_pdrop": c.dropout, "resid_pdrop": c.dropout, "attn_pdrop": 0.0}
    names = {"attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    weights = {}
    for name, weight in model.state_dict().items():
        linear = next((ours for ours in names if f".{ours}." in name), None)
        if linear is not None:
            name = name.replace(linear, names[linear])
            weight = weight.T if weight.ndim == 2 else weight  # Conv1D holds (in, out)
        weights[f"transformer.{name}"] = weight
    return values, weights


def _llama(model: SmallGPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    c = model.config
    values: dict[str, Any] = {"architectures": [f"{c.architecture.title()}ForCausalLM"], "model_type": c.architecture}
    values |= {"hidden_size": c.embed_dim, "intermediate_size": c.hidden_dim, "num_hidden_layers": c.num_layers}
    values |= {"num_attention_heads": c.num_heads, "num_key_value_heads": c.kv_heads, "head_dim": c.head_dim}
    values |= {"max_position_embeddings": c.max_seq_len, "rms_norm_eps": NORM_EPS, "rope_theta": ROPE_THETA}
    values |= {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    rows = [heads * c.head_dim for heads in (c.num_heads, c.kv_heads, c.kv_heads)]
    ours = model.state_dict()
    weights = {"model.embed_tokens.weight": ours["wte.weight"], "model.norm.weight": ours["ln_f.weight"]}
    for i in range(c.num_layers):
        q, k, v = ours[f"h.{i}.attn.qkv.weight"].split(rows)
        gate, up = ours[f"h.{i}.mlp.up.weight"].chunk(2)
        layer = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "mlp.gate_proj": gate}
        layer |= {"mlp.up_proj": up, "mlp.down_proj": ours[f"h.{i}.mlp.down.weight"]}
        layer |= {"self_attn.o_proj": ours[f"h.{i}.attn.proj.weight"], "input_layernorm": ours[f"h.{i}.ln_1.weight"]}
        layer |= {"post_attention_layernorm": ours[f"h.{i}.ln_2.weight"]}
        if c.architecture == "qwen3":
            layer |= {f"self_attn.{x}_norm": ours[f"h.{i}.attn.{x}_norm.weight"] for x in "qk"}
        weights |= {f"model.layers.{i}.{name}.weight": weight for name, weight in layer.items()}
    return values, weights


def save_transformers(model: SmallGPT, folder: str | Path) -> None:
    """Write config.json and model.safetensors for `from_pretrained` of Transformers; other files there stay."""
    values, weights = to_transformers(model)
    # Transformers asks for this one key; a second one would make the bytes differ from process to process.
    write_atomic(Path(folder) / "model.safetensors", save(weights, metadata={"format": "pt"}))
    write_json(Path(folder) / "config.json", values)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m smallgpt.interop models/gpt --out DIR`."""
    parser = argparse.ArgumentParser(prog="python -m smallgpt.interop", description=__doc__)
    parser.add_argument("model", nargs="?", default="models/gpt", help="model folder (default: models/gpt)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write config.json and model.safetensors to")
    options = parser.parse_args(arguments)
    if options.out.resolve() == Path(options.model).resolve():
        raise ValueError(f"--out is {options.out}, the model folder itself; name another one")
    save_transformers(SmallGPT.from_pretrained(options.model), options.out)
    return 0


if __name__ == "__main__":
    run(main)
