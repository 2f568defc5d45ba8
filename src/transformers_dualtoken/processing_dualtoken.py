"""Processors: text, images and chats for the unified model, and images and captions for the vision tokenizer."""

from typing import Any

from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, TextKwargs, Unpack
from transformers.utils.chat_template_utils import render_jinja_template

from .chat_dualtoken import (
    CHAT_TEMPLATE,
    ImageTokens,
    check_text,
    encode_chats,
    image_data,
    image_parts,
    learned_spans,
    mark_special_tokens,
    new_marker,
    normalize_chats,
    special_tokens_of,
    stack_codes,
    without_image_data,
    writes,
)
from .image_processing_pil_dualtoken import DualTokenImageProcessorKwargs, post_process_images
from .image_reading import flatten_images
from .siglip_text import as_trained


class DualTokenTextKwargs(TextKwargs, total=False):
    # Before transformers knew it itself, it dropped the name.
    return_text_replacement_offsets: bool | None


class DualTokenProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: DualTokenImageProcessorKwargs
    text_kwargs: DualTokenTextKwargs

    # Class variables of the processor are the newer way, but transformers 5.6 does not read those.
    _defaults = {"text_kwargs": {"padding": True, "padding_side": "left"}}


class DualTokenVisionTokenizerProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: DualTokenImageProcessorKwargs

    # SigLIP was trained on texts padded to one length, padding attended.
    _defaults = {"text_kwargs": {"padding": "max_length", "truncation": True, "return_attention_mask": False}}


def _flatten_images(images) -> tuple[list, list[int] | None]:
    """All images in reading order, and how many each row has; `None` for a flat list, which does not tell."""
    if images is None or (isinstance(images, (list, tuple)) and not images):
        return [], None
    if isinstance(images, (list, tuple)) and any(row is None or isinstance(row, (list, tuple)) for row in images):
        rows = [row if isinstance(row, (list, tuple)) else [] if row is None else [row] for row in images]
        rows = [flatten_images(row) for row in rows]
        return [image for row in rows for image in row], [len(row) for row in rows]
    return flatten_images(images), None


def _as_texts(text) -> list[str]:
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(item, str) for item in texts):
        raise ValueError(f"`text` must be a string or a list of at least one string, got {text!r:.100}.")
    for item in texts:
        check_text(item)
    return list(texts)


# What the inputs of a negative prompt are called in `generate`.
_NEGATIVE_INPUTS = {
    "input_ids": "negative_prompt_ids",
    "attention_mask": "negative_prompt_attention_mask",
    "pixel_values": "negative_pixel_values",
    "pixel_codes": "negative_pixel_codes",
    "semantic_codes": "negative_semantic_codes",
}


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

    def _image_inputs(self, images: list, merged: dict[str, Any]) -> dict:
        if not images:
            return {}
        return dict(self.image_processor(images, **{**merged["images_kwargs"], "return_tensors": None}))

    def post_process_images(self, reconstruction) -> list:
        """Decoded images, floating point (B, 3, S', S') or (3, S', S') in [-1, 1], as a list of PIL images."""
        return post_process_images(reconstruction)


class DualTokenProcessor(_DualTokenProcessorMixin, ProcessorMixin):
    r"""
    Text, chats and images for [`DualTokenForCausalLM`].

    An image is `image_start_token`, `num_image_tokens` times `image_token`, `image_end_token` in the sequence, and one
    entry of `pixel_values` (images, 3, S, S); images are flat over the batch, in reading order.

    Args:
        image_processor ([`DualTokenImageProcessor`] or [`DualTokenImageProcessorPil`])
        tokenizer (`PreTrainedTokenizerBase`): a Qwen2 tokenizer.
        chat_template (`str`, *optional*): defaults to ChatML. No system prompt is added to a conversation without one.
        num_image_tokens (`int`, defaults to 729): positions per image, `config.num_positions` of the model.
        image_start_token, image_token, image_end_token (`str`): default to Qwen2.5's `<|vision_start|>`,
            `<|image_pad|>` and `<|vision_end|>`. Their ids come from the tokenizer: `image_start_token_id`,
            `image_token_id`, `image_end_token_id`.

    Raises:
        ValueError: if the tokenizer lacks one of the three tokens, or `num_image_tokens` is below 1.
    """

    valid_processor_kwargs = DualTokenProcessorKwargs

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
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        if num_image_tokens < 1:
            raise ValueError(f"`num_image_tokens` must be at least 1, got {num_image_tokens}.")
        self.num_image_tokens = num_image_tokens
        self.image_start_token = image_start_token
        self.image_token = image_token
        self.image_end_token = image_end_token
        self.image_start_token_id = self._token_id("image_start_token")
        self.image_token_id = self._token_id("image_token")
        self.image_end_token_id = self._token_id("image_end_token")

    def _token_id(self, name: str) -> int:
        token_id = self.tokenizer.get_vocab().get(getattr(self, name))
        if token_id is None:
            raise ValueError(
                f"The tokenizer has no token {getattr(self, name)!r}, which `{name}` names. Name one of its special "
                "tokens, or add this one to the tokenizer and a row for it to the model's embeddings."
            )
        return token_id

    @property
    def image_tokens(self) -> ImageTokens:
        return ImageTokens(
            start=self.image_start_token,
            pad=self.image_token,
            end=self.image_end_token,
            start_id=self.image_start_token_id,
            pad_id=self.image_token_id,
            end_id=self.image_end_token_id,
            count=self.num_image_tokens,
        )

    def _merged_kwargs(self, kwargs: dict) -> dict[str, Any]:
        if "text_kwargs" in kwargs:
            # transformers 5.6 drops the flat ones beside it. Those given twice are left for it to refuse.
            given = kwargs["text_kwargs"]
            flat = {name for name in DualTokenTextKwargs.__annotations__ if name in kwargs and name not in given}
            given = {**given, **{name: kwargs[name] for name in flat}}
            kwargs = {name: value for name, value in kwargs.items() if name not in flat} | {"text_kwargs": given}
        # Without the tokenizer's `init_kwargs`: a loaded one carries the padding and truncation of whatever it encoded
        # last before it was saved.
        merged = self._merge_kwargs(self.valid_processor_kwargs, **kwargs)
        text_kwargs = merged["text_kwargs"]
        text_kwargs.pop("sanitize_control_tokens", None)
        for name in ("return_mm_token_type_ids", "return_text_replacement_offsets"):
            merged[name] = bool(text_kwargs.pop(name, merged.get(name, False)))
        # Tensors are made at the end, from everything at once.
        merged["return_tensors"] = text_kwargs.pop("return_tensors", None)
        return merged

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
        Prepare rendered prompts and images. Special tokens in `text` count as such: for the text of a user take
        [`~DualTokenProcessor.apply_chat_template`].

        Args:
            images (*optional*): PIL images, arrays, tensors, paths or URLs: one, a flat list in reading order, or one
                list per prompt.
            text (`str` or `list[str]`, *optional*): prompts, an image in them written as
                `<|vision_start|><|image_pad|><|vision_end|>`; the one `<|image_pad|>` is repeated here.
            placeholders_only (`bool`, defaults to `False`): the prompts may show images that are not given, because
                the model gets their codes instead.
            negative_prompt (`str` or `list[str]`, *optional*): rendered prompts without images that an image is guided
                away from, one for all or one for each; `<|vision_start|>` is added where it does not end them.
            **kwargs: settings of the tokenizer and the image processor (`padding`, `padding_side`, `return_tensors`,
                `resize_mode`, ...), flat or as `text_kwargs` and `images_kwargs`.

        Returns:
            [`BatchFeature`]: `input_ids` and `attention_mask` (B, L), padded on the left unless told otherwise, and
            `pixel_values` (images, 3, S, S) in [-1, 1]; with a negative prompt also `negative_prompt_ids` and
            `negative_prompt_attention_mask`; with `return_text_replacement_offsets` also
            `text_replacement_offsets`, of every prompt and each of its images a dict of `type` ("image"), `text`,
            `replacement`, and the places `span` and `new_span` before and after: what engines such as vLLM put in the
            place of `<|image_pad|>`.

        Raises:
            ValueError: if a prompt is empty, if the numbers of placeholders and images differ (per prompt for nested
                images), or if truncation cut an image.
        """
        if videos is not None or audio is not None:
            raise ValueError("Only text and images are supported, got videos or audio.")
        images, row_counts = _flatten_images(images)
        if not images and text is None:
            raise ValueError("Give `text`, `images` or both, got neither.")
        merged = self._merged_kwargs(kwargs)
        data = {}
        if text is not None:
            prompts = _as_texts(text)
            for index, prompt in enumerate(prompts):
                if not prompt:
                    raise ValueError(f"A prompt must not be empty, but prompt {index} of {len(prompts)} is.")
            counts = [prompt.count(self.image_token) for prompt in prompts]
            if images or not placeholders_only:
                self._check_counts(counts, len(images), row_counts)
            prompts, replacements = zip(*map(self.image_tokens.expand, prompts))
            data = dict(self.tokenizer(list(prompts), **merged["text_kwargs"]))
            self._finish_text(data, counts, merged)
        data.update(self._image_inputs(images, merged))
        features = BatchFeature(data, tensor_type=merged["return_tensors"])
        if text is not None and merged["return_text_replacement_offsets"]:
            features["text_replacement_offsets"] = list(replacements)
        if negative_prompt is not None:
            texts = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
            if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
                raise ValueError(
                    f"`negative_prompt` must be a string or a list of strings, got {negative_prompt!r:.200}."
                )
            start = self.image_start_token
            texts = [text if text.endswith(start) else text + start for text in texts]
            features.update(_negative_inputs(self(text=texts, **kwargs)))
        return features

    def _check_counts(self, counts: list[int], num_images: int, row_counts: list[int] | None):
        if row_counts is not None and len(row_counts) != len(counts):
            raise ValueError(
                f"Nested `images` must have one list per prompt: got {len(row_counts)} lists, {len(counts)} prompts."
            )
        for index, (shown, given) in enumerate(zip(counts, row_counts or ())):
            if shown != given:
                raise ValueError(
                    f"Prompt {index} has {shown} image placeholders ({self.image_token!r}), but {given} images were "
                    "given for it; the numbers must be equal."
                )
        if sum(counts) != num_images:
            raise ValueError(
                f"The prompts have {sum(counts)} image placeholders ({self.image_token!r}), but {num_images} images "
                "were given; the numbers must be equal."
            )

    def _finish_text(self, data: dict, counts: list[int], merged: dict[str, Any]):
        for index, (ids, count) in enumerate(zip(data["input_ids"], counts)):
            wanted, found = count * self.num_image_tokens, ids.count(self.image_token_id)
            if found != wanted:
                raise ValueError(
                    f"Row {index} needs {wanted} image positions for its {count} images, but has {found}: truncation "
                    "cut an image. Raise `max_length` or shorten the text."
                )
        if merged["return_mm_token_type_ids"]:
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])

    def post_process_multimodal_output(
        self, generated_outputs, skip_special_tokens: bool = True, generation_mode: str | None = None, **kwargs
    ) -> list:
        """
        Texts of generated ids, or with `generation_mode="image"` PIL images of what `decode_image_tokens` made.

        Raises:
            ValueError: for another mode, or for what that mode does not return.
        """
        if generation_mode == "image":
            return self.post_process_images(generated_outputs)
        if generation_mode not in (None, "text"):
            raise ValueError(f"`generation_mode` must be 'text' or 'image', got {generation_mode!r}.")
        if getattr(generated_outputs, "ndim", 2) > 2:
            raise ValueError(
                "Image mode returned codes and no text. For images a pipeline is called with `generation_mode='image'` "
                "itself, not within `generate_kwargs`."
            )
        return self.post_process_image_text_to_text(
            generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs
        )

    def create_mm_token_type_ids(self, input_ids: list[list[int]]) -> list[list[int]]:
        """1 at image positions, 0 elsewhere."""
        return [[int(token_id == self.image_token_id) for token_id in ids] for ids in input_ids]

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Positions per image, whatever its size; read by vLLM."""
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )

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
        "image": ...}` with whatever [`locate_image`] takes (the keys `url`, `path`, `base64` and `bytes` and OpenAI's
        `image_url` parts work as well), in any role; or `{"type": "image",
        "pixel_codes": ..., "semantic_codes": ...}` with codes (H, W, D).

        With `tokenize=True` every special token that occurs in a message, a role, a tool or another variable of the
        template stays plain text: only those the template itself writes are control tokens. The string returned with
        `tokenize=False` has lost that distinction; do not tokenize text of strangers from it.

        Args:
            add_generation_prompt (`bool`): end with the head of an answer.
            continue_final_message (`bool`): leave the last message open; it must end in text.
            generate_image (`bool`): end with `<|vision_start|>`, after the generation prompt or the open message.
            return_assistant_tokens_mask (`bool`): add `assistant_masks` (B, L), 1 at the content of assistant messages
                (their images included) and the `<|im_end|>` that closes it.
            placeholders_only (`bool`): write placeholders for image parts but process no image, because the model gets
                the codes of all images otherwise. The parts may then lack image data.
            return_dict (`bool`): return all inputs instead of `input_ids` alone.
            negative_prompt (`str`, list of them or conversations, *optional*): what an image is guided away from, one
                for all conversations or one for each. A string is what the user says. Rendered as the conversations
                are, with `<|vision_start|>` at the end; needs `tokenize=True` and `return_dict=True`.
            processor_kwargs (`dict`): settings of the tokenizer and the image processor (`padding`, `max_length`,
                `resize_mode`, ...), and `images` for image parts without data. They are also taken from `**kwargs`;
                what the template mentions goes to the template. **A message may name any file and any URL** unless
                `image_sources="data"` is among them.

        Returns:
            `str` or `list[str]`, or with `tokenize=True` a [`BatchFeature`] of `input_ids`, `attention_mask`, and
            `pixel_values` (images, 3, S, S) or `pixel_codes` and `semantic_codes` (images, H, W, D). With a negative
            prompt also `negative_prompt_ids`, `negative_prompt_attention_mask`, and its images' `negative_pixel_values`
            or `negative_pixel_codes` and `negative_semantic_codes`, as `generate` takes them.

        Raises:
            ValueError: for an empty conversation, an unknown role, parts of another form, images of more than one
                sort, and flags that exclude each other.
        """
        self._check_flags(
            add_generation_prompt, continue_final_message, return_assistant_tokens_mask, generate_image, tokenize
        )
        negative = {}
        if negative_prompt is not None:
            if not (tokenize and return_dict):
                raise ValueError(
                    "`negative_prompt` gives inputs of its own: it needs `tokenize=True` and `return_dict=True`."
                )
            negative = self.apply_chat_template(
                _negative_chats(negative_prompt),
                chat_template=chat_template,
                tools=tools,
                documents=documents,
                add_generation_prompt=True,
                tokenize=True,
                return_tensors=return_tensors,
                return_dict=True,
                generate_image=True,
                processor_kwargs={name: value for name, value in (processor_kwargs or {}).items() if name != "images"},
                **{name: value for name, value in kwargs.items() if name != "images"},
            )
        template = self._find_template(chat_template)
        for name, value in (("tools", tools), ("documents", documents)):
            if value and not writes(template, name):
                raise ValueError(
                    f"The chat template does not write `{name}`, so the model would know nothing of them. Give a "
                    "`chat_template` that does, or put them into a message."
                )
        processor_kwargs = dict(processor_kwargs or {})
        if return_tensors not in (None, "auto"):
            processor_kwargs["return_tensors"] = return_tensors
        kwargs.pop("load_audio_from_video", None)
        for name in list(kwargs):
            if not writes(template, name):
                processor_kwargs[name] = kwargs.pop(name)

        chats, batched = normalize_chats(conversation, template)
        parts = [part for chat in chats for part in image_parts(chat)]
        counts = [len(image_parts(chat)) for chat in chats]
        images, codes = [], {}
        if tokenize:
            given = processor_kwargs.pop("images", None)
            if given is not None:
                images, row_counts = _flatten_images(given)
                self._check_counts(counts, len(images), row_counts)
            elif not placeholders_only:
                images, with_codes = image_data(parts)
                codes = stack_codes(with_codes, self.num_image_tokens)

        outside = {
            "chats": [[without_image_data(message) for message in chat] for chat in chats],
            "tools": tools,
            "documents": documents,
            "variables": kwargs,
        }
        marker = new_marker(outside)
        if tokenize:
            outside = mark_special_tokens(outside, marker, special_tokens_of(self.tokenizer, self.image_tokens))
        rendered, spans = render_jinja_template(
            conversations=outside["chats"],
            tools=outside["tools"],
            documents=outside["documents"],
            chat_template=template,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            continue_final_message=continue_final_message,
            add_generation_prompt=add_generation_prompt,
            **{
                **self.tokenizer.special_tokens_map,
                "image_start_token": self.image_start_token,
                "image_token": self.image_token,
                "image_end_token": self.image_end_token,
                **outside["variables"],
            },
        )
        if return_assistant_tokens_mask:
            spans = [learned_spans(chat, spans_of_chat) for chat, spans_of_chat in zip(chats, spans)]
        if generate_image:
            rendered = [prompt + self.image_start_token for prompt in rendered]
        if not tokenize:
            return rendered if batched else rendered[0]

        merged = self._merged_kwargs(processor_kwargs)
        rows, masks = encode_chats(
            self.tokenizer, self.image_tokens, rendered, marker, spans if return_assistant_tokens_mask else None
        )
        for row, count in zip(rows, counts):
            shown = row.count(self.image_token_id) // self.num_image_tokens
            if shown != count:
                raise ValueError(
                    f"A conversation has {count} images, but its rendered form has {shown}. The chat template must "
                    "write one image per image part, and a message to be continued must end in text."
                )
        data = self._pad(rows, masks if return_assistant_tokens_mask else None, merged["text_kwargs"])
        self._finish_text(data, counts, merged)
        data.update(codes)
        data.update(self._image_inputs(_flatten_images(images)[0], merged))
        features = BatchFeature(data, tensor_type=merged["return_tensors"])
        features.update(_negative_inputs(negative))
        return features if return_dict else features["input_ids"]

    @staticmethod
    def _check_flags(add_generation_prompt, continue_final_message, assistant_mask, generate_image, tokenize):
        if continue_final_message and add_generation_prompt:
            raise ValueError(
                "`continue_final_message` and `add_generation_prompt` exclude each other: the first leaves the last "
                "message open, the second begins a new one."
            )
        if assistant_mask and (continue_final_message or not tokenize):
            raise ValueError(
                "`return_assistant_tokens_mask` needs `tokenize=True`, and excludes `continue_final_message`."
            )
        if generate_image and not (add_generation_prompt or continue_final_message):
            raise ValueError(
                "`generate_image=True` needs `add_generation_prompt=True` or `continue_final_message=True`: the image "
                "belongs to an answer."
            )

    def _find_template(self, chat_template: str | None) -> str:
        if not isinstance(self.chat_template, dict):
            return chat_template or self.chat_template
        if chat_template is None and "default" not in self.chat_template:
            raise ValueError(
                f"The processor's chat templates are {sorted(self.chat_template)}, none of them 'default': name one "
                "as `chat_template`."
            )
        return self.chat_template.get(chat_template or "default", chat_template)

    def _pad(self, rows: list[list[int]], masks: list[list[int]] | None, text_kwargs: dict[str, Any]) -> dict:
        """Truncate and pad encoded rows as the tokenizer would."""
        max_length, padding_side = text_kwargs.get("max_length"), text_kwargs.get("padding_side")
        if text_kwargs.get("truncation") and max_length is not None:
            kept = slice(max_length) if self.tokenizer.truncation_side == "right" else slice(-max_length, None)
            rows = [row[kept] for row in rows]
            masks = masks and [mask[kept] for mask in masks]
        data = self.tokenizer.pad(
            {"input_ids": rows},
            padding=text_kwargs.get("padding", False),
            max_length=max_length,
            pad_to_multiple_of=text_kwargs.get("pad_to_multiple_of"),
            padding_side=padding_side,
            return_attention_mask=text_kwargs.get("return_attention_mask"),
        )
        data = dict(data)
        if masks is not None:
            fills = [[0] * (len(ids) - len(mask)) for ids, mask in zip(data["input_ids"], masks)]
            left = (padding_side or self.tokenizer.padding_side) == "left"
            data["assistant_masks"] = [fill + mask if left else mask + fill for fill, mask in zip(fills, masks)]
        return data


class DualTokenVisionTokenizerProcessor(_DualTokenProcessorMixin, ProcessorMixin):
    r"""
    Images and captions for [`DualTokenVisionTokenizer`].

    Args:
        image_processor ([`DualTokenImageProcessor`] or [`DualTokenImageProcessorPil`])
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer of the SigLIP checkpoint. That of a SigLIP 2 folder, which
            names Gemma's, becomes one that sees texts in lower case and without punctuation, as SigLIP 2's training
            did; SigLIP's does so by itself.
        text_length (`int`, defaults to 64): tokens every caption is padded or cut to, as SigLIP was trained.
    """

    valid_processor_kwargs = DualTokenVisionTokenizerProcessorKwargs

    def __init__(self, image_processor=None, tokenizer=None, text_length: int = 64):
        super().__init__(image_processor, as_trained(tokenizer))
        if text_length < 1:
            raise ValueError(f"`text_length` must be at least 1, got {text_length}.")
        self.text_length = text_length

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", *self.image_processor.model_input_names]

    def __call__(
        self, images=None, text=None, **kwargs: Unpack[DualTokenVisionTokenizerProcessorKwargs]
    ) -> BatchFeature:
        r"""
        Args:
            images (*optional*): PIL images, arrays, tensors, paths or URLs: one or a list.
            text (`str` or `list[str]`, *optional*): captions. Their number need not be that of the images.
            **kwargs: settings of the tokenizer and the image processor.

        Returns:
            [`BatchFeature`]: `input_ids` (texts, text_length), without an attention mask as in SigLIP's training, and
            `pixel_values` (images, 3, S, S) in [-1, 1].

        Raises:
            ValueError: if neither images nor text are given.
        """
        images, _ = _flatten_images(images)
        if not images and text is None:
            raise ValueError("Give `text`, `images` or both, got neither.")
        # Without the tokenizer's `init_kwargs`, as in `DualTokenProcessor._merged_kwargs`.
        merged = self._merge_kwargs(self.valid_processor_kwargs, **kwargs)
        text_kwargs = merged["text_kwargs"]
        text_kwargs.setdefault("max_length", self.text_length)
        return_tensors = text_kwargs.pop("return_tensors", None)
        data = {}
        if text is not None:
            data.update(self.tokenizer(_as_texts(text), **text_kwargs))
        data.update(self._image_inputs(images, merged))
        return BatchFeature(data, tensor_type=return_tensors)


__all__ = ["DualTokenProcessor", "DualTokenVisionTokenizerProcessor"]
