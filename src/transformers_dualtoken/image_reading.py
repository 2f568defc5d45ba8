"""One reader of images, for training and for inference: from what holds an image to an RGB image.

Nothing a stranger sends is read without bounds ([`ImageBounds`]), and what cannot be read says why.
"""

import base64
import contextlib
import http.client
import math
import os
import re
import socket
import stat
import string
import threading
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO

import fsspec
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .field_rules import Rule, is_list_of


MAX_DECODED_PIXELS = 2**26  # told by the header; as RGB, with the image processor's array of it, 520 MB at most
MAX_DOWNLOADED_BYTES = 2**26
DOWNLOAD_SECONDS = 60
# Bytes, base64 text and data URLs; paths and file URLs; http and https; other URLs that fsspec knows (hf://, s3://, ...).
IMAGE_SOURCES = ("data", "local", "url", "fsspec")
# Keys of a dict that holds an image, the first that is there counts; `path` may also be the name of the bytes.
IMAGE_KEYS = ("image", "bytes", "base64", "url", "path")
# Names consist of the characters of base64, too: up to this length text is base64 only if it begins as an image does.
_LONGEST_PATH = 4096
_IMAGE_START = re.compile(
    rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF.{4}WEBP|II[*+]\0|MM\0[*+]|BM.{4}\0{4}|P[1-7fF]\s|qoif"
    rb"|.{4}ftyp|\0\0\0\x0cj[Pp]  |\xff\x4f\xff\x51",
    re.DOTALL,
)
# PIL goes by the content and not by the name: PostScript would start Ghostscript, and files of the others hold one of
# another format, not bounded by their header. An ICO is decoded while it is opened: it is told by its first bytes.
_ICO_START = b"\0\0\1\0"
_HOLDS_OTHERS = "it is of the format {}, which holds pictures of any size; save it as PNG or JPEG"
_REFUSED_FORMATS = {
    "EPS": "it is PostScript, a program and no image",
    **{name: _HOLDS_OTHERS.format(name) for name in ("BLP", "ICNS", "IPTC")},
}
_TIFF_TILE = (322, 323)  # the tags of its width and height
# Protocols of fsspec that read, by another name, what other sources stand for.
_FSSPEC_SOURCES = {
    **dict.fromkeys(("file", "local", "asynclocal", "git", "dvc"), {"local"}),
    **dict.fromkeys(("http", "https"), {"url"}),
    **dict.fromkeys(("reference", "generic"), {"local", "url"}),  # they go on to any URL
}
_STRIP_PIXELS = 2**22
_PIECE_BYTES = 2**16
# Half a level of 8 bits: floating-point images may leave their range by so much of it.
_HALF_LEVEL = 0.5 / 255
# A decoded image may overshoot [-1, 1], an untrained decoder's by much; levels of 0..255 lie beyond this.
MAX_RECONSTRUCTION = 16.0
_OF_DECODED = "Of decoded images, which lie in [-1, 1], `post_process_images` makes images."

_LIMIT = Rule("a whole number from 1 on, or None for no limit", in_range=lambda n: type(n) is int and n >= 1)
_SOURCES = Rule(
    f"one or a list of {', '.join(IMAGE_SOURCES)}",
    in_range=lambda v: is_list_of(IMAGE_SOURCES.__contains__)((v,) if isinstance(v, str) else v),
)


class UnreadableImageError(ValueError):
    """An image that cannot be read, and that training passes over; the message is the reason."""


@dataclass(frozen=True)
class ImageBounds:
    """What may be read, by default at inference."""

    sources: tuple[str, ...] = ("data", "local", "url")  # images in memory are always read
    max_pixels: int | None = MAX_DECODED_PIXELS  # of an image; `None`: as many as Pillow decodes
    max_bytes: int | None = MAX_DOWNLOADED_BYTES  # of a download; `None`: any number

    def __post_init__(self):
        _SOURCES.check("image_sources", self.sources)
        object.__setattr__(self, "sources", (self.sources,) if isinstance(self.sources, str) else tuple(self.sources))
        _LIMIT.check_given(max_image_pixels=self.max_pixels, max_image_bytes=self.max_bytes)

    def check_source(self, source: str) -> None:
        if source not in self.sources:
            allowed = f"allowed are {', '.join(self.sources) or 'none'} (`image_sources`)"
            raise UnreadableImageError(f"images from the source {source!r} are not read here; {allowed}")

    def check_pixels(self, width: int, height: int) -> None:
        if self.max_pixels is not None and width * height > self.max_pixels:
            limit = f"where {self.max_pixels:,} can be decoded (`max_image_pixels`)"
            raise UnreadableImageError(f"it has too many pixels: {width} x {height}, {limit}")


# The data of a training run are its owner's choice.
TRAINING_BOUNDS = ImageBounds(sources=IMAGE_SOURCES)


@contextlib.contextmanager
def _unreadable(reason: str):
    """Errors of Pillow, whose decoders raise many kinds on damaged data, as one."""
    try:
        yield
    except (MemoryError, UnreadableImageError):
        raise
    except Exception as error:
        raise UnreadableImageError(f"{reason} ({error})") from error


def image_name(value) -> str | None:
    """What to call an image in a message: where it lies, as far as that is known."""
    if isinstance(value, Mapping):
        value = value.get("path") or value.get("url") or value.get("image")
        return None if value is None else image_name(value)
    if isinstance(value, (str, os.PathLike)):
        name = os.fsdecode(value)
        return name if len(name) <= 200 else f"{name[:60]}... ({len(name):,} characters)"
    name = getattr(value, "filename", None) or getattr(value, "name", None)
    return name if isinstance(name, str) else None


def is_array(value) -> bool:
    return isinstance(value, (np.ndarray, torch.Tensor))


def flatten_images(images) -> list:
    """One image, a batch (an array or tensor of 4 dimensions) or lists of both as a flat list of images."""
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in flatten_images(item)]
    is_batch = is_array(images) and not getattr(images, "is_nested", False) and images.ndim == 4
    return list(images) if is_batch else [images]


def locate_image(value, folder: str | None = None, bounds: ImageBounds = TRAINING_BOUNDS):
    """
    What holds an image in one of four forms: `{"bytes": ..., "path": a name or None}`, the path of a local file, a
    URL, or, unchanged, an image in memory (PIL, array, tensor).

    Args:
        value: bytes, a file object, a path, a URL of any kind, base64 text (which must begin as an image of a known
            format does, or it is a path), an image in memory, or a dict with one of these under an [`IMAGE_KEYS`].
        folder (`str`, *optional*): where relative paths begin, a path or a URL; a `file:` URL is whole by itself.
        bounds ([`ImageBounds`]): without `local`, text is not looked for in the file system.

    Raises:
        UnreadableImageError: for an entry without an image, and text that is not what it claims.
        TypeError: for another kind of entry.
    """
    if isinstance(value, Mapping):
        key = next((key for key in IMAGE_KEYS if value.get(key) is not None), None)
        if key is None:
            keys = ", ".join(map(repr, value)) or "no keys"
            raise UnreadableImageError(f"the entry holds no image (it has {keys}, none of {', '.join(IMAGE_KEYS)})")
        if key == "base64":
            return {"bytes": _decode_base64(value[key]), "path": None}
        if key != "bytes":
            return locate_image(value[key], folder, bounds)
        if not isinstance(value[key], (bytes, bytearray, memoryview)):
            raise TypeError(f"The 'bytes' of an image must be bytes, got {type(value[key]).__name__}.")
        return {"bytes": bytes(value[key]), "path": image_name(value.get("path"))}
    if value is None:
        raise UnreadableImageError("the entry holds no image")
    if isinstance(value, Image.Image) or is_array(value):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"bytes": bytes(value), "path": None}
    if hasattr(value, "read"):
        with _unreadable("the file object cannot be read"):
            # As Pillow does: a buffer that an image was just written to stands at its end.
            if getattr(value, "seekable", bool)():
                value.seek(0)
            data = value.read()
        if not isinstance(data, bytes):
            raise TypeError(f"A file object must be open for bytes (mode 'rb'), got one of {type(data).__name__}.")
        return {"bytes": data, "path": image_name(value)}
    if isinstance(value, os.PathLike):
        return _local_path(os.fsdecode(value), folder)
    if isinstance(value, str):
        return _locate_text(value, folder, "local" in bounds.sources)
    kinds = "a path, a URL, base64 text, bytes, a file object, {'bytes': ...}, a PIL image, an array or a tensor"
    raise TypeError(f"An image must be {kinds}, got {type(value).__name__}.")


def _locate_text(text: str, folder: str | None, may_be_local: bool):
    if not text:
        raise UnreadableImageError("the path of an image is empty")
    scheme = text[:8].lower()
    if scheme.startswith("data:"):
        head, comma, data = text.partition(",")
        if not comma:
            raise UnreadableImageError("a data URL needs a comma before its data")
        data = urllib.parse.unquote_to_bytes(data)
        return {"bytes": _decode_base64(data) if head.rstrip().lower().endswith(";base64") else data, "path": None}
    if scheme.startswith("file:"):
        host, path = re.fullmatch(r"(?://([^/]*))?(.*)", text[len("file:") :], re.DOTALL).groups()
        if (host or "").lower() not in ("", "localhost"):
            raise UnreadableImageError(f"a file URL must be of this machine and this one names the host {host!r:.200}")
        # Percent signs are an escape in a URL, and none where somebody wrote "file://" before a path.
        return path if may_be_local and os.path.isfile(path) else urllib.parse.unquote(path)
    if scheme.startswith(("http://", "https://")):
        return text
    path = _local_path(text, folder)
    if may_be_local and os.path.isfile(path):
        return path
    if "://" in text[:_LONGEST_PATH]:
        return text
    try:
        data = _decode_base64(text)
    except UnreadableImageError:
        return path
    return {"bytes": data, "path": None} if len(text) > _LONGEST_PATH or _IMAGE_START.match(data) else path


def _local_path(path: str, folder: str | None) -> str:
    if folder is not None and "://" in folder:
        return f"{folder.rstrip('/')}/{path}"
    return os.path.join(folder or "", os.path.expanduser(path))


def _decode_base64(text) -> bytes:
    with _unreadable("the base64 text of an image cannot be decoded"):
        data = text.encode() if isinstance(text, str) else text
        return base64.b64decode(b"".join(data.split()), validate=True)  # encoders break lines


def read_image(
    value, min_size: int | None = None, reducing_gap: float | None = None, bounds: ImageBounds = TRAINING_BOUNDS
) -> Image.Image:
    """
    What holds an image as an upright RGB image, its mode converted as the image processor does it ([`pil_to_rgb`]).

    Args:
        value: see [`locate_image`]; arrays and tensors as the image processor takes them.
        min_size (`int`, *optional*): pixels that either side needs at least. With it a JPEG is decoded at 1/2, 1/4 or
            1/8 of its size where it has more than `bounds.max_pixels`.
        reducing_gap (`float`, *optional*): a JPEG is decoded at the smallest size with sides of at least
            `reducing_gap * min_size`, as in `PIL.Image.Image.thumbnail`.
        bounds ([`ImageBounds`])

    Raises:
        UnreadableImageError: for what is missing, damaged, no image, of a refused format, without a defined range of
            values, or excluded by `bounds`.
        TypeError: for another kind of entry.
        OSError (`urllib.error.URLError`), or another error of `fsspec`: where a URL fails for another reason than that
            nothing is there; no image is passed over because of the network.
    """
    # A damaged file is reported once, by its error; PIL would also warn of odd tags, and of large images.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = open_image(value, bounds, min_size, reducing_gap)
    if isinstance(image, Image.Image) and image.mode == "RGB" and "transparency" not in image.info:
        return image
    try:
        image = image_to_tensor(image).cpu().numpy()
        return Image.merge("RGB", [Image.fromarray(plane) for plane in image])
    except ValueError as error:
        raise UnreadableImageError(str(error).rstrip(".")) from error


def open_image(value, bounds: ImageBounds, min_size: int | None = None, reducing_gap: float | None = None):
    """As [`read_image`], but the mode stays as it is, and arrays and tensors pass through."""
    value = locate_image(value, bounds=bounds)
    if is_array(value):
        return value
    if isinstance(value, Image.Image):
        return decode_image(value, bounds)
    if isinstance(value, Mapping):
        source, opener = "data", lambda: BytesIO(value["bytes"])
    elif "://" not in value or os.path.isfile(value):
        source, opener = "local", lambda: _open_local(value)
    elif value[:8].lower().startswith(("http://", "https://")):
        source, opener = "url", lambda: BytesIO(_download(value, bounds.max_bytes))
    else:
        source, opener = "fsspec", lambda: BytesIO(_read_fsspec(value, bounds))
    bounds.check_source(source)
    with opener() as file, _unreadable("it is damaged"):
        start = file.read(len(_ICO_START))
        if not start:
            raise UnreadableImageError("the file is empty (0 bytes)")
        if start == _ICO_START:
            raise UnreadableImageError(_HOLDS_OTHERS.format("ICO"))
        file.seek(0)
        try:
            image = Image.open(file)
        except UnidentifiedImageError as error:
            raise UnreadableImageError("it is no image, or damaged, or of an unknown format") from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise UnreadableImageError(f"it has too many pixels ({error})") from error
        is_large = bounds.max_pixels is not None and math.prod(image.size) > bounds.max_pixels
        if min_size is not None and (is_large or reducing_gap is not None):
            # Does nothing for other formats than JPEG.
            side = min_size if is_large else math.ceil(min_size * reducing_gap)
            image.draft(None, (side, side))
        return decode_image(image, bounds)


def _open_local(path: str):
    where = "" if os.path.isabs(path) else f", looked for in {os.getcwd()!r}"
    try:
        # Before it is opened: opening a pipe would wait for its other end.
        if stat.S_ISREG(os.stat(path).st_mode):
            return open(path, "rb")
    except (OSError, ValueError) as error:
        raise UnreadableImageError(f"the file cannot be read ({error}{where})") from error
    raise UnreadableImageError(f"{path!r} is a folder or a device and no file")


def _read_fsspec(url: str, bounds: ImageBounds) -> bytes:
    needed = set()
    for part in url.split("::"):
        protocol, mark, _ = part.partition("://")
        # A part of a chain is a URL, the name of a protocol, or else a path of this machine.
        is_path = len(protocol) < 2 or not (mark or protocol in fsspec.available_protocols())
        needed |= {"local"} if is_path else _FSSPEC_SOURCES.get(protocol.lower(), set())
    for source in sorted(needed):
        bounds.check_source(source)
    try:
        filesystem, path = fsspec.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UnreadableImageError(f"there is no way to read this URL ({url}: {error})") from error
    try:
        with filesystem.open(path) as file:
            return _read_bounded(file, bounds.max_bytes)
    except FileNotFoundError as error:
        if "url" in needed:  # fsspec calls every fault of http a missing file
            raise urllib.error.URLError(f"no file, or no answer, from {url!r:.200}: {error!r}") from error
        raise UnreadableImageError(f"there is no file at this URL ({error})") from error


def _read_bounded(file, max_bytes: int | None, announced: int = 0) -> bytes:
    # Piece by piece: memory for all that is announced, or allowed, would be taken before any of it is there.
    data, size, limit = bytearray(), f"{announced:,}", math.inf if max_bytes is None else max_bytes
    if announced <= limit:
        size = f"more than {limit:,}"
        while len(data) <= limit and (piece := file.read(_PIECE_BYTES)):
            data += piece
    if max(announced, len(data)) > limit:
        sizes = f"{size} bytes, where {max_bytes:,} are read (`max_image_bytes`)"
        raise UnreadableImageError(f"its file is too large: {sizes}")
    return bytes(data)


class _TimedHandler(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """Keeps the sockets of a download, to cut them off when its time is over: their own timeout is one per read."""

    handler_order = urllib.request.FTPHandler.handler_order - 1

    def __init__(self):
        super().__init__()
        self.sockets, self.is_over = [], False

    def do_open(self, http_class, request, **options):
        handler = self

        class Connection(http_class):
            def connect(self):
                super().connect()
                handler.sockets.append(self.sock)
                # The time may have ended meanwhile, when there was no socket to cut off.
                if handler.is_over:
                    self.close()
                    raise TimeoutError

        return super().do_open(Connection, request, **options)

    def ftp_open(self, request):
        raise UnreadableImageError(f"it leads to a URL of the kind {request.type!r}, which is not followed")

    def cut(self) -> None:
        self.is_over = True
        for connection in self.sockets:
            with contextlib.suppress(OSError):  # it has ended by itself
                connection.shutdown(socket.SHUT_RDWR)


def _download(url: str, max_bytes: int | None) -> bytes:
    """The body of an http(s) URL. Redirects are followed to http(s) only, as often as urllib does."""
    handler = _TimedHandler()
    timer = threading.Timer(DOWNLOAD_SECONDS, handler.cut)
    timer.daemon = True
    timer.start()
    try:
        parts = urllib.parse.urlsplit(url)
        if not parts.hostname:
            raise ValueError("it names no host")
        # Blanks and characters outside ASCII as percent signs, what is quoted already as it is.
        path, query = (urllib.parse.quote(part, safe=string.punctuation) for part in (parts.path, parts.query))
        quoted = urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, query, ""))
        # Some servers refuse Python's own name.
        request = urllib.request.Request(quoted, headers={"User-Agent": "transformers-dualtoken"})
        with urllib.request.build_opener(handler).open(request, timeout=DOWNLOAD_SECONDS) as response:
            data = _read_bounded(response, max_bytes, response.length or 0)
            if handler.is_over:
                raise TimeoutError
            if response.length:  # a connection that broke off, and no fault of the image
                missing = f"{len(data):,} bytes and announced {response.length:,} more"
                raise urllib.error.URLError(f"the server sent {missing}")
            return data
    except (ValueError, http.client.HTTPException, OSError) as error:
        if handler.is_over:
            raise TimeoutError(f"{url!r:.200} was not read to its end within {DOWNLOAD_SECONDS} seconds") from error
        if isinstance(error, urllib.error.HTTPError) and (error.code in (404, 410) or 300 <= error.code < 400):
            raise UnreadableImageError(f"there is no file at this URL ({url}: {error})") from error
        if isinstance(error, (UnreadableImageError, urllib.error.URLError)):
            raise
        if isinstance(error, (ValueError, http.client.InvalidURL)):
            raise UnreadableImageError(f"it is no valid URL ({error})") from error
        raise urllib.error.URLError(f"no valid answer from {url!r:.200}: {error!r}") from error
    finally:
        timer.cancel()


def decode_image(image: Image.Image, bounds: ImageBounds) -> Image.Image:
    """Read the pixels (PIL opens files lazily) and turn them upright by the EXIF orientation."""
    if image.format in _REFUSED_FORMATS:
        raise UnreadableImageError(_REFUSED_FORMATS[image.format])
    bounds.check_pixels(*image.size)
    if image.format == "TIFF":  # its tiles may be larger than the image, and are decoded whole
        tile = [image.tag_v2.get(tag) for tag in _TIFF_TILE]
        if all(isinstance(side, int) for side in tile):
            bounds.check_pixels(*tile)
    with _unreadable("it is truncated or damaged"):
        image.load()
    if 0 in image.size:
        raise UnreadableImageError(f"it must have at least one pixel, and its size is {image.width} x {image.height}")
    # Unreadable EXIF data says nothing about the orientation; the pixels are fine.
    with contextlib.suppress(UnreadableImageError), _unreadable("its EXIF data is damaged"):
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # `exif_transpose` makes a copy
            return ImageOps.exif_transpose(image)
    return image


def pil_to_rgb(image: Image.Image) -> np.ndarray:
    """
    A decoded PIL image of any mode as `uint8` (3, H, W): transparent pixels composited on white, 16-bit grey scaled to
    8 bit. Mode `"I"` counts as 16 bit, since it is what 16-bit files open as. In strips: whole, a large image would be
    in memory several times.
    """
    if image.mode == "F":
        raise UnreadableImageError("a floating-point image (PIL mode 'F') has no defined range; give it as an array")
    planes = np.empty((3, image.height, image.width), np.uint8)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image if rows >= image.height else image.crop((0, top, image.width, min(top + rows, image.height)))
        if image.mode.startswith("I"):
            array = np.asarray(strip)
            if array.min() < 0 or array.max() > 65535:
                values = f"(0 to 65535), and it has {array.min()} to {array.max()}"
                raise UnreadableImageError(f"an integer image must hold 16-bit values {values}")
            planes[:, top : top + rows] = _from_16_bit(array)
        else:
            with _unreadable("it cannot be converted to RGB"):  # a palette or transparency that does not fit
                planes[:, top : top + rows] = np.moveaxis(np.asarray(_on_white(strip).convert("RGB")), -1, 0)
    return planes


def _on_white(image: Image.Image) -> Image.Image:
    has_key = image.mode in ("1", "L", "P", "RGB") and "transparency" in image.info
    if not has_key and not {"A", "a"} & set(image.getbands()):
        return image
    image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _from_16_bit(array: np.ndarray) -> np.ndarray:
    """0..65535 -> 0..255, rounded to nearest."""
    return ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def image_to_tensor(image, input_data_format=None, do_convert_rgb=True, do_rescale=True, do_normalize=True):
    """
    A PIL image of any mode, an array or a tensor as a tensor (C, H, W), RGB with `do_convert_rgb`: `uint8`, or floats
    without `do_rescale`, which must lie in [0, 1] with `do_normalize`.
    """
    if isinstance(image, Image.Image):
        image = decode_image(image, ImageBounds(max_pixels=None))
        input_data_format = "channels_first" if do_convert_rgb else "channels_last"
        image = pil_to_rgb(image) if do_convert_rgb else np.array(image)
    image = _as_tensor(image, input_data_format)
    if do_rescale:
        image = _to_8_bit(image)
    else:
        low, high = _value_range(image)
        if do_normalize and not (image.is_floating_point() and -_HALF_LEVEL <= low and high <= 1 + _HALF_LEVEL):
            values = f"floating-point with values in [0, 1], got {image.dtype} from {low:g} to {high:g}"
            raise ValueError(f"With `do_rescale=False` an image must be {values}. {_OF_DECODED}")
        image = image.clamp(0, 1) if do_normalize else image
    return (_to_rgb(image) if do_convert_rgb else image).contiguous()


def _as_tensor(image, input_data_format) -> torch.Tensor:
    """
    An array or tensor (H, W), (H, W, C) or (C, H, W) as a tensor (C, H, W): `uint8` of levels of 255, `uint16` (scaled
    from 16 bit) and booleans (0 and 255), or else `float32`. Without a format it is inferred: of two sides that may be
    the channels it is the one of 3, or else the first.
    """
    if isinstance(image, torch.Tensor):
        is_dense = image.layout == torch.strided and not (image.is_nested or image.is_quantized or image.is_meta)
        if not is_dense or image.is_complex():
            kind = f"{image.dtype}, {image.layout}, {image.device}"
            raise ValueError(f"An image tensor must be dense and of real numbers, got {kind}.")
        image = image.detach()
    elif np.ma.is_masked(image):
        raise ValueError("An image array must not have masked values; fill them first (`array.filled(...)`).")
    elif image.dtype.kind not in "buif":
        raise ValueError(f"An image array must hold real numbers, got dtype {image.dtype}.")
    shape = tuple(image.shape)
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"An image array must have 2 or 3 dimensions and at least one pixel, got shape {shape}.")
    if len(shape) == 2:
        image, input_data_format = image[None], "channels_first"
    is_last = input_data_format == "channels_last"
    if input_data_format is None:
        is_last = shape[0] not in (1, 3, 4) or (shape[2] == 3 and shape[0] != 3)
        if is_last and shape[2] not in (1, 3, 4):
            raise ValueError(
                f"An image array must have 1, 3 or 4 channels, the first or the last side, got shape {shape}."
            )
    elif input_data_format not in ("channels_first", "channels_last"):
        formats = "'channels_first', 'channels_last' or None"
        raise ValueError(f"`input_data_format` must be {formats}, got {input_data_format!r}.")
    if isinstance(image, torch.Tensor) and (image.is_floating_point() or image.dtype == torch.uint8):
        image = image if image.dtype == torch.uint8 else image.float()
    else:
        image = _from_array(image.cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image))
    return image.permute(2, 0, 1) if is_last else image


def _from_array(array: np.ndarray) -> torch.Tensor:
    if array.dtype.kind == "f":
        array = array.astype(np.float32, copy=False)
    elif array.dtype.kind == "b":
        array = array * np.uint8(255)
    elif array.dtype == np.uint16:
        array = _from_16_bit(array)
    elif array.dtype != np.uint8:
        if array.min() < 0 or array.max() > 255:
            values = f"{array.dtype} values from {array.min()} to {array.max()}"
            raise ValueError(f"An integer image array must hold values from 0 to 255 (uint16: 65535), got {values}.")
        array = array.astype(np.uint8)
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _value_range(image: torch.Tensor) -> tuple[float, float]:
    low, high = float(image.amin()), float(image.amax())  # `min` and `aminmax` are slow where channels come last
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError("The image array contains NaN or infinite values.")
    return low, high


def _to_8_bit(image: torch.Tensor) -> torch.Tensor:
    """
    An image (C, H, W) as levels of 255, `uint8`. Floating-point values must be such levels or lie in [0, 1]; between 1
    and 2 only whole numbers are levels, for decoded images end there.
    """
    if not image.is_floating_point():
        return image
    low, high = _value_range(image)
    scale = 255 if -_HALF_LEVEL <= low and high <= 1 + _HALF_LEVEL else 1
    below = 0.5 if high > MAX_RECONSTRUCTION else _HALF_LEVEL
    if low < -below or high > 255.5 or (scale == 1 and high <= 2 and bool((image != image.round()).any())):
        values = f"from 0 to 255, or from 0 to 1, got {low:g} to {high:g}"
        raise ValueError(f"A floating-point image must have values {values}. {_OF_DECODED}")
    return (image * scale).round_().clamp_(0, 255).to(torch.uint8)


def _to_rgb(image: torch.Tensor) -> torch.Tensor:
    """An image (C, H, W) of grey, RGB or RGBA (composited on white), `uint8` or in [0, 1], as (3, H, W)."""
    if len(image) not in (1, 3, 4):
        raise ValueError(f"An image array must have 1, 3 or 4 channels, got shape {tuple(image.shape)}.")
    if len(image) < 4:
        return image.expand(3, -1, -1)
    white = 255 if image.dtype == torch.uint8 else 1
    alpha = image[3:] / white
    composite = alpha * image[:3] + (1 - alpha) * white
    return composite.round().to(torch.uint8) if white == 255 else composite
