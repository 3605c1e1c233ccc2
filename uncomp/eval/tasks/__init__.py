# SPDX-License-Identifier: Apache-2.0
"""The tasks of `uncomp eval`, by name. A task reads and checks its data, then makes examples with a tokenizer."""

from uncomp.eval.tasks import gsm8k, infinitebench, longbench, needle, ruler
from uncomp.eval.tasks.base import Options, Source

TASKS = {
    "longbench": longbench.read,
    "needle": needle.read,
    "ruler": ruler.read,
    "gsm8k": gsm8k.read,
    "infinitebench": infinitebench.read,
}

__all__ = ["TASKS", "Options", "Source"]
