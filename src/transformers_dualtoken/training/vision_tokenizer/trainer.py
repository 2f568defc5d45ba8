"""Training of the vision tokenizer: one step for all stages of the paper's recipe."""

import contextlib
import itertools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers.trainer_utils import EvalLoopOutput

from ...evaluation.codebook_statistics import CodebookUsage
from ...evaluation.perceptual import load_lpips
from ..arguments import DualTokenVisionTokenizerTrainingArguments
from ..base_trainer import DualTokenBaseTrainer
from .adversary import Adversary, adaptive_weight
from .callbacks import ReconstructionGridCallback, WeightAverage
from .contrastive import contrastive_loss
from .recipe import DualTokenVisionTokenizerRecipe


# Logged as zero while the adversary waits, so that the names do not change during a run.
_ADAPTIVE_TERMS = ("adaptive_weight", "adaptive_weight_unclamped")
_DISCRIMINATOR_TERMS = ("discriminator", "discriminator_real_logits", "discriminator_fake_logits")


class _KnownGradient(torch.autograd.Function):
    """A value whose gradient with respect to a tensor is known already."""

    @staticmethod
    def forward(ctx, tensor, gradient, value):
        ctx.save_for_backward(gradient)
        ctx.dtype = tensor.dtype
        return value.clone()

    @staticmethod
    def backward(ctx, grad_output):
        (gradient,) = ctx.saved_tensors
        return (grad_output * gradient).to(ctx.dtype), None, None


class DualTokenVisionTokenizerTrainer(DualTokenBaseTrainer):
    """
    `Trainer` for [`DualTokenVisionTokenizer`] on batches of `pixel_values`, for the three stages of the paper's recipe,
    and of `pixel_values` and `input_ids`, a caption of each image, for the contrastive one.

    The semantic branch is held to a frozen teacher, the vision tower training started from, or to the captions, of which
    those of all ranks are compared, and of this step of accumulation only; the pixel branch to the image, by squared
    error, LPIPS and a discriminator that is trained beside it, and is part of checkpoints.

    Args:
        teacher (`SiglipVisionModel`, *optional*): needed where a term of the loss compares with it.
        recipe ([`DualTokenVisionTokenizerRecipe`], *optional*): stage 1 by default.
        model, args, kwargs: as in [`DualTokenBaseTrainer`].

    Raises:
        ValueError: for DeepSpeed, FSDP and fp16 (bf16 and DDP work), and for a teacher that is missing.
        ImportError: if the perceptual term has a weight and `lpips` cannot be imported.
    """

    arguments_class = DualTokenVisionTokenizerTrainingArguments
    noun = "images"

    def __init__(self, model=None, args=None, *trainer_args, teacher=None, recipe=None, **kwargs):
        self.recipe = recipe or DualTokenVisionTokenizerRecipe()
        super().__init__(model, args, *trainer_args, steps_per_epoch=self.recipe.steps_per_epoch, **kwargs)
        self._check_engine()
        # The loss is a mean per micro-batch; the Trainer divides it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.recipe.freeze(self.model)
        self.loss_weights = self.recipe.loss_weights
        terms = ", ".join(self.recipe.teacher_terms)
        if teacher is None and terms:
            raise ValueError(f"The terms {terms} compare with a teacher, but `teacher` is None.")
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval().to(self.args.device)
        if self.loss_weights["perceptual"]:
            lpips = load_lpips(self.recipe.perceptual_net, self.recipe.perceptual_weights)
            self.perceptual_loss = lpips.to(self.args.device)
        self.adversary = self.weight_average = self._grid = None
        # Left by `compute_loss`: its terms and, where the adversary takes part, what that learns from; and by the model's
        # forward, what went into the last layer.
        self._terms: dict[str, torch.Tensor] = {}
        self._adversary_images = self._last_input = None
        if self.recipe.grid_steps is not None:
            self._grid = ReconstructionGridCallback(self)
            self.add_callback(self._grid)
        self._codebook_usage = {}
        for kind in self.recipe.codes:
            config = self.model.quantizer(kind).config
            sizes = config.num_depths, config.codebook_size, config.shared_codebook
            self._codebook_usage[kind] = CodebookUsage(*sizes)

    def _check_engine(self) -> None:
        """Refuse what would train silently wrong, whether `args` or accelerate's own settings ask for it."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "The vision tokenizer trains with DDP (torchrun or accelerate launch); DeepSpeed and FSDP would shard "
                "the weights whose gradients its adaptive weight reads. Leave them out."
            )
        if self.accelerator.mixed_precision == "fp16":
            raise ValueError("fp16 would need two loss scales, of the tokenizer and its discriminator; use `bf16`.")

    def train(self, *args, **kwargs):
        with self._watch_last_layer():
            return super().train(*args, **kwargs)

    @contextlib.contextmanager
    def _watch_last_layer(self):
        """Within this context a training forward leaves what went into the decoder's last layer."""

        def keep(module, inputs):
            if module.training:
                self._last_input = inputs[0].detach()

        # Not for longer: a hook makes the model hold the trainer, and with it teacher, discriminator and optimizers.
        hook = self.model.decoder.conv_out.register_forward_pre_hook(keep) if self.recipe.is_adversarial else None
        try:
            with contextlib.nullcontext() if hook is None else hook:
                yield
        finally:
            self._last_input = None

    # The step

    @torch.no_grad()
    def teacher_features(self, pixel_values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden state `(B, N, H)` after encoder layer `layer`, and the pooled feature `(B, H)`, of the teacher."""
        with self.accelerator.autocast():
            hidden_states = self.teacher.embeddings(pixel_values)
            for depth, encoder_layer in enumerate(self.teacher.encoder.layers, start=1):
                hidden_states = encoder_layer(hidden_states, attention_mask=None)
                if depth == layer:
                    target = hidden_states
            pooled = self.teacher.head(self.teacher.post_layernorm(hidden_states))
        return target.float(), pooled.float()

    def target_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What the reconstruction is compared with `(B, 3, S', S')`: the input in the reconstruction's size."""
        size = (self.model.config.reconstruction_size,) * 2
        if pixel_values.shape[-2:] == size:
            return pixel_values
        return F.interpolate(pixel_values, size=size, mode="bilinear", align_corners=False)

    def feature_terms(self, output, pixel_values: torch.Tensor, input_ids=None) -> dict[str, torch.Tensor]:
        """The terms that do not look at the reconstructed image, before weighting, by their logged names."""
        terms = {}
        if self.recipe.teacher_terms:
            hidden, pooled = self.teacher_features(pixel_values, self.model.config.semantic_layer)
            terms = {
                "semantic_mse": F.mse_loss(output.semantic_features, hidden),
                "semantic_cosine": -F.cosine_similarity(output.semantic_features, hidden, dim=-1).mean(),
                "pooler_mse": F.mse_loss(output.pooler_output, pooled),
                "pooler_cosine": -F.cosine_similarity(output.pooler_output, pooled, dim=-1).mean(),
            }
        if self.recipe.is_contrastive:
            siglip, kind = self.model.siglip, self.recipe.contrastive_loss
            pairs = output.image_embeds, output.text_embeds, input_ids
            # Of an evaluation the ranks have different numbers of batches.
            terms["contrastive"] = contrastive_loss(
                *pairs, siglip.logit_scale, siglip.logit_bias, kind, gather=self.model.training
            )
        if self.recipe.semantic_terms:
            terms["semantic_commitment"] = output.semantic_commitment_loss
        if self.recipe.pixel_terms:
            terms["pixel_commitment"] = output.pixel_commitment_loss
        # A term that has a weight and is not computed is an error, not left out.
        return {name: terms[name] for name in self.recipe.feature_terms}

    def image_term(self, name: str, image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """A term of the reconstructed image `(B, 3, S', S')`, before weighting."""
        if name == "reconstruction_mse":
            return F.mse_loss(image, target)
        if name == "perceptual":
            with self.accelerator.autocast():
                return self.perceptual_loss(image, target).float().mean()
        if name == "generator":
            return self.adversary.generator_loss(image)
        raise ValueError(f"There is no term {name!r} of the image.")

    def image_loss(self, reconstruction: torch.Tensor, target: torch.Tensor, adversarial: bool) -> tuple:
        """
        The weighted sum of the image terms with its gradient, and the terms; of images `(B, 3, S', S')`.

        Each is differentiated once, as far as the image, where the adaptive weight needs the gradients one by one; LPIPS
        and the discriminator let go of their activations before the tokenizer's backward begins.
        """
        dtype = torch.promote_types(reconstruction.dtype, torch.float32)
        image = reconstruction.detach().to(dtype).requires_grad_()
        terms, gradients = {}, {}
        for name in self.recipe.image_terms(adversarial):
            with torch.enable_grad():
                term = self.image_term(name, image, target)
            gradients[name] = torch.autograd.grad(term, image)[0]
            terms[name] = term.detach()
        weights = {name: self.loss_weights[name] for name in terms}
        if adversarial:
            # Of the plain sum of the terms that compare with the target.
            compared = sum(gradient for name, gradient in gradients.items() if name != "generator")
            last_layer = self.model.decoder.conv_out
            clamped, unclamped = adaptive_weight(
                self._last_input, last_layer, compared, gradients["generator"], self.accelerator
            )
            weights["generator"] = weights["generator"] * clamped
            terms |= {"adaptive_weight": clamped, "adaptive_weight_unclamped": unclamped}
        elif self.recipe.is_adversarial:
            terms |= {name: image.new_zeros(()) for name in ("generator", *_ADAPTIVE_TERMS)}
        value = sum(weight * terms[name] for name, weight in weights.items())
        gradient = sum(weight * gradients[name] for name, weight in weights.items())
        return _KnownGradient.apply(reconstruction, gradient, value), terms

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pixel_values, input_ids = inputs["pixel_values"], inputs.get("input_ids")
        if self.recipe.is_contrastive and input_ids is None:
            raise ValueError("The term contrastive needs captions: give the data set a `caption_column`.")
        training = model.training
        adversarial = training and self.adversary is not None and self.adversary.begin_step(self.state.global_step)
        # With the similarities, for DDP looks in the output for the parameters that take part, scale and bias among them.
        output = model(pixel_values=pixel_values, input_ids=input_ids, codes=self.recipe.codes)
        terms = self.feature_terms(output, pixel_values, input_ids)
        loss = sum(self.loss_weights[name] * term for name, term in terms.items())
        if self.recipe.image_terms(adversarial=True):
            target = self.target_images(pixel_values)
            if training:
                image_loss, image_terms = self.image_loss(output.reconstruction, target, adversarial)
            else:
                names = self.recipe.image_terms(adversarial=False)
                image_terms = {name: self.image_term(name, output.reconstruction, target) for name in names}
                image_loss = sum(self.loss_weights[name] * term for name, term in image_terms.items())
            loss, terms = loss + image_loss, terms | image_terms
            if adversarial:
                self._adversary_images = target, output.reconstruction.detach()
        self._last_input = None
        self._terms = terms
        if training:
            for kind, usage in self._codebook_usage.items():
                usage.update(output[f"{kind}_codes"])
        return (loss, output) if return_outputs else loss

    def _model_inputs(self, inputs: dict) -> dict:
        """The images of a batch, and their captions where they are looked at, on the device."""
        names = ("pixel_values", *["input_ids"] * self.recipe.is_contrastive)
        return {name: inputs[name].to(self.args.device) for name in names if name in inputs}

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.note_batch(inputs, len(inputs["pixel_values"]))
        if self._grid is not None:
            self._grid.choose_images(inputs["pixel_values"])
        loss = super().training_step(model, self._model_inputs(inputs), num_items_in_batch)
        # Without the graph, which would else live until the next step.
        terms, self._terms = {name: term.detach() for name, term in self._terms.items()}, {}
        if self._adversary_images is not None:
            (real, fake), self._adversary_images = self._adversary_images, None
            terms |= self.adversary.learn(real, fake, self.state.global_step, self.current_gradient_accumulation_steps)
        elif self.recipe.is_adversarial:
            terms |= {name: loss.new_zeros(()) for name in _DISCRIMINATOR_TERMS}
        # Once for all, after the backward was queued and before the optimizer's step.
        self.check_finite(dict(zip(terms, torch.stack([term.float() for term in terms.values()]).tolist())))
        self.add_terms(terms)
        return loss

    # Optimizers and checkpoints

    def get_decay_parameter_names(self, model) -> list[str]:
        """Biases, norms and other vectors are not decayed (code: tensors below two dimensions)."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """The last that is made before a checkpoint is loaded, and the first to know how long the training is."""
        if self.recipe.is_adversarial:
            self.adversary = Adversary(
                self.recipe, self.accelerator, self.args, num_training_steps, self._steps_per_epoch()
            )
        if self.recipe.weight_average_decay is not None:
            if self.weight_average is not None:
                self.remove_callback(self.weight_average)
            self.weight_average = WeightAverage(self.model, self.recipe.weight_average_decay)
            self.add_callback(self.weight_average)
        if self.args.world_size > 1:
            # DDP makes the parameters equal on all ranks, but buffers only where it sends them before each forward.
            for kind in self.recipe.codes:
                for buffer in self.model.quantizer(kind).codebook.buffers():
                    dist.broadcast(buffer, 0)
        return super().create_scheduler(num_training_steps, optimizer)

    def _steps_per_epoch(self) -> int | None:
        if self.is_stream or self.train_dataset is None:
            return None
        images, batch = len(self.train_dataset), self.args.train_batch_size * self.args.world_size
        micro_batches = images // batch if self.args.dataloader_drop_last else -(-images // batch)
        return max(1, -(-micro_batches // self.args.gradient_accumulation_steps))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        for part in (self.adversary, self.weight_average):
            if part is not None and self.args.should_save:
                part.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        for part in (self.adversary, self.weight_average):
            if part is not None and checkpoint is not None:
                part.load(checkpoint)

    def tensors_to_save(self):
        yield from self.model.state_dict().items()
        if self.adversary is not None:
            state = self.adversary.discriminator.state_dict()
            yield from ((f"discriminator.{name}", tensor) for name, tensor in state.items())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Outside of checkpoints, the averaged weights are what is saved, where there is an average."""
        is_checkpoint = _internal_call and output_dir is not None
        with contextlib.nullcontext() if is_checkpoint else self._weights_to_keep():
            super().save_model(output_dir, _internal_call)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.weight_average is not None:
            self.weight_average.load(self.state.best_model_checkpoint)

    def _weights_to_keep(self):
        """A context in which the model has the weights that are evaluated, and saved at the end."""
        return contextlib.nullcontext() if self.weight_average is None else self.weight_average.in_model()

    # Evaluation and logs

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Means of the loss and of its terms, the generator's left out, over the images of all ranks."""
        was_training = self.model.training
        self.model.eval()
        count, sums = torch.zeros((), device=self.args.device), {}
        with self._weights_to_keep(), self.accelerator.autocast():
            for inputs in itertools.islice(dataloader, dataloader.num_counted_batches):
                inputs = self._model_inputs(inputs)
                loss = self.compute_loss(self.model, inputs)
                for name, term in {"loss": loss, **self._terms}.items():
                    sums[name] = sums.get(name, 0.0) + term.float() * len(inputs["pixel_values"])
                count += len(inputs["pixel_values"])
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        self.model.train(was_training)
        names = ["loss", *self.recipe.semantic_terms, *self.recipe.pixel_terms]
        names = [name for name in names if name != "generator"]
        values = torch.stack([*(torch.as_tensor(sums.get(name, 0.0)).to(count) for name in names), count])
        *values, count = self.accelerator.reduce(values, "sum").tolist()
        metrics = {f"{metric_key_prefix}_{name}": value / count for name, value in zip(names, values)}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=int(count))

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add the codebooks' use since the last log, and the trained logit scale and bias."""
        if "loss" in logs and self._num_seen:
            for kind, usage in self._codebook_usage.items():
                logs |= {f"{kind}_codebook_{name}": value for name, value in usage.reduce().compute().items()}
                usage.reset()
            if self.recipe.is_contrastive:
                siglip = self.model.siglip
                logs |= {"logit_scale": siglip.logit_scale.exp().item(), "logit_bias": siglip.logit_bias.item()}
            if self.adversary is not None:
                logs["discriminator_learning_rate"] = self.adversary.optimizer.param_groups[0]["lr"]
        super().log(logs, *args, **kwargs)
