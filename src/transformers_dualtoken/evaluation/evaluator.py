"""One pass over images: codes, reconstructions and embeddings, and every metric that is made from them."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from ..modeling_vision_tokenizer import CODE_KINDS, DualTokenVisionTokenizer
from .codebook_statistics import CodebookUsage
from .image_metrics import ReconstructionMetrics
from .processes import summed
from .retrieval import RetrievalRecall
from .zero_shot import ZeroShotAccuracy, embed_texts


class TokenizerEvaluator:
    """
    Running metrics of a vision tokenizer over one pass. Every process of `torch.distributed` adds its own images; the
    results are of all of them, whatever number each had.

    Args:
        model ([`DualTokenVisionTokenizer`]): put into eval mode. Any floating dtype; metrics are made in float32.
        zero_shot (*optional*): needs `labels` in `update`.
        retrieval (*optional*): needs `input_ids` and `captions_per_image` in `update`.
        codebooks (`bool`, defaults to `True`): whether to count the codes of both codebooks.
        num_shown (`int`, defaults to 16): first images kept, with reconstructions, in `shown`.
    """

    def __init__(
        self,
        model: DualTokenVisionTokenizer,
        reconstruction: ReconstructionMetrics | None = None,
        zero_shot: ZeroShotAccuracy | None = None,
        retrieval: RetrievalRecall | None = None,
        codebooks: bool = True,
        num_shown: int = 16,
    ):
        self.model = model.eval()
        self.reconstruction = None if reconstruction is None else reconstruction.to(model.device)
        self.zero_shot, self.retrieval = zero_shot, retrieval
        self.usage = {}
        for kind in CODE_KINDS if codebooks else ():
            config = model.quantizer(kind).config
            self.usage[kind] = CodebookUsage(config.num_depths, config.codebook_size, config.shared_codebook)
        self.num_images, self.num_shown, self.shown = 0, num_shown, []

    @torch.no_grad()
    def update(
        self,
        pixel_values: torch.Tensor,
        labels: torch.LongTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        captions_per_image: list[int] | torch.Tensor | None = None,
    ) -> None:
        """
        Add images.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, S, S)`): in [-1, 1].
            labels (`torch.LongTensor` of shape `(B,)`): indices of the class names.
            input_ids (`torch.LongTensor` of shape `(T, L)`): the captions of the first image, then of the second, ...
            captions_per_image (`list[int]` of length B): how many each image has.
        """
        for metric, name, value in (
            (self.zero_shot, "labels", labels),
            (self.retrieval, "input_ids", input_ids),
            (self.retrieval, "captions_per_image", captions_per_image),
        ):
            if metric is not None and value is None:
                raise ValueError(f"{type(metric).__name__} needs `{name}` with every batch, and got none.")
        pixel_values = pixel_values.to(self.model.device)
        room = max(0, self.num_shown - len(self.shown))
        num_decoded = len(pixel_values) if self.reconstruction is not None else min(room, len(pixel_values))
        needs_embeds = self.zero_shot is not None or self.retrieval is not None
        needed = {"pixel": num_decoded > 0, "semantic": needs_embeds}
        codes = [kind for kind in CODE_KINDS if needed[kind] or kind in self.usage]
        if codes:
            encoded = self.model.encode(pixel_values.to(self.model.dtype), codes=codes, features=needs_embeds)
        for kind, usage in self.usage.items():
            usage.update(encoded[f"{kind}_codes"])
        if num_decoded:
            images = pixel_values[:num_decoded].float()
            decoded = self.model.decode(pixel_codes=encoded.pixel_codes[:num_decoded]).reconstruction.float()
            if images.shape[-2:] != decoded.shape[-2:]:
                images = F.interpolate(images, size=decoded.shape[-2:], mode="bilinear", align_corners=False)
            if self.reconstruction is not None:
                self.reconstruction.update(decoded, images)
            self.shown += list(zip(images[:room].cpu(), decoded[:room].cpu()))
        if needs_embeds:
            image_embeds = F.normalize(encoded.pooler_output.float(), dim=-1)
        if self.zero_shot is not None:
            self.zero_shot.update(image_embeds, labels)
        if self.retrieval is not None:
            self.retrieval.update(image_embeds, embed_texts(self.model, input_ids), captions_per_image)
        self.num_images += len(pixel_values)

    def run(self, batches: Iterable[dict]) -> dict:
        """`update` with every batch, a dict of its arguments, then `compute`."""
        for batch in batches:
            self.update(**batch)
        return self.compute()

    def compute(self) -> dict[str, float | int | dict]:
        """
        The metrics by name, over all processes, each of which must call it: `num_images`, those of the parts, and
        `{pixel,semantic}_codebook_{usage,perplexity,entropy}`, with lists over the depths under `per_depth`.
        """
        device = self.model.device
        metrics = {"num_images": int(summed(torch.tensor(self.num_images, device=device)))}
        if not metrics["num_images"]:
            raise ValueError("There was no image to evaluate: the data set holds none, or none that is readable.")
        for part in (self.reconstruction, self.zero_shot):
            metrics |= {} if part is None else part.compute()
        if self.retrieval is not None:
            metrics |= self.retrieval.compute(device)
        for kind, usage in self.usage.items():
            usage = usage.reduce(device)
            metrics |= {f"{kind}_codebook_{name}": value for name, value in usage.compute().items()}
            for name, values in usage.compute_per_depth().items():
                metrics.setdefault("per_depth", {})[f"{kind}_codebook_{name}"] = values
        return metrics
