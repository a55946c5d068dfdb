"""The fields that every run has, each with its meaning. A run's file changes what it needs."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The defaults of all fields."""
    config = ConfigDict()
    # Seed of initialisation, data order and negatives.
    config.seed = 0
    # Training steps of the run.
    config.total_steps = 1000
    # Devices to use, of all processes; 0 for all.
    config.num_devices = 0

    config.data = data = ConfigDict()
    # Data set: "shapes" (generated), "fashion_products" (needs data_dir), or one that
    # dqe_jax.prepare has prepared: "fashioniq", "cirr", "circo" or "triplets" (your own).
    data.dataset = "shapes"
    # Variant of shapes: "plain", "hard", "coarse", "smoke", "hard_smoke" or "coarse_smoke"; of
    # fashion_products: "plain" or "coarse".
    data.variant = "plain"
    # Directory of the data set, also --data_dir: the raw photos of fashion_products, or what
    # dqe_jax.prepare wrote (its own --data_dir); "" for prepared_dir.
    data.data_dir = ""
    # Directory of prepared data sets (TFDS); shapes and fashion_products are prepared on first use.
    data.prepared_dir = "~/.cache/dqe_jax"
    # Pixels a side; images are stored and used at this size.
    data.image_size = 64
    # How photos become square images: "pad" (the whole photo on white), "squash" (BLIP-2's way),
    # "crop" (the centre: CLIP's way) or "target_pad" (padded to a ratio of 1.25, then the centre).
    data.preprocess = "pad"
    # Share of the raw data of fashion_products that may be lost to missing or corrupt photos.
    data.max_bad_fraction = 0.01
    # Keep decoded images in memory once read: gallery images x image_size^2 x 3 bytes.
    data.cache_images = True
    # Threads that read images.
    data.num_threads = 2
    # Augmentation of training images: "none", "flip" or "flip_shift".
    data.augment = "none"
    # How several captions of a query become one text: "forward" ("a and b"), "reverse", or
    # "random": training draws the order anew each time, evaluation takes "forward".
    data.captions = "forward"
    # Longest modification text, in tokens; longer ones are cut, counted and reported.
    data.max_length = 16
    # File with the words of each attribute; "" for dqe_jax/data/lexicon.txt.
    data.lexicon = ""

    # A batch over all devices: references x queries_per_reference queries. Both the references and
    # the targets are candidates of the in-batch terms.
    config.batch = batch = ConfigDict()
    batch.references = 32
    batch.queries_per_reference = 4

    config.model = model = ConfigDict()
    # Backbone: "tiny" (from scratch), or the pretrained "clip" or "blip2".
    model.backbone = "tiny"
    # Compute dtype of matrix products: "float32" or "bfloat16". Norms and softmax are float32.
    model.dtype = "float32"
    # Weights that a pretrained backbone starts from: a Hugging Face model directory or safetensors
    # file, an id on its hub, or a directory written by dqe_jax.convert; "" for random ones.
    model.weights = ""
    # Tokenizer of a pretrained backbone: a directory or an id; "" for that of the weights.
    model.tokenizer = ""
    # Parts of the model that do not train, such as ("vision",): the names are those of the table
    # of parameters that a run prints first.
    model.frozen = ()
    # Dtype in which frozen parameters are kept; those that train are float32.
    model.frozen_dtype = "float32"
    # Recompute each layer of a pretrained backbone in the backward pass: less memory, more time.
    model.remat = False
    # Compile one layer of a pretrained tower and loop over it: compiles faster.
    model.scan_layers = False
    # Attention of pretrained backbones: "xla", "cudnn" (flash attention: NVIDIA GPU, bfloat16), or
    # "auto": cudnn where it works.
    model.attention = "auto"
    # Temperature at the start; it is learned.
    model.initial_tau = 0.07
    model.tiny = tiny = ConfigDict()
    # Brightness of the background (becomes 0), and the unit of brightness, of 0 to 255.
    tiny.pixel_mean = 222.0
    tiny.pixel_std = 64.0
    # Pixels a side of a patch, and of the cells that a patch is embedded from.
    tiny.patch_size = 16
    tiny.cell_size = 8
    # Width of an embedded cell.
    tiny.cell_width = 64
    # Width of the tokens, and attention heads.
    tiny.width = 128
    tiny.heads = 4
    # Blocks of the image encoder, the text encoder and the composer.
    tiny.image_depth = 4
    tiny.text_depth = 2
    tiny.composer_depth = 2
    # Width of a token inside the embedding heads, and of the embeddings.
    tiny.token_dim = 64
    tiny.embed_dim = 256
    # Dropout on patch and word embeddings.
    tiny.dropout = 0.0
    model.clip = clip = ConfigDict()
    # Variant: "vit_b_32", "vit_b_16", "vit_l_14", "vit_l_14_336", or "auto": as the weights say.
    clip.variant = "vit_l_14"
    # Patch tokens that composer and attribute weights see: of the "penultimate" or "last" layer.
    clip.features = "penultimate"
    # Width of the composer, its blocks and attention heads.
    clip.composer_width = 512
    clip.composer_depth = 2
    clip.composer_heads = 8
    model.blip2 = blip2 = ConfigDict()
    # Variant, named by its vision tower: "vit_g_14" (EVA), "vit_l_14" (CLIP's), or "auto".
    blip2.variant = "vit_g_14"
    # Dropout of the Q-Former.
    blip2.dropout = 0.1
    model.attributes = attributes = ConfigDict()
    # Attribute weighting (method, section 1); without it the model is the plain composer.
    attributes.enabled = True
    # Names of the attributes; each is a section of the lexicon.
    attributes.names = ("color", "shape")
    # Width of the attribute features, and attention heads of the attribute queries.
    attributes.width = 128
    attributes.heads = 4
    # Weights: "sigmoid" (independent) or "softmax" (they sum to 1).
    attributes.activation = "sigmoid"

    # Mined negatives (method, section 2), on top of the in-batch term.
    config.negatives = negatives = ConfigDict()
    # Rule: "trns" (mid-zone), "qure" (between the steepest drops behind the target), "random",
    # "hardest", or "in_batch" (none is mined: InfoNCE).
    negatives.rule = "trns"
    # An oracle, for comparison on data that say which images are in truth valid: these are no
    # negatives of the "mined" terms, or of "all" terms, InfoNCE included. "none" for real runs.
    negatives.oracle = "none"
    # Negatives drawn for each query.
    negatives.per_query = 16
    # Candidates: "batch" (the targets and references of the global batch) or "bank" (the whole
    # training gallery, embedded anew at intervals).
    negatives.pool = "batch"
    # From the bank: mine at each "step" with its queries, or at a "refresh" for all queries.
    negatives.mining = "step"
    # Steps before the bank is filled first, and between refreshes.
    negatives.first_refresh = 500
    negatives.refresh_every = 100
    # Negatives until then: "in_batch" (none beside InfoNCE), "random" or "rule", of the batch.
    negatives.warmup = "in_batch"
    # Dtype of the bank: "float32" or "bfloat16".
    negatives.bank_dtype = "float32"
    # Unit of the bounds of the mid-zone: "absolute" (values of delta), "quantile" (of the query's
    # deltas), "std" (multiples of their standard deviation around their mean) or "drops" (QuRe's).
    negatives.bounds = "quantile"
    negatives.lower = 0.02
    negatives.upper = 0.6
    # No candidate at or below this delta is in the zone, whatever the bounds say.
    negatives.floor = 0.0
    # Draw in proportion to exp(-delta / sample_temperature); 0 draws uniformly.
    negatives.sample_temperature = 0.1
    # Of "drops": how many candidates behind the target are looked at, and places between the drops.
    negatives.drops_depth = 1024
    negatives.drops_apart = 1

    # Weights of the loss terms (method, section 3).
    config.loss = loss = ConfigDict()
    # Symmetric InfoNCE over the batch.
    loss.in_batch = 1.0
    # Preference and margin terms over the mined negatives.
    loss.preference = 0.5
    loss.margin = 0.1
    # Attribute terms: weights against mentions, query's features against the target's.
    loss.intent = 0.1
    loss.alignment = 0.1
    # Margin of the margin term, in units of similarity.
    loss.margin_size = 0.1

    config.optimizer = optimizer = ConfigDict()
    # AdamW: peak learning rate, betas, decay of matrices, norm to which gradients are clipped.
    optimizer.learning_rate = 1e-3
    optimizer.b1 = 0.9
    optimizer.b2 = 0.98
    optimizer.weight_decay = 0.05
    optimizer.clip_norm = 1.0
    # Steps of linear warm-up, at most half of the run.
    optimizer.warmup_steps = 100
    # Shard the moments over the devices (ZeRO-1): less memory, as much is sent.
    optimizer.shard_state = False

    # Steps between log lines, evaluations on the validation split, and checkpoints. The last step
    # always evaluates and saves. eval_every = 0 leaves all evaluation to dqe_jax.evaluate --watch.
    config.log_every = 20
    config.eval_every = 500
    config.checkpoint_every = 500
    # Checkpoints kept: the newest ones; beside them those of every keep_period steps (0: none), and
    # the best by a metric of the validation split ("": none), of those at steps that evaluate.
    config.keep_checkpoints = 3
    config.keep_period = 0
    config.keep_best = ""
    # A step whose loss or gradients are not finite changes nothing; so many in a row end the run.
    config.max_bad_steps = 10

    config.eval = evaluation = ConfigDict()
    # Images or queries embedded at a time, over all devices.
    evaluation.batch_size = 256
    # Length of the ranked lists, at least 50.
    evaluation.top_k = 50
    # Split that the run is evaluated on at its end: "validation" where test has no labels.
    evaluation.split = "test"
    # Gallery of FashionIQ: "original" (the split files: CLIP4Cir, SPRC, QuRe) or "val" (only the
    # images of the queries: VAL, DQU-CIR). Their figures are not comparable.
    evaluation.protocol = "original"
    # Queries on the contact sheet.
    evaluation.sheet_queries = 10
    return config


def parse_variants(arg: str, known: tuple[str, ...]) -> set[str]:
    """The variants in the string after the config's file name, `configs/shapes.py:hard,smoke`."""
    variants = {name.strip() for name in arg.split(",") if name.strip()}
    if not variants <= set(known):
        unknown = ", ".join(sorted(variants - set(known)))
        raise ValueError(f"unknown variant {unknown} of the config; it has {', '.join(known)}")
    return variants


def use_blip2(config: ConfigDict) -> None:
    """BLIP-2 with EVA ViT-g/14: Q-Former, projections and attributes train, the tower does not."""
    config.data.image_size = 224
    config.data.preprocess = "target_pad"
    config.data.augment = "flip"
    config.data.captions = "random"
    config.eval.split = "validation"
    # As the CIR papers on BLIP-2 do.
    config.data.max_length = 32
    config.data.cache_images = False
    config.batch.references = 64
    config.batch.queries_per_reference = 2
    config.model.backbone = "blip2"
    config.model.weights = "Salesforce/blip2-itm-vit-g"
    config.model.dtype = "bfloat16"
    config.model.frozen = ("vision", "itm_head")
    config.model.frozen_dtype = "bfloat16"
    config.model.scan_layers = True
    config.model.attributes.width = 256
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 500


def use_products(config: ConfigDict) -> None:
    """The same model on `fashion_products`: real photos too, and FashionIQ is not needed."""
    config.data.dataset = "fashion_products"
    config.eval.split = "test"
    config.model.attributes.names = ("color", "article", "gender", "usage", "season")


def make_smoke(config: ConfigDict) -> None:
    """Shrinks a run to a few steps, and `tiny` to a small model: to see that everything works."""
    config.total_steps = 8
    config.log_every = 2
    config.negatives.first_refresh = config.negatives.refresh_every = 4
    config.eval_every = 4
    config.checkpoint_every = 4
    config.batch.references = 8
    config.model.tiny.width = 32
    config.model.tiny.image_depth = 1
    config.model.tiny.text_depth = 1
    config.model.tiny.composer_depth = 1
    config.model.tiny.token_dim = 8
    config.model.tiny.embed_dim = 32
    config.eval.sheet_queries = 4
