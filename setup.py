"""The description that the package carries; all other metadata is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup


def self_contained(readme: str) -> str:
    """README.md where its neighbours are not beside it: links to files and headings as text, pictures by their names."""
    readme = re.sub(r"!\[([^\]]*)\]\((?!https?:)([^)]*)\)", r"*Picture: \1 (`\2` in the source archive).*", readme)
    readme = re.sub(r"\[([^\]]*)\]\(#[^)]*\)", r"\1", readme)
    readme = re.sub(r"\[([^\]]*)\]\(\1\)", r"`\1`", readme)
    return re.sub(r"\[([^\]]*)\]\((?!https?:)([^)]*)\)", r"\1 (`\2`)", readme)


setup(
    long_description=self_contained(Path(__file__).with_name("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
