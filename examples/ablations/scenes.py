"""
Handwritten digits over photographs: real images that cost both branches of a tokenizer something, and no download.

    python examples/ablations/scenes.py --output_dir ablations

A scene is a scan of scikit-learn's digits, blended in a random colour over a crop of a photograph that comes with
scikit-image or scikit-learn. To name the digit little of a scene matters; to reconstruct it everything does. The
held-out scenes show the held-out scans over photographs that no training scene uses; with `--validation` they show a
fifth of the training scans over yet another photograph, for choosing settings. Written are `scenes.npz` and, to look
at, `scenes.png`.
"""

import argparse
import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from transformers_dualtoken.optional_libraries import needed_libraries


with needed_libraries("The ablation"):
    import skimage.data
    from sklearn.datasets import load_sample_images


sys.path.append(str(Path(__file__).parents[1] / "digits"))
from data import IMAGE_SIZE, scan_to_image, split_scans, vary  # noqa: E402


TRAIN_PHOTOS = (
    "astronaut",
    "brick",
    "cameraman",
    "flower",
    "galaxies",
    "gravel",
    "motorcycle",
    "retina",
    "rocket",
    "stained tissue",
)
VALIDATION_PHOTOS = ("coffee",)
HELDOUT_PHOTOS = ("cat", "temple", "grass")
# Scenes drawn of every scan.
TRAIN_SCENES, HELDOUT_SCENES = 12, 4
# Side of a crop in the photograph's pixels.
CROP_SIDES = (32, 160)
# The strokes of a scan are this many times as opaque as it is bright, up to fully opaque.
OPACITY = 1.5
# Digits are light over dark crops and dark over light ones: their colours lie within this of white or black, of 1.
TINT = 0.4


def load_photos() -> dict[str, Image.Image]:
    """The photographs by name, as RGB."""
    temple, flower = load_sample_images().images
    arrays = {
        "astronaut": skimage.data.astronaut(),
        "brick": skimage.data.brick(),
        "cameraman": skimage.data.camera(),
        "cat": skimage.data.chelsea(),
        "coffee": skimage.data.coffee(),
        "flower": flower,
        "galaxies": skimage.data.hubble_deep_field(),
        "grass": skimage.data.grass(),
        "gravel": skimage.data.gravel(),
        "motorcycle": skimage.data.stereo_motorcycle()[0],
        "retina": skimage.data.retina(),
        "rocket": skimage.data.rocket(),
        "stained tissue": skimage.data.immunohistochemistry(),
        "temple": temple,
    }
    return {name: Image.fromarray(array).convert("RGB") for name, array in arrays.items()}


def draw_scene(scan: Image.Image, photo: Image.Image, rng: random.Random, varied: bool) -> np.ndarray:
    """
    A scan in a random colour over a random crop: `(S, S, 3)`, uint8.

    With `varied` the scan is changed a little, and the crop may be mirrored and have its colours swapped: a few
    photographs alone hold too few colours to learn other photographs from.
    """
    side = rng.randint(*CROP_SIDES)
    left, top = rng.randint(0, photo.width - side), rng.randint(0, photo.height - side)
    crop = photo.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    background = np.asarray(crop, dtype=np.float64) / 255
    if varied:
        scan = vary(scan, rng)
        background = background[:, :: rng.choice((1, -1)), rng.sample(range(3), 3)]
    return blend_digit(scan, background, rng)


def blend_digit(scan: Image.Image, background: np.ndarray, rng: random.Random) -> np.ndarray:
    """A scan in a random colour over a background `(S, S, 3)` with values in [0, 1]: `(S, S, 3)`, uint8."""
    tint = TINT * np.array([rng.random() for _ in range(3)])
    color = 1 - tint if background.mean() < 0.5 else tint
    alpha = np.minimum(1, OPACITY * np.asarray(scan, dtype=np.float64)[..., None] / 255)
    return np.rint(255 * (background * (1 - alpha) + color * alpha)).astype(np.uint8)


def draw_scenes(
    scans: np.ndarray, digits: np.ndarray, photos: list[Image.Image], count: int, varied: bool, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`count` scenes of every scan: images `(n, S, S, 3)`, their digits `(n,)`, indices of their photos `(n,)`."""
    rng, images, labels, sources = random.Random(seed), [], [], []
    for scan, digit in zip(scans, digits):
        plain = scan_to_image(scan)
        for _ in range(count):
            source = rng.randrange(len(photos))
            images.append(draw_scene(plain, photos[source], rng, varied))
            labels.append(digit)
            sources.append(source)
    return np.stack(images), np.array(labels), np.array(sources)


def write_scenes(output_dir: str | Path, validation: bool = False, train_scenes: int = TRAIN_SCENES) -> Path:
    """
    Write `scenes.npz` with `{train,heldout}_{images,digits,photos}`, always the same, unless it is there already.

    Args:
        output_dir (`str` or `Path`).
        validation (`bool`, defaults to `False`): hold out validation scenes instead of the final ones.
        train_scenes (`int`, defaults to 12): training scenes of every training scan.
    """
    path = Path(output_dir) / "scenes.npz"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    photos = load_photos()
    train_names = TRAIN_PHOTOS if validation else TRAIN_PHOTOS + VALIDATION_PHOTOS
    heldout_names = VALIDATION_PHOTOS if validation else HELDOUT_PHOTOS
    parts = {}
    for name, (scans, digits), photo_names, count in (
        ("train", split_scans(validation)[0], train_names, train_scenes),
        ("heldout", split_scans(validation)[1], heldout_names, HELDOUT_SCENES),
    ):
        chosen, is_train = [photos[photo] for photo in photo_names], name == "train"
        drawn = draw_scenes(scans, digits, chosen, count, varied=is_train, seed=0 if is_train else 1)
        parts |= {f"{name}_{kind}": array for kind, array in zip(("images", "digits", "photos"), drawn)}
    show_scenes(parts, path.with_suffix(".png"))
    # Written whole or not at all: a run that is killed is started again in the same folder.
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **parts)
    partial.rename(path)
    return path


def show_scenes(parts: dict[str, np.ndarray], path: Path) -> None:
    """Two rows of training scenes above two of held-out ones."""
    rows = []
    for name in ("train", "heldout"):
        images = parts[f"{name}_images"]
        shown = images[np.linspace(0, len(images) - 1, 32).astype(int)]
        rows += [np.concatenate(list(row), axis=1) for row in (shown[:16], shown[16:])]
    picture = Image.fromarray(np.concatenate(rows))
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--validation", action="store_true")
    arguments = parser.parse_args()
    write_scenes(arguments.output_dir, arguments.validation)
