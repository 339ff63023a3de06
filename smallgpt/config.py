"""params.yaml as pydantic models: strict, typed, with an error that names the key, its value and the remedy."""

import argparse
import difflib
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from smallgpt.cli import run
from smallgpt.files import decode_utf8
from smallgpt.sampling import GenerationConfig


def _number(value: Any) -> Any:
    """Read `5e-4`, which PyYAML takes for a string, as the number every YAML 1.2 reader takes it for."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        return float(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**1023 else math.inf  # the next check refuses infinity
    return value


def _generation(values: Any) -> Any:
    """The generation section is a plain dataclass, shared with the serving install; it checks itself."""
    if not isinstance(values, dict):
        return values
    values = {key: _number(v) if isinstance(v, str) and key != "stop" else v for key, v in values.items()}
    if isinstance(bias := values.get("logit_bias"), dict):
        values["logit_bias"] = {token: _number(v) for token, v in bias.items()}
    return GenerationConfig.from_dict(values)


Real = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[Real, Field(gt=0)]
NonNegative = Annotated[Real, Field(ge=0)]
Fraction = Annotated[Real, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
VariantName = Literal["fp32", "int8", "int4", "fp32-kv8", "int8-kv8", "int4-kv8", "fp16"]


class Section(BaseModel):
    """One section of params.yaml: frozen, no unknown keys, no silent conversions, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class PrepareConfig(Section):
    """Where the text comes from and how it is split."""

    source: Annotated[str, Field(min_length=1)] = "stories"
    stories_bytes: Annotated[int, Field(ge=10_000, le=10**9)] = 3_000_000
    valid_fraction: Annotated[Real, Field(gt=0, lt=1)] = 0.05
    test_fraction: Fraction = 0.05
    seed: Annotated[int, Field(ge=0)] = 1

    @model_validator(mode="after")
    def _fractions(self) -> "PrepareConfig":
        if self.valid_fraction + self.test_fraction >= 1:
            raise ValueError("valid_fraction + test_fraction must be below 1, or nothing is left to train on")
        return self


class TokenizerConfig(Section):
    """SentencePiece BPE options; the vocabulary size stands in the model section."""

    split_digits: bool = True
    max_piece_length: Annotated[int, Field(ge=1, le=64)] = 16


class ModelConfig(Section):
    """The shape of the network. The defaults are a 24.6M parameter GPT-2."""

    architecture: Literal["gpt2", "llama", "qwen3"] = "gpt2"
    vocab_size: Annotated[int, Field(ge=261, le=2**31 - 1)] = 10_000
    embed_dim: Count = 512
    num_heads: Count = 8
    num_kv_heads: Count | None = None
    num_layers: Count = 6
    ffn_dim: Count | None = None
    max_seq_len: Annotated[int, Field(ge=2)] = 1024
    dropout: Fraction = 0.1

    @model_validator(mode="after")
    def _shape(self) -> "ModelConfig":
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}")
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.num_kv_heads}")
        if self.architecture == "gpt2" and self.num_kv_heads not in (None, self.num_heads):
            raise ValueError("num_kv_heads must be null for architecture gpt2; llama and qwen3 have grouped heads")
        if self.architecture != "gpt2" and (self.embed_dim // self.num_heads) % 2:
            raise ValueError("embed_dim / num_heads must be even for rotary positions")
        return self

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward layer: 4 D for gpt2; else 8/3 D rounded up to a multiple of 64."""
        if self.ffn_dim:
            return self.ffn_dim
        if self.architecture == "gpt2":
            return 4 * self.embed_dim
        return -(-8 * self.embed_dim // (3 * 64)) * 64


class TrainingConfig(Section):
    """Optimizer, schedule, precision and bookkeeping of one training run."""

    batch_size: Count = 32
    gradient_accumulation_steps: Count = 1
    seq_len: Annotated[int, Field(ge=2)] | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: Positive = 5e-4
    muon_learning_rate: Positive = 0.02
    weight_decay: NonNegative = 0.1
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    warmup_steps: Annotated[int, Field(ge=0)] = 2000
    max_steps: Count = 100_000
    lr_schedule: Literal["cosine", "linear"] = "cosine"
    gradient_clip: NonNegative = 1.0
    ema_decay: Fraction = 0.0
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    compile: Literal["auto", True, False] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=0)] = 0
    eval_interval: Count = 500
    log_interval: Count = 10
    checkpoint_interval: Count = 500
    resume: Literal["auto", "never"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1  # PyTorch's CPU generator reads 32 bits

    @model_validator(mode="after")
    def _steps(self) -> "TrainingConfig":
        if self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} is larger than max_steps {self.max_steps}")
        return self

    def shaping(self) -> dict[str, Any]:
        """What of it shapes the weights."""
        return self.model_dump(exclude={"resume", "checkpoint_interval", "device", "threads"})


class EvaluationConfig(Section):
    """How the trained model is scored and sampled."""

    stride: Count | None = None
    batch_size: Count = 16
    train_tokens: Annotated[int, Field(ge=0)] = 100_000
    samples: Annotated[int, Field(ge=0)] = 10
    sample_prompt: str = ""
    device: Literal["auto", "cpu", "cuda"] = "auto"


class ExportConfig(Section):
    """Which bundles are written and on how much text they are certified."""

    variants: Annotated[list[VariantName], Field(min_length=1)] = ["fp32", "int8", "int8-kv8", "int4", "fp16"]
    certificate_tokens: Annotated[int, Field(ge=100)] = 20_000
    threads: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _variants(self) -> "ExportConfig":
        if len(set(self.variants)) < len(self.variants):
            raise ValueError(f"variants is {self.variants}; each may stand there once")
        return self


class Config(Section):
    """All of params.yaml. A missing section or key takes the default written above."""

    prepare: PrepareConfig = PrepareConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    generation: Annotated[GenerationConfig, BeforeValidator(_generation)] = GenerationConfig()
    export: ExportConfig = ExportConfig()

    @property
    def seq_len(self) -> int:
        """Tokens in one training sequence."""
        return self.training.seq_len or self.model.max_seq_len

    @model_validator(mode="after")
    def _across_sections(self) -> "Config":
        multiple = 8 if self.model.architecture == "gpt2" else 16
        if self.model.head_dim % multiple:
            raise ValueError(
                f"model.embed_dim / model.num_heads is {self.model.head_dim}; the attention of ONNX Runtime "
                f"needs a multiple of {multiple} for {self.model.architecture}"
            )
        if self.training.seq_len and self.training.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"training.seq_len {self.training.seq_len} is larger than model.max_seq_len {self.model.max_seq_len}"
            )
        if self.evaluation.stride and self.evaluation.stride > self.model.max_seq_len:
            raise ValueError(
                f"evaluation.stride {self.evaluation.stride} is larger than "
                f"model.max_seq_len {self.model.max_seq_len}: tokens between the windows would not be scored"
            )
        try:
            self.generation.check_ids(self.model.vocab_size)
        except ValueError as error:
            raise ValueError(f"generation.{error}") from None
        return self


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses what two YAML readers understand differently: doubled keys and octal-looking numbers."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, value in node.value:
            line = f"line {key.start_mark.line + 1}"
            name = str(key.value)
            if name in seen:
                raise ValueError(f"{line}: the key {name} stands there twice; remove one of them")
            seen.add(name)
            for part in [key, *(value.value if isinstance(value, yaml.SequenceNode) else [value])]:
                if isinstance(part, yaml.ScalarNode) and part.style is None:
                    if re.fullmatch(r"[-+]?0\d+", part.value):
                        raise ValueError(f"{line}: {name} is {part.value}, which reads as octal; drop the leading 0")
                    if re.fullmatch(r"[-+]?\d+(:\d+)+", part.value):
                        raise ValueError(
                            f"{line}: {name} is {part.value}, which reads as a number of base 60; quote it"
                        )
        return super().construct_mapping(node, deep)


def load_config(path: str | Path = "params.yaml") -> Config:
    """Read and check params.yaml.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one line per fault, each with the key, the value and what is allowed.
    """
    path = Path(path)
    if not path.is_file():
        wrong = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {wrong}; run from the project's root or name a parameter file")
    text = decode_utf8(path.read_bytes(), str(path))
    try:
        values = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected sections such as model: and training:, found {type(values).__name__}")
    return parse_config(values, str(path))


def parse_config(values: dict[str, Any], origin: str) -> Config:
    """Check a plain dict; `origin` names where it came from in the messages of the ValueError."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(f"{origin}: {_explain(fault)}" for fault in error.errors())) from None


def _known_keys(location: tuple[str | int, ...]) -> list[str]:
    if len(location) == 1:
        return list(Config.model_fields)
    section = Config.model_fields[str(location[0])].annotation
    return list(getattr(section, "model_fields", None) or getattr(section, "__dataclass_fields__", {}))


def _explain(fault: Any) -> str:
    location = fault["loc"]
    key = ".".join(str(part) for part in location[:2])
    if fault["type"] in ("extra_forbidden", "invalid_key"):
        close = difflib.get_close_matches(str(location[-1]), _known_keys(location), n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(_known_keys(location))}"
        return f"unknown parameter {key}{hint}"
    message = re.sub("^(Value error, |Input |String |List )", "", fault["msg"])
    if fault["type"] == "value_error":
        return f"{key}: {message}" if key else message
    if fault["type"] in ("model_type", "dataclass_exact_type"):
        message = f"should hold parameters, a line each: {', '.join(_known_keys((*location, '')))}"
    if fault["type"] == "too_short":
        message = message.removesuffix(" after validation, not 0")
    return f"{key} is {fault['input']!r}; it {message}"


def main(arguments: list[str] | None = None) -> int:
    """`python -m smallgpt.config [FILE ...]`: check parameter files and say nothing when they are right."""
    parser = argparse.ArgumentParser(prog="python -m smallgpt.config", description="Check parameter files.")
    parser.add_argument("files", nargs="*", default=["params.yaml"], help="default: params.yaml")
    parser.add_argument("--complete", action="store_true", help="refuse what DVC could not read settings from")
    options = parser.parse_args(arguments)
    for file in options.files:
        config = load_config(file)
        if options.complete:  # what dvc.yaml names must stand there, defaults or not
            missing = [name for name in Config.model_fields if name not in config.model_fields_set]
            missing += [] if "vocab_size" in config.model.model_fields_set else ["model.vocab_size"]
            if missing:
                raise ValueError(f"{file} has no {', '.join(missing)}; the pipeline needs them: see configs/")
    return 0


if __name__ == "__main__":
    run(main)
