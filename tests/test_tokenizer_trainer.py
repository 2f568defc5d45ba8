"""The trainer of the vision tokenizer: accumulation, logs, evaluation, averaged weights, pictures, epochs."""

import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizer_training import PLAIN, adversarial_trainer, pixel_items, tokenizer_trainer
from training_helpers import TOKENIZER_FIELDS, FixedItems, changed, quiet, state_of
from transformers import SiglipModel, TrainerCallback, TrainingArguments

from transformers_dualtoken import DualTokenVisionTokenizer
from transformers_dualtoken.evaluation.pictures import reconstruction_grid
from transformers_dualtoken.training import (
    DualTokenVisionTokenizerRecipe,
    DualTokenVisionTokenizerTrainer,
    collate_images,
)


# Accumulation, logs, evaluation, averaged weights, pictures


def test_accumulation_does_not_change_the_step(siglip_folder, tmp_path, monkeypatch):
    """With codebooks at rest and one adaptive weight, which else belongs to a micro-batch, 2 x 2 images are 1 x 4."""
    monkeypatch.setattr("transformers_dualtoken.training.vision_tokenizer.adversary.ADAPTIVE_WEIGHT_RANGE", (0.5, 0.5))

    def run(batch_size, accumulation):
        config = {
            f"{kind}_quantizer_config": {**TOKENIZER_FIELDS[f"{kind}_quantizer_config"], "restart_unused_codes": False}
            for kind in ("pixel", "semantic")
        }
        torch.manual_seed(3)
        trainer = adversarial_trainer(
            siglip_folder,
            tmp_path,
            config=config,
            dataset=pixel_items(),
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0,
            lr_scheduler_type="constant",
            recipe={"discriminator_learning_rate": 1e-3},
        )
        for kind in ("pixel", "semantic"):
            trainer.model.quantizer(kind).codebook.embeddings.normal_(generator=torch.Generator().manual_seed(1))
            trainer.model.quantizer(kind).frozen = True
        trainer.train()
        return trainer

    one, two = run(4, 1), run(2, 2)
    logs = [trainer.state.log_history[0] for trainer in (one, two)]
    for name in ("loss", "discriminator", "reconstruction_mse", "semantic_mse"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-5)
    for (name, p), q in zip(one.model.named_parameters(), two.model.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    # Adam's first step is about the sign of a gradient alone, which rounding turns where it is next to nothing.
    states = [trainer.adversary.discriminator.state_dict() for trainer in (one, two)]
    for name in states[0]:
        if name.endswith("weight"):
            assert (states[0][name] - states[1][name]).abs().gt(1e-5).float().mean() < 0.01, name


@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 1), (1, 2)])
def test_logged_terms_add_up(siglip_folder, tmp_path, batch_size, accumulation):
    trainer = tokenizer_trainer(
        siglip_folder,
        tmp_path,
        dataset=pixel_items(),
        logging_steps=2,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
    )
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    total = sum(weight * log[name] for name, weight in trainer.loss_weights.items() if name in log)
    assert log["loss"] == pytest.approx(total, rel=1e-4)


def test_logged_codebooks_and_skipped_images(siglip_folder, tmp_path):
    items = pixel_items()
    items.items[1]["num_skipped"] = 3
    trainer = tokenizer_trainer(siglip_folder, tmp_path, dataset=items, logging_steps=2, max_steps=4)
    seen = []
    forward = trainer.model.encode

    def encode(*args, **kwargs):
        output = forward(*args, **kwargs)
        seen.append(output.semantic_codes)
        return output

    trainer.model.encode = encode
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["images_skipped"] for log in logs] == [3, 6]
    for window, log in enumerate(logs):
        codes = torch.cat([codes.flatten() for codes in seen[2 * window : 2 * window + 2]])
        share = codes.bincount(minlength=24) / len(codes)
        assert log["semantic_codebook_usage"] == pytest.approx(float((share > 0).float().mean()))
        perplexity = math.exp(-sum(p * math.log(p) for p in share.tolist() if p))
        assert log["semantic_codebook_perplexity"] == pytest.approx(perplexity, rel=1e-4)
        assert log["images_per_second"] > 0


def test_evaluation_reports_every_term(siglip_folder, tmp_path):
    trainer = adversarial_trainer(siglip_folder, tmp_path, dataset=pixel_items(), per_device_eval_batch_size=2)
    before = state_of(trainer.model)
    metrics = trainer.evaluate(pixel_items(3))
    assert not changed(before, state_of(trainer.model))
    trainer.model.eval()
    with torch.no_grad():
        batches = [
            trainer.compute_loss(trainer.model.eval(), collate_images(pixel_items(3).items[part])).item()
            for part in (slice(0, 2), slice(2, 3))
        ]
    names = [name for name in trainer.loss_weights if f"eval_{name}" in metrics]
    assert names == [name for name, weight in trainer.loss_weights.items()
                     if weight and name not in ("generator", "discriminator")]  # fmt: skip
    assert metrics["eval_loss"] == pytest.approx((2 * batches[0] + batches[1]) / 3, rel=1e-4)
    total = sum(trainer.loss_weights[name] * metrics[f"eval_{name}"] for name in names)
    assert total == pytest.approx((2 * batches[0] + batches[1]) / 3, rel=1e-4)


def test_averaged_weights_are_evaluated_and_saved(siglip_folder, tmp_path):
    trainer = tokenizer_trainer(
        siglip_folder,
        tmp_path,
        dataset=pixel_items(),
        recipe={"weight_average_decay": 0.5},
        max_steps=3,
        save_strategy="steps",
        save_steps=3,
    )
    seen = []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(model.decoder.conv_out.weight.detach().clone())

    trainer.add_callback(Record())
    trainer.train()
    trainer.save_model(tmp_path / "final")
    average = seen[0]
    for weight in seen[1:]:
        average = 0.5 * average + 0.5 * weight
    name = "decoder.conv_out.weight"
    torch.testing.assert_close(load_file(tmp_path / "final" / "model.safetensors")[name], average)
    assert torch.equal(load_file(tmp_path / "checkpoint-3" / "model.safetensors")[name], seen[-1])
    assert torch.equal(trainer.model.decoder.conv_out.weight, seen[-1])


def test_the_best_model_is_evaluated_and_saved(siglip_folder, tmp_path):
    class WorseLater(DualTokenVisionTokenizerTrainer):
        """The first evaluation counts as the best."""

        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            metrics["eval_made_up"] = float(self.state.global_step)
            return metrics

    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "made_up", "greater_is_better": False}
    trainer = WorseLater(
        DualTokenVisionTokenizer.from_siglip_pretrained(siglip_folder, **TOKENIZER_FIELDS),
        TrainingArguments(str(tmp_path), per_device_train_batch_size=2, **quiet(**settings, **best)),
        teacher=SiglipModel.from_pretrained(siglip_folder).vision_model,
        recipe=DualTokenVisionTokenizerRecipe(loss_weights=PLAIN, weight_average_decay=0.5),
        train_dataset=pixel_items(),
        eval_dataset=pixel_items(3),
        data_collator=collate_images,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    logged = next(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(logged, rel=1e-6)
    average = torch.load(tmp_path / "checkpoint-2" / "weight_average.pt", weights_only=True)
    trainer.save_model(tmp_path / "best")
    weight = load_file(tmp_path / "best" / "model.safetensors")["decoder.conv_out.weight"]
    assert any(torch.equal(weight, value) for value in average.values())


def test_evaluation_leaves_the_training_alone(siglip_folder, tmp_path):
    """With evaluations in between, and with the averaged weights lent to the model for them."""
    states = []
    for name, settings in (("plain", {}), ("evaluated", {"eval_strategy": "steps", "eval_steps": 1})):
        torch.manual_seed(0)
        trainer = tokenizer_trainer(
            siglip_folder, tmp_path / name, dataset=pixel_items(), recipe={"weight_average_decay": 0.5}, max_steps=4
        )
        for key, value in settings.items():
            setattr(trainer.args, key, value)
        trainer.state.compute_steps(trainer.args, 4)
        trainer.eval_dataset = pixel_items(3)
        trainer.train()
        states.append(state_of(trainer.model))
    assert not changed(*states)
    assert sum("eval_loss" in log for log in trainer.state.log_history) == 4


def test_pictures_of_reconstructions(siglip_folder, tmp_path):
    trainer = tokenizer_trainer(
        siglip_folder, tmp_path, dataset=pixel_items(), recipe={"grid_steps": 2, "grid_images": 3}, max_steps=4
    )
    trainer.train()
    pictures = sorted((tmp_path / "grids").glob("*.png"))
    assert [path.name for path in pictures] == ["step-00000002.png", "step-00000004.png"]
    images = torch.stack([item["pixel_values"] for item in pixel_items().items[:3]])
    with torch.no_grad():
        expected = reconstruction_grid(images, trainer.model.eval()(images).reconstruction)
    with Image.open(pictures[1]) as picture:
        assert picture.size == expected.size and picture.tobytes() == expected.tobytes()


def test_pictures_reach_the_tracker(siglip_folder, tmp_path):
    sent = []

    class TensorBoardCallback(TrainerCallback):
        """As transformers' own, which is recognised by its name; tensorboard itself is not installed for the tests."""

        class tb_writer:
            @staticmethod
            def add_image(name, array, step, dataformats):
                sent.append((name, array.shape, step, dataformats))

    trainer = tokenizer_trainer(siglip_folder, tmp_path, dataset=pixel_items(), recipe={"grid_steps": 1}, max_steps=2)
    trainer.add_callback(TensorBoardCallback())
    trainer.train()
    with Image.open(tmp_path / "grids" / "step-00000001.png") as picture:
        shape = (picture.height, picture.width, 3)
    assert sent == [("reconstructions", shape, 1, "HWC"), ("reconstructions", shape, 2, "HWC")]


def test_bf16_and_checkpointing_train(siglip_folder, tmp_path):
    """On a CPU too: autocast with float32 weights; the loss is near the float32 one."""
    losses = {}
    for name, settings in (("plain", {}), ("bf16", {"bf16": True, "gradient_checkpointing": True})):
        torch.manual_seed(0)
        trainer = adversarial_trainer(siglip_folder, tmp_path, dataset=pixel_items(), max_steps=2, **settings)
        trainer.train()
        losses[name] = trainer.state.log_history[0]
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    for term in ("semantic_mse", "reconstruction_mse", "discriminator", "pixel_commitment"):
        assert losses["bf16"][term] == pytest.approx(losses["plain"][term], rel=0.05)
        assert losses["bf16"][term] != losses["plain"][term]


@pytest.mark.slow
def test_compiled_training_is_the_same(siglip_folder, tmp_path):
    """Without restarts: a compiled graph draws other random numbers than torch does outside of one."""
    config = {
        f"{kind}_quantizer_config": {**TOKENIZER_FIELDS[f"{kind}_quantizer_config"], "restart_unused_codes": False}
        for kind in ("pixel", "semantic")
    }
    logs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        trainer = adversarial_trainer(
            siglip_folder, tmp_path, config=config, dataset=pixel_items(), max_steps=2, torch_compile=compiled
        )
        trainer.train()
        logs.append(trainer.state.log_history[:2])
    # Rounding turns the sign of next to nothing, which Adam makes a whole step of: the second step is near only.
    for plain, compiled, tolerance in zip(*logs, (1e-4, 2e-2)):
        for term in ("loss", "reconstruction_mse", "semantic_mse", "generator", "adaptive_weight", "discriminator"):
            assert compiled[term] == pytest.approx(plain[term], rel=tolerance)


# The epoch reaches the data set, also within an epoch that a resumed run takes up


class EpochRecorder(FixedItems):
    epoch = None

    def __init__(self, items):
        super().__init__(items)
        self.seen = []

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        self.seen.append((self.epoch, index))
        return super().__getitem__(index)


def test_epoch_reaches_the_dataset(siglip_folder, tmp_path):
    def run(resume=None, **overrides):
        dataset = EpochRecorder(pixel_items(6).items)
        arguments = {"max_steps": 9, "save_strategy": "steps", "save_steps": 4, **overrides}
        trainer = tokenizer_trainer(siglip_folder, tmp_path, dataset=dataset, **arguments)
        trainer.train(resume_from_checkpoint=resume)
        return dataset.seen

    whole = run()
    assert [epoch for epoch, _ in whole] == [0] * 6 + [1] * 6 + [2] * 6
    resumed = run(resume=str(tmp_path / "checkpoint-4"))
    assert resumed == whole[8:]


def test_epoch_reaches_the_dataset_when_ranks_share_it(siglip_folder, tmp_path):
    """On several ranks accelerate wraps the batch sampler, and leaves the data set alone."""
    from accelerate.data_loader import prepare_data_loader

    dataset = EpochRecorder(pixel_items(8).items)
    trainer = tokenizer_trainer(siglip_folder, tmp_path, dataset=dataset, num_train_epochs=3, max_steps=-1)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, shuffle=True, collate_fn=collate_images)
    trainer.get_train_dataloader = lambda: prepare_data_loader(
        loader, num_processes=2, process_index=1, rng_types=[], use_seedable_sampler=True
    )
    trainer.train()
    assert [epoch for epoch, _ in dataset.seen] == [0] * 4 + [1] * 4 + [2] * 4
