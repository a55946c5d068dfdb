"""A place where a command reads a file."""

from __future__ import annotations

import dataclasses

from tests.fuzz.rules import Rule


@dataclasses.dataclass(frozen=True)
class Place:
    """A file that a command reads.

    Attributes:
      name: of the place, and of its folder in `corpus/`.
      kind: of input, for the table.
      arguments: the command; `{world}` stands for the good files.
      copies: what of the good files lies in the working directory; a folder `raw/cirr` as `cirr`.
      file: that is damaged, from the working directory.
      form: of the file: json, lines, safetensors, npz, parquet, photo, bytes or config.
      rule: what a damaged file must lead to.
      results: files that a command which accepts writes, and that must be those of the good file.
      stated: verdicts of damages by their names, in place of the rule's.
      trained: whether it needs the good run.
      names: whether the sentence must name the file.
      good_words: of a command that would serve or send something: it is given an address that it
        cannot have, and ends in a sentence with these words when it has accepted all that it reads.
      may_change: what a command that accepts may change, by the beginnings of paths.
      most: cases, drawn from all by the seed, where each takes long; 0 for all.
      spares: whether the command can do without the file, or take another.
    """

    name: str
    kind: str
    arguments: tuple[str, ...]
    copies: tuple[str, ...]
    file: str
    form: str
    rule: Rule
    results: tuple[str, ...] = ()
    stated: dict[str, str] = dataclasses.field(default_factory=dict)
    trained: bool = False
    names: bool = True
    good_words: str = ""
    may_change: tuple[str, ...] = ()
    most: int = 0
    spares: bool = False

    @property
    def command(self) -> str:
        """Its name."""
        return self.arguments[0]
