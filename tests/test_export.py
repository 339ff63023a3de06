import base64
import dataclasses
import json
import logging
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import closure
import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch

from smallgpt import export as export_module
from smallgpt.builder import MOST_COLUMNS, GraphBuilder
from smallgpt.bundle import FILES, load_bundle, write_config
from smallgpt.cli import MismatchError
from smallgpt.config import ExportConfig
from smallgpt.export import VARIANTS, export, library_hashes, second_moments
from smallgpt.files import sha256_bytes, sha256_file, write_json
from smallgpt.generation import MANY_TOKENS, Batch
from smallgpt.model import SmallGPT
from smallgpt.quantize import Quantized, quantize, quantize_weights
from smallgpt.runtime import MANY_ROWS, OrtGPT, check_golden
from smallgpt.sampling import GenerationConfig
from stages.export import main as stage

MODELS = {
    "gpt2": {"architecture": "gpt2"},
    "llama": {"architecture": "llama"},
    "qwen3-grouped": {"architecture": "qwen3", "num_kv_heads": 2},
}
CONTEXT = 64


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[SmallGPT, Path]:
    """A model of each kind and the folder of its bundles."""
    model = tiny.random_model(**MODELS[request.param])
    return model, tiny.write_bundles(tmp_path_factory.mktemp(request.param), model, list(VARIANTS))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    tiny.write_bundles(folder, tiny.random_model(), ["fp32"])
    return folder


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the branches in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from all_nodes(attribute.g)


def random_ids(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(4, tiny.tokenizer().vocab_size, shape)


def torch_logits(model: SmallGPT, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(ids))[0].numpy()


def run_export(project: Path, out: Path, variants: list[str]) -> dict[str, dict[str, object]]:
    config = ExportConfig(variants=variants, certificate_tokens=300, threads=1)
    report = out.with_suffix(".json")
    return export(project / "model", project / "tokens", config, GenerationConfig(), out=out, report=report)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "tolerance"), [("fp32", 2e-5), ("fp16", 0.05)])
def test_ragged_batches_equal_torch_up_to_the_last_position(pair, variant: str, tolerance: float) -> None:
    model, bundles = pair
    served = OrtGPT(bundles / variant, device="cpu", threads=1)
    lengths = np.array([50, 1, 31, 2, 50])
    rows = random_ids(5, CONTEXT)
    expected = torch_logits(model, rows)
    each = np.arange(5)
    logits = served.prefill(rows[:, :50], lengths)
    np.testing.assert_allclose(logits, expected[each, lengths - 1], rtol=0, atol=tolerance)
    for step in range(CONTEXT - 50):
        logits = served.step(rows[each, lengths + step])
        np.testing.assert_allclose(logits, expected[each, lengths + step], rtol=0, atol=tolerance)
    assert served.lengths.max() == CONTEXT
    with pytest.raises(ValueError, match="65 tokens do not fit into the context of 64"):
        served.step(rows[:, 0])
    assert np.abs(expected).max() > 4  # the tolerance means something


@pytest.mark.parametrize("variant", ["int8", "int4"])
@pytest.mark.parametrize(
    "shape",
    [
        {"embed_dim": 128},
        {"embed_dim": 40, "num_heads": 5, "max_seq_len": 33},  # no block divides 40
        {"architecture": "llama", "embed_dim": 96, "num_heads": 3, "ffn_dim": 88},
        {"architecture": "qwen3", "num_kv_heads": 2},
    ],
)
def test_quantised_graphs_compute_with_the_dequantised_weights(
    tmp_path: Path, shape: dict[str, object], variant: str
) -> None:
    model = tiny.random_model(**shape)
    bundle = tiny.write_bundles(tmp_path, model, [variant]) / variant
    moments = second_moments(model, np.fromfile(tmp_path / "tokens" / "train.bin", np.uint16).astype(np.int64))
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    quantized = quantize_weights(weights, VARIANTS[variant].bits, moments)
    rounded = {
        name: value.dequantized() if isinstance(value, Quantized) else value for name, value in quantized.items()
    }
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in rounded.items()})
    # With inputs in full precision the graph must give the same as PyTorch with the dequantised weights.
    graph = onnx.load(bundle / "model.onnx")
    for node in all_nodes(graph.graph):
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    onnx.save(graph, bundle / "model.onnx")
    served = OrtGPT(bundle, device="cpu", threads=1, verify=False)
    context = model.config.max_seq_len
    few = MANY_TOKENS - 1
    rows, lengths = random_ids(3, context), np.array([few, 1, 5])
    expected = torch_logits(model, rows)
    np.testing.assert_allclose(served.logits(rows[0], range(1, context)), expected[0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(served.logits(rows[0], range(few, context, few)), expected[0], rtol=0, atol=1e-4)
    # Many tokens have their inputs rounded to 8 bits, row by row.
    difference = np.abs(served.logits(rows[0]) - expected[0]).mean()
    assert 0 < difference < 0.05 * expected.std()
    logits = served.prefill(rows[:, : lengths[0]], lengths)
    np.testing.assert_allclose(logits, expected[np.arange(3), lengths - 1], rtol=0, atol=1e-4)
    for step in range(3):
        logits = served.step(rows[np.arange(3), lengths + step])
        np.testing.assert_allclose(logits, expected[np.arange(3), lengths + step], rtol=0, atol=1e-4)


def test_an_int8_cache_holds_the_rounded_keys_and_values(pair) -> None:
    model, bundles = pair
    served = OrtGPT(bundles / "int8-kv8", device="cpu", threads=1)
    assert served.bundle.config.dtype == "int8"
    ids = np.fromfile(bundles.parent / "tokens" / "train.bin", np.uint16).astype(np.int64)
    with torch.inference_mode():
        caches = [model(torch.from_numpy(ids[None, i : i + CONTEXT]))[1] for i in range(0, len(ids), CONTEXT)]
    graph = onnx.load(bundles / "int8-kv8" / "model.onnx").graph
    scales = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    plain = OrtGPT(bundles / "int8", device="cpu", threads=1)
    for one in (served, plain):
        one.prefill(ids[None, : CONTEXT - 1])
        one.step(ids[CONTEXT - 1 : CONTEXT])
    for layer in range(2):
        for kind, name in enumerate(("k_scale", "v_scale")):
            scale = scales[f"h.{layer}.attn.{name}"]  # (KV, 1, head_dim)
            largest = torch.stack([cache[layer][kind][0].abs().amax(1) for cache in caches]).amax(0)
            np.testing.assert_allclose(scale[:, 0] * 127, 2 * largest, rtol=1e-5)
            found = served._block[2 * layer + kind, 0] * scale
            expected = plain._block[2 * layer + kind, 0]
            if layer == 0:  # rounded to the nearest level, and nothing else
                assert (np.abs(found - expected) < 0.501 * scale).all()
            # The last token's are those of a layer that has read rounded ones.
            assert np.abs(found - expected).max() < 0.5 * scale.max() + 0.05 * np.abs(expected).max()
            assert np.abs(served._block[2 * layer + kind]).max() > 40
    rows = random_ids(CONTEXT)
    assert np.array_equal(served.logits(rows), plain.logits(rows))  # a prompt reads its own ones as they are
    for cuts in (range(1, CONTEXT), range(20, CONTEXT, 12)):  # through both branches of the graph
        logits = torch_logits(model, rows[None])[0]
        error, base = (np.abs(one.logits(rows, cuts) - logits).mean() for one in (served, plain))
        assert base * 0.8 < error < base * 1.5


def test_whole_weights_with_an_int8_cache(pair) -> None:
    _, bundles = pair
    small, plain = (OrtGPT(bundles / variant, device="cpu", threads=1) for variant in ("fp32-kv8", "fp32"))
    row = random_ids(CONTEXT)
    whole = plain.logits(row).copy()
    assert np.array_equal(small.logits(row), whole)
    # By single tokens and by pieces, through both branches of the graph; a piece reads its own ones as they are.
    singles, pieces = (np.abs(small.logits(row, c) - whole).mean() for c in (range(1, CONTEXT), range(20, CONTEXT, 12)))
    assert 0.2 * singles < pieces < singles < 0.05 * whole.std()
    assert small._block.nbytes * 4 == plain._block.nbytes


def test_second_moments_are_those_of_the_layers_inputs() -> None:
    model = tiny.random_model()
    ids = random_ids(150)
    moments = second_moments(model, ids)
    assert sorted(moments) == sorted(
        name for name in model.state_dict() if name.startswith("h.") and ".ln" not in name and name.endswith("weight")
    )
    with torch.no_grad():
        x = model.h[0].ln_1(model.wte(torch.from_numpy(ids)) + model.wpe(torch.arange(150) % CONTEXT))
    np.testing.assert_allclose(moments["h.0.attn.qkv.weight"], (x.T @ x / 150).numpy(), rtol=1e-4, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_every_prompt_cut_equals_torch(pair) -> None:
    model, bundles = pair
    served = OrtGPT(bundles / "fp32", threads=1)
    row = random_ids(CONTEXT)
    expected = torch_logits(model, row[None])[0]
    for cuts in [(), *((cut,) for cut in range(1, CONTEXT)), range(1, CONTEXT), (3, 4, 20)]:
        np.testing.assert_allclose(served.logits(row, cuts), expected, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="65 tokens do not fit into the context of 64"):
        served.logits(random_ids(CONTEXT + 1))


def test_logits_do_not_depend_on_the_batch(pair) -> None:
    served = OrtGPT(pair[1] / "fp32", threads=1)
    rows, lengths, each = random_ids(7, CONTEXT), np.array([9, 40, 1, 17, 40, 3, 22]), np.arange(7)
    batched = [served.prefill(rows[:, :40], lengths).copy()]
    batched += [served.step(rows[each, lengths + step]).copy() for step in range(10)]
    for i in each:
        alone = [served.prefill(rows[i : i + 1, : lengths[i]], capacity=50).copy()]
        alone += [served.step(rows[i : i + 1, lengths[i] + step]).copy() for step in range(10)]
        assert np.array_equal(np.stack(alone)[:, 0], np.stack(batched)[:, i])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("columns", "bias", "least"), [(40, False, None), (40, True, None), (1100, True, None), (1100, False, -0.2)]
)
def test_products_in_integers(bits: int, columns: int, bias: bool, least: float | None) -> None:
    """Against sums of whole numbers in NumPy, each part of a row with its scale; a row of zeros stays zeros."""
    draw = np.random.default_rng(bits)
    x, offset = draw.standard_normal((2, 5, columns), np.float32), draw.standard_normal(24, np.float32) * bias
    x = np.maximum(x, least) if least else x
    x[1, 2] = 0
    x[0, 0, -1] = 50
    weight = quantize(draw.standard_normal((24, columns), np.float32), bits, np.eye(columns) if bits == 4 else None)
    builder = GraphBuilder("float32", integers=True)
    builder.quantized("w", weight)
    builder.product("x", "w", weight, "y", builder.weight("offset", offset) if bias else "", least)
    value = onnx.helper.make_tensor_value_info
    ends = [value("x", onnx.TensorProto.FLOAT, [2, 5, columns])], [value("y", onnx.TensorProto.FLOAT, [2, 5, 24])]
    graph = onnx.helper.make_graph(builder.nodes, "product", *ends, list(builder.constants.values()))
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    [result] = session.run(None, {"x": x})

    matrix = weight.dequantized()
    of_outputs = weight.scales[:, 0] if bits == 8 else np.abs(matrix).max(1) / 127
    levels = np.rint(matrix / of_outputs[:, None]).astype(np.int64)
    expected = np.broadcast_to(offset, result.shape).astype(np.float64)
    for part in np.array_split(np.arange(columns), 1 if least else -(-columns // MOST_COLUMNS)):
        inputs = x[..., part]
        steps = np.abs(inputs).max(-1, keepdims=True) / 127
        if least:  # 16 of the 256 levels reach down to it
            steps = np.maximum(inputs.max(-1, keepdims=True) / 239, -least / 16)
        inputs = np.rint(np.divide(inputs, steps, out=np.zeros_like(inputs), where=steps > 0)).astype(np.int64)
        expected = expected + inputs @ levels[:, part].T * steps * of_outputs
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)
    assert np.array_equal(result[1, 2], offset)


@pytest.mark.parametrize("variant", ["int8", "int4"])
def test_company_does_not_change_the_digits_of_long_prompts(pair, variant: str) -> None:
    _, bundles = pair
    served = OrtGPT(bundles / variant, device="cpu", threads=2, verify=False)
    rows = random_ids(7, 30)
    together = served.prefill(rows).copy()
    for row, logits in zip(rows, together, strict=True):
        assert np.array_equal(served.prefill(row[None])[0], logits)


@pytest.mark.parametrize("variant", ["int8", "int4-kv8"])
def test_many_rows_are_multiplied_in_integers_where_batches_may_matter(pair, variant: str) -> None:
    _, bundles = pair
    served = OrtGPT(bundles / variant, device="cpu", threads=2, verify=False)
    faster = OrtGPT(bundles / variant, device="cpu", threads=2, verify=False, batch_invariant=False)
    rows, lengths = random_ids(12, 30), np.array([30, 1, 12, 29, 2, 30, 9, 17, 30, 3, 21, 8])

    def steps(model: OrtGPT, batch: int) -> np.ndarray:
        model.reserve(batch)
        model.fill(0, rows[:batch], lengths[:batch])
        return np.stack([model.step(rows[:batch, i]).copy() for i in range(3)], 1)

    expected, found = steps(served, 12), steps(faster, 12)
    difference = np.abs(found - expected).mean()
    assert 0 < difference < 0.05 * expected.std()
    assert np.array_equal(steps(served, 2), expected[:2])
    assert np.array_equal(steps(faster, MANY_ROWS), found[:MANY_ROWS])  # no row depends on another
    assert np.array_equal(steps(faster, MANY_ROWS - 1), steps(served, MANY_ROWS - 1))
    assert np.array_equal(faster.extend(0, rows[0, :MANY_ROWS]), served.extend(0, rows[0, :MANY_ROWS]))


def test_short_prompts_are_filled_apart_from_long_ones(pair) -> None:
    served = OrtGPT(pair[1] / "int8", device="cpu", threads=2, verify=False)
    config = GenerationConfig(temperature=0.0, max_new_tokens=1)
    prompts = [random_ids(length).tolist() for length in range(MANY_TOKENS - 3, MANY_TOKENS + 4)]

    def logprobs(*chosen: list[int]) -> list[float | None]:
        batch = Batch(served, len(chosen), even=True)
        for key, prompt in enumerate(chosen):
            batch.add(key, prompt, config, logprobs=0)
        return [piece.logprob for piece in sorted(batch.step(), key=lambda piece: piece.sequence)]

    assert logprobs(*prompts) == [logprobs(prompt)[0] for prompt in prompts]


def test_the_graph_has_exactly_the_intended_nodes(pair) -> None:
    model, bundles = pair
    graph = onnx.load(bundles / "fp32" / "model.onnx").graph
    names = [constant.name for constant in graph.initializer]
    assert len(names) == len(set(names))
    assert not any(constant.external_data for constant in graph.initializer)
    floats = sum(np.prod(c.dims) for c in graph.initializer if c.data_type == onnx.TensorProto.FLOAT)
    tables = 0 if model.config.architecture == "gpt2" else 2 * model.cos.numel()
    assert floats == model.num_parameters() + tables  # the tied embedding is stored once
    nodes = Counter(node.op_type for node in graph.node)
    common = {"GroupQueryAttention": 2, "MatMul": 8, "Gemm": 1, "Reshape": 1}
    if model.config.architecture == "gpt2":
        assert nodes == {**common, "Gather": 3, "Add": 11, "FastGelu": 2, "LayerNormalization": 5}
    else:
        normed = 2 * (model.config.architecture == "qwen3")  # layers with queries and keys of one length
        others = {"Gather": 2, "Add": 4, "Split": 2 + normed, "QuickGelu": 2, "Mul": 2, "Reshape": 1 + 4 * normed}
        assert nodes == {**common, **others, "SimplifiedLayerNormalization": 5 + 2 * normed}
    half = Counter(node.op_type for node in onnx.load(bundles / "fp16" / "model.onnx").graph.node)
    fused = "SkipLayerNormalization" if model.config.architecture == "gpt2" else "SkipSimplifiedLayerNormalization"
    assert half[fused] == (5 if model.config.architecture == "gpt2" else 4)


def test_a_quantised_graph_holds_each_matrix_once_in_few_bits(pair) -> None:
    model, bundles = pair
    matrices = {name: tensor for name, tensor in model.state_dict().items() if tensor.ndim == 2}
    for bits in (8, 4):
        graph = onnx.load(bundles / f"int{bits}" / "model.onnx").graph
        names = [constant.name for constant in graph.initializer]
        assert len(names) == len(set(names))
        stored = {c.name: int(np.prod(c.dims)) for c in graph.initializer if c.name in matrices}
        assert stored == {
            name: tensor.numel() * (bits if name.startswith("h.") else 8) // 8 for name, tensor in matrices.items()
        }
        (node,) = graph.node
        assert (node.op_type, list(node.input)) == ("If", ["integers"])
        branches = {a.name: Counter(node.op_type for node in a.g.node) for a in node.attribute}
        few, many = branches["else_branch"], branches["then_branch"]
        assert few["MatMulNBits"] == many["MatMulIntegerToFloat"] == 9
        assert not few["MatMulIntegerToFloat"] + many["MatMulNBits"]
        for nodes in (few, many):
            assert nodes["GatherBlockQuantized"] == (2 if model.config.architecture == "gpt2" else 1)
            assert nodes["Gather"] == 1  # of the wanted positions
            assert not {"MatMul", "Gemm"} & set(nodes)
        levels = {a.i for node in all_nodes(graph) for a in node.attribute if a.name == "accuracy_level"}
        assert levels == {4}


def test_the_certificate_says_what_was_measured(pair) -> None:
    model, bundles = pair
    for variant, largest in (("fp32", 2e-5), ("fp16", 0.05)):
        certificate = json.loads((bundles / variant / "parity.json").read_text())
        figures = certificate["figures"]
        assert 0 < figures["mean_difference"] < figures["max_difference"] < largest
        assert figures["bits_per_byte_difference"] < 1e-4
        assert figures["top1_agreement"] > (0.98 if variant == "fp16" else 0.999)
        paths = ["text", *(f"batch_{b}_{kind}" for b in (1, 2, 5) for kind in ("prefill", "decode")), "cuts"]
        assert list(certificate["differences"]) == paths
        # Three batches of 32 steps, the longest sequence of which ends at the last position of the context.
        assert certificate["differences"]["batch_5_decode"]["logits"] == 5 * 32 * model.config.vocab_size
        assert certificate["text"]["split"] == "test"
        assert certificate["text"]["tokens"] == 300
        assert certificate["versions"]["torch"] == torch.__version__
        assert [len(golden["ids"]) for golden in certificate["golden"]] == [1, 16, CONTEXT]
        golden = certificate["golden"][-1]
        assert [len(golden["logits"]) for golden in certificate["golden"]] == [1, 2, 2]
        for text in golden["logits"]:
            stored = np.frombuffer(base64.b64decode(text), "<f4")
            np.testing.assert_allclose(stored, torch_logits(model, np.array([golden["ids"]]))[0, -1], atol=1e-5)
    for variant, limit in (("int8", 2e-3), ("int4", 5e-3), ("int8-kv8", 2e-3), ("int4-kv8", 5e-3)):
        figures = json.loads((bundles / variant / "parity.json").read_text())["figures"]
        assert figures["bits_per_byte_difference"] < limit
        for way in ("single", "paired", "many", "eight"):
            assert 0 < figures[f"{way}_bits_per_byte_difference"] < 2 * limit
            assert figures[f"{way}_bits_per_byte_torch"] == figures["bits_per_byte_torch"]  # of less than 2,000 tokens
        assert 0.6 < figures["top1_agreement"] < 1
    report = json.loads((bundles.parent / "export.json").read_text())
    for variant in VARIANTS:
        graph = bundles / variant / "model.onnx"
        assert report[variant]["bytes"] == graph.stat().st_size
        assert report[variant]["sha256"] == sha256_file(graph)
    # Of the weights: the nodes of so small a graph take a quarter of its file.
    graphs = {
        variant: onnx.load(bundles / variant / "model.onnx").graph for variant in ("fp32", "fp16", "int8", "int4")
    }
    stored = {variant: sum(c.ByteSize() for c in graph.initializer) for variant, graph in graphs.items()}
    sizes = [stored[variant] / stored["fp32"] for variant in ("fp16", "int8", "int4")]
    assert all(size < limit for size, limit in zip(sizes, (0.51, 0.30, 0.20), strict=True))


def test_bits_per_byte_are_those_of_the_text(project: Path) -> None:
    figures = json.loads((project / "export.json").read_text())["fp32"]
    model = SmallGPT.from_pretrained(project / "model")
    ids = np.fromfile(project / "tokens" / "test.bin", np.uint16)[:301].astype(np.int64)
    nats = 0.0
    for start in range(0, 300, CONTEXT):
        window = torch.from_numpy(ids[start : start + CONTEXT + 1])
        with torch.inference_mode():
            logits = model(window[None, :-1])[0][0]
        nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    text_bytes = len(tiny.tokenizer().decode(ids[1:].tolist()).encode())
    assert figures["bits_per_byte_torch"] == pytest.approx(nats / np.log(2) / text_bytes, rel=1e-6)


def test_lineage_names_model_text_tokenizer_and_library(project: Path) -> None:
    lineage = json.loads((project / "exports" / "fp32" / "config.json").read_text())["lineage"]
    assert lineage["model"] == sha256_file(project / "model" / "model.safetensors")
    assert lineage["tokenizer"] == sha256_file(project / "model" / "tokenizer.model")
    assert lineage["library"] == library_hashes()
    source = Path(export_module.__file__)
    files = {*closure.closure(source), source}
    assert lineage["library"] == {f"smallgpt/{path.name}": sha256_file(path) for path in files}


@pytest.mark.slow
def test_two_exports_have_the_same_bytes(project: Path, tmp_path: Path) -> None:
    first, second = (run_export(project, tmp_path / name, list(VARIANTS)) for name in ("a", "b"))
    assert first == second
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(contents(tmp_path / "a")) == len(VARIANTS) * (len(FILES) + 1)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert str(tmp_path).encode() not in b"".join(contents(tmp_path / "a").values())


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(project: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from smallgpt.config import ExportConfig\n"
        "from smallgpt.export import export; from smallgpt.sampling import GenerationConfig\n"
        "project, out = map(Path, sys.argv[1:])\n"
        "config = ExportConfig(variants=['fp32', 'int4-kv8', 'fp16'], certificate_tokens=300, threads=1)\n"
        "export(project / 'model', project / 'tokens', config, GenerationConfig(), out=out, report=out / 'r.json')\n"
    )
    for name, seed in (("a", "1"), ("b", "2")):
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent.parent)}
        subprocess.run([sys.executable, "-c", code, project, tmp_path / name], env=environment, check=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    "weight", ["h.0.attn.qkv.weight", "h.1.mlp.down.bias", "h.1.ln_2.weight", "wpe.weight", "wte.weight"]
)
def test_the_certificate_fails_on_one_changed_weight(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: str
) -> None:
    out = tmp_path / "exports"
    run_export(project, out, ["fp32"])
    before = contents(tmp_path)
    build = export_module.build_graph

    def build_wrong(weights, *arguments, **settings):
        weights[weight] = weights[weight].copy()
        weights[weight].flat[-1] += 0.05
        return build(weights, *arguments, **settings)

    monkeypatch.setattr(export_module, "build_graph", build_wrong)
    with pytest.raises(ValueError, match=r"the certificate of fp32 fails: max_difference is .*, the limit is 0\.001"):
        run_export(project, out, ["fp32"])
    assert contents(tmp_path) == before  # the earlier export and its report are whole, and nothing else is left


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["int8", "int4"])
@pytest.mark.parametrize("weight", ["h.0.attn.qkv.weight", "h.1.mlp.down.weight", "wte.weight"])
def test_the_certificate_fails_on_a_matrix_with_scales_of_other_rows(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: str, variant: str
) -> None:
    build = export_module.build_graph

    def build_wrong(weights, *arguments, **settings):
        matrix = weights[weight]
        weights = weights | {weight: dataclasses.replace(matrix, scales=np.roll(matrix.scales, 1, axis=0))}
        return build(weights, *arguments, **settings)

    monkeypatch.setattr(export_module, "build_graph", build_wrong)
    with pytest.raises(ValueError, match=f"the certificate of {variant} fails: "):
        run_export(project, tmp_path / "exports", [variant])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variant", ["int8", "int4", "int8-kv8", "int4-kv8"])
def test_golden_logits_of_a_quantised_bundle_are_its_own(pair, tmp_path: Path, variant: str) -> None:
    bundle = shutil.copytree(pair[1] / variant, tmp_path / variant)
    count, largest = check_golden(OrtGPT(bundle, device="cpu", threads=1))
    assert count == 3
    assert largest < 1e-3  # PyTorch's are a hundred times as far
    certificate = json.loads((bundle / "parity.json").read_text())
    logits = np.frombuffer(base64.b64decode(certificate["golden"][1]["logits"][1]), "<f4").copy()
    logits[7] += 0.51
    certificate["golden"][1]["logits"][1] = base64.b64encode(logits.tobytes()).decode()
    write_json(bundle / "parity.json", certificate)
    write_config(bundle, load_bundle(bundle, verify=False).config)
    with pytest.raises(MismatchError, match=r"logits differ by 0\.51 from those in parity\.json, limit 0\.5"):
        check_golden(OrtGPT(bundle, device="cpu", threads=1))


@pytest.mark.parametrize("variant", ["int4", "int8-kv8"])
def test_what_is_fitted_needs_the_train_split(project: Path, tmp_path: Path, variant: str) -> None:
    tiny.write_project(tmp_path, SmallGPT.from_pretrained(project / "model"))
    (tmp_path / "tokens" / "train.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.bin does not exist; the tokenize stage writes it"):
        run_export(tmp_path, tmp_path / "exports", [variant])
    assert list(run_export(tmp_path, tmp_path / "exports", ["int8"])) == ["int8"]


def test_the_certificate_fails_on_logits_that_are_not_finite(project: Path, tmp_path: Path) -> None:
    model = SmallGPT.from_pretrained(project / "model")
    with torch.no_grad():
        model.h[0].mlp.up.weight[0, 0] = 1e30  # fits float32, not float16
    tiny.write_project(tmp_path, model)
    with (
        np.errstate(over="ignore", invalid="ignore"),
        pytest.raises(ValueError, match="the certificate of fp16 fails: max_difference is nan"),
    ):
        run_export(tmp_path, tmp_path / "exports", ["fp16"])


@pytest.mark.parametrize(("architecture", "head_dim", "multiple"), [("gpt2", 12, 8), ("llama", 24, 16)])
def test_heads_without_a_kernel_are_refused(tmp_path: Path, architecture: str, head_dim: int, multiple: int) -> None:
    tiny.write_project(tmp_path, tiny.random_model(architecture, embed_dim=4 * head_dim))
    message = f"embed_dim / num_heads is {head_dim}; ONNX Runtime's attention needs a multiple of {multiple}"
    with pytest.raises(ValueError, match=message):
        run_export(tmp_path, tmp_path / "exports", ["fp32"])


def test_valid_stands_in_for_a_missing_test_split(project: Path, tmp_path: Path) -> None:
    tiny.write_project(tmp_path, SmallGPT.from_pretrained(project / "model"))
    (tmp_path / "tokens" / "test.bin").unlink()
    run_export(tmp_path, tmp_path / "exports", ["fp32"])
    text = json.loads((tmp_path / "exports" / "fp32" / "parity.json").read_text())["text"]
    ids = np.fromfile(tmp_path / "tokens" / "valid.bin", np.uint16).astype(np.int64)[:301]
    assert text == {"split": "valid", "tokens": len(ids) - 1, "sha256": sha256_bytes(ids.tobytes())}


def test_what_does_not_fit_together_is_refused(project: Path, tmp_path: Path) -> None:
    tiny.write_project(tmp_path, SmallGPT.from_pretrained(project / "model"))
    header = tmp_path / "tokens" / "test.json"
    header.write_text(header.read_text().replace(tiny.tokenizer().sha256, "0" * 64))
    with pytest.raises(MismatchError, match=r"test\.bin was not made with the model's tokenizer"):
        run_export(tmp_path, tmp_path / "exports", ["fp32"])
    (tmp_path / "model" / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model does not exist; the train stage writes it"):
        run_export(tmp_path, tmp_path / "exports", ["fp32"])
    assert not (tmp_path / "exports").exists()


def test_the_stage_reads_params_and_replaces_old_bundles(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SMALLGPT_TRACKING", "off")
    caplog.set_level(logging.INFO)
    params = tmp_path / "params.yaml"
    params.write_text(
        "export: {variants: [fp32], certificate_tokens: 200, threads: 1}\n"
        "generation: {temperature: 0.25, stop: ['.']}\n"
    )
    old = tmp_path / "exports" / "fp16" / "model.onnx"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    stage(
        params=str(params),
        model=str(project / "model"),
        tokens=str(project / "tokens"),
        out=str(tmp_path / "exports"),
        report=str(tmp_path / "reports" / "export.json"),
    )
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["fp32"]
    generation = json.loads((tmp_path / "exports" / "fp32" / "generation_config.json").read_text())
    assert (generation["temperature"], generation["stop"]) == (0.25, ["."])
    assert list(json.loads((tmp_path / "reports" / "export.json").read_text())) == ["fp32"]
    assert "fp32: certified" in caplog.text
