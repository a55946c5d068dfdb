"""Evaluates a model on a split and writes what was found."""

from __future__ import annotations

from typing import Any

import jax
from etils import epath
from tokenizers import Tokenizer

from dqe_jax.checkpoints.trained import Trained
from dqe_jax.config import flatten
from dqe_jax.data.splits import Split
from dqe_jax.data.text import encode_texts
from dqe_jax.distributed import processes
from dqe_jax.embedding.encoders import encoders
from dqe_jax.evaluation import protocols, report
from dqe_jax.evaluation.evaluator import Result, RetrievalEvaluator
from dqe_jax.models import DQE


def make_evaluator(
    config: Any, model: DQE, tokenizer: Tokenizer, split: Split, devices: list[jax.Device]
) -> RetrievalEvaluator:
    """The evaluator of a split; it takes parameters."""
    encode_query, encode_gallery = encoders(model)
    return RetrievalEvaluator(
        split=split,
        text=encode_texts(tokenizer, split),
        encode_query=encode_query,
        encode_gallery=encode_gallery,
        batch_size=config.eval.batch_size,
        top_k=config.eval.top_k,
        devices=devices,
        protocol=protocols.protocol_of(config.data.dataset, config.eval.protocol),
    )


def evaluate_and_report(
    config: Any, evaluator: RetrievalEvaluator, params: Any, *, step: int, directory: epath.Path
) -> Result:
    """Evaluates, writes the files of `report.py`, and logs the table and the queries drawn.

    Args:
      config: of the run.
      evaluator: of the split.
      params: of the model.
      step: of the checkpoint.
      directory: where the files go.

    Raises:
      UserError: the directory is not writable, or a submission would be refused.
    """
    result = evaluator.run(params, baselines=True)
    if not processes.leads():
        return result
    report.write_report(
        evaluator,
        result,
        directory,
        f"{evaluator.split.name}-{step}",
        dataset=config.data.dataset,
        step=step,
        attributes=config.model.attributes.names if config.model.attributes.enabled else (),
        sheet_queries=config.eval.sheet_queries,
    )
    return result


def output_of(trained: Trained) -> epath.Path:
    """Where results go: `eval/`, or a place of its own for what the run was not trained on."""
    names = ("data.dataset", "data.variant", "eval.protocol")
    own, run = (flatten(c) for c in (trained.config.to_dict(), trained.trained_by))
    # A field that the run did not have yet is no difference.
    other = [own[name] for name in names if own[name] != run.get(name, own[name])]
    return trained.directory.parent / "-".join(["eval", *other])
