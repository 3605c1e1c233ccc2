# SPDX-License-Identifier: Apache-2.0
"""A compressed model from its folder, in one call."""

from __future__ import annotations

import os
from typing import Any

from uncomp.hf.load import load_model
from uncomp.transforms.lorc.files import RECORD, is_checkpoint


def load(folder: str | os.PathLike[str], **options: Any) -> tuple[Any, Any]:
    """A compressed model and its tokenizer; `uncomp.hf.load.load_model` gives the same, for any folder.

    Args:
        folder: what `uncomp lorc` wrote, or a handle's save_pretrained with a tokenizer beside it.
        options: of load_model (dtype, device, ...).
    Raises:
        ValueError: no such checkpoint, or a damaged one; and as load_model.
    """
    if not is_checkpoint(folder):
        raise ValueError(f'uncomp.lorc.load: folder "{folder}" must hold {RECORD}, as `uncomp lorc` writes it')
    return load_model(folder, **options)
