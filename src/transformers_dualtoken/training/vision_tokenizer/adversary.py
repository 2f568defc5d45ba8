"""The discriminator's side of tokenizer training: its optimizer, its schedule, its start and its checkpoints."""

import contextlib
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainingArguments

from ..checkpoints import checkpoint_file
from .discriminator import PatchDiscriminator, discriminator_loss
from .recipe import DualTokenVisionTokenizerRecipe


_WEIGHTS_NAME = "discriminator.safetensors"
_STATE_NAME = "discriminator_optimizer.pt"

# Bounds of the adaptive weight (code).
ADAPTIVE_WEIGHT_RANGE = (0.3, 10.0)


class Adversary:
    """
    A discriminator in training beside the tokenizer.

    Its steps use the reconstructions made before the tokenizer's step, as the authors' code does, and accumulate over
    the same micro-batches. Adam without weight decay; the rate warms up linearly from its first step on and falls
    along a cosine until the end of training, after `max_steps` steps of the tokenizer. What the recipe leaves open is
    of `args`, or derived from `steps_per_epoch`.
    """

    def __init__(
        self,
        recipe: DualTokenVisionTokenizerRecipe,
        accelerator: Accelerator,
        args: TrainingArguments,
        max_steps: int,
        steps_per_epoch: int | None,
    ):
        self.recipe, self.accelerator, self.args, self.max_steps = recipe, accelerator, args, max_steps
        self.peak_rate = recipe.discriminator_learning_rate or args.learning_rate
        if self.peak_rate <= 0:
            raise ValueError(f"The discriminator needs a learning rate above 0, got {self.peak_rate}.")
        steps_per_epoch = recipe.steps_per_epoch or steps_per_epoch
        steps = recipe.discriminator_start_step, recipe.discriminator_warmup_steps
        if steps_per_epoch is None and None in steps:
            raise ValueError(
                "The adversary starts in the middle of the first epoch, but the length of a stream is unknown: give "
                "`steps_per_epoch`, or both `discriminator_start_step` and `discriminator_warmup_steps`."
            )
        self.start_step, self.warmup_steps = (steps_per_epoch // 2 if step is None else step for step in steps)
        # Until then the discriminator's own loss counts fully.
        self.first_epoch_steps = steps_per_epoch or 0
        with torch.random.fork_rng(devices=[]):
            self.discriminator = PatchDiscriminator(recipe.discriminator_channels)
        # For several ranks, and compiled where that is asked for. The tokenizer's gradient takes the plain one: it must
        # not touch the wrapper's bookkeeping of gradients to reduce.
        self.wrapped = accelerator.prepare_model(self.discriminator)
        self._draw(0)

    def _draw(self, restarts: int) -> None:
        """New weights, the same on every rank, with an optimizer and a schedule of their own."""
        self.restarts = restarts
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.args.seed + restarts)
            self.discriminator.load_state_dict(PatchDiscriminator(self.recipe.discriminator_channels).state_dict())
        options = {"betas": (self.args.adam_beta1, self.args.adam_beta2), "eps": self.args.adam_epsilon}
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=self.peak_rate, **options)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: self._rate_factor(step))

    def _rate_factor(self, step: int) -> float:
        """Of the peak rate, after `step` steps since the last draw. The very first step already learns."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        start = self.start_step + self.restarts * (self.recipe.discriminator_restart_steps or 0)
        end = min(1.0, self.recipe.discriminator_end_learning_rate / self.peak_rate)
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.max_steps - start - self.warmup_steps))
        return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))

    def begin_step(self, global_step: int) -> bool:
        """Whether the adversary takes part in this step of the tokenizer; draws a new one when it is time."""
        if global_step < self.start_step:
            return False
        interval = self.recipe.discriminator_restart_steps
        due = (global_step - self.start_step) // interval if interval else 0
        if due > self.restarts:
            self._draw(due)
        return True

    def generator_loss(self, images: torch.Tensor) -> torch.Tensor:
        """L_G = -mean D(images), of images `(B, 3, S, S)` in [-1, 1]."""
        return -self.discriminator(images).float().mean()

    def learn(self, real: torch.Tensor, fake: torch.Tensor, global_step: int, accumulation_steps: int) -> dict:
        """
        A micro-batch of images `(B, 3, S, S)` and their reconstructions, without gradient; takes the optimizer's step
        where the tokenizer's is due. Returns `discriminator`, the loss before weighting, and the mean logits.
        """
        is_due = self.accelerator.sync_gradients
        with contextlib.nullcontext() if is_due else self.accelerator.no_sync(self.wrapped):
            # One pass over both: the normalisation is per image, so they do not see each other.
            real_logits, fake_logits = self.wrapped(torch.cat([real, fake])).chunk(2)
            loss = discriminator_loss(real_logits, fake_logits, self.recipe.discriminator_loss)
            weight = 1.0 if global_step < self.first_epoch_steps else self.recipe.loss_weights["discriminator"]
            (weight / accumulation_steps * loss).backward()
        if is_due:
            if self.args.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(self.discriminator.parameters(), self.args.max_grad_norm)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return {
            "discriminator": loss.detach(),
            "discriminator_real_logits": real_logits.detach().float().mean(),
            "discriminator_fake_logits": fake_logits.detach().float().mean(),
        }

    def save(self, folder: str | Path) -> None:
        save_file(self.discriminator.state_dict(), Path(folder, _WEIGHTS_NAME))
        state = {name: getattr(self, name).state_dict() for name in ("optimizer", "scheduler")}
        torch.save({**state, "restarts": self.restarts}, Path(folder, _STATE_NAME))

    def load(self, folder: str | Path) -> None:
        names = _WEIGHTS_NAME, _STATE_NAME
        weights, state = (checkpoint_file(folder, name, "by training without an adversary") for name in names)
        device = next(self.discriminator.parameters()).device
        state = torch.load(state, map_location=device, weights_only=True)
        if state["restarts"] != self.restarts:
            self._draw(state["restarts"])
        self.discriminator.load_state_dict(load_file(weights))
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


def adaptive_weight(
    last_input, last_layer: nn.Conv2d, reconstruction_gradient, generator_gradient, accelerator: Accelerator
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    g = ||grad(MSE + LPIPS)|| / (||grad L_G|| + 1e-4) at the decoder's last convolution, clamped to [0.3, 10] (code).

    The gradients of a convolution's weights follow from its input `(B, C, S, S)` and the gradients at its output
    `(B, 3, S, S)`, so neither loss is differentiated a second time, nor is anything below that convolution. They are
    averaged over the ranks first: one weight for the whole batch. Returns it clamped, and before the clamp: scalars.
    """
    # A gradient of half precision would vanish; bfloat16 has the range.
    dtype = last_input.dtype if last_input.dtype != torch.float16 else torch.float32
    fixed = last_input.to(dtype), last_layer.weight.shape
    options = {"stride": last_layer.stride, "padding": last_layer.padding}
    gradients = [
        nn.grad.conv2d_weight(*fixed, gradient.to(dtype), **options)
        for gradient in (reconstruction_gradient, generator_gradient)
    ]
    gradients = accelerator.reduce(torch.stack(gradients).float(), "mean")
    reconstruction_norm, generator_norm = gradients.flatten(1).norm(dim=1)
    weight = reconstruction_norm / (generator_norm + 1e-4)
    return weight.clamp(*ADAPTIVE_WEIGHT_RANGE), weight
