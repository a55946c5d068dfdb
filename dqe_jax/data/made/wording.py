"""The grammar of any attributes, and the lexicon that goes with it.

An attribute whose name is a common one (`color`, `category`, `gender`, `usage`, `season` and their
like) is spoken of as people do; any other by its name: "change the fabric to wool". A file of
templates (TOML) replaces what it names:

    joints = ["{} and {}"]                            # joins the clauses of two changes

    [fabric]                                          # an attribute
    noun = "material"
    new = ["made of {new}", "{new} instead"]          # texts that state the new value only
    new_and_old = ["{new} rather than {old}"]         # texts that state the old one too; may be []

    [fabric.words]                                    # what values are called in texts
    "WL" = "wool"

`{new}` and `{old}` are the values in words, `{noun}` is what the attribute is called. Other forms
of a value are `{new[a]}` ("a sandal"), `{new[one]}` (the same of a plural: "a pair of jeans") and
`{new[many]}` ("sandals"). Texts become lower case.
"""

from __future__ import annotations

import collections
import os
import re
import string
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from dqe_jax.data.lexicon import words_of
from dqe_jax.data.made import known
from dqe_jax.data.made.grammar import JOINTS, Attribute, Grammar, with_article
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import read_text
from dqe_jax.utils.paths import whole_path

_NEW = (
    "change the {noun} to {new}",
    "the same with {noun} {new}",
    "make it {new}",
    "{new} instead",
    "the {noun} should be {new}",
    "i would like {noun} {new}",
)
_NEW_AND_OLD = (
    "{new} instead of {old}",
    "{new} rather than {old}",
    "{new}, not {old}",
    "change the {noun} from {old} to {new}",
)
# Common names of attributes, without spaces and in lower case, and what is known of them.
_COMMON = {
    "color": known.COLOR,
    "colour": known.COLOR,
    "basecolor": known.COLOR,
    "basecolour": known.COLOR,
    "maincolor": known.COLOR,
    "maincolour": known.COLOR,
    "article": known.ARTICLE,
    "articletype": known.ARTICLE,
    "category": known.ARTICLE,
    "subcategory": known.ARTICLE,
    "type": known.ARTICLE,
    "producttype": known.ARTICLE,
    "gender": known.GENDER,
    "usage": known.USAGE,
    "season": known.SEASON,
}
_FORMS = ("a", "one", "many")
_FIELDS = {
    "noun",
    *("new", "old"),
    *(f"{value}[{form}]" for value in ("new", "old") for form in _FORMS),
}


class _Forms(dict[str, str]):
    """The forms of a value; as a text, its word."""

    def __str__(self) -> str:
        return self["word"]

    def __format__(self, spec: str) -> str:
        return format(self["word"], spec)


def make_grammar(
    values: Mapping[str, Sequence[str]], templates: str | os.PathLike[str] | None = None
) -> Grammar:
    """The grammar of attributes.

    Args:
      values: of each attribute, by its name, each once.
      templates: a file as the module tells; None for what is built in.

    Raises:
      UserError: the file cannot be used, or two values of an attribute are called the same.
    """
    given = _read_templates(templates, tuple(values)) if templates is not None else {}
    attributes = tuple(_attribute(name, own, given.get(name, {})) for name, own in values.items())
    for attribute in attributes:
        called: dict[str, str] = {}
        for value in values[attribute.name]:
            word = str(attribute.words(value))
            other = called.setdefault(word, value)
            if other != value:
                raise UserError(
                    f"{templates}: {other!r} and {value!r} of {attribute.name} are both called "
                    f"{word!r}; call them differently, or make them one value in the table."
                )
    return Grammar(attributes, tuple(given.get("joints", JOINTS)))


def _attribute(name: str, values: Sequence[str], own: Mapping[str, Any]) -> Attribute:
    common = _COMMON.get("".join(re.findall(r"[^\W_]+", name)).lower())
    renamed: Mapping[str, str] = own.get("words", {})
    # Words of people for a value may be another value: "Multi" beside "Multicolour".
    words_of_people = common.words if common else lambda value: {}
    called = collections.Counter(words_of_people(x).get("word", x.lower()) for x in values)

    def words(value: str) -> _Forms:
        word = renamed.get(value, value).lower()
        one, many = known.article_words(word if value in renamed else value)
        forms = {"word": word, "a": with_article(word), "one": one, "many": many}
        if common in (known.GENDER, known.USAGE):
            forms |= {"whom": word, "adjective": word, "noun": word}
        usual = words_of_people(value)
        if value not in renamed and called[usual.get("word", word)] < 2:
            forms |= usual
        return _Forms(forms)

    noun = own.get("noun", common.noun if common else _spoken(name))
    new, both = own.get("new"), own.get("new_and_old")
    if new is None:
        new = common.new if common else _NEW
    if both is None:
        # A user's own templates are not mixed with others.
        both = () if "new" in own else common.new_and_old if common else _NEW_AND_OLD
    return Attribute(name, name, noun.lower(), _lower(new), _lower(both), words)


def _lower(templates: Sequence[str]) -> tuple[str, ...]:
    """Templates whose words are in lower case, as are the names of their fields."""
    return tuple(template.lower() for template in templates)


def _spoken(name: str) -> str:
    """The name of a column in words: "heelHeight" and "heel_height" are "heel height"."""
    parts = re.findall(r"[^\W_]+", re.sub(r"(?<=[^\W\d_A-Z])(?=[A-Z])", " ", name))
    return " ".join(parts).lower()


# --- Templates of a user --------------------------------------------------------------------------


def _read_templates(path: str | os.PathLike[str], names: Sequence[str]) -> dict[str, Any]:
    file = whole_path(path)
    try:
        content = tomllib.loads(read_text(file))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{file} is not TOML ({error}); mend it.") from error
    for name, own in content.items():
        if name == "joints":
            _check_texts(file, name, own)
            if not all(joint.count("{}") == 2 for joint in own):
                raise UserError(f"{file}: each of joints must hold {{}} twice, as '{{}} and {{}}'.")
        elif name not in names:
            raise UserError(
                f"{file}: [{name}] is none of the attributes, which are {', '.join(names)}; name "
                "one of them."
            )
        else:
            _check_attribute(file, name, own)
    return content


def _check_attribute(file: object, name: str, own: object) -> None:
    known_keys = ("noun", "new", "new_and_old", "words")
    if not isinstance(own, dict) or not set(own) <= set(known_keys):
        raise UserError(f"{file}: [{name}] may hold {', '.join(known_keys)} and nothing else.")
    words = own.get("words", {})
    texts = [own.get("noun", "x"), *(words.values() if isinstance(words, dict) else [None])]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"{file}: noun and words of [{name}] must be texts, not empty ones.")
    for key in ("new", "new_and_old"):
        if key not in own:
            continue
        _check_texts(file, f"{key} of [{name}]", own[key], least=int(key == "new"))
        for template in own[key]:
            fields = _fields_of(template)
            value = {"new", "new[a]", "new[one]", "new[many]"}
            if fields is None or not fields <= _FIELDS or not fields & value:
                raise UserError(
                    f"{file}: {template!r} in {key} of [{name}] must hold {{new}} or one of its "
                    f"forms, and besides only {', '.join(sorted(_FIELDS))} in braces."
                )


def _is_text(x: object) -> bool:
    return isinstance(x, str) and bool(x)


def _check_texts(file: object, what: str, texts: object, least: int = 1) -> None:
    if not isinstance(texts, list) or len(texts) < least or not all(map(_is_text, texts)):
        raise UserError(f"{file}: {what} must be a list of texts, not {texts!r}.")


def _fields_of(template: str) -> set[str] | None:
    """What is in braces; None if that is not well formed."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError:
        return None
    if any(spec or conversion for _, field, spec, conversion in parts if field is not None):
        return None
    return {field for _, field, _, _ in parts if field is not None}


# --- The lexicon ----------------------------------------------------------------------------------


def make_lexicon(
    grammar: Grammar, values: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """Words by which texts of a grammar mention each attribute: what it and its values are called.

    Args:
      grammar: of the attributes.
      values: of each, by its name.
    """
    found = {}
    for attribute in grammar.attributes:
        entries: dict[str, None] = {}
        entries[" ".join(words_of(attribute.noun))] = None
        entries[" ".join(words_of(_spoken(attribute.name)))] = None
        for value in values[attribute.name]:
            for form in attribute.words(value).values():
                entries[" ".join(_without_article(words_of(form)))] = None
        found[attribute.name] = tuple(entry for entry in entries if entry)
    return found


def _without_article(words: Sequence[str]) -> Sequence[str]:
    """Words without "a" or "a pair of" before them, which belong to the text."""
    if list(words[:3]) == ["a", "pair", "of"]:
        return words[3:]
    return words[1:] if len(words) > 1 and words[0] in ("a", "an") else words


def lexicon_text(lexicon: Mapping[str, Sequence[str]]) -> str:
    """A lexicon as the file that `data.lexicon.load_lexicon` reads."""
    lines = ["# Words by which a text mentions an attribute, from the values of a table."]
    for name, entries in lexicon.items():
        lines += ["", f"[{name}]", *sorted(entries)]
    return "\n".join(lines) + "\n"


def add_entries(
    lexicon: Mapping[str, Sequence[str]], more: Mapping[str, Sequence[str] | frozenset[str]]
) -> dict[str, tuple[str, ...]]:
    """A lexicon with further entries of its attributes."""
    return {
        name: tuple(dict.fromkeys((*entries, *sorted(more.get(name, ())))))
        for name, entries in lexicon.items()
    }
