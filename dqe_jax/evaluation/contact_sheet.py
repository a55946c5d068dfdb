"""Draws rankings as one picture: a row per query, with the reference, the text and the results."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from dqe_jax.evaluation.drawing import GREY, clean, fit_image, font_of, rounded_mask, wrap

TARGET, RELEVANT, REFERENCE, OTHER = "target", "relevant", "reference", ""

_BACKGROUND = "#ffffff"
_STRIPE = "#f6f8fa"
_TEXT = "#1f2328"
_MUTED = "#656d76"
_MISSED = "#d1242f"
_FRAMES = {TARGET: "#1a9c3e", RELEVANT: "#56cfc0", REFERENCE: "#8c959f"}
# Bars take these colours in turn, by the place of the attribute.
_BARS = ("#4c78c8", "#d9822b", "#8a63c7", "#c2518a", "#7a8b2e", "#3b97a8")


@dataclasses.dataclass(frozen=True)
class SheetResult:
    """One retrieved image, uint8 `[H, W, 3]`; `mark` is "target", "relevant", "reference" or ""."""

    image: np.ndarray
    mark: str = OTHER


@dataclasses.dataclass(frozen=True)
class SheetRow:
    """One query of a contact sheet.

    Attributes:
        reference: the reference image, uint8 `[H, W, 3]`.
        text: the modification text.
        results: the images found, best first; the sheet shows as many as it has columns for.
        weights: attribute weights in `[0, 1]` by name; empty draws no bars.
        target: the target image, drawn at the end of the row if no shown result is the target.
        target_rank: its rank from 1, as that column says; None if it is not known.
        depth: how many results were ranked: without a rank, the column says "rank > depth".
    """

    reference: np.ndarray
    text: str
    results: Sequence[SheetResult]
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    target: np.ndarray | None = None
    target_rank: int | None = None
    depth: int | None = None


def sheet_row(
    image: Callable[[int], np.ndarray],
    ranked: Sequence[int] | np.ndarray,
    *,
    reference: int,
    target: int,
    text: str,
    relevant: Sequence[int] = (),
    weights: Mapping[str, float] | None = None,
    shown: int = 10,
) -> SheetRow:
    """Makes a `SheetRow` from a ranked list.

    Args:
        image: gives the uint8 `[H, W, 3]` image of a gallery row; called for shown rows only.
        ranked: gallery rows, best first, ended by -1 if there are fewer.
        reference: gallery row of the reference.
        target: gallery row of the target; -1 if it is not known.
        text: the modification text.
        relevant: gallery rows that are truly relevant.
        weights: attribute weights by name.
        shown: how many results are drawn.
    """
    ranked = [int(row) for row in ranked if row >= 0]
    also_relevant = {int(row) for row in relevant}

    def mark(row: int) -> str:
        if row == target:
            return TARGET
        if row == reference:
            return REFERENCE
        return RELEVANT if row in also_relevant else OTHER

    return SheetRow(
        reference=image(reference),
        text=text,
        results=[SheetResult(image(row), mark(row)) for row in ranked[:shown]],
        weights=dict(weights or {}),
        target=image(target) if target >= 0 else None,
        target_rank=ranked.index(target) + 1 if target in ranked else None,
        depth=len(ranked),
    )


def draw_contact_sheet(
    rows: Sequence[SheetRow],
    path: str | os.PathLike[str] | None = None,
    *,
    title: str = "",
    columns: int = 10,
    cell: int = 96,
) -> Image.Image:
    """Draws one row per query: reference, text with attribute weights, and its first results.

    A frame tells what a result is: green the target, teal another relevant target, grey the
    reference itself. A target that is not among the shown results follows at the end in a
    dashed red frame.

    Args:
        rows: the queries, drawn from top to bottom.
        path: where to write the picture (the suffix gives the format); None writes nothing.
        title: a heading, or "".
        columns: how many results are drawn for each query.
        cell: side of an image in pixels; everything else is proportional to it.

    Returns:
        The picture, mode "RGB".

    Raises:
        ValueError: if there are no rows or an image is not uint8 `[H, W, 3]`.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one row")
    sheet = _Sheet(rows, title, columns, cell)
    if path is not None:
        sheet.picture.save(path)
    return sheet.picture


class _Sheet:
    """Layout and drawing of one sheet. All lengths follow from `cell`."""

    def __init__(self, rows: Sequence[SheetRow], title: str, columns: int, cell: int):
        self.cell = cell
        self.columns = columns
        self.unit = unit = cell / 96
        self.margin, self.gap, self.gutter = (round(x * unit) for x in (24, 14, 28))
        self.frame, self.radius = max(2, round(4 * unit)), round(7 * unit)
        self.text_width = round(244 * unit)
        self.font = font_of(18.5 * unit)
        self.small = font_of(15 * unit)
        self.heading = font_of(22 * unit)

        self.x_text = self.margin + cell + self.gutter - self.gap
        self.x_results = self.x_text + self.text_width + self.gutter
        self.x_missed = self.x_results + columns * (cell + self.gap) - self.gap + self.gutter
        missed = any(self._missed(row) for row in rows)
        right = self.x_missed + cell if missed else self.x_missed - self.gutter
        width = right + self.margin

        title = clean(title)
        y_legend = self.margin + (round(36 * unit) if title else 0)
        y_labels = y_legend + round(38 * unit)
        y_rows = y_labels + round(24 * unit)
        blocks = [self._block(row) for row in rows]
        pad = round(12 * unit)
        heights = [max(cell, height) + 2 * pad for _, height in blocks]

        size = (width, y_rows + sum(heights) + self.margin - pad)
        self.picture = Image.new("RGB", size, _BACKGROUND)
        self.draw = ImageDraw.Draw(self.picture)
        if title:
            self.draw.text((self.margin, self.margin), title, _TEXT, self.heading)
        self._legend(y_legend, rows, missed)
        self._labels(y_labels, missed)
        y = y_rows
        for i, (row, (lines, block), height) in enumerate(zip(rows, blocks, heights)):
            if i % 2 == 0:
                inset = self.margin // 2
                box = (inset, y, width - inset, y + height)
                self._paste_rounded(box, _STRIPE, self.radius)
            self._row(row, lines, block, y, height)
            y += height

    def _missed(self, row: SheetRow) -> bool:
        shown = row.results[: self.columns]
        return row.target is not None and all(result.mark != TARGET for result in shown)

    def _block(self, row: SheetRow) -> tuple[list[str], int]:
        """The wrapped text of a row, and the height of text and bars together."""
        lines = wrap(clean(row.text), self.font, self.text_width, max_lines=4)
        height = len(lines) * self._line
        if row.weights:
            height += round(6 * self.unit) + len(row.weights) * self._bar_step
        return lines, height

    @property
    def _line(self) -> int:
        return round(23 * self.unit)

    @property
    def _bar_step(self) -> int:
        return round(20 * self.unit)

    def _legend(self, y: int, rows: Sequence[SheetRow], missed: bool) -> None:
        marks = {result.mark for row in rows for result in row.results[: self.columns]}
        entries = [(TARGET, "target")]
        if RELEVANT in marks:
            entries.append((RELEVANT, "also relevant"))
        if REFERENCE in marks:
            entries.append((REFERENCE, "the reference itself"))
        swatch = round(18 * self.unit)
        x = self.margin
        middle = y + swatch // 2
        for mark, label in entries:
            self._ring((x, y, x + swatch, y + swatch), _FRAMES[mark], round(4 * self.unit))
            x = self._legend_text(x + swatch, middle, label)
        if missed:
            self._dashes((x, y, x + swatch - 1, y + swatch - 1), dash=round(4 * self.unit))
            self._legend_text(x + swatch, middle, f"target, not in the first {self.columns}")

    def _legend_text(self, x: int, middle: int, label: str) -> int:
        x += round(8 * self.unit)
        self.draw.text((x, middle), label, _TEXT, self.small, anchor="lm")
        return x + round(self.small.getlength(label) + 26 * self.unit)

    def _labels(self, y: int, missed: bool) -> None:
        def label(x: float, text: str, anchor: str = "lt") -> None:
            self.draw.text((x, y), text, _MUTED, self.small, anchor=anchor)

        label(self.margin + self.cell / 2, "reference", "mt")
        label(self.x_text, "modification")
        for i in range(self.columns):
            label(self._x(i) + self.cell / 2, str(i + 1), "mt")
        if missed:
            label(self.x_missed + self.cell / 2, "target", "mt")

    def _x(self, column: int) -> int:
        return self.x_results + column * (self.cell + self.gap)

    def _row(self, row: SheetRow, lines: list[str], block: int, y: int, height: int) -> None:
        top = y + (height - self.cell) // 2
        self._image(row.reference, self.margin, top)
        text_y = y + (height - block) // 2
        for line in lines:
            middle = text_y + self._line // 2
            self.draw.text((self.x_text, middle), line, _TEXT, self.font, anchor="lm")
            text_y += self._line
        self._bars(row.weights, text_y + round(6 * self.unit))
        for i, result in enumerate(row.results[: self.columns]):
            self._image(result.image, self._x(i), top, result.mark)
        if row.target is not None and self._missed(row):
            self._image(row.target, self.x_missed, top, rank=_rank_label(row))

    def _bars(self, weights: Mapping[str, float], y: int) -> None:
        if not weights:
            return
        unit = self.unit
        names = {name: wrap(clean(name), self.small, round(96 * unit), 1)[0] for name in weights}
        name_width = max(self.small.getlength(label) for label in names.values())
        left = self.x_text + round(name_width + 10 * unit)
        right = self.x_text + self.text_width - round(42 * unit)
        thickness = round(8 * unit)
        for i, (name, weight) in enumerate(weights.items()):
            middle = y + i * self._bar_step + self._bar_step // 2
            self.draw.text((self.x_text, middle), names[name], _MUTED, self.small, anchor="lm")
            top = middle - thickness // 2
            bar = (left, top, right, top + thickness)
            self._paste_rounded(bar, GREY, thickness // 2)
            share = min(max(float(weight), 0.0), 1.0)
            # NaN compares as false, so no bar is drawn; the number beside it says NaN.
            length = round(share * (right - left)) if share > 0 else 0
            if length:
                filled = (left, top, left + max(length, thickness), top + thickness)
                self._paste_rounded(filled, _BARS[i % len(_BARS)], thickness // 2)
            x = self.x_text + self.text_width
            self.draw.text((x, middle), f"{weight:.2f}", _TEXT, self.small, anchor="rm")

    def _image(
        self, image: np.ndarray, x: int, y: int, mark: str = OTHER, rank: str | None = None
    ) -> None:
        cell, frame = self.cell, self.frame
        picture = fit_image(image, cell)
        self.picture.paste(picture, (x, y), rounded_mask((cell, cell), self.radius))
        if rank is not None:
            self._dashes((x - frame, y - frame, x + cell + frame - 1, y + cell + frame - 1))
            self._tag(x, y, rank, _MISSED)
        elif mark in _FRAMES:
            box = (x - frame, y - frame, x + cell + frame, y + cell + frame)
            self._ring(box, _FRAMES[mark], self.radius + frame, picture)

    def _tag(self, x: int, y: int, text: str, color: str) -> None:
        """A label across the lower edge of a cell."""
        width = round(self.small.getlength(text) + 14 * self.unit)
        height = round(20 * self.unit)
        left = x + (self.cell - width) // 2
        top = y + self.cell - height // 2 - self.frame // 2
        self._paste_rounded((left, top, left + width, top + height), color, height // 2)
        center = (left + width / 2, top + height / 2)
        self.draw.text(center, text, _BACKGROUND, self.small, anchor="mm")

    def _paste_rounded(self, box: tuple[int, int, int, int], color: str, radius: int) -> None:
        size = (box[2] - box[0], box[3] - box[1])
        self.picture.paste(color, box, rounded_mask(size, radius))

    def _ring(
        self,
        box: tuple[int, int, int, int],
        color: str,
        radius: int,
        inside: Image.Image | None = None,
    ) -> None:
        """A rounded frame of `color` in `box` around `inside` (or around nothing)."""
        frame = self.frame if inside is not None else max(2, round(3 * self.unit))
        self._paste_rounded(box, color, radius)
        left, top, right, bottom = box
        inner = (left + frame, top + frame, right - frame, bottom - frame)
        radius = max(radius - frame, 0)
        if inside is None:
            self._paste_rounded(inner, _BACKGROUND, radius)
        else:
            mask = rounded_mask(inside.size, radius)
            self.picture.paste(inside, inner[:2], mask)

    def _dashes(self, box: tuple[int, int, int, int], dash: int | None = None) -> None:
        """A dashed rectangle whose dashes are symmetric, so that all four corners are drawn."""
        dash = dash or round(8 * self.unit)
        thick = max(2, round(2.5 * self.unit))
        left, top, right, bottom = box
        # An odd number of equal pieces, drawn and left out in turn: a dash at both ends.
        for low, high, horizontal in ((left, right, True), (top, bottom, False)):
            pieces = max(1, round((high - low) / dash)) // 2 * 2 + 1
            ends = [round(low + (high + 1 - low) * i / pieces) for i in range(pieces + 1)]
            for a, b in list(itertools.pairwise(ends))[::2]:
                for near in (top, bottom - thick + 1) if horizontal else (left, right - thick + 1):
                    far = near + thick - 1
                    line = (a, near, b - 1, far) if horizontal else (near, a, far, b - 1)
                    self.draw.rectangle(line, fill=_MISSED)


def _rank_label(row: SheetRow) -> str:
    if row.target_rank is not None:
        return f"rank {row.target_rank}"
    return "not found" if row.depth is None else f"rank > {row.depth}"
