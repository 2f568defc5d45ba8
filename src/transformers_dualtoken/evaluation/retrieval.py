"""
Recall of image-text retrieval in both directions. Needs torch alone; torchmetrics' retrieval metrics want every pair of
image and text at once, where here similarities are made in chunks.
"""

import torch

from .processes import gathered


class RetrievalRecall:
    """
    R@k of images and their captions, several captions per image allowed.

    Image to text: the share of images with one of their captions among the k most similar of all captions. Text to
    image: the share of captions whose image is among the k most similar of all images. What is exactly as similar as
    the right answer counts as better, so that equal embeddings retrieve nothing.

    The embeddings of all images and texts are kept on the CPU until `compute`, which compares `chunk_size` queries with
    everything at a time.
    """

    def __init__(self, ks: tuple[int, ...] = (1, 5, 10), chunk_size: int = 1024):
        if not ks or min(ks) < 1 or chunk_size < 1:
            raise ValueError(f"`ks` and `chunk_size` must be at least 1, got {ks} and {chunk_size}.")
        self.ks, self.chunk_size = tuple(ks), chunk_size
        # `torch.cat` passes over empty ones, whatever the width of the others.
        self._images, self._texts, self._counts = [torch.zeros(0)], [torch.zeros(0)], [torch.zeros(0).long()]

    def update(
        self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, captions_per_image: list[int] | torch.Tensor
    ) -> None:
        """
        Add embeddings of length 1, `(B, hidden_size)` of images and `(T, hidden_size)` of the captions of the first
        image, then of the second, and so on; `captions_per_image` says how many each has, at least 1.
        """
        counts = torch.as_tensor(captions_per_image).cpu()
        if len(counts) != len(image_embeds) or int(counts.sum()) != len(text_embeds) or int(counts.min()) < 1:
            raise ValueError(
                f"`captions_per_image` must give every one of {len(image_embeds)} images at least one of the "
                f"{len(text_embeds)} captions, got {counts.tolist()}."
            )
        self._images.append(image_embeds.float().cpu())
        self._texts.append(text_embeds.float().cpu())
        self._counts.append(counts)

    def compute(self, device: torch.device | str = "cpu") -> dict[str, float]:
        """
        `image_to_text_recall_at_{k}` and `text_to_image_recall_at_{k}` in 0..1, over all processes, each of which
        must call it; NaN without images.
        """
        own = [torch.cat(parts) for parts in (self._images, self._texts, self._counts)]
        images, texts, counts = (torch.cat(parts).to(device) for parts in zip(*gathered(own)))
        indices = torch.arange(len(images), device=device)
        owners = indices.repeat_interleave(counts)
        ranks = {
            "image_to_text": self._ranks(images, texts, indices, owners),
            "text_to_image": self._ranks(texts, images, owners, indices),
        }
        return {
            f"{direction}_recall_at_{k}": float((rank < k).double().mean())
            for direction, rank in ranks.items()
            for k in self.ks
        }

    def _ranks(self, queries, keys, query_owners, key_owners) -> torch.Tensor:
        """Of every query, how many keys of others are at least as similar as the best of its own: `(queries,)`."""
        ranks = [torch.zeros(0, device=queries.device)]
        for start in range(0, len(queries), self.chunk_size):
            chunk = slice(start, start + self.chunk_size)
            similarity = queries[chunk] @ keys.t()
            own = query_owners[chunk, None] == key_owners[None]
            best = similarity.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
            ranks.append(((similarity >= best) & ~own).sum(1))
        return torch.cat(ranks)
