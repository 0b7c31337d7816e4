"""Folders that are whole or not there: written beside, checked, and put in place when everything in them is written.

A process can be killed at any moment, and a disk can lose what it was given. A checkpoint therefore ends with a list
of its files, their sizes and sha256, and one that does not match its list is never continued from.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
"""File with the name, size and sha256 of every other file of a checkpoint; written last."""
PREFIX = "checkpoint-"


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Give a folder to write in; it takes the place of `path` when the block ends, and is dropped if it fails.

    Args:
        path: where the folder is to be; what is there now stays until then.
    """
    path = Path(path)
    beside = fresh_folder(path.with_name(f".{path.name}.writing"))
    try:
        yield beside
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    put_in_place(beside, path)


def fresh_folder(path: Path) -> Path:
    """Make an empty folder, in place of what a killed process has left there."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def put_in_place(written: Path, path: Path) -> None:
    """Rename a folder to `path`, replacing what is there, after everything in it has reached the disk."""
    for file in written.rglob("*"):
        _sync(file)
    _sync(written)
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    written.rename(path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_manifest(folder: Path, processes: int = 1) -> None:
    """List the files of a checkpoint in it, with size and sha256, and how many processes trained."""
    files = {
        str(file.relative_to(folder)): _size_and_digest(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    (folder / MANIFEST).write_text(
        json.dumps({"processes": processes, "files": files}, indent=1) + "\n", encoding="utf-8"
    )


def what_is_wrong(folder: str | Path) -> str | None:
    """Say why a checkpoint cannot be continued from; None if every file is what was written.

    Args:
        folder: of the checkpoint.
    """
    folder = Path(folder)
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(size), str(digest)) for name, (size, digest) in files.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was not written to its end"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    for name, written in expected.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != written[0]:
            return f"{name} has {file.stat().st_size} bytes and not {written[0]}"
        if tuple(_size_and_digest(file)) != written:
            return f"{name} has other contents than were written"
    return None


def processes_of(folder: str | Path) -> int:
    """How many processes trained when a good checkpoint was written."""
    return int(json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))["processes"])


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest first, good or bad."""
    found = {
        int(path.name.removeprefix(PREFIX)): path
        for path in Path(output_dir).glob(f"{PREFIX}*")
        if path.is_dir() and path.name.removeprefix(PREFIX).isdigit()
    }
    return [found[step] for step in sorted(found, reverse=True)]


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; killed meanwhile, this leaves no half of one in its place. A failure is a warning."""
    old = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    try:
        checkpoint.rename(old)
    except OSError as error:
        logger.warning("checkpoint %s cannot be removed: %s", checkpoint, error)
    shutil.rmtree(old, ignore_errors=True)


def rotate(output_dir: str | Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints until so many are left; the newest and the best stay, as in transformers.

    Args:
        output_dir: folder of the run.
        limit: None or 0 removes nothing.
        best: path of the best checkpoint, or None.
    """
    for half_removed in Path(output_dir).glob(f".{PREFIX}*.old"):
        shutil.rmtree(half_removed, ignore_errors=True)
    found = checkpoints(output_dir)
    kept = {*found[:1], *([] if best is None else [Path(best)])}
    too_many = len(found) - max(limit, len(kept)) if limit else 0
    for checkpoint in [path for path in reversed(found) if path not in kept][: max(too_many, 0)]:
        remove(checkpoint)


def last_good_checkpoint(output_dir: str | Path) -> str | None:
    """Return the newest checkpoint that can be continued from, or None; warn about each newer one that cannot.

    Args:
        output_dir: folder of the run.
    """
    for path in checkpoints(output_dir):
        problem = what_is_wrong(path)
        if problem is None:
            return str(path)
        logger.warning("checkpoint %s is damaged: %s. It is left as it is, and the one before is taken", path, problem)
    return None


def _size_and_digest(file: Path) -> list[int | str]:
    with file.open("rb") as stream:
        return [file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
