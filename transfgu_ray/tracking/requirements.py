"""The distributions that a module of this package needs, found by following its imports."""

import ast
import importlib.metadata
import re
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def requirements_of(module: Path) -> list[str]:
    """Return the declared dependencies that a module of this package needs, with versions, sorted by name.

    Imports inside functions count too. The standard library and indirect dependencies are not declared and so not
    listed.

    Args:
        module: file of a module of this package.
    """
    seen: set[Path] = set()
    imported: set[str] = set()
    waiting = [module]
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        for name in _imports(file):
            top, _, rest = name.partition(".")
            if top == _PACKAGE.name:
                waiting += _files(rest)
            else:
                imported.add(top)
    found = importlib.metadata.packages_distributions()
    needed = {_normal(name) for top in imported for name in found.get(top, [])}
    declared = {
        _normal(re.split(r"[\s\[<>=!~;]", line)[0]) for line in importlib.metadata.requires("transfgu-ray") or []
    }
    return [f"{name}=={importlib.metadata.version(name)}" for name in sorted(needed & declared)]


def _imports(file: Path) -> list[str]:
    """Return the dotted names that a file imports; for `from a import b` both a and a.b, since b may be a module."""
    names: list[str] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def _files(name: str) -> list[Path]:
    """Return the files that run when a dotted name below the package is imported, as far as it is a module."""
    parts = name.split(".") if name else []
    folders = [_PACKAGE.joinpath(*parts[:length]) / "__init__.py" for length in range(len(parts) + 1)]
    return [file for file in (*folders, _PACKAGE.joinpath(*parts).with_suffix(".py")) if file.is_file()]


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")
