"""Zero-shot classification with the tokenizer's text tower; open_clip has the templates and builds the classifier."""

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from ..optional_libraries import require
from ..processing_dualtoken import as_trained


def text_tokenizer(tokenizer, length: int) -> Callable[[list[str]], torch.LongTensor]:
    """
    A function from texts to ids `(T, length)`, padded and cut to the full length, as SigLIP was trained; those of
    SigLIP 2 in lower case and without punctuation. It can be pickled, as loader workers that are not forked need it.
    """
    return partial(_tokenize, as_trained(tokenizer), length)


def _tokenize(tokenizer, length: int, texts: Sequence[str]) -> torch.LongTensor:
    settings = {"padding": "max_length", "truncation": True, "max_length": length}
    return tokenizer(list(texts), **settings, return_tensors="pt").input_ids


def embed_texts(model, input_ids: torch.LongTensor) -> torch.Tensor:
    """Text embeddings of length 1, float32 `(T, hidden_size)`."""
    features = model.get_text_features(input_ids.to(model.device)).pooler_output
    return F.normalize(features.float(), dim=-1)


def zero_shot_classifier(
    model, tokenize: Callable[[list[str]], torch.LongTensor], class_names: Sequence[str]
) -> torch.Tensor:
    """
    The weights of a linear classifier, float32 `(hidden_size, classes)`, the classes in the order of the labels: of
    every class the mean over open_clip's 80 templates of the normalised text embeddings, normalised again.

    `tokenize` makes ids of texts, for example from [`text_tokenizer`].
    """
    if len(class_names) < 2:
        raise ValueError(f"Zero-shot classification needs at least two class names, got {list(class_names)}.")
    open_clip = require("open_clip", "Zero-shot classification")
    tower = SimpleNamespace(encode_text=lambda input_ids, normalize: embed_texts(model, input_ids))
    return open_clip.build_zero_shot_classifier(
        tower, tokenize, class_names, open_clip.OPENAI_IMAGENET_TEMPLATES, device=model.device
    )


class ZeroShotAccuracy:
    """
    Running top-1 and, from five classes on, top-5 accuracy by the `(hidden_size, classes)` of [`zero_shot_classifier`],
    over the processes of `torch.distributed`.
    """

    def __init__(self, classifier: torch.Tensor):
        accuracy = require("torchmetrics.classification", "Zero-shot accuracy").MulticlassAccuracy
        self.classifier, self.num_classes = classifier, classifier.shape[1]
        settings = {"num_classes": self.num_classes, "average": "micro", "validate_args": False}
        self.accuracies = {
            f"zero_shot_top{k}": accuracy(top_k=k, **settings).to(classifier.device)
            for k in (1, 5)
            if k == 1 or k <= self.num_classes
        }

    def update(self, image_embeds: torch.Tensor, labels: torch.LongTensor) -> None:
        """Add image embeddings of length 1 `(B, hidden_size)` and their labels `(B,)`."""
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
