"""Pure transforms of one example's texts."""

from __future__ import annotations

from collections.abc import Sequence


def join_captions(captions: Sequence[str], order: str = "forward") -> str:
    """Captions of one modification as one text, as the FashionIQ papers join them: "a and b".

    Blanks, full stops, commas and question marks at the ends of captions go when several are
    joined, and empty captions are left out. Case stays: the tokenizers lower it.

    Args:
      captions: in their published order.
      order: "forward" or "reverse".
    """
    if len(captions) > 1:
        captions = [caption.strip(" .?,\t\n") for caption in captions]
    captions = [caption.strip() for caption in captions if caption.strip()]
    return " and ".join(captions if order == "forward" else captions[::-1])
