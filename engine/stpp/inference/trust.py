"""Signatures of engines: engines contain native code, and loading one runs it.

Every engine that this user builds is signed: an HMAC over `engine.json`, which holds the SHA-256 of every
file, with a secret key in the user's cache folder that only the user can read. An engine folder from
elsewhere, or with one byte changed, has no valid signature. The signature proves who built the engine, no
more: anyone who can read the key, or run programs as the user, can sign too. Machines that share a home
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
    """Cache folder of the user: `$XDG_CACHE_HOME/stpp`, or `~/.cache/stpp`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stpp"


def sign(record: EngineRecord) -> str:
    """Signs an engine that was just built."""
    return hmac.new(_key(create=True), records.canonical(record), hashlib.sha256).hexdigest()


def is_own(record: EngineRecord, signature: str) -> bool:
    """Verifies this user's signature of a record."""
    key = _key(create=False)
    expected = hmac.new(key, records.canonical(record), hashlib.sha256).hexdigest() if key else ""
    return bool(key) and hmac.compare_digest(expected, signature)


def altered_file(folder: Path, record: EngineRecord) -> str | None:
    """Finds a file that is missing or differs from its hash in the record; None if all are unchanged."""
    for name, digest in record.files.items():
        path = folder / name
        if "/" in name or "\\" in name or not path.is_file() or files.sha256(path) != digest:
            return name
    return None


def _key(*, create: bool) -> bytes:
    """Reads the secret key; empty if there is none and `create` is False."""
    path = cache_folder() / "engine.key"
    if not path.exists() and not create:
        return b""
    if not path.exists():
        files.create_once(path, secrets.token_bytes(KEY_BYTES))
    stat = path.stat()
    if hasattr(os, "getuid") and (stat.st_uid != os.getuid() or stat.st_mode & 0o077):
        raise UserError(f"{path} is accessible to others (owner {stat.st_uid}, mode "
                        f"{stat.st_mode & 0o777:o}); delete it: engines are then compiled again")
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise UserError(f"{path} is damaged ({len(key)} bytes, expected {KEY_BYTES}); delete it: engines are "
                        "then compiled again")
    return key
