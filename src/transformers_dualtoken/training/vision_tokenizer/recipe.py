"""What the stages of tokenizer training teach: the terms of the loss with their weights, and what stands still."""

import math
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from ...field_rules import Rule, at_least, is_number, one_of, within
from ...modeling_vision_tokenizer import DualTokenVisionTokenizer
from ..arguments import json_object
from .contrastive import CONTRASTIVE_LOSSES
from .discriminator import DISCRIMINATOR_LOSSES


_STAGES = (0, 1, 2, "contrastive")
# The terms of the loss by their logged names: what each looks at, and its weight in every stage (0 to 2: code, with
# lambda_sem = 1 in all of them; the paper names the contrastive one without numbers). Those of `image` look at the
# reconstructed image, where their gradients meet. `discriminator` is the weight of the discriminator's own loss after
# the first epoch, in which it is 1; that loss is no part of the total.
_TERMS = {
    "semantic_mse": ("semantic_features", 0.0, 5.0, 0.0, 0.0),
    "semantic_cosine": ("semantic_features", 0.0, 5.0, 1.0, 0.0),
    "pooler_mse": ("pooler", 5.0, 1.0, 5.0, 0.0),
    "pooler_cosine": ("pooler", 5.0, 1.0, 5.0, 0.0),
    "contrastive": ("captions", 0.0, 0.0, 0.0, 1.0),
    "semantic_commitment": ("semantic_codes", 5.0, 5.0, 5.0, 5.0),
    "reconstruction_mse": ("image", 5.0, 5.0, 0.0, 0.0),
    "perceptual": ("image", 1.0, 1.0, 0.0, 0.0),
    "generator": ("image", 0.0, 0.75, 0.0, 0.0),
    "pixel_commitment": ("pixel_codes", 5.0, 5.0, 0.0, 0.0),
    "discriminator": ("discriminator", 0.75, 0.75, 0.75, 0.75),
}
STAGE_LOSS_WEIGHTS = {
    stage: {name: weights[column] for name, (_, *weights) in _TERMS.items()} for column, stage in enumerate(_STAGES)
}

# What fields must be, where they are not None.
_RULES = {
    **dict.fromkeys(("steps_per_epoch", "discriminator_restart_steps", "grid_steps", "grid_images"), at_least(1)),
    **dict.fromkeys(("discriminator_start_step", "discriminator_warmup_steps"), at_least(0)),
    "discriminator_end_learning_rate": at_least(0),
    "discriminator_learning_rate": Rule("above 0", is_number, lambda rate: rate > 0),
    "weight_average_decay": Rule("above 0 and below 1", is_number, lambda decay: 0 < decay < 1),
    "contrastive_loss": one_of(*CONTRASTIVE_LOSSES),
    "discriminator_loss": one_of(*DISCRIMINATOR_LOSSES),
}


def _option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class DualTokenVisionTokenizerRecipe:
    """
    How [`DualTokenVisionTokenizerTrainer`] trains, beyond `TrainingArguments`. Steps are optimizer steps throughout.

    The defaults are the authors' code; None stands for what depends on the length of an epoch.
    """

    stage: Literal[_STAGES] = _option(
        1,
        "0: what is new, and the layers above the semantic one; 1: everything but the text tower; 2: the semantic branch "
        "alone, what makes pixel codes and images stands still; contrastive: the same branch, on images and captions",
    )
    loss_weights: dict | str | None = _option(
        None,
        "changes to the stage's loss weights, a JSON object or the path of one, such as "
        '{"perceptual": 0, "generator": 0}; a term of weight 0 is not computed',
    )
    contrastive_loss: str = _option("sigmoid", "sigmoid (SigLIP's) or softmax (CLIP's), of the term `contrastive`")
    perceptual_net: str = _option("vgg", "network of the perceptual term: vgg or alex")
    perceptual_weights: str | None = _option(None, "file of that network's torchvision weights, instead of a download")
    steps_per_epoch: int | None = _option(
        None,
        "length of an epoch, for streams, whose length is unknown; in the first the discriminator's loss has weight 1",
    )
    discriminator_start_step: int | None = _option(
        None, "no adversary before this step (None: half of the first epoch)"
    )
    discriminator_warmup_steps: int | None = _option(
        None, "steps of linear warm-up of the discriminator's rate (None: half an epoch)"
    )
    discriminator_learning_rate: float | None = _option(None, "peak rate of the discriminator (None: --learning_rate)")
    discriminator_end_learning_rate: float = _option(4e-5, "what the discriminator's rate falls to, along a cosine")
    discriminator_restart_steps: int | None = _option(
        None, "draw a new discriminator every so many steps (None: never)"
    )
    discriminator_loss: str = _option("leaky_hinge", "leaky_hinge (the authors' code) or hinge (the usual one)")
    discriminator_channels: int = _option(64, "width of the discriminator's first layer")
    weight_average_decay: float | None = _option(
        None, "keep a moving average of the weights, evaluate and save that at the end; such as 0.9999"
    )
    grid_steps: int | None = _option(None, "write originals beside reconstructions every so many steps (None: never)")
    grid_images: int = _option(8, "how many images those pictures show")

    def __post_init__(self):
        one_of(*_STAGES).check("stage", self.stage)
        for name, rule in _RULES.items():
            rule.check_given(**{name: getattr(self, name)})
        given = json_object(self.loss_weights, "loss_weights")
        weights = STAGE_LOSS_WEIGHTS[self.stage]
        unknown = ", ".join(sorted(set(given) - set(weights)))
        if unknown:
            raise ValueError(f"No such loss terms: {unknown}; there are {', '.join(weights)}.")
        for name, weight in given.items():
            within(float, 0, math.inf, below=True).check(f"loss_weights[{name!r}]", weight)
        self.loss_weights = {**weights, **given}
        if not self.pixel_terms and not self.semantic_terms:
            raise ValueError("All terms of the loss have weight 0, so there is nothing to train.")
        if self.stage == "contrastive" and self.pixel_terms:
            raise ValueError(
                "The contrastive stage leaves pixel codes and reconstructions as they are, so the terms "
                f"{', '.join(self.pixel_terms)} would train nothing: they must have weight 0."
            )
        if self.is_adversarial and not (self.loss_weights["reconstruction_mse"] or self.loss_weights["perceptual"]):
            raise ValueError(
                "The adaptive weight of `generator` compares it with `reconstruction_mse` and `perceptual`, which both "
                "have weight 0: give one of them a weight, or set `generator` to 0 too."
            )

    def _with_weight(self, *branches: str) -> list[str]:
        return [name for name, (branch, *_) in _TERMS.items() if branch in branches and self.loss_weights[name]]

    @property
    def pixel_terms(self) -> list[str]:
        return self._with_weight("image", "pixel_codes")

    @property
    def semantic_terms(self) -> list[str]:
        return [*self.teacher_terms, *self._with_weight("captions", "semantic_codes")]

    @property
    def teacher_terms(self) -> list[str]:
        return self._with_weight("semantic_features", "pooler")

    @property
    def is_contrastive(self) -> bool:
        return self.loss_weights["contrastive"] > 0

    @property
    def feature_terms(self) -> list[str]:
        """Of those with a weight, the terms that do not look at the reconstructed image."""
        return [*self.semantic_terms, *self._with_weight("pixel_codes")]

    def image_terms(self, adversarial: bool) -> list[str]:
        """Of those with a weight, the terms that look at the reconstructed image; `generator` if `adversarial`."""
        return [name for name in self._with_weight("image") if adversarial or name != "generator"]

    @property
    def codes(self) -> tuple[str, ...]:
        """The kinds of codes that the terms need."""
        return ("pixel",) * bool(self.pixel_terms) + ("semantic",) * bool(self.semantic_terms)

    @property
    def is_adversarial(self) -> bool:
        return self.loss_weights["generator"] > 0

    def freeze(self, model: DualTokenVisionTokenizer) -> None:
        """
        Hold still what the stage does not train, and what no term reaches.

        The text tower always, so that text stays aligned, and the logit scale and bias unless the contrastive loss
        takes them. Stage 0: the encoder up to the semantic layer. Stages 2 and contrastive: everything that makes the
        pixel codes and the image. (The authors' code freezes the layers up to the shortcut's only, which would move the
        pixel codes under a frozen decoder.) Whatever was held still before moves again.
        """
        model.requires_grad_(True)
        config, siglip = model.config, model.siglip
        vision = siglip.vision_model
        layers = vision.encoder.layers
        pixel_depth = max(config.pixel_layer, config.shortcut_layer or 0)
        still: list[nn.Module | nn.Parameter] = [siglip.text_model]
        if not self.is_contrastive:
            still.append(siglip.logit_scale)
        if not self.is_contrastive or self.contrastive_loss == "softmax":  # to which a bias makes no difference
            still.append(siglip.logit_bias)
        is_semantic_only = self.stage in (2, "contrastive")
        if self.stage == 0:
            still += [vision.embeddings, *layers[: config.semantic_layer]]
        if is_semantic_only:
            still += [vision.embeddings, *layers[:pixel_depth]]
        if is_semantic_only or "pixel" not in self.codes:
            still.append(model.pixel_down_proj)
            if config.shortcut_layer is not None:
                still.append(model.shortcut_down_proj)
        if is_semantic_only or not self._with_weight("image"):
            still += [model.pixel_up_proj, model.post_quantizer_block, model.decoder]
        if "semantic" not in self.codes:
            still += [model.semantic_down_proj, *layers[pixel_depth:]]
        if not self._with_weight("pooler", "captions"):
            still += [*layers[config.semantic_layer :], vision.post_layernorm, vision.head]
            if not self._with_weight("semantic_features"):
                still.append(model.semantic_up_proj)
        for part in still:
            part.requires_grad_(False)
        model.pixel_quantizer.frozen = is_semantic_only
