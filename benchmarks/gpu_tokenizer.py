"""The full-size vision tokenizer on one GPU: images a second, and the share of what the GPU's matrix units reach.

    python benchmarks/gpu_tokenizer.py --output gpu_tokenizer.json    # an H100; compiling takes most of ten minutes
    python benchmarks/gpu_tokenizer.py --small                        # the same on a CPU with a tiny tokenizer

The paper's 384 px tokenizer with random weights in bfloat16, 16 images at a time: encoding to both kinds of codes, the
same with all features, pixel codes alone, the residual search by itself (in float32), and decoding; called as they are
and compiled (`torch.compile`, one graph, modes reduce-overhead and max-autotune-no-cudagraphs); decoding also with the
weights of its convolutions channels-last. Every way is first compared with the plain call. Then the goals:
encoding and decoding at half of the measured matrix peak or more, the search a tenth of the encoding at most, pixel
codes 3.5 times as fast as both kinds. FLOPs are counted, not estimated: those of matrix products and convolutions, the
search as the one product it needs. Rows are printed as they are measured; when --minutes are up, nothing new begins.

TF32 is switched on (`torch.set_float32_matmul_precision("high")`), which changes no code; the search is also timed in
blocks, as where there is no Triton, with TF32 and without. Needs torch and transformers. Without diffusers there is no
image decoder, and only encoding is measured. The package need not be installed: PYTHONPATH=src.
"""

import argparse
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from bench_tokenizer import KINDS, latents_of, make_tokenizer, random_codes, random_images
from common import relative_error
from gpu_device import Device, Report
from torch.utils.flop_counter import FlopCounterMode

from transformers_dualtoken import DualTokenVisionTokenizer, code_search, vector_quantization


ENCODE_CALLS = {
    "encode": {"features": False},
    "encode, pixel codes alone": {"codes": ("pixel",), "features": False},
    "encode, all features": {},
}
# What every mode measures, the most wanted first: a compilation takes a minute or more.
STEPS = ("encode", "decode, channels-last", "encode, pixel codes alone", "decode", "encode, all features")
MODES = ("eager", "reduce-overhead", "max-autotune-no-cudagraphs")
COLUMNS = ("step", "mode", "ms", "images/s", "TFLOP/s", "of the product", "peak GiB")
GOALS = {"encode + decode, share of the product": 0.5, "search, share of encode": 0.1, "encode / pixel alone": 3.5}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16, help="images at a time (default %(default)s)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: all")
    parser.add_argument("--minutes", type=float, default=9, help="begin nothing new after that (default %(default)s)")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    parser.add_argument(
        "--small", action="store_true", help="a tiny tokenizer in float32 on the CPU, without Inductor"
    )
    args = parser.parse_args()
    if args.small:
        args.images, args.modes = 2, ["eager", "aot_eager"]
    return args


def psnr(image, reference):
    """Decibels, for the range that the reference has: random weights do not fill [-1, 1]."""
    error = (image.float() - reference.float()).square().mean().clamp(min=1e-20)
    return 20 * torch.log10(2 * reference.float().abs().max() / error.sqrt()).item()


def count_flops(config, images):
    """FLOPs of every step: of matrix products and convolutions on the meta device, and of the search's one product."""
    with torch.device("meta"):
        model = DualTokenVisionTokenizer(config).eval()
        pixel_values = torch.empty(images, 3, config.image_size, config.image_size)
        sums = torch.empty(images, config.num_positions, config.pixel_quantizer_config.code_dim)

    def count(function, *args, **kwargs):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            function(*args, **kwargs)
        return counter.get_total_flops()

    def search(kinds):
        quantizers = (model.quantizer(kind).config for kind in kinds)
        vectors = images * config.num_positions
        return sum(2 * vectors * each.num_depths * each.codebook_size * each.code_dim for each in quantizers)

    def no_search(vectors, codebook):
        return vectors.new_zeros(len(vectors), dtype=torch.long)

    flops = {"search of both kinds": search(KINDS), "the same in blocks": search(KINDS)}
    with (
        mock.patch.object(vector_quantization, "nearest_codes", no_search),
        mock.patch.object(DualTokenVisionTokenizer, "_check_pixel_values", lambda *args: None),
    ):
        for name, call in ENCODE_CALLS.items():
            flops[name] = count(model.encode, pixel_values, **call) + search(call.get("codes", KINDS))
    if hasattr(model.decoder, "conv_in"):
        flops["decode"] = flops["decode, channels-last"] = count(model.decode, pixel_quantized=sums)
    return flops


class Steps:
    """The model's calls, plain and compiled, on one batch."""

    def __init__(self, args, device: Device):
        self.device, self.model = device, make_tokenizer(args.small).to(device.device, device.dtype)
        self.pixel_values = random_images(self.model, args.images).to(device.device, device.dtype)
        self.codes = random_codes(self.model, args.images).to(device.device)
        self.has_decoder = hasattr(self.model.decoder, "conv_in")
        self.latents = latents_of(self.model, self.pixel_values)

    def function(self, step, mode):
        """A function without arguments."""
        is_decode = step.startswith("decode")
        layout = torch.channels_last if "channels-last" in step else torch.contiguous_format
        self.model.to(memory_format=layout)
        call = self.model.decode if is_decode else self.model.encode
        if mode != "eager":
            torch._dynamo.reset()
            options = {"backend": mode} if mode == "aot_eager" else {"mode": mode}
            call = torch.compile(call, fullgraph=True, dynamic=False, **options)
        if is_decode:
            return lambda: call(self.codes)
        return lambda: call(self.pixel_values, **ENCODE_CALLS[step])

    def search(self):
        return [self.model.quantizer(kind)(self.latents[kind]) for kind in KINDS]

    def check_search(self):
        """No chosen code is further than the nearest, in float64."""
        codebook = self.model.pixel_quantizer.codebook[0]
        vectors = self.latents["pixel"].float().flatten(0, 1)[:2048]
        codes = code_search.nearest_codes(vectors, codebook)
        distances = torch.cdist(vectors.double(), codebook.double()).square()
        gap = (distances.gather(1, codes[:, None])[:, 0] / distances.amin(1) - 1).max().item()
        assert gap < 1e-5, f"The search chose a code whose distance is {gap:.1e} above the least."

    def compare(self, step, output, reference):
        """Fails where a compiled call is not what the plain one gives; returns what to say of the difference."""
        if step.startswith("decode"):
            decibels = psnr(output.reconstruction, reference.reconstruction)
            assert decibels > 30, f"{step}: the images agree to {decibels:.1f} dB only."
            return f"images agree to {decibels:.1f} dB"
        tolerance = 5e-2 if self.device.dtype == torch.bfloat16 else 1e-3
        error = relative_error(output.pixel_hidden_state.float(), reference.pixel_hidden_state.float())
        assert error < tolerance, f"{step}: the hidden states of the pixel layer differ by {error:.1e}."
        first = (output.pixel_codes[..., 0] == reference.pixel_codes[..., 0]).float().mean().item()
        return f"hidden states differ by {error:.1e} of their range, {first:.1%} of the first codes are the same"


class TokenizerReport(Report):
    """The table, printed as it grows, and the goals."""

    def __init__(self, args, device: Device, flops):
        self.images, self.flops, self.product = args.images, flops, device.product_flops()
        copy = device.copy_bandwidth()
        super().__init__(
            args.output,
            device,
            COLUMNS,
            num_names=2,
            images=args.images,
            product_tflops=self.product / 1e12,
            copy_gb_per_second=copy / 1e9,
            flops=flops,
            goals={},
        )
        self.print_machine()
        print(
            f"{str(device.dtype).removeprefix('torch.')}, {args.images} images; a large product runs at "
            f"{self.product / 1e12:.1f} TFLOP/s, a copy at {copy / 1e9:.0f} GB/s"
        )
        self.print_head()

    def add(self, step, mode, seconds, peak_gib):
        rate, images = self.flops[step] / seconds, self.images / seconds
        self.results.append(
            {
                "step": step,
                "mode": mode,
                "seconds": seconds,
                "images_per_second": images,
                "tflops_per_second": rate / 1e12,
                "share_of_product": rate / self.product,
                "peak_gib": peak_gib,
            }
        )
        times = [(1e3 * seconds, ".2f"), (images, ".1f"), (rate / 1e12, ".2f"), (rate / self.product, ".1%")]
        self.print_row(step, mode, *times, (peak_gib, ".1f"))
        self.write()

    def seconds(self, *steps):
        """The least seconds of any of these steps in any mode; `None` if none was measured."""
        return min((result["seconds"] for result in self.results if result["step"] in steps), default=None)

    def close(self):
        """The goals, each from the fastest rows."""
        encode, pixel = self.seconds("encode"), self.seconds("encode, pixel codes alone")
        decode, search = self.seconds("decode", "decode, channels-last"), self.seconds("search of both kinds")
        reached = {}
        if encode and decode:
            rate = (self.flops["encode"] + self.flops["decode"]) / (encode + decode)
            reached["encode + decode, share of the product"] = rate / self.product
        if encode and search:
            reached["search, share of encode"] = search / encode
        if encode and pixel:
            reached["encode / pixel alone"] = encode / pixel
        print("\n| of the fastest rows | goal | measured |\n| --- | ---: | ---: |")
        for name, goal in GOALS.items():
            self.machine["goals"][name] = reached.get(name)
            sign = "≤" if name.startswith("search") else "≥"
            self.print_row(name, f"{sign} {goal}", (reached.get(name), ".3f"))
        print()
        self.print_notes()
        self.write()


def measure_search(steps, device: Device, report: TokenizerReport):
    steps.check_search()
    report.add("search of both kinds", "eager", device.seconds_in_a_row(steps.search), device.peak_gib(steps.search))
    width = steps.model.config.pixel_quantizer_config.code_dim
    is_fused = device.is_gpu and code_search.find_fused_search(steps.latents["pixel"].device, width) is not None
    report.note(f"The search of this device {'is one kernel' if is_fused else 'runs in blocks'}.")
    with mock.patch.object(vector_quantization, "nearest_codes", code_search.blocked_nearest_codes):
        report.add("the same in blocks", "eager", device.seconds_in_a_row(steps.search), device.peak_gib(steps.search))
        if device.is_gpu:
            torch.set_float32_matmul_precision("highest")
            report.note(
                f"The search in blocks takes {1e3 * device.seconds_in_a_row(steps.search):.2f} ms without TF32."
            )
            torch.set_float32_matmul_precision("high")


def measure_decoding_in_float32(steps, report: TokenizerReport):
    """How far the images of this dtype are from those of float32."""
    reference = steps.model.decode(steps.codes[:1]).reconstruction.float()
    exact = steps.model.to(torch.float32).decode(steps.codes[:1]).reconstruction
    steps.model.to(steps.device.dtype)
    report.note(f"Images decoded in bfloat16 agree with those of float32 to {psnr(reference, exact):.1f} dB.")


def measure_step(step, mode, steps, device: Device, report: TokenizerReport, references):
    function = steps.function(step, mode)
    output = function()
    if mode == "eager":
        references[step] = output
        if device.is_gpu:
            report.note(f"{step}: waits for the GPU {device.count_waits(function)} times, to look at its input.")
    else:
        report.note(f"{step}, {mode}: {steps.compare(step, output, references[step])}.")
    report.add(step, mode, device.seconds_in_a_row(function), device.peak_gib(function))


@torch.no_grad()
def main():
    args = parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    torch.set_float32_matmul_precision("high")
    device = Device(args.small)
    steps = Steps(args, device)
    report = TokenizerReport(args, device, count_flops(steps.model.config, args.images))
    measure_search(steps, device, report)
    if not steps.has_decoder:
        report.note("diffusers is not installed: there is no image decoder, only encoding is measured.")
    elif device.is_gpu:
        measure_decoding_in_float32(steps, report)
    references = {}
    for mode in ["eager", *(mode for mode in args.modes if mode != "eager")]:
        for step in STEPS:
            if step.startswith("decode") and not steps.has_decoder:
                continue
            if time.monotonic() > deadline:
                report.note(f"{step}, {mode}: the time was up.")
                continue
            try:
                measure_step(step, mode, steps, device, report, references)
            except Exception as error:
                # The other rows stand; what failed is named in the results.
                report.note(f"{step}, {mode} failed: {type(error).__name__}: {error}"[:500])
            device.free()
    report.close()
    return 0 if report.results else 1


if __name__ == "__main__":
    sys.exit(main())
