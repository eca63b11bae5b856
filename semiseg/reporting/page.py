"""HTML pages from the templates beside this file."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import jinja2
from matplotlib.figure import Figure

from semiseg.evaluation.figures import draw_figure


@dataclass(frozen=True)
class Picture:
    """A picture inside of a page."""

    source: str  # data URL
    text: str  # what it shows

    @classmethod
    def of_png(cls, content: bytes, text: str) -> Picture:
        """A picture from the content of its file."""
        return cls(f"data:image/png;base64,{base64.b64encode(content).decode()}", text)

    @classmethod
    def of_figure(cls, figure: Figure, text: str) -> Picture:
        """A picture that is on no disk."""
        content = io.BytesIO()
        draw_figure(figure, content)
        return cls.of_png(content.getvalue(), text)


def render(template: str, **values: Any) -> str:
    """An HTML page from a template; whatever goes in is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("semiseg.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
