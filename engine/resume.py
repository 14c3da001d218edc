"""A run that is cut short: what is said and kept then, and where `--resume` finds it. What is in a checkpoint belongs to the seams."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from tqdm import tqdm

from engine.loop import Diverged
from engine.observers import Checkpoints
from engine.options import TrainOptions
from utils.errors import InputError
from utils.files import existing
from utils.log import LOGGER


def find_last(path: str | Path) -> Path:
    """The `last.pt` that `--resume` means: a run folder's, the file itself, or with nothing given that of the newest run under runs/.

    Raises `InputError` for a run that saved no epoch (with the command that starts it again) and for any other file.
    """
    given = Path(path) if path else _newest()
    if given.is_dir():
        given = given / "last.pt" if given.name == "weights" else given / "weights" / "last.pt"
    if given.name != "last.pt" or given.absolute().parent.name != "weights":
        raise InputError(
            f"--resume: a run goes on from its RUN/weights/last.pt; to train on from {given}, start one with --weights {given}"
        )
    folder = given.parent.parent
    if not given.exists() and given.parent.is_dir():
        again = f" with: {_saved_command(folder)}" if (folder / "opt.yaml").exists() else ""
        raise InputError(f"--resume: {folder} saved no checkpoint, as its first epoch was not finished; start it again{again}")
    return existing(given, "--resume")


def _newest() -> Path:
    found = sorted(Path("runs").glob("**/weights/last.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise InputError("--resume: no runs/**/weights/last.pt is here; give the path of a last.pt")
    return found[-1]


def _saved_command(folder: Path) -> str:
    return TrainOptions.from_saved(yaml.safe_load((folder / "opt.yaml").read_text(encoding="utf-8"))).command()


@contextmanager
def nothing_lost(checkpoints: Checkpoints, options: TrainOptions) -> Iterator[None]:
    """Whatever ends the training inside, say what is kept and how to go on; a failing disk or loader becomes an `InputError`.

    SIGTERM, which batch systems send, is taken as Ctrl-C.
    """
    try:
        with _terminated_as_interrupted(), _quiet_writers():
            yield
    except Diverged:
        raise
    except (KeyboardInterrupt, InputError):
        _say_what_is_kept(checkpoints, options)
        raise
    except (OSError, EOFError, RuntimeError) as error:
        if (explained := _explained(error, checkpoints.folder.parent)) is None:
            raise
        # torch reports a loader process that dies by raising wherever the main one is: here that would be in the middle of this.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _say_what_is_kept(checkpoints, options)
        raise InputError(explained) from None


def _explained(error: Exception, folder: Path) -> str | None:
    """One line for an error of the disk or of a loader process; None for an error of the program."""
    if isinstance(error, (ConnectionError, EOFError)) or "DataLoader worker" in str(error):
        return "a loader process was killed, most often because memory ran out: use fewer --workers, or no --cache ram"
    return f"{error.filename or folder}: {error.strerror or error}" if isinstance(error, OSError) else None


def _say_what_is_kept(checkpoints: Checkpoints, options: TrainOptions) -> None:
    for bar in list(getattr(tqdm, "_instances", ())):  # a line of its own for what follows
        bar.close()
    if checkpoints.saved:
        again = shlex.join(["python", options.script, "--resume", str(checkpoints.last)])
        LOGGER.info(f"stopped; {checkpoints.saved} of {options.epochs} epochs are kept. Continue with: {again}")
    else:
        LOGGER.info(f"stopped; no epoch was saved. Start again with: {options.command()}")


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's affair
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _quiet_writers() -> Iterator[None]:
    """Let no background thread print a traceback for a full disk: TensorBoard's raises the error once more in the main thread."""
    previous = threading.excepthook
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else previous(args)
    try:
        yield
    finally:
        threading.excepthook = previous
