"""Chats: the default template, the messages it renders, and their injection-safe encoding.

A rendered chat is one string in which control tokens of the template and the same characters typed by a user look
alike. Here a random marker is put before every special token in what comes from outside; after rendering, control
tokens are the unmarked ones, and all text between two of them is encoded with special tokens split.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .image_reading import IMAGE_KEYS, flatten_images


# Qwen2.5's ChatML without its default system prompt. Parts are written one after the other, nothing between them; the
# `generation` block is what `return_assistant_tokens_mask` marks.
CHAT_TEMPLATE = """\
{%- set image_group = (image_start_token | default('<|vision_start|>')) + (image_token | default('<|image_pad|>'))
        + (image_end_token | default('<|vision_end|>')) -%}
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {{- image_group if part['type'] == 'image' else part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
            {{- render(message['content']) + '<|im_end|>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- render(message['content']) + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

# A marker is followed by one of these: before a typed special token, or after a string that stops within one. The
# second must not hide a control token of the template that comes next.
_TYPED, _SEAM = "1", "0"

ROLES = ("system", "user", "assistant")
# What a message may have beside its role and content without being written: how it is learned, and what names it.
LEARNING_KEYS = ("weight", "train")
_NAMING_KEYS = ("name", "id", "uuid", "index", "timestamp", "created_at", "model", "source", "language", "metadata")
CODE_KEYS = ("pixel_codes", "semantic_codes")
# Of parts, not of messages, though a template names them.
_PART_KEYS = ("type", "text", *IMAGE_KEYS, *CODE_KEYS)


def writes(chat_template: str, name: str) -> bool:
    """Whether a template mentions a variable or a key."""
    return re.search(rf"\b{re.escape(name)}\b", chat_template) is not None


@functools.lru_cache
def roles_of(chat_template: str) -> tuple[str, ...]:
    """The roles a message may have: the usual ones, and what a template of one's own names as a string."""
    return ROLES if chat_template == CHAT_TEMPLATE else (*ROLES, *re.findall(r"""['"](\w+)['"]""", chat_template))


def normalize_chats(conversation, chat_template: str | None = None) -> tuple[list[list[dict]], bool]:
    """
    One conversation or a batch as a list of conversations, and whether it was a batch. Messages and parts lose the
    keys that are `None` (datasets fill in those of other parts); OpenAI's `image_url` parts become image parts.

    Raises:
        ValueError: for another form; with a `chat_template` also for what that would not write (a role it does not
            know, a key that says something beside the content) and for a `weight` or `train` that is neither 0 nor 1, or
            asks to learn what no assistant says.
    """
    conversation = getattr(conversation, "messages", conversation)
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise ValueError("A conversation must be a list of at least one message.")
    batched = isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
    chats = [getattr(chat, "messages", chat) for chat in conversation] if batched else [conversation]
    if not all(isinstance(chat, (list, tuple)) and chat for chat in chats):
        raise ValueError("Each conversation of a batch must be a list of at least one message.")
    return [[_normalize_message(message, chat_template) for message in chat] for chat in chats], batched


def _normalize_message(message, chat_template: str | None) -> dict:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"A message must be a dict with a 'role' (a string) and a 'content', got {message!r:.200}.")
    message = {key: value for key, value in message.items() if value is not None}
    if chat_template is not None:
        _check_written(message, chat_template)
    content = message.setdefault("content", "")
    if isinstance(content, (list, tuple)):
        message["content"] = [_normalize_part(part) for part in content]
    elif not isinstance(content, str):
        kind = type(content).__name__
        raise ValueError(f"The content of a message must be a string or a list of parts, got {kind}.")
    return message


def _normalize_part(part) -> dict:
    part = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    if part.get("type") == "image_url" and "image_url" in part:
        url = part["image_url"]
        part = {"type": "image", "url": url.get("url") if isinstance(url, Mapping) else url}
    if part.get("type") == "image":
        images = flatten_images(part_image(part))
        if len(images) != 1:
            raise ValueError(f"An image part must hold one image, got a list or a batch of {len(images)}.")
        if "image" in part:  # a list or a batch of one is that one, for all who read the part
            part["image"] = images[0]
    elif part.get("type") != "text" or not isinstance(part.get("text"), str):
        given = f"got a part of type {part.get('type')!r:.100} with the keys {sorted(map(str, part))}"
        known = "{'type': 'text', 'text': a string} or {'type': 'image', 'image': ...}"
        raise ValueError(f"A part of a message must be {known}, {given}.")
    return part


def keys_beside_content(message: Mapping) -> list[str]:
    """The keys by which a message says something beside its content: tool calls, reasoning and the like."""
    known = ("role", "content", *LEARNING_KEYS, *_NAMING_KEYS)
    filled = [key for key, value in message.items() if not isinstance(value, (str, list, tuple, Mapping)) or value]
    return [key for key in filled if key not in known]


def _check_written(message: dict, chat_template: str) -> None:
    """Raise unless the template writes all that a message says."""
    role = message["role"]
    if role not in roles_of(chat_template):
        raise ValueError(f"A message has the role {role!r:.200}; the roles are {', '.join(ROLES)}.")
    who, own = f"A message of the role {role!r} has", chat_template != CHAT_TEMPLATE
    keys = map(str, keys_beside_content(message))
    lost = [key for key in keys if not (own and key not in _PART_KEYS and writes(chat_template, key))]
    if lost:
        advice = "what stands there would be lost: write it into the 'content', or leave it out"
        raise ValueError(f"{who} {', '.join(map(repr, lost))}, which the chat template does not write; {advice}.")
    for key in LEARNING_KEYS:
        value = message.get(key, 0)
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise ValueError(f"The {key!r} of a message must be 0 (context) or 1 (learned), got {value!r:.100}.")
        if value and role != "assistant":
            raise ValueError(f"{who} {key!r} = {value}, but only an assistant's are learned.")


def is_learned(message: Mapping) -> bool:
    """Whether training learns a message: an assistant's, unless its `weight` is 0 or its `train` is false."""
    return message["role"] == "assistant" and all(message.get(key, 1) for key in LEARNING_KEYS)


def learned_spans(chat: list[dict], spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those of the character ranges of the assistant's content whose messages are learned."""
    answers = [is_learned(message) for message in chat if message["role"] == "assistant"]
    if all(answers):
        return spans
    if len(answers) != len(spans):
        ranges = f"{len(spans)} ranges for {len(answers)} messages of the assistant"
        raise ValueError(f"The chat template marks {ranges}, so it is not known which 'weight' or 'train' belong to.")
    return [span for span, learned in zip(spans, answers) if learned]


def part_image(part: Mapping):
    """What an image part holds its image in, as [`locate_image`] takes it; `None` if it has none."""
    found = {key: part[key] for key in IMAGE_KEYS if part.get(key) is not None}
    return found.get("image", found or None)


def image_parts(chat: list[dict]) -> list[dict]:
    """The image parts of a conversation in reading order."""
    contents = [message["content"] for message in chat if not isinstance(message["content"], str)]
    return [part for content in contents for part in content if part["type"] == "image"]


def without_image_data(message: dict) -> dict:
    """The message as a template needs it: it only has to know where images are."""
    if isinstance(message["content"], str):
        return message
    parts = [{"type": "image"} if part["type"] == "image" else part for part in message["content"]]
    return {**message, "content": parts}


def image_data(parts: list[dict], num_positions: int) -> tuple[list, dict[str, np.ndarray]]:
    """What image parts carry: all of them images, or all codes ([`stack_codes`]), or else a `ValueError`."""
    with_codes = [part for part in parts if any(key in part for key in CODE_KEYS)]
    images = [part_image(part) for part in parts if not any(key in part for key in CODE_KEYS)]
    missing = sum(image is None for image in images)
    if missing or (with_codes and images):
        counts = f"{len(images) - missing} carry an image and {len(with_codes)} codes, {missing} neither"
        keys = f"images ({', '.join(map(repr, IMAGE_KEYS))}), or all codes ({' and '.join(map(repr, CODE_KEYS))})"
        advice = "If the model gets all codes otherwise, pass `placeholders_only=True`"
        raise ValueError(f"All {len(parts)} image parts of a call must carry {keys}: {counts}. {advice}.")
    return images, stack_codes(with_codes, num_positions)


def stack_codes(parts: list[dict], num_positions: int) -> dict[str, np.ndarray]:
    """`pixel_codes` and `semantic_codes` (H, W, D) of the parts as two int64 arrays (images, H, W, D)."""
    stacked = {}
    for key in CODE_KEYS if parts else ():
        if not all(key in part for part in parts):
            raise ValueError("An image part with codes must have both 'pixel_codes' and 'semantic_codes'.")
        codes = [np.asarray(part[key].cpu() if hasattr(part[key], "cpu") else part[key]) for part in parts]
        shapes = sorted({array.shape for array in codes})
        if len(shapes) > 1 or len(shapes[0]) != 3 or shapes[0][0] * shapes[0][1] != num_positions:
            wanted = f"one shape (H, W, D) with H * W = {num_positions}, got {', '.join(map(str, shapes))}"
            raise ValueError(f"The {key!r} of all image parts must have {wanted}.")
        if not all(np.issubdtype(array.dtype, np.integer) for array in codes):
            raise ValueError(f"The {key!r} of an image part must be integers, got {codes[0].dtype}.")
        stacked[key] = np.stack(codes).astype(np.int64)
    return stacked


def mark_special_tokens(value: Any, marker: str, special_tokens: list[str]) -> Any:
    """
    A copy of `value` (strings in dicts and lists) with a marker before every special token, and another at the end of
    a string that stops within one, lest two strings join to a token in the template.
    """
    if isinstance(value, str):
        value = re.sub(f"(?={'|'.join(map(re.escape, special_tokens))})", marker + _TYPED, value)
        starts = tuple({token[:length] for token in special_tokens for length in range(1, len(token))})
        return value + marker + _SEAM if value.endswith(starts) else value
    mark = functools.partial(mark_special_tokens, marker=marker, special_tokens=special_tokens)
    if isinstance(value, Mapping):
        return {mark(key): mark(item) for key, item in value.items()}
    return [mark(item) for item in value] if isinstance(value, (list, tuple)) else value


def check_text(text: str) -> None:
    """Raise a `ValueError` for half a character (a lone surrogate of UTF-16), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"The text has half a character at position {error.start:,} ({error}).") from error


def special_tokens_of(processor) -> list[str]:
    """Every special token, longest first: a regular expression takes the first alternative that fits."""
    tokens = {token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special}
    tokens |= {processor.image_start_token, processor.image_token, processor.image_end_token}
    return sorted(tokens, key=len, reverse=True)


def encode_chat(processor, rendered: str, marker: str, spans: list[tuple[int, int]] | None):
    """
    Of a rendered chat whose typed special tokens are marked the ids, images expanded, and of each token whether it
    overlaps one of `spans`, the character ranges of the assistant's content (`None`: no mask).

    Between two control tokens the text is encoded in one piece, whoever wrote it, so that a chat without typed special
    tokens gets the very ids its rendered string has.
    """
    tokenizer, special_tokens, unmarked = processor.tokenizer, special_tokens_of(processor), f"(?<!{marker}{_TYPED})"
    alternatives = "|".join(map(re.escape, special_tokens))
    control = re.compile(f"(?P<image>{processor.image_pattern(unmarked)})|{unmarked}(?:{alternatives})")
    inside, pieces, last = bytearray(len(rendered)), [], 0
    for start, end in spans or ():
        inside[start:end] = b"\1" * (end - start)
    for match in [*control.finditer(rendered), None]:
        start, end = match.span() if match else (len(rendered), len(rendered))
        pieces.append(_unmark(rendered[last:start], inside[last:start], marker))
        if match:
            ids = processor.ids_of_image if match["image"] else [tokenizer.convert_tokens_to_ids(match.group())]
            pieces.append((ids, inside[start:end]))
        last = end

    texts = [piece for piece, _ in pieces if isinstance(piece, str) and piece]
    for text in texts:
        check_text(text)
    encoded = {"input_ids": []}
    if texts:
        settings = {"add_special_tokens": False, "padding": False, "truncation": False, "verbose": False}
        encoded = tokenizer(texts, split_special_tokens=True, return_offsets_mapping=spans is not None, **settings)
    control_ids = set(tokenizer.convert_tokens_to_ids(special_tokens))
    for text, ids in zip(texts, encoded["input_ids"]):
        if typed := control_ids.intersection(ids):
            tokens = f"control tokens {tokenizer.convert_ids_to_tokens(sorted(typed))} from plain text ({text!r:.100})"
            advice = "so a chat could be forged. Add them to the tokenizer as special tokens"
            raise ValueError(f"The tokenizer makes the {tokens}, {advice}.")

    row, mask = [], []
    of_texts = iter(zip(encoded["input_ids"], encoded.get("offset_mapping") or [()] * len(texts)))
    for piece, inside in pieces:
        if isinstance(piece, str):
            piece, offsets = next(of_texts) if piece else ([], [])
            mask += _token_mask(offsets, inside)
        else:
            mask += [int(any(inside))] * len(piece)
        row += piece
    return row, mask


def _unmark(text: str, inside: bytearray, marker: str) -> tuple[str, bytes]:
    """A text without its markers, and what belongs to it of `inside`, one byte for each character."""
    markers = [match.span() for match in re.finditer(f"{marker}[{_TYPED}{_SEAM}]", text)]
    kept = list(map(slice, [0, *(end for _, end in markers)], [*(start for start, _ in markers), len(text)]))
    return "".join(text[part] for part in kept), b"".join(inside[part] for part in kept)


def _token_mask(offsets: list[tuple[int, int]], inside: bytes) -> list[int]:
    mask, last = [], 0
    for start, end in offsets:
        # Some tokenizers trim leading blanks off the offsets; they belong to the token all the same.
        mask.append(int(any(inside[min(last, start) : end])))
        last = end
    return mask
