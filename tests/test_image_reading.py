"""The one reader of images: what it takes, what it refuses and how it says so, at inference as in training."""

import base64
import contextlib
import io
import os
import re
import socket
import struct
import threading
import time
import tracemalloc
import urllib.error
import urllib.parse
import zlib
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, features
from training_helpers import build_tiny_processor, say
from transformers import SiglipImageProcessorPil

from transformers_dualtoken import DualTokenImageProcessorPil, image_reading
from transformers_dualtoken.data.formats import convert_messages
from transformers_dualtoken.image_reading import (
    IMAGE_SOURCES,
    ImageBounds,
    UnreadableImageError,
    _read_bounded,
    flatten_images,
    locate_image,
    read_image,
)
from transformers_dualtoken.training import ChatEncoder


def encoded(image, format="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
PIXELS = np.asarray(PICTURE)
PNG = encoded(PICTURE)
BASE64 = base64.b64encode(PNG).decode()
NAME = "a b%c#ü.png"


def png(width, height) -> bytes:
    """A black and white PNG of any size in few bytes."""
    compress = zlib.compressobj(9)
    rows = b"".join(compress.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)) + compress.flush()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


@pytest.fixture(scope="module")
def processor():
    return build_tiny_processor()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (NAME, "a.png", "a.txt"):
        (tmp_path / name).write_bytes(PNG)
    return tmp_path


@pytest.fixture
def serve(monkeypatch):
    """Starts a server on the loopback that answers every request with `answer(handler)`; gives its address."""
    monkeypatch.setenv("no_proxy", "*")
    with contextlib.ExitStack() as stack:

        def start(answer) -> str:
            class Handler(BaseHTTPRequestHandler):
                def do_GET(self):
                    with contextlib.suppress(ConnectionError):
                        answer(self)

                def log_message(self, *arguments):
                    pass

            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}"

        yield start


def send(handler, data, status=200, **head):
    handler.send_response(status)
    for name, value in head.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def sources(folder) -> dict:
    buffer = io.BytesIO()
    PICTURE.save(buffer, "PNG")  # stands at its end
    tensor = torch.from_numpy(PIXELS.copy())
    url = f"file://{urllib.parse.quote(str(folder / NAME))}"
    return {
        "bytes": PNG,
        "bytearray": bytearray(PNG),
        "buffer": buffer,
        "file object": open(folder / NAME, "rb"),
        "dict of bytes": {"bytes": PNG, "path": None},
        "dict of bytes with a name": {"bytes": PNG, "path": "elsewhere.png"},
        "dict of a path": {"bytes": None, "path": NAME},
        "dict of base64": {"base64": BASE64},
        "dict of a URL": {"url": url},
        "path": NAME,
        "pathlib": folder / NAME,
        "file URL": url,
        "file URL of localhost": url.replace("file://", "FILE://localhost"),
        "file URL without escapes": f"file://{folder}/{NAME}",
        "relative file URL": "file:a.png",
        "data URL": f"data:image/png;base64,{BASE64}",
        "data URL in lines": "data:;BASE64," + base64.encodebytes(PNG).decode(),
        "data URL with escapes": "data:image/png," + urllib.parse.quote_from_bytes(PNG),
        "base64": BASE64,
        "wrong ending": "a.txt",
        "PIL": PICTURE,
        "lazy PIL": Image.open(folder / NAME),
        "array": PIXELS,
        "channels first": PIXELS.transpose(2, 0, 1),
        "int64": PIXELS.astype(np.int64),
        "floats of 255": PIXELS.astype(np.float32),
        "floats of 1": PIXELS / 255,
        "tensor": tensor,
        "float tensor": tensor.permute(2, 0, 1) / 255,
        "bfloat16": tensor.bfloat16(),
        "16 bit": PIXELS.astype(np.uint16) * 257,
    }


def test_one_message_works_in_training_and_at_inference(processor, folder, serve):
    def answer(handler):
        send(handler, PNG, Content_Length=len(PNG))

    encoder = ChatEncoder(processor, prompt_drop_probability=0)
    expected = processor.image_processor(PICTURE, return_tensors="pt").pixel_values
    for name, value in {**sources(folder), "URL": f"{serve(answer)}/ä b.png?c=d e"}.items():
        messages = [say("user", "What?"), say("assistant", {"type": "image", "image": value})]
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], expected), name
        for example in ({"messages": messages}, convert_messages({"messages": messages}, None)):
            sample = encoder.sample(encoder.encode(example), "")
            assert torch.equal(sample["pixel_values"], expected), name
        assert np.array_equal(np.asarray(read_image(value)), PIXELS), name


@pytest.mark.parametrize(
    "part", [{"path": NAME}, {"url": NAME}, {"base64": BASE64}, {"bytes": PNG, "path": "gone.png"}]
)
def test_keys_of_a_part(processor, folder, part):
    messages = [say("user", "What?"), say("assistant", {"type": "image", **part})]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    expected = processor.image_processor(PICTURE, return_tensors="pt").pixel_values
    encoder = ChatEncoder(processor, prompt_drop_probability=0)
    sample = encoder.sample(encoder.encode(convert_messages({"messages": messages}, None)), "")
    assert torch.equal(inputs["pixel_values"], expected) and torch.equal(sample["pixel_values"], expected)


def test_a_part_holds_one_image(processor):
    for value in ([PICTURE, PICTURE], np.stack([PIXELS, PIXELS]), []):
        with pytest.raises(ValueError, match="must hold one image"):
            processor.apply_chat_template([say("user", {"type": "image", "image": value})], tokenize=True)
    expected = processor.image_processor(PICTURE, return_tensors="pt").pixel_values
    encoder = ChatEncoder(processor, prompt_drop_probability=0)
    for value in ([PICTURE], PIXELS[None], [{"bytes": PNG}]):
        messages = [say("user", "What?"), say("assistant", {"type": "image", "image": value})]
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], expected)
        for example in ({"messages": messages}, convert_messages({"messages": messages}, None)):
            assert torch.equal(encoder.sample(encoder.encode(example), "")["pixel_values"], expected)


REFUSED = {
    "missing": ("photos/cats.png", "'photos/cats.png' cannot be used: the file cannot be read .*looked for in"),
    "missing and like base64": ("photos/cats1", "No such file"),
    "folder": ("/", "a folder or a device and no file"),
    "device": ("/dev/zero", "a folder or a device and no file"),
    "empty path": ("", "the path of an image is empty"),
    "null": ("a\0b", "embedded null byte"),
    "half a character": ("\ud800", "surrogates not allowed"),
    "no bytes": (b"", "the file is empty"),
    "nothing": (None, "the entry holds no image"),
    "empty dict": ({}, "it has no keys, none of image, bytes"),
    "other dict": ({"data": PNG}, "it has 'data', none of image, bytes"),
    "text as bytes": ({"bytes": "abc"}, "must be bytes, got str"),
    "number": (3, "a PIL image, an array or a tensor, got int"),
    "text file": (io.StringIO("a"), "must be open for bytes"),
    "data URL without a comma": ("data:image/png", "needs a comma"),
    "data URL that is no base64": ("data:image/png;base64,%%%", "base64 text of an image cannot be decoded"),
    "no host": ("http:///a.png", "no valid URL .it names no host"),
    "no port": ("http://a:b/", "no valid URL .nonnumeric port"),
    "file of another host": ("file://a.png", "must be of this machine .* names the host 'a.png'"),
    "other scheme": ("ftp://a/b.png", "from the source 'fsspec' are not read here; allowed are data, local, url"),
    "bomb": (png(20_000, 20_000), "too many pixels .*400000000"),
    "large": (png(13_000, 13_000), "too many pixels: 13000 x 13000, where 67,108,864 can be decoded"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "it is no image"),
    "PDF": (encoded(PICTURE, "PDF"), "it is no image"),
    "PostScript": (encoded(PICTURE, "EPS"), "PostScript, a program and no image"),
    "stub": (b"\x89HDF\r\n\x1a\n" + bytes(50), "cannot find loader"),
    "cut": (PNG[:200], "truncated"),
}


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_image_is_one_sentence(kind):
    value, message = REFUSED[kind]
    with pytest.raises((UnreadableImageError, TypeError), match=message):
        DualTokenImageProcessorPil(size=8)(value)


def wrapped(format: str, data: bytes) -> bytes:
    """A file of a format that says it is of 16 x 16 pixels and holds another file."""
    if format == "ICO":
        return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 24, len(data), 22) + data
    if format == "ICNS":
        return b"icns" + struct.pack(">I4sI", 16 + len(data), b"icp4", 8 + len(data)) + data
    if format == "BLP":  # a palette, since only its header is read
        return b"BLP1" + struct.pack("<iIIIii", 1, 0, 16, 16, 4, 4) + bytes(2000)
    side = struct.pack(">H", 16)
    fields = [(3, 20, side), (3, 30, side), (3, 60, b"\1\0"), (3, 65, b"\0"), (3, 120, b"\5"), (8, 10, data)]
    return b"".join(struct.pack(">BBBH", 28, *tag, len(value)) + value for *tag, value in fields)


@pytest.mark.parametrize(
    ("format", "opened"),  # PIL decodes an ICO on opening
    [("ICO", False)] + [(format, opened) for format in ("ICNS", "IPTC", "BLP") for opened in (False, True)],
)
def test_files_within_files_are_not_decoded(monkeypatch, format, opened):
    loaded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", loaded.append)
    data = wrapped(format, png(64, 64))
    with pytest.raises(UnreadableImageError, match=f"of the format {format}, which holds pictures of any size"):
        DualTokenImageProcessorPil(size=8)(Image.open(io.BytesIO(data)) if opened else data)
    assert not loaded


def test_the_tiles_of_a_tiff_are_bounded():
    processor = DualTokenImageProcessorPil(size=8, max_image_pixels=600)
    for side, is_read in ((16, True), (32, False)):
        # One tile, uncompressed, of a grey image of 4 x 4 pixels.
        tags = [(256, 4), (257, 4), (258, 8), (259, 1), (262, 1), (277, 1), (322, side), (323, side), (324, 8)]
        tags += [(325, side * side)]
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
        data = b"II*\0" + struct.pack("<I", 8 + side * side) + bytes(side * side)
        data += struct.pack("<H", len(tags)) + entries + bytes(4)
        assert Image.open(io.BytesIO(data)).size == (4, 4)
        if is_read:
            assert processor(data)["pixel_values"]
        else:
            with pytest.raises(UnreadableImageError, match="too many pixels: 32 x 32, where 600"):
                processor(data)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_damaged_avif_is_named(tmp_path):
    data = bytearray(encoded(PICTURE, "AVIF"))
    data[-200:] = bytes(200)
    (tmp_path / "a.avif").write_bytes(data[:-100])
    with pytest.raises(UnreadableImageError, match="a.avif' cannot be used"):
        DualTokenImageProcessorPil(size=8)(tmp_path / "a.avif")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnreadableImageError, match="a folder or a device"):
        DualTokenImageProcessorPil(size=8)(tmp_path / "pipe")


def test_bounds_can_be_set_and_lifted(folder, tmp_path):
    (tmp_path / "large.png").write_bytes(png(9_000, 9_000))
    processor = DualTokenImageProcessorPil(size=8)
    for value in ("large.png", Image.open("large.png")):
        with pytest.raises(UnreadableImageError, match="large.png' cannot be used: it has too many pixels"):
            processor(value)
    strict = DualTokenImageProcessorPil(size=8, image_sources=["data"], max_image_pixels=600)
    strict.save_pretrained(tmp_path)
    strict = DualTokenImageProcessorPil.from_pretrained(tmp_path)
    assert strict(PNG)["pixel_values"] and strict("a.png", image_sources=["local"])["pixel_values"]
    for value in ("a.png", "gone.png", "file:///etc/hostname", {"path": "a.png"}, folder / "a.png"):
        with pytest.raises(UnreadableImageError, match="source 'local' are not read here; allowed are data"):
            strict(value)
    with pytest.raises(UnreadableImageError, match="source 'url' are not read here"):
        strict("https://127.0.0.1/a.png")
    with pytest.raises(UnreadableImageError, match="30 x 21, where 600"):
        strict(png(30, 21))
    for max_pixels in (None, 2**27):
        assert strict(png(30, 21), max_image_pixels=max_pixels)["pixel_values"]
    assert DualTokenImageProcessorPil(max_image_pixels=None).max_image_pixels is None
    for name, value in (("image_sources", ["web"]), ("max_image_pixels", 0), ("max_image_bytes", -1)):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            DualTokenImageProcessorPil(**{name: value})


def test_bounds_reach_a_chat(processor, folder):
    messages = [say("user", {"type": "image_url", "image_url": {"url": str(folder / "a.png")}})]
    processor.apply_chat_template(messages, tokenize=True)
    with pytest.raises(UnreadableImageError, match="source 'local' are not read here"):
        processor.apply_chat_template(messages, tokenize=True, image_sources=["data", "url"])
    with pytest.raises(UnreadableImageError, match="too many pixels"):
        processor.apply_chat_template(messages, tokenize=True, max_image_pixels=10)
    with pytest.raises(UnreadableImageError, match="source 'local' are not read here"):
        processor(images=str(folder / "a.png"), image_sources=["data"])
    # One source needs no list; its name is not taken apart either.
    for call in (processor.apply_chat_template, partial(processor.apply_chat_template, tokenize=True)):
        assert call([say("user", {"type": "image", "image": PNG})], image_sources="data")
    with pytest.raises(UnreadableImageError, match="source 'local' are not read here; allowed are data"):
        processor.apply_chat_template(messages, tokenize=True, image_sources="data")
    with pytest.raises(ValueError, match="`image_sources` must be one or a list of data, .* got 'dat'"):
        processor(images=PNG, image_sources="dat")
    own = build_tiny_processor()
    own.image_processor.image_sources = ("data",)
    own.save_pretrained(folder / "saved")
    loaded = type(own).from_pretrained(folder / "saved")
    with pytest.raises(UnreadableImageError, match="source 'local' are not read here"):
        loaded.apply_chat_template(messages, tokenize=True)
    with pytest.raises(ValueError, match="Give `text`, `images` or both"):
        processor(images=[])


def test_downloads_end_at_their_limit(serve):
    sent = []

    def endless(handler):
        send(handler, b"")
        while sum(sent) < 2**24:  # without a limit it ends all the same
            handler.wfile.write(bytes(2**16))
            sent.append(2**16)

    processor = DualTokenImageProcessorPil(size=8, max_image_bytes=2**20)
    with pytest.raises(UnreadableImageError, match="too large: more than 1,048,576 bytes"):
        processor(f"{serve(endless)}/a.png")
    assert sum(sent) < 2**24  # what the sockets buffer
    announced = serve(lambda handler: send(handler, b"", Content_Length=10**12))
    with pytest.raises(UnreadableImageError, match="too large: 1,000,000,000,000 bytes"):
        processor(f"{announced}/a.png")
    assert processor(f"{serve(lambda handler: send(handler, PNG))}/a.png", max_image_bytes=None)["pixel_values"]


def test_no_memory_is_taken_for_bytes_that_only_are_allowed_or_announced(serve, folder):
    def unannounced(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(PNG)

    (folder / "a.png").write_bytes(PNG)
    allowed = ImageBounds(sources=IMAGE_SOURCES, max_bytes=2**70)
    for url in (f"{serve(unannounced)}/a.png", f"local://{folder}/a.png"):
        assert np.array_equal(np.asarray(read_image(url, bounds=allowed)), PIXELS)
    announced = serve(lambda handler: send(handler, PNG, Content_Length=10**14))
    for max_bytes in (None, 10**15):
        with pytest.raises(urllib.error.URLError, match="sent 1,888 bytes and announced 99,999,999,998,112 more"):
            read_image(f"{announced}/a.png", bounds=ImageBounds(max_bytes=max_bytes))


def test_files_that_give_fewer_bytes_than_asked_for_are_read_to_their_end():
    class Slow(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, 7))

    assert _read_bounded(Slow(PNG), len(PNG)) == PNG
    with pytest.raises(UnreadableImageError, match="more than 1,887 bytes"):
        _read_bounded(Slow(PNG), len(PNG) - 1)


def test_layouts_and_channels_that_do_not_fit_are_refused():
    processor = DualTokenImageProcessorPil(size=8)
    with pytest.raises(ValueError, match="`input_data_format` must be 'channels_first', .* got 'channel_last'"):
        processor(np.zeros((4, 5, 3), np.uint8), input_data_format="channel_last")
    with pytest.raises(ValueError, match=r"the first or the last side, got shape \(9, 8, 5\)"):
        processor(np.zeros((9, 8, 5), np.uint8), do_convert_rgb=False, do_normalize=False)
    for channels, settings, message in (
        (1, {}, r"the channels that `image_mean` has \(3\), got 1"),
        (4, {"do_normalize": False, "resize_mode": "pad"}, "padded needs 1 or 3 channels, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(np.zeros((5, 6, channels), np.uint8), do_convert_rgb=False, **settings)
    grey = processor(np.zeros((5, 6), np.uint8), do_convert_rgb=False, image_mean=[0.5], image_std=[0.5])
    assert grey["pixel_values"][0].shape == (1, 8, 8)


@pytest.mark.parametrize("name", ["d41d8cd98f00b204e9800998ecf8427e", "images/" + 57 * "a", "a/b/" + 60 * "Z"])
def test_names_without_an_ending_are_no_base64(folder, name):
    assert locate_image(name) == name
    assert locate_image(name, "https://a.b/c") == f"https://a.b/c/{name}"
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PNG)
    assert np.array_equal(np.asarray(read_image(locate_image(name, str(folder)))), PIXELS)


def test_base64_of_every_format_is_known():
    small = Image.new("RGB", (1, 1))
    formats = ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000"]
    for data in [encoded(small, name) for name in formats + ["AVIF"] * features.check("avif")]:
        assert locate_image(base64.b64encode(data).decode()) == {"bytes": data, "path": None}
    no_image = b"<svg/>" * 1000  # longer than any path
    assert locate_image(base64.b64encode(no_image).decode()) == {"bytes": no_image, "path": None}


def test_file_urls_are_joined_to_no_folder():
    for url in ("file:///a/b%20c.png", "file:/a/b%20c.png", "FILE://LOCALHOST/a/b%20c.png"):
        for folder in (None, "https://a.b/c", "/d"):
            assert locate_image(url, folder) == "/a/b c.png"
    with pytest.raises(UnreadableImageError, match="names the host 'server'"):
        locate_image("file://server/a.png", "/d")


def test_servers_that_lie_or_lead_astray(serve):
    processor = DualTokenImageProcessorPil(size=8)
    answers = {
        "sent 1,888 bytes and announced 50 more": lambda h: send(h, PNG, Content_Length=len(PNG) + 50),
        "it is truncated": lambda h: send(h, PNG, Content_Length=len(PNG) - 50),
        "infinite loop": lambda h: send(h, b"", 302, Location="/again"),
        "'file:///etc/hostname' is not allowed": lambda h: send(h, b"", 302, Location="file:///etc/hostname"),
        "kind 'ftp', which is not followed": lambda h: send(h, b"", 302, Location="ftp://127.0.0.1/a"),
        "BadStatusLine": lambda h: h.wfile.write(b"\0nonsense\r\n"),
        "403": lambda h: send(h, b"", 403),
    }
    assert len(PNG) == 1888
    for message, answer in answers.items():
        with pytest.raises(UnreadableImageError, match=f"/a.png' cannot be used: .*{message}"):
            processor(f"{serve(answer)}/a.png")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(UnreadableImageError, match="cannot be used: .*refused"):
            processor(f"http://127.0.0.1:{unused.getsockname()[1]}/a.png")


@pytest.mark.parametrize("where", ["head", "body", "connecting"])
def test_a_download_has_one_time_limit(serve, monkeypatch, where):
    monkeypatch.setattr(image_reading, "DOWNLOAD_SECONDS", 0.5)
    if where == "connecting":  # a slow name server: when the time is over there is no socket yet
        getaddrinfo = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: time.sleep(0.6) or getaddrinfo(*a, **k))

    def trickle(handler):
        if where == "head":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        else:
            send(handler, b"")
        for _ in range(100):  # each read ends well before the limit
            handler.wfile.write(b"X")
            time.sleep(0.05)

    start = time.monotonic()
    with pytest.raises(UnreadableImageError, match="not read to its end within 0.5 seconds"):
        DualTokenImageProcessorPil(size=8)(f"{serve(trickle)}/a.png")
    assert time.monotonic() - start < 3


def test_floats_are_levels_or_fractions():
    processor = DualTokenImageProcessorPil(size=8)
    expected = processor(PICTURE, return_tensors="pt").pixel_values
    noise = np.random.default_rng(0).uniform(-0.4, 0.4, PIXELS.shape)
    for array in (PIXELS + noise, PIXELS / 255 + noise / 255, PIXELS.astype(np.float16), PIXELS / 255.0):
        for image in (array, torch.from_numpy(array)):
            assert torch.equal(processor(image, return_tensors="pt").pixel_values, expected)
    rgba = np.dstack([PIXELS, np.full((20, 30), 255)])
    assert torch.equal(processor(rgba / 255, return_tensors="pt").pixel_values, expected)
    # What `decode_images` returns is neither; nor is one that leaves [0, 1] a little.
    for array in (PIXELS / 127.5 - 1, PIXELS / 255 * 1.2, PIXELS * 200.0, PIXELS - 1.0):
        for image in (array, torch.from_numpy(array)):
            with pytest.raises(ValueError, match="from 0 to 255, or from 0 to 1, got .*`post_process_images`"):
                processor(image)
    for array in (PIXELS / 127.5 - 1, PIXELS, PIXELS.astype(float)):
        with pytest.raises(ValueError, match="With `do_rescale=False` an image must"):
            processor(array, do_rescale=False)
    assert processor(PIXELS / 127.5 - 1, do_rescale=False, do_normalize=False)["pixel_values"]


def test_arrays_that_are_no_images():
    processor = DualTokenImageProcessorPil(size=8)
    masked = np.ma.array(PIXELS, mask=PIXELS > 9)
    for array, message in [
        (masked, "must not have masked values"),
        (PIXELS.astype(object), "must hold real numbers, got dtype object"),
        (PIXELS + 0j, "must hold real numbers, got dtype complex128"),
        (torch.zeros(3, 4, 4, device="meta"), "must be dense and of real numbers"),
        (torch.zeros(3, 4, 4).to_sparse(), "must be dense and of real numbers"),
        (np.zeros(5), r"2 or 3 dimensions .*, got shape \(5,\)"),
        (np.zeros((2, 9, 9)), "1, 3 or 4 channels"),
        (np.zeros((0, 9, 3)), "at least one pixel"),
        ([], "at least one image"),
        (np.zeros((0, 9, 9, 3)), "at least one image"),
    ]:
        with pytest.raises(ValueError, match=message):
            processor(array)
    assert processor(masked.filled(0))["pixel_values"] and processor(np.ma.array(PIXELS))["pixel_values"]


def test_batches_and_lists_are_flattened_by_their_own_shapes():
    batch = np.stack([PIXELS, PIXELS])
    assert [np.shape(image) for image in flatten_images([batch, [PICTURE, PIXELS], PIXELS])] == 5 * [(20, 30, 3)]
    out = DualTokenImageProcessorPil(size=8)([batch, PICTURE], return_tensors="pt").pixel_values
    assert out.shape == (3, 3, 8, 8) and torch.equal(out[0], out[2])


def test_three_channels_are_preferred_where_two_sides_may_be_them():
    processor = DualTokenImageProcessorPil(size=8)
    for shape in ((1, 9, 3), (4, 9, 3)):
        array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        last = processor(array, input_data_format="channels_last")["pixel_values"]
        assert np.array_equal(processor(array)["pixel_values"], last)
    column = np.arange(27, dtype=np.uint8).reshape(9, 3)  # grey, of three columns
    assert np.array_equal(
        processor(column)["pixel_values"], processor(column[None], input_data_format="channels_first")["pixel_values"]
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "whole numbers from 1 on, got .*0"),
        ({"size": -1}, "whole numbers from 1 on"),
        ({"size": []}, "whole numbers from 1 on"),
        ({"size": {"height": "8", "width": 8}}, "whole numbers from 1 on"),
        ({"size": 10**6}, "at most 67,108,864 pixels"),
        ({"image_std": [0, 0, 0]}, "`image_std` must be one number or three positive numbers"),
        ({"image_std": [float("nan")] * 3}, "`image_std`"),
        ({"image_mean": [float("nan")] * 3}, "`image_mean`"),
        ({"image_mean": [0.5, 0.5]}, "`image_mean`"),
        ({"image_mean": "grey"}, "`image_mean`"),
        ({"rescale_factor": 0}, "`rescale_factor`"),
        ({"resample": "bicubic"}, "`resample` must be one of"),
        ({"do_resize": "False"}, "`do_resize` must be True or False"),
        ({"do_center_crop": True}, "use `resize_mode='center_crop'`"),
        ({"fill_color": 0.5}, "`fill_color`"),
        ({"fill_color": None, "resize_mode": []}, "`resize_mode`"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        DualTokenImageProcessorPil(**settings)


def damaged(data: bytes, rng) -> bytes:
    array = np.frombuffer(data, np.uint8).copy()
    kind = rng.integers(4)
    if kind == 0:
        places = rng.integers(0, len(array), 5)
        array[places] ^= (1 << rng.integers(0, 8, 5)).astype(np.uint8)
    elif kind == 1:
        array[rng.integers(0, min(len(array), 120), 4)] = rng.integers(0, 256, 4)
    elif kind == 2:
        array = array[: rng.integers(len(array))]
    else:
        start = rng.integers(len(array))
        array[start : start + 40] = rng.choice([0, 255])
    return array.tobytes()


def outcome(processor, value, **settings):
    """The pixel values, or `None` where the reader says in its own words what is wrong."""
    own = "^(The image |An? |With |There must be )"
    try:
        pixel_values = processor(value, return_tensors="pt", **settings).pixel_values
    except (ValueError, TypeError) as error:
        assert re.search(own, str(error)), repr(error)
        return None
    assert pixel_values.dtype == torch.float32 and torch.isfinite(pixel_values).all()
    assert -1 <= pixel_values.min() and pixel_values.max() <= 1
    return pixel_values


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_right_or_named_and_training_agrees():
    rng = np.random.default_rng(0)
    processor = DualTokenImageProcessorPil(size=8)
    picture = PICTURE.resize((60, 40))
    files = [encoded(picture, name) for name in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "PPM")]
    files += [encoded(picture.convert(mode), "PNG") for mode in ("P", "LA", "RGBA", "1")]
    files += [encoded(picture.convert("I").convert("I;16"), "PNG")]  # in two steps: Pillow 10 knows no other way
    files += [encoded(picture.convert("CMYK"), "JPEG"), encoded(picture, "WEBP", lossless=True)]
    files += [encoded(picture, "AVIF")] if features.check("avif") else []
    seen = {True: 0, False: 0}
    for number in range(20 * len(files)):
        data = damaged(files[number % len(files)], rng)
        pixel_values = outcome(processor, data)
        seen[pixel_values is not None] += 1
        try:
            image = read_image({"bytes": data, "path": None})
        except UnreadableImageError:
            assert pixel_values is None
        else:
            assert torch.equal(processor(image, return_tensors="pt").pixel_values, pixel_values)
    assert min(seen.values()) > 50


def test_images_of_all_modes_are_right_or_named():
    rng = np.random.default_rng(0)
    ours, siglips = DualTokenImageProcessorPil(size=8), SiglipImageProcessorPil(size={"height": 8, "width": 8})
    modes = "1 L P RGB RGBA CMYK YCbCr LAB HSV I F LA PA RGBX RGBa La I;16 I;16B".split()
    for number in range(10 * len(modes)):
        image = Image.new(modes[number % len(modes)], tuple(rng.integers(1, 40, 2).tolist()))
        image.frombytes(rng.bytes(len(image.tobytes())))
        if image.mode in ("P", "PA"):
            image.putpalette(rng.integers(0, 256, 768).tolist())
        is_odd = number % 3 == 0
        if is_odd:
            image.info["transparency"] = [3, b"\0\1\xff", (1, 2, 3), "x", None, -1, 10**9][rng.integers(7)]
            image.info["exif"] = rng.bytes(30)
        pixel_values = outcome(ours, image)
        if not is_odd and image.mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr"):
            assert torch.equal(pixel_values, siglips(image, return_tensors="pt").pixel_values), image.mode


def test_arrays_of_all_kinds_are_right_or_named():
    rng = np.random.default_rng(0)
    processor = DualTokenImageProcessorPil(size=8)
    kinds = [bool, "u1", "i1", "i2", "u2", "i8", "u8", "f2", "f4", "f8", ">f4", "c8", "O", "U3", "M8[s]"]
    kinds += [torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float64]
    ranges = [(0, 1), (-1, 1), (0, 255), (0, 256), (-5, 300), (0, 65535), (-1e30, 1e30), (0, 1.05), (0.2, 1.4), (0, 2)]
    seen = {True: 0, False: 0}
    for number in range(600):
        shape = rng.choice([0, 1, 2, 3, 4, 9, 17], rng.integers(0, 6), p=[0.04, 0.1, 0.06, 0.4, 0.1, 0.15, 0.15])
        values = rng.uniform(*ranges[rng.integers(len(ranges))], shape)
        if number % 9 == 0 and values.size:
            values = np.where(rng.random(values.shape) < 0.1, [np.nan, np.inf, -np.inf][rng.integers(3)], values)
        kind = kinds[number % len(kinds)]
        with np.errstate(all="ignore"):
            array = np.asarray(values)
            image = torch.from_numpy(array).to(kind) if isinstance(kind, torch.dtype) else array.astype(kind)
        seen[outcome(processor, image, do_rescale=number % 5 != 0) is not None] += 1
    assert min(seen.values()) > 50


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK", "I;16", "I"])
def test_large_images_are_converted_in_strips(monkeypatch, mode):
    """The array that is returned, and little beside it."""
    levels = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)
    image = Image.fromarray(levels)
    # In two steps: Pillow 10 knows no other way.
    image = image.convert("I").convert(mode) if mode.startswith("I") else image.convert(mode)
    processor = DualTokenImageProcessorPil(size=8)
    expected, read = processor(image, return_tensors="pt").pixel_values, read_image(image)
    monkeypatch.setattr(image_reading, "_STRIP_PIXELS", 2**14)
    image.load()
    tracemalloc.start()
    try:
        settings = {"do_convert_rgb": True, "do_rescale": True, "rescale_factor": 1 / 255}
        array = processor.process_image(image, **settings)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.1 * array.nbytes == 1.1 * 3_000_000
    assert np.array_equal(np.moveaxis(array, 0, -1), np.asarray(read))
    assert np.array_equal(np.asarray(read_image(image)), np.asarray(read))
    assert torch.equal(processor(image, return_tensors="pt").pixel_values, expected)


def test_fsspec_goes_round_no_bounds(folder, serve, monkeypatch):
    processor = DualTokenImageProcessorPil(size=8, image_sources=["data", "fsspec"])
    url = serve(lambda handler: send(handler, PNG))
    for value, source in [
        (f"local://{folder}/a.png", "local"),
        (f"simplecache::file://{folder}/a.png", "local"),
        (f"zip://a.png::{folder}/a.zip", "local"),
        (f"dir::local://{folder}/a.png", "local"),
        ("reference://a.png::memory://refs.json", "local"),
        (f"simplecache::{url}/a.png", "url"),
    ]:
        with pytest.raises(UnreadableImageError, match=f"source '{source}' are not read here"):
            processor(value)
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/a.png", PNG)
    for value in ("memory://a.png", "simplecache::memory://a.png"):
        assert processor(value, max_image_bytes=len(PNG))["pixel_values"]
        with pytest.raises(UnreadableImageError, match=f"too large: more than {len(PNG) - 1:,} bytes"):
            processor(value, max_image_bytes=len(PNG) - 1)
        assert processor(value, max_image_bytes=None)["pixel_values"]
    with pytest.raises(UnreadableImageError, match="no file at this URL"):
        read_image("memory://gone.png")
    # Of http fsspec says that nothing is there whatever the fault is.
    monkeypatch.setattr(fsspec, "url_to_fs", lambda url: (memory, "/gone.png"))
    with pytest.raises(urllib.error.URLError, match="no file, or no answer, from 'simplecache::http://a/b.png'"):
        read_image("simplecache::http://a/b.png")


def test_training_reads_from_everywhere(tmp_path):
    """What `fsspec` knows is read in training, and at inference where it is allowed."""
    (tmp_path / "a.png").write_bytes(PNG)
    url = f"simplecache::local://{tmp_path}/a.png"
    assert np.array_equal(np.asarray(read_image(url)), PIXELS)
    processor = DualTokenImageProcessorPil(size=8)
    assert processor(url, image_sources=IMAGE_SOURCES)["pixel_values"]
    with pytest.raises(UnreadableImageError, match="source 'fsspec' are not read here"):
        processor(url)
    assert ImageBounds().sources == ("data", "local", "url")
