"""transformers' pipelines on the kept checkpoint: each answers rightly, or says in a sentence what to take instead."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer, GenerationConfig, pipeline
from transformers.models.auto import modeling_auto

from transformers_dualtoken import DualTokenVisionTokenizer, DualTokenVisionTokenizerProcessor


DIGITS = Path(__file__).parents[1] / "examples" / "digits"
DRAW = [{"role": "user", "content": [{"type": "text", "text": "Draw a three."}]}]
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def digits():
    """60 held-out scans as images, and their digits."""
    sys.path.insert(0, str(DIGITS))
    try:
        import data
    finally:
        sys.path.remove(str(DIGITS))
    scans, labels = data.split_scans()[1]
    return [data.scan_to_image(scan) for scan in scans[:60]], labels[:60].tolist()


@pytest.fixture(scope="module")
def model():
    return AutoModelForMultimodalLM.from_pretrained(DIGITS / "checkpoint" / "dualtoken", dtype=torch.float32)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(DIGITS / "checkpoint" / "dualtoken")


@pytest.fixture(scope="module")
def tokenizer_folder(model, processor, tmp_path_factory):
    """The vision tokenizer as a checkpoint of its own."""
    folder = tmp_path_factory.mktemp("tokenizer")
    model.vision_tokenizer.save_pretrained(folder)
    texts = AutoTokenizer.from_pretrained(DIGITS / "checkpoint" / "captions")
    DualTokenVisionTokenizerProcessor(processor.image_processor, texts, text_length=8).save_pretrained(folder)
    return folder


def question(image: Image.Image) -> list[dict]:
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "Which digit is this?"}]
    return [{"role": "user", "content": parts}]


@pytest.mark.parametrize("hypothesis", ["a scan of the digit {}.", "This is a photo of {}."])
def test_zero_shot_image_classification(tokenizer_folder, digits, hypothesis):
    """The pipeline pads texts to the longest and gives their mask; SigLIP's text tower was trained with neither."""
    images, labels = digits
    classifier = pipeline("zero-shot-image-classification", model=tokenizer_folder)
    assert isinstance(classifier.model, DualTokenVisionTokenizer)
    answers = classifier(images, candidate_labels=NAMES, hypothesis_template=hypothesis)
    best = [answer[0]["label"] for answer in answers]

    processor = AutoProcessor.from_pretrained(tokenizer_folder)
    inputs = processor(images=images, text=[hypothesis.format(name) for name in NAMES], return_tensors="pt")
    with torch.no_grad():
        logits = classifier.model(**inputs).logits_per_image
    assert best == [NAMES[index] for index in logits.argmax(-1)]
    accuracy = sum(name == NAMES[label] for name, label in zip(best, labels)) / len(labels)
    assert accuracy >= 0.95


def test_image_feature_extraction_returns_features(tokenizer_folder, digits):
    extractor = pipeline("image-feature-extraction", model=tokenizer_folder)
    features = extractor(digits[0][0], return_tensors=True)
    pixel_values = extractor.image_processor(digits[0][0], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        encoded = extractor.model.encode(pixel_values)
    assert torch.equal(features, encoded.last_hidden_state)
    pooled = extractor(digits[0][0], pool=True, return_tensors=True)
    assert torch.equal(F.normalize(pooled, dim=-1), F.normalize(encoded.pooler_output, dim=-1))


def test_text_pipelines_answer_and_name_what_draws(model, processor, digits):
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    answer = pipe(text=question(digits[0][0]), max_new_tokens=10, return_full_text=False)[0]["generated_text"]
    assert answer == f"It is a {NAMES[digits[1][0]]}."
    with pytest.raises(ValueError, match=r"pipeline\('any-to-any', ...\)` with `generation_mode='image'`"):
        pipe(text=DRAW, generate_kwargs={"generation_mode": "image"})
    with pytest.raises(ValueError, match="take `model.generate.*interleaved"):
        pipe(text=DRAW, generate_kwargs={"generation_mode": "interleaved"})
    text_only = pipeline("text-generation", model=model, tokenizer=processor.tokenizer)
    with pytest.raises(ValueError, match="text-generation.*returns text"):
        text_only("Draw a three.", generation_mode="image")


def test_another_models_pipeline_takes_nothing_back(model, processor, digits):
    """A model that draws while a pipeline of another runs: a tool, or a stopping criterion. A wrapped one is the same."""
    prompt = processor.apply_chat_template(
        DRAW, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    other = AutoModelForMultimodalLM.from_pretrained(DIGITS / "checkpoint" / "dualtoken", dtype=torch.float32)
    drawn = []

    def draw(input_ids, scores):
        drawn.append(model.generate(**prompt, generation_mode="image", cache_implementation="dynamic"))
        return torch.ones(len(input_ids), dtype=torch.bool)

    pipe = pipeline("text-generation", model=other, tokenizer=processor.tokenizer)
    pipe("Say it.", max_new_tokens=2, stopping_criteria=[draw])
    assert drawn[0].pixel_codes.shape == (1, 4, 4, model.config.num_depths)
    pipe.model = torch.compile(model)
    with pytest.raises(ValueError, match="text-generation.*returns text"):
        pipe._forward(pipe.preprocess("Say it."), generation_mode="image")


def test_tables_of_names_that_pipelines_and_servers_read():
    for task in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
        assert getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")["dualtoken"] == "DualTokenForCausalLM"


def test_a_served_answer_ends_where_an_image_would_begin(model, processor, digits):
    """`transformers serve` returns text alone: after an image that is not there, text would speak of it."""
    server = {"__name__": "transformers.cli.serving.utils"}
    exec("def generate(model, **inputs):\n    return model.generate(**inputs)", server)

    def answer(messages, generate):
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        config = GenerationConfig(**{**model.generation_config.to_diff_dict(), "max_new_tokens": 12})
        ids = generate(model, **inputs, generation_config=config)[0, inputs["input_ids"].shape[1] :]
        return processor.decode(ids, skip_special_tokens=True)

    assert answer(DRAW, server["generate"]) == ""
    assert answer(DRAW, type(model).generate) != ""
    expected = f"It is a {NAMES[digits[1][0]]}."
    assert answer(question(digits[0][0]), server["generate"]) == expected


@pytest.mark.extras
def test_any_to_any_answers_and_draws(model, processor, digits):
    pytest.importorskip("torchvision")
    pipe = pipeline("any-to-any", model=model, processor=processor)
    answer = pipe(text=question(digits[0][0]), max_new_tokens=10, return_full_text=False)[0]["generated_text"]
    assert answer == f"It is a {NAMES[digits[1][0]]}."

    generator = torch.Generator().manual_seed(0)
    drawn = pipe(text=DRAW, generation_mode="image", generate_kwargs={"generator": generator})[0]["generated_image"]
    assert isinstance(drawn, Image.Image)
    # The same as without a pipeline, where the usual output comes back.
    inputs = processor.apply_chat_template(
        DRAW, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, generation_mode="image", generator=torch.Generator().manual_seed(0))
    assert output.sequences.shape[1] > inputs["input_ids"].shape[1]
    assert drawn.tobytes() == processor.post_process_images(model.decode_images(output))[0].tobytes()

    several = pipe(text=[DRAW, DRAW], generation_mode="image", batch_size=2)
    assert len(several) == 2 and all(isinstance(row[0]["generated_image"], Image.Image) for row in several)
    copies = pipe(text=DRAW, generation_mode="image", generate_kwargs={"num_return_sequences": 3})
    assert [isinstance(record["generated_image"], Image.Image) for record in copies] == [True] * 3
    with pytest.raises(ValueError, match="returns text or an image.*model.generate"):
        pipe(text=DRAW, generate_kwargs={"generation_mode": "interleaved"})
    with pytest.raises(ValueError, match="not within `generate_kwargs`"):
        pipe(text=DRAW, generate_kwargs={"generation_mode": "image"})
