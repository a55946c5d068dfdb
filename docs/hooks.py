"""Fills the reference pages when the site is built, so that they say what the code says."""

from __future__ import annotations

import re
import subprocess
import sys

from dqe_jax.cli.commands import COMMANDS
from dqe_jax.config import fields

# What the page of the Python API documents, by heading.
MODULES = {
    "Config": ("dqe_jax.config",),
    "Training and evaluation": (
        "dqe_jax.training.loop",
        "dqe_jax.evaluation.run",
        "dqe_jax.evaluation.watch",
        "dqe_jax.checkpoints.trained",
        "dqe_jax.checkpoints.export",
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
    "Scores": (
        "dqe_jax.evaluation.metrics",
        "dqe_jax.evaluation.ranking",
        "dqe_jax.evaluation.protocols",
        "dqe_jax.evaluation.predictions",
    ),
    "Data": ("dqe_jax.data.datasets", "dqe_jax.data.examples", "dqe_jax.data.splits"),
}


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replaces the marks of a page by what is generated; called by mkdocs."""
    made = {"config fields": config_fields, "commands": commands, "modules": modules}
    return re.sub(r"<!-- ([\w ]+) -->", lambda mark: made[mark[1]](), markdown)


def config_fields() -> str:
    """A table of every section of a config."""
    sections: dict[str, list[str]] = {}
    for name, field in fields().items():
        section = name.rpartition(".")[0]
        cells = (f"`{name}`", f"`{field.default!r}`", f"{field.doc} *{field.role}*")
        row = " | ".join(cell.replace("|", r"\|") for cell in cells)
        sections.setdefault(section, []).append(f"| {row} |")
    head = "| field | default | meaning; what it decides |\n| --- | --- | --- |"
    return "\n\n".join(
        f"## {section or 'Top level'}\n\n" + "\n".join([head, *rows])
        for section, rows in sorted(sections.items())
    )


def commands() -> str:
    """What each command says of itself, by its name."""
    parts = []
    for name in COMMANDS:
        help_of = [sys.executable, "-m", "dqe_jax", *name.split(), "--help"]
        said = subprocess.run(help_of, check=True, capture_output=True, text=True).stdout
        parts.append(f"## dqe-jax {name}\n\n```text\n{said.strip()}\n```")
    return "\n\n".join(parts)


def modules() -> str:
    """A section of each heading of `MODULES`, which mkdocstrings fills."""
    return "\n\n".join(
        f"## {heading}\n\n"
        + "\n\n".join(f"::: {module}\n    options:\n      heading_level: 3" for module in names)
        for heading, names in MODULES.items()
    )
