"""How queries are packed into batches, and texts into lengths: on made and on published numbers."""

from __future__ import annotations

import json
import pathlib

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given

from dqe_jax.data import tokenizer as text_tokens
from dqe_jax.data.annotations import fashioniq
from dqe_jax.data.datasets import DATASETS, expected_shape
from dqe_jax.data.lengths import choose_lengths, length_for, share_of_batches
from dqe_jax.data.packing import Packing, check_parts, even_shape
from dqe_jax.data.settings import BatchConfig
from dqe_jax.utils.errors import UserError

REAL = pathlib.Path(__file__).resolve().parents[3] / "shared" / "annotations" / "fashioniq"


def queries_of(sizes):
    """References of queries in mixed order: the `i`-th reference has `sizes[i]`."""
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))


def published():
    """The reference of each training query of FashionIQ, or a skip."""
    if not REAL.exists():
        pytest.skip(f"needs the published annotations in {REAL}")
    found = []
    for category in fashioniq.CATEGORIES:
        text = (REAL / "captions" / f"cap.{category}.train.json").read_text()
        found += [record["candidate"] for record in json.loads(text)]
    return np.unique(found, return_inverse=True)[1]


def check_epoch(packing, reference, epoch):
    """Each query once, and each row at the slot of its reference, group by group."""
    units = packing.take(epoch * packing.units, packing.units)
    assert sorted(units.query[units.mask].tolist()) == list(range(len(reference)))
    assert (np.diff(units.slot, axis=1) >= 0).all()
    own = np.take_along_axis(reference[units.reference], units.slot, axis=1)
    np.testing.assert_array_equal(own[units.mask], reference[units.query][units.mask])
    for slot, mask, used in zip(units.slot, units.mask, units.used):
        assert set(slot[mask]) == set(np.flatnonzero(used))
    rows = np.bincount(
        (units.slot + packing.shape.of_unit[1] * np.arange(packing.units)[:, None])[units.mask]
    )
    return units, rows


# About as FashionIQ.
MIXED = [1] * 90 + [2] * 24 + [3] * 8 + [5] * 2


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=60),
    references=st.integers(1, 16),
    most=st.integers(1, 4),
)
@example(sizes=[8] * 40, references=16, most=2)
@example(sizes=[1] * 200, references=8, most=4)
@example(sizes=MIXED, references=64, most=2)
def test_each_query_comes_once_an_epoch(sizes, references, most):
    reference = queries_of(sizes)
    packing = Packing(reference, references, most, seed=3)
    assert packing.shape.queries == references * most
    for epoch in (0, 7):
        units, rows = check_epoch(packing, reference, epoch)
        assert rows.max() <= most
        assert packing.padding.queries == pytest.approx(1 - units.mask.mean())
        assert packing.padding.references == pytest.approx(1 - units.used.mean())


@pytest.mark.parametrize(("references", "most"), [(64, 2), (32, 2), (128, 2), (32, 4), (64, 1)])
def test_a_tenth_of_the_padding_of_fashioniq_is_left(references, most):
    """A fixed number of rows for each reference pads more than a third; packed: below 3%."""
    reference = published()
    _, counts = np.unique(reference, return_counts=True)
    before = 1 - np.minimum(counts, 2).sum() / (2 * len(counts))
    assert before == pytest.approx(0.358, abs=1e-3)
    packing = Packing(reference, references, most)
    found = packing.padding
    print(f"{packing.shape}: {before:.1%} before, {found.queries:.2%}, {found.references:.2%} now")
    check_epoch(packing, reference, 1)
    assert found.queries < 0.03
    assert found.references < 0.03
    # The planner knows the numbers of the published split.
    assert expected_shape("fashioniq", BatchConfig(references, most)) == packing.shape
    assert np.bincount(counts)[1:].tolist() == list(DATASETS["fashioniq"].sizes["train"].references)


def test_few_groups_are_cut_for_nothing():
    """Of groups of two nearly all stay whole."""
    reference = published()
    _, counts = np.unique(reference, return_counts=True)
    packing = Packing(reference, 64, 2)
    _, rows = check_epoch(packing, reference, 0)
    assert (rows == 2).sum() > 0.95 * (counts // 2).sum()


def test_full_references_make_batches_without_an_index():
    packing = Packing(queries_of([8] * 50), 32, 4)
    assert packing.shape == even_shape(32, 4) == expected_shape("shapes", BatchConfig(32, 4))
    assert packing.shape.even
    assert packing.padding.queries == packing.padding.references == 0


def test_neighbours_stay_together():
    reference = np.repeat(np.arange(30), 8)
    packing = Packing(reference, 8, 4)
    for epoch in range(3):
        units = packing.take(epoch * packing.units, packing.units)
        assert ((np.diff(units.query, axis=1) % 8) == 1).all()
    starts = {tuple(packing.take(e * packing.units, 1).query[0] % 8) for e in range(20)}
    assert len(starts) > 4


def test_the_stream_is_that_of_the_seed_at_any_place():
    reference = queries_of(MIXED)
    one, again, other = (Packing(reference, 8, 2, seed) for seed in (1, 1, 2))
    start = 3 * one.units - 5
    whole = one.take(start, 20)
    parts = [again.take(start + i, 1) for i in reversed(range(20))][::-1]
    np.testing.assert_array_equal(whole.query, np.concatenate([part.query for part in parts]))
    assert (whole.query != other.take(start, 20).query).any()
    assert (one.take(0, 8).query != one.take(one.units, 8).query).any()


def test_devices_and_chunks_divide_the_units():
    shape = Packing(queries_of(MIXED * 20), 64, 2).shape
    assert shape.units % 8 == 0
    check_parts(shape, 8, shape.units // 8)
    with pytest.raises(UserError, match=r"chunks is 64, on 8 devices: .* cut into \d+ equal parts"):
        check_parts(shape, 8, 64)
    part = shape.part(8)
    assert part.queries * 8 == shape.queries
    assert part.of_unit == shape.of_unit


# ---------------------------------------------------------------------------------------- lengths


def test_lengths_are_few_and_hold_every_text():
    rng = np.random.default_rng(0)
    needed = np.clip(rng.normal(13, 3, 20_000).astype(int), 3, 70)
    needed[:3] = 61
    lengths = choose_lengths(needed, 128, 77)
    assert lengths == (24, 64)
    assert share_of_batches(needed, 128, 24) > 0.9
    assert choose_lengths(needed, 128, 20) == (20,)  # texts are cut there
    assert choose_lengths(np.full(5, 9), 8, 77) == (16,)
    assert choose_lengths(np.full(5, 15), 8, 15) == (15,)
    assert length_for(np.array([[3, 24]]), lengths) == 24
    assert length_for(np.array([25]), lengths) == 64


@pytest.mark.parametrize("ends", [False, True])
def test_what_a_text_needs(ends):
    """With and without a token at the end, which may be that of padding too."""
    tokenizer = text_tokens.train_word_tokenizer(["a red one", "a"], 6)
    if ends:
        from tokenizers import processors

        tokenizer.add_special_tokens(["<end>"])
        end = tokenizer.token_to_id("<end>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <end>", special_tokens=[("<end>", end)]
        )
        text_tokens.set_length(tokenizer, 6, end, "<end>")
    ids, _ = text_tokens.encode(tokenizer, ["a red one", "a", "", "a red one a red one a"])
    found = text_tokens.lengths_of(tokenizer, ids)
    assert found.tolist() == ([4, 2, 1, 6] if ends else [3, 1, 1, 6])
