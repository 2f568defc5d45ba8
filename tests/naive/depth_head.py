"""One depth head, position by position and depth by depth, out of ordinary linear layers (DESIGN.md, section 3)."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class NaiveRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), times a weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return self.weight * x / torch.sqrt((x * x).mean() + self.eps)


class NaiveDepthLayer(nn.Module):
    """Pre-norm: attention over the depths so far, then the feed-forward of the depth."""

    def __init__(self, config, num_depths: int):
        super().__init__()
        width, bias = config.hidden_size, config.bias
        self.head_dim = config.head_dim
        self.norm_1, self.norm_2 = (NaiveRMSNorm(width, config.rms_norm_eps) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=bias) for _ in range(4))
        self.up = nn.ModuleList(nn.Linear(width, config.intermediate_size, bias=bias) for _ in range(num_depths))
        self.down = nn.ModuleList(nn.Linear(config.intermediate_size, width, bias=bias) for _ in range(num_depths))

    def forward(self, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        """The vectors `(W,)` of the depths 1..d -> the same number of vectors."""
        normed = [self.norm_1(x) for x in xs]
        outputs = []
        for depth, x in enumerate(xs):
            heads = []
            for start in range(0, len(x), self.head_dim):
                part = slice(start, start + self.head_dim)
                query = self.query(normed[depth])[part]
                scores = [query @ self.key(n)[part] / math.sqrt(self.head_dim) for n in normed[: depth + 1]]
                weights = torch.softmax(torch.stack(scores), dim=0)
                heads.append(sum(w * self.value(n)[part] for w, n in zip(weights, normed[: depth + 1])))
            x = x + self.out(torch.cat(heads))
            outputs.append(x + self.down[depth](F.gelu(self.up[depth](self.norm_2(x)))))
        return outputs


class NaiveDepthHead(nn.Module):
    """The head of one kind of codes."""

    def __init__(self, config, language_width: int, num_depths: int, codebook_size: int, code_dim: int):
        super().__init__()
        bias = config.bias
        self.mlp_1 = nn.Linear(language_width, config.input_hidden_size, bias=bias)
        self.mlp_2 = nn.Linear(config.input_hidden_size, config.input_hidden_size, bias=bias)
        self.a = nn.Linear(config.input_hidden_size, config.hidden_size, bias=bias)
        self.b = nn.Linear(code_dim, config.hidden_size, bias=bias)
        self.layers = nn.ModuleList(NaiveDepthLayer(config, num_depths) for _ in range(config.num_hidden_layers))
        self.norm = NaiveRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.classifiers = nn.ModuleList(
            nn.Linear(config.hidden_size, codebook_size, bias=bias) for _ in range(num_depths)
        )

    def next_logits(self, hidden_state: torch.Tensor, code_vectors: list[torch.Tensor]) -> torch.Tensor:
        """Logits `(K,)` of the depth after the given ones: `(H,)` and the vectors `(C,)` of the codes before."""
        inputs = [self.a(self.mlp_2(F.gelu(self.mlp_1(hidden_state))))]
        for depth in range(1, len(code_vectors) + 1):
            inputs.append(self.b(sum(code_vectors[:depth])))
        for layer in self.layers:
            inputs = layer(inputs)
        return self.classifiers[len(code_vectors)](self.norm(inputs[-1]))

    def forward(self, hidden_states: torch.Tensor, code_vectors: torch.Tensor) -> torch.Tensor:
        """Logits `(T, D, K)` of all depths given the true codes: `(T, H)`, `(T, D, C)`."""
        return torch.stack(
            [
                torch.stack([self.next_logits(state, list(vectors[:depth])) for depth in range(len(vectors))])
                for state, vectors in zip(hidden_states, code_vectors)
            ]
        )


def stacked_sources(stacked, head: NaiveDepthHead, kind: int) -> list[tuple[nn.Parameter, nn.Parameter, tuple]]:
    """
    Which part of the stacked heads a parameter of the naive one stands for.

    Triples (naive parameter, stacked parameter, index into it); `kind` is 0 for pixel and 1 for semantic codes.
    """
    sources = []

    def linear(naive, source, *index):
        sources.append((naive.weight, source.weight, (kind, *index)))
        if naive.bias is not None:
            sources.append((naive.bias, source.bias, (kind, *index)))

    linear(head.mlp_1, stacked.input_fc1)
    linear(head.mlp_2, stacked.input_fc2)
    linear(head.a, stacked.input_proj)
    linear(head.b, stacked.code_proj)
    sources.append((head.norm.weight, stacked.norm.weight, (kind,)))
    for depth, classifier in enumerate(head.classifiers):
        linear(classifier, stacked.classifier, depth)
    for layer, source in zip(head.layers, stacked.layers):
        sources.append((layer.norm_1.weight, source.input_layernorm.weight, (kind,)))
        sources.append((layer.norm_2.weight, source.post_attention_layernorm.weight, (kind,)))
        width = len(layer.norm_1.weight)
        for place, naive in enumerate((layer.query, layer.key, layer.value)):
            linear(naive, source.qkv_proj, slice(place * width, (place + 1) * width))
        linear(layer.out, source.o_proj)
        for depth, (up, down) in enumerate(zip(layer.up, layer.down)):
            linear(up, source.up_proj, depth)
            linear(down, source.down_proj, depth)
    return sources


@torch.no_grad()
def naive_head(stacked, kind: int) -> NaiveDepthHead:
    """The naive head with the weights of one kind (0 pixel, 1 semantic) of the stacked heads."""
    head = NaiveDepthHead(
        stacked.config,
        language_width=stacked.input_fc1.weight.shape[-1],
        num_depths=stacked.num_depths,
        codebook_size=stacked.codebook_size,
        code_dim=stacked.code_proj.weight.shape[-1],
    )
    for naive, source, index in stacked_sources(stacked, head, kind):
        naive.copy_(source[index])
    return head.to(stacked.norm.weight.dtype)
