"""Small models of `transformers` with random weights, and what PyTorch computes with them.

Needs PyTorch. `write_golden(pathlib.Path("tests/golden"))` writes the golden files, with which the
same comparison runs where PyTorch is not installed; `names` chooses some of them.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from safetensors.numpy import save_file

if TYPE_CHECKING:
    import torch
    import transformers

_Model = TypeVar("_Model", bound="torch.nn.Module")

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SIZE, END = 32, 49
DINO = ("dinov2", "dinov2_with_registers", "dinov3_vit")


def small_clip(
    activation: str = "quick_gelu", end_id: int = END, **vision: object
) -> transformers.CLIPModel:
    """A `CLIPModel` of a few thousand parameters; `vision` changes its image tower."""
    import transformers

    text = dict(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        vocab_size=50,
        max_position_embeddings=12,
        projection_dim=8,
        eos_token_id=end_id,
        bos_token_id=48,
        hidden_act=activation,
    )
    tower: dict[str, object] = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
        hidden_act=activation,
        projection_dim=8,
    )
    config = transformers.CLIPConfig(
        text_config=text, vision_config=tower | vision, projection_dim=8
    )
    return randomize(transformers.CLIPModel(config))


def small_metaclip_2() -> transformers.MetaClip2Model:
    """A `MetaClip2Model` as small as `small_clip`; 2 ends its texts, as in published ones."""
    import transformers

    config = small_clip(end_id=2).config.to_dict()
    towers = {
        name: {field: x for field, x in config[name].items() if field != "model_type"}
        for name in ("text_config", "vision_config")
    }
    own = transformers.MetaClip2Config(
        text_config=towers["text_config"],
        vision_config=towers["vision_config"],
        projection_dim=config["projection_dim"],
    )
    return randomize(transformers.MetaClip2Model(own))


def small_siglip(
    activation: str = "gelu_pytorch_tanh", text_width: int = 24, **vision: object
) -> transformers.SiglipModel:
    """A `SiglipModel` of a few thousand parameters; `vision` changes its image tower."""
    import transformers

    tower: dict[str, object] = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
        hidden_act=activation,
    )
    tower |= vision
    text = dict(
        hidden_size=text_width,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        vocab_size=50,
        max_position_embeddings=12,
        projection_size=tower["hidden_size"],
        hidden_act=activation,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    config = transformers.SiglipConfig(text_config=text, vision_config=tower)
    return randomize(transformers.SiglipModel(config))


def small_dino(family: str = "dinov2", **fields: object) -> Any:
    """A DINO model of a few thousand parameters, of a `model_type` of `transformers`."""
    import transformers

    config: dict[str, object] = dict(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
    )
    kinds: dict[str, tuple[Any, Any]] = {
        "dinov2": (transformers.Dinov2Config, transformers.Dinov2Model),
        "dinov2_with_registers": (
            transformers.Dinov2WithRegistersConfig,
            transformers.Dinov2WithRegistersModel,
        ),
        "dinov3_vit": (transformers.DINOv3ViTConfig, transformers.DINOv3ViTModel),
    }
    if family == "dinov3_vit":
        config |= {"intermediate_size": 32, "num_register_tokens": 2}
    else:
        config |= {"mlp_ratio": 2}
    if family == "dinov2_with_registers":
        config |= {"num_register_tokens": 3}
    settings, kind = kinds[family]
    return randomize(kind(settings(**config | fields)))


def small_blip2(
    qkv_bias: bool = True, query_tokens: int = 4
) -> transformers.Blip2ForImageTextRetrieval:
    """A `Blip2ForImageTextRetrieval` of a few thousand parameters."""
    import transformers

    vision = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
        qkv_bias=qkv_bias,
    )
    qformer = dict(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=3,
        vocab_size=50,
        max_position_embeddings=12,
        encoder_hidden_size=16,
        use_qformer_text_input=True,
    )
    config = transformers.Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        num_query_tokens=query_tokens,
        image_text_hidden_size=8,
    )
    return randomize(transformers.Blip2ForImageTextRetrieval(config))


def randomize(model: _Model, seed: int = 0, scale: float = 0.2) -> _Model:
    """Every parameter gets values: some start at zero, which would hide mistakes."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs(
    texts: int = 4,
    images: int = 3,
    size: int = SIZE,
    vocab: int = 50,
    end: int = END,
    length: int = 10,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 and token ids of texts of different lengths, padded with 0."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (images, size, size, 3), np.uint8)
    ids = np.zeros((texts, length), np.int64)
    for row, count in enumerate(np.linspace(2, length, texts).astype(int)):
        ids[row, :count] = rng.integers(1, min(vocab, end) - 1, count)
        ids[row, count - 1] = end
    return image, ids


def pixels(
    image: np.ndarray, mean: Sequence[float] = MEAN, std: Sequence[float] = STD
) -> torch.Tensor:
    """What the vision towers of `transformers` get of images uint8."""
    import torch

    middle, spread = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    x = (image.astype(np.float32) / 255 - middle) / spread
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def clip_outputs(
    model: transformers.CLIPModel, image: np.ndarray, ids: np.ndarray, **kwargs: bool
) -> dict[str, torch.Tensor]:
    """What `CLIPModel` gives, by the names that the tests use; `kwargs` go to its image tower."""
    import torch

    words, config = torch.from_numpy(ids), cast(Any, model.config)
    # The mask is as a tokenizer makes it: true up to and including the end of the text.
    ends = torch.eq(words, config.text_config.eos_token_id).int().argmax(1)
    mask = (torch.arange(words.shape[1])[None] <= ends[:, None]).long()
    vision = model.vision_model(pixels(image), output_hidden_states=True, **kwargs)
    text = model.text_model(words, attention_mask=mask)
    images = model.visual_projection(vision.pooler_output)
    texts = model.text_projection(text.pooler_output)
    unit = torch.nn.functional.normalize
    return {
        "last": vision.hidden_states[-1],
        "penultimate": vision.hidden_states[-2],
        "image": images,
        "text_tokens": text.last_hidden_state * mask[..., None],
        "text": texts,
        "scores": model.logit_scale.exp() * unit(images, dim=-1) @ unit(texts, dim=-1).T,
    }


def siglip_outputs(
    model: transformers.SiglipModel, image: np.ndarray, ids: np.ndarray, **kwargs: bool
) -> dict[str, torch.Tensor]:
    """What `SiglipModel` gives of texts that are padded with 0; `kwargs` go to its image tower."""
    import torch

    config = cast(Any, model.config)
    missing = config.text_config.max_position_embeddings - ids.shape[1]
    words = torch.from_numpy(np.pad(ids, ((0, 0), (0, missing))))
    half = (0.5, 0.5, 0.5)
    vision = model.vision_model(pixels(image, half, half), output_hidden_states=True, **kwargs)
    text = model.text_model(words)
    images, texts = vision.pooler_output, text.pooler_output
    mask = torch.from_numpy(ids != 0)[..., None]
    unit = torch.nn.functional.normalize
    cosines = unit(images, dim=-1) @ unit(texts, dim=-1).T
    return {
        "last": vision.last_hidden_state,
        "penultimate": vision.hidden_states[-2],
        "image": images,
        "text_tokens": text.last_hidden_state[:, : ids.shape[1]] * mask,
        "text": texts,
        "scores": cosines * model.logit_scale.exp() + model.logit_bias,
    }


def dino_outputs(model: Any, image: np.ndarray, ids: np.ndarray) -> dict[str, torch.Tensor]:
    """What a DINO model gives of images; it reads no texts."""
    del ids
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    out = model(pixels(image, mean, std), output_hidden_states=True)
    return {
        "last": out.last_hidden_state,
        "penultimate": out.hidden_states[-2],
        "pooled": out.pooler_output,
    }


def blip2_outputs(
    model: transformers.Blip2ForImageTextRetrieval, image: np.ndarray, ids: np.ndarray
) -> dict[str, torch.Tensor]:
    """What the three paths of `Blip2ForImageTextRetrieval` give.

    The multimodal path takes the first texts, one for each image.
    """
    import torch

    words = torch.from_numpy(ids)
    mask = (words > 0).long()
    tokens = model.vision_model(pixels(image)).last_hidden_state
    count = model.config.num_query_tokens
    queries = model.query_tokens.expand(len(image), -1, -1)
    gallery = model.qformer(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state
    text = model.qformer(
        query_embeds=model.embeddings(input_ids=words), query_length=0, attention_mask=mask
    ).last_hidden_state
    paired, paired_mask = words[: len(image)], mask[: len(image)]
    fused = model.qformer(
        query_embeds=model.embeddings(input_ids=paired, query_embeds=queries),
        query_length=count,
        attention_mask=torch.cat([torch.ones(len(image), count).long(), paired_mask], 1),
        encoder_hidden_states=tokens,
    ).last_hidden_state[:, :count]
    return {
        "tokens": tokens,
        "gallery": model.vision_projection(gallery),
        "text_tokens": text * mask[..., None],
        "text": model.text_projection(text[:, 0]),
        "fused": fused,
        "composed": model.vision_projection(fused).mean(1),
        "scores": model(pixels(image), words, mask).logits_per_image,
        "matching": model(
            pixels(image), paired, paired_mask, use_image_text_matching_head=True
        ).logits_per_image,
    }


MODELS: dict[str, tuple[Callable[[], Any], Callable[..., dict[str, torch.Tensor]]]] = {
    "clip": (small_clip, clip_outputs),
    "siglip": (small_siglip, siglip_outputs),
    "blip2": (small_blip2, blip2_outputs),
    **{family: (functools.partial(small_dino, family), dino_outputs) for family in DINO},
}


# The outputs whose weighted sum is differentiated.
DIFFERENTIATED = {
    "clip": ("image", "text", "scores"),
    "siglip": ("image", "text", "scores"),
    "blip2": ("gallery", "text", "composed", "matching"),
    **{family: ("last", "pooled") for family in DINO},
}


def write_gradients(directory: pathlib.Path, names: Sequence[str] = tuple(MODELS)) -> None:
    """Writes gradients of the models in `tests/golden/`, by the names of PyTorch's parameters.

    They are of a sum of the outputs in `DIFFERENTIATED`, with random weights that are in the file
    too, as `weights_of_...`.
    """
    import torch
    import transformers

    classes: dict[str, Any] = {
        "clip": transformers.CLIPModel,
        "siglip": transformers.SiglipModel,
        "blip2": transformers.Blip2ForImageTextRetrieval,
        **dict.fromkeys(MODELS.keys() - {"clip", "siglip", "blip2"}, transformers.AutoModel),
    }
    for name in names:
        outputs_of = MODELS[name][1]
        model = classes[name].from_pretrained(directory / name).eval()
        image, ids = inputs(texts=3, images=3)
        outputs, rng = outputs_of(model, image, ids), np.random.default_rng(0)
        weights = {
            key: rng.normal(size=tuple(outputs[key].shape)).astype(np.float32)
            for key in DIFFERENTIATED[name]
        }
        terms = [(outputs[key] * torch.from_numpy(x)).sum() for key, x in weights.items()]
        torch.stack(terms).sum().backward()
        arrays = {
            path: np.ascontiguousarray(p.grad.numpy())
            for path, p in model.named_parameters()
            if p.grad is not None
        }
        arrays |= {f"weights_of_{key}": x for key, x in weights.items()}
        save_file(
            arrays | {"input_image": image, "input_ids": ids},
            directory / f"{name}_gradients.safetensors",
        )


def write_golden(directory: pathlib.Path, names: Sequence[str] = tuple(MODELS)) -> None:
    """Writes each small model, its inputs, outputs and gradients: the files of `tests/golden/`."""
    import torch

    for name in names:
        make, outputs_of = MODELS[name]
        model = make()
        model.save_pretrained(directory / name)
        image, ids = inputs()
        with torch.no_grad():
            outputs = outputs_of(model, image, ids)
        arrays = {key: np.ascontiguousarray(x.numpy()) for key, x in outputs.items()}
        save_file(
            arrays | {"input_image": image, "input_ids": ids},
            directory / f"{name}_outputs.safetensors",
        )
    write_gradients(directory, names)
