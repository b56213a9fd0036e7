"""File patterns below a folder, such as `photos/**/*.jpg`: a fixed folder, and a regular expression for the
rest.

`**/` any folders or none, `*` and `?` within a name, `[...]` a character set, `{a,b}` and `{1..3}`
alternatives. A pattern part that is, brackets included, the name of an existing folder denotes that
folder.
"""

import os
import re
import unicodedata
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

from braceexpand import UnbalancedBracesError, braceexpand

from stpp.errors import UserError
from stpp.images.image_file import IMAGE_EXTENSIONS

_BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")
MOST_WORDS = 10_000
"""Maximum number of alternatives that braces may expand to."""


@dataclass(frozen=True, slots=True)
class Side:
    """Search location of images or of masks."""

    prefix: str
    """Folder below the root; "" is the root itself."""
    pattern: re.Pattern | None
    """Regular expression for a path below the prefix: group 1 is the name, the further groups are the name
    without the fixed folders between wildcards; None: any path."""
    extensions: tuple[str, ...] = IMAGE_EXTENSIONS
    lead: str = ""
    """Common beginning of all names: `img_` for `photos/img_*.jpg`."""

    def without_lead(self, path_of: dict[str, str]) -> dict[str, str]:
        """Paths by pairing name, with the common beginning removed from the names."""
        parts = ((*name.rpartition("/"), path) for name, path in path_of.items())
        return {f"{folder}{slash}{last[len(self.lead):]}": path for folder, slash, last, path in parts}


def parsed(pattern: str, flag: str, root: Path | None = None) -> Side:
    """Splits a pattern into fixed folders and a regular expression whose group 1 is the pairing name.

    Args:
        flag: "images" or "masks", for messages, and for the extensions of patterns that end in a wildcard.
        root: folder in which parts with brackets or braces may be literal folder names.

    Raises:
        UserError: a pattern that leads outside, has no wildcard, or has unreadable braces.
    """
    pattern_NFC = unicodedata.normalize("NFC", pattern)
    parts = pattern_NFC.replace("\\", "/").split("/")
    if pattern.startswith(("/", "~")) or ".." in parts or not parts[-1]:
        raise UserError(
            f"--data.{flag} {pattern}: must be a pattern of files below the data root, without '..'"
        )
    prefix, parts = _fixed([part for part in parts if part != "."], root)
    for found in _BRACES.finditer("/".join(parts)):
        if set(found[1]) & set("*?[/"):
            raise UserError(
                f"--data.{flag} {pattern}: braces may hold words, such as {{train,val}}, but no wildcards or "
                "folders"
            )
    rest = "/".join(parts)
    wild = max(rest.rfind(c) for c in "*?]")
    if wild < 0:
        wild = max((found.end() - 1 for found in _BRACES.finditer(rest)), default=-1)
    if wild < 0:
        raise UserError(f"--data.{flag} {pattern}: has no '*'; give a pattern such as 'photos/**/*.jpg'")
    ending = rest[wild + 1 :]
    # A pattern that ends in a wildcard, such as photos/*, pairs by the name without extension.
    tail = expression(ending, flag) if ending else r"(?:\.[^./]*)?"
    lazy = "?" if not ending and rest.endswith("*") else ""
    runs = groupby(rest[: wild + 1].split("/"), key=_is_wild)
    *before, (_, last) = [(is_wild, "/".join(run)) for is_wild, run in runs]
    folders = "".join(
        f"({expression(run + '/', flag)})" if is_wild else re.escape(run + "/") for is_wild, run in before
    )
    try:
        compiled = re.compile(f"({folders}({expression(last, flag)}{lazy})){tail}", re.IGNORECASE | re.DOTALL)
    except re.error as error:
        raise UserError(f"--data.{flag} {pattern}: the set in brackets is invalid ({error})") from None
    extensions = ("",) if ending else IMAGE_EXTENSIONS if flag == "images" else (".png",)
    name = last.rpartition("/")[2]
    found = re.search(r"[*?\[]|" + _BRACES.pattern, name)
    lead = name[: found.start()] if found else ""
    return Side(prefix, compiled, extensions, lead)


def expression(glob: str, flag: str = "images") -> str:
    """Regular expression of a glob."""
    out, i = [], 0
    while i < len(glob):
        if glob.startswith("**/", i):
            out.append("(?:[^/]+/)*")
            i += 3
        elif glob.startswith("**", i):
            out.append(".*")
            i += 2
        elif glob[i] == "*":
            out.append("[^/]*")
            i += 1
        elif glob[i] == "?":
            out.append("[^/]")
            i += 1
        elif glob[i] == "[" and (end := glob.find("]", i + 2)) > 0:
            inside = glob[i + 1 : end].replace("\\", "\\\\").replace("[", "\\[")
            # The brackets may be literal: browsers name folders `photos [1]`.
            out.append(
                f"(?:[{'^' + inside[1:] if inside[0] == '!' else inside}]|{re.escape(glob[i : end + 1])})"
            )
            i = end + 1
        elif found := _BRACES.match(glob, i):
            out.append(f"(?:{'|'.join(map(re.escape, _words(found[0], flag)))})")
            i = found.end()
        else:
            out.append(re.escape(glob[i]))
            i += 1
    return "".join(out)


def _fixed(parts: list[str], root: Path | None) -> tuple[str, list[str]]:
    """Literal folder at the start of a pattern, as spelled on disk, and the remaining parts."""
    prefix = ""
    for number, part in enumerate(parts[:-1]):
        forms = [
            os.path.join(prefix, form) for form in dict.fromkeys((part, unicodedata.normalize("NFD", part)))
        ]
        existing = next((form for form in forms if root is not None and os.path.isdir(root / form)), None)
        if existing is None and _is_wild(part):
            return prefix, parts[number:]
        prefix = existing or forms[0]
    return prefix, parts[-1:]


def _is_wild(part: str) -> bool:
    return bool(set(part) & set("*?[")) or bool(_BRACES.search(part))


def _words(braces: str, flag: str) -> list[str]:
    try:
        words = list(dict.fromkeys(islice(braceexpand(braces), MOST_WORDS + 1)))
    except (UnbalancedBracesError, ValueError) as error:
        raise UserError(f"--data.{flag}: the braces {braces} cannot be read ({error})") from None
    if len(words) > MOST_WORDS:
        raise UserError(f"--data.{flag}: the braces {braces} expand to more than {MOST_WORDS} words")
    return words
