"""The description of a request's fields: what it allows, the settings take."""

import pytest

from smallgpt.openapi import FIELDS
from smallgpt.sampling import RANGES, GenerationConfig

NUMBERS = [name for name in FIELDS if name in RANGES and name != "seed"]  # -1 is a seed for a request only


@pytest.mark.parametrize("name", NUMBERS)
def test_limits_are_those_of_the_settings(name: str) -> None:
    schema = FIELDS[name]
    step = 1 if schema["type"] == "integer" else 1e-3
    low = schema["minimum"] if "minimum" in schema else schema["exclusiveMinimum"] + step
    high = schema["maximum"]
    for value in (low, high):
        assert getattr(GenerationConfig(**{name: value}), name) == value
    for value in (low - step, high + max(step, high * step)):
        with pytest.raises(ValueError, match=f"^{name} is "):
            GenerationConfig(**{name: value})
