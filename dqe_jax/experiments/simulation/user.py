"""What a simulated user does: goes on from the best image, says what still differs, and rejects.

The user wants images with the values of a query's target, and knows the attributes of every image
that is shown. In each turn

- the search is over if a valid image is shown, and the first of these is picked;
- the shown images that agree least with what is wanted are rejected, at most `REJECTS` of them;
- the next reference is the shown image that agrees most, if it agrees better than the reference
  before; else that one stays;
- the next text says what still differs, in words drawn anew, two differences at the most.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import numpy as np

from dqe_jax.data.feedback import Click
from dqe_jax.data.made.grammar import Grammar, Values
from dqe_jax.search.asks import Ask, Turn
from dqe_jax.search.index import Index
from dqe_jax.search.relevance import MOVES, STILL, Moves

REJECTS = 3  # images of a turn
SAID = 2  # differences in a text
BATCH = 64  # searches at a time
# What the search does with what was said before.
MODES = {
    "none": "nothing: each turn is a search of its own",
    "hidden": "rejected images are not shown again",
    "feedback": "they are not shown again, and rejections and earlier turns move the query",
}


@dataclasses.dataclass(frozen=True)
class World:
    """What a user knows of the images of an index.

    Attributes:
      ids: of the images, by row.
      values: of their attributes, by row.
      grammar: by which changes are said.
      counted: positions of the attributes that decide what is valid.
    """

    ids: Sequence[str]
    values: Sequence[Values]
    grammar: Grammar
    counted: tuple[int, ...]

    def agreement(self, row: int, wanted: Values) -> int:
        """In how many of the attributes that count an image is as wanted."""
        return sum(self.values[row][i] == wanted[i] for i in self.counted)

    def said(self, row: int, wanted: Values, rng: random.Random) -> str:
        """A text that says how the wanted images differ from this one; "" if they do not."""
        own = self.values[row]
        differ = [i for i in self.counted if own[i] != wanted[i]]
        if not differ:
            return ""
        chosen = set(rng.sample(differ, min(SAID, len(differ))))
        new = tuple(wanted[i] if i in chosen else value for i, value in enumerate(own))
        return self.grammar.modification(own, new, rng)


@dataclasses.dataclass(frozen=True)
class Wish:
    """What a user looks for.

    Attributes:
      reference: row of the image that it starts from.
      text: the first one.
      target: row of an image that is meant.
      valid: rows of all images that are.
    """

    reference: int
    text: str
    target: int
    valid: frozenset[int]


@dataclasses.dataclass
class _Talk:
    """A conversation so far."""

    wish: Wish
    reference: int
    text: str
    rng: random.Random
    earlier: list[Turn] = dataclasses.field(default_factory=list)
    rejected: list[str] = dataclasses.field(default_factory=list)
    found: int = 0  # the turn, from 1; 0 for none


def search_all(
    index: Index,
    world: World,
    wishes: Sequence[Wish],
    *,
    mode: str,
    seed: int,
    turns: int = 3,
    shown: int = 10,
    moves: Moves = MOVES,
) -> tuple[np.ndarray, list[Click]]:
    """Lets a user search for each wish.

    Args:
      index: to search.
      world: of its images.
      wishes: at least one.
      mode: of `MODES`.
      seed: of the words.
      turns: the most of a conversation.
      shown: images that the user looks at in a turn.
      moves: how far a conversation moves a query, in the mode `feedback`.

    Returns:
      int `[n]`, the turn in which a valid image was shown, from 1; 0 for none. And the clicks.
    """
    row_of = {id_: row for row, id_ in enumerate(world.ids)}
    talks = [
        _Talk(wish, wish.reference, wish.text, random.Random(f"{seed}:{i}"))
        for i, wish in enumerate(wishes)
    ]
    clicks: list[Click] = []
    for turn in range(turns):
        waiting = [(i, talk) for i, talk in enumerate(talks) if not talk.found]
        for start in range(0, len(waiting), BATCH):
            part = waiting[start : start + BATCH]
            asks = [_ask(world, talk, mode, shown) for _, talk in part]
            used = moves if mode == "feedback" else STILL
            for (i, talk), results in zip(part, index.answer(asks, used)):
                rows = [row_of[one.id] for one in results]
                clicks += _react(index, world, talk, rows, turn, f"user-{seed}-{i}")
    return np.array([talk.found for talk in talks]), clicks


def _ask(world: World, talk: _Talk, mode: str, shown: int) -> Ask:
    images = (world.ids[talk.reference],)
    if mode == "feedback":
        rejected, earlier = tuple(talk.rejected), tuple(talk.earlier)
        return Ask(images, talk.text, shown, rejected=rejected, earlier=earlier)
    exclude = tuple(talk.rejected) if mode == "hidden" else ()
    return Ask(images, talk.text, shown, exclude=exclude)


def _react(
    index: Index, world: World, talk: _Talk, rows: Sequence[int], turn: int, name: str
) -> list[Click]:
    """What the user clicks on, and how the conversation goes on."""
    wish, wanted = talk.wish, world.values[talk.wish.target]
    own = (world.ids[talk.reference],)

    def click(kind: str, row: int) -> Click:
        return Click(
            kind=kind,
            conversation=name,
            turn=turn,
            folder=str(index.root),
            references=own,
            text=talk.text,
            image=world.ids[row],
            shown=tuple(world.ids[other] for other in rows),
            model=index.model.fingerprint,
        )

    valid = [row for row in rows if row in wish.valid]
    wrong = [row for row in rows if row not in wish.valid]
    away = sorted(wrong, key=lambda row: world.agreement(row, wanted))[:REJECTS]  # stable
    clicks = [click("reject", row) for row in away]
    if valid:
        talk.found = turn + 1
        return [*clicks, click("pick", valid[0])]
    talk.rejected += [world.ids[row] for row in away]
    talk.earlier.append(Turn(own, talk.text))
    best = max(wrong, key=lambda row: world.agreement(row, wanted), default=talk.reference)
    if world.agreement(best, wanted) > world.agreement(talk.reference, wanted):
        talk.reference = best
    talk.text = world.said(talk.reference, wanted, talk.rng) or talk.text
    return clicks
