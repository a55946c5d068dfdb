"""Writes a trained model in Hugging Face layout."""

from __future__ import annotations

import json
import pathlib

import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from dqe_jax.method.arrays import Params
from dqe_jax.models.clip import ClipSizes
from dqe_jax.models.dino import V2, V3, DinoSizes, swiglu_width
from dqe_jax.models.given import GivenSizes
from dqe_jax.models.siglip import SiglipSizes
from dqe_jax.models.weights import sizes as size_files
from dqe_jax.models.weights.rules import layouts_of
from dqe_jax.models.weights.source import PROCESSOR, SINGLE, TEXT
from dqe_jax.models.weights.stacking import unstack_layers
from dqe_jax.models.weights.transfer import write_backbone
from dqe_jax.utils.files import JsonObject

METADATA = {"format": "pt"}


def config_of(sizes: size_files.PretrainedSizes) -> JsonObject | None:
    """A `config.json` of these sizes; None if no Hugging Face model has this shape."""
    vision = {
        "image_size": sizes.vision.image_size,
        "patch_size": sizes.vision.patch_size,
        "hidden_size": sizes.vision.width,
        "num_hidden_layers": sizes.vision.depth,
        "num_attention_heads": sizes.vision.heads,
        "intermediate_size": sizes.vision.mlp_dim,
        "hidden_act": sizes.vision.activation,
        "layer_norm_eps": sizes.vision.epsilon,
    }
    if isinstance(sizes, DinoSizes):
        return _dino(sizes, vision)
    if isinstance(sizes, ClipSizes | SiglipSizes):
        text = {
            "hidden_size": sizes.text_width,
            "num_hidden_layers": sizes.text_depth,
            "num_attention_heads": sizes.text_heads,
            "intermediate_size": sizes.text_mlp_dim,
            "hidden_act": sizes.text_activation,
            "layer_norm_eps": sizes.text_epsilon,
            "vocab_size": sizes.vocab_size,
            "max_position_embeddings": sizes.max_length,
        }
    if isinstance(sizes, ClipSizes):
        return {
            "architectures": [layouts_of(sizes)[0].name],
            "model_type": sizes.family,
            "projection_dim": sizes.embed_dim,
            "text_config": text | {"eos_token_id": sizes.end_id, "projection_dim": sizes.embed_dim},
            "vision_config": vision | {"projection_dim": sizes.embed_dim},
        }
    if isinstance(sizes, SiglipSizes):
        return {
            "architectures": ["SiglipModel"],
            "model_type": "siglip",
            "text_config": text
            | {"projection_size": sizes.embed_dim, "pad_token_id": sizes.pad_id},
            "vision_config": vision,
        }
    if sizes.vision.pre_norm:
        return None
    qformer = {
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.heads,
        "intermediate_size": sizes.mlp_dim,
        "hidden_act": sizes.activation,
        "layer_norm_eps": sizes.epsilon,
        "cross_attention_frequency": sizes.cross_every,
        "encoder_hidden_size": sizes.vision.width,
        "vocab_size": sizes.vocab_size,
        "max_position_embeddings": sizes.max_length,
        "use_qformer_text_input": True,
    }
    return {
        "architectures": ["Blip2ForImageTextRetrieval"],
        "model_type": "blip-2",
        "num_query_tokens": sizes.num_queries,
        "image_text_hidden_size": sizes.embed_dim,
        "qformer_config": qformer,
        "vision_config": vision | {"qkv_bias": sizes.vision.qkv_bias},
    }


def _dino(sizes: DinoSizes, vision: JsonObject) -> JsonObject:
    """A `config.json` of a DINO tower; `vision` has what all towers have."""
    tower, third = sizes.vision, sizes.family == V3
    fields = dict(vision)
    if third:
        fields |= {
            "query_bias": tower.qkv_bias,
            "key_bias": tower.qkv_bias and tower.key_bias,
            "value_bias": tower.qkv_bias,
            "use_gated_mlp": tower.gated,
            "rope_theta": tower.rotary_base,
        }
    else:
        del fields["intermediate_size"]
        # The files hold the width inside the MLP as a whole multiple of the width.
        ratio = tower.mlp_dim // tower.width
        if tower.gated:
            ratio = next(r for r in range(1, 100) if swiglu_width(tower.width, r) >= tower.mlp_dim)
        fields |= {
            "mlp_ratio": ratio,
            "qkv_bias": tower.qkv_bias,
            "use_swiglu_ffn": tower.gated,
        }
        if tower.gated:
            fields["hidden_act"] = "gelu"  # which SwiGLU does not read
    if sizes.family == V2:
        fields["use_mask_token"] = False
    else:
        fields["num_register_tokens"] = tower.registers
    return {
        "architectures": [layouts_of(sizes)[0].name],
        "model_type": sizes.family,
        **fields,
    }


def text_config_of(sizes: ClipSizes | SiglipSizes) -> JsonObject:
    """A `config.json` of the text tower of a model alone."""
    config = config_of(sizes)
    assert config is not None, "transformers has both"
    kind = "SiglipTextModel" if isinstance(sizes, SiglipSizes) else "CLIPTextModelWithProjection"
    if isinstance(sizes, ClipSizes) and sizes.family == "metaclip_2":
        kind = "MetaClip2TextModelWithProjection"
    return config | {"architectures": [kind]}


def processor_of(sizes: size_files.PretrainedSizes, image_size: int) -> JsonObject:
    """A `preprocessor_config.json`: size, mean and standard deviation of the pixels."""
    whole = isinstance(sizes, SiglipSizes)  # which does not cut
    square = {"height": image_size, "width": image_size}
    return {
        "image_processor_type": "SiglipImageProcessor" if whole else "CLIPImageProcessor",
        "do_resize": True,
        "size": square if whole else {"shortest_edge": image_size},
        "do_center_crop": not whole,
        "crop_size": square,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(sizes.vision.pixel_mean),
        "image_std": list(sizes.vision.pixel_std),
        "do_convert_rgb": True,
    }


def write(directory: pathlib.Path, params: Params, meta: JsonObject) -> tuple[int, int]:
    """Writes a model; returns the numbers of tensors in Hugging Face layout and of our own.

    Args:
      directory: made if it does not exist.
      params: of the whole model, arrays.
      meta: of its checkpoint.

    Raises:
      OSError: the directory cannot be written to.
    """
    sizes = size_files.from_json(meta["config"]["model"]["backbone"], meta["sizes"])
    assert not isinstance(sizes, GivenSizes), "features have no encoder to export"
    flat = flatten_dict(unstack_layers(params), sep="/")
    prefix = "backbone/"
    own = {path[len(prefix) :]: x for path, x in flat.items() if path.startswith(prefix)}
    tensors = write_backbone(own, sizes)
    theirs = {prefix + rule.path for rule in layouts_of(sizes)[0].rules}
    ours = {
        path: np.array(x, np.float32, order="C") for path, x in flat.items() if path not in theirs
    }
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(sizes, DinoSizes):
        texts = {name: x for name, x in tensors.items() if name.startswith("text_")}
        images = {name: x for name, x in tensors.items() if name not in texts}
        (directory / TEXT).mkdir(exist_ok=True)
        save_file(images, directory / SINGLE, metadata=METADATA)
        save_file(texts, directory / TEXT / SINGLE, metadata=METADATA)
        content = json.dumps(text_config_of(sizes.text), indent=2)
        (directory / TEXT / "config.json").write_text(content + "\n")
    else:
        save_file(tensors, directory / SINGLE, metadata=METADATA)
    save_file(ours, directory / "dqe.safetensors")
    config = config_of(sizes)
    if config is None:
        logging.warning("transformers has no model of this shape: there is no config.json.")
    else:
        # The sizes say what the weights were trained at; the run may use other images.
        vision = config if isinstance(sizes, DinoSizes) else config["vision_config"]
        vision["image_size"] = meta["config"]["data"]["image_size"]
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if isinstance(sizes, ClipSizes | SiglipSizes | DinoSizes):
            processor = processor_of(sizes, meta["config"]["data"]["image_size"])
            (directory / PROCESSOR).write_text(json.dumps(processor, indent=2) + "\n")
    if meta.get("tokenizer"):
        (directory / "tokenizer.json").write_text(meta["tokenizer"])
        if isinstance(sizes, DinoSizes):
            (directory / TEXT / "tokenizer.json").write_text(meta["tokenizer"])
    return len(tensors), len(ours)
