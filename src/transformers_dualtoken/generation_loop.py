"""The loops of generation: one position, whole images, and rows that write and draw.

A position is one step of fixed shape: both depth heads draw its codes, these become the next embedding, and the language
model runs once on all rows, conditional and unconditional. No value leaves the device until the last position. On a
CUDA device the step is captured once and replayed for every position; elsewhere, and for whatever cannot be captured,
the same step runs eagerly.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers.utils import logging

from .code_sampling import DualTokenCodeSampler
from .configuration_dualtoken import CODE_KINDS
from .generation_cache import Context, Prompt, StaticContext
from .generation_graph import HostWait, KeptSteps, StepMemory, capture, compiled_step, weights_key
from .generation_settings import GenerationArguments
from .generation_text import TextSampler
from .sharding import is_sharded
from .unified_loss import text_logits


logger = logging.get_logger(__name__)

kept_steps = KeptSteps()

# Text between images that the first buffers have room for.
TEXT_ROOM = 256
# A compiled step's cache has a multiple of this many columns: compiled anew for every size, fewer of them.
_COMPILED_BLOCK = 256
# How far the host may be ahead of a progress bar.
_STEPS_AHEAD = 8


class ImageDecoder:
    """
    Draws positions of all rows of a context, as often as it is asked to.

    Args:
        model ([`DualTokenForCausalLM`]).
        prompts (list of [`Prompt`]), rows (`int`), max_new_tokens (`int`): as in [`Context`].
        arguments ([`GenerationArguments`]): how codes are drawn, the kind of cache, and how the step is compiled.
    """

    def __init__(self, model, prompts: list[Prompt], rows: int, max_new_tokens: int, arguments: GenerationArguments):
        self.model, config, guided = model, model.config, len(prompts) == 2
        self.guidance = arguments.settings.guidance_scale if guided else None
        self.sampler = sampler = DualTokenCodeSampler.from_settings(arguments.settings, arguments.inputs.generator)
        self.is_static, self.compile_options = _kind_of_step(model, arguments.generation_config)
        block = StaticContext.BLOCK if self.compile_options is None else _COMPILED_BLOCK
        columns = max(prompt.input_ids.shape[1] for prompt in prompts) - 1
        columns += min(max_new_tokens, config.num_positions + TEXT_ROOM)
        capacity = -(-columns // block) * block
        # What a step takes for constants, besides the model.
        self.constants = (rows, guided, capacity, self.guidance, *sampler.constants)
        self.key = self._step_key()
        # What is kept of another kind is freed before there is new memory.
        memory = kept_steps.take(model, self.key) or StepMemory()
        context_class = StaticContext if self.is_static else Context
        self.context = context_class(model, prompts, rows, max_new_tokens, memory, capacity)

        # The step's own buffers: a graph knows them by their addresses.
        self.codebooks = memory.place("codebooks", model.model.codebooks())
        device = self.codebooks.device
        self.noise = sampler.new_noise(config.num_depths, rows, config.codebook_size, device)
        if self.noise is not None:
            self.noise.values = memory.place("noise", self.noise.values)
        sampler.score_sums = memory.place("score_sums", sampler.score_sums)
        codes = torch.zeros(config.num_positions, 2, rows, config.num_depths, dtype=torch.long, device=device)
        self.codes = memory.place("codes", codes)
        self.index = memory.place("index", torch.zeros(1, dtype=torch.long, device=device))
        # What rows that do not draw are fed, and which rows those are.
        self.given_embeds = memory.place("given_embeds", torch.zeros_like(self.context.last_embeds))
        self.is_given = memory.place("is_given", torch.zeros(rows, 1, 1, dtype=torch.bool, device=device))
        self.hidden_states: torch.Tensor | None = None
        self._is_capturable: bool | None = None

    def draw(
        self,
        num_positions: int,
        rows: list[int] | None = None,
        given_embeds: torch.Tensor | None = None,
        feed_last: bool = True,
        on_position: Callable = lambda: None,
    ) -> torch.LongTensor:
        """
        Codes `(M, B, n, D)` of the next positions of every row, no more than an image has.

        Args:
            rows (`list[int]`, *optional*): those whose codes are wanted; the generators of others rest.
            given_embeds (`torch.Tensor` of shape `(B, 1, H)`, *optional*): what the other rows are fed instead.
            feed_last (`bool`): also feed the last position; the context's hidden states are then those after it.
            on_position (callable): called after every position.
        """
        context = self.context
        self.is_given.fill_(given_embeds is not None)
        if given_embeds is not None:
            self.given_embeds.copy_(given_embeds)
            self.is_given[rows] = False
        num_fed = num_positions if feed_last else num_positions - 1
        context.reserve(num_fed)
        self.index.zero_()
        self.hidden_states = context.memory.place("hidden_states", context.hidden_states)
        with context.attention():
            step = self._prepared_step()
            for _ in range(num_fed):
                self._draw_noise(rows)
                step()
                on_position()
        context.length += num_fed
        context.hidden_states = self.hidden_states.clone()
        if not feed_last:
            self.codes[num_fed] = self.sample(rows)
            on_position()
        return self.codes[:num_positions].permute(1, 2, 0, 3).clone()

    def sample(self, rows: list[int] | None = None) -> torch.LongTensor:
        """The codes `(M, B, D)` of the next position of every row, which is not fed; `rows` as in [`draw`]."""
        self._draw_noise(rows)
        return self._sample(self.context.hidden_states)

    def _sample(self, hidden_states: torch.Tensor) -> torch.LongTensor:
        """`(R, H)` -> codes `(M, B, D)`."""
        noise = None if self.noise is None else self.noise.values
        return self.model.depth_heads.sample(hidden_states, self.codebooks, self.sampler, self.guidance, noise)

    def _draw_noise(self, rows: list[int] | None) -> None:
        # Outside the step: what a graph replays is the same every time.
        if self.noise is not None:
            self.noise.draw(rows)

    def _prepared_step(self) -> Callable[[], None]:
        """The step of a position: captured, compiled or as it is."""
        memory, step = self.context.memory, _step
        if self.compile_options is not None:
            step = compiled_step(_step, self.compile_options, (*self.constants, self.context.capacity))
        step = functools.partial(step, self)
        if self._is_capturable is None:
            self._is_capturable = self.is_static and self._can_capture()
        if self._is_capturable and memory.graph is None:
            memory.graph = self._capture(step)
            self._is_capturable = memory.graph is not None
        return memory.graph.replay if self._is_capturable else step

    def _can_capture(self) -> bool:
        return self.codes.device.type == "cuda" and _has_addresses(self.model)

    def _capture(self, step):
        """One step as a CUDA graph; `None`, with a warning, where something in it would wait for the device."""
        context = self.context
        # The columns it writes are written again.
        changed = [self.index, self.hidden_states, context.column, context.next_position, context.attention_mask]
        try:
            return capture(step, changed, self.codes.device)
        except HostWait as obstacle:
            logger.warning_once(f"The step of image generation cannot be a CUDA graph and runs eagerly: {obstacle}")
            return None

    def _step_key(self):
        """All that a captured step takes for constant; `None` where that cannot be told, or nothing is captured."""
        model = self.model
        if not self.is_static or not _has_addresses(model):
            return None
        parts = [model.model.language_model, model.depth_heads, model.model.visual_projector]
        parts += [model.vision_tokenizer.quantizer(kind) for kind in CODE_KINDS]
        weights = weights_key(parts)
        if weights is None:
            return None
        is_eager = model.config.text_config._attn_implementation == "eager"
        return (self.constants, self.compile_options and repr(sorted(self.compile_options.items())), is_eager, weights)

    def keep(self) -> None:
        """Keep a captured step, with the buffers it works in, for the next generation of the same kind."""
        is_grown = self.is_static and self.context.capacity != self.constants[2]
        if self.context.memory.graph is not None and self.key is not None and not is_grown:
            kept_steps.put(self.model, self.key, self.context.memory)


def _step(decoder: ImageDecoder) -> None:
    """Draw a position's codes from the hidden states and feed them, all in the decoder's and the context's buffers."""
    drawn = decoder._sample(decoder.hidden_states)
    decoder.codes.index_copy_(0, decoder.index, drawn.unsqueeze(0))
    embeds = decoder.model.model.embed_image_codes(*drawn.unsqueeze(2)).to(decoder.given_embeds.dtype)
    embeds = torch.where(decoder.is_given, decoder.given_embeds, embeds)
    decoder.hidden_states.copy_(decoder.context.advance(embeds))
    decoder.index.add_(1)


def _kind_of_step(model, generation_config) -> tuple[bool, dict | None]:
    """Whether the cache is static, and the options by which the step is compiled."""
    kind, unsupported = generation_config.cache_implementation, StaticContext.unsupported(model)
    if kind not in (None, "static", "dynamic"):
        raise ValueError(
            f"Image and interleaved generation take `cache_implementation` 'static' or 'dynamic', got {kind!r}."
        )
    if kind == "static" and unsupported is not None:
        raise ValueError(f"This model cannot draw images with a static cache: {unsupported}. Take 'dynamic'.")
    is_static = kind == "static" or (kind is None and unsupported is None)
    compile_config = getattr(generation_config, "compile_config", None)
    if compile_config is None or getattr(generation_config, "disable_compile", False):
        return is_static, None
    if not is_static:
        raise ValueError(
            "`compile_config` compiles a step of fixed shape: it needs a static cache, got a dynamic one."
        )
    return is_static, compile_config.to_dict()


def _has_addresses(model) -> bool:
    """Whether the weights lie where they are and stay there: not sharded, quantised or moved by accelerate's hooks."""
    hooks = (getattr(model, "hf_quantizer", None), getattr(model, "_hf_hook", None))
    return hooks == (None, None) and not is_sharded(model)


@contextmanager
def progress(show: bool, total: int, unit: str, device: torch.device) -> Iterator[Callable]:
    """A progress bar, as what is to be called after every step; it does nothing where none is wanted."""
    events = deque()

    def update():
        if device.type == "cuda":
            # The host runs ahead of a GPU. The bar waits for what was done a few steps before, so the GPU never idles.
            events.append(torch.cuda.Event())
            events[-1].record(torch.cuda.current_stream(device))
            if len(events) > _STEPS_AHEAD:
                events.popleft().synchronize()
        bar.update()

    with logging.tqdm(total=total, unit=unit, disable=not show) as bar:
        yield update if show else lambda: None


class InterleavedLoop:
    """
    Interleaved generation: at every step a row writes a token, draws a position, or waits.

    While every row that is not done draws, there is nothing to decide: as many positions as all of them have left are
    drawn at once, and the host learns of them at the end.

    Args:
        decoder ([`ImageDecoder`]): on a context of the prompts that has not begun yet.
        input_ids (`torch.LongTensor` of shape `(B, L)`): the prompts; a row that ends in `<image_start>` draws at once.
        budget (`int`): new tokens at most; an image counts N + 2, and none is started that could not be finished.
        text ([`TextSampler`]): chooses the tokens.
        on_image (callable, *optional*), streamer (transformers' `BaseStreamer`, *optional*): told of images and of text.
    """

    def __init__(
        self, decoder: ImageDecoder, input_ids: torch.LongTensor, budget: int, text: TextSampler, on_image, streamer
    ):
        self.model, self.context, self.decoder = decoder.model, decoder.context, decoder
        self.text, self.on_image, self.streamer = text, on_image, streamer
        self.start_id, self.image_id, self.end_id = self.model.config.special_image_token_ids
        self.num_positions = self.model.config.num_positions
        self.num_rows, self.length, self.end = len(input_ids), input_ids.shape[1], input_ids.shape[1] + budget
        self.sequences = F.pad(input_ids, (0, budget), value=text.pad_id)
        # Of every row: the positions drawn of its current image, if it is in one; the codes (M, n, D) of the positions of
        # every image, part by part; and whether it has ended.
        self.num_drawn: list[int | None] = [None] * self.num_rows
        self.images: list[list[list[torch.Tensor]]] = [[] for _ in input_ids]
        self.finished = [False] * self.num_rows

    def run(self, on_step: Callable) -> tuple[torch.LongTensor, list[list[torch.LongTensor]]]:
        """Returns the sequences `(B, L')` and the codes `(M, N, D)` of every row's new images."""
        prompts = self.sequences[:, : self.length]
        starts = (prompts[:, -1] == self.start_id).nonzero().flatten().tolist()
        for index in starts:
            self._begin_image(index)
        self.context.begin(starts)
        if self.streamer is not None:
            self.streamer.put(prompts.cpu())
        while self._goes_on():
            drawing = [i for i, count in enumerate(self.num_drawn) if count is not None and count < self.num_positions]
            if drawing and all(self.finished[index] or index in drawing for index in range(self.num_rows)):
                self._draw_on(drawing, on_step)
            else:
                self._step(drawing)
                on_step()
        if self.streamer is not None:
            self.streamer.end()
        return self.sequences[:, : self.length], [[image for (image,) in row] for row in self.images]

    def _goes_on(self) -> bool:
        return self.length < self.end and not all(self.finished)

    def _begin_image(self, index: int) -> None:
        self.num_drawn[index] = 0
        self.images[index].append([])

    def _draw_on(self, drawing: list[int], on_step: Callable) -> None:
        """Draw as many positions as every row that draws has left."""
        count = self.num_positions - max(self.num_drawn[index] for index in drawing)
        self._take(drawing, self.decoder.draw(count, drawing, on_position=on_step))
        self.sequences[drawing, self.length : self.length + count] = self.image_id
        self.length += count

    def _step(self, drawing: list[int]) -> None:
        """One token or position of every row."""
        tokens, starts = [self.text.pad_id] * self.num_rows, []
        writing = [i for i, count in enumerate(self.num_drawn) if count is None and not self.finished[i]]
        for index, count in enumerate(self.num_drawn):
            if count is not None:
                tokens[index] = self.image_id if index in drawing else self.end_id
                self.num_drawn[index] = count if index in drawing else None
        for index, token in zip(writing, self._write(writing) if writing else ()):
            tokens[index] = token
            self.finished[index] = token in self.text.eos_ids
            if token == self.start_id and not self.finished[index]:
                starts.append(index)
                self._begin_image(index)
        next_ids = torch.tensor(tokens, device=self.sequences.device)
        self.sequences[:, self.length] = next_ids
        self.length += 1
        if self.streamer is not None and writing:
            self.streamer.put(next_ids.cpu())
        if not self._goes_on():
            if drawing:
                self._take(drawing, self.decoder.sample(drawing).unsqueeze(2))
            return
        self.context.reserve(1)
        self.context.start_images(starts)
        embeds = self.model.get_input_embeddings()(next_ids[:, None])
        if drawing:
            self._take(drawing, self.decoder.draw(1, drawing, embeds))
        else:
            self.context.feed(embeds, conditional_only=not starts)

    def _write(self, writing: list[int]) -> list[int]:
        """The next tokens of the rows that write."""
        logits = text_logits(self.model.lm_head, self.context.hidden_states[: self.num_rows])
        barred = [self.image_id, self.end_id]
        if self.end - self.length < self.num_positions + 2:
            barred.append(self.start_id)
        return self.text.choose(self.sequences[:, : self.length], logits.float(), writing, barred)

    def _take(self, drawing: list[int], codes: torch.LongTensor) -> None:
        """Give the rows that draw their part of the codes `(M, B, n, D)`, and tell of images that are finished."""
        grid = self.model.config.vision_tokenizer_config.grid_size
        for index in drawing:
            images = self.images[index]
            images[-1].append(codes[:, index])
            self.num_drawn[index] += codes.shape[2]
            if self.num_drawn[index] == self.num_positions:
                self.decoder.sampler.check_scores(index)
                images[-1] = [torch.cat(images[-1], dim=1)]
                if self.on_image is not None:
                    self.on_image(tuple(images[-1][0].unflatten(1, (grid, grid))), index)
