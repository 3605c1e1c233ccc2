# SPDX-License-Identifier: Apache-2.0
"""pruning: stages of a model, tokens of every layer, and which tokens go on; against worked vectors and plain loops."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hidden_support import best
from profile_support import made_profile
from test_stages import CURVE_7B, CURVE_13B

from uncomp import PrefillPruning, UncompConfig
from uncomp.calibration import files
from uncomp.calibration.profile import HeadProfile
from uncomp.pruning import PrunedPrompt, chosen_tokens, schedule_for, token_scores
from uncomp.types import CacheShape, Lengths

CPU = torch.device("cpu")


def shape(layers: int = 4, heads: int = 4) -> CacheShape:
    return CacheShape(layers, heads, 2, 64, 2, tuple(range(layers)), layers, "llama", "0" * 64)


def schedule(
    layers: int, stages, *, window: int = 8, sinks: int = 0, heads: int = 4, profile: str = "online", **options
):
    prefill = PrefillPruning(stages=stages, **options)
    return schedule_for(
        UncompConfig(prefill=prefill, window=window, sinks=sinks, profile=profile), shape(layers, heads)
    )


def saved(tmp_path, curve, name: str = "p.json", heads: int = 32) -> str:
    profile = dataclasses.replace(made_profile(len(curve), heads, 2), curve=curve)
    profile.save(tmp_path / name)
    return str(tmp_path / name)


# ---- stages and tokens
@pytest.mark.parametrize(
    ("layers", "n", "n_max", "sizes", "tokens"),
    [
        (32, 4096, "prompt", [2, 13, 11, 5, 1], [4096, 3456, 2816, 2176, 1536]),
        (32, 8192, 8192, [2, 13, 11, 5, 1], [8192, 6528, 4864, 3200, 1536]),
        (32, 32768, "prompt", [2, 13, 11, 5, 1], [32768, 24960, 17152, 9344, 1536]),
        (32, 3000, "prompt", [2, 13, 11, 5, 1], [3000, 2634, 2268, 1902, 1536]),
        (32, 1536, "prompt", [2, 13, 11, 5, 1], [1536] * 5),
        (40, 4096, 4096, [1, 2, 12, 8, 8, 4, 2, 3], [4096, 3726, 3361, 2996, 2631, 2266, 1901, 1536]),
    ],
)
def test_published_schedules(layers, n, n_max, sizes, tokens):
    """Layer by layer, the stages of 2, 13, 11, 5 and 1 layers, and those of 40 layers."""
    found = schedule(layers, "fixed", n_max=n_max)
    want = [count for size, count in zip(sizes, tokens, strict=True) for _ in range(size)]
    assert found.by_layer(n) == want
    pruned = PrunedPrompt(found, Lengths([n, 700], n), None, CPU)
    assert pruned.reached == [[count, 700] for count in want]
    assert list(pruned.borders) == [layer for layer in range(1, layers) if want[layer] != want[layer - 1]]


def test_the_reference_cuts_the_first_stage_too():
    found = schedule(40, "fixed", n_max=4096, prune_first=True)
    assert found.by_layer(5000)[:4] == [5000, 3726, 3726, 3361]
    found = schedule(32, "fixed", n_max=4096, prune_first=True)
    assert found.by_layer(5000)[:4] == [5000, 4096, 3456, 3456]


def test_steps_of_a_fixed_size_and_shares():
    found = schedule(6, [0, 1, 2, 3, 5], n_step=512)
    assert found.by_layer(4096) == [4096, 3584, 3072, 2560, 2560, 2048]
    assert found.by_layer(2600) == [2600, 2088, 1576, 1536, 1536, 1536]
    found = schedule(4, [0, 1, 3], n_min=0.25, n_max=0.75)
    assert found.by_layer(1000) == [1000, 500, 500, 250]


def test_the_newest_and_the_sinks_are_a_floor():
    assert schedule(4, [0, 2], n_min=1).by_layer(100) == [100, 100, 8, 8]
    assert schedule(4, [0, 2], n_min=1, window=20, sinks=3).by_layer(100) == [100, 100, 23, 23]
    assert schedule(4, [0, 2], n_min=1).by_layer(5) == [5, 5, 5, 5]


@pytest.mark.parametrize(
    ("curve", "options", "starts"),
    [
        (CURVE_7B, {}, (0, 2, 15, 26, 31)),
        (CURVE_13B, {}, (0, 1, 3, 15, 23, 31, 35, 37)),
        (CURVE_7B, {"threshold": 0.5}, (0, 2, 8, 15, 24, 26, 29, 31)),
        (CURVE_7B, {"num_stages": 3}, (0, 2, 31)),
        (CURVE_7B, {"threshold": 100}, (0,)),
    ],
)
def test_stages_of_a_profile(tmp_path, curve, options, starts):
    assert schedule(len(curve), "profile", heads=32, profile=saved(tmp_path, curve), **options).starts == starts


def test_a_profile_of_its_own_comes_before_that_of_the_heads(tmp_path):
    heads, own = saved(tmp_path, CURVE_7B, "heads.json"), saved(tmp_path, CURVE_7B[::-1], "own.json")
    prefill = PrefillPruning(profile=own)
    found = schedule_for(UncompConfig(prefill=prefill, profile=heads), shape(32, 32))
    assert found.starts != (0, 2, 15, 26, 31)
    found = schedule_for(UncompConfig(prefill=PrefillPruning(), profile=heads), shape(32, 32))
    assert found.starts == (0, 2, 15, 26, 31)


def test_few_heads_have_a_lower_threshold(tmp_path):
    """min(1, heads / 32): a drop of 0.2 splits a model of 4 heads, none of 32."""
    curve = [4.0, 3.8, 3.9, 3.9]
    assert schedule(4, "profile", profile=saved(tmp_path, curve, heads=4)).starts == (0, 1)
    assert schedule(4, "profile", heads=32, profile=saved(tmp_path, curve, heads=32)).starts == (0,)


def test_the_curve_of_effective_ranks(tmp_path):
    profile = made_profile(4, 4, 2)
    entropy = [[0.5] * 4, [0.2] * 4, [0.6] * 4, [0.55] * 4]
    dataclasses.replace(profile, entropy=entropy, curve=[1.0] * 4).save(tmp_path / "p.json")
    found = schedule(4, "profile", profile=str(tmp_path / "p.json"), curve="erank", threshold=3.0)
    assert found.starts == (0, 1)  # ranks 8.0 2.3 12.1 9.85


def test_the_profile_of_the_package_needs_no_name():
    """For the model that it was made of: found by the hash of its config."""
    facts = HeadProfile.load(files.shipped_names()[0]).model
    model = CacheShape(
        facts.L, facts.Hq, facts.Hkv, facts.D, facts.Hkv, tuple(range(facts.L)), facts.L, facts.type, facts.hash
    )
    found = schedule_for(UncompConfig(policy="uncomp_stage"), model)
    assert len(found.starts) > 1
    assert found.num_layers == facts.L


# ---- refusals
def test_what_a_model_does_not_allow(tmp_path):
    with pytest.raises(ValueError, match=r"stages must ascend from 0 to below 4 layers; got \[0, 2, 4\]"):
        schedule(4, [0, 2, 4])
    with pytest.raises(ValueError, match='for a model of 24 layers; "fixed" is published for 32 and 40'):
        schedule(24, "fixed")
    with pytest.raises(ValueError, match=r"come from a profile .* no profile of this model comes with the package"):
        schedule(4, "profile")
    with pytest.raises(ValueError, match="Hq of the model must be 32"):
        schedule(32, "profile", profile=saved(tmp_path, CURVE_7B))
    with pytest.raises(FileNotFoundError, match="profile must be"):
        schedule(4, "profile", profile=str(tmp_path / "none.json"))
    sliding = dataclasses.replace(shape(4), num_layers=2, layers=(1, 3), model_type="gemma3_text")
    with pytest.raises(NotImplementedError, match=r"full attention in all 4 layers, .*; gemma3_text has 2"):
        schedule_for(UncompConfig(prefill=PrefillPruning(stages=[0, 1])), sliding)


def test_attention_that_was_not_seen_is_an_error():
    pruned = PrunedPrompt(schedule(4, [0, 2], n_min=20), Lengths([50], 50), None, CPU)
    with pytest.raises(RuntimeError, match="did not see the attention of layer 1"):
        pruned.enter(2, [torch.zeros(1, 50, 4)])


# ---- which tokens
def test_worked_vector(device):
    u = torch.tensor([[0.9, 0.1, 0.4, 0.05, 0.3, 0.02, 0.6, 0.1, 0.2, 0.15, 0.3, 0.5]], device=device)
    index = chosen_tokens(u, Lengths([12], 12), Lengths([8], 8), newest=3, sinks=0)
    assert index.tolist() == [[0, 2, 4, 6, 8, 9, 10, 11]]


def test_ties_nan_and_sinks(device):
    u = torch.tensor([[0.1, 0.5, math.nan, 0.5, 0.5, 0.2, 0.0, 0.0]], device=device)
    for keep, sinks, want in ((4, 0, [1, 3, 6, 7]), (4, 1, [0, 1, 6, 7]), (7, 0, [0, 1, 3, 4, 5, 6, 7])):
        index = chosen_tokens(u, Lengths([8], 8), Lengths([keep], keep), newest=2, sinks=sinks)
        assert index.tolist() == [want]


@pytest.mark.parametrize("seed", range(4))
def test_batches_of_any_lengths(device, seed):
    """Places counted from each sequence's first token, padding in front, against a plain sort."""
    made = torch.Generator().manual_seed(seed)
    n = torch.randint(0, 60, (5,), generator=made).tolist()
    columns, newest, sinks = max(n) + seed, 8, seed
    keep = [min(count, 20 + 3 * row) for row, count in enumerate(n)]
    scores = torch.rand(5, columns, generator=made)
    lengths, kept = Lengths(n, columns), Lengths(keep, max(keep))
    index = chosen_tokens(scores.to(device), lengths, kept, newest, sinks).tolist()
    for row, count in enumerate(n):
        places = (
            best(scores[row, :count].tolist(), keep[row], newest, sinks) if count > newest + sinks else range(count)
        )
        assert index[row] == [-1] * (max(keep) - keep[row]) + [columns - count + p for p in places]


@pytest.mark.parametrize("queries", [1, 8, 64])
def test_scores_are_sums_over_all_heads(device, queries):
    """Against a float64 softmax; padding holds NaN."""
    made = torch.Generator().manual_seed(0)
    n, columns, scale = [40, 23, 5], 44, 0.125
    query, key = torch.randn(3, 4, columns, 64, generator=made), torch.randn(3, 2, columns, 64, generator=made)
    for row, count in enumerate(n):
        query[row, :, : columns - count] = key[row, :, : columns - count] = math.nan
    got = token_scores(query.to(device), key.to(device), scale, queries, Lengths(n, columns)).cpu()
    assert got.dtype == torch.float32
    for row, count in enumerate(n):
        q, k = query[row, :, columns - count :].double(), key[row, :, columns - count :].double()
        logits = q @ k.repeat_interleave(2, 0).transpose(1, 2) * scale
        causal = torch.ones(count, count).tril().bool()
        weights = logits.masked_fill(~causal, -math.inf).softmax(-1)
        want = weights[:, -queries:].sum((0, 1))
        torch.testing.assert_close(got[row, :count].double(), want, atol=1e-4, rtol=1e-4)
        assert not got[row, count:].any()


def test_what_goes_along_is_gathered_by_one_index(device):
    """Tensors of a batch and shared ones, positions, and a second border on top of the first."""
    where = torch.device(device)
    pruned = PrunedPrompt(schedule(4, [0, 1, 3], n_min=10), Lengths([30, 12], 32), None, where)
    assert pruned.reached == [[30, 12], [20, 11], [20, 11], [10, 10]]
    states = torch.arange(64.0, device=where).view(2, 32, 1)
    shared = torch.arange(100, 132, device=where).view(1, 32)
    for layer in (1, 3):
        made = torch.Generator().manual_seed(layer)
        columns = states.shape[1]
        q, k = (torch.randn(2, 2, columns, 64, generator=made).to(where) for _ in range(2))
        pruned.score(layer - 1, q, k, 0.125)
        states, shared = pruned.enter(layer, [states, shared])
        width = max(pruned.reached[layer])
        assert states.shape == (2, width, 1) and shared.shape == (2, width)
        for row, keep in enumerate(pruned.reached[layer]):
            pads, begin = width - keep, (2, 20)[row]
            column = states[row, pads:, 0].long() - 32 * row
            assert not states[row, :pads].any() and not shared[row, :pads].any()
            assert pruned.position[row].tolist() == [-1] * pads + (column - begin).tolist()
            assert torch.equal(shared[row, pads:], column + 100)
            assert column.tolist() == sorted(column.tolist()) and column[-1] == 31
    assert pruned.lengths.length == [10, 10] and not pruned.lengths.padded
