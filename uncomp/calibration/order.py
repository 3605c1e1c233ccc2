# SPDX-License-Identifier: Apache-2.0
"""The order of heads from a file: a HeadProfile, or votes that were counted for one number of groups."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from uncomp.calibration import files
from uncomp.calibration.profile import HeadProfile
from uncomp.calibration.votes import Votes


def load_order(path: str) -> HeadProfile | Votes:
    """Reads a profile by file or shipped name, or votes by JSON file or folder of tables; once, not once a cache.

    Raises:
        OSError: no such file; the text lists the profiles that the package has.
        ValueError: as HeadProfile.load and Votes.load.
    Source: docs/method.md "Calibration and profiles".
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


@lru_cache(maxsize=8)
def _load_version(path: str, changed: int, size: int) -> HeadProfile | Votes:
    votes = os.path.isdir(path) or b'"votes"' in Path(path).read_bytes()
    return Votes.load(path) if votes else HeadProfile.load(path)
