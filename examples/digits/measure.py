"""
Measure a unified digits model on the held-out scans, and draw what it does.

    python examples/digits/measure.py --model dualtoken-demo/dualtoken --captions dualtoken-demo/captions --output_dir results

The drawings are judged by a scikit-learn classifier that never sees the model: `SVC(gamma=0.001)`, fitted on the real
training scans.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from transformers_dualtoken.checkpoints import checkpoint_errors
from transformers_dualtoken.optional_libraries import needed_libraries
from transformers_dualtoken.recipe_files import run_script
from transformers_dualtoken.training import use_cpu_threads


with needed_libraries("The digits' demo"):
    from matplotlib.figure import Figure
    from sklearn.svm import SVC


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "miniature")]
from data import (  # noqa: E402
    ASK,
    CAPTIONS,
    DRAW,
    DRAW_AND_SAY,
    INVERT,
    NAMES,
    NOUNS,
    image_to_scan,
    scan_to_image,
    split_scans,
)
from evaluation import MiniatureEvaluation, psnr, rows_of_images, table, user  # noqa: E402


# Sampling of the drawings, chosen on validation scans; the demo's checkpoint carries it.
SAMPLING = {"guidance_scale": 2.0, "image_temperature": 0.8, "image_top_k": 30, "image_top_p": 0.8}
DRAWINGS_PER_DIGIT = 20

# What the demo promises of the mean of three seeds.
GOALS = {
    "reconstruction_psnr": 25.0,
    "zero_shot_accuracy": 0.96,
    "answer_accuracy": 0.96,
    "drawing_accuracy": 0.97,
    "drawings_different": 1.0,
    "drawing_novelty": 1.0,
    "draw_and_say_accuracy": 0.90,
    "inversion_accuracy": 0.90,
}
EXPLANATIONS = {
    "reconstruction_psnr": "reconstruction, PSNR in dB",
    "zero_shot_accuracy": "zero-shot top-1, quantised semantic branch",
    "answer_accuracy": "'which digit is this?', exact answer",
    "drawing_accuracy": "drawings recognised by an independent SVC",
    "drawings_different": "drawings that are all different",
    "drawing_novelty": "distance to nearest training scan / held-out scans'",
    "drawing_variety": "in-class spread of drawings / real scans'",
    "draw_and_say_accuracy": "drawn, recognised and rightly named in one answer",
    "inversion_accuracy": "'invert this picture': recognised after inverting back",
    "inversion_psnr": "the same against the true inversion, PSNR in dB",
    "real_scan_accuracy": "the SVC on held-out scans, for comparison",
}


class DigitsEvaluation(MiniatureEvaluation):
    """Every measurement of the demo, and its pictures."""

    measurements = ("tokenizer", "answers", "drawings", "draw_and_say", "inversion")

    def __init__(self, model, processor, caption_tokenizer, validation: bool = False, seed: int = 0):
        super().__init__(model, processor, seed=seed)
        self.caption_tokenizer = caption_tokenizer
        (train_scans, train_digits), (scans, self.digits) = split_scans(validation)
        self.images = [scan_to_image(scan) for scan in scans]
        # Real scans go through the same resizing as drawings before they are compared or judged.
        self.train_scans = self.as_scans([scan_to_image(scan) for scan in train_scans])
        self.heldout_scans = self.as_scans(self.images)
        self.train_digits = train_digits
        self.judge = SVC(gamma=0.001).fit(train_scans.reshape(len(train_scans), -1), train_digits)

    @staticmethod
    def as_scans(images: list[Image.Image]) -> np.ndarray:
        return np.stack([image_to_scan(image) for image in images]).reshape(len(images), -1)

    @torch.no_grad()
    def measure_tokenizer(self) -> None:
        tokenizer, pixel_values = self.model.vision_tokenizer, self.pixels(self.images)
        encoded, decoded = self.encode_and_decode(pixel_values)
        self.metrics["reconstruction_psnr"] = float(psnr(decoded, pixel_values).mean())

        captions = [caption.format(name) for name in NAMES for caption in CAPTIONS]
        length = tokenizer.config.text_config.max_position_embeddings
        tokens = self.caption_tokenizer(captions, padding="max_length", max_length=length, return_tensors="pt")
        text = F.normalize(tokenizer.get_text_features(tokens.input_ids).pooler_output, dim=-1)
        classes = F.normalize(text.view(len(NAMES), len(CAPTIONS), -1).mean(1), dim=-1)
        predicted = (F.normalize(encoded.pooler_output, dim=-1) @ classes.t()).argmax(-1)
        self.metrics["zero_shot_accuracy"] = float((predicted.numpy() == self.digits).mean())

        shown = slice(0, 12)
        self.pictures["reconstructions"] = rows_of_images(
            [self.images[shown], self.processor.post_process_images(decoded[shown])], ["original", "from codes"]
        )
        self.pictures["codes"] = self._code_maps(encoded, self.images[:6])

    def measure_answers(self) -> None:
        answers = self.answer([user(image, ASK[index % len(ASK)]) for index, image in enumerate(self.images)])
        right = [f"It is {NOUNS[digit]}." for digit in self.digits]
        self.metrics["answer_accuracy"] = float(np.mean([a == r for a, r in zip(answers, right)]))

    def measure_drawings(self) -> None:
        asked = np.repeat(np.arange(10), DRAWINGS_PER_DIGIT)
        prompts = [user(DRAW.format(NOUNS[digit])) for digit in asked]
        drawings, _ = self.draw(prompts)
        scans = self.as_scans(drawings)
        self.metrics["drawing_accuracy"] = float((self.judge.predict(scans) == asked).mean())
        self.metrics["drawings_different"] = len({image.tobytes() for image in drawings}) / len(drawings)
        self.metrics["drawing_novelty"] = self._to_nearest(scans) / self._to_nearest(self.heldout_scans)
        self.metrics["drawing_variety"] = self._spread(scans, asked) / self._spread(self.heldout_scans, self.digits)
        self.metrics["real_scan_accuracy"] = float((self.judge.predict(self.heldout_scans) == self.digits).mean())
        rows = [drawings[start : start + DRAWINGS_PER_DIGIT] for start in range(0, len(drawings), DRAWINGS_PER_DIGIT)]
        self.pictures["drawings"] = rows_of_images(rows, [f"draw {noun}" for noun in NOUNS])

    def measure_draw_and_say(self, repeats: int = 10) -> None:
        asked = np.repeat(np.arange(10), repeats)
        drawings, texts = self.draw_and_answer([user(DRAW_AND_SAY.format(NOUNS[digit])) for digit in asked])
        right = 0
        for digit, own, text in zip(asked, drawings, texts):
            named = text == f"This is {NOUNS[digit]}."
            right += len(own) == 1 and named and self.judge.predict(self.as_scans(own))[0] == digit
        self.metrics["draw_and_say_accuracy"] = right / len(asked)

    def measure_inversion(self, count: int = 100) -> None:
        sources, digits = self.images[:count], self.digits[:count]
        drawings, decoded = self.draw([user(image, INVERT) for image in sources])
        scans = 16 - self.as_scans(drawings)
        self.metrics["inversion_accuracy"] = float((self.judge.predict(scans) == digits).mean())
        self.metrics["inversion_psnr"] = float(psnr(decoded, -self.pixels(sources)).mean())
        self.pictures["inversions"] = rows_of_images([sources[:12], drawings[:12]], ["asked to invert", "answer"])

    def _to_nearest(self, scans: np.ndarray) -> float:
        """Mean distance to the nearest training scan."""
        distances = np.linalg.norm(scans[:, None] - self.train_scans[None], axis=-1)
        return float(distances.min(1).mean())

    @staticmethod
    def _spread(scans: np.ndarray, digits: np.ndarray) -> float:
        """Mean distance between two pictures of the same digit."""
        spreads = []
        for digit in range(10):
            own = scans[digits == digit]
            distances = np.linalg.norm(own[:, None] - own[None], axis=-1)
            spreads.append(distances.sum() / (len(own) * (len(own) - 1)))
        return float(np.mean(spreads))

    @staticmethod
    def _code_maps(encoded, images: list[Image.Image]) -> Figure:
        """The codes of the first depth as maps: equal colours are equal codes."""
        figure = Figure(figsize=(6.5, 3.4), layout="constrained")
        axes = figure.subplots(3, len(images))
        for column, image in enumerate(images):
            axes[0, column].imshow(np.asarray(image), cmap="gray")
            for row, kind in ((1, "pixel"), (2, "semantic")):
                codes = encoded[f"{kind}_codes"][column, :, :, 0].numpy()
                axes[row, column].imshow(codes, cmap="nipy_spectral", vmin=0)
        for cell in axes.flat:
            cell.set_xticks([])
            cell.set_yticks([])
        for cell, title in zip(axes[:, 0], ("image", "pixel codes", "semantic codes")):
            cell.set_ylabel(title, fontsize=8)
        return figure


TITLE = "measured on held-out scans"


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the unified model")
    parser.add_argument("--captions", required=True, help="folder with the tokenizer of the SigLIP captions")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--validation", action="store_true", help="measure on validation scans")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    print(use_cpu_threads(1), flush=True)
    with checkpoint_errors(arguments.model):
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        processor = AutoProcessor.from_pretrained(arguments.model)
    with checkpoint_errors(arguments.captions):
        captions = AutoTokenizer.from_pretrained(arguments.captions)
    evaluation = DigitsEvaluation(
        model,
        processor,
        captions,
        validation=arguments.validation,
        seed=arguments.seed,
    )
    metrics = evaluation.run()
    evaluation.save(Path(arguments.output_dir))
    print(table({"value": metrics}, EXPLANATIONS, GOALS, TITLE))
    return metrics


if __name__ == "__main__":
    run_script(main)
