"""Which attributes a modification text mentions, by the words of a lexicon (method, section 3)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import read_text

_WORD = re.compile(r"[^\W_]+")


def words_of(text: str) -> list[str]:
    """The words of a text as entries hold them: in lower case, singular; numbers are words."""
    return [_singular(word) for word in _WORD.findall(text.lower())]


def _singular(word: str) -> str:
    if len(word) > 3 and word.endswith("s") and word[-2] != "s":
        word = word[:-1]
    # "dresses" is now "dresse" and "blouses" "blouse": without the e both match their singular.
    return word[:-1] if len(word) > 3 and word.endswith(("se", "xe", "che", "she")) else word


def load_lexicon(path: str = "") -> dict[str, frozenset[str]]:
    """Reads a lexicon: attribute to its entries, in singular.

    Args:
      path: a file as `dqe_jax/data/lexicon.txt`, which is the default.

    Raises:
      UserError: the file is missing, is no text, or has an entry before the first `[attribute]`.
    """
    source = epath.Path(path) if path else epath.Path(__file__).parent / "lexicon.txt"
    if not source.is_file():
        raise UserError(f"config.data.lexicon: there is no file {source}.")
    lexicon: dict[str, set[str]] = {}
    section: set[str] | None = None
    for number, line in enumerate(read_text(source).splitlines(), 1):
        line = line.split("#")[0].strip()
        if line.startswith("[") and line.endswith("]"):
            section = lexicon.setdefault(line[1:-1].strip(), set())
        elif line:
            if section is None:
                raise UserError(
                    f"{source}, line {number}: put an [attribute] line before {line!r}."
                )
            section.update(" ".join(words_of(entry)) for entry in line.split(",") if entry.strip())
    return {name: frozenset(entries) for name, entries in lexicon.items()}


def mentions(
    texts: Sequence[str], names: Sequence[str], lexicon: Mapping[str, frozenset[str]]
) -> np.ndarray:
    """1 where a text mentions an attribute: float32 `[len(texts), len(names)]`.

    Raises:
      UserError: an attribute without a section in the lexicon.
    """
    for name in names:
        if name not in lexicon:
            raise UserError(
                f"config.model.attributes.names: {name!r} has no section in the lexicon, "
                f"which has {', '.join(sorted(lexicon))}."
            )
    longest = max((len(entry.split(" ")) for name in names for entry in lexicon[name]), default=1)
    result = np.zeros((len(texts), len(names)), np.float32)
    for row, text in enumerate(texts):
        words = words_of(text)
        phrases = {
            " ".join(words[i : i + n])
            for n in range(1, longest + 1)
            for i in range(len(words) - n + 1)
        }
        result[row] = [not phrases.isdisjoint(lexicon[name]) for name in names]
    return result
