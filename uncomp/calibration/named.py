# SPDX-License-Identifier: Apache-2.0
"""Profiles as configurations name them: a file, or one that comes with the package; read once, not once a cache."""

from __future__ import annotations

import os
from functools import lru_cache

from uncomp.calibration import files
from uncomp.calibration.profile import HeadProfile


def load(path: str) -> HeadProfile:
    """The profile that a configuration names.

    Args:
        path: a JSON file, or the name of a profile that comes with the package.
    Raises:
        OSError: it cannot be read; the text lists the names. ValueError: as HeadProfile.load.
    """
    file = files.locate(path)
    try:
        found = os.stat(file)
    except OSError as error:
        shipped = ", ".join(files.shipped_names())
        raise type(error)(
            f'uncomp: profile must be "online", a readable HeadProfile file or one of {shipped}; got {path!r} '
            f"({error.strerror})"
        ) from error
    return _load_version(os.path.abspath(file), found.st_mtime_ns, found.st_size)


def shipped_for(config_hash: str) -> str | None:
    """Name of the profile of the package that was made of this very model; None if there is none."""
    return next((name for name in files.shipped_names() if load(name).model.hash == config_hash), None)


@lru_cache(maxsize=8)
def _load_version(path: str, changed: int, size: int) -> HeadProfile:
    return HeadProfile.load(path)
