"""Parameter files: defaults, numbers, and one line for every way to get them wrong."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from smallgpt.config import Config, ModelConfig, load_config, parse_config
from smallgpt.sampling import GenerationConfig

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "params.yaml", *sorted((ROOT / "configs").glob("*.yaml"))]
REFERENCE = """
model:
  vocab_size: 10000
  embed_dim: 512
  num_heads: 8
  num_layers: 6
  max_seq_len: 1024
  dropout: 0.1
training:
  batch_size: 32
  learning_rate: 5e-4
  weight_decay: 0.1
  warmup_steps: 2000
  max_steps: 100000
generation:
  temperature: 0.8
  top_k: 50
  top_p: 0.9
"""


def fault(**sections: Any) -> str:
    """The one line that refuses these sections."""
    with pytest.raises(ValueError, match=r"^p\.yaml: ") as caught:
        parse_config(sections, "p.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix("p.yaml: ")


def file_fault(folder: Path, content: bytes | str) -> str:
    """The one line that refuses a file with this content, less the path it starts with."""
    path = folder / "params.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match="params") as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_defaults_are_the_reference_shape_and_recipe() -> None:
    config = Config()
    model, training, generation = config.model, config.training, config.generation
    assert (model.vocab_size, model.embed_dim, model.num_heads) == (10_000, 512, 8)
    assert (model.num_layers, model.max_seq_len, model.dropout, model.architecture) == (6, 1024, 0.1, "gpt2")
    assert (training.batch_size, training.learning_rate, training.weight_decay) == (32, 5e-4, 0.1)
    assert (training.warmup_steps, training.max_steps) == (2000, 100_000)
    assert (generation.temperature, generation.top_k, generation.top_p) == (0.8, 50, 0.9)


def test_reference_file_loads_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "small_model.yaml").write_text(REFERENCE)
    config = load_config(tmp_path / "small_model.yaml")
    assert config == Config()
    assert config.training.learning_rate == 0.0005


def test_derived_shapes() -> None:
    assert ModelConfig().hidden_dim == 2048
    assert ModelConfig(architecture="llama").hidden_dim == 1408  # 8/3 512 = 1365.3, up to a multiple of 64
    assert ModelConfig(architecture="llama", embed_dim=96).hidden_dim == 256  # exactly 8/3 96
    assert ModelConfig(ffn_dim=100).hidden_dim == 100
    assert (ModelConfig().kv_heads, ModelConfig().head_dim) == (8, 64)
    assert ModelConfig(architecture="llama", num_kv_heads=2).kv_heads == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [("5e-4", 5e-4), ("1e-4", 1e-4), ("1E+3", 1000.0), ("+.5e1", 5.0), ("2.e0", 2.0), ("0.25", 0.25), ("3", 3.0)],
)
def test_numbers_read_as_yaml_1_2_reads_them(tmp_path: Path, text: str, value: float) -> None:
    (tmp_path / "p.yaml").write_text(f"training: {{muon_learning_rate: {text}, weight_decay: {text}}}\n")
    training = load_config(tmp_path / "p.yaml").training
    assert (training.muon_learning_rate, training.weight_decay) == (value, value)
    assert type(training.muon_learning_rate) is float


def test_generation_reads_exponents_but_leaves_texts_alone() -> None:
    generation = parse_config({"generation": {"temperature": "5e-1", "stop": "1e5"}}, "p").generation
    assert generation == GenerationConfig(temperature=0.5, stop=("1e5",))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"modle": {}}, "unknown parameter modle; did you mean model?"),
        ({"xyz": {}}, "unknown parameter xyz; known are prepare, tokenizer, model, training, evaluation, "),
        ({1: {}}, "unknown parameter 1; known are prepare, "),
        ({"prepare": {"sorce": "stories"}}, "unknown parameter prepare.sorce; did you mean source?"),
        ({"tokenizer": {"split_digit": True}}, "unknown parameter tokenizer.split_digit; did you mean split_digits?"),
        ({"model": {"embed_dims": 512}}, "unknown parameter model.embed_dims; did you mean embed_dim?"),
        ({"model": {"zzz": 1}}, "unknown parameter model.zzz; known are architecture, vocab_size, "),
        ({"training": {"learnig_rate": 1}}, "unknown parameter training.learnig_rate; did you mean learning_rate?"),
        ({"training": {3: 1}}, "unknown parameter training.3; known are batch_size, "),
        ({"evaluation": {"strides": 3}}, "unknown parameter evaluation.strides; did you mean stride?"),
        ({"generation": {"topk": 3}}, "generation: unknown parameter topk; did you mean top_k?"),
        ({"generation": {3: 3}}, "generation: unknown parameter 3; known are temperature, "),
        ({"export": {"variant": []}}, "unknown parameter export.variant; did you mean variants?"),
    ],
)
def test_unknown_parameters(sections: dict[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"p.yaml: {message}")) as caught:
        parse_config(sections, "p.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "value", "remedy"),
    [
        ("prepare", "source", 7, "it should be a valid string"),
        ("prepare", "source", "", "it should have at least 1 character"),
        ("prepare", "stories_bytes", 9_999, "it should be greater than or equal to 10000"),
        ("prepare", "valid_fraction", 0.0, "it should be greater than 0"),
        ("prepare", "test_fraction", 1.0, "it should be less than 1"),
        ("tokenizer", "split_digits", "yes", "it should be a valid boolean"),
        ("tokenizer", "max_piece_length", 65, "it should be less than or equal to 64"),
        ("model", "architecture", "gpt3", "it should be 'gpt2', 'llama' or 'qwen3'"),
        ("model", "vocab_size", 260, "it should be greater than or equal to 261"),
        ("model", "vocab_size", "10000", "it should be a valid integer"),
        ("model", "vocab_size", 10000.0, "it should be a valid integer"),
        ("model", "embed_dim", 0, "it should be greater than or equal to 1"),
        ("model", "num_heads", -8, "it should be greater than or equal to 1"),
        ("model", "num_layers", True, "it should be a valid integer"),
        ("model", "num_layers", None, "it should be a valid integer"),
        ("model", "max_seq_len", 1, "it should be greater than or equal to 2"),
        ("model", "dropout", 1.0, "it should be less than 1"),
        ("model", "dropout", -0.1, "it should be greater than or equal to 0"),
        ("model", "dropout", True, "it should be a valid number"),
        ("model", "dropout", [0.1], "it should be a valid number"),
        ("training", "batch_size", 0, "it should be greater than or equal to 1"),
        ("training", "learning_rate", 0, "it should be greater than 0"),
        ("training", "learning_rate", float("nan"), "it should be a finite number"),
        ("training", "learning_rate", float("inf"), "it should be a finite number"),
        ("training", "learning_rate", "fast", "it should be a valid number"),
        ("training", "max_steps", "1E+3", "it should be a valid integer"),
        ("training", "optimizer", "sgd", "it should be 'adamw' or 'muon'"),
        ("training", "lr_schedule", "constant", "it should be 'cosine' or 'linear'"),
        ("training", "precision", "fp8", "it should be 'auto', 'bf16', 'fp16' or 'fp32'"),
        ("training", "compile", "yes", "it should be 'auto', True or False"),
        ("training", "resume", "always", "it should be 'auto' or 'never'"),
        ("training", "seed", 2**32, "it should be less than 4294967296"),
        ("evaluation", "stride", 0, "it should be greater than or equal to 1"),
        ("export", "variants", [], "it should have at least 1 item"),
        (
            "export",
            "variants",
            ["int3"],
            "it should be 'fp32', 'int8', 'int4', 'fp32-kv8', 'int8-kv8', 'int4-kv8' or 'fp16'",
        ),
        ("export", "certificate_tokens", 99, "it should be greater than or equal to 100"),
    ],
)
def test_wrong_values_name_key_value_and_remedy(section: str, key: str, value: Any, remedy: str) -> None:
    shown = value[0] if value == ["int3"] else value  # of a list, the item that is wrong
    message = fault(**{section: {key: value}})
    assert message.startswith(f"{section}.{key} is {shown!r}; {remedy}")


def test_a_variant_is_exported_once() -> None:
    message = "variants is ['fp32', 'fp16', 'fp32']; each may stand there once"
    assert message in fault(export={"variants": ["fp32", "fp16", "fp32"]})


def test_huge_numbers() -> None:
    assert fault(training={"learning_rate": "1e400"}) == "training.learning_rate is inf; it should be a finite number"
    assert fault(training={"learning_rate": 10**400}) == "training.learning_rate is inf; it should be a finite number"
    assert fault(training={"learning_rate": -(10**400)}).endswith("it should be a finite number")


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("temperature", -1, "it must be between 0 and 100"),
        ("temperature", float("nan"), "it must be between 0 and 100"),
        ("temperature", True, "it must be a number"),
        ("top_k", 1.5, "it must be a whole number"),
        ("top_p", 0, "which keeps no token"),
        ("stop", 5, "it must be a list of texts"),
        ("stop", [""], "it must be a list of texts"),
    ],
)
def test_wrong_generation_values(key: str, value: Any, remedy: str) -> None:
    message = fault(generation={key: value})
    assert message.startswith(f"generation: {key} is {value}")
    assert remedy in message


@pytest.mark.parametrize("section", list(Config.model_fields))
@pytest.mark.parametrize("value", [None, [], 3])
def test_sections_must_hold_parameters(section: str, value: Any) -> None:
    assert re.match(
        rf"{section} is {re.escape(repr(value))}; it should hold parameters, a line each: \w+",
        fault(**{section: value}),
    )


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"embed_dim": 100, "num_heads": 8}}, "embed_dim 100 is not divisible by num_heads 8"),
        ({"model": {"architecture": "llama", "num_kv_heads": 3}}, "num_heads 8 is not divisible by num_kv_heads 3"),
        ({"model": {"num_kv_heads": 2}}, "num_kv_heads must be null for architecture gpt2"),
        (
            {"model": {"architecture": "llama", "embed_dim": 24}},
            "embed_dim / num_heads must be even for rotary positions",
        ),
        ({"training": {"max_steps": 100}}, "warmup_steps 2000 is larger than max_steps 100"),
        ({"prepare": {"valid_fraction": 0.5, "test_fraction": 0.5}}, "valid_fraction + test_fraction must be below 1"),
        ({"training": {"seq_len": 2048}}, "training.seq_len 2048 is larger than model.max_seq_len 1024"),
        ({"evaluation": {"stride": 1025}}, "evaluation.stride 1025 is larger than model.max_seq_len 1024"),
        (
            {"generation": {"stop_token_ids": [10_000]}},
            "generation.stop_token_ids names the token 10000; the vocabulary has 0 to 9999",
        ),
    ],
)
def test_checks_between_parameters(sections: dict[str, Any], message: str) -> None:
    assert message in fault(**sections)


def test_limits_of_the_checks_between_parameters() -> None:
    config = parse_config(
        {
            "model": {"num_kv_heads": 8, "max_seq_len": 64},
            "training": {"warmup_steps": 100, "max_steps": 100, "seq_len": 64},
            "evaluation": {"stride": 64},
            "prepare": {"valid_fraction": 0.5, "test_fraction": 0.49},
            "generation": {"stop_token_ids": [9999], "logit_bias": {17: "-1e1"}},
        },
        "p.yaml",
    )
    assert config.model.kv_heads == 8
    assert config.generation.logit_bias == {17: -10.0}


def test_every_fault_has_its_line() -> None:
    with pytest.raises(ValueError, match=r"^p\.yaml: ") as caught:
        parse_config({"model": {"dropout": 2, "heads": 1}, "training": {"compile": 3, "batch_size": 0}}, "p.yaml")
    assert sorted(str(caught.value).split("\n")) == [
        "p.yaml: model.dropout is 2; it should be less than 1",
        "p.yaml: training.batch_size is 0; it should be greater than or equal to 1",
        "p.yaml: training.compile is 3; it should be 'auto', True or False",
        "p.yaml: unknown parameter model.heads; did you mean num_heads?",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected sections such as model: and training:, found NoneType"),
        ("# nothing\n", "expected sections such as model: and training:, found NoneType"),
        ("- model\n", "expected sections such as model: and training:, found list"),
        ("model", "expected sections such as model: and training:, found str"),
        ("model:\n  dropout: 0.1\n  dropout: 0.2\n", "line 3: the key dropout stands there twice; remove one of them"),
        ("model: {}\ntraining: {}\nmodel: {}\n", "line 3: the key model stands there twice; remove one of them"),
        (
            "training:\n  batch_size: 012\n",
            "line 2: batch_size is 012, which reads as octal; drop the leading 0",
        ),
        ("prepare: {source: 1:30}", "line 1: source is 1:30, which reads as a number of base 60; quote it"),
        ("model:\n  dropout: -1:2:3\n", "line 2: dropout is -1:2:3, which reads as a number of base 60; quote it"),
        ("model: {dropout: -01}", "line 1: dropout is -01, which reads as octal; drop the leading 0"),
        ("export: {variants: [fp32, 012]}", "line 1: variants is 012, which reads as octal; drop the leading 0"),
        ("generation: {logit_bias: {017: 1}}", "line 1: 017 is 017, which reads as octal; drop the leading 0"),
        ("model: {dropout: 0.1\n", "while parsing a flow mapping"),
        ("model:\n\tdropout: 0.1\n", "while scanning for the next token found character '\\t'"),
        ("model: {{ dropout }}\n", "while constructing a mapping"),
        ("? [model]\n: 1\n", "while constructing a mapping"),
        ("model: *other\n", "found undefined alias 'other'"),
        ("model: !!python/object/apply:os.getcwd []\n", "could not determine a constructor for the tag"),
        ("model: \0\n", "unacceptable character #x0000"),
        ("model: {}\n---\nmodel: {}\n", "expected a single document in the stream"),
        ("training: {learning_rate: .nan}\n", "training.learning_rate is nan; it should be a finite number"),
        ("training: {learning_rate: -.inf}\n", "training.learning_rate is -inf; it should be"),
        ("model: {num_layers: true}\n", "model.num_layers is True; it should be a valid integer"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: bytes | str, message: str) -> None:
    assert file_fault(tmp_path, content).startswith(message)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"model:\n  dropout: 0.1 # \xff\n")
    with pytest.raises(ValueError, match=r"latin\.yaml line 2, byte 24: 0xff is not UTF-8; save the file as UTF-8"):
        load_config(tmp_path / "latin.yaml")
    with pytest.raises(FileNotFoundError, match=r" is a folder; run from the project's root or name a parameter file"):
        load_config(tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml does not exist; run from the project's root"):
        load_config(tmp_path / "nothing.yaml")


def test_quoted_zeros_and_merges_are_no_octals_or_doubles(tmp_path: Path) -> None:
    text = 'prepare: {source: "012"}\nmodel: {<<: {num_layers: 3, embed_dim: 64}, num_layers: 2}\n'
    (tmp_path / "p.yaml").write_text(text)
    config = load_config(tmp_path / "p.yaml")
    assert (config.prepare.source, config.model.num_layers, config.model.embed_dim) == ("012", 2, 64)


def test_settings_cannot_be_changed_after_the_check() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().model.num_layers = 3  # type: ignore[misc]


def check_command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "smallgpt.config", *arguments]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )


def test_check_command(tmp_path: Path) -> None:
    missing = check_command(cwd=tmp_path)
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.startswith("error: params.yaml does not exist; ")
    (tmp_path / "params.yaml").write_text(REFERENCE)
    good = check_command(cwd=tmp_path)
    assert (good.returncode, good.stdout, good.stderr) == (0, "", "")
    part = check_command("--complete", cwd=tmp_path)
    assert part.returncode == 2
    expected = (
        "error: params.yaml has no prepare, tokenizer, evaluation, export; the pipeline needs them: see configs/\n"
    )
    assert part.stderr == expected
    assert check_command("--complete", str(ROOT / "params.yaml"), cwd=tmp_path).returncode == 0
    (tmp_path / "bad.yaml").write_text("training: {batch_size: 0}\n")
    bad = check_command("params.yaml", "bad.yaml", cwd=tmp_path)
    line = "error: bad.yaml: training.batch_size is 0; it should be greater than or equal to 1\n"
    assert (bad.returncode, bad.stdout, bad.stderr) == (2, "", line)


def test_reading_settings_imports_no_torch() -> None:
    code = "import sys; from smallgpt import load_config; load_config(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_files_are_there() -> None:
    names = ["gpt2-25m", "shakespeare-11m", "shakespeare-25m", "shakespeare-3m", "stories-25m", "stories-tiny"]
    names += ["wikitext2-25m-long", "wikitext2-25m"]
    assert [file.name for file in FILES] == ["params.yaml", *(f"{name}.yaml" for name in names)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_files_spell_out_and_explain_every_parameter(file: Path) -> None:
    config = load_config(file)
    values = yaml.safe_load(file.read_text())
    assert list(values) == list(Config.model_fields)
    for section, keys in values.items():
        kind = type(getattr(config, section))
        fields = getattr(kind, "model_fields", None) or kind.__dataclass_fields__
        assert list(keys) == list(fields), section
    lines = file.read_text().splitlines()
    assert lines[0].startswith("# ")
    parameters = [index for index, line in enumerate(lines) if re.match(r"  \w+:", line)]
    assert len(parameters) == sum(len(keys) for keys in values.values())
    for index in parameters:
        assert re.match(r"  # [A-Z\w].+[\w.)]$", lines[index - 1]), f"{lines[index]} has no comment above"


@pytest.mark.parametrize("file", [file for file in FILES if "25m" in file.name], ids=lambda file: file.name)
def test_large_files_are_of_the_25m_class(file: Path) -> None:
    torch = pytest.importorskip("torch")
    from smallgpt.model import SmallGPT

    with torch.device("meta"):
        parameters = SmallGPT(**load_config(file).model.model_dump()).num_parameters()
    assert 19_000_000 <= parameters <= 25_900_000


def test_shakespeare_is_cut_by_the_convention() -> None:
    prepare = load_config(ROOT / "configs" / "shakespeare-25m.yaml").prepare
    assert (prepare.source, prepare.valid_fraction, prepare.test_fraction) == ("shakespeare", 0.1, 0.0)
