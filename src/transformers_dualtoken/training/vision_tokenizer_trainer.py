"""Training of the vision tokenizer: stage 1 of the paper's recipe without its perceptual and adversarial terms."""

import torch
import torch.nn.functional as F
from transformers import SiglipVisionModel

from ..modeling_vision_tokenizer import DualTokenVisionTokenizer, DualTokenVisionTokenizerOutput
from .base_trainer import DualTokenBaseTrainer


# Keys are the logged names. The pooled features' terms count once where the positions' count five times.
DEFAULT_LOSS_WEIGHTS = {
    "semantic_mse": 5.0,
    "semantic_cosine": 5.0,
    "pooler_mse": 1.0,
    "pooler_cosine": 1.0,
    "reconstruction_mse": 5.0,
    "pixel_commitment": 5.0,
    "semantic_commitment": 5.0,
}


class DualTokenVisionTokenizerTrainer(DualTokenBaseTrainer):
    """
    `Trainer` for [`DualTokenVisionTokenizer`] on batches of `pixel_values`.

    The semantic branch is held to a frozen teacher, the vision tower training started from: features of the semantic
    layer and the pooled feature, by mean squared error and cosine. The text tower and the logit scale and bias are
    not trained, so that text stays aligned.

    Args:
        teacher (`SiglipVisionModel`): frozen here, and moved to the training device.
        loss_weights (`dict[str, float]`, *optional*): overrides of `DEFAULT_LOSS_WEIGHTS`, by name.
        args, kwargs: as in `Trainer`.
    """

    def __init__(self, *args, teacher: SiglipVisionModel, loss_weights: dict[str, float] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        unknown = sorted(set(loss_weights or {}) - set(DEFAULT_LOSS_WEIGHTS))
        if unknown:
            raise ValueError(f"No such loss terms: {', '.join(unknown)}; there are {', '.join(DEFAULT_LOSS_WEIGHTS)}.")
        self.loss_weights = {**DEFAULT_LOSS_WEIGHTS, **(loss_weights or {})}
        self.teacher = teacher.requires_grad_(False).eval().to(self.args.device)
        # The loss is a mean per micro-batch; the Trainer divides it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        siglip = self.accelerator.unwrap_model(self.model).siglip
        for module in (siglip.text_model, siglip.logit_scale, siglip.logit_bias):
            module.requires_grad_(False)

    def get_decay_parameter_names(self, model) -> list[str]:
        """Biases, norms and other vectors are not decayed (code: tensors below two dimensions)."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    @torch.no_grad()
    def teacher_features(self, pixel_values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden state `(B, N, H)` after encoder layer `layer`, and the pooled feature `(B, H)`, of the teacher."""
        hidden_states = self.teacher.embeddings(pixel_values)
        for depth, encoder_layer in enumerate(self.teacher.encoder.layers, start=1):
            hidden_states = encoder_layer(hidden_states, attention_mask=None)
            if depth == layer:
                target = hidden_states
        return target, self.teacher.head(self.teacher.post_layernorm(hidden_states))

    def loss_terms(
        self, model: DualTokenVisionTokenizer, output: DualTokenVisionTokenizerOutput, pixel_values: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Every term before weighting, by its logged name."""
        hidden, pooled = self.teacher_features(pixel_values, model.config.semantic_layer)
        size = output.reconstruction.shape[-2:]
        target = pixel_values
        if size != pixel_values.shape[-2:]:
            target = F.interpolate(pixel_values, size=size, mode="bilinear", align_corners=False)
        return {
            "semantic_mse": F.mse_loss(output.semantic_features, hidden),
            "semantic_cosine": -F.cosine_similarity(output.semantic_features, hidden, dim=-1).mean(),
            "pooler_mse": F.mse_loss(output.pooler_output, pooled),
            "pooler_cosine": -F.cosine_similarity(output.pooler_output, pooled, dim=-1).mean(),
            "reconstruction_mse": F.mse_loss(output.reconstruction, target),
            "pixel_commitment": output.pixel_commitment_loss,
            "semantic_commitment": output.semantic_commitment_loss,
        }

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(pixel_values=inputs["pixel_values"])
        terms = self.loss_terms(self.accelerator.unwrap_model(model), output, inputs["pixel_values"])
        loss = sum(self.loss_weights[name] * term for name, term in terms.items())
        if model.training:
            self.add_terms(terms)
        return (loss, output) if return_outputs else loss
