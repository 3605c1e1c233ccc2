# SPDX-License-Identifier: Apache-2.0
"""What an evaluation reads back from the device does not grow with the layers: on a GPU every read is a wait."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import uncomp
from uncomp.eval import batch, kept
from uncomp.eval.perplexity import Probe
from uncomp.eval.prompts import Prompt
from uncomp.report import read_together
from uncomp.testing import tiny_model

POLICIES = (
    {"policy": "uncomp"},
    {"preset": "tuned-hits"},
    {"policy": "adakv"},
    {"policy": "uncomp", "delete_heads": 1},
)


class Reads(TorchDispatchMode):
    """Counts operators that give the host a number, or a shape that hangs on data."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return operator(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def models():
    return [tiny_model("llama", num_hidden_layers=layers) for layers in (2, 5)]


@pytest.fixture(scope="module")
def prompts():
    draw = torch.Generator().manual_seed(0)
    return [Prompt(torch.randint(3, 199, (n,), generator=draw).tolist(), n - 9, 0, [5, 6]) for n in (150, 110)]


def counted(call):
    with Reads() as reads:
        call()
    return reads.count


@pytest.mark.parametrize("options", POLICIES, ids=str)
@pytest.mark.parametrize("agnostic", [False, True], ids=["aware", "agnostic"])
def test_a_batch(models, prompts, options, agnostic):
    config = uncomp.UncompConfig(budget=48, extend="append" if agnostic else "reselect", **options)
    found = []
    for model in models:
        turns = model.config.num_hidden_layers if agnostic else 0  # a later turn reads one number a layer
        with uncomp.patch(model, config) as handle:
            how = {"max_new_tokens": 5, "agnostic": agnostic, "pad": 0, "eos": ()}
            found.append(counted(lambda h=handle, m=model, how=how: batch.run(m, h, prompts, **how)) - turns)
            found.append(counted(handle.stats))
    assert found[:2] == found[2:]


def test_a_continuation(models):
    draw = torch.Generator().manual_seed(1)
    prefix, continuation = (torch.randint(3, 199, (1, n), generator=draw) for n in (150, 6))
    found = []
    for model in models:
        with Probe(model, uncomp.UncompConfig(budget=48)) as probe:
            found.append(counted(lambda p=probe: p.score(prefix, continuation)))
            first, second = probe.score(prefix, continuation), probe.score(prefix, continuation.flip(1))
            assert counted(lambda a=first, b=second: a.against(b)) <= 1
            assert first.against(second) == (first.divergence(second), first.agreement(second))
    assert found[0] == found[1]


def test_looking_at_what_is_kept_reads_nothing(models, prompts):
    with uncomp.patch(models[1], uncomp.UncompConfig(budget=48)) as handle:
        cache = handle.new_cache()
        with torch.no_grad():
            models[1](torch.tensor([prompts[0].ids]), past_key_values=cache, use_cache=True)
        layers = [layer.ragged for layer in cache.uncomp.layers]
        assert counted(lambda: kept.look(layers, [[5, 6]], 150)) == 0


def test_tensors_are_read_together():
    given = [torch.tensor([[1, 2**31 - 1]], dtype=torch.int32), torch.tensor(0.1), torch.zeros(0), torch.tensor([2.5])]
    read = read_together(given)
    assert [t.shape for t in read] == [t.shape for t in given] and {t.dtype for t in read} == {torch.float64}
    assert all(torch.equal(a, b.double()) for a, b in zip(read, given, strict=True))
    assert read_together([]) == []
