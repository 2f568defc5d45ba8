"""What the benchmarks of image generation share: weights that make codes differ, prompts, and an image of any grid."""

import torch
import unified_models  # noqa: F401 - first of all that imports the package: it stands in for missing libraries


@torch.no_grad()
def spread_weights(model) -> None:
    """
    Random weights of a size at which codes depend on the prompt and the most probable one stands out.

    At the usual initialisation nearly nothing reaches the heads, and equal codes would prove nothing.
    """
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "vision_tokenizer" not in name and "embed_tokens" not in name and parameter.ndim > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    for kind in ("pixel", "semantic"):
        model.vision_tokenizer.quantizer(kind).codebook.embeddings.normal_()


def make_prompts(config, rows: int, length: int, device="cpu") -> torch.LongTensor:
    """Random ids `(rows, length)` of which the last is `<image_start>`."""
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(1, min(config.special_image_token_ids), (rows, length), generator=generator)
    prompts[:, -1] = config.image_start_token_id
    return prompts.to(device)


def draw_image(model, prompts: torch.LongTensor, side: int | None = None, **settings) -> torch.LongTensor:
    """
    Codes `(2, B, N, D)` of an image per prompt, by the model's own `generate`.

    Args:
        side (`int`, *optional*): of the grid instead of the model's own, for an image of fewer positions.
        settings: of `generate`.
    """
    vision = model.config.vision_tokenizer_config.vision_config
    own_size = vision.image_size
    if side is not None:
        # What the number of positions follows from.
        vision.image_size = side * vision.patch_size
    try:
        mask = torch.ones_like(prompts)
        output = model.generate(prompts, attention_mask=mask, generation_mode="image", **settings)
    finally:
        vision.image_size = own_size
    return torch.stack([output.pixel_codes, output.semantic_codes]).flatten(2, 3)
