# SPDX-License-Identifier: Apache-2.0
"""How every operator is timed, in one file, so that all numbers mean the same."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

Run = Callable[[], object]

MIN_SETS, MAX_SETS = 4, 64
L2_TIMES = 3  # input sets together exceed the L2 cache this many times
REPLAYS = 5  # most replays of a group
MEMORY_SHARE = 0.8  # of the free memory that input sets may take


@dataclass
class Case:
    """One row of a benchmark.

    `ours(i)` and each rival build input set `i` on the current CUDA device and return the call to be timed, without
    arguments. Calls are captured in a CUDA graph; a rival that cannot be captured is timed eagerly and marked so.
    A call that uses up its inputs (free slots, say) is returned as `Resettable`.
    """

    op: str
    shape: str  # e.g. "8x32768 k=1552"
    dtype: str
    bytes: int  # that must move: each input byte read once, each output byte written once
    ours: Callable[[int], Run]
    rivals: dict[str, Callable[[int], Run]] = field(default_factory=dict)


@dataclass
class Resettable:
    """A call whose inputs last for REPLAYS + 1 calls; `reset` runs between groups, outside the timed part."""

    call: Run
    reset: Callable[[], None]

    def __call__(self) -> object:
        """Makes the call."""
        return self.call()


@dataclass
class Plan:
    """How long a case is timed."""

    groups: int = 20
    seconds: float = 0.5  # of device time for one entry; slow calls get fewer replays, then fewer groups
    least_groups: int = 3


@dataclass
class Timing:
    """Microseconds of one call: percentiles over groups, or the reason why there are none."""

    median_us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    eager: bool = False
    sets: int = 0
    error: str | None = None

    @property
    def spread_us(self) -> float | None:
        """From the 10th to the 90th percentile."""
        return None if self.p10_us is None or self.p90_us is None else self.p90_us - self.p10_us


def percentile(values: Sequence[float], share: float) -> float:
    """Value below which `share` (0 to 1) of the values lie, linear between neighbours."""
    if not values or not 0 <= share <= 1:
        raise ValueError(f"percentile: needs values and a share in [0, 1]; got {len(values)} values and {share}")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def wanted_sets(bytes_of_call: int, l2_bytes: int) -> int:
    """Input sets that push one another out of the L2 cache."""
    enough = math.ceil(L2_TIMES * l2_bytes / max(bytes_of_call, 1))
    return min(max(enough, MIN_SETS), MAX_SETS)


def replays_and_groups(replay_ms: float, plan: Plan) -> tuple[int, int]:
    """REPLAYS x groups where the time allows, then fewer replays, then fewer groups."""
    allowed = plan.seconds * 1e3 / max(replay_ms, 1e-6)
    replays = min(max(int(allowed / plan.groups), 1), REPLAYS)
    groups = min(max(int(allowed / replays), plan.least_groups), plan.groups)
    return replays, groups


def first_line(error: BaseException) -> str:
    """Kind and first line of an exception."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def affordable_sets(wanted: int, call_ms: float, plan: Plan) -> int:
    """Fewer sets where one pass over all of them would eat the time: so slow a call does not depend on the cache."""
    return min(wanted, max(int(plan.seconds * 1e3 / plan.least_groups / max(call_ms, 1e-6)), 1))


def time_entry(make: Callable[[int], Run], bytes_of_call: int, plan: Plan) -> Timing:
    """Builds the input sets and times a call over them; an exception becomes `Timing.error`."""
    try:
        torch.cuda.empty_cache()
        return _time_sets(_build_sets(make, bytes_of_call, plan), plan)
    except Exception as error:
        text = first_line(error)
    try:
        gc.collect()  # the frames of the traceback held tensors
        _forget_capture()
    except Exception as error:
        text += f"; then {first_line(error)}"
    return Timing(error=text)


def _build_sets(make: Callable[[int], Run], bytes_of_call: int, plan: Plan) -> list[Run]:
    device = torch.cuda.current_device()
    wanted = wanted_sets(bytes_of_call, torch.cuda.get_device_properties(device).L2_cache_size)
    free, _ = torch.cuda.mem_get_info(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    sets = [make(0)]
    kept = sets[0]()  # results stay alive while a graph is captured
    torch.cuda.synchronize()
    of_one = max(torch.cuda.memory_allocated(device) - before, 1)
    of_work = torch.cuda.max_memory_allocated(device) - before
    del kept
    room = int((MEMORY_SHARE * free - of_work) / of_one)
    count = affordable_sets(min(wanted, room), _elapsed_ms(sets[0]), plan)
    return sets + [make(i) for i in range(1, count)]


def _time_sets(sets: list[Run], plan: Plan) -> Timing:
    def reset() -> None:
        for run in sets:
            if isinstance(run, Resettable):
                run.reset()

    reset()
    replay, eager = _capture(sets)
    reset()
    replay()
    replays, groups = replays_and_groups(_elapsed_ms(replay), plan)
    marks = []
    # Groups are queued without a wait, so that the host's launches stay ahead of the device.
    for _ in range(groups):
        reset()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            replay()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    micros = [start.elapsed_time(end) * 1e3 / (replays * len(sets)) for start, end in marks]
    return Timing(percentile(micros, 0.5), percentile(micros, 0.1), percentile(micros, 0.9), eager, len(sets))


def _elapsed_ms(call: Run) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _capture(sets: list[Run]) -> tuple[Run, bool]:
    """One graph that runs every set once and False, or a plain loop and True where capture is impossible."""

    def run_all() -> list[object]:
        # Results are held until the end: a result buffer used again at once would never leave the L2 cache.
        return [run() for run in sets]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run_all()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    if _synchronises(sets[0]):
        return run_all, True
    graph, outside = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            results = run_all()
    except Exception:
        torch.cuda.set_stream(outside)  # a capture that breaks off leaves its own stream current
        _forget_capture()
        run_all()  # an exception that has nothing to do with capture is raised again here
        return run_all, True
    del results
    return graph.replay, False


def _synchronises(run: Run) -> bool:
    """Whether torch itself waits for the device in this call: such a call would break a capture."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():  # torch says each time that this mode is a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchroniz" in str(error):
            return True
        raise
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return False


def _forget_capture() -> None:
    """A capture that broke off leaves the random generator in capture mode, where every later randn would raise."""
    device = torch.cuda.current_device()
    fresh = torch.Generator(device=f"cuda:{device}")
    torch.cuda.default_generators[device].graphsafe_set_state(fresh.graphsafe_get_state())


def copy_bandwidth(plan: Plan) -> float:
    """TB/s of a device copy, bytes read plus bytes written."""
    size = 1 << 28

    def make(_: int) -> Run:
        source = torch.ones(size, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return _bandwidth("copy", make, 2 * size, plan)


def read_bandwidth(plan: Plan) -> float:
    """TB/s of a sum over a large tensor, which reads and writes next to nothing."""
    size = 1 << 28

    def make(_: int) -> Run:
        source = torch.ones(size // 4, device="cuda")
        return lambda: source.sum()

    return _bandwidth("read", make, size, plan)


def _bandwidth(name: str, make: Callable[[int], Run], moved: int, plan: Plan) -> float:
    timing = time_entry(make, moved, plan)
    if timing.median_us is None:
        raise RuntimeError(f"the {name} bandwidth could not be measured: {timing.error}")
    return moved / timing.median_us / 1e6
