"""What a config takes from a directory of `dqe-jax triplets`: its attributes and their words."""

from __future__ import annotations

import os

from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import JsonObject, read_json
from dqe_jax.utils.paths import whole_path

FACTS, LEXICON = "made.json", "lexicon.txt"


def read_facts(directory: str | os.PathLike[str]) -> JsonObject | None:
    """What `made.json` of a directory says; None if there is none.

    Raises:
      UserError: it is damaged.
    """
    path = whole_path(directory) / FACTS
    if not path.exists():
        return None
    facts = read_json(path, dict, "run dqe-jax triplets again with --overwrite")
    names = facts.get("attributes")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is damaged; run dqe-jax triplets again with --overwrite.")
    return facts


def made_fields(directory: str | os.PathLike[str]) -> dict[str, object]:
    """Fields of a config that go with made triplets, by their dotted names.

    Args:
      directory: of prepared data.

    Returns:
      Nothing for a directory that `dqe-jax triplets` has not made, or without attributes.

    Raises:
      UserError: `made.json` is damaged.
    """
    facts = read_facts(directory)
    if facts is None or not facts["attributes"]:
        return {}
    return {
        "model.attributes.names": tuple(facts["attributes"]),
        "data.lexicon": os.fspath(whole_path(directory) / LEXICON),
    }
