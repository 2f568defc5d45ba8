"""What the language model has seen: prompts, and the state of generation that grows from them.

With guidance every row has a second, unconditional one. Both kinds lie in one batch and one cache, the conditional rows
first, so that the weights are read once for both. A row's mask shows it what is its own: the unconditional one of a row
sees the negative prompt (if any) and the row's current image, and counts its positions from there, as if it were alone.
"""

import threading
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .generation_graph import StepMemory
from .sharding import is_sharded
from .transformers_compat import CACHE_NAME


@dataclass
class Prompt:
    """A batch of prompts: ids and mask `(B, L)`, and their images' codes `(images, h, w, D)` in reading order."""

    input_ids: torch.LongTensor
    attention_mask: torch.LongTensor
    codes: tuple[torch.LongTensor, torch.LongTensor] | None

    def __len__(self) -> int:
        return len(self.input_ids)

    def without_last(self) -> "Prompt":
        return Prompt(self.input_ids[:, :-1], self.attention_mask[:, :-1], self.codes)


@dataclass
class _Prefill:
    """Keys and values `(B, heads, L, head_dim)` of every layer for the prompts so far; none of an empty prompt."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    attention_mask: torch.LongTensor
    cache: DynamicCache | None = None

    @classmethod
    def of(cls, model, prompt: Prompt) -> "_Prefill":
        """All of the prompts but their last token."""
        prefix = prompt.without_last()
        if prefix.input_ids.shape[1] > 0:
            cache = cls._feed(model, prefix)
            return cls([(layer.keys, layer.values) for layer in cache.layers], prefix.attention_mask, cache)
        num_images = 0 if prompt.codes is None else len(prompt.codes[0])
        model.model.check_placeholders(model.model.image_mask(prompt.input_ids, None), num_images)
        if is_sharded(model):
            # For the sake of ranks with longer prompts: all must run the same modules.
            cls._feed(model, prompt)
        return cls([], prefix.attention_mask)

    @staticmethod
    def _feed(model, prompt: Prompt) -> DynamicCache:
        inputs = {"input_ids": prompt.input_ids, "attention_mask": prompt.attention_mask}
        if prompt.codes is not None:
            inputs["pixel_codes"], inputs["semantic_codes"] = prompt.codes
        cache = DynamicCache(config=model.config.text_config)
        model.model(**inputs, past_key_values=cache, use_cache=True)
        return cache

    @classmethod
    def of_all(cls, model, prompts: list[Prompt], rows: int, pad_token_id: int) -> "_Prefill":
        """All rows of all prompts in one batch: for caches that know more of a row than keys and values."""
        length = max(prompt.input_ids.shape[1] for prompt in prompts)
        ids, masks, codes = [], [], []
        for prompt in prompts:
            repeats, missing = rows // len(prompt), length - prompt.input_ids.shape[1]
            ids.append(F.pad(prompt.input_ids, (missing, 0), value=pad_token_id).repeat_interleave(repeats, 0))
            masks.append(F.pad(prompt.attention_mask, (missing, 0)).repeat_interleave(repeats, 0))
            if prompt.codes is not None:
                image_mask = model.model.image_mask(prompt.input_ids, None)
                order = model._image_order(image_mask, len(prompt.codes[0]), repeats)
                codes.append(tuple(kind[order] for kind in prompt.codes))
        codes = tuple(torch.cat(kind) for kind in zip(*codes)) if codes else None
        whole = Prompt(torch.cat(ids), torch.cat(masks), codes)
        prefix = whole.without_last()
        if prefix.input_ids.shape[1] == 0:
            return cls([], prefix.attention_mask)
        return cls([], prefix.attention_mask, cls._feed(model, prefix))

    def __len__(self) -> int:
        return self.attention_mask.shape[1]

    def layer(self, index: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's keys and values for `rows` rows, every prompt repeated in place."""
        return tuple(part.repeat_interleave(rows // len(part), 0) for part in self.layers[index])

    def mask(self, rows: int, length: int) -> torch.LongTensor:
        """The mask `(rows, length)`, padded on the left."""
        mask = self.attention_mask.repeat_interleave(rows // len(self.attention_mask), 0)
        return F.pad(mask, (length - len(self), 0))


class Context:
    """
    The language model's state over the rows of a generation, in a cache that grows: for every kind of backbone.

    A recurrent one cannot forget what its unconditional rows have seen: with guidance it may draw one image, not go on
    to the next.

    Args:
        model ([`DualTokenForCausalLM`]).
        prompt ([`Prompt`]): all of it but the last token is fed at once; [`begin`] feeds that.
        rows (`int`): a multiple of the prompts; each is repeated in place, once it has been fed.
        negative_prompt ([`Prompt`], *optional*): of all rows, or one for each or for each prompt; ends in
            `<image_start>`, which a row is fed when its image starts. With it there are as many unconditional rows.
        max_new_tokens (`int`): how many tokens will be fed at most, that last one included.
        block (`int`, *optional*): a static context has a multiple of this many columns.
        memory ([`StepMemory`], *optional*): where a static context of the same rows and columns lay before.
    """

    # Whole blocks for the attention kernels.
    BLOCK = 32

    def __init__(
        self,
        model,
        prompt: Prompt,
        rows: int,
        negative_prompt: Prompt | None,
        max_new_tokens: int,
        block: int | None = None,
        memory: StepMemory | None = None,
    ):
        self.block, self.memory = block or self.BLOCK, memory or StepMemory()
        self.model, self.rows, self.guided = model, rows, negative_prompt is not None
        last_ids = prompt.input_ids[:, -1:].repeat_interleave(rows // len(prompt), 0)
        self.last_embeds = model.model.for_backbone(model.get_input_embeddings()(last_ids))
        prompts = [prompt, negative_prompt] if self.guided else [prompt]
        if has_keys_and_values_only(model):
            prefills = [_Prefill.of(model, part) for part in prompts]
        else:
            prefills = [_Prefill.of_all(model, prompts, rows, model.config.image_start_token_id)]
        self.prefix_length = max(map(len, prefills))
        rows_of_each = rows * len(prompts) // len(prefills)
        self.prefix_mask = torch.cat([prefill.mask(rows_of_each, self.prefix_length) for prefill in prefills])
        # The next position of every row, (R, 1).
        self.next_position = self.prefix_mask.sum(-1, keepdim=True)
        self.hidden_states: torch.Tensor | None = None
        self._build(prefills, max_new_tokens)

    def _build(self, prefills: list[_Prefill], max_new_tokens: int) -> None:
        longest = max(prefills, key=len)
        self.attention_mask = self.prefix_mask
        self.cache = longest.cache
        if self.cache is None:
            self.cache = DynamicCache(config=self.model.config.text_config)
        if not longest.layers:
            return
        for index, layer in enumerate(self.cache.layers):
            # A window of the past holds its end, and where others have less there is nothing to see.
            length = layer.keys.shape[2]
            sides = []
            for prefill in prefills:
                if not prefill.layers:
                    sides.append(tuple(part.new_zeros(self.rows, *part.shape[1:]) for part in longest.layers[index]))
                    continue
                parts = prefill.layer(index, self.rows)
                sides.append(tuple(F.pad(part, (0, 0, length - part.shape[2], 0)) for part in parts))
            layer.keys, layer.values = (torch.cat(part) for part in zip(*sides))

    def begin(self, drawing: list[int]) -> None:
        """Feed the prompts' last tokens; with those of the rows `drawing`, which are `<image_start>`, images begin."""
        self.start_images(drawing)
        self.feed(self.last_embeds, conditional_only=not drawing)

    def start_images(self, rows: list[int]) -> None:
        """What is fed next begins an image of these rows: their unconditional rows forget what came before."""
        if self.guided and rows:
            rows = self._unconditional(rows)
            self.attention_mask = self.attention_mask.clone()
            self.attention_mask[rows, self.prefix_length :] = 0
            self.next_position[rows] = self.prefix_mask[rows].sum(-1, keepdim=True)

    def _unconditional(self, rows: list[int]) -> slice | torch.LongTensor:
        if len(rows) == self.rows:
            return slice(self.rows, None)
        return torch.tensor(rows, device=self.prefix_mask.device) + self.rows

    def feed(self, embeds: torch.Tensor, conditional_only: bool = False) -> torch.Tensor:
        """
        Feed one embedding per row, `(B, 1, H)`: the unconditional rows get the same.

        Args:
            conditional_only (`bool`, defaults to `False`): no row is in an image, so that the unconditional rows may
                be left out. A growing cache feeds them all the same.

        Returns:
            `torch.Tensor` of shape `(R, H)`: the new hidden states, conditional rows first.
        """
        ones = self.attention_mask.new_ones(len(self.attention_mask), 1)
        self.attention_mask = torch.cat([self.attention_mask, ones], dim=1)
        self.hidden_states = self._run(embeds, self.attention_mask, self.next_position, self.cache)
        self.next_position = self.next_position + 1
        return self.hidden_states

    def _run(self, embeds, attention_mask, position_ids, cache) -> torch.Tensor:
        # As the text's embeddings, also under autocast, where the projector's are of another dtype.
        embeds = embeds.to(self.last_embeds.dtype)
        outputs = self.model.model.language_model(
            inputs_embeds=embeds.repeat(len(position_ids) // len(embeds), 1, 1),
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            return_dict=True,
            **{CACHE_NAME: cache},
        )
        return outputs.last_hidden_state[:, -1]

    def has_room(self, num_tokens: int) -> bool:
        return True

    def reserve(self, num_tokens: int) -> None:
        """Make room for that many more tokens."""

    def attention(self):
        """The attention that [`feed`] runs with, as a context manager."""
        return nullcontext()


class _Buffers:
    """One layer's keys and values `(R, heads, columns, head_dim)`, made when the first of them are known."""

    def __init__(self, memory: StepMemory, layer: int, rows: int, capacity: int):
        self.memory, self.names = memory, (f"keys_{layer}", f"values_{layer}")
        self.rows, self.capacity = rows, capacity
        self.keys_and_values: list[torch.Tensor] | None = None

    def make(self, *examples: torch.Tensor) -> None:
        if self.keys_and_values is None:
            self.keys_and_values = [
                self.memory.zeros(name, (self.rows, example.shape[1], self.capacity, example.shape[3]), example)
                for name, example in zip(self.names, examples)
            ]

    def fill(self, rows: slice, columns: slice, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.make(keys, values)
        for buffer, part in zip(self.keys_and_values, (keys, values)):
            buffer[rows, :, columns] = part

    def grow(self, capacity: int) -> None:
        added, self.capacity = capacity - self.capacity, capacity
        if self.keys_and_values is not None:
            for index, name in enumerate(self.names):
                # One after the other: only one is there twice.
                self.keys_and_values[index] = F.pad(self.keys_and_values[index], (0, 0, 0, added))
                self.memory.replace(name, self.keys_and_values[index])


class _SharedColumnLayer(StaticLayer):
    """The first rows of buffers of fixed shape; all layers write into the column that one tensor names."""

    def __init__(self, buffers: _Buffers, rows: int, column: torch.LongTensor):
        super().__init__(max_cache_len=buffers.capacity)
        self.buffers, self.rows, self.column = buffers, rows, column
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        self.buffers.make(key_states, value_states)
        self.keys, self.values = (buffer[: self.rows] for buffer in self.buffers.keys_and_values)
        # Under autocast values are made in another dtype than the cache of a prompt holds them in.
        self.keys.index_copy_(2, self.column, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.column, value_states.to(self.values.dtype))
        return self.keys, self.values

    def get_seq_length(self) -> torch.LongTensor:
        return self.column


class StaticContext(Context):
    """
    The same in buffers of fixed shape: a step is the same kernels on the same addresses, whatever has gone before.

    [`advance`] depends on no value that the host would have to wait for, so it can be captured in a CUDA graph or
    compiled once. The buffers double where more room is needed.
    """

    def attention(self):
        return _step_attention(self.model.model.language_model)

    @staticmethod
    def unsupported(model) -> str | None:
        """Why `model` cannot have it, as the end of a sentence; `None` if it can."""
        if not has_keys_and_values_only(model, windows=False):
            return "its language model has layers with other than full attention"
        if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
            return "it lies on several devices"
        return None

    def _build(self, prefills: list[_Prefill], max_new_tokens: int) -> None:
        device, num_rows = self.prefix_mask.device, len(self.prefix_mask)
        self.length = self.prefix_length
        self.capacity = self.capacity_for(self.prefix_length, max_new_tokens, self.block)
        # The column that is written next.
        self.column = self.memory.place("column", torch.full((1,), self.length, device=device))
        self.next_position = self.memory.place("next_position", self.next_position)
        num_layers = self.model.config.text_config.num_hidden_layers
        self.buffers = [_Buffers(self.memory, index, num_rows, self.capacity) for index in range(num_layers)]
        for index, buffers in enumerate(self.buffers):
            for side, prefill in enumerate(prefills):
                if prefill.layers:
                    rows = slice(side * self.rows, (side + 1) * self.rows)
                    columns = slice(self.prefix_length - len(prefill), self.prefix_length)
                    buffers.fill(rows, columns, *prefill.layer(index, self.rows))
        self._make_caches()
        # Added to the scores of attention.
        dtype = self.last_embeds.dtype
        self.hidden_value = torch.finfo(dtype).min
        shape = (num_rows, 1, 1, self.capacity)
        hidden = torch.full(shape, self.hidden_value, dtype=dtype, device=device)
        hidden[:, 0, 0, : self.prefix_length].masked_fill_(self.prefix_mask.bool(), 0)
        self.attention_mask = self.memory.place("attention_mask", hidden)

    @classmethod
    def capacity_for(cls, prefix_length: int, max_new_tokens: int, block: int | None = None) -> int:
        """The columns of a context of prompts of `prefix_length` tokens without their last ones."""
        block = block or cls.BLOCK
        return -(-(prefix_length + max_new_tokens) // block) * block

    def _make_caches(self) -> None:
        def cache(rows):
            return Cache(layers=[_SharedColumnLayer(buffers, rows, self.column) for buffers in self.buffers])

        self.cache = cache(len(self.prefix_mask))
        # The conditional rows alone, in the same memory.
        self.conditional_cache = cache(self.rows)

    def start_images(self, rows: list[int]) -> None:
        if self.guided and rows:
            rows = self._unconditional(rows)
            self.attention_mask[rows, ..., self.prefix_length :] = self.hidden_value
            self.next_position[rows] = self.prefix_mask[rows].sum(-1, keepdim=True)

    def feed(self, embeds: torch.Tensor, conditional_only: bool = False) -> torch.Tensor:
        with self.attention():
            self.hidden_states = self.advance(embeds, conditional_only)
        self.length += 1
        return self.hidden_states

    def advance(self, embeds: torch.Tensor, conditional_only: bool = False) -> torch.Tensor:
        """[`feed`] without the host's own count of the columns, `length`, which is then the caller's to keep."""
        rows = self.rows if conditional_only else len(self.next_position)
        cache = self.conditional_cache if conditional_only else self.cache
        self.attention_mask.index_fill_(3, self.column, 0)
        hidden_states = self._run(embeds, self.attention_mask[:rows], self.next_position[:rows], cache)
        self.column.add_(1)
        self.next_position.add_(1)
        return hidden_states

    def has_room(self, num_tokens: int) -> bool:
        return self.length + num_tokens <= self.capacity

    def reserve(self, num_tokens: int) -> None:
        if self.has_room(num_tokens):
            return
        grown = self.capacity_for(0, max(self.length + num_tokens, 2 * self.capacity), self.block)
        # The caches and the graph hold on to the old buffers.
        self.cache = self.conditional_cache = self.memory.graph = None
        for buffers in self.buffers:
            buffers.grow(grown)
        wider = F.pad(self.attention_mask, (0, grown - self.capacity), value=self.hidden_value)
        self.attention_mask = self.memory.replace("attention_mask", wider)
        self.capacity = grown
        self._make_caches()


_STEP_ATTENTION = "dualtoken_step"


def _grouped_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """
    transformers' `sdpa`, but for one token `(R, heads, 1, head_dim)` under a mask without copies of keys and values.

    The query heads that share a key head are the rows of its attention. Elsewhere keys and values are repeated for
    them: by transformers before 5.23, and under `torch.compile` by later ones too.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    is_plain = kwargs.get("softcap") is None and kwargs.get("position_bias") is None
    is_step = query.shape[2] == 1 and attention_mask is not None and attention_mask.shape[1:3] == (1, 1)
    if groups == 1 or not is_step or not is_plain:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    grouped = query.reshape(len(query), -1, groups, query.shape[3])
    output = F.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return output.reshape(len(query), 1, -1, value.shape[3]), None


AttentionInterface.register(_STEP_ATTENTION, _grouped_attention)
AttentionMaskInterface.register(_STEP_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])

# Of the language models that run steps: how many threads do, and the attention given, which the last one puts back.
_in_steps = weakref.WeakKeyDictionary()
_in_steps_lock = threading.Lock()


@contextmanager
def _step_attention(language_model):
    """
    The attention of a step as the language model's, unless that is `eager`.

    Flash attention, for one, takes no mask of columns; for one new token it gains little.
    """
    config = language_model.config
    with _in_steps_lock:
        is_changed = config._attn_implementation != "eager"
        if is_changed:
            state = _in_steps.setdefault(language_model, [0, config._attn_implementation])
            state[0] += 1
            config._attn_implementation = _STEP_ATTENTION
    try:
        yield
    finally:
        if is_changed:
            with _in_steps_lock:
                state[0] -= 1
                if state[0] == 0:
                    config._attn_implementation = state[1]
                    del _in_steps[language_model]


def has_keys_and_values_only(model, windows: bool = True) -> bool:
    """
    Whether the language model's past is keys and values alone, without recurrent states.

    Args:
        windows (`bool`, defaults to `True`): also where layers see a window of the past only.
    """
    config = model.config.text_config
    layers = DynamicCache(config=config).layers
    if len(layers) != config.num_hidden_layers:
        return False
    kind = DynamicLayer
    return all(isinstance(layer, kind) if windows else type(layer) is kind for layer in layers)


__all__ = ["Context", "Prompt", "StaticContext", "has_keys_and_values_only"]
