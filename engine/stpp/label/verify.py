"""What a finished shard left on the disk, against its marker and its rows."""

from pathlib import Path

from stpp.errors import UserError
from stpp.label import rows
from stpp.label.jobs import Job
from stpp.label.shards import Markers, measured


def damage(out: Path, job: Job, markers: Markers, shard: int) -> str | None:
    """The first file of a finished shard that is missing, truncated or altered, in words; None if all is as it was."""
    try:
        marker = markers.read(shard)
        part = out / job.folder / marker["rows"]["path"]
        found = _differs(part, marker["rows"])
        if found is None and job.folder == "labels":
            table = rows.read(part)
            masks = [{"path": f"masks/{row['key']}.png", "bytes": row["size"], "crc": row["crc"]}
                     for row in table if row["status"] == "ok"] if not marker["files"] else marker["files"]
            found = next((text for file in masks if (text := _differs(out / file["path"], file))), None)
        return found
    except (UserError, KeyError, TypeError) as error:
        return str(error)


def _differs(path: Path, expected: dict) -> str | None:
    try:
        found = measured(path)
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    if found["bytes"] != expected["bytes"]:
        return f"{path} has {found['bytes']} bytes instead of {expected['bytes']}"
    return None if found["crc"] == expected["crc"] else f"{path} was altered"
