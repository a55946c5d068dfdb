"""What pictures of results are drawn with: fitted images, rounded shapes, and text that fits."""

from __future__ import annotations

import functools
import unicodedata

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GREY = "#dfe3e8"
_SUBSTITUTES = {"–": "-", "—": "-", "−": "-", "×": "x"}  # for what the font may lack
_SMOOTH = 4  # shapes are drawn this much larger and reduced: Pillow does not anti-alias them

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def fit_image(image: np.ndarray, cell: int) -> Image.Image:
    """`image`, uint8 `[H, W, 3]`, as large as fits a square of `cell` pixels, centred on grey.

    Whole multiples are enlarged pixel by pixel, to keep tiny images crisp; all else is resampled.

    Raises:
        ValueError: if `image` is not uint8 `[H, W, 3]` with at least one pixel.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    height, width = image.shape[:2]
    scale = cell / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    method = Image.Resampling.NEAREST if scale.is_integer() else Image.Resampling.LANCZOS
    fitted = Image.new("RGB", (cell, cell), GREY)
    corner = ((cell - size[0]) // 2, (cell - size[1]) // 2)
    fitted.paste(Image.fromarray(np.ascontiguousarray(image)).resize(size, method), corner)
    return fitted


def wrap(text: str, font: Font, width: int, max_lines: int) -> list[str]:
    """Breaks `text` into lines of at most `width` pixels, between words where possible.

    Words wider than a line are broken within. What does not fit `max_lines` ends in an ellipsis.
    """

    def fits(line: str) -> bool:
        return font.getlength(line) <= width

    lines, line = [], ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if fits(joined):
            line = joined
            continue
        if line:
            lines.append(line)
        line = ""
        for character in word:
            # A character that is wider than the line gets a line of its own.
            if line and not fits(line + character):
                lines.append(line)
                line = ""
            line += character
        if len(lines) > max_lines:
            break
    if line or not lines:
        lines.append(line)
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and not fits(f"{last.rstrip()}…"):
            last = last[:-1]
        lines = [*lines[: max_lines - 1], f"{last.rstrip()}…"]
    return lines


def clean(text: str) -> str:
    """`text` on one line, in characters that the font can draw."""
    # Lone surrogates cannot be encoded, so they cannot be drawn.
    text = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    return "".join(_drawable(c) for c in text if c.isprintable())


@functools.lru_cache(maxsize=4096)
def _drawable(character: str) -> str:
    """`character`; if the font lacks it, its base letter or "?"."""

    def drawn(text: str) -> bytes:
        return bytes(font_of(32).getmask(text))

    missing = drawn("\uffff")
    if drawn(character) != missing:
        return character
    if character in _SUBSTITUTES:
        return _SUBSTITUTES[character]
    decomposed = unicodedata.normalize("NFKD", character)
    base = "".join(c for c in decomposed if not unicodedata.combining(c))
    # Letters only: without its stroke "≠" would mean the opposite.
    return base if base.isascii() and base.isalpha() else "?"


@functools.lru_cache(maxsize=16)
def font_of(size: float) -> Font:
    """Pillow's own font, at a size in pixels."""
    return ImageFont.load_default(size=size)


@functools.lru_cache(maxsize=256)
def rounded_mask(size: tuple[int, int], radius: int) -> Image.Image:
    """A rectangle with round corners as a mask of `size` pixels, mode "L", with smooth edges."""
    large = (max(1, size[0]) * _SMOOTH, max(1, size[1]) * _SMOOTH)
    mask = Image.new("L", large, 0)
    box = (0, 0, large[0] - 1, large[1] - 1)
    ImageDraw.Draw(mask).rounded_rectangle(box, radius * _SMOOTH, fill=255)
    return mask.resize((large[0] // _SMOOTH, large[1] // _SMOOTH), Image.Resampling.BOX)
