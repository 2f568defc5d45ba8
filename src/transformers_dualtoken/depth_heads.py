"""The pixel and the semantic depth transformer, as one batched transformer (paper, section 3.2).

Both heads have the same shape and never exchange anything, so every weight carries a leading axis of two and one
batched product serves both: half the sequential steps of two separate heads, the same numbers. Letters: M = 2 heads,
D depths, T positions, B rows, H the language model's width, W the head's width, C code width, K codes.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_dualtoken import CODE_KINDS, DualTokenDepthHeadConfig
from .linear_cross_entropy import LinearCrossEntropyOutput, is_autocast_on, linear_cross_entropy, without_autocast


NUM_KINDS = len(CODE_KINDS)


class DualTokenStackedLinear(nn.Module):
    """Independent linear layers of one shape, applied in one batched product. `weight` is `(*stack, out, in)`."""

    def __init__(self, stack: tuple[int, ...], in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*stack, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(*stack, out_features)) if bias else None

    def forward(
        self, hidden_states: torch.Tensor, depth: int | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        `(*stack, T, in)` -> `(*stack, T, out)`, or of one depth of a `(M, D)` stack `(M, T, in)` -> `(M, T, out)`;
        `residual`, of the result's shape, is added. All by calls of the module, where ZeRO-3 and FSDP2 gather weights.
        """
        weight, bias = self.weight, self.bias
        if depth is not None:
            weight, bias = weight[:, depth], None if bias is None else bias[:, depth]
        stack, weight = weight.shape[:-2], weight.flatten(0, -3).transpose(1, 2)
        hidden_states = hidden_states.flatten(0, -3)
        added = None if bias is None else bias.flatten(0, -2).unsqueeze(1)
        # Within the product only where that keeps its precision: autocast would round it.
        fused = residual is not None and residual.dtype == weight.dtype and not is_autocast_on(weight.device.type)
        if fused:
            added = residual.flatten(0, -3) if added is None else residual.flatten(0, -3) + added
        product = torch.bmm(hidden_states, weight) if added is None else torch.baddbmm(added, hidden_states, weight)
        product = product.view(*stack, *product.shape[1:])
        return product if residual is None or fused else residual + product


class DualTokenStackedRMSNorm(nn.Module):
    """RMSNorm with a weight of its own per head; computed in float32 at least."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(NUM_KINDS, hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(M, ..., W)` -> the same."""
        weight = self.weight.view(NUM_KINDS, *[1] * (hidden_states.ndim - 2), -1)
        return weight * F.rms_norm(hidden_states, hidden_states.shape[-1:], eps=self.eps)


class _CausalAttention(torch.autograd.Function):
    """
    Causal softmax attention of many short sequences, `(N, D, head_dim)` -> the same, in float32 at least and rounded
    once; autograd would keep the wide copies. Not torch's own, which is for few long ones: on a GPU its backward pads 8
    depths to 128 (5.7 GiB for 8 images of 384 px, whose scores are 24 MB here) and takes at most 65,535 positions.
    """

    @staticmethod
    def forward(ctx, query, key, value):
        depths, wide = query.shape[1], torch.promote_types(query.dtype, torch.float32)
        with without_autocast(query.device.type):
            # One mask for all, added within the product.
            mask = torch.full((depths, depths), float("-inf"), dtype=wide, device=query.device).triu(1)
            scores = torch.baddbmm(mask, _widen(query), _widen(key).transpose(1, 2), alpha=query.shape[-1] ** -0.5)
            probabilities = scores.softmax(-1)
            ctx.save_for_backward(query, key, value, probabilities)
            return torch.bmm(probabilities, _widen(value)).to(value.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, probabilities = ctx.saved_tensors
        with without_autocast(query.device.type):
            wide = _widen(grad)
            grad_value = torch.bmm(probabilities.transpose(1, 2), wide).to(value.dtype)
            grad_scores = torch.bmm(wide, _widen(value).transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_scores, probabilities, -1, grad_scores.dtype)
            grad_scores *= query.shape[-1] ** -0.5
            grad_query = torch.bmm(grad_scores, _widen(key)).to(query.dtype)
            grad_key = torch.bmm(grad_scores.transpose(1, 2), _widen(query)).to(key.dtype)
            return grad_query, grad_key, grad_value


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class DualTokenDepthLayer(GradientCheckpointingLayer):
    """Pre-norm layer: causal attention over the depths of a position, then a feed-forward of the depth's own."""

    def __init__(self, config: DualTokenDepthHeadConfig, num_depths: int):
        super().__init__()
        width, heads = config.hidden_size, (NUM_KINDS,)
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.input_layernorm = DualTokenStackedRMSNorm(width, config.rms_norm_eps)
        self.qkv_proj = DualTokenStackedLinear(heads, width, 3 * width, config.bias)
        self.o_proj = DualTokenStackedLinear(heads, width, width, config.bias)
        self.post_attention_layernorm = DualTokenStackedRMSNorm(width, config.rms_norm_eps)
        per_depth = (NUM_KINDS, num_depths)
        self.up_proj = DualTokenStackedLinear(per_depth, width, config.intermediate_size, config.bias)
        self.down_proj = DualTokenStackedLinear(per_depth, config.intermediate_size, width, config.bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, depth: int | None = None, cache: torch.Tensor | None = None
    ) -> torch.Tensor:
        """All depths at once, `(M, D, T, W)` -> the same, or one of them, `(M, T, W)` -> the same, as `step`."""
        if depth is not None:
            return self.step(hidden_states, depth, cache)
        kinds, depths, length, width = hidden_states.shape
        qkv = self.qkv_proj(self.input_layernorm(hidden_states).flatten(1, 2))
        qkv = qkv.view(kinds, depths, length, 3, self.num_heads, self.head_dim)
        # Positions are the batch of this attention, depths its sequence: (3, M, T, heads, D, head_dim).
        query, key, value = qkv.permute(3, 0, 2, 4, 1, 5).flatten(1, 3)
        context = _CausalAttention.apply(query, key, value)
        context = context.view(kinds, length, self.num_heads, depths, self.head_dim).permute(0, 3, 1, 2, 4)
        attention = self.o_proj(context.reshape(kinds, depths * length, width))
        hidden_states = hidden_states + attention.view_as(hidden_states)
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + self.down_proj(self.act_fn(self.up_proj(normed)))

    def step(self, hidden_states: torch.Tensor, depth: int, cache: torch.Tensor) -> torch.Tensor:
        """
        One depth of every position: `(M, T, W)` -> `(M, T, W)`. `cache` `(2, M, T, heads, D, head_dim)` holds the keys
        and values of the depths before, and takes this one's.
        """
        kinds, length, width = hidden_states.shape
        qkv = self.qkv_proj(self.input_layernorm(hidden_states)).unflatten(-1, (3, self.num_heads, self.head_dim))
        cache[:, :, :, :, depth] = qkv[:, :, 1:].permute(2, 0, 1, 3, 4)
        if depth == 0:
            # Attention to oneself alone.
            context = qkv[:, :, 2]
        else:
            # torch's own: one kernel for few rows, and no backward.
            key, value = cache[:, :, :, :, : depth + 1].flatten(1, 2)
            query = qkv[:, :, 0].flatten(0, 1).unsqueeze(2)
            context = F.scaled_dot_product_attention(query, key, value)
        hidden_states = self.o_proj(context.reshape(kinds, length, width), residual=hidden_states)
        normed = self.post_attention_layernorm(hidden_states)
        return self.down_proj(self.act_fn(self.up_proj(normed, depth)), depth, residual=hidden_states)


class DualTokenDepthHeads(nn.Module):
    """
    Predicts the 2 x D codes of a position from the language model's hidden state before it.

    With m one of the two heads: u_1 = A_m MLP_m(h); u_d = B_m sum_{d' < d} e_m(k_d') for d > 1, e_m being the code
    vectors; the u_d go through pre-norm layers with causal attention over the depths and a feed-forward per depth, a
    final norm, and one classifier per depth. There is no depth embedding: each depth has its own feed-forward.
    """

    def __init__(
        self,
        config: DualTokenDepthHeadConfig,
        language_hidden_size: int,
        num_depths: int,
        codebook_size: int,
        code_dim: int,
    ):
        super().__init__()
        self.config = config
        self.num_depths, self.codebook_size = num_depths, codebook_size
        heads, width, bias = (NUM_KINDS,), config.hidden_size, config.bias
        self.input_fc1 = DualTokenStackedLinear(heads, language_hidden_size, config.input_hidden_size, bias)
        self.input_fc2 = DualTokenStackedLinear(heads, config.input_hidden_size, config.input_hidden_size, bias)
        self.input_proj = DualTokenStackedLinear(heads, config.input_hidden_size, width, bias)
        self.code_proj = DualTokenStackedLinear(heads, code_dim, width, bias)
        self.layers = nn.ModuleList([DualTokenDepthLayer(config, num_depths) for _ in range(config.num_hidden_layers)])
        self.norm = DualTokenStackedRMSNorm(width, config.rms_norm_eps)
        self.classifier = DualTokenStackedLinear((NUM_KINDS, num_depths), width, codebook_size, bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.gradient_checkpointing = False

    def _embed_hidden(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """u_1: `(T, H)` -> `(M, T, W)`."""
        # The language model may be of another dtype: bfloat16 or quantised, with heads trained in float32.
        hidden_states = hidden_states.to(self.input_fc1.weight.dtype).expand(NUM_KINDS, *hidden_states.shape)
        return self.input_proj(self.input_fc2(self.act_fn(self.input_fc1(hidden_states))))

    def _features(self, hidden_states: torch.Tensor, code_embeds: torch.Tensor) -> torch.Tensor:
        """Teacher forcing: `(T, H)` and the true codes' vectors `(M, T, D, C)` -> normed features `(M, D, T, W)`."""
        first = self._embed_hidden(hidden_states)
        running = code_embeds[:, :, :-1].transpose(1, 2).clone(memory_format=torch.contiguous_format)
        # Not `cumsum`, which a GPU does not do reproducibly.
        for depth in range(1, running.shape[1]):
            running[:, depth] += running[:, depth - 1]
        later = self.code_proj(running.to(first.dtype).flatten(1, 2)).unflatten(1, running.shape[1:3])
        features = torch.cat([first.unsqueeze(1), later], dim=1)
        for layer in self.layers:
            features = layer(features)
        return self.norm(features)

    def forward(
        self, hidden_states: torch.Tensor, codes: torch.LongTensor, code_embeds: torch.Tensor
    ) -> LinearCrossEntropyOutput:
        """
        Cross-entropies and right guesses of the codes of T positions, both `(M, D)` and summed over the positions.

        Args:
            hidden_states (`torch.Tensor` of shape `(T, H)`): the language model's states before the positions.
            codes (`torch.LongTensor` of shape `(M, T, D)`): pixel and semantic codes.
            code_embeds (`torch.Tensor` of shape `(M, T, D, C)`): their code vectors.
        """
        features = self._features(hidden_states, code_embeds)
        bias = self.classifier.bias
        output = linear_cross_entropy(
            features.flatten(0, 1),
            self.classifier.weight.flatten(0, 1),
            codes.transpose(1, 2).flatten(0, 1),
            bias=None if bias is None else bias.flatten(0, 1),
        )
        return LinearCrossEntropyOutput(*(sums.view(NUM_KINDS, self.num_depths) for sums in output))

    @torch.no_grad()
    def sample(
        self,
        hidden_states: torch.Tensor,
        codebooks: torch.Tensor,
        sampler,
        guidance: float | None = None,
        noise: torch.Tensor | None = None,
    ) -> torch.LongTensor:
        """
        Draw the codes `(M, B, D)` of one position of every row, depth by depth. No host sync, and all shapes are fixed:
        the whole can be one CUDA graph.

        Args:
            hidden_states (`torch.Tensor` of shape `(R, H)`): R = B rows, or with guidance 2 B: first the conditional,
                then the unconditional rows. Both rows of a pair share the drawn codes.
            codebooks (`torch.Tensor` of shape `(M, books, K, C)`): code vectors; `books` is 1 or D.
            sampler (callable): logits `(M, B, K)`, and with `noise` that of the depth, -> codes `(M, B)`.
            guidance (`float`, *optional*): s in logits = uncond + s (cond - uncond). Applied to the features before
                the classifier, which is linear: the same logits for half the rows.
            noise (`torch.Tensor` of shape `(D, M, B, candidates)`, *optional*): what the sampler is to draw by, of all
                depths ([`CodeNoise`]).
        """
        features = self._embed_hidden(hidden_states)
        shape = (
            2,
            NUM_KINDS,
            len(hidden_states),
            self.config.num_attention_heads,
            self.num_depths,
            self.config.head_dim,
        )
        caches = [features.new_empty(shape) for _ in self.layers]
        kinds = torch.arange(NUM_KINDS, device=features.device)[:, None]
        running, codes = None, []
        for depth in range(self.num_depths):
            if depth > 0:
                vectors = codebooks[kinds, depth - 1 if codebooks.shape[1] > 1 else 0, codes[-1]]
                running = vectors if running is None else running + vectors
                features = self.code_proj(running.to(features.dtype))
                if guidance is not None:
                    features = features.repeat(1, 2, 1)
            for layer, cache in zip(self.layers, caches):
                features = layer(features, depth, cache)
            normed = self.norm(features)
            if guidance is not None:
                cond, uncond = normed.chunk(2, dim=1)
                normed = torch.lerp(uncond, cond, guidance)
            logits = self.classifier(normed, depth)
            codes.append(sampler(logits) if noise is None else sampler(logits, noise[depth]))
        return torch.stack(codes, dim=-1)
