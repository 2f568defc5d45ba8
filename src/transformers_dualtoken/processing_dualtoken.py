# Copyright 2026 The transformers-dualtoken authors. All rights reserved.
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Processors: text, images and chats for the unified model, and images and captions for the vision tokenizer."""

import re
import secrets
import string
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, TextKwargs, Unpack
from transformers.utils import auto_docstring
from transformers.utils.chat_template_utils import render_jinja_template

from .chat_dualtoken import (
    CHAT_TEMPLATE,
    CODE_KEYS,
    check_text,
    encode_chat,
    image_data,
    image_parts,
    learned_spans,
    mark_special_tokens,
    normalize_chats,
    special_tokens_of,
    without_image_data,
    writes,
)
from .field_rules import at_least
from .image_processing_pil_dualtoken import DualTokenImageProcessorKwargs, post_process_images
from .image_reading import flatten_images


# What SigLIP 2's folders name. `SiglipTokenizer`, of SigLIP, does by itself what `as_trained` does.
_SIGLIP_2_TOKENIZERS = {"GemmaTokenizer", "GemmaTokenizerFast", "Siglip2Tokenizer"}
# Settings of a call that are neither the tokenizer's nor the image processor's.
_FLAGS = ("return_mm_token_type_ids", "return_text_replacement_offsets")
_IMAGE_TOKENS = ("image_start_token", "image_token", "image_end_token")
# What the inputs of a negative prompt are called in `generate`.
_NEGATIVE_INPUTS = {"input_ids": "negative_prompt_ids", "attention_mask": "negative_prompt_attention_mask"}
_NEGATIVE_INPUTS |= {name: f"negative_{name}" for name in ("pixel_values", *CODE_KEYS)}


class DualTokenProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: DualTokenImageProcessorKwargs

    _defaults = {}  # transformers 5.6 asks for it, and does not read those of the processor


def as_trained(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a SigLIP 2 folder, made to see texts as SigLIP 2's training did: lower case, without punctuation,
    every blank one space, padded on the right; special tokens in a text are text. Any other tokenizer is returned as
    it is. The rule is saved with the tokenizer that is returned, for whatever loads it, pipelines included.
    """
    if tokenizer is None or not _SIGLIP_2_TOKENIZERS & {base.__name__ for base in type(tokenizer).__mro__}:
        return tokenizer
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    # Of big_vision, as SigLIP's tokenizer does it. `-` and `]` have a meaning in a class of characters.
    punctuation = "".join("\\" + character for character in string.punctuation)
    rule = [
        normalizers.Lowercase(),
        normalizers.Replace(Regex(f"[{punctuation}]"), ""),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
    ]
    backend.normalizer = normalizers.Sequence([*rule, backend.normalizer] if backend.normalizer else rule)
    special_tokens = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    settings = {"model_max_length": tokenizer.model_max_length, "padding_side": "right", "split_special_tokens": True}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings, **special_tokens)


def _flatten_images(images) -> tuple[list, list[int] | None]:
    """All images in reading order, and how many each row has; `None` for a flat list, which does not tell."""
    if images is None:
        return [], None
    is_list = isinstance(images, (list, tuple))
    if not is_list or not any(row is None or isinstance(row, (list, tuple)) for row in images):
        return flatten_images(images), None
    rows = [[] if row is None else flatten_images(row) for row in images]
    return [image for row in rows for image in row], [len(row) for row in rows]


def _as_texts(text, name: str = "text") -> list[str]:
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(item, str) for item in texts):
        raise ValueError(f"`{name}` must be a string or a list of at least one string, got {text!r:.100}.")
    for item in texts:
        check_text(item)
    return list(texts)


def _negative_inputs(inputs: dict) -> dict:
    return {_NEGATIVE_INPUTS[name]: value for name, value in inputs.items() if name in _NEGATIVE_INPUTS}


def _negative_chats(negative_prompt) -> list:
    """Strings as conversations of one message, conversations as they are."""
    texts = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
    if isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts):
        return [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in texts]
    return negative_prompt


class _DualTokenProcessorMixin:
    """What both processors share."""

    valid_processor_kwargs = DualTokenProcessorKwargs
    text_kwargs: dict[str, Any]  # the tokenizer's settings, unless told otherwise

    def _merged_kwargs(self, kwargs: dict) -> dict[str, Any]:
        """`text_kwargs` and `images_kwargs`, the flat ones among them; beside them the flags and `return_tensors`."""
        text_kwargs = dict(kwargs.get("text_kwargs", {}))
        flags = {name: bool(text_kwargs.pop(name, kwargs.get(name, False))) for name in _FLAGS}
        # transformers 5.6 drops the flat ones beside `text_kwargs`. Those given twice are left for it to refuse.
        flat = (TextKwargs.__annotations__.keys() & kwargs.keys()) - text_kwargs.keys()
        text_kwargs |= {name: kwargs[name] for name in flat - flags.keys()}
        kwargs = {name: value for name, value in kwargs.items() if name not in flat and name not in flags}
        # Without the tokenizer's `init_kwargs`: a loaded one carries the padding and truncation of whatever it encoded
        # last before it was saved.
        merged = self._merge_kwargs(self.valid_processor_kwargs, **{**kwargs, "text_kwargs": text_kwargs})
        text_kwargs = {**self.text_kwargs, **merged["text_kwargs"]}
        text_kwargs.pop("sanitize_control_tokens", None)
        # Tensors are made at the end, from everything at once.
        return_tensors = text_kwargs.pop("return_tensors", None)
        return {**merged, **flags, "text_kwargs": text_kwargs, "return_tensors": return_tensors}

    def _features(self, data: dict, images: list, merged: dict[str, Any]) -> BatchFeature:
        if images:
            data.update(self.image_processor(images, **{**merged["images_kwargs"], "return_tensors": None}))
        return BatchFeature(data, tensor_type=merged["return_tensors"])

    post_process_images = staticmethod(post_process_images)


@auto_docstring(
    custom_intro=r"""
    Text, chats and images for [`DualTokenForCausalLM`].

    An image is `image_start_token`, `num_image_tokens` times `image_token`, `image_end_token` in the sequence, and one
    entry of `pixel_values` (images, 3, S, S); images are flat over the batch, in reading order.
    """
)
class DualTokenProcessor(_DualTokenProcessorMixin, ProcessorMixin):
    text_kwargs = {"padding": True, "padding_side": "left"}

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        num_image_tokens: int = 729,
        image_start_token: str = "<|vision_start|>",
        image_token: str = "<|image_pad|>",
        image_end_token: str = "<|vision_end|>",
    ):
        r"""
        chat_template (`str`, *optional*):
            Defaults to ChatML. No system prompt is added to a conversation without one.
        num_image_tokens (`int`, *optional*, defaults to 729):
            Positions per image, `config.num_positions` of the model.
        image_start_token (`str`, *optional*, defaults to `"<|vision_start|>"`):
            Of the tokenizer, like the other two: it must have them. `image_start_token_id` is its id.
        image_token (`str`, *optional*, defaults to `"<|image_pad|>"`):
            Stands at each position of an image. `image_token_id` is its id.
        image_end_token (`str`, *optional*, defaults to `"<|vision_end|>"`):
            `image_end_token_id` is its id.
        """
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        at_least(1).check("num_image_tokens", num_image_tokens)
        self.num_image_tokens = num_image_tokens
        vocabulary = tokenizer.get_vocab()
        for name, token in zip(_IMAGE_TOKENS, (image_start_token, image_token, image_end_token)):
            if token not in vocabulary:
                raise ValueError(
                    f"The tokenizer has no token {token!r}, which `{name}` names. Name one of its special tokens, or add "
                    "this one to the tokenizer and a row for it to the model's embeddings."
                )
            setattr(self, name, token)
            setattr(self, f"{name}_id", vocabulary[token])

    @property
    def ids_of_image(self) -> list[int]:
        """Its start, its positions, its end."""
        return [self.image_start_token_id, *[self.image_token_id] * self.num_image_tokens, self.image_end_token_id]

    def image_pattern(self, unmarked: str = "") -> str:
        """Regular expression of an image in a prompt. A bare `image_token` counts, and gets its start and end."""
        start, token, end = (re.escape(getattr(self, name)) for name in _IMAGE_TOKENS)
        return f"(?:{unmarked}{start})?{unmarked}{token}(?:{end})?"

    def _expand_images(self, prompt: str) -> tuple[str, list[dict[str, Any]]]:
        """The prompt with every image at its length, and what was put in the place of each `image_token`."""
        pieces, replacements, last, grown = [], [], 0, 0
        for match in re.finditer(self.image_pattern(), prompt):
            before, token, after = match.group().partition(self.image_token)
            text = token * self.num_image_tokens
            text = ("" if before else self.image_start_token) + text + ("" if after else self.image_end_token)
            at = match.start() + len(before)
            pieces += [prompt[last:at], text]
            last = at + len(token)
            spans = {"span": (at, last), "new_span": (at + grown, at + grown + len(text))}
            replacements.append({"type": "image", "text": token, "replacement": text, **spans})
            grown += len(text) - len(token)
        return "".join([*pieces, prompt[last:]]), replacements

    @auto_docstring
    def __call__(
        self,
        images=None,
        text=None,
        videos=None,
        audio=None,
        placeholders_only: bool = False,
        negative_prompt: str | list[str] | None = None,
        **kwargs: Unpack[DualTokenProcessorKwargs],
    ) -> BatchFeature:
        r"""
        images (*optional*):
            PIL images, arrays, tensors, paths or URLs: one, a flat list in reading order, or one list per prompt.
        text (`str` or `list[str]`, *optional*):
            Rendered prompts, an image in them written as `<|vision_start|><|image_pad|><|vision_end|>`; the one
            `<|image_pad|>` is repeated here. Special tokens count as such: for the text of a user take
            [`~DualTokenProcessor.apply_chat_template`].
        placeholders_only (`bool`, *optional*, defaults to `False`):
            The prompts may show images that are not given, because the model gets their codes instead.
        negative_prompt (`str` or `list[str]`, *optional*):
            Rendered prompts without images that an image is guided away from, one for all or one for each;
            `<|vision_start|>` is added where it does not end them.

        Returns:
            [`BatchFeature`]: `input_ids` and `attention_mask` (B, L), padded on the left unless told otherwise, and
            `pixel_values` (images, 3, S, S) in [-1, 1]; of a negative prompt `negative_prompt_ids` and
            `negative_prompt_attention_mask`; with `return_text_replacement_offsets` also `text_replacement_offsets`, of
            every prompt's images a dict of `type` ("image"), `text`, `replacement`, and their places `span` and
            `new_span`: what engines such as vLLM put in the place of `<|image_pad|>`.
        """
        images, row_counts = _flatten_images(images)
        if videos is not None or audio is not None:
            raise ValueError("Only text and images are supported, got videos or audio.")
        if not images and text is None:
            raise ValueError("Give `text`, `images` or both, got neither.")
        merged = self._merged_kwargs(kwargs)
        data, replacements = {}, None
        if text is not None:
            prompts = _as_texts(text)
            if "" in prompts:
                raise ValueError(f"A prompt must not be empty, but prompt {prompts.index('')} of {len(prompts)} is.")
            counts = [prompt.count(self.image_token) for prompt in prompts]
            if images or not placeholders_only:
                self._check_counts(counts, len(images), row_counts)
            prompts, replacements = zip(*map(self._expand_images, prompts))
            data = self._finish_text(dict(self.tokenizer(list(prompts), **merged["text_kwargs"])), counts, merged)
        features = self._features(data, images, merged)
        if replacements and merged["return_text_replacement_offsets"]:
            features["text_replacement_offsets"] = list(replacements)
        if negative_prompt is not None:
            start, texts = self.image_start_token, _as_texts(negative_prompt, "negative_prompt")
            negative = self(text=[text if text.endswith(start) else text + start for text in texts], **kwargs)
            features.update(_negative_inputs(negative))
        return features

    def _check_counts(self, counts: list[int], num_images: int, row_counts: list[int] | None):
        if row_counts is not None and len(row_counts) != len(counts):
            lengths = f"got {len(row_counts)} lists, {len(counts)} prompts"
            raise ValueError(f"Nested `images` must have one list per prompt: {lengths}.")
        compared = [(f"Prompt {row} has", *pair) for row, pair in enumerate(zip(counts, row_counts or ()))]
        for who, shown, given in [*compared, ("The prompts have", sum(counts), num_images)]:
            if shown != given:
                placeholders = f"{shown} image placeholders ({self.image_token!r})"
                raise ValueError(f"{who} {placeholders}, but {given} images were given; the numbers must be equal.")

    def _finish_text(self, data: dict, counts: list[int], merged: dict[str, Any]) -> dict:
        for index, (ids, count) in enumerate(zip(data["input_ids"], counts)):
            wanted, found = count * self.num_image_tokens, ids.count(self.image_token_id)
            if found != wanted:
                positions = f"{wanted} image positions for its {count} images, but has {found}"
                raise ValueError(f"Row {index} needs {positions}: truncation cut an image. Raise `max_length`.")
        if merged["return_mm_token_type_ids"]:
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        return data

    def create_mm_token_type_ids(self, input_ids: list[list[int]]) -> list[list[int]]:
        """1 at image positions, 0 elsewhere."""
        return [[int(token_id == self.image_token_id) for token_id in ids] for ids in input_ids]

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Positions per image, whatever its size; read by vLLM."""
        ones = None if image_sizes is None else [1] * len(image_sizes)
        return MultiModalData(num_image_tokens=ones and [self.num_image_tokens] * len(ones), num_image_patches=ones)

    def post_process_multimodal_output(
        self, generated_outputs, skip_special_tokens: bool = True, generation_mode: str | None = None, **kwargs
    ) -> list:
        """Texts of generated ids, or with `generation_mode="image"` PIL images of what `decode_image_tokens` made."""
        if generation_mode == "image":
            return self.post_process_images(generated_outputs)
        if generation_mode not in (None, "text"):
            raise ValueError(f"`generation_mode` must be 'text' or 'image', got {generation_mode!r}.")
        if getattr(generated_outputs, "ndim", 2) > 2:
            advice = "a pipeline draws when it is called with `generation_mode='image'` itself, not within `generate_kwargs`"
            raise ValueError(f"Image mode returned codes and no text: {advice}.")
        return self.post_process_image_text_to_text(generated_outputs, skip_special_tokens, **kwargs)

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        tools: list | None = None,
        documents: list | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        generate_image: bool = False,
        placeholders_only: bool = False,
        negative_prompt: str | list | None = None,
        processor_kwargs: dict | None = None,
        **kwargs,
    ):
        r"""
        Render one conversation or a batch of them; with `tokenize=True` prepare the model's inputs.

        A message is `{"role": ..., "content": ...}`, its role `system`, `user`, `assistant` or one that a template of
        one's own names, its content a string or a list of parts: `{"type": "text", "text": ...}`; `{"type": "image",
        "image": ...}` with whatever [`locate_image`] takes (or the keys `url`, `path`, `base64`, `bytes`, and OpenAI's
        `image_url` parts); `{"type": "image", "pixel_codes": ..., "semantic_codes": ...}` with codes (H, W, D).

        With `tokenize=True` every special token that occurs in a message, a role, a tool or another variable of the
        template stays plain text: only those the template itself writes are control tokens. The string returned with
        `tokenize=False` has lost that distinction; do not tokenize text of strangers from it.

        Args:
            add_generation_prompt (`bool`): end with the head of an answer.
            continue_final_message (`bool`): leave the last message open; it must end in text.
            generate_image (`bool`): end with `<|vision_start|>`, after the generation prompt or the open message.
            return_assistant_tokens_mask (`bool`): add `assistant_masks` (B, L), 1 at the content of assistant messages
                (their images included) and the `<|im_end|>` that closes it.
            placeholders_only (`bool`): process no image, because the model gets the codes of all images otherwise; the
                image parts may then lack image data.
            return_dict (`bool`): return all inputs instead of `input_ids` alone.
            negative_prompt (`str`, list of them or conversations, *optional*): what an image is guided away from, one
                for all conversations or one for each. A string is what the user says.
            processor_kwargs (`dict`): settings of the tokenizer and the image processor (`padding`, `max_length`,
                `resize_mode`, ...), and `images` for image parts without data. They are also taken from `**kwargs`;
                what the template mentions goes to the template. **A message may name any file and any URL** unless
                `image_sources="data"` is among them.

        Returns:
            `str` or `list[str]`, or with `tokenize=True` a [`BatchFeature`] of `input_ids`, `attention_mask`, and
            `pixel_values` (images, 3, S, S) or `pixel_codes` and `semantic_codes` (images, H, W, D), as `generate`
            takes them; of a negative prompt the same under the names of its arguments (`negative_prompt_ids`, ...).

        Raises:
            ValueError: for conversations of another form, images of more than one sort, and flags that exclude each
                other.
        """
        if add_generation_prompt and continue_final_message:
            raise ValueError("`continue_final_message` and `add_generation_prompt` exclude each other.")
        if return_assistant_tokens_mask and (continue_final_message or not tokenize):
            raise ValueError("`return_assistant_tokens_mask` needs `tokenize=True`, without `continue_final_message`.")
        if generate_image and not (add_generation_prompt or continue_final_message):
            raise ValueError("`generate_image` needs `add_generation_prompt=True` or `continue_final_message=True`.")
        if negative_prompt is not None and not (tokenize and return_dict):
            raise ValueError("`negative_prompt` gives inputs: it needs `tokenize=True` and `return_dict=True`.")
        templates = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        template = templates.get(chat_template or "default", chat_template)
        if template is None:
            raise ValueError(
                f"Of the chat templates {', '.join(templates)} none is 'default': name a `chat_template`."
            )
        for name, value in (("tools", tools), ("documents", documents)):
            if value and not writes(template, name):
                advice = "so the model would know nothing of them; put them into a message"
                raise ValueError(f"The chat template does not write `{name}`, {advice}.")
        kwargs.pop("load_audio_from_video", None)
        settings = {**(processor_kwargs or {}), **{k: v for k, v in kwargs.items() if not writes(template, k)}}
        variables = {name: value for name, value in kwargs.items() if name not in settings}
        given = settings.pop("images", None)
        if return_tensors not in (None, "auto"):
            settings["return_tensors"] = return_tensors

        chats, batched = normalize_chats(conversation, template)
        parts = [image_parts(chat) for chat in chats]
        counts = [len(parts_of_chat) for parts_of_chat in parts]
        images, codes = [], {}
        if tokenize and given is not None:
            images, row_counts = _flatten_images(given)
            self._check_counts(counts, len(images), row_counts)
        elif tokenize and not placeholders_only:
            images, codes = image_data(sum(parts, []), self.num_image_tokens)

        chats_without_images = [[without_image_data(message) for message in chat] for chat in chats]
        outside = {**variables, "conversations": chats_without_images, "tools": tools, "documents": documents}
        marker = f"{secrets.randbelow(10**32):032}"  # digits, because no template filter changes them
        if tokenize:
            specials = special_tokens_of(self)
            outside = {name: mark_special_tokens(value, marker, specials) for name, value in outside.items()}
        own_tokens = {name: getattr(self, name) for name in _IMAGE_TOKENS}
        rendered, spans = render_jinja_template(
            chat_template=template,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            continue_final_message=continue_final_message,
            add_generation_prompt=add_generation_prompt,
            **{**self.tokenizer.special_tokens_map, **own_tokens, **outside},
        )
        if generate_image:
            rendered = [prompt + self.image_start_token for prompt in rendered]
        if not tokenize:
            return rendered if batched else rendered[0]

        learned = [learned_spans(*each) for each in zip(chats, spans)] or [None] * len(chats)
        rows, masks = zip(*(encode_chat(self, prompt, marker, ranges) for prompt, ranges in zip(rendered, learned)))
        for row, count in zip(rows, counts):
            shown = row.count(self.image_token_id) // self.num_image_tokens
            if shown != count:
                rule = "The template must write one per image part, and a message to be continued must end in text"
                raise ValueError(f"A conversation has {count} images, but its rendered form has {shown}. {rule}.")
        merged = self._merged_kwargs(settings)
        data = self._pad(rows, masks if return_assistant_tokens_mask else None, merged["text_kwargs"])
        data = {**self._finish_text(data, counts, merged), **codes}
        features = self._features(data, flatten_images(images), merged)
        if negative_prompt is not None:
            negative_chats = _negative_chats(negative_prompt)
            ends = {"add_generation_prompt": True, "generate_image": True, "tokenize": True, "return_dict": True}
            given = {"tools": tools, "documents": documents, "processor_kwargs": settings, **variables}
            features.update(_negative_inputs(self.apply_chat_template(negative_chats, template, **ends, **given)))
        return features if return_dict else features["input_ids"]

    def _pad(self, rows: list[list[int]], masks: list[list[int]] | None, text_kwargs: dict[str, Any]) -> dict:
        """Truncate and pad encoded rows as the tokenizer would."""
        max_length = text_kwargs.get("max_length")
        if text_kwargs.get("truncation") and max_length is not None:
            kept = slice(max_length) if self.tokenizer.truncation_side == "right" else slice(-max_length, None)
            rows = [row[kept] for row in rows]
            masks = masks and [mask[kept] for mask in masks]
        names = ("padding", "max_length", "pad_to_multiple_of", "padding_side", "return_attention_mask")
        encoded = (
            {"input_ids": rows} if masks is None else {"input_ids": rows, "token_type_ids": masks}
        )  # padded with 0
        data = dict(self.tokenizer.pad(encoded, **{name: text_kwargs.get(name) for name in names}))
        if masks is not None:
            data["assistant_masks"] = data.pop("token_type_ids")
        return data


@auto_docstring(custom_intro="Images and captions for [`DualTokenVisionTokenizer`].")
class DualTokenVisionTokenizerProcessor(_DualTokenProcessorMixin, ProcessorMixin):
    # SigLIP was trained on texts padded to one length, padding attended.
    text_kwargs = {"padding": "max_length", "truncation": True, "return_attention_mask": False}

    def __init__(self, image_processor=None, tokenizer=None, text_length: int = 64):
        r"""
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer of the SigLIP checkpoint. That of a SigLIP 2 folder, which names Gemma's, becomes one that sees
            texts in lower case and without punctuation, as SigLIP 2's training did; SigLIP's does so by itself.
        text_length (`int`, *optional*, defaults to 64):
            Tokens every caption is padded or cut to, as SigLIP was trained.
        """
        super().__init__(image_processor, as_trained(tokenizer))
        at_least(1).check("text_length", text_length)
        self.text_length = text_length

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", *self.image_processor.model_input_names]

    @auto_docstring
    def __call__(self, images=None, text=None, **kwargs: Unpack[DualTokenProcessorKwargs]) -> BatchFeature:
        r"""
        text (`str` or `list[str]`, *optional*):
            Captions. Their number need not be that of the images.

        Returns:
            [`BatchFeature`]: `input_ids` (texts, text_length), without an attention mask as in SigLIP's training, and
            `pixel_values` (images, 3, S, S) in [-1, 1].
        """
        images, _ = _flatten_images(images)
        if not images and text is None:
            raise ValueError("Give `text`, `images` or both, got neither.")
        merged = self._merged_kwargs(kwargs)
        settings = {"max_length": self.text_length, **merged["text_kwargs"]}
        data = {} if text is None else dict(self.tokenizer(_as_texts(text), **settings))
        return self._features(data, images, merged)


__all__ = ["DualTokenProcessor", "DualTokenVisionTokenizerProcessor"]
