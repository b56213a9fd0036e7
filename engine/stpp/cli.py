"""The command line: `stpp COMMAND ...`, also `python -m stpp COMMAND ...` under torchrun.

Nothing heavy is imported before a command runs, so that `--help` is instant.
"""

import errno
import faulthandler
import importlib
import os
import sys
from pathlib import Path

from stpp import signals
from stpp.errors import UserError

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("demo", "make a small synthetic data set and run ST++ or UniMatch on it"),
    "prepare": ("prepare", "check a data set and write its index"),
    "split": ("prepare", "draw which images keep their labels"),
    "recipes": ("recipes", "list the recipes that come with stpp"),
    "train": ("train", "run supervised training, ST, ST++, UniMatch or UniMatch-V2"),
    "evaluate": ("evaluate", "score a checkpoint at native size"),
    "calibrate": ("calibrate", "measure how far confidences can be trusted, and propose thresholds"),
    "predict": ("predict", "write masks of a few images, and pictures of them"),
    "export": ("export", "write a checkpoint as ONNX"),
    "compile": ("compile", "compile a checkpoint into an engine that labels faster"),
    "label": ("label", "write pseudo labels of any number of images"),
    "select": ("label", "rank images by the agreement of several checkpoints"),
    "export-labels": ("export_labels", "write labels for CVAT, Label Studio or as COCO or YOLO"),
    "serve": ("serve", "answer Label Studio with predictions while people annotate"),
    "report": ("report", "write a page about a run or about pseudo labels"),
    "doctor": ("doctor", "say what this machine has, whether it works, and what to do"),
}
"""By name: the module of `stpp.commands` whose function of that name runs it; and one line of help."""


def run(name: str, args: list[str]) -> None:
    """Runs a command in this process.

    Raises:
        UserError: no such command, or what the command refuses.
    """
    if name not in COMMANDS:
        raise UserError(f"no command {name!r}; choose one of {', '.join(COMMANDS)}")
    module = importlib.import_module(f"stpp.commands.{COMMANDS[name][0]}")
    getattr(module, name.replace("-", "_"))(args)


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Failures that no command can foresee, and that a user can mend: a full disk, one that may not be written
to."""


def main(argv: list[str] | None = None) -> None:
    """Runs a command; exits with 0 when done, 1 when failed, 2 for a mistake, 130 or 143 when stopped."""
    if argv is None:
        _in_utf8()
        faulthandler.enable()  # a crash in native code says where each thread was
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help"):
        names = "\n".join(f"  {name:<13} {text}" for name, (_, text) in COMMANDS.items())
        print("usage: stpp COMMAND [--help] ...\n\nTrains a segmentation model from few labelled images and "
              f"many unlabelled ones.\n\n{names}\n\nSeveral processes: torchrun --nproc-per-node 8 -m stpp "
              "train ...")
        sys.exit(0 if args else 2)
    if args[0] == "--version":
        from stpp import __version__

        print(f"stpp {__version__}")
        return
    try:
        with signals.ending_on_term():
            run(args[0], args[1:])
    except UserError as error:
        if _is_heard():
            print(f"stpp: {error}", file=sys.stderr)
        _tell_torchrun(error.with_traceback(None))  # the line alone
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            _tell_torchrun(error)
            raise
        refusal = UserError(f"{error.filename or 'a file'}: cannot be written ({error.strerror}); make room, "
                            "or choose another --out")
        if _is_heard():
            print(f"stpp: {refusal}", file=sys.stderr)
        _tell_torchrun(refusal)
        sys.exit(2)
    except Exception as error:
        _tell_torchrun(error)
        raise


def _in_utf8() -> None:
    """Starts this program again in UTF-8 where the locale has another encoding for names of files: images
    have names of any kind."""
    if sys.getfilesystemencoding().lower().replace("-", "") != "utf8" and os.environ.get("PYTHONUTF8") != "1":
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"PYTHONUTF8": "1"})


def _is_heard() -> bool:
    """Whether this rank prints the user's mistakes: most are found by all ranks, and torchrun's closing
    report names any."""
    return os.environ.get("LOCAL_RANK", "0") == "0" or "TORCHELASTIC_ERROR_FILE" not in os.environ


def _tell_torchrun(error: Exception) -> None:
    """Leaves the error for torchrun's closing report, which is long and would else not say it."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        try:
            get_error_handler().record_exception(error)
        except OSError:  # as on a full disk: torchrun cannot read half a file
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).unlink(missing_ok=True)
