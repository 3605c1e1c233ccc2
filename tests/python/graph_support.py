# SPDX-License-Identifier: Apache-2.0
"""A stand-in for CUDA graphs on machines without a GPU."""

from __future__ import annotations


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
