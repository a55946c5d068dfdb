"""Readers of annotations on files that Hypothesis draws: a `UserError`, or sound queries."""

import copy
import json

import hypothesis.strategies as st
import pytest
from hypothesis import given

from dqe_jax.data import feedback
from dqe_jax.data.annotations import hp_fashioniq
from dqe_jax.evaluation.asked import read_labels
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.metric_log import read_line
from tests.fuzz import world
from tests.fuzz.damage import paths_of

SCALARS = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    st.sampled_from((10**400, -(10**400), 2**63, "\ud800", "\0", "../x", "None")),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
JSON_FILES = {
    "cirr": ("cirr/captions/cap.rc2.val.json", "val"),
    "circo": ("circo/annotations/val.json", "val"),
    "fashioniq": ("fashioniq/captions/cap.dress.val.json", "val"),
    "fashioniq's images": ("fashioniq/image_splits/split.dress.val.json", "val"),
    "shoes": ("shoes/relative_captions_shoes.json", "val"),
    "lasco": ("lasco/lasco_val.json", "val"),
    "genecis": ("genecis/genecis/focus_attribute.json", "test"),
    "genecis' photos": ("genecis/genecis/change_object.json", "test"),
    "circled": ("circled/data/circo_val.json", "test"),
    "circled's images": ("circled/split.rc2.val.json", "test"),
}
LINES = {
    "shoes": ("shoes/eval_im_names.txt", "val"),
    "fashion200k": ("fashion200k/test_queries.txt", "test"),
    "fashion200k's images": ("fashion200k/dress_test_detect_all.txt", "test"),
    "pic2word": ("pic2word/imgnet_real_query.txt", "test"),
    "imagenet_r": ("imagenet_r/imgnet_targets.txt", "test"),
    "nico": ("nico/nico/database_files.csv", "test"),
    "icir": ("icir/icir/database_files.csv", "test"),
    "edir": ("edir/corpus.jsonl", "test"),
    "edir's instances": ("edir/instances.jsonl", "test"),
    "triplets": ("named/triplets.jsonl", "test"),
    "triplets' table": ("triplets/triplets.csv", "val"),
}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """The annotation files of all benchmarks."""
    root = tmp_path_factory.mktemp("annotations")
    world.raw_files(root, photos=False)
    return root


def said_of(read, *arguments):
    """What a reader refuses a file with, or "" and what it reads."""
    try:
        return "", read(*arguments)
    except UserError as error:
        return str(error), None


def reads(raw, file, split):
    """Reads a file that was changed: nothing but a `UserError` may come of it."""
    dataset = file.partition("/")[0]
    said, labels = said_of(
        read_labels, "triplets" if dataset == "named" else dataset, split, raw / dataset
    )
    if said:
        assert str(raw / dataset) in said
        return
    queries, rows = labels.queries, len(labels.gallery)
    assert len(set(queries.ids)) == len(queries.ids) > 0
    assert all(isinstance(text, str) for text in (*queries.ids, *queries.texts))
    assert all(0 <= row < rows for row in queries.reference.tolist())
    json.dumps([queries.ids, queries.texts, labels.gallery.ids]).encode()


def changed(content, data):
    """A JSON tree with another value at a place of any depth, or without it."""
    tree = [copy.deepcopy(content)]
    path = data.draw(st.sampled_from(list(paths_of(content))))
    holder, key = tree, 0
    for step in path:
        holder, key = holder[key], step
    if path and data.draw(st.integers(0, 4)) == 0:
        del holder[key]
    else:
        holder[key] = data.draw(VALUES)
    return tree[0]


@pytest.mark.parametrize("name", JSON_FILES)
@given(data=st.data())
def test_any_value_at_any_place(raw, name, data):
    file, split = JSON_FILES[name]
    good = (raw / file).read_text()
    try:
        (raw / file).write_text(json.dumps(changed(json.loads(good), data)))
        reads(raw, file, split)
    finally:
        (raw / file).write_text(good)


@pytest.mark.parametrize("name", LINES)
@given(data=st.data())
def test_any_bytes_at_any_place(raw, name, data):
    file, split = LINES[name]
    good = (raw / file).read_bytes()
    start = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(start, min(len(good), start + 40)))
    inside = data.draw(
        st.binary(max_size=12) | st.text(',"|\n\r\t {}[]0', max_size=6).map(str.encode)
    )
    try:
        (raw / file).write_bytes(good[:start] + inside + good[end:])
        reads(raw, file, split)
    finally:
        (raw / file).write_bytes(good)


@given(data=st.data())
def test_any_judgement(raw, data):
    file = raw / "hp_fashioniq/hpfiq.json"
    good = file.read_text()
    try:
        file.write_text(json.dumps(changed(json.loads(good), data)))
        said, judgements = said_of(hp_fashioniq.read, file)
        assert str(file) in said if said else True
        for judgement in judgements or ():
            assert judgement.preferred in (1, 2)
            assert len(judgement.first) == len(judgement.second) == 5
    finally:
        file.write_text(good)


CLICK = {
    **{"format": 1, "time": "2026-05-01T10:00:00Z", "kind": "pick", "conversation": "c"},
    **{"turn": 0, "folder": "/photos", "references": ["a.jpg"], "text": "red", "image": "b.jpg"},
    **{"shown": ["b.jpg"], "model": "f00d"},
}


@given(data=st.data())
def test_any_line_of_a_log_costs_no_other(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "clicks.jsonl"
    sound = json.dumps(CLICK)
    path.write_text("\n".join((sound, json.dumps(changed(CLICK, data)), sound)))
    log = feedback.read_log(path)
    assert len(log.clicks) + log.skipped == 3
    assert log.clicks[0] == log.clicks[-1]
    feedback.judged(log.clicks)


@given(value=VALUES, raw=st.booleans())
def test_any_line_of_a_metric_log(value, raw):
    line = json.dumps(value).encode() if raw else json.dumps({"step": value, "loss": 1}).encode()
    found = read_line(line)
    assert found is None or type(found["step"]) is int
