# SPDX-License-Identifier: Apache-2.0
"""A stand-in for CUDA graphs on machines without a GPU, and calls that tests of recorded steps share."""

from __future__ import annotations

import torch

import uncomp

NEW = 14
SMALL = {"budget": 48, "groups": 2}


class Rerun:
    """A recorded function; a replay calls it again, with the host's numbers as they were at the recording."""

    def __init__(self, active, function) -> None:
        self._active, self._function = active, function
        self._columns = active().clock.columns

    def replay(self) -> None:
        """What a graph does: it knows tensors only, so a step that reads a host number gives wrong tokens here too."""
        shared = self._active()
        columns, shared.clock.columns = shared.clock.columns, self._columns
        try:
            self.result = self._function()
        finally:
            shared.clock.columns = columns


class ReplayMachine:
    """Takes the place of uncomp.graph.CudaGraphs in a patched model's handle.

    Attributes:
        fail: text of the exception that the next recording raises.
    """

    device_type = "cpu"

    def __init__(self, handle) -> None:
        self._active = handle._step.active
        self.fail: str | None = None
        handle._recordings.machine = self

    def record(self, device, function) -> Rerun:
        """See CudaGraphs."""
        if self.fail:
            raise RuntimeError(self.fail)
        return Rerun(self._active, function)

    def order(self, device) -> None:
        """One thread, no streams."""

    def scratch_bytes(self) -> int:
        """Nothing is held."""
        return 0


def prompt(device: str, batch: int = 1, columns: int = 90, seed: int = 1):
    return torch.randint(3, 199, (batch, columns), generator=torch.Generator().manual_seed(seed)).to(device)


def padded(device: str, columns: int = 90):
    ids = prompt(device, 3, columns)
    mask = torch.ones_like(ids)
    for row, pads in ((1, 1), (2, columns - 57)):
        ids[row, :pads], mask[row, :pads] = 0, 0
    return ids, mask


def run(model, ids, mask=None, **kwargs):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **{"max_new_tokens": NEW, "do_sample": False, **kwargs})


def patched(model, *, record: bool = True, **options):
    """A patched model whose steps are recorded, on a CPU by the stand-in; or whose steps never are."""
    options = {**SMALL, **options}
    handle = uncomp.patch(model, uncomp.UncompConfig(**options, graph="auto" if record else "off"))
    if record and model.device.type == "cpu":
        ReplayMachine(handle)
    return handle


def both(model, call, **options):
    """What a call gives with recorded steps, checked against the same call without; and the stats of the first."""
    with patched(model, record=False, **options) as handle:
        want = call(handle)
        assert handle.stats()["steps_replayed"] == 0
    with patched(model, **options) as handle:
        got, stats = call(handle), handle.stats()
    assert torch.equal(got, want)
    return stats
