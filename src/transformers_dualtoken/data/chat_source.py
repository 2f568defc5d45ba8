"""A source of conversations and documents, and what becomes of its samples that cannot be trained on."""

import math
from collections.abc import Callable, Mapping
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


def check_weights(weights: Mapping[str, float | None]) -> None:
    """
    Raises:
        ValueError: unless all sources, by name, have a weight or none has, and the weights are finite numbers above 0
            whose sum is finite.
    """
    for name, weight in weights.items():
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if weight is not None and not (is_number and 0 < weight < math.inf):
            raise ValueError(f"The weight of {name!r} must be a finite number above 0, got {weight!r:.100}.")
    without = [name for name, weight in weights.items() if weight is None]
    if 0 < len(without) < len(weights):
        raise ValueError(f"Either all sources of a mixture have a weight or none; without one are {without}.")
    if not without and not sum(map(float, weights.values())) < math.inf:
        raise ValueError(f"The sum of the weights must be finite, got {list(weights.values())}.")


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
