"""The formats of data for unified training: from a record (a dict of columns) to the example that is encoded."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..chat_dualtoken import CODE_KEYS, ROLES, normalize_chats, part_image
from ..image_reading import UnreadableImageError, locate_image
from .samples import BadSampleError


TASKS = ("draw", "describe", "both")
_LLAVA_ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}
_LLAVA_IMAGE = "<image>"


@dataclass(frozen=True)
class Format:
    """
    How the rows of one kind of data become examples.

    Attributes:
        convert: `(record, folder, **options) -> example`; raises [`BadSampleError`].
        columns (`tuple[str, ...]`): that it reads if they are there, besides those of `roles`.
        told_by (`tuple[tuple[str, ...], ...]`): columns that tell it, one group of them is enough; else `roles` do.
        roles (`dict`): option that names a column that must be there -> the names it is looked for by.
        options (`dict`): the other options of the format -> their defaults.
    """

    convert: Callable[..., dict]
    columns: tuple[str, ...] = ()
    told_by: tuple[tuple[str, ...], ...] = ()
    roles: dict[str, tuple[str, ...]] = field(default_factory=dict)
    options: dict = field(default_factory=dict)

    def find_columns(self, columns, named: Mapping = {}) -> dict[str, str] | None:
        """The column of each role: the one that is `named`, or the first of its names; `None` if one is missing."""
        found = {}
        for role, names in self.roles.items():
            names = (named[role],) if role in named else names
            found[role] = next((name for name in names if name in columns), None)
        return None if None in found.values() else found

    def is_told_by(self, columns) -> bool:
        return any(set(group) <= set(columns) for group in self.told_by) or bool(self.find_columns(columns))


def detect_format(columns) -> str | None:
    """The name of the first of `FORMATS` that these columns tell."""
    return next((name for name, format in FORMATS.items() if format.is_told_by(columns)), None)


def convert_messages(record: Mapping, folder: str | None) -> dict:
    """Chat messages, as `messages` or, in two parts, `prompt` and `completion`."""
    messages = record.get("messages")
    if messages is None:
        parts = [_rows(record.get(name) or []) for name in ("prompt", "completion")]
        if not all(isinstance(part, (list, tuple)) for part in parts):
            raise BadSampleError("its prompt and completion must be lists of messages")
        messages = [*parts[0], *parts[1]]
    return _chat(record, _rows(messages), folder, "image part without data")


def convert_llava(record: Mapping, folder: str | None) -> dict:
    """`conversations` of `{"from", "value"}`; each `<image>` in a value is the next of the column `image`."""
    turns = _rows(record.get("conversations"))
    if not isinstance(turns, (list, tuple)):
        raise BadSampleError(f"its conversations must be a list, got {type(turns).__name__}")
    messages = []
    for turn in turns:
        role = turn.get("from") if isinstance(turn, Mapping) else None
        if not isinstance(role, str) or role not in _LLAVA_ROLES or not isinstance(turn.get("value"), str):
            raise BadSampleError(
                f"a turn must have a 'from' of {', '.join(_LLAVA_ROLES)} and a string as 'value', got {turn!r:.200}"
            )
        beside = {key: value for key, value in turn.items() if key not in ("from", "value")}
        messages.append({**beside, "role": _LLAVA_ROLES[role], "content": _split_at_images(turn["value"])})
    return _chat(record, messages, folder, _LLAVA_IMAGE)


def _split_at_images(text: str) -> str | list[dict]:
    """The parts of a text, without the line breaks beside its images."""
    first, *others = text.split(_LLAVA_IMAGE)
    if not others:
        return text
    pieces = [first.rstrip("\r\n"), *(piece.strip("\r\n") for piece in others[:-1]), others[-1].lstrip("\r\n")]
    parts = []
    for piece in pieces:
        parts += [{"type": "image"}, {"type": "text", "text": piece}]
    return [part for part in parts[1:] if part.get("text") != ""]


def _chat(record: Mapping, messages: Sequence, folder: str | None, placeholder: str) -> dict:
    """Messages behind the column `system`, as ShareGPT's records have it, with the columns of images and `tools`."""
    system, tools = record.get("system"), record.get("tools")
    if system is not None and system != "":
        if not isinstance(system, str):
            raise BadSampleError(f"its 'system' must be a string, got {system!r:.100}")
        if any(isinstance(message, Mapping) and message.get("role") == "system" for message in messages or []):
            raise BadSampleError("it has a system prompt twice, in its column 'system' and in its messages")
        messages = [{"role": "system", "content": system}, *(messages or [])]
    messages = normalized(messages)
    _fill_images([message["content"] for message in messages], _images_of(record), folder, placeholder)
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
    except ValueError as error:
        raise BadSampleError(f"its tools are not valid JSON ({error})") from error
    if tools and not isinstance(tools, list):
        raise BadSampleError(f"its tools must be a list, got {type(tools).__name__}")
    return {"messages": messages, **({"tools": tools} if tools else {})}


def convert_caption(
    record: Mapping,
    folder: str | None,
    task: str,
    image_column: str,
    caption_column: str,
    draw_prompt: str,
    describe_prompt: str,
) -> dict:
    """An image and its caption: drawn after the caption, or described by it."""
    image = {"type": "image", "image": _image(record.get(image_column), folder)}
    caption = _wording(record, caption_column)
    if task == "draw":
        # Not by `str.format`: braces may occur in both.
        return _exchange(draw_prompt.replace("{caption}", caption), [image])
    return _exchange([image, {"type": "text", "text": describe_prompt}], caption)


def convert_edit(
    record: Mapping, folder: str | None, input_column: str, instruction_column: str, edited_column: str
) -> dict:
    """An image and an instruction, and the image that comes of them."""
    before, after = (
        {"type": "image", "image": _image(record.get(column), folder)} for column in (input_column, edited_column)
    )
    return _exchange([before, {"type": "text", "text": _wording(record, instruction_column)}], [after])


def _exchange(question, answer) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def convert_text(record: Mapping, folder: str | None, text_column: str, sample_by: str) -> dict:
    """Plain text, every token of it a target."""
    return {"content": _text_of(record, text_column)}


def convert_interleaved(record: Mapping, folder: str | None) -> dict:
    """A document: `content` of parts, or `images` and `texts` with `None` (or "") where the other one stands."""
    content, images = record.get("content"), []
    if content is None:
        content = _merged(record.get("texts"), record.get("images"))
    else:
        images = _images_of(record)
    content = normalized([{"role": "user", "content": _rows(content)}])[0]["content"]
    if not content:
        raise BadSampleError("the document is empty")
    _fill_images([content], images, folder, "image part without data")
    return {"content": content}


def _merged(texts, images) -> list[dict]:
    columns = (texts, images)
    if not all(isinstance(column, (list, tuple)) for column in columns) or len(texts) != len(images):
        sizes = [len(column) if isinstance(column, (list, tuple)) else type(column).__name__ for column in columns]
        raise BadSampleError(f"its texts and images must be lists of one length, got {sizes[0]} and {sizes[1]}")
    parts = []
    for index, (text, image) in enumerate(zip(texts, images)):
        if _is_missing(image):
            if not isinstance(text, str):
                raise BadSampleError(f"entry {index} is neither a text (got {text!r:.100}) nor an image")
            parts += [{"type": "text", "text": text}] if text else []
        elif text:
            raise BadSampleError(f"entry {index} is both a text and an image: their order is unknown")
        else:
            parts.append({"type": "image", "image": image})
    return parts


def _with_file_names(*names: str) -> tuple[str, ...]:
    """Also what the metadata of an image folder calls the file of a column."""
    return (*names, *(f"{name}_file_name" for name in names))


_IMAGE_NAMES = _with_file_names("image", "jpg", "jpeg", "png", "webp", "img", "image_path", "image_url", "file_name")
_INPUT_NAMES = _with_file_names("input_image", "source_image", "original_image", "source_img", "src_img", "image")
_EDITED_NAMES = _with_file_names("edited_image", "output_image", "target_image", "edited_img", "target_img")
_INSTRUCTIONS = ("edit_prompt", "instruction", "edit_instruction", "prompt", "edited_prompt_list")

# In the order in which they are looked for where none is named.
FORMATS = {
    "messages": Format(
        convert_messages,
        ("messages", "prompt", "completion", "images", "image", "tools", "system"),
        told_by=(("messages",), ("prompt", "completion")),
    ),
    "llava": Format(
        convert_llava, ("conversations", "images", "image", "tools", "system"), told_by=(("conversations",),)
    ),
    "interleaved": Format(
        convert_interleaved, ("content", "texts", "images", "image"), told_by=(("content",), ("images", "texts"))
    ),
    "edit": Format(
        convert_edit,
        roles={"input_column": _INPUT_NAMES, "instruction_column": _INSTRUCTIONS, "edited_column": _EDITED_NAMES},
    ),
    "caption": Format(
        convert_caption,
        roles={"image_column": _IMAGE_NAMES, "caption_column": ("caption", "text", "txt", "prompt")},
        options={"task": "draw", "draw_prompt": "{caption}", "describe_prompt": "Describe this image."},
    ),
    "text": Format(convert_text, roles={"text_column": ("text",)}, options={"sample_by": "document"}),
}


def _rows(value):
    """A list of dicts that `datasets` once turned into a dict of lists is a list of dicts again."""
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, row)) for row in zip(*value.values())]
    return value


def normalized(messages) -> list[dict]:
    """One conversation as [`normalize_chats`] gives it."""
    if not messages:
        raise BadSampleError("it has no messages")
    try:
        chats, batched = normalize_chats(messages)
    except ValueError as error:
        raise BadSampleError(str(error).rstrip(".")) from error
    if batched:
        raise BadSampleError("its messages are a list of conversations; a sample must be one")
    return chats[0]


def _text_of(record: Mapping, column: str) -> str:
    text = record.get(column)
    if not isinstance(text, str) or not text.strip():
        raise BadSampleError(f"its {column!r} must be a string that is not empty, got {text!r:.100}")
    return text


def _wording(record: Mapping, column: str) -> str:
    """A caption or an instruction, without blanks around it; of several wordings the first."""
    text = record.get(column)
    return _text_of({column: text[0]} if isinstance(text, (list, tuple)) and text else record, column).strip()


def _images_of(record: Mapping) -> list:
    """The images of the column `images`, or else `image`, in order."""
    for column in ("images", "image"):
        images = record.get(column)
        if isinstance(images, (list, tuple)):
            for index, image in enumerate(images):
                if _is_missing(image):
                    raise BadSampleError(f"image {index + 1} of the {len(images)} in {column!r} is missing")
            return list(images)
        if not _is_missing(images):
            return [images]
    return []


def _is_missing(image) -> bool:
    """Arrow's struct of nothing is nothing."""
    return image is None or (isinstance(image, Mapping) and all(value is None for value in image.values()))


def _fill_images(contents: list, images: list, folder: str | None, placeholder: str):
    """Give the image parts of contents what they stand for: their own image or codes, or the next of `images`."""
    empty = []
    for part in (part for content in contents if not isinstance(content, str) for part in content):
        if part["type"] != "image":
            continue
        image = part_image({key: value for key, value in part.items() if not _is_missing(value)})
        codes, index = {key: part[key] for key in CODE_KEYS if key in part}, part.get("index")
        part.clear()
        part["type"] = "image"
        if codes:
            if len(codes) < len(CODE_KEYS):
                raise BadSampleError(f"an image part has only {', '.join(codes)} of {' and '.join(CODE_KEYS)}")
            try:
                part.update({key: np.asarray(values) for key, values in codes.items()})
            except (ValueError, TypeError, OverflowError) as error:
                raise BadSampleError(f"the codes of an image are no array ({error})") from error
        elif image is not None:
            part["image"] = _image(image, folder)
        else:
            if index is not None and index != len(empty):
                raise BadSampleError(f"image part {len(empty)} says that its image is number {index}, out of order")
            empty.append(part)
    if len(empty) != len(images):
        raise BadSampleError(
            f"the number of placeholders and of images differ: {len(empty)} x {placeholder}, {len(images)} x image"
        )
    for part, image in zip(empty, images):
        part["image"] = _image(image, folder)


def _image(value, folder: str | None):
    """An image as [`locate_image`] gives it, its path beside the data made whole; a local file must exist."""
    if _is_missing(value):
        raise BadSampleError("an image is missing")
    try:
        image = locate_image(value, folder)
    except (TypeError, UnreadableImageError) as error:
        raise BadSampleError(str(error).rstrip(".")) from error
    if isinstance(image, str) and "://" not in image and not os.path.isfile(image):
        raise BadSampleError(f"the image file {image!r} does not exist")
    return image
