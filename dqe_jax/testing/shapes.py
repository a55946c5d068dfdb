"""Checks the shapes and dtypes that signatures promise, while tests run.

`check_shapes("dqe_jax.method")` must come before the modules are imported: their functions and
methods are then compiled with `jaxtyping` and `beartype` around them. Classes stay as they are:
JAX makes objects of them whose fields are no arrays.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence

_DECORATOR = "__import__('jaxtyping').jaxtyped(typechecker=__import__('beartype').beartype)"


class _Decorate(ast.NodeTransformer):
    """Decorates functions and methods, not what is defined inside them."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        """Last of the decorators, so that it is the first to be called."""
        decorator = ast.parse(_DECORATOR, mode="eval").body
        node.decorator_list.append(ast.copy_location(decorator, node))
        return ast.fix_missing_locations(node)


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> types.CodeType:
        """The decorated code, which no cache of bytecode gets."""
        path = self.get_filename(fullname)
        tree = _Decorate().visit(ast.parse(self.get_data(path), path))
        return compile(tree, path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, packages: Sequence[str]):
        self.packages = tuple(packages)

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """The module of a checked package, with our loader; None for all others."""
        if not any(fullname == p or fullname.startswith(f"{p}.") for p in self.packages):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            return spec
        spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def check_shapes(*packages: str) -> None:
    """Checks the signatures of these packages, which must not be imported yet.

    Args:
      *packages: such as `dqe_jax.method`.

    Raises:
      ImportError: one is imported already: its functions would not be checked.
    """
    late = [name for name in sys.modules if name in packages]
    if late:
        raise ImportError(f"{', '.join(late)} is imported already: check its shapes before that")
    sys.meta_path.insert(0, _Finder(packages))
