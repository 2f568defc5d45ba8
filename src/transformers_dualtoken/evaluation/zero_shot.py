"""Zero-shot classification with the tokenizer's text tower; open_clip has the templates and builds the classifier."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..siglip_text import as_trained
from .optional_libraries import require


def text_tokenizer(tokenizer, length: int) -> Callable[[list[str]], torch.LongTensor]:
    """
    A function from texts to ids `(T, length)`, padded and cut to the full length, as SigLIP was trained; those of
    SigLIP 2 in lower case and without punctuation. It can be pickled, as loader workers that are not forked need it.
    """
    return partial(_tokenize, as_trained(tokenizer), length)


def _tokenize(tokenizer, length: int, texts: Sequence[str]) -> torch.LongTensor:
    return tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids


def embed_texts(model, input_ids: torch.LongTensor) -> torch.Tensor:
    """Text embeddings of length 1, float32 `(T, hidden_size)`."""
    features = model.get_text_features(input_ids.to(model.device)).pooler_output
    return F.normalize(features.float(), dim=-1)


class _TextTower:
    """The tokenizer's text tower as open_clip expects a model."""

    def __init__(self, model):
        self.model = model

    def encode_text(self, input_ids: torch.LongTensor, normalize: bool = False) -> torch.Tensor:
        if normalize:
            return embed_texts(self.model, input_ids)
        return self.model.get_text_features(input_ids).pooler_output.float()


def zero_shot_classifier(
    model,
    tokenize: Callable[[list[str]], torch.LongTensor],
    class_names: Sequence[str],
    templates: Sequence[str | Callable] | None = None,
    classes_per_batch: int = 10,
) -> torch.Tensor:
    """
    The weights of a linear classifier, float32 `(hidden_size, classes)`: of every class the mean over the templates
    of the normalised text embeddings, normalised again.

    The processes of `torch.distributed` share the classes, and each gets all weights: every one must call it.

    Args:
        model ([`DualTokenVisionTokenizer`])
        tokenize (`Callable`): texts -> ids, for example from [`text_tokenizer`].
        class_names (`Sequence[str]`): one per label, in the order of the labels.
        templates (`Sequence`, *optional*): sentences with `{}`, or functions of a name. Defaults to open_clip's 80.
        classes_per_batch (`int`, defaults to 10): classes embedded at a time.

    Raises:
        ValueError: if there are fewer than two class names.
        MetricUnavailableError: if open_clip is missing.
    """
    if len(class_names) < 2:
        raise ValueError(f"Zero-shot classification needs at least two class names, got {list(class_names)}.")
    open_clip = require("open_clip", "Zero-shot classification")
    is_distributed = dist.is_available() and dist.is_initialized()
    rank, num_processes = (dist.get_rank(), dist.get_world_size()) if is_distributed else (0, 1)
    names, weights = class_names[rank::num_processes], None
    if names:  # there may be more processes than classes
        weights = open_clip.build_zero_shot_classifier(
            _TextTower(model),
            tokenize,
            names,
            open_clip.OPENAI_IMAGENET_TEMPLATES if templates is None else templates,
            num_classes_per_batch=classes_per_batch,
            device=model.device,
        ).cpu()
    parts = [weights]
    if is_distributed:
        parts = [None] * num_processes
        dist.all_gather_object(parts, weights)
    classifier = parts[0].new_empty(len(parts[0]), len(class_names))
    for first, part in enumerate(parts):
        if part is not None:
            classifier[:, first::num_processes] = part
    return classifier.to(model.device)


class ZeroShotAccuracy:
    """
    Running top-1 and, from five classes on, top-5 accuracy. Adds up over the processes of `torch.distributed`.

    Args:
        classifier (`torch.Tensor` of shape `(hidden_size, classes)`): from [`zero_shot_classifier`].

    Raises:
        MetricUnavailableError: if torchmetrics is missing.
    """

    def __init__(self, classifier: torch.Tensor):
        classification = require("torchmetrics.classification", "Zero-shot accuracy")
        self.classifier, self.num_classes = classifier, classifier.shape[1]
        self.accuracies = {
            f"zero_shot_top{k}": classification.MulticlassAccuracy(
                num_classes=self.num_classes, top_k=k, average="micro", validate_args=False
            ).to(classifier.device)
            for k in (1, 5)
            if k == 1 or k <= self.num_classes
        }

    def update(self, image_embeds: torch.Tensor, labels: torch.LongTensor) -> None:
        """
        Add image embeddings of length 1 `(B, hidden_size)` and their labels `(B,)`.

        Raises:
            ValueError: if a label has no class name.
        """
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"Labels go from {int(labels.min())} to {int(labels.max())}, but there are {self.num_classes} class "
                f"names: labels must lie in 0..{self.num_classes - 1}."
            )
        logits = image_embeds.float() @ self.classifier
        for accuracy in self.accuracies.values():
            accuracy.update(logits, labels.to(logits.device))

    def compute(self) -> dict[str, float]:
        """`zero_shot_top1` and `zero_shot_top5` in 0..1, over all processes, each of which must call it."""
        return {name: float(accuracy.compute()) for name, accuracy in self.accuracies.items()}


__all__ = ["ZeroShotAccuracy", "embed_texts", "text_tokenizer", "zero_shot_classifier"]
