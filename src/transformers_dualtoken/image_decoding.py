"""Drawing the positions of images one after the other: the inner loop of generation.

A position is one step of fixed shape: both depth heads draw its codes, these become the next embedding, and the language
model runs once on all rows, conditional and unconditional. No value leaves the device until the last position. On a
CUDA device the step is captured once and replayed for every position; elsewhere, and for whatever cannot be captured,
the same step runs eagerly.
"""

import functools
import threading
import types
from collections import OrderedDict
from collections.abc import Hashable

import torch
from transformers.utils import logging

from .code_sampling import DualTokenCodeSampler
from .generation_context import Context, StaticContext
from .generation_graph import HostWait, KeptSteps, capture
from .sharding import is_sharded


logger = logging.get_logger(__name__)


class ImageDecoder:
    """
    Draws positions of all rows of a context, as often as it is asked to.

    Args:
        model ([`DualTokenForCausalLM`]).
        context ([`Context`]): fed up to the position before; every row's hidden state is that before its next position.
        sampler ([`DualTokenCodeSampler`]).
        guidance_scale (`float`, *optional*): with a guided context.
        compile_options (`dict`, *optional*): arguments of `torch.compile` for the step.

    Raises:
        ValueError: for `compile_options` where the step has no fixed shape.
    """

    def __init__(
        self,
        model,
        context: Context,
        sampler: DualTokenCodeSampler,
        guidance_scale: float | None,
        compile_options: dict | None = None,
    ):
        self.model, self.context, self.sampler = model, context, sampler
        self.guidance_scale = guidance_scale if context.guided else None
        memory, config = context.memory, model.config
        # The step's own buffers: a graph knows them by their addresses.
        self.codebooks = memory.place("codebooks", model._codebooks())
        device = self.codebooks.device
        self.noise = sampler.new_noise(config.num_depths, context.rows, config.codebook_size, device)
        if self.noise is not None:
            self.noise.values = memory.place("noise", self.noise.values)
        sampler.score_sums = memory.place("score_sums", sampler.score_sums)
        self.is_static = isinstance(context, StaticContext)
        if compile_options is not None and not self.is_static:
            raise ValueError(
                "`compile_config` compiles a step of fixed shape: it needs a static cache, got a dynamic one."
            )
        self.compile_options = compile_options
        codes = torch.zeros(config.num_positions, 2, context.rows, config.num_depths, dtype=torch.long, device=device)
        self.codes = memory.place("codes", codes)
        self.index = memory.place("index", torch.zeros(1, dtype=torch.long, device=device))
        # What rows that do not draw are fed instead, and which rows those are.
        self.given_embeds = memory.place("given_embeds", torch.zeros_like(context.last_embeds))
        self.is_given = memory.place("is_given", torch.zeros(context.rows, 1, 1, dtype=torch.bool, device=device))
        self.hidden_states: torch.Tensor | None = None
        self._is_capturable: bool | None = None

    def draw(
        self, num_positions: int, feed_last: bool = True, on_position=None, rows: list[int] | None = None
    ) -> torch.LongTensor:
        """
        Draw the next positions of every row.

        Args:
            num_positions (`int`): no more than an image has.
            feed_last (`bool`, defaults to `True`): also feed the last position; the context's hidden states are then
                those after it.
            on_position (callable, *optional*): called after every position.
            rows (`list[int]`, *optional*): those whose codes are wanted; the generators of others rest.

        Returns:
            `torch.LongTensor` of shape `(2, B, n, D)`: pixel and semantic codes.
        """
        if not self.is_static:
            return self._draw_growing(num_positions, feed_last, on_position, rows)
        self.is_given.zero_()
        step = self._prepare(num_positions)
        fed = num_positions if feed_last else num_positions - 1
        with self.context.attention():
            for _ in range(fed):
                self._draw_noise(rows)
                step()
                if on_position is not None:
                    on_position()
        self._conclude(fed)
        if not feed_last:
            self.codes[num_positions - 1] = self.sample(rows)
            if on_position is not None:
                on_position()
        return self.codes[:num_positions].permute(1, 2, 0, 3).clone()

    def draw_beside_text(self, embeds: torch.Tensor, writing: list[int]) -> torch.LongTensor:
        """
        Draw one position of every row, but feed `embeds` `(B, 1, H)` to the rows `writing`; a static context's.

        Returns:
            `torch.LongTensor` of shape `(2, B, D)`.
        """
        self.given_embeds.copy_(embeds)
        self.is_given.zero_()
        self.is_given[writing] = True
        step = self._prepare(1)
        with self.context.attention():
            self._draw_noise([row for row in range(self.context.rows) if row not in writing])
            step()
        self._conclude(1)
        return self.codes[0].clone()

    def sample(self, rows: list[int] | None = None) -> torch.LongTensor:
        """The codes `(2, B, D)` of the next position of every row, which is not fed; `rows` as in [`draw`]."""
        self._draw_noise(rows)
        return self._sample(self.context.hidden_states)

    def _draw_growing(self, num_positions: int, feed_last: bool, on_position, rows) -> torch.LongTensor:
        codes = []
        for position in range(num_positions):
            codes.append(self.sample(rows))
            if feed_last or position < num_positions - 1:
                self.context.feed(self.model.model.embed_image_codes(*codes[-1].unsqueeze(2)))
            if on_position is not None:
                on_position()
        return torch.stack(codes, dim=2)

    def _sample(self, hidden_states: torch.Tensor) -> torch.LongTensor:
        noise = None if self.noise is None else self.noise.values
        return self.model.depth_heads.sample(hidden_states, self.codebooks, self.sampler, self.guidance_scale, noise)

    def _draw_noise(self, rows: list[int] | None = None) -> None:
        # Outside the step: what a graph replays is the same every time.
        if self.noise is not None:
            self.noise.draw(rows)

    def _prepare(self, num_positions: int):
        """Fill the step's buffers; returns what to call for every position: captured, compiled or as it is."""
        context = self.context
        context.reserve(num_positions)
        self.index.zero_()
        self.hidden_states = context.memory.place("hidden_states", context.hidden_states)
        step = functools.partial(self._step_function(), self)
        if self._is_capturable is None:
            self._is_capturable = self._can_capture()
        if self._is_capturable and context.memory.graph is None:
            context.memory.graph = self._capture(step)
            self._is_capturable = context.memory.graph is not None
        return context.memory.graph.replay if self._is_capturable else step

    def _conclude(self, num_positions: int) -> None:
        self.context.length += num_positions
        self.context.hidden_states = self.hidden_states.clone()

    def _step_function(self):
        if self.compile_options is None:
            return _step
        context = self.context
        # What a compiled step has of its own, besides the model: sizes, and numbers that it takes for constants.
        sizes = (context.rows, context.guided, context.capacity, self.guidance_scale)
        sampling = (self.sampler.temperature, self.sampler.top_k, self.sampler.top_p, self.sampler.do_sample)
        return _compiled_step(self.compile_options, sizes + sampling)

    def _can_capture(self) -> bool:
        return self.codes.device.type == "cuda" and _has_addresses(self.model)

    def _capture(self, step):
        """One step as a CUDA graph; `None`, with a warning, where something in it would wait for the device."""
        context = self.context
        # The columns it writes are written again.
        changed = [self.index, self.hidden_states, context.column, context.next_position, context.attention_mask]
        try:
            with context.attention():
                return capture(step, changed, self.codes.device)
        except HostWait as obstacle:
            logger.warning_once(f"The step of image generation cannot be a CUDA graph and runs eagerly: {obstacle}")
            return None

    def keep(self) -> None:
        """Keep a captured step, with the buffers it works in, for the next generation of the same kind."""
        if self.context.memory.graph is None:
            return
        context = self.context
        key = step_key(
            self.model,
            context.rows,
            context.guided,
            context.capacity,
            self.sampler,
            self.guidance_scale,
            self.compile_options,
        )
        if key is not None:
            kept_steps.put(self.model, key, context.memory)


kept_steps = KeptSteps()

# Where modules come from that compute nothing but what their weights and configs say: PEFT's, for one, can be switched.
_PLAIN_PACKAGES = {"torch", "transformers", __name__.partition(".")[0]}


def _has_addresses(model) -> bool:
    """Whether the weights lie where they are and stay there: not sharded, quantised or moved by accelerate's hooks."""
    return (
        not is_sharded(model)
        and getattr(model, "hf_quantizer", None) is None
        and getattr(model, "_hf_hook", None) is None
    )


def step_key(
    model,
    rows: int,
    guided: bool,
    capacity: int,
    sampler: DualTokenCodeSampler,
    guidance_scale: float | None,
    compile_options: dict | None,
) -> Hashable | None:
    """
    All that a captured step takes for constant; `None` where that cannot be told.

    Weights count by their addresses, which a graph reads them from: changed in place they may be, moved or replaced not.
    """
    if not _has_addresses(model):
        return None
    parts = [model.model.language_model, model.depth_heads, model.model.visual_projector]
    parts += [model.vision_tokenizer.quantizer(kind) for kind in ("pixel", "semantic")]
    weights = []
    for part in parts:
        for module in part.modules():
            is_plain = type(module).__module__.partition(".")[0] in _PLAIN_PACKAGES and "forward" not in vars(module)
            if not is_plain or module._forward_hooks or module._forward_pre_hooks:
                return None
            own = [*module._parameters.values(), *module._buffers.values()]
            weights.append(
                (type(module), *((x.data_ptr(), x.dtype, x.shape, x.stride()) for x in own if x is not None))
            )
    device_type = model.get_input_embeddings().weight.device.type
    if torch.is_autocast_enabled(device_type):
        # A graph would hold the addresses of the weights' casts, which autocast frees when it ends.
        return None
    settings = (
        model.training,
        model.config.text_config._attn_implementation == "eager",
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_inference_mode_enabled(),
    )
    sampling = (sampler.temperature, sampler.top_k, sampler.top_p, sampler.do_sample)
    options = compile_options and repr(sorted(compile_options.items()))
    return (rows, guided, capacity, guidance_scale, sampling, options, settings, tuple(weights))


def _step(decoder: ImageDecoder) -> None:
    """Draw a position's codes from the hidden states and feed them, all in the decoder's and the context's buffers."""
    drawn = decoder._sample(decoder.hidden_states)
    decoder.codes.index_copy_(0, decoder.index, drawn.unsqueeze(0))
    embeds = decoder.model.model.embed_image_codes(*drawn.unsqueeze(2)).to(decoder.given_embeds.dtype)
    embeds = torch.where(decoder.is_given, decoder.given_embeds, embeds)
    decoder.hidden_states.copy_(decoder.context.advance(embeds))
    decoder.index.add_(1)


# `torch.compile` makes graphs of its own in these modes, which do not take buffers that a step changes.
_WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


# The latest compiled steps, by options and sizes.
_compiled = OrderedDict()
_compiled_lock = threading.Lock()
_MAX_COMPILED = 16


def _compiled_step(options: dict, sizes: tuple):
    """
    The compiled step, the same function for the same options and sizes.

    Of every size it is a function of its own: torch gives up on one that it has compiled eight times.
    """
    key = (repr(sorted(options.items())), sizes)
    with _compiled_lock:
        if key not in _compiled:
            function = types.FunctionType(_step.__code__.replace(), _step.__globals__, _step.__name__)
            _compiled[key] = torch.compile(function, **_compiler_arguments(options))
            if len(_compiled) > _MAX_COMPILED:
                _compiled.popitem(last=False)
        _compiled.move_to_end(key)
        return _compiled[key]


def _compiler_arguments(options: dict) -> dict:
    """Arguments of `torch.compile` from those of a `CompileConfig`."""
    arguments = {name: value for name, value in options.items() if value is not None}
    # Every size has kernels of its own, as it has buffers of its own.
    arguments.setdefault("dynamic", False)
    if "options" in arguments:
        arguments.pop("mode", None)
    elif arguments.get("mode") in _WITHOUT_GRAPHS:
        arguments["mode"] = _WITHOUT_GRAPHS[arguments["mode"]]
    return arguments


__all__ = ["ImageDecoder"]
