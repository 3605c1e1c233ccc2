# SPDX-License-Identifier: Apache-2.0
"""streaming_llm: sinks and the newest, at every step."""

from __future__ import annotations

import pytest
from policy_support import Run, shape_of

from uncomp import UncompConfig
from uncomp.policies import make_policy


@pytest.mark.parametrize("rows", ["kv_head", "query_head"])
@pytest.mark.parametrize("sinks", [None, 0, 7])
def test_sinks_and_newest(rows, sinks):
    config = UncompConfig(policy="streaming_llm", budget=30, rows=rows, sinks=sinks)
    first, n = 4 if sinks is None else sinks, 90
    run = Run(config, shape_of(config), [n, 10])
    for step in range(31):
        for layer in range(3):
            for row, kept in enumerate(run.kept(layer)):
                seen = run.seen[row // run.shape.rows]
                want = range(seen) if seen <= 30 else [*range(first), *range(seen - 30 + first, seen)]
                assert sorted(kept) == list(want), step
        run.step()
    run.turn([20, 25])
    assert sorted(run.kept(0)[0]) == [*range(first), *range(run.seen[0] - 30 + first, run.seen[0])]


def test_pooling_is_refused():
    config = UncompConfig(policy="streaming_llm", pool_width=7)
    with pytest.raises(ValueError, match="pool_width of streaming_llm must be 1"):
        make_policy(config, shape_of(config))
