"""Made copies of each benchmark, from raw files through training to metrics and submissions."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from dqe_jax.config import RunConfig
from dqe_jax.data import datasets, preparation
from dqe_jax.data.builders.benchmarks import make_builder
from dqe_jax.evaluation import comparison, predictions, query_results
from dqe_jax.evaluation.run import evaluate_checkpoint
from dqe_jax.evaluation.scoring import score_embeddings
from dqe_jax.testing import standins
from dqe_jax.testing.commands import run_module
from dqe_jax.testing.small_runs import (
    BENCHMARK_SIZE,
    small_benchmark_config,
)
from dqe_jax.training import loop
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import write_json

ROOT = Path(__file__).resolve().parents[2]
MAKERS = {
    "fashioniq": standins.small_fashioniq,
    "cirr": standins.small_cirr,
    "circo": standins.small_circo,
    "triplets": standins.small_triplets,
}
# Made copies of benchmarks without a training split, by what they are evaluated with.
OTHERS = {
    "genecis": standins.small_genecis,
    "pinpoint": standins.small_pinpoint,
    "pic2word": standins.small_imagenet_r,
    "imagenet_r": standins.small_imagenet_r,
    "icir": standins.small_icir,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """`raw/<data set>` as published, `data` prepared, `compiled` programs."""
    base = tmp_path_factory.mktemp("benchmarks")
    for dataset, make in MAKERS.items():
        make(base / "raw" / dataset)
        builder = make_builder(
            dataset,
            str(base / "data"),
            image_size=BENCHMARK_SIZE,
            preprocess={"fashioniq": "target_pad", "triplets": "pad"}.get(dataset, "squash"),
            raw_dir=str(base / "raw" / dataset),
            splits=tuple(datasets.DATASETS[dataset].splits),
            num_workers=1,
        )
        preparation.prepare(builder)
        assert preparation.write_report(builder, preparation.report(builder), None) == []
    return base


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def fashioniq_run(base):
    config = small_benchmark_config("fiq:smoke", base / "data")
    return config, base / "fiq", loop.train_and_evaluate(config, base / "fiq")


def same_from_a_file(base, config, workdir, dataset, split="val", own=None, page=False, **options):
    """Evaluates a run, and its embeddings from a file against the annotation files alone."""
    own, file = own or base / "own", base / f"{dataset}.safetensors"
    result = evaluate_checkpoint(
        config, workdir, split=split, output=own, save_embeddings=file, page=page, **options
    )
    again = score_embeddings(
        config, file, base / "again", split=split, raw_dir=base / "raw" / dataset, **options
    )
    assert again.metrics == result.metrics
    assert again.metrics
    assert again.baselines == result.baselines
    name = datasets.split_of(dataset, split)
    results = [
        query_results.read_results(path)
        for path in (own / f"{name}-2.queries.json", base / f"again/{name}-{dataset}.queries.json")
    ]
    assert results[0].questions == results[1].questions
    assert results[0].gallery == results[1].gallery
    assert results[0].measured() == results[1].measured()
    for key, interval in results[0].measured().items():
        assert interval.value == pytest.approx(result.metrics[key], abs=1e-9)


@pytest.mark.parametrize("protocol", ["original", "val"])
def test_embeddings_of_fashioniq(base, fashioniq_run, protocol):
    _, workdir, _ = fashioniq_run
    config = small_benchmark_config("fiq:smoke", base / "data", **{"eval.protocol": protocol})
    same_from_a_file(base, config, workdir, "fashioniq")


@pytest.mark.slow  # FashionIQ takes the same way
def test_embeddings_of_cirr(base, cirr_run):
    config, workdir, _ = cirr_run
    same_from_a_file(base, config, workdir, "cirr")
    file = base / "test1.npz"
    evaluate_checkpoint(config, workdir, split="test1", output=base / "own", save_embeddings=file)
    score_embeddings(config, file, base / "again", split="test1", raw_dir=base / "raw" / "cirr")
    for name in ("recall", "recall_subset"):
        one = read(base / "own" / f"test-2.cirr_{name}.json")
        assert one == read(base / "again" / f"test-test1.cirr_{name}.json")


def test_embeddings_of_circo(base, cirr_run, caplog):
    """With the list of its gallery, and without: what the file holds is then the gallery."""
    _, workdir, _ = cirr_run
    config = small_benchmark_config("circo:smoke", base / "data")
    same_from_a_file(base, config, workdir, "circo")
    (base / "labels").mkdir()
    labels = base / "raw" / "circo" / "annotations" / "val.json"
    (base / "labels" / "val.json").write_bytes(labels.read_bytes())
    file = base / "circo.safetensors"
    with caplog.at_level("WARNING"):
        got = score_embeddings(config, file, base / "x", split="val", raw_dir=base / "labels")
    assert got.metrics == score_embeddings(config, file, base / "y", split="val").metrics
    assert "do not list the gallery" in caplog.text


def test_fashioniq(base, fashioniq_run):
    config, workdir, metrics = fashioniq_run
    report = read(workdir / "eval" / "validation-2.json")
    assert report["protocol"] == "fashioniq-original"
    assert report["queries"] == {"used": 36, "official": 36}
    assert report["gallery"] == {"used": 120, "official": 120}
    assert metrics["categories"] == 3
    ranked = read(workdir / "eval" / "validation-2.ranked.json")
    # Every list is of its own category, all of it, and the reference stays.
    assert {len(ids) for ids in ranked.values()} == {40}
    assert all({image[0] for image in ids} == {q[0].upper()} for q, ids in ranked.items())
    file = workdir / "eval" / "validation-2.ranked.json"
    scored = predictions.score("fashioniq", "val", file, base / "raw" / "fashioniq")
    assert scored | metrics == pytest.approx(scored, abs=1e-9)
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    assert any("validation/R@10/dress" in line for line in lines)

    config = small_benchmark_config("fiq:smoke", base / "data", **{"eval.protocol": "val"})
    evaluate_checkpoint(config, workdir, split="val")
    assert read(workdir / "eval" / "validation-2.json") == report  # not overwritten
    report = read(workdir / "eval-val" / "validation-2.json")
    assert report["protocol"] == "fashioniq-val"
    named = {q["candidate"] for q in read_captions(base)} | {
        q["target"] for q in read_captions(base)
    }
    assert report["ranked_images"] == len(named)
    lists = read(workdir / "eval-val" / "validation-2.ranked.json")
    assert set().union(*lists.values()) == named


def read_captions(base):
    folder = base / "raw" / "fashioniq" / "captions"
    return [q for file in sorted(folder.glob("cap.*.val.json")) for q in read(file)]


def test_fashioniq_without_labels(base, fashioniq_run):
    config, workdir, _ = fashioniq_run
    evaluate_checkpoint(config, workdir, split="test", output=base / "test")
    report = read(base / "test" / "test-2.json")
    assert report["metrics"] == {}
    assert len(read(base / "test" / "test-2.ranked.json")) == 36
    assert not list((base / "test").glob("*.cirr*"))


def test_hp_fashioniq(base, fashioniq_run):
    config, workdir, _ = fashioniq_run
    path = "/-/image_data/{}/{}.jpg"
    sets = [[path.format("shirt", f"SVAL{i + j:04d}") for j in range(5)] for i in (3, 20, 3)]
    half = {
        "ref_img_paths": [path.format("shirt", "SVAL0000")] * 3,
        "targ_img_paths": [path.format("shirt", "SVAL0001")] * 3,
        "sentences": ["is more 0  and is reddotmark"] * 3,
        "retrieved_set1": [{"img_path": sets[0], "user_score": "4"}] * 3,
        "retrieved_set2": [{"img_path": sets[k], "user_score": "3"} for k in (1, 1, 2)],
        "preferred set": ["1", "2", "1"],
    }
    half["retrieved_set1"][1] = {"img_path": [sets[0][0][:-8] + "9999.jpg"] * 5, "user_score": "1"}
    write_json(base / "hpfiq.json", {"user_1": {"question_set_1": half}})
    evaluate_checkpoint(
        config, workdir, split="val", output=base / "hp", hp_fashioniq=base / "hpfiq.json"
    )
    found = read(base / "hp" / "hp_fashioniq-2.json")
    assert (found["judgements"], found["official"]) == (2, 3)  # one names an image not at hand
    assert found["ties"] == 1  # the same five images
    assert found["always_first"] == 1.0
    same_from_a_file(base, config, workdir, "fashioniq", hp_fashioniq=base / "hpfiq.json")
    assert read(base / "own" / "hp_fashioniq-2.json") == found
    with pytest.raises(UserError, match=r"FashionIQ's val split, not test"):
        evaluate_checkpoint(config, workdir, split="test", hp_fashioniq=base / "hpfiq.json")


@pytest.fixture(scope="module")
def cirr_run(base):
    config = small_benchmark_config("cirr:smoke", base / "data")
    return config, base / "cirr", loop.train_and_evaluate(config, base / "cirr")


@pytest.mark.slow  # FashionIQ takes the same way
def test_cirr(base, cirr_run):
    _, workdir, metrics = cirr_run
    report = read(workdir / "eval" / "validation-2.json")
    assert report["protocol"] == "cirr"
    assert metrics["mean"] == pytest.approx((metrics["R@5"] + metrics["R_subset@1"]) / 2)
    ranked = read(workdir / "eval" / "validation-2.ranked.json")
    labels = read(base / "raw" / "cirr" / "captions" / "cap.rc2.val.json")
    assert all(q["reference"] not in ranked[str(q["pairid"])] for q in labels)
    file = workdir / "eval" / "validation-2.ranked.json"
    scored = predictions.score("cirr", "val", file, base / "raw" / "cirr")
    for k in (1, 5, 10, 50):
        assert scored[f"R@{k}"] == pytest.approx(metrics[f"R@{k}"], abs=1e-9)


def test_cirr_submissions(base, cirr_run):
    config, workdir, _ = cirr_run
    evaluate_checkpoint(config, workdir, split="test1", output=base / "test1")
    recall = read(base / "test1" / "test-2.cirr_recall.json")
    subset = read(base / "test1" / "test-2.cirr_recall_subset.json")
    queries = {str(q["pairid"]): q for q in read_json_list(base, "cirr", "cap.rc2.test1.json")}
    assert (recall.pop("version"), recall.pop("metric")) == ("rc2", "recall")
    assert (subset.pop("version"), subset.pop("metric")) == ("rc2", "recall_subset")
    assert recall.keys() == subset.keys() == queries.keys()
    for pair, query in queries.items():
        assert len(set(recall[pair])) == 50
        assert len(set(subset[pair])) == 3
        assert set(subset[pair]) < set(query["img_set"]["members"])
        assert query["reference"] not in recall[pair] + subset[pair]
        # Both rank by the same scores.
        order = [image for image in recall[pair] if image in subset[pair]]
        assert order == subset[pair][: len(order)]
    file = base / "test1" / "test-2.cirr_recall.json"
    with pytest.raises(UserError, match=r"keeps the rules .* send it to http"):
        predictions.score_predictions("cirr", "test1", file, base / "raw" / "cirr")


def read_json_list(base, dataset, name):
    return read(base / "raw" / dataset / "captions" / name)


def test_circo_by_the_model_of_cirr(base, cirr_run):
    _, workdir, _ = cirr_run
    config = small_benchmark_config("circo:smoke", base / "data")
    evaluate_checkpoint(config, workdir, split="val", output=base / "circo")
    report = read(base / "circo" / "validation-2.json")
    assert report["protocol"] == "circo"
    assert {"mAP@5", "mAP@10/addition", "mAP@10/negation", "R@50"} <= report["metrics"].keys()
    ranked = base / "circo" / "validation-2.ranked.json"
    scored = predictions.score("circo", "val", ranked, base / "raw" / "circo")
    for name, value in report["metrics"].items():
        assert scored[name] == pytest.approx(value, abs=1e-9)
    evaluate_checkpoint(config, workdir, split="test", output=base / "circo")
    made = read(base / "circo" / "test-2.circo.json")
    assert made.keys() == {"0", "1", "2", "3"}
    assert all(len(set(v)) == 50 and {type(i) for i in v} == {int} for v in made.values())
    with pytest.raises(UserError, match="circo is a benchmark without training data: train on"):
        loop.train_and_evaluate(config, base / "no")


@pytest.mark.parametrize("dataset", OTHERS)
def test_benchmarks_without_training_data(base, cirr_run, dataset):
    raw, out = base / "raw" / dataset, base / f"{dataset}-results"
    OTHERS[dataset](raw)
    builder = make_builder(
        *(dataset, str(base / "data")),
        image_size=BENCHMARK_SIZE,
        preprocess="squash",
        raw_dir=str(raw),
        splits=("test",),
        num_workers=1,
    )
    preparation.prepare(builder)
    assert preparation.write_report(builder, preparation.report(builder), None) == []
    variants = "smoke" if dataset == "genecis" else f"{dataset},smoke"
    config = small_benchmark_config(f"zero_shot:{variants}", base / "data")
    same_from_a_file(base, config, cirr_run[1], dataset, "test", out, page=True)
    report = read(out / "test-2.json")
    protocol = datasets.DATASETS[dataset].protocols["original"]
    assert report["protocol"] == protocol
    assert report["queries"]["used"] == report["queries"]["official"] > 0
    assert (out / "report.html").exists()
    # The ranked lists score the same as a file of anybody's predictions.
    ranked = out / "test-2.ranked.json"
    scored = predictions.score_predictions(dataset, "test", ranked, raw, output=out)
    assert scored | report["metrics"] == pytest.approx(scored, abs=1e-9)
    # So does each query, and the two can be compared.
    files = ("test-2.queries.json", "predictions-test.queries.json")
    compared = comparison.compare([query_results.read_results(out / file) for file in files])
    assert set(compared.keys) <= set(report["intervals"])
    assert compared.lines[1].differences
    for apart in compared.lines[1].differences.values():
        assert (apart.low, apart.value, apart.high) == pytest.approx((0, 0, 0), abs=1e-9)
    with pytest.raises(UserError, match=f"{dataset} is a benchmark without training data"):
        loop.train_and_evaluate(config, base / "no")


def test_predictions_are_scored_by_the_binary(base):
    queries = read(base / "raw" / "circo" / "annotations" / "val.json")
    perfect = {str(q["id"]): q["gt_img_ids"] for q in queries}
    write_json(base / "perfect.json", perfect)
    command = [
        *("dqe_jax.evaluate", "--config=configs/circo.py", "--split=val"),
        *(f"--predictions={base / 'perfect.json'}", f"--raw_dir={base / 'raw' / 'circo'}"),
        f"--output={base / 'scored'}",
    ]
    done = run_module(*command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert '"protocol": "circo"' in done.stderr
    found = read(base / "scored" / "predictions-validation.json")
    assert found["protocol"] == "circo"
    assert found["metrics"]["mAP@50"] == found["metrics"]["mAP@10/addition"] == 1.0


def test_triplets(base):
    config = small_benchmark_config("triplets:tiny,smoke", base / "data")
    metrics = loop.train_and_evaluate(config, base / "triplets")
    assert metrics["queries"] == 10
    assert metrics["R@50"] == 1.0  # the gallery has 24 images: lists end there
    assert {"P@10/tint", "mAP@10/attribute:color", "R_valid@10"} <= metrics.keys()
    ranked = read(base / "triplets" / "eval" / "test-2.ranked.json")
    assert {len(ids) for ids in ranked.values()} == {24}
    assert all(image.startswith("images/") for ids in ranked.values() for image in ids)
    same_from_a_file(base, config, base / "triplets", "triplets", "test")


def test_rankings_do_not_depend_on_devices(base, cirr_run):
    _, workdir, _ = cirr_run
    for devices in (1, 8):
        config = small_benchmark_config("cirr:smoke", base / "data", num_devices=devices)
        evaluate_checkpoint(config, workdir, split="test1", output=base / f"on{devices}")
    for name in ("cirr_recall", "cirr_recall_subset", "ranked"):
        one, other = (read(base / f"on{devices}" / f"test-2.{name}.json") for devices in (1, 8))
        assert one == other


def test_captions_in_both_orders(base):
    from dqe_jax.data import splits
    from dqe_jax.data.text import encode_texts, encode_wordings
    from dqe_jax.data.tokenizer import train_word_tokenizer

    data = RunConfig.of(small_benchmark_config("fiq:smoke", base / "data")).data
    assert data.captions == "random"
    builder = datasets.open_dataset(data)
    split = splits.open_split(data, builder, "train")
    assert split.queries.texts[3] == "is more 3 and is red"
    words = train_word_tokenizer(split.queries.texts, 12)
    both = encode_wordings(words, split, "random")
    assert both.ids.shape == (36, 2, 12)
    assert [own[3] for own in both.texts] == ["is more 3 and is red", "is red and is more 3"]
    backwards = dataclasses.replace(data, captions="reverse")
    other = splits.open_split(backwards, builder, "train")
    assert other.queries.texts[3] == "is red and is more 3"
    np.testing.assert_array_equal(encode_texts(words, other), both.ids[:, 1])
    assert encode_wordings(words, split, "forward").ids.shape == (36, 1, 12)
