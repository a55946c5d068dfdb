"""What models are made of and make: weights, features, runs, exports, indexes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.fuzz import rules
from tests.fuzz.place import Place
from tests.fuzz.rules import Rule
from tests.fuzz.world import small_flags

_SAFETENSORS = dict.fromkeys(
    (f"tensors {x}" for x in ("length", "header json", "offsets", "huge")), "refused"
)
_NPZ = dict.fromkeys(
    (
        f"npz {x}"
        for x in ("pickled", "missing", "bomb array", "nan array", "encrypted", "wrong type")
    ),
    "refused",
) | {"npz shuffled": "same"}
_WHOLE = dict.fromkeys(("empty", "other"), "refused")


def _embeddings(form: str, reader: Callable[[Path], dict[str, object]]) -> Place:
    return Place(
        name=f"embeddings-{form}",
        kind="embeddings",
        arguments=(
            *("evaluate", "--config=triplets:tiny", "--raw_dir=named", "--split=test"),
            *(f"--embeddings=embeddings.{form}", "--output=out"),
        ),
        copies=("raw/named", f"given/embeddings.{form}"),
        file=f"embeddings.{form}",
        form=form,
        rule=rules.of_arrays(reader),
        results=("out/test-embeddings.ranked.json",),
        stated=_NPZ | _SAFETENSORS | _WHOLE,
    )


def _features(form: str, reader: Callable[[Path], dict[str, object]]) -> Place:
    return Place(
        name=f"features-{form}",
        kind="features",
        arguments=(
            *("features", "--config=shapes:smoke", f"--import_images=features.{form}"),
            *("--name=mine", "--config.features.directory=stores"),
        ),
        copies=(f"given/features.{form}",),
        file=f"features.{form}",
        form=form,
        rule=rules.of_arrays(reader),
        stated=_NPZ | _SAFETENSORS | _WHOLE | {"npz missing": "refused"},
    )


def _clip(file: str, form: str, rule: Rule, **more: object) -> Place:
    return Place(
        name=f"weights-{file.partition('.')[0]}",
        kind="weights",
        arguments=("convert", "--source=clip", "--output=out"),
        copies=("given/clip",),
        file=f"clip/{file}",
        form=form,
        rule=rule,
        **more,  # type: ignore[arg-type]
    )


def _loose(path: Path, good: Path) -> str:
    """What is not JSON is refused; no field is promised to be read."""
    try:
        held = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return rules.REFUSED
    if not isinstance(held, type(json.loads(good.read_text()))):
        return rules.REFUSED
    return rules.EITHER


def _anything(path: Path, good: Path) -> str:
    return rules.SAME if path.read_bytes() == good.read_bytes() else rules.EITHER


def _kept(path: Path, good: Path) -> str:
    """What a run has written of itself, and does without: whatever it holds, the run goes on."""
    del path, good
    return rules.SAME


def _flags() -> tuple[str, ...]:
    """Those of the good run, whose prepared data all cases share."""
    return tuple(small_flags("{world}/prepared"))


GIVEN = (
    _embeddings("npz", rules.npz),
    _embeddings("safetensors", rules.safetensors),
    _embeddings("parquet", rules.parquet),
    _features("npz", rules.npz),
    _features("safetensors", rules.safetensors),
    _features("parquet", rules.parquet),
    _clip("model.safetensors", "safetensors", _anything, stated=_SAFETENSORS | _WHOLE),
    _clip("config.json", "json", _loose, names=False),
    Place(
        name="config-file",
        kind="configs",
        arguments=("describe", "--config=mine.py"),
        copies=("given/mine.py",),
        file="mine.py",
        form="bytes",
        rule=_anything,
        stated={"empty": "refused"},
    ),
)


# --- A run ----------------------------------------------------------------------------------------


def _of_a_run(name: str, command: str, file: str, form: str, rule: Rule, **more: object) -> Place:
    """A file of a complete run that a command reads; an older checkpoint may take its place."""
    place = {
        "evaluate": ("evaluate", *_flags(), "--workdir=run", "--split=validation", "--output=out"),
        "watch": (
            *("evaluate", *_flags(), "--workdir=run", "--watch"),
            *("--output=out", "--poll_s=0.01", "--patience_s=0.5"),
        ),
        "export": ("export", "--workdir=run", "--output=out"),
        "push": ("push", "run", "--repo=nobody/nothing"),
        "report": (
            *("evaluate", *_flags(), "--workdir=run", "--split=test"),
            *("--output=out", "--report_against=other"),
        ),
        "compare": ("compare", "a=a.queries.json", "b=run/eval/test-2.queries.json"),
    }[command]
    copies = {
        "report": ("run", "run/eval=other"),
        "compare": ("run", "run/eval/test-2.queries.json=a.queries.json"),
    }.get(command, ("run",))
    kind = str(more.pop("kind", "checkpoints"))
    return Place(
        name, kind, place, copies, file, form, rule, trained=True, names=False,
        most=6 if command in ("evaluate", "watch", "report") else 16,
        may_change=("run/watch-",), spares=kind == "checkpoints", **more,  # type: ignore[arg-type]
    )  # fmt: skip


def _of_training(name: str, kind: str, file: str, form: str, rule: Rule, **more: object) -> Place:
    """A file that a run reads which goes on after its first step; its results must be the same."""
    arguments = ("train", *_flags(), "--workdir=stopped")
    copies: tuple[str, ...] = ("stopped",)
    if name == "train-feedback":
        arguments, copies = (*arguments, "--feedback=clicks.jsonl"), ("given/clicks.jsonl",)
    return Place(
        name, kind, arguments, copies, file, form, rule, trained=True,
        most=5, may_change=("stopped/",), results=("stopped/eval/test-2.ranked.json",), **more,  # type: ignore[arg-type]
    )  # fmt: skip


def _clicks(path: Path, good: Path) -> str:
    """A log of clicks: lines that are not whole are skipped; without any, there is no log."""

    def sound(data: bytes) -> list[object]:
        found = []
        for line in data.split(b"\n"):
            try:
                held = json.loads(line.decode())
            except (ValueError, RecursionError):
                continue
            if isinstance(held, dict):
                found.append(held)
        return found

    held = sound(path.read_bytes())
    if not held:
        return rules.REFUSED
    return rules.SAME if held == sound(good.read_bytes()) else rules.EITHER


RUN = (
    _of_a_run("run-evaluated", "evaluate", "run/checkpoints/2/_CHECKPOINT_METADATA", "json",
              _anything),
    _of_a_run("run-watched", "watch", "run/config.json", "json", _anything, kind="configs"),
    _of_a_run("run-watched-meta", "watch", "run/checkpoints/2/meta/metadata", "json", _anything),
    _of_a_run("checkpoint-meta", "export", "run/checkpoints/2/meta/metadata", "json", _anything),
    _of_a_run("checkpoint-arrays", "export", "run/checkpoints/2/params/manifest.ocdbt", "bytes",
              _anything),
    _of_a_run("run-pushed-meta", "push", "run/checkpoints/2/meta/metadata", "json", _anything,
              good_words="the hub"),
    _of_a_run("run-pushed-results", "push", "run/eval/test-2.json", "json", _anything,
              kind="results", good_words="the hub"),
    _of_a_run("run-reported", "report", "other/test-2.ranked.json", "json", _loose, kind="results"),
    _of_a_run("compare-results", "compare", "a.queries.json", "json", _loose, kind="results"),
    _of_training("train-metrics", "logs", "stopped/metrics.jsonl", "lines", _kept,
                 stated={"gone": "same"}, spares=True),
    _of_training("train-timing", "logs", "stopped/timing.jsonl", "lines", _kept,
                 stated={"gone": "same"}, spares=True),
    _of_training("train-config", "configs", "stopped/config.json", "json", _loose),
    _of_training("train-meta", "checkpoints", "stopped/checkpoints/1/meta/metadata", "json",
                 _anything, names=False, spares=True),
    _of_training("train-feedback", "logs", "clicks.jsonl", "lines", _clicks,
                 stated=dict.fromkeys(("empty", "other"), "refused")),
)  # fmt: skip


# --- An export and an index -----------------------------------------------------------------------


def _of_an_index(name: str, command: str, kind: str, file: str, form: str, rule: Rule,
                 **more: object) -> Place:  # fmt: skip
    arguments = {
        "search": ("search", "--index=index", "--model=export", "--image=000.png", "in red",
                   "--k=3"),
        "again": ("index", "--model=export", "--images=photos", "--output=index"),
        "index": ("index", "--model=export", "--images=photos", "--output=new",
                  "--table=table.csv"),
        "serve": ("serve", "--index=index", "--model=export", "--host=203.0.113.1",
                  "--token=" + "a" * 20),
        "push": ("push", "export", "--repo=nobody/nothing"),
    }[command]  # fmt: skip
    words = {"serve": "cannot listen on", "push": "the hub"}.get(command, "")
    copies = {
        "index": ("export", "photos", "given/table.csv"),
        "push": ("export",),
    }.get(command, ("export", "index", "photos"))
    return Place(
        name, kind, arguments, copies, file, form, rule, trained=True, names=False,
        good_words=words, most=16, may_change=("index/",), **more,  # type: ignore[arg-type]
    )  # fmt: skip


_TENSORS: dict[str, object] = {"stated": _SAFETENSORS | _WHOLE}
INDEX = (
    _of_an_index("export-dqe", "search", "exports", "export/dqe.json", "json", _loose),
    _of_an_index("export-tokenizer", "search", "tokenizers", "export/tokenizer.json", "json",
                 _loose),
    _of_an_index("export-weights", "search", "weights", "export/dqe.safetensors", "safetensors",
                 _anything, **_TENSORS),
    _of_an_index("index-images", "search", "indexes", "index/images.parquet", "parquet", _anything,
                 stated=_WHOLE),
    _of_an_index("index-facts", "search", "indexes", "index/index.json", "json", _loose),
    _of_an_index("index-shard", "search", "indexes", "index/shard-000000/shard.json", "json",
                 _anything),
    _of_an_index("index-keys", "search", "indexes", "index/shard-000000/keys.npy", "bytes",
                 _anything),
    _of_an_index("index-rows", "search", "indexes", "index/shard-000000/embeddings.npy", "bytes",
                 _anything),
    _of_an_index("index-again", "again", "indexes", "index/images.parquet", "parquet", _anything,
                 spares=True),
    _of_an_index("index-again-rows", "again", "indexes", "index/shard-000000/embeddings.npy",
                 "bytes", _anything, spares=True),
    _of_an_index("table", "index", "tables", "table.csv", "lines", rules.lines),
    _of_an_index("photo", "index", "photos", "photos/000.png", "photo", _anything),
    _of_an_index("serve-index", "serve", "indexes", "index/index.json", "json", _loose),
    _of_an_index("serve-images", "serve", "indexes", "index/images.parquet", "parquet", _anything,
                 stated=_WHOLE),
    _of_an_index("serve-export", "serve", "exports", "export/dqe.json", "json", _loose),
    _of_an_index("push-dqe", "push", "exports", "export/dqe.json", "json", _loose),
    _of_an_index("push-tokenizer", "push", "tokenizers", "export/tokenizer.json", "json", _loose),
    _of_an_index("push-weights", "push", "weights", "export/dqe.safetensors", "safetensors",
                 _anything, **_TENSORS),
)  # fmt: skip
MODELS = (*GIVEN, *RUN, *INDEX)
