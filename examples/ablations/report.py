"""
Run the ablations' variants, and put their tables and plots beside the paper's.

    python examples/ablations/report.py --output_dir ablations --page docs/ablations.md

trains nothing: it writes `<experiment>.md` and `ablation_<experiment>.png` of what is finished in the output folder,
and with `--page` puts them into a page, between the page's markers and into `images/` beside it. `ablate_objectives.py`
and `ablate_pixel_layer.py` train first.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from transformers_dualtoken.optional_libraries import needed_libraries


with needed_libraries("The ablation"):
    from matplotlib.figure import Figure


HERE = Path(__file__).parent
# Name, how it is shown, number of decimals, and whether more is better.
METRICS = {
    "zero_shot": ("zero-shot top-1, %", 1, True),
    "psnr": ("PSNR, dB", 2, True),
    "ssim": ("SSIM", 3, True),
    "frechet": ("Fréchet distance", 1, False),
}


@dataclass
class Variant:
    """A row: the run's name, its title, and the paper's numbers as printed; its Fréchet distance is its rFID."""

    run: str
    title: str
    paper_title: str | None = None
    paper: dict[str, str] | None = None


@dataclass
class Experiment:
    """Variants compared with one of them, the reference."""

    title: str
    reference: str
    variants: list[Variant]


EXPERIMENTS = {
    "objectives": Experiment(
        "Where the two losses act",
        "dual-2",
        [
            Variant(
                "one-4",
                "one deep codebook, both losses",
                "one deep codebook, both losses",
                {"zero_shot": "72.3", "frechet": "3.86", "psnr": "12.64", "ssim": "0.574"},
            ),
            Variant("one-8", "the same, twice the depths"),
            Variant(
                "reconstruction-7",
                "reconstruction only, deep",
                "reconstruction only, deep",
                {"frechet": "0.27", "psnr": "27.88", "ssim": "0.722"},
            ),
            Variant(
                "reconstruction-2",
                "reconstruction only, shallow",
                "reconstruction only, shallow",
                {"frechet": "0.29", "psnr": "28.12", "ssim": "0.745"},
            ),
            Variant(
                "dual-2",
                "dual: shallow pixels, deep semantics",
                "dual: shallow pixels, deep semantics",
                {"zero_shot": "82.0", "frechet": "0.25", "psnr": "28.69", "ssim": "0.744"},
            ),
        ],
    ),
    "pixel_layer": Experiment(
        "The layer of the pixel codes",
        "dual-2",
        [
            Variant("dual-2", "layer 2 of 8", "layer 6 of 24", {"zero_shot": "80.4", "frechet": "0.72"}),
            Variant("dual-4", "layer 4 of 8", "layer 12 of 24", {"zero_shot": "77.6", "frechet": "1.09"}),
            Variant("dual-6", "layer 6 of 8", "layer 18 of 24", {"zero_shot": "72.9", "frechet": "2.93"}),
        ],
    ),
}


def run_variants(output_dir: Path, variants: list[str], seeds: list[int], jobs: int) -> None:
    """
    Train what is not finished yet: `jobs` processes at a time, each on one thread, a seed's teacher before its variants.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    (output_dir / "logs").mkdir(parents=True, exist_ok=True)
    total, started, done = len(seeds) * (len(variants) + 1), time.monotonic(), []

    def run(name: str, script: str, *options: str) -> None:
        log = output_dir / "logs" / f"{name}.log"
        command = [sys.executable, str(HERE / script), "--output_dir", str(output_dir), *options]
        with log.open("w") as stream:
            result = subprocess.run(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        if result.returncode:
            raise RuntimeError(f"{name} failed; its log, {log}, ends:\n{log.read_text()[-2000:]}")
        done.append(name)
        print(f"[{len(done)}/{total}] {name}, {time.monotonic() - started:.0f} s", flush=True)

    def run_variant(teacher, variant: str, seed: int) -> None:
        teacher.result()
        run(f"{variant}-seed{seed}", "train_variant.py", "--variant", variant, "--seed", str(seed))

    # What all seeds share; two processes would both make it.
    run("judge", "teacher.py", "--judge_only")
    done.clear()
    with ThreadPoolExecutor(jobs) as pool:
        # Submitted first, so that no variant can wait for a teacher that has no thread.
        teachers = {seed: pool.submit(run, f"teacher-{seed}", "teacher.py", "--seed", str(seed)) for seed in seeds}
        runs = [pool.submit(run_variant, teachers[seed], variant, seed) for seed in seeds for variant in variants]
        try:
            for future in [*teachers.values(), *runs]:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def load_runs(output_dir: Path, variant: str) -> dict[int, dict]:
    """The finished runs of a variant, by seed."""
    runs = [json.loads(path.read_text()) for path in sorted((output_dir / "runs").glob(f"{variant}-seed*.json"))]
    return {run["settings"]["seed"]: run for run in runs}


def values_of(runs: dict[int, dict], metric: str) -> dict[int, float]:
    """A metric by seed, accuracies in percent; empty where a variant has no such number."""
    factor = 100 if metric in ("zero_shot", "teacher_zero_shot") else 1
    return {seed: factor * run["metrics"][metric] for seed, run in runs.items() if metric in run["metrics"]}


def mean_and_spread(values: dict[int, float], decimals: int) -> str:
    """`mean ± standard deviation` over the seeds (of a sample: divided by n - 1)."""
    if not values:
        return "–"
    numbers = list(values.values())
    spread = f" ± {np.std(numbers, ddof=1):.{decimals}f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):.{decimals}f}{spread}"


def difference(values: dict[int, float], reference: dict[int, float], decimals: int) -> str:
    """`mean (lowest to highest)` of the seeds' differences, bold where all have one sign."""
    differences = [values[seed] - reference[seed] for seed in values if seed in reference]
    if not differences:
        return "–"
    low, high = min(differences), max(differences)
    text = f"{np.mean(differences):+.{decimals}f} ({low:+.{decimals}f} to {high:+.{decimals}f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    align = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, align, *rows])


def write_tables(output_dir: Path, experiment: Experiment) -> str:
    """Ours, the differences to the reference, and the paper's, as Markdown."""
    runs = {variant.run: load_runs(output_dir, variant.run) for variant in experiment.variants}
    shown = [title for title, _, _ in METRICS.values()]
    ours, differences = [], []
    for variant in experiment.variants:
        own = runs[variant.run]
        cells = [mean_and_spread(values_of(own, name), decimals) for name, (_, decimals, _) in METRICS.items()]
        bits = next((f"{run['metrics']['bits']:.0f}" for run in own.values()), "–")
        ours.append([variant.title, bits, str(len(own)), *cells])
        if variant.run != experiment.reference:
            compared = [
                difference(values_of(own, name), values_of(runs[experiment.reference], name), decimals)
                for name, (_, decimals, _) in METRICS.items()
            ]
            differences.append([variant.title, *compared])
    paper = [
        [variant.paper_title, *(variant.paper.get(name, "–") for name in METRICS)]
        for variant in experiment.variants
        if variant.paper
    ]
    reference_title = next(v.title for v in experiment.variants if v.run == experiment.reference)
    teachers = mean_and_spread(values_of(runs[experiment.reference], "teacher_zero_shot"), 1)
    return "\n\n".join(
        [
            "Ours, mean ± standard deviation over the seeds:",
            markdown_table(["", "bits a position", "seeds", *shown], ours),
            f"The teachers themselves, unquantised, reach {teachers} % zero-shot.",
            f"The difference from “{reference_title}” of the same seed, mean (lowest to highest), bold where all seeds "
            "agree in sign:",
            markdown_table(["", *shown], differences),
            "The paper's (ImageNet; rFID on Inception features):",
            markdown_table(["", *shown[:-1], "rFID"], paper),
        ]
    )


def plot(output_dir: Path, experiment: Experiment) -> Figure:
    """A column for each metric: ours with a point for each seed, mean and standard deviation; below, the paper's."""
    figure = Figure(figsize=(11, 1.6 + 0.62 * len(experiment.variants)), layout="constrained")
    figure.suptitle(experiment.title)
    axes = figure.subplots(2, len(METRICS), sharey="row")
    own = experiment.variants[::-1]
    papers = [variant for variant in own if variant.paper]
    for column, (name, (title, _, more_is_better)) in enumerate(METRICS.items()):
        top, bottom = axes[:, column]
        for row, variant in enumerate(own):
            values = list(values_of(load_runs(output_dir, variant.run), name).values())
            if values:
                top.plot(values, [row] * len(values), ".", color="0.65", zorder=1)
                spread = np.std(values, ddof=1) if len(values) > 1 else 0
                top.errorbar(np.mean(values), row, xerr=spread, fmt="o", color="C0", capsize=3)
        for row, variant in enumerate(papers):
            if name in variant.paper:
                bottom.plot(float(variant.paper[name]), row, "s", color="C1")
        top.set_title(f"{title} {'→' if more_is_better else '←'} better", fontsize=9)
        bottom.set_title("rFID" if name == "frechet" else title, fontsize=9)
        for axis, rows in ((top, own), (bottom, papers)):
            titles = [variant.title if rows is own else variant.paper_title for variant in rows]
            axis.set_yticks(range(len(rows)), titles, fontsize=8)
            axis.set_ylim(-0.6, len(rows) - 0.4)
            axis.margins(x=0.15)
            axis.grid(axis="x", alpha=0.3)
            axis.tick_params(axis="x", labelsize=8)
        if not any(name in variant.paper for variant in papers):
            bottom.set_xticks([])
            bottom.text(0.5, 0.5, "not given", transform=bottom.transAxes, ha="center", va="center", color="0.5")
    axes[0, 0].set_ylabel("ours")
    axes[1, 0].set_ylabel("the paper's")
    return figure


def fill_page(page: Path, name: str, text: str) -> None:
    """Put text between `<!-- name -->` and `<!-- end of name -->` of a page."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    content = page.read_text()
    if content.count(start) != 1 or content.count(end) != 1:
        raise ValueError(f"{page} must hold the markers {start} and {end} once each.")
    block = f"{start}\n\n{text}\n\n{end}"
    page.write_text(re.sub(f"{re.escape(start)}.*{re.escape(end)}", lambda _: block, content, flags=re.DOTALL))


def write_report(output_dir: Path, name: str, page: Path | None = None) -> str:
    """The tables and the plot of an experiment, into the output folder and, if given, a page."""
    experiment = EXPERIMENTS[name]
    tables, picture = write_tables(output_dir, experiment), f"ablation_{name}.png"
    (output_dir / f"{name}.md").write_text(f"# {experiment.title}\n\n{tables}\n\n![{experiment.title}]({picture})\n")
    figure = plot(output_dir, experiment)
    figure.savefig(output_dir / picture, dpi=110)
    if page is not None:
        (page.parent / "images").mkdir(exist_ok=True)
        figure.savefig(page.parent / "images" / picture, dpi=110)
        fill_page(page, name, f"{tables}\n\n![{experiment.title}: ours above, the paper's below](images/{picture})")
    return tables


def experiment_main(name: str, description: str, argv: list[str] | None = None) -> None:
    """The command of an experiment: train what is missing, then report."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one thread each")
    parser.add_argument("--page", type=Path, help="page to put the tables and the plot into")
    arguments = parser.parse_args(argv)
    variants = [variant.run for variant in EXPERIMENTS[name].variants]
    run_variants(arguments.output_dir, variants, arguments.seeds, arguments.jobs)
    print(write_report(arguments.output_dir, name, arguments.page))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--page", type=Path, help="page to put the tables and the plots into")
    arguments = parser.parse_args()
    for experiment_name in EXPERIMENTS:
        print(f"{write_report(arguments.output_dir, experiment_name, arguments.page)}\n")
