"""Training that gets a SIGTERM, with a model of two weights; runs of both trainings are in the tests of these."""

import multiprocessing
import os
import signal
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from training_helpers import FixedItems, Sigterm, quiet
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from transformers_dualtoken.training import DualTokenTrainingArguments, TrainingStopped, base_trainer
from transformers_dualtoken.training.base_trainer import DualTokenBaseTrainer


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.constant_(self.layer.weight, 0.5)

    def forward(self, x, y=None):
        return {"loss": (self.layer(x) - 1).pow(2).mean()}


def make_trainer(folder, callbacks=(), arguments=TrainingArguments, **overrides) -> DualTokenBaseTrainer:
    """Six steps in two epochs; steps that are too long make the loss grow from one evaluation to the next."""
    options = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 0.1, "label_names": ["y"]}
    items = FixedItems([{"x": torch.tensor([index / 3, 1.0]), "y": torch.zeros(1)} for index in range(6)])
    trainer = DualTokenBaseTrainer(
        Line(),
        arguments(str(folder), **quiet(**{**options, **overrides})),
        train_dataset=items,
        eval_dataset=items,
        callbacks=list(callbacks),
    )
    trainer.model_accepts_loss_kwargs = False
    return trainer


@pytest.fixture
def sigterm_handler():
    """Takes note of SIGTERM, as a program may that trains."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(True))
    yield heard
    signal.signal(signal.SIGTERM, before)


class SigtermToAll(TrainerCallback):
    """As `os.killpg`: the workers get it, too, and have died of it before the next batch, if they do."""

    def __init__(self, step):
        self.step, self.workers = step, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.workers = multiprocessing.active_children()
            for process in self.workers:
                os.kill(process.pid, signal.SIGTERM)
                process.join(0.1)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_workers_outlive_a_signal_to_the_group_and_end_after_training(tmp_path, monkeypatch):
    """The one of training, which is kept, and the one of evaluation, which transformers' own loader keeps."""
    monkeypatch.setattr(DualTokenBaseTrainer, "get_eval_dataloader", Trainer.get_eval_dataloader)
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 1}
    options |= {"eval_strategy": "steps", "eval_steps": 1}
    signals = SigtermToAll(2)
    trainer = make_trainer(tmp_path, [signals], **options)
    with pytest.raises(TrainingStopped) as stopped:
        trainer.train()
    assert stopped.value.checkpoint.endswith("checkpoint-3")
    assert len(signals.workers) == 2 and all(worker.is_alive() for worker in signals.workers)
    # As Python does at its end.
    for worker in signals.workers:
        worker.terminate()
    for worker in signals.workers:
        worker.join(5)
    codes = [worker.exitcode for worker in signals.workers]
    for worker in signals.workers:
        worker.kill()  # else Python's end would wait for one that is left
    assert codes == [0, 0]


def test_ranks_wait_for_each_other_as_long_as_the_run_says(tmp_path, monkeypatch):
    made = {}
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "new_group", lambda **options: made.update(options))
    trainer = make_trainer(tmp_path, ddp_timeout=7200)
    with trainer._save_on_sigterm.listening(trainer.args.ddp_timeout):
        pass
    assert made == {"backend": "gloo", "timeout": timedelta(hours=2)}
    monkeypatch.setattr(trainer._save_on_sigterm, "listening", lambda timeout: pytest.fail(f"{timeout:g}"))
    with pytest.raises(pytest.fail.Exception, match="7200"):
        trainer.train()


PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "mode": "max"}}


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (2, {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4}),
        (3, {"eval_strategy": "epoch"}),
        (2, {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "metric_for_best_model": "loss"}),
    ],
    ids=["steps", "epoch", "best"],
)
def test_evaluation_at_the_last_step_before_a_stop(tmp_path, step, options):
    """The learning rate hangs on it."""
    options |= PLATEAU | ({"greater_is_better": True} if options.get("save_strategy") == "best" else {})
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(TrainingStopped) as stopped:
        make_trainer(tmp_path / "stopped", [Sigterm(step)], **options).train()
    assert stopped.value.checkpoint.endswith(f"checkpoint-{step}")
    resumed = make_trainer(tmp_path / "stopped", **options)
    resumed.train(resume_from_checkpoint=stopped.value.checkpoint)
    rates = [trainer.optimizer.param_groups[0]["lr"] for trainer in (whole, resumed)]
    assert rates[0] == rates[1] < 0.1
    assert torch.equal(whole.model.layer.weight, resumed.model.layer.weight)


def test_evaluation_that_ends_training_is_no_stop(tmp_path, caplog):
    options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = make_trainer(tmp_path, [Sigterm(2), EarlyStoppingCallback(1)], **options)
    assert trainer.train().global_step == 2
    assert "training has ended as usual" in caplog.text


def test_a_stop_saves_whole_where_checkpoints_are_models_only(tmp_path):
    options = {"save_only_model": True, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(TrainingStopped) as stopped:
        make_trainer(tmp_path / "stopped", [Sigterm(2)], **options).train()
    saved = {path.parent.name for path in tmp_path.glob("*/*/optimizer.pt")}
    assert saved == {"checkpoint-2"} and not (tmp_path / "whole/checkpoint-2/optimizer.pt").exists()
    resumed = make_trainer(tmp_path / "stopped", **options)
    resumed.train(resume_from_checkpoint=stopped.value.checkpoint)
    assert torch.equal(whole.model.layer.weight, resumed.model.layer.weight)


class LateSigterm(TrainerCallback):
    def on_train_end(self, args, state, control, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("late", [LateSigterm(), Sigterm(6)], ids=["after the last step", "in the last step"])
def test_signal_that_comes_too_late_to_stop_training(tmp_path, caplog, sigterm_handler, late):
    trainer = make_trainer(tmp_path, [late])
    assert trainer.train().global_step == 6
    assert sigterm_handler == [True] and "SIGTERM came when no step of training was left" in caplog.text


def test_threads_of_the_training_arguments_hold_without_the_scripts(tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(base_trainer, "use_cpu_threads", used.append)
    make_trainer(tmp_path)
    make_trainer(tmp_path, arguments=DualTokenTrainingArguments)
    assert used == []
    make_trainer(tmp_path, arguments=DualTokenTrainingArguments, cpu_threads=1)
    assert used == [1]
