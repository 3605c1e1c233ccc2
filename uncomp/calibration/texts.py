# SPDX-License-Identifier: Apache-2.0
"""Texts by path or by name: UTF-8 files, and WikiText-2 from a file at hand or through `datasets`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

WIKITEXT2 = "wikitext2"
# Where the train split of WikiText-2 raw lies if it was unpacked into the working folder.
WIKITEXT2_FILES = ("wiki.train.raw", "wikitext-2-raw/wiki.train.raw", "wikitext2/wiki.train.raw")
_DATASET = ("Salesforce/wikitext", "wikitext-2-raw-v1")


def read_texts(names: Sequence[str]) -> list[str]:
    """The texts of UTF-8 files; the name "wikitext2" is the train split of WikiText-2 raw unless a file is called so.

    Raises:
        ValueError: a file that cannot be read, is not UTF-8 or is empty, names it; "wikitext2" where it is not found.
    """
    return [_wikitext2() if name == WIKITEXT2 and not Path(name).is_file() else _file(name) for name in names]


def _file(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise ValueError(f'uncomp.calibrate: text "{path}" is not UTF-8 (byte {error.start})') from error
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f'uncomp.calibrate: text "{path}" cannot be read ({reason})') from error
    if not text.strip():
        raise ValueError(f'uncomp.calibrate: text "{path}" is empty')
    return text


def _wikitext2() -> str:
    for path in WIKITEXT2_FILES:
        if Path(path).is_file():
            return _file(path)
    try:
        import datasets
    except ImportError as error:
        files = ", ".join(WIKITEXT2_FILES)
        raise ValueError(
            f"uncomp.calibrate: text wikitext2 is not here: none of the files {files}, and no package datasets "
            "(pip install datasets); any UTF-8 file does as well"
        ) from error
    try:
        lines = datasets.load_dataset(*_DATASET, split="train")["text"]
    except Exception as error:  # the hub, the network, the cache and the format each have errors of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"uncomp.calibrate: text wikitext2 could not be had through datasets ({reason})") from error
    return "".join(line or " \n" for line in lines)  # the bytes of wiki.train.raw, whose blank lines datasets empties
