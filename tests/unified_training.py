"""What the tests of unified training share: samples with and without images, a trainer, and naive metrics."""

import math

import torch
import torch.nn.functional as F
from tiny_models import depth_logits
from training_helpers import FixedItems, quiet
from transformers import TrainingArguments

from transformers_dualtoken.training.unified.trainer import DualTokenTrainer


N, START, IMAGE, END, PAD = 9, 50, 51, 52, 0


def make_samples(draws=(True, False, True, True, False), num_codes=24) -> list[dict]:
    """Samples of several lengths: some draw an image, the others have one in the question, or none."""
    generator = torch.Generator().manual_seed(3)
    samples = []
    for index, draw in enumerate(draws):
        text = torch.randint(3, 50, (5 + 2 * index,), generator=generator)
        ids = torch.cat([text[:3], torch.tensor([START, *[IMAGE] * N, END]), text[3:]])
        labels = ids.clone()
        labels[: 3 if draw else 14] = -100
        sample = {"input_ids": ids, "labels": labels}
        if index == 4:
            sample = {"input_ids": text, "labels": text.clone()}
        else:
            for name in ("pixel_codes", "semantic_codes"):
                sample[name] = torch.randint(num_codes, (1, 3, 3, 3), generator=generator)
        samples.append(sample)
    return samples


def collate(samples: list[dict]) -> dict[str, torch.Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {
        "input_ids": pad([s["input_ids"] for s in samples], batch_first=True, padding_value=PAD),
        "labels": pad([s["labels"] for s in samples], batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(s["input_ids"]) for s in samples], batch_first=True),
        # A reader's count, which is not the model's.
        "num_skipped": torch.zeros(1, dtype=torch.int64),
    }
    for name in ("pixel_codes", "semantic_codes"):
        codes = [s[name] for s in samples if name in s]
        if codes:
            batch[name] = torch.cat(codes)
    return batch


def make_trainer(tmp_path, model, samples=None, processor=None, **overrides) -> DualTokenTrainer:
    samples = make_samples() if samples is None else samples
    return DualTokenTrainer(
        model,
        TrainingArguments(output_dir=str(tmp_path), **quiet(**overrides)),
        train_dataset=FixedItems(samples),
        eval_dataset=FixedItems(samples),
        data_collator=collate,
        processing_class=processor,
    )


@torch.no_grad()
def naive_metrics(model, samples) -> dict[str, float]:
    """From the full logits, one sample at a time."""
    config = model.config
    text_losses, text_right, visual_losses, visual_right = [], [], [], []
    for sample in samples:
        inputs = {name: value if "codes" in name else value[None] for name, value in sample.items()}
        labels = inputs.pop("labels")
        output = model(**inputs)
        hidden, targets = output.last_hidden_state[0, :-1], labels[0, 1:]
        is_text = (targets != -100) & (targets != IMAGE)
        logits = model.lm_head(hidden[is_text])
        text_losses.append(F.cross_entropy(logits, targets[is_text], reduction="none"))
        text_right.append(logits.argmax(-1) == targets[is_text])
        if (targets == IMAGE).any():
            codes = torch.stack([inputs["pixel_codes"], inputs["semantic_codes"]]).flatten(1, 3)
            logits = depth_logits(
                model.depth_heads,
                hidden[targets == IMAGE],
                torch.stack([model.model.code_embeds(*codes)[index] for index in range(2)]),
            )
            visual_losses.append(F.cross_entropy(logits.flatten(0, 2), codes.flatten(), reduction="none"))
            visual_losses[-1] = visual_losses[-1].view(codes.shape)
            visual_right.append(logits.argmax(-1) == codes)
    text, right = torch.cat(text_losses), torch.cat(text_right).double()
    visual, visual_right = torch.cat(visual_losses, 1).double().mean(1), torch.cat(visual_right, 1).double().mean(1)
    metrics = {
        "text_loss": text.mean().item(),
        "text_perplexity": math.exp(text.double().mean()),
        "text_accuracy": right.mean().item(),
        "pixel_loss": visual[0].sum().item(),
        "semantic_loss": visual[1].sum().item(),
        "num_text_targets": len(text),
        "num_visual_targets": sum(map(len, [x[0] for x in visual_losses])),
    }
    for kind, losses, rights in zip(("pixel", "semantic"), visual.tolist(), visual_right.tolist()):
        for depth in range(3):
            metrics[f"{kind}_loss_depth_{depth + 1}"] = losses[depth]
            metrics[f"{kind}_accuracy_depth_{depth + 1}"] = rights[depth]
    weights = {kind: getattr(config, f"{kind}_loss_weight") for kind in ("text", "pixel", "semantic")}
    metrics["loss"] = sum(weight * metrics[f"{kind}_loss"] for kind, weight in weights.items())
    return metrics
