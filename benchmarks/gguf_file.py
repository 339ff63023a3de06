"""A model folder as GGUF, for llama.cpp: the same weights in F32, F16, BF16, Q8_0 or Q4_0."""

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

BLOCK_NAMES = {
    "attn.qkv": "attn_qkv",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "attn.proj": "attn_output",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
}
OTHER_NAMES = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}


def write_gguf(model: Path, path: Path, kind: str) -> None:
    """Write the weights of the folder `model` as `path`; `kind` is a name of gguf.GGMLQuantizationType.

    Every matrix takes that type but the position table, which stays F32 as in llama.cpp's own conversion. The head is
    tied to the embedding. The tokenizer is a stand-in: the benchmark feeds ids.
    """
    config = json.loads((model / "config.json").read_text())["model"]
    heads, width = config["num_heads"], config["embed_dim"]
    gpt2 = config["architecture"] == "gpt2"
    tensors = {}
    for name, array in load_file(model / "model.safetensors").items():
        for key, value in _renamed(name, array.astype(np.float32), config).items():
            tensors[key] = value
    writer = gguf.GGUFWriter(path, config["architecture"])
    writer.add_block_count(config["num_layers"])
    writer.add_context_length(config["max_seq_len"])
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(tensors["blk.0.ffn_down.weight"].shape[1])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_kv_heads"] or heads)
    if gpt2:
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(width // heads)
        writer.add_rope_freq_base(10_000.0)
    writer.add_tokenizer_model("llama")
    vocabulary = [f"token{i}".encode() for i in range(config["vocab_size"])]
    vocabulary[:259] = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % i for i in range(256))]
    writer.add_token_list(vocabulary)
    writer.add_token_scores([0.0] * len(vocabulary))
    kinds = gguf.TokenType
    writer.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256][: len(vocabulary)]
                           + [kinds.NORMAL] * (len(vocabulary) - 259))  # fmt: skip
    quantised = gguf.GGMLQuantizationType[kind]
    for name, array in tensors.items():
        if array.ndim == 2 and name != "position_embd.weight" and kind != "F32":
            writer.add_tensor(name, gguf.quants.quantize(array, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _renamed(name: str, array: np.ndarray, config: dict) -> dict[str, np.ndarray]:
    """One of our tensors under llama.cpp's names: split and permuted where it wants that."""
    stem, end = name.rsplit(".", 1)
    if stem in OTHER_NAMES:
        return {f"{OTHER_NAMES[stem]}.{end}": array}
    _, layer, part = stem.split(".", 2)
    block = f"blk.{layer}"
    if config["architecture"] == "gpt2" or part not in ("attn.qkv", "mlp.up"):
        return {f"{block}.{BLOCK_NAMES[part]}.{end}": array}
    if part == "mlp.up":
        gate, value = np.split(array, 2)
        return {f"{block}.ffn_gate.{end}": gate, f"{block}.ffn_up.{end}": value}
    heads, kv_heads = config["num_heads"], config["num_kv_heads"] or config["num_heads"]
    head_dim = config["embed_dim"] // heads
    q, k, v = np.split(array, np.cumsum([heads * head_dim, kv_heads * head_dim]))
    if config["architecture"] == "llama":
        q, k = _interleaved(q, heads), _interleaved(k, kv_heads)
    return {
        f"{block}.attn_q.{end}": q,
        f"{block}.attn_k.{end}": k,
        f"{block}.attn_v.{end}": v,
    }


def _interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """For its `llama` llama.cpp rotates neighbouring rows of a head together; we, as Transformers, those half apart."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
