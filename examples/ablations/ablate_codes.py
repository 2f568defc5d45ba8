"""
Ablation: does the unified model need both kinds of codes? Pixel codes only, semantic codes only, and both.

    python examples/ablations/ablate_codes.py --output_dir ablations

trains unified models of each variant with three seeds, one to answer and one to draw, each until its validation loss
stops falling, and writes
`codes.md`, `ablation_codes.png` (learning curves) and `ablation_codes_drawings.png`. Started again, it skips what is
finished. `--page docs/ablations.md` puts the results into the documentation; with `--report_only` nothing is trained.
With the same folder, it uses the scenes, the judge and the teachers of the other ablations.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from transformers_dualtoken.optional_libraries import needed_libraries


with needed_libraries("The ablation"):
    from matplotlib.figure import Figure


sys.path.insert(0, str(Path(__file__).parent))
from report import difference, fill_page, load_runs, markdown_table, mean_and_spread  # noqa: E402


HERE = Path(__file__).parent
TITLES = {"both": "both", "pixel": "pixel only", "semantic": "semantic only"}
REFERENCE = "both"
# Name, how it is shown, factor and number of decimals.
UNDERSTANDING = {
    "digit": ("which digit, %", 100, 1),
    "corner": ("which corner, %", 100, 1),
}
GENERATION = {
    "drawn_digit": ("digit as asked, %", 100, 1),
    "drawn_view": ("photograph as asked, %", 100, 1),
    "drawn_both": ("both as asked, %", 100, 1),
    "frechet": ("Fréchet distance", 1, 1),
    "drawn_semantics": ("digit by semantic codes, %", 100, 1),
}
METRICS = UNDERSTANDING | GENERATION
TASK_OF = dict.fromkeys(UNDERSTANDING, "understanding") | dict.fromkeys(GENERATION, "generation")
CURVES = ("digit", "corner", "drawn_both", "drawn_digit", "frechet", "drawn_semantics")
PICTURES = {"curves": "ablation_codes.png", "drawings": "ablation_codes_drawings.png"}


def train(output_dir: Path, seeds: list[int], jobs: int) -> None:
    """Train what is missing: a process for each seed, `jobs` at a time, one thread each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    (output_dir / "logs").mkdir(parents=True, exist_ok=True)

    def run(name: str, script: str, *options: str) -> None:
        log = output_dir / "logs" / f"{name}.log"
        command = [sys.executable, str(HERE / script), "--output_dir", str(output_dir), *options]
        with log.open("w") as stream:
            result = subprocess.run(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        if result.returncode:
            raise RuntimeError(f"{name} failed; its log, {log}, ends:\n{log.read_text()[-2000:]}")
        print(f"{name} is finished.", flush=True)

    # What all seeds share; two processes would both make it.
    run("judge", "teacher.py", "--judge_only")
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda seed: run(f"codes-{seed}", "train_codes.py", "--seed", str(seed)), seeds))


def load(output_dir: Path) -> dict[str, dict[int, dict]]:
    """The finished runs, by variant and seed."""
    return {variant: load_runs(output_dir, f"codes-{variant}") for variant in TITLES}


def values_of(runs: dict[int, dict], name: str, moment: str = "best") -> dict[int, float]:
    """A metric by seed, at the lowest validation loss (`best`) or the end (`last`), or of the `tokenizer`."""
    measured = {
        seed: run[moment] if moment == "tokenizer" else run[TASK_OF[name]][moment] for seed, run in runs.items()
    }
    return {seed: METRICS[name][1] * values[name] for seed, values in measured.items() if name in values}


def write_tables(output_dir: Path) -> str:
    """What the models reach, the difference to both kinds of codes, and how long they were trained, as Markdown."""
    runs = load(output_dir)
    sections = []
    for title, metrics in (("Understanding", UNDERSTANDING), ("Generation", GENERATION)):
        rows = [
            [
                f"{TITLES[variant]}, {moment}",
                str(len(own)),
                *(mean_and_spread(values_of(own, name, moment), metrics[name][2]) for name in metrics),
            ]
            for variant, own in runs.items()
            for moment in ("best", "last")
        ]
        if metrics is GENERATION:
            codes = {seed: run for own in runs.values() for seed, run in own.items()}
            limits = [mean_and_spread(values_of(codes, name, "tokenizer"), metrics[name][2]) for name in metrics]
            rows.append(["codes of held-out pictures", str(len(codes)), *limits])
        header = ["", "seeds", *(shown for shown, _, _ in metrics.values())]
        sections += [
            f"{title}, mean ± standard deviation where there are several seeds:",
            markdown_table(header, rows),
        ]
    rows = [
        [
            TITLES[variant],
            *(
                difference(values_of(own, name), values_of(runs[REFERENCE], name), METRICS[name][2])
                for name in METRICS
            ),
        ]
        for variant, own in runs.items()
        if variant != REFERENCE
    ]
    if max(map(len, runs.values())) > 1:
        # Of one seed it would show nothing that the tables above do not.
        sections += [
            f"The difference from “{TITLES[REFERENCE]}” of the same seed at the best, mean (lowest to highest), bold "
            "where all seeds agree in sign:",
            markdown_table(["", *(shown for shown, _, _ in METRICS.values())], rows),
        ]
    sections += [
        "Steps to the lowest validation loss (best) and to the last plateau (last), and processor time, by seed:",
        markdown_table(["", "best step", "last step", "plateau reached", "minutes of a core"], training_rows(runs)),
    ]
    return "\n\n".join(sections)


def training_rows(runs: dict[str, dict[int, dict]]) -> list[list[str]]:
    rows = []
    for task in ("understanding", "generation"):
        for variant, own in runs.items():
            cells = [
                [str(run["best_step"]), str(run["last_step"]), "yes" if run["converged"] else "no"]
                + [f"{run['core_seconds'] / 60:.1f}"]
                for run in (trained[task] for trained in own.values())
            ]
            columns = list(zip(*cells)) or [[]] * 4
            rows.append([f"{task}, {TITLES[variant]}", *(", ".join(column) or "–" for column in columns)])
    return rows


def plot_curves(output_dir: Path) -> Figure:
    """Held-out metrics against steps, a line for each seed, a point where its validation loss is lowest."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    for axis, name in zip(figure.subplots(2, 3).flat, CURVES):
        shown, factor = METRICS[name][:2]
        for color, (variant, own) in enumerate(load(output_dir).items()):
            for run in (trained[TASK_OF[name]] for trained in own.values()):
                points = [(point["step"], factor * point[name]) for point in run["curve"] if name in point]
                if points:
                    axis.plot(*zip(*points), color=f"C{color}", linewidth=1, alpha=0.8)
                    best = [point for point in points if point[0] == run["best_step"]]
                    axis.plot(*zip(*best), "o", color=f"C{color}", markersize=4)
            axis.plot([], [], color=f"C{color}", label=TITLES[variant])
        axis.set_title(shown, fontsize=9)
        axis.set_xlabel("steps", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    return figure


def plot_drawings(output_dir: Path) -> Figure:
    """What the first seed's models with pixel codes drew, a column for each digit and a row for each photograph."""
    paths = {variant: sorted((output_dir / "runs").glob(f"codes-{variant}-seed*.png")) for variant in TITLES}
    shown = {variant: found[0] for variant, found in paths.items() if found}
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    for axis, (variant, path) in zip(figure.subplots(1, max(1, len(shown)), squeeze=False)[0], shown.items()):
        axis.imshow(np.asarray(Image.open(path)), interpolation="nearest")
        axis.set_title(TITLES[variant], fontsize=9)
        axis.axis("off")
    return figure


def write_report(output_dir: Path, page: Path | None = None) -> str:
    """The tables and the pictures, into the output folder and, if given, a page."""
    tables = write_tables(output_dir)
    figures = {PICTURES["curves"]: plot_curves(output_dir), PICTURES["drawings"]: plot_drawings(output_dir)}
    for folder in [output_dir] if page is None else [output_dir, page.parent / "images"]:
        folder.mkdir(exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(folder / name, dpi=110)
    links = {
        "Learning curves on held-out pictures": PICTURES["curves"],
        "Drawings of the first seed": PICTURES["drawings"],
    }
    lines = [f"![{title}]({{folder}}{name})" for title, name in links.items()]
    text = "\n\n".join([tables, *lines])
    (output_dir / "codes.md").write_text(f"# Both kinds of codes\n\n{text.format(folder='')}\n")
    if page is not None:
        fill_page(page, "codes", text.format(folder="images/"))
    return tables


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one thread each")
    parser.add_argument("--page", type=Path, help="page to put the tables and the pictures into")
    parser.add_argument("--report_only", action="store_true", help="report what is finished, and train nothing")
    arguments = parser.parse_args(argv)
    if not arguments.report_only:
        train(arguments.output_dir, arguments.seeds, arguments.jobs)
    print(write_report(arguments.output_dir, arguments.page))


if __name__ == "__main__":
    main()
