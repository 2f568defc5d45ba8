"""`dualtoken convert` and `dualtoken merge` on files that are cut, foreign or odd: one sentence, and nothing written."""

import json
import os
import shutil

import pytest
import torch
from official_format import decoder_fields, quantizer_fields, write_golden_folder
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_models import lively_unified_model

from transformers_dualtoken import DualTokenVisionTokenizer
from transformers_dualtoken.checkpoints import new_folder
from transformers_dualtoken.cli import main
from transformers_dualtoken.convert import is_official_folder, load_official_tokenizer
from transformers_dualtoken.training.unified.adapters import add_lora


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    write_golden_folder(folder)
    return folder


@pytest.fixture
def folder(golden, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return shutil.copytree(golden, tmp_path / "official")


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs the command on a folder, which it must refuse in one line; returns the line."""

    def run(folder):
        output = tmp_path / "new" / "output"
        assert main(["convert", str(folder), str(output)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("dualtoken: ") and error.count("\n") == 1 and len(error) < 4100, error
        assert not output.parent.exists()
        return error

    return run


def change_config(folder, part, key, value):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (config["rqvaesiglip"][part] if part else config["rqvaesiglip"])[key] = value
    path.write_text(json.dumps(config))


def change_weights(folder, change):
    (path,) = folder.glob("*.pt")
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint["state_dict"])
    torch.save(checkpoint, path)


# --- configurations ---

INFINITY = float("inf")


@pytest.mark.parametrize(
    "part, key, value, message",
    [
        ("", "layer_recon", "2", "`rqvaesiglip.layer_recon` must be an integer from 1 to 1024, got '2'"),
        ("", "layer_sem", True, "`rqvaesiglip.layer_sem` must be an integer"),
        ("", "layer_sem", 99, "`layer_sem` must lie between 1 and 4, the number of layers of the vision encoder"),
        ("", "layer_shortcut", -1, "`rqvaesiglip.layer_shortcut` must be"),
        ("", "weight_shortcut", float("nan"), "`rqvaesiglip.weight_shortcut` must be a number"),
        ("", "decoder_latent_shape", [], "`rqvaesiglip.decoder_latent_shape` must be a list of 2 items, got []"),
        ("", "decoder_latent_shape", "12", "`rqvaesiglip.decoder_latent_shape` must be a list"),
        ("", "pretrained_model", ["siglip"], "`rqvaesiglip.pretrained_model` must be a folder or Hub id"),
        ("", "pretrained_model", "a\nb", "`rqvaesiglip.pretrained_model` must be a folder or Hub id"),
        ("", "pretrained_model", "a" * 5000, "must be a folder or Hub id, got 'aaa"),
        ("", "ddconfig", [1], "'ddconfig' must be an object, got [1]"),
        ("", "vq_sem", "rq", "'vq_sem' must be an object, got 'rq'"),
        ("ddconfig", "ch_mult", [], "`ddconfig.ch_mult` must be a list of 1 to 16 items, got []"),
        ("ddconfig", "ch_mult", [1, 0.5], "`ddconfig.ch_mult[1]` must be an integer"),
        ("ddconfig", "ch", 2**31 - 1, "`ddconfig.ch * ddconfig.ch_mult[1]` must be"),
        ("ddconfig", "ch", INFINITY, "`ddconfig.ch` must be an integer"),
        ("ddconfig", "attn_resolutions", 12, "`ddconfig.attn_resolutions` must be a list"),
        ("ddconfig", "resolution", 0, "`ddconfig.resolution` must be"),
        ("ddconfig", "num_res_blocks", -1, "`ddconfig.num_res_blocks` must be"),
        ("vq_pix", "code_shape", [], "`vq_pix.code_shape` must be a list of 3 items, got []"),
        ("vq_pix", "code_shape", [3, 3, 0], "`vq_pix.code_shape[2]` must be"),
        ("vq_pix", "n_embed", [], "`vq_pix.n_embed` must be the same at every depth"),
        ("vq_sem", "decay", 1.5, "`vq_sem.decay` must be a number"),
        ("vq_sem", "embed_dim", 7, "vq_sem.embed_dim (7)"),
        ("vq_sem", "shared_codebook", "yes", "`vq_sem.shared_codebook` must be True or False"),
    ],
)
def test_odd_values_in_the_configuration(folder, refused, part, key, value, message):
    if (key, value) == ("ch", 2**31 - 1):
        change_config(folder, part, "ch_mult", [1, 2])
    change_config(folder, part, key, value)
    error = refused(folder)
    assert message in error and str(folder / "config.json") in error


@pytest.mark.parametrize("content", [b"", b'{"rqvaesiglip": ', b"\xff\xfe", b"[1]", b"[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "siglip/config.json"])
def test_configuration_that_is_no_json_object(folder, refused, name, content):
    (folder / name).write_bytes(content)
    error = refused(folder)
    assert str(folder / name) in error and "JSON" in error
    if name == "config.json":
        with pytest.raises(ValueError, match="JSON"):
            is_official_folder(folder)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_type": "clip"}, "of type 'clip'"),
        ({"vision_config": [1]}, "`vision_config` must be"),
        ({"vision_config": {"patch_size": 0}}, "`vision_config.patch_size` must be"),
        ({"text_config": {"hidden_size": "x"}}, "hidden_size"),
        ({"vision_config": {"image_size": "a" * 5000}}, "'image_size'"),
    ],
)
def test_siglip_configuration_of_another_kind(folder, refused, fields, message):
    (folder / "siglip" / "config.json").write_text(json.dumps(fields))
    error = refused(folder)
    assert message in error and str(folder / "siglip" / "config.json") in error


def test_what_any_configuration_may_hold_is_not_read(folder):
    path = folder / "siglip" / "config.json"
    fields = json.loads(path.read_text())
    fields["vision_config"] |= {
        "quantization_config": 1,
        "id2label": "x",
        "dtype": [1],
        "to_dict": 1,
        "sub_configs": 1,
    }
    path.write_text(json.dumps(fields))
    assert load_official_tokenizer(folder).config.vision_config.num_labels == 2


def test_siglip_checkpoint_that_is_not_there(folder, refused):
    shutil.rmtree(folder / "siglip")
    change_config(folder, "", "pretrained_model", "/other/machine/siglip")
    error = refused(folder)
    assert "pretrained_model" in error
    assert f"There is no folder '/other/machine/siglip' (working directory: {os.getcwd()})" in error


# --- checkpoints ---


class Hostile:
    def __reduce__(self):
        return os.system, ("exit 1",)


KEY = "decoder.conv_out.bias"


@pytest.mark.parametrize(
    "value, message",
    [
        (torch.ones(3, dtype=torch.int64), "must be a dense tensor of real numbers, got torch.int64"),
        (torch.ones(3, dtype=torch.complex64), "got torch.complex64"),
        (torch.ones(3).to_sparse(), "got torch.float32, torch.sparse_coo"),
        (torch.nested.nested_tensor([torch.ones(3)]), "must be a dense tensor"),
        (torch.ones(3, device="meta"), "fewer values in the file"),
        (torch.ones(1).expand(3), "fewer values in the file"),
        (torch.tensor([0, float("nan"), 0]), "has values that are not finite"),
        (torch.tensor([0, 1e300, 0], dtype=torch.float64), "has values that are not finite"),
        ([0.0, 0.0, 0.0], "is of type list, not a tensor"),
    ],
)
def test_values_that_are_no_weights(folder, refused, value, message):
    change_weights(folder, lambda state: state.update({KEY: value, 7: torch.ones(1)}))
    error = refused(folder)
    assert f"'{KEY}' " in error and message in error and "the key 7 is not a string" in error


def test_one_copy_of_a_shared_codebook_in_another_dtype(folder):
    """As a checkpoint is that was made small: equal values are the same codebook."""
    key = "quantizer_pix.codebooks.1.weight"
    change_weights(folder, lambda state: state.update({key: state[key].to(torch.float8_e4m3fn)}))
    load_official_tokenizer(folder)


def test_checkpoints_that_are_cut_or_hostile(folder, refused):
    (path,) = folder.glob("*.pt")
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert f"{path}, which must be a whole torch checkpoint" in refused(folder)
    torch.save({"state_dict": Hostile()}, path)
    assert "it asks for posix.system" in refused(folder)
    for state_dict in ([1], None, "x"):
        torch.save({"state_dict": state_dict}, path)
        assert f"{path}: 'state_dict' must be a dict" in refused(folder)
    path.unlink()
    path.mkdir()
    assert f"{path} is not a file" in refused(folder)


def test_sizes_are_compared_with_the_file_before_memory_is_taken(folder, monkeypatch):
    """A model of these sizes would take terabytes; with 2 ** 31 codes its bytes are more than 64 bits count."""
    for size in (2**25, 2**31 - 1):
        change_config(folder, "", "vq_pix", quantizer_fields(n_embed=size, embed_dim=32, shared_codebook=False))
        change_config(folder, "", "ddconfig", decoder_fields(ch=2**20, ch_mult=[1, 1], decoder_in_channels=2**20))
        with pytest.raises(ValueError, match="instead of|can have these sizes"):
            load_official_tokenizer(folder)


# --- output ---


def test_where_output_cannot_be_written(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    outputs = {
        tmp_path / "file": "is a file",
        tmp_path / "file" / "x": "cannot be written",
        folder: "is not empty",
        folder / "inside": "lies in",
    }
    for output, message in outputs.items():
        assert main(["convert", str(folder), str(output)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error and str(output) in error
    assert (tmp_path / "file").read_text() == "kept" and not (folder / "inside").exists()


@pytest.mark.parametrize(
    "raised, status, message",
    [
        (SafetensorError("I/O error: No space left on device"), 1, "cannot be written: I/O error: No space"),
        (OSError(28, "No space left on device"), 1, "cannot be written: [Errno 28]"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError("x"), 1, "the memory of this machine does not suffice"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "the memory of this machine does not suffice"),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_write_leaves_nothing(folder, tmp_path, monkeypatch, capsys, raised, status, message, exists):
    def fails(self, path, **kwargs):
        (path / "config.json").write_text("{}")
        raise raised

    monkeypatch.setattr(DualTokenVisionTokenizer, "save_pretrained", fails)
    output = tmp_path / "output"
    if exists:
        output.mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert main(["convert", str(folder), str(output)]) == status
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_fault_of_this_package_keeps_its_traceback(folder, tmp_path, monkeypatch):
    def fails(self, path, **kwargs):
        raise RuntimeError("a fault")

    monkeypatch.setattr(DualTokenVisionTokenizer, "save_pretrained", fails)
    with pytest.raises(RuntimeError, match="a fault"):
        main(["convert", str(folder), str(tmp_path / "output")])


def test_an_empty_folder_is_filled_in_its_place(folder, tmp_path, monkeypatch):
    output = tmp_path / "empty"
    output.mkdir()
    inode = output.stat().st_ino
    monkeypatch.chdir(output)
    assert main(["convert", str(folder), "."]) == 0
    assert output.stat().st_ino == inode and {"config.json", "model.safetensors"} <= set(os.listdir(output))


def test_a_new_folder_has_the_usual_permissions(tmp_path):
    with new_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("x")
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "a" / "b").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert os.listdir(tmp_path / "a") == ["b"] and os.listdir(tmp_path / "a" / "b") == ["file"]


# --- merge ---


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    model = lively_unified_model()
    model.save_pretrained(folder / "base")
    add_lora(model).save_pretrained(folder / "adapter")
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


def change_json(**values):
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensor(part, change):
    def write(path):
        tensors = load_file(path)
        key = next(key for key in sorted(tensors) if part in key)
        value = change(tensors.pop(key))
        save_file(tensors if value is None else {**tensors, key: value}, path, metadata={"format": "pt"})

    return write


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("adapter/adapter_config.json", cut, "adapter_config.json is not JSON"),
        ("adapter/adapter_config.json", lambda path: path.write_text("[]"), "must hold a JSON object, got list"),
        ("adapter/adapter_config.json", change_json(base_model_name_or_path=7), "names no base model"),
        ("adapter/adapter_config.json", change_json(peft_type="x"), "The adapter's configuration"),
        ("adapter/adapter_model.safetensors", cut, "SafetensorError"),
        ("adapter/adapter_model.safetensors", os.remove, "holds no adapter_model.safetensors"),
        ("adapter/adapter_model.safetensors", change_tensor("lora_A", lambda tensor: None), "missing adapter keys"),
        ("adapter/adapter_model.safetensors", change_tensor("lora_A", lambda tensor: tensor[:1].clone()), "size mismatch"),
        ("adapter/adapter_model.safetensors", change_tensor("lora_A", lambda tensor: tensor / 0), "not finite"),
        ("adapter/adapter_model.safetensors", change_tensor("visual_projector", lambda tensor: tensor / 0), "not finite"),
        ("base/config.json", lambda path: path.write_text("[]"), "must hold a JSON object, got list"),
        ("base/config.json", change_json(vision_tokenizer_config={"vision_config": {"hidden_act": 3.5}}), "hidden_act"),
        ("base/generation_config.json", cut, "generation_config.json is not JSON"),
        ("base/model.safetensors", cut, "is damaged"),
        ("base/model.safetensors", change_tensor("proj.bias", lambda tensor: tensor[:1].clone()), "of other shapes"),
    ],
)  # fmt: skip
def test_merge_of_damaged_files(parts, tmp_path, capsys, name, change, message):
    folder = shutil.copytree(parts, tmp_path / "parts")
    change_json(base_model_name_or_path=str(folder / "base"))(folder / "adapter" / "adapter_config.json")
    change(folder / name)
    assert main(["merge", str(folder / "adapter"), str(tmp_path / "new" / "output")]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dualtoken: ")]
    assert len(errors) == 1 and message in errors[0] and str(folder) in errors[0], errors
    assert not (tmp_path / "new").exists()
