"""A source of samples for unified training, and what becomes of those that cannot be trained on."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import datasets

from ..field_rules import one_of


# More unusable samples than this in a row are a broken data set, not a few broken files.
MAX_SKIPPED_IN_A_ROW = 1000
ON_BAD_SAMPLE = one_of("error", "skip")
# So many of them are named in a process's log; all are counted.
MAX_NAMED = 20


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

    def sample_id(self, row: dict) -> str | None:
        """The name that the sample of a raw row has by itself."""
        try:
            return self.to_example(row).get("id")
        except BadSampleError as error:
            return error.sample_id

    def sample_name(self, number: int, row: dict) -> str:
        """How a message names a sample: by its place, its source and, where it has one, its id."""
        identity = self.sample_id(row)
        return f"{number} of {self.name}" + (f" (id {identity})" if identity is not None else "")


def check_sources(sources: Sequence, on_bad_sample: str) -> None:
    """Raise for a rule that is unknown, for no sources, and for weights that do not fit each other."""
    ON_BAD_SAMPLE.check("on_bad_sample", on_bad_sample)
    if not sources:
        raise ValueError("There are no sources to train on.")
    if all(isinstance(source, ChatSource) for source in sources):
        check_weights([source.name for source in sources], [source.weight for source in sources])


def check_weights(names: Sequence[str], weights: Sequence[float | None]) -> None:
    """Raise unless all sources have a weight or none has, and the weights are finite numbers above 0, as is their sum."""
    names = [f"{name} ({number})" for number, name in enumerate(names, 1)]  # a mixture may name a path twice
    for name, weight in zip(names, weights):
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if weight is not None and not (is_number and 0 < weight < math.inf):
            raise ValueError(f"The weight of {name!r} must be a finite number above 0, got {weight!r:.100}.")
    without = [name for name, weight in zip(names, weights) if weight is None]
    if 0 < len(without) < len(names):
        raise ValueError(f"Either all sources of a mixture have a weight or none; without one are {without}.")
    if not without and not sum(map(float, weights)) < math.inf:
        raise ValueError(f"The sum of the weights must be finite, got {list(weights)}.")


def refusal(name: str, error: BadSampleError) -> ValueError:
    """What is raised for a sample that cannot be trained on, where such samples are not to be skipped."""
    return ValueError(
        f"The sample {name} cannot be trained on: {error}. Mend it, or pass such samples over and have them counted with "
        "`on_bad_sample` = 'skip'."
    )
