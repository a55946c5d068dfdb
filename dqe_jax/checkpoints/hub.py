"""Models on the Hugging Face hub: got by `hf://OWNER/NAME`, and put there.

Only the files of an export travel (`FILES`): safetensors, JSON, and the card in Markdown. Nothing
else of a repository is got, and nothing is ever unpickled. `HF_ENDPOINT` names another hub than the
public one, `HF_TOKEN` who asks.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from etils import epath

from dqe_jax.checkpoints.names import FACTS, OWN, TOKENIZER
from dqe_jax.models.weights.source import SINGLE
from dqe_jax.utils.errors import UserError, reason_of

SCHEME, CARD = "hf://", "README.md"
# What is loaded of an export; `config.json` is there for `transformers`.
FILES = (FACTS, OWN, TOKENIZER, SINGLE, "config.json")
_REPO = re.compile(r"[\w.-]+/[\w.-]+")


def is_on_hub(path: str | os.PathLike[str]) -> bool:
    """Whether a path means a model on the hub."""
    return os.fspath(path).startswith((SCHEME, "hf:/"))  # pathlib drops a slash


def check_repo(repo: str, told: str) -> str:
    """The name of a repository.

    Raises:
      UserError: it is none; the text calls it `told`.
    """
    if not _REPO.fullmatch(repo) or ".." in repo:
        raise UserError(f"{told} is {repo!r}: it must be OWNER/NAME.")
    return repo


def parse(path: str | os.PathLike[str]) -> tuple[str, str | None]:
    """The repository and the revision, None for the newest, of `hf://OWNER/NAME[@REVISION]`.

    Raises:
      UserError: it is not of this form.
    """
    text = os.fspath(path)
    name, at, revision = text.partition(":")[2].lstrip("/").partition("@")
    if at and not revision:
        raise UserError(f"{text} names no revision behind the @: it must be hf://OWNER/NAME@REV.")
    return check_repo(name, text), revision or None


def fetch(path: str | os.PathLike[str]) -> epath.Path:
    """Gets an exported model to the hub's cache; what is there already is not got again.

    Args:
      path: `hf://OWNER/NAME`, or with `@` and a branch, a tag or a commit.

    Returns:
      Its directory.

    Raises:
      UserError: there is none, it may not be read, or the hub cannot be reached.
    """
    repo, revision = parse(path)
    import huggingface_hub  # slow

    with _told(repo, revision):
        directory = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=list(FILES), endpoint=_endpoint()
        )
    found = epath.Path(directory)
    if not (found / FACTS).exists():
        raise UserError(
            f"{SCHEME}{repo} is no model of dqe_jax, for it has no {FACTS}: name one that "
            "dqe-jax push has written."
        )
    return found


def check_token() -> None:
    """Raises a `UserError` if nobody is logged in to the hub."""
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise UserError(
            "dqe-jax push needs a token of the hub that may write: set HF_TOKEN, or run "
            "`hf auth login`."
        )


def upload(
    files: Mapping[str, Path | bytes],
    repo: str,
    *,
    message: str,
    public: bool = False,
    revision: str | None = None,
) -> str:
    """Puts files in a repository, in one commit; it is made if it is not there.

    Args:
      files: by their names there.
      repo: `OWNER/NAME`.
      message: of the commit.
      public: whether a new repository is for all to see.
      revision: a branch, which is made if it is not there; None for the main one.

    Returns:
      The commit, 40 hexadecimal digits.

    Raises:
      UserError: the hub refuses it, or cannot be reached.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi(endpoint=_endpoint())
    with _told(repo, None):
        if not api.repo_exists(repo):
            api.create_repo(repo, private=not public)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.create_commit(
            repo,
            [
                huggingface_hub.CommitOperationAdd(name, os.fspath(x) if isinstance(x, Path) else x)
                for name, x in files.items()
            ],
            commit_message=message,
            revision=revision,
        )
    return str(done.oid)


def _endpoint() -> str | None:
    """The hub that the environment names; None for the public one."""
    return os.environ.get("HF_ENDPOINT") or None


@contextlib.contextmanager
def _told(repo: str, revision: str | None) -> Iterator[None]:
    """Raises a `UserError` for what goes wrong between here and the hub."""
    from huggingface_hub import utils as errors

    name = f"{SCHEME}{repo}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name} is gated: ask for access on its page, and set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{name} has no revision {revision!r}: name one of its page.") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{name} is not on the hub, or is private and your token may not read it: check the "
            "name, and set HF_TOKEN."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{name}: the hub cannot be reached, and no copy is here ({reason_of(error)}): look at "
            "the network and HF_ENDPOINT."
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise UserError(
                f"{name}: the hub refuses your token ({status}): set HF_TOKEN to one that may "
                "write there."
            ) from error
        raise UserError(
            f"{name}: the hub answers with an error ({reason_of(error)}): try again later."
        ) from error
    except Exception as error:  # its client raises errors of several libraries
        raise UserError(
            f"{name}: the exchange with the hub failed ({reason_of(error)}): look at the network, "
            "HF_ENDPOINT and the space on this disk."
        ) from error
