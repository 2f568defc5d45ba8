"""Drawing 384 px images with the full-size unified model on one GPU: seconds an image beside the floor.

    python benchmarks/gpu_generation.py --output gpu.json      # an H100: 5 minutes
    python benchmarks/gpu_generation.py --small                # the same on a CPU with a tiny model: under a minute

The paper's 3B-384 (Qwen2.5-3B, two heads of 258 M parameters, 729 positions of 2 x 8 codes) with random weights, in
bfloat16, with guidance: every image is two rows. An image here is its codes; decoding them is the tokenizer's work.

    fast      `generate` with `cache_implementation="static"`, at growing numbers of prompts
    fast, CPU generator      the same, with the noise drawn on the host
    compiled  the same with a `compile_config`, only with --compile
    eager     the same with `cache_implementation="dynamic"`
    VILA-U style, Janus style      the loops of `naive/`, with the same weights. A number of positions (--positions)
              in the middle of an image is timed and extrapolated to a whole one

The floor of a position is the time to read the weights it needs once, at the bandwidth that a large copy reaches:
the language model without its embeddings, projector and both heads. Waits are how often the host waits for the GPU,
an image or (of the loops) its positions. Before anything is timed the most probable codes of all four are compared: on
this device at small size in float32, where they must agree (with --small it is an error if they do not), and at full
size in bfloat16, where rounding may part them: the equal share is noted.

Times are medians after a warm-up. What fails is noted and leaves the others. The table is printed last, and written to
--output as JSON as it grows. Needs torch and transformers; the package need not be installed: PYTHONPATH=src.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from generation_models import draw_image, make_prompts, spread_weights
from gpu_device import Device, Report
from naive.generation import JanusLoop, VilaULoop
from unified_models import full_size_config, small_config

from transformers_dualtoken.modeling_dualtoken import DualTokenForCausalLM


COLUMNS = ("case", "images", "ms a position", "times the floor", "s an image", "images/s", "gain", "peak GiB", "waits")
CACHES = {"fast": "static", "fast, CPU generator": "static", "compiled": "static", "eager": "dynamic"}
LOOPS = {"VILA-U style": VilaULoop, "Janus style": JanusLoop}
PROMPT, GUIDANCE = 21, 3.0
# Of the grid on which codes are compared.
CHECKED_SIDE = 4


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[*CACHES, *LOOPS], help="default: all but what needs --compile")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16], help="default: %(default)s")
    parser.add_argument("--positions", type=int, default=32, help="of the naive loops (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=8, help="begin nothing new after that (default %(default)s)")
    parser.add_argument("--compile", action="store_true", help="`generate` with a compile_config as well")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    parser.add_argument("--small", action="store_true", help="a tiny model on the CPU, in float32")
    args = parser.parse_args()
    if args.small:
        args.batches, args.positions, args.repeats = [1, 2, 4], 4, 2
    return args


def make_model(device: Device, small: bool) -> DualTokenForCausalLM:
    config = small_config(image_size=32) if small else full_size_config()
    with device.device:
        model = DualTokenForCausalLM._from_config(config, dtype=torch.float32 if small else torch.bfloat16)
    spread_weights(model)
    return model.eval().requires_grad_(False)


def settings_of(case: str, do_sample: bool = True) -> dict:
    """Of `generate`, for one of `CACHES`."""
    settings = {"cache_implementation": CACHES[case], "guidance_scale": GUIDANCE, "image_do_sample": do_sample}
    if case == "fast, CPU generator":
        settings["generator"] = torch.Generator().manual_seed(0)
    if case == "compiled":
        settings["compile_config"] = transformers.CompileConfig()
    return settings


def equal_shares(model, cases) -> dict:
    """The share of the most probable codes of a small image that are those of the fast path, by case."""
    prompts = make_prompts(model.config, 2, PROMPT, model.device)
    expected = draw_image(model, prompts, CHECKED_SIDE, **settings_of("fast", do_sample=False))
    assert expected.flatten(0, 2).unique(dim=0).shape[0] > 1, "All positions have the same codes: nothing is compared."
    shares = {}
    for case in cases:
        if case in CACHES:
            codes = draw_image(model, prompts, CHECKED_SIDE, **settings_of(case, do_sample=False))
        else:
            codes = LOOPS[case](model, GUIDANCE, do_sample=False).generate(prompts, num_positions=CHECKED_SIDE**2)
        shares[case] = (codes == expected).float().mean().item()
    return shares


def weight_bytes(model) -> int:
    """What a position reads of the weights at least: each once, and of the embeddings next to nothing."""
    read = [model.model.language_model, model.model.visual_projector, model.depth_heads]
    embeddings = model.get_input_embeddings().weight
    return sum(
        parameter.numel() * parameter.element_size()
        for module in read
        for parameter in module.parameters()
        if parameter is not embeddings
    )


class GenerationReport(Report):
    """The rows of the table, which is printed at the end."""

    def __init__(self, args, device: Device, model):
        self.bandwidth, self.product = device.copy_bandwidth(), device.product_flops()
        self.num_positions, self.weight_bytes = model.config.num_positions, weight_bytes(model)
        self.floor = self.weight_bytes / self.bandwidth
        super().__init__(
            args.output,
            device,
            COLUMNS,
            dtype=str(model.dtype).removeprefix("torch."),
            num_positions=self.num_positions,
            copy_bandwidth=self.bandwidth,
            product_tflops=self.product / 1e12,
            weight_bytes=self.weight_bytes,
            floor_seconds=self.floor,
        )

    def add(self, case, rows, seconds, peak_gib, waits):
        """A row of the table, of `rows` images in `seconds` together."""
        first = self.seconds(case)
        self.results.append(
            {
                "case": case,
                "rows": rows,
                "seconds": seconds,
                "seconds_a_position": seconds / self.num_positions,
                "images_a_second": rows / seconds,
                "gain": rows / seconds * first if first else None,
                "peak_gib": peak_gib,
                "waits": waits,
            }
        )
        print(f"{case}, {rows} images: {seconds:.3f} s", file=sys.stderr, flush=True)
        self.write()

    def seconds(self, case, rows=1):
        return next((row["seconds"] for row in self.results if (row["case"], row["rows"]) == (case, rows)), None)

    def close(self):
        for case in LOOPS:
            if self.seconds(case) and self.seconds("fast"):
                self.note(f"{case} takes {self.seconds(case) / self.seconds('fast'):.1f} times as long as fast.")
        self.print_machine()
        print(
            f"{self.machine['dtype']}, {self.num_positions} positions; a large copy runs at "
            f"{self.bandwidth / 1e12:.2f} TB/s, a large bfloat16 product at {self.product / 1e12:.0f} TFLOP/s"
        )
        print(
            f"floor: {self.weight_bytes / 1e9:.2f} GB of weights a position, {1e3 * self.floor:.2f} ms, "
            f"{self.floor * self.num_positions:.2f} s an image\n"
        )
        self.print_notes()
        self.print_head()
        for row in self.results:
            position = row["seconds_a_position"]
            times = [(1e3 * position, ".2f"), (position / self.floor, ".2f"), (row["seconds"], ".3f")]
            others = [(row["gain"], ".2f"), (row["peak_gib"], ".1f"), (row["waits"], "d")]
            self.print_row(row["case"], str(row["rows"]), *times, (row["images_a_second"], ".3f"), *others)


def count_replays(run) -> int:
    """How many CUDA graphs are replayed."""
    count, replay = 0, torch.cuda.CUDAGraph.replay

    def counted(graph):
        nonlocal count
        count += 1
        replay(graph)

    torch.cuda.CUDAGraph.replay = counted
    try:
        run()
    finally:
        torch.cuda.CUDAGraph.replay = replay
    return count


def time_ours(case, model, args, device: Device, report: GenerationReport, deadline):
    """Whole images at growing numbers of prompts; on the eager path of one prompt only."""
    for rows in [1] if case == "eager" else args.batches:
        if time.monotonic() > deadline:
            report.note(f"{case}: the time was up before {rows} images.")
            return
        prompts = make_prompts(model.config, rows, PROMPT, device.device)
        run = partial(draw_image, model, prompts, **settings_of(case))
        try:
            # The first run is the warm-up too: it captures or compiles what there is.
            peak_gib = device.peak_gib(run)
            seconds = device.seconds(run, args.repeats, 15.0)
            waits = device.count_waits(run)
            replays = count_replays(run) if device.device.type == "cuda" and case != "eager" else None
        except (torch.cuda.OutOfMemoryError, ValueError) as error:
            report.note(f"{case}: {rows} images do not fit ({error}).")
            return
        if replays == 0:
            report.note(f"{case}: NO GRAPH was replayed with {rows} images. This row is eager.")
        report.add(case, rows, seconds, peak_gib, waits)


def time_loop(case, model, args, device: Device, report: GenerationReport):
    """Some positions in the middle of an image of one prompt, extrapolated to a whole one with its prompt read."""
    loop, count = LOOPS[case](model, GUIDANCE), args.positions
    prompt = make_prompts(model.config, 1, PROMPT, device.device)
    middle = make_prompts(model.config, 1, PROMPT + (model.config.num_positions - count) // 2, device.device)
    loop.start(prompt)
    prompt_seconds = device.seconds(lambda: loop.start(prompt), args.repeats, 5.0)
    loop.start(middle)
    loop.step()
    positions = [device.seconds(loop.step, 1, 1.0) for _ in range(count)]
    loop.start(middle)
    waits = device.count_waits(loop.step)
    loop.start(middle)
    peak_gib = device.peak_gib(loop.step)
    seconds = prompt_seconds + model.config.num_positions * statistics.median(positions)
    report.add(case, 1, seconds, peak_gib, None if waits is None else waits * model.config.num_positions)
    report.note(f"{case}: extrapolated from {count} positions.")


def check(name, model, cases, report: GenerationReport, must_agree: bool) -> None:
    shares = equal_shares(model, cases)
    report.note(
        f"{name}: the most probable codes of {CHECKED_SIDE**2} positions that are the fast path's: "
        + ", ".join(f"{case} {100 * share:.1f} %" for case, share in shares.items())
    )
    parted = [case for case, share in shares.items() if share < 1]
    if must_agree and parted:
        raise AssertionError(f"{name}: other codes than the fast path's by {', '.join(parted)}.")


def main():
    args = parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    device = Device(args.small)
    cases = [case for case in args.cases if case != "compiled" or args.compile]
    small_model = make_model(device, small=True)
    model = small_model if args.small else make_model(device, small=False)
    report = GenerationReport(args, device, model)
    jobs = {"float32, small": lambda: check("float32, small", small_model, cases, report, must_agree=True)}
    if not args.small:
        jobs["bfloat16"] = lambda: check("bfloat16, full size", model, cases, report, must_agree=False)
    for case in cases:
        if case in CACHES:
            jobs[case] = lambda c=case: time_ours(c, model, args, device, report, deadline)
        else:
            jobs[case] = lambda c=case: time_loop(c, model, args, device, report)
    failed = False
    for name, job in jobs.items():
        if time.monotonic() > deadline:
            report.note(f"{name}: the time was up.")
            continue
        try:
            job()
        except Exception as error:
            # The other cases stand; what failed is named in the results.
            report.note(f"{name} failed: {type(error).__name__}: {error}"[:500])
            failed = True
        device.free()
    report.close()
    return 1 if not report.results or (args.small and failed) else 0


if __name__ == "__main__":
    sys.exit(main())
