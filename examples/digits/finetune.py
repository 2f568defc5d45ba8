"""
Teach the digits' model something new by LoRA, and see what that does to what it knew.

    python examples/digits/finetune.py data --output_dir digits-new
    python examples/run_unified.py examples/digits/finetune.json                               # into digits-adapter/
    dualtoken merge digits-adapter digits-merged
    python examples/digits/finetune.py measure --output_dir digits-finetuned \\
        --models examples/digits/checkpoint/dualtoken digits-adapter digits-merged

New are German, in questions as well as in requests for a drawing, and the word "bold" in English ones. What the model
knew is trained along, by its weight in `digits-new/mixture.json`.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from transformers import AutoModelForCausalLM, AutoProcessor

from transformers_dualtoken.checkpoints import checkpoint_errors
from transformers_dualtoken.optional_libraries import needed_libraries
from transformers_dualtoken.recipe_files import run_script
from transformers_dualtoken.training import use_cpu_threads


with needed_libraries("The digits' demo"):
    from sklearn.svm import SVC


sys.path.insert(0, str(Path(__file__).parent))
from data import DRAW, NAMES, NOUNS, scan_to_image, split_scans, write_data  # noqa: E402
from measure import DRAWINGS_PER_DIGIT, DigitsEvaluation, rows_of_images, user  # noqa: E402


GERMAN_NOUNS = tuple(
    f"eine {name}" for name in ("Null", "Eins", "Zwei", "Drei", "Vier", "Fünf", "Sechs", "Sieben", "Acht", "Neun")
)
GERMAN_ASK = ("Welche Ziffer ist das?", "Welche Zahl siehst du hier?")
GERMAN_ANSWER = "Das ist {}."
GERMAN_DRAW = "Zeichne {}."
DRAW_BOLD = "Draw a bold {}."
# Requests for drawings, one of each digit.
REQUESTS = {
    "german": [GERMAN_DRAW.format(noun) for noun in GERMAN_NOUNS],
    "bold": [DRAW_BOLD.format(name) for name in NAMES],
    "plain": [DRAW.format(noun) for noun in NOUNS],
}

# Shares of the new conversations and, last, of those that the model was trained on.
WEIGHTS = {"german": 2, "bold": 1, "chat": 2}

EXPLANATIONS = {
    "german_answer_accuracy": "new: 'Welche Ziffer ist das?', exact answer",
    "german_drawing_accuracy": "new: 'Zeichne eine Drei.', recognised",
    "bold_drawing_accuracy": "new: 'Draw a bold three.', recognised, and as bold",
    "answer_accuracy": "old: 'Which digit is this?', exact answer",
    "plain_drawing_accuracy": "old: 'Draw a three.', recognised",
    "plain_not_bold": "old: the same, recognised, and as not bold",
    "draw_and_say_accuracy": "old: drawn, recognised and rightly named",
    "inversion_accuracy": "old: 'Invert this picture.', recognised",
}


def embolden(image: Image.Image) -> Image.Image:
    """The same digit in strokes that are four pixels wider."""
    return image.filter(ImageFilter.MaxFilter(5))


def conversation(question: list | str, answer: list | str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_finetuning_data(output_dir: str | Path, validation: bool = False, seed: int = 0) -> None:
    """
    Write `german.jsonl` and `bold.jsonl`, two conversations and one about every training scan; beside them, by
    `data.write_data`, what the model was trained on, and `mixture.json`, all of it weighted.
    """
    output_dir, rng = Path(output_dir), random.Random(seed)
    write_data(output_dir, variants=1, validation=validation, seed=seed)
    german, bold = [], []
    (scans, digits), _ = split_scans(validation)
    for index, (scan, digit) in enumerate(zip(scans, digits)):
        # `write_data` has written it.
        plain = {"type": "image", "image": f"train/{index:04d}-0.png"}
        noun = GERMAN_NOUNS[digit]
        question = {"type": "text", "text": rng.choice(GERMAN_ASK)}
        german.append(conversation([plain, question], GERMAN_ANSWER.format(noun)))
        german.append(conversation(GERMAN_DRAW.format(noun), [plain]))
        name = f"train/{index:04d}-bold.png"
        embolden(scan_to_image(scan)).save(output_dir / name)
        bold.append(conversation(DRAW_BOLD.format(NAMES[digit]), [{"type": "image", "image": name}]))
    for name, rows in (("german", german), ("bold", bold)):
        (output_dir / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixture = [{"path": f"{name}.jsonl", "weight": weight} for name, weight in WEIGHTS.items()]
    (output_dir / "mixture.json").write_text(json.dumps(mixture, indent=2) + "\n")


class FinetuningEvaluation(DigitsEvaluation):
    """
    What is new and what is old of a model, or of one with an adapter.

    Whether a drawing is bold is judged by a second SVC, fitted on the real training scans as they are and emboldened:
    it tells twenty classes apart, ten digits in two weights.
    """

    measurements = ("german_answers", "answers", "requests", "draw_and_say", "inversion")

    def __init__(self, model, processor, validation: bool = False, seed: int = 0):
        super().__init__(model, processor, None, validation, seed)
        (scans, digits), _ = split_scans(validation)
        images = [scan_to_image(scan) for scan in scans]
        fitted_on = self.as_scans([*images, *map(embolden, images)])
        self.bold_judge = SVC(gamma=0.001).fit(fitted_on, np.concatenate([digits, digits + 10]))

    def measure_german_answers(self) -> None:
        questions = [user(image, GERMAN_ASK[index % len(GERMAN_ASK)]) for index, image in enumerate(self.images)]
        inputs = self.inputs(questions)
        # In bytes, as the language model's vocabulary knows no German.
        ids = self.model.generate(**inputs, max_new_tokens=30, do_sample=False)
        answers = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right = [GERMAN_ANSWER.format(GERMAN_NOUNS[digit]) for digit in self.digits]
        self.metrics["german_answer_accuracy"] = float(np.mean([a.strip() == r for a, r in zip(answers, right)]))

    def measure_requests(self) -> None:
        asked = np.repeat(np.arange(10), DRAWINGS_PER_DIGIT)
        shown = {}
        for name, requests in REQUESTS.items():
            drawings, _ = self.draw([user(requests[digit]) for digit in asked])
            scans = self.as_scans(drawings)
            classes = self.bold_judge.predict(scans)
            if name == "bold":
                self.metrics["bold_drawing_accuracy"] = float((classes == asked + 10).mean())
            else:
                self.metrics[f"{name}_drawing_accuracy"] = float((self.judge.predict(scans) == asked).mean())
            if name == "plain":
                self.metrics["plain_not_bold"] = float((classes == asked).mean())
            shown[requests[3]] = drawings[::DRAWINGS_PER_DIGIT]
        self.pictures["requests"] = rows_of_images(list(shown.values()), list(shown))


def table(results: dict[str, dict[str, float]]) -> str:
    """What was measured as text, a column per model."""
    width = max(map(len, EXPLANATIONS.values()))
    columns = {model: max(len(model), 7) for model in results}
    lines = [f"{'measured on held-out scans':<{width}}" + "".join(f"  {m:>{w}}" for m, w in columns.items())]
    for name, text in EXPLANATIONS.items():
        cells = "".join(f"  {100 * results[model][name]:>{w - 2}.1f} %" for model, w in columns.items())
        lines.append(f"{text:<{width}}{cells}")
    return "\n".join(lines)


def measure_models(
    models: list[str], output_dir: str | Path, validation: bool = False, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Measure each model; writes `metrics.json` and a picture of its drawings to a folder of its name."""
    results = {}
    for path in models:
        print(path, flush=True)
        # Of an adapter transformers finds the base model by itself.
        with checkpoint_errors(path):
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        evaluation = FinetuningEvaluation(model, AutoProcessor.from_pretrained(path), validation, seed)
        name = Path(path).name
        results[name] = evaluation.run()
        evaluation.save(Path(output_dir, name))
    return results


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]] | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="write conversations to learn from")
    measure = commands.add_parser("measure", help="compare models, adapters and merged models on held-out scans")
    measure.add_argument("--models", nargs="+", required=True, help="folders with different names")
    for command in (data, measure):
        command.add_argument("--output_dir", required=True)
        command.add_argument("--validation", action="store_true", help="hold out validation scans, to choose settings")
        command.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.command == "data":
        write_finetuning_data(arguments.output_dir, arguments.validation, arguments.seed)
        return None
    if len({Path(path).name for path in arguments.models}) < len(arguments.models):
        parser.error("the folders of --models must have different names: results are kept by them.")
    print(use_cpu_threads(1), flush=True)
    results = measure_models(arguments.models, arguments.output_dir, arguments.validation, arguments.seed)
    print(table(results))
    return results


if __name__ == "__main__":
    run_script(main)
