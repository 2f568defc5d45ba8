"""A source of conversations and documents, and what becomes of its samples that cannot be trained on."""

from collections.abc import Callable
from dataclasses import dataclass

import datasets


BAD_SAMPLE_RULES = ("error", "skip")


class BadSampleError(ValueError):
    """A sample that cannot be trained on; the message is the reason. `sample_id` names the sample, where known."""

    sample_id: str | None = None


@dataclass
class ChatSource:
    """
    One source of examples for unified training.

    Attributes:
        name (`str`): of the file, folder or data set, different from the other sources' of the mixture.
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): raw rows; no image is decoded.
        to_example: makes a row the example `{"messages": [...]}` or, without roles, `{"content": ...}`, with `"id"`
            where the sample has a name. Depends on the row only, can be pickled, raises [`BadSampleError`].
        weight (`float`, *optional*): share of the mixture, relative to the others'.
    """

    name: str
    dataset: datasets.Dataset | datasets.IterableDataset
    to_example: Callable[[dict], dict]
    weight: float | None = None


def check_bad_sample_rule(rule: str) -> None:
    if rule not in BAD_SAMPLE_RULES:
        raise ValueError(f"`on_bad_sample` must be one of {', '.join(BAD_SAMPLE_RULES)}, got {rule!r}.")


def refusal(name: str, error: BadSampleError) -> ValueError:
    """What is raised for a sample that cannot be trained on, where such samples are not to be skipped."""
    return ValueError(
        f"The sample {name} cannot be trained on: {error}. Mend it, or pass such samples over and have them counted with "
        "`on_bad_sample` = 'skip'."
    )


def sample_name(source: ChatSource, row: int, raw: dict) -> str:
    """How a message names a sample: by its source, its place there and, where it has one, its id."""
    try:
        identity = source.to_example(raw).get("id")
    except BadSampleError as error:
        identity = error.sample_id
    return f"{row} of {source.name}" + (f" (id {identity})" if identity is not None else "")
