"""`from_pretrained` on checkpoints that are not there, of another kind, or not whole."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_unified_config
from transformers import AutoModel, Qwen2Config, Qwen2ForCausalLM

from transformers_dualtoken import (
    DualTokenConfig,
    DualTokenForCausalLM,
    DualTokenModel,
    DualTokenVisionTokenizer,
    DualTokenVisionTokenizerConfig,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of every kind."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("checkpoints")
    model = DualTokenForCausalLM(tiny_unified_config())
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    parts = {
        "unified": model,
        "without_heads": model.model,
        "tokenizer": model.vision_tokenizer,
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**tiny, num_key_value_heads=1, vocab_size=32)),
    }
    for name, part in parts.items():
        part.save_pretrained(root / name)
    (root / "empty").mkdir()
    return {path.name: path for path in root.iterdir()}


def copy_of(folder: Path, target: Path, change) -> Path:
    """A checkpoint with its tensors changed by `change(tensors)`."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("whole", ["unified", "without_heads"])
def test_the_tokenizer_of_a_unified_model(folders, whole, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("transformers.Qwen2Model.__init__", None)
    part = DualTokenVisionTokenizer.from_pretrained(folders[whole])
    expected = DualTokenVisionTokenizer.from_pretrained(folders["tokenizer"])
    assert type(part.config) is DualTokenVisionTokenizerConfig
    assert not caplog.records
    # And it is saved as a tokenizer.
    part.save_pretrained(tmp_path)
    for tensors in (part.state_dict(), AutoModel.from_pretrained(tmp_path).state_dict()):
        assert tensors.keys() == expected.state_dict().keys()
        assert all(torch.equal(tensors[key], value) for key, value in expected.state_dict().items())


def test_base_model_of_a_whole_one(folders):
    base, whole = (
        DualTokenModel.from_pretrained(folders["unified"]),
        DualTokenForCausalLM.from_pretrained(folders["unified"]),
    )
    for key, value in base.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[key])


@pytest.mark.parametrize("loader", [DualTokenForCausalLM, DualTokenModel, DualTokenVisionTokenizer])
def test_tensors_too_many(folders, loader, tmp_path):
    """A part's list of what it leaves aside once hid them, of the whole and of its other parts."""
    surplus = {
        DualTokenForCausalLM: {"depth_heads.layers.9.weight", "lm_head.scale", "model.language_model.layers.9.weight"},
        DualTokenModel: {"model.language_model.layers.9.weight", "model.vision_tokenizer.extra"},
        DualTokenVisionTokenizer: {"model.vision_tokenizer.extra"},
    }[loader]
    folder = copy_of(
        folders["unified"], tmp_path / "more", lambda t: t.update({key: torch.ones(2) for key in surplus})
    )
    unexpected = loader.from_pretrained(folder, output_loading_info=True)[1]["unexpected_keys"]
    prefix = "model.vision_tokenizer." if loader is DualTokenVisionTokenizer else ""
    assert set(unexpected) == {key.removeprefix(prefix) for key in surplus}


def test_what_other_engines_leave_out(folders):
    """vLLM builds the model without heads, brings a text head itself, and loads nothing that these patterns match."""
    patterns = AutoModel.from_pretrained(folders["unified"])._keys_to_ignore_on_load_unexpected
    names = DualTokenForCausalLM.from_pretrained(folders["unified"]).state_dict()
    left_out = {name for name in names if any(re.search(pattern, name) for pattern in patterns)}
    assert left_out == {name for name in names if name.startswith("depth_heads.")}


@pytest.mark.parametrize(
    ("loader", "folder", "message"),
    [
        (
            DualTokenForCausalLM,
            "tokenizer",
            "type 'dualtoken_vision_tokenizer': load it with DualTokenVisionTokenizer, or",
        ),
        (DualTokenModel, "tokenizer", "from_pretrained_parts"),
        (DualTokenConfig, "tokenizer", "type 'dualtoken_vision_tokenizer'"),
        (DualTokenForCausalLM, "qwen2", "type 'qwen2': a causal language model is joined"),
        (DualTokenVisionTokenizer, "qwen2", "type 'qwen2'"),
        (DualTokenVisionTokenizerConfig, "qwen2", "type 'qwen2'"),
        (
            DualTokenForCausalLM,
            "without_heads",
            "lacks .* weights of DualTokenForCausalLM, which would be random: depth_heads",
        ),
    ],
)
def test_of_another_kind(folders, loader, folder, message):
    with pytest.raises(ValueError, match=message):
        loader.from_pretrained(folders[folder])


def test_siglip_is_where_a_tokenizer_starts(siglip_folder):
    with pytest.raises(ValueError, match="from_siglip_pretrained"):
        DualTokenVisionTokenizer.from_pretrained(siglip_folder)


def test_authors_format(folders, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"rqvaesiglip": {}}))
    for loader in (DualTokenVisionTokenizer, DualTokenForCausalLM):
        with pytest.raises(ValueError, match="load_official_tokenizer"):
            loader.from_pretrained(tmp_path)


@pytest.mark.parametrize("loader", [DualTokenForCausalLM, DualTokenVisionTokenizer])
class TestNotThere:
    @pytest.mark.parametrize("name", ["./no-such", "/no/such/folder", "a/b/c", "no-such/"])
    def test_path(self, loader, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(
            FileNotFoundError, match=f"There is no folder '{name}' \\(working directory: {tmp_path}\\)"
        ):
            loader.from_pretrained(name)

    @pytest.mark.parametrize("name", ["no-such", "owner/no-such"])
    def test_path_or_hub_id(self, loader, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(
            FileNotFoundError, match=f"no folder '{name}' in the working directory {tmp_path}, and the Hub"
        ):
            loader.from_pretrained(name)

    def test_empty_folder(self, loader, folders):
        with pytest.raises(FileNotFoundError, match="holds no checkpoint: it has no config.json"):
            loader.from_pretrained(folders["empty"])


def test_language_model_that_is_not_there(folders):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        DualTokenForCausalLM.from_pretrained_parts(str(folders["tokenizer"]), "./no-such")


class TestNotWhole:
    def test_missing(self, folders, tmp_path):
        def drop(tensors):
            del tensors[
                "visual_projector.linear_1.weight"
                if "visual_projector.linear_1.weight" in tensors
                else "model.visual_projector.linear_1.weight"
            ]

        folder = copy_of(folders["unified"], tmp_path / "copy", drop)
        with pytest.raises(ValueError, match="lacks 1 of the weights .*visual_projector.linear_1.weight"):
            DualTokenForCausalLM.from_pretrained(folder)
        # Whoever asks what is missing goes on.
        _, info = DualTokenForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert info["missing_keys"] == {"model.visual_projector.linear_1.weight"}
        # No part of the tokenizer.
        DualTokenVisionTokenizer.from_pretrained(folder)

    def test_misshapen(self, folders, tmp_path):
        def cut(tensors):
            tensors["pixel_up_proj.proj.bias"] = tensors["pixel_up_proj.proj.bias"][:-1].clone()

        folder = copy_of(folders["tokenizer"], tmp_path / "copy", cut)
        with pytest.raises(ValueError, match="weights of other shapes than its configuration"):
            DualTokenVisionTokenizer.from_pretrained(folder)

    def test_codes_that_are_no_numbers(self, folders, tmp_path):
        def break_code(tensors):
            tensors["semantic_quantizer.codebook.embeddings"][0, 3] = float("nan")

        folder = copy_of(folders["tokenizer"], tmp_path / "copy", break_code)
        with pytest.raises(
            ValueError, match="semantic_quantizer.codebook.embeddings holds values that are not finite"
        ):
            DualTokenVisionTokenizer.from_pretrained(folder)
