"""
Measure a unified digits model on the held-out scans, and draw what it does.

    python examples/digits/measure.py --model dualtoken-demo/dualtoken --captions dualtoken-demo/captions --output_dir results

The drawings are judged by a scikit-learn classifier that never sees the model: `SVC(gamma=0.001)`, fitted on the real
training scans.
"""

import argparse
import json
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


sys.path.insert(0, str(Path(__file__).parent))
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


def user(*parts) -> list[dict]:
    """A conversation with one question; strings are text, pictures images."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return [{"role": "user", "content": content}]


class DigitsEvaluation:
    """Every measurement of the demo, and its pictures."""

    def __init__(self, model, processor, caption_tokenizer, validation: bool = False, seed: int = 0):
        self.model, self.processor, self.caption_tokenizer = model.float().eval(), processor, caption_tokenizer
        (train_scans, train_digits), (scans, self.digits) = split_scans(validation)
        self.images = [scan_to_image(scan) for scan in scans]
        # Real scans go through the same resizing as drawings before they are compared or judged.
        self.train_scans = self.as_scans([scan_to_image(scan) for scan in train_scans])
        self.heldout_scans = self.as_scans(self.images)
        self.train_digits = train_digits
        self.judge = SVC(gamma=0.001).fit(train_scans.reshape(len(train_scans), -1), train_digits)
        self.generator = torch.Generator().manual_seed(seed)
        self.metrics, self.pictures = {}, {}

    @staticmethod
    def as_scans(images: list[Image.Image]) -> np.ndarray:
        return np.stack([image_to_scan(image) for image in images]).reshape(len(images), -1)

    def inputs(self, conversations: list, **kwargs) -> dict:
        return self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **kwargs,
        )

    def pixels(self, images: list[Image.Image]) -> torch.Tensor:
        return self.processor.image_processor(images=images, return_tensors="pt").pixel_values

    def draw(self, conversations: list) -> tuple[list[Image.Image], torch.Tensor]:
        """One picture per conversation, and its values in [-1, 1]."""
        out = self.model.generate(
            **self.inputs(conversations, generate_image=True),
            generation_mode="image",
            generator=self.generator,
        )
        decoded = self.model.decode_images(out).clamp(-1, 1)
        return self.processor.post_process_images(decoded), decoded

    @staticmethod
    def psnr(images: torch.Tensor, targets: torch.Tensor) -> float:
        """Mean over images of the PSNR in dB, for values in [-1, 1]."""
        errors = (images - targets).square().flatten(1).mean(1)
        return float((10 * torch.log10(4 / errors)).mean())

    @torch.no_grad()
    def measure_tokenizer(self) -> None:
        tokenizer, pixel_values = self.model.vision_tokenizer, self.pixels(self.images)
        encoded = tokenizer.encode(pixel_values)
        decoded = tokenizer.decode(pixel_codes=encoded.pixel_codes).reconstruction.clamp(-1, 1)
        self.metrics["reconstruction_psnr"] = self.psnr(decoded, pixel_values)

        captions = [caption.format(name) for name in NAMES for caption in CAPTIONS]
        length = tokenizer.config.text_config.max_position_embeddings
        tokens = self.caption_tokenizer(captions, padding="max_length", max_length=length, return_tensors="pt")
        text = F.normalize(tokenizer.get_text_features(tokens.input_ids).pooler_output, dim=-1)
        classes = F.normalize(text.view(len(NAMES), len(CAPTIONS), -1).mean(1), dim=-1)
        predicted = (F.normalize(encoded.pooler_output, dim=-1) @ classes.t()).argmax(-1)
        self.metrics["zero_shot_accuracy"] = float((predicted.numpy() == self.digits).mean())

        shown = slice(0, 12)
        self.pictures["reconstructions"] = self._rows(
            [self.images[shown], self.processor.post_process_images(decoded[shown])], ["original", "from codes"]
        )
        self.pictures["codes"] = self._code_maps(encoded, self.images[:6])

    def measure_answers(self) -> None:
        inputs = self.inputs([user(image, ASK[index % len(ASK)]) for index, image in enumerate(self.images)])
        ids = self.model.generate(**inputs, max_new_tokens=16, do_sample=False)
        answers = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right = [f"It is {NOUNS[digit]}." for digit in self.digits]
        self.metrics["answer_accuracy"] = float(np.mean([a.strip() == r for a, r in zip(answers, right)]))

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
        self.pictures["drawings"] = self._rows(rows, [f"draw {noun}" for noun in NOUNS])

    def measure_draw_and_say(self, repeats: int = 10) -> None:
        asked = np.repeat(np.arange(10), repeats)
        inputs = self.inputs([user(DRAW_AND_SAY.format(NOUNS[digit])) for digit in asked])
        positions = self.model.config.num_positions
        out = self.model.generate(
            **inputs,
            generation_mode="interleaved",
            max_new_tokens=positions + 2 + 16,
            do_sample=False,
            generator=self.generator,
        )
        images = self.processor.post_process_images(self.model.decode_images(out).clamp(-1, 1))
        texts = self.processor.batch_decode(out.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        owners, right = out.image_owner.tolist(), 0
        for row, digit in enumerate(asked):
            own = [image for image, owner in zip(images, owners) if owner == row]
            named = texts[row].strip() == f"This is {NOUNS[digit]}."
            right += len(own) == 1 and named and self.judge.predict(self.as_scans(own))[0] == digit
        self.metrics["draw_and_say_accuracy"] = right / len(asked)

    def measure_inversion(self, count: int = 100) -> None:
        sources, digits = self.images[:count], self.digits[:count]
        drawings, decoded = self.draw([user(image, INVERT) for image in sources])
        scans = 16 - self.as_scans(drawings)
        self.metrics["inversion_accuracy"] = float((self.judge.predict(scans) == digits).mean())
        self.metrics["inversion_psnr"] = self.psnr(decoded, -self.pixels(sources))
        self.pictures["inversions"] = self._rows([sources[:12], drawings[:12]], ["asked to invert", "answer"])

    def run(self) -> dict[str, float]:
        return self._run(
            self.measure_tokenizer,
            self.measure_answers,
            self.measure_drawings,
            self.measure_draw_and_say,
            self.measure_inversion,
        )

    def _run(self, *measurements) -> dict[str, float]:
        for number, measurement in enumerate(measurements, start=1):
            what = measurement.__name__.removeprefix("measure_").replace("_", " ")
            print(f"measuring {number}/{len(measurements)}: {what}", flush=True)
            measurement()
        return self.metrics

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
    def _rows(rows: list[list[Image.Image]], titles: list[str]) -> Figure:
        columns = max(len(row) for row in rows)
        figure = Figure(figsize=(0.55 * columns + 1.6, 0.6 * len(rows) + 0.1), layout="constrained")
        axes = figure.subplots(len(rows), columns, squeeze=False)
        for row, title, cells in zip(rows, titles, axes):
            for cell in cells:
                cell.axis("off")
            for image, cell in zip(row, cells):
                cell.imshow(np.asarray(image), cmap="gray", vmin=0, vmax=255)
            cells[0].text(-0.15, 0.5, title, transform=cells[0].transAxes, ha="right", va="center", fontsize=8)
        return figure

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

    def save(self, output_dir: Path) -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        for name, figure in self.pictures.items():
            path = output_dir / f"{name}.png"
            figure.savefig(path, dpi=85)
            # A quarter of the size, and no difference to the eye.
            Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)
        (output_dir / "metrics.json").write_text(json.dumps(self.metrics, indent=2) + "\n")


def table(metrics: dict[str, float]) -> str:
    """The measurements beside the goals, as text."""
    width = max(len(text) for text in EXPLANATIONS.values())
    lines = [f"{'measured on held-out scans':<{width}}  {'value':>8}  {'goal':>8}"]
    for name, text in EXPLANATIONS.items():
        if name in metrics:
            goal = f">= {GOALS[name]:g}" if name in GOALS else ""
            lines.append(f"{text:<{width}}  {metrics[name]:>8.3f}  {goal:>8}")
    return "\n".join(lines)


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
    print(table(metrics))
    return metrics


if __name__ == "__main__":
    run_script(main)
