"""Packed against padded batches on samples of mixed length: tokens a second, and padding.

    python benchmarks/bench_packing.py            # ten minutes, 3 GB
    python benchmarks/bench_packing.py --small    # seconds

Of the samples 60 % are text chats of 50 to 400 tokens, 30 % hold one picture and 20 to 200 tokens of text, and 10 % two
to four pictures, each with 10 to 60 tokens of text. A picture takes 64 positions, where the paper's take 729 and text
is as it is here: lengths vary more there. Batches are made in three ways:

    padded      one row a sample, padded to the batch's longest
    grouped     likewise, of samples of like length, as `train_sampling_strategy="group_by_length"` orders them
    packed      samples share rows of at most --packed-length tokens; the same samples as padded

A packed batch must have the loss and the gradients of the padded one, which is checked first. A miniature with random
weights is trained (forward and backward) on one CPU thread, with SDPA. Padding is of all samples, times are the
processor's for a few batches, medians over rounds that run all ways in turn.
"""

import argparse
import time

import torch
from common import alternating_medians, print_machine, relative_error
from transformers.trainer_pt_utils import LengthGroupedSampler
from unified_models import small_config

from transformers_dualtoken.modeling_dualtoken import DualTokenForCausalLM
from transformers_dualtoken.training import DualTokenDataCollator


WAYS = ("padded", "grouped", "packed")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=3200, help="default %(default)s")
    parser.add_argument("--batch", type=int, default=16, help="samples of a batch (default %(default)s)")
    parser.add_argument("--batches", type=int, default=4, help="timed batches of each way (default %(default)s)")
    parser.add_argument("--packed-length", type=int, default=512, help="default %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds (default %(default)s)")
    parser.add_argument("--small", action="store_true", help="two batches of 8, one round")
    args = parser.parse_args()
    if args.small:
        args.samples, args.batch, args.batches, args.repeats = 80, 8, 2, 1
    return args


def make_samples(config, count):
    """Samples with precomputed codes; questions are context, answers and drawn pictures are targets."""
    generator = torch.Generator().manual_seed(0)
    start, image, end = config.special_image_token_ids
    picture = torch.tensor([start, *[image] * config.num_positions, end])
    grid = config.vision_tokenizer_config.grid_size

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    def words(low, high):
        return torch.randint(1, start, (draw(low, high),), generator=generator)

    samples = []
    for index in torch.randperm(count, generator=generator).tolist():
        kind = index % 10
        if kind < 6:
            num_images, chat = 0, words(50, 400)
            parts = [(chat[: len(chat) // 3], False), (chat[len(chat) // 3 :], True)]
        elif kind < 9:
            # Drawn, or asked about.
            num_images, text = 1, words(20, 200)
            parts = [(text, False), (picture, True)] if index % 20 < 10 else [(picture, False), (text, True)]
        else:
            num_images = draw(2, 4)
            parts = [part for _ in range(num_images) for part in ((words(10, 60), False), (picture, True))]
        ids = torch.cat([part for part, _ in parts])
        labels = torch.cat([part if is_target else torch.full_like(part, -100) for part, is_target in parts])
        samples.append({"input_ids": ids, "labels": labels})
        if num_images:
            shape = (num_images, grid, grid, config.num_depths)
            for name in ("pixel_codes", "semantic_codes"):
                samples[-1][name] = torch.randint(config.codebook_size, shape, generator=generator)
    return samples


def make_batches(args, samples):
    """Way -> all batches, as the collator is given them."""
    lengths = [len(sample["input_ids"]) for sample in samples]
    grouped = list(LengthGroupedSampler(args.batch, lengths=lengths, generator=torch.Generator().manual_seed(0)))
    orders = {"padded": range(len(samples)), "grouped": grouped, "packed": range(len(samples))}
    return {
        way: [[samples[i] for i in order[first : first + args.batch]] for first in range(0, len(order), args.batch)]
        for way, order in orders.items()
    }


def train(model, batch):
    """Summed loss terms of a batch, so that batches add up; the gradients lie in `.grad`."""
    loss = model(**batch, num_items_in_batch=(1, 1)).loss
    loss.backward()
    return loss.detach()


def check_equality(model, samples, collators):
    results = {}
    for way in ("padded", "packed"):
        model.zero_grad()
        loss = train(model, collators[way](samples))
        results[way] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None} | {
            "loss": loss
        }
    errors = {name: relative_error(value, results["padded"][name]) for name, value in results["packed"].items()}
    worst = max(errors, key=errors.get)
    assert errors[worst] < 1e-4, f"{worst} differs by {errors[worst]:.1e} of its largest value."
    return errors[worst]


def main():
    args = parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # As in the paper's 3B-384, a text target costs a tenth of what a position does, and a visual target a quarter.
    config = small_config(width=256, layers=8, head_width=96)
    model = DualTokenForCausalLM(config).train()
    samples = make_samples(config, args.samples)
    packing = DualTokenDataCollator(pad_token_id=0, packed_length=args.packed_length)
    collators = {"padded": DualTokenDataCollator(pad_token_id=0), "packed": packing}
    collators["grouped"] = collators["padded"]
    error = check_equality(model, samples[: args.batch], collators)

    batches = make_batches(args, samples)
    padding, timed, tokens = {}, {}, {}
    for way in WAYS:
        shapes = [collators[way](batch)["input_ids"].numel() for batch in batches[way]]
        padding[way] = 1 - sum(len(sample["input_ids"]) for sample in samples) / sum(shapes)
        # Spread evenly: a grouped order goes from long to short again and again.
        chosen = [batches[way][i * len(batches[way]) // args.batches] for i in range(args.batches)]
        tokens[way] = sum(len(sample["input_ids"]) for batch in chosen for sample in batch)
        timed[way] = [collators[way](batch) for batch in chosen]

    def run(way):
        model.zero_grad()
        for batch in timed[way]:
            train(model, batch)

    seconds = alternating_medians({way: lambda way=way: run(way) for way in WAYS}, args.repeats, time.process_time)

    print_machine()
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples], dtype=torch.float32)
    print(
        f"{args.samples} samples of {lengths.min():.0f} to {lengths.max():.0f} tokens, {lengths.mean():.0f} on average,"
    )
    print(
        f"{args.batch} a batch, packed into rows of {args.packed_length}; {size / 1e6:.1f} M trained parameters; medians of"
    )
    print(f"{args.repeats}; loss and gradients equal to {error:.0e}\n")
    print(f"{'':12}{'padding':>10}{'tokens/s':>12}{'against padded':>17}")
    rates = {way: tokens[way] / seconds[way] for way in WAYS}
    for way in WAYS:
        ratio = rates[way] / rates["padded"]
        print(f"{way:12}{100 * padding[way]:>9.1f}%{rates[way]:>12.0f}{ratio:>17.2f}")


if __name__ == "__main__":
    main()
