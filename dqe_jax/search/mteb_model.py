"""A trained model for `mteb`, the Massive Text Embedding Benchmark, which scores images too.

    import mteb, dqe_jax
    from dqe_jax.search.mteb_model import MtebModel

    model = MtebModel(dqe_jax.load("runs/shapes"), name="OWNER/shapes")
    mteb.evaluate(model, mteb.get_tasks(tasks=["CIRRIT2IRetrieval"]))

It implements mteb's `SearchProtocol`: mteb gives the images of a task and its queries, each an
image with a text that says what should change, and takes ranked lists, which it measures itself.
They are ranked as in our own evaluation, exactly and with all tokens of an image. Images with equal
scores, such as copies of a photo, mteb puts in an order of its own. `mteb` need not be installed
for the rest of dqe_jax.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dqe_jax.evaluation import ranking
from dqe_jax.search.model import Model
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.progress import progress

# Images of a task that are decoded at a time.
AT_A_TIME = 512


class MtebModel:
    """A model as mteb takes it."""

    def __init__(self, model: Model, *, name: str, license: str | None = None):
        """Computes nothing.

        Args:
          model: that `dqe_jax.load` gave.
          name: in the results of mteb, OWNER/NAME.
          license: of the model, as the hub names it; None if it is not stated.

        Raises:
          UserError: mteb is not installed, or the name is not of this form.
        """
        try:
            import mteb  # noqa: F401  # it is asked for when results are wanted
        except ImportError as error:
            raise UserError(
                "MtebModel needs the package mteb, which is not installed: run "
                "`pip install 'dqe_jax[mteb]'`."
            ) from error
        owner, slash, rest = name.partition("/")
        if not (owner and slash and rest):
            raise UserError(f"name={name!r}: mteb names models as OWNER/NAME.")
        self.model, self.name, self._license = model, name, license
        self._ids: list[str] = []
        self._tokens: np.ndarray | None = None

    @property
    def mteb_model_meta(self) -> Any:
        """An `mteb.models.ModelMeta`: what mteb writes beside results."""
        from mteb.models import ModelMeta
        from mteb.models.model_meta import ScoringFunction

        tokens, width = self.model.token_shape()
        return ModelMeta(
            loader=None,
            name=self.name,
            revision=self.model.fingerprint,
            release_date=None,
            languages=["eng-Latn"],
            n_parameters=None,
            memory_usage_mb=None,
            max_tokens=None,
            embed_dim=width,
            license=self._license,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["JAX"],
            similarity_fn_name=(ScoringFunction.COSINE if tokens == 1 else ScoringFunction.MAX_SIM),
            use_instructions=False,
            training_datasets=None,
            modalities=["image", "text"],
            model_type=["dense" if tokens == 1 else "late-interaction"],
        )

    def index(self, corpus: Any, *, task_metadata: Any, **options: Any) -> None:
        """Embeds the images of a task.

        Args:
          corpus: a `datasets.Dataset` with the columns `id` and `image`.
          task_metadata: of the task.
          **options: of mteb, which do not matter here.

        Raises:
          UserError: the task has other documents than images.
        """
        del options
        _check_columns(task_metadata, "documents", corpus.column_names, ("id", "image"))
        _check_images_alone(task_metadata, corpus.column_names)
        starts = range(0, len(corpus), AT_A_TIME)
        parts = [
            self.model.encode_gallery(list(corpus[at : at + AT_A_TIME]["image"]))
            for at in progress(starts, len(corpus), "Embedding images", AT_A_TIME)
        ]
        self._ids, self._tokens = list(map(str, corpus["id"])), np.concatenate(parts)

    def search(
        self,
        queries: Any,
        *,
        task_metadata: Any,
        top_k: int,
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        **options: Any,
    ) -> dict[str, dict[str, float]]:
        """Ranks the images of the task for each query.

        Args:
          queries: a `datasets.Dataset` with the columns `id`, `image` and `text`.
          task_metadata: of the task.
          top_k: how many images of each query are given.
          top_ranked: ids of the images that a query may find, where a task reranks.
          **options: of mteb, which do not matter here.

        Returns:
          Scores by id of the image, by id of the query.

        Raises:
          UserError: queries have no image or no text, or nothing was indexed.
        """
        del options
        if self._tokens is None:
            raise UserError("MtebModel.search: there are no images yet; call index first.")
        _check_columns(task_metadata, "queries", queries.column_names, ("id", "image", "text"))
        parts = []
        starts = range(0, len(queries), AT_A_TIME)
        for at in progress(starts, len(queries), "Embedding queries", AT_A_TIME):
            some = queries[at : at + AT_A_TIME]
            parts.append(self.model.encode_query(list(some["image"]), list(some["text"])).embedding)
        embedded, names = np.concatenate(parts), list(map(str, queries["id"]))
        if top_ranked is not None:
            return self._reranked(embedded, names, top_k, top_ranked)
        k = min(top_k, len(self._ids))
        rank = ranking.make_rank_fn(k, devices=self.model.devices)
        rows, scores = rank(embedded, self._tokens)
        return {
            name: {self._ids[row]: score for row, score in zip(own, found)}
            for name, own, found in zip(names, rows.tolist(), scores.tolist())
        }

    def _reranked(
        self,
        embedded: np.ndarray,
        names: Sequence[str],
        top_k: int,
        top_ranked: Mapping[str, Sequence[str]],
    ) -> dict[str, dict[str, float]]:
        """Scores of the images that each query may find."""
        assert self._tokens is not None, "`search` looks at it"
        place = {image: row for row, image in enumerate(self._ids)}
        listed = [[place[str(image)] for image in top_ranked.get(name, ())] for name in names]
        rows = np.full((len(names), max(1, *map(len, listed))), -1, np.int32)
        for line, own in zip(rows, listed):
            line[: len(own)] = own
        score = ranking.make_score_fn(devices=self.model.devices)
        scores = score(embedded, self._tokens, rows)
        found = {}
        for name, chosen, values in zip(names, rows, scores):
            best = [i for i in np.argsort(-values, kind="stable")[:top_k] if chosen[i] >= 0]
            found[name] = {self._ids[chosen[i]]: float(values[i]) for i in best}
        return found


def _check_columns(task: Any, what: str, held: Sequence[str], wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in held]
    if missing:
        raise UserError(
            f"mteb task {task.name}: its {what} have no {' and no '.join(missing)}; a composed "
            "query is an image with a text, and finds images: choose a task of the category it2i."
        )


def _check_images_alone(task: Any, held: Sequence[str]) -> None:
    if "text" in held:
        raise UserError(
            f"mteb task {task.name}: its documents have texts too, which the model does not read; "
            "choose a task of the category it2i."
        )
