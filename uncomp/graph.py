# SPDX-License-Identifier: Apache-2.0
"""A decode step as one CUDA graph: recorded once, replayed for every further token.

A compressed cache has constant shapes, lengths and positions on the device, so nothing that a step does depends on
the host. A recording is bound to the memory that it reads and writes: the weights, static inputs, and the arenas of one
cache. When that cache is dropped, its arenas wait for the next request, which is packed into them if it fits; then the
recording lives on. Everything else runs the ordinary step, with the same result.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from uncomp._extension import warmup
from uncomp.cache import RaggedLayer

logger = logging.getLogger(__name__)
MOST_GRAPHS = 8  # recordings that a patched model keeps
IDLE = 256  # replays of others after which a recording of a living cache may go


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """A collection could destroy something of CUDA's, which a recording does not survive."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class CudaRecording:
    """A function's kernels in a CUDA graph. Recording runs none of them."""

    def __init__(self, function: Callable[[], Any], stream: torch.cuda.Stream, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(stream.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream), _no_collection():
            # Other threads may go on allocating and launching.
            self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                self.result = function()
            except BaseException:
                self._abandon(stream.device_index, pool)
                current.wait_stream(stream)
                raise
            self._graph.capture_end()
        current.wait_stream(stream)

    def _abandon(self, device: int, pool: Any) -> None:
        """Ends a recording that failed; what the function raised is the error to show."""
        with contextlib.suppress(RuntimeError):
            self._graph.capture_end()
        # Where that raises, allocator and generator would go on believing that a recording is under way.
        with contextlib.suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(device, pool)
        with contextlib.suppress(RuntimeError, AttributeError):
            generator = torch.cuda.default_generators[device]
            generator.graphsafe_set_state(generator.clone_state())

    def replay(self) -> None:
        """Runs the kernels on the current stream."""
        self._graph.replay()


# Streams to record on that nobody uses now. cuBLAS keeps a workspace for every stream that it has met.
_idle: dict[torch.device, list[torch.cuda.Stream]] = {}


def _stream(device: torch.device, owner: object) -> torch.cuda.Stream:
    """A stream of its own for `owner`, free for others once that is gone."""
    idle = _idle.setdefault(device, [])
    stream = idle.pop() if idle else torch.cuda.Stream(device)
    weakref.finalize(owner, idle.append, stream).atexit = False
    return stream


class CudaGraphs:
    """Records on CUDA devices. Recordings of a device share their scratch memory, so one runs at a time."""

    device_type = "cuda"

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._pools: dict[torch.device, Any] = {}
        self._alive: dict[torch.device, weakref.WeakSet[CudaRecording]] = {}
        self._last: dict[torch.device, torch.cuda.Stream] = {}

    def record(self, device: torch.device, function: Callable[[], Any]) -> CudaRecording:
        """Records a function that works on one device."""
        if device not in self._streams:
            self._streams[device], self._alive[device] = _stream(device, self), weakref.WeakSet()
        if not self._alive[device]:  # torch gives a pool up with its last recording
            self._pools[device] = torch.cuda.graph_pool_handle()
        warmup(device.index)
        with torch.cuda.device(device):
            recording = CudaRecording(function, self._streams[device], self._pools[device])
        self._alive[device].add(recording)
        return recording

    def busy(self) -> bool:
        """True while somebody else records the current stream."""
        return torch.cuda.is_current_stream_capturing()

    def order(self, device: torch.device) -> None:
        """Makes the current stream wait for what another one did with recordings and their memory."""
        if device.type != self.device_type:
            return
        current, last = torch.cuda.current_stream(device), self._last.get(device)
        if last is not None and last != current:
            current.wait_stream(last)
        self._last[device] = current

    def scratch_bytes(self) -> int:
        """Bytes that recordings hold beside inputs and arenas."""
        pools = {tuple(self._pools[device]) for device, alive in self._alive.items() if alive}
        if not pools:
            return 0
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s.get("segment_pool_id", ())) in pools)


class Once:
    """A function that is called where a recording would be replayed."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function

    def replay(self) -> None:
        """Calls it."""
        self.result = self._function()


@dataclass(eq=False)
class StepGraph:
    """A recorded step, and the memory that it is bound to."""

    key: tuple
    recording: Any
    inputs: dict[str, Tensor]  # static
    position: Tensor  # [B] int32, real tokens before the current one, as the cache's clock keeps it
    arenas: list[RaggedLayer]
    mark: tuple  # of the model, see hf/step.py
    cache: weakref.ref | None  # state of the cache whose arenas these are; None while they wait for a request
    generation: int
    kept: bool = True  # False: a step that runs as it is, this one time
    weights: list[Tensor] = field(default_factory=list)  # so that their memory is nobody else's while it is read
    used: int = 0  # count of replays when it was prepared last


class Recordings:
    """Those of one patched model, and the counts that `stats` shows."""

    def __init__(self, machine: CudaGraphs) -> None:
        self.machine = machine
        self.lock = threading.RLock()
        self.graphs: list[StepGraph] = []
        self.recorded = self.replayed = self.eager = 0
        self.reason: str | None = None  # of the last step that was not replayed
        self._warned: set[str] = set()
        self._owner: int | None = None  # thread that changes the list
        self._dead: list[Any] = []  # caches that were dropped meanwhile

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """A change of the list. Caches that are dropped in the middle, by a collection, are buried behind it."""
        with self.lock:
            before, self._owner = self._owner, threading.get_ident()
            try:
                yield
            finally:
                self._owner = before
            while before is None and self._dead:
                self.bury(self._dead.pop())

    # ---- recordings
    def find(self, key: tuple, shared) -> StepGraph | None:
        """The recording that is bound to this cache as it is now."""
        for graph in self.graphs:
            if (
                graph.cache is not None
                and graph.cache() is shared
                and graph.generation == shared.generation
                and graph.key == key
            ):
                graph.used = self.replayed
                return graph
        return None

    def room_for(self, shared) -> bool:
        """Whether one more recording can be kept: recording a step for every replay costs more than it saves."""
        with self._changing():
            alive = [g for g in self.graphs if self._serves(g, shared)]
            self.graphs = alive
            if len(alive) < MOST_GRAPHS:
                return True
            oldest = min(alive, key=lambda g: (g.cache is not None, g.used))
            if oldest.cache is not None and self.replayed - oldest.used < IDLE:
                return False
            self.graphs = [g for g in alive if g is not oldest]
            return True

    @staticmethod
    def _serves(graph: StepGraph, shared) -> bool:
        """False for a recording of memory that its cache has left."""
        cache = graph.cache() if graph.cache is not None else None
        return graph.cache is None or (cache is not None and graph.generation == cache.generation)

    def add(self, graph: StepGraph) -> None:
        """Keeps a recording."""
        with self._changing():
            graph.used = self.replayed
            self.graphs = [*self.graphs, graph]

    def drop(self, graph: StepGraph) -> None:
        """Forgets a recording."""
        with self._changing():
            self.graphs = [g for g in self.graphs if g is not graph]

    def clear(self) -> None:
        """Forgets all recordings, and their memory."""
        with self._changing():
            self.graphs = []

    # ---- arenas of dropped caches
    def bury(self, shared) -> None:
        """A cache was dropped: arenas that a recording is bound to wait for the next one, all others are freed."""
        if self._owner == threading.get_ident():
            self._dead.append(shared)
            return
        with self._changing():
            kept = []
            for graph in self.graphs:
                if graph.cache is None or graph.cache() is not shared:
                    kept.append(graph)
                elif graph.generation == shared.generation and not shared.clock.broken:
                    graph.cache = None
                    kept.append(graph)
            self.graphs = kept
        shared.let_go()

    def take(self, index: int, made: RaggedLayer, shared, *, for_now: bool = False) -> RaggedLayer:
        """Where a layer that was just packed is to stay: a waiting arena that it fits, else itself.

        Args:
            index: of the layer among the compressed ones. made: the packed layer.
            for_now: a turn may follow that makes the layer longer, so that arenas which do not fit now may fit then:
                those that came last go on waiting.
        """
        with self._changing():
            if index == 0:
                waiting = [g for g in self.graphs if g.cache is None]
                fitting = [g for g in waiting if g.arenas[0].fits(made)]
                # All recordings of one set of arenas; others would hold memory that this request needs.
                shared.claimed = [g for g in fitting if g.arenas[0] is fitting[-1].arenas[0]]
                spared = shared.claimed
                if not fitting and waiting and for_now:
                    spared = [g for g in waiting if g.arenas[0] is waiting[-1].arenas[0]]
                self.graphs = [g for g in self.graphs if g.cache is not None or g in spared]
                for graph in shared.claimed:
                    graph.cache = weakref.ref(shared)
            if not shared.claimed:
                return made
            arenas = shared.claimed[0].arenas
            if not arenas[index].fits(made):
                self.graphs = [g for g in self.graphs if g not in shared.claimed]
                shared.claimed = []
                return made
            self.machine.order(made.key_rows.device)  # the last replay on them may still run
            arenas[index].copy_(made)
            if index == len(arenas) - 1:
                for graph in shared.claimed:
                    graph.generation = shared.generation
                shared.claimed = []
            return arenas[index]

    def waiting_bytes(self) -> int:
        """Bytes of arenas that wait for the next request."""
        waiting = {id(arena): arena for g in self.graphs if g.cache is None for arena in g.arenas}
        return sum(arena.kv_bytes + arena.state_bytes for arena in waiting.values())

    # ---- why not
    def give_up(self, reason: str, *, loud: bool = True) -> None:
        """A step runs without a recording."""
        self.eager += 1
        self.reason = reason
        if loud and reason not in self._warned:
            self._warned.add(reason)
            logger.warning("uncomp: decode steps run without a CUDA graph: %s", reason)
