# SPDX-License-Identifier: Apache-2.0
"""Runs the kernel tests under compute-sanitizer, a process a core: sanitize.py TEST_KERNELS LOG TOOL...

Exits with 0 when every process passed its tests and reported nothing but what KNOWN names.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests" / "cpp" / "kernels"

# (tool, kernel): why what the tool reports of it is no fault. docs/kernels.md follows each to its barrier.
KNOWN = {
    ("racecheck", "evict_row_kernel"): "an arrival at another block's mbarrier orders the vote sums; the tool knows "
    "arrivals within a block",
    ("racecheck", "stream_gram_kernel"): "a named barrier of one warpgroup orders the sums of a group; the tool loses "
    "it beside mbarriers",
}

# (tool, operator): cases that the tool cannot run, and why.
LEFT_OUT = {
    # It takes the waits of blocks 8 to 15 of a cluster at an mbarrier for missing ones and ends the kernel.
    ("synccheck", "decode_evict"): "~[cluster16]",
}

# (tool, operator) of which one process takes much longer than all others: a process a case.
BY_CASE = {("racecheck", "decode_attention"), ("racecheck", "decode_evict")}

CASE = re.compile(r'TEST_CASE\("([^"]+)",\s*"([^"]+)"\)')
REPORT = re.compile(r"^========= (?!COMPUTE-SANITIZER|\w+ SUMMARY|Target application returned|$)(?=\S)(.*)")
KERNEL = re.compile(r"\bat (?:void )?(?:[\w<>]+::)*(\w+_kernel)\b")


@dataclass(frozen=True)
class Job:
    """A tool over the cases of an operator that a Catch2 filter names."""

    tool: str
    operator: str
    filter: str


@dataclass(frozen=True)
class Result:
    """What came of a job: `problem` is empty when all is well, `known` counts reports that KNOWN explains."""

    job: Job
    seconds: float
    problem: str
    known: int
    log: str


def reports(log: str) -> list[str]:
    """Each report with the lines that belong to it."""
    found: list[str] = []
    for line in log.splitlines():
        if REPORT.match(line):
            found.append(line)
        elif found and line.startswith("=========  "):
            found[-1] += "\n" + line
    return found


def judge(tool: str, status: int, log: str) -> tuple[str, int]:
    """(what is wrong or "", reports that are known)."""
    known = 0
    for report in reports(log):
        kernels = set(KERNEL.findall(report))
        if not kernels or any((tool, kernel) not in KNOWN for kernel in kernels):
            return report.splitlines()[0].lstrip("= ")[:200] + f" [{', '.join(sorted(kernels))}]", known
        known += 1
    if "All tests passed" not in log:
        return f"tests did not pass, status {status}", known
    if re.search(r"SUMMARY: \d", log) is None or (status != 0 and known == 0):
        return f"status {status} without a report", known
    return "", known


def run(job: Job, executable: str, deadline: float) -> Result:
    """Runs a job until the deadline."""
    command = ["compute-sanitizer", "--tool", job.tool, "--error-exitcode", "9", "--print-limit", "0"]
    command += [executable, "--durations", "yes", job.filter]
    begin = time.monotonic()
    log, status = "", 0
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=max(1.0, deadline - time.time()),
        )
        log, status = done.stdout, done.returncode
        problem, known = judge(job.tool, status, log)
    except subprocess.TimeoutExpired as error:
        log = (error.stdout or b"").decode(errors="replace")
        problem, known = "stopped: out of time", 0
    return Result(job, time.monotonic() - begin, problem, known, log)


def jobs(tools: list[str]) -> list[Job]:
    """A process a tool and operator, the slowest first: racecheck, then operators with much to test.

    More processes than needed take longer in all: they share one GPU.
    """
    found = []
    for tool in tools:
        for file in sorted(TESTS.glob("test_*.cpp"), key=lambda path: -path.stat().st_size):
            operator = file.stem.removeprefix("test_")
            names = [name for name, tags in CASE.findall(file.read_text()) if "[large]" not in tags]
            if (tool, operator) in BY_CASE:
                found += [Job(tool, operator, name.replace(",", "\\,")) for name in names]
            elif names:
                found.append(Job(tool, operator, f"[{operator}]~[large]{LEFT_OUT.get((tool, operator), '')}"))
    return found


def main(executable: str, log: Path, tools: list[str]) -> int:
    """Prints a line a tool and a line a problem; the logs of all jobs go to one file."""
    deadline = float(os.environ.get("DEADLINE") or time.time() + 570)
    todo = jobs(tools)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: run(job, executable, deadline), todo))
    with log.open("w") as out:
        for r in results:
            verdict = f"{'FAIL ' + r.problem if r.problem else 'ok'}, {r.known} known reports"
            out.write(f"{r.log}\n{r.job} {r.seconds:.0f} s: {verdict}\n\n")
    for tool in tools:
        mine = [r for r in results if r.job.tool == tool]
        bad = {r.job.operator for r in mine if r.problem}
        clean = {r.job.operator for r in mine} - bad
        explained = sorted({r.job.operator for r in mine if r.known and not r.problem})
        longest = max(mine, key=lambda r: r.seconds)
        print(
            f"      {tool}: {len(clean)} operators pass, {len(bad)} do not; known reports of "
            f"{', '.join(explained) or 'none'}; longest {longest.job.operator}, {longest.seconds:.0f} s"
        )
        for r in mine:
            if r.problem:
                print(f"FAIL  {tool} {r.job.operator}, {r.job.filter}: {r.problem}")
    return int(any(r.problem for r in results))


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: sanitize.py TEST_KERNELS LOG TOOL...")
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
