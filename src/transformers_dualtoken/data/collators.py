"""Batches: of images, and of conversations and documents, padded or packed."""

import torch

from ..field_rules import at_least


def collate_images(samples: list[dict]) -> dict:
    """
    A batch of samples: `pixel_values` `(B, 3, S, S)`, with captions `input_ids` `(B, L)`, `num_skipped` `(1,)`, their sum,
    and of a stream `stream_position`, where it is after the last of them.
    """
    if not samples:
        raise ValueError("A batch must have at least one sample, got none.")
    batch = {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "num_skipped": torch.tensor([sum(sample["num_skipped"] for sample in samples)]),
    }
    if "input_ids" in samples[0]:
        batch["input_ids"] = torch.stack([sample["input_ids"] for sample in samples])
    if "stream_position" in samples[-1]:
        batch["stream_position"] = samples[-1]["stream_position"]
    return batch


class DualTokenDataCollator:
    """
    Makes one batch of samples of [`DualTokenChatDataset`] or [`DualTokenChatStream`]; their images are joined, flat over
    the batch, in reading order.

    Without `packed_length` every sample has a row, padded on the right, and `attention_mask` says what is padding. With
    it short samples share rows of at most that many tokens (a longer sample has a row of its own), filled as evenly as
    possible; instead of a mask there are `position_ids`, which begin at 0 for every sample. The model then lets no
    sample see another one, and the first token of a sample is no target, so that losses and gradients are those of the
    padded batch. A batch holds the same samples packed or not: steps, epochs and schedules do not change.

    Args:
        pad_token_id (`int`).
        packed_length (`int`, *optional*).
    """

    def __init__(self, pad_token_id: int, packed_length: int | None = None):
        if pad_token_id is None:
            raise ValueError("`pad_token_id` is None: the tokenizer has no padding token. Set its `pad_token`.")
        at_least(1).check_given(packed_length=packed_length)
        self.pad_token_id, self.packed_length = pad_token_id, packed_length

    def __call__(self, samples: list[dict]) -> dict:
        if not samples:
            raise ValueError("A batch must have at least one sample, got none.")
        lengths = [len(sample["input_ids"]) for sample in samples]
        rows = [[i] for i in range(len(samples))] if self.packed_length is None else pack(lengths, self.packed_length)
        length = max(sum(lengths[index] for index in row) for row in rows)
        input_ids = torch.full((len(rows), length), self.pad_token_id)
        labels, mask = torch.full_like(input_ids, -100), torch.zeros_like(input_ids)
        positions = torch.arange(length).repeat(len(rows), 1)
        for row, members in enumerate(rows):
            start = 0
            for index in members:
                end = start + lengths[index]
                input_ids[row, start:end] = samples[index]["input_ids"]
                labels[row, start + 1 : end] = samples[index]["labels"][1:]
                mask[row, start:end] = 1
                # What follows is another sample, padding at the end of a packed row included.
                positions[row, end:] -= end - start
                start = end
        batch = {"input_ids": input_ids, "labels": labels}
        batch |= {"attention_mask": mask} if self.packed_length is None else {"position_ids": positions}
        for name in ("pixel_values", "pixel_codes", "semantic_codes"):
            images = [samples[index][name] for row in rows for index in row if name in samples[index]]
            if images:
                batch[name] = torch.cat(images)
        if "pixel_values" in batch and "pixel_codes" in batch:
            raise ValueError(
                "Some samples of a batch have images as pixels and others as codes; it must be one or the other."
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
