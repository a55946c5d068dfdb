"""A training step in PyTorch: the update that a config asks for, compiled or not."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import cast

import jax
import numpy as np
import torch
from flax.traverse_util import flatten_dict
from torch import Tensor

from dqe_jax.config import RunConfig
from dqe_jax.method.arrays import Params
from dqe_jax.method.batch import Batch
from dqe_jax.models import freeze
from dqe_jax.models.build import parts_of
from dqe_jax.models.weights.sizes import PretrainedSizes
from dqe_jax.models.weights.stacking import unstack_layers
from dqe_jax.performance.in_torch.copying import to_torch
from dqe_jax.performance.in_torch.model import DQE, Output
from dqe_jax.training.optimizer import EPSILON, make_schedule

# Of a batch, what the step reads.
_READ = (
    *("reference_image", "reference_id", "reference_mask", "text", "target_image", "target_id"),
    *("known_positives", "mentions", "query_mask"),
)
_INTEGERS = ("text",)  # indices, which PyTorch wants as int64


@dataclasses.dataclass
class TorchStep:
    """A model with its optimiser, ready to take steps.

    Attributes:
      model: with parameters copied from ours.
      optimizer: AdamW.
      schedule: of its learning rate.
      batch: on the device.
      clip_norm: of the gradients.
      autocast: gives the context of the forward pass.
      forward: the model, or what `torch.compile` makes of it.
    """

    model: DQE
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    batch: Mapping[str, Tensor]
    clip_norm: float
    autocast: Callable[[], contextlib.AbstractContextManager[None]]
    forward: Callable[[Mapping[str, Tensor]], tuple[Tensor, Output]]

    def step(self) -> None:
        """Takes a step; a GPU may not have finished it yet."""
        with self.autocast():
            loss, _ = self.forward(self.batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        training = [p for p in self.model.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(training, self.clip_norm)
        self.optimizer.step()
        self.schedule.step()

    def compiled(self) -> TorchStep:
        """The same model and optimiser, with the forward and backward pass by `torch.compile`."""
        return dataclasses.replace(self, forward=torch.compile(self.model))

    def run(self, steps: int) -> None:
        """Takes steps and waits for them."""
        for _ in range(steps):
            self.step()
        if self.batch["text"].is_cuda:
            torch.cuda.synchronize()


def device_for(platform: str) -> torch.device:
    """Where PyTorch works beside JAX on `platform`: the GPU, if both have it."""
    return torch.device("cuda" if platform == "gpu" and torch.cuda.is_available() else "cpu")


def set_threads(threads: int) -> None:
    """Lets PyTorch take as many threads as XLA does, and the same precision of float32 on GPUs."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")  # TF32, as XLA's default


def as_tensors(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """What a step reads of a batch of images and token ids."""
    arrays = {name: np.asarray(getattr(batch, name)) for name in _READ}
    references, queries = len(arrays["reference_id"]), len(arrays["target_id"])
    even = np.arange(queries) // (queries // references)
    arrays["reference"] = even if batch.reference is None else np.asarray(batch.reference)
    wide = (*_INTEGERS, "reference")
    return {
        name: torch.from_numpy(x.astype(np.int64) if name in wide else np.array(x)).to(device)
        for name, x in arrays.items()
    }


def make_model(
    config: RunConfig, params: Params, sizes: PretrainedSizes | None, vocab_size: int
) -> tuple[DQE, dict[str, str]]:
    """The model with our parameters; and the paths of these by the names of its own.

    Args:
      config: of a run.
      params: of its model.
      sizes: of a pretrained backbone, or None.
      vocab_size: of the backbone `tiny`.
    """
    model = DQE(config, sizes, vocab_size)
    tensors, paths = to_torch(params, sizes)
    model.load_state_dict(tensors)  # strict: all of them, and no other
    return model, paths


def make_torch_step(
    config: RunConfig,
    params: Params,
    sizes: PretrainedSizes | None,
    vocab_size: int,
    batch: Batch,
    device: torch.device,
) -> TorchStep:
    """A step of a config, not compiled.

    Args:
      config: of a run.
      params: that it starts from.
      sizes: of a pretrained backbone, or None.
      vocab_size: of the backbone `tiny`.
      batch: of images and token ids.
      device: to work on.
    """
    model, paths = make_model(config, params, sizes, vocab_size)
    parts, frozen = parts_of(config.model.backbone), config.model.frozen
    half = config.model.dtype == "bfloat16"
    decays: dict[bool, list[Tensor]] = {True: [], False: []}
    axes = {p: x.ndim for p, x in flatten_dict(unstack_layers(params), sep="/").items()}
    for name, parameter in model.named_parameters():
        path = paths[name]
        if freeze.part_of(path, parts) in frozen:
            parameter.requires_grad_(False)
            if config.model.frozen_dtype == "bfloat16":
                parameter.data = parameter.data.bfloat16()
        else:
            decays[axes[path] > 1].append(parameter)
    model.to(device).train()
    o = config.optimizer
    groups = [
        {"params": own, "weight_decay": o.weight_decay if matrix else 0.0}
        for matrix, own in decays.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(o.b1, o.b2), eps=EPSILON, fused=True)
    rate = make_schedule(o, config.total_steps)
    rates = np.asarray(jax.vmap(rate)(np.arange(config.total_steps)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: float(rates[min(step, len(rates) - 1)])
    )

    def autocast() -> contextlib.AbstractContextManager[None]:
        if not half:
            return contextlib.nullcontext()
        return cast(
            contextlib.AbstractContextManager[None], torch.autocast(device.type, torch.bfloat16)
        )

    return TorchStep(
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        batch=as_tensors(batch, device),
        clip_norm=o.clip_norm,
        autocast=autocast,
        forward=model,
    )


def graph_breaks() -> int:
    """Places at which `torch.compile` has left compiled code so far."""
    from torch._dynamo.utils import counters

    return sum(counters["graph_break"].values())


def forward_once(
    config: RunConfig,
    params: Params,
    sizes: PretrainedSizes | None,
    vocab_size: int,
    batch: Batch,
    device: torch.device,
) -> dict[str, np.ndarray]:
    """What the model makes of a batch without dropout: "query", "reference", "target", "loss"."""
    model, _ = make_model(config, params, sizes, vocab_size)
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    with torch.no_grad():
        loss, out = model.to(device).eval()(as_tensors(batch, device))
    torch.set_float32_matmul_precision("high")
    arrays = {"query": out.query, "reference": out.reference, "target": out.target, "loss": loss}
    return {name: x.float().cpu().numpy() for name, x in arrays.items()}
