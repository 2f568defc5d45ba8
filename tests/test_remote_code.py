"""A checkpoint with its code beside it, in a process that cannot import the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_tokenizer_config, tiny_unified_config
from training_helpers import build_tiny_processor
from transformers import AutoModelForMultimodalLM, AutoProcessor
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

import transformers_dualtoken
from transformers_dualtoken import (
    DualTokenConfig,
    DualTokenForCausalLM,
    DualTokenImageProcessorPil,
    DualTokenVisionTokenizer,
    DualTokenVisionTokenizerProcessor,
    save_remote_code,
)
from transformers_dualtoken.remote_code import carry_code


KEPT = Path(__file__).parents[1] / "examples" / "digits" / "checkpoint" / "dualtoken"

ASK_AND_DRAW = """
import sys
sys.modules["transformers_dualtoken"] = None  # an import of it fails
import torch
from PIL import Image
from transformers import AutoModelForMultimodalLM, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

folder, saved = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert type(model).__name__ in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values()


def inputs(*parts, **kwargs):
    return processor.apply_chat_template(
        [{"role": "user", "content": list(parts)}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **kwargs,
    )


drawing = inputs({"type": "text", "text": "Draw a three."}, generate_image=True)
output = model.generate(**drawing, generation_mode="image", generator=torch.Generator().manual_seed(0))
image = processor.post_process_images(model.decode_images(output))[0]
question = inputs({"type": "image", "image": image}, {"type": "text", "text": "Which digit is this?"})
ids = model.generate(**question, max_new_tokens=10)[0, question["input_ids"].shape[1] :]
print("ANSWER", processor.decode(ids, skip_special_tokens=True))
model.save_pretrained(saved)
processor.save_pretrained(saved)
"""


def test_auto_map_and_files(tmp_path):
    model = DualTokenForCausalLM(tiny_unified_config())
    assert model.config.auto_map == {}
    model.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    files = save_remote_code(tmp_path)
    assert {"modeling_dualtoken.py", "processing_dualtoken.py", "image_reading.py"} <= set(files)
    assert sorted(path.name for path in tmp_path.glob("*.py")) == files
    config = DualTokenConfig.from_pretrained(tmp_path)
    for auto_class, name in config.auto_map.items():
        file, _, class_name = name.partition(".")
        assert f"class {class_name}(" in (tmp_path / f"{file}.py").read_text(), auto_class
        # All that transformers 5.6 copies to where it imports them from.
        needed = {Path(path).stem for path in get_relative_import_files(tmp_path / f"{file}.py")}
        assert set(get_relative_imports(tmp_path / f"{file}.py")) == needed, auto_class
    # Saved again, here or by anybody who has the package, it stays so.
    DualTokenForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").glob("*.py")) == files
    # Where the package is imported, its classes are what loads; asking for remote code changes nothing.
    assert type(AutoModelForMultimodalLM.from_pretrained(tmp_path)) is DualTokenForCausalLM
    assert type(AutoModelForMultimodalLM.from_pretrained(tmp_path, trust_remote_code=True)) is DualTokenForCausalLM


def test_a_tokenizer_and_what_is_none(tmp_path):
    DualTokenVisionTokenizer(tiny_tokenizer_config()).save_pretrained(tmp_path / "tokenizer")
    files = save_remote_code(tmp_path / "tokenizer")
    assert "modeling_vision_tokenizer.py" in files and "modeling_dualtoken.py" not in files
    with pytest.raises(FileNotFoundError, match="^The folder '.*' holds no saved checkpoint: it has no config.json"):
        save_remote_code(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model type 'bert'"):
        save_remote_code(tmp_path)


def test_trl_loads_a_checkpoint_by_its_path(tmp_path):
    """It asks every config that it does not know for `auto_map`."""
    utils = pytest.importorskip("trl.trainer.utils")
    DualTokenForCausalLM(tiny_unified_config()).save_pretrained(tmp_path)
    model = utils.create_model_from_path(str(tmp_path), dtype="float32")
    assert type(model) is DualTokenForCausalLM


@pytest.mark.parametrize("kind", ["unified", "tokenizer"])
def test_what_carries_its_code_is_saved_with_it(tmp_path, kind):
    """As models are that the examples train: the folders are the same as those that `save_remote_code` makes."""
    if kind == "unified":
        model, processor = DualTokenForCausalLM(tiny_unified_config()), build_tiny_processor()
    else:
        model = DualTokenVisionTokenizer(tiny_tokenizer_config())
        processor = DualTokenVisionTokenizerProcessor(DualTokenImageProcessorPil(), build_tiny_processor().tokenizer)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "after")
    files = save_remote_code(tmp_path / "after")
    carry_code(model, processor)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "carried")
    assert sorted(path.name for path in (tmp_path / "carried").glob("*.py")) == files
    for name in [*files, "config.json", "processor_config.json"]:
        assert (tmp_path / "carried" / name).read_text() == (tmp_path / "after" / name).read_text(), name


@pytest.mark.slow
@pytest.mark.parametrize("by", ["save_remote_code", "carry_code"])
def test_without_the_package_it_answers_draws_and_saves_again(tmp_path, by):
    model, processor = AutoModelForMultimodalLM.from_pretrained(KEPT), AutoProcessor.from_pretrained(KEPT)
    if by == "carry_code":
        carry_code(model, processor)
    model.save_pretrained(tmp_path / "first")
    processor.save_pretrained(tmp_path / "first")
    if by == "save_remote_code":
        save_remote_code(tmp_path / "first")
    for folder, saved in (("first", "second"), ("second", "third")):
        environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / f"modules-{folder}"), "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        command = [sys.executable, "-c", ASK_AND_DRAW, str(tmp_path / folder), str(tmp_path / saved)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "ANSWER It is a three." in done.stdout, done.stdout
        assert (tmp_path / saved / "modeling_dualtoken.py").exists()
    assert Path(transformers_dualtoken.__file__).parent.name == "transformers_dualtoken"
