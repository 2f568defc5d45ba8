"""
Measure a unified emoji model on combinations it has never seen, and on as many that it has.

    python examples/emoji/emoji_measure.py --model emoji-demo/dualtoken --output_dir results

A drawing is judged against the truth: which picture of the whole family is nearest to it, by the embedding of
`emoji_judge.py` and by plain PSNR.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

from transformers_dualtoken.checkpoints import checkpoint_errors
from transformers_dualtoken.recipe_files import run_script
from transformers_dualtoken.training import use_cpu_threads


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "miniature")]
from emoji_data import (  # noqa: E402
    ASK_ACTIVITY,
    ASK_GENDER,
    ASK_TONE,
    DRAW,
    DRAW_AND_SAY,
    GENDER_WORDS,
    NAME,
    TONE_WORDS,
    Picture,
    draw_emoji,
    edits,
    family,
)
from emoji_judge import Gallery, load_judge  # noqa: E402
from evaluation import MiniatureEvaluation, psnr, rows_of_images, table, user  # noqa: E402


# Of the drawings; a first guess, not chosen on validation combinations yet. The demo's checkpoint carries it.
SAMPLING = {"guidance_scale": 1.5, "image_temperature": 0.5, "image_top_k": 50, "image_top_p": 0.9}

GOALS = {
    "unseen_drawing_top1": 0.60,
    "unseen_drawing_activity": 0.90,
    "unseen_drawing_gender": 0.90,
    "unseen_drawing_tone": 0.90,
    "unseen_name": 0.90,
    "unseen_edit_tone_top1": 0.80,
    "unseen_edit_gender_top1": 0.80,
}
MEASURED = {
    "reconstruction_psnr": "reconstruction, PSNR in dB",
    "reconstruction_top1": "reconstruction: nearest picture is the right one",
    "drawing_top1": "drawing: nearest of all 1,361 is the one asked for",
    "drawing_top5": "drawing: among the 5 nearest",
    "drawing_top1_by_psnr": "drawing: nearest by plain PSNR",
    "drawing_activity": "drawing: activity as asked",
    "drawing_gender": "drawing: gender as asked",
    "drawing_tone": "drawing: tone as asked",
    "drawing_psnr": "drawing: PSNR to the truth, dB",
    "drawing_copy_psnr": "drawing: PSNR to the nearest training picture, dB",
    "truth_copy_psnr": "truth: PSNR to the nearest training picture, dB",
    "drawing_de_top1": "drawing, asked in German: nearest is the one asked for",
    "name": "naming, exact",
    "name_de": "naming in German, exact",
    "ask_activity": "which activity, exact",
    "ask_gender": "man, woman or person, exact",
    "ask_tone": "which skin tone, exact",
    "edit_tone_top1": "edit of the tone: nearest is the truth",
    "edit_gender_top1": "edit of the gender: nearest is the truth",
    "draw_and_say": "drawn, nearest the right one, and named exactly",
}
TITLE = "combinations never seen, and as many that were"
EXPLANATIONS = {f"{part}_{name}": f"{part}: {text}" for part in ("unseen", "seen") for name, text in MEASURED.items()}


class EmojiEvaluation(MiniatureEvaluation):
    """
    Every measurement of the demo, and its pictures.

    Args:
        model, processor, seed: as of [`MiniatureEvaluation`].
        gallery (`Gallery`): all pictures of the family and their judge.
        split (`str`, defaults to `"test"`): the combinations held out; `"validation"` to choose settings.
        limit (`int`, *optional*): measure so many of them only.
    """

    measurements = ("reconstruction", "drawings", "answers", "edits", "draw_and_say")

    def __init__(
        self, model, processor, gallery: Gallery, split: str = "test", seed: int = 0, limit: int | None = None
    ):
        super().__init__(model, processor, seed=seed, batch_size=128)
        self.gallery, self.train = gallery, family("train")
        unseen = random.Random(0).sample(family(split), len(family(split)))[:limit]
        self.parts = {"unseen": unseen, "seen": random.Random(0).sample(self.train, len(unseen))}
        self.train_rows = torch.tensor([gallery.index[picture] for picture in self.train])

    def _truths(self, asked: list[Picture]) -> torch.Tensor:
        return self.gallery.pixel_values[[self.gallery.index[picture] for picture in asked]]

    @staticmethod
    def images_of(pictures: list[Picture]) -> list[Image.Image]:
        return [draw_emoji(picture.characters) for picture in pictures]

    def _record(self, part: str, **values: torch.Tensor | float) -> None:
        for name, value in values.items():
            value = value.float().mean().item() if isinstance(value, torch.Tensor) else value
            self.metrics[f"{part}_{name}"] = value

    def measure_reconstruction(self) -> None:
        for part, asked in self.parts.items():
            encoded, decoded = self.encode_and_decode(self.pixels(self.images_of(asked)))
            ranks = self.gallery.ranks(decoded, asked)
            self._record(part, reconstruction_psnr=psnr(decoded, self._truths(asked)), reconstruction_top1=ranks == 0)
            if part == "unseen":
                shown = self.processor.post_process_images(decoded[:12])
                self.pictures["reconstructions"] = rows_of_images(
                    [self.images_of(asked[:12]), shown], ["original", "from codes"]
                )

    def _drawings(self, part: str, asked: list[Picture], language: str) -> tuple[list[Image.Image], torch.Tensor]:
        prompts = [user(DRAW[language][0].format(picture.names[language])) for picture in asked]
        return self.draw(prompts)

    def measure_drawings(self) -> None:
        for part, asked in self.parts.items():
            images, decoded = self._drawings(part, asked, "en")
            truths, ranks = self._truths(asked), self.gallery.ranks(decoded, asked)
            distances = self.gallery.squared_distances(decoded)
            own = torch.tensor([self.gallery.index[picture] for picture in asked])
            # Of a truth that was seen, the nearest other one.
            among_train = self.gallery.squared_distances(truths).scatter(1, own[:, None], torch.inf)
            self._record(
                part,
                drawing_top1=ranks == 0,
                drawing_top5=ranks < 5,
                drawing_top1_by_psnr=distances.argmin(1) == own,
                drawing_psnr=psnr(decoded, truths),
                drawing_copy_psnr=10 * torch.log10(4 / distances[:, self.train_rows].min(1).values),
                truth_copy_psnr=10 * torch.log10(4 / among_train[:, self.train_rows].min(1).values),
            )
            attributes = self.gallery.attributes(decoded, asked)
            self._record(part, **{f"drawing_{name}": right for name, right in attributes.items()})
            _, german = self._drawings(part, asked, "de")
            self._record(part, drawing_de_top1=self.gallery.ranks(german, asked) == 0)
            if part == "unseen":
                self.pictures["drawings"] = rows_of_images(
                    [images[:16], self.images_of(asked[:16]), images[16:32], self.images_of(asked[16:32])],
                    ["drawn", "truth"] * 2,
                )

    def _exact(self, part: str, name: str, asked: list[Picture], question: str, right: list[str]) -> None:
        answers = self.answer([user(image, question) for image in self.images_of(asked)], max_new_tokens=40)
        self._record(part, **{name: sum(a == f"{r}." for a, r in zip(answers, right)) / len(right)})

    def measure_answers(self) -> None:
        for part, asked in self.parts.items():
            self._exact(part, "name", asked, NAME["en"][0], [picture.names["en"] for picture in asked])
            self._exact(part, "name_de", asked, NAME["de"][0], [picture.names["de"] for picture in asked])
            self._exact(part, "ask_activity", asked, ASK_ACTIVITY["en"], [picture.activity for picture in asked])
            genders = [GENDER_WORDS["en"][picture.gender] for picture in asked]
            self._exact(part, "ask_gender", asked, ASK_GENDER["en"], genders)
            self._exact(part, "ask_tone", asked, ASK_TONE["en"], [TONE_WORDS["en"][picture.tone] for picture in asked])

    def _edit_pairs(self, targets: list[Picture], kind: str) -> list[tuple[Picture, Picture]]:
        """(seen picture, target) that differ in a tone or a gender alone, one for each target that has one."""
        rng, pairs = random.Random(0), []
        for target in targets:
            same = "gender" if kind == "tone" else "tone"
            sources = [
                source
                for source in self.train
                if edits(source, target, "en") and getattr(source, same) == getattr(target, same)
            ]
            if sources:
                pairs.append((rng.choice(sources), target))
        return pairs

    def measure_edits(self) -> None:
        for part, targets in self.parts.items():
            for kind in ("tone", "gender"):
                pairs = self._edit_pairs(targets, kind)
                if not pairs:
                    continue
                sources, truths = zip(*pairs)
                prompts = [
                    user(image, edits(source, target, "en"))
                    for image, (source, target) in zip(self.images_of(sources), pairs)
                ]
                images, decoded = self.draw(prompts)
                self._record(part, **{f"edit_{kind}_top1": self.gallery.ranks(decoded, list(truths)) == 0})
                if part == "unseen":
                    self.pictures[f"edits_{kind}"] = rows_of_images(
                        [self.images_of(sources[:16]), images[:16], self.images_of(truths[:16])],
                        ["shown", "edited", "truth"],
                    )

    def measure_draw_and_say(self) -> None:
        for part, asked in self.parts.items():
            prompts = [user(DRAW_AND_SAY["en"].format(picture.names["en"])) for picture in asked]
            drawings, texts = self.draw_and_answer(prompts, max_new_tokens=40)
            right = 0
            for picture, own, text in zip(asked, drawings, texts):
                if len(own) == 1 and text == f"{picture.names['en']}.":
                    right += int(self.gallery.ranks(self.pixels(own), [picture])[0] == 0)
            self._record(part, draw_and_say=right / len(asked))


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the unified model")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--limit", type=int, help="measure so many combinations only")
    parser.add_argument("--sampling", help="JSON object of image arguments of `generate`, instead of the checkpoint's")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    print(use_cpu_threads(1), flush=True)
    with checkpoint_errors(arguments.model):
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        processor = AutoProcessor.from_pretrained(arguments.model)
    if arguments.sampling:
        for name, value in json.loads(arguments.sampling).items():
            setattr(model.generation_config, name, value)
    evaluation = EmojiEvaluation(
        model,
        processor,
        Gallery(load_judge()),
        split=arguments.split,
        seed=arguments.seed,
        limit=arguments.limit,
    )
    metrics = evaluation.run()
    evaluation.save(arguments.output_dir)
    print(table({"value": metrics}, EXPLANATIONS, GOALS, TITLE))
    return metrics


if __name__ == "__main__":
    run_script(main)
