"""The unified model's loss from materialised logits, target by target (DESIGN.md, section 3)."""

import torch
import torch.nn.functional as F

from .depth_head import naive_head


def naive_loss(model, input_ids, attention_mask, pixel_codes, semantic_codes, labels) -> dict[str, torch.Tensor]:
    """
    `text`, `pixel` and `semantic`: sums of the cross-entropies; `num_text`, `num_visual`: numbers of targets.

    Every image must have codes; the codes are taken in reading order as the sequence goes by. Gradients reach the
    model's language model, but not its heads, whose weights are copied.
    """
    config = model.config
    states = model(
        input_ids, attention_mask=attention_mask, pixel_codes=pixel_codes, semantic_codes=semantic_codes
    ).last_hidden_state
    heads = [naive_head(model.depth_heads, kind) for kind in range(2)]
    codes = [pixel_codes.reshape(-1, config.num_depths), semantic_codes.reshape(-1, config.num_depths)]
    quantizers = [model.vision_tokenizer.quantizer(kind) for kind in ("pixel", "semantic")]
    sums = {"text": torch.zeros(()), "pixel": torch.zeros(()), "semantic": torch.zeros(())}
    num_text = num_visual = 0
    place = 0  # among all image positions of the batch
    for row in range(len(input_ids)):
        for t in range(input_ids.shape[1]):
            is_image = bool(input_ids[row, t] == config.image_token_id)
            target = int(labels[row, t])
            if t > 0 and target == config.image_token_id:
                num_visual += 1
                for kind, name in enumerate(("pixel", "semantic")):
                    row_codes = codes[kind][place]
                    books = quantizers[kind].codebook
                    vectors = torch.stack([books[depth][int(code)] for depth, code in enumerate(row_codes)])
                    logits = heads[kind](states[row, t - 1][None], vectors[None])[0]
                    losses = F.cross_entropy(logits, row_codes, reduction="none")
                    sums[name] = sums[name] + (losses.sum() if config.depth_reduction == "sum" else losses.mean())
            elif t > 0 and target != -100:
                num_text += 1
                logits = model.lm_head(states[row, t - 1])
                sums["text"] = sums["text"] - torch.log_softmax(logits, dim=0)[target]
            place += is_image
    return {**sums, "num_text": num_text, "num_visual": num_visual}
