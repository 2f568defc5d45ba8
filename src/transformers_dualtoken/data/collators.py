"""Batches: of images, and of conversations and documents, padded or packed."""

from collections.abc import Callable

import torch


def collate_images(samples: list[dict]) -> dict:
    """
    A batch of samples: `pixel_values` `(B, 3, S, S)`, `num_skipped` `(1,)`, their sum, and of a stream
    `stream_position`, where it is after the last of them.
    """
    if not samples:
        raise ValueError("A batch must have at least one sample, got none.")
    batch = {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "num_skipped": torch.tensor([sum(sample["num_skipped"] for sample in samples)]),
    }
    if "stream_position" in samples[-1]:
        batch["stream_position"] = samples[-1]["stream_position"]
    return batch


class DualTokenDataCollator:
    """
    Makes one batch of samples of [`DualTokenChatDataset`] or [`DualTokenChatStream`]; their images are joined, flat over
    the batch, in reading order.

    Without `packed_length` every sample has a row, padded on the right, and `attention_mask` says what is padding.

    With it short samples share rows, of at most that many tokens (a longer sample has a row of its own), filled as
    evenly as possible; instead of a mask there are `position_ids`, which begin at 0 for every sample. The model then
    lets no sample see another one, and the first token of a sample is no target, so that losses and gradients are those
    of the padded batch. A batch holds the same samples packed or not: steps, epochs and schedules do not change.

    Args:
        pad_token_id (`int`).
        pad_to_multiple_of (`int`, *optional*): of the length of the rows.
        packed_length (`int`, *optional*).
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None, packed_length: int | None = None):
        if pad_token_id is None:
            raise ValueError("`pad_token_id` is None: the tokenizer has no padding token. Set its `pad_token`.")
        if packed_length is not None and packed_length < 1:
            raise ValueError(f"`packed_length` must be at least 1 token, got {packed_length}.")
        self.pad_token_id, self.packed_length = pad_token_id, packed_length
        self.pad_to_multiple_of = pad_to_multiple_of or 1

    def __call__(self, samples: list[dict]) -> dict:
        if not samples:
            raise ValueError("A batch must have at least one sample, got none.")
        lengths = [len(sample["input_ids"]) for sample in samples]
        if self.packed_length is None:
            rows = [[index] for index in range(len(samples))]
        else:
            rows = pack(lengths, self.packed_length)
        length = max(sum(lengths[index] for index in row) for row in rows)
        length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(rows), length)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "labels": torch.full(shape, -100),
        }
        # Padding at the end of a packed row is one more sample.
        positions, filled = torch.arange(length).repeat(len(rows), 1), torch.zeros(shape, dtype=torch.int64)
        for row, members in enumerate(rows):
            start = 0
            for index in members:
                end = start + lengths[index]
                batch["input_ids"][row, start:end] = samples[index]["input_ids"]
                batch["labels"][row, start:end] = samples[index]["labels"]
                batch["labels"][row, start] = -100
                positions[row, start:end] = torch.arange(lengths[index])
                filled[row, start:end] = 1
                start = end
            positions[row, start:] = torch.arange(length - start)
        if self.packed_length is None:
            batch["attention_mask"] = filled
        else:
            batch["position_ids"] = positions
        for name in ("pixel_values", "pixel_codes", "semantic_codes"):
            images = [samples[index][name] for row in rows for index in row if name in samples[index]]
            if images:
                batch[name] = torch.cat(images)
        if "pixel_values" in batch and "pixel_codes" in batch:
            raise ValueError(
                "Some samples of a batch have images as pixels and others as codes; precompute the codes of all sources "
                "of a mixture, or of none."
            )
        for name in ("num_skipped", "num_cut"):
            if any(name in sample for sample in samples):
                batch[name] = torch.tensor([sum(sample.get(name, 0) for sample in samples)])
        if "stream_position" in samples[-1]:
            batch["stream_position"] = samples[-1]["stream_position"]
        return batch


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """
    Samples of these lengths over as few rows of `capacity` tokens as the longest-first rule finds, evenly filled.

    Returns:
        `list[list[int]]`: the indices of each row's samples. A sample longer than `capacity` has a row of its own.
    """
    rows = [[index] for index, length in enumerate(lengths) if length > capacity]
    order = sorted((index for index, length in enumerate(lengths) if length <= capacity), key=lambda i: -lengths[i])
    if not order:
        return rows
    count = -(-sum(lengths[index] for index in order) // capacity)
    while True:
        packed, fill = [[] for _ in range(count)], [0] * count
        for index in order:
            shortest = fill.index(min(fill))
            packed[shortest].append(index)
            fill[shortest] += lengths[index]
        if max(fill) <= capacity:
            return rows + packed
        count += 1


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
