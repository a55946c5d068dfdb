"""Modification texts of `fashion_products`: its attributes, and the words by which they change."""

from __future__ import annotations

import dataclasses

from dqe_jax.data.made import known
from dqe_jax.data.made.grammar import Grammar

# In the order of the 5-tuples: the names are those of columns.
GRAMMAR = Grammar(
    tuple(
        dataclasses.replace(attribute, name=column)
        for column, attribute in (
            ("baseColour", known.COLOR),
            ("articleType", known.ARTICLE),
            ("gender", known.GENDER),
            ("usage", known.USAGE),
            ("season", known.SEASON),
        )
    )
)
ATTRIBUTES = GRAMMAR.names
