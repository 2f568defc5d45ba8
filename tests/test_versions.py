"""Versions of transformers: the oldest and the newest that are supported, and what is said of others."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_unified_config
from transformers import DynamicCache

import transformers_dualtoken
from transformers_dualtoken.modeling_dualtoken import DualTokenForCausalLM
from transformers_dualtoken.transformers_compat import (
    CACHE_NAME,
    NEWEST_TRANSFORMERS,
    OLDEST_TRANSFORMERS,
    check_transformers_version,
)


ROOT = Path(__file__).parents[1]


def test_older_is_refused():
    with pytest.raises(ImportError, match=rf"needs transformers {OLDEST_TRANSFORMERS} or later, but 5\.5\.4 is"):
        check_transformers_version("5.5.4")


def test_newer_is_said():
    """Once at import: in test_optional_libraries.py."""
    with pytest.warns(UserWarning, match=f"tested up to {NEWEST_TRANSFORMERS}"):
        check_transformers_version("5.99.0.dev0")


@pytest.mark.parametrize("version", [OLDEST_TRANSFORMERS + ".0", NEWEST_TRANSFORMERS])
def test_supported_is_silent(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_transformers_version(version)


def test_the_numbers_are_those_that_are_installed():
    project, pins = (ROOT / "pyproject.toml").read_text(), (ROOT / "constraints.txt").read_text()
    assert f'"transformers>={OLDEST_TRANSFORMERS}"' in project
    assert re.search(rf"^transformers=={re.escape(NEWEST_TRANSFORMERS)};? ?", pins, re.MULTILINE)


def test_package_has_a_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", transformers_dualtoken.__version__)


class TestCacheNames:
    """Since 5.24 transformers calls `past_key_values` `cache`: both names are taken, the output has transformers'."""

    @pytest.fixture
    def model(self):
        return DualTokenForCausalLM(tiny_unified_config()).eval()

    @pytest.mark.parametrize("base", [False, True])
    def test_both_are_taken(self, model, base):
        part, ids = model.model if base else model, torch.tensor([[5, 6, 7]])
        outputs = []
        for name in ("cache", "past_key_values"):
            cache = DynamicCache(config=model.config.text_config)
            outputs.append(part(ids, use_cache=True, **{name: cache}))
            assert cache.get_seq_length() == 3
            assert outputs[-1][CACHE_NAME] is cache
            assert outputs[-1].past_key_values is cache
        torch.testing.assert_close(outputs[0].last_hidden_state, outputs[1].last_hidden_state, rtol=0, atol=0)

    def test_both_at_once_are_refused(self, model):
        cache = DynamicCache(config=model.config.text_config)
        with pytest.raises(ValueError, match="two names of one argument"):
            model(torch.tensor([[5]]), cache=cache, past_key_values=cache)

    @pytest.mark.parametrize("name", ["cache", "past_key_values"])
    def test_in_generate(self, model, name):
        ids = torch.tensor([[5, 6, 7]])
        expected = model.generate(ids, max_new_tokens=4, do_sample=False)
        cache = DynamicCache(config=model.config.text_config)
        first = model.generate(ids, max_new_tokens=2, do_sample=False, **{name: cache})
        assert torch.equal(model.generate(first, max_new_tokens=2, do_sample=False, **{name: cache}), expected)


@pytest.mark.parametrize("version", ["5.24.0.dev0", "5.24rc1", "5.6.0rc2"])
def test_pre_releases_are_read(version):
    check_transformers_version(version)
