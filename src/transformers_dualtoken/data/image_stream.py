"""Images for tokenizer training from a stream, which goes on exactly where a stopped run was."""

from ..image_reading import UnreadableImageError, image_name
from .image_reading import ImagePreparation
from .image_sources import undecoded
from .sample_stream import SampleStream


class DualTokenImageStream(SampleStream):
    """
    Images of a streamed `datasets` data set as `pixel_values`, with the augmentation of [`DualTokenImageDataset`].

    How the images are divided, shuffled and resumed: [`SampleStream`].

    Args:
        dataset (`datasets.IterableDataset`): with a column of images.
        image_processor: makes `pixel_values` `(1, 3, S, S)` of a PIL image.
        image_column (`str`, defaults to `"image"`).
        crop_scale (`tuple[float, float]`, defaults to `(0.9, 1.0)`): see [`DualTokenImageDataset`].
        seed (`int`, defaults to 0).
        reducing_gap (`float`, *optional*, defaults to 2.0): see [`ImagePreparation`].
        kwargs: `shuffle_buffer_size`, `rank`, `world_size` and `repeat` of [`SampleStream`].

    Yields:
        `{"pixel_values": (3, S, S) float32, "num_skipped": int, "stream_position": dict}`: the image, how many
        unreadable ones were passed over before it, and where the stream is after it.

    Raises:
        ValueError: as [`SampleStream`], and for a column that is missing.
    """

    noun = "image"
    passed_over = (UnreadableImageError,)

    def __init__(
        self,
        dataset,
        image_processor,
        image_column: str = "image",
        crop_scale=(0.9, 1.0),
        seed: int = 0,
        reducing_gap: float | None = 2.0,
        **kwargs,
    ):
        super().__init__([undecoded(dataset, image_column)], seed=seed, **kwargs)
        self.image_preparation = ImagePreparation(image_processor, crop_scale, reducing_gap)
        self.image_column = image_column

    def prepare(self, source: int, row: dict, key: str) -> dict:
        return {"pixel_values": self.image_preparation(row[self.image_column], key)}

    def row_name(self, source: int, row: dict) -> str | None:
        return image_name(row[self.image_column])
