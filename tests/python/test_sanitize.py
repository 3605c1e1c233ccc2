# SPDX-License-Identifier: Apache-2.0
"""What .ci/sanitize.py makes of a tool's log: explained reports pass, everything else fails."""

import importlib.util
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / ".ci" / "sanitize.py"
PASSED = "All tests passed (3 assertions in 1 test case)\n"
HEAD = (
    "========= Error: Race reported between Write access at void uncomp::kernels::{a}<(int)64>(uncomp::Params)+0x10\n"
)
TAIL = (
    "=========     and Read access at void uncomp::kernels::<unnamed>::{b}<(int)64>(uncomp::Params)+0x20 [48 hazards]\n"
)
RACE = HEAD + TAIL + "========= \n"
CLEAN = PASSED + "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
FOUND = PASSED + "========= RACECHECK SUMMARY: 1 hazards displayed (1 errors, 0 warnings)\n"


@pytest.fixture(scope="module")
def sanitize():
    spec = importlib.util.spec_from_file_location("sanitize", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["sanitize"] = module
    spec.loader.exec_module(module)
    return module


def race(a, b):
    return RACE.format(a=a, b=b) + FOUND


@pytest.mark.parametrize(
    ("tool", "status", "log", "wrong"),
    [
        ("racecheck", 0, "========= COMPUTE-SANITIZER\n" + CLEAN, ""),
        ("racecheck", 9, race("evict_row_kernel", "evict_row_kernel"), ""),
        ("racecheck", 9, race("evict_row_kernel", "split_kernel"), "Race reported"),
        ("racecheck", 9, race("split_kernel", "split_kernel"), "Race reported"),
        ("memcheck", 9, race("evict_row_kernel", "evict_row_kernel"), "Race reported"),
        ("racecheck", 9, race("evict_row_kernel", "evict_row_kernel").replace("passed", "failed"), "did not pass"),
        ("racecheck", 0, PASSED, "without a report"),
        ("racecheck", 9, CLEAN, "without a report"),
        ("racecheck", 0, CLEAN.replace("All tests passed", "No tests ran"), "did not pass"),
        ("synccheck", 9, "========= Barrier error detected. Missing wait.\n" + CLEAN, "Barrier error"),
    ],
)
def test_reports_without_an_explanation_fail(sanitize, tool, status, log, wrong):
    problem, known = sanitize.judge(tool, status, log)
    assert wrong in problem
    assert bool(problem) == bool(wrong)
    assert known == (1 if "evict_row_kernel" in log and tool == "racecheck" and "split" not in log else 0)


def test_every_operator_with_short_cases_is_a_job_of_every_tool(sanitize):
    jobs = sanitize.jobs(["racecheck", "synccheck"])
    operators = {job.operator for job in jobs}
    split = {operator for tool, operator in sanitize.BY_CASE}
    assert len([job for job in jobs if job.operator not in split]) == 2 * len(operators - split)
    assert {"decode_evict", "matrix_spectrum", "ragged_attention"} <= operators
    assert "decode_evict_steps" not in operators  # all its cases are at scale
    for tool, operator in sanitize.LEFT_OUT:
        assert any(job.tool == tool and job.operator == operator for job in jobs)


def test_a_process_a_case_where_one_process_takes_too_long(sanitize):
    jobs = sanitize.jobs(["racecheck", "memcheck"])
    mine = [job for job in jobs if job.operator == "decode_attention"]
    assert [job.filter for job in mine if job.tool == "memcheck"] == ["[decode_attention]~[large]"]
    filters = {job.filter for job in mine if job.tool == "racecheck"}
    assert {"group sizes 1 to 16", r"block borders\, empty rows and skew"} <= filters
    assert not any(job.filter.startswith("one row of many slots") for job in mine)  # at scale


@pytest.mark.parametrize("tag", ["cluster16"])
def test_cases_that_a_tool_leaves_out_exist(sanitize, tag):
    assert any(tag in rest for rest in sanitize.LEFT_OUT.values())
    assert any(f"[{tag}]" in file.read_text() for file in sanitize.TESTS.glob("test_*.cpp"))
