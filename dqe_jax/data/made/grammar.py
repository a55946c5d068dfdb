"""The grammar of modification texts: words by which the value of an attribute changes.

Templates give several wordings for each attribute, with or without the old value. A text is in
lower case, and depends on the random generator that the caller hands in.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping

Values = tuple[str, ...]  # Values of a grammar's attributes, in their order.
NA = "NA"  # The value of an attribute that is not stated.
UNSTATED = ("with no stated {}", "one whose {} is not stated", "without any given {}")
JOINTS = ("{} and {}", "{}, {}", "{}, and also {}", "{}, plus {}")


@dataclasses.dataclass(frozen=True)
class Attribute:
    """How the change of one attribute is said.

    Attributes:
        name: as in `name=value`.
        kind: of a query that changes it alone.
        noun: what it is called in a text.
        new: templates that state the new value only.
        new_and_old: templates that state the old one too; there may be none.
        words: gives the forms of a value, by the names that the templates use.
    """

    name: str
    kind: str
    noun: str
    new: tuple[str, ...]
    new_and_old: tuple[str, ...]
    words: Callable[[str], Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class Grammar:
    """How changes of several attributes are said.

    Attributes:
        attributes: in the order of the values.
        joints: templates that join the clauses of two changes.
    """

    attributes: tuple[Attribute, ...]
    joints: tuple[str, ...] = JOINTS

    @property
    def names(self) -> tuple[str, ...]:
        """Of the attributes."""
        return tuple(attribute.name for attribute in self.attributes)

    def modification(self, old: Values, new: Values, rng: random.Random) -> str:
        """The text that turns a product of values `old` into one of values `new`."""
        clauses = [clause(self.attributes[i], old[i], new[i], rng) for i in changes(old, new)]
        rng.shuffle(clauses)
        if len(clauses) == 1:
            return clauses[0]
        return rng.choice(self.joints).format(*clauses)


def clause(attribute: Attribute, old: str, new: str, rng: random.Random) -> str:
    """Says in words, chosen by `rng`, that the attribute changes from `old` to `new`."""
    if new == NA:
        return rng.choice(UNSTATED).format(attribute.noun)
    templates = attribute.new
    # Not if the old value is NA, which has no words.
    if old != NA and attribute.new_and_old and rng.random() < 0.5:
        templates = attribute.new_and_old
    forms = {"new": attribute.words(new), "old": attribute.words(old), "noun": attribute.noun}
    return rng.choice(templates).format(**forms)


def changes(old: Values, new: Values) -> tuple[int, ...]:
    """Positions of the values that differ."""
    return tuple(i for i, (a, b) in enumerate(zip(old, new)) if a != b)


def with_article(noun: str) -> str:
    """A noun with "a" or "an"."""
    vowel = noun[:1] in tuple("aeiou") and not noun.startswith("uni")
    return f"{'an' if vowel else 'a'} {noun}"
