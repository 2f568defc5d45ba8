"""The loss of the unified model: text head, visual targets, sums and what they are divided by (paper, section 3.2).

Legend of dimension letters: `modeling_dualtoken.py`; T targets of the whole batch, V text tokens.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .linear_cross_entropy import is_autocast_on, linear_cross_entropy
from .sharding import is_sharded


# The loss is their sum, each times `<name>_weight` of the config.
LOSS_TERMS = ("text_loss", "pixel_loss", "semantic_loss")
# Rows whose logits an adapted text head makes at once.
_ADAPTED_HEAD_ROWS = 1024


class DualTokenTextHead(nn.Linear):
    """Classifier of text tokens, which also makes its loss: FSDP2 gathers a weight in its module's forward only."""

    def forward(self, hidden_states: torch.Tensor, targets: torch.LongTensor | None = None):
        """`(..., H)` -> logits `(..., V)`; `(T, H)` and targets `(T,)` -> summed cross-entropy, number of right ones."""
        # A copy that an adapter trains in float32 beside a bfloat16 model is of another dtype.
        if not is_autocast_on(hidden_states.device.type):
            hidden_states = hidden_states.to(self.weight.dtype)
        if targets is None:
            return super().forward(hidden_states)
        output = linear_cross_entropy(hidden_states, self.weight, targets, bias=self.bias)
        # No view: FSDP2 hangs its work for the backward on what it is given.
        return output.loss_sums.clone(), output.num_correct


def text_logits(head: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """`(..., H)` -> `(..., V)`, by our text head or by what an adapter has put in its place."""
    return head(_for_text_head(head, hidden_states))


def unified_losses(
    model, outputs, image_mask: torch.BoolTensor, labels: torch.LongTensor, num_items_in_batch
) -> dict[str, torch.Tensor | int]:
    """
    The losses, and the sums and counts they are made of: fields of [`DualTokenCausalLMOutputWithPast`], by name.

    From the base model's `outputs`, the placeholders `image_mask` and the `labels` `(B, L)`.
    """
    config, hidden_states = model.config, outputs.last_hidden_state
    if labels.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"`labels` must have the shape of the ids, {tuple(hidden_states.shape[:2])}, got {tuple(labels.shape)}."
        )
    labels = labels.to(hidden_states.device)
    is_visual = labels == config.image_token_id
    codes = _visual_targets(config, outputs, image_mask.to(labels.device), is_visual)

    # The state at t - 1 predicts position t.
    states, is_visual = hidden_states[:, :-1], is_visual[:, 1:]
    is_text = (labels[:, 1:] != -100) & ~is_visual
    text_targets = labels[:, 1:][is_text]
    text_sum, num_text_correct = _text_loss(model.lm_head, states[is_text], text_targets, config.tie_word_embeddings)
    heads = model.depth_heads(states[is_visual], codes, model.model.code_embeds(*codes))
    visual_sums = heads.loss_sums.sum(-1) if config.depth_reduction == "sum" else heads.loss_sums.mean(-1)

    num_text, num_visual = _divisors(num_items_in_batch, len(text_targets), codes.shape[1])
    terms = (text_sum / num_text, visual_sums[0] / num_visual, visual_sums[1] / num_visual)
    losses = dict(zip(LOSS_TERMS, terms, strict=True))
    return {
        "loss": sum(getattr(config, f"{name}_weight") * value for name, value in losses.items()),
        **losses,
        "text_loss_sum": text_sum.detach(),
        "num_text_correct": num_text_correct,
        "num_text_targets": len(text_targets),
        "depth_loss_sums": heads.loss_sums.detach(),
        "num_depth_correct": heads.num_correct,
        "num_visual_targets": codes.shape[1],
    }


def _text_loss(
    head: nn.Module, hidden_states: torch.Tensor, targets: torch.LongTensor, tied: bool
) -> tuple[torch.Tensor, torch.LongTensor]:
    """Summed cross-entropy of `(T, H)` against `(T,)`, and how many of the T are right."""
    hidden_states = _for_text_head(head, hidden_states)
    # PEFT's wrapper of a trained copy hands on what it is given (but a copy tied to the embeddings is a plain Linear),
    # that of trained rows says the weight it computes with; its LoRA layers do neither.
    if isinstance(head, DualTokenTextHead) or (hasattr(head, "modules_to_save") and not tied):
        return head(hidden_states, targets)
    if hasattr(head, "original_module"):
        output = linear_cross_entropy(hidden_states, head.weight, targets)
        return output.loss_sums, output.num_correct

    def chunk_loss(hidden_states, targets):
        logits = head(hidden_states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction="sum"), (logits.argmax(-1) == targets).sum()

    # LoRA, or quantised: the weight alone is not what it computes. Logits of one chunk at a time, made again in the
    # backward. Ranks that share weights must call it equally often.
    rows = max(len(targets), 1) if is_sharded(head) else _ADAPTED_HEAD_ROWS
    chunks = zip(hidden_states.split(rows), targets.split(rows))
    sums, correct = zip(*(checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks))
    return torch.stack(sums).sum(), torch.stack(correct).sum()


def _for_text_head(head: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """`(..., H)` in the dtype of an adapter's text head; ours sees to that itself."""
    # Its weight is not looked at: ZeRO-3 would gather it once more.
    if isinstance(head, DualTokenTextHead):
        return hidden_states
    weight = getattr(head, "weight", None)
    if weight is None or not weight.is_floating_point() or is_autocast_on(hidden_states.device.type):
        return hidden_states
    return hidden_states.to(weight.dtype)


def _visual_targets(config, outputs, image_mask: torch.BoolTensor, is_visual: torch.BoolTensor) -> torch.LongTensor:
    """Codes `(M, T, D)` of labelled positions, from masks `(B, L)`; an image is labelled wholly or not at all."""
    if outputs.pixel_codes is None:
        if is_visual.any():
            raise ValueError(f"`labels` hold the image token ({config.image_token_id}), but no images were given.")
        return torch.zeros(2, 0, config.num_depths, dtype=torch.long, device=is_visual.device)
    if (is_visual & ~image_mask).any():
        raise ValueError("`labels` hold the image token at positions that are no image's.")
    labelled = is_visual[image_mask].view(-1, config.num_positions)
    in_part = labelled.any(-1) != labelled.all(-1)
    if in_part.any():
        index = int(in_part.nonzero()[0])
        raise ValueError(
            f"An image must be labelled wholly or not at all; image {index} of the batch has "
            f"{int(labelled[index].sum())} of {config.num_positions} positions labelled."
        )
    if is_visual[:, 0].any():
        raise ValueError("A labelled image at the very start of a sequence has no `<image_start>` to predict it.")
    codes = torch.stack([outputs.pixel_codes, outputs.semantic_codes]).flatten(1, 3)
    return codes[:, labelled.flatten()]


def _divisors(num_items_in_batch, num_text: int, num_visual: int):
    """What the text sum and the visual sums are divided by; from 1, so that a term without targets is a connected 0."""
    if num_items_in_batch is None:
        return max(num_text, 1), max(num_visual, 1)
    if isinstance(num_items_in_batch, torch.Tensor) and num_items_in_batch.numel() == 2:
        # No host sync.
        return num_items_in_batch.flatten().clamp(min=1).unbind()
    if not isinstance(num_items_in_batch, Sequence):
        return num_items_in_batch, num_items_in_batch
    if len(num_items_in_batch) != 2:
        raise ValueError(
            "`num_items_in_batch` must be one number or the pair (text targets, visual targets), got "
            f"{list(num_items_in_batch)}."
        )
    return tuple(max(number, 1) for number in num_items_in_batch)
