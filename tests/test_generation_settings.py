"""Arguments of `generate`: where they may stand, and those of the wrong kind, of another mode, or misspelt."""

import itertools
import json
import logging
import math
import re

import numpy
import pytest
import torch
from generation_helpers import GREEDY, ids, push, shared_model
from tiny_models import lively_unified_model
from transformers import BatchEncoding, CompileConfig, GenerationConfig, WatermarkingConfig

from transformers_dualtoken import generation_dualtoken, generation_settings
from transformers_dualtoken.generation_settings import (
    DualTokenImageGenerationConfig,
    DualTokenImageGenerationInputs,
    GenerationArguments,
)
from transformers_dualtoken.generation_text import ScoreCheck
from transformers_dualtoken.modeling_dualtoken import DualTokenForCausalLM


@pytest.fixture
def warnings_of():
    """Collects what a module's logger warns of."""
    handlers, messages = [], []

    class Handler(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    def listen(module):
        handlers.append((module.logger, Handler(logging.WARNING)))
        module.logger.addHandler(handlers[-1][1])
        return messages

    logging.Logger.warning_once.cache_clear()
    yield listen
    for logger, handler in handlers:
        logger.removeHandler(handler)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"generator": 42}, r"`generator` must be a torch.Generator.*manual_seed\(0\).*, got 42"),
        ({"generator": [0]}, "`generator` must be a torch.Generator"),
        ({"generator": []}, "`generator` must be a torch.Generator"),
        ({"image_top_k": "30"}, "`image_top_k` must be a whole number from 0 .*, got '30'"),
        ({"semantic_temperature": [1.0]}, "`semantic_temperature` must be a finite number"),
        ({"pixel_top_p": True}, "`pixel_top_p` must be a number .*, got True"),
        ({"image_do_sample": "False"}, "`image_do_sample` must be True or False, got 'False'"),
        ({"progress_bar": 1}, "`progress_bar` must be True or False, got 1"),
        ({"generation_mode": 3}, "`generation_mode` must be one of 'text', 'image', 'interleaved', got 3"),
        ({"generation_config": "image"}, "`generation_config` must be a GenerationConfig or a dict, got str"),
        ({"pixel_codes": [[1]]}, r"`pixel_codes` must be a tensor of whole numbers, got \[\[1\]\]"),
        ({"negative_pixel_codes": numpy.zeros(3)}, "`negative_pixel_codes` must be a tensor of whole numbers"),
        ({"eos_token_id": "end"}, "`eos_token_id` must be an id or a list of ids, got 'end'"),
        ({"attention_mask": [[1]]}, "`attention_mask` must be a tensor"),
        ({"num_return_sequences": 2.0}, "`num_return_sequences` must be a whole number from 1, got 2.0"),
        ({"on_image": "x.png"}, r"`on_image` must be callable as on_image\(codes, owner\), got 'x.png'"),
        ({"negative_prompt_ids": "ugly"}, "`negative_prompt_ids` must be a tensor of ids, got 'ugly'"),
        (
            {"generation_mode": "interleaved", "max_new_tokens": 40.0},
            "`max_new_tokens` must be a whole number from 1, got 40",
        ),
        ({"decoder_start_token_id": "x"}, "`decoder_start_token_id` must be an id or a list of ids, got 'x'"),
        ({"sequence_bias": [1]}, r"`sequence_bias` must be a dict of tuples of ids and numbers, or .*, got \[1\]"),
        (
            {"generation_mode": "interleaved", "streamer": print},
            "`streamer` must be an object with the methods `put` and `end`",
        ),
    ],
)
def test_wrong_kinds_are_named(model, options, message):
    with pytest.raises(TypeError, match=message):
        model.generate(ids(5), **{**GREEDY, **options})


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
@pytest.mark.parametrize(
    "watermark", [{"a": 1}, {1: 2}, {"bias": "x"}, {"greenlist_ratio": "x"}, WatermarkingConfig(context_width=1.5)]
)
def test_watermark_is_of_transformers_kinds(model, mode, watermark):
    with pytest.raises(TypeError, match="`watermarking_config` must be .* a dict of its `greenlist_ratio`, `bias`"):
        model.generate(ids(5), generation_mode=mode, watermarking_config=watermark)


def test_right_watermarks_and_biases_are_taken(model):
    text = {"generation_mode": "interleaved", "max_new_tokens": 3}
    for watermark in ({}, {"bias": 1, "seeding_scheme": "selfhash"}, WatermarkingConfig(greenlist_ratio=0.5)):
        assert model.generate(ids(5), watermarking_config=watermark, **text).sequences.shape[1] <= 4
    for bias in ({(7,): 1e9}, [[[7], 1e9]]):
        assert model.generate(ids(5), sequence_bias=bias, **text).sequences.tolist() == [[5, 7, 7, 7]]


@pytest.mark.parametrize("eos", [7, [2, 7], (2, 7), torch.tensor(7), torch.tensor([2, 7])])
def test_any_form_of_the_ends(model, eos):
    arguments = {"generation_mode": "interleaved", "max_new_tokens": 3, "logits_processor": [push(7)]}
    assert model.generate(ids(5), eos_token_id=eos, **arguments).sequences.tolist() == [[5, 7]]


def test_drafts_of_the_first_layers_are_refused(model):
    with pytest.raises(ValueError, match="`assistant_early_exit` drafts .*`prompt_lookup_num_tokens`"):
        model.generate(ids(5), max_new_tokens=2, assistant_early_exit=1)


@pytest.mark.parametrize("mode", ["text", "interleaved"])
@pytest.mark.parametrize("forced", [60, [2, 60]])
def test_forced_id_is_of_the_vocabulary(model, mode, forced):
    with pytest.raises(ValueError, match="`forced_eos_token_id` must be of the vocabulary of 60 ids, got"):
        model.generate(ids(5), max_new_tokens=3, generation_mode=mode, forced_eos_token_id=forced)


@pytest.mark.parametrize("name", ["image_temperature", "image_top_k", "guidance_scale", "temperature"])
def test_numbers_beyond_floats_are_named(model, name):
    try:
        GenerationArguments(GenerationConfig(), None, {"generation_mode": "image", name: -(10**400)})
    except ValueError as error:
        assert f"`{name}` must be" in str(error)
    else:
        # Any finite number.
        assert name == "temperature"


@pytest.mark.parametrize("scale", ["3", [3.0], torch.tensor([1.0, 3.0]), True, float("nan"), -1])
def test_guidance_scale_is_a_number(model, scale):
    with pytest.raises((TypeError, ValueError), match="`guidance_scale` must be a number from 0"):
        model.generate(ids(5), **{**GREEDY, "guidance_scale": scale})


@pytest.mark.parametrize("prompt", ["Draw a three.", BatchEncoding({"input_ids": ids(5)}), [5, 6]])
def test_prompt_is_a_tensor(model, prompt):
    with pytest.raises(TypeError, match=rf"a tensor of ids, got {type(prompt).__name__}: .*`\*\*inputs`"):
        model.generate(prompt, **GREEDY)


@pytest.mark.parametrize(
    "name, hint",
    [
        ("guidence_scale", "Is `guidance_scale` meant"),
        ("image_topk", "Is `image_top_k` meant"),
        ("seed", r"generator=torch.Generator\(\).manual_seed\(seed\)"),
        ("nonsense", r"\.$"),
    ],
)
def test_misspelt_arguments(model, name, hint):
    with pytest.raises(ValueError, match=f"does not take {name}.*{hint}"):
        model.generate(ids(5), **{name: 1}, **GREEDY)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"do_sample": False}, "passes over `do_sample`: it is `image_do_sample` for images."),
        ({"do_sample": True, "top_k": 3}, "passes over `top_k`: it is `image_top_k` for images."),
        ({"repetition_penalty": 1.5}, "writes no text and passes over `repetition_penalty`."),
    ],
)
def test_settings_of_text_are_passed_over_aloud(model, options, message, warnings_of):
    messages = warnings_of(generation_settings)
    model.generate(ids(5), **options, **GREEDY)
    assert len(messages) == len(options) and messages[-1].endswith(message)


def test_settings_of_text_are_for_interleaved_answers(model, warnings_of):
    messages = warnings_of(generation_settings)
    model.generate(
        ids(5), generation_mode="interleaved", max_new_tokens=2, do_sample=True, top_k=3, repetition_penalty=1.5
    )
    assert messages == []


@pytest.mark.parametrize(
    "option",
    [{"image_top_k": 30}, {"pixel_temperature": 1.0}, {"generator": torch.Generator()}, {"image_do_sample": True}],
)
def test_without_its_mode_an_argument_of_images_is_refused(model, option):
    with pytest.raises(ValueError, match=f"`{next(iter(option))}` belongs to image .*pass `generation_mode='image'`"):
        model.generate(ids(5), max_new_tokens=2, **option)


def test_text_that_should_be_an_image_says_so(model, warnings_of):
    messages = warnings_of(generation_dualtoken)
    model.generate(ids(5), max_new_tokens=1)
    assert messages == []
    model.generate(ids(5, model.config.image_start_token_id), max_new_tokens=1)
    assert len(messages) == 1 and "ends in `<image_start>`" in messages[0] and "generation_mode='image'" in messages[0]


def test_a_negative_prompt_without_guidance_is_passed_over_aloud(model, warnings_of):
    messages = warnings_of(generation_dualtoken)
    arguments = {"negative_prompt_ids": ids(7, model.config.image_start_token_id), **GREEDY}
    model.generate(ids(5), **arguments, guidance_scale=3.0)
    assert messages == []
    model.generate(ids(5), **GREEDY, guidance_scale=1.0)
    assert messages == []
    model.generate(ids(5), **arguments, guidance_scale=1.0)
    assert messages == ["`guidance_scale=1.0` is no guidance and passes over the negative prompt."]


def test_what_cannot_be_compiled_is_named_by_what_was_given(model):
    with pytest.raises(ValueError, match="needs a static cache, got a dynamic one"):
        model.generate(ids(5), cache_implementation="dynamic", compile_config=CompileConfig(), **GREEDY)


ODD = {"image_top_k": 1, "guidance_scale": 1.5}


class TestWhereSettingsStand:
    """A keyword counts before the given generation config, this before the model's own, and this before the default."""

    @pytest.fixture
    def own(self, monkeypatch):
        """The generation config of a model of its own, which may be changed."""
        model = lively_unified_model()
        return model, model.generation_config

    @staticmethod
    def draw(model, **arguments):
        torch.manual_seed(3)
        return model.generate(ids(5, 6, 50), **{"generation_mode": "image", **arguments}).pixel_codes

    def test_precedence(self, own):
        model, config = own
        default, odd = self.draw(model), self.draw(model, **ODD)
        assert not torch.equal(default, odd)
        for given in (GenerationConfig(**ODD), ODD):
            assert torch.equal(self.draw(model, generation_config=given), odd)
            over = {"image_top_k": 900, "guidance_scale": 3.0}
            assert torch.equal(self.draw(model, generation_config=given, **over), default)
        for name, value in ODD.items():
            setattr(config, name, value)
        assert torch.equal(self.draw(model), odd)
        # Also where a generation config is given that says nothing about it, or says the default.
        assert torch.equal(self.draw(model, generation_config=GenerationConfig()), odd)
        assert torch.equal(self.draw(model, generation_config={"image_top_k": 900, "guidance_scale": 3.0}), default)
        # They are no concern of text, and do not reach it.
        assert torch.equal(model.generate(ids(5), max_new_tokens=3), shared_model().generate(ids(5), max_new_tokens=3))

    def test_all_settings(self, own):
        model, config = own
        config.update(image_do_sample=False, generation_mode="image", allow_custom_entries=True)
        greedy = model.generate(ids(5, 6, 50))
        assert torch.equal(greedy.pixel_codes, self.draw(shared_model(), image_do_sample=False))
        assert isinstance(model.generate(ids(5), generation_mode="text", max_new_tokens=2), torch.Tensor)

    def test_heads(self):
        def heads(*places):
            settings = DualTokenImageGenerationConfig.resolve(*places)
            return settings.of_heads("top_k"), settings.of_heads("temperature"), settings.of_heads("top_p")

        assert heads({}) == ((900, 900), (1.0, 1.0), (0.96, 0.96))
        one = {"image_top_k": 7, "pixel_top_k": 3, "semantic_temperature": 0.5, "image_top_p": None, "other": 1}
        assert heads(one) == ((3, 7), (1.0, 0.5), (0.96, 0.96))
        # What is said of both heads at a place that counts more is said of each.
        assert heads({"image_top_k": 5}, one) == ((5, 5), (1.0, 0.5), (0.96, 0.96))
        assert heads({"semantic_top_k": 5}, one) == ((3, 5), (1.0, 0.5), (0.96, 0.96))

    def test_saved_and_loaded(self, own, tmp_path):
        model, config = own
        for name, value in ODD.items():
            setattr(config, name, value)
        model.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "generation_config.json").read_text())
        assert saved["image_top_k"] == 1 and saved["guidance_scale"] == 1.5
        assert saved["suppress_tokens"] == [50, 51, 52]
        # What vLLM reads of it: an answer ends where an image would begin, and not with an image-start for ever.
        assert saved["eos_token_id"] == [2, 50]
        loaded = DualTokenForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(self.draw(loaded), self.draw(shared_model(), **ODD))
        # Images and interleaved answers are free of what keeps other engines' text clean; a caller's own tokens are not.
        interleaved = {"generation_mode": "interleaved", "max_new_tokens": 11, "logits_processor": [push(50)]}
        for arguments in ({}, {"generation_config": loaded.generation_config}, {"suppress_tokens": [7]}):
            assert len(loaded.generate(ids(5), **interleaved, **arguments).pixel_codes) == 1
        assert len(loaded.generate(ids(5), **interleaved, suppress_tokens=[50, 51, 52]).pixel_codes) == 0
        assert len(loaded.generate(ids(5), **interleaved, eos_token_id=[2, 50]).pixel_codes) == 0
        loaded.generation_config.suppress_tokens += [7]
        interleaved |= {"logits_processor": [push(50, 7)], "max_new_tokens": 12}
        assert 7 not in loaded.generate(ids(5), **interleaved).sequences

    def test_bad_settings_of_a_config(self, own, warnings_of):
        model, config = own
        for given in ({"image_topk": 3}, GenerationConfig(image_topk=3)):
            with pytest.raises(ValueError, match="does not take image_topk. Is `image_top_k` meant?"):
                self.draw(model, generation_config=given)
        with pytest.raises(TypeError, match="`image_top_k` must be a whole number"):
            self.draw(model, generation_config={"image_top_k": "30"})
        with pytest.raises(ValueError, match="does not take num_beams"):
            self.draw(model, generation_config={"num_beams": 2})
        messages = warnings_of(generation_settings)
        self.draw(model, generation_config={"max_new_tokens": 20, "max_length": 20, "use_cache": False})
        assert len(messages) == 3 and "passes over `max_new_tokens`" in messages[0]
        # A checkpoint's own settings of text are nobody's mistake.
        config.update(temperature=0.7, do_sample=True, num_beams=2, repetition_penalty=1.1)
        self.draw(model)
        assert len(messages) == 3
        with pytest.raises(ValueError, match="does not take num_beams"):
            self.draw(model, generation_mode="interleaved")

    def test_every_field_of_transformers_is_known(self, monkeypatch):
        """A new one is refused until somebody has looked at it; these are what is known not to be refused."""
        # By what they are, not by the kind of value.
        monkeypatch.setattr(generation_settings, "_RULES", {})
        own = GenerationConfig()
        taken = {"interleaved": set(), "image": set()}
        for name in own.to_dict():
            for mode, names in taken.items():
                try:
                    GenerationArguments(own, {name: _Anything()}, {"generation_mode": mode})
                    names.add(name)
                except (TypeError, ValueError):
                    pass
        for names in taken.values():
            assert {"sequence_bias", "bad_words_ids", "compile_config"} <= names
            assert not names & {"penalty_alpha", "num_beam_groups", "constraints", "max_time", "stop_strings"}
            assert not names & {"dola_layers", "prompt_lookup_num_tokens", "output_scores", "token_healing"}


# What arguments are given in place of what they should be.
WRONG = [
    "x",
    "False",
    math.nan,
    math.inf,
    -1,
    0,
    1.5,
    [],
    {},
    (2,),
    True,
    torch.tensor([1, 2]),
    numpy.zeros(2),
    object(),
]


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_any_value_is_right_or_named(model, mode):
    """Of every setting and input: a result, or a sentence that names the argument; never an error from within."""
    names = [*DualTokenImageGenerationConfig.names(), *DualTokenImageGenerationInputs.names(), "max_new_tokens"]
    names += ["max_length", "do_sample", "temperature", "top_p", "num_return_sequences", "eos_token_id"]
    names += [
        "suppress_tokens",
        "attention_mask",
        "pixel_values",
        "pixel_codes",
        "logits_processor",
        "past_key_values",
    ]
    for name, value in itertools.product(names, WRONG):
        given = {"generation_mode": mode, "max_new_tokens": 3, name: value}
        if mode == "image":
            # Refused before anything is drawn; what is right is looked at elsewhere.
            given |= {"nonsense": 1}
        try:
            model.generate(ids(5), **given)
        except (TypeError, ValueError) as error:
            assert re.search(r"`\w+`|(?i:image)", str(error)), (name, value, error)


class _Anything:
    """Equal to no default."""


class TestScoreCheck:
    """Rows that have ended and beams beside living ones choose nothing; whatever else holds nothing is named."""

    empty, full = torch.full((1, 5), float("-inf")), torch.zeros(1, 5)

    def test_a_row_that_has_ended(self):
        check, scores = ScoreCheck(ended_ids=[torch.tensor([2])]), torch.cat([self.empty, self.full])
        assert torch.equal(check(torch.tensor([[1, 2], [1, 3]]), scores), torch.zeros(2, 5))
        with pytest.raises(ValueError, match="No token was left"):
            check(torch.tensor([[1, 3], [1, 2]]), scores)

    def test_beams(self):
        check, ids = ScoreCheck(num_beams=2), torch.tensor([[1, 3], [1, 3]])
        scores = torch.cat([self.empty, self.full])
        assert torch.equal(check(ids, scores), scores)
        for dead in (torch.cat([self.empty, self.empty]), torch.cat([self.full, self.full * float("nan")])):
            with pytest.raises(ValueError, match="No token was left"):
                ScoreCheck(num_beams=2)(ids, dead)
