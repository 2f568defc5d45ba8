"""
Train and measure the unified models of one seed of the ablation of the codes: both kinds, pixel only, semantic only.

    python examples/ablations/train_codes.py --output_dir ablations --seed 0

It leaves `runs/codes-both-seed0.json` and a picture of drawings for every variant. All of a seed have the same
tokenizer (`dual-2` of `train_variant.py`), whose codes are made once, and the same untrained language model, data and
order of the data. A variant reads and learns to write only its own kind of codes. Of each variant one model learns to
answer and another one to draw: in one model, which of the two it gives up would be a matter of their weights.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, TrainerCallback, TrainingArguments

from transformers_dualtoken import (
    DualTokenForCausalLM,
    DualTokenImageProcessorPil,
    DualTokenProcessor,
    DualTokenVisionTokenizer,
)
from transformers_dualtoken.training import ChatEncoder, DualTokenChatDataset, DualTokenDataCollator, DualTokenTrainer


EXAMPLES = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(EXAMPLES / "digits"), str(EXAMPLES / "miniature")]
from build_language_model import build_tokenizer  # noqa: E402
from data import IMAGE_SIZE, NOUNS, scan_to_image, split_scans, vary  # noqa: E402
from scenes import TRAIN_PHOTOS, TRAIN_SCENES, VALIDATION_PHOTOS, blend_digit, load_photos, write_scenes  # noqa: E402
from teacher import Judge, to_pixels, train_teacher, zero_shot_accuracy  # noqa: E402
from train_variant import frechet_distance, load_judge, train_tokenizer  # noqa: E402


# The kinds of codes a model reads and learns to write.
VARIANTS = {"both": ("pixel", "semantic"), "pixel": ("pixel",), "semantic": ("semantic",)}
TASKS = ("understanding", "generation")
TOKENIZER = "dual-2"

# What is asked about scenes, and drawn: a digit over one view of one of these photographs. Over crops from anywhere, as
# in the scenes, a model of this size and data learns to draw for many times as long.
VIEWS = ("galaxies", "motorcycle", "retina", "rocket")
VIEW_SIDE = 160
ASK = {"digit": "Which digit is this?", "corner": "Which corner is the brightest?"}
CORNERS = ("upper left", "upper right", "lower left", "lower right")
# A corner is asked for where it is brighter than the others by this much, of 255.
CORNER_LEAD = 13
DRAW = "Draw {} over the {}."
# Of the drawings, as the recorded runs had it.
SAMPLING = {"guidance_scale": 3.0, "image_temperature": 0.9, "image_top_k": 30, "image_top_p": 0.85}

# Pictures of every training scan: all its scenes to be asked about, views to draw. Every tenth scan is for validation.
PICTURES = {"understanding": TRAIN_SCENES, "generation": 4}
VALIDATION_EVERY, VALIDATION_PICTURES = 10, 2
HELDOUT_VIEWS = 4
# Drawings of every digit over every view: while training, and in the end.
CURVE_DRAWINGS, FINAL_DRAWINGS = 5, 10

LANGUAGE_MODEL = {
    "hidden_size": 96,
    "intermediate_size": 288,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": None,
}
DEPTH_HEADS = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "head_dim": 32,
    "intermediate_size": 128,
    "input_hidden_size": 96,
}
# Where more than `patience` evaluations in a row find a validation loss that has fallen by less than `threshold` of
# itself since it was lowest, the learning rate is multiplied by `factor`; where it would be for the time after `cuts`,
# training ends.
TRAINING = {
    "batch_size": 16,
    "learning_rate": 1.5e-3,
    "weight_decay": 0.05,
    "prompt_drop_probability": 0.1,
    "eval_steps": 500,
    "threshold": 0.01,
    "patience": 1,
    "factor": 0.25,
    "cuts": 2,
    "max_steps": 12000,
}


def brightest_corner(images: np.ndarray) -> np.ndarray:
    """Index in `CORNERS` of the brightest 8 x 8 corner of each image `(n, S, S, 3)`; -1 where it hardly leads."""
    gray = images.astype(np.float64).mean(-1)
    corners = [
        gray[:, rows, columns] for rows in (slice(8), slice(-8, None)) for columns in (slice(8), slice(-8, None))
    ]
    means = np.stack([corner.mean((1, 2)) for corner in corners], axis=1)
    second, first = np.sort(means, axis=1)[:, -2:].T
    return np.where(first - second >= CORNER_LEAD, means.argmax(1), -1)


def draw_views(scans: np.ndarray, digits: np.ndarray, count: int, seed: int) -> dict[str, np.ndarray]:
    """`count` changed copies of every scan over random views: `images` (n, S, S, 3), `digits`, `views` (n,)."""
    rng, photos, backgrounds = random.Random(seed), load_photos(), []
    for name in VIEWS:
        photo = photos[name]
        left, top = (photo.width - VIEW_SIDE) // 2, (photo.height - VIEW_SIDE) // 2
        box = (left, top, left + VIEW_SIDE, top + VIEW_SIDE)
        view = photo.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, box=box)
        backgrounds.append(np.asarray(view, dtype=np.float64) / 255)
    images, views = [], []
    for scan in scans:
        for _ in range(count):
            views.append(rng.randrange(len(VIEWS)))
            images.append(blend_digit(vary(scan_to_image(scan), rng), backgrounds[views[-1]], rng))
    return {"images": np.stack(images), "digits": digits.repeat(count), "views": np.array(views)}


def load_pictures(output_dir: Path, validation: bool) -> dict[str, dict[str, np.ndarray]]:
    """Scenes to ask about (`train`, `heldout`) and scans over views to draw (`train_views`, `heldout_views`)."""
    scenes = np.load(write_scenes(output_dir, validation))
    train, heldout = split_scans(validation)
    pictures = {
        part: {kind: scenes[f"{part}_{kind}"] for kind in ("images", "digits")} for part in ("train", "heldout")
    }
    pictures["train_views"] = draw_views(*train, PICTURES["generation"], seed=2)
    pictures["heldout_views"] = draw_views(*heldout, HELDOUT_VIEWS, seed=3)
    return pictures


def load_tokenizer(output_dir: Path, seed: int) -> DualTokenVisionTokenizer:
    """`tokenizer-{seed}/` of `output_dir`; trained first where it is missing."""
    folder = output_dir / f"tokenizer-{seed}"
    if not folder.exists():
        # Renamed when whole: a run that is killed is started again in the same folder.
        partial = folder.with_suffix(".partial")
        train_tokenizer(output_dir, TOKENIZER, seed).save_pretrained(partial)
        partial.rename(folder)
    return DualTokenVisionTokenizer.from_pretrained(folder).eval()


def message(role: str, *parts: str | dict) -> dict:
    """Strings are text; pictures are parts already."""
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def draw_request(digit: int, view: int) -> dict:
    return message("user", DRAW.format(NOUNS[digit], VIEWS[view]))


class Conversations:
    """Everything the models of a seed learn from and are asked: token ids with the codes of one tokenizer."""

    def __init__(self, output_dir: Path, seed: int, validation: bool = False):
        self.pictures = load_pictures(output_dir, validation)
        self.vision_tokenizer = load_tokenizer(output_dir, seed)
        self.codes = {part: self._encode(value["images"]) for part, value in self.pictures.items()}
        self.corners = {part: brightest_corner(self.pictures[part]["images"]) for part in ("train", "heldout")}
        answers = [*(f"It is {noun}." for noun in NOUNS), *(f"The {corner} one." for corner in CORNERS)]
        requests = [DRAW.format(noun, view) for noun in NOUNS for view in VIEWS]
        size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        self.processor = DualTokenProcessor(
            DualTokenImageProcessorPil(size=size),
            build_tokenizer([*ASK.values(), *answers, *requests, "user\nassistant\n"]),
            num_image_tokens=self.vision_tokenizer.config.num_positions,
        )
        num_scans = len(self.pictures["train_views"]["digits"]) // PICTURES["generation"]
        scans = {
            True: range(0, num_scans, VALIDATION_EVERY),
            False: [scan for scan in range(num_scans) if scan % VALIDATION_EVERY],
        }
        drop = TRAINING["prompt_drop_probability"]
        self.train = {
            task: self._dataset(self._lesson(task, scans[False], PICTURES[task]), drop, seed) for task in TASKS
        }
        self.validation = {task: self._dataset(self._lesson(task, scans[True], VALIDATION_PICTURES)) for task in TASKS}
        heldout = range(len(self.corners["heldout"]))
        self.questions = {kind: self._dataset(self._ask("heldout", heldout, kind)) for kind in ASK}

    @torch.no_grad()
    def _encode(self, images: np.ndarray) -> tuple[torch.LongTensor, torch.LongTensor]:
        encoded = [self.vision_tokenizer.encode(part, features=False) for part in to_pixels(images).split(256)]
        return tuple(torch.cat([getattr(part, f"{kind}_codes") for part in encoded]) for kind in ("pixel", "semantic"))

    def _picture(self, part: str, row: int) -> dict:
        pixel, semantic = (kind[row] for kind in self.codes[part])
        return {"type": "image", "pixel_codes": pixel, "semantic_codes": semantic}

    def _ask(self, part: str, rows, kind: str) -> list[dict]:
        digits, corners, examples = self.pictures[part]["digits"], self.corners[part], []
        for row in rows:
            answer = f"It is {NOUNS[digits[row]]}." if kind == "digit" else f"The {CORNERS[corners[row]]} one."
            if kind == "digit" or corners[row] >= 0:
                chat = [message("user", self._picture(part, row), ASK[kind]), message("assistant", answer)]
                examples.append({"messages": chat, "id": f"{part}/{row}"})
        return examples

    def _lesson(self, task: str, scans, pictures: int) -> list[dict]:
        """Questions about, or drawings of, the first `pictures` pictures of each of the training scans."""
        views = self.pictures["train_views"]
        if task == "understanding":
            rows = [scan * PICTURES[task] + number for scan in scans for number in range(pictures)]
            return [example for kind in ASK for example in self._ask("train", rows, kind)]
        examples = []
        for row in [scan * PICTURES[task] + number for scan in scans for number in range(pictures)]:
            request = draw_request(views["digits"][row], views["views"][row])
            chat = [request, message("assistant", self._picture("train_views", row))]
            examples.append({"messages": chat, "id": f"train_views/{row}"})
        return examples

    def _dataset(self, examples: list[dict], drop: float = 0.0, seed: int = 0) -> DualTokenChatDataset:
        encoder = ChatEncoder(self.processor, prompt_drop_probability=drop)
        return DualTokenChatDataset(examples, encoder, seed=seed)

    def draw_inputs(self, digits: np.ndarray, views: np.ndarray) -> dict:
        return self.processor.apply_chat_template(
            [[draw_request(digit, view)] for digit, view in zip(digits, views)],
            add_generation_prompt=True,
            generate_image=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )


def build_model(conversations: Conversations, kinds: tuple[str, ...], seed: int) -> DualTokenForCausalLM:
    """An untrained unified model that reads and learns to write the codes of `kinds` only."""
    processor, text_tokenizer = conversations.processor, conversations.processor.tokenizer
    special = {"eos_token_id": text_tokenizer.eos_token_id, "pad_token_id": text_tokenizer.pad_token_id}
    torch.manual_seed(seed)
    language_model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(text_tokenizer), **LANGUAGE_MODEL, **special))
    language_model.generation_config = GenerationConfig(**special)
    token_ids = {
        name: getattr(processor, name) for name in ("image_start_token_id", "image_token_id", "image_end_token_id")
    }
    model = DualTokenForCausalLM.from_pretrained_parts(
        conversations.vision_tokenizer,
        language_model,
        **token_ids,
        depth_head_config=DEPTH_HEADS,
        pixel_loss_weight=float("pixel" in kinds),
        semantic_loss_weight=float("semantic" in kinds),
    )
    projector = model.model.visual_projector
    width = projector.linear_1.in_features // 2
    mask = torch.tensor([float("pixel" in kinds), float("semantic" in kinds)]).repeat_interleave(width)
    projector.register_forward_pre_hook(lambda module, inputs: (inputs[0] * mask,))
    return model


@torch.no_grad()
def answer_accuracy(model: DualTokenForCausalLM, questions: DualTokenChatDataset, collate) -> float:
    """Share of the questions whose greedy answer is right to the letter: one where every token is the likeliest."""
    right = []
    for start in range(0, len(questions), 256):
        batch = collate([questions[row] for row in range(start, min(start + 256, len(questions)))])
        del batch["num_skipped"]
        labels = batch["labels"][:, 1:]
        predicted = model(**batch).logits[:, :-1].argmax(-1)
        right.append(((predicted == labels) | (labels == -100)).all(1))
    return float(torch.cat(right).float().mean())


@torch.no_grad()
def embed_semantic_codes(tokenizer: DualTokenVisionTokenizer, codes: torch.LongTensor) -> torch.Tensor:
    """Image embeddings `(n, H)` of semantic codes `(n, h, w, D)`: the rest of the way that `encode` goes."""
    vision_model = tokenizer.siglip.vision_model
    hidden_states = tokenizer.semantic_up_proj(tokenizer.semantic_quantizer.embed_codes(codes).flatten(1, 2))
    for layer in vision_model.encoder.layers[tokenizer.config.semantic_layer :]:
        hidden_states = layer(hidden_states, attention_mask=None)
    return vision_model.head(vision_model.post_layernorm(hidden_states))


class Drawings:
    """Judges pictures of digits over views: by an independent network, and their semantic codes by zero-shot."""

    def __init__(self, conversations: Conversations, judge: Judge, classes: torch.Tensor, photos: list[str]):
        self.conversations, self.tokenizer = conversations, conversations.vision_tokenizer
        self.judge, self.classes = judge, classes
        self.photos = np.array([photos.index(name) for name in VIEWS])
        self.reference = self._features(to_pixels(conversations.pictures["heldout_views"]["images"]))

    @torch.no_grad()
    def _features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.judge.features(pixel_values)

    def judge_codes(self, codes: dict[str, torch.Tensor], digits: np.ndarray, views: np.ndarray) -> dict[str, float]:
        """Accuracies and the Fréchet distance to held-out pictures, of codes `(n, h, w, D)` by kind."""
        metrics = {}
        if "pixel" in codes:
            with torch.no_grad():
                images = self.tokenizer.decode(pixel_codes=codes["pixel"]).reconstruction.clamp(-1, 1)
            features = self._features(images)
            is_digit, is_view = (
                head(F.relu(features)).argmax(-1).numpy() == wanted
                for head, wanted in ((self.judge.digit, digits), (self.judge.photo, self.photos[views]))
            )
            metrics |= {"drawn_digit": is_digit.mean(), "drawn_view": is_view.mean()}
            metrics["drawn_both"] = (is_digit & is_view).mean()
            metrics["frechet"] = frechet_distance(features.double().numpy(), self.reference.double().numpy())
        if "semantic" in codes:
            embeddings = embed_semantic_codes(self.tokenizer, codes["semantic"])
            metrics["drawn_semantics"] = zero_shot_accuracy(embeddings, self.classes, digits)
        return {name: float(value) for name, value in metrics.items()}

    def draw(self, model: DualTokenForCausalLM, kinds: tuple[str, ...], repeats: int) -> tuple[dict, dict]:
        """Draw every digit over every view: what [`judge_codes`] says of it, and the codes."""
        digits, views = (grid.flatten().repeat(repeats) for grid in np.mgrid[: len(NOUNS), : len(VIEWS)])
        output = model.generate(
            **self.conversations.draw_inputs(digits, views),
            generation_mode="image",
            generator=torch.Generator().manual_seed(0),
            **SAMPLING,
        )
        codes = {kind: getattr(output, f"{kind}_codes") for kind in kinds}
        return self.judge_codes(codes, digits, views), codes

    def tokenizer_metrics(self) -> dict[str, float]:
        """The same of the codes of held-out pictures: what a perfect model could reach."""
        pictures = self.conversations.pictures["heldout_views"]
        codes = dict(zip(("pixel", "semantic"), self.conversations.codes["heldout_views"]))
        return self.judge_codes(codes, pictures["digits"], pictures["views"])


class Curve(TrainerCallback):
    """Measures at every evaluation, keeps the weights of the lowest validation loss, and ends at the last plateau."""

    def __init__(self, measure):
        self.measure, self.points, self.best, self.weights, self.converged = measure, [], None, None, False
        self.lowest_that_counts, self.num_bad = float("inf"), 0

    def on_evaluate(self, args, state, control, model=None, optimizer=None, metrics=None, **kwargs):
        loss, rate = metrics["eval_loss"], optimizer.param_groups[0]["lr"]
        lowest = min((point["loss"] for point in self.points), default=float("inf"))
        self.points.append({"step": state.global_step, "loss": loss, "learning_rate": rate, **self.measure(model)})
        print(json.dumps({name: round(value, 4) for name, value in self.points[-1].items()}), flush=True)
        if loss < lowest:
            trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            self.weights = {name: value.clone() for name, value in model.state_dict().items() if name in trained}
            self.best = len(self.points) - 1
        # As the scheduler counts, which begins anew after a cut.
        if len(self.points) > 1 and rate != self.points[-2]["learning_rate"]:
            self.num_bad = 0
        if loss < self.lowest_that_counts * (1 - TRAINING["threshold"]):
            self.lowest_that_counts, self.num_bad = loss, 0
        else:
            self.num_bad += 1
        is_last_rate = rate < TRAINING["learning_rate"] * TRAINING["factor"] ** (TRAINING["cuts"] - 0.5)
        if is_last_rate and self.num_bad > TRAINING["patience"]:
            self.converged = control.should_training_stop = True


def save_drawings(path: Path, images: torch.Tensor) -> None:
    """The first drawing of every digit over every view: a column for each digit."""
    first = images.unflatten(0, (len(NOUNS), len(VIEWS), -1))[:, :, 0].clamp(-1, 1)
    grid = first.permute(1, 3, 0, 4, 2).flatten(2, 3).flatten(0, 1)
    Image.fromarray(np.rint((grid.numpy() + 1) * 127.5).astype(np.uint8)).save(path)


def train_task(
    output_dir: Path, variant: str, task: str, seed: int, conversations: Conversations, drawings: Drawings
) -> dict:
    """Train a variant for a task until its validation loss stops falling; measure it at its lowest and at the end."""
    kinds = VARIANTS[variant]
    model = build_model(conversations, kinds, seed)
    collate = DualTokenDataCollator(conversations.processor.tokenizer.pad_token_id)

    def measure(model, repeats: int = CURVE_DRAWINGS) -> dict[str, float]:
        model.eval()
        if task == "understanding":
            return {kind: answer_accuracy(model, asked, collate) for kind, asked in conversations.questions.items()}
        return drawings.draw(model, kinds, repeats)[0]

    curve = Curve(measure)
    arguments = TrainingArguments(
        output_dir=str(output_dir / "runs"),
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=TRAINING["eval_steps"],
        eval_strategy="steps",
        eval_steps=TRAINING["eval_steps"],
        max_steps=TRAINING["max_steps"],
        per_device_train_batch_size=TRAINING["batch_size"],
        per_device_eval_batch_size=256,
        learning_rate=TRAINING["learning_rate"],
        adam_beta2=0.95,
        weight_decay=TRAINING["weight_decay"],
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={name: TRAINING[name] for name in ("factor", "patience", "threshold")},
        metric_for_best_model="eval_loss",
        prediction_loss_only=True,
    )
    started = time.process_time()
    DualTokenTrainer(
        model=model,
        args=arguments,
        train_dataset=conversations.train[task],
        eval_dataset=conversations.validation[task],
        data_collator=collate,
        callbacks=[curve],
    ).train()
    seconds = time.process_time() - started
    last = measure(model, FINAL_DRAWINGS)
    # What was not trained is not among them.
    unknown = model.load_state_dict(curve.weights, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"The kept weights have names that the model lacks: {', '.join(unknown[:5])}.")
    best = measure(model, FINAL_DRAWINGS)
    if task == "generation" and "pixel" in kinds:
        codes = drawings.draw(model, kinds, 1)[1]
        save_drawings(
            output_dir / "runs" / f"codes-{variant}-seed{seed}.png", model.decode_images(pixel_codes=codes["pixel"])
        )
    return {
        "best_step": curve.points[curve.best]["step"],
        "last_step": curve.points[-1]["step"],
        "converged": curve.converged,
        "core_seconds": round(seconds, 1),
        "best": best,
        "last": last,
        "curve": curve.points,
    }


def train_variant(output_dir: Path, variant: str, seed: int, conversations, drawings: Drawings) -> dict:
    """Both models of a variant, by task, and what the codes of held-out pictures reach."""
    results = {task: train_task(output_dir, variant, task, seed, conversations, drawings) for task in TASKS}
    return {**results, "tokenizer": drawings.tokenizer_metrics()}


def settings_of(variant: str, seed: int) -> dict:
    """What a result depends on: a kept one counts only if it was made with the same."""
    return {
        "variant": variant,
        "seed": seed,
        "pictures": PICTURES,
        "language_model": LANGUAGE_MODEL,
        "depth_heads": DEPTH_HEADS,
        "training": TRAINING,
        "sampling": SAMPLING,
    }


def train_seed(
    output_dir: Path, seed: int, validation: bool = False, variants: tuple[str, ...] = tuple(VARIANTS)
) -> None:
    """Train and measure the variants of a seed that have left no results yet."""
    paths = {variant: output_dir / "runs" / f"codes-{variant}-seed{seed}.json" for variant in variants}
    missing = [
        variant
        for variant, path in paths.items()
        if not path.exists() or json.loads(path.read_text())["settings"] != settings_of(variant, seed)
    ]
    if not missing:
        return
    write_scenes(output_dir, validation)
    judge, teacher_dir = load_judge(output_dir), train_teacher(output_dir, seed)
    conversations = Conversations(output_dir, seed, validation)
    photos = list(TRAIN_PHOTOS if validation else TRAIN_PHOTOS + VALIDATION_PHOTOS)
    drawings = Drawings(conversations, judge, torch.load(teacher_dir / "classes.pt")["classes"], photos)
    (output_dir / "runs").mkdir(exist_ok=True)
    for variant in missing:
        result = {"settings": settings_of(variant, seed)}
        result |= train_variant(output_dir, variant, seed, conversations, drawings)
        # Written whole or not at all.
        partial = paths[variant].with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=2) + "\n")
        partial.rename(paths[variant])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--validation", action="store_true", help="hold out validation scenes, to choose settings")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    train_seed(arguments.output_dir, arguments.seed, arguments.validation, tuple(arguments.variants))


if __name__ == "__main__":
    main()
