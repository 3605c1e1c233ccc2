# SPDX-License-Identifier: Apache-2.0
"""The file beside a profile in the making, from which a killed run goes on: nothing lost, nothing counted twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from uncomp.calibration.files import replace_file
from uncomp.calibration.sums import Sums

_KEY = "uncomp_calibration"


def state_path(out: Path) -> Path:
    """Where the state of a run lies that writes `out`."""
    return out.with_name(f"{out.name}.state")


def save(path: Path, settings: dict[str, Any], sums: Sums) -> None:
    """Writes the sums of a run beside and renames them.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    import safetensors.torch

    note = json.dumps({"settings": settings, "samples": sums.samples}, sort_keys=True)
    replace_file(path, safetensors.torch.save(sums.state(), {_KEY: note}))


def resume(path: Path, settings: dict[str, Any], sums: Sums) -> bool:
    """Takes up the run that left its state there; False if none did.

    Raises:
        ValueError: a damaged file, or one of a run with other settings or another text; names the first that differs.
    """
    import safetensors

    if not path.exists():
        return False
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            note = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        theirs, samples = note["settings"], int(note["samples"])
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise ValueError(f'uncomp.calibrate: "{path}" is no state of a run ({error}); delete it') from error
    ours = json.loads(json.dumps(settings))
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f'uncomp.calibrate: "{path}" is of a run with another {name}: {theirs.get(name)!r} there, '
                f"{ours.get(name)!r} now; delete it to start again"
            )
    sums.restore(tensors, samples)
    return True
