"""What the tests of both trainers share: short runs on the CPU, and runs that are stopped and go on."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_quantizer_fields, tiny_tokenizer_config
from tiny_tokenizer import build_tiny_qwen2_tokenizer
from transformers import TrainerCallback

from transformers_dualtoken import DualTokenImageProcessorPil, DualTokenProcessor
from transformers_dualtoken.training import TrainingStopped


TOKENIZER_FIELDS = {
    name: getattr(tiny_tokenizer_config(), name)
    for name in (
        "pixel_layer",
        "semantic_layer",
        "shortcut_layer",
        "decoder_block_out_channels",
        "decoder_in_channels",
        "decoder_norm_num_groups",
        "decoder_latent_size",
    )
} | {f"{kind}_quantizer_config": tiny_quantizer_fields() for kind in ("pixel", "semantic")}

TINY_IMAGE_POSITIONS = 9  # of an image of the tiny tokenizer


def build_tiny_processor() -> DualTokenProcessor:
    text_tokenizer = build_tiny_qwen2_tokenizer(
        ["user assistant", "Draw it, please. What is in the picture? A blue one."]
    )
    return DualTokenProcessor(
        DualTokenImageProcessorPil(size=24), text_tokenizer, num_image_tokens=TINY_IMAGE_POSITIONS
    )


def say(role: str, *parts) -> dict:
    """A message; a string is text, a tuple of one names an image, a dict is a part."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part[0]}
        if isinstance(part, tuple)
        else part
        for part in parts
    ]
    return {"role": role, "content": content}


def quiet(**overrides) -> dict:
    """Training arguments of a short run on the CPU that leaves nothing but its checkpoints."""
    return {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "logging_steps": 1,
        **overrides,
    }


def noise(seed: int, size=(24, 24)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def state_of(module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict, after: dict) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


class FixedItems(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Stopped(Exception):
    pass


class Stop(TrainerCallback):
    """As if the process had ended after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stopped


def write_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        noise(index, size=(30, 26)).save(folder / f"{index}.png")


RUN = [
    *("--use_cpu", "1", "--disable_tqdm", "1", "--logging_steps", "1", "--learning_rate", "1e-3"),
    *("--per_device_train_batch_size", "2", "--max_steps", "6", "--save_steps", "3"),
]


def assert_same_run(one: Path, other: Path, last_step: int = 6) -> None:
    """Weights, buffers, optimizer, schedule, random states and logs are bit-identical."""
    for folder in ("", f"checkpoint-{last_step}"):
        first, second = (load_file(path / folder / "model.safetensors") for path in (one, other))
        assert not changed(first, second)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        first, second = (
            torch.load(path / f"checkpoint-{last_step}" / name, weights_only=False) for path in (one, other)
        )
        assert_equal(first, second, name)
    logs = [json.loads((path / "trainer_state.json").read_text())["log_history"] for path in (one, other)]
    assert len(logs[0]) == last_step + 1  # the steps and the summary, whose times differ
    timeless = [[{k: v for k, v in log.items() if not k.endswith("_per_second")} for log in run[:-1]] for run in logs]
    assert timeless[0] == timeless[1]


def assert_equal(first, second, where):
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_equal(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, pair in enumerate(zip(first, second)):
            assert_equal(*pair, f"{where}/{index}")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, np.ndarray):
        assert np.array_equal(first, second), where
    else:
        assert first == second, where


def check_resume(main, arguments, tmp_path):
    """Runs without a stop, and with one in the step after the checkpoint of step 3."""
    whole, stopped = tmp_path / "new" / "whole", tmp_path / "stopped"
    stopped.mkdir()
    main([*arguments, "--output_dir", str(whole)])
    with pytest.raises(Stopped):
        main([*arguments, "--output_dir", str(stopped)], callbacks=[Stop(4)])
    assert [path.name for path in stopped.glob("checkpoint-*")] == ["checkpoint-3"]
    # What a run leaves that was stopped while it wrote a checkpoint.
    (stopped / "checkpoint-5").mkdir()
    (stopped / "checkpoint-5" / "model.safetensors").write_bytes(b"")
    main([*arguments, "--output_dir", str(stopped)])
    assert_same_run(whole, stopped)
    return whole


def check_finished(main, arguments, folder):
    before = load_file(folder / "model.safetensors")
    main([*arguments, "--output_dir", str(folder)])
    assert not changed(before, load_file(folder / "model.safetensors"))
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 6


class Sigterm(TrainerCallback):
    """A signal in the middle of a step: the codebooks have moved, the weights have not."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def check_sigterm(main, arguments, whole, folder, step=4, last_step=6):
    """A run that got the signal in a step, between two checkpoints, and went on, is the same as a whole one."""
    handler = signal.getsignal(signal.SIGTERM)
    arguments = [*arguments, "--output_dir", str(folder)]
    with pytest.raises(TrainingStopped) as stopped:
        main(arguments, callbacks=[Sigterm(step)])
    assert stopped.value.code == 0 and stopped.value.checkpoint == str(folder / f"checkpoint-{step}")
    assert signal.getsignal(signal.SIGTERM) is handler
    main(arguments)
    assert_same_run(whole, folder, last_step)


def check_sigterm_at_random(command, tmp_path, last_step, ranks=1, times=3):
    """Runs of a script that get the signal at random moments, and end in the bits of one that was left alone."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    draw = random.Random(ranks)

    def start(folder):
        return subprocess.Popen(
            [*command, "--output_dir", str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(process) -> str:
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output[-3000:]
        return output

    whole = tmp_path / "whole"
    finish(start(whole))
    for number in range(times):
        folder, first_step = tmp_path / f"stopped-{number}", draw.randrange(1, last_step - 5)
        process = start(folder)
        lines = []
        while sum("'loss'" in line for line in lines) < first_step:
            lines.append(process.stdout.readline())
            assert process.poll() is None, lines
        time.sleep(draw.uniform(0, 0.05))
        trained = process.pid
        if ranks > 1:  # of a launcher's children only one
            trained = draw.choice(psutil.Process(process.pid).children()).pid
        if ranks == 1 and number == 0:  # with the workers
            os.killpg(trained, signal.SIGTERM)
        else:
            os.kill(trained, signal.SIGTERM)
        output = "".join(lines) + finish(process)
        assert "SIGTERM: stopped after step" in output, output[-3000:]
        assert "SIGTERM" not in finish(start(folder))
        if ranks == 1:
            assert_same_run(whole, folder, last_step)
        assert not changed(*(load_file(path / "model.safetensors") for path in (whole, folder)))
