"""smallgpt: train, measure, export and serve a small GPT, end to end and reproducibly, on one machine."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "SmallGPT": "smallgpt.model",
    "generate_text": "smallgpt.decode",
    "GPTTrainer": "smallgpt.train",
    "load_config": "smallgpt.config",
}
__all__ = ["GPTTrainer", "SmallGPT", "__version__", "generate_text", "load_config"]


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that `import smallgpt` needs neither torch nor pydantic."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'smallgpt' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
