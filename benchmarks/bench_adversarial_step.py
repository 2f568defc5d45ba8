"""Time and memory of the image terms with their adaptive weight: the trainer's against the usual two extra backwards.

    python benchmarks/bench_adversarial_step.py            # one image of 384 px: a minute or two, 3 GB
    python benchmarks/bench_adversarial_step.py --small    # seconds

From what goes into the decoder's last layer to its gradient; the tokenizer below it costs both the same. LPIPS is
stood for by its VGG16 with random weights, so that nothing has to be installed or downloaded. Times are medians of runs
that alternate in one process; the peak memory beyond the inputs is measured in a child process of its own for each
(VmHWM, Linux).
"""

import argparse
import json
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from common import (
    alternating_medians,
    print_head,
    print_machine,
    print_row,
    relative_error,
    run_child,
    transient_bytes,
)
from naive.adversarial_step import adversarial_backward
from torch import nn

from transformers_dualtoken.training import (
    STAGE_LOSS_WEIGHTS,
    DualTokenVisionTokenizerRecipe,
    DualTokenVisionTokenizerTrainer,
    PatchDiscriminator,
)


NAMES = ("usual", "ours")
WEIGHTS = STAGE_LOSS_WEIGHTS[1]


class Vgg16Distance(nn.Module):
    """Features of five layers, normalised, and their squared differences: LPIPS without its learned weights."""

    def __init__(self):
        super().__init__()
        self.stages, channels = nn.ModuleList(), 3
        for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            layers = [nn.MaxPool2d(2)] if len(self.stages) else []
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            self.stages.append(nn.Sequential(*layers))
        self.requires_grad_(False)

    def forward(self, first, second):
        distance = 0.0
        for stage in self.stages:
            first, second = stage(first), stage(second)
            units = [x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (first, second)]
            distance = distance + (units[0] - units[1]).square().sum(1).mean((1, 2))
        return distance


def make_inputs(size: int):
    torch.manual_seed(0)
    perceptual, discriminator = Vgg16Distance(), PatchDiscriminator()
    discriminator.main[5].weight.data.mul_(0.1)  # so that the adaptive weight lies within its bounds
    last_layer = nn.Conv2d(128, 3, 3, padding=1)
    features = torch.randn(1, 128, size, size, requires_grad=True)
    return features, last_layer, torch.rand(1, 3, size, size) * 2 - 1, perceptual, discriminator


def run(name, features, last_layer, target, perceptual, discriminator):
    """The gradient at `features`, and the adaptive weight."""
    features.grad = last_layer.weight.grad = last_layer.bias.grad = None
    if name == "usual":
        weight = adversarial_backward(features, last_layer, target, perceptual, discriminator, WEIGHTS)
    else:
        # The trainer's own method, on the few attributes that it reads.
        trainer = SimpleNamespace(
            loss_weights=WEIGHTS,
            recipe=DualTokenVisionTokenizerRecipe(loss_weights=WEIGHTS),
            accelerator=Accelerator(cpu=True),
            model=SimpleNamespace(decoder=SimpleNamespace(conv_out=last_layer)),
            perceptual_loss=perceptual,
            adversary=SimpleNamespace(generator_loss=lambda image: -discriminator(image).mean()),
            _last_input=features.detach(),
        )
        trainer.image_term = DualTokenVisionTokenizerTrainer.image_term.__get__(trainer)
        loss, terms = DualTokenVisionTokenizerTrainer.image_loss(trainer, last_layer(features), target, True)
        loss.backward()
        weight = terms["adaptive_weight"]
    discriminator.zero_grad()
    return features.grad, weight


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=384, help="of the image, in pixels (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default %(default)s)")
    parser.add_argument("--small", action="store_true", help="a fast run at 96 px")
    parser.add_argument("--child", choices=NAMES, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = 96 if args.small else args.size
    torch.set_num_threads(1)
    inputs = make_inputs(size)
    if args.child:
        print(json.dumps(transient_bytes(lambda: run(args.child, *inputs))))
        return

    gradients, weights = zip(
        *((gradient.clone(), weight) for gradient, weight in (run(name, *inputs) for name in NAMES))
    )
    errors = relative_error(gradients[1], gradients[0]), relative_error(weights[1], weights[0])
    if max(errors) > 1e-3:
        raise SystemExit(f"The two disagree: gradient by {errors[0]:.1e}, adaptive weight by {errors[1]:.1e}.")
    print_machine()
    print(f"image of {size} px, adaptive weight {float(weights[0]):.3f}; gradient differs by {errors[0]:.1e}\n")
    print_head(NAMES)
    seconds = alternating_medians({name: lambda name=name: run(name, *inputs) for name in NAMES}, args.repeats)
    print_row("image terms, forward and backward", [seconds[name] * 1000 for name in NAMES], "ms", 0)
    peaks = [run_child(__file__, "--size", size, "--child", name) for name in NAMES]
    print_row("peak memory", [peak / 1e6 for peak in peaks], "MB", 1)


if __name__ == "__main__":
    main()
