"""Fills the reference pages when the site is built, so that they say what the code says.

A page holds a mark such as `<!-- commands -->`, which is replaced by what is generated.
"""

from __future__ import annotations

import dataclasses
import html
import re
import subprocess
import sys
from collections.abc import Iterator

from dqe_jax.cli.commands import COMMANDS
from dqe_jax.config import RunConfig
from dqe_jax.utils.fields import Field, fields_of

# What the page of the Python API documents, by heading: modules, or single functions.
OBJECTS = {
    "Search": (
        "dqe_jax.search.loading.load",
        "dqe_jax.search.model",
        "dqe_jax.search.index",
        "dqe_jax.search.asks",
        "dqe_jax.search.relevance",
        "dqe_jax.search.results",
        "dqe_jax.search.tables",
        "dqe_jax.search.store",
        "dqe_jax.search.mteb_model",
    ),
    "Config": ("dqe_jax.cli.config_files.load_config", "dqe_jax.config"),
    "Training and evaluation": (
        "dqe_jax.training.loop.train_and_evaluate",
        "dqe_jax.evaluation.run",
        "dqe_jax.evaluation.evaluator",
        "dqe_jax.evaluation.watch.watch",
        "dqe_jax.checkpoints.trained",
        "dqe_jax.checkpoints.export",
        "dqe_jax.checkpoints.exported",
        "dqe_jax.checkpoints.opened",
    ),
    "Data": (
        "dqe_jax.data.prepare",
        "dqe_jax.data.datasets",
        "dqe_jax.data.examples",
        "dqe_jax.data.splits",
        "dqe_jax.data.tokenizer",
    ),
    "The method": (
        "dqe_jax.method.similarity",
        "dqe_jax.method.trns",
        "dqe_jax.method.mining",
        "dqe_jax.method.sharded",
        "dqe_jax.method.losses",
        "dqe_jax.method.objective",
        "dqe_jax.method.batch",
    ),
    "Models": (
        "dqe_jax.models.dqe",
        "dqe_jax.models.attributes",
        "dqe_jax.models.features",
        "dqe_jax.models.build",
    ),
    "Frozen towers": (
        "dqe_jax.feature_store.features",
        "dqe_jax.feature_store.manage",
        "dqe_jax.feature_store.tables",
    ),
    "Scores": (
        "dqe_jax.evaluation.metrics",
        "dqe_jax.evaluation.ranking",
        "dqe_jax.evaluation.protocols",
        "dqe_jax.evaluation.predictions",
        "dqe_jax.evaluation.scoring",
        "dqe_jax.evaluation.embedding_files",
        "dqe_jax.evaluation.query_results",
        "dqe_jax.evaluation.comparison",
        "dqe_jax.evaluation.intervals",
    ),
    "Experiments and cost": (
        "dqe_jax.experiments.ablation.runs.run_ablation",
        "dqe_jax.experiments.bound_curve.run_curve",
        "dqe_jax.experiments.simulation.run.simulate",
        "dqe_jax.experiments.sliders.measure_sliders",
        "dqe_jax.experiments.audit.run.audit_checkpoint",
        "dqe_jax.performance.planning.run.plan_config",
        "dqe_jax.performance.describe.describe_model",
        "dqe_jax.performance.step_benchmark.benchmark_step",
        "dqe_jax.performance.torch_comparison.compare_with_torch",
        "dqe_jax.performance.features_benchmark.benchmark_features",
        "dqe_jax.performance.data_benchmark.benchmark_data",
        "dqe_jax.performance.mining_benchmark.benchmark_mining",
        "dqe_jax.performance.ranking_benchmark.compare_ranking",
    ),
}


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replaces the marks of a page by what is generated; called by mkdocs."""
    made = {"config fields": config_fields, "commands": commands, "python api": python_api}
    return re.sub(r"<!-- ([\w ]+) -->", lambda mark: made[mark[1]](), markdown)


def config_fields() -> str:
    """A table of each section of a config."""
    return "\n\n".join(
        f"## {name or 'Top level'}\n\n{about}\n\n"
        + "| field | default | meaning |\n| --- | --- | --- |\n"
        + "\n".join(map(_row, own))
        for name, about, own in _sections(RunConfig)
    )


def _sections(config: type, name: str = "") -> Iterator[tuple[str, str, list[Field]]]:
    """Name, description and own fields of a config and of each section in it."""
    about = (config.__doc__ or "").partition("\n\n")[0]
    prefix = name and f"{name}."
    own = [field for field in fields_of(config, prefix) if field.name.rpartition(".")[0] == name]
    yield name, about, own
    for inside in dataclasses.fields(config):
        if isinstance(inside.default_factory, type):
            yield from _sections(inside.default_factory, prefix + inside.name)


def _row(field: Field) -> str:
    """The row of a field, which `#negatives.rule` links to."""
    name = f'<span id="{field.name}">`{field.name}`</span>'
    about = html.escape(f"{field.doc} Allowed: {field.check.words}.", quote=False)
    cells = (name, f"`{field.default!r}`", f"{about} *{field.role}*")
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def commands() -> str:
    """What `--help` of each command says."""
    parts = []
    for name, (_, does) in COMMANDS.items():
        help_of = [sys.executable, "-m", "dqe_jax", *name.split(), "--help"]
        said = subprocess.run(help_of, check=True, capture_output=True, text=True).stdout
        parts.append(f"## dqe-jax {name}\n\n{does}\n\n```text\n{said.strip()}\n```")
    return "\n\n".join(parts)


def python_api() -> str:
    """The headings of `OBJECTS`, below which mkdocstrings puts what the docstrings say."""
    return "\n\n".join(
        f"## {heading}\n\n"
        + "\n\n".join(f"::: {name}\n    options:\n      heading_level: 3" for name in names)
        for heading, names in OBJECTS.items()
    )
