"""Images for tokenizer training: any source as a data set of undecoded images, and one image as `pixel_values`."""

import collections
import itertools
import json
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers.utils import logging

from ..field_rules import at_least
from ..image_reading import read_image
from . import files
from .samples import MAX_SKIPPED_IN_A_ROW, BadSampleError


logger = logging.get_logger(__name__)

_UNDECODED = datasets.Image(decode=False)
# Keys of a webdataset sample that are integers, by its convention.
_INTEGER_KEYS = ("cls", "cls2", "index", "inx")
_METADATA_READERS = {".jsonl": pa.json.read_json, ".csv": pa.csv.read_csv, ".parquet": pq.read_table}


def load_image_dataset(
    source,
    *,
    name: str | None = None,
    split: str = "train",
    streaming: bool = False,
    image_column: str = "image",
    keep_columns=(),
):
    """
    Any source of images as a `datasets` data set with one column, of undecoded images, and others if asked for.

    Args:
        source (`str` or `os.PathLike`): a folder of images, of `.parquet` files, or of webdataset shards (`.tar`); a
            file, or a pattern such as `shards/*.tar`, of one of these kinds, taken whole; a folder written by
            `save_to_disk`; the name of a data set on the Hub. In a folder the subfolders and, for shards, the words of
            the file names say what belongs to a split; what names none belongs to `"train"`.
        name (`str`, *optional*): of a data set on the Hub, its configuration.
        split (`str`, defaults to `"train"`).
        streaming (`bool`, defaults to `False`): read while training; shards are else copied to the cache of `datasets`.
        image_column (`str`, defaults to `"image"`): that holds the images; the column of the result. In a webdataset
            any key that is an image's ending counts, unless the samples have this key.
        keep_columns (`Iterable[str]`, *optional*): columns to leave beside the images, such as labels and captions. A
            folder of images has those of its `metadata.jsonl` (or `.csv`, `.parquet`) or, without one, `"label"`, the
            subfolder. A webdataset has its keys and the fields of its `json`: integers where they are called `cls` or
            `index`, else text, and `None` where a sample lacks one.

    Returns:
        `datasets.Dataset`, or with `streaming` `datasets.IterableDataset`, with the column `image_column` of
        `datasets.Image(decode=False)`: `{"bytes": ..., "path": ...}`, of which one may be `None`; and `keep_columns`.

    Raises:
        ValueError: if there is nothing at `source`, no image in it, no such split or column, or if a shard is
            truncated or damaged, which it names; in a stream that is raised where the shard is read.
    """
    source = os.path.expanduser(os.fspath(source))
    keep = tuple(column for column in dict.fromkeys(keep_columns) if column != image_column)
    dataset = files.load_ready(source, split, streaming, name)
    if dataset is not None:
        return undecoded(_with_image_column(dataset, source, image_column), image_column, keep)
    found = files.find_files(source)
    data = {kind: [path for path in paths if not _is_metadata(path)] for kind, paths in found.items()}
    wanted = "are no images, parquet files or webdataset shards"
    kind, paths = files.choose_files(source, data, ("image", "parquet", "tar"), split, wanted)
    if kind == "image":
        dataset = _image_files(source, paths, found, streaming, image_column, keep)
        return undecoded(dataset, image_column, keep)
    if kind == "tar":
        _check_tars(paths, image_column)
        features = {key: datasets.Value("int64" if key in _INTEGER_KEYS else "string") for key in keep}
        generator, shards = _tar_rows, paths
    else:
        inspected = [_inspect_parquet(path, image_column, keep) for path in paths]  # finds files that were cut off
        features = inspected[0][0]
        generator = _parquet_rows
        shards = [(path, group) for path, (_, number) in zip(paths, inspected) for group in range(number)]
    features = datasets.Features({image_column: _UNDECODED, **{key: features[key] for key in keep}})
    return files.dataset_of_shards(generator, shards, features, streaming, image_column=image_column, keep=keep)


def undecoded(dataset, image_column: str, keep=()):
    """
    The column of images of a data set as `datasets.Image(decode=False)`, and the columns `keep`; all others are
    dropped before anything of them is decoded. Of a stream without features, and of a data set with a transform, the
    images stay as they are. Raises a `ValueError` for a column that is missing or of another type.
    """
    wanted = list(dict.fromkeys((image_column, *keep)))
    columns = dataset.column_names
    if columns is None:  # a stream that was mapped
        columns = list(dict.fromkeys(column for row in dataset.take(files.ROWS_LOOKED_AT) for column in row))
    for column in wanted:
        if column not in columns:
            raise ValueError(f"The data set has no column {column!r}; it has {columns}.")
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom":
        return dataset  # a transform decides by itself what the column gives
    dataset = dataset.with_format(None)
    if columns != wanted:
        dataset = dataset.select_columns(wanted)
    if dataset.features is None or dataset.features[image_column] == _UNDECODED:
        return dataset
    _check_type(dataset.features[image_column], f"The column {image_column!r}")
    return dataset.cast_column(image_column, _UNDECODED)


def _check_type(feature, column: str) -> None:
    if not _holds_images(feature):
        raise ValueError(f"{column} must hold images (or the bytes or paths of image files), got {feature}.")


def _holds_images(feature) -> bool:
    """Whether a column of this type can be cast to undecoded images: images, their bytes, their paths, or both."""
    if isinstance(feature, dict):
        parts = [feature[name] for name in ("bytes", "path") if name in feature]
        return bool(parts) and all(not isinstance(part, dict) and _holds_images(part) for part in parts)
    types = ("string", "large_string", "binary", "large_binary", "null")
    return isinstance(feature, datasets.Image) or (isinstance(feature, datasets.Value) and feature.dtype in types)


def _with_image_column(dataset, source: str, image_column: str):
    """A webdataset as `datasets` reads it, with a column of every key, has the images of any ending in one."""
    columns = dataset.column_names or []
    if image_column in columns or "__key__" not in columns:
        return dataset
    keys = _image_keys(columns, image_column)
    if len(keys) != 1:
        raise ValueError(
            f"The webdataset {source!r} has the columns {columns}. Say by `image_column` which has images."
        )
    return dataset.rename_column(keys[0], image_column)


def _image_files(source: str, paths: list[str], found: dict, streaming: bool, image_column: str, keep: tuple):
    """Image files, with what stands of them in a metadata file, or the class that is their subfolder."""
    columns, features = {image_column: paths}, {image_column: _UNDECODED}
    if keep:
        metadata = [path for kind in ("json", "csv", "parquet") for path in found.get(kind, ()) if _is_metadata(path)]
        rows = {}
        for path in metadata:
            with files.naming_file(path):
                table = _METADATA_READERS[Path(path).suffix](path).to_pylist()
            place = os.path.dirname(path)
            names = [str(row.get("file_name") or "") for row in table]
            rows |= {os.path.normpath(os.path.join(place, name)): row for name, row in zip(names, table)}
        if metadata and not any(os.path.normpath(path) in rows for path in paths):
            raise ValueError(f"None of the {len(paths)} images is named in the column `file_name` of {metadata}.")
        for column in keep:
            if any(column in row for row in rows.values()):
                columns[column] = [rows.get(os.path.normpath(path), {}).get(column) for path in paths]
        folder = source if os.path.isdir(source) else None
        labels = [_class_of(path, folder) for path in paths]
        if "label" in keep and not metadata and None not in labels:
            # Of all splits: the classes have the same numbers in each.
            names = sorted({_class_of(path, folder) for path in found["image"]} - {None})
            columns["label"] = [names.index(label) for label in labels]
            features["label"] = datasets.ClassLabel(names=names)
    elif streaming:
        # A stream shuffles within blocks only, and folders are sorted by class: it starts from another order.
        random.Random(0).shuffle(paths)
    dataset = datasets.Dataset.from_dict(columns)
    for column, feature in features.items():
        dataset = dataset.cast_column(column, feature)
    return dataset.to_iterable_dataset(min(len(paths), files.MAX_SHARDS)) if streaming else dataset


def _is_metadata(path: str) -> bool:
    return Path(path).stem == "metadata" and Path(path).suffix in _METADATA_READERS


def _class_of(path: str, source: str | None) -> str | None:
    """The folder that an image lies in, unless that is the source's, if it is one, or a split's."""
    if source is None:
        return os.path.basename(os.path.dirname(path))
    folders = Path(os.path.relpath(path, source)).parts[:-1]
    return None if not folders or (len(folders) == 1 and folders[0].lower() in files.SPLITS) else folders[-1]


def _check_tars(paths: list[str], image_column: str) -> None:
    """Raise if of the first samples none has an image, or most have several; a single odd one is passed over later."""
    counts, first = collections.Counter(), {}  # of none, one and several images
    samples = ((path, *sample) for path in paths for sample in files.read_tar(path, lambda keys: ()))
    try:
        for path, sample, keys, _ in itertools.islice(samples, MAX_SKIPPED_IN_A_ROW):
            num_images = min(2, len(_image_keys(keys, image_column)))
            counts[num_images] += 1
            first.setdefault(num_images, (path, sample, keys))
            if counts.total() >= files.ROWS_LOOKED_AT and counts[1] + counts[2] > 0:
                break
    except ValueError:  # a damaged shard, which is named again where it is read
        if not counts:
            raise
    if counts[1] <= counts[2]:
        path, sample, keys = first.get(2) or first.get(0) or (paths[0], "", [])
        raise ValueError(
            f"The sample {sample!r} of the webdataset shard {path!r} has {len(_image_keys(keys, image_column))} images, "
            f"with the keys {sorted(keys)}. Say which by `image_column`, or give one an ending such as 'jpg' or 'png'."
        )


def _image_keys(keys: list[str], image_column: str) -> list[str]:
    return [image_column] if image_column in keys else [key for key in keys if key.lower() in files.IMAGE_EXTENSIONS]


def _tar_rows(shards: list[str], image_column: str, keep: tuple[str, ...]) -> Iterator[dict]:
    for path in shards:
        for sample, keys, read in files.read_tar(
            path, lambda keys: [*_image_keys(keys, image_column), *keep, *["json"] * (not {*keep} <= {*keys})]
        ):
            images, contents = _image_keys(keys, image_column), dict(read)
            # What has no image, or several, is counted as an image that cannot be read.
            image = {"bytes": b"", "path": f"{path}/{sample}"}
            if len(images) == 1:
                image = {"bytes": contents[images[0]], "path": f"{path}/{sample}.{images[0]}"}
            elif images:
                logger.warning_once(f"{path}/{sample} has the images {sorted(images)}; `image_column` may say which.")
            row, fields = {image_column: image}, _json_fields(contents, keep)
            for key in keep:
                text = contents[key].decode("utf-8", "replace") if key in contents else fields.get(key)
                try:
                    row[key] = int(text) if text is not None and key in _INTEGER_KEYS else text
                except ValueError as error:
                    raise ValueError(f"{path}/{sample}.{key} must hold an integer, got {text!r:.100}.") from error
            yield row


def _json_fields(contents: dict[str, bytes], keep: tuple[str, ...]) -> dict[str, str]:
    """What a sample's `json` says of columns that have no file of their own, as text; nothing if it is damaged."""
    try:
        fields = json.loads(contents.get("json", b"{}"))
    except (ValueError, RecursionError):
        return {}
    fields = fields if isinstance(fields, dict) else {}
    return {key: str(fields[key]) for key in keep if isinstance(fields.get(key), (str, int))}


def _inspect_parquet(path: str, image_column: str, keep: tuple[str, ...]) -> tuple[datasets.Features, int]:
    """The types of the columns, and the number of row groups: what can be read at once."""
    with files.naming_file(path), pq.ParquetFile(path) as file:
        schema, num_row_groups = file.schema_arrow, file.num_row_groups
    for column in (image_column, *keep):
        if column not in schema.names:
            raise ValueError(f"The parquet file {path!r} has no column {column!r}; it has {schema.names}.")
    columns = [schema.field(column) for column in dict.fromkeys((image_column, *keep))]
    features = datasets.Features.from_arrow_schema(pa.schema(columns, schema.metadata))
    _check_type(features[image_column], f"The column {image_column!r} of the parquet file {path!r}")
    return features, num_row_groups


def _parquet_rows(shards: list[tuple[str, int]], image_column: str, keep: tuple[str, ...]) -> Iterator[dict]:
    columns = list(dict.fromkeys((image_column, *keep)))
    for path, row_group in shards:
        with files.naming_file(path), pq.ParquetFile(path) as file:
            before = sum(file.metadata.row_group(group).num_rows for group in range(row_group))
            batches = file.iter_batches(batch_size=64, row_groups=[row_group], columns=columns)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows, before):
                value = row[image_column]
                parts = value if isinstance(value, dict) else {"bytes" if isinstance(value, bytes) else "path": value}
                data, own_name = parts.get("bytes"), parts.get("path")
                # Not by its own name, which `datasets` would take for a file's if there is one.
                value = own_name if data is None else {"bytes": data, "path": f"{path}/{own_name or f'row {number}'}"}
                yield {**row, image_column: value}


class ImagePreparation:
    """
    From an entry of a column of images to `pixel_values`, with the paper's augmentation: a random crop of 90 to 100 %
    of the area, resized (code, stage 1; no flip).

    Args:
        image_processor: makes `pixel_values` `(1, 3, S, S)` of a PIL image.
        crop_scale (`tuple[float, float]`, defaults to `(0.9, 1.0)`): range, within (0, 1], of the crop's share of the
            area; `(1, 1)` switches the augmentation off.
        reducing_gap (`float`, *optional*, defaults to 2.0): from 1 on, see [`read_image`]: large images are averaged
            over whole pixels before they are resized (`PIL.Image.Image.resize`), in a fraction of the time and without
            a visible difference. `None`: at full size, as the image processor does by itself.
    """

    def __init__(self, image_processor, crop_scale=(0.9, 1.0), reducing_gap: float | None = 2.0):
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"`crop_scale` must be a range within (0, 1], got {crop_scale}.")
        at_least(1).check_given(reducing_gap=reducing_gap)
        self.image_processor, self.crop_scale, self.reducing_gap = image_processor, crop_scale, reducing_gap
        self.size = None
        if image_processor.do_resize:
            self.size = (image_processor.size["width"], image_processor.size["height"])

    def __call__(self, value, seed: str) -> torch.Tensor:
        """`pixel_values` `(3, S, S)`; what is drawn depends on `seed` only. Raises [`UnreadableImageError`]."""
        # The crop takes away from the sides, by the share and by its aspect ratio.
        min_size = self.size and math.ceil(max(self.size) / math.sqrt(self.crop_scale[0] * 3 / 4))
        image = read_image(value, min_size, self.reducing_gap)
        box = (0, 0, *image.size)
        if self.crop_scale[0] < 1:
            box = self.random_box(image.size, random.Random(seed))
        image = self._crop(image, box)
        return self.image_processor(images=image, return_tensors="pt").pixel_values[0]

    def sample(self, row: dict, image_column: str, seed: str, caption_column=None, tokenize=None) -> dict:
        """
        `pixel_values` of a row and, with a column of captions, `input_ids` `(L,)` of one of the row's, as `tokenize` makes
        them `(texts, L)` of texts. Raises [`UnreadableImageError`], and [`BadSampleError`] without a caption.
        """
        if caption_column is None:
            return {"pixel_values": self(row[image_column], seed)}
        captions = row[caption_column]
        captions = [captions] if isinstance(captions, str) else captions
        if (
            not captions
            or not isinstance(captions, (list, tuple))
            or not all(isinstance(text, str) and text.strip() for text in captions)
        ):
            raise BadSampleError(
                f"its {caption_column!r} must be a caption or several, got {row[caption_column]!r:.100}"
            )
        caption = random.Random(f"{seed}/caption").choice(captions)
        return {"pixel_values": self(row[image_column], seed), "input_ids": tokenize([caption])[0]}

    def random_box(self, size: tuple[int, int], rng: random.Random) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of a crop of an image of `size` (width, height), in fractions of pixels."""
        width, height = size
        area = width * height * rng.uniform(*self.crop_scale)
        # Aspect ratios between 3:4 and 4:3, as usual for this augmentation.
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_height = min(height, area / min(width, math.sqrt(area * ratio)))
        # Where the ratio does not fit, the area is kept and not the ratio.
        crop_width = min(width, area / crop_height)
        left, top = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
        return (left, top, min(width, left + crop_width), min(height, top + crop_height))

    def _crop(self, image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
        """What the box holds, at the model's size where the image processor would do no more than resize."""
        # A fractional box: a small picture would otherwise move by whole pixels only.
        if self.size is not None and self.image_processor.resize_mode == "squash":
            resample = Image.Resampling(self.image_processor.resample)
            return image.resize(self.size, resample, box=box, reducing_gap=self.reducing_gap)
        if box == (0, 0, *image.size):
            return image
        # The image processor goes on from here: it gets the shape of the whole picture, and no more pixels than help.
        scale = 1.0
        if self.size is not None and self.reducing_gap is not None:
            scale = min(1.0, self.reducing_gap * max(self.size) / min(image.size))
        size = tuple(math.ceil(scale * side) for side in image.size)
        return image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=self.reducing_gap)
