"""The card of a model: what it was trained on and what it finds, as Markdown that the hub shows."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from dqe_jax import __version__
from dqe_jax.config import RunConfig
from dqe_jax.utils.files import JsonObject

# Metrics of a table, where they are measured.
_SHOWN = ("R@1", "R@5", "R@10", "R@50", "mAP@5", "mAP@10", "R_subset@1", "mean")


def write_card(
    repo: str,
    config: RunConfig,
    facts: JsonObject,
    results: Sequence[JsonObject],
    *,
    license_id: str = "",
    data: Mapping[str, str] | None = None,
) -> str:
    """The card of an exported model.

    Args:
      repo: `OWNER/NAME`, where it will lie.
      config: of the run.
      facts: of the export, its `dqe.json`.
      results: of its evaluations, as `evaluation/report.py` writes them; none are known for some.
      license_id: of the model, as the hub names it; "" if its owner has said nothing.
      data: digests of the splits that it was trained and evaluated on, by name; None if they are
        not known.
    """
    head = ["---", "library_name: dqe_jax"]
    head += [f"license: {license_id}"] if license_id else []
    head += ["tags:", "- composed-image-retrieval", "- jax", "- flax", "---"]
    name = repo.partition("/")[2]
    weights = public_name(config.model.weights)
    lines = [
        *head,
        f"# {name}",
        "",
        "A model for composed image retrieval: it finds an image by a reference image and a text "
        "that says what should change.",
        "",
        "```python",
        "import dqe_jax",
        "",
        f'model = dqe_jax.load("hf://{repo}")',
        "```",
        "",
        "## Model",
        "",
        f"- Backbone: `{config.model.backbone}`" + (f", started from `{weights}`" * bool(weights)),
        f"- Attributes: {', '.join(facts.get('attributes') or ()) or 'none'}",
        f"- Images: {config.data.image_size} pixels a side, `{config.data.preprocess}`",
        f"- Texts: at most {config.data.max_length} tokens",
        f"- Step {facts['step']} of {config.total_steps}, seed {config.seed}",
        f"- Negatives: `{config.negatives.rule}`",
        f"- Fingerprint: `{facts['fingerprint']}`",
        f"- Written by dqe_jax {__version__}{commit_of_code()}",
        "",
        "## Data",
        "",
        f"Trained on `{config.data.dataset}`.",
        *(f"Digest of {split}: `{digest}`." for split, digest in sorted((data or {}).items())),
        "",
        "## Results",
        "",
    ]
    if not results:
        lines += ["No evaluation of this step was found beside the run.", ""]
    for one in results:
        lines += result_lines(one)
    lines += ["## Licence", ""]
    lines += [f"`{license_id}`." if license_id else "Not stated: ask the owner."]
    return "\n".join(lines) + "\n"


def result_lines(one: JsonObject) -> list[str]:
    """A table of an evaluation, with its protocol and how much of the data was at hand.

    Raises:
      LookupError, TypeError, ValueError, AttributeError: it is not what an evaluation writes.
    """
    metrics = one.get("metrics") or {}
    keys = [key for key in _SHOWN if key in metrics]
    queries, gallery = one["queries"], one["gallery"]
    lines = [
        f"### {one['dataset']}, {one['split']}",
        "",
        f"Protocol `{one['protocol']}`; {queries['used']} of {queries['official']} queries, "
        f"{gallery['used']} of {gallery['official']} gallery images; data `{one['data']}`; one "
        "seed, so no spread is known.",
        "",
    ]
    if not keys:
        return [*lines, "This split has no labels.", ""]
    rows = {"this model": metrics, **(one.get("baselines") or {})}
    lines += ["| | " + " | ".join(keys) + " |", "| --- |" + " --- |" * len(keys)]
    for name, values in rows.items():
        cells = (f"{values[key]:.4f}" if key in values else "" for key in keys)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def public_name(weights: str) -> str:
    """What weights are called in public: an id on the hub, or the last part of a path."""
    is_id = weights.count("/") == 1 and not weights.startswith((".", "/", "~"))
    return weights if is_id else weights.rstrip("/").rpartition("/")[2]


def commit_of_code() -> str:
    """`, commit <digits>` of the clone that this code runs from; "" for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        asked = ["git", "-C", str(root), "rev-parse", "HEAD"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    found = done.stdout.strip()
    return f", commit {found}" if done.returncode == 0 and found else ""
