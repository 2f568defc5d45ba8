"""The discriminator that is trained beside the tokenizer: its shape, losses, schedule and restarts."""

import math

import pytest
import torch
from tokenizer_training import adversarial_trainer, pixel_items
from training_helpers import changed, state_of
from transformers import TrainerCallback

from transformers_dualtoken.training import PatchDiscriminator
from transformers_dualtoken.training.vision_tokenizer.discriminator import discriminator_loss


def test_discriminator_has_the_recorded_shape():
    """Code: 64, 128, 256, 512 channels, a logit for every 8 x 8 pixels."""
    model = PatchDiscriminator()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name.endswith("weight") and p.ndim == 4}
    assert shapes == {
        "main.0.weight": (64, 3, 3, 3),
        "main.2.conv1.weight": (128, 64, 3, 3),
        "main.2.nin_shortcut.weight": (128, 64, 1, 1),
        "main.3.conv1.weight": (256, 128, 3, 3),
        "main.3.nin_shortcut.weight": (256, 128, 1, 1),
        "main.4.conv1.weight": (512, 256, 3, 3),
        "main.4.nin_shortcut.weight": (512, 256, 1, 1),
        "main.5.weight": (1, 512, 3, 3),
    }
    assert model(torch.randn(2, 3, 48, 40)).shape == (2, 1, 6, 5)
    assert model.main[2].conv1.weight.detach().std() == pytest.approx(0.02, rel=0.05)
    with pytest.raises(ValueError, match="multiple of 32, got 48"):
        PatchDiscriminator(48)


def test_discriminator_losses_by_hand():
    real, fake = torch.tensor([0.5, 3.0]), torch.tensor([-2.0, 0.25])
    # 1 - real = 0.5, -2; 1 + fake = -1, 1.25
    assert float(discriminator_loss(real, fake, "hinge")) == pytest.approx(0.5 * (0.25 + 0.625))
    leaky = 0.5 * ((0.5 - 0.02) / 2 + (-0.01 + 1.25) / 2)
    assert float(discriminator_loss(real, fake, "leaky_hinge")) == pytest.approx(leaky)


def test_discriminator_learns_and_the_generator_leaves_it_alone(siglip_folder, tmp_path):
    trainer = adversarial_trainer(siglip_folder, tmp_path, dataset=pixel_items(), max_steps=1)
    trainer.create_scheduler(1, torch.optim.SGD(trainer.model.parameters(), 0.1))
    with trainer._watch_last_layer():
        trainer.compute_loss(trainer.model.train(), {"pixel_values": torch.zeros(2, 3, 24, 24)}).backward()
    assert all(p.grad is None for p in trainer.adversary.discriminator.parameters())
    before = state_of(trainer.adversary.discriminator)
    trainer.train()
    # A new adversary, of the same seed, that has learned.
    moved = changed(before, state_of(trainer.adversary.discriminator))
    assert {name for name in before if name.endswith("weight")} <= moved


def test_start_weight_and_rate_of_the_adversary(siglip_folder, tmp_path):
    """Eight images in batches of two: an epoch of four steps; the adversary begins with the third."""
    recipe = {"discriminator_start_step": None, "discriminator_warmup_steps": None}
    trainer = adversarial_trainer(
        siglip_folder, tmp_path, recipe=recipe, dataset=pixel_items(8), max_steps=8, learning_rate=1e-3
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["adaptive_weight"] > 0 for log in logs] == [False] * 2 + [True] * 6
    assert [log["discriminator"] > 0 for log in logs] == [False] * 2 + [True] * 6
    # Warm-up over half an epoch of its own steps, then a cosine to 4e-5 at the end.
    peak, end = 1e-3, 4e-5
    cosine = [end + (peak - end) * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(5)]
    # The rate of the step to come is what is logged.
    expected = [peak / 2, peak / 2, peak, *cosine]
    assert [log["discriminator_learning_rate"] for log in logs] == pytest.approx(expected)


def test_discriminator_is_drawn_anew(siglip_folder, tmp_path):
    recipe = {"discriminator_restart_steps": 2, "discriminator_start_step": 1}
    seen = []

    class Record(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append((trainer.adversary.restarts, trainer.adversary.scheduler.last_epoch))

    trainer = adversarial_trainer(siglip_folder, tmp_path, recipe=recipe, dataset=pixel_items(8), max_steps=6)
    trainer.add_callback(Record())
    trainer.train()
    # Before the steps 0 to 5: how often it was drawn anew, and how many steps it has made since.
    assert seen == [(0, 0), (0, 0), (0, 1), (0, 2), (1, 1), (1, 2)]
