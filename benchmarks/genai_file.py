"""A bundle as a folder of onnxruntime-genai: the same graph, behind the inputs that its generator fills in."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from smallgpt.runtime import MANY_ROWS


def write_genai(bundle: Path, folder: Path) -> None:
    """Write the graph of `bundle` and its description; the cache must be in fp32. Only last tokens get logits."""
    graph = onnx.load(bundle / "model.onnx")
    shape = json.loads((bundle / "config.json").read_text())["model"]
    # What smallgpt's runtime counts itself follows here from the attention mask and the ids.
    computed = ("seqlens_k", "total_sequence_length", "logit_index", "integers")
    kept = [value for value in graph.graph.input if value.name not in computed]
    quantized = any(value.name == "integers" for value in graph.graph.input)
    kept.insert(1, helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]))
    graph.graph.ClearField("input")
    graph.graph.input.extend(kept)
    graph.graph.node[-1].output[0] = "rows"  # (B, V)
    last = helper.make_node("Unsqueeze", ["rows", "genai_axis"], ["logits"])  # (B, 1, V)
    prefix = [node for node in _prefix() if node.output[0] != "integers" or quantized]
    nodes = [*prefix, *graph.graph.node, last]
    graph.graph.ClearField("node")
    graph.graph.node.extend(nodes)
    numbers = {"genai_axis": np.array([1]), "genai_one": np.array(1), "genai_many": np.array(MANY_ROWS)}
    graph.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in numbers.items())
    logits = next(value for value in graph.graph.output if value.name == "logits")
    logits.CopyFrom(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, shape["vocab_size"]]))
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(graph, folder / "model.onnx")
    (folder / "genai_config.json").write_text(json.dumps(_description(shape), indent=2))


def _prefix() -> list[NodeProto]:
    def node(op: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
        return helper.make_node(op, inputs, [output], output, **attributes)

    return [
        node("ReduceSum", ["attention_mask", "genai_axis"], "lengths", keepdims=0),  # (B,)
        node("Sub", ["lengths", "genai_one"], "lengths_less_one"),
        node("Cast", ["lengths_less_one"], "seqlens_k", to=TensorProto.INT32),
        node("Shape", ["attention_mask"], "mask_shape"),
        node("Gather", ["mask_shape", "genai_one"], "longest"),
        node("Cast", ["longest"], "total_sequence_length", to=TensorProto.INT32),
        # The last row of each sequence among the flattened ones.
        node("Shape", ["input_ids"], "ids_shape"),
        node("Gather", ["ids_shape", "genai_one"], "new_tokens"),
        node("Size", ["input_ids"], "all_tokens"),
        node("Sub", ["new_tokens", "genai_one"], "first_wanted"),
        node("Range", ["first_wanted", "all_tokens", "new_tokens"], "logit_index"),
        node("GreaterOrEqual", ["all_tokens", "genai_many"], "integers"),
    ]


def _description(shape: dict[str, Any]) -> dict[str, Any]:
    names = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    inputs = {"input_ids": "input_ids", "attention_mask": "attention_mask", **names}
    if shape["architecture"] == "gpt2":
        inputs["position_ids"] = "position_ids"
    decoder = {
        "filename": "model.onnx",
        "head_size": shape["head_dim"],
        "hidden_size": shape["embed_dim"],
        "num_attention_heads": shape["num_heads"],
        "num_key_value_heads": shape["num_kv_heads"],
        "num_hidden_layers": shape["num_layers"],
        "inputs": inputs,
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "session_options": {"provider_options": []},
    }
    # The end of a text is forbidden by a shortest length: the benchmark decodes to a length.
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model = {"type": "decoder", **ids, "vocab_size": shape["vocab_size"], "context_length": shape["max_seq_len"]}
    return {"model": {**model, "decoder": decoder}, "search": {"past_present_share_buffer": True, "do_sample": False}}
