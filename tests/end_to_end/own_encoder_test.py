"""Encoders of other libraries, with random weights: `timm`, and `sentence-transformers`.

Their features are written to files of each format, imported, trained on and evaluated.
"""

import json

import numpy as np
import pytest

from dqe_jax.config import RunConfig
from dqe_jax.data import datasets, splits
from dqe_jax.evaluation.run import evaluate_checkpoint
from dqe_jax.feature_store.features import directory_of
from dqe_jax.feature_store.imports import import_features
from dqe_jax.testing.small_runs import small_config
from dqe_jax.training import loop

pytestmark = [pytest.mark.slow, pytest.mark.torch]

FIELDS = {
    **{"total_steps": 4, "eval_every": 4, "checkpoint_every": 4, "batch.references": 4},
    **{"model.backbone": "features", "model.features.width": 32, "model.features.heads": 2},
    **{"model.features.images": ("vit",), "model.features.texts": ("sentences",)},
    **{"optimizer.warmup_steps": 2, "eval.sheet_queries": 1},
}


def images_of(pixels):
    """Tokens of a small vision transformer, and its vector, of images uint8 `[N, H, W, 3]`."""
    import timm
    import torch

    torch.manual_seed(0)
    side = pixels.shape[1]
    made = timm.create_model("vit_tiny_patch16_224", img_size=side, num_classes=0).eval()
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        tokens = made.forward_features(x)
        vector = made.forward_head(tokens)
    # safetensors writes the memory as it lies.
    made = {"tokens": tokens.numpy(), "vector": vector.numpy()}
    return {name: np.ascontiguousarray(array) for name, array in made.items()}


def texts_of(texts, directory):
    """Vectors `[N, D]` of a small sentence transformer."""
    import torch
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    try:
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    except ImportError:  # before version 6
        from sentence_transformers.models import Pooling, Transformer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special))
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    ).save_pretrained(directory)
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vocabulary = words.get_vocab_size()
    BertModel(BertConfig(vocab_size=vocabulary, intermediate_size=48, **sizes)).save_pretrained(
        directory
    )
    transformer = Transformer(str(directory))
    model = SentenceTransformer(modules=[transformer, Pooling(24)], device="cpu")
    return model.encode(texts, show_progress_bar=False)


@pytest.fixture(scope="module")
def features(tmp_path_factory, prepared):
    pytest.importorskip("timm", reason="timm is not installed")
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    base = tmp_path_factory.mktemp("own")
    prepared(base)
    config = RunConfig.of(small_config(base / "prepared", **FIELDS))
    builder = datasets.open_dataset(config.data)
    ids, pixels, texts = [], [], {}
    for name in ("train", "validation", "test"):
        split = splits.open_split(config.data, builder, name)
        ids += split.gallery.ids
        pixels += [split.gallery[row] for row in range(len(split.gallery))]
        texts |= dict.fromkeys(split.queries.texts)
    images = images_of(np.stack(pixels))
    sentences = texts_of([*texts], base / "bert")
    return base, config, ids, images, [*texts], sentences


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".parquet"])
def test_a_run_on_features_of_other_libraries(features, suffix):
    import pyarrow
    import pyarrow.parquet
    from safetensors.numpy import save_file

    base, config, ids, images, texts, sentences = features
    name = suffix[1:]
    files = [base / f"images{suffix}", base / f"texts{suffix}"]
    if suffix == ".npz":
        np.savez(files[0], id=np.array(ids), **images)
        np.savez(files[1], id=np.array(texts), features=sentences)
    elif suffix == ".safetensors":
        save_file(images, files[0], metadata={"ids": json.dumps(ids)})
        save_file(dict(zip(texts, sentences)), files[1])
    else:
        columns = {name: pyarrow.array(array.tolist()) for name, array in images.items()}
        pyarrow.parquet.write_table(pyarrow.table({"id": ids, **columns}), files[0])
        table = pyarrow.table({"id": texts, "features": sentences.tolist()})
        pyarrow.parquet.write_table(table, files[1])
    root = directory_of(config)
    import_features(root, name, "image", files[:1], dtype="float32")
    import_features(root, f"{name}-texts", "text", files[1:], dtype="float32")
    changes = {"model.features.images": (name,), "model.features.texts": (f"{name}-texts",)}
    changed = config.with_changes(changes)
    loop.train_and_evaluate(changed, base / name)
    lines = [json.loads(one) for one in (base / name / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([line["loss"] for line in lines if "loss" in line]).all()
    found = evaluate_checkpoint(changed, base / name, output=base / f"{name}-again").metrics
    assert found["R@10"] == pytest.approx(lines[-1]["test/R@10"])
    own = [line["loss"] for line in lines if "loss" in line]
    FIRST.setdefault("losses", own)
    np.testing.assert_allclose(own, FIRST["losses"], rtol=1e-5)  # the format changes nothing


# The losses of the format that runs first.
FIRST: dict[str, list[float]] = {}
