# SPDX-License-Identifier: Apache-2.0
"""Records of a benchmark through the `datasets` package, as the lines of a file that is checked like any other."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path


def fetch(repository: str, name: str, *, split: str = "test") -> Path:
    """Writes one subset of a data set as JSON Lines into the user's cache.

    Args:
        repository: of the hub, or a folder that `datasets` reads. name: of the subset.
    Returns:
        the file; one that is there already is not fetched again.
    Raises:
        ImportError: `datasets` is missing. ValueError: the subset could not be loaded.
    """
    place = os.environ.get("UNCOMP_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "uncomp"
    folder = Path(place).expanduser() / "data" / repository.strip("/").replace("/", "--")
    path = folder / f"{name}.jsonl"
    if path.is_file():
        return path
    try:
        import datasets
    except ImportError as error:
        raise ImportError("uncomp eval: --hub needs the datasets package; pip install datasets") from error
    try:
        rows = datasets.load_dataset(repository, name, split=split)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False, encoding="utf-8") as file:
            try:
                file.writelines(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
            except BaseException:
                os.unlink(file.name)
                raise
    except Exception as error:  # whatever a data set's own loader raises
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"uncomp eval: --hub {repository} did not give {name} ({line})") from error
    os.replace(file.name, path)
    return path
