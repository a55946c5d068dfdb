"""The fields of a config that the data have. The names here are those of tables of the data."""

from __future__ import annotations

import dataclasses

from dqe_jax.utils.fields import field, flag, integer, number, one_of, text, tuple_of_names

DATASETS = (
    *("shapes", "fashion_products", "fashioniq", "cirr", "circo", "triplets"),
    *("shoes", "lasco", "genecis", "pinpoint", "pic2word", "imagenet_r", "nico", "minidn"),
    *("ltll", "fashion200k", "icir", "edir", "circled"),
)
VARIANTS = ("plain", "hard", "coarse", "smoke", "hard_smoke", "coarse_smoke")
PREPROCESS = ("pad", "squash", "crop", "target_pad")
IMAGE_FORMATS = ("png", "jpeg", "raw")
AUGMENTATIONS = ("none", "flip", "flip_shift")
# Orders in which captions are joined; "random" is one of the others, drawn anew in training.
CAPTION_ORDERS = ("forward", "reverse", "random")
SPLITS = ("train", "validation", "test")
QUERIES = ("triplets", "captions")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data set, and how its images and texts are read."""

    dataset: str = field(
        "shapes",
        'Data set: "shapes" (generated), "fashion_products" (needs data_dir), or one that '
        'dqe_jax.prepare has prepared: "fashioniq", "cirr", "circo", "triplets" (your own) or '
        "another benchmark of docs/how-to/more-benchmarks.md.",
        one_of(*DATASETS),
    )
    variant: str = field(
        "plain",
        'Variant of shapes: "plain", "hard", "coarse", "smoke", "hard_smoke" or "coarse_smoke"; of '
        'fashion_products: "plain" or "coarse".',
        one_of(*VARIANTS),
    )
    data_dir: str = field(
        "",
        "Directory of the data set, also --data_dir: the raw photos of fashion_products, or what "
        'dqe_jax.prepare wrote (its own --data_dir); "" for prepared_dir.',
        text(),
        "free",
    )
    prepared_dir: str = field(
        "~/.cache/dqe_jax",
        "Directory of prepared data sets (TFDS); shapes and fashion_products are prepared on first "
        "use.",
        text(),
        "free",
    )
    image_size: int = field(
        64,
        "Pixels a side; images are stored and used at this size.",
        integer(16, 4_096),
        "model",
    )
    preprocess: str = field(
        "pad",
        'How photos become square images: "pad" (the whole photo on white), "squash" (BLIP-2\'s '
        'way), "crop" (the centre: CLIP\'s way) or "target_pad" (padded to a ratio of 1.25, then '
        "the centre).",
        one_of(*PREPROCESS),
        "model",
    )
    image_format: str = field(
        "png",
        'How the square photos are stored: "png" (exact), "jpeg" (nearly exact, small, and several '
        'times faster to read) or "raw" (exact, large, and the fastest to read). Shapes are always '
        "PNG.",
        one_of(*IMAGE_FORMATS),
    )
    max_bad_fraction: float = field(
        0.01,
        "Share of the raw data of fashion_products that may be lost to missing or corrupt photos.",
        number(0, 1),
    )
    cache_images: bool = field(
        True,
        "Keep decoded images in memory once read: gallery images x image_size^2 x 3 bytes.",
        flag(),
        "free",
    )
    num_threads: int = field(2, "Threads that read images.", integer(1, 1_024), "free")
    augment: str = field(
        "none",
        'Augmentation of training images: "none", "flip" or "flip_shift".',
        one_of(*AUGMENTATIONS),
    )
    captions: str = field(
        "forward",
        'How several captions of a query become one text: "forward" ("a and b"), "reverse", or '
        '"random": training draws the order anew each time, evaluation takes "forward".',
        one_of(*CAPTION_ORDERS),
    )
    max_length: int = field(
        16,
        "Longest modification text, in tokens; longer ones are cut, counted and reported.",
        integer(1, 10_000),
        "model",
    )
    lexicon: str = field(
        "",
        'File with the words of each attribute; "" for dqe_jax/data/lexicon.txt.',
        text(),
    )
    queries: str = field(
        "triplets",
        'What the queries are: "triplets" (reference, modification text and target) or "captions" '
        "(for each photo of the gallery the attributes that are stated of it, and the photo: to "
        "align a model before it is trained on triplets).",
        one_of(*QUERIES),
    )
    train_share: float = field(
        1.0,
        "Share of the training queries that are kept, chosen by their ids; a smaller share is part "
        "of a larger one.",
        number(0.0001, 1),
    )
    leave_out: tuple[str, ...] = field(
        (),
        'Kinds of change whose queries are left out of training, such as "two changes": evaluation '
        "has them all the same. It shows what a model makes of changes that it never saw together.",
        tuple_of_names(empty=True),
    )


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """A batch over all devices: references x queries_per_reference queries.

    Both the references and the targets are candidates of the in-batch terms.
    """

    references: int = field(
        32,
        "References of a batch, over all devices, where each has queries_per_reference queries; "
        "where they have fewer, a batch has as many queries, of more references.",
        integer(1, 1_000_000),
    )
    queries_per_reference: int = field(
        4, "Queries of a reference in a batch, at the most.", integer(1, 10_000)
    )
    accumulate: int = field(
        1,
        "Batches whose gradients are averaged before an update, which is a step. Each has only its "
        "own negatives; chunks keeps those of one large batch.",
        integer(1, 1_000_000),
    )
    chunks: int = field(
        1,
        "Parts in which a device computes its share of a batch, one after the other (GradCache): "
        "the gradients of the whole batch in the memory of a part, for a forward pass more.",
        integer(1, 1_000_000),
        "free",
    )
