"""Results of searches as a picture, and as HTML that needs no other file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dqe_jax.evaluation.contact_sheet import SheetResult, SheetRow, draw_contact_sheet

if TYPE_CHECKING:
    from dqe_jax.search.results import Results

_STYLE = """\
.dqe{font-family:system-ui,sans-serif;margin:0 0 1.5em}
.dqe p{margin:.2em 0}.dqe .warn{color:#b35900}
.dqe .row{display:flex;flex-wrap:wrap;gap:10px;margin-top:.5em}
.dqe figure{margin:0;width:130px;font-size:12px;overflow-wrap:anywhere}
.dqe img{width:130px;height:130px;object-fit:contain;background:#dfe3e8;border-radius:6px}
.dqe .ref img{outline:3px solid #8c959f}"""
_PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>Search</title>
<style>:root{{color-scheme:light dark}}body{{margin:1.5em}}</style></head>
<body>
{}
</body></html>
"""
_MOST_COLUMNS = 12


def to_page(found: Sequence[Results]) -> str:
    """A whole page."""
    return _PAGE.format(to_html(found))


def to_html(found: Sequence[Results]) -> str:
    """A part of a page."""
    return f"<style>{_STYLE}</style>\n" + "\n".join(map(_section, found))


def _section(results: Results) -> str:
    lines = [f"<p><b>{html.escape(results.text or 'no text')}</b></p>"]
    if results.described_weights:
        lines.append(f"<p>attribute weights: {html.escape(results.described_weights)}</p>")
    lines += [f'<p class="warn">{html.escape(said)}</p>' for said in results.warnings]
    references, pictures = results.thumbnails()
    figures = [
        _figure(jpeg, html.escape(name), "ref")
        for jpeg, name in zip(references, results.references)
    ]
    for jpeg, one in zip(pictures, results.results):
        told = [f"{one.score:.3f}", one.id]
        told += [f"{name}: {x}" for name, x in one.metadata.items() if x is not None]
        figures.append(_figure(jpeg, "<br>".join(map(html.escape, told))))
    return f'<div class="dqe">{"".join(lines)}<div class="row">{"".join(figures)}</div></div>'


def _figure(jpeg: bytes, caption: str, kind: str = "") -> str:
    data = base64.b64encode(jpeg).decode()
    picture = f'<img src="data:image/jpeg;base64,{data}" alt="">' if jpeg else "<img alt=''>"
    return f'<figure class="{kind}">{picture}<figcaption>{caption}</figcaption></figure>'


def to_picture(found: Sequence[Results]) -> Image.Image:
    """A picture with a row for each query: its first reference, its text, and the results."""
    rows = []
    for results in found:
        references, pictures = results.thumbnails()
        rows.append(
            SheetRow(
                reference=_pixels(references[0]),
                text=results.text or "(no text)",
                results=[SheetResult(_pixels(jpeg)) for jpeg in pictures[:_MOST_COLUMNS]],
                weights={name: min(x, 1.0) for name, x in results.attribute_weights.items()},
            )
        )
    columns = max((len(row.results) for row in rows), default=1)
    return draw_contact_sheet(rows, columns=max(1, columns))


def _pixels(jpeg: bytes) -> np.ndarray:
    """uint8 `[H, W, 3]`; grey where there is no picture."""
    if not jpeg:
        return np.full((8, 8, 3), 223, np.uint8)
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
