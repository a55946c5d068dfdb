"""The structure of the code base, from its source: who may import whom, what no module does.

Imports go one way. `ALLOWED` has a row for each module or package of dqe_jax; imports under
`TYPE_CHECKING` and inside functions count like all others.
"""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "dqe_jax"

ROOT_INIT = "__init__"
UNITS_OF_BINARIES = (
    "distributed",
    "interrupts",
    "watch",
    "train",
    "run_setup",
    "evaluators",
    "report",
    "protocols",
    "predictions",
    "checkpoint",
    "models",
    "config",
    "data",
    "parallel",
    "weights",
    "utils",
)
# Module or package of dqe_jax (longest prefix wins) -> what of dqe_jax it may import.
ALLOWED: dict[str, tuple[str, ...]] = {
    ROOT_INIT: (),
    "utils": ("utils",),
    "trns": (),
    "partition": ("utils",),
    "losses": (),
    "metrics": ("utils",),
    "parallel": ("utils",),
    "ranking": ("parallel", "utils"),
    "contact_sheet": ("utils",),
    "models": ("models", "utils"),
    "data": ("data", "utils"),
    "optimizer": ("utils",),
    "zero": ("parallel",),
    "checkpoint": ("utils",),
    "train_step": ("losses", "trns", "mining", "partition", "parallel", "zero", "utils"),
    "protocols": ("metrics", "data", "utils"),
    "submissions": ("protocols", "data", "utils"),
    "predictions": ("protocols", "submissions", "data", "utils"),
    "evaluators": ("evaluators", "data", "metrics", "protocols", "ranking", "parallel", "utils"),
    "report": ("evaluators", "protocols", "submissions", "contact_sheet", "utils"),
    "mining": ("trns",),
    "bank": ("mining", "parallel", "utils"),
    "auditing": ("auditing", "bank", "mining", "parallel", "data", "utils"),
    "config": ("models", "data", "utils", "trns"),
    "weights": ("weights", "models", "data", "partition", "utils"),
    "distributed": ("utils",),
    "interrupts": ("utils",),
    "workdir": ("config", "utils"),
    "watch": ("checkpoint", "run_setup", "data", "utils"),
    "programs": ("train_step", "models", "optimizer", "parallel", "partition", "zero"),
    "run_setup": (
        "bank",
        "checkpoint",
        "config",
        "distributed",
        "programs",
        "parallel",
        "evaluators",
        "report",
        "protocols",
        "models",
        "partition",
        "data",
        "weights",
        "utils",
    ),
    "main": UNITS_OF_BINARIES,
    "evaluate": UNITS_OF_BINARIES,
    "convert": UNITS_OF_BINARIES,
    "export": UNITS_OF_BINARIES,
    "describe": UNITS_OF_BINARIES,
    "prepare": UNITS_OF_BINARIES,
    "audit": (*UNITS_OF_BINARIES, "auditing"),
    "ablation": UNITS_OF_BINARIES,
    "bound_curve": ("ablation", "config", "report", "utils"),
    "ablate": ("ablation", "bound_curve", "utils"),
    "mining_benchmark": ("bank", "mining", "parallel", "utils"),
    "planning": (
        *("planning", "programs", "run_setup", "bank", "mining", "models", "parallel"),
        *("train_step", "optimizer", "data", "utils"),
    ),
    "plan": (*UNITS_OF_BINARIES, "planning"),
    "benchmark": (*UNITS_OF_BINARIES, "programs", "train_step", "optimizer"),
}
# The training loop puts everything together: anything but the binaries.
ALLOWED["train"] = (
    *(
        unit
        for unit in ALLOWED
        if unit
        not in (
            "main",
            "evaluate",
            "convert",
            "export",
            "describe",
            "benchmark",
            "prepare",
            "mining_benchmark",
            "audit",
            "ablation",
            "bound_curve",
            "ablate",
            "plan",
            "planning",
        )
    ),
    "train",
)

JAX = ("jax", "jaxlib", "flax", "optax", "orbax", "chex")
WITHOUT_JAX = (
    *("metrics", "protocols", "submissions", "predictions", "contact_sheet", "data"),
    *("auditing.candidates", "auditing.statistics", "auditing.figure"),
)
ONLY_JAX = ("trns", "losses")  # of all third-party packages
CONFIG_IMPORTS = ("__future__", "ml_collections", "configs")
# Calls that only build a value: free to run when a module is imported. So are classes (CapWords)
# and methods of a string literal.
CONSTANT_CALLS = (
    # The checks of the config's fields.
    "_integer",
    "_number",
    # Sizes of a variant of a backbone.
    "_variant",
    "_one_of",
    "collections.namedtuple",
    "config_flags.DEFINE_config_file",
    "dict",
    "flags.DEFINE_bool",
    "flags.DEFINE_enum",
    "flags.DEFINE_float",
    "flags.DEFINE_integer",
    "flags.DEFINE_list",
    "flags.DEFINE_multi_string",
    "flags.DEFINE_string",
    "float",
    "frozenset",
    "functools.partial",
    "int",
    "itertools.product",
    "len",
    "logging.getLogger",
    "max",
    "min",
    "range",
    "re.compile",
    "set",
    "sorted",
    "sum",
    "tuple",
)


@dataclasses.dataclass(frozen=True)
class Module:
    """A source file: its dotted name, whether it is a package's `__init__`, and its tree."""

    name: str
    is_package: bool
    tree: ast.Module

    @property
    def unit(self) -> str:
        """Name within dqe_jax: `data.builders.shapes`; `__init__` for the package itself."""
        return self.name.partition(".")[2] or ROOT_INIT

    def within(self, units: tuple[str, ...]) -> bool:
        return any(is_within(self.unit, unit) for unit in units)


def is_within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def module(path: str, source: str) -> Module:
    parts = list(Path(path).with_suffix("").parts)
    is_package = parts[-1] == "__init__"
    return Module(".".join(parts[:-1] if is_package else parts), is_package, ast.parse(source))


def modules(folder: str) -> list[Module]:
    files = sorted((ROOT / folder).rglob("*.py"))
    return [module(str(f.relative_to(ROOT)), f.read_text(encoding="utf-8")) for f in files]


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or attribute; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def imports(source: Module) -> Iterator[tuple[str, int]]:
    """Everything the module imports, as absolute dotted names, with line numbers."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = source.name.split(".")
                keep = len(package) - node.level + source.is_package
                base = ".".join([*package[:keep], *([base] if base else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield argument.value, node.lineno


def row_of(unit: str) -> str | None:
    """The row of `ALLOWED` that a module falls under: the longest prefix."""
    return max((row for row in ALLOWED if is_within(unit, row)), key=len, default=None)


# ------------------------------------------------------------------------------------ the rules
# Each yields one sentence for each violation in one module of dqe_jax.


def internal_imports(source: Module) -> Iterator[str]:
    row = row_of(source.unit)
    if row is None:
        yield f"{source.name} is in no row of ALLOWED: add a row to {Path(__file__).name}"
        return
    for name, line in imports(source):
        if name == PACKAGE or name == f"{PACKAGE}.*":
            yield f"{source.name}:{line} imports all of {PACKAGE}: name the module"
        elif is_within(name, PACKAGE):
            target = name.partition(".")[2]
            if row_of(target) is None:
                # A name defined in dqe_jax/__init__.py, or a module without a row, which fails
                # by itself. The package imports nothing, so this makes no cycle.
                continue
            if not any(is_within(target, allowed) for allowed in ALLOWED[row]):
                yield f"{source.name}:{line} may not import {name} (row {row!r} of ALLOWED)"


def third_party_imports(source: Module) -> Iterator[str]:
    for name, line in imports(source):
        package = name.split(".")[0]
        where = f"{source.name}:{line}"
        if package == "tensorflow":
            yield f"{where} imports tensorflow"
        if package == "tensorflow_datasets" and not source.within(("data",)):
            yield f"{where} imports tensorflow_datasets outside {PACKAGE}/data"
        if package in JAX and source.within(WITHOUT_JAX):
            yield f"{where} imports {package}: this module works without jax"
        if package in ("tests", "configs"):
            yield f"{where} imports {package}"
        if source.within(ONLY_JAX) and package not in ("jax", PACKAGE, *sys.stdlib_module_names):
            yield f"{where} imports {package}: this module needs only jax"


def pmap_only_in_parallel(source: Module) -> Iterator[str]:
    """`parallel.pmap` may be called; `jax.pmap`, or `pmap` under a bare name, only there."""
    if source.unit == "parallel":
        return
    for node in ast.walk(source.tree):
        name = dotted(node)
        if name.split(".")[-1] == "pmap" and name not in (
            "parallel.pmap",
            f"{PACKAGE}.parallel.pmap",
        ):
            yield f"{source.name}:{node.lineno} says {name}: use parallel.pmap"
    for name, line in imports(source):
        if name.split(".")[-1] == "pmap":
            yield f"{source.name}:{line} imports {name}: use parallel.pmap"


def no_print(source: Module) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and dotted(node.func) == "print":
            yield f"{source.name}:{node.lineno} calls print: use absl's logging"


def builds_a_value(call: ast.Call) -> bool:
    function = call.func
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Constant):
        return True  # " ".join(...)
    return dotted(function) in CONSTANT_CALLS or dotted(function).split(".")[-1][:1].isupper()


def is_constant(node: ast.AST) -> bool:
    """Whether an expression builds a constant. The body of a lambda does not run on import."""
    if isinstance(node, ast.Lambda):
        return True
    if isinstance(node, ast.Await) or (isinstance(node, ast.Call) and not builds_a_value(node)):
        return False
    return all(is_constant(child) for child in ast.iter_child_nodes(node))


def is_guard(node: ast.If) -> bool:
    """`if __name__ == "__main__"` or `if TYPE_CHECKING`."""
    if isinstance(node.test, ast.Compare):
        return dotted(node.test.left) == "__name__"
    return dotted(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def runs_nothing_on_import(source: Module) -> Iterator[str]:
    for position, node in enumerate(source.tree.body):
        match node:
            case (
                ast.Import()
                | ast.ImportFrom()
                | ast.FunctionDef()
                | ast.AsyncFunctionDef()
                | ast.ClassDef()
            ):
                continue
            case ast.Expr(value=ast.Constant(value=str())) if position == 0:
                continue
            case ast.Expr(value=ast.Call(func=ast.Attribute(attr="defvjp"))):
                continue  # names the gradient of the function above; computes nothing
            case ast.If() if is_guard(node) and not node.orelse:
                continue
            case ast.Assign(value=value) if is_constant(value):
                continue
            case ast.AnnAssign(value=value) if value is None or is_constant(value):
                continue
        yield (
            f"{source.name}:{node.lineno} runs work on import: {ast.unparse(node)[:60]!r} "
            "(a call that only builds a constant can be added to CONSTANT_CALLS)"
        )


Rule = Callable[[Module], Iterator[str]]
RULES: tuple[Rule, ...] = (
    internal_imports,
    third_party_imports,
    pmap_only_in_parallel,
    no_print,
    runs_nothing_on_import,
)


def config_imports(source: Module) -> Iterator[str]:
    for name, line in imports(source):
        if name.split(".")[0] not in CONFIG_IMPORTS:
            yield f"{source.name}:{line} imports {name}: a config imports only ml_collections"


# ------------------------------------------------------------------------------ what is enforced


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_module_keeps_the_rule(rule: Rule):
    sources = modules(PACKAGE)
    assert sources, f"no module found under {ROOT / PACKAGE}"
    violations = [violation for source in sources for violation in rule(source)]
    assert not violations, "\n" + "\n".join(violations)


def test_configs_import_only_ml_collections_and_configs():
    violations = [
        violation for source in modules("configs") for violation in config_imports(source)
    ]
    assert not violations, "\n" + "\n".join(violations)


def test_the_table_is_free_of_cycles():
    """Imports go one way: no row can reach itself over other rows."""

    def reachable(row: str, path: tuple[str, ...]) -> None:
        assert row not in path, f"cycle in ALLOWED: {' -> '.join([*path, row])}"
        for other in ALLOWED[row]:
            if other != row:
                reachable(other, (*path, row))

    for row in ALLOWED:
        assert set(ALLOWED[row]) <= set(ALLOWED), f"row {row!r} allows something without a row"
        reachable(row, ())


# --------------------------------------------------------------------------- the rules themselves

ACCEPTED = [
    (internal_imports, "ranking", "from dqe_jax import parallel\nimport dqe_jax.utils.errors"),
    (internal_imports, "models.tiny", "from .layers import Block\nfrom ..utils import errors"),
    (internal_imports, "models.__init__", "from .tiny import Tiny"),
    (internal_imports, "models.new", "from dqe_jax.models.layers import Block"),
    (internal_imports, "train", "from dqe_jax import __version__, train_step, evaluators"),
    (internal_imports, "trns", "import jax\nfrom jax import lax"),
    (third_party_imports, "data.pipeline", "import tensorflow_datasets as tfds\nimport numpy"),
    (
        third_party_imports,
        "trns",
        "from __future__ import annotations\nimport functools, jax.numpy",
    ),
    (third_party_imports, "train", "import optax, flax"),
    (pmap_only_in_parallel, "parallel", "import jax\nf = jax.pmap"),
    (pmap_only_in_parallel, "ranking", "from dqe_jax import parallel\nf = parallel.pmap"),
    (no_print, "main", "def print_usage(): log.print('x')"),
    (runs_nothing_on_import, "train", '"""Doc."""\nimport jax\nX: int = 3\nY = {"a": (X, -1)}'),
    (runs_nothing_on_import, "train", "@jax.jit\ndef f(): work()\nclass A:\n    x = g()"),
    (runs_nothing_on_import, "train", "W = re.compile('a')\nif __name__ == '__main__':\n    f()"),
    (runs_nothing_on_import, "train", "if TYPE_CHECKING:\n    import numpy"),
    (runs_nothing_on_import, "data.text", "N = {w: i for i, w in ((0, 'a'), (1, 'b'))}"),
    (runs_nothing_on_import, "models.x", "F = {'a': jax.nn.silu, 'b': lambda x: jnp.tanh(x)}"),
    (runs_nothing_on_import, "data.x", "C = (Config(name=' '.join(('a', 'b'))), Config())"),
    (config_imports, "x", "from ml_collections import config_dict\nfrom configs.tiny import get"),
]
REFUSED = [
    (internal_imports, "trns", "from dqe_jax.utils import errors"),
    (internal_imports, "metrics", "from dqe_jax import ranking"),
    (internal_imports, "utils.errors", "from ..data import examples"),
    (internal_imports, "models.tiny", "from dqe_jax import losses"),
    (internal_imports, "models.__init__", "from ..trns import similarity"),
    (internal_imports, "evaluators", "import dqe_jax.train_step"),
    (internal_imports, "train", "def f():\n    from dqe_jax import main"),
    (internal_imports, "main", "from dqe_jax.evaluate import run"),
    (internal_imports, "evaluate", "from dqe_jax import main"),
    (internal_imports, "data.x", "if TYPE_CHECKING:\n    from dqe_jax.models import DQE"),
    (internal_imports, "data.x", "importlib.import_module('dqe_jax.models')"),
    (internal_imports, "ranking", "import dqe_jax"),
    (internal_imports, "ranking", "from dqe_jax import *"),
    (internal_imports, "brand_new", "import jax"),
    (internal_imports, "training", "import jax"),
    (third_party_imports, "data.pipeline", "import tensorflow as tf"),
    (third_party_imports, "data.pipeline", "import jax.numpy as jnp"),
    (third_party_imports, "metrics", "from jax import numpy"),
    (third_party_imports, "contact_sheet", "from flax import linen"),
    (third_party_imports, "train", "import tensorflow_datasets as tfds"),
    (third_party_imports, "losses", "import numpy as np"),
    (third_party_imports, "main", "from configs import tiny"),
    (third_party_imports, "train", "from tests.trns_test import unit"),
    (pmap_only_in_parallel, "ranking", "import jax\nf = jax.pmap(g)"),
    (pmap_only_in_parallel, "ranking", "from jax import pmap as p"),
    (pmap_only_in_parallel, "train_step", "@functools.partial(pmap, axis_name='i')\ndef f(): ..."),
    (no_print, "main", "def f():\n    print('x')"),
    (runs_nothing_on_import, "train", "logging.set_verbosity(1)"),
    (runs_nothing_on_import, "train", "X = jnp.zeros(3)"),
    (runs_nothing_on_import, "train", "X: list = [load() for _ in range(3)]"),
    (runs_nothing_on_import, "train", "X = Config(jnp.zeros(3))"),
    (runs_nothing_on_import, "train", "Config()"),
    (runs_nothing_on_import, "train", "for x in range(3): pass"),
    (runs_nothing_on_import, "train", "if jax.devices():\n    X = 1"),
    (runs_nothing_on_import, "train", "try:\n    import a\nexcept ImportError:\n    a = None"),
    (config_imports, "x", "import jax"),
    (config_imports, "x", "from dqe_jax import trns"),
]


def example(unit: str, source: str) -> Module:
    return module(f"{PACKAGE}/{unit.replace('.', '/')}.py", source)


@pytest.mark.parametrize(("rule", "unit", "source"), ACCEPTED)
def test_accepted(rule: Rule, unit: str, source: str):
    assert list(rule(example(unit, source))) == []


@pytest.mark.parametrize(("rule", "unit", "source"), REFUSED)
def test_refused(rule: Rule, unit: str, source: str):
    assert list(rule(example(unit, source)))


def test_a_new_module_is_told_to_add_a_row():
    assert "add a row" in next(internal_imports(example("brand_new", "")))
