"""Annotation files of the benchmarks and files of ranked lists: `dqe-jax evaluate` reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from tests.fuzz import rules
from tests.fuzz.place import Place
from tests.fuzz.rules import ABSENT, Rule, any_of, many, name, number, record, text, whole


def _score(config: str, raw: str, given: str, split: str = "val") -> tuple[str, ...]:
    """Scores ranked lists against annotation files."""
    return (
        *("evaluate", *f"--config={config}".split(), f"--raw_dir={raw}"),
        *(f"--predictions={given}", f"--split={split}", "--output=out"),
    )


def _annotations(
    dataset: str, file: str, form: str, rule: Rule, split: str = "val", config: str = ""
) -> Place:
    """A file that says what queries ask: bad records are left out, and a list that still answers
    them is refused."""
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
_GENECIS = {
    **{"": many(any_of), "*": record, "*.condition": name, "*.reference": record},
    **{"*.target": record, "*.gallery": many(any_of), "*.gallery.*": record},
}
_REGION = {
    f"*.{one}.{field}": kind
    for one in ("reference", "target", "gallery.*")
    for field, kind in (("image_id", name), ("instance_bbox", many(number)))
} | {f"*.{one}.instance_bbox.*": number for one in ("reference", "target", "gallery.*")}
_PHOTO = {f"*.{one}.val_image_id": whole for one in ("reference", "target", "gallery.*")}
_CIRCLED = {
    **{"": many(any_of), "*": record, "*.session_id": name, "*.ground_truth_ids": many(any_of)},
    **{"*.ground_truth_ids.*": any_of, "*.turns": many(any_of), "*.turns.*": record},
    **{"*.turns.*.turn": whole, "*.turns.*.relative_caption": name},
    "*.turns.*.reference_image_id": any_of,
}
_LISTS_OF_JUDGES = ("ref_img_paths", "targ_img_paths", "sentences", "preferred set")
_JUDGED = {
    **{"": record, "*": record, "*.*": record},
    **{f"*.*.{one}": many(text) for one in _LISTS_OF_JUDGES},
    **{f"*.*.{one}.*": text for one in _LISTS_OF_JUDGES},
    **{f"*.*.retrieved_set{i}": many(record) for i in (1, 2)},
    **{f"*.*.retrieved_set{i}.*": record for i in (1, 2)},
    **{f"*.*.retrieved_set{i}.*.img_path": many(text) for i in (1, 2)},
    **{f"*.*.retrieved_set{i}.*.img_path.*": text for i in (1, 2)},
    **{f"*.*.retrieved_set{i}.*.user_score": text for i in (1, 2)},
}
_SCORES = {"": record, "*": many(many(number)), "*.*": many(number), "*.*.*": number}


def _prediction(dataset: str, config: str = "") -> Place:
    lists = {"": record, "*": _lists, "*.*": lambda value: type(value) in (str, int)}
    place = _annotations(dataset, "x.json", "json", rules.of_json(lists), config=config)
    return dataclasses.replace(
        place, name=f"predictions-{dataset}", kind="predictions", file=f"{dataset}.json"
    )


def _judgements(file: str, read: dict[str, Callable[[object], bool]]) -> Place:
    return Place(
        name=f"hp_fashioniq-{file.partition('.')[0]}",
        kind="annotations" if file == "hpfiq.json" else "predictions",
        arguments=(
            *("evaluate", "--config=fiq", "--split=val", "--predictions=scores.json"),
            *("--hp_fashioniq=hpfiq.json", "--output=out"),
        ),
        copies=("raw/hp_fashioniq/hpfiq.json", "given/scores.json"),
        file=file,
        form="json",
        rule=rules.of_json(read),
        results=("out/hp_fashioniq-scores.json",),
    )


def _tested(dataset: str, file: str, form: str, rule: Rule) -> Place:
    """A file of a benchmark that has a test split alone."""
    config = "zero_shot" + f":{dataset}" * (dataset != "genecis")
    return _annotations(dataset, file, form, rule, "test", config)


ANNOTATIONS = (
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
    _annotations("shoes", "train_im_names.txt", "lines", rules.lines),
    _annotations("lasco", "lasco_val.json", "json", rules.of_json(_LASCO), config=_LASCO_CONFIG),
    _tested("fashion200k", "test_queries.txt", "lines", rules.lines),
    _tested("fashion200k", "dress_test_detect_all.txt", "lines", rules.lines),
    _annotations("named", "triplets.jsonl", "lines", rules.lines, "test", config="triplets:tiny"),
    _tested("genecis", "genecis/focus_attribute.json", "json", rules.of_json(_GENECIS | _REGION)),
    _tested("genecis", "genecis/change_object.json", "json", rules.of_json(_GENECIS | _PHOTO)),
    _tested("pinpoint", "pinpoint_licensed.parquet", "parquet", rules.of_arrays(rules.parquet)),
    _tested("pinpoint", "index_signatures.txt", "lines", rules.lines),
    _tested("imagenet_r", "imgnet_targets.txt", "lines", rules.lines),
    _tested("pic2word", "imgnet_real_query.txt", "lines", rules.lines),
    _tested("nico", "nico/query_files.csv", "lines", rules.lines),
    _tested("nico", "nico/database_files.csv", "lines", rules.lines),
    _tested("icir", "icir/query_files.csv", "lines", rules.lines),
    _tested("icir", "icir/database_files.csv", "lines", rules.lines),
    _tested("edir", "corpus.jsonl", "lines", rules.lines),
    _tested("edir", "queries.jsonl", "lines", rules.lines),
    _tested("edir", "instances.jsonl", "lines", rules.lines),
    _tested("circled", "data/cirr_val.json", "json", rules.of_json(_CIRCLED)),
    _tested("circled", "split.dress.val.json", "json", rules.of_json({"": many(name), "*": name})),
    _judgements("hpfiq.json", _JUDGED),
    _judgements("scores.json", _SCORES),
    _prediction("cirr"),
    _prediction("circo"),
    _prediction("fashioniq", "fiq"),
)
