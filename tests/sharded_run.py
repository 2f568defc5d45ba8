"""
What one rank does in `test_sharded_training.py`: `torchrun ... sharded_run.py ENGINE MODEL FOLDER`.

Also imported by the test, which trains the same in one process.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tiny_models import tiny_unified_config
from training_helpers import FixedItems, quiet
from transformers import TrainingArguments, set_seed

from transformers_dualtoken import DualTokenForCausalLM
from transformers_dualtoken.training import DualTokenTrainer


STEPS, SAVED_AT = 20, 10
RANKS, ACCUMULATION, ROWS = 2, 2, 2
EXAMPLES = Path(__file__).parents[1] / "examples"
# Of the four micro-batches of a step, ranks taking turns: which hold images, and how. In half of the steps one rank
# has none where the other has; in one of them the ranks are given them in different ways, in one all targets are
# one rank's.
PLAN = (
    ("draw", "text", "text", "ask"),
    ("text", "text", "text", "text"),
    ("draw", "ask", "draw codes", "draw"),
    ("text", "draw", "text", "text"),
    ("ask", "draw codes", "draw codes", "text"),
)


def batches() -> list[dict[str, torch.Tensor]]:
    """The micro-batches of the whole run, in the order in which one process takes them."""
    config, generator = tiny_unified_config(), torch.Generator().manual_seed(0)
    vision = config.vision_tokenizer_config
    num_codes, grid = vision.pixel_quantizer_config.codebook_size, vision.grid_size

    def words(count):
        return torch.randint(3, 50, (ROWS, count), generator=generator)

    made = []
    for step in range(STEPS):
        for index, kind in enumerate(PLAN[step % len(PLAN)]):
            # Other lengths on other ranks: the counts of the targets differ too.
            prompt, answer = words(2 + index), words(3 + (step + index) % 4)
            batch, parts, targets = {}, [prompt, answer], [False, True]
            if kind != "text":
                image = torch.full((ROWS, config.num_positions + 2), config.image_token_id)
                image[:, 0], image[:, -1] = config.image_start_token_id, config.image_end_token_id
                parts, targets = [prompt, image, answer], [False, kind != "ask", True]
                if kind.endswith("codes"):
                    for name in ("pixel_codes", "semantic_codes"):
                        shape = (ROWS, grid, grid, config.num_depths)
                        batch[name] = torch.randint(num_codes, shape, generator=generator)
                else:
                    shape = (ROWS, 3, vision.image_size, vision.image_size)
                    batch["pixel_values"] = torch.rand(shape, generator=generator) * 2 - 1
            batch["input_ids"] = torch.cat(parts, dim=1)
            learned = [part if target else torch.full_like(part, -100) for part, target in zip(parts, targets)]
            batch["labels"] = torch.cat(learned, dim=1)
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            made.append(batch)
    return made


def arguments(folder: Path, **overrides) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        **quiet(
            per_device_train_batch_size=1,
            gradient_accumulation_steps=ACCUMULATION,
            max_steps=STEPS,
            learning_rate=1e-3,
            lr_scheduler_type="linear",
            train_sampling_strategy="sequential",
            max_grad_norm=1.0,
            **overrides,
        ),
    )


def trainer(model, args: TrainingArguments) -> DualTokenTrainer:
    """An item of the data set is a whole micro-batch, so that the ranks' batches are those of one process."""
    items = FixedItems(batches())
    return DualTokenTrainer(model, args, train_dataset=items, eval_dataset=items, data_collator=lambda batch: batch[0])


def losses(runner: DualTokenTrainer) -> dict[str, list[float]]:
    """By step: the loss, its three parts, and the gradient's norm."""
    names = ("loss", "text_loss", "pixel_loss", "semantic_loss", "grad_norm")
    logs = [log for log in runner.state.log_history if "loss" in log]
    return {name: [float(log[name]) for log in logs] for name in names}


def generate(model) -> dict[str, list]:
    """A text, and an image's pixel codes, of a model in training; every rank takes part."""
    model.eval()
    input_ids = torch.tensor([[1, 5, 9, 20]])
    text = model.generate(input_ids, max_new_tokens=4, do_sample=False)
    torch.manual_seed(1)
    image = model.generate(input_ids, generation_mode="image", guidance_scale=2.0)
    return {"text": text.tolist(), "pixel_codes": image.pixel_codes.tolist()}


def deepspeed_config(name: str) -> dict:
    config = json.loads((EXAMPLES / "deepspeed" / f"{name}.json").read_text())
    if "stage3_param_persistence_threshold" in config["zero_optimization"]:
        # At these sizes nothing would be partitioned.
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


def run_deepspeed(name: str, models: Path, folder: Path) -> None:
    import deepspeed

    deepspeed.init_distributed("gloo")
    common = {"deepspeed": deepspeed_config(name), "ddp_backend": "gloo"}
    saving = {"save_strategy": "steps", "save_steps": SAVED_AT}

    args = arguments(folder / "whole", **saving, **common)
    model = DualTokenForCausalLM.from_pretrained(models / "unified")
    check_loaded(model, models / "unified", partitioned=name.startswith("zero3"))
    runner = trainer(model, args)
    runner.train()
    result = {"whole": losses(runner), "eval_loss": runner.evaluate()["eval_loss"], "generated": generate(runner.model)}
    runner.save_model(folder / "final")

    args = arguments(folder / "resumed", **common)
    runner = trainer(DualTokenForCausalLM.from_pretrained(models / "unified"), args)
    runner.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{SAVED_AT}"))
    result["resumed"] = losses(runner)
    runner.save_model(folder / "resumed_final")

    # In bfloat16, tied embeddings, a model assembled from its parts.
    args = arguments(folder / "half", bf16=True, **common)
    args.max_steps = 3
    model = DualTokenForCausalLM.from_pretrained_parts(
        models / "tokenizer", models / "language", **json.loads((models / "overrides.json").read_text())
    )
    check_loaded(model.vision_tokenizer, models / "tokenizer", partitioned=name.startswith("zero3"))
    check_loaded(model.model.language_model, models / "language" / "base", partitioned=name.startswith("zero3"))
    runner = trainer(model, args)
    runner.train()
    result["half"] = losses(runner)
    check_codebooks(model, models / "tokenizer")
    runner.save_model(folder / "half_final")
    if dist.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps(result))


def check_loaded(model, folder: Path, partitioned: bool) -> None:
    """Under ZeRO-3 the parameters of a loaded model are parts, its buffers whole; together they are the file's."""
    import deepspeed

    stored = load_file(folder / "model.safetensors")
    parameters = dict(model.named_parameters())
    assert all(hasattr(parameter, "ds_id") == partitioned for parameter in parameters.values())
    if partitioned:
        assert all(parameter.numel() == 0 for parameter in parameters.values())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=partitioned):
        for name, value in model.state_dict().items():
            if name in stored:  # a tied weight is stored once
                assert torch.equal(value.float(), stored[name].to(value.dtype).float()), name


def check_codebooks(model, tokenizer_folder: Path) -> None:
    """Exact and in float32 after training in bfloat16."""
    stored = load_file(tokenizer_folder / "model.safetensors")
    found = 0
    for name, buffer in model.vision_tokenizer.named_buffers():
        if "codebook" in name:
            assert buffer.dtype == torch.float32 and torch.equal(buffer, stored[name]), name
            found += 1
    assert found == 6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def run_fsdp(models: Path, folder: Path) -> None:
    use_fsdp_config()
    saving = {"save_strategy": "steps", "save_steps": SAVED_AT}
    args = arguments(folder / "whole", ddp_backend="gloo", **saving)
    runner = on_cpu(trainer(DualTokenForCausalLM.from_pretrained(models / "unified"), args))
    runner.train()
    model = runner.model
    parameters = dict(model.named_parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters.values())
    whole = sum(parameter.numel() for parameter in parameters.values())
    assert sum(parameter.to_local().numel() for parameter in parameters.values()) < 0.6 * whole
    assert isinstance(model.model.language_model.layers[0], FSDPModule)
    result = {"whole": losses(runner), "eval_loss": runner.evaluate()["eval_loss"], "generated": generate(runner.model)}
    runner.save_model(folder / "final")

    args = arguments(folder / "resumed", ddp_backend="gloo")
    runner = on_cpu(trainer(DualTokenForCausalLM.from_pretrained(models / "unified"), args))
    runner.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{SAVED_AT}"))
    result["resumed"] = losses(runner)
    runner.save_model(folder / "resumed_final")
    if dist.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps(result))


def use_fsdp_config() -> None:
    """The environment that `accelerate launch --config_file fsdp2.yaml` makes, without mixed precision."""
    config = yaml.safe_load((EXAMPLES / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    config["fsdp_transformer_cls_to_wrap"] = config.pop("fsdp_transformer_layer_cls_to_wrap")
    os.environ.update(
        {name.upper(): str(value).lower() if isinstance(value, bool) else str(value) for name, value in config.items()}
    )
    os.environ["ACCELERATE_USE_FSDP"] = "true"


def on_cpu(runner: DualTokenTrainer) -> DualTokenTrainer:
    """accelerate leaves FSDP out where there is no GPU, and goes on with DDP; its own code for FSDP2 runs on a CPU."""
    PartialState().distributed_type = runner.accelerator.state.distributed_type = DistributedType.FSDP
    runner.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    runner.is_fsdp_enabled = True
    return runner


def main(engine: str, model_folder: str, folder: str) -> None:
    torch.set_num_threads(1)
    set_seed(0)
    if engine == "fsdp2":
        run_fsdp(Path(model_folder), Path(folder))
    else:
        run_deepspeed(engine, Path(model_folder), Path(folder))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
