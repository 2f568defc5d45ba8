"""What the measurements of the demos have in common: asking a unified model, drawing with it, comparing pictures."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from transformers_dualtoken.optional_libraries import needed_libraries


with needed_libraries("The demos"):
    from matplotlib.figure import Figure


def user(*parts) -> list[dict]:
    """A conversation with one question; strings are text, pictures images."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return [{"role": "user", "content": content}]


def psnr(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """PSNR in dB of each of the images `(B, C, H, W)`, for values in [-1, 1]; `(B,)`."""
    return 10 * torch.log10(4 / (images - targets).square().flatten(1).mean(1))


class MiniatureEvaluation:
    """
    Measures a unified model by the `measure_...` methods that a subclass has and names in `measurements`, in order.

    Args:
        model (`DualTokenForCausalLM`): computes in float32 here.
        processor (`DualTokenProcessor`)
        seed (`int`, defaults to 0): of everything that is sampled.
        batch_size (`int`, defaults to 1000): conversations answered side by side.
    """

    measurements: tuple[str, ...] = ()

    def __init__(self, model, processor, seed: int = 0, batch_size: int = 1000):
        self.model, self.processor, self.batch_size = model.float().eval(), processor, batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.metrics, self.pictures = {}, {}

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
        """Images as the model takes them, `(B, 3, S, S)` in [-1, 1]."""
        return self.processor.image_processor(images=images, return_tensors="pt").pixel_values

    def _batches(self, items: list) -> list[list]:
        return [items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]

    def answer(self, conversations: list, max_new_tokens: int = 16) -> list[str]:
        """The most likely answer to each conversation."""
        answers = []
        for part in self._batches(conversations):
            inputs = self.inputs(part)
            ids = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            answers += self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    def draw(self, conversations: list) -> tuple[list[Image.Image], torch.Tensor]:
        """One picture per conversation, and its values in [-1, 1]."""
        decoded = []
        for part in self._batches(conversations):
            out = self.model.generate(
                **self.inputs(part, generate_image=True), generation_mode="image", generator=self.generator
            )
            decoded.append(self.model.decode_images(out).clamp(-1, 1))
        decoded = torch.cat(decoded)
        return self.processor.post_process_images(decoded), decoded

    def draw_and_answer(
        self, conversations: list, max_new_tokens: int = 16
    ) -> tuple[list[list[Image.Image]], list[str]]:
        """All pictures and the text of each interleaved answer; the text may have `max_new_tokens`."""
        pictures, texts = [], []
        for part in self._batches(conversations):
            inputs = self.inputs(part)
            out = self.model.generate(
                **inputs,
                generation_mode="interleaved",
                max_new_tokens=self.model.config.num_positions + 2 + max_new_tokens,
                do_sample=False,
                generator=self.generator,
            )
            own = [[] for _ in part]
            for image, owner in zip(
                self.processor.post_process_images(self.model.decode_images(out).clamp(-1, 1)),
                out.image_owner.tolist(),
            ):
                own[owner].append(image)
            pictures += own
            new = out.sequences[:, inputs["input_ids"].shape[1] :]
            texts += [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]
        return pictures, texts

    @torch.no_grad()
    def encode_and_decode(self, pixel_values: torch.Tensor):
        """The tokenizer's codes and features of images, and their reconstructions in [-1, 1]."""
        tokenizer = self.model.vision_tokenizer
        encoded = tokenizer.encode(pixel_values)
        return encoded, tokenizer.decode(pixel_codes=encoded.pixel_codes).reconstruction.clamp(-1, 1)

    def run(self) -> dict[str, float]:
        for number, name in enumerate(self.measurements, start=1):
            print(f"measuring {number}/{len(self.measurements)}: {name.replace('_', ' ')}", flush=True)
            getattr(self, f"measure_{name}")()
        return self.metrics

    def save(self, output_dir: Path) -> None:
        """`metrics.json` and all pictures."""
        output_dir.mkdir(parents=True, exist_ok=True)
        for name, figure in self.pictures.items():
            path = output_dir / f"{name}.png"
            figure.savefig(path, dpi=85)
            # A quarter of the size, and no difference to the eye.
            Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)
        (output_dir / "metrics.json").write_text(json.dumps(self.metrics, indent=2) + "\n")


def rows_of_images(rows: list[list[Image.Image]], titles: list[str], cell: float = 0.55) -> Figure:
    """A sheet: each row of images with its title at the left; a cell is `cell` inches wide."""
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(cell * columns + 1.6, (cell + 0.05) * len(rows) + 0.1), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, title, cells in zip(rows, titles, axes):
        for axis in cells:
            axis.axis("off")
        for image, axis in zip(row, cells):
            axis.imshow(np.asarray(image), cmap="gray", vmin=0, vmax=255)
        cells[0].text(-0.15, 0.5, title, transform=cells[0].transAxes, ha="right", va="center", fontsize=8)
    return figure


def table(
    columns: dict[str, dict[str, float]], explanations: dict[str, str], goals: dict[str, float], title: str
) -> str:
    """Measurements by column, beside the goals, as text."""
    width, widths = max(map(len, (title, *explanations.values()))), [max(8, len(name)) for name in columns]
    heads = "".join(f"  {name:>{size}}" for name, size in zip(columns, widths))
    lines = [f"{title:<{width}}{heads}  {'goal':>8}"]
    for name, text in explanations.items():
        if any(name in metrics for metrics in columns.values()):
            values = "".join(
                f"  {metrics.get(name, float('nan')):>{size}.3f}" for metrics, size in zip(columns.values(), widths)
            )
            goal = f">= {goals[name]:g}" if name in goals else ""
            lines.append(f"{text:<{width}}{values}  {goal:>8}")
    return "\n".join(lines)
