"""The structure of the code base, from its source: what no module does."""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "dqe_jax"

ROOT_INIT = "__init__"
JAX = ("jax", "jaxlib", "flax", "optax", "orbax", "chex")
WITHOUT_JAX = (
    "data",
    *(f"evaluation.{name}" for name in ("metrics", "protocols", "submissions", "predictions")),
    *("evaluation.contact_sheet", "evaluation.drawing"),
    *(f"experiments.audit.{name}" for name in ("candidates", "statistics", "figure")),
    *("config", "method.settings", "models.settings", "utils.fields"),
)
# Of these rooms, what makes training batches and augments them on the devices.
WITH_JAX = ("data.augmentation", "data.pipeline")
ONLY_JAX = ("method",)  # of all third-party packages, and what describes its arrays
DESCRIBES_ARRAYS = ("flax.struct", "jaxtyping")
CONFIG_IMPORTS = ("__future__", "ml_collections", "configs", "dqe_jax.config")
# Calls that only build a value: free to run when a module is imported. So are classes (CapWords)
# and methods of a string literal.
CONSTANT_CALLS = (
    # Sizes of a variant of a backbone.
    "_variant",
    "collections.namedtuple",
    "dataclasses.replace",
    "config_flags.DEFINE_config_file",
    "dict",
    "np.dtype",
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


# ------------------------------------------------------------------------------------ the rules
# Each yields one sentence for each violation in one module of dqe_jax.


def third_party_imports(source: Module) -> Iterator[str]:
    for name, line in imports(source):
        package = name.split(".")[0]
        where = f"{source.name}:{line}"
        if package == "tensorflow":
            yield f"{where} imports tensorflow"
        if package == "tensorflow_datasets" and not source.within(("data",)):
            yield f"{where} imports tensorflow_datasets outside {PACKAGE}/data"
        if package in JAX and source.within(WITHOUT_JAX) and not source.within(WITH_JAX):
            yield f"{where} imports {package}: this module works without jax"
        if package in ("tests", "configs"):
            yield f"{where} imports {package}"
        known = package in ("jax", PACKAGE, *sys.stdlib_module_names)
        known |= any(is_within(name, other) for other in DESCRIBES_ARRAYS)
        # The one module that says what an array is.
        known |= source.unit == "method.arrays" and package == "numpy"
        if source.within(ONLY_JAX) and not known:
            yield f"{where} imports {package}: this module needs only jax"


def pmap_only_in_mesh(source: Module) -> Iterator[str]:
    """`mesh.pmap` may be called; `jax.pmap`, or `pmap` under a bare name, only there."""
    if source.unit == "distributed.mesh":
        return
    for node in ast.walk(source.tree):
        name = dotted(node)
        if name.split(".")[-1] == "pmap" and name not in (
            "mesh.pmap",
            f"{PACKAGE}.distributed.mesh.pmap",
        ):
            yield f"{source.name}:{node.lineno} says {name}: use mesh.pmap"
    for name, line in imports(source):
        if name.split(".")[-1] == "pmap":
            yield f"{source.name}:{line} imports {name}: use mesh.pmap"


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
            case ast.If() if is_guard(node) and all(
                isinstance(x, ast.Assign) and is_constant(x.value) for x in node.orelse
            ):
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
    third_party_imports,
    pmap_only_in_mesh,
    no_print,
    runs_nothing_on_import,
)


def config_imports(source: Module) -> Iterator[str]:
    for name, line in imports(source):
        if not any(is_within(name, allowed) for allowed in CONFIG_IMPORTS):
            yield (
                f"{source.name}:{line} imports {name}: a config imports only dqe_jax.config and "
                "ml_collections"
            )


# ------------------------------------------------------------------------------ what is enforced


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_module_keeps_the_rule(rule: Rule):
    sources = modules(PACKAGE)
    assert sources, f"no module found under {ROOT / PACKAGE}"
    violations = [violation for source in sources for violation in rule(source)]
    assert not violations, "\n" + "\n".join(violations)


def test_configs_import_only_the_fields_and_one_another():
    violations = [
        violation for source in modules("configs") for violation in config_imports(source)
    ]
    assert not violations, "\n" + "\n".join(violations)


# --------------------------------------------------------------------------- the rules themselves

ACCEPTED = [
    (third_party_imports, "data.pipeline", "import tensorflow_datasets as tfds\nimport numpy"),
    (
        third_party_imports,
        "method.trns",
        "from __future__ import annotations\nimport functools, jax.numpy",
    ),
    (third_party_imports, "train", "import optax, flax"),
    (third_party_imports, "method.mining", "import flax.struct\nfrom jaxtyping import Float"),
    (pmap_only_in_mesh, "distributed.mesh", "import jax\nf = jax.pmap"),
    (pmap_only_in_mesh, "x", "from dqe_jax.distributed import mesh\nf = mesh.pmap"),
    (no_print, "main", "def print_usage(): log.print('x')"),
    (runs_nothing_on_import, "train", '"""Doc."""\nimport jax\nX: int = 3\nY = {"a": (X, -1)}'),
    (runs_nothing_on_import, "train", "@jax.jit\ndef f(): work()\nclass A:\n    x = g()"),
    (runs_nothing_on_import, "train", "W = re.compile('a')\nif __name__ == '__main__':\n    f()"),
    (runs_nothing_on_import, "train", "if TYPE_CHECKING:\n    import numpy"),
    (runs_nothing_on_import, "x", "if TYPE_CHECKING:\n    import a\nelse:\n    a = int"),
    (runs_nothing_on_import, "data.text", "N = {w: i for i, w in ((0, 'a'), (1, 'b'))}"),
    (runs_nothing_on_import, "models.x", "F = {'a': jax.nn.silu, 'b': lambda x: jnp.tanh(x)}"),
    (runs_nothing_on_import, "data.x", "C = (Config(name=' '.join(('a', 'b'))), Config())"),
    (config_imports, "x", "from ml_collections import config_dict\nfrom configs.tiny import get"),
    (config_imports, "x", "from dqe_jax.config import RunConfig"),
]
REFUSED = [
    (third_party_imports, "data.pipeline", "import tensorflow as tf"),
    (third_party_imports, "data.splits", "import jax.numpy as jnp"),
    (third_party_imports, "evaluation.metrics", "from jax import numpy"),
    (third_party_imports, "evaluation.contact_sheet", "from flax import linen"),
    (third_party_imports, "train", "import tensorflow_datasets as tfds"),
    (third_party_imports, "method.losses", "import numpy as np"),
    (third_party_imports, "method.mining", "from flax import linen"),
    (third_party_imports, "main", "from configs import tiny"),
    (third_party_imports, "train", "from tests.trns_test import unit"),
    (pmap_only_in_mesh, "ranking", "import jax\nf = jax.pmap(g)"),
    (pmap_only_in_mesh, "ranking", "from jax import pmap as p"),
    (pmap_only_in_mesh, "train_step", "@functools.partial(pmap, axis_name='i')\ndef f(): ..."),
    (no_print, "main", "def f():\n    print('x')"),
    (runs_nothing_on_import, "train", "logging.set_verbosity(1)"),
    (runs_nothing_on_import, "train", "X = jnp.zeros(3)"),
    (runs_nothing_on_import, "train", "X: list = [load() for _ in range(3)]"),
    (runs_nothing_on_import, "train", "X = Config(jnp.zeros(3))"),
    (runs_nothing_on_import, "train", "Config()"),
    (runs_nothing_on_import, "train", "for x in range(3): pass"),
    (runs_nothing_on_import, "train", "if jax.devices():\n    X = 1"),
    (runs_nothing_on_import, "x", "if TYPE_CHECKING:\n    import a\nelse:\n    a = load()"),
    (runs_nothing_on_import, "train", "try:\n    import a\nexcept ImportError:\n    a = None"),
    (config_imports, "x", "import jax"),
    (config_imports, "x", "from dqe_jax import trns"),
    (config_imports, "x", "from dqe_jax.configs import x"),
]


def example(unit: str, source: str) -> Module:
    return module(f"{PACKAGE}/{unit.replace('.', '/')}.py", source)


@pytest.mark.parametrize(("rule", "unit", "source"), ACCEPTED)
def test_accepted(rule: Rule, unit: str, source: str):
    assert list(rule(example(unit, source))) == []


@pytest.mark.parametrize(("rule", "unit", "source"), REFUSED)
def test_refused(rule: Rule, unit: str, source: str):
    assert list(rule(example(unit, source)))
