"""Installations without extras: one sentence, with the extra that brings what is missing."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from transformers_dualtoken.optional_libraries import EXTRAS, MissingLibraryError, needed_libraries, require


ROOT = Path(__file__).parents[1]
# Imports whose distribution has another name.
DISTRIBUTIONS = {
    "open_clip": "open_clip_torch",
    "scipy": "scikit-learn",  # which needs it
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
}

# In a process where none of the libraries can be imported: what each import ends in, "" where it works. And where
# transformers is newer than what was tested.
CHECK = """
import importlib.util, json, sys, transformers, warnings
from pathlib import Path
transformers.__version__ = "5.99.0"
warnings.simplefilter("always")
from transformers_dualtoken.optional_libraries import EXTRAS
sys.modules |= dict.fromkeys(EXTRAS)
root, outcomes = Path(sys.argv[1]), {}
modules = ["transformers_dualtoken", "transformers_dualtoken.evaluation", "transformers_dualtoken.training",
           "transformers_dualtoken.training.unified.adapters"]
for name in [*modules, *sorted(str(path.relative_to(root)) for path in root.glob("**/*.py"))]:
    try:
        if name.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(name).stem + "_script", root / name)
            sys.path.insert(0, str((root / name).parent))
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        else:
            importlib.import_module(name)
        outcomes[name] = ""
    except Exception as error:
        outcomes[name] = f"{type(error).__name__}: {error}"
    # Parts of a package whose import failed stay behind.
    for part in [part for part in sys.modules if part.startswith("transformers_dualtoken.training")]:
        del sys.modules[part]
print(json.dumps(outcomes))
"""


def test_nothing_installed_but_the_core():
    result = subprocess.run(
        [sys.executable, "-c", CHECK, str(ROOT / "examples")], capture_output=True, text=True, check=True
    )
    assert result.stderr.count("tested up to") == 1  # of a newer transformers, at import
    outcomes = json.loads(result.stdout.splitlines()[-1])
    works = {"transformers_dualtoken", "transformers_dualtoken.evaluation", "eval_tokenizer.py", "digits/run_demo.py"}
    assert {name for name, outcome in outcomes.items() if not outcome} >= works
    for name, outcome in outcomes.items():
        assert not outcome or re.match(
            r"MissingLibraryError: .* needs \w+: pip install 'transformers-dualtoken\[\w+\]'", outcome
        ), (name, outcome)


def test_every_extra_brings_its_libraries():
    text = (ROOT / "pyproject.toml").read_text()
    for library, extra in EXTRAS.items():
        body = re.search(rf"^{extra} = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1]
        name = DISTRIBUTIONS.get(library, library).replace("_", "[_-]")
        assert re.search(rf'"{name}["><=]', body), (library, extra)


def test_the_outermost_purpose_is_named(monkeypatch):
    for name in ("peft", "peft.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingLibraryError, match="^`dualtoken merge` needs peft: ") as caught:
        with needed_libraries("`dualtoken merge`"):
            require("peft.utils", "An adapter")
    for command in ("pip install 'transformers-dualtoken[train]'", "pip install -c constraints.txt '.[train]'"):
        assert command in str(caught.value)
    assert "An adapter" not in str(caught.value)
    with pytest.raises(ModuleNotFoundError, match="no_such_library"), needed_libraries("A test"):
        import no_such_library  # noqa: F401
