"""Fields of a config: each says once what it means, what it may be and what it decides.

A config is a frozen dataclass. Its fields are made by `field`, or are sections, which have such a
dataclass as their `default_factory`. This module knows no field of dqe_jax.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar, cast

# What a field decides: what a run computes; the shapes or the input of the model; how training
# starts and is computed, which evaluation does not need; or, free to differ when a run goes on, how
# it is watched and where its data lie.
Role = Literal["compute", "model", "start", "free"]

# Names of the dtypes that a field may choose from.
DTYPES = ("float32", "bfloat16")

_KEY = "field"
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Check:
    """What a field may be.

    Attributes:
      kind: its type; an integer is a number too, and a list a tuple.
      test: of a value of that type, which is not NaN.
      words: what the field must be, to end a sentence.
    """

    kind: type
    test: Callable[[Any], bool]
    words: str

    def read(self, value: object) -> object:
        """The value in the field's type.

        Raises:
          ValueError: it is not allowed.
        """
        if self.kind is tuple and type(value) is list:
            value = tuple(value)
        if value == ("",):  # what a flag without a value gives: `--config.model.frozen=`
            value = ()
        if self.kind is float and value == "-inf":  # as JSON holds it
            value = -math.inf
        number = self.kind is float and type(value) is int
        if not number and type(value) is not self.kind:
            raise ValueError(self.words)
        if value != value or not self.test(value):
            raise ValueError(self.words)
        return float(value) if self.kind is float and isinstance(value, int) else value


@dataclasses.dataclass(frozen=True)
class Field:
    """What is known of a field.

    Attributes:
      name: with its sections, `data.image_size`.
      default: its value where a config says nothing.
      doc: what it means, in whole sentences.
      check: what it may be.
      role: what it decides.
    """

    name: str
    default: Any
    doc: str
    check: Check
    role: Role


def field(default: _T, doc: str, check: Check, role: Role = "compute") -> _T:
    """A field of a config's dataclass; arguments as of `Field`."""
    made = Field("", default, doc, check, role)
    return dataclasses.field(default=default, metadata={_KEY: made})


def fields_of(config: type, prefix: str = "") -> Iterator[Field]:
    """All fields of a config's dataclass and its sections, in their order."""
    for own in dataclasses.fields(config):
        if _KEY in own.metadata:
            yield dataclasses.replace(own.metadata[_KEY], name=prefix + own.name)
        else:
            yield from fields_of(_section(own), f"{prefix}{own.name}.")


def build(config: type[_T], values: Mapping[str, object], prefix: str = "") -> _T:
    """The config with these values, `{"data.image_size": 64, ...}`, one for each of its fields."""
    given = {
        own.name: values[prefix + own.name]
        if _KEY in own.metadata
        else build(_section(own), values, f"{prefix}{own.name}.")
        for own in dataclasses.fields(cast(Any, config))
    }
    return config(**given)


def _section(own: dataclasses.Field[object]) -> type:
    """The dataclass of a field that is a section: what makes its default."""
    return cast(type, own.default_factory)


# -------------------------------------------------------------------------------------- the checks


def one_of(*values: str) -> Check:
    """One of some words."""
    return Check(str, lambda value: value in values, "one of " + ", ".join(values))


def integer(least: int, most: int) -> Check:
    """An integer between limits, both included."""
    words = f"an integer of at least {least:,} and at most {most:,}"
    return Check(int, lambda value: least <= value <= most, words)


def number(least: float, most: float) -> Check:
    """A number between limits, both included."""
    words = f"a number from {least:,} to {most:,}"
    return Check(float, lambda value: least <= value <= most, words)


def weight(most: int) -> Check:
    """A number that is not negative, up to a limit."""
    words = f"a number of at least 0 and at most {most:,}"
    return Check(float, lambda value: 0 <= value <= most, words)


def positive(most: int) -> Check:
    """A number above 0, up to a limit."""
    words = f"a number above 0 and at most {most:,}"
    return Check(float, lambda value: 0 < value <= most, words)


def rate() -> Check:
    """A number from 0 to below 1, which float32 tells from 1."""
    return Check(float, lambda value: 0 <= value <= 0.999999, "a number from 0 to 0.999999")


def number_or_least(most: int) -> Check:
    """A number up to a limit in size, or -inf."""
    words = f"a number from {-most:,} to {most:,}, or -inf"
    return Check(float, lambda value: value == -math.inf or -most <= value <= most, words)


def number_or_zero(least: float, most: int) -> Check:
    """A positive number that may be divided by, or 0."""
    words = f"0, or a number from {least:,} to {most:,}"
    return Check(float, lambda value: value == 0 or least <= value <= most, words)


def text() -> Check:
    """Any string."""
    return Check(str, lambda value: True, "a string")


def nonempty() -> Check:
    """A string with something in it."""
    return Check(str, lambda value: bool(value.strip()), "a name")


def flag() -> Check:
    """True or false."""
    return Check(bool, lambda value: True, "True or False")


def tuple_of_names(*, empty: bool) -> Check:
    """A tuple of strings, perhaps an empty one."""
    words = "a tuple of names, or ()" if empty else "a tuple of names"

    def test(value: tuple[object, ...]) -> bool:
        return (empty or bool(value)) and all(isinstance(name, str) for name in value)

    return Check(tuple, test, words)


def some_of(*values: str) -> Check:
    """A tuple of some of these words, each once; it may be empty."""
    words = f"a tuple of some of {', '.join(values)}, each once, or ()"

    def test(value: tuple[object, ...]) -> bool:
        return len(set(value)) == len(value) and all(name in values for name in value)

    return Check(tuple, test, words)
