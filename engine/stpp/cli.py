"""The command line: `stpp COMMAND ...`, also `python -m stpp COMMAND ...` under torchrun.

Heavy packages are imported only when a command runs, so `--help` is instant.
"""

import errno
import faulthandler
import importlib
import os
import sys

from stpp import signals
from stpp.errors import UserError

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("demo", "generate a small synthetic data set and run ST++ or UniMatch on it"),
    "prepare": ("prepare", "check a data set and write its index"),
    "split": ("prepare", "draw the images that keep their labels"),
    "recipes": ("recipes", "list the recipes that come with stpp"),
    "train": ("train", "run supervised training, ST, ST++, UniMatch or UniMatch-V2"),
    "evaluate": ("evaluate", "score a checkpoint at native size"),
    "calibrate": ("calibrate", "measure the calibration of confidences and propose thresholds"),
    "predict": ("predict", "write masks and overlays for a few images"),
    "export": ("export", "export a checkpoint to ONNX"),
    "compile": ("compile", "compile a checkpoint into an engine that labels faster"),
    "label": ("label", "write pseudo labels for any number of images"),
    "select": ("label", "rank images by the agreement of several checkpoints"),
    "export-labels": ("export_labels", "export labels to CVAT, Label Studio, COCO or YOLO"),
    "serve": ("serve", "serve predictions to Label Studio during annotation"),
    "report": ("report", "write an HTML report of a run or of pseudo labels"),
    "doctor": ("doctor", "check this machine's hardware and packages, and suggest fixes"),
}
"""Module of `stpp.commands` and help text by command name; the module has a function of that name."""


def run(name: str, args: list[str]) -> None:
    """Runs a command in this process.

    Raises:
        UserError: the command is unknown, or rejects its arguments.
    """
    if name not in COMMANDS:
        raise UserError(f"no command {name!r}; choose one of {', '.join(COMMANDS)}")
    module = importlib.import_module(f"stpp.commands.{COMMANDS[name][0]}")
    getattr(module, name.replace("-", "_"))(args)


_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Write errors that a user can fix: a full disk or quota, or a read-only file system."""


def main(argv: list[str] | None = None) -> None:
    """Runs a command. Exit codes: 0 success, 1 failure, 2 user error, 130 or 143 interrupted."""
    if argv is None:
        _restart_in_utf8()
        faulthandler.enable()  # a crash in native code prints all stacks
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
        if _prints_errors():
            print(f"stpp: {error}", file=sys.stderr)
        _record_for_torchrun(error.with_traceback(None))  # only the line
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            _record_for_torchrun(error)
            raise
        refusal = UserError(f"{error.filename or 'a file'}: cannot be written ({error.strerror}); make room, "
                            "or choose another --out")
        if _prints_errors():
            print(f"stpp: {refusal}", file=sys.stderr)
        _record_for_torchrun(refusal)
        sys.exit(2)
    except Exception as error:
        _record_for_torchrun(error)
        raise


def _restart_in_utf8() -> None:
    """Restarts this program in UTF-8 mode where the locale cannot encode every file name."""
    if sys.getfilesystemencoding().lower().replace("-", "") != "utf8" and os.environ.get("PYTHONUTF8") != "1":
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"PYTHONUTF8": "1"})


def _prints_errors() -> bool:
    """True on the rank that prints user errors: all ranks find most of them."""
    return os.environ.get("LOCAL_RANK", "0") == "0" or "TORCHELASTIC_ERROR_FILE" not in os.environ


def _record_for_torchrun(error: Exception) -> None:
    """Records the error for torchrun's closing report, which otherwise omits the message.

    The file appears whole: torchrun ends this process once another has died, and a partial file ends torchrun
    itself, where it would have restarted the ranks.
    """
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        from stpp import files

        whole = os.environ["TORCHELASTIC_ERROR_FILE"]
        part = os.environ["TORCHELASTIC_ERROR_FILE"] = f"{whole}.part"  # the handler opens it by this name
        try:
            with files.renamed(whole, part):
                get_error_handler().record_exception(error)
        except OSError:
            pass  # a full disk: the report omits the message
        finally:
            os.environ["TORCHELASTIC_ERROR_FILE"] = whole
