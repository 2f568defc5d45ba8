"""The contrastive stage of tokenizer training: its loss, what moves, images with captions, ranks, and whole runs."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from data_helpers import first_epoch, flat, numbers, write_tar
from safetensors.torch import load_file
from tokenizer_training import caption_items, tokenizer_trainer
from training_helpers import (
    RUN,
    TOKENIZER_FIELDS,
    FixedItems,
    changed,
    check_finished,
    check_resume,
    check_sigterm,
    state_of,
    write_images,
)
from transformers import AutoTokenizer, SiglipModel

from transformers_dualtoken import (
    DualTokenImageProcessorPil,
    DualTokenVisionTokenizer,
    DualTokenVisionTokenizerProcessor,
)
from transformers_dualtoken.convert import load_vision_tokenizer
from transformers_dualtoken.data import DualTokenImageDataset, DualTokenImageStream, load_image_dataset
from transformers_dualtoken.evaluation.zero_shot import embed_texts
from transformers_dualtoken.recipe_files import parse_settings
from transformers_dualtoken.training import DualTokenVisionTokenizerRecipe, collate_images
from transformers_dualtoken.training.vision_tokenizer.contrastive import contrastive_loss


EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import run_tokenizer  # noqa: E402


# The loss


def naive_loss(images, texts, pairs, scale, bias, kind):
    """Pair by pair, as SigLIP's and CLIP's papers write it; `pairs[i][j]` says whether caption j is one of image i's."""
    count, total = len(images), 0.0
    logits = [[scale.exp() * image @ text for text in texts] for image in images]
    for i in range(count):
        own = [j for j in range(count) if pairs[i][j]]
        if kind == "sigmoid":
            for j in range(count):
                sign = 1 if j in own else -1
                total = total + torch.log1p(torch.exp(-sign * (logits[i][j] + bias)))
        else:
            for row in (logits[i], [logits[j][i] for j in range(count)]):
                total = total + (torch.stack(row).logsumexp(0) - sum(row[j] for j in own) / len(own)) / 2
    return total / count


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
@pytest.mark.parametrize("captions", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 1]], ids=["distinct", "some are equal"])
def test_loss_is_the_naive_one(kind, captions):
    torch.manual_seed(0)
    inputs = [F.normalize(torch.randn(5, 6).double(), dim=-1).requires_grad_() for _ in range(2)]
    inputs += [torch.tensor([value]).double().requires_grad_() for value in (1.2, -2.0)]
    input_ids = torch.tensor(captions)[:, None] + torch.arange(3)
    pairs = [[i == j for j in captions] for i in captions]
    loss, expected = (
        contrastive_loss(*inputs[:2], input_ids, *inputs[2:], kind),
        naive_loss(*inputs[:2], pairs, *inputs[2:], kind),
    )
    torch.testing.assert_close(loss, expected.squeeze())
    used = inputs if kind == "sigmoid" else inputs[:3]
    for one, other in zip(torch.autograd.grad(loss, used), torch.autograd.grad(expected, used)):
        torch.testing.assert_close(one, other)


def test_loss_is_that_of_transformers(siglip_folder):
    """SigLIP's own, of its image features in the place of ours."""
    model = SiglipModel.from_pretrained(siglip_folder)
    batch = collate_images(caption_items().items)
    with torch.no_grad():
        output = model(batch["input_ids"], batch["pixel_values"], return_loss=True)
        embeds = output.image_embeds, output.text_embeds
        loss = contrastive_loss(*embeds, batch["input_ids"], model.logit_scale, model.logit_bias)
    torch.testing.assert_close(loss, output.loss)


# What moves


@pytest.mark.parametrize("settings", [{}, {"bf16": True, "gradient_checkpointing": True}], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_pixel_codes_and_reconstructions_stay_bit_for_bit(siglip_folder, tmp_path, kind, settings):
    trainer = tokenizer_trainer(
        siglip_folder,
        tmp_path,
        dataset=caption_items(),
        stage="contrastive",
        recipe={"contrastive_loss": kind},
        learning_rate=0.02,
        weight_decay=0.1,
        max_steps=5,
        per_device_train_batch_size=4,
        **settings,
    )
    model, pixel_values = trainer.model, collate_images(caption_items(8).items)["pixel_values"]
    model.pixel_quantizer.codebook.embeddings.normal_()
    before = state_of(model)

    @torch.no_grad()
    def measure():
        # Not by calling the model, which the Trainer leaves with autocast.
        encoded = model.eval().encode(pixel_values)
        return encoded, model.decode(pixel_quantized=encoded.pixel_quantized).reconstruction

    first, image = measure()
    trainer.train()
    second, image_after = measure()
    assert torch.equal(first.pixel_codes, second.pixel_codes)
    assert torch.equal(first.pixel_quantized, second.pixel_quantized) and torch.equal(image, image_after)
    assert not torch.equal(first.semantic_codes, second.semantic_codes)
    still = ["siglip.text_model.", "siglip.vision_model.embeddings.", "pixel_", "shortcut_", "post_quantizer_block."]
    still += ["decoder.", *(f"siglip.vision_model.encoder.layers.{i}." for i in range(2))]  # the pixel layer is 2
    still += ["siglip.logit_bias"] if kind == "softmax" else []
    moved = changed(before, state_of(model))
    # Buffers of the semantic codebook included.
    assert moved == {name for name in before if not name.startswith(tuple(still)) and "position_ids" not in name}
    logs = trainer.state.log_history[0]
    assert logs["loss"] == pytest.approx(logs["contrastive"] + 5 * logs["semantic_commitment"], rel=1e-4)
    assert logs["logit_scale"] > 0 and "pixel_codebook_usage" not in logs


# The authors' layout of 2025.
OLDER = {
    "projection_type": "resnet",
    "semantic_projection": False,
    "shortcut_layer": None,
    "semantic_quantizer_config": {**TOKENIZER_FIELDS["semantic_quantizer_config"], "code_dim": 32},
}


@pytest.mark.parametrize("config", [{}, OLDER], ids=["paper", "2025"])
@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_every_trained_parameter_is_reached(siglip_folder, tmp_path, kind, config):
    """DDP is told so where there is gradient checkpointing, and would fail at the second step otherwise."""
    recipe = {"contrastive_loss": kind}
    trainer = tokenizer_trainer(siglip_folder, tmp_path, config=config, stage="contrastive", recipe=recipe)
    trainer.compute_loss(trainer.model.train(), collate_images(caption_items().items)).backward()
    for name, parameter in trainer.model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def colours(count, seed) -> tuple[list[dict], torch.LongTensor]:
    """Noisy pictures in four colours with captions of three ids, and the captions `(4, 8)`."""
    generator = torch.Generator().manual_seed(seed)
    captions = F.pad(torch.tensor([[3, 10 + colour, 20] for colour in range(4)]), (0, 5))
    tints = torch.tensor([[0.7, -0.5, -0.5], [-0.5, 0.7, -0.5], [-0.5, -0.5, 0.7], [0.5, 0.5, -0.7]])
    items = []
    for index in range(count):
        values = tints[index % 4, :, None, None] + 0.3 * torch.randn(3, 24, 24, generator=generator)
        items.append({"pixel_values": values.clamp(-1, 1), "input_ids": captions[index % 4], "num_skipped": 0})
    return items, captions


@torch.no_grad()
def zero_shot(model, items, captions) -> float:
    images = model.eval().get_image_features(collate_images(items)["pixel_values"]).pooler_output
    predicted = (F.normalize(images, dim=-1) @ embed_texts(model, captions).t()).argmax(-1)
    return float((predicted == torch.arange(len(items)) % 4).float().mean())


def test_zero_shot_comes_back_from_a_detuned_start(siglip_folder, tmp_path):
    """On held-out pictures: trained, detuned by noise on what makes features of the codes, and trained on from there."""
    (train, captions), (heldout, _) = colours(64, seed=1), colours(64, seed=2)

    def trainer(steps):
        trainer = tokenizer_trainer(
            siglip_folder,
            tmp_path,
            dataset=FixedItems(train),
            stage="contrastive",
            learning_rate=3e-3,
            max_steps=steps,
            per_device_train_batch_size=16,
            logging_steps=steps,
        )
        # Nearer to SigLIP's than what a new one has.
        trainer.model.siglip.logit_scale.data.fill_(2.0)
        trainer.model.siglip.logit_bias.data.fill_(-3.0)
        return trainer

    torch.manual_seed(0)
    first = trainer(90)
    first.train()
    trained = zero_shot(first.model, heldout, captions)
    second = trainer(90)
    second.model.load_state_dict(first.model.state_dict())
    for parameter in second.model.semantic_up_proj.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    detuned = zero_shot(second.model, heldout, captions)
    second.train()
    again = zero_shot(second.model, heldout, captions)
    assert trained > 0.7 and detuned < 0.6 and again > 0.9, (trained, detuned, again)


def test_captions_are_asked_for(siglip_folder, tmp_path):
    items = caption_items()
    for item in items.items:
        del item["input_ids"]
    trainer = tokenizer_trainer(siglip_folder, tmp_path, dataset=items, stage="contrastive")
    with pytest.raises(ValueError, match="needs captions: give the data set a `caption_column`"):
        trainer.train()


@pytest.mark.parametrize(("stage", "weights"), [("contrastive", {"pooler_cosine": 1}), (2, {"contrastive": 1})])
def test_terms_of_the_teacher_and_of_captions_together(siglip_folder, tmp_path, stage, weights):
    trainer = tokenizer_trainer(siglip_folder, tmp_path, weights, caption_items(), stage=stage)
    before = state_of(trainer.model)
    trainer.train()
    assert {"siglip.logit_scale", "siglip.logit_bias"} <= changed(before, state_of(trainer.model))
    log = trainer.state.log_history[0]
    total = sum(weight * log[name] for name, weight in trainer.loss_weights.items() if name in log)
    assert log["loss"] == pytest.approx(total, rel=1e-4) and {"contrastive", "pooler_cosine"} <= log.keys()


# Images with captions


def write_pairs(kind: str, folder: Path) -> dict:
    """Six pictures that tell their number, with captions of as many words, and how they are loaded."""
    captions = ["a" + number * " a" for number in range(6)]
    pictures = {f"{number}.png": flat(number) for number in range(6)}
    if kind == "folder":
        folder.mkdir(parents=True)
        for name, data in pictures.items():
            (folder / name).write_bytes(data)
        rows = [{"file_name": f"{number}.png", "caption": caption} for number, caption in enumerate(captions)]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return {"source": folder, "keep_columns": ["caption"]}
    texts = {f"{number}.txt": caption.encode() for number, caption in enumerate(captions)}
    if kind == "json":
        texts = {
            f"{number}.json": json.dumps({"caption": c, "width": 24}).encode() for number, c in enumerate(captions)
        }
    files = dict(sorted({**pictures, **texts}.items()))
    column = "txt" if kind == "txt" else "caption"
    return {"source": write_tar(folder / "0.tar", files).parent, "keep_columns": [column]}


def count_words(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[len(text.split()), 0] for text in texts])


@pytest.mark.parametrize("kind", ["folder", "txt", "json"])
@pytest.mark.parametrize("streaming", [False, True])
def test_images_come_with_their_captions(tmp_path, own_cache, kind, streaming):
    spec = write_pairs(kind, tmp_path / "pairs")
    images = load_image_dataset(**spec, streaming=streaming)
    processor = DualTokenImageProcessorPil(size=24)
    settings = {"caption_column": spec["keep_columns"][0], "tokenize": count_words}
    if streaming:
        samples = first_epoch(DualTokenImageStream(images, processor, **settings), 6)
    else:
        samples = DualTokenImageDataset(images, processor, **settings)
    batch = collate_images(list(samples))
    assert sorted(numbers(batch["pixel_values"])) == list(range(6))
    assert numbers(batch["pixel_values"]) == [ids[0] - 1 for ids in batch["input_ids"].tolist()]


def test_one_of_several_captions_is_drawn_and_none_is_passed_over(tmp_path, own_cache, caplog):
    rows = [{"file_name": "0.png", "caption": ["a", "a a", "a a a"]}, {"file_name": "1.png", "caption": None}]
    for row in rows:
        (tmp_path / row["file_name"]).write_bytes(flat(1))
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    images = load_image_dataset(tmp_path, keep_columns=["caption"])
    dataset = DualTokenImageDataset(
        images, DualTokenImageProcessorPil(size=24), caption_column="caption", tokenize=count_words
    )
    drawn = []
    for epoch in range(20):
        dataset.set_epoch(epoch)
        drawn.append(int(dataset[0]["input_ids"][0]))
        assert int(dataset[0]["input_ids"][0]) == drawn[-1]
    assert set(drawn) == {1, 2, 3}
    assert dataset[0]["num_skipped"] == 0 and dataset[1]["num_skipped"] == 1
    assert "1.png is skipped: its 'caption' must be a caption or several, got None" in caplog.text


# Ranks


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_two_ranks_have_the_gradients_of_the_whole_batch(siglip_folder, tmp_path, kind):
    """Of every trained parameter; codes restart at vectors of rank 0, so restarts are off."""
    script = tmp_path / "train.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from pathlib import Path
from transformers import TrainerCallback
from tokenizer_training import caption_items, tokenizer_trainer
from training_helpers import TOKENIZER_FIELDS

ranks = int(os.environ["WORLD_SIZE"])

class Keep(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if args.process_index == 0:
            gradients = {{n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None}}
            torch.save(gradients, f"{tmp_path}/gradients-{{ranks}}.pt")

config = {{"semantic_quantizer_config": {{**TOKENIZER_FIELDS["semantic_quantizer_config"], "restart_unused_codes": False}}}}
torch.manual_seed(0)
trainer = tokenizer_trainer(
    Path({str(siglip_folder)!r}), "{tmp_path}/out", dataset=caption_items(8), config=config, stage="contrastive",
    recipe={{"contrastive_loss": {kind!r}}}, max_steps=1, per_device_train_batch_size=8 // ranks, max_grad_norm=0,
    ddp_backend="gloo")
trainer.model.double()
trainer.add_callback(Keep())
trainer.train()
if trainer.args.process_index == 0:
    torch.save(trainer.state.log_history[0], f"{tmp_path}/log-{{ranks}}.pt")
if ranks > 1:
    torch.distributed.barrier(); torch.distributed.destroy_process_group()
""")
    for ranks in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run([*command, str(script)], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr[-4000:]
    one, two = (torch.load(tmp_path / f"gradients-{ranks}.pt") for ranks in (1, 2))
    assert one.keys() == two.keys() and ("siglip.logit_bias" in one) == (kind == "sigmoid")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    logs = [torch.load(tmp_path / f"log-{ranks}.pt") for ranks in (1, 2)]
    assert logs[1]["contrastive"] == pytest.approx(logs[0]["contrastive"], rel=1e-6)


# Runs


@pytest.fixture
def tokenizer_folder(siglip_folder, tmp_path) -> Path:
    """A tokenizer with its processor, as the stages before save it."""
    write_images(tmp_path / "images", 4)
    data = ["--siglip_model_name_or_path", str(siglip_folder), "--train_dataset", str(tmp_path / "images")]
    more = ["--config_overrides", json.dumps(TOKENIZER_FIELDS), "--loss_weights", '{"perceptual": 0, "generator": 0}']
    run_tokenizer.main([*RUN, *data, *more, "--max_steps", "1", "--output_dir", str(tmp_path / "before")])
    return tmp_path / "before"


@pytest.mark.parametrize("kind", ["folder", "json"])
def test_run_goes_on_where_it_was_stopped(tokenizer_folder, tmp_path, own_cache, kind):
    """Without SigLIP's checkpoint, with the text tokenizer that the stages before have saved."""
    spec = write_pairs(kind, tmp_path / "pairs")
    arguments = [*RUN, "--stage", "contrastive", "--model_name_or_path", str(tokenizer_folder)]
    arguments += ["--train_dataset", str(spec["source"]), "--caption_column", spec["keep_columns"][0]]
    arguments += ["--eval_dataset", str(spec["source"]), "--eval_split", "train", "--weight_average_decay", "0.9"]
    arguments += ["--streaming", "1", "--shuffle_buffer_size", "4"] if kind == "json" else []
    folder = check_resume(run_tokenizer.main, arguments, tmp_path)
    check_finished(run_tokenizer.main, arguments, folder)
    check_sigterm(run_tokenizer.main, arguments, folder, tmp_path / "sigterm")
    before, after = (load_file(path / "model.safetensors") for path in (tokenizer_folder, folder))
    assert {"siglip.logit_scale", "siglip.logit_bias"} <= changed(before, after)
    assert not any(name.startswith(("decoder.", "pixel_", "siglip.text_model.")) for name in changed(before, after))
    metrics = json.loads((folder / "eval_results.json").read_text())
    assert metrics.keys() >= {"eval_loss", "eval_contrastive", "eval_semantic_commitment"}
    model = DualTokenVisionTokenizer.from_pretrained(folder)
    assert torch.equal(model.siglip.logit_bias, after["siglip.logit_bias"])


@pytest.mark.parametrize("arguments", [["--stage", "contrastive"], ["--stage", "2", "--caption_column", "txt"]])
def test_captions_and_stage_belong_together(tmp_path, arguments):
    command = ["--model_name_or_path", "none", "--train_dataset", "images", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="--caption_column names the captions of --stage contrastive"):
        run_tokenizer.main([*command, *arguments, "--use_cpu", "1"])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bias"), [("sigmoid", -5.0), ("softmax", None)])
def test_digits_are_told_apart_again(tmp_path, own_cache, monkeypatch, kind, bias):
    """
    The demo's tokenizer with noise on both projections of its semantic codes, trained on captions of the training scans,
    on scans that are held out. Its SigLIP was trained by softmax and has no bias that a sigmoid could begin with.
    """
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn, of the extra demo")
    monkeypatch.syspath_prepend(str(EXAMPLES / "digits"))
    import data

    checkpoint = EXAMPLES / "digits/checkpoint"
    model = load_vision_tokenizer(checkpoint / "dualtoken", torch.float32).eval()
    length = model.config.text_config.max_position_embeddings
    captions = AutoTokenizer.from_pretrained(checkpoint / "captions")
    processor = DualTokenVisionTokenizerProcessor(DualTokenImageProcessorPil(size=32), captions, text_length=length)
    (scans, digits), (heldout, answers) = data.split_scans()
    rows = []
    (tmp_path / "pairs").mkdir()
    for index, (scan, digit) in enumerate(zip(scans, digits)):
        for variant in range(5):
            image, name = data.scan_to_image(scan), f"{index}-{variant}.png"
            (data.vary(image, random.Random(10 * index + variant)) if variant else image).save(
                tmp_path / "pairs" / name
            )
            rows.append({"file_name": name, "caption": [text.format(data.NAMES[digit]) for text in data.CAPTIONS]})
    (tmp_path / "pairs/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pixel_values = processor(images=list(map(data.scan_to_image, heldout)), return_tensors="pt").pixel_values
    texts = processor(text=[text.format(name) for name in data.NAMES for text in data.CAPTIONS], return_tensors="pt")

    @torch.no_grad()
    def measure(model):
        output = model.eval()(pixel_values)
        classes = F.normalize(
            embed_texts(model, texts.input_ids).view(len(data.NAMES), len(data.CAPTIONS), -1).mean(1), dim=-1
        )
        return float(((output.image_embeds @ classes.t()).argmax(-1).numpy() == answers).mean()), output

    published = measure(model)[0]
    generator = torch.Generator().manual_seed(0)
    for parameter in (*model.semantic_down_proj.parameters(), *model.semantic_up_proj.parameters()):
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    if bias is not None:
        model.siglip.logit_bias.data.fill_(bias)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "detuned")
    detuned, before = measure(model)
    run_tokenizer.main(
        ["--stage", "contrastive", "--contrastive_loss", kind, "--model_name_or_path", str(tmp_path / "detuned")]
        + ["--train_dataset", str(tmp_path / "pairs"), "--caption_column", "caption", "--crop_scale", "1", "1"]
        + ["--output_dir", str(tmp_path / "trained"), "--max_steps", "400", "--per_device_train_batch_size", "64"]
        + ["--learning_rate", "1e-3", "--adam_beta1", "0.9", "--adam_beta2", "0.95", "--use_cpu", "1"]
        + ["--seed", "0"]
    )
    trained, after = measure(DualTokenVisionTokenizer.from_pretrained(tmp_path / "trained"))
    print(f"zero-shot, {kind}: published {published:.3f}, detuned {detuned:.3f}, trained {trained:.3f}")
    assert detuned < 0.4 and trained > 0.95
    assert torch.equal(before.pixel_codes, after.pixel_codes)
    assert torch.equal(before.reconstruction, after.reconstruction)


def test_stage_of_a_recipe(tmp_path):
    """A number or a name, in a file and on the command line."""
    path = tmp_path / "recipe.json"
    for stage in (2, "contrastive"):
        path.write_text(json.dumps({"stage": stage}))
        for argv in ([str(path)], ["--stage", str(stage)]):
            assert parse_settings((DualTokenVisionTokenizerRecipe,), argv)[0].stage == stage


def test_terms_that_would_train_nothing_are_refused():
    with pytest.raises(ValueError, match="the terms reconstruction_mse, pixel_commitment would train nothing"):
        DualTokenVisionTokenizerRecipe(
            stage="contrastive", loss_weights={"pixel_commitment": 1, "reconstruction_mse": 1, "semantic_mse": 1}
        )
