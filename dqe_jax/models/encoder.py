"""The pre-norm transformer of the towers of CLIP, SigLIP, EVA ViT-g and DINO, for their weights.

Normalisation and softmax run in float32 whatever the compute dtype.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, UInt8

from dqe_jax.method.arrays import Array

# Mean and standard deviation of CLIP's and BLIP-2's training images, of 0 to 1.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

_tanh_gelu = functools.partial(jax.nn.gelu, approximate=True)
# By the names of `transformers`, which has several for the same function.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": _tanh_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "silu": jax.nn.silu,
}
# Cosines and sines `[P, size]` by which queries and keys of patches are turned.
Rotation = tuple[Float[Array, "P size"], Float[Array, "P size"]]
# Pixels a side of square images, or height and width.
ImageSize = int | tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a model is computed, not what it computes.

    Attributes:
      dtype: of matrix products and of the residual stream.
      attention: "xla", or "cudnn" for flash attention on NVIDIA GPUs, in bfloat16 or float16.
      remat: recompute the inside of each layer in the backward pass, to save memory.
      scan: one compiled layer looped over stacked parameters: compiles faster.
    """

    dtype: DTypeLike = jnp.float32
    attention: str = "xla"
    remat: bool = False
    scan: bool = False


def flash_takes(
    q: Array | jax.ShapeDtypeStruct,
    k: Array | jax.ShapeDtypeStruct,
    mask: Array | jax.ShapeDtypeStruct | None,
) -> bool:
    """Whether cuDNN's flash attention takes queries `[B, L, heads, size]`, keys `[B, S, ...]`.

    It wants half precision, head sizes that are multiples of 8 up to 128, and, to train with a
    mask, even lengths.
    """
    size = q.shape[-1]
    even = q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0
    return q.dtype.itemsize == 2 and size % 8 == 0 and size <= 128 and (mask is None or even)


def rotation_of(grid: tuple[int, int], size: int, base: float) -> Rotation:
    """Rotary positions of the patches of a grid, for heads of `size`, which 4 divides.

    A quarter of the angles is of a patch's row, a quarter of its column, and both come twice.
    Places run from -1 to 1 whatever the grid (Simeoni et al., "DINOv3", 2025, section 3.2).

    Args:
      grid: rows and columns.
      size: of a head.
      base: longest period.
    """
    rows, columns = ((np.arange(count) + 0.5) / count * 2 - 1 for count in grid)
    places = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
    frequencies = base ** -(np.arange(size // 4) * 4 / size)
    angles = 2 * np.pi * places[:, :, None] * frequencies  # [P, 2, size / 4]
    angles = np.tile(angles.reshape(len(places), -1), 2)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotated(
    x: Float[Array, "B L heads size"], rotation: Rotation
) -> Float[Array, "B L heads size"]:
    """Queries or keys with the last P tokens, the patches, turned by their places."""
    cos, sin = (jnp.asarray(part, x.dtype)[:, None] for part in rotation)
    first = x.shape[1] - len(cos)
    patches = x[:, first:]
    one, other = jnp.split(patches, 2, axis=-1)
    patches = patches * cos + jnp.concatenate([-other, one], axis=-1) * sin
    return jnp.concatenate([x[:, :first], patches], axis=1)


def attend(
    q: Float[Array, "B L D"],
    k: Float[Array, "B S D"],
    v: Float[Array, "B S D"],
    heads: int,
    compute: Compute,
    *,
    mask: Bool[Array, "B S"] | None = None,
    causal: bool = False,
    rotation: Rotation | None = None,
) -> Float[Array, "B L D"]:
    """Multi-head attention of projected queries over keys and values.

    Args:
      q: queries.
      k: keys.
      v: values.
      heads: number of heads; divides D.
      compute: says which implementation.
      mask: false for keys that none attends to.
      causal: a query attends to keys up to its own place.
      rotation: of the patches, which come last.
    """
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    if rotation is not None:
        q, k = rotated(q, rotation), rotated(k, rotation)
    flash = compute.attention == "cudnn" and flash_takes(q, k, mask)
    if mask is not None:
        mask = mask[:, None, None, :]
        if flash:  # cuDNN does not broadcast over the queries
            mask = jnp.broadcast_to(mask, (*mask.shape[:2], q.shape[1], k.shape[1]))
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=causal, implementation="cudnn" if flash else "xla"
    )
    return out.reshape(*out.shape[:2], -1)


class EncoderLayer(nn.Module):
    """Pre-norm layer: self-attention, then an MLP.

    Attributes:
      heads: attention heads.
      mlp_dim: width inside the MLP.
      activation: a name of `ACTIVATIONS`.
      epsilon: of the norms.
      qkv_bias: whether queries, keys and values have a bias.
      key_bias: whether keys have one where queries and values do.
      layer_scale: whether what a layer adds is multiplied by learned factors (DINO).
      gated: whether half of the MLP multiplies the other half (SwiGLU).
      causal: whether a token attends to earlier ones only.
      compute: see `Compute`.
    """

    heads: int
    mlp_dim: int
    activation: str
    epsilon: float
    qkv_bias: bool = True
    key_bias: bool = True
    layer_scale: bool = False
    gated: bool = False
    causal: bool = False
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], rotation: Rotation | None = None
    ) -> Float[Array, "B L D"]:
        """Maps tokens to tokens."""
        dtype, width = self.compute.dtype, x.shape[-1]
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        y = nn.LayerNorm(self.epsilon, dtype=dtype, name="norm_attention")(x)
        whole = self.qkv_bias and self.key_bias
        y = nn.Dense(3 * width, use_bias=whole, dtype=dtype, name="qkv")(y)
        q, k, v = jnp.split(y, 3, axis=-1)
        if self.qkv_bias and not self.key_bias:
            q = q + self.param("query_bias", zeros, (width,)).astype(dtype)
            v = v + self.param("value_bias", zeros, (width,)).astype(dtype)
        y = attend(q, k, v, self.heads, self.compute, causal=self.causal, rotation=rotation)
        y = nn.Dense(width, dtype=dtype, name="out")(y)
        if self.layer_scale:
            y = y * self.param("scale_attention", ones, (width,)).astype(dtype)
        x = x + y
        y = nn.LayerNorm(self.epsilon, dtype=dtype, name="norm_mlp")(x)
        y = nn.Dense((1 + self.gated) * self.mlp_dim, dtype=dtype, name="mlp_in")(y)
        if self.gated:
            gate, y = jnp.split(y, 2, axis=-1)
            y = ACTIVATIONS[self.activation](gate) * y
        else:
            y = ACTIVATIONS[self.activation](y)
        y = nn.Dense(width, dtype=dtype, name="mlp_out")(y)
        if self.layer_scale:
            y = y * self.param("scale_mlp", ones, (width,)).astype(dtype)
        return x + y


class Stack(nn.Module):
    """`depth` layers, the children `layers_0` ...; or one child `layers` with a leading axis.

    Attributes:
      depth: number of layers, at least 1.
      layer: arguments of `EncoderLayer`, all but `compute`.
      compute: see `Compute`.
    """

    depth: int
    layer: Mapping[str, Any]
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], rotation: Rotation | None = None
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"]]:
        """Returns what leaves the last layer, and what enters it; `rotation`: see `attend`."""
        scan = self.compute.scan
        cls = nn.remat(EncoderLayer, prevent_cse=not scan) if self.compute.remat else EncoderLayer
        make = functools.partial(cls, **self.layer, compute=self.compute)
        before = x
        if not scan:
            for i in range(self.depth):
                before, x = x, make(name=f"layers_{i}")(x, rotation)
            return x, before

        def step(
            layer: EncoderLayer, carry: tuple[Array, Array], _: None
        ) -> tuple[tuple[Array, Array], None]:
            return (layer(carry[0], rotation), carry[0]), None

        loop = nn.scan(
            step, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth
        )
        (x, before), _ = loop(make(name="layers"), (x, before), None)
        return x, before


@dataclasses.dataclass(frozen=True)
class VisionSizes:
    """Sizes of a vision tower.

    Attributes:
      image_size: pixels a side that the weights were trained at.
      patch_size: pixels a side of a patch.
      width: `D`.
      depth: layers.
      heads: attention heads.
      mlp_dim: width inside the MLPs.
      activation: a name of `ACTIVATIONS`.
      epsilon: of the norms.
      pre_norm: a norm before the first layer (CLIP).
      patch_bias: the patch embedding has a bias (EVA, SigLIP).
      qkv_bias: queries, keys and values have a bias.
      class_token: a token before the patches (all but SigLIP).
      registers: learned tokens between it and the patches, without a position (DINO).
      key_bias: keys have a bias where queries and values do (all but DINOv3).
      layer_scale: as of `EncoderLayer` (DINO).
      gated: likewise (DINO's largest towers).
      rotary_base: longest period of rotary positions (DINOv3); 0 for learned positions.
      antialias: learned positions of a larger grid are smoothed when they become those of a smaller
        one (DINOv2 with registers).
      pixel_mean: of red, green and blue in the images of the training, of 0 to 1.
      pixel_std: likewise, their standard deviation.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    activation: str
    epsilon: float
    pre_norm: bool
    patch_bias: bool
    qkv_bias: bool = True
    class_token: bool = True
    registers: int = 0
    key_bias: bool = True
    layer_scale: bool = False
    gated: bool = False
    rotary_base: float = 0.0
    antialias: bool = False
    pixel_mean: tuple[float, float, float] = PIXEL_MEAN
    pixel_std: tuple[float, float, float] = PIXEL_STD


def grid_of(image_size: ImageSize, patch_size: int) -> tuple[int, int]:
    """Rows and columns of whole patches."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return height // patch_size, width // patch_size


def patches_of(
    image: UInt8[Array, "B H W 3"],
    patch_size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: DTypeLike,
) -> Float[Array, "B P cell"]:
    """Standardized pixels of each patch, row by row: `cell = patch_size * patch_size * 3`.

    Pixels that fill no patch, at the right and at the bottom, are left out.
    """
    p = patch_size
    batch, height, width, _ = image.shape
    rows, columns = grid_of((height, width), p)
    x = image[:, : rows * p, : columns * p].astype(jnp.float32)
    x = (x / 255 - jnp.array(mean)) / jnp.array(std)
    x = x.astype(dtype).reshape(batch, rows, p, columns, p, 3)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, p * p * 3)


class VisionTower(nn.Module):
    """A ViT. Before the patches come a class token and registers, where the sizes say so.

    Attributes:
      sizes: see `VisionSizes`.
      image_size: of the images it gets; decides the number of positions.
      compute: see `Compute`.
    """

    sizes: VisionSizes
    image_size: ImageSize
    compute: Compute = Compute()

    def setup(self) -> None:
        """Creates the submodules."""
        s, dtype = self.sizes, self.compute.dtype
        normal = nn.initializers.normal(0.02)
        self.patches = nn.Dense(s.width, use_bias=s.patch_bias, dtype=dtype)
        rows, columns = grid_of(self.image_size, s.patch_size)
        count = rows * columns + s.class_token
        if s.class_token:
            self.class_token = self.param("class_token", normal, (s.width,))
        if s.registers:
            self.registers = self.param("registers", normal, (s.registers, s.width))
        if not s.rotary_base:
            self.positions = self.param("positions", normal, (count, s.width))
        if s.pre_norm:
            self.pre_norm = nn.LayerNorm(s.epsilon, dtype=dtype)
        layer = dict(
            heads=s.heads,
            mlp_dim=s.mlp_dim,
            activation=s.activation,
            epsilon=s.epsilon,
            qkv_bias=s.qkv_bias,
            key_bias=s.key_bias,
            layer_scale=s.layer_scale,
            gated=s.gated,
        )
        self.encoder = Stack(s.depth, layer, self.compute)
        self.post_norm = nn.LayerNorm(s.epsilon, dtype=dtype)

    def __call__(
        self, image: UInt8[Array, "B H W 3"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        """Images to the tokens after and before the last layer.

        `T` is the number of patches and of the tokens before them: the class token, which comes
        first, and registers. The norm behind the tower is not in them.
        """
        s, dtype = self.sizes, self.compute.dtype
        x = self.patches(patches_of(image, s.patch_size, s.pixel_mean, s.pixel_std, dtype))
        if s.class_token:
            first = jnp.broadcast_to(self.class_token.astype(dtype), (len(x), 1, x.shape[-1]))
            x = jnp.concatenate([first, x], axis=1)
        rotation = None
        if s.rotary_base:
            height, width = image.shape[1:3]
            grid = grid_of((height, width), s.patch_size)
            rotation = rotation_of(grid, s.width // s.heads, s.rotary_base)
        else:
            x = x + self.positions.astype(dtype)
        if s.registers:
            own = jnp.broadcast_to(self.registers.astype(dtype), (len(x), *self.registers.shape))
            before = int(s.class_token)
            x = jnp.concatenate([x[:, :before], own, x[:, before:]], axis=1)
        if s.pre_norm:
            x = self.pre_norm(x)
        return self.encoder(x, rotation)

    def norm(self, tokens: Float[Array, "*axes D"]) -> Float[Array, "*axes D"]:
        """The norm behind the tower."""
        return self.post_norm(tokens)
