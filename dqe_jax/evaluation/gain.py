"""Composition gain: what image and text find together that neither finds alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Rows of one modality.
SINGLE = ("text", "image")


def composition_gain(
    rows: Mapping[str, Mapping[str, float]],
    columns: Sequence[str],
    alone: Sequence[str] = SINGLE,
) -> dict[str, str | float] | None:
    """The best composed row less the best of a single modality, by the first headline metric.

    Args:
      rows: metrics by row: of `zero_shot.ROWS`, and `model` for a trained one.
      columns: headline metrics of the protocol.
      alone: the rows of one modality.

    Returns:
      `metric`, `gain`, and the names of both rows, `composed` and `single`; None if one is missing.
    """
    if not columns:
        return None
    key = columns[0]
    single = {name: x[key] for name, x in rows.items() if name in alone and key in x}
    composed = {name: x[key] for name, x in rows.items() if name not in alone and key in x}
    if not single or not composed:
        return None
    best, other = max(composed, key=composed.__getitem__), max(single, key=single.__getitem__)
    gain = composed[best] - single[other]
    return {"metric": key, "gain": gain, "composed": best, "single": other}


def gain_line(gain: Mapping[str, str | float]) -> str:
    """The composition gain in a sentence."""
    return (
        f"Composition gain: {gain['gain']:+.4f} {gain['metric']} ({gain['composed']}, the best of "
        f"image and text together, less {gain['single']}, the best of one alone)."
    )
