"""What transformers' common suites found: attention dispatch, recorded outputs, plans; in small tests of our own."""

import copy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_quantizer_fields, tiny_tokenizer_config, tiny_unified_config
from transformers import PreTrainedModel, Qwen2ForCausalLM, StaticCache

import transformers_dualtoken
from transformers_dualtoken import (
    DualTokenConfig,
    DualTokenDepthHeadConfig,
    DualTokenQuantizerConfig,
    DualTokenVisionTokenizerConfig,
)
from transformers_dualtoken.modeling_dualtoken import DualTokenForCausalLM
from transformers_dualtoken.modeling_vision_tokenizer import DualTokenVisionTokenizer


def attention_of(model) -> set:
    """The attention implementations of a model and all models within it."""
    return {part.config._attn_implementation for part in model.modules() if isinstance(part, PreTrainedModel)}


@pytest.mark.parametrize(
    ("model_class", "make_config"),
    [(DualTokenVisionTokenizer, tiny_tokenizer_config), (DualTokenForCausalLM, tiny_unified_config)],
)
def test_attention_implementation_reaches_every_part(model_class, make_config):
    model = model_class._from_config(make_config(), attn_implementation="eager")
    assert attention_of(model) == {"eager"}
    model.set_attn_implementation("sdpa")
    assert attention_of(model) == {"sdpa"}


def test_attention_implementation_of_one_tower():
    config = tiny_tokenizer_config()
    config._attn_implementation = {"text_config": "eager"}
    model = DualTokenVisionTokenizer(config)
    assert model.siglip.text_model.config._attn_implementation == "eager"
    assert model.siglip.vision_model.config._attn_implementation == "sdpa"


def test_eager_and_sdpa_agree():
    torch.manual_seed(0)
    eager = DualTokenVisionTokenizer._from_config(tiny_tokenizer_config(), attn_implementation="eager").eval()
    sdpa = copy.deepcopy(eager)
    sdpa.set_attn_implementation("sdpa")
    pixel_values, ids = torch.rand(2, 3, 24, 24), torch.randint(3, 64, (2, 8))
    torch.testing.assert_close(sdpa(pixel_values, ids).logits_per_image, eager(pixel_values, ids).logits_per_image)


def test_features_record_hidden_states_and_attentions():
    model = DualTokenVisionTokenizer._from_config(tiny_tokenizer_config(), attn_implementation="eager").eval()
    wanted = {"output_hidden_states": True, "output_attentions": True}
    image = model.get_image_features(torch.rand(2, 3, 24, 24), **wanted)
    assert [state.shape for state in image.hidden_states] == [(2, 9, 32)] * 5
    assert [weights.shape for weights in image.attentions] == [(2, 4, 9, 9)] * 4
    text = model.get_text_features(torch.randint(3, 64, (2, 8)), **wanted)
    assert len(text.hidden_states) == 2
    assert len(text.attentions) == 1
    assert isinstance(model.get_image_features(torch.rand(2, 3, 24, 24), return_dict=False), tuple)


def test_tied_text_head_has_a_tensor_parallel_plan():
    config = tiny_unified_config(tie_word_embeddings=True)
    assert DualTokenForCausalLM._tp_plan["lm_head"] == "colwise_gather_output"
    # transformers 5.6 forgets it, of its own models as well.
    expected = Qwen2ForCausalLM(config.text_config).tp_plan.get("lm_head")
    assert DualTokenForCausalLM(config).tp_plan.get("lm_head") == expected


def test_forward_with_a_static_cache_has_no_graph_break():
    """A condition on a static cache's length, a tensor, would break the graph."""
    model = DualTokenForCausalLM(tiny_unified_config()).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        logits, compiled_logits = (
            forward(input_ids=ids, past_key_values=StaticCache(model.config.text_config, max_cache_len=8)).logits
            for forward in (model, compiled)
        )
    torch.testing.assert_close(compiled_logits, logits)


def test_pre_shifted_labels_are_refused():
    model = DualTokenForCausalLM(tiny_unified_config())
    ids = torch.tensor([[1, 5, 6, 7]])
    with pytest.raises(ValueError, match="shift_labels"):
        model(input_ids=ids, labels=ids, shift_labels=ids)


def test_remote_code_needs_no_more_than_the_core():
    """transformers asks for every import of the files that a Hub repository would hold, outside of `try`."""
    from transformers.dynamic_module_utils import get_imports, get_relative_import_files

    package = Path(transformers_dualtoken.__file__).parent
    files = {str(package / "modeling_dualtoken.py"), str(package / "processing_dualtoken.py")}
    for file in list(files):
        files |= set(get_relative_import_files(file))
    assert {Path(file).name for file in files} >= {"sharding.py", "generation_dualtoken.py", "vector_quantization.py"}
    assert all(Path(file).parent == package for file in files)
    needed = {module for file in files for module in get_imports(file)} - set(sys.stdlib_module_names)
    assert needed <= {
        "PIL",
        "diffusers",
        "fsspec",  # huggingface_hub brings it along
        "huggingface_hub",
        "numpy",
        "safetensors",
        "tokenizers",  # transformers brings it along
        "torch",
        "torchvision",
        "transformers",
    }


# --- odd values of a config's fields ---

ODD = [
    None,
    True,
    0,
    -1,
    2.5,
    float("nan"),
    float("inf"),
    10**30,
    "3",
    "",
    [],
    {},
    [None],
    [True],
    b"x",
    {"a": 1},
    {1: 2},
]
CONFIGS = {
    "quantizer": (DualTokenQuantizerConfig, tiny_quantizer_fields),
    "tokenizer": (DualTokenVisionTokenizerConfig, lambda: tiny_tokenizer_config().to_dict()),
    "heads": (DualTokenDepthHeadConfig, lambda: tiny_unified_config().depth_head_config.to_dict()),
    "unified": (DualTokenConfig, lambda: tiny_unified_config().to_dict()),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_odd_values_of_config_fields(name):
    """Right, or one sentence: when a field is set, and at construction for what may be set."""
    config_class, fields = CONFIGS[name]
    given = {key: item for key, item in fields().items() if key != "model_type"}
    built = config_class(**given)

    def refused(field, value, take) -> bool:
        try:
            take()
        except (TypeError, ValueError) as error:
            assert "\n" not in str(error) and "`" in str(error), (field, value, error)
            return True
        assert value not in (10**30, "", float("inf")) and value == value, (field, value)
        return False

    for field in (*config_class._rules, *config_class.sub_configs):
        for value in ODD:
            if not refused(field, value, partial(setattr, built, field, value)):
                refused(field, value, partial(config_class, **{**given, field: value}))


@pytest.mark.parametrize("field, value", [("dtype", "3"), ("num_labels", None), ("hidden_size", "3")])
@pytest.mark.parametrize("part", ["text_config", "vision_config", None])
def test_odd_values_of_transformers_own_fields(part, field, value):
    """It raises an AttributeError of the first and a TypeError without a name of the second."""
    build = tiny_unified_config if part == "text_config" else tiny_tokenizer_config
    if part is None:
        build, given, name = tiny_unified_config, {field: value}, field
        if field == "hidden_size":
            build, given = DualTokenDepthHeadConfig, {field: value}
    else:
        given, name = {part: {field: value}}, f"{part}.{field}"
    with pytest.raises((TypeError, ValueError), match=f"^`{name}` (cannot|must) be .*{value}[^\n]*$"):
        build(**given)


def test_the_field_that_is_at_fault_is_named():
    """And not one that is refused only when it comes alone, as these layer types do."""
    fields = tiny_unified_config().text_config.to_dict()
    assert fields["layer_types"] == ["full_attention"] * 2
    with pytest.raises(TypeError, match="^`text_config.num_labels` cannot be None: "):
        tiny_unified_config(text_config={**fields, "num_labels": None})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"pad_token_id": -1}, "`text_config.pad_token_id` must be an integer from 0 to 59 or None, got -1"),
        ({"bos_token_id": 60}, "`text_config.bos_token_id` must be an integer from 0 to 59 or None, got 60"),
        ({"eos_token_id": [2, 60]}, "`text_config.eos_token_id` must be an integer from 0 to 59 or None, got 60"),
        ({"use_sliding_window": True, "sliding_window": -1}, "`text_config.sliding_window` must be an integer from 1"),
        ({"num_hidden_layers": 10**12}, "`text_config.num_hidden_layers` must be an integer from 1 to 1024"),
        ({"model_type": "qwen20"}, "`text_config.model_type` must be a model type of transformers, got 'qwen20'"),
    ],
)
def test_a_language_model_that_would_go_wrong_later_is_refused(fields, message):
    of_language_model = tiny_unified_config().text_config.to_dict()
    assert tiny_unified_config(text_config={**of_language_model, "eos_token_id": [2, 59], "pad_token_id": None})
    of_language_model.pop("layer_types")
    with pytest.raises(ValueError, match=message):
        tiny_unified_config(text_config={**of_language_model, **fields})


@pytest.mark.parametrize("field", ["ema_eps", "ema_decay"])
def test_a_quantizers_nan_is_refused(field):
    with pytest.raises(ValueError, match=f"`{field}` must be a number .*got nan"):
        DualTokenQuantizerConfig(**{field: float("nan")})


def test_misspelt_fields_of_parts_are_named_and_unknown_ones_kept():
    with pytest.raises(
        ValueError, match="`pixel_quantizer_config` has no field `num_depth`; did you mean `num_depths`"
    ):
        tiny_tokenizer_config(pixel_quantizer_config=tiny_quantizer_fields(num_depth=3))
    assert tiny_tokenizer_config(of_a_later_version=3).of_a_later_version == 3
    with pytest.raises(ValueError, match="`vision_config.hidden_size` must be an integer from 1 .*got 0"):
        tiny_tokenizer_config(vision_config={"hidden_size": 0})


@pytest.mark.parametrize(
    "config_class",
    [DualTokenConfig, DualTokenDepthHeadConfig, DualTokenQuantizerConfig, DualTokenVisionTokenizerConfig],
)
def test_every_field_of_a_config_is_documented(config_class):
    for name in config_class.__annotations__.keys() - {"model_type", "sub_configs", "keys_to_ignore_at_inference"}:
        assert f"\n    {name} (`" in config_class.__doc__, name
