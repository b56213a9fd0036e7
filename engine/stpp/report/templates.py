"""Loader of this folder's templates; undefined variables are errors."""

from pathlib import Path

import jinja2

FOLDER = Path(__file__).parent


def template(name: str) -> jinja2.Template:
    """A template with autoescaping."""
    return jinja2.Environment(loader=jinja2.FileSystemLoader(FOLDER), autoescape=True,
                              undefined=jinja2.StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True).get_template(name)
