"""Stored records of a split: in order with their images still encoded, or by random access.

TFDS decodes a record field by field, which takes several times longer than this: the schema of
`examples.py` has texts, numbers and lists of them alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dqe_jax.data.examples import Record
from dqe_jax.data.image_formats import decode_image
from dqe_jax.utils.errors import UserError, reason_of

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

# Fields that hold one value; all others hold a list.
_SINGLE = ("id", "photo", "reference", "target")
CHUNK = 256


def read_records(builder: tfds.core.DatasetBuilder, stored: str) -> Iterator[Record]:
    """The records of a stored split.

    Args:
      builder: prepared, of the schema in `examples.py`.
      stored: name of a split of the builder, of queries or of a gallery.

    Yields:
      Records: texts as bytes, numbers as int, `image` a list of none or one encoded image.

    Raises:
      UserError: a file is damaged.
    """
    source = _bytes_of(builder, stored)
    for start in range(0, len(source), CHUNK):
        rows = list(range(start, min(start + CHUNK, len(source))))
        with told_damaged(builder):
            records = list(map(parse_record, source.__getitems__(rows)))
        yield from records


def parse_record(data: bytes) -> Record:
    """A record from its bytes, a serialized `tf.train.Example`."""
    from tensorflow_datasets.proto import tf_example_pb2

    found = {}
    for name, feature in tf_example_pb2.Example.FromString(data).features.feature.items():
        values = feature.int64_list if feature.HasField("int64_list") else feature.bytes_list
        found[name] = values.value[0] if name in _SINGLE else list(values.value)
    return found


class DecodedRecords:
    """Records of a stored split by random access, each with its image decoded."""

    def __init__(self, builder: tfds.core.DatasetBuilder, stored: str):
        """Takes what `read_records` takes, and raises what it raises."""
        self._builder, self._source = builder, _bytes_of(builder, stored)

    @functools.cached_property
    def _raw(self) -> bool:
        """Whether images are arrays, and not encoded."""
        import tensorflow_datasets as tfds

        return not isinstance(self._builder.info.features["image"].feature, tfds.features.Image)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> Record:
        return self._decoded(self._source[row])

    def __getitems__(self, rows: Sequence[int]) -> Sequence[Record]:
        return [self._decoded(data) for data in self._source.__getitems__(rows)]

    def _decoded(self, data: bytes) -> Record:
        record = parse_record(data)
        images = [decode_image(image, raw=self._raw) for image in record["image"]]
        return {**record, "image": images}


@contextlib.contextmanager
def told_damaged(builder: tfds.core.DatasetBuilder) -> Iterator[None]:
    """Turns what is raised of damaged files into a sentence: TFDS and ArrayRecord raise many types.

    Raises:
      UserError: a file is damaged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the prepared data in {builder.data_dir} cannot be read ({reason_of(error)}): if they "
            "are damaged, remove this directory and prepare them again."
        ) from error


def _bytes_of(builder: tfds.core.DatasetBuilder, stored: str) -> Any:
    """The data source of a stored split, of serialized records."""
    import tensorflow_datasets as tfds  # slow to import

    with told_damaged(builder):
        return builder.as_data_source(
            split=stored, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
