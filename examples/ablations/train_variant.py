"""
Train and measure one tokenizer of the ablations: a variant of one seed.

    python examples/ablations/train_variant.py --output_dir ablations --variant dual-2 --seed 0

It leaves `runs/dual-2-seed0.json`. Variants are `dual-L`, pixel codes from layer L and semantic codes from layer 7;
`reconstruction-L`, pixel codes from layer L and no semantic loss; `one-D`, one codebook of D depths at layer 7 for
both losses. All of a seed start from its teacher; they have the same sizes, weights, steps and order of the data.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import SiglipModel

from transformers_dualtoken import DualTokenVisionTokenizer
from transformers_dualtoken.modeling_vision_tokenizer import CODE_KINDS, DualTokenEncoderOutput
from transformers_dualtoken.optional_libraries import needed_libraries
from transformers_dualtoken.training import DualTokenVisionTokenizerRecipe, DualTokenVisionTokenizerTrainer


with needed_libraries("The ablation"):
    import skimage.metrics
    from scipy.linalg import sqrtm


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "digits")]
from scenes import write_scenes  # noqa: E402
from teacher import (  # noqa: E402
    Judge,
    to_pixels,
    train_judge,
    train_teacher,
    training_arguments,
    zero_shot_accuracy,
)


SEMANTIC_LAYER = 7
STEPS = 800
BATCH_SIZE = 32
NUM_DEPTHS = 4
QUANTIZER = {"codebook_size": 256, "code_dim": 16, "num_depths": NUM_DEPTHS, "ema_decay": 0.97}
SIZES = {
    "semantic_layer": SEMANTIC_LAYER,
    "shortcut_layer": None,
    "semantic_quantizer_config": QUANTIZER,
    # A latent twice as fine as the grid: with one level less to upsample, the decoder learns much faster.
    "decoder_latent_size": 8,
    "decoder_in_channels": 64,
    "decoder_block_out_channels": [16, 32, 64],
    "decoder_num_res_blocks": 1,
    "decoder_norm_num_groups": 8,
}
# The networks of the perceptual and the adversarial term would have to be downloaded or trained. The semantic terms are
# large here (the teacher's features are): with a weight of 200 they decide alone what a single codebook keeps.
LOSS_WEIGHTS = {"reconstruction_mse": 1000.0, "perceptual": 0.0, "generator": 0.0}
NO_SEMANTICS = dict.fromkeys(
    ("semantic_mse", "semantic_cosine", "pooler_mse", "pooler_cosine", "semantic_commitment"), 0.0
)


class OneCodebookTokenizer(DualTokenVisionTokenizer):
    """
    [`DualTokenVisionTokenizer`] with a single vocabulary: its semantic codes are its pixel codes, made at the semantic
    layer. Each branch keeps its own up-projection. There is one commitment, given under both names, so that one of the
    two weights must be 0.

    Raises:
        ValueError: if the config names two layers or a shortcut.
    """

    def __init__(self, config):
        if config.pixel_layer != config.semantic_layer or config.shortcut_layer is not None:
            raise ValueError(
                "One codebook takes one layer and no shortcut: `pixel_layer` must equal `semantic_layer` and "
                f"`shortcut_layer` be None, got {config.pixel_layer}, {config.semantic_layer} and "
                f"{config.shortcut_layer}."
            )
        super().__init__(config)
        self.semantic_down_proj = self.pixel_down_proj
        self.semantic_quantizer = self.pixel_quantizer

    def encode(self, pixel_values, codes=CODE_KINDS, features: bool = True, **kwargs) -> DualTokenEncoderOutput:
        """As in the base class, but whichever kind is asked for, both are made."""
        fields = dict(super().encode(pixel_values, codes=("pixel",), **kwargs))
        for name in ("codes", "quantized", "commitment_loss", "hidden_state"):
            fields[f"semantic_{name}"] = fields[f"pixel_{name}"]
        if features:
            vision_model = self.siglip.vision_model
            fields["semantic_features"] = hidden_states = self.semantic_up_proj(fields["pixel_quantized"])
            for layer in vision_model.encoder.layers[self.config.semantic_layer :]:
                hidden_states = layer(hidden_states, attention_mask=None)
            fields["last_hidden_state"] = hidden_states
            fields["pooler_output"] = vision_model.head(vision_model.post_layernorm(hidden_states))
        return DualTokenEncoderOutput(**fields)


def variant_settings(variant: str) -> dict:
    """What a variant's name stands for: its `kind`, `config` overrides and `loss_weights`."""
    kind, _, number = variant.partition("-")
    if kind not in ("dual", "reconstruction", "one") or not number.isdigit():
        raise ValueError(
            f"`variant` must be dual-L or reconstruction-L with a layer L, or one-D with a number of depths D, "
            f"got {variant!r}."
        )
    is_one = kind == "one"
    quantizer = {**QUANTIZER, "num_depths": int(number) if is_one else NUM_DEPTHS}
    config = {
        **SIZES,
        "pixel_layer": SEMANTIC_LAYER if is_one else int(number),
        "pixel_quantizer_config": quantizer,
        "semantic_quantizer_config": quantizer if is_one else QUANTIZER,
    }
    loss_weights = {
        "dual": LOSS_WEIGHTS,
        "reconstruction": LOSS_WEIGHTS | NO_SEMANTICS,
        "one": LOSS_WEIGHTS | {"semantic_commitment": 0.0},
    }[kind]
    return {"kind": kind, "config": config, "loss_weights": loss_weights, "batch_size": BATCH_SIZE}


def bits_per_position(settings: dict) -> float:
    """Bits of the codes a variant is trained to make at one position."""
    kinds = ("pixel", "semantic") if settings["kind"] == "dual" else ("pixel",)
    quantizers = [settings["config"][f"{kind}_quantizer_config"] for kind in kinds]
    return float(sum(quantizer["num_depths"] * np.log2(quantizer["codebook_size"]) for quantizer in quantizers))


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Between Gaussians fitted to two sets of features `(n, C)`: |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2))."""
    covariances = [np.cov(features, rowvar=False) for features in (first, second)]
    means = [features.mean(0) for features in (first, second)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    return float(((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root))


@torch.no_grad()
def measure(model: DualTokenVisionTokenizer, kind: str, scenes, classes: torch.Tensor, judge: Judge) -> dict:
    """Zero-shot top-1 and, of images in [0, 1], PSNR, SSIM and the Fréchet distance on the judge's features."""
    pixel_values = to_pixels(scenes["heldout_images"])
    model.eval()
    encoded = model.encode(pixel_values, codes=("pixel",) if kind == "reconstruction" else CODE_KINDS)
    decoded = model.decode(pixel_codes=encoded.pixel_codes).reconstruction.clamp(-1, 1)
    metrics = {}
    if kind != "reconstruction":
        metrics["zero_shot"] = zero_shot_accuracy(encoded.pooler_output, classes, scenes["heldout_digits"])
    originals, images = ((value.permute(0, 2, 3, 1).numpy() + 1) / 2 for value in (pixel_values, decoded))
    pairs = list(zip(originals, images))
    psnr = [skimage.metrics.peak_signal_noise_ratio(*pair, data_range=1) for pair in pairs]
    ssim = [skimage.metrics.structural_similarity(*pair, data_range=1, channel_axis=-1) for pair in pairs]
    features = [judge.features(values).double().numpy() for values in (pixel_values, decoded)]
    metrics |= {"psnr": float(np.mean(psnr)), "ssim": float(np.mean(ssim)), "frechet": frechet_distance(*features)}
    for code_kind in CODE_KINDS if kind == "dual" else ("pixel",):
        codes = getattr(encoded, f"{code_kind}_codes")
        metrics[f"{code_kind}_codes_used"] = len(codes.unique())
    return metrics


def load_judge(output_dir: Path) -> Judge:
    """The judge of all seeds and variants, in eval mode; trained first where there is none yet."""
    weights = torch.load(train_judge(output_dir))["weights"]
    judge = Judge(len(weights["photo.bias"]))
    judge.load_state_dict(weights)
    return judge.eval()


def train_tokenizer(output_dir: Path, variant: str, seed: int, steps: int = STEPS) -> DualTokenVisionTokenizer:
    """A variant's tokenizer, trained from the teacher of its seed."""
    settings = variant_settings(variant)
    scenes = np.load(write_scenes(output_dir))
    teacher_dir = train_teacher(output_dir, seed)
    torch.manual_seed(seed)
    model_class = OneCodebookTokenizer if settings["kind"] == "one" else DualTokenVisionTokenizer
    model = model_class.from_siglip_pretrained(teacher_dir, **settings["config"])
    arguments = training_arguments(
        output_dir / "runs",
        seed,
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=1.5e-3,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.01,
    )
    trainer = DualTokenVisionTokenizerTrainer(
        model=model,
        args=arguments,
        teacher=SiglipModel.from_pretrained(teacher_dir).vision_model,
        recipe=DualTokenVisionTokenizerRecipe(loss_weights=settings["loss_weights"]),
        train_dataset=[{"pixel_values": image} for image in to_pixels(scenes["train_images"])],
    )
    trainer.train()
    return model.eval()


def train_variant(output_dir: Path, variant: str, seed: int, steps: int = STEPS) -> dict:
    """Train and measure a variant, unless the same settings have left their results already."""
    settings = {**variant_settings(variant), "variant": variant, "seed": seed, "steps": steps}
    path = output_dir / "runs" / f"{variant}-seed{seed}.json"
    if path.exists() and (kept := json.loads(path.read_text()))["settings"] == settings:
        return kept
    path.parent.mkdir(parents=True, exist_ok=True)
    judge, teacher_dir = load_judge(output_dir), train_teacher(output_dir, seed)
    started = time.process_time()
    model = train_tokenizer(output_dir, variant, seed, steps)
    seconds = time.process_time() - started
    teacher, scenes = torch.load(teacher_dir / "classes.pt"), np.load(write_scenes(output_dir))
    metrics = measure(model, settings["kind"], scenes, teacher["classes"], judge)
    result = {
        "settings": settings,
        "metrics": {**metrics, "teacher_zero_shot": teacher["zero_shot"], "bits": bits_per_position(settings)},
        "core_seconds": round(seconds, 1),
    }
    # Written whole or not at all.
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.rename(path)
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--variant", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    result = train_variant(arguments.output_dir, arguments.variant, arguments.seed, arguments.steps)
    print(json.dumps({**result["metrics"], "core_seconds": result["core_seconds"]}))


if __name__ == "__main__":
    main()
