"""Puts a model on the Hugging Face hub: the files of its export, and a card."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from absl import logging
from etils import epath

from dqe_jax.checkpoints import exported, hub, store
from dqe_jax.checkpoints.card import public_name, result_lines, write_card
from dqe_jax.checkpoints.export import export_run
from dqe_jax.config import RunConfig
from dqe_jax.utils.errors import UserError, reason_of
from dqe_jax.utils.files import JsonObject, is_regular, read_json
from dqe_jax.utils.paths import is_remote, whole_path

# Fields of a config that say where things lie on one machine: nobody else needs to know.
PLACES = ("data.data_dir", "data.prepared_dir", "features.directory", "init.run", "data.lexicon")
_RESULT = re.compile(r"(train|validation|test|whole)-(\d+)\.json")


def push(
    run: str | os.PathLike[str],
    repo: str,
    *,
    step: int | None = None,
    public: bool = False,
    license_id: str = "",
    revision: str | None = None,
) -> str:
    """Puts a model on the hub, where `dqe_jax.load("hf://OWNER/NAME")` finds it.

    Args:
      run: a workdir, which is exported first, or a directory that `dqe-jax export` wrote.
      repo: `OWNER/NAME`, which is made if it is not there.
      step: of the checkpoint of a workdir; None for the newest.
      public: whether a new repository is for all to see.
      license_id: of the model, as the hub names it, such as "apache-2.0".
      revision: a branch; None for the main one.

    Returns:
      The commit there.

    Raises:
      UserError: there is no model, or the hub refuses it.
    """
    hub.check_repo(repo, "--repo")
    hub.check_token()
    directory = whole_path(run)
    if is_remote(directory) and exported.is_exported(directory):
        raise UserError(f"{directory} is an export in a bucket: copy it to this machine first.")
    results: list[JsonObject] = []
    data: dict[str, str] | None = None
    with tempfile.TemporaryDirectory() as made:
        held = Path(directory)
        if not exported.is_exported(directory):
            held = export_run(directory, Path(made) / "export", step=step)
            manager = store.open_for_reading(directory)
            step, meta = store.read_chosen(manager, step, lambda n: store.read_meta(manager, n))
            data = meta.get("data")
            results = results_of(directory, step)
        elif step is not None:
            raise UserError(f"{directory} is an exported model, which has no steps: give none.")
        facts = read_json(epath.Path(held / exported.FACTS), dict, exported.AGAIN)
        # These raise now what a reader would find later.
        exported.words_of(epath.Path(held), exported.read(epath.Path(held)))
        config = exported.config_of(facts["config"])
        card = write_card(repo, config, facts, results, license_id=license_id, data=data)
        files: dict[str, Path | bytes] = {hub.CARD: card.encode()}
        for name in hub.FILES:
            if (held / name).exists() and is_regular(held / name):
                files[name] = held / name
        files[exported.FACTS] = _without_places(facts)
        commit = hub.upload(
            files,
            repo,
            message=f"Step {facts['step']} of a run of dqe_jax",
            public=public,
            revision=revision,
        )
    logging.info(
        "%d files are on the hub, commit %s. Load the model by dqe_jax.load(%r).",
        *(len(files), commit[:8], f"{hub.SCHEME}{repo}" + (f"@{revision}" if revision else "")),
    )
    return commit


def _without_places(facts: JsonObject) -> bytes:
    """`dqe.json` of an export, with the defaults for what is of one machine alone."""
    config: dict[str, Any] = json.loads(json.dumps(facts["config"]))
    defaults = RunConfig().to_dict()
    for name in PLACES:
        *sections, last = name.split(".")
        own, default = config, defaults
        for section in sections:
            own, default = own.get(section, {}), default[section]
        if last in own:
            own[last] = default[last]
    for name in ("weights", "tokenizer"):
        config["model"][name] = public_name(config["model"][name])
    return (json.dumps({**facts, "config": config}, indent=2) + "\n").encode()


def results_of(workdir: epath.Path, step: int) -> list[JsonObject]:
    """What evaluations of a step say, those on the data of the run first.

    Raises:
      UserError: a file is damaged.
    """
    found = []
    for place in sorted(workdir.glob("eval*")):
        for path in sorted(place.glob("*.json")):
            match = _RESULT.fullmatch(path.name)
            if match and int(match[2]) == step:
                one = read_json(path, dict, "evaluate the run again")
                try:
                    result_lines(one)
                except (LookupError, TypeError, ValueError, AttributeError) as error:
                    raise UserError(
                        f"{path} is damaged ({reason_of(error)}): evaluate the run again."
                    ) from error
                found.append(one)
    return found
