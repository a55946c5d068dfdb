"""A comparison of models as text, Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable

from absl import logging
from etils import epath

from dqe_jax.evaluation.comparison import Comparison
from dqe_jax.evaluation.intervals import DRAWS, LEVEL, Interval
from dqe_jax.utils.files import cannot_write, make_directory
from dqe_jax.utils.text_table import text_table

NAME = "comparison"
CLEAR = "*"  # behind a difference whose interval leaves out 0
_CSV = (
    *("model", "metric", "value", "low", "high"),
    *("difference", "difference_low", "difference_high", "queries"),
)
_IN_LATEX = {
    **{mark: rf"\{mark}" for mark in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
}


def note(comparison: Comparison) -> str:
    """What the figures are, in sentences."""
    images = "" if comparison.images is None else f", {comparison.images:,} images"
    first = comparison.lines[0].name
    return (
        f"{comparison.dataset}, {comparison.split}, protocol {comparison.protocol}: "
        f"{comparison.queries:,} queries{images}. In brackets are {LEVEL:.0%} bootstrap intervals "
        f"over the reference images, each with all its queries ({DRAWS:,} draws). Differences are "
        f"from {first}, query by query; {CLEAR} marks those whose interval leaves out 0. They "
        "tell how much a figure depends on the choice of queries, and not how much runs with other "
        f"seeds differ.{_cut(comparison)}"
    )


def _cut(comparison: Comparison) -> str:
    """A sentence, where lists were scored that end before all that counts."""
    if comparison.cut_at is None:
        return ""
    return (
        " All models were scored from lists that are cut (the shortest holds "
        f"{comparison.cut_at:,} images): figures of whole rankings may be higher."
    )


def as_text(comparison: Comparison) -> str:
    """A table for the terminal, with the note."""
    return f"{text_table(_cells(comparison))}\n{note(comparison)}"


def as_markdown(comparison: Comparison) -> str:
    """A Markdown table, with the note."""
    head, *lines = [[_markdown(cell) for cell in line] for line in _cells(comparison)]
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"{table}\n\n{_markdown(note(comparison))}\n"


def as_latex(comparison: Comparison) -> str:
    """A LaTeX tabular for the package booktabs, with the note as a comment."""
    head, *lines = [[_latex(cell) for cell in line] for line in _cells(comparison)]
    rows = [" & ".join(line) + r" \\" for line in lines]
    return "\n".join(
        [
            f"% {note(comparison)}",
            rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            r"\toprule",
            " & ".join(head) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def as_csv(comparison: Comparison) -> str:
    """A line for each model and metric, with all digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_CSV)
    for line in comparison.lines:
        for key in comparison.keys:
            one, apart = line.values[key], (line.differences or {}).get(key)
            ends = [one.value, one.low, one.high]
            others = [apart.value, apart.low, apart.high] if apart else ["", "", ""]
            writer.writerow([line.name, key, *ends, *others, comparison.queries])
    return out.getvalue()


def write_tables(comparison: Comparison, directory: epath.Path) -> None:
    """Writes `comparison.md`, `.csv` and `.tex`.

    Raises:
      UserError: the directory is not writable.
    """
    make_directory(directory)
    formats: dict[str, Callable[[Comparison], str]] = {
        "md": as_markdown,
        "csv": as_csv,
        "tex": as_latex,
    }
    for suffix, made in formats.items():
        path = directory / f"{NAME}.{suffix}"
        try:
            path.write_text(made(comparison), encoding="utf-8")
        except OSError as error:
            raise cannot_write(directory, error) from error
        logging.info("File: %s", path)


def _cells(comparison: Comparison) -> list[list[str]]:
    """The table: a line for each model, and below each but the first its differences."""
    rows = [["model", *comparison.keys]]
    for line in comparison.lines:
        rows.append([line.name, *(_cell(line.values[key]) for key in comparison.keys)])
        if line.differences is not None:
            apart = [_difference(line.differences[key]) for key in comparison.keys]
            rows.append([f"  {line.name} - {comparison.lines[0].name}", *apart])
    return rows


def _cell(one: Interval) -> str:
    return f"{one.value:.4f} [{one.low:.4f}, {one.high:.4f}]"


def _difference(one: Interval) -> str:
    mark = "" if one.low <= 0 <= one.high else CLEAR
    return f"{one.value:+.4f} [{one.low:+.4f}, {one.high:+.4f}]{mark}"


def _markdown(text: str) -> str:
    return re.sub(r"([|\\*_`<])", r"\\\1", text.strip())


def _latex(text: str) -> str:
    made = re.sub(r"[&%$#_{}~^\\]", lambda match: _IN_LATEX[match[0]], text.strip())
    made = re.sub(r"(?<![\w)])-(?=[\d ])", "$-$", made)
    # At the start of a line these would belong to the command that ends the line before.
    return f"{{}}{made}" if made.startswith(("[", "*")) else made
