"""Lease of a run folder: at most one process runs in it.

`lease.json` names the holder, and its modification time is the heartbeat. The lease of a dead process on this
machine is void immediately, one of another machine after `EXPIRY_S` without a heartbeat.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from stpp import files
from stpp.errors import UserError

BEAT_S = 15.0
EXPIRY_S = 120.0
NAME = "lease.json"


@contextlib.contextmanager
def held(folder: Path, *, beat_s: float = BEAT_S, expiry_s: float = EXPIRY_S) -> Iterator[None]:
    """Holds the lease of `folder`, which is created if missing, during the block.

    Raises:
        UserError: another process holds it (named by host and PID), or the folder cannot be written.
    """
    path, own = folder / NAME, {**_me(), "token": secrets.token_hex(8)}
    try:
        with files.locked(folder / ".lease.lock"):
            require_free(folder, expiry_s)
            files.write_json(path, own)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}; choose a writable folder") from None
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, own, ended, beat_s), name="stpp-lease", daemon=True)
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()
        with contextlib.suppress(OSError):
            if _read(path) == own:
                path.unlink()


def require_free(folder: Path, expiry_s: float = EXPIRY_S) -> None:
    """Checks that no running process holds the lease of a folder.

    Raises:
        UserError: names the process and its host.
    """
    path = folder / NAME
    if not path.exists():
        return
    age_s, holder = _age_s(path), _read(path)
    if holder is None:
        return  # damaged, so no valid lease: leases are written atomically
    if age_s > expiry_s or (holder.get("machine") == _me()["machine"] and not _running(holder.get("pid"))):
        return
    raise UserError(f"--out {path.parent} is in use by process {holder.get('pid')} on {holder.get('host')} "
                    f"(seen {age_s:.0f} s ago); stop it, choose another --out, or wait: a lease not renewed "
                    f"for {expiry_s:.0f} s is void")


def _beat(path: Path, own: dict, ended: threading.Event, beat_s: float) -> None:
    while not ended.wait(beat_s):
        try:
            if _read(path) != own:
                print(f"stpp: {path.parent} was taken over by another process ({_read(path)}), because this "
                      "one was suspended for too long; it exits, and no work is "
                      "lost", file=sys.stderr, flush=True)
                os._exit(1)  # nothing more may be written
            os.utime(path)
        except OSError:
            continue  # the file server may be briefly unavailable


def _age_s(path: Path) -> float:
    """Seconds since the last heartbeat, by the clock of the file system."""
    probe = path.with_name(f".{path.name}.{secrets.token_hex(4)}.now")
    files.plain(probe).close()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink()


def _read(path: Path) -> dict | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _me() -> dict:
    """Identity of this process: host, PID, and the scope of the PID (boot id and PID namespace)."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"host": socket.gethostname(), "pid": os.getpid(),
                "machine": f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"}
    return {"host": socket.gethostname(), "pid": os.getpid(), "machine": socket.gethostname()}


def _running(pid: object) -> bool:
    """Checks that a process of this machine is running; a zombie is not."""
    if not isinstance(pid, int) or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return True
