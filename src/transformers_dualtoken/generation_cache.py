"""What the language model has seen: prompts, and the keys and values of generation that grow from them.

With guidance every row has a second, unconditional one. Both kinds lie in one batch and one cache of R rows, the
conditional ones first, so that the weights are read once for both. A row's mask shows it what is its own: the
unconditional one sees the negative prompt and the row's current image, and counts its positions from there.
"""

import os
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


def repeated_images(image_mask: torch.BoolTensor, repeats: int, num_positions: int) -> torch.LongTensor:
    """Indices of a batch's images once every row of its placeholders `(B, L)` is repeated in place."""
    counts = (image_mask.sum(-1) // num_positions).tolist()
    groups = torch.arange(sum(counts), device=image_mask.device).split(counts)
    return torch.cat([group for group in groups for _ in range(repeats)])


def _prefill(model, prompt: Prompt) -> DynamicCache:
    """Keys and values `(B, heads, L, head_dim)` of every layer for a whole prompt."""
    inputs = {"input_ids": prompt.input_ids, "attention_mask": prompt.attention_mask}
    if prompt.codes is not None:
        inputs["pixel_codes"], inputs["semantic_codes"] = prompt.codes
    cache = DynamicCache(config=model.config.text_config)
    model.model(**inputs, past_key_values=cache, use_cache=True)
    return cache


def _prefill_rows(model, prompts: list[Prompt], rows: int) -> DynamicCache | None:
    """The same of all rows of all prompts but their last tokens, in one batch: for states other than keys and values."""
    length, config = max(prompt.input_ids.shape[1] for prompt in prompts), model.config
    if length == 1:
        return None
    ids, masks, codes = [], [], []
    for prompt in prompts:
        repeats, missing = rows // len(prompt), (length - prompt.input_ids.shape[1], 0)
        ids.append(F.pad(prompt.input_ids, missing, value=config.image_start_token_id).repeat_interleave(repeats, 0))
        masks.append(F.pad(prompt.attention_mask, missing).repeat_interleave(repeats, 0))
        if prompt.codes is not None:
            image_mask = model.model.image_mask(prompt.input_ids, None)
            model.model.check_placeholders(image_mask, len(prompt.codes[0]))
            order = repeated_images(image_mask, repeats, config.num_positions)
            codes.append([kind[order] for kind in prompt.codes])
    codes = tuple(map(torch.cat, zip(*codes))) if codes else None
    return _prefill(model, Prompt(torch.cat(ids), torch.cat(masks), codes).without_last())


def physical_memory() -> int | None:
    """Bytes of the machine, `None` where unknown: what others hold may be swapped, what is beyond them never fits."""
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def check_memory(cache: DynamicCache, rows: int, sides: int, columns: int) -> None:
    """
    Raise a `ValueError` if keys and values of `rows` images, `sides` times up to `columns` tokens each, would fill a CPU's
    memory; a device says so itself. The layers will be like those of `cache`, a prompt's.
    """
    parts = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    parts = [part for part in parts if part is not None and part.device.type == "cpu"]
    each = sides * columns * sum(part.shape[1] * part.shape[3] * part.itemsize for part in parts)
    available = physical_memory()
    if available is not None and rows * each > available:
        raise ValueError(
            f"Drawing {rows} image(s) at once, with up to {columns} tokens each, takes {rows * each / 1e9:.2f} GB for "
            f"keys and values, but a CPU of {available / 1e9:.2f} GB has room for {available // each} (prompts times "
            "`num_return_sequences`)."
        )


class Context:
    """
    The language model's state over the rows of a generation, in a cache that grows: for every kind of backbone.

    A recurrent one cannot forget what its unconditional rows have seen: with guidance it draws one image, not the next.

    Args:
        model ([`DualTokenForCausalLM`]).
        prompts (list of [`Prompt`]): the prompts, and with guidance the negative ones (of all rows, or one for each or
            for each prompt), which end in `<image_start>`. All but their last tokens are fed at once; [`begin`] feeds those.
        rows (`int`): a multiple of the prompts; each is fed once and repeated in place.
        max_new_tokens (`int`): how many tokens will be fed at most, the prompts' last ones included.
        memory ([`StepMemory`]), capacity (`int`): where a static context's buffers lie, and their columns at first.
    """

    def __init__(
        self,
        model,
        prompts: list[Prompt],
        rows: int,
        max_new_tokens: int,
        memory: StepMemory,
        capacity: int | None = None,
    ):
        self.model, self.rows, self.guided = model, rows, len(prompts) == 2
        self.memory, self.capacity = memory, capacity
        self.prefix_length = max(prompt.input_ids.shape[1] for prompt in prompts) - 1
        if has_keys_and_values_only(model):
            caches, longest = self._prefixes(prompts)
            check_memory(longest, rows, len(prompts), self.prefix_length + max_new_tokens)
        else:
            caches, longest = [], _prefill_rows(model, prompts, rows)
        last_ids = prompts[0].input_ids[:, -1:].repeat_interleave(rows // len(prompts[0]), 0)
        self.last_embeds = model.model.for_backbone(model.get_input_embeddings()(last_ids))
        masks = [prompt.without_last().attention_mask.repeat_interleave(rows // len(prompt), 0) for prompt in prompts]
        self.prefix_mask = torch.cat([F.pad(mask, (self.prefix_length - mask.shape[1], 0)) for mask in masks])
        # The next position of every row, (R, 1).
        self.next_position = self.prefix_mask.sum(-1, keepdim=True)
        self.length, self.hidden_states = self.prefix_length, None
        self._build(caches, longest)

    def _prefixes(self, prompts: list[Prompt]) -> tuple[list[DynamicCache | None], DynamicCache]:
        """The caches of prompts without their last tokens, `None` where nothing is left; and the longest of them."""
        fed = []
        for prompt in prompts:
            length = prompt.input_ids.shape[1] - 1
            if not length:
                num_images = 0 if prompt.codes is None else len(prompt.codes[0])
                self.model.model.check_placeholders(self.model.model.image_mask(prompt.input_ids, None), num_images)
            # One token too: where no other shows what layers there are, and for ranks with longer prompts, since all must
            # run the same modules.
            is_fed = length or is_sharded(self.model) or not (self.prefix_length or fed)
            fed.append((length, _prefill(self.model, prompt.without_last() if length else prompt) if is_fed else None))
        return [cache if length else None for length, cache in fed], max(fed, key=lambda pair: pair[0])[1]

    def _build(self, caches: list[DynamicCache | None], longest: DynamicCache | None) -> None:
        self.attention_mask = self.prefix_mask
        self.cache = longest if self.prefix_length else DynamicCache(config=self.model.config.text_config)
        for index, layer in enumerate(self.cache.layers if caches and self.prefix_length else ()):
            joined = {}
            for name in ("keys", "values"):
                like = getattr(layer, name)
                parts = [like[:1, :, :0] if cache is None else getattr(cache.layers[index], name) for cache in caches]
                # A window of the past holds its end, and where others have less there is nothing to see.
                parts = [F.pad(part, (0, 0, like.shape[2] - part.shape[2], 0)) for part in parts]
                joined[name] = torch.cat([part.repeat_interleave(self.rows // len(part), 0) for part in parts])
            layer.keys, layer.values = joined.values()

    def begin(self, drawing: list[int]) -> None:
        """Feed the prompts' last tokens; with those of the rows `drawing`, which are `<image_start>`, images begin."""
        self.start_images(drawing)
        self.feed(self.last_embeds, conditional_only=not drawing)

    def start_images(self, rows: list[int]) -> None:
        """What is fed next begins an image of these rows: their unconditional rows forget what came before."""
        if self.guided and rows:
            rows = torch.tensor(rows, device=self.prefix_mask.device) + self.rows
            self._forget(rows)
            self.next_position[rows] = self.prefix_mask[rows].sum(-1, keepdim=True)

    def _forget(self, rows: torch.LongTensor) -> None:
        """Hide from rows `(n,)` of the cache what came after the prompts."""
        self.attention_mask = self.attention_mask.clone()
        self.attention_mask[rows, self.prefix_length :] = 0

    def feed(self, embeds: torch.Tensor, conditional_only: bool = False) -> None:
        """Feed one embedding per row, `(B, 1, H)`, to both its kinds, or where no row is in an image to one alone."""
        with self.attention():
            self.hidden_states = self.advance(embeds, conditional_only)
        self.length += 1

    def advance(self, embeds: torch.Tensor, conditional_only: bool = False) -> torch.Tensor:
        """
        [`feed`] without the host's own count of the columns, `length`, which is then the caller's to keep.

        Returns the new hidden states `(R, H)`. A growing cache feeds the unconditional rows in any case.
        """
        ones = self.attention_mask.new_ones(len(self.attention_mask), 1)
        self.attention_mask = torch.cat([self.attention_mask, ones], dim=1)
        hidden_states = self._run(embeds, self.attention_mask, self.next_position, self.cache)
        self.next_position = self.next_position + 1
        return hidden_states

    def _run(self, embeds, attention_mask, position_ids, cache) -> torch.Tensor:
        """`(B, 1, H)` -> `(R, H)`."""
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

    def reserve(self, num_tokens: int) -> None:
        """Make room for that many more tokens."""

    def attention(self):
        """The attention that [`feed`] runs with, as a context manager."""
        return nullcontext()


class _SharedColumnLayer(StaticLayer):
    """Rows of buffers of fixed shape `(R, heads, columns, head_dim)`; all layers write the column that a tensor names."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, column: torch.LongTensor):
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.column, self.is_initialized = keys, values, column, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """`(R, heads, 1, head_dim)` -> the whole buffers, twice."""
        # Under autocast values are made in another dtype than the cache of a prompt holds them in.
        self.keys.index_copy_(2, self.column, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.column, value_states.to(self.values.dtype))
        return self.keys, self.values

    def get_seq_length(self) -> torch.LongTensor:
        return self.column


class StaticContext(Context):
    """
    The same in buffers of fixed shape, which double where more room is needed: a step is the same kernels on the same
    addresses. [`advance`] depends on no value of the device, so it can be captured in a CUDA graph or compiled once.
    """

    # Whole blocks for the attention kernels.
    BLOCK = 32

    @staticmethod
    def unsupported(model) -> str | None:
        """Why `model` cannot have it, as the end of a sentence; `None` if it can."""
        if not has_keys_and_values_only(model, windows=False):
            return "its language model has layers with other than full attention"
        if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
            return "it lies on several devices"
        return None

    def attention(self):
        return _step_attention(self.model.model.language_model)

    def _build(self, caches: list[DynamicCache | None], longest: DynamicCache) -> None:
        device, num_rows = self.prefix_mask.device, len(self.prefix_mask)
        self.num_layers = len(longest.layers)
        # The column that is written next.
        self.column = self.memory.place("column", torch.full((1,), self.length, device=device))
        self.next_position = self.memory.place("next_position", self.next_position)
        for index, layer in enumerate(longest.layers):
            for name in ("keys", "values"):
                like = getattr(layer, name)
                shape = (num_rows, like.shape[1], self.capacity, like.shape[3])
                buffer = self.memory.zeros(f"{name}_{index}", shape, like)
                for rows, cache in zip(buffer.split(self.rows), caches):
                    if cache is not None:
                        part = getattr(cache.layers[index], name)
                        columns = slice(self.prefix_length - part.shape[2], self.prefix_length)
                        rows[:, :, columns] = part.repeat_interleave(self.rows // len(part), 0)
        self._make_caches()
        # Added to the scores of attention.
        dtype = self.last_embeds.dtype
        self.hidden_value = torch.finfo(dtype).min
        hidden = torch.full((num_rows, 1, 1, self.capacity), self.hidden_value, dtype=dtype, device=device)
        hidden[:, 0, 0, : self.prefix_length].masked_fill_(self.prefix_mask.bool(), 0)
        self.attention_mask = self.memory.place("attention_mask", hidden)

    def _make_caches(self) -> None:
        tensors = self.memory.tensors
        buffers = [(tensors[f"keys_{index}"], tensors[f"values_{index}"]) for index in range(self.num_layers)]

        def cache(rows: int) -> Cache:
            return Cache(
                layers=[_SharedColumnLayer(keys[:rows], values[:rows], self.column) for keys, values in buffers]
            )

        self.cache = cache(len(self.prefix_mask))
        # The conditional rows alone, in the same memory.
        self.conditional_cache = cache(self.rows)

    def _forget(self, rows: torch.LongTensor) -> None:
        self.attention_mask[rows, ..., self.prefix_length :] = self.hidden_value

    def advance(self, embeds: torch.Tensor, conditional_only: bool = False) -> torch.Tensor:
        rows = self.rows if conditional_only else len(self.next_position)
        cache = self.conditional_cache if conditional_only else self.cache
        self.attention_mask.index_fill_(3, self.column, 0)
        hidden_states = self._run(embeds, self.attention_mask[:rows], self.next_position[:rows], cache)
        self.column.add_(1)
        self.next_position.add_(1)
        return hidden_states

    def reserve(self, num_tokens: int) -> None:
        added = 0
        while self.length + num_tokens > self.capacity + added:
            added += self.capacity + added
        if not added:
            return
        # The caches and the graph hold on to the old buffers; of these one at a time is there twice.
        self.cache = self.conditional_cache = self.memory.graph = None
        for name in [f"{kind}_{index}" for index in range(self.num_layers) for kind in ("keys", "values")]:
            self.memory.replace(name, F.pad(self.memory.tensors[name], (0, 0, 0, added)))
        wider = F.pad(self.attention_mask, (0, added), value=self.hidden_value)
        self.attention_mask = self.memory.replace("attention_mask", wider)
        self.capacity += added
        self._make_caches()


_STEP_ATTENTION = "dualtoken_step"


def _grouped_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """
    transformers' `sdpa`, but for one token `(R, heads, 1, head_dim)` under a mask without copies of keys and values.

    The query heads that share a key head are the rows of its attention. Elsewhere keys and values are repeated for them:
    by transformers before 5.23, and under `torch.compile`.
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
    """The attention of a step, unless it is `eager`: flash attention, for one, takes no mask of columns."""
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
    """Whether the past is keys and values alone, without recurrent states; with `windows` also of its end only."""
    config = model.config.text_config
    layers = DynamicCache(config=config).layers
    if len(layers) != config.num_hidden_layers:
        return False
    return all(isinstance(layer, DynamicLayer) if windows else type(layer) is DynamicLayer for layer in layers)
