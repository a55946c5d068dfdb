"""The simulated user: it finds what the search gives it, and says what still differs."""

import random
from types import SimpleNamespace

import numpy as np
import pytest

from dqe_jax.data.feedback import judged
from dqe_jax.data.made.wording import make_grammar
from dqe_jax.experiments.described import described
from dqe_jax.experiments.simulation import run
from dqe_jax.experiments.simulation.user import MODES, REJECTS, Wish, World, search_all
from dqe_jax.search.relevance import MOVES, STILL
from dqe_jax.utils.errors import UserError

COLORS, KINDS = ("red", "blue", "green", "black"), ("shirt", "dress", "shoe")
VALUES = [(color, kind, str(i)) for color in COLORS for kind in KINDS for i in range(3)]
IDS = [f"{row:03d}.png" for row in range(len(VALUES))]
GRAMMAR = make_grammar(
    {"color": COLORS, "category": KINDS, "number": sorted({own[2] for own in VALUES})}
)
WORLD = World(ids=IDS, values=VALUES, grammar=GRAMMAR, counted=(0, 1))


class Scripted:
    """An index that gives what a function of the search says."""

    def __init__(self, answer):
        self.root, self.model = "/photos", SimpleNamespace(fingerprint="f")
        self._answer, self.asked, self.moves = answer, [], []

    def answer(self, asks, moves):
        self.asked += asks
        self.moves.append(moves)
        return [[SimpleNamespace(id=IDS[row]) for row in self._answer(ask)] for ask in asks]


def row(color, kind, number=0):
    return VALUES.index((color, kind, str(number)))


WISH = Wish(
    reference=row("red", "shirt"),
    text="in blue, a dress",
    target=row("blue", "dress"),
    valid=frozenset(row("blue", "dress", i) for i in range(3)),
)


def test_it_goes_on_from_the_best_and_says_what_differs():
    half = [row("red", "shoe", i) for i in range(3)] + [row("blue", "shoe"), row("green", "shoe")]

    def answer(ask):
        return half if ask.images == (IDS[WISH.reference],) else [row("blue", "dress", 2), half[0]]

    index = Scripted(answer)
    found, clicks = search_all(index, WORLD, [WISH], mode="feedback", seed=0)
    assert found.tolist() == [2]
    second = index.asked[1]
    assert second.images == (IDS[row("blue", "shoe")],)  # it agrees in one of two
    assert "dress" in second.text
    assert "blue" not in second.text
    assert [turn.text for turn in second.earlier] == [WISH.text]
    assert len(second.rejected) == REJECTS
    assert set(index.moves) == {MOVES}
    kinds = [(click.kind, click.turn) for click in clicks]
    assert kinds == [("reject", 0)] * 3 + [("reject", 1), ("pick", 1)]
    (last,) = [one for one in judged(clicks) if one.picked]
    assert last.picked == (IDS[row("blue", "dress", 2)],)
    assert last.rejected == (IDS[half[0]],)


def test_the_modes_differ_in_what_they_send():
    asked = {}
    for mode in MODES:
        index = Scripted(lambda ask: [row("green", "shoe", i) for i in range(3)])
        found, _ = search_all(index, WORLD, [WISH], mode=mode, seed=0)
        assert found.tolist() == [0]
        assert len(index.asked) == 3
        asked[mode] = index.asked[-1], index.moves[-1]
    assert (asked["none"][0].exclude, asked["none"][0].rejected) == ((), ())
    assert len(asked["hidden"][0].exclude) > 0
    assert asked["hidden"][0].earlier == ()
    assert asked["none"][1] == asked["hidden"][1] == STILL
    assert len(asked["feedback"][0].earlier) == 2
    # Nothing better was shown: the reference stays, and the words change.
    assert {ask.images for ask in index.asked} == {(IDS[WISH.reference],)}


def test_words_are_of_the_difference():
    rng = random.Random(0)
    assert WORLD.said(row("blue", "dress", 1), VALUES[WISH.target], rng) == ""
    for _ in range(20):
        text = WORLD.said(row("green", "dress"), VALUES[WISH.target], rng)
        assert "blue" in text
    assert WORLD.agreement(row("green", "dress"), VALUES[WISH.target]) == 1


def test_what_counts_is_what_valid_images_share():
    targets = [row("blue", "dress"), row("red", "shoe")]
    queries = SimpleNamespace(
        target=np.array(targets),
        relevant=[[row(*VALUES[t][:2], i) for i in range(3)] + [10_000] for t in targets],
    )
    split = SimpleNamespace(queries=queries, gallery=VALUES)
    assert run._counted(split, VALUES) == (0, 1)
    with pytest.raises(UserError, match="do not all have the same attributes"):
        described([("a=1",), ("b=1",)], "shapes")
    names, values = described([("a=1", "b=x=y"), ("a=2", "b=z")], "made")
    assert names == ("a", "b")
    assert values == [("1", "x=y"), ("2", "z")]
    table = run.told({"none": [[0.1, 0.2], [0.3, 0.4]]}, [0, 1])
    assert "0.200  0.300   0.141" in table
