"""What transformers' common suites found: attention dispatch, recorded outputs, plans; in small tests of our own."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_tokenizer_config, tiny_unified_config
from transformers import PreTrainedModel, Qwen2ForCausalLM, StaticCache

import transformers_dualtoken
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
    assert {Path(file).name for file in files} >= {"sharding.py", "generation.py", "quantization.py"}
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
