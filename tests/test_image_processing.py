"""Conversions, resize modes, errors and post-processing of the image processors."""

import base64
import functools
import http.server
import io
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipImageProcessorPil
from transformers.models.auto.image_processing_auto import (
    AutoImageProcessor,
)  # up to 5.17 the short path needs torchvision
from transformers.utils import is_torchvision_available

from transformers_dualtoken.configuration_dualtoken import DualTokenVisionTokenizerConfig
from transformers_dualtoken.image_processing_dualtoken import DualTokenImageProcessor
from transformers_dualtoken.image_processing_pil_dualtoken import DualTokenImageProcessorPil, _middle, plan_resize
from transformers_dualtoken.transformers_compat import is_older_than


@pytest.fixture
def processor():
    return DualTokenImageProcessorPil(size=4)


def pixels(processor, image, **kwargs) -> np.ndarray:
    """The processed image as (H, W, 3) levels of 0..255."""
    values = processor(image, return_tensors="pt", **kwargs).pixel_values
    assert values.dtype == torch.float32 and values.ndim == 4 and values.min() >= -1 and values.max() <= 1
    return ((values[0].permute(1, 2, 0) + 1) * 127.5).round().numpy().astype(int)


def flat(mode, color, size=(4, 4), **info):
    image = Image.new(mode, size, color)
    image.info.update(info)
    return image


def palette_image(**info):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 255, 255, 10, 20, 30])
    image.info.update(info)
    return image


def transparent_palette_image():
    image = flat("RGBA", (0, 0, 0, 0)).convert("PA")
    image.putalpha(0)  # Pillow before 12 makes it opaque
    return image


def sixteen_bit(value, dtype="<u2"):
    return Image.fromarray(np.full((4, 4), value, dtype=dtype))


@pytest.mark.parametrize(
    "image, expected",
    [
        (flat("RGB", (10, 20, 30)), (10, 20, 30)),
        (flat("L", 77), (77, 77, 77)),
        (flat("1", 1), (255, 255, 255)),
        (palette_image(), (10, 20, 30)),
        (palette_image(transparency=1), (255, 255, 255)),
        (flat("RGB", (10, 20, 30), transparency=(10, 20, 30)), (255, 255, 255)),
        (flat("LA", (100, 0)), (255, 255, 255)),
        (flat("LA", (100, 255)), (100, 100, 100)),
        (flat("RGBA", (10, 20, 30, 0)), (255, 255, 255)),
        (flat("RGBA", (0, 100, 255, 51)), (204, 224, 255)),
        (flat("RGBa", (0, 0, 0, 0)), (255, 255, 255)),
        (flat("La", (0, 0)), (255, 255, 255)),
        (flat("RGBA", (0, 0, 0, 255)).convert("PA"), (0, 0, 0)),
        (transparent_palette_image(), (255, 255, 255)),
        (flat("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
        (flat("YCbCr", (128, 128, 128)), (128, 128, 128)),
        (sixteen_bit(65535), (255, 255, 255)),
        (sixteen_bit(32768), (128, 128, 128)),
        (sixteen_bit(257), (1, 1, 1)),
        (sixteen_bit(32768, "<i4"), (128, 128, 128)),
    ],
)
def test_modes_become_rgb(processor, image, expected):
    result = pixels(processor, image)
    assert result.shape == (4, 4, 3)
    assert (result == expected).all(), result[0, 0]


@pytest.mark.parametrize(
    "array, expected",
    [
        (np.full((5, 6), 9, np.uint8), (9, 9, 9)),
        (np.full((5, 6, 1), 9, np.uint8), (9, 9, 9)),
        (np.full((3, 5, 6), 9, np.uint8), (9, 9, 9)),
        (np.full((5, 6, 3), 9, np.int64), (9, 9, 9)),
        (np.full((5, 6, 3), 9.0, np.float32), (9, 9, 9)),
        (np.full((5, 6), 32768, np.uint16), (128, 128, 128)),
        (np.full((5, 6), True), (255, 255, 255)),
        (np.dstack([np.zeros((5, 6, 3), np.uint8), np.full((5, 6), 51, np.uint8)]), (204, 204, 204)),
        (torch.full((3, 5, 6), 9, dtype=torch.uint8), (9, 9, 9)),
        (torch.full((5, 6, 3), 9.0, dtype=torch.bfloat16), (9, 9, 9)),
    ],
)
def test_arrays_become_rgb(processor, array, expected):
    assert (pixels(processor, array) == expected).all()


def test_rescaled_floats_keep_their_range(processor):
    image = np.full((3, 4, 4), 0.2, np.float32)
    result = processor(image, do_rescale=False, do_resize=False, return_tensors="pt").pixel_values
    torch.testing.assert_close(result, torch.full((1, 3, 4, 4), -0.6))


def test_floats_are_resized_as_floats(processor):
    image = np.zeros((3, 8, 8), np.float32)
    image[:, :, 4:] = 1
    result = processor(image, do_rescale=False, return_tensors="pt").pixel_values
    eight_bit = processor((image * 255).astype(np.uint8), return_tensors="pt").pixel_values
    assert result.min() >= -1 and result.max() <= 1
    torch.testing.assert_close(result, eight_bit, rtol=0, atol=2 / 255)
    assert torch.unique(result).numel() > 2


def test_batches(processor):
    images = [flat("RGB", (0, 0, 0), (5, 7)), flat("L", 255, (9, 3))]
    assert processor(images, return_tensors="pt").pixel_values.shape == (2, 3, 4, 4)
    assert processor(np.zeros((3, 8, 8, 3), np.uint8), return_tensors="pt").pixel_values.shape == (3, 3, 4, 4)
    assert processor(torch.zeros(3, 3, 8, 8), return_tensors="np").pixel_values.shape == (3, 3, 4, 4)


def test_exif_orientation(processor, tmp_path):
    image = Image.fromarray(np.array([[[255, 0, 0]] * 2, [[0, 0, 255]] * 2], np.uint8).repeat(2, 0).repeat(2, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the top row is shown at the right
    image.save(tmp_path / "turned.png", exif=exif)
    for source in (tmp_path / "turned.png", str(tmp_path / "turned.png"), Image.open(tmp_path / "turned.png")):
        result = pixels(processor, source)
        assert (result[:, 2:] == (255, 0, 0)).all() and (result[:, :2] == (0, 0, 255)).all()


def test_sources(processor, tmp_path):
    buffer = io.BytesIO()
    sixteen_bit(32768).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    (tmp_path / "image.png").write_bytes(buffer.getvalue())
    for source in (tmp_path / "image.png", data, f"data:image/png;base64,{data}"):
        assert (pixels(processor, source) == 128).all()


def test_urls(processor, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    flat("RGBA", (0, 100, 255, 51)).save(tmp_path / "image.png")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert (pixels(processor, f"{address}/image.png") == (204, 224, 255)).all()
        with pytest.raises(
            ValueError, match="The image '.*missing.png' cannot be used: there is no file at this URL .*404"
        ):
            processor(f"{address}/missing.png")
        server.shutdown()


NOISE = np.random.default_rng(0).integers(0, 256, (50, 31, 4), dtype=np.uint8)
RGB = Image.fromarray(NOISE[..., :3])


@pytest.mark.parametrize(
    "image",
    [
        *(RGB.convert(mode) for mode in ("RGB", "L", "1", "P", "CMYK", "YCbCr")),
        *(Image.fromarray(NOISE).convert(mode) for mode in ("RGBA", "LA")),
        *(NOISE[..., :3], NOISE[..., :3].transpose(2, 0, 1), NOISE[..., 0]),
        *(torch.from_numpy(NOISE[..., :3].copy()), torch.from_numpy(NOISE[..., :3].copy()).permute(2, 0, 1)),
    ],
    ids=lambda image: f"{type(image).__name__}-{image.mode if isinstance(image, Image.Image) else tuple(image.shape)}",
)
def test_squash_is_siglips(image):
    """To the bit. Of files that are transparent, 16 bit deep or turned by EXIF it is not: there SigLIP's is wrong."""
    ours = DualTokenImageProcessorPil(size=16)(image, return_tensors="pt").pixel_values
    if not isinstance(image, Image.Image) and image.ndim == 2:
        image = np.stack([image] * 3, -1)  # transformers 5.6 makes one channel of it
    if getattr(image, "mode", None) in ("RGBA", "LA") and is_older_than("5.17"):
        # It drops the transparency, and later versions composite on white, as here.
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    theirs = SiglipImageProcessorPil(size={"height": 16, "width": 16})(image, return_tensors="pt").pixel_values
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("resize_mode", ["squash", "center_crop", "pad"])
def test_floats_up_to_255_are_levels(kind, resize_mode):
    """An array as `float` is what it is as `uint8`, where resampling overshoots at edges, too."""
    processor = DualTokenImageProcessorPil(size=16, resize_mode=resize_mode)
    levels = np.where(NOISE[:9, :7, :3] > 127, 190, 60).astype(np.uint8)
    floats = torch.from_numpy(levels).to(kind) if isinstance(kind, torch.dtype) else levels.astype(kind)
    for settings in ({}, {"rescale_factor": 1 / 127.5, "do_normalize": False}):
        expected, result = (processor(each, **settings, return_tensors="pt").pixel_values for each in (levels, floats))
        assert torch.equal(result, expected)
    raw = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    expected, result = (processor(each, **raw).pixel_values.float() for each in (levels, floats))
    assert (result - expected).abs().max() < 1.5 and expected.max() > 200  # Pillow rounds twice


def stripes(width, height):
    """Red, green, blue from left to right (wide) or top to bottom (tall)."""
    array = np.zeros((height, width, 3), np.uint8)
    third = max(width, height) // 3
    for channel in range(3):
        cut = slice(channel * third, (channel + 1) * third)
        array[(slice(None), cut, channel) if width > height else (cut, slice(None), channel)] = 255
    return Image.fromarray(array)


@pytest.mark.parametrize("wide", [True, False])
def test_center_crop(processor, wide):
    image = stripes(12, 4) if wide else stripes(4, 12)
    assert (pixels(processor, image, resize_mode="center_crop") == (0, 255, 0)).all()
    # A very long image is cut before it is resized; its middle stays its middle.
    image = stripes(3000, 1) if wide else stripes(1, 3000)
    assert (pixels(processor, image, resize_mode="center_crop") == (0, 255, 0)).all()


@pytest.mark.parametrize("wide", [True, False])
def test_pad(processor, wide):
    image = flat("RGB", (1, 2, 3), (8, 4) if wide else (4, 8))
    result = pixels(processor, image, resize_mode="pad", fill_color=(9, 8, 7))
    result = result if wide else result.transpose(1, 0, 2)
    assert (result[[0, 3]] == (9, 8, 7)).all() and (result[[1, 2]] == (1, 2, 3)).all()


def test_pad_fills_grey_by_default_and_rescaled_images_alike(processor):
    image = flat("RGB", (0, 0, 0), (8, 4))
    expected = processor(image, resize_mode="pad", return_tensors="pt").pixel_values
    assert (pixels(processor, image, resize_mode="pad")[0] == 127).all()
    array = np.zeros((3, 4, 8), np.float32)
    rescaled = processor(array, resize_mode="pad", do_rescale=False, return_tensors="pt").pixel_values
    torch.testing.assert_close(rescaled, expected)


def test_geometry():
    """The part that is kept, and the size it is resized to; what is cut or padded lies on both sides alike."""
    assert plan_resize((100, 200), (50, 50), "squash") == ((100, 200), (50, 50))
    assert plan_resize((100, 201), (50, 50), "center_crop") == ((100, 201), (50, 100))
    assert plan_resize((100, 200), (51, 51), "pad") == ((100, 200), (26, 51))
    assert plan_resize((1, 10000), (50, 50), "pad") == ((1, 10000), (1, 50))
    assert plan_resize((1, 10000), (50, 50), "center_crop") == ((1, 4), (50, 200))
    columns, rows = np.arange(100)[None], np.arange(51)[:, None]
    assert _middle(columns, (1, 50))[0].tolist() == list(range(25, 75))
    assert _middle(rows, (26, 1))[:, 0].tolist() == list(range(12, 38))


def test_wrong_settings(processor):
    with pytest.raises(ValueError, match="`resize_mode` must be one of 'squash', 'center_crop', 'pad', got 'fit'"):
        DualTokenImageProcessorPil(resize_mode="fit")
    with pytest.raises(ValueError, match="`resize_mode` must be one of"):
        processor(flat("L", 0), resize_mode="fit")
    with pytest.raises(ValueError, match="`fill_color` must be one or three integers"):
        DualTokenImageProcessorPil(fill_color=(0, 0, 300))
    with pytest.raises(ValueError, match="`size` must be a number of pixels or give 'height' and 'width'"):
        DualTokenImageProcessorPil(size={"shortest_edge": 4})


def test_truncated_files(processor, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name in ("cut.jpg", "cut.png"):
        noise.save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        for source in (str(tmp_path / name), Image.open(tmp_path / name)):
            with pytest.raises(ValueError, match=f"{name}' cannot be used: it is truncated or damaged"):
                processor(source)


def test_wrong_images(processor, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="text.png' cannot be used: it is no image"):
        processor(str(tmp_path / "text.png"))
    with pytest.raises(
        ValueError, match="'missing.png' cannot be used: the file cannot be read .*No such.*looked for in"
    ):
        processor("missing.png")
    with pytest.raises(ValueError, match="No such file.*missing.png'"):
        processor(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="no defined range"):
        processor(Image.new("F", (4, 4)))
    with pytest.raises(ValueError, match="16-bit values .0 to 65535., and it has 0 to 70000"):
        processor(Image.fromarray(np.array([[0, 70000]], np.int32)))
    with pytest.raises(ValueError, match="values from 0 to 255 .* got int32 values from 300 to 300"):
        processor(np.full((4, 4, 3), 300, np.int32))
    with pytest.raises(ValueError, match="NaN or infinite"):
        processor(np.full((4, 4, 3), np.nan, np.float32))
    with pytest.raises(ValueError, match="at least one pixel"):
        processor(Image.new("RGB", (0, 4)))


def test_post_process_inverts_preprocess(processor):
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(3).reshape(16, 16, 3))
    values = processor([image, image], do_resize=False, return_tensors="pt").pixel_values
    for reconstruction in (values, values.numpy(), values.double()):
        images = processor.post_process_images(reconstruction)
        assert len(images) == 2 and images[0].mode == "RGB"
        assert (np.asarray(images[1]) == np.asarray(image)).all()
    assert len(processor.post_process_images(values[0].requires_grad_())) == 1
    overshoot = processor.post_process_images(torch.tensor([-1.3, 0.0, 1.3]).view(3, 1, 1))[0]
    assert overshoot.getpixel((0, 0)) == (0, 128, 255)
    assert len(processor.post_process_images(torch.zeros(2, 3, 4, 6, dtype=torch.bfloat16))) == 2


@pytest.mark.parametrize(
    "reconstruction, message",
    [
        (torch.zeros(4, 4), r"must have shape \(B, 3, height, width\) or \(3, height, width\), got \(4, 4\)"),
        (torch.zeros(1, 4, 4, 3), r"must have shape .* got \(1, 4, 4, 3\)"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "must be a floating-point tensor .* got torch.uint8"),
        (torch.full((3, 4, 4), 255.0), r"values in \[-1, 1\], got values from 255 to 255"),
        (torch.full((3, 4, 4), float("nan")), "NaN or infinite"),
        ([0.0], "must be a tensor or an array, got list"),
    ],
)
def test_post_process_errors(processor, reconstruction, message):
    with pytest.raises(ValueError, match=message):
        processor.post_process_images(reconstruction)


def test_save_and_load(tmp_path):
    AutoImageProcessor.register(
        DualTokenVisionTokenizerConfig,
        image_processor_classes={"pil": DualTokenImageProcessorPil, "torchvision": DualTokenImageProcessor},
        exist_ok=True,
    )
    processor = DualTokenImageProcessorPil(size=12, resize_mode="pad", fill_color=5)
    processor.save_pretrained(tmp_path)
    for loaded in (
        DualTokenImageProcessorPil.from_pretrained(tmp_path),
        AutoImageProcessor.from_pretrained(tmp_path, backend="pil"),
        AutoImageProcessor.from_pretrained(tmp_path),
    ):
        assert loaded.resize_mode == "pad" and tuple(loaded.fill_color) == (5, 5, 5)
        assert dict(loaded.size) == {"height": 12, "width": 12}
        assert isinstance(loaded, (DualTokenImageProcessorPil, DualTokenImageProcessor))
    assert dict(DualTokenImageProcessorPil().size) == {"height": 384, "width": 384}


@pytest.mark.skipif(is_torchvision_available(), reason="shows what happens without torchvision")
def test_torchvision_backend_names_what_is_missing():
    with pytest.raises(ImportError, match="Torchvision"):
        DualTokenImageProcessor()


@pytest.mark.extras
def test_backends_agree():
    """In a process of its own: where torchvision has no operators of its own, a stub has to come before its import."""
    code = """
import importlib.util, sys
if importlib.util.find_spec("torchvision") is None:
    sys.exit(77)
import torch
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    try:
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:
        pass
import numpy as np
from PIL import Image
from transformers_dualtoken.image_processing_dualtoken import DualTokenImageProcessor
from transformers_dualtoken.image_processing_pil_dualtoken import DualTokenImageProcessorPil
noise = np.random.default_rng(0).integers(0, 256, (40, 61, 4), dtype=np.uint8)
images = [Image.fromarray(noise), noise[..., :3], torch.from_numpy(noise), Image.fromarray(noise[..., 0]).convert("I;16")]
for mode in ("squash", "center_crop", "pad"):
    a, b = (c(size=24, resize_mode=mode)(images, return_tensors="pt").pixel_values
            for c in (DualTokenImageProcessor, DualTokenImageProcessorPil))
    assert a.shape == b.shape == (4, 3, 24, 24) and a.dtype == torch.float32
    assert (a - b).abs().max() < 3 / 255, (mode, (a - b).abs().max())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    if done.returncode == 77:
        pytest.skip("torchvision is not installed")
    assert done.returncode == 0, done.stderr


def test_postscript_is_refused(tmp_path):
    """Under any name: PIL would start Ghostscript on it."""
    Image.new("RGB", (24, 24)).save(tmp_path / "image.eps")
    (tmp_path / "image.eps").rename(tmp_path / "image.png")
    with pytest.raises(ValueError, match="image.png' cannot be used: it is PostScript"):
        DualTokenImageProcessorPil(size=24)(str(tmp_path / "image.png"), return_tensors="pt")
