"""What the tests of generation share: a tiny model, prompts and codes, forced answers, and checks of a step."""

import functools

import pytest
import torch
from naive.generation_loop import NaiveGenerator, code_pairs
from tiny_models import lively_unified_model
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


N, START, IMAGE, END, PAD, EOS, VOCAB = 9, 50, 51, 52, 0, 2, 60
PICTURE = [START, *[IMAGE] * N, END]
CACHES = pytest.mark.parametrize("cache", ["static", "dynamic"])
GREEDY = {"generation_mode": "image", "image_do_sample": False}
GREEDY_IMAGES = dict.fromkeys(("image", "interleaved"), {"image_do_sample": False})
INTERLEAVED = {"generation_mode": "interleaved", "image_do_sample": False}


@functools.cache
def shared_model():
    return lively_unified_model()


@functools.cache
def naive():
    return NaiveGenerator(shared_model())


def ids(*row: int) -> torch.Tensor:
    return torch.tensor([row])


def pad_left(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD] * (length - len(row)) + list(row) for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }


def random_codes(images: int, seed: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{kind}_codes": torch.randint(24, (images, 3, 3, 3), generator=generator) for kind in ("pixel", "semantic")
    }


def pairs(codes: dict) -> list:
    return code_pairs(codes["pixel_codes"], codes["semantic_codes"]) if codes else []


def take(codes: dict, images: slice) -> dict:
    """The codes of some of the images; no codes at all for none."""
    part = {name: kind[images] for name, kind in codes.items()}
    return part if len(part["pixel_codes"]) else {}


def assert_codes(output, pixel, semantic):
    """`pixel`, `semantic`: `(images, N, D)` or, for one image, `(N, D)`."""
    assert torch.equal(output.pixel_codes.flatten(1, 2), pixel.view(-1, N, 3))
    assert torch.equal(output.semantic_codes.flatten(1, 2), semantic.view(-1, N, 3))


def same_images(one, other) -> bool:
    return torch.equal(one.pixel_codes, other.pixel_codes) and torch.equal(one.semantic_codes, other.semantic_codes)


# Prompts with no, one and two images, of different lengths.
ROWS = [[5, 6, 7], [8, *PICTURE, 9], [*PICTURE, 10, *PICTURE]]
IMAGES_BEFORE = [slice(0, 0), slice(0, 1), slice(1, 3)]


def force(plans: list[dict[int, int]], prompt_length: int):
    """A logits processor: row r must write `plans[r][step]` at that step, wherever it is given."""

    def process(input_ids, scores):
        step = input_ids.shape[1] - prompt_length
        for row, plan in enumerate(plans):
            if step in plan:
                scores[row] = -100.0
                scores[row, plan[step]] = 100.0
        return scores

    return process


def naive_force(plan: dict[int, int], prompt_length: int):
    def process(sequence, scores):
        return force([plan], prompt_length)(torch.tensor([sequence]), scores[None].clone())[0]

    return process


def push(*tokens: int):
    """A logits processor that makes tokens as likely as can be."""

    def process(input_ids, scores):
        scores[:, list(tokens)] += 1e4
        return scores

    return process


class Recorder:
    """What a `TextStreamer` is given."""

    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value.flatten().tolist())

    def end(self):
        self.ended += 1


PROMPTS = pad_left([[5, 6, 7, START], [8, START]])


def draw(model, seed=1, **kwargs):
    arguments = {**PROMPTS, "generation_mode": "image", "guidance_scale": 2.5, **kwargs}
    return model.generate(**arguments, generator=torch.Generator().manual_seed(seed))


def converse(model, rows=2, budget=40, **kwargs):
    """Text, images at different times and at once, more text; the rest is the model's choice."""
    plans = [{1: START, 14: 5, 20: START}, {4: START, 16: 6, 20: START}][:rows]
    return model.generate(
        **{name: value[:rows] for name, value in pad_left([[5, 6, 7], [8]]).items()},
        generation_mode="interleaved",
        guidance_scale=2.5,
        max_new_tokens=budget,
        eos_token_id=None,
        do_sample=True,
        logits_processor=[force(plans, 3)],
        generator=torch.Generator().manual_seed(1),
        **kwargs,
    )


# What makes the host wait for a device.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "unique_dim", "equal", "is_nonzero"}


# What copies from the host, of which a CPU's operations tell nothing.
COPIES = {torch.tensor, torch.as_tensor, torch.Tensor.new_tensor, torch.Tensor.item, torch.Tensor.tolist}
COPIES |= {torch.Tensor.cpu, torch.from_numpy}


class NoCopies(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in COPIES, f"{function.__name__} copies from or to the host"
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(part, list) for part in parts), "a list as an index is copied from the host"
        return function(*args, **(kwargs or {}))


class NoWaits(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device"
        assert name != "index" or all(i is None or i.dtype != torch.bool for i in args[1]), "a mask as an index waits"
        self.count += 1
        return function(*args, **(kwargs or {}))


class Traced:
    """A stand-in for a CUDA graph: the operations of one step, on the tensors it had, again and again."""

    def __init__(self, decoder, step):
        # Tracing runs the step.
        changed = [
            decoder.index,
            decoder.hidden_states,
            decoder.context.column,
            decoder.context.next_position,
            decoder.context.attention_mask,
        ]
        before = [buffer.clone() for buffer in changed]

        def run():
            step()
            return decoder.index.clone()

        self.replay = make_fx(run)()
        self.num_replays = 0
        for buffer, value in zip(changed, before):
            buffer.copy_(value)
