"""What the emoji demo has of its own: data, settings, measurements; importing it loads PyTorch."""

import argparse
import json
import sys
from pathlib import Path


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "miniature")]
import emoji_data  # noqa: E402
import emoji_measure  # noqa: E402
from emoji_judge import Gallery, load_judge  # noqa: E402
from evaluation import table  # noqa: E402
from stages import DemoStages  # noqa: E402


def load_recipe(name: str) -> dict:
    """Options of the scripts by stage; of other recipes the file holds what differs from the short one."""
    recipes = json.loads((Path(__file__).parent / "recipes.json").read_text())
    return _merged(recipes["short"], recipes[name])


def _merged(base: dict, changes: dict) -> dict:
    both = base.keys() & changes.keys()
    merged = {
        key: _merged(base[key], changes[key]) if isinstance(changes[key], dict) else changes[key] for key in both
    }
    return {**base, **changes, **merged}


class EmojiStages(DemoStages):
    kept_checkpoint = Path(__file__).parent / "checkpoint"
    sampling = emoji_measure.SAMPLING

    def __init__(self, arguments: argparse.Namespace):
        self.recipe, self.limit = load_recipe(arguments.recipe), arguments.limit

    def write_data(self, data_dir: Path, arguments: argparse.Namespace) -> None:
        emoji_data.write_data(data_dir, arguments.seed, **self.recipe["data"], num_activities=arguments.num_activities)

    def options(self, stage: str, arguments: argparse.Namespace) -> list[str]:
        options = []
        for name, value in self.recipe[stage].items():
            if name == "max_steps" and arguments.steps_factor != 1:
                value = max(1, round(value * arguments.steps_factor))
            options += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
        if stage != "language_model":
            # A run that was interrupted is taken up from here.
            options += ["--save_strategy", "steps", "--save_steps", "100", "--save_total_limit", "1"]
        return options

    def evaluation(self, checkpoint: Path, validation: bool, seed: int) -> emoji_measure.EmojiEvaluation:
        return emoji_measure.EmojiEvaluation(
            *self.load(checkpoint / "dualtoken"),
            Gallery(load_judge()),
            split="validation" if validation else "test",
            seed=seed,
            limit=self.limit,
        )

    def table(self, metrics: dict[str, float], kept: dict[str, float] | None) -> str:
        columns = {"trained now": metrics} | ({"kept checkpoint": kept} if kept else {})
        return table(columns, emoji_measure.EXPLANATIONS, emoji_measure.GOALS, emoji_measure.TITLE)

    def save_and_measure(self, output_dir: Path, arguments: argparse.Namespace) -> dict[str, float]:
        """With the card of a checkpoint that is kept."""
        metrics = super().save_and_measure(output_dir, arguments)
        if arguments.keep_checkpoint is not None:
            model, _ = self.load(arguments.keep_checkpoint / "dualtoken")
            card = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")
            text = card.format(
                parameters=model.num_parameters() / 1e6,
                recipe=arguments.recipe,
                seed=arguments.seed,
                table=self.table(metrics, None),
            )
            (arguments.keep_checkpoint / "dualtoken" / "README.md").write_text(text, encoding="utf-8")
        return metrics
