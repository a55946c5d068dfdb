"""The places where a command reads a file: its command line, its rule, and what it must give."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from tests.fuzz import rules
from tests.fuzz.rules import ABSENT, Rule, any_of, many, name, number, record, text, whole


@dataclasses.dataclass(frozen=True)
class Place:
    """A file that a command reads.

    Attributes:
      name: of the place, and of its folder in `corpus/`.
      kind: of input, for the table.
      arguments: the command; `{world}` stands for the good files.
      copies: what of the good files lies in the working directory; a folder `raw/cirr` as `cirr`.
      file: that is damaged, from the working directory.
      form: of the file: json, lines, safetensors, npz, parquet, photo or config.
      rule: what a damaged file must lead to.
      results: files that a command which accepts writes, and that must be those of the good file.
      stated: verdicts of damages by their names, in place of the rule's.
      trained: whether it needs the good run.
      names: whether the sentence must name the file.
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

    @property
    def command(self) -> str:
        """Its name."""
        return self.arguments[0]


def _score(config: str, raw: str, given: str, split: str = "val") -> tuple[str, ...]:
    """Scores ranked lists against annotation files."""
    return (
        *("evaluate", *f"--config={config}".split(), f"--raw_dir={raw}"),
        *(f"--predictions={given}", f"--split={split}", "--output=out"),
    )


def _annotations(
    dataset: str, file: str, form: str, rule: Rule, split: str = "val", config: str = ""
) -> Place:
    stem = Path(file).name.partition(".")[0] if dataset != "fashioniq" else Path(file).name[:5]
    return Place(
        name=f"{dataset}-{stem}",
        kind="annotations",
        arguments=_score(config or dataset, dataset, f"{dataset}.json", split),
        copies=(f"raw/{dataset}", f"given/{dataset}.json"),
        file=f"{dataset}/{file}",
        form=form,
        rule=rule,
        results=(f"out/predictions-{'validation' if split == 'val' else split}.json",),
    )


def _lists(value: object) -> bool:
    """Lists of ids without repetition, by query."""
    ids = isinstance(value, list) and all(type(x) in (str, int) for x in value)
    return ids and len({str(x) for x in value}) == len(value)


_CIRR = {
    **{"": many(any_of), "*": record, "*.reference": name, "*.caption": text},
    **{"*.pairid": whole, "*.target_hard": name, "*.target_soft": record},
    **{
        "*.target_soft.*": lambda value: value is ABSENT or number(value),
        "*.img_set": record,
        "*.img_set.members": many(text),
    },
    "*.img_set.members.*": text,
}
_CIRCO = {
    **{"": many(any_of), "*": record, "*.id": whole, "*.reference_img_id": whole},
    **{"*.relative_caption": text, "*.target_img_id": whole, "*.gt_img_ids": many(whole)},
    **{"*.gt_img_ids.*": whole, "*.semantic_aspects": many(text), "*.semantic_aspects.*": text},
}
_FASHIONIQ = {
    **{"": many(any_of), "*": record, "*.candidate": name, "*.target": name},
    **{"*.captions": many(text), "*.captions.*": text},
}
_SHOES = {
    **{"": many(any_of), "*": record, "*.ImageName": name, "*.ReferenceImageName": name},
    "*.RelativeCaption": name,
}
_LASCO = {
    **{"": many(any_of), "*": record, "*.qid": whole, "*.query-text": text},
    **{"*.query-image": many(any_of), "*.target-image": many(any_of)},
    **{"*.query-image.*": any_of, "*.target-image.*": any_of},
}
_LASCO_CONFIG = "shoes --config.data.dataset=lasco"
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


def _prediction(dataset: str, config: str = "") -> Place:
    lists = {"": record, "*": _lists, "*.*": lambda value: type(value) in (str, int)}
    place = _annotations(dataset, "x.json", "json", rules.of_json(lists), config=config)
    return dataclasses.replace(
        place, name=f"predictions-{dataset}", kind="predictions", file=f"{dataset}.json"
    )


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


def _trained() -> list[Place]:
    run = ("--config=shapes:smoke", "--config.data.prepared_dir={world}/prepared")
    search = ("search", "--index=index", "--model=export", "--image=000.png", "in red", "--k=3")
    evaluate = ("evaluate", *run, "--workdir=run", "--split=validation", "--output=out")
    export = ("export", "--workdir=run", "--output=out")
    described = ("index", "--model=export", "--images=photos", "--output=new", "--table=table.csv")
    more: dict[str, object] = {"trained": True, "names": False}
    return [
        Place("export-dqe", "exports", search, ("export", "index", "photos"), "export/dqe.json",
              "json", _loose, **more),
        Place("export-tokenizer", "tokenizers", search, ("export", "index", "photos"),
              "export/tokenizer.json", "json", _loose, **more),
        Place("export-weights", "weights", search, ("export", "index", "photos"),
              "export/dqe.safetensors", "safetensors", _anything, stated=_SAFETENSORS | _WHOLE,
              **more),
        Place("index-images", "indexes", search, ("export", "index", "photos"),
              "index/images.parquet", "parquet", _anything, stated=_WHOLE, **more),
        Place("table", "tables", described, ("export", "photos", "given/table.csv"), "table.csv",
              "lines", rules.lines, **more),
        Place("photo", "photos", described, ("export", "photos", "given/table.csv"),
              "photos/000.png", "photo", _anything, **more),
        Place("checkpoint-meta", "checkpoints", export, ("run",),
              "run/checkpoints/2/meta/metadata", "json", _anything, **more),
        Place("checkpoint-arrays", "checkpoints", export, ("run",),
              "run/checkpoints/2/params/manifest.ocdbt", "bytes", _anything, **more),
        Place("run-evaluated", "checkpoints", evaluate, ("run",),
              "run/checkpoints/2/_CHECKPOINT_METADATA", "json", _anything, **more),
        Place("compare-results", "results", ("compare", "a.queries.json", "run/eval/"
              "test-2.queries.json"), ("run", "run/eval/test-2.queries.json=a.queries.json"),
              "a.queries.json", "json", _loose, **more),
    ]  # fmt: skip


PLACES = (
    _annotations("cirr", "captions/cap.rc2.val.json", "json", rules.of_json(_CIRR)),
    _annotations("circo", "annotations/val.json", "json", rules.of_json(_CIRCO)),
    _annotations(
        "fashioniq", "captions/cap.dress.val.json", "json", rules.of_json(_FASHIONIQ), config="fiq"
    ),
    _annotations(
        "fashioniq",
        "image_splits/split.dress.val.json",
        "json",
        rules.of_json({"": many(name), "*": name}),
        config="fiq",
    ),
    _annotations("shoes", "relative_captions_shoes.json", "json", rules.of_json(_SHOES)),
    _annotations("shoes", "eval_im_names.txt", "lines", rules.lines),
    _annotations("lasco", "lasco_val.json", "json", rules.of_json(_LASCO), config=_LASCO_CONFIG),
    _annotations(
        "fashion200k",
        "test_queries.txt",
        "lines",
        rules.lines,
        "test",
        config="zero_shot:fashion200k",
    ),
    _annotations(
        "fashion200k",
        "dress_test_detect_all.txt",
        "lines",
        rules.lines,
        "test",
        config="zero_shot:fashion200k",
    ),
    _annotations("named", "triplets.jsonl", "lines", rules.lines, "test", config="triplets:tiny"),
    _prediction("cirr"),
    _prediction("circo"),
    _prediction("fashioniq", "fiq"),
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
    *_trained(),
)
