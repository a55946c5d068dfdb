"""Evaluation: embeds a split's gallery and queries on all devices, ranks on device, measures.

Used alike during training and by the separate evaluation binary. The gallery is never truncated:
short batches are padded, and the padding is cut off again.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from dqe_jax import contact_sheet, metrics, parallel, ranking
from dqe_jax.data.pipeline import Split
from dqe_jax.utils.errors import UserError

# Metrics of a log line and of the table at the end, in this order where present.
HEADLINE = ("R@1", "R@5", "R@10", "R@50", "P@10", "mAP@10", "top1_is_reference")


@dataclasses.dataclass(frozen=True)
class Result:
    """What an evaluation gives.

    Attributes:
      metrics: as `metrics.summarize`.
      baselines: `random` (expected) and `reference_only` (the reference's own gallery embedding as
        query, with the reference left out of the ranking), the same metrics; None if not asked for.
      rows: int32 `[Q, K]`, ranked gallery rows.
      scores: float32 `[Q, K]`.
      attribute_weights: float32 `[Q, number of attributes]`.
    """

    metrics: dict[str, float]
    baselines: dict[str, dict[str, float]] | None
    rows: np.ndarray
    scores: np.ndarray
    attribute_weights: np.ndarray


class RetrievalEvaluator:
    """Ranks the gallery of a split for each of its queries."""

    def __init__(
        self,
        *,
        split: Split,
        text: np.ndarray,
        encode_query: Callable[..., Any],
        encode_gallery: Callable[..., jax.Array],
        batch_size: int,
        top_k: int,
        devices: Sequence[jax.Device],
    ):
        """Compiles nothing yet.

        Args:
          split: queries and gallery.
          text: int32 `[Q, L]`, ids of the queries' texts.
          encode_query: `(params, image, text) -> QueryOutput`.
          encode_gallery: `(params, image) -> [B, M, d]`.
          batch_size: examples at a time over all devices; rounded up to a multiple of these.
          top_k: length of the ranked lists.
          devices: to run on.

        Raises:
          UserError: the gallery is smaller than `top_k`.
        """
        if top_k > len(split.gallery):
            raise UserError(
                f"config.eval.top_k is {top_k}: the gallery of {split.name} has only "
                f"{len(split.gallery)} images."
            )
        self.split, self.text = split, text
        self._n = len(devices)
        self._batch = -(-batch_size // self._n) * self._n

        def query(params, image, text):
            out = encode_query(params, image, text)
            return out.embedding, out.attribute_weights

        on = {"out_axes": 0, "devices": devices}
        self._query = parallel.pmap(query, in_axes=(None, 0, 0), **on)
        self._gallery = parallel.pmap(encode_gallery, in_axes=(None, 0), **on)
        self._rank = ranking.make_rank_fn(top_k, devices=devices)

    def run(self, params: Any, *, baselines: bool = False) -> Result:
        """Evaluates parameters that are replicated over the devices."""
        queries, images = self.split.queries, self.split.gallery
        gallery = self._embed(self._gallery, params, np.arange(len(images)))
        query, weights = self._embed(self._query, params, queries.reference, self.text)
        rows, scores = self._rank(query, gallery)
        compared = None
        if baselines:
            # The first token stands for the image where an embedding has several.
            alone, _ = self._rank(
                gallery[queries.reference, 0], gallery, excluded=queries.reference[:, None]
            )
            compared = {
                "random": metrics.random_baseline(len(images), [len(v) for v in queries.valid]),
                "reference_only": self._measure(alone),
            }
        return Result(self._measure(rows), compared, rows, scores, weights)

    def _measure(self, rows: np.ndarray) -> dict[str, float]:
        queries = self.split.queries
        return metrics.summarize(
            rows,
            target=queries.target,
            valid=queries.valid,
            reference=queries.reference,
            kinds=queries.kinds,
        ) | {"gallery": len(self.split.gallery)}

    def _embed(self, encode, params: Any, rows: np.ndarray, *columns: np.ndarray) -> Any:
        """Runs `encode` over the images of `rows` (and columns beside them), batch by batch."""
        parts = []
        for i, images in enumerate(self.split.gallery.batches(rows, self._batch)):
            here = slice(i * self._batch, i * self._batch + len(images))
            inputs = (images, *(column[here] for column in columns))
            padded = [parallel.pad_rows(x, self._batch) for x in inputs]
            out = parallel.unshard(encode(params, *parallel.shard(padded, self._n)))
            parts.append(out)
        # Only the last batch is padded.
        return jax.tree.map(lambda *xs: np.concatenate(xs)[: len(rows)], *parts)

    def draw(
        self, result: Result, path: os.PathLike[str] | str, count: int, names: Sequence[str]
    ) -> list[str]:
        """Writes a contact sheet of `count` queries spread over the split.

        Args:
          result: of `run`.
          path: a .png.
          count: queries to draw.
          names: of the attributes.

        Returns:
          One line a drawn query: text, attribute weights, rank of the target.
        """
        queries, images = self.split.queries, self.split.gallery
        sheet = []
        lines = []
        for i in np.unique(np.linspace(0, len(queries) - 1, count).astype(int)):
            weights = dict(zip(names, map(float, result.attribute_weights[i])))
            row = contact_sheet.sheet_row(
                lambda row: images[row][0],
                result.rows[i],
                reference=int(queries.reference[i]),
                target=int(queries.target[i]),
                text=queries.texts[i],
                valid=queries.valid[i],
                weights=weights,
            )
            sheet.append(row)
            listed = ", ".join(f"{name} {value:.2f}" for name, value in weights.items())
            rank = row.target_rank or f"> {result.rows.shape[1]}"
            lines.append(f"{queries.texts[i]!r}: {listed or 'no attributes'}; target at {rank}")
        picture = contact_sheet.draw_contact_sheet(sheet)
        with epath.Path(path).open("wb") as file:
            picture.save(file, "PNG")
        return lines


def write_result(
    result: Result, directory: epath.Path, name: str, **facts: Any
) -> tuple[epath.Path, epath.Path]:
    """Writes `<name>.json`, and returns its path and the one for the contact sheet beside it.

    Args:
      result: of an evaluation.
      directory: made if it is not there.
      name: `<split>-<step>`.
      **facts: what else the JSON says, such as step and split.
    """
    directory.mkdir(parents=True, exist_ok=True)
    report = directory / f"{name}.json"
    content = {**facts, "metrics": result.metrics, "baselines": result.baselines}
    report.write_text(json.dumps(content, indent=2) + "\n")
    return report, directory / f"{name}.png"


def table(result: Result) -> str:
    """The metrics as text: a line each for the model, its baselines and each kind of change."""
    keys = [key for key in HEADLINE if key in result.metrics]
    kinds = sorted({k.split("/")[1] for k in result.metrics if k.startswith("R@1/")})
    lines = [("", *keys, "queries")]

    def line(name: str, values: dict[str, float], suffix: str = "") -> None:
        cells = [f"{values[k + suffix]:.4f}" if k + suffix in values else "-" for k in keys]
        lines.append((name, *cells, str(values.get("queries" + suffix, "-"))))

    line("all", result.metrics)
    for kind in kinds:
        line(kind, result.metrics, f"/{kind}")
    for name, values in (result.baselines or {}).items():
        line(name, values)
    if "P@10_ceiling" in result.metrics:
        ceiling = {"P@10": result.metrics["P@10_ceiling"]}
        line("ceiling", ceiling)
    widths = [max(len(row[i]) for row in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths))
        )
        for row in lines
    )
