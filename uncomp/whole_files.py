# SPDX-License-Identifier: Apache-2.0
"""Writes files whole: a reader sees the old ones or the new ones, and a full disk leaves the old."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Mapping
from pathlib import Path


def write_whole(files: Mapping[Path, bytes], *, mark: str | None = None) -> None:
    """Writes all files or none: they change their names when the last one has found room.

    Args:
        files: contents by path, of folders that are there.
        mark: between a file's name and ".part" while it is written; default: this process's id.
    Raises:
        OSError: a folder cannot be written, the disk is full, or a path is a folder; the system's name that path.
    """
    mark = str(os.getpid()) if mark is None else mark
    beside = {path: path.with_name(f"{path.name}.{mark}.part") for path in files}
    path = None
    try:
        for path, content in files.items():
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            with open(beside[path], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # a disk may tell only now that it is full
        for path in files:
            os.replace(beside[path], path)
    except OSError as error:
        if error.errno is not None:  # else its text would be lost
            error.filename = os.fspath(path)
        raise
    finally:
        for part in beside.values():
            with contextlib.suppress(OSError):  # a file system that can only be read has none
                part.unlink()
