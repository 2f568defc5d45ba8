"""Which EMA rule makes the better codebook: `rq`, `rq_ema` with own vectors, or `rq_ema` with the final residual.

    python benchmarks/compare_ema_rules.py            # 3 seeds, about a minute on one CPU thread
    python benchmarks/compare_ema_rules.py --small    # seconds

Only quantisers are trained, on fixed vectors of real images that come with scikit-learn: principal components of
patches of its two photographs (8 x 8 pixels, colour) and whole 4 x 4 patches of its handwritten digits. Evaluated on
held-out vectors (the right quarter of the photographs, the last quarter of the digits): the squared error after all
depths over the vectors' own variance, and how much of the codebook is used. The table gives the mean over the seeds,
and the lowest and highest.
"""

import argparse
import statistics

import torch
from common import print_machine
from sklearn.datasets import load_digits, load_sample_images

from transformers_dualtoken.configuration_dualtoken import DualTokenQuantizerConfig
from transformers_dualtoken.vector_quantization import DualTokenResidualQuantizer


RULES = {
    "rq": {"update_rule": "rq"},
    "rq_ema, own": {"update_rule": "rq_ema", "ema_vectors": "own"},
    "rq_ema, final": {"update_rule": "rq_ema", "ema_vectors": "final"},
}
SMALL = {"steps": 30, "seeds": 1}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="training steps (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1024, help="vectors of a step (default %(default)s)")
    parser.add_argument("--codes", type=int, default=256, help="codes of a codebook (default %(default)s)")
    parser.add_argument("--depths", type=int, default=4, help="residual codes of a vector (default %(default)s)")
    parser.add_argument("--decay", type=float, default=0.99, help="EMA factor (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default %(default)s)")
    parser.add_argument("--small", action="store_true", help=f"a fast run at {SMALL}")
    args = parser.parse_args()
    if args.small:
        vars(args).update(SMALL)
    return args


def patches(images, size, stride):
    """Images (B, H, W, channels) -> vectors (T, size * size * channels)."""
    windows = images.unfold(1, size, stride).unfold(2, size, stride)
    return windows.flatten(3).flatten(0, 2)


def photo_vectors():
    """Training and held-out vectors (T, 16): leading principal components, centred."""
    images = torch.stack([torch.tensor(image) for image in load_sample_images().images]).float() / 127.5 - 1
    border = images.shape[2] * 3 // 4
    train, held_out = (patches(part, 8, 4) for part in (images[:, :, :border], images[:, :, border:]))
    mean = train.mean(0)
    _, _, directions = torch.linalg.svd(train - mean, full_matrices=False)
    return (train - mean) @ directions[:16].T, (held_out - mean) @ directions[:16].T


def digit_vectors():
    """Training and held-out vectors (T, 16), centred."""
    images = torch.from_numpy(load_digits().images).float()[..., None] / 8 - 1
    border = len(images) * 3 // 4
    train, held_out = (patches(part, 4, 2) for part in (images[:border], images[border:]))
    return train - train.mean(0), held_out - train.mean(0)


def measure(rule, shared_codebook, train, held_out, seed, args):
    """Relative squared error and the used part of the codebook on held-out vectors."""
    torch.manual_seed(seed)
    quantizer = DualTokenResidualQuantizer(
        DualTokenQuantizerConfig(
            codebook_size=args.codes,
            code_dim=train.shape[1],
            num_depths=args.depths,
            shared_codebook=shared_codebook,
            ema_decay=args.decay,
            **RULES[rule],
        )
    )
    # As a new model: the statistics are empty, and the first batch chooses the codes.
    quantizer.codebook.embeddings.normal_(std=0.02)
    quantizer.train()
    for _ in range(args.steps):
        quantizer(train[torch.randint(len(train), (args.batch,))])
    quantizer.eval()
    output = quantizer(held_out)
    error = (output.quantized - held_out).square().sum() / held_out.square().sum()
    books = output.codes.flatten()[:, None] if shared_codebook else output.codes
    used = sum(len(book.unique()) for book in books.T) / (books.shape[1] * args.codes)
    return error.item(), used


@torch.no_grad()
def main():
    args = parse_args()
    torch.set_num_threads(1)
    print_machine()
    print(f"{args.codes} codes, {args.depths} depths, {args.steps} steps of {args.batch} vectors, ", end="")
    print(f"decay {args.decay}, {args.seeds} seeds\n")
    print(f"{'vectors':10}{'codebook':12}{'rule':16}{'relative error (lowest to highest)':38}{'used':>8}")
    for data, make_vectors in (("photos", photo_vectors), ("digits", digit_vectors)):
        train, held_out = make_vectors()
        for shared_codebook in (True, False):
            for rule in RULES:
                runs = [measure(rule, shared_codebook, train, held_out, seed, args) for seed in range(args.seeds)]
                errors, used = zip(*runs)
                error = f"{statistics.mean(errors):.4f} ({min(errors):.4f} to {max(errors):.4f})"
                book = "shared" if shared_codebook else "per depth"
                print(f"{data:10}{book:12}{rule:16}{error:38}{statistics.mean(used):>8.1%}", flush=True)


if __name__ == "__main__":
    main()
