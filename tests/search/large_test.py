"""An index of many images in Milvus beside the exact one: what is found, time and memory.

`DQE_INDEX_IMAGES=200000 python -m pytest -m slow -n 0 -rP tests/search/large_test.py` prints the
figures of docs/how-to/search.md.
"""

import importlib.util
import os
import random
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from dqe_jax.config import RunConfig
from dqe_jax.data.builders.shapes_scenes import PLAIN, Renderer
from dqe_jax.search.loading import load
from dqe_jax.testing.pretrained import write_bert_tokenizer
from dqe_jax.testing.untrained import save_untrained

pytestmark = [
    pytest.mark.slow,
    pytest.mark.torch,
    pytest.mark.skipif(not importlib.util.find_spec("pymilvus"), reason="pymilvus is not here"),
    pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="PyTorch is not here"),
]
IMAGES = int(os.environ.get("DQE_INDEX_IMAGES", "2000"))
PART, QUERIES, CHANGED = 1000, 64, 10
TEXTS = ("make the red circle blue", "make the circle red", "a red circle", "the blue circle")


def write_part(number: int, folder: str, count: int) -> list[str]:
    """Scenes as files in a folder of their own, and their lines of a table."""
    rng, renderer, lines = random.Random(number), Renderer(72), []
    place = Path(folder) / f"{number:03d}"
    place.mkdir(parents=True)
    for i in range(count):
        scene = PLAIN.scene(rng)
        things = [thing for thing in scene if thing]
        Image.fromarray(renderer.render(scene, rng)).save(place / f"{i:03d}.png", compress_level=1)
        lines.append(f"{number:03d}/{i:03d}.png,{things[0].color},{len(things)}")
    return lines


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    """A BLIP-2 with 8 query tokens, a folder of scenes and a table."""
    from dqe_jax.testing.torch_models import small_blip2

    base = tmp_path_factory.mktemp("large")
    small_blip2(query_tokens=8).save_pretrained(base / "weights")
    write_bert_tokenizer(base / "weights")
    changes = {
        **{"model.backbone": "blip2", "model.weights": str(base / "weights")},
        **{"model.blip2.variant": "auto", "model.frozen": (), "data.max_length": 12},
    }
    save_untrained(RunConfig.of(run[0]).with_changes(changes), base / "run")
    parts = [(i, str(base / "photos"), PART) for i in range(IMAGES // PART)]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        lines = [line for own in pool.map(write_part, *zip(*parts)) for line in own]
    (base / "table.csv").write_text("\n".join(["image,color,things", *lines]))
    return load(base / "run", num_devices=1), base


def say(what, seconds):
    print(f"{what}: {seconds:.2f} s")


def timed(what, job):
    start = time.perf_counter()
    found = job()
    say(what, time.perf_counter() - start)
    return found


def check(store, exact, what, **options):
    """All that the store finds scores as high as what exact search finds."""
    ids = [exact.ids[i] for i in np.random.default_rng(0).choice(len(exact), QUERIES, False)]
    texts = [TEXTS[i % len(TEXTS)] for i in range(QUERIES)]
    ours = timed(f"{QUERIES} searches {what}", lambda: store.search(ids, texts, k=10, **options))
    theirs = exact.search(ids, texts, k=10, **options)
    right, named = [], []
    for own, other in zip(ours, theirs, strict=True):
        least = other[-1].score - 1e-5
        assert len({one.id for one in own}) == len(own) == len(other)  # each image once
        right.append(np.mean([one.score >= least for one in own]))
        named.append(len({one.id for one in own} & {one.id for one in other}) / len(other))
    print(f"recall@10 {what}: {np.mean(right):.4f} by score, {np.mean(named):.4f} by name")
    assert np.mean(right) >= 0.99


def test_a_large_index(made):
    model, base = made
    folder, table = base / "photos", base / "table.csv"

    def in_milvus():
        return model.index(folder, output=base / "a", store=str(base / "a.db"), table=table)

    def exact():
        return model.index(folder, output=base / "b", table=table)

    one = timed(f"index of {IMAGES:,} images, in Milvus", in_milvus)
    other = timed("the same, exact", exact)
    check(one, other, "of all")
    check(one, other, "with a filter", filter={"color": "red", "things": (2, 3)})
    for name, index, times in (("Milvus", one, 12), ("exact", other, 100)):
        seconds = []
        for i in range(times):
            start = time.perf_counter()
            index.search(other.ids[i], TEXTS[0], k=10)
            seconds.append(time.perf_counter() - start)
        say(f"a search, {name}, median", np.median(seconds))
        say(f"a search, {name}, p95", np.percentile(seconds, 95))
    print(f"memory, at most: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    one._engine.close()

    files = sorted(folder.rglob("*.png"))[: 3 * CHANGED]
    for path in files[:CHANGED]:
        ImageOps.mirror(Image.open(path)).save(path)
    for path in files[CHANGED : 2 * CHANGED]:
        path.unlink()
    for path in files[2 * CHANGED :]:
        ImageOps.flip(Image.open(path)).save(path.with_stem(path.stem + "-new"))
    one = timed("an update of a few", in_milvus)
    check(one, exact(), "after an update")
    one._engine.close()
    one = timed("an update of nothing", in_milvus)
    assert one.report.embedded == 0
    one._engine.close()
