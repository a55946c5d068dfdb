"""Queries made from the attributes of a split's products.

The rules are told by `builders/fashion_products.py` and `tables.py`.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import random
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence

from dqe_jax.data import examples
from dqe_jax.data.made.grammar import NA, Grammar, Values, changes
from dqe_jax.utils.files import JsonObject

TWO_CHANGES = "two changes"  # the kind of such a query


@dataclasses.dataclass(frozen=True)
class Rules:
    """By which queries are made.

    Attributes:
        grammar: the attributes, in the order of the products' values, and how a change is said.
        salt: of the random choices.
        ask_unstated: whether a query may ask for a value that is not stated.
    """

    grammar: Grammar
    salt: str
    ask_unstated: bool = True


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of one split.

    Attributes:
        id: Its id.
        values: What decides for which queries it is relevant.
        photo: Row of the first product with an identical photo.
        attributes: All that is known of it, as `name=value`.
        image: Index in the file of images.
    """

    id: str
    values: Values
    photo: int
    attributes: tuple[str, ...] = ()
    image: int = -1


@dataclasses.dataclass(frozen=True)
class _Draft:
    """A query, before it is known which others ask the same.

    Attributes:
        reference: row of the reference.
        target: row of the target.
        text: that asks for it.
        values: that the text asks for, changed or not.
        changed: positions of those that are changed.
        asked: (attribute, value) that the text asks for.
    """

    reference: int
    target: int
    text: str
    values: Values
    changed: tuple[int, ...]
    asked: list[tuple[str, str]]


def make_queries(
    rules: Rules,
    products: Sequence[Product],
    queries_per_reference: int,
    known: Collection[tuple[str, str]] | None = None,
) -> tuple[list[examples.Query], int]:
    """Makes the queries of a split, in the order of their references; see the rules.

    Args:
        rules: By which they are made.
        products: The gallery of the split.
        queries_per_reference: At most so many a product.
        known: The (attribute, value) that may be asked for; any if None.

    Returns:
        The queries, and how many were dropped because they ask for a value not in `known`.
    """
    rows: dict[Values, list[int]] = collections.defaultdict(list)
    for row, product in enumerate(products):
        rows[product.values].append(row)
    drafts = _draft_queries(rules, products, rows, queries_per_reference)
    kept = [d for d in drafts if known is None or all(pair in known for pair in d.asked)]
    answers = _answers(products, kept)
    queries = []
    numbers: collections.Counter[int] = collections.Counter()
    for draft in kept:
        product = products[draft.reference]
        others = sorted(answers[product.photo, draft.text] - {draft.target})
        one = rules.grammar.attributes[draft.changed[0]].kind
        queries.append(
            examples.Query(
                id=f"{product.id}-{numbers[draft.reference]}",
                texts=[draft.text],
                reference=draft.reference,
                target=draft.target,
                known_positives=[draft.target, *others],
                relevant=rows[draft.values],
                kinds=(one if len(draft.changed) == 1 else TWO_CHANGES,),
                attributes=[f"{name}={value}" for name, value in draft.asked],
            )
        )
        numbers[draft.reference] += 1
    return queries, len(drafts) - len(kept)


def _draft_queries(
    rules: Rules,
    products: Sequence[Product],
    rows: Mapping[Values, Sequence[int]],
    per_reference: int,
) -> list[_Draft]:
    """Queries of all products whose photos are not ambiguous; `rows` are those of each tuple."""
    ambiguous = ambiguous_photos(products)
    # Rows that can be a target. Copies of the reference have its own tuple, since ambiguous photos
    # are no references, so that none of them is a target.
    clear = {
        values: usable
        for values, those in rows.items()
        if (usable := [row for row in those if products[row].photo not in ambiguous])
    }
    near = neighbours(clear, rules.ask_unstated)
    sizes = {values: len(usable) for values, usable in clear.items()}
    drafts = []
    for reference, product in enumerate(products):
        if product.photo in ambiguous:
            continue
        rng = random.Random(f"{rules.salt}:{product.id}")
        for values in _choose(near[product.values], sizes, per_reference, rng):
            target = rng.choice(clear[values])
            text = rules.grammar.modification(product.values, values, rng)
            changed = changes(product.values, values)
            asked = [(rules.grammar.attributes[i].name, values[i]) for i in changed]
            drafts.append(_Draft(reference, target, text, values, changed, asked))
    return drafts


def _answers(
    products: Sequence[Product], drafts: Iterable[_Draft]
) -> dict[tuple[int, str], set[int]]:
    """Rows that answer a text about a photo: the same words about it are one question to a model.

    Copies of a target's photo answer as it does.
    """
    copies: dict[int, list[int]] = collections.defaultdict(list)
    for row, product in enumerate(products):
        copies[product.photo].append(row)
    answers: dict[tuple[int, str], set[int]] = collections.defaultdict(set)
    for draft in drafts:
        question = products[draft.reference].photo, draft.text
        answers[question].update(copies[products[draft.target].photo])
    return answers


def neighbours(
    tuples: Collection[Values], ask_unstated: bool = True
) -> dict[Values, dict[tuple[int, ...], list[Values]]]:
    """For each tuple, those that differ from it in one or two values, by the positions changed.

    Found through indexes of the tuples with one or two values removed, not by comparing all pairs.

    Args:
        tuples: Distinct tuples of one length.
        ask_unstated: Whether those may be among them in which a changed value is not stated.

    Returns:
        `{tuple: {positions: [tuples]}}`, in a fixed order; positions without any are absent.
    """
    ordered = sorted(tuples)
    count = len(ordered[0]) if ordered else 0
    positions = [*((i,) for i in range(count)), *itertools.combinations(range(count), 2)]
    result: dict[Values, dict[tuple[int, ...], list[Values]]] = {values: {} for values in ordered}
    for removed in positions:
        index: dict[Values, list[Values]] = collections.defaultdict(list)
        for values in ordered:
            index[_without(values, removed)].append(values)
        for values in ordered:
            found = [
                other
                for other in index[_without(values, removed)]
                if all(other[i] != values[i] for i in removed)
                and (ask_unstated or all(other[i] != NA for i in removed))
            ]
            if found:
                result[values][removed] = found
    return result


def _without(values: Values, removed: tuple[int, ...]) -> Values:
    return tuple(value for i, value in enumerate(values) if i not in removed)


def ambiguous_photos(products: Sequence[Product]) -> set[int]:
    """The `photo` of those photos that occur with different attributes."""
    seen: dict[int, Values] = {}
    return {p.photo for p in products if seen.setdefault(p.photo, p.values) != p.values}


def _choose(
    found: Mapping[tuple[int, ...], list[Values]],
    sizes: Mapping[Values, int],
    count: int,
    rng: random.Random,
) -> list[Values]:
    """Up to `count` distinct tuples, one or two changes away: the kind first, then the values."""
    # A third of two changes in expectation, and no more than half as many as of one change.
    two = count // 3 + (rng.random() < (count % 3) / 3)
    singles = _cycle({k: v for k, v in found.items() if len(k) == 1}, sizes, count - two, rng)
    two = min(two, -(-len(singles) // 2))
    return singles + _cycle({k: v for k, v in found.items() if len(k) == 2}, sizes, two, rng)


def _cycle(
    found: Mapping[tuple[int, ...], list[Values]],
    sizes: Mapping[Values, int],
    count: int,
    rng: random.Random,
) -> list[Values]:
    """Takes random tuples from each kind in turn, kinds in random order, until `count`.

    Within a kind, in proportion to the products of a tuple (`sizes`) and without replacement: the
    largest of `uniform ** (1 / size)` (Efraimidis and Spirakis, 2006).
    """
    kinds = sorted(found)
    rng.shuffle(kinds)
    samples = []
    for kind in kinds:
        keys = {values: rng.random() ** (1 / sizes[values]) for values in found[kind]}
        samples.append(sorted(keys, key=keys.__getitem__, reverse=True)[:count])
    turns = itertools.chain.from_iterable(itertools.zip_longest(*samples))
    return list(itertools.islice((values for values in turns if values is not None), count))


def asked_values(queries: Iterable[examples.Query]) -> set[tuple[str, str]]:
    """The (attribute, value) pairs that the queries ask for."""
    parts = (pair.partition("=") for query in queries for pair in query.attributes)
    return {(name, value) for name, _, value in parts}


def summary(
    products: Sequence[Product], queries: Sequence[examples.Query], dropped: int
) -> JsonObject:
    """Counts of a split, for the metadata."""
    relevant = [len(query.relevant) for query in queries] or [0]
    kinds = collections.Counter(kind for query in queries for kind in query.kinds)
    return {
        "products": len(products),
        "distinct_photos": len({product.photo for product in products}),
        "ambiguous_photos": len(ambiguous_photos(products)),
        "distinct_attributes": len({product.values for product in products}),
        "queries": len(queries),
        "references": len({query.reference for query in queries}),
        "kinds": dict(sorted(kinds.items())),
        "median_valid": float(statistics.median(relevant)),
        "mean_valid": round(statistics.fmean(relevant), 3),
        "dropped_rare_values": dropped,
    }
