"""The two depth heads as one would write them first: one after the other, each with the weights of one kind of codes.

`PrefixDepthHead` is the way of VILA-U and of RQ-VAE before it: nothing is kept from depth to depth. `CachedDepthHead`
keeps keys and values, as an eager loop of a careful writer. Both compute what `DualTokenDepthHeads.sample` computes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN


def draw_by_full_sort(logits: Tensor, temperature: float = 1.0, top_k: int = 900, top_p: float = 0.96) -> Tensor:
    """
    A code for every row of logits, `(B, K)` -> `(B,)`: all logits below the k-th set aside, then all codes sorted by
    probability for top-p. The host waits once, for the check of the logits.
    """
    logits = logits.float() / temperature
    kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
    logits = logits.masked_fill(logits < kth, float("-inf"))
    if logits.isnan().any():
        raise ValueError("The logits hold a NaN.")
    probabilities = logits.softmax(-1)
    ordered, order = probabilities.sort(-1, descending=True)
    surplus = ordered.cumsum(-1) - ordered >= top_p
    surplus = surplus.scatter(-1, order, surplus)
    probabilities = probabilities.masked_fill(surplus, 0.0)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return torch.multinomial(probabilities, 1)[:, 0]


def draw_from_all(logits: Tensor) -> Tensor:
    """A code for every row of logits, `(B, K)` -> `(B,)`, out of all codes."""
    return torch.multinomial(logits.float().softmax(-1), 1)[:, 0]


def most_probable(logits: Tensor) -> Tensor:
    """`(B, K)` -> `(B,)`."""
    return logits.argmax(-1)


def _linear(stacked, *index: int | slice) -> nn.Linear:
    """One layer of a stacked one; its weight is a part of the same memory."""
    weight = stacked.weight[index]
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=stacked.bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if stacked.bias is not None:
        layer.bias = nn.Parameter(stacked.bias[index].detach(), requires_grad=False)
    return layer


class _Norm:
    """RMSNorm of one head."""

    def __init__(self, stacked, kind: int):
        self.weight, self.eps = stacked.weight[kind].detach(), stacked.eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _Layer:
    """A layer of one head over the depths d of a prefix: `(R, d, W)` -> `(R, d, W)`."""

    def __init__(self, stacked, kind: int):
        width = stacked.o_proj.weight.shape[-1]
        self.num_heads, self.head_dim = stacked.num_heads, stacked.head_dim
        self.norm_1, self.norm_2 = _Norm(stacked.input_layernorm, kind), _Norm(stacked.post_attention_layernorm, kind)
        self.query, self.key, self.value = (
            _linear(stacked.qkv_proj, kind, slice(place * width, (place + 1) * width)) for place in range(3)
        )
        self.out = _linear(stacked.o_proj, kind)
        # A feed-forward for every depth: (D, I, W) and (D, W, I).
        self.up, self.down = stacked.up_proj.weight[kind].detach(), stacked.down_proj.weight[kind].detach()
        self.up_bias, self.down_bias = (
            None if bias is None else bias[kind].detach() for bias in (stacked.up_proj.bias, stacked.down_proj.bias)
        )
        self.act_fn = stacked.act_fn

    def split(self, x: Tensor) -> Tensor:
        """`(R, d, W)` -> `(R, heads, d, head_dim)`."""
        return x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def merge(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    def feed_forward(self, x: Tensor, first: int = 0) -> Tensor:
        """Of the depths from `first` on, each with its own weights."""
        depths = slice(first, first + x.shape[1])
        x = torch.einsum("rdw,diw->rdi", x, self.up[depths])
        x = self.act_fn(x if self.up_bias is None else x + self.up_bias[depths])
        x = torch.einsum("rdi,dwi->rdw", x, self.down[depths])
        return x if self.down_bias is None else x + self.down_bias[depths]

    def __call__(self, x: Tensor) -> Tensor:
        """All depths of the prefix, with attention written out."""
        normed = self.norm_1(x)
        query, key, value = (self.split(project(normed)) for project in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) * (1 / math.sqrt(self.head_dim))
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        x = x + self.out(self.merge(weights @ value))
        return x + self.feed_forward(self.norm_2(x))

    def step(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One depth `(R, 1, W)` after those whose keys and values are in `past`, which grows by it."""
        normed = self.norm_1(x)
        query, key, value = (self.split(project(normed)) for project in (self.query, self.key, self.value))
        depth = 0 if past is None else past[0].shape[2]
        if past is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(past, (key, value)))
        x = x + self.out(self.merge(F.scaled_dot_product_attention(query, key, value)))
        return x + self.feed_forward(self.norm_2(x), depth), (key, value)


class SeparateDepthHead:
    """
    What both ways share: one head with ordinary layers, which use the memory of the stacked weights.

    Args:
        heads ([`DualTokenDepthHeads`]).
        codebook (`torch.Tensor` of shape `(books, K, C)`): `books` is 1 or D.
        kind (`int`): 0 for pixel codes, 1 for semantic codes.
    """

    def __init__(self, heads, codebook: Tensor, kind: int):
        self.num_depths, self.codebook = heads.num_depths, codebook
        self.fc1, self.fc2 = _linear(heads.input_fc1, kind), _linear(heads.input_fc2, kind)
        self.project_state, self.project_code = _linear(heads.input_proj, kind), _linear(heads.code_proj, kind)
        self.layers = [_Layer(layer, kind) for layer in heads.layers]
        self.norm = _Norm(heads.norm, kind)
        self.classifiers = [_linear(heads.classifier, kind, depth) for depth in range(self.num_depths)]
        self.act_fn = ACT2FN[heads.config.hidden_act]

    def book(self, depth: int) -> Tensor:
        return self.codebook[depth if len(self.codebook) > 1 else 0]

    def embed_state(self, hidden_states: Tensor) -> Tensor:
        """`(R, H)` -> `(R, 1, W)`."""
        hidden_states = hidden_states.to(self.fc1.weight.dtype)
        return self.project_state(self.fc2(self.act_fn(self.fc1(hidden_states)))).unsqueeze(1)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Vectors of all codes of a position, depth by depth: `(R, D)` -> `(R, D, C)`."""
        depths = range(codes.shape[1])
        return torch.cat([F.embedding(codes[:, depth : depth + 1], self.book(depth)) for depth in depths], dim=1)

    def guided_logits(self, features: Tensor, depth: int, guidance_scale: float | None) -> Tensor:
        """Normed features `(R, W)` -> logits `(B, K)`: both rows of a pair are classified, then joined."""
        logits = self.classifiers[depth](features)
        if guidance_scale is None:
            return logits
        cond, uncond = logits.chunk(2)
        return uncond + guidance_scale * (cond - uncond)


class PrefixDepthHead(SeparateDepthHead):
    """At every depth all codes of the position are embedded anew and the whole prefix goes through the layers."""

    def sample(self, hidden_states: Tensor, draw=draw_by_full_sort, guidance_scale: float | None = None) -> Tensor:
        """
        Codes `(B, D)` of one position.

        Args:
            hidden_states (`torch.Tensor` of shape `(R, H)`): R = B rows, or with guidance 2 B, the conditional first.
            draw (callable): logits `(B, K)` -> codes `(B,)`.
        """
        state = self.embed_state(hidden_states)
        pairs = len(state) // (1 if guidance_scale is None else 2)
        codes = torch.zeros(len(state), self.num_depths, dtype=torch.long, device=state.device)
        for depth in range(self.num_depths):
            features = state
            if depth > 0:
                running = self.embed_codes(codes).cumsum(1)[:, :depth]
                features = torch.cat([state, self.project_code(running.to(state.dtype))], dim=1)
            for layer in self.layers:
                features = layer(features)
            chosen = draw(self.guided_logits(self.norm(features[:, -1]), depth, guidance_scale))
            codes[:, depth] = chosen.repeat(len(state) // pairs)
        return codes[:pairs]


class CachedDepthHead(SeparateDepthHead):
    """At every depth only the newest code goes through the layers, beside the keys and values of those before."""

    def sample(self, hidden_states: Tensor, draw=draw_from_all, guidance_scale: float | None = None) -> Tensor:
        """As [`PrefixDepthHead.sample`]."""
        features = self.embed_state(hidden_states)
        rows, pairs = len(features), len(features) // (1 if guidance_scale is None else 2)
        caches, codes, running = [None] * len(self.layers), [], 0.0
        for depth in range(self.num_depths):
            if depth > 0:
                running = running + F.embedding(codes[-1], self.book(depth - 1))
                features = self.project_code(running.to(features.dtype)).repeat(rows // pairs, 1).unsqueeze(1)
            for index, layer in enumerate(self.layers):
                features, caches[index] = layer.step(features, caches[index])
            codes.append(draw(self.guided_logits(self.norm(features[:, -1]), depth, guidance_scale)))
        return torch.stack(codes, dim=1)


def separate_heads(model, head_class) -> list:
    """The pixel and the semantic head of a [`DualTokenForCausalLM`], as `head_class`."""
    books = [model.vision_tokenizer.quantizer(kind).codebook.embeddings for kind in ("pixel", "semantic")]
    return [head_class(model.depth_heads, book, kind) for kind, book in enumerate(books)]


@torch.no_grad()
def sample_separately(heads: list, hidden_states: Tensor, draw, guidance_scale: float | None = None) -> Tensor:
    """One head after the other; the same result `(2, B, D)` as `DualTokenDepthHeads.sample`."""
    return torch.stack([head.sample(hidden_states, draw, guidance_scale) for head in heads])
