"""One position of an image: ours against a VILA-U style and a Janus style loop, on one CPU thread, with guidance.

    python benchmarks/bench_image_position.py                # full-size heads: 10 minutes, 3 GB
    python benchmarks/bench_image_position.py --operations   # only the counts, name by name: seconds
    python benchmarks/bench_image_position.py --small        # seconds

The language model is small (4 layers of 512), the two heads are the paper's (258 M parameters together with what
projects into them, 8 depths of 16384 codes each), float32, random weights. "VILA-U style" recomputes the prefix of
depths for every code and sorts all logits; "Janus style" keeps keys and values. Both are in `naive/`.

    heads            the codes of one position from its hidden state: `DualTokenDepthHeads.sample` and the two heads
                     one after the other
    whole position   that, the next embedding and the language model, at `--past` tokens in its cache. Timed as two
                     images of different grids: (seconds of the larger - seconds of the smaller) / positions between
                     them, so that the prompt and what is done once an image cancel out. The grids are small and the
                     prompt stands for the positions before, since a step costs the same after either.
    operations       what a position's heads ask PyTorch to do; `operations.py` says what is counted
    memory           peak beyond the weights while the heads draw a position, each in a process of its own (VmHWM,
                     Linux, to about 1 MB)

All draw as they do by default: ours and VILA-U style top-k 900 and top-p 0.96, Janus style from all codes. That the
most probable codes are the same is checked first, for the heads and for whole images.
"""

import argparse
import json

import torch
from common import alternating_medians, cpu_name, run_child, transient_bytes
from generation_models import draw_image, make_prompts, spread_weights
from naive.depth_heads import (
    CachedDepthHead,
    PrefixDepthHead,
    draw_by_full_sort,
    draw_from_all,
    most_probable,
    sample_separately,
    separate_heads,
)
from naive.generation import JanusLoop, VilaULoop
from operations import count_operations

from transformers_dualtoken import DualTokenForCausalLM
from transformers_dualtoken.code_sampling import DualTokenCodeSampler
from transformers_dualtoken.configuration_dualtoken import DualTokenConfig, DualTokenVisionTokenizerConfig


NAMES = ("VILA-U style", "Janus style", "ours")
SIZES = ("width", "layers", "vocabulary", "head_width", "depths", "codes", "past")
SMALL = {"width": 64, "layers": 2, "vocabulary": 512, "head_width": 64, "depths": 4, "codes": 512, "past": 12}
GUIDANCE, PATCH, CODE_DIM = 3.0, 8, 32
# Sides of the two grids whose difference in time is that of the positions between them.
SIDES = (2, 4)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="of the language model (default %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of the language model (default %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=32000, help="default %(default)s")
    parser.add_argument("--head-width", type=int, default=1024, help="default %(default)s")
    parser.add_argument("--depths", type=int, default=8, help="codes of a kind at a position (default %(default)s)")
    parser.add_argument("--codes", type=int, default=16384, help="codes of a codebook (default %(default)s)")
    parser.add_argument("--past", type=int, default=320, help="tokens before: a prompt of 20, 300 positions")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default %(default)s)")
    parser.add_argument("--operations", action="store_true", help="only count, with narrow heads")
    parser.add_argument("--small", action="store_true", help=f"a fast run at {SMALL}")
    parser.add_argument("--child", choices=NAMES, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.small:
        vars(args).update(SMALL, repeats=min(args.repeats, 3))
    if args.operations:
        # Counts do not depend on widths.
        vars(args).update(width=64, vocabulary=512, head_width=64, codes=2048)
    return args


def make_model(args) -> DualTokenForCausalLM:
    """The unified model with a tokenizer that is next to nothing: no image is encoded or decoded here."""
    tower = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    quantizer = {"codebook_size": args.codes, "code_dim": CODE_DIM, "num_depths": args.depths}
    tokenizer = DualTokenVisionTokenizerConfig(
        vision_config={**tower, "image_size": SIDES[-1] * PATCH, "patch_size": PATCH},
        text_config={**tower, "vocab_size": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        pixel_layer=1,
        shortcut_layer=None,
        semantic_layer=2,
        pixel_quantizer_config=quantizer,
        semantic_quantizer_config=quantizer,
        decoder_block_out_channels=[32, 32],
        decoder_in_channels=32,
    )
    config = DualTokenConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": args.vocabulary,
            "hidden_size": args.width,
            "intermediate_size": 11 * args.width // 4,
            "num_hidden_layers": args.layers,
            "num_attention_heads": max(2, args.width // 64),
            "num_key_value_heads": 2,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "tie_word_embeddings": True,
        },
        vision_tokenizer_config=tokenizer,
        depth_head_config={
            "hidden_size": args.head_width,
            "head_dim": args.head_width // 8,
            "intermediate_size": 2 * args.head_width,
            "input_hidden_size": 2 * args.head_width,
        },
        image_start_token_id=args.vocabulary - 3,
        image_token_id=args.vocabulary - 2,
        image_end_token_id=args.vocabulary - 1,
    )
    model = DualTokenForCausalLM(config).eval()
    spread_weights(model)
    return model


class Heads:
    """The three ways to draw the codes of a position, `(2, B, D)`, from hidden states `(2 B, H)`; B is 1."""

    def __init__(self, model):
        self.stacked, generator = model.depth_heads, torch.Generator().manual_seed(1)
        self.hidden_states = torch.randn(2, model.config.text_config.hidden_size, generator=generator)
        books = [model.vision_tokenizer.quantizer(kind).codebook.embeddings for kind in ("pixel", "semantic")]
        self.codebooks = torch.stack(books)
        self.prefix, self.cached = separate_heads(model, PrefixDepthHead), separate_heads(model, CachedDepthHead)

    @torch.no_grad()
    def sample(self, name: str, do_sample: bool = True):
        if name == "ours":
            sampler = DualTokenCodeSampler(do_sample=do_sample)
            # As in `generate`: the noise of all depths at once.
            noise = sampler.new_noise(self.stacked.num_depths, 1, self.stacked.codebook_size, torch.device("cpu"))
            noise = None if noise is None else noise.draw()
            return self.stacked.sample(self.hidden_states, self.codebooks, sampler, GUIDANCE, noise)
        heads, draw = (self.prefix, draw_by_full_sort) if name == "VILA-U style" else (self.cached, draw_from_all)
        return sample_separately(heads, self.hidden_states, draw if do_sample else most_probable, GUIDANCE)


class Images:
    """The three ways to draw an image after a prompt that fills the cache."""

    def __init__(self, model, past: int):
        self.model = model
        self.prompt = make_prompts(model.config, 1, past)

    def generate(self, name: str, side: int, do_sample: bool = True):
        """Codes `(2, 1, side², D)`."""
        if name == "ours":
            return draw_image(self.model, self.prompt, side, guidance_scale=GUIDANCE, image_do_sample=do_sample)
        loop_class = VilaULoop if name == "VILA-U style" else JanusLoop
        return loop_class(self.model, GUIDANCE, do_sample).generate(self.prompt, num_positions=side**2)


def check_equality(heads: Heads, images: Images) -> None:
    """Fails unless the most probable codes are the same everywhere."""
    expected = heads.sample("ours", do_sample=False)
    drawn = images.generate("ours", SIDES[-1], do_sample=False)
    assert drawn.flatten(0, 2).unique(dim=0).shape[0] > 1, "All positions have the same codes: nothing is compared."
    for name in NAMES[:-1]:
        assert torch.equal(heads.sample(name, do_sample=False), expected), f"The heads, {name}: other codes."
        other = images.generate(name, SIDES[-1], do_sample=False)
        assert torch.equal(other, drawn), f"An image, {name}: {(other != drawn).sum()} other codes."


def position_seconds(images: Images, repeats: int) -> dict:
    """Seconds of a whole position, by name."""
    runs = {(name, side): lambda n=name, s=side: images.generate(n, s) for name in NAMES for side in SIDES}
    seconds = alternating_medians(runs, repeats)
    small, large = SIDES
    return {name: (seconds[name, large] - seconds[name, small]) / (large**2 - small**2) for name in NAMES}


def print_values(label, values, unit, places, ratios=True):
    """A row: the three values, and the first two divided by the last."""
    cells = "".join(f"{value:>13.{places}f} {unit:2}" for value in values)
    cells += "".join(f"{value / values[-1]:>8.2f}" for value in values[:-1]) if ratios else ""
    print(f"{label:32}{cells}".rstrip(), flush=True)


def print_counts(counters: dict) -> None:
    """The operations of every name, the most frequent first, and the synchronisations."""
    for name, counter in counters.items():
        print(f"{name}: {counter.count} operations, {counter.num_synchronisations} synchronisations")
        print("    " + ", ".join(f"{key} {count}" for key, count in counter.operations.most_common()))
        if counter.synchronisations:
            print("    waits: " + ", ".join(f"{key} {count}" for key, count in counter.synchronisations.items()))


def main():
    args = parse_args()
    torch.set_num_threads(1)
    if args.child:
        Heads(make_model(argparse.Namespace(**SMALL))).sample(args.child)  # loads what the first call loads
        heads = Heads(make_model(args))
        return print(json.dumps(transient_bytes(lambda: heads.sample(args.child))))
    if args.operations:
        heads = Heads(make_model(args))
        return print_counts({name: count_operations(lambda n=name: heads.sample(n)) for name in NAMES})

    sizes = [x for size in SIZES for x in (f"--{size.replace('_', '-')}", getattr(args, size))]
    memory = {name: run_child(__file__, "--child", name, *sizes) for name in NAMES}
    model = make_model(args)
    heads, images = Heads(model), Images(model, args.past)
    check_equality(heads, images)
    counters = {name: count_operations(lambda n=name: heads.sample(n)) for name in NAMES}
    seconds = alternating_medians({name: lambda n=name: heads.sample(n) for name in NAMES}, args.repeats)
    positions = position_seconds(images, args.repeats)

    print(f"{cpu_name()}, torch {torch.__version__}, {torch.get_num_threads()} thread, float32")
    print(", ".join(f"{size} {getattr(args, size)}" for size in SIZES), end="")
    print(f", medians of {args.repeats}; the most probable codes are identical\n")
    print(" " * 32 + "".join(f"{name:>16}" for name in NAMES) + f"{'ratio':>8}" * 2)
    print_values("heads", [1e3 * seconds[name] for name in NAMES], "ms", 1)
    print_values("whole position", [1e3 * positions[name] for name in NAMES], "ms", 1)
    print_values("operations of the heads", [counters[name].count for name in NAMES], "", 0)
    print_values(
        "synchronisations of the heads", [counters[name].num_synchronisations for name in NAMES], "", 0, ratios=False
    )
    print_values("peak memory of the heads", [memory[name] / 1e6 for name in NAMES], "MB", 1, ratios=False)


if __name__ == "__main__":
    main()
