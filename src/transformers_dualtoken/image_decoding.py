"""Drawing the positions of images one after the other: the inner loop of generation.

A position is one step of fixed shape: both depth heads draw its codes, these become the next embedding, and the language
model runs once on all rows, conditional and unconditional. No value leaves the device until the last position. On a
CUDA device the step is captured once and replayed for every position; elsewhere, and for whatever cannot be captured,
the same step runs eagerly.
"""

import functools

import torch
from transformers.utils import logging

from .code_sampling import DualTokenCodeSampler
from .generation_context import Context, StaticContext
from .sharding import is_sharded


logger = logging.get_logger(__name__)

# Steps before a capture: libraries choose their kernels and take their workspaces.
_WARMUP_STEPS = 2


class ImageDecoder:
    """
    Draws n positions of all rows of a context, as often as it is asked to.

    Args:
        model ([`DualTokenForCausalLM`]).
        context ([`Context`]): fed up to the position before; every row's hidden state is that before its next position.
        sampler ([`DualTokenCodeSampler`]).
        guidance_scale (`float`, *optional*): with a guided context.
        compile_options (`dict`, *optional*): arguments of `torch.compile` for the step.
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
        self.codebooks, config = model._codebooks(), model.config
        self.noise = sampler.new_noise(config.num_depths, context.rows, config.codebook_size, self.codebooks.device)
        # State of the tokenizer's up-projections within the current images, for `visual_features="projected"`.
        self.projection_cache: list = []
        self.is_static = isinstance(context, StaticContext) and config.visual_features == "codes"
        self.compile_options = compile_options if self.is_static else None
        self.hidden_states = self.codes = self.index = None
        self._graph, self._captured_capacity = None, None

    def draw(self, num_positions: int, feed_last: bool = True, on_position=None) -> torch.LongTensor:
        """
        Draw the next positions of every row.

        Args:
            num_positions (`int`): no more than an image has.
            feed_last (`bool`, defaults to `True`): also feed the last position; the context's hidden states are then
                those after it.
            on_position (callable, *optional*): called after every position.

        Returns:
            `torch.LongTensor` of shape `(2, B, n, D)`: pixel and semantic codes.
        """
        if not self.is_static:
            return self._draw_growing(num_positions, feed_last, on_position)
        self.context.reserve(num_positions)
        self._begin()
        step = self._step_function(num_positions)
        fed = num_positions if feed_last else num_positions - 1
        for _ in range(fed):
            self._fill_noise()
            step()
            if on_position is not None:
                on_position()
        self.context.length += fed
        if not feed_last:
            self._fill_noise()
            self.codes[num_positions - 1] = self._sample(self.hidden_states)
            if on_position is not None:
                on_position()
        self.context.hidden_states = self.hidden_states.clone()
        return self.codes[:num_positions].permute(1, 2, 0, 3).clone()

    def sample(self) -> torch.LongTensor:
        """The codes `(2, B, D)` of the next position of every row, which is not fed."""
        self._fill_noise()
        return self._sample(self.context.hidden_states)

    def _draw_growing(self, num_positions: int, feed_last: bool, on_position) -> torch.LongTensor:
        codes = []
        for position in range(num_positions):
            codes.append(self.sample())
            if feed_last or position < num_positions - 1:
                self.context.feed(self.model.model.embed_image_codes(*codes[-1].unsqueeze(2), self.projection_cache))
            if on_position is not None:
                on_position()
        return torch.stack(codes, dim=2)

    def _sample(self, hidden_states: torch.Tensor) -> torch.LongTensor:
        return self.model.depth_heads.sample(
            hidden_states, self.codebooks, self.sampler, self.guidance_scale, self.noise
        )

    def _fill_noise(self) -> None:
        # Outside the step: what a graph replays is the same every time.
        if self.noise is not None:
            self.sampler.fill_noise(self.noise)

    def _begin(self) -> None:
        """The step's own buffers, made once: a graph knows them by their addresses."""
        hidden_states = self.context.hidden_states
        if self.codes is None:
            config = self.model.config
            shape = (config.num_positions, 2, self.context.rows, config.num_depths)
            self.codes = torch.zeros(shape, dtype=torch.long, device=hidden_states.device)
            self.index = torch.zeros(1, dtype=torch.long, device=hidden_states.device)
            self.hidden_states = torch.empty_like(hidden_states)
        self.index.zero_()
        self.hidden_states.copy_(hidden_states)

    def _step_function(self, num_positions: int):
        """The step to call for every position: captured, compiled or as it is."""
        step = functools.partial(_compiled_step(self.compile_options), self)
        if not self._can_capture() or num_positions < 2:
            return step
        if self._graph is None or self._captured_capacity != self.context.capacity:
            self._graph, self._captured_capacity = self._capture(step), self.context.capacity
        return step if self._graph is None else self._graph.replay

    def _can_capture(self) -> bool:
        model = self.model
        return (
            self.hidden_states.device.type == "cuda"
            and not is_sharded(model)
            and getattr(model, "hf_quantizer", None) is None
            and getattr(model, "_hf_hook", None) is None
        )

    def _capture(self, step):
        """One step as a CUDA graph; `None`, with a warning, where it cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._warm_up(step)
        torch.cuda.current_stream().wait_stream(stream)
        try:
            with torch.cuda.graph(graph):
                step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            logger.warning_once(f"The step of image generation runs eagerly: no CUDA graph could be made ({error}).")
            return None
        return graph

    def _warm_up(self, step) -> None:
        """Run the step and put back what it has changed; the columns it wrote are written again."""
        context = self.context
        changed = [self.index, self.hidden_states, context.column, context.next_position, context.attention_mask]
        before = [buffer.clone() for buffer in changed]
        for _ in range(_WARMUP_STEPS):
            step()
            for buffer, value in zip(changed, before):
                buffer.copy_(value)


def _step(decoder: ImageDecoder) -> None:
    """Draw a position's codes from the hidden states and feed them, all in the decoder's and the context's buffers."""
    drawn = decoder._sample(decoder.hidden_states)
    decoder.codes.index_copy_(0, decoder.index, drawn.unsqueeze(0))
    embeds = decoder.model.model.embed_image_codes(*drawn.unsqueeze(2))
    decoder.hidden_states.copy_(decoder.context.advance(embeds))
    decoder.index.add_(1)


# `torch.compile` makes graphs of its own in these modes, which do not take buffers that a step changes.
_WITHOUT_GRAPHS = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}
# One compiled function for all generations with the same options: another one would be traced anew.
_compiled = {}


def _compiled_step(options: dict | None):
    if options is None:
        return _step
    options = {"fullgraph": True, **{name: value for name, value in options.items() if value is not None}}
    # Every size has kernels of its own, as it has buffers of its own.
    options.setdefault("dynamic", False)
    if options.get("mode") in _WITHOUT_GRAPHS:
        options["mode"] = _WITHOUT_GRAPHS[options["mode"]]
    if "options" in options:
        options.pop("mode", None)
    key = repr(sorted(options.items()))
    if key not in _compiled:
        _compiled[key] = torch.compile(_step, **options)
    return _compiled[key]


__all__ = ["ImageDecoder"]
