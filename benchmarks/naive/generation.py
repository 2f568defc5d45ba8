"""Image generation as the usual loops do it: eager, with a growing cache, and the two heads one after the other."""

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from transformers_dualtoken.transformers_compat import CACHE_NAME

from .depth_heads import (
    CachedDepthHead,
    PrefixDepthHead,
    draw_by_full_sort,
    draw_from_all,
    most_probable,
    sample_separately,
    separate_heads,
)


class _EagerLoop:
    """
    What both loops share: one batch of conditional and unconditional rows through the language model.

    A loop adds `step()`, which draws the codes `(2, B, D)` of a position and feeds its embedding.

    Args:
        model ([`DualTokenForCausalLM`]): its weights are used as they are, none is copied.
        guidance_scale (`float`): 1.0 for none.
        do_sample (`bool`): `False` takes the most probable code at every depth.
    """

    def __init__(self, model, guidance_scale: float = 3.0, do_sample: bool = True):
        self.model, self.config = model, model.config
        self.language_model, self.projector = model.model.language_model, model.model.visual_projector
        self.guidance_scale = None if guidance_scale == 1 else guidance_scale
        self.do_sample = do_sample
        self.draw = self.draw_sampled if do_sample else most_probable
        self.heads = separate_heads(model, self.head_class)

    @torch.no_grad()
    def start(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Read prompts `(B, L)` that end in `<image_start>`, left-padded; without a prompt: that token alone."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.guidance_scale is not None:
            unconditional = torch.zeros_like(mask)
            unconditional[:, -1] = 1
            input_ids, mask = input_ids.repeat(2, 1), torch.cat([mask, unconditional])
        self.input_ids, self.attention_mask = input_ids, mask
        self.cache = DynamicCache(config=self.config.text_config)
        self._forward(self.language_model.get_input_embeddings()(input_ids))

    def _forward(self, embeds: Tensor) -> None:
        """Feed `(R, n, H)`, the newest n of what the mask counts."""
        positions = (self.attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        outputs = self.language_model(
            inputs_embeds=embeds,
            attention_mask=self.attention_mask,
            position_ids=positions,
            use_cache=True,
            **{CACHE_NAME: self.cache},
        )
        self.hidden_states = outputs.last_hidden_state[:, -1]

    def _embed(self, codes: Tensor) -> Tensor:
        """Codes `(2, R, D)` of one position -> `(R, 1, H)`."""
        sums = [head.embed_codes(kind).cumsum(1)[:, -1] for head, kind in zip(self.heads, codes)]
        return self.projector(torch.cat(sums, dim=-1).to(self.projector.linear_1.weight.dtype)).unsqueeze(1)

    def _grow_mask(self) -> None:
        self.attention_mask = torch.cat([self.attention_mask, torch.ones_like(self.attention_mask[:, :1])], dim=1)

    def _draw_codes(self) -> Tensor:
        """`(2, B, D)`"""
        return sample_separately(self.heads, self.hidden_states, self.draw, self.guidance_scale)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, num_positions: int | None = None):
        """Codes `(2, B, n, D)` of the first `num_positions` (by default all) positions of an image per row."""
        self.start(input_ids, attention_mask)
        num_positions = self.config.num_positions if num_positions is None else num_positions
        codes = [self.step() for _ in range(num_positions - 1)]
        # As ours: what follows the last position is not asked for.
        return torch.stack([*codes, self._draw_codes()], dim=2)


class VilaULoop(_EagerLoop):
    """
    As VILA-U does it, within transformers' own sampling loop.

    Heads that recompute the whole prefix at every depth and sort all logits; the codes of the position are embedded
    D + 2 times: at every depth, for the text head, which runs at image positions too and whose token nobody reads,
    and again when the language model takes them up; ids and mask grow by concatenation. The loop's checks for the end
    of a text, each of which waits for the device, are left out.
    """

    head_class = PrefixDepthHead
    draw_sampled = staticmethod(draw_by_full_sort)

    @torch.no_grad()
    def step(self) -> Tensor:
        codes = self._draw_codes()
        both = codes if self.guidance_scale is None else codes.repeat(1, 2, 1)
        scores = self.model.lm_head(self._embed(both)[:, -1]).float()
        tokens = torch.multinomial(scores.softmax(-1), 1) if self.do_sample else scores.argmax(-1, keepdim=True)
        self.input_ids = torch.cat([self.input_ids, tokens], dim=1)
        self._grow_mask()
        self._forward(self._embed(both))
        return codes


class JanusLoop(_EagerLoop):
    """
    As Janus does it: a plain loop over positions, no text head, new codes embedded once.

    Codes are drawn out of all, without top-k or top-p; the heads keep keys and values, which Janus, with one code a
    position, does not need. The codes of a position are brought to the host.
    """

    head_class = CachedDepthHead
    draw_sampled = staticmethod(draw_from_all)

    @torch.no_grad()
    def start(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        super().start(input_ids, attention_mask)
        self.drawn = []

    @torch.no_grad()
    def step(self) -> Tensor:
        codes = self._draw_codes()
        self.drawn.append(codes.tolist())
        self._grow_mask()
        self._forward(self._embed(codes if self.guidance_scale is None else codes.repeat(1, 2, 1)))
        return codes
