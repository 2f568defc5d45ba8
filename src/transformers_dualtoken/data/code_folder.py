"""A folder of precomputed codes: parquet shards, and one file of JSON that says that all of them are whole.

Every shard also carries, in its footer, the settings it was made with and what it counts. So a shard is whole or absent,
several processes need no word with each other, and whoever finds the last shard in place writes the description.
"""

import json
import os
import re
import secrets
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


FORMAT_VERSION = 1
DESCRIPTION_FILE = "dualtoken_codes.json"
_SHARD_NAME = re.compile(r"shard-(\d{5,})\.parquet")
_FOOTER_KEY = b"dualtoken_codes"
# What a stream reads at once: about 12 MB of codes at full size.
_ROWS_PER_GROUP = 512
# Skipped samples that are named, of a shard and of the folder.
MAX_SKIPPED_NAMED = 10


_NEEDED = {
    "format_version",
    "tokenizer_fingerprint",
    "bfloat16_fingerprint",
    "grid",
    "num_depths",
    "codebook_size",
} | {"num_shards"}


def code_dtype(codebook_size: int) -> np.dtype:
    """int16 where all codes fit, else int32."""
    return np.dtype(np.int16 if codebook_size <= 2**15 else np.int32)


def shard_path(folder, index: int) -> Path:
    return Path(folder) / f"shard-{index:05d}.parquet"


def is_code_folder(path) -> bool:
    """Whether a folder holds precomputed codes, also where it is not finished."""
    folder = Path(path)
    if (folder / DESCRIPTION_FILE).is_file():
        return True
    return folder.is_dir() and any(_has_footer(shard) for shard in _find_shards(folder).values())


def _has_footer(shard: Path) -> bool:
    try:
        return _FOOTER_KEY in (pq.read_schema(shard).metadata or {})
    except (OSError, pa.ArrowException):  # another shard, or who reads this one, says what is wrong
        return False


def read_description(path) -> dict:
    """
    The contents of `dualtoken_codes.json` of a folder whose shards are all there.

    Raises:
        ValueError: if the folder is not there, holds no codes, is not finished, lacks a shard, or is of a later format.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"There is no folder of precomputed codes at {str(path)!r}.")
    file = folder / DESCRIPTION_FILE
    if not file.is_file():
        if is_code_folder(folder):
            raise ValueError(
                f"The precomputed codes in {str(path)!r} are not finished: {len(_find_shards(folder))} shards are "
                f"there and {DESCRIPTION_FILE}, which is written last, is not. Start precompute_codes again with the "
                "same arguments; it goes on where it was stopped."
            )
        raise ValueError(f"{str(path)!r} holds no precomputed codes: it has no {DESCRIPTION_FILE}.")
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        lacking = sorted(_NEEDED - set(description))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{str(file)!r} is damaged ({error}). Delete it and start precompute_codes again.") from error
    if lacking:
        raise ValueError(f"{str(file)!r} is damaged: it lacks {', '.join(lacking)}. Start precompute_codes again.")
    if description["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"The precomputed codes in {str(path)!r} are of format {description['format_version']}; this version of "
            f"transformers-dualtoken reads format {FORMAT_VERSION}."
        )
    missing = sorted(set(range(description["num_shards"])) - set(_find_shards(folder)))
    if missing:
        raise ValueError(
            f"Of the {description['num_shards']} shards of precomputed codes in {str(path)!r}, {len(missing)} are "
            f"missing; the first is {shard_path(folder, missing[0]).name}. Copy the folder again, or delete "
            f"{DESCRIPTION_FILE} and start precompute_codes again with the same arguments."
        )
    return description


def _find_shards(folder: Path) -> dict[int, Path]:
    shards = {int(match[1]): folder / name for name in os.listdir(folder) if (match := _SHARD_NAME.fullmatch(name))}
    return dict(sorted(shards.items()))


def _read_footer(shard: Path) -> dict:
    try:
        metadata = pq.read_schema(shard).metadata or {}
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"The shard {str(shard)!r} is damaged: {error}. Delete it and start again.") from error
    if _FOOTER_KEY not in metadata:
        raise ValueError(f"{str(shard)!r} is no shard of precomputed codes. Give an empty output folder.")
    return json.loads(metadata[_FOOTER_KEY])


def _write_atomically(path: Path, write) -> None:
    """Write by `write(file)` under another name; `path` appears when everything is on the disk."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class CodeFolder:
    """
    A folder that is being written.

    Args:
        path (`str` or `os.PathLike`): made if it is not there.
        settings (`dict`): fit for JSON; what decides the contents of the shards. It has the keys `sources` (dicts with
            a `name`), `grid` and `codebook_size`, as in [`precompute_codes`].

    Raises:
        ValueError: if the folder was begun with other settings, which are named, or a shard of it is damaged.
    """

    def __init__(self, path, settings: dict):
        self.path, self.settings = Path(path), settings
        self.path.mkdir(parents=True, exist_ok=True)
        for shard in _find_shards(self.path).values():
            self._check_settings(_read_footer(shard)["settings"])

    def _check_settings(self, found: dict) -> None:
        if found == self.settings:
            return
        different = [key for key in {**self.settings, **found} if found.get(key) != self.settings.get(key)]
        listed = "; ".join(f"{key} was {found.get(key)} and is now {self.settings.get(key)}" for key in different)
        raise ValueError(
            f"The folder {str(self.path)!r} was begun with other settings: {listed}. Give the same arguments as then, "
            "or another output folder."
        )

    def whole_shards(self) -> set[int]:
        """Numbers of the shards that are written."""
        return set(_find_shards(self.path))

    def write_shard(self, index: int, columns: dict[str, list], counts: list[dict], skipped: list[dict]) -> None:
        """
        Args:
            index (`int`): number of the shard.
            columns (`dict`): of the samples, `id`, `source`, `example`, `pixel_codes` and `semantic_codes`; codes are
                a list of arrays `(h * w * D,)`, one for an image, for every sample.
            counts (`list[dict]`): `num_samples`, `num_images` and `num_skipped` of every source.
            skipped (`list[dict]`): `sample` and `reason` of what was skipped.
        """
        footer = {"settings": self.settings, "counts": counts, "skipped": skipped[:MAX_SKIPPED_NAMED]}
        arrays = {name: pa.array(columns[name], pa.string()) for name in ("id", "source", "example")}
        for kind, codebook_size in self.settings["codebook_size"].items():
            width = self.settings["grid"][0] * self.settings["grid"][1] * self.settings["num_depths"][kind]
            arrays[f"{kind}_codes"] = _nested_lists(columns[f"{kind}_codes"], width, code_dtype(codebook_size))
        arrays["num_images"] = pa.array([len(codes) for codes in columns["pixel_codes"]], pa.int32())
        table = pa.table(arrays).replace_schema_metadata({_FOOTER_KEY: json.dumps(footer)})
        path = shard_path(self.path, index)
        _write_atomically(path, lambda file: _write_table(table, file))
        # What a killed process left of this shard.
        for stale in self.path.glob(f"{path.name}.*.tmp"):
            stale.unlink(missing_ok=True)

    def finish(self, num_rows: int) -> dict | None:
        """
        Write the description if all shards are there; any process may do it, and several at once.

        Args:
            num_rows (`int`): of all sources together.

        Returns:
            `dict`: the description, or `None` as long as other processes have shards to write.

        Raises:
            ValueError: if the shards do not hold so many rows.
        """
        samples_per_shard = self.settings["samples_per_shard"]
        shards = _find_shards(self.path)
        num_shards = -(-num_rows // samples_per_shard)
        if set(range(num_shards)) - set(shards):
            return None
        counts = [dict.fromkeys(("num_samples", "num_images", "num_skipped"), 0) for _ in self.settings["sources"]]
        skipped = []
        for index, shard in shards.items():
            footer = _read_footer(shard)
            for total, part in zip(counts, footer["counts"]):
                for name, count in part.items():
                    total[name] += count
            found = sum(part["num_samples"] + part["num_skipped"] for part in footer["counts"])
            expected = min(samples_per_shard, max(0, num_rows - index * samples_per_shard))
            if found != expected:
                raise ValueError(
                    f"{str(shard)!r} holds {found} rows of the sources, which now have {expected} there: the sources "
                    "have changed since this folder was begun. Give another output folder."
                )
            skipped += footer["skipped"][: MAX_SKIPPED_NAMED - len(skipped)]
        totals = {name: sum(part[name] for part in counts) for name in ("num_samples", "num_images", "num_skipped")}
        sources = [{**source, **part} for source, part in zip(self.settings["sources"], counts)]
        description = {**self.settings, "sources": sources, "num_shards": num_shards, **totals, "skipped": skipped}
        text = json.dumps(description, indent=2) + "\n"
        _write_atomically(self.path / DESCRIPTION_FILE, lambda file: file.write(text.encode()))
        return description

    def read_finished(self) -> dict | None:
        """The description of a folder that is finished already; `None` if it is not."""
        return read_description(self.path) if (self.path / DESCRIPTION_FILE).is_file() else None


def _write_table(table: pa.Table, file) -> None:
    # Dictionaries, which parquet makes by itself, pack codes of 14 bits into 14 bits.
    with pq.ParquetWriter(file, table.schema, compression="zstd") as writer:
        if len(table):  # `datasets` cannot read an empty row group
            writer.write_table(table, _ROWS_PER_GROUP)


def _nested_lists(samples: list[list[np.ndarray]], width: int, dtype: np.dtype) -> pa.Array:
    """Codes `(width,)` of every image of every sample as a column of lists of lists."""
    codes = [image for images in samples for image in images]
    flat = np.concatenate(codes).astype(dtype, copy=False) if codes else np.zeros(0, dtype)
    images = pa.ListArray.from_arrays(pa.array(np.arange(len(codes) + 1) * width, pa.int32()), pa.array(flat))
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *map(len, samples)]), pa.int32()), images)
