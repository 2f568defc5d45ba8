"""Training of text answers by trainers that know text losses only, as TRL's."""

from collections.abc import Callable

import torch


class TextAnswerCollator:
    """
    Another collator, whose labels are checked: no image may be a target.

    TRL's `SFTTrainer` computes the loss itself, over every label, by the text head: it would teach the text head to
    say `<image_pad>`, and the depth heads nothing. Images belong into questions there, and questions are no targets
    (`assistant_only_loss=True`). Answers with images take [`DualTokenTrainer`].

    Args:
        collator (`Callable`): samples -> a batch with `labels` `(B, L)`, for instance the `data_collator` of an
            `SFTTrainer`.
        image_token_id (`int`): of the model's config.

    Raises:
        ValueError: when called, if an image is labelled; names the samples by their number in the batch.
    """

    def __init__(self, collator: Callable, image_token_id: int):
        self.collator, self.image_token_id = collator, image_token_id

    def __call__(self, samples: list) -> dict[str, torch.Tensor]:
        batch = self.collator(samples)
        rows = (batch["labels"] == self.image_token_id).any(-1).nonzero().flatten().tolist()
        if rows:
            raise ValueError(
                f"The samples {rows} of this batch have images among their targets, but only text is learned here. "
                "Images in questions: set `assistant_only_loss=True`. Images in answers: train with DualTokenTrainer."
            )
        return batch
