"""The unified model: embeddings, losses, gradients, attention and positions, loading and assembling."""

import copy
import logging

import pytest
import torch
from naive.loss import naive_loss
from tiny_models import lively_unified_model, tiny_unified_config
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    DynamicCache,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging as transformers_logging

from transformers_dualtoken import DualTokenForCausalLM, DualTokenModel, DualTokenVisionTokenizer
from transformers_dualtoken.transformers_compat import CACHE_NAME


N, START, IMAGE, END = 9, 50, 51, 52
PICTURE = [START, *[IMAGE] * N, END]
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


@pytest.fixture
def model():
    return lively_unified_model()


def random_codes(images: int, seed: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{kind}_codes": torch.randint(24, (images, 3, 3, 3), generator=generator) for kind in ("pixel", "semantic")
    }


def pad_left(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }


def training_batch() -> dict[str, torch.Tensor]:
    """
    Three rows: a question about an image (only the answer is a target), two drawings (one after another), text only.
    """
    rows = [
        [5, *PICTURE, 6, 7, 8, 2],
        [9, 10, *PICTURE, 11, *PICTURE, 2],
        [12, 13, 14, 2],
    ]
    batch = pad_left(rows)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[0, :-3] = -100
    labels[1, :2] = -100
    # The first token of a row has nothing before it; here it would be predicted from padding.
    labels[2, :-3] = -100
    return {**batch, **random_codes(3), "labels": labels}


def split_rows(batch: dict) -> list[dict]:
    """The rows of a batch, padding included, each with its own images."""
    counts = ((batch["input_ids"] == IMAGE).sum(-1) // N).tolist()
    rows, first = [], 0
    for index, count in enumerate(counts):
        row = {name: batch[name][index : index + 1] for name in ("input_ids", "attention_mask", "labels")}
        if count:
            row |= {name: batch[name][first : first + count] for name in ("pixel_codes", "semantic_codes")}
        first += count
        rows.append(row)
    return rows


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_same_gradients(one: dict, other: dict, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **(tolerance or CLOSE), msg=lambda m, n=name: f"{n}: {m}")


class TestLoss:
    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    def test_equals_the_naive_loss(self, reduction):
        weights = {"text_loss_weight": 0.5, "pixel_loss_weight": 2.0, "semantic_loss_weight": 3.0}
        model = lively_unified_model(depth_reduction=reduction, **weights)
        batch = training_batch()
        out = model(**batch)
        expected = naive_loss(model, **batch)
        assert (expected["num_text"], expected["num_visual"]) == (3 + 6 + 3, 2 * N)
        torch.testing.assert_close(out.text_loss, expected["text"] / expected["num_text"])
        torch.testing.assert_close(out.pixel_loss, expected["pixel"] / expected["num_visual"])
        torch.testing.assert_close(out.semantic_loss, expected["semantic"] / expected["num_visual"])
        total = 0.5 * out.text_loss + 2 * out.pixel_loss + 3 * out.semantic_loss
        torch.testing.assert_close(out.loss, total)

    @pytest.mark.parametrize("pair", [(20, 7), [20, 7], torch.tensor([20, 7])], ids=["tuple", "list", "tensor"])
    def test_a_pair_of_counts_divides_the_sums(self, model, pair):
        batch = training_batch()
        local, shared = model(**batch), model(**batch, num_items_in_batch=pair)
        torch.testing.assert_close(shared.text_loss, local.text_loss * 12 / 20)
        torch.testing.assert_close(shared.pixel_loss, local.pixel_loss * 2 * N / 7)
        torch.testing.assert_close(shared.semantic_loss, local.semantic_loss * 2 * N / 7)

    @pytest.mark.parametrize("number", [30, torch.tensor(30), torch.tensor([30])], ids=["int", "0-d", "1-d"])
    def test_one_count_divides_all_sums(self, model, number):
        batch = training_batch()
        local, shared = model(**batch), model(**batch, num_items_in_batch=number)
        assert shared.loss.numel() == 1
        torch.testing.assert_close(shared.text_loss.squeeze(), local.text_loss * 12 / 30)
        torch.testing.assert_close(shared.pixel_loss.squeeze(), local.pixel_loss * 2 * N / 30)

    def test_three_counts_raise(self, model):
        with pytest.raises(ValueError, match="one number or the pair"):
            model(**training_batch(), num_items_in_batch=(1, 2, 3))

    def test_accumulation_gives_the_gradient_of_the_whole_batch(self, model):
        """8 x 1 = 1 x 8: rows of different kinds and numbers of targets, with the counts of the global batch."""
        batch = training_batch()
        counts = (12, 2 * N)
        whole = model.train()(**batch, num_items_in_batch=counts).loss
        whole.backward()
        at_once = {name: grad.clone() for name, grad in gradients(model).items()}
        model.zero_grad()
        parts = [model(**row, num_items_in_batch=counts).loss for row in split_rows(batch)]
        for part in parts:
            part.backward()
        torch.testing.assert_close(sum(parts), whole)
        assert_same_gradients(gradients(model), at_once, atol=1e-4, rtol=1e-4)

    def test_text_only(self, model):
        ids = torch.tensor([[5, 6, 7, 2]])
        out = model.train()(ids, labels=ids)
        assert out.loss == out.text_loss and out.pixel_loss == 0 and out.semantic_loss == 0
        out.loss.backward()
        for name, grad in gradients(model).items():
            # Connected zeros, so that every rank runs and reduces the same modules.
            assert grad is not None, name
            if "depth_heads" in name or "visual_projector" in name:
                assert not grad.any(), name
            assert grad.isfinite().all(), name

    @pytest.mark.parametrize("pair", [None, (0, 5)])
    def test_no_text_targets(self, model, pair):
        ids = torch.tensor([[5, *PICTURE]])
        labels = ids.masked_fill(ids != IMAGE, -100)
        out = model.train()(ids, **random_codes(1), labels=labels, num_items_in_batch=pair)
        assert out.text_loss == 0 and out.pixel_loss > 0 and out.semantic_loss > 0
        out.loss.backward()
        assert not model.lm_head.weight.grad.any()
        assert all(grad is not None and grad.isfinite().all() for grad in gradients(model).values())

    def test_no_targets_at_all(self, model):
        ids = torch.tensor([[5, *PICTURE]])
        out = model.train()(ids, **random_codes(1), labels=torch.full_like(ids, -100))
        assert out.loss == 0
        out.loss.backward()
        assert all(grad is not None and not grad.any() for grad in gradients(model).values())

    def test_question_images_are_no_targets(self, model):
        ids = torch.tensor([[*PICTURE, 6, 7, 2]])
        labels = ids.clone()
        labels[:, : len(PICTURE)] = -100
        out = model(ids, **random_codes(1), labels=labels)
        assert out.pixel_loss == 0 and out.semantic_loss == 0 and out.text_loss > 0

    def test_heads_learn_from_the_state_before_a_position(self, model):
        """`<image_start>` predicts v_1: the first position's codes do not reach the state that predicts them."""
        ids = torch.tensor([[5, *PICTURE]])
        codes, other = random_codes(1), random_codes(1)
        other["pixel_codes"][:, 0, 0] = (other["pixel_codes"][:, 0, 0] + 1) % 24
        states = [model(ids, **kind).last_hidden_state[0] for kind in (codes, other)]
        same = torch.isclose(*states).all(-1)
        assert same[:2].all() and not same[2:].any()

    def test_logits_are_made_unless_training_with_labels(self, model):
        batch = training_batch()
        assert model(**batch).logits.shape == (*batch["input_ids"].shape, 60)
        assert model.train()(**batch).logits is None
        del batch["labels"]
        assert model(**batch).logits is not None
        assert model(**batch, logits_to_keep=1).logits.shape == (3, 1, 60)


class TestGradients:
    def test_reach_everything_but_the_tokenizer(self):
        model = lively_unified_model().train()
        before = copy.deepcopy(model.vision_tokenizer.state_dict())
        model(**training_batch()).loss.backward()
        for name, parameter in model.named_parameters():
            if "vision_tokenizer" in name:
                assert not parameter.requires_grad and parameter.grad is None, name
            else:
                assert parameter.grad.abs().max() > 0, name
        after = model.vision_tokenizer.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)

    def test_codebooks_do_not_move_in_training(self, model, pixel_values):
        model.train()
        assert model.training and model.model.training and not model.vision_tokenizer.training
        assert not any(module.training for module in model.vision_tokenizer.modules())
        before = copy.deepcopy(model.vision_tokenizer.state_dict())
        ids = torch.tensor([[5, *PICTURE, *PICTURE, 2]])
        model(ids, pixel_values=pixel_values, labels=ids).loss.backward()
        after = model.vision_tokenizer.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert all(parameter.grad is None for parameter in model.vision_tokenizer.parameters())

    def test_autocast_stays_near_float32(self):
        model = lively_unified_model().train()
        exact = model(**training_batch()).loss
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(**training_batch()).loss
        rough.backward()
        torch.testing.assert_close(rough, exact, rtol=0.05, atol=0)
        assert all(grad.isfinite().all() for grad in gradients(model).values())

    def test_gradient_checkpointing_changes_nothing(self):
        model = lively_unified_model().train()
        batch = training_batch()
        model(**batch).loss.backward()
        plain = {name: grad.clone() for name, grad in gradients(model).items()}
        model.zero_grad()
        model.gradient_checkpointing_enable()
        assert all(layer.gradient_checkpointing for layer in model.depth_heads.layers)
        model(**batch).loss.backward()
        assert_same_gradients(gradients(model), plain)


class TestForward:
    def test_pixels_and_their_codes_are_the_same_input(self, pixel_values):
        model = lively_unified_model()
        ids = torch.tensor([[5, *PICTURE, 6, *PICTURE, 2]])
        encoded = model.vision_tokenizer.encode(pixel_values)
        from_pixels = model(ids, pixel_values=pixel_values, labels=ids)
        from_codes = model(ids, pixel_codes=encoded.pixel_codes, semantic_codes=encoded.semantic_codes, labels=ids)
        assert torch.equal(from_pixels.pixel_codes, encoded.pixel_codes)
        assert torch.equal(from_pixels.semantic_codes, encoded.semantic_codes)
        assert torch.equal(from_pixels.logits, from_codes.logits)
        assert torch.equal(from_pixels.loss, from_codes.loss)
        # Not degenerate: the two images have different codes.
        assert not torch.equal(encoded.pixel_codes[0], encoded.pixel_codes[1])

    def test_position_embeddings_follow_the_formula(self, model):
        codes = random_codes(2)
        tokenizer, projector = model.vision_tokenizer, model.model.visual_projector
        sums = [
            sum(
                tokenizer.quantizer(kind).codebook.embeddings[0][codes[f"{kind}_codes"][..., depth]]
                for depth in range(3)
            )
            for kind in ("pixel", "semantic")
        ]
        x = torch.cat(sums, dim=-1).flatten(1, 2)
        v = projector.linear_2(torch.nn.functional.gelu(projector.linear_1(x)))
        torch.testing.assert_close(model.get_image_features(**codes).pooler_output, v)

    def test_projected_embeddings_are_refused(self):
        with pytest.raises(ValueError, match="`visual_features` must be 'codes', .* got 'projected'"):
            tiny_unified_config(visual_features="projected")

    def test_left_padding_changes_nothing(self):
        model = lively_unified_model()
        batch = training_batch()
        padded = model(**batch)
        for index, row in enumerate(split_rows(batch)):
            kept = row["attention_mask"][0].bool()
            alone = {name: row[name][:, kept] for name in ("input_ids", "labels")}
            alone |= {name: row[name] for name in ("pixel_codes", "semantic_codes") if name in row}
            torch.testing.assert_close(padded.logits[index, kept], model(**alone).logits[0], **CLOSE)

    def test_a_masked_prefix_is_no_prefix(self):
        """Prompt drop: everything before `<image_start>` masked, an input image included."""
        model = lively_unified_model()
        codes = random_codes(2)
        ids = torch.tensor([[5, *PICTURE, 6, 7, *PICTURE, 2]])
        first = ids.shape[1] - len(PICTURE) - 1
        mask = torch.ones_like(ids)
        mask[:, :first] = 0
        labels = ids.clone()
        labels[:, :first] = -100
        # `<image_start>` is the start of the short sequence: nothing predicts it there.
        labels[:, first] = -100
        dropped = model(ids, attention_mask=mask, **codes, labels=labels)
        short = model(ids[:, first:], **{name: kind[1:] for name, kind in codes.items()}, labels=labels[:, first:])
        torch.testing.assert_close(dropped.logits[:, first:], short.logits, **CLOSE)
        for name in ("text_loss", "pixel_loss", "semantic_loss"):
            torch.testing.assert_close(dropped[name], short[name], **CLOSE)

    def test_positions_count_what_the_mask_keeps(self, model):
        """Rotary embeddings hide a common shift: read the position ids themselves."""
        seen = []
        hook = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
        )
        ids, mask = torch.tensor([[0, 0, 5, START], [5, 6, 7, START]]), torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]])
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        model(ids[:, :1], attention_mask=torch.nn.functional.pad(mask, (0, 1), value=1), past_key_values=cache)
        model(ids)
        hook.remove()
        assert seen[0][0, 2:].tolist() == [0, 1] and seen[0][1, 3:].tolist() == [0]
        assert seen[1].tolist() == [[2], [1]]
        assert seen[2] is None

    def test_cached_forward_equals_the_full_one(self):
        model = lively_unified_model()
        ids = torch.tensor([[5, *PICTURE, 6, *PICTURE, 7, 8]])
        codes = random_codes(2)
        full = model(ids, **codes).logits
        cut = len(PICTURE) + 2
        first = model(ids[:, :cut], **{name: kind[:1] for name, kind in codes.items()}, use_cache=True)
        second = model(
            ids[:, cut:-1],
            **{name: kind[1:] for name, kind in codes.items()},
            past_key_values=first.past_key_values,
            use_cache=True,
        )
        last = model(ids[:, -1:], past_key_values=second.past_key_values, use_cache=True)
        parts = torch.cat([first.logits, second.logits, last.logits], dim=1)
        torch.testing.assert_close(parts, full, **CLOSE)

    def test_cached_forward_on_a_padded_batch(self, model):
        batch = training_batch()
        del batch["labels"]
        full = model(**batch).logits
        mask, ids = batch["attention_mask"], batch["input_ids"]
        cache = DynamicCache(config=model.config.text_config)
        start = model(**{**batch, "input_ids": ids[:, :-1], "attention_mask": mask[:, :-1]}, past_key_values=cache)
        last = model(ids[:, -1:], attention_mask=mask, past_key_values=start.past_key_values)
        torch.testing.assert_close(last.logits[:, 0], full[:, -1], **CLOSE)

    def test_inputs_embeds(self):
        model = lively_unified_model()
        batch = training_batch()
        expected = model(**batch)
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
        out = model(**batch)
        torch.testing.assert_close(out.logits, expected.logits)
        torch.testing.assert_close(out.loss, expected.loss)

    def test_eager_equals_sdpa_and_gives_attentions(self, model):
        batch = training_batch()
        sdpa = model(**batch, output_hidden_states=True)
        model.set_attn_implementation("eager")
        eager = model(**batch, output_attentions=True, output_hidden_states=True)
        kept = batch["attention_mask"].bool()
        torch.testing.assert_close(eager.logits[kept], sdpa.logits[kept], **CLOSE)
        rows, length = batch["input_ids"].shape
        assert [tuple(x.shape) for x in eager.attentions] == [(rows, 4, length, length)] * 2
        assert [tuple(x.shape) for x in eager.hidden_states] == [(rows, length, 32)] * 3
        assert torch.equal(eager.hidden_states[-1], eager.last_hidden_state)

    def test_tuples_and_the_base_model(self, model):
        batch = training_batch()
        named = model(**batch)
        assert torch.equal(model(**batch, return_dict=False)[0], named.loss)
        del batch["labels"]
        base = model.model(**batch)
        assert torch.equal(base.last_hidden_state, named.last_hidden_state)
        assert set(base.keys()) == {"last_hidden_state", CACHE_NAME, "pixel_codes", "semantic_codes"}
        mask = model.model.image_mask(batch["input_ids"], None)
        assert torch.equal(mask, batch["input_ids"] == IMAGE)
        assert torch.equal(model.model(**batch, image_mask=mask).last_hidden_state, named.last_hidden_state)

    def test_per_depth_codebooks(self):
        fields = tiny_unified_config().vision_tokenizer_config.to_dict()
        fields["pixel_quantizer_config"]["shared_codebook"] = False
        model = lively_unified_model(vision_tokenizer_config=fields)
        batch = training_batch()
        expected = naive_loss(model, **batch)
        torch.testing.assert_close(model(**batch).pixel_loss, expected["pixel"] / expected["num_visual"])

    def test_one_depth(self):
        fields = tiny_unified_config().vision_tokenizer_config.to_dict()
        for kind in ("pixel", "semantic"):
            fields[f"{kind}_quantizer_config"]["num_depths"] = 1
        model = lively_unified_model(vision_tokenizer_config=fields)
        batch = training_batch()
        batch |= {name: batch[name][..., :1] for name in ("pixel_codes", "semantic_codes")}
        expected = naive_loss(model, **batch)
        torch.testing.assert_close(model(**batch).pixel_loss, expected["pixel"] / expected["num_visual"])


class TestEmbeddings:
    def test_resizing(self):
        model = lively_unified_model()
        batch = training_batch()
        before = model(**batch)
        model.resize_token_embeddings(64, mean_resizing=False)
        after = model(**batch)
        assert model.config.text_config.vocab_size == 64 and after.logits.shape[-1] == 64
        torch.testing.assert_close(after.logits[..., :60], before.logits, **CLOSE)
        torch.testing.assert_close(after.pixel_loss, before.pixel_loss, **CLOSE)
        # The tokenizer's own text embeddings are another matter.
        assert len(model.vision_tokenizer.get_input_embeddings().weight) == 64

    def test_tied(self, tmp_path):
        text_config = {**tiny_unified_config().text_config.to_dict(), "tie_word_embeddings": True}
        model = lively_unified_model(text_config=text_config)
        assert model.config.tie_word_embeddings
        assert model.lm_head.weight is model.get_input_embeddings().weight
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
        batch = training_batch()
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)

    def test_not_tied_by_default_here(self, model):
        assert model.lm_head.weight is not model.get_input_embeddings().weight


@pytest.fixture
def warnings_of_transformers(caplog):
    """Messages of transformers at WARNING and above."""
    transformers_logging.enable_propagation()
    caplog.set_level(logging.WARNING, logger="transformers")
    yield caplog
    transformers_logging.disable_propagation()


class TestLoading:
    @pytest.mark.parametrize(
        "auto_class",
        [AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM, DualTokenForCausalLM],
    )
    def test_bit_for_bit(self, auto_class, tmp_path, warnings_of_transformers):
        model = lively_unified_model()
        model.save_pretrained(tmp_path)
        loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is DualTokenForCausalLM
        assert not any(info.values()), info
        assert not [record.message for record in warnings_of_transformers.records]
        state, loaded_state = model.state_dict(), loaded.state_dict()
        assert state.keys() == loaded_state.keys()
        assert all(torch.equal(state[name], loaded_state[name]) for name in state)
        batch = training_batch()
        assert torch.equal(loaded(**batch).loss, model(**batch).loss)

    def test_base_model(self, model, tmp_path, warnings_of_transformers):
        model.save_pretrained(tmp_path)
        loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is DualTokenModel
        assert not any(info.values()), info
        assert not [record.message for record in warnings_of_transformers.records]
        state, loaded_state = model.model.state_dict(), loaded.state_dict()
        assert state.keys() == loaded_state.keys()
        assert all(torch.equal(state[name], loaded_state[name]) for name in state)

    def test_base_model_alone(self, model, tmp_path):
        model.model.save_pretrained(tmp_path)
        loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is DualTokenModel and not any(info.values()), info
        state, loaded_state = model.model.state_dict(), loaded.state_dict()
        assert all(torch.equal(state[name], loaded_state[name]) for name in state)

    @pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM])
    def test_the_tokenizer_comes_back_frozen(self, auto_class, model, tmp_path):
        model.save_pretrained(tmp_path)
        loaded = auto_class.from_pretrained(tmp_path)
        tokenizer = loaded.base_model.vision_tokenizer
        assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
        assert not tokenizer.training and not loaded.training
        assert loaded.base_model.visual_projector.linear_1.weight.requires_grad
        assert not loaded.train().base_model.vision_tokenizer.training

    def test_bfloat16_keeps_the_codebooks_in_float32(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        for kind in ("pixel", "semantic"):
            for name, buffer in loaded.vision_tokenizer.quantizer(kind).codebook.named_buffers():
                original = dict(model.vision_tokenizer.quantizer(kind).codebook.named_buffers())[name]
                assert buffer.dtype == torch.float32 and torch.equal(buffer, original)
        others = {parameter.dtype for parameter in loaded.parameters()}
        assert others == {torch.bfloat16}
        batch = training_batch()
        torch.testing.assert_close(loaded(**batch).loss, model(**batch).loss, rtol=0.1, atol=0.1)
        loaded.train()(**batch).loss.backward()

    def test_generation_config_is_saved(self, model, tmp_path):
        model.generation_config.max_new_tokens = 7
        model.save_pretrained(tmp_path)
        assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.max_new_tokens == 7


class TestFromParts:
    IDS = {"image_start_token_id": START, "image_token_id": IMAGE, "image_end_token_id": END}

    @pytest.fixture
    def language_model(self):
        model = Qwen2ForCausalLM(Qwen2Config(**_without_type(tiny_unified_config().text_config.to_dict())))
        model.generation_config.max_new_tokens = 11
        return model

    @pytest.fixture
    def parts(self, tokenizer, language_model):
        return tokenizer, language_model

    @staticmethod
    def check(model, tokenizer, language_model):
        assert type(model) is DualTokenForCausalLM
        for mine, theirs in (
            (model.vision_tokenizer, tokenizer),
            (model.model.language_model, language_model.model),
            (model.lm_head, language_model.lm_head),
        ):
            state, expected = mine.state_dict(), theirs.state_dict()
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[name], expected[name]) for name in expected)
        assert model.generation_config.max_new_tokens == 11
        assert not any(parameter.requires_grad for parameter in model.vision_tokenizer.parameters())
        assert not model.vision_tokenizer.training

    def test_from_objects(self, parts):
        model = DualTokenForCausalLM.from_pretrained_parts(*parts, **self.IDS)
        self.check(model, *parts)
        # Copies: training the one leaves the other alone.
        assert model.generation_config is not parts[1].generation_config
        assert model.lm_head.weight is not parts[1].lm_head.weight
        text = torch.tensor([[5, 6, 7]])
        torch.testing.assert_close(model(text).logits, parts[1](text).logits)
        assert model(**training_batch()).loss.isfinite()

    def test_from_paths(self, parts, tmp_path):
        for name, part in zip(("tokenizer", "language_model"), parts):
            part.save_pretrained(tmp_path / name)
        model = DualTokenForCausalLM.from_pretrained_parts(
            tmp_path / "tokenizer", str(tmp_path / "language_model"), **self.IDS
        )
        self.check(model, *parts)
        model.save_pretrained(tmp_path / "unified")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "unified")
        self.check(loaded, *parts)

    def test_tied_language_model(self, tokenizer):
        fields = _without_type(tiny_unified_config().text_config.to_dict())
        language_model = Qwen2ForCausalLM(Qwen2Config(**{**fields, "tie_word_embeddings": True}))
        model = DualTokenForCausalLM.from_pretrained_parts(tokenizer, language_model, **self.IDS)
        assert model.lm_head.weight is model.get_input_embeddings().weight
        text = torch.tensor([[5, 6, 7]])
        torch.testing.assert_close(model(text).logits, language_model(text).logits)

    def test_dtype(self, parts):
        model = DualTokenForCausalLM.from_pretrained_parts(*parts, **self.IDS, dtype=torch.bfloat16)
        assert model.lm_head.weight.dtype == model.depth_heads.norm.weight.dtype == torch.bfloat16
        assert model.vision_tokenizer.pixel_quantizer.codebook.embeddings.dtype == torch.float32

    def test_eval_mode(self, parts):
        model = DualTokenForCausalLM.from_pretrained_parts(*(part.train() for part in parts), **self.IDS)
        assert not any(module.training for module in model.modules())

    @pytest.mark.parametrize("as_paths", [False, True])
    def test_attention_of_the_parts(self, tokenizer, tmp_path, as_paths):
        """The language model's own or the one asked for; the tokenizer's stays."""
        fields = _without_type(tiny_unified_config().text_config.to_dict())
        language_model = Qwen2ForCausalLM._from_config(Qwen2Config(**fields), attn_implementation="eager")
        parts = [tokenizer, language_model]
        if as_paths:
            parts = [tmp_path / "tokenizer", tmp_path / "language_model"]
            tokenizer.save_pretrained(parts[0])
            language_model.save_pretrained(parts[1])
        for asked in (None, "eager", "sdpa"):
            model = DualTokenForCausalLM.from_pretrained_parts(*parts, **self.IDS, attn_implementation=asked)
            language, tower = model.model.language_model, model.vision_tokenizer.siglip.vision_model
            expected = asked or ("sdpa" if as_paths else "eager")
            configs = (model.config.text_config, language.config, language.layers[0].self_attn.config)
            assert [config._attn_implementation for config in configs] == [expected] * 3
            assert tower.encoder.layers[0].self_attn.config._attn_implementation == "sdpa"

    @pytest.mark.parametrize("trained", [True, False])
    @torch.no_grad()
    def test_image_positions_are_as_large_as_text(self, parts, trained):
        for kind in ("pixel", "semantic"):
            codebook = parts[0].quantizer(kind).codebook
            codebook.embeddings.mul_(30)
            codebook.cluster_size.uniform_(1, 5) if trained else codebook.cluster_size.zero_()
        model = DualTokenForCausalLM.from_pretrained_parts(*parts, **self.IDS)
        images = model.get_image_features(**random_codes(8)).pooler_output
        text = model.get_input_embeddings().weight
        assert 0.5 < float(images.square().mean().sqrt() / text.square().mean().sqrt()) < 2

    def test_unknown_override(self, parts):
        with pytest.raises(ValueError, match="No such fields of DualTokenConfig: num_heads"):
            DualTokenForCausalLM.from_pretrained_parts(*parts, **self.IDS, num_heads=3)

    def test_ids_outside_the_vocabulary(self, parts):
        with pytest.raises(ValueError, match="vocabulary of 60.*151652"):
            DualTokenForCausalLM.from_pretrained_parts(*parts)

    def test_wrong_tokenizer(self, language_model):
        with pytest.raises(TypeError, match="must be a DualTokenVisionTokenizer, got Qwen2ForCausalLM"):
            DualTokenForCausalLM.from_pretrained_parts(language_model, language_model, **self.IDS)


def _without_type(fields: dict) -> dict:
    return {name: value for name, value in fields.items() if name != "model_type"}


class TestBadInputs:
    IDS = torch.tensor([[5, *PICTURE, 6, 2]])

    @pytest.mark.parametrize("images", [0, 2])
    def test_placeholders_that_do_not_fit(self, model, images):
        codes = random_codes(images) if images else {}
        with pytest.raises(ValueError, match=rf"{images} image\(s\) were given.*{images * N} placeholders.*hold 9"):
            model(self.IDS, **codes)

    def test_images_divided_among_rows(self, model):
        ids = torch.tensor([[IMAGE] * (N + 3) + [5] * 3, [5] * 9 + [IMAGE] * (N - 3)])
        with pytest.raises(ValueError, match=r"whole images, 9 placeholders each; rows \[0, 1\] hold \[12, 6\]"):
            model(ids, **random_codes(2))

    def test_pixels_without_placeholders(self, model, pixel_values):
        with pytest.raises(ValueError, match=r"2 image\(s\) were given.*hold 0"):
            model(torch.tensor([[5, 6]]), pixel_values=pixel_values)

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda codes: codes.index_fill(3, torch.tensor([1]), 24), "between 0 and 23"),
            (lambda codes: codes.index_fill(3, torch.tensor([1]), -1), "between 0 and 23"),
            (lambda codes: codes[..., :2], "3 residual codes"),
            (lambda codes: codes[:, :2], r"shape \(B, 3, 3, 3\)"),
            (lambda codes: codes.flatten(1, 2), r"shape \(B, 3, 3, 3\)"),
            (lambda codes: codes.float(), "must be integers"),
        ],
        ids=["too_large", "negative", "depths", "grid", "flat", "float"],
    )
    @pytest.mark.parametrize("kind", ["pixel", "semantic"])
    def test_codes_that_do_not_fit(self, model, kind, change, message):
        codes = random_codes(1)
        codes[f"{kind}_codes"] = change(codes[f"{kind}_codes"])
        with pytest.raises(ValueError, match=f"{kind}_codes.*{message}"):
            model(self.IDS, **codes)

    @pytest.mark.parametrize("kind", ["pixel", "semantic"])
    def test_one_kind_of_codes(self, model, kind):
        codes = random_codes(1)
        missing = codes.pop(f"{kind}_codes")
        with pytest.raises(ValueError, match=f"`{kind}_codes` is missing"):
            model(self.IDS, **codes)
        assert missing is not None

    def test_codes_of_different_images(self, model):
        codes = random_codes(2)
        codes["pixel_codes"] = codes["pixel_codes"][:1]
        with pytest.raises(ValueError, match="must describe the same images, got 1 and 2"):
            model(self.IDS, **codes)

    def test_pixels_and_codes(self, model, pixel_values):
        with pytest.raises(ValueError, match="not as both"):
            model(self.IDS, pixel_values=pixel_values[:1], **random_codes(1))

    def test_ids_and_embeddings(self, model):
        embeds = model.get_input_embeddings()(self.IDS)
        with pytest.raises(ValueError, match="Exactly one of"):
            model(self.IDS, inputs_embeds=embeds)
        with pytest.raises(ValueError, match="Exactly one of"):
            model()

    def test_image_labelled_in_part(self, model):
        ids = torch.tensor([[5, *PICTURE, *PICTURE]])
        labels = ids.clone()
        labels[0, -3] = -100
        with pytest.raises(ValueError, match="image 1 of the batch has 8 of 9 positions"):
            model(ids, **random_codes(2), labels=labels)

    def test_labels_of_another_shape(self, model):
        with pytest.raises(ValueError, match=r"shape of the ids, \(1, 14\), got \(1, 13\)"):
            model(self.IDS, **random_codes(1), labels=self.IDS[:, :-1])

    def test_image_labels_without_an_image(self, model):
        with pytest.raises(ValueError, match="no images were given"):
            model(torch.tensor([[5, 6]]), labels=torch.tensor([[5, IMAGE]]))
        labels = self.IDS.clone()
        labels[0, 0] = IMAGE
        with pytest.raises(ValueError, match="positions that are no image's"):
            model(self.IDS, **random_codes(1), labels=labels)

    def test_image_at_the_very_start(self, model):
        ids = self.IDS[:, 2:]
        with pytest.raises(ValueError, match="no `<image_start>` to predict it"):
            model(ids, **random_codes(1), labels=ids)
        assert model(ids, **random_codes(1)).logits is not None

    def test_decode_images_takes_one_argument(self, model):
        with pytest.raises(ValueError, match="or `pixel_codes`"):
            model.decode_images()
        codes = random_codes(2)["pixel_codes"]
        assert torch.equal(
            model.decode_images(pixel_codes=codes), model.vision_tokenizer.decode(pixel_codes=codes).reconstruction
        )


def test_the_tokenizer_is_reachable(model):
    assert isinstance(model.vision_tokenizer, DualTokenVisionTokenizer)
    assert model.vision_tokenizer is model.model.vision_tokenizer
