"""Versions of installed distributions."""

from importlib import metadata


def version_of(name: str) -> str | None:
    """Version of an installed distribution; None where there is none of that name."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
