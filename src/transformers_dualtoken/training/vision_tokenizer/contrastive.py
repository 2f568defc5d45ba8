"""The loss of images and their captions, against all captions of the batch on all ranks (SigLIP's and CLIP's)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.nn.functional import all_gather

from ...linear_cross_entropy import without_autocast


CONTRASTIVE_LOSSES = ("sigmoid", "softmax")


def contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    input_ids: torch.LongTensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    kind: str = "sigmoid",
    gather: bool = True,
) -> torch.Tensor:
    """
    A scalar; its mean over the ranks is the loss of the whole batch, and so is its gradient as DDP averages it.

    Images and captions of the same row belong together. Captions of the same ids belong to each other's images too: in a
    data set with few captions those would else be pushed away from what they show.

    Args:
        image_embeds, text_embeds (`torch.Tensor` of shape `(B, H)`): of length 1.
        input_ids (`torch.LongTensor` of shape `(B, L)`): the captions, padded to one length.
        logit_scale, logit_bias (`torch.Tensor` of shape `(1,)`): as SigLIP has them, the scale as its logarithm.
        kind (`str`): `"sigmoid"`, each pair judged by itself, summed over the captions and averaged over the images; or
            `"softmax"`, the mean of the cross-entropies in both directions, without the bias.
        gather (`bool`): all ranks together, each with the same B; `False` for the pairs of this one alone.
    """
    dtype = torch.promote_types(image_embeds.dtype, torch.float32)
    images, texts = image_embeds.to(dtype), text_embeds.to(dtype)
    gather = gather and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    all_texts, all_ids = (torch.cat(all_gather(each)) if gather else each for each in (texts, input_ids))
    is_pair = (input_ids[:, None] == all_ids).all(-1)
    with without_autocast(images.device.type):
        logits_per_image = images @ all_texts.t() * logit_scale.exp()
        if kind == "sigmoid":
            return -F.logsigmoid((logits_per_image + logit_bias) * (2 * is_pair.to(dtype) - 1)).sum(1).mean()
        all_images = torch.cat(all_gather(images)) if gather else images
        logits_per_text = texts @ all_images.t() * logit_scale.exp()
        targets = is_pair / is_pair.sum(1, keepdim=True, dtype=dtype)
        return (F.cross_entropy(logits_per_image, targets) + F.cross_entropy(logits_per_text, targets)) / 2
