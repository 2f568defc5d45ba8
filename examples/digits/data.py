"""
scikit-learn's handwritten digits as a data set for every stage: 1,797 real 8 x 8 scans, no download.

    python examples/digits/data.py --output_dir digits-data

writes PNG files (`train/`), `captions.jsonl` (for SigLIP) and `chat.jsonl` (for the unified model) of the training scans,
and PNG files of the others (`test/`): 20 % of all scans, stratified and always the same, are held out and used for
nothing but the final numbers; with `--validation` a fifth of the rest stands in for them, for choosing settings.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

from transformers_dualtoken.optional_libraries import needed_libraries


with needed_libraries("The digits' demo"):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split


NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NOUNS = tuple(f"an {name}" if name == "eight" else f"a {name}" for name in NAMES)
IMAGE_SIZE = 32
# Of every training scan, this many pictures (the scan, then its changed copies) are drawn, and come inverted as well.
DRAWN_VARIANTS = 2

CAPTIONS = ("a scan of the digit {}.", "a handwritten {}.", "the number {}.", "a {} on paper.")
ASK = ("Which digit is this?", "What number is shown here?")
DRAW = "Draw {}."
DRAW_AND_SAY = "Draw {}, then say what you drew."
INVERT = "Invert this picture."


def split_scans(validation: bool = False) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """
    (training scans, digits), (held-out scans, digits); scans are `(n, 8, 8)` with values from 0 to 16.

    The held-out fifth is fixed. `validation=True` leaves it aside and holds out a fifth of the training scans.
    """
    digits = load_digits()
    parts = train_test_split(digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
    if validation:
        parts = train_test_split(parts[0], parts[2], test_size=0.2, stratify=parts[2], random_state=0)
    train_scans, heldout_scans, train_digits, heldout_digits = parts
    return (train_scans, train_digits), (heldout_scans, heldout_digits)


def scan_to_image(scan: np.ndarray) -> Image.Image:
    """An 8 x 8 scan with values from 0 to 16 as a grayscale picture of the models' size."""
    image = Image.fromarray(np.rint(scan * (255 / 16)).astype(np.uint8))
    return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)


def image_to_scan(image: Image.Image) -> np.ndarray:
    """The way back: a picture as 8 x 8 means with values from 0 to 16."""
    pixels = np.asarray(image.convert("L").resize((IMAGE_SIZE, IMAGE_SIZE)), dtype=np.float64)
    block = IMAGE_SIZE // 8
    return pixels.reshape(8, block, 8, block).mean((1, 3)) * (16 / 255)


def vary(image: Image.Image, rng: random.Random) -> Image.Image:
    """A slightly rotated, scaled, sheared and shifted copy; black is drawn in."""
    angle, scale = rng.uniform(-0.17, 0.17), rng.uniform(0.9, 1.1)
    shear, shift = rng.uniform(-0.1, 0.1), (rng.uniform(-2, 2), rng.uniform(-2, 2))
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    matrix = np.array([[cos, -sin + shear], [sin, cos]])
    centre = np.full(2, IMAGE_SIZE / 2)
    offset = centre - matrix @ (centre + shift)
    coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)


def _part(image: str) -> dict:
    return {"type": "image", "image": image}


def _chat(question: list, answer: list) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _text(text: str) -> dict:
    return {"type": "text", "text": text}


def conversations(plain: str, inverted: str | None, digit: int, rng: random.Random) -> list[dict]:
    """What the unified model learns from one picture: to name it and, where it is a model of its kind, to draw it."""
    noun = NOUNS[digit]
    chats = [_chat([_part(plain), _text(rng.choice(ASK))], [_text(f"It is {noun}.")])]
    if inverted is not None:
        # Drawing is the hardest to learn, so it comes twice.
        chats += [_chat([_text(DRAW.format(noun))], [_part(plain)])] * 2
        chats.append(_chat([_text(DRAW_AND_SAY.format(noun))], [_part(plain), _text(f"This is {noun}.")]))
        chats.append(_chat([_part(plain), _text(INVERT)], [_part(inverted)]))
    return chats


def write_data(output_dir: str | Path, variants: int = 4, validation: bool = False, seed: int = 0) -> None:
    """
    Write the data set.

    Args:
        output_dir (`str` or `Path`).
        variants (`int`, defaults to 4): slightly changed copies of every training scan, beside the scan itself.
        validation (`bool`, defaults to `False`): hold out a part of the training scans instead of the test scans.
        seed (`int`, defaults to 0): of the copies and the wording, not of the split.
    """
    output_dir, rng = Path(output_dir), random.Random(seed)
    (train_scans, train_digits), (heldout_scans, _) = split_scans(validation)
    captions, chats = [], []
    for split in ("train", "test"):
        (output_dir / split).mkdir(parents=True, exist_ok=True)

    def save(image: Image.Image, name: str) -> str:
        image.save(output_dir / name)
        return name

    for index, (scan, digit) in enumerate(zip(train_scans, train_digits)):
        image = scan_to_image(scan)
        for variant in range(variants + 1):
            varied = vary(image, rng) if variant else image
            plain = save(varied, f"train/{index:04d}-{variant}.png")
            # White on black is the rule, and black on white a rarer sight.
            inverted = None
            if variant < DRAWN_VARIANTS:
                inverted = save(ImageChops.invert(varied), f"train/{index:04d}-{variant}-inverted.png")
            true = [caption.format(NAMES[digit]) for caption in CAPTIONS]
            captions += [{"image": path, "captions": true} for path in (plain, inverted) if path]
            chats += conversations(plain, inverted, int(digit), rng)
    for index, scan in enumerate(heldout_scans):
        save(scan_to_image(scan), f"test/{index:04d}.png")
    for name, rows in (("captions", captions), ("chat", chats)):
        (output_dir / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--variants", type=int, default=4)
    parser.add_argument("--validation", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_data(arguments.output_dir, arguments.variants, arguments.validation, arguments.seed)
    print(
        f"Wrote {arguments.output_dir}: images in train/ and test/, their captions in captions.jsonl, conversations in "
        "chat.jsonl."
    )
