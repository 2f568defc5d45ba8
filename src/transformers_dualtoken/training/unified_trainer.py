"""Training of the unified model."""

import torch

from ..modeling_dualtoken import DualTokenForCausalLM
from .base_trainer import DualTokenBaseTrainer


# What the names of `set_trainable` stand for, as prefixes of parameter names.
TRAINABLE_PARTS = {
    "projector": ("model.visual_projector.",),
    "language_model": ("model.language_model.", "lm_head."),
    "heads": ("depth_heads.",),
}


def set_trainable(model: DualTokenForCausalLM, parts: list[str]) -> None:
    """
    Train the named parts of a model and freeze the rest. The vision tokenizer is always frozen.

    Args:
        model ([`DualTokenForCausalLM`]).
        parts (`list[str]`): of `"projector"`, `"language_model"` and `"heads"`.
    """
    unknown = sorted(set(parts) - set(TRAINABLE_PARTS))
    if unknown or not parts:
        raise ValueError(f"`parts` must name some of {', '.join(TRAINABLE_PARTS)}, got {parts}.")
    prefixes = tuple(prefix for part in parts for prefix in TRAINABLE_PARTS[part])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))


class DualTokenTrainer(DualTokenBaseTrainer):
    """
    `Trainer` for [`DualTokenForCausalLM`].

    Text and visual targets are counted apart, over the whole global batch: each loss is a mean over its own targets,
    whatever the number of accumulation steps and ranks. The three losses are logged beside their weighted sum.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Every rank divides by the global counts, so that the ranks' terms are parts of a sum.
        self.terms_reduction = "sum" if self.args.average_tokens_across_devices else "mean"

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """Override of Trainer's count: the pair (text targets, visual targets) of one optimizer step."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        image_token_id = self.accelerator.unwrap_model(self.model).config.image_token_id
        labels = [batch["labels"][:, 1:] for batch in batch_samples]
        visual = sum((label == image_token_id).sum() for label in labels)
        text = sum((label != -100).sum() for label in labels) - visual
        counts = torch.stack([text, visual]).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        return counts

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            # With a count over the global batch the micro-batches' losses add up to the step's mean.
            names = ("text_loss", "pixel_loss", "semantic_loss")
            self.add_terms({name: outputs[name] for name in names}, completes=self.accelerator.sync_gradients)
        return (loss, outputs) if return_outputs else loss
