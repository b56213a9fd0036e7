"""The templates of this folder, each of which must find all that it names."""

from pathlib import Path

import jinja2

FOLDER = Path(__file__).parent


def template(name: str) -> jinja2.Template:
    """A template; what is put in is escaped."""
    return jinja2.Environment(loader=jinja2.FileSystemLoader(FOLDER), autoescape=True,
                              undefined=jinja2.StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True).get_template(name)
