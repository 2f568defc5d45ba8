"""The evaluation of unified training is exact, whatever the batches and ranks."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import lively_unified_model, tiny_unified_config
from training_helpers import FixedItems, state_of
from unified_training import IMAGE, N, collate, make_samples, make_trainer, naive_metrics

from transformers_dualtoken.training.base_trainer import evaluation_batches
from transformers_dualtoken.training.unified.loss_sums import UnifiedLossSums


@torch.no_grad()
def partly_right(model, samples) -> list[dict]:
    """The samples with every second text target, and the last codes of every image, as the model predicts them."""
    for sample in samples:
        inputs = {name: value if "codes" in name else value[None] for name, value in sample.items()}
        output = model(**inputs)
        labels = sample["labels"]
        is_text = (labels[1:] != -100) & (labels[1:] != IMAGE)
        chosen = is_text.nonzero()[::2, 0]
        labels[chosen + 1] = output.logits[0, chosen].argmax(-1)
        if "pixel_codes" in sample:
            before_last = output.last_hidden_state[:, 3 + N - 1]
            codes = model.depth_heads.sample(before_last, model.model.codebooks(), lambda logits: logits.argmax(-1))
            sample["pixel_codes"][0, -1, -1], sample["semantic_codes"][0, -1, -1] = codes[:, 0]
    return samples


def evaluated(metrics: dict) -> dict:
    others = ("runtime", "samples_per_second", "steps_per_second", "preparation_time", "epoch")
    return {name: value for name, value in metrics.items() if not name.endswith(others)}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_evaluation_is_that_of_the_full_logits(tmp_path, batch_size):
    model = lively_unified_model(pixel_loss_weight=0.5, semantic_loss_weight=2.0)
    samples = partly_right(model, make_samples())
    trainer = make_trainer(tmp_path, model, samples, per_device_eval_batch_size=batch_size)
    metrics = evaluated(trainer.evaluate())
    expected = {f"eval_{name}": value for name, value in naive_metrics(model, samples).items()}
    assert metrics.keys() == expected.keys()
    accuracies = [value for name, value in expected.items() if "accuracy" in name]
    assert len(accuracies) == 7 and all(0 < accuracy < 1 for accuracy in accuracies)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name
    assert trainer.predict(FixedItems(make_samples()[:2])).metrics["test_num_visual_targets"] == N


def test_evaluation_leaves_no_trace_in_training(tmp_path):
    model = lively_unified_model().train()
    trainer = make_trainer(tmp_path, model)
    state, before = torch.get_rng_state(), state_of(model)
    trainer.evaluate()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_two_ranks_evaluate_what_one_does(tmp_path):
    """Five samples in batches of one: the second rank makes up its last batch."""
    model = lively_unified_model()
    whole = make_trainer(tmp_path, model, per_device_eval_batch_size=1)
    expected = evaluated(whole.evaluate())
    calls, sums = [], []
    for rank in range(2):
        trainer = make_trainer(tmp_path, model, per_device_eval_batch_size=1)
        trainer.args = SimpleNamespace(
            **{name: getattr(whole.args, name) for name in ("eval_batch_size", "dataloader_num_workers")},
            dataloader_pin_memory=False,
            dataloader_prefetch_factor=None,
            process_index=rank,
            world_size=2,
        )
        trainer.check_ranks_agree = lambda dataset: None  # there is one process here
        loader = trainer.get_eval_dataloader()
        trainer._evaluation_sums, trainer._batches_to_count = UnifiedLossSums(model.config), loader.num_counted_batches
        trainer.args = whole.args
        for inputs in loader:
            trainer.prediction_step(model, inputs, True)
        calls.append(len(loader))
        sums.append(trainer._evaluation_sums)
    assert calls == [3, 3]

    # An all-reduce between the two.
    sent = {}
    for one in sums:
        one.reduce(
            SimpleNamespace(reduce=lambda tensor, how: sent.setdefault(tensor.dtype, []).append(tensor) or tensor)
        )
    joined = sums[0].reduce(SimpleNamespace(reduce=lambda tensor, how: sum(sent[tensor.dtype]))).compute()
    assert {f"eval_{name}" for name in joined} == expected.keys()
    for name, value in joined.items():
        assert value == pytest.approx(expected[f"eval_{name}"], rel=1e-6), name


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "num_ranks"), [(1, 1, 1), (5, 2, 2), (7, 3, 4), (2, 8, 4), (9, 2, 4), (16, 4, 4)]
)
def test_ranks_share_the_evaluation_set(num_samples, batch_size, num_ranks):
    shares = [evaluation_batches(num_samples, batch_size, rank, num_ranks) for rank in range(num_ranks)]
    assert len({len(batches) for batches, _ in shares}) == 1
    counted = [index for batches, count in shares for batch in batches[:count] for index in batch]
    assert sorted(counted) == list(range(num_samples))
    assert all(0 < len(batch) <= batch_size for batches, _ in shares for batch in batches)


def test_loss_sums_forget_and_leave_out_what_has_no_target():
    config = tiny_unified_config(depth_reduction="mean")
    sums = UnifiedLossSums(config)
    model, samples = lively_unified_model(depth_reduction="mean"), make_samples()
    sums.update(model(**{k: v for k, v in collate(samples).items() if k != "num_skipped"}))
    metrics = sums.compute()
    by_depth = [metrics[f"pixel_loss_depth_{depth}"] for depth in (1, 2, 3)]
    assert metrics["pixel_loss"] == pytest.approx(sum(by_depth) / 3)
    sums.reset()
    sums.update(model(input_ids=samples[4]["input_ids"][None], labels=samples[4]["labels"][None]))
    metrics = sums.compute()
    assert metrics["loss"] == metrics["text_loss"] and "pixel_loss" not in metrics
    assert metrics["num_visual_targets"] == 0 and metrics["num_text_targets"] == len(samples[4]["input_ids"]) - 1


def test_evaluation_refuses_what_it_cannot_do(tmp_path):
    trainer = make_trainer(tmp_path, lively_unified_model())
    with pytest.raises(ValueError, match="must have a length.*generator"):
        trainer.get_eval_dataloader(item for item in ())
    with pytest.raises(ValueError, match="holds no samples"):
        trainer.evaluate(FixedItems([]))
    silent = [{**sample, "labels": torch.full_like(sample["labels"], -100)} for sample in make_samples()]
    with pytest.raises(ValueError, match="No sample .* has a target"):
        trainer.evaluate(FixedItems(silent))
    trainer.compute_metrics = lambda prediction: {}
    with pytest.raises(ValueError, match="`compute_metrics` is not supported"):
        trainer.evaluate()
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="no evaluation set"):
        trainer.evaluate()
