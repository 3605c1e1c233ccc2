# SPDX-License-Identifier: Apache-2.0
"""The tasks of `uncomp eval`, by name. A task reads and checks its data, then makes examples with a tokenizer."""

from uncomp.eval.tasks import gsm8k, longbench, needle
from uncomp.eval.tasks.base import Options, Source

TASKS = {
    "longbench": longbench.read,
    "needle": needle.read,
    "gsm8k": gsm8k.read,
}

__all__ = ["TASKS", "Options", "Source"]
