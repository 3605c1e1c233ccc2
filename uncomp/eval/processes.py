# SPDX-License-Identifier: Apache-2.0
"""Several processes that share the records of a run, as torchrun and `accelerate launch` start them."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from uncomp.eval.folder import RunFailure


def _talk(call: Callable[[], Any]) -> None:
    """One exchange with the others; a connection that breaks means that one of them is gone."""
    try:
        call()
    except RuntimeError as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise RunFailure(
            f"uncomp eval: another process is gone; finished records stay, use --resume ({line})"
        ) from error


class Processes:
    """This process among its like.

    Attributes:
        rank, count: which of how many.
        local: which on this machine; its GPU.
    """

    def __init__(self) -> None:
        """Joins the others if the environment names any; messages go over gloo, whatever the models run on."""
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0")) if self.count > 1 else 0
        self.local = int(os.environ.get("LOCAL_RANK", "0")) if self.count > 1 else 0
        self._own = False
        if self.count > 1 and not dist.is_initialized():
            # A process may wait for another one's whole share of the records.
            dist.init_process_group("gloo", timeout=timedelta(days=14))
            self._own = True

    @property
    def first(self) -> bool:
        """Whether this one reads and writes for all."""
        return self.rank == 0

    def from_first(self, make: Any) -> Any:
        """Runs `make()` in the first process; its value, or its ValueError or RunFailure, in all."""
        if self.count == 1:
            return make()
        box: list[Any] = [None]
        if self.first:
            try:
                box[0] = ("value", make())
            except (ValueError, RunFailure) as error:
                box[0] = ("failed", type(error) is RunFailure, str(error))
        _talk(lambda: dist.broadcast_object_list(box, src=0))
        if box[0][0] == "failed":
            raise (RunFailure if box[0][1] else ValueError)(box[0][2])
        return box[0][1]

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in all of them."""
        if self.count == 1:
            return [value]
        told: list[Any] = [None] * self.count
        _talk(lambda: dist.all_gather_object(told, value))
        return told

    def settle(self, failure: str | None) -> None:
        """Waits until all are here.

        Args:
            failure: why this process's share is not done; None if it is.
        Raises:
            RunFailure: a process failed, in all of them.
        """
        told = self.gather(failure)
        failed = [f"process {rank}: {text}" for rank, text in enumerate(told) if text is not None]
        if failed:
            raise RunFailure(f"uncomp eval: {failed[0]}; finished records stay, use --resume")

    def leave(self) -> None:
        """Lets the others go."""
        if self._own and dist.is_initialized():
            dist.destroy_process_group()
