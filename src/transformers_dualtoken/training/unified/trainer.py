"""Training of the unified model."""

import torch
from torch import nn
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ...modeling_dualtoken import DualTokenForCausalLM
from ...unified_loss import LOSS_TERMS
from ..arguments import DualTokenTrainingArguments
from ..base_trainer import DualTokenBaseTrainer
from .loss_sums import UnifiedLossSums
from .throughput import ThroughputMeter, TrainingFlops, peak_flops


logger = logging.get_logger(__name__)

# What the names of `set_trainable` stand for, as prefixes of parameter names.
TRAINABLE_PARTS = {
    "projector": ("model.visual_projector.",),
    "language_model": ("model.language_model.", "lm_head."),
    "heads": ("depth_heads.",),
}


def set_trainable(model: DualTokenForCausalLM, parts: list[str]) -> None:
    """Train the parts of a model, of `"projector"`, `"language_model"` and `"heads"`, and freeze the rest."""
    unknown = sorted(set(parts) - set(TRAINABLE_PARTS))
    if unknown or not parts:
        raise ValueError(f"`parts` must name some of {', '.join(TRAINABLE_PARTS)}, got {parts}.")
    if not isinstance(model, DualTokenForCausalLM):
        raise TypeError(
            f"`model` must be a DualTokenForCausalLM, got {type(model).__name__}. What an adapter trains is set when it is "
            "made (`lora_config`, `train_in_full`)."
        )
    prefixes = tuple(prefix for part in parts for prefix in TRAINABLE_PARTS[part])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))


class _EpochLengthGroupedSampler(LengthGroupedSampler):
    """
    Samples of like length together, in an order of the seed and the epoch only: transformers' sampler draws from the
    global random state, which a resumed run cannot bring back for the epoch at hand.
    """

    def __init__(self, dataset, batch_size: int, seed: int):
        # The lengths of the epoch at hand are asked for when it begins.
        super().__init__(batch_size, lengths=[1] * len(dataset), generator=torch.Generator())
        self.dataset, self.seed = dataset, seed

    def __iter__(self):
        self.lengths = self.dataset.lengths.tolist()
        self.generator.manual_seed(self.seed + 1_000_003 * self.dataset.epoch)
        return super().__iter__()


class DualTokenTrainer(DualTokenBaseTrainer):
    """
    `Trainer` for [`DualTokenForCausalLM`], or a `PeftModel` around it.

    Text and visual targets are counted apart, over the whole global batch: each loss is a mean over its own targets,
    whatever the number of accumulation steps and ranks. Logged are the three losses beside their weighted sum, losses
    and accuracies of both heads at every depth, and [`ThroughputMeter`]. An evaluation reports [`UnifiedLossSums`]
    exactly, whatever the batch size and the number of ranks.

    Args:
        learning_rates (`dict[str, float]`, *optional*): rates of parts (`"projector"`, `"language_model"`, `"heads"`)
            that differ from `args.learning_rate`; they share its schedule.
        args, kwargs: as in [`DualTokenBaseTrainer`].

    Raises:
        ValueError: for rates of unknown parts, or together with an optimizer of DeepSpeed's config, which knows nothing
            of them; for label smoothing; for a tokenizer of more tokens than the model.
    """

    arguments_class = DualTokenTrainingArguments

    def __init__(self, model=None, args=None, *trainer_args, learning_rates=None, **kwargs):
        self.learning_rates = dict(learning_rates or {})
        unknown = ", ".join(sorted(set(self.learning_rates) - set(TRAINABLE_PARTS)))
        if unknown:
            raise ValueError(f"`learning_rates` must name parts of {', '.join(TRAINABLE_PARTS)}, got {unknown}.")
        if args is not None and args.label_smoothing_factor:
            raise ValueError(
                "`label_smoothing_factor` must be 0: the Trainer would smooth the labels of images by the text head; got "
                f"{args.label_smoothing_factor}."
            )
        super().__init__(model, args, *trainer_args, **kwargs)
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        if self.learning_rates and plugin is not None and "optimizer" in plugin.deepspeed_config:
            raise ValueError(
                "DeepSpeed's config has an optimizer of its own, which would give all parts one learning rate. Leave "
                "`optimizer` and `scheduler` out of it: the Trainer's are used then, with `learning_rates`."
            )
        # Every rank divides by the global counts, so that the ranks' terms are parts of a sum.
        self.terms_reduction = "sum" if self.args.average_tokens_across_devices else "mean"
        unwrapped = self.accelerator.unwrap_model(self.model)
        self.config = unwrapped.config
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        vocab_size = self.config.get_text_config().vocab_size
        if tokenizer is not None and hasattr(tokenizer, "get_vocab") and len(tokenizer) > vocab_size:
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} tokens and the model {vocab_size}: ids would lie outside its "
                "vocabulary. Take the model's own tokenizer, or `model.resize_token_embeddings`."
            )
        self._loss_sums = UnifiedLossSums(self.config, self.args.device)
        pad_token_id = getattr(self.data_collator, "pad_token_id", None)
        ids = self.config.image_token_id, -1 if pad_token_id is None else pad_token_id
        device = self.args.device
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        flops = None if peak is None else _training_flops(unwrapped)
        self.throughput = ThroughputMeter(self.accelerator, *ids, flops, peak)

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(dataset, "lengths"):
            return super()._get_train_sampler(train_dataset)
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return _EpochLengthGroupedSampler(dataset, batch_size, seed)

    # The step

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """Override of Trainer's count: the pair (text targets, visual targets) of one optimizer step."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        labels = [batch["labels"][:, 1:] for batch in batch_samples]
        visual = sum((label == self.config.image_token_id).sum() for label in labels)
        text = sum((label != -100).sum() for label in labels) - visual
        counts = torch.stack([text, visual]).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        return counts

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.note_batch(inputs)
        self.throughput.update(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            # With a count over the global batch the micro-batches' losses add up to the step's mean.
            terms = {name: outputs[name] for name in LOSS_TERMS}
            self.add_terms(terms, completes=self.accelerator.sync_gradients)
            self._loss_sums.update(outputs)
        return (loss, outputs) if return_outputs else loss

    # Optimizer and checkpoints

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self.learning_rates:
            # Whatever wraps the model (PEFT, DDP).
            prefixes = [(part, prefix) for part, of_part in TRAINABLE_PARTS.items() for prefix in of_part]
            parts = {
                id(parameter): next((part for part, prefix in prefixes if prefix in name), None)
                for name, parameter in self.model.named_parameters()
            }
            frozen, groups = set(self.learning_rates), []
            for group in optimizer.param_groups:
                of_each = [parts.get(id(parameter)) for parameter in group["params"]]
                frozen -= set(of_each)
                for part in dict.fromkeys(of_each):
                    parameters = [p for p, its in zip(group["params"], of_each) if its == part]
                    rate = self.learning_rates.get(part, group["lr"])
                    groups.append({**group, "params": parameters, "lr": rate})
            if frozen:
                raise ValueError(f"`learning_rates` names parts that are not trained: {', '.join(sorted(frozen))}.")
            optimizer.param_groups[:] = groups
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        self._loss_sums.reset()
        self.throughput.reset()
        return super().create_scheduler(num_training_steps, optimizer)

    def _save_checkpoint(self, model, trial) -> None:
        with self.throughput.paused():
            super()._save_checkpoint(model, trial)

    # Evaluation and logs

    def evaluate(self, *args, **kwargs):
        with self.throughput.paused():
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Trainer's loop, which wraps the model as its engine needs it; the metrics are those of all ranks' sums."""
        if self.compute_metrics is not None:
            raise ValueError(
                "`compute_metrics` is not supported: the logits of a whole evaluation set are never in memory. "
                "Leave it out; losses, accuracies and perplexity are computed anyway."
            )
        # What `prediction_step` adds to.
        self._evaluation_sums = UnifiedLossSums(self.config, self.args.device)
        self._batches_to_count = dataloader.num_counted_batches
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        computed = self._evaluation_sums.reduce(self.accelerator).compute()
        if not computed["num_text_targets"] + computed["num_visual_targets"]:
            raise ValueError("No sample of the evaluation set has a target: all of its labels are -100.")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in computed.items()}
        return output._replace(metrics={**output.metrics, **metrics}, num_samples=len(dataloader.dataset))

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager():
            # The losses make their own logits, a chunk at a time.
            outputs = model(**self._prepare_inputs(inputs), logits_to_keep=1, use_cache=False)
        if self._batches_to_count > 0:
            self._evaluation_sums.update(outputs)
        self._batches_to_count -= 1
        return None, None, None

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add losses and accuracies by depth, text accuracy, and throughput since the last log."""
        if "loss" in logs and self._term_count:
            sums = self._loss_sums.reduce(self.accelerator).compute()
            self._loss_sums.reset()
            logs.update({name: value for name, value in sums.items() if "_depth_" in name or "accuracy" in name})
            logs.update(self.throughput.compute())
        super().log(logs, *args, **kwargs)
        self.check_finite({name: logs[name] for name in LOSS_TERMS if name in logs})


def _training_flops(model: nn.Module) -> TrainingFlops | None:
    """`None`, and a warning, for a language model of other blocks than Qwen2's: its operations cannot be counted."""
    try:
        return TrainingFlops(model)
    except AttributeError as error:
        logger.warning(f"The utilisation of the device is not logged: its operations cannot be counted ({error}).")
        return None
