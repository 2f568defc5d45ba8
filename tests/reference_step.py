"""One training step from recorded starting weights, to compare with what other code made of them."""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import SiglipVisionModel, TrainerCallback, TrainingArguments

from transformers_dualtoken.convert import load_official_tokenizer, official_key, official_view
from transformers_dualtoken.training.vision_tokenizer.recipe import STAGE_LOSS_WEIGHTS, DualTokenVisionTokenizerRecipe
from transformers_dualtoken.training.vision_tokenizer.trainer import DualTokenVisionTokenizerTrainer


_FEATURE_TERMS = ("semantic_mse", "semantic_cosine", "pooler_mse", "pooler_cosine")


class _RecordingTrainer(DualTokenVisionTokenizerTrainer):
    """The trainer as it is, with an ear at the terms it logs and at its total."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.recorded: dict[str, torch.Tensor] = {}

    def add_terms(self, terms, completes=True):
        self.recorded |= terms
        super().add_terms(terms, completes)

    def training_step(self, *args, **kwargs):
        self.recorded["total"] = super().training_step(*args, **kwargs)
        return self.recorded["total"]


class _Weights(TrainerCallback):
    """Sets the discriminator's weights before the step, and keeps the gradients just before the optimizer's."""

    def __init__(self, trainer: _RecordingTrainer, discriminator: dict[str, torch.Tensor]):
        self.trainer, self.discriminator, self.gradients = trainer, discriminator, {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.adversary.discriminator.load_state_dict(self.discriminator)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for name, parameter in self.trainer.model.named_parameters():
            if parameter.grad is not None:
                self.gradients[name] = parameter.grad.clone()


def reference_step(folder: str | Path, training_step_folder: str | Path) -> dict[str, torch.Tensor]:
    """
    One whole stage 1 step of the trainer, on CPU in float32.

    Args:
        folder (`str` or `Path`): a tokenizer in the authors' format, with the images in `expected.safetensors`
            (`pixel_values`).
        training_step_folder (`str` or `Path`): `step.json` (rate, betas, eps, decay, weights), `teacher.safetensors`,
            `discriminator.safetensors`.

    Returns:
        `dict[str, torch.Tensor]`, parameters under the authors' names:

        - `loss/...`: every term before weighting; `semantic_total`, their weighted sum without lambda_sem;
          `adaptive_weight` and `adaptive_weight_unclamped`; `total`; `discriminator`.
        - `grad/...`: gradients of the total; `after/...`: parameters after AdamW.
        - `discriminator_after/...`: the discriminator's after its Adam step.
        - `target`: what the reconstruction was compared with.

    Raises:
        FileNotFoundError: if a file is missing.
    """
    folder, training_step_folder = Path(folder), Path(training_step_folder)
    settings = json.loads((training_step_folder / "step.json").read_text())
    pixel_values = load_file(folder / "expected.safetensors")["pixel_values"]
    model = load_official_tokenizer(folder)
    # Without the prefix that older versions of transformers gave these names.
    teacher_state = load_file(training_step_folder / "teacher.safetensors")
    teacher_state = {name.removeprefix("vision_model."): tensor for name, tensor in teacher_state.items()}
    teacher = SiglipVisionModel(model.config.vision_config)
    teacher.load_state_dict(teacher_state)

    weights = STAGE_LOSS_WEIGHTS[1]
    recipe = DualTokenVisionTokenizerRecipe(
        stage=1,
        loss_weights={name: settings["semantic_weight"] * weights[name] for name in _FEATURE_TERMS}
        | {"perceptual": settings["lpips_weight"]},
        discriminator_channels=settings["discriminator_channels"],
        discriminator_start_step=0,
        discriminator_warmup_steps=0,
    )
    with tempfile.TemporaryDirectory() as output_dir:
        arguments = TrainingArguments(
            output_dir,
            max_steps=1,
            per_device_train_batch_size=1,
            learning_rate=settings["learning_rate"],
            adam_beta1=settings["betas"][0],
            adam_beta2=settings["betas"][1],
            adam_epsilon=settings["eps"],
            weight_decay=settings["weight_decay"],
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
        )
        trainer = _RecordingTrainer(
            model,
            arguments,
            teacher=teacher,
            recipe=recipe,
            # One sample that is the whole batch: nothing shuffles it.
            train_dataset=[{"pixel_values": pixel_values}],
            data_collator=lambda samples: samples[0],
        )
        callback = _Weights(trainer, load_file(training_step_folder / "discriminator.safetensors"))
        trainer.add_callback(callback)
        trainer.train()

    levels = len(model.config.decoder_block_out_channels)
    losses = {name: trainer.recorded[name] for name in trainer.recorded if not name.endswith("_logits")}
    losses["semantic_total"] = sum(weights[name] * losses[name] for name in _FEATURE_TERMS)
    result = {f"loss/{name}": loss.detach() for name, loss in losses.items()}
    for kind, tensors in (("grad", callback.gradients), ("after", dict(model.named_parameters()))):
        for name, tensor in tensors.items():
            result[f"{kind}/{official_key(name, levels)}"] = official_view(name, tensor.detach())
    for name, tensor in trainer.adversary.discriminator.state_dict().items():
        result[f"discriminator_after/{name}"] = tensor
    result["target"] = trainer.target_images(pixel_values)
    return result
