"""The examples in README.md and docs/."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


def example_with(part: str, document: str = "docs/own_data.md") -> str:
    """The only Python example of a document that has this part."""
    [example] = [code for code in blocks(document, "python") if part in code]
    return example
