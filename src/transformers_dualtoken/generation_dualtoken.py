"""Generation in three modes: `"text"`, `"image"` and `"interleaved"` (paper, section 3.2).

Text mode is the whole of transformers' `generate`. Image mode draws one image per row. In interleaved mode the model
decides at every step between text and a new image. Guidance (classifier-free) keeps a second, unconditional context
beside each image; both contexts see the same drawn codes.
"""

import copy
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.generation import GenerationMixin, LogitsProcessorList
from transformers.utils import ModelOutput, logging

from .generation_cache import Prompt, has_keys_and_values_only, repeated_images
from .generation_loop import TEXT_ROOM, ImageDecoder, InterleavedLoop, kept_steps, progress
from .generation_settings import GenerationArguments
from .generation_text import ImageTokenBar, ScoreCheck, TextSampler, as_ids, is_served, wants_plain_codes
from .transformers_compat import CACHE_NAME, given_cache, require_transformers


logger = logging.get_logger(__name__)


@dataclass
class DualTokenGenerateOutput(ModelOutput):
    """
    What image and interleaved generation return.

    Args:
        sequences (`torch.LongTensor` of shape `(B, L)`): prompts and new ids, placeholders included; padded on the
            right.
        pixel_codes, semantic_codes (`torch.LongTensor` of shape `(images, h, w, D)`): of the new images only, ordered
            by row, then by time.
        image_owner (`torch.LongTensor` of shape `(images,)`): the row of `sequences` an image belongs to.
    """

    sequences: torch.LongTensor | None = None
    pixel_codes: torch.LongTensor | None = None
    semantic_codes: torch.LongTensor | None = None
    image_owner: torch.LongTensor | None = None


class DualTokenGenerationMixin(GenerationMixin):
    """`generate` of [`DualTokenForCausalLM`]."""

    @torch.no_grad()
    def generate(self, inputs: torch.LongTensor | None = None, generation_config=None, **kwargs):
        """
        Generate text, an image per row, or both as the model decides.

        Args:
            inputs or input_ids (`torch.LongTensor` of shape `(B, L)`): prompts; left-padded in a batch.
            generation_config (`GenerationConfig` or `dict`, *optional*): settings; keywords count before it.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*).
            pixel_values, or pixel_codes and semantic_codes (*optional*): the prompts' images, as in the model's forward.
            generation_mode, guidance_scale, image_do_sample, image_top_k, ...: how images are drawn, see
                [`DualTokenImageGenerationConfig`].
            generator, on_image, progress_bar, negative_prompt_ids, ...: of this call, see
                [`DualTokenImageGenerationInputs`].
            max_new_tokens (`int`): ignored in image mode, with a warning; in interleaved mode an image counts N + 2.
            cache_implementation (`str`, *optional*): where images are drawn `"static"`, buffers of fixed shape and on a
                CUDA device one graph per position (the default where the language model allows it), or `"dynamic"`, a
                cache that grows. In float32 the codes are the same either way.
            compile_config (`CompileConfig`, *optional*): compiles the step of an image position, once for every size.
            kwargs: as in transformers. What a mode does not do is refused.

        Returns:
            Text mode: what transformers returns. Otherwise [`DualTokenGenerateOutput`]; to transformers' any-to-any
            pipeline, the pixel codes alone.

        Raises:
            TypeError: for arguments of the wrong kind.
            ValueError: for arguments out of range or of another mode, prompts or images that do not fit, scores that
                leave nothing to choose, or more images at once than a CPU has memory for.
            torch.OutOfMemoryError: for more images at once than a device has memory for, with how many to try.
        """
        # 1. The arguments, apart and checked; text is transformers' own.
        arguments = GenerationArguments(self.generation_config, generation_config, kwargs)
        mode, kwargs = arguments.mode, arguments.kwargs
        inputs = self._pop_prompt(inputs, kwargs)
        codes = self._pop_codes(kwargs)
        if mode == "text":
            return self._generate_text(inputs, codes, arguments)
        plain_codes = wants_plain_codes(self, mode)

        # 2. What is left for transformers' own settings, and what this mode cannot do.
        attention_mask = kwargs.pop("attention_mask", None)
        of_text = {}
        if mode == "interleaved":
            of_text = {name: kwargs.pop(name, None) for name in ("logits_processor", "streamer")}
        # Not left to transformers, which refuses copies of a greedy row: here the images differ even so.
        num_return_sequences = int(arguments.value("num_return_sequences", 1))
        kwargs.pop("num_return_sequences", None)
        config, left = self._prepare_generation_config(arguments.generation_config, **kwargs)
        arguments.generation_config = config
        without_effect = {"return_dict", "synced_gpus", "trust_remote_code"}
        arguments.refuse([name for name, value in left.items() if value is not None and name not in without_effect])
        if inputs is None:
            raise ValueError(f"`generation_mode={mode!r}` needs `input_ids`.")
        if self.training and self.is_gradient_checkpointing:
            raise ValueError(
                f"`generation_mode={mode!r}` needs a cache, which gradient checkpointing does without in training: "
                "call `model.eval()` first."
            )
        self._prepare_special_tokens(config, attention_mask is not None, device=inputs.device)

        # 3. The prompts, and with guidance the negative ones.
        prompt = Prompt(inputs, self._prompt_mask(inputs, attention_mask, config), codes)
        if mode == "image":
            prompt = self._end_in_image_start(prompt)
        elif (inputs[:, -1] == self.config.image_token_id).any():
            raise ValueError("A prompt must not end within an image: `<image_end>` closes it.")
        rows = len(prompt) * num_return_sequences
        generators = arguments.inputs.generator
        if isinstance(generators, (list, tuple)) and len(generators) != rows:
            raise ValueError(
                f"A list as `generator` must have one for every row, {rows} (prompts times `num_return_sequences`), "
                f"got {len(generators)}."
            )
        prompts = [prompt, self._negative_prompt(prompt, arguments)]
        if arguments.settings.guidance_scale == 1:
            if arguments.inputs.negative_prompt_ids is not None:
                logger.warning_once("`guidance_scale=1.0` is no guidance and passes over the negative prompt.")
            prompts = [prompt]

        # 4. The loop.
        with _advice_on_memory(rows):
            if mode == "image":
                output = self._generate_image(prompts, rows, arguments)
                return output.pixel_codes if plain_codes else output
            return self._generate_interleaved(prompts, rows, arguments, **of_text)

    def release_generation_graphs(self) -> None:
        """
        Free what drawing on a CUDA device keeps for the next call: the captured step of the last size drawn, and the
        buffers it works in, its key-value cache among them. So do `train()`, whatever moves the weights (`to`, `cpu`,
        ...), and drawing at another size.
        """
        kept_steps.take(self)

    # Image and interleaved mode.

    def _generate_image(self, prompts: list[Prompt], rows: int, arguments: GenerationArguments):
        """One image for each of the rows; a [`DualTokenGenerateOutput`]."""
        num_positions, inputs = self.config.num_positions, arguments.inputs
        decoder = ImageDecoder(self, prompts, rows, num_positions, arguments)
        input_ids = prompts[0].input_ids.repeat_interleave(rows // len(prompts[0]), 0)
        decoder.context.begin(list(range(rows)))
        with progress(inputs.progress_bar, num_positions, "position", input_ids.device) as on_position:
            codes = decoder.draw(num_positions, feed_last=False, on_position=on_position)
        decoder.sampler.check_scores()
        # Only now: another thread may take what is kept, and the scores are in it.
        decoder.keep()
        _, image_id, end_id = self.config.special_image_token_ids
        sequences = F.pad(F.pad(input_ids, (0, num_positions), value=image_id), (0, 1), value=end_id)
        output = self._output(sequences, codes, range(rows))
        for owner, pair in enumerate(zip(output.pixel_codes, output.semantic_codes)):
            if inputs.on_image is not None:
                inputs.on_image(pair, owner)
        return output

    def _generate_interleaved(
        self, prompts: list[Prompt], rows: int, arguments: GenerationArguments, logits_processor, streamer
    ):
        """Text and images as every row decides; a [`DualTokenGenerateOutput`]."""
        config, num_positions = arguments.generation_config, self.config.num_positions
        prompt_ids = prompts[0].input_ids
        budget = arguments.new_tokens(prompt_ids.shape[1], default=2 * (num_positions + 2) + TEXT_ROOM)
        config.max_length = prompt_ids.shape[1] + budget
        # A checkpoint's config keeps image ids out of engines that return text alone; what a keyword says is the caller's.
        start, image_ids = self.config.image_start_token_id, set(self.config.special_image_token_ids)
        suppressed = set(as_ids(config.suppress_tokens))
        if arguments.kwargs.get("suppress_tokens") is None and image_ids <= suppressed:
            config.suppress_tokens = sorted(suppressed - image_ids) or None
        if arguments.kwargs.get("eos_token_id") is None and config.eos_token_id is not None:
            config.eos_token_id = [token for token in as_ids(config.eos_token_id) if token != start]
        if streamer is not None and rows > 1:
            raise ValueError(f"A streamer takes one row, got {rows}.")
        if len(prompts) == 2 and not has_keys_and_values_only(self):
            raise ValueError(
                "Interleaved generation with guidance needs a language model whose past is keys and values alone: a "
                "recurrent state cannot forget one image for the next. Pass `guidance_scale=1.0`."
            )
        if budget < num_positions + 1 and (prompt_ids[:, -1] == start).any():
            raise ValueError(
                f"The prompt asks for an image, which takes {num_positions + 1} tokens, but `max_new_tokens` is {budget}."
            )
        decoder = ImageDecoder(self, prompts, rows, budget, arguments)
        input_ids = prompt_ids.repeat_interleave(rows // len(prompt_ids), 0)
        bar = ImageTokenBar([])
        processors = self._get_logits_processor(
            config,
            input_ids_seq_length=input_ids.shape[1],
            encoder_input_ids=input_ids,
            prefix_allowed_tokens_fn=None,
            logits_processor=[*(logits_processor or []), bar],
            device=input_ids.device,
        )
        vocab_size, inputs = self.config.get_text_config().vocab_size, arguments.inputs
        text = TextSampler(processors, bar, config, inputs.generator, vocab_size)
        loop = InterleavedLoop(decoder, input_ids, budget, text, inputs.on_image, streamer)
        with progress(inputs.progress_bar, budget, "token", input_ids.device) as on_step:
            sequences, images = loop.run(on_step)
        decoder.keep()
        owners = [index for index, row in enumerate(images) for _ in row]
        codes = [image for row in images for image in row]
        shape = (2, 0, num_positions, self.config.num_depths)
        return self._output(sequences, torch.stack(codes, 1) if codes else sequences.new_empty(shape), owners)

    def _output(self, sequences: torch.LongTensor, codes: torch.LongTensor, owners) -> DualTokenGenerateOutput:
        """From codes `(M, images, N, D)` and the images' rows."""
        grid = self.config.vision_tokenizer_config.grid_size
        pixel_codes, semantic_codes = codes.unflatten(2, (grid, grid))
        owners = torch.tensor(list(owners), dtype=torch.long, device=sequences.device)
        return DualTokenGenerateOutput(sequences, pixel_codes, semantic_codes, owners)

    # Text mode: transformers' own generate.

    def _generate_text(self, inputs, codes, arguments: GenerationArguments):
        kwargs = arguments.kwargs
        if codes is not None:
            kwargs["pixel_codes"], kwargs["semantic_codes"] = codes
        self._drop_cached_images(inputs, kwargs)
        if inputs is not None and (inputs[:, -1] == self.config.image_start_token_id).any():
            logger.warning(
                "The prompt ends in `<image_start>`, which asks for an image, but text mode writes none: pass "
                "`generation_mode='image'` or `'interleaved'`."
            )
        check, config = ScoreCheck(), arguments.generation_config
        processors = [*(kwargs.get("logits_processor") or []), check]
        if is_served():
            # The client gets text alone: the answer ends where the image would begin, of which text after it would speak.
            start, config = self.config.image_start_token_id, copy.deepcopy(config or self.generation_config)
            config.eos_token_id = self._ends_and_image_start(config)
            config.suppress_tokens = sorted(set(as_ids(config.suppress_tokens)) - {start}) or None
            processors.append(ImageTokenBar([i for i in self.config.special_image_token_ids if i != start]))
        kwargs["logits_processor"] = LogitsProcessorList(processors)
        output = super().generate(inputs, generation_config=config, **kwargs)
        check.raise_if_empty()
        return output

    def _prepare_generation_config(self, *args, **kwargs):
        generation_config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        # Guidance is of images only: transformers' processor must not guide text, an assistant's neither.
        generation_config.guidance_scale = 1.0
        return generation_config, model_kwargs

    def _get_logits_processor(self, generation_config, *args, logits_processor=None, **kwargs) -> LogitsProcessorList:
        """
        Transformers' processors with the image tokens barred, for every kind of generation. In between lie the caller's;
        a [`ScoreCheck`] among them comes to the end. Continuous batching asks here with a generation config as it is.
        """
        if generation_config.guidance_scale not in (None, 1):
            generation_config = copy.copy(generation_config)
            generation_config.guidance_scale = 1.0
        forced, size = generation_config.forced_eos_token_id, self.config.get_text_config().vocab_size
        if forced is not None and (torch.as_tensor(forced) >= size).any():
            raise ValueError(f"`forced_eos_token_id` must be of the vocabulary of {size} ids, got {forced}.")
        given = list(logits_processor or [])
        checks = [part for part in given if isinstance(part, ScoreCheck)]
        for check in checks:
            # Of transformers' `generate`, which has them on the device.
            ended = [getattr(generation_config, f"_{kind}_token_tensor", None) for kind in ("eos", "pad")]
            check.ended_ids = [token_ids.flatten() for token_ids in ended if token_ids is not None]
            check.num_beams = generation_config.num_beams or 1
        bars = [part for part in given if isinstance(part, ImageTokenBar)]
        bar = bars[0] if bars else ImageTokenBar(self.config.special_image_token_ids)
        others = [part for part in given if part not in [*checks, *bars]]
        processors = super()._get_logits_processor(
            generation_config, *args, logits_processor=LogitsProcessorList([*others, bar]), **kwargs
        )
        return LogitsProcessorList([bar, *processors, *checks[:1]])

    def generate_batch(self, inputs, *args, **kwargs):
        """transformers' continuous batching: text to prompts of text (lists of ids)."""
        # Before, it looks for the sizes of the language model in the config of the whole.
        require_transformers("5.17", "Continuous batching")
        with_images = [i for i, row in enumerate(inputs) if self.config.image_token_id in row]
        if with_images:
            raise ValueError(
                f"Continuous batching takes no images, but prompts {with_images} hold some: use `generate`."
            )
        return super().generate_batch(inputs, *args, **kwargs)

    def _drop_cached_images(self, inputs: torch.LongTensor | None, kwargs: dict) -> None:
        """Going on with ids `(B, L)` from a cache: of a whole conversation's codes, those of later images are fed."""
        cache = given_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        codes = kwargs.get("pixel_codes")
        cached_length = cache.get_seq_length() if cache is not None else 0
        if inputs is None or codes is None or not 0 < cached_length < inputs.shape[1]:
            return
        image_mask = inputs == self.config.image_token_id
        if len(codes) * self.config.num_positions != int(image_mask.sum()):
            return
        is_new = image_mask & (torch.arange(inputs.shape[1], device=inputs.device) >= cached_length)
        is_new = is_new[image_mask].view(len(codes), -1).any(-1)
        for name in ("pixel_codes", "semantic_codes"):
            kwargs[name] = kwargs[name][is_new] if is_new.any() else None

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, is_first_iteration=False, **kwargs):
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        # Images go with the whole sequence, also in an assistant's prefill, which is no first iteration; where only the
        # end of it is fed they are in the cache.
        if is_first_iteration or (inputs_embeds is None and model_inputs["input_ids"].shape[1] == input_ids.shape[1]):
            return model_inputs
        return {name: value for name, value in model_inputs.items() if name not in ("pixel_codes", "semantic_codes")}

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Images are flat over the batch: each row's group of images is repeated with its row."""
        codes = {name: model_kwargs.pop(name, None) for name in ("pixel_codes", "semantic_codes")}
        if expand_size > 1 and codes["pixel_codes"] is not None:
            inputs_embeds = model_kwargs.get("inputs_embeds")
            image_mask = self.model.image_mask(None if inputs_embeds is not None else input_ids, inputs_embeds)
            self.model.check_placeholders(image_mask, len(codes["pixel_codes"]))
            order = repeated_images(image_mask, expand_size, self.config.num_positions)
            codes = {name: None if value is None else value[order] for name, value in codes.items()}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        model_kwargs.update({name: value for name, value in codes.items() if value is not None})
        return input_ids, model_kwargs

    def _ends_and_image_start(self, generation_config) -> list[int]:
        """The ids that end a text, and `<image_start>`, for engines that return text alone."""
        ids, start = as_ids(generation_config.eos_token_id), self.config.image_start_token_id
        return ids if start in ids else [*ids, start]

    # Prompts.

    def _pop_prompt(self, inputs, kwargs: dict) -> torch.LongTensor | None:
        """The ids `(B, L)`, looked at before anything runs; `None` is left to transformers."""
        input_ids = kwargs.pop("input_ids", None)
        if inputs is not None and input_ids is not None:
            raise ValueError("The prompt comes either as `inputs` or as `input_ids`, not as both.")
        inputs = input_ids if inputs is None else inputs
        if inputs is None:
            return None
        if kwargs.get("inputs_embeds") is not None and isinstance(inputs, torch.Tensor) and inputs.shape[-1:] == (0,):
            # As transformers gives ids that are to be written after embeddings alone.
            return inputs
        inputs = self._checked_ids(inputs, "The prompt")
        # Going on from a cache, a mask may be longer.
        if kwargs.get("past_key_values") is None and kwargs.get("cache") is None:
            _check_mask(kwargs.get("attention_mask"), inputs, "attention_mask")
        return inputs

    def _checked_ids(self, ids, what: str) -> torch.LongTensor:
        """Ids `(B, L)` as int64."""
        if not isinstance(ids, torch.Tensor):
            given = type(ids).__name__
            raise TypeError(
                f"{what} must be a tensor of ids, got {given}: pass what the processor returns as `**inputs`."
            )
        if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
            raise TypeError(f"{what} must be ids, whole numbers, got {ids.dtype}.")
        if ids.ndim != 2 or ids.numel() == 0:
            raise ValueError(
                f"{what} must be ids of shape (B, L), at least one row with at least one token, got {tuple(ids.shape)}."
            )
        ids, vocab_size = ids.long(), self.config.get_text_config().vocab_size
        low, high = torch.stack(ids.aminmax()).tolist()
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"{what} must hold ids from 0 to {vocab_size - 1}, the vocabulary's, got ids from {low} to {high}."
            )
        return ids

    def _pop_codes(self, values: dict, prefix: str = "") -> tuple[torch.LongTensor, torch.LongTensor] | None:
        """Take a prompt's images out, as codes `(images, h, w, D)`."""
        pixel_values, *codes = (
            values.pop(f"{prefix}{name}", None) for name in ("pixel_values", "pixel_codes", "semantic_codes")
        )
        if codes == [None, None]:
            # Once here, rather than at every forward and for every copy of a row.
            return None if pixel_values is None else self.model.get_image_codes(pixel_values)
        if pixel_values is not None:
            raise ValueError(f"Images come either as `{prefix}pixel_values` or as codes, not as both.")
        # Of narrow kinds, which codes are kept in, the range cannot be looked at.
        codes = [None if part is None else part.long() for part in codes]
        self.model.check_image_codes(*codes)
        return tuple(codes)

    def _prompt_mask(self, input_ids, attention_mask, config, name: str = "attention_mask") -> torch.LongTensor:
        """The mask `(B, L)` of prompts padded on the left."""
        if attention_mask is not None:
            _check_mask(attention_mask, input_ids, name)
            if (attention_mask[:, -1] == 0).any():
                raise ValueError(f"Prompts must be padded on the left, but `{name}` hides the last token of a row.")
            return attention_mask.to(input_ids)
        pad = config.pad_token_id
        if pad is None or pad in as_ids(config.eos_token_id):
            return torch.ones_like(input_ids)
        # As transformers does: only padding in front of a prompt.
        return (input_ids != pad).long().cummax(-1).values

    def _end_in_image_start(self, prompt: Prompt) -> Prompt:
        start = self.config.image_start_token_id
        ends = prompt.input_ids[:, -1] == start
        if ends.all():
            return prompt
        if ends.any():
            raise ValueError(
                f"Either all prompts of a batch end in `<image_start>` (id {start}) or none; rows "
                f"{(~ends).nonzero().flatten().tolist()} do not."
            )
        ids, mask = F.pad(prompt.input_ids, (0, 1), value=start), F.pad(prompt.attention_mask, (0, 1), value=1)
        return Prompt(ids, mask, prompt.codes)

    def _negative_prompt(self, prompt: Prompt, arguments: GenerationArguments) -> Prompt:
        """The unconditional context: one for all prompts, or one for each."""
        num_prompts, start = len(prompt), self.config.image_start_token_id
        given = vars(arguments.inputs).items()
        negative = {name: value for name, value in given if name.startswith("negative_") and value is not None}
        ids = negative.pop("negative_prompt_ids", None)
        if ids is None:
            if negative:
                raise ValueError(f"{', '.join(negative)} need `negative_prompt_ids`.")
            ids = torch.full_like(prompt.input_ids[:1, :1], start)
            return Prompt(ids, torch.ones_like(ids), None)
        if ids.ndim != 2 or ids.shape[1] == 0 or len(ids) not in (1, num_prompts):
            raise ValueError(
                f"`negative_prompt_ids` must have shape (1, L) or one row per prompt, got {tuple(ids.shape)} for "
                f"{num_prompts} prompts."
            )
        ids = self._checked_ids(ids.to(prompt.input_ids.device), "`negative_prompt_ids`")
        if (ids[:, -1] != start).any():
            raise ValueError(f"`negative_prompt_ids` must end in `<image_start>` (id {start}) in every row.")
        name = "negative_prompt_attention_mask"
        mask = self._prompt_mask(ids, negative.pop(name, None), arguments.generation_config, name)
        return Prompt(ids, mask, self._pop_codes(negative, prefix="negative_"))


@contextmanager
def _advice_on_memory(rows: int):
    """What a device says that is out of memory, with how many rows to try."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        advice = f"try {rows // 2} (prompts times `num_return_sequences`)" if rows > 1 else "not even one fits"
        raise torch.OutOfMemoryError(
            f"{rows} image(s) at once are too many for the device: {advice}. {error}"
        ) from error


def _check_mask(attention_mask, input_ids: torch.LongTensor, name: str) -> None:
    given = None if attention_mask is None else getattr(attention_mask, "shape", type(attention_mask).__name__)
    if given is not None and given != input_ids.shape:
        given = tuple(given) if isinstance(given, torch.Size) else given
        raise ValueError(f"`{name}` must have the shape of the ids, {tuple(input_ids.shape)}, got {given}.")
