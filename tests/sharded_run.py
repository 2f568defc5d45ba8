"""
What one rank does in `test_sharded_training.py`: `torchrun ... sharded_run.py ENGINE MODELS FOLDER`.

`ENGINE` is the name of a file in `examples/deepspeed/`, `fsdp2` or `plan`; `MODELS` holds what `save_models` wrote. The test
imports this file too, and trains the same in one process.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from tiny_models import lively_unified_model, tiny_unified_config
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from training_helpers import FixedItems, quiet
from transformers import Qwen2ForCausalLM, TrainingArguments, set_seed

from transformers_dualtoken import DualTokenForCausalLM
from transformers_dualtoken.training import DualTokenTrainer
from transformers_dualtoken.training.unified.adapters import add_lora


EXAMPLES = Path(__file__).parents[1] / "examples"
RANKS, ACCUMULATION, ROWS = 2, 2, 2
STEPS, SAVED_AT, FEW_STEPS = 20, 10, 3
# Of the four micro-batches of a step, ranks taking turns: which hold images, and how. In most steps one rank has none
# where the other has; once each is given them in another way, once all visual targets are one rank's.
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
            # Other lengths on other ranks, so that their counts of targets differ.
            prompt, answer = words(2 + index), words(3 + (step + index) % 4)
            batch, parts, learned = {}, [prompt, answer], [False, True]
            if kind != "text":
                image = torch.full((ROWS, config.num_positions + 2), config.image_token_id)
                image[:, 0], image[:, -1] = config.image_start_token_id, config.image_end_token_id
                parts, learned = [prompt, image, answer], [False, kind != "ask", True]
                if kind.endswith("codes"):
                    shape = (ROWS, grid, grid, config.num_depths)
                    for name in ("pixel_codes", "semantic_codes"):
                        batch[name] = torch.randint(num_codes, shape, generator=generator)
                else:
                    shape = (ROWS, 3, vision.image_size, vision.image_size)
                    batch["pixel_values"] = torch.rand(shape, generator=generator) * 2 - 1
            batch["input_ids"] = torch.cat(parts, dim=1)
            labels = [part if is_learned else torch.full_like(part, -100) for part, is_learned in zip(parts, learned)]
            batch["labels"] = torch.cat(labels, dim=1)
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            made.append(batch)
    return made


@torch.no_grad()
def save_models(folder: Path) -> None:
    """`unified`; `tied`, with tied embeddings; and the parts of a new model."""
    for name, overrides in (("unified", {}), ("tied", {"tie_word_embeddings": True})):
        model = lively_unified_model(**overrides)
        for parameter_name, parameter in model.named_parameters():
            if "vision_tokenizer" not in parameter_name and parameter.ndim > 1:
                # Livelier, and rounding alone would part two runs in 20 steps.
                parameter.mul_(0.4)
        model.save_pretrained(folder / name)
    model.vision_tokenizer.save_pretrained(folder / "tokenizer")
    language_model = Qwen2ForCausalLM(model.config.text_config)
    language_model.save_pretrained(folder / "language")
    language_model.model.save_pretrained(folder / "language_base")


def arguments(folder: Path, **overrides) -> TrainingArguments:
    fields = {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
    }
    return TrainingArguments(output_dir=str(folder), **quiet(**{**fields, **overrides}))


def make_trainer(model: DualTokenForCausalLM, args: TrainingArguments) -> DualTokenTrainer:
    """An item of the data set is a whole micro-batch, so that the ranks' batches are those of one process."""
    items = batches()
    return DualTokenTrainer(
        model,
        args,
        train_dataset=FixedItems(items),
        eval_dataset=FixedItems(items[: 2 * len(PLAN[0])]),
        data_collator=lambda batch: batch[0].copy(),
    )


def load(models: Path, start: str):
    """`unified` or `tied`, or `lora`: an adapter on `unified`, with trained copies of the projector and the heads."""
    model = DualTokenForCausalLM.from_pretrained(models / ("unified" if start == "lora" else start))
    if start != "lora":
        return model
    torch.manual_seed(0)
    return add_lora(model, r=4, dropout=0.0, train_in_full=("projector", "heads"))


def losses(trainer: DualTokenTrainer) -> dict[str, list[float]]:
    """By step: the loss, its three parts, and the norm of the gradient."""
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {
        name: [float(log[name]) for log in logs]
        for name in ("loss", "text_loss", "pixel_loss", "semantic_loss", "grad_norm")
    }


def generate(model: DualTokenForCausalLM) -> dict[str, list]:
    """A text, and the pixel codes of a drawing."""
    model.eval()
    input_ids = torch.tensor([[1, 5, 9, 20]])
    text = model.generate(input_ids, max_new_tokens=4, do_sample=False)
    torch.manual_seed(1)
    image = model.generate(input_ids, generation_mode="image", guidance_scale=2.0)
    return {"text": text.tolist(), "pixel_codes": image.pixel_codes.tolist()}


def deepspeed_config(name: str) -> dict:
    config = json.loads((EXAMPLES / "deepspeed" / f"{name}.json").read_text())
    if config["zero_optimization"]["stage"] == 3:
        # At these sizes nothing would be partitioned.
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


def use_fsdp_config() -> None:
    """What `accelerate launch --config_file fsdp2.yaml` puts into the environment, without mixed precision."""
    config = yaml.safe_load((EXAMPLES / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    config["fsdp_transformer_cls_to_wrap"] = config.pop("fsdp_transformer_layer_cls_to_wrap")
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    os.environ.update({name.upper(): str(value) for name, value in config.items()})


def with_fsdp(trainer: DualTokenTrainer) -> DualTokenTrainer:
    """Where there is no GPU accelerate falls back to DDP, unless it is told otherwise: its FSDP2 runs on a CPU too."""
    plugin = FullyShardedDataParallelPlugin()
    if trainer.args.bf16:
        plugin.set_mixed_precision("bf16")
    state = trainer.accelerator.state
    PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = plugin
    trainer.is_fsdp_enabled = True
    return trainer


def check_loaded(model, folder: Path, partitioned: bool) -> None:
    """Under ZeRO-3 the parameters of a loaded model are parts and its buffers whole; together they are the file's."""
    import deepspeed

    stored = load_file(folder / "model.safetensors")
    parameters = list(model.parameters())
    assert all(hasattr(parameter, "ds_id") == partitioned for parameter in parameters)
    assert not partitioned or all(parameter.numel() == 0 for parameter in parameters)
    with deepspeed.zero.GatheredParameters(parameters, enabled=partitioned):
        state = model.state_dict()
        assert stored.keys() <= state.keys()  # a tied weight is stored once
        for name, value in stored.items():
            assert torch.equal(state[name], value.to(state[name].dtype)), name


def check_sharded(model) -> None:
    """Every parameter is a DTensor, about half of it here; layers are gathered one at a time."""
    parameters = list(model.parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters)
    here, whole = (sum(p.numel() for p in part) for part in ([p.to_local() for p in parameters], parameters))
    assert here < 0.6 * whole
    for layer in (model.model.language_model.layers[0], model.depth_heads.layers[0]):
        assert isinstance(layer, FSDPModule)


def check_codebooks(model, folder: Path) -> None:
    """As they were, in float32."""
    stored = load_file(folder / "model.safetensors")
    codebooks = {name: buffer for name, buffer in model.vision_tokenizer.named_buffers() if "codebook" in name}
    assert len(codebooks) == 6
    for name, buffer in codebooks.items():
        assert buffer.dtype == torch.float32 and torch.equal(buffer, stored[name]), name


def run_plan(models: Path, folder: Path) -> None:
    """
    Weights split while they load, by transformers' own plan (`from_pretrained(..., distributed_config=)`).

    The tied model alone: there the plan must bring one weight together for two modules.
    """
    from transformers.distributed import DistributedConfig

    args = arguments(folder / "tied", ddp_backend="gloo", max_steps=FEW_STEPS)
    plan = DistributedConfig(fsdp_size=RANKS)
    trainer = make_trainer(DualTokenForCausalLM.from_pretrained(models / "tied", distributed_config=plan), args)
    trainer.train()
    model = trainer.model
    embeddings, head = model.get_input_embeddings().weight, model.lm_head.weight
    assert embeddings is head and isinstance(head, DTensor)
    weights = {name: value.full_tensor() for name, value in model.named_parameters() if isinstance(value, DTensor)}
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps({"tied": losses(trainer)}))
        torch.save(weights, folder / "weights.pt")


def run(engine: str, models: Path, folder: Path) -> None:
    if engine == "plan":
        return run_plan(models, folder)
    fsdp, partitioned = engine == "fsdp2", engine.startswith("zero3")
    if fsdp:
        use_fsdp_config()
        engine_arguments = {"ddp_backend": "gloo"}
    else:
        import deepspeed

        # Saves a minute of compiling: gloo sums as well as DeepSpeed's own shared memory.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo")
        engine_arguments = {"ddp_backend": "gloo", "deepspeed": deepspeed_config(engine)}

    def train(name, make_model, resume_from_checkpoint=None, **overrides):
        # The arguments first: they tell `from_pretrained` of ZeRO-3.
        args = arguments(folder / name, **engine_arguments, **overrides)
        trainer = make_trainer(make_model(), args)
        trainer = with_fsdp(trainer) if fsdp else trainer
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        results[name] = losses(trainer)
        return trainer

    def unified():
        model = load(models, "unified")
        if not fsdp:
            check_loaded(model, models / "unified", partitioned)
        return model

    def new():
        names = ("image_start_token_id", "image_token_id", "image_end_token_id", "depth_head_config")
        config = tiny_unified_config()
        model = DualTokenForCausalLM.from_pretrained_parts(
            models / "tokenizer",
            models / "language",
            **{name: getattr(config, name) for name in names},
        )
        if not fsdp:
            check_loaded(model.vision_tokenizer, models / "tokenizer", partitioned)
            check_loaded(model.model.language_model, models / "language_base", partitioned)
        return model

    results = {}
    trainer = train("whole", unified, save_strategy="steps", save_steps=SAVED_AT)
    if fsdp:
        check_sharded(trainer.model)
    results["eval_loss"] = trainer.evaluate()["eval_loss"]
    results["generated"] = generate(trainer.model)
    trainer.save_model(folder / "whole")

    checkpoint = folder / "whole" / f"checkpoint-{SAVED_AT}"
    train("resumed", unified, str(checkpoint)).save_model(folder / "resumed")
    for name in ("tied", "lora"):
        overrides = {"max_steps": FEW_STEPS, "gradient_checkpointing": name == "tied"}
        train(name, partial(load, models, name), **overrides).save_model(folder / name)
    trainer = train("half", new, max_steps=FEW_STEPS, bf16=True)
    check_codebooks(trainer.model, models / "tokenizer")
    trainer.save_model(folder / "half")
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    set_seed(0)
    run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    # A rank that ends before the other has read its last message takes it down.
    dist.barrier()
    dist.destroy_process_group()
