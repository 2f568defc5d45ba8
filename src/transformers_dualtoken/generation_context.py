"""What the language model has seen: prompts, and the states of generation that grow from them."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicCache


@dataclass
class Prompt:
    """A batch of prompts: ids and mask `(B, L)`, and their images' codes `(images, h, w, D)` in reading order."""

    input_ids: torch.LongTensor
    attention_mask: torch.LongTensor
    codes: tuple[torch.LongTensor, torch.LongTensor] | None

    def __len__(self) -> int:
        return len(self.input_ids)

    def model_inputs(self) -> dict:
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.codes is not None:
            inputs["pixel_codes"], inputs["semantic_codes"] = self.codes
        return inputs


def _left_pad(prompt: Prompt, length: int, pad_token_id: int) -> Prompt:
    missing = length - prompt.input_ids.shape[1]
    pad = torch.nn.functional.pad
    return Prompt(
        pad(prompt.input_ids, (missing, 0), value=pad_token_id),
        pad(prompt.attention_mask, (missing, 0), value=0),
        prompt.codes,
    )


def stack_prompts(first: Prompt, second: Prompt, pad_token_id: int) -> Prompt:
    """The rows of two batches in one, left-padded to one length."""
    length = max(first.input_ids.shape[1], second.input_ids.shape[1])
    first, second = _left_pad(first, length, pad_token_id), _left_pad(second, length, pad_token_id)
    codes = [prompt.codes for prompt in (first, second) if prompt.codes is not None]
    return Prompt(
        torch.cat([first.input_ids, second.input_ids]),
        torch.cat([first.attention_mask, second.attention_mask]),
        tuple(torch.cat(kind) for kind in zip(*codes)) if codes else None,
    )


class Context:
    """The language model's state over a batch of rows: its cache, mask and positions."""

    def __init__(self, model, prompt: Prompt, cache):
        self.model, self.cache = model, cache
        self.attention_mask = prompt.attention_mask
        outputs = model.model(**prompt.model_inputs(), past_key_values=cache, use_cache=True, return_dict=True)
        self.hidden_states = outputs.last_hidden_state[:, -1]
        self.next_position = self.attention_mask.sum(-1, keepdim=True)

    def step(self, embeds: torch.Tensor) -> torch.Tensor:
        """Feed one embedding per row, `(B, 1, H)`; returns the new hidden states `(B, H)`."""
        self.attention_mask = torch.cat(
            [self.attention_mask, self.attention_mask.new_ones(len(self.attention_mask), 1)], dim=1
        )
        outputs = self.model.model.language_model(
            inputs_embeds=self.model.model.for_backbone(embeds),
            attention_mask=self.attention_mask,
            position_ids=self.next_position,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        )
        self.next_position = self.next_position + 1
        self.hidden_states = outputs.last_hidden_state[:, -1]
        return self.hidden_states


class UnconditionalContext:
    """
    The unconditional side of guidance where rows start and end their images at different times.

    All rows share one cache. A row's mask shows it the negative prompt (if any) and its current image only, and its
    positions count from there, so that it sees exactly what it would see alone. Rows without an image ride along
    unseen. When no row has an image the cache is cut back to the negative prompt.
    """

    def __init__(self, model, prompt: Prompt):
        self.model = model
        # The final <image_start> is fed when a row starts an image.
        self.prefix = Prompt(prompt.input_ids[:, :-1], prompt.attention_mask[:, :-1], prompt.codes)
        self.prefix_length = self.prefix.input_ids.shape[1]
        self.prefix_positions = self.prefix.attention_mask.sum(-1)
        self.next_position = self.prefix_positions.clone()
        self.attention_mask = self.prefix.attention_mask
        self.cache = DynamicCache(config=model.config.text_config)
        if self.prefix_length:
            model.model(**self.prefix.model_inputs(), past_key_values=self.cache, use_cache=True)
        self.hidden_states = None

    def _cut_back(self) -> None:
        """Keep the negative prompt only."""
        surplus = self.attention_mask.shape[1] - self.prefix_length
        if surplus == 0:
            return
        self.attention_mask = self.prefix.attention_mask
        if self.prefix_length:
            self.cache.crop(-surplus)
        else:
            self.cache = DynamicCache(config=self.model.config.text_config)

    def step(self, embeds: torch.Tensor, starts: list[int], goes_on: list[int]) -> None:
        """Feed `(B, 1, H)`: rows in `starts` begin an image with it, rows in `goes_on` continue theirs."""
        if not starts and not goes_on:
            self._cut_back()
            return
        mask = self.attention_mask.clone()
        hidden_past = torch.ones(len(mask), dtype=torch.bool, device=mask.device)
        hidden_past[goes_on] = False
        mask[hidden_past, self.prefix_length :] = 0
        self.next_position = torch.where(hidden_past, self.prefix_positions, self.next_position)
        self.attention_mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        outputs = self.model.model.language_model(
            inputs_embeds=self.model.model.for_backbone(embeds),
            attention_mask=self.attention_mask,
            position_ids=self.next_position[:, None],
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        )
        self.next_position = self.next_position + 1
        self.hidden_states = outputs.last_hidden_state[:, -1]


__all__ = ["Context", "Prompt", "UnconditionalContext", "stack_prompts"]
