"""LoRA on the unified model: what it trains, saving, loading, merging; quantised loading."""

import importlib.util
import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tiny_models import lively_unified_model, tiny_unified_config
from torch import nn
from training_helpers import FixedItems, build_tiny_processor, changed, quiet, state_of
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    QuantoConfig,
    Qwen2ForCausalLM,
    TrainingArguments,
)
from transformers.quantizers.quantizers_utils import should_convert_module

from transformers_dualtoken import DualTokenForCausalLM, DualTokenModel, DualTokenVisionTokenizer
from transformers_dualtoken.cli import main as cli
from transformers_dualtoken.lora_targets import BACKBONE_PROJECTIONS
from transformers_dualtoken.training.unified.adapters import (
    DEFAULT_TRAINED_IN_FULL,
    add_lora,
    lora_config,
    merge_adapter,
)
from transformers_dualtoken.training.unified.low_bit import load_quantized, low_bit_config
from transformers_dualtoken.training.unified.trainer import DualTokenTrainer


START, IMAGE, END = 50, 51, 52  # of the tiny config


def example() -> dict[str, torch.Tensor]:
    """A row that draws an image and writes, and one that is asked about an image."""
    input_ids = torch.randint(3, 49, (2, 20), generator=torch.Generator().manual_seed(1))
    input_ids[:, 3], input_ids[:, 4:13], input_ids[:, 13] = START, IMAGE, END
    labels = input_ids.clone()
    labels[:, :3] = -100
    labels[1, :15] = -100
    pixel_values = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return {"input_ids": input_ids, "labels": labels, "pixel_values": pixel_values}


def train(model: nn.Module, steps: int = 3) -> list[float]:
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**example()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def answers(model) -> dict[str, torch.Tensor]:
    """What a model does in every mode."""
    model.eval()
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "image_do_sample": False}
    drawn = model.generate(**prompt, generation_mode="image")
    mixed = model.generate(**prompt, generation_mode="interleaved", max_new_tokens=12)
    outputs = model(**example())
    return {
        "logits": outputs.logits,
        "losses": torch.stack([outputs.text_loss, outputs.pixel_loss, outputs.semantic_loss]),
        "text": model.generate(input_ids=prompt["input_ids"], max_new_tokens=4),
        "codes": torch.stack([drawn.pixel_codes, drawn.semantic_codes]),
        "images": model.decode_images(drawn),
        "mixed": mixed.sequences,
    }


def assert_same(first: dict, second: dict, tolerance: float = 1e-5):
    for name in first:
        assert first[name].shape == second[name].shape, name
        torch.testing.assert_close(first[name], second[name], atol=tolerance, rtol=tolerance, msg=name)


@pytest.fixture
def base_folder(tmp_path):
    def make(**overrides):
        lively_unified_model(**overrides).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return make


def adapted(folder, **kwargs) -> PeftModel:
    model = add_lora(AutoModelForCausalLM.from_pretrained(folder), **kwargs)
    train(model)
    return model


# What is adapted.


def test_lora_lies_on_the_blocks_of_the_language_model_only():
    model = add_lora(lively_unified_model())
    layers = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    prefix = "base_model.model.model.language_model.layers"
    parts = {name: "self_attn" if name[0] in "qkvo" else "mlp" for name in BACKBONE_PROJECTIONS}
    assert layers == {f"{prefix}.{layer}.{part}.{name}" for layer in range(2) for name, part in parts.items()}


@pytest.mark.parametrize(
    ("parts", "tied"),
    [
        *((DEFAULT_TRAINED_IN_FULL, tied) for tied in (False, True)),
        *((("image_tokens", "embeddings"), tied) for tied in (False, True)),
        (("projector",), False),
        (("heads",), True),
        ((), False),
    ],
)
def test_exactly_the_wanted_tensors_move(tied, parts):
    model = lively_unified_model(tie_word_embeddings=tied)
    before, names = state_of(model), set(model.state_dict())
    model = add_lora(model, train_in_full=parts)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    start = state_of(model)
    losses = train(model)
    assert losses[-1] < losses[0]
    moved = changed(start, state_of(model))
    # A tied head shows the rows of the embeddings a second time.
    assert {name for name in moved if not (tied and "lm_head" in name)} == trainable
    in_full = {"projector": ["visual_projector"], "heads": ["depth_heads"], "embeddings": ["embed_tokens", "lm_head"]}
    for part, modules in in_full.items():
        for module in modules[: 1 if tied else None]:
            assert any(f"{module}.modules_to_save" in name for name in trainable) == (part in parts)
    rows = {name.split(".token_adapter")[0].split(".")[-1] for name in trainable if "token_adapter" in name}
    all_rows = {"embed_tokens"} if tied else {"embed_tokens", "lm_head"}
    assert rows == (all_rows if "image_tokens" in parts and "embeddings" not in parts else set())

    # The copies below PEFT's wrappers, the vision tokenizer and its codebooks are what they were.
    model = model.unload()
    assert set(model.state_dict()) == names
    touched = [module for part, modules in in_full.items() if part in parts for module in modules]
    untouched = {name for name in names if not any(module in name for module in touched)}
    assert not {name for name in untouched if not torch.equal(before[name], model.state_dict()[name])}


def test_only_rows_of_image_tokens_move():
    for tied in (False, True):
        model = lively_unified_model(tie_word_embeddings=tied)
        before = [layer.weight.clone() for layer in (model.get_input_embeddings(), model.lm_head)]
        model = add_lora(model)
        train(model)
        model = model.merge_and_unload()
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        for old, layer in zip(before, (model.get_input_embeddings(), model.lm_head)):
            rows = (old != layer.weight).any(-1).nonzero().flatten().tolist()
            # An image's positions are no look-ups: of the input embeddings alone, the row of <image_pad> stays.
            assert rows == ([START, END] if layer is not model.lm_head and not tied else [START, IMAGE, END])


def test_disabled_adapter_is_the_base_model(base_folder):
    folder = base_folder()
    model = adapted(folder)
    before = answers(AutoModelForCausalLM.from_pretrained(folder))
    with model.disable_adapter():
        assert_same(before, answers(model), tolerance=0)
    assert not torch.equal(before["logits"], model(**example()).logits)


def test_settings_reach_the_config():
    model = lively_unified_model()
    config = lora_config(model, r=4, alpha=8, dropout=0.0, target_modules=["q_proj", "v_proj"], use_rslora=True)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (4, 8, 0.0, True)
    layers = {name.split(".")[-4] for name, _ in add_lora(model, config).named_parameters() if "lora_A" in name}
    assert layers == {"q_proj", "v_proj"}


def test_wrong_settings_are_refused():
    model = lively_unified_model()
    with pytest.raises(ValueError, match="takes projector, heads, image_tokens, embeddings, got decoder"):
        lora_config(model, train_in_full=["decoder"])
    with pytest.raises(ValueError, match="must name layers .* got fc1"):
        lora_config(model, target_modules=["q_proj", "fc1"])
    with pytest.raises(ValueError, match="got none"):
        lora_config(model, target_modules=[])
    with pytest.raises(ValueError, match="not both; got also r"):
        add_lora(model, lora_config(model), r=3)
    with pytest.raises(ValueError, match="must name layers .* got lm_head"):
        lora_config(model, target_modules=["lm_head"])


def test_plain_lora_config_adapts_the_language_model_only(base_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(base_folder())
    # PEFT's Auto class finds the model by the task type.
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all(".language_model.layers." in name for name in trainable)
    model.save_pretrained(tmp_path / "adapter")
    assert_same(answers(model), answers(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), 0)


# Numbers.


def test_adapted_text_head_is_trained_through():
    """The loss of an adapted head equals that of its logits, in value and gradient."""
    model = add_lora(lively_unified_model(), target_modules=r".*\.q_proj|lm_head", train_in_full=[], dropout=0.0)
    head = model.get_base_model().lm_head
    nn.init.normal_(head.lora_B["default"].weight)
    batch = example()
    wanted = batch["labels"].masked_fill(batch["labels"] == IMAGE, -100)[:, 1:]
    gradients = []
    for reference in (False, True):
        model.zero_grad()
        if reference:
            logits = model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"]).logits
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), wanted.flatten())
        else:
            loss = model.train()(**batch).text_loss
        loss.backward()
        gradients.append(
            [head.lora_A["default"].weight.grad.clone(), head.lora_B["default"].weight.grad.clone(), loss]
        )
        assert gradients[-1][0].abs().max() > 0
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("part", ["image_tokens", "embeddings"])
def test_rows_of_the_text_head_are_trained_through(part):
    for tied in (False, True):
        model = add_lora(lively_unified_model(tie_word_embeddings=tied), train_in_full=[part], dropout=0.0)
        head = model.get_base_model().lm_head
        if part == "embeddings":
            rows = head.modules_to_save["default"].weight
        else:
            rows = head.token_adapter.trainable_tokens_delta["default"]
        batch = example()
        wanted = batch["labels"].masked_fill(batch["labels"] == IMAGE, -100)[:, 1:]
        logits = model.train()(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"]).logits
        reference = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), wanted.flatten())
        loss = model(**batch).text_loss
        torch.testing.assert_close(*(torch.autograd.grad(value, rows)[0] for value in (loss, reference)))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    model = add_lora(lively_unified_model(), dropout=0.0, train_in_full=())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        model(**example()).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("parts", "tied"),
    [(DEFAULT_TRAINED_IN_FULL, False), (("embeddings",), False), (("embeddings",), True)],
)
def test_what_is_trained_on_a_bfloat16_model_is_float32(parts, tied):
    model = add_lora(lively_unified_model(tie_word_embeddings=tied).to(torch.bfloat16), train_in_full=parts)
    dtypes = {(parameter.requires_grad, parameter.dtype) for parameter in model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    with torch.autocast("cpu", torch.bfloat16):
        losses = train(model)
    assert losses[-1] < losses[0]
    result = answers(model)  # without autocast
    assert result["logits"].dtype == (torch.float32 if "embeddings" in parts else torch.bfloat16)
    assert result["losses"].isfinite().all()


def test_trainer_trains_saves_and_resumes_an_adapter(base_folder, tmp_path):
    folder, batch = base_folder(), example()
    items = [
        {
            "input_ids": ids,
            "labels": labels,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": batch["pixel_values"][row : row + 1],
        }
        for row, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"]))
    ]

    def run(output, resume=None, **overrides):
        model = add_lora(AutoModelForCausalLM.from_pretrained(folder))
        settings = quiet(
            learning_rate=1e-2,
            max_steps=4,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=2,
            **overrides,
        )
        trainer = DualTokenTrainer(
            model=model,
            args=TrainingArguments(output_dir=str(output), **settings),
            train_dataset=FixedItems(items),
            data_collator=lambda rows: {
                **{name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "pixel_values"},
                "pixel_values": torch.cat([row["pixel_values"] for row in rows]),
            },
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    trainer = run(tmp_path / "whole")
    logs = [log for log in trainer.state.log_history if "text_loss" in log]
    assert all(logs[-1][name] < logs[0][name] for name in ("loss", "text_loss", "pixel_loss", "semantic_loss"))
    saved = {path.name for path in (tmp_path / "whole" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved

    resumed = run(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert not changed(state_of(trainer.model), state_of(resumed.model))
    assert_same(answers(trainer.model), answers(AutoPeftModelForCausalLM.from_pretrained(_save(trainer, tmp_path))), 0)


def _save(trainer, tmp_path):
    trainer.save_model(tmp_path / "saved")
    return tmp_path / "saved"


# Loading and merging.


# Of tied embeddings PEFT must tie what is trained again; the tests of the trainer and of merging have untied ones.
@pytest.mark.parametrize(
    ("parts", "tied"), [(DEFAULT_TRAINED_IN_FULL, True), (("embeddings",), True), (("embeddings",), False)]
)
def test_every_way_of_loading_gives_the_same_answers(base_folder, tmp_path, parts, tied):
    folder, adapter = base_folder(tie_word_embeddings=tied), tmp_path / "adapter"
    model = adapted(folder, train_in_full=parts)
    model.save_pretrained(adapter)
    expected = answers(model)
    assert_same(expected, answers(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter)), 0)
    assert_same(expected, answers(AutoPeftModelForCausalLM.from_pretrained(adapter)), 0)
    assert_same(expected, answers(AutoModelForCausalLM.from_pretrained(adapter)), 0)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.load_adapter(str(adapter))
    assert_same(expected, answers(loaded), 0)

    merged = model.merge_and_unload()
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == tied
    assert type(merged) is DualTokenForCausalLM and not [n for n, _ in merged.named_modules() if "lora" in n]
    assert_same(expected, answers(merged))
    merged.save_pretrained(tmp_path / "merged")
    assert set(merged.state_dict()) == set(AutoModelForCausalLM.from_pretrained(folder).state_dict())
    assert_same(expected, answers(DualTokenForCausalLM.from_pretrained(tmp_path / "merged")))


def test_adapter_holds_no_weights_of_the_base_model(base_folder, tmp_path):
    folder, adapter = base_folder(), tmp_path / "adapter"
    model = adapted(folder, train_in_full=())
    model.save_pretrained(adapter)
    trained, _ = model.get_nb_trainable_parameters()
    size = (adapter / "adapter_model.safetensors").stat().st_size
    assert 4 * trained < size < 4 * trained + 10_000  # the file's header


def test_merge_command(base_folder, tmp_path, capsys):
    folder, adapter, output = base_folder(), tmp_path / "adapter", tmp_path / "merged"
    build_tiny_processor().save_pretrained(folder)
    model = adapted(folder)
    model.save_pretrained(adapter)
    assert cli(["merge", str(adapter), str(output)]) == 0
    assert "Wrote" in capsys.readouterr().out
    assert_same(answers(model), answers(DualTokenForCausalLM.from_pretrained(output)))
    AutoProcessor.from_pretrained(output)
    assert cli(["merge", str(adapter), str(output)]) == 1
    assert "is not empty" in capsys.readouterr().err

    half = merge_adapter(adapter, tmp_path / "half", dtype=torch.bfloat16)
    assert (
        half.dtype == torch.bfloat16
        and half.vision_tokenizer.pixel_quantizer.codebook.embeddings.dtype == torch.float32
    )
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="names no base model"):
        merge_adapter(adapter, tmp_path / "other")


def test_merging_rounds_once(base_folder, tmp_path):
    """Into a bfloat16 model, the float32 sum rounded, and not a sum of rounded terms."""
    folder = base_folder()
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    model = add_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    exact = model.merge_and_unload().to(torch.bfloat16)
    assert merged.dtype == torch.bfloat16
    assert not changed(state_of(exact), state_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")))


# Quantised loading.


def test_quantised_loading_refuses_what_does_not_exist():
    with pytest.raises(ValueError, match="4 or 8 bits of bitsandbytes, or 8 of torchao, got 4 of 'torchao'"):
        low_bit_config(4, "torchao")


def test_a_missing_library_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setattr("transformers_dualtoken.training.unified.low_bit.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match=r"needs bitsandbytes: pip install 'transformers-dualtoken\[quantization\]'"):
        low_bit_config(4)


@pytest.mark.parametrize("skipped", [None, ["lm_head"], ["model.language_model.layers.0"]])
@pytest.mark.parametrize("of_base", [False, True])
def test_a_plain_quantization_config_reaches_the_language_model_alone(skipped, of_base, monkeypatch):
    model = lively_unified_model()
    model_class, model = (DualTokenModel, model.model) if of_base else (DualTokenForCausalLM, model)
    given = {}
    monkeypatch.setattr(
        PreTrainedModel,
        "from_pretrained",
        classmethod(lambda cls, *args, **kwargs: given.update(kwargs) or (model, {"missing_keys": []})),
    )
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    fields = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": skipped}
    for config in (BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped), QuantoConfig(), fields):
        model_class.from_pretrained("folder", quantization_config=config)
        result = given["quantization_config"]
        patterns = getattr(result, "llm_int8_skip_modules", None) or result.modules_to_not_convert
        expected = {name for name in linear if "language_model.layers." in name}
        if skipped and not isinstance(result, QuantoConfig):
            expected = {name for name in expected if not name.startswith(skipped[0])}
        assert {name for name in linear if should_convert_module(name, patterns)} == expected
        assert result is not config
    assert fields["llm_int8_skip_modules"] == skipped


def test_quantisation_is_refused_where_the_weights_are_needed(monkeypatch):
    model = lively_unified_model()
    with pytest.raises(ValueError, match="The vision tokenizer is not quantised"):
        DualTokenVisionTokenizer.from_pretrained("folder", quantization_config=QuantoConfig())
    language_model = Qwen2ForCausalLM(model.config.text_config)
    language_model.is_quantized = True
    with pytest.raises(ValueError, match="language model is quantised.*load it with a `quantization_config`"):
        DualTokenForCausalLM.from_pretrained_parts(model.vision_tokenizer, language_model)


@pytest.mark.parametrize("field", ["load_in_4bit", "load_in_8bit"])
def test_a_plain_bitsandbytes_config_draws_answers_and_trains(field, tmp_path):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    text_config = {**tiny_unified_config().text_config.to_dict(), "hidden_size": 64, "intermediate_size": 128}
    lively_unified_model(text_config=text_config).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**{field: True})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    # bitsandbytes packs weights for inference on a CPU at the first call, and cannot train on them any more.
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
    losses = train(adapted)
    assert losses[-1] < losses[0]
    answered = answers(AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config))
    assert answered["codes"].shape == (2, 1, 3, 3, 3) and answered["images"].isfinite().all()


def stored(weight: torch.Tensor) -> torch.Tensor:
    """The integers of a quantised weight; torchao's type knows no comparison."""
    return getattr(weight, "qdata", weight)


@pytest.mark.parametrize(("bits", "library"), [(4, "bitsandbytes"), (8, "bitsandbytes"), (8, "torchao")])
def test_quantised_loading_and_training(bits, library, tmp_path):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    # Blocks of 64 weights share a scale.
    text_config = {**tiny_unified_config().text_config.to_dict(), "hidden_size": 64, "intermediate_size": 128}
    full = lively_unified_model(text_config=text_config)
    full.save_pretrained(tmp_path / "base")
    model = load_quantized(tmp_path / "base", bits=bits, library=library)
    whole = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module.weight) is nn.Parameter
    }
    linear = {name for name, module in full.named_modules() if isinstance(module, nn.Linear)}
    assert linear - whole == {name for name in linear if "language_model.layers." in name}
    floats = {parameter.dtype for name, parameter in model.named_parameters() if "language_model.layers" not in name}
    assert floats == {torch.bfloat16}
    assert model.vision_tokenizer.pixel_quantizer.codebook.embeddings.dtype == torch.float32
    inputs = {name: value for name, value in example().items() if name != "labels"}
    states = [m.eval()(**inputs).last_hidden_state.float().flatten() for m in (model, full)]
    assert torch.corrcoef(torch.stack(states))[0, 1] > 0.8

    model = add_lora(model)
    blocks = {name: stored(value) for name, value in state_of(model).items() if "base_layer" in name}
    with torch.autocast("cpu", torch.bfloat16):
        losses = train(model)
    assert losses[-1] < losses[0]
    assert not changed(blocks, {name: stored(value) for name, value in model.state_dict().items() if name in blocks})
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        load_quantized(tmp_path / "base", bits=bits, library=library), tmp_path / "adapter"
    )
    torch.testing.assert_close(again.eval()(**inputs).logits, model(**inputs).logits, atol=0.1, rtol=0.1)
    assert answers(model)["codes"].shape == (2, 1, 3, 3, 3)
