"""Stored records of a split, read in order with their images still encoded.

TFDS decodes a record field by field, which takes several times longer than this: the schema of
`examples.py` has texts, numbers and lists of them alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dqe_jax.data.examples import Record

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
    """
    import tensorflow_datasets as tfds  # slow to import

    source = builder.as_data_source(
        split=stored, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    for start in range(0, len(source), CHUNK):
        rows = list(range(start, min(start + CHUNK, len(source))))
        yield from map(parse_record, source.__getitems__(rows))


def parse_record(data: bytes) -> Record:
    """A record from its bytes, a serialized `tf.train.Example`."""
    from tensorflow_datasets.proto import tf_example_pb2

    found = {}
    for name, feature in tf_example_pb2.Example.FromString(data).features.feature.items():
        values = feature.int64_list if feature.HasField("int64_list") else feature.bytes_list
        found[name] = values.value[0] if name in _SINGLE else list(values.value)
    return found
