"""What the package carries: the source archive what is tracked and no more, the wheel all that is used at run time."""

import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import transformers_dualtoken


ROOT = Path(__file__).parents[1]
# What a used clone holds besides; the last is named by a listing that an older build left behind.
STRAYS = [
    "picture.png",
    "dualtoken-demo/model.safetensors",
    "dualtoken-demo/examples/digits/measure.py",
    ".venv-test/lib/module.py",
    ".pytest_cache/README.md",
    "docs/images/outputs/drawing.png",
    "examples/configs/outputs/config.json",
    "examples/configs/runs/model/README.md",
    "examples/digits/checkpoint/three.png",
    "examples/digits/__pycache__/data.cpython-311.pyc",
    "src/transformers_dualtoken/__pycache__/cli.cpython-311.pyc",
    "src/transformers_dualtoken/drawing.png",
    "src/transformers_dualtoken.egg-info/PKG-INFO",
    "tests/outputs/test_of_old.py",
    "notes/kept.txt",
]


def tracked() -> list[str]:
    """Tracked files and new ones that git does not ignore; of an unpacked source archive all that came in it."""
    if not (ROOT / ".git").exists():
        listing = ROOT / "src/transformers_dualtoken.egg-info/SOURCES.txt"
        return [name for name in listing.read_text().splitlines() if ".egg-info/" not in name]
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).exists()]


def build(kind: str, root: Path, output: Path) -> Path:
    """As pip does, but for the environment of its own, which would take a network."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(output)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = output.glob({"sdist": "*.tar.gz", "wheel": "*.whl"}[kind])
    return built


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source archive of a used clone, and the wheel of what it unpacks to."""
    clone, output = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("dist")
    for name in [*STRAYS, *tracked()]:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_bytes((ROOT / name).read_bytes() if name not in STRAYS else b"stray")
    (clone / "src/transformers_dualtoken.egg-info/SOURCES.txt").write_text("\n".join(STRAYS))
    sdist = build("sdist", clone, output)
    with tarfile.open(sdist) as archive:
        archive.extractall(output / "unpacked", filter="data")
    (unpacked,) = (output / "unpacked").iterdir()
    return unpacked, build("wheel", unpacked, output)


def test_source_archive_holds_what_is_tracked(built):
    unpacked, _ = built
    names = {str(file.relative_to(unpacked)) for file in unpacked.rglob("*") if file.is_file()}
    made = {name for name in names if name.startswith(("build/", "src/transformers_dualtoken.egg-info/"))}
    expected = {name for name in tracked() if name != ".gitignore" and not name.startswith(".ci/")}
    assert names - made - {"PKG-INFO", "setup.cfg"} == expected


def test_wheel_holds_what_is_used(built, tmp_path):
    _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    package = tmp_path / "transformers_dualtoken"
    source = Path(transformers_dualtoken.__file__).parent
    files, expected = (
        {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc"}
        for folder in (package, source)
    )
    assert files == expected
    assert "py.typed" in files
    code = "import transformers_dualtoken as t; print(t.__file__, t.__version__)"
    command = [sys.executable, "-W", "error", "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.stdout.split() == [str(package / "__init__.py"), transformers_dualtoken.__version__], run.stderr


def test_description_shows_elsewhere(built):
    """On a package index neither the files beside README.md nor its headings can be linked to."""
    _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Version"] == transformers_dualtoken.__version__
    assert metadata["Description-Content-Type"] == "text/markdown"
    description = metadata.get_payload()
    assert "from transformers import AutoModelForCausalLM" in description
    targets = re.findall(r"\]\(([^)]*)\)", description)
    assert targets and all(target.startswith("https://") for target in targets)


def test_floors_are_those_that_are_tested():
    """constraints-floor.txt names the floor of every library that pyproject.toml asks for, but of torch."""
    project = (ROOT / "pyproject.toml").read_text()
    floors = dict(re.findall(r'^    "([\w-]+)>=([\d.]+)[",]', project, re.MULTILINE))
    pins = re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints-floor.txt").read_text(), re.MULTILINE)
    assert {name for name, _ in pins} >= {
        "transformers",
        "diffusers",
        "huggingface_hub",
        "accelerate",
        "datasets",
        "peft",
    }
    for name, pin in pins:
        assert name == "pyarrow" or (pin + ".").startswith(floors[name] + "."), name
