"""A training script, looked at before anything is started: it is there, it is Python, and it has the function."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from elastic.errors import ConfigurationError

_TAKEN = sys.stdlib_module_names | {"actors", "cli", "collectives", "elastic", "fault", "numpy", "ray", "torch"}


def check_script(path: Path, function: str) -> Path:
    """Its full path. Raises ConfigurationError. What only goes wrong when it is imported is for its peers to say."""
    if path.suffix != ".py" or "." in path.stem or path.stem in _TAKEN:
        rule = "a name of its own that ends in .py, with no other dot, and is no module's (train.py)"
        raise ConfigurationError(f"{path} cannot be imported under its name: give it {rule}")
    tree = _parse(path)
    names = set(_names(tree))
    if function not in names and "*" not in names:
        raise ConfigurationError(
            f"{path} has no function {function!r}: write def {function}(peer, config), or say --function NAME"
        )
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == function:
            _check_call(path, node)
    return path.absolute()


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None
    except SyntaxError as error:
        raise ConfigurationError(f"{path} is no Python: line {error.lineno or 1}: {error.msg}") from None
    except ValueError as error:  # a null byte
        raise ConfigurationError(f"{path} is no Python: {error}") from None


def _names(node: ast.AST) -> Iterator[str]:
    """What the module may define, "*" for whatever another module has."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield child.name
        elif isinstance(child, ast.alias):
            yield child.asname or child.name.partition(".")[0]
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id
        else:
            yield from _names(child)


def _check_call(path: Path, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
    """It will be called as function(peer, config)."""
    named = node.args.posonlyargs + node.args.args
    needed = len(named) - len(node.args.defaults)
    more = any(default is None for default in node.args.kw_defaults)
    fits = needed <= 2 and not more and (len(named) >= 2 or node.args.vararg is not None)
    if not fits or isinstance(node, ast.AsyncFunctionDef):
        raise ConfigurationError(
            f"{path}, line {node.lineno}: {node.name} is called as {node.name}(peer, config): it must be an ordinary "
            "function of these two"
        )
