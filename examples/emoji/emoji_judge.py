"""
The judge of the drawings: a small convolutional network that tells the family's pictures apart.

It is trained on the true pictures alone, all of them, and on no output of a model; no part of the models it judges is
trained with it. A drawing is the picture of the family whose embedding is nearest. Blurred, shifted and recoloured
copies in its training keep it from hanging on single pixels. The one all numbers are taken with is kept; this makes it
anew:

    python examples/emoji/emoji_judge.py
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn


sys.path.insert(0, str(Path(__file__).parent))
from emoji_data import GENDERS, TONES, Picture, draw_emoji, family  # noqa: E402


KEPT = Path(__file__).parent / "judge.safetensors"
STEPS = 1500
EMBEDDING_SIZE = 96


def as_pixels(images: list) -> torch.Tensor:
    """RGB images as `(B, 3, S, S)` in [-1, 1]."""
    stacked = torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in images])
    side = images[0].size[0]
    return stacked.view(len(images), side, side, 3).permute(0, 3, 1, 2).float() / 127.5 - 1


class Judge(nn.Module):
    """Names activity, gender and tone, and embeds a picture for the search of the nearest."""

    def __init__(self, activities: list[str]):
        super().__init__()
        self.activities = activities
        layers, width = [], 3
        for channels in (24, 48, 64, 96):
            layers += [nn.Conv2d(width, channels, 3, stride=2, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
            layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
            width = channels
        self.body = nn.Sequential(*layers)
        self.embed = nn.Linear(width * 16, EMBEDDING_SIZE)
        sizes = {"activity": len(activities), "gender": len(GENDERS), "tone": len(TONES)}
        self.heads = nn.ModuleDict({name: nn.Linear(EMBEDDING_SIZE, size) for name, size in sizes.items()})

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, 3, 64, 64)` in [-1, 1] to embeddings of length 1, `(B, 96)`."""
        return F.normalize(self.embed(self.body(pixel_values).flatten(1)), dim=-1)

    def attributes(self, embeddings: torch.Tensor) -> dict[str, torch.Tensor]:
        """The logits of activity, gender and tone."""
        return {name: head(16 * embeddings) for name, head in self.heads.items()}

    def indices(self, pictures: list[Picture]) -> dict[str, torch.Tensor]:
        """Activity, gender and tone of pictures as class indices, each `(B,)`."""
        return {
            "activity": torch.tensor([self.activities.index(picture.activity) for picture in pictures]),
            "gender": torch.tensor([GENDERS.index(picture.gender) for picture in pictures]),
            "tone": torch.tensor([TONES.index(picture.tone) for picture in pictures]),
        }


def disturb(pixel_values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shifted by up to two pixels, blurred and recoloured at random, as reconstructions may be."""
    batch = len(pixel_values)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(batch, *shape, generator=generator)

    theta = torch.eye(2, 3).repeat(batch, 1, 1)
    theta[:, :, 2] = (random(2) - 0.5) * 4 * 2 / pixel_values.shape[-1]
    grid = F.affine_grid(theta, list(pixel_values.shape), align_corners=False)
    moved = F.grid_sample(pixel_values, grid, padding_mode="border", align_corners=False)
    blurred = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, 1)
    moved = torch.lerp(moved, blurred, random(1, 1, 1))
    colours = (random(3, 1, 1) - 0.5) * 0.06
    noise = 0.05 * torch.randn(pixel_values.shape, generator=generator) * random(1, 1, 1)
    return moved + colours + noise


def train_judge(steps: int = STEPS) -> Judge:
    """A judge of the whole family; one for all models and seeds."""
    generator, members = torch.Generator().manual_seed(0), family()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = Judge(sorted({picture.activity for picture in members}))
        # Every picture is a class of its own besides: neighbours in the family have to be told apart.
        prototypes = nn.Linear(EMBEDDING_SIZE, len(members), bias=False)
    pixels, targets = as_pixels([draw_emoji(picture.characters) for picture in members]), judge.indices(members)
    optimizer = torch.optim.AdamW([*judge.parameters(), *prototypes.parameters()], lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        rows = torch.randint(len(members), (128,), generator=generator)
        embeddings = judge(disturb(pixels[rows], generator))
        logits = judge.attributes(embeddings)
        loss = sum(F.cross_entropy(logits[name], targets[name][rows]) for name in logits)
        loss = loss + F.cross_entropy(16 * F.linear(embeddings, F.normalize(prototypes.weight, dim=-1)), rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"judge: step {step}/{steps}, loss {loss.item():.3f}", flush=True)
    return judge.eval()


def load_judge(path: Path = KEPT) -> Judge:
    """The judge that comes with the repository."""
    judge = Judge(sorted({picture.activity for picture in family()}))
    judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return judge.eval()


class Gallery:
    """
    All pictures of the family with their embeddings: which of them is a drawing?

    Args:
        judge (`Judge`)
    """

    def __init__(self, judge: Judge):
        self.judge, self.members = judge, family()
        self.index = {picture: number for number, picture in enumerate(self.members)}
        self.pixel_values = as_pixels([draw_emoji(picture.characters) for picture in self.members])
        with torch.no_grad():
            self.embeddings = judge(self.pixel_values)

    @torch.no_grad()
    def ranks(self, pixel_values: torch.Tensor, asked: list[Picture]) -> torch.Tensor:
        """How many pictures of the family are nearer to each drawing, by the embedding, than the one asked for; `(B,)`."""
        scores = self.judge(pixel_values) @ self.embeddings.t()
        own = scores.gather(1, torch.tensor([[self.index[picture]] for picture in asked]))
        return (scores > own).sum(1)

    def squared_distances(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Mean squared differences to all pictures of the family, `(B, pictures)`."""
        return torch.cdist(pixel_values.flatten(1), self.pixel_values.flatten(1)).square() / pixel_values[0].numel()

    @torch.no_grad()
    def attributes(self, pixel_values: torch.Tensor, asked: list[Picture]) -> dict[str, torch.Tensor]:
        """Whether activity, gender and tone of each drawing, as the judge names them, are right; each `(B,)`."""
        targets, logits = self.judge.indices(asked), self.judge.attributes(self.judge(pixel_values))
        return {name: logits[name].argmax(-1) == targets[name] for name in logits}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=KEPT)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    weights = train_judge(arguments.steps).state_dict()
    save_file(
        {name: value.half() if value.is_floating_point() else value for name, value in weights.items()},
        arguments.output,
    )
    gallery = Gallery(load_judge(arguments.output))
    right = (gallery.ranks(gallery.pixel_values, gallery.members) == 0).float().mean()
    print(f"Wrote {arguments.output}, which knows {right:.1%} of the true pictures.")


if __name__ == "__main__":
    main()
