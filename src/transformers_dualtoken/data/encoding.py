"""From an example to what the model is trained on: token ids, labels, and images as pixels or codes."""

import random
from dataclasses import dataclass, field

import jinja2
import numpy as np
import torch

from ..chat_dualtoken import (
    CODE_KEYS,
    check_text,
    image_data,
    image_parts,
    is_learned,
    keys_beside_content,
    part_image,
)
from ..field_rules import at_least, within
from ..image_reading import UnreadableImageError, image_name, read_image
from ..processing_dualtoken import DualTokenProcessor
from .formats import normalized
from .samples import BadSampleError


@dataclass
class EncodedExample:
    """
    An example as ids (L,), int32, each image as `<image_start>`, N placeholders, `<image_end>`; what of them is learned
    (L,), bool; its image parts, in reading order; and whether the end was cut off to fit `max_length`.
    """

    input_ids: np.ndarray
    is_target: np.ndarray
    images: list[dict] = field(default_factory=list)
    cut: bool = False


class ChatEncoder:
    """
    Examples as samples for [`DualTokenForCausalLM`].

    Of a chat all the assistant says is a target, images included, but for messages with `weight` 0 or `train` false;
    everything else is context. Of a document everything is, and it ends in the tokenizer's end-of-sequence token.
    Special tokens that occur in a text stay text.

    For guidance, a share of the samples that draw an image forget their prompt: all before the first drawn image's
    `<image_start>` is left out, which leaves `<image_start>` at position 0, as at generation.

    Args:
        processor ([`DualTokenProcessor`]).
        max_length (`int`, *optional*): tokens a sample may have.
        cut_long_samples (`bool`, defaults to `False`): cut what is longer, before an image rather than within it;
            otherwise it is a bad sample.
        prompt_drop_probability (`float`, defaults to 0.1).

    Raises:
        ValueError: for settings out of range.
    """

    def __init__(
        self,
        processor: DualTokenProcessor,
        max_length: int | None = None,
        cut_long_samples: bool = False,
        prompt_drop_probability: float = 0.1,
    ):
        at_least(2).check_given(max_length=max_length)
        if cut_long_samples and max_length is None:
            raise ValueError("`cut_long_samples` needs a `max_length` to cut at.")
        within(float, 0, 1).check("prompt_drop_probability", prompt_drop_probability)
        if processor.tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no `eos_token`, which closes every document.")
        self.processor, self.max_length, self.cut_long_samples = processor, max_length, cut_long_samples
        self.prompt_drop_probability = prompt_drop_probability
        self.image_ids = np.array(processor.ids_of_image, dtype=np.int32)
        self.image_token_id = processor.image_token_id

    @property
    def settings(self) -> list:
        """What decides the ids of an example: the tokenizer, the chat template, the image tokens, and the lengths."""
        tokenizer = self.processor.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        vocabulary = tokenizer.get_vocab() if backend is None else backend.to_str()
        chats = [self.processor.chat_template, self.processor.ids_of_image, tokenizer.special_tokens_map]
        return [vocabulary, *chats, self.max_length, self.cut_long_samples]

    def encode(self, example: dict) -> EncodedExample:
        """
        Raises:
            BadSampleError: if the example has no target, an image without data, is longer than `max_length` (or, cut,
                has no target left), or is of another form.
        """
        if ("messages" in example) == ("content" in example):
            raise BadSampleError("it must have either 'messages' (a chat) or 'content' (a document)")
        encode = self._encode_chat if "messages" in example else self._encode_document
        try:
            messages = _messages(example)
            input_ids, is_target = encode(messages, example)
        except BadSampleError:
            raise
        except (ValueError, jinja2.TemplateError) as error:
            raise BadSampleError(f"it cannot be rendered ({error})") from error
        encoded = EncodedExample(input_ids, is_target, image_parts(messages))
        for number, part in enumerate(encoded.images):
            if part_image(part) is None and not any(part.get(key) is not None for key in CODE_KEYS):
                raise BadSampleError(f"its image {number} has no image data: the part is {part!r:.200}")
        if self.max_length is not None and len(input_ids) > self.max_length:
            encoded = self._cut(encoded)
        # Nothing predicts the first token.
        encoded.is_target[:1] = False
        if not encoded.is_target.any():
            missing = "no assistant message that is learned" if "messages" in example else "no content"
            raise BadSampleError(f"it has {missing}, so nothing to learn")
        return encoded

    @staticmethod
    def images(example: dict) -> list[dict]:
        """The image parts of an example, in reading order."""
        return image_parts(_messages(example))

    def _encode_chat(self, messages: list[dict], example: dict) -> tuple[np.ndarray, np.ndarray]:
        encoded = self.processor.apply_chat_template(
            messages,
            tools=example.get("tools"),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            placeholders_only=True,
        )
        for number, message in enumerate(messages):
            parts = message["content"]
            is_empty = not any(isinstance(part, str) or part.get("text") != "" for part in parts)
            if is_learned(message) and is_empty and not keys_beside_content(message):
                raise BadSampleError(f"the assistant says nothing in message {number}, and that would be learned")
        return np.array(encoded["input_ids"][0], np.int32), np.array(encoded["assistant_masks"][0], bool)

    def _encode_document(self, messages: list[dict], example: dict) -> tuple[np.ndarray, np.ndarray]:
        content, ids = messages[0]["content"], []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "image":
                ids.append(self.image_ids)
            elif part["text"]:
                check_text(part["text"])
                tokens = self.processor.tokenizer(part["text"], add_special_tokens=False, split_special_tokens=True)
                ids.append(np.array(tokens["input_ids"], dtype=np.int32))
        if not ids:
            raise BadSampleError("it has no content, so nothing to learn")
        input_ids = np.concatenate([*ids, np.array([self.processor.tokenizer.eos_token_id], dtype=np.int32)])
        return input_ids, np.ones(len(input_ids), dtype=bool)

    def _cut(self, encoded: EncodedExample) -> EncodedExample:
        length, end = len(encoded.input_ids), self.max_length
        if not self.cut_long_samples:
            raise BadSampleError(f"it has {length} tokens, more than `max_length` = {self.max_length}")
        starts = self.image_starts(encoded.input_ids)
        end = next((int(start) for start in starts if start < end < start + len(self.image_ids)), end)
        kept = [part for start, part in zip(starts, encoded.images) if start < end]
        if not encoded.is_target[1:end].any():
            left = f"nothing to learn is left before `max_length` = {self.max_length}"
            raise BadSampleError(f"it has {length} tokens, and {left}")
        return EncodedExample(encoded.input_ids[:end].copy(), encoded.is_target[:end].copy(), kept, cut=True)

    def image_starts(self, input_ids: np.ndarray) -> np.ndarray:
        """Where the `<image_start>` of every image stands."""
        placeholders = np.flatnonzero(input_ids == self.image_token_id)
        return placeholders[:: len(self.image_ids) - 2] - 1

    def _drop_start(self, encoded: EncodedExample, key: str) -> int:
        """Where a sample begins: at 0, or where its prompt is dropped at its first drawn image's `<image_start>`."""
        if random.Random(f"{key}/prompt").random() >= self.prompt_drop_probability:
            return 0
        drawn = np.flatnonzero(encoded.is_target & (encoded.input_ids == self.image_token_id))
        return int(drawn[0]) - 1 if len(drawn) else 0

    def sample(self, encoded: EncodedExample, key: str) -> dict[str, torch.Tensor]:
        """
        `input_ids` (L,) and `labels` (L,), int64, and of n images either `pixel_values` (n, 3, S, S) float32 or
        `pixel_codes` and `semantic_codes` (n, h, w, D) int64. Whether the prompt is dropped depends on `key` only.

        Raises:
            BadSampleError: for an image that cannot be read, or if some images have codes and others have not.
        """
        start = self._drop_start(encoded, key)
        input_ids = torch.from_numpy(encoded.input_ids[start:].astype(np.int64))
        is_target = torch.from_numpy(encoded.is_target[start:].copy())
        is_target[0] = False
        num_dropped = int((self.image_starts(encoded.input_ids) < start).sum())
        labels = input_ids.masked_fill(~is_target, -100)
        return {"input_ids": input_ids, "labels": labels, **self._images(encoded.images[num_dropped:])}

    def _images(self, parts: list[dict]) -> dict[str, torch.Tensor]:
        try:
            images, codes = image_data(parts, len(self.image_ids) - 2)
        except ValueError as error:
            raise BadSampleError(str(error)) from error
        if images:
            processor = self.processor.image_processor
            return {"pixel_values": torch.stack([read_pixel_values(image, processor) for image in images])}
        return {key: torch.from_numpy(stacked) for key, stacked in codes.items()}


def read_pixel_values(value, image_processor) -> torch.Tensor:
    """`pixel_values` (3, S, S) of an image, as a part holds it."""
    try:
        image = read_image(value)
    except (TypeError, UnreadableImageError) as error:
        name = image_name(value) or "without a name"
        raise BadSampleError(f"its image {name} cannot be used: {error}") from error
    return image_processor(images=image, return_tensors="pt").pixel_values[0]


def _messages(example: dict) -> list[dict]:
    """The messages of an example, normalised; a document is one without a role."""
    if "messages" in example:
        return normalized(example["messages"])
    return normalized([{"role": "", "content": example["content"]}])
