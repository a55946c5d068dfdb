"""A model of ours, measured by `mteb` itself, on a task made of scenes: nothing is downloaded."""

import math

import numpy as np
import pytest

from dqe_jax.evaluation.run import evaluate_checkpoint
from dqe_jax.search.mteb_model import MtebModel
from dqe_jax.utils.errors import UserError

QUERIES = 60


@pytest.fixture
def mteb():
    return pytest.importorskip("mteb", reason="mteb is not installed")


def scenes_task(mteb, split):
    """A retrieval task of mteb of the queries of `shapes`: an image with a text finds images."""
    from datasets import Dataset, Features, Image, Value
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    from PIL import Image as Pictures

    def picture(row):
        return Pictures.fromarray(split.gallery[int(row)])

    ids, asked = split.gallery.ids, split.queries.take(np.arange(QUERIES))
    image = {"id": Value("string"), "image": Image()}
    corpus = {"id": ids, "image": [picture(row) for row in range(len(ids))]}
    queries = {
        "id": list(asked.ids),
        "image": [picture(row) for row in asked.reference],
        "text": list(asked.texts),
    }

    class Scenes(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="ScenesIT2IRetrieval",
            description="Scenes of shapes that a reference and a text ask for.",
            dataset={"path": "none", "revision": "none"},
            type="Any2AnyRetrieval",
            category="it2i",
            modalities=["text", "image"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, **options):
            del options
            self.dataset = {
                "default": {
                    "test": {
                        "corpus": Dataset.from_dict(corpus, Features(image)),
                        "queries": Dataset.from_dict(
                            queries, Features({**image, "text": Value("string")})
                        ),
                        "relevant_docs": {
                            query: {ids[row]: 1 for row in np.unique(asked.relevant[i]).tolist()}
                            for i, query in enumerate(asked.ids)
                        },
                        "top_ranked": None,
                    }
                }
            }
            self.data_loaded = True

    return Scenes()


def ndcg_at_10(split, rows):
    """Mean nDCG@10 of ranked rows, each relevant image worth 1."""
    values = []
    for i in range(QUERIES):
        relevant = set(split.queries.relevant[i].tolist())
        gained = sum(
            1 / math.log2(at + 2) for at, row in enumerate(rows[i][:10]) if row in relevant
        )
        best = sum(1 / math.log2(at + 2) for at in range(min(10, len(relevant))))
        values.append(gained / best)
    return np.mean(values)


@pytest.mark.slow  # imports mteb, which imports PyTorch and more
def test_mteb_measures_what_we_measure(mteb, run, model, tmp_path):
    config, workdir, split = run
    result = evaluate_checkpoint(config, workdir, output=tmp_path / "own")
    adapter = MtebModel(model, name="made/scenes")
    found = mteb.evaluate(
        adapter,
        scenes_task(mteb, split),
        cache=mteb.ResultCache(tmp_path),
        show_progress_bar=False,
        co2_tracker=False,
    )
    (scores,) = found.task_results[0].scores["test"]
    assert scores["main_score"] == scores["ndcg_at_10"]
    own = ndcg_at_10(split, result.rows)
    assert scores["ndcg_at_10"] == pytest.approx(own, abs=1e-6)
    assert 0 < own < 1
    hits = [t in row[:10] for t, row in zip(split.queries.target[:QUERIES], result.rows.tolist())]
    assert scores["recall_at_10"] == pytest.approx(np.mean(hits), abs=1e-5)
    meta = adapter.mteb_model_meta
    assert (meta.name, meta.framework) == ("made/scenes", ["JAX"])
    assert meta.revision == model.fingerprint


@pytest.mark.slow
def test_reranking_and_tasks_that_are_not_composed(mteb, run, model):
    split = run[2]
    task = scenes_task(mteb, split)
    task.load_data()
    data = task.dataset["default"]["test"]
    adapter = MtebModel(model, name="made/scenes")
    options = {"task_metadata": task.metadata, "hf_split": "test", "hf_subset": "default"}
    options |= {"encode_kwargs": {}, "num_proc": None}
    queries = data["queries"].select(range(3))
    with pytest.raises(UserError, match="call index first"):
        adapter.search(queries, top_k=3, **options)
    adapter.index(data["corpus"], **options)
    every = adapter.search(queries, top_k=len(split.gallery), **options)
    few = {query: split.gallery.ids[5:9] for query in queries["id"]}
    got = adapter.search(queries, top_k=3, top_ranked=few, **options)
    for query, found in got.items():
        assert len(found) == 3
        best = sorted(few[query], key=lambda image: -every[query][image])[:3]
        assert found == pytest.approx({image: every[query][image] for image in best}, abs=1e-6)
    with pytest.raises(UserError, match=r"task ScenesIT2IRetrieval: its queries have no text; "):
        adapter.search(queries.remove_columns("text"), top_k=3, **options)
    with pytest.raises(UserError, match=r"its documents have texts too"):
        adapter.index(queries, **options)
    with pytest.raises(UserError, match=r"name='scenes': mteb names models as OWNER/NAME"):
        MtebModel(model, name="scenes")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CIRRIT2IRetrieval", "FashionIQIT2IRetrieval"])
def test_published_tasks_are_of_the_form_that_is_taken(mteb, name):
    """They are not run: their data are on the hub."""
    task = mteb.get_task(name)
    assert (task.metadata.category, task.metadata.main_score) == ("it2i", "ndcg_at_10")
    assert set(task.metadata.modalities) == {"image", "text"}
