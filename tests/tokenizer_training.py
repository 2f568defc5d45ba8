"""What the tests of tokenizer training share: tiny trainers, images and a stand-in for LPIPS."""

import torch
from training_helpers import TOKENIZER_FIELDS, FixedItems, quiet
from transformers import SiglipModel, TrainingArguments

from transformers_dualtoken import DualTokenVisionTokenizer
from transformers_dualtoken.training import (
    DualTokenVisionTokenizerRecipe,
    DualTokenVisionTokenizerTrainer,
    collate_images,
)


# LPIPS needs torchvision, which most test environments lack; a stand-in takes its place where the term is wanted.
PLAIN = {"perceptual": 0, "generator": 0}
ADVERSARIAL = {"perceptual": 0}
ADVERSARY = {"discriminator_channels": 32, "discriminator_start_step": 0, "discriminator_warmup_steps": 2}


def tokenizer_trainer(
    folder, output_dir, loss_weights=None, dataset=None, config=None, recipe=None, stage=1, **overrides
) -> DualTokenVisionTokenizerTrainer:
    model = DualTokenVisionTokenizer.from_siglip_pretrained(folder, **{**TOKENIZER_FIELDS, **(config or {})})
    arguments = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, **overrides}
    return DualTokenVisionTokenizerTrainer(
        model=model,
        args=TrainingArguments(str(output_dir), **quiet(**arguments)),
        teacher=SiglipModel.from_pretrained(folder).vision_model,
        recipe=DualTokenVisionTokenizerRecipe(
            stage=stage, loss_weights=PLAIN if loss_weights is None else loss_weights, **(recipe or {})
        ),
        train_dataset=dataset,
        data_collator=collate_images,
    )


def adversarial_trainer(folder, output_dir, recipe=None, **kwargs) -> DualTokenVisionTokenizerTrainer:
    return tokenizer_trainer(
        folder, output_dir, loss_weights=ADVERSARIAL, recipe={**ADVERSARY, **(recipe or {})}, **kwargs
    )


def pixel_items(count=4) -> FixedItems:
    values = torch.rand(count, 3, 24, 24, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return FixedItems([{"pixel_values": value, "num_skipped": 0} for value in values])


def caption_items(count=4) -> FixedItems:
    """`pixel_items` with captions of eight ids, all different."""
    ids = torch.randint(3, 64, (count, 8), generator=torch.Generator().manual_seed(6))
    return FixedItems([{**item, "input_ids": ids[index]} for index, item in enumerate(pixel_items(count).items)])


class SquaredDistance(torch.nn.Module):
    """In the place of LPIPS: a distance per image that is not the squared error's mean."""

    def forward(self, first, second):
        return (first - second).square().square().mean((1, 2, 3), keepdim=True)
