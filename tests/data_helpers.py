"""Files of images and conversations for the tests of data, and what is read of them."""

import io
import itertools
import json
import pickle
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from training_helpers import noise

from transformers_dualtoken.data import BadSampleError, ChatSource, load_chat_sources
from transformers_dualtoken.image_reading import read_image


def encoded(image, format="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def flat(number: int, format="PNG") -> bytes:
    """A picture that tells its number by its colour, whatever is cropped of it."""
    return encoded(Image.new("RGB", (24, 24), (number, 0, 0)), format)


def numbers(pixel_values) -> list[int]:
    return ((pixel_values[:, 0, 12, 12] + 1) * 127.5).round().int().tolist()


def first_epoch(samples, count: int) -> list[dict]:
    """Those of the first `count` samples of a stream, or of its loader, that are of its first epoch."""
    samples = itertools.islice(samples, count)
    return [sample for sample in samples if sample["stream_position"]["sources"][0]["epoch"] == 0]


def table(*images) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"image": list(images)}, features=datasets.Features({"image": datasets.Image()}))


def write_tar(path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_parquet(path, images: list, column="image", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = [{"bytes": image, "path": None} for image in images]
    pq.write_table(pa.table({column: values, "label": [0] * len(images)}), path, **options)
    return path


def loaded_numbers(dataset) -> list[int]:
    images = [read_image(row["image"]) for row in dataset]
    return sorted(image.getpixel((0, 0))[0] for image in images)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    noise(seed, (4, 4)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, content) -> Path:
    """Bytes or text as they are, a list as JSON lines, a table as parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    if isinstance(content, pa.Table):
        pq.write_table(content, path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def only(spec, **kwargs) -> ChatSource:
    (source,) = load_chat_sources(spec, **kwargs)
    return source


def examples(spec, **kwargs) -> list[dict]:
    """The examples of one source: the same from the stream and after pickling, with images that can be read."""
    source = only(spec, **kwargs)
    assert isinstance(source.dataset, datasets.Dataset)
    to_example = pickle.loads(pickle.dumps(source.to_example))
    results = [to_example(row) for row in source.dataset]
    streamed = only(spec, streaming=True, **kwargs)
    assert isinstance(streamed.dataset, datasets.IterableDataset) and streamed.name == source.name
    assert [streamed.to_example(row) for row in streamed.dataset] == results
    for image in images_of(*results):
        assert read_image(image).size == (4, 4)
    return results


def images_of(*results) -> list:
    contents = [
        message["content"]
        for example in results
        for message in example.get("messages", [{"content": example.get("content")}])
    ]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    return [part["image"] for part in parts if part["type"] == "image"]


def refused(spec, match: str, **kwargs) -> BadSampleError:
    """Every row of a source is a bad sample for this reason, in a stream too."""
    for streaming in (False, True):
        source = only(spec, streaming=streaming, **kwargs)
        rows = list(source.dataset)
        assert rows
        for row in rows:
            with pytest.raises(BadSampleError, match=match) as caught:
                source.to_example(row)
    return caught.value


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def image(value) -> dict:
    return {"type": "image", "image": value}


def chat(question, answer, **extra) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **extra}
