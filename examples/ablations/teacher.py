"""
The frozen teacher of every variant of a seed, a small SigLIP trained on scenes and captions, and an independent judge.

    python examples/ablations/teacher.py --output_dir ablations --seed 0

It leaves `teacher-0/`, a SigLIP with the class embeddings of its captions, and `judge.pt`, a small convolutional network
that tells digits and photographs apart. The judge is the same for all seeds and never meets a tokenizer: its features
serve the Fréchet distance between held-out scenes and their reconstructions.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import SiglipModel, TrainingArguments


EXAMPLES = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(EXAMPLES / "digits"), str(EXAMPLES / "miniature")]
from data import CAPTIONS, IMAGE_SIZE, NAMES  # noqa: E402
from scenes import write_scenes  # noqa: E402
from train_siglip import CaptionedImages, SiglipTrainer, build_model, build_tokenizer  # noqa: E402


NUM_LAYERS = 8
TEACHER_STEPS = 2000
JUDGE_STEPS = 600


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 `(B, S, S, 3)` as `(B, 3, S, S)` in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def training_arguments(output_dir: Path, seed: int, **kwargs) -> TrainingArguments:
    """What the teacher's and the tokenizers' training have in common."""
    return TrainingArguments(
        output_dir=str(output_dir),
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=100,
        warmup_steps=30,
        lr_scheduler_type="cosine",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **kwargs,
    )


@torch.no_grad()
def class_embeddings(siglip: SiglipModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean over the captions of a digit's normalised text features, `(10, H)`, of length 1."""
    text = F.normalize(siglip.get_text_features(input_ids.flatten(0, 1)).pooler_output, dim=-1)
    return F.normalize(text.view(*input_ids.shape[:2], -1).mean(1), dim=-1)


def zero_shot_accuracy(features: torch.Tensor, classes: torch.Tensor, digits: np.ndarray) -> float:
    """Share of image features `(B, H)` nearest, by angle, to the embedding of their own digit."""
    predicted = (F.normalize(features, dim=-1) @ classes.t()).argmax(-1)
    return float((predicted.numpy() == digits).mean())


def train_teacher(output_dir: Path, seed: int, steps: int = TEACHER_STEPS) -> Path:
    """`teacher-{seed}/` in `output_dir`, unless it is there already."""
    folder = output_dir / f"teacher-{seed}"
    if (folder / "classes.pt").exists():
        return folder
    scenes = np.load(write_scenes(output_dir))
    torch.manual_seed(seed)
    texts = [caption.format(name) for name in NAMES for caption in CAPTIONS]
    tokenizer = build_tokenizer(texts)
    tokens = tokenizer(texts, padding="max_length", return_tensors="pt")
    input_ids = tokens.input_ids.view(len(NAMES), len(CAPTIONS), -1)
    # Eight layers, so that an eighth of the encoder is one layer.
    siglip = build_model(tokenizer, num_hidden_layers=NUM_LAYERS, image_size=IMAGE_SIZE)
    nn.init.constant_(siglip.logit_scale, 1.5)
    arguments = training_arguments(
        folder,
        seed,
        max_steps=steps,
        per_device_train_batch_size=96,
        learning_rate=8e-4,
        adam_beta2=0.98,
        weight_decay=0.05,
    )
    captions = [[caption.format(NAMES[digit]) for caption in CAPTIONS] for digit in scenes["train_digits"]]
    dataset = CaptionedImages(to_pixels(scenes["train_images"]), captions, tokenizer, seed)
    started = time.process_time()
    SiglipTrainer(siglip, arguments, train_dataset=dataset).train()
    siglip.eval().save_pretrained(folder)
    classes = class_embeddings(siglip, input_ids)
    with torch.no_grad():
        features = siglip.get_image_features(to_pixels(scenes["heldout_images"])).pooler_output
    accuracy = zero_shot_accuracy(features, classes, scenes["heldout_digits"])
    print(f"teacher {seed}: zero-shot {accuracy:.3f}, {time.process_time() - started:.0f} s of one core", flush=True)
    # Last: it says that the folder is complete.
    torch.save({"classes": classes, "zero_shot": accuracy}, folder / "classes.pt")
    return folder


class Judge(nn.Module):
    """Digit and photograph of a scene, from 64 features that a Fréchet distance can be taken on."""

    def __init__(self, num_photos: int):
        super().__init__()
        layers, width = [], 3
        for channels in (24, 48, 64):
            layers += [nn.Conv2d(width, channels, 3, stride=2, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
            layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
            width = channels
        self.body, self.embed = nn.Sequential(*layers), nn.Linear(64 * 16, 64)
        self.digit, self.photo = nn.Linear(64, 10), nn.Linear(64, num_photos)

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.embed(self.body(pixel_values).flatten(1))


def train_judge(output_dir: Path, steps: int = JUDGE_STEPS) -> Path:
    """`judge.pt` in `output_dir`, unless it is there already; one for all seeds and variants."""
    path = output_dir / "judge.pt"
    if path.exists():
        return path
    scenes = np.load(write_scenes(output_dir))
    torch.manual_seed(0)
    pixels, digits, photos = (
        to_pixels(scenes["train_images"]),
        torch.from_numpy(scenes["train_digits"]),
        torch.from_numpy(scenes["train_photos"]),
    )
    judge = Judge(int(photos.max()) + 1)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    started = time.process_time()
    for _ in range(steps):
        rows = torch.randint(len(pixels), (96,))
        features = F.relu(judge.features(pixels[rows]))
        loss = F.cross_entropy(judge.digit(features), digits[rows])
        loss = loss + F.cross_entropy(judge.photo(features), photos[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    judge.eval()
    with torch.no_grad():
        features = F.relu(judge.features(to_pixels(scenes["heldout_images"])))
        accuracy = float((judge.digit(features).argmax(-1).numpy() == scenes["heldout_digits"]).mean())
    print(f"judge: digits {accuracy:.3f}, {time.process_time() - started:.0f} s of one core", flush=True)
    torch.save({"weights": judge.state_dict(), "digits": accuracy}, path.with_suffix(".partial"))
    path.with_suffix(".partial").rename(path)
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=TEACHER_STEPS)
    parser.add_argument("--judge_only", action="store_true", help="make what all seeds share, and no teacher")
    parser.add_argument("--validation", action="store_true", help="hold out validation scenes, to choose settings")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    write_scenes(arguments.output_dir, arguments.validation)
    train_judge(arguments.output_dir)
    if not arguments.judge_only:
        train_teacher(arguments.output_dir, arguments.seed, arguments.steps)


if __name__ == "__main__":
    main()
