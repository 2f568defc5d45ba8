"""Conversations with images for unified training."""

import random
from collections.abc import Callable, Mapping

import torch
from torch.utils.data import Dataset

from ..processing_dualtoken import DualTokenProcessor


class DualTokenChatDataset(Dataset):
    """
    Conversations as token ids and labels, with their images as codes or pixels. All the assistant says is a target,
    images included; everything else is context.

    For guidance, a share of the samples that draw an image forget their prompt: everything before the first drawn
    image's `<image_start>` is masked, which leaves `<image_start>` at position 0, as at generation. Who forgets
    depends on the seed, the epoch and the sample's index only, so that a resumed run goes on as it would have.

    Args:
        conversations (`list[list[dict]]`): messages `{"role", "content"}` with parts `{"type": "text", "text": ...}`
            and `{"type": "image", "image": key}`; a key is a path, or whatever the next two arguments take.
        processor ([`DualTokenProcessor`]).
        image_codes (`Mapping`, *optional*): key -> (pixel codes, semantic codes), each `(h, w, D)`.
        load_image (`Callable`, *optional*): key -> `pixel_values` `(3, S, S)`; used where there are no codes.
        max_length (`int`, *optional*): longer samples are an error, since a cut image cannot be learned from.
        prompt_drop_probability (`float`, defaults to 0.1).
        seed (`int`, defaults to 0).

    Raises:
        ValueError: for a conversation without an assistant message, or longer than `max_length`; names the sample.
    """

    def __init__(
        self,
        conversations: list[list[dict]],
        processor: DualTokenProcessor,
        image_codes: Mapping | None = None,
        load_image: Callable | None = None,
        max_length: int | None = None,
        prompt_drop_probability: float = 0.1,
        seed: int = 0,
    ):
        if (image_codes is None) == (load_image is None):
            raise ValueError("Exactly one of `image_codes` and `load_image` must be given.")
        self.image_codes, self.load_image = image_codes, load_image
        self.image_start_token_id = processor.image_start_token_id
        self.image_token_id = processor.image_token_id
        self.prompt_drop_probability, self.seed, self.epoch = prompt_drop_probability, seed, 0
        self.samples = []
        for index, messages in enumerate(conversations):
            sample = self._tokenize(processor, messages, index)
            if max_length is not None and len(sample["input_ids"]) > max_length:
                raise ValueError(
                    f"Sample {index} has {len(sample['input_ids'])} tokens, more than `max_length` = {max_length}."
                )
            self.samples.append(sample)

    @staticmethod
    def _tokenize(processor: DualTokenProcessor, messages: list[dict], index: int) -> dict:
        encoded = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, placeholders_only=True
        )
        input_ids = torch.tensor(encoded["input_ids"][0])
        is_target = torch.tensor(encoded["assistant_masks"][0], dtype=torch.bool)
        if not is_target.any():
            raise ValueError(f"Sample {index} has no assistant message, so nothing to learn: {messages}.")
        images = [
            part["image"]
            for message in messages
            if not isinstance(message["content"], str)
            for part in message["content"]
            if part["type"] == "image"
        ]
        return {"input_ids": input_ids, "labels": input_ids.masked_fill(~is_target, -100), "images": images}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.samples[index]
        item = {"input_ids": sample["input_ids"], "labels": sample["labels"]}
        item["attention_mask"] = torch.ones_like(item["input_ids"])
        if self.image_codes is None:
            if sample["images"]:
                item["pixel_values"] = torch.stack([self.load_image(key) for key in sample["images"]])
        elif sample["images"]:
            pixel, semantic = zip(*(self.image_codes[key] for key in sample["images"]))
            item["pixel_codes"], item["semantic_codes"] = torch.stack(pixel), torch.stack(semantic)
        if random.Random(f"{self.seed}/{self.epoch}/{index}").random() < self.prompt_drop_probability:
            self._drop_prompt(item)
        return item

    def _drop_prompt(self, item: dict[str, torch.Tensor]) -> None:
        drawn = (item["labels"] == self.image_token_id).nonzero()
        if len(drawn) == 0:
            return
        start = int(drawn[0]) - 1
        item["attention_mask"] = item["attention_mask"].clone()
        item["attention_mask"][:start] = 0
        # What is masked is not learned, and neither is the first token after it, which nothing predicts.
        item["labels"] = item["labels"].clone()
        item["labels"][: start + 1] = -100


class DualTokenDataCollator:
    """
    Pads samples of [`DualTokenChatDataset`] on the right and joins their images, flat over the batch.

    Args:
        pad_token_id (`int`).
        pad_to_multiple_of (`int`, *optional*).
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None):
        self.fill_values = {"input_ids": pad_token_id, "labels": -100, "attention_mask": 0}
        self.pad_to_multiple_of = pad_to_multiple_of or 1

    def __call__(self, samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        length = max(len(sample["input_ids"]) for sample in samples)
        length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {}
        for name, fill_value in self.fill_values.items():
            batch[name] = torch.full((len(samples), length), fill_value)
            for row, sample in enumerate(samples):
                batch[name][row, : len(sample[name])] = sample[name]
        for name in ("pixel_values", "pixel_codes", "semantic_codes"):
            images = [sample[name] for sample in samples if name in sample]
            if images:
                batch[name] = torch.cat(images)
        return batch


@torch.no_grad()
def encode_images(
    model, load_image: Callable, keys: list, batch_size: int = 64
) -> dict[object, tuple[torch.LongTensor, torch.LongTensor]]:
    """
    Codes of many images, for training without the encoder.

    Args:
        model ([`DualTokenForCausalLM`] or [`DualTokenModel`]).
        load_image (`Callable`): key -> `pixel_values` `(3, S, S)`.
        keys (`list`): of the images; equal keys are encoded once.

    Returns:
        `dict`: key -> (pixel codes, semantic codes), each `(h, w, D)`, on the CPU.
    """
    base_model = getattr(model, "model", model)
    keys, codes = list(dict.fromkeys(keys)), {}
    for start in range(0, len(keys), batch_size):
        part = keys[start : start + batch_size]
        pixel_values = torch.stack([load_image(key) for key in part]).to(base_model.device)
        pixel, semantic = base_model.get_image_codes(pixel_values)
        codes.update(zip(part, zip(pixel.cpu(), semantic.cpu())))
    return codes
