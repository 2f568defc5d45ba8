"""What the unified model answers to fixed prompts, during training: on disk and in the tracker."""

import contextlib
import copy
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import Image
from torch import nn
from transformers import TrainerCallback

from ...chat_dualtoken import image_parts, normalize_chats
from ...field_rules import at_least
from ...generation_settings import GENERATION_MODES
from ...image_reading import IMAGE_SOURCES, image_name
from ...processing_dualtoken import DualTokenProcessor
from ...sharding import gathered
from ..trackers import send_to_trackers


def read_prompts(path) -> list[dict]:
    """The prompts of [`SampleGenerationCallback`] from a JSON list; relative paths of images are relative to the file."""
    path = Path(path)
    prompts = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(prompts, list):
        raise ValueError(f"{path} must hold a list of prompts, got {type(prompts).__name__}.")
    for prompt in prompts:
        for message in prompt.get("messages", ()) if isinstance(prompt, dict) else ():
            for part in message.get("content", ()) if isinstance(message, dict) else ():
                image = part.get("image") if isinstance(part, dict) else None
                if isinstance(image, str) and "://" not in image:
                    part["image"] = str(path.parent / image)
    return prompts


class SamplePrompt:
    """
    A prompt that is ready for the model: `"messages"`, a chat that ends with a message to be answered; `"mode"`, `"text"`
    (the default), `"image"` or `"interleaved"`; everything else goes to `generate` (`guidance_scale`, ...). A
    `ValueError` names the prompt by its number, from 1.
    """

    def __init__(self, prompt: dict, processor: DualTokenProcessor, number: int):
        if not isinstance(prompt, dict) or "messages" not in prompt:
            raise ValueError(f"Sample prompt {number} must be a dict with 'messages', got {prompt!r:.200}.")
        self.number, self.settings = number, dict(prompt)
        messages, self.mode = self.settings.pop("messages"), self.settings.pop("mode", "text")
        if self.mode not in GENERATION_MODES:
            modes = ", ".join(map(repr, GENERATION_MODES))
            raise ValueError(f"The 'mode' of sample prompt {number} must be one of {modes}, got {self.mode!r}.")
        try:
            ((self.messages,), _) = normalize_chats(messages)
            self.inputs = processor.apply_chat_template(
                self.messages,
                add_generation_prompt=True,
                generate_image=self.mode == "image",
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                image_sources=IMAGE_SOURCES,
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"Sample prompt {number} cannot be used: {error}") from error
        # As JSON can hold them: images by their names.
        self.messages = copy.deepcopy(self.messages)
        for part in image_parts(self.messages):
            name = image_name(part.get("image")) or "image"
            part.clear()
            part.update(type="image", image=name)

    def __str__(self) -> str:
        return f"sample prompt {self.number} ({self.mode}): {self.text()!r:.200}"

    def text(self) -> str:
        """The last message, an image as its name in square brackets."""
        content = self.messages[-1]["content"]
        if isinstance(content, str):
            return content
        return " ".join(part["text"] if part["type"] == "text" else f"[{part['image']}]" for part in content)


class SampleGenerationCallback(TrainerCallback):
    """
    Answers fixed prompts at every evaluation, or every `steps` steps.

    Writes `samples/step-000500/` into the output folder: each image as PNG (`prompt-1-image-1.png`), all of them in
    `grid.png`, prompts and answers in `samples.json` and, to be read, in `samples.md`. Trackers get the grid and the
    texts. Every prompt has the same seed at every step, and training goes on as if there had been no samples. All ranks
    generate together, as sharded weights need it, and rank 0 writes.

    Args:
        trainer ([`DualTokenTrainer`]): its model may be sharded (ZeRO-3, FSDP2) or a `PeftModel`.
        prompts (`list[dict]`): see [`SamplePrompt`], checked at once; [`read_prompts`] reads them from a file.
        processor ([`DualTokenProcessor`], *optional*): the trainer's `processing_class` by default.
    """

    def __init__(self, trainer, prompts: Sequence[dict], processor=None, steps: int | None = None, seed: int = 0):
        processor = trainer.processing_class if processor is None else processor
        if not isinstance(processor, DualTokenProcessor):
            raise ValueError(f"Samples need a DualTokenProcessor as `processor`, got {type(processor).__name__}.")
        if not prompts:
            raise ValueError("There must be at least one sample prompt.")
        at_least(1).check_given(steps=steps)
        self.trainer, self.processor, self.steps, self.seed = trainer, processor, steps, seed
        self.prompts = [SamplePrompt(prompt, processor, number) for number, prompt in enumerate(prompts, start=1)]
        self._last_step: int | None = None

    def on_step_end(self, args, state, control, **kwargs):
        if self.steps is not None and state.global_step % self.steps == 0:
            self.generate()

    def on_evaluate(self, args, state, control, **kwargs):
        # Once, also where there are several evaluation sets.
        if self.steps is None and state.global_step != self._last_step:
            self._last_step = state.global_step
            self.generate()

    def generate(self) -> None:
        """Answer the prompts now; every rank must call it. A `RuntimeError` names a prompt whose generation fails."""
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        is_gpu = model.device.type not in ("cpu", "mps", "meta")
        random_state = {"devices": [model.device] * is_gpu, "device_type": model.device.type if is_gpu else "cuda"}
        was_training, answers = model.training, []
        # Dropout and gradient checkpointing, which allows no cache, are for training only.
        model.eval()
        try:
            with trainer.throughput.paused(), torch.no_grad(), trainer.accelerator.autocast():
                for prompt in self.prompts:
                    try:
                        with torch.random.fork_rng(**random_state), _gathered(trainer.model, model):
                            # transformers' text sampling knows the global random state only.
                            torch.manual_seed(self.seed)
                            answers.append(self._answer(model, prompt))
                    except Exception as error:
                        raise RuntimeError(f"Generation failed for {prompt}") from error
        finally:
            model.train(was_training)
        if trainer.state.is_world_process_zero:
            self._write(answers)

    def _answer(self, model, prompt: SamplePrompt) -> list[list[dict]]:
        """Answers as lists of parts, like the content of a message; an image part holds a PIL image."""
        inputs = prompt.inputs.to(model.device)
        settings = {"use_cache": True, **prompt.settings}
        if prompt.mode == "text":
            # A model at the start of its training does not end its answers by itself.
            settings.setdefault("max_new_tokens", 128)
        else:
            settings["generator"] = torch.Generator().manual_seed(self.seed)
        output = model.generate(**inputs, generation_mode=prompt.mode, **settings)
        if prompt.mode == "text":
            sequences, images = output, iter(())
        else:
            sequences, images = output.sequences, iter(self.processor.post_process_images(model.decode_images(output)))
        return [self._parts(ids, images) for ids in sequences[:, inputs["input_ids"].shape[1] :].tolist()]

    def _parts(self, ids: list[int], images: Iterator[Image.Image]) -> list[dict]:
        """The parts of an answer; each run of placeholders is the next of `images`."""
        parts, image_id, borders = [], self.processor.image_token_id, self.processor.ids_of_image
        for is_image, run in groupby(ids, key=lambda token: token == image_id):
            if is_image:
                parts.append({"type": "image", "image": next(images)})
                continue
            text = self.processor.decode([token for token in run if token not in borders], skip_special_tokens=True)
            if text:
                parts.append({"type": "text", "text": text})
        return parts

    def _write(self, answers: list[list[list[dict]]]) -> None:
        step = self.trainer.state.global_step
        folder = Path(self.trainer.args.output_dir, "samples", f"step-{step:06d}")
        folder.mkdir(parents=True, exist_ok=True)
        samples, pictures, lines = [], [], [f"# Samples of step {step}", ""]
        for prompt, of_prompt in zip(self.prompts, answers):
            images = [part for answer in of_prompt for part in answer if part["type"] == "image"]
            for count, part in enumerate(images, start=1):
                pictures.append(part["image"])
                part["image"] = f"prompt-{prompt.number}-image-{count}.png"
                pictures[-1].save(folder / part["image"])
            told = [{"role": "assistant", "content": answer} for answer in of_prompt]
            samples.append({"messages": prompt.messages, "mode": prompt.mode, **prompt.settings, "answers": told})
            lines += [f"## Prompt {prompt.number} ({prompt.mode})", "", prompt.text(), ""]
            for number, answer in enumerate(of_prompt, start=1):
                lines += [f"### Answer {number}", ""]
                for part in answer:
                    lines += [part["text"] if part["type"] == "text" else f"![{part['image']}]({part['image']})", ""]
        text = json.dumps(samples, ensure_ascii=False, indent=2, default=str)
        (folder / "samples.json").write_text(text + "\n", encoding="utf-8")
        markdown = "\n".join(lines)
        (folder / "samples.md").write_text(markdown, encoding="utf-8")
        callbacks = self.trainer.callback_handler.callbacks
        send_to_trackers(callbacks, "samples_text", markdown, step)
        if pictures:
            grid = _image_grid(pictures)
            grid.save(folder / "grid.png")
            send_to_trackers(callbacks, "samples", grid, step)


@contextlib.contextmanager
def _gathered(wrapped: nn.Module, model: nn.Module):
    """
    Engines gather a module's weights around its forward. Generation also enters by other ways: the depth heads draw
    depth by depth, and the model's own layers are called without its forward; within this context those are whole.
    """
    units = []
    if hasattr(wrapped, "unshard"):  # FSDP2
        units = [wrapped, *(module for module in model.depth_heads.modules() if hasattr(module, "unshard"))]
    with gathered(model.depth_heads.parameters()):
        for unit in units:
            unit.unshard()
        try:
            yield
        finally:
            for unit in units:
                unit.reshard()


def _image_grid(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of one size in rows of four; what is left of the last row is white."""
    columns = min(4, len(pictures))
    blanks = [Image.new("RGB", pictures[0].size, "white")] * (-len(pictures) % columns)
    return make_image_grid(pictures + blanks, -(-len(pictures) // columns), columns)
