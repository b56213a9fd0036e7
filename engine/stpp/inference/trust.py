"""Whose engines are loaded: an engine is a native program, and loading it runs it.

Every engine that this user builds is signed: an HMAC over `engine.json`, which names the SHA-256 of every
file, with a secret key that lies in the user's own cache folder and is readable by nobody else. An engine
folder from elsewhere, or with one byte changed, has no valid signature. It says "I built this", not "I am
careful": whoever can read the key, or run programs as the user, can sign too. Machines that share a home
directory share the key.
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from stpp import files
from stpp.errors import UserError
from stpp.inference import record as records
from stpp.inference.record import EngineRecord

KEY_BYTES = 32


def cache_folder() -> Path:
    """The user's own cache: `$XDG_CACHE_HOME/stpp`, or `~/.cache/stpp`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stpp"


def sign(record: EngineRecord) -> str:
    """The signature of this user for an engine just built."""
    return hmac.new(_key(create=True), records.canonical(record), hashlib.sha256).hexdigest()


def is_own(record: EngineRecord, signature: str) -> bool:
    """Whether this user signed the record."""
    key = _key(create=False)
    expected = hmac.new(key, records.canonical(record), hashlib.sha256).hexdigest() if key else ""
    return bool(key) and hmac.compare_digest(expected, signature)


def altered_file(folder: Path, record: EngineRecord) -> str | None:
    """Name of a file that is missing or differs from what the record says; None where all are as they were
    built."""
    for name, digest in record.files.items():
        path = folder / name
        if "/" in name or "\\" in name or not path.is_file() or files.sha256(path) != digest:
            return name
    return None


def _key(*, create: bool) -> bytes:
    """The secret; empty where there is none and none is to be made."""
    path = cache_folder() / "engine.key"
    if not path.exists() and not create:
        return b""
    if not path.exists():
        files.create_once(path, secrets.token_bytes(KEY_BYTES))
    stat = path.stat()
    if hasattr(os, "getuid") and (stat.st_uid != os.getuid() or stat.st_mode & 0o077):
        raise UserError(f"{path} is not yours alone (owner {stat.st_uid}, mode {stat.st_mode & 0o777:o}); "
                        "delete it: engines are then compiled again")
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise UserError(f"{path} is damaged ({len(key)} bytes, expected {KEY_BYTES}); delete it: engines are "
                        "then compiled again")
    return key
