"""The library files a stage really imports, found in the source without importing it."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def imports(path: Path) -> set[Path]:
    """Files of smallgpt/ that the file at `path` imports, wherever the import statement stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("smallgpt"):
                found.add(ROOT / (name.replace(".", "/") + ".py" if "." in name else "smallgpt/__init__.py"))
    return found


def closure(path: Path) -> set[Path]:
    """All library files reached from `path`, itself not counted."""
    seen: set[Path] = set()
    waiting = [path]
    while waiting:
        for file in imports(waiting.pop()) - seen:
            seen.add(file)
            waiting.append(file)
    return seen
