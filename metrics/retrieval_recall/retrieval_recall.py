"""Recall of image-text retrieval in both directions, for `evaluate`.

evaluate.load("metrics/retrieval_recall").compute(predictions=image_embeds, references=lists_of_text_embeds)
"""

import datasets
import evaluate
import torch
import torch.nn.functional as F

from transformers_dualtoken.evaluation import RetrievalRecall


class RetrievalRecallMetric(evaluate.Metric):
    """Share of images with one of their captions, and of captions with their image, among the k most similar."""

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description=self._compute.__doc__,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Sequence(datasets.Sequence(datasets.Value("float32"))),
                }
            ),
        )

    def _compute(self, predictions, references, ks=(1, 5, 10)):
        """
        Args:
            predictions: image embeddings `(hidden_size,)`; they are brought to length 1.
            references: the embeddings `(captions, hidden_size)` of each image's captions.
            ks: how many answers count.

        Returns:
            `image_to_text_recall_at_{k}` and `text_to_image_recall_at_{k}` in 0..1.
        """
        recall = RetrievalRecall(tuple(ks))
        for image, texts in zip(predictions, references):
            image, texts = torch.as_tensor(image)[None], torch.as_tensor(texts)
            recall.update(F.normalize(image, dim=-1), F.normalize(texts, dim=-1), [len(texts)])
        return recall.compute()
