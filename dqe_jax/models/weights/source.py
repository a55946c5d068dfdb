"""Where tensors come from: a safetensors file, sharded or not, a directory of them, or a hub id."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterator

import ml_dtypes  # noqa: F401  NumPy knows bfloat16 once it is imported
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from dqe_jax.utils.errors import UserError, reason_of
from dqe_jax.utils.files import JsonObject, is_regular, read_json
from dqe_jax.utils.paths import is_remote

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Of an exported DINO: the directory of its text tower.
TEXT = "text"
PROCESSOR = "preprocessor_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FLOATS = ("F16", "BF16", "F32", "F64")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclasses.dataclass(frozen=True)
class Source:
    """Tensors by name.

    Attributes:
      origin: what the user named.
      files: the file that holds each tensor.
      config: the model's `config.json`; empty if there is none.
      directory: where the files lie.
      processor: the `preprocessor_config.json` beside it; empty if there is none.
    """

    origin: str
    files: dict[str, pathlib.Path]
    config: JsonObject
    directory: pathlib.Path
    processor: JsonObject = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Callable[[str], np.ndarray]]:
        """Gives a function that reads a tensor as float32; files stay open in the block.

        The function raises a `UserError` if a file is damaged, or a tensor is not of floating
        point.
        """
        with contextlib.ExitStack() as stack:
            handles: dict[pathlib.Path, safe_open] = {}

            def read(name: str) -> np.ndarray:
                file = self.files[name]
                try:
                    if file not in handles:
                        handles[file] = stack.enter_context(safe_open(file, framework="np"))
                    _check_float(handles[file], name, file)
                    return handles[file].get_tensor(name).astype(np.float32)
                except (SafetensorError, OSError) as error:
                    raise UserError(f"{file} cannot be read ({error}); get it again.") from error

            yield read


def _check_float(opened: safe_open, name: str, file: pathlib.Path) -> None:
    dtype = opened.get_slice(name).get_dtype()
    if dtype not in FLOATS:
        raise UserError(
            f"tensor {name} of {file} is of type {dtype}: weights are {', '.join(FLOATS)}; "
            "convert quantised weights first."
        )


def open_source(origin: str) -> Source:
    """Finds the tensors that a user names.

    Args:
      origin: a safetensors file, an index of shards, a directory with either (as Hugging Face
        models are stored), or an id on its hub, such as `openai/clip-vit-large-patch14`.

    Raises:
      UserError: there is nothing of the kind, or it cannot be read.
    """
    if is_remote(origin):
        raise UserError(
            f"weights {origin!r}: there are no converted weights in this directory, and others are "
            "read from a disk alone; copy them to this machine, or see dqe-jax convert."
        )
    path = pathlib.Path(origin).expanduser()
    if not path.exists():
        if _HUB_ID.fullmatch(origin):
            path = _from_hub(origin)
        else:
            raise UserError(
                f"weights {origin!r}: there is no such file or directory, and it is not the id of "
                "a model on the hub."
            )
    if path.is_dir():
        found = [path / name for name in (INDEX, SINGLE) if (path / name).exists()]
        found = found or sorted(path.glob("*.safetensors"))
        if not found:
            pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
            raise UserError(_no_pickle(path / pickles[0]) if pickles else _nothing_in(path))
        if len(found) > 1 and found[0].name != INDEX:
            raise UserError(
                f"weights {path}: there is no {INDEX}, and more than one safetensors file; name "
                "one of them."
            )
        path = found[0]
    if path.suffix in PICKLES:
        raise UserError(_no_pickle(path))
    files = _files_of_index(path) if path.name.endswith(".json") else _names_in(path)
    config, processor = (
        read_json(epath.Path(file), dict) if file.exists() else {}
        for file in (path.parent / "config.json", path.parent / PROCESSOR)
    )
    return Source(origin, files, config, path.parent, processor)


def _no_pickle(path: pathlib.Path) -> str:
    return (
        f"weights {path}: pickled files can run code and are never read; save the model again as "
        "safetensors (`save_pretrained` of transformers does)."
    )


def _nothing_in(path: pathlib.Path) -> str:
    return f"weights {path}: there is neither {SINGLE} nor {INDEX} in this directory."


def _names_in(path: pathlib.Path) -> dict[str, pathlib.Path]:
    try:
        if not is_regular(path):
            raise OSError("it is no regular file")
        with safe_open(path, framework="np") as opened:
            return dict.fromkeys(opened.keys(), path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no safetensors file ({error}); get it again.") from error


def _files_of_index(path: pathlib.Path) -> dict[str, pathlib.Path]:
    index = read_json(epath.Path(path), dict).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise UserError(f"{path} has no weight_map: it is not an index of safetensors shards.")
    files: dict[str, pathlib.Path] = {}
    for shard in sorted(set(index.values())):
        file = path.parent / shard
        if not file.exists():
            raise UserError(f"{path} names the shard {shard}, which is missing; get it again.")
        inside = _names_in(file)
        expected = {name for name, holder in index.items() if holder == shard}
        if expected - set(inside):
            raise UserError(
                f"{file} lacks {sorted(expected - set(inside))[0]}, which {path.name} says it "
                "holds; get both again."
            )
        files |= {name: file for name in expected}
    return files


def _from_hub(model_id: str) -> pathlib.Path:
    """Downloads a model's safetensors and small files to the hub's cache."""
    import huggingface_hub  # only here: everything else works without it

    try:
        directory = pathlib.Path(
            huggingface_hub.snapshot_download(
                model_id, allow_patterns=["*.safetensors", "*.json", "*.txt"]
            )
        )
    except Exception as error:
        raise UserError(
            f"weights {model_id!r} are neither a local path nor could they be got from the hub "
            f"({reason_of(error)}); without a network, copy the model here and name its directory."
        ) from error
    if not any(directory.glob("*.safetensors")):
        raise UserError(
            f"weights {model_id!r}: this model has no safetensors on the hub, and pickled files "
            "are never read; save it as safetensors and name the directory."
        )
    return directory
