"""`shapes`: generated scenes and edits, in the manner of CSS (TIRG, Vo et al., CVPR 2019).

A scene is a 3x3 grid with some cells taken by objects (shape, colour, size; `hard` adds a fill). A
query changes, adds or removes one thing ("make the large red circle blue"); `hard` also moves
objects, leaves things open ("add a red circle": any free cell, either size) and joins two edits.
Everything follows from a fixed seed: no download, the same records on every machine.

Every reference comes with several edits, most of them in pairs that differ in one value only, so
that galleries are full of near misses; those of validation and test hold further ones. `relevant`
lists *all* gallery scenes that satisfy a query. Scenes of different splits are disjoint.

In `coarse` it does not matter where things lie and how large they are: a scene is relevant if its
**content**, the colours and shapes of its objects, is what the text asks for. Galleries hold every
content in many arrangements, all relevant for a query; its target is a random one of them. Contents
come in families, in which each has others that differ in one thing. A scene has no two objects
alike, and texts say nothing of places and sizes. Contents of different splits are disjoint.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator

import tensorflow_datasets as tfds

from dqe_jax.data.builders.shapes_coarse import make_coarse_split
from dqe_jax.data.builders.shapes_edits import DrawnSplit
from dqe_jax.data.builders.shapes_exact import make_exact_split
from dqe_jax.data.builders.shapes_scenes import Renderer, Scene, content_of, describe_scene
from dqe_jax.data.builders.shapes_variants import CONFIGS, ShapesConfig
from dqe_jax.data.examples import SPLITS, GalleryItem, Query, Records, features, gallery_split
from dqe_jax.utils.progress import progress


class Shapes(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder; see the module's docstring."""

    VERSION = tfds.core.Version("2.0.0")
    BUILDER_CONFIGS = CONFIGS

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=features(self.builder_config.image_size),
            disable_shuffling=True,  # a record's row is its position in the split
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Records]:
        del dl_manager  # nothing to download
        config = self.builder_config
        renderer = Renderer(config.image_size)
        used: set[Scene] = set()
        # Test first: its scenes do not change with the size of the training split.
        drawn = {name: make_split(config, name, used) for name in ("test", "validation", "train")}
        generators = {}
        for name in SPLITS:
            queries = _queries(name, drawn[name], coarse=config.coarse)
            generators[name] = self._generate_examples(queries)
            gallery = _gallery_items(name, drawn[name], renderer)
            generators[gallery_split(name)] = self._generate_examples(gallery)
        return generators

    def _generate_examples(self, records: Iterable[Query | GalleryItem]) -> Records:
        for row, item in enumerate(records):
            yield row, item.record()


def make_split(config: ShapesConfig, split: str, used: set[Scene]) -> DrawnSplit:
    """Draws a split.

    Args:
      config: the variant.
      split: `train`, `validation` or `test`.
      used: scenes of the splits before it, which this one avoids and to which it adds its own.
    """
    make = make_coarse_split if config.coarse else make_exact_split
    return make(config, split, used)


def _gallery_items(name: str, split: DrawnSplit, renderer: Renderer) -> Iterator[GalleryItem]:
    scenes = progress(split.scenes, len(split.scenes), f"Scenes of {name}")
    for row, scene in enumerate(scenes):
        image = renderer.render(scene, random.Random(f"render:{name}:{row}"))
        yield GalleryItem(f"{name}-{row:06d}", image, row, describe_scene(scene))


def _queries(name: str, split: DrawnSplit, *, coarse: bool) -> Iterator[Query]:
    def asked(scene: Scene) -> Hashable:
        """What a scene must agree in to be relevant."""
        return content_of(scene) if coarse else scene

    rows: dict[Hashable, list[int]] = defaultdict(list)
    for row, scene in enumerate(split.scenes):
        rows[asked(scene)].append(row)
    for index, (reference, target, edit) in enumerate(split.queries):
        yield Query(
            id=f"{name}-{index:06d}",
            texts=[edit.text],
            reference=reference,
            target=target,
            known_positives=[target],
            relevant=sorted(
                {row for result in edit.results for row in rows.get(asked(result), ())}
            ),
            kinds=(edit.kind,),
            attributes=edit.attributes,
        )


def make_builder(*, variant: str, prepared_dir: str) -> Shapes:
    """The builder of a variant, whose records lie (or will lie) below `prepared_dir`."""
    return Shapes(config=variant, data_dir=prepared_dir, file_format="array_record")
