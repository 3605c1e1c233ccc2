# SPDX-License-Identifier: Apache-2.0
"""LoRC on the weights of a trained model: whole rank, ranks by condition numbers, and the bounds of docs/policies.md on
the states that its layers see."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

from uncomp import lorc
from uncomp.testing import example_text
from uncomp.transforms.lorc import factors

pytestmark = pytest.mark.hf
HEADS, GROUP, D, LAYERS = 3, 3, 64, (0, 11, 29)


@pytest.fixture(scope="module")
def real():
    """SmolLM2-135M in float32, and 200 tokens."""
    from uncomp.hf.load import load_model

    try:
        model, tokenizer = load_model("smollm2-135m", dtype="float32")
    except (FileNotFoundError, ImportError) as error:
        pytest.skip(str(error))
    return model, tokenizer(example_text()[5000:7000], return_tensors="pt").input_ids[:, :200]


@torch.no_grad()
def seen(model, ids):
    """Of each layer of LAYERS what goes into its projections, [T, E], and its queries, [Hq, T, D]; float64."""
    found, hooks = {}, []
    for index in LAYERS:

        def keep(module, args, output, index=index):
            found[index] = (args[0], output)

        hooks.append(model.model.layers[index].self_attn.q_proj.register_forward_hook(keep))
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {i: (x[0].double(), q[0].double().view(len(q[0]), -1, D).transpose(0, 1)) for i, (x, q) in found.items()}


def turned(vectors, model):
    """Vectors [..., T, D] at positions 0 to T - 1, as the model rotates them."""
    frequency = model.model.rotary_emb.inv_freq.double()
    angle = torch.arange(vectors.shape[-2]).double()[:, None] * frequency
    one, other = vectors.chunk(2, -1)
    return torch.cat((one * angle.cos() - other * angle.sin(), other * angle.cos() + one * angle.sin()), -1)


@torch.no_grad()
def test_whole_rank_is_the_model_and_removal_is_exact(real):
    model, ids = real
    want, before = model(ids).logits, {name: p.clone() for name, p in model.named_parameters()}
    with lorc.compress(model, lorc.LorcConfig(rho=1.0)):
        assert (model(ids).logits - want).norm() < 1e-4 * want.norm()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(model(ids).logits, want)


def test_ranks_follow_singular_values_of_the_weights(real):
    """Condition numbers by an SVD of each layer's matrices instead of our eigenvalues, sums and ramp by hand; in this
    model the schedule is one step from the linear ramp at most."""
    model, logs = real[0], []
    for layer in model.model.layers:
        pair = [
            torch.linalg.svdvals(p.weight.detach().double()) for p in (layer.self_attn.k_proj, layer.self_attn.v_proj)
        ]
        logs.append(sum(math.log(s[0] / s[-1].clamp(min=1e-6 * s[0])) for s in pair))
    with lorc.compress(model, lorc.LorcConfig(rho=0.575)) as handle:
        assert handle.log_kappa == pytest.approx(logs, rel=1e-6)
        ranks = list(handle.ranks.key)
        assert handle.ranks.value == handle.ranks.key
    sums = [sum(logs[i:]) for i in range(len(logs))]
    depth = [(s - sums[-1]) / (sums[0] - sums[-1]) for s in sums]
    lowest = 0.25 * D
    highest = lowest + (0.575 * D - lowest) * len(depth) / sum(depth)
    wanted = [lowest + t * (highest - lowest) for t in depth]
    assert sum(ranks) == 16 * round(0.575 * D * len(ranks) / 16)
    assert ranks == sorted(ranks, reverse=True)
    assert all(abs(rank - want) < 16 for rank, want in zip(ranks, wanted, strict=True))
    ramp = lorc.rank_schedule(logs, D, lorc.LorcConfig(rho=0.575, schedule="linear")).key
    assert max(abs(one - other) for one, other in zip(ranks, ramp, strict=True)) <= 16


@torch.no_grad()
def test_bounds_hold_on_states_of_the_model(real):
    """Of the modules that run: errors of latents, logits of rotated keys, total variation of weights, outputs."""
    model, ids = real
    states, rank = seen(model, ids), 32
    whole = {
        i: [
            factors.per_head(getattr(model.model.layers[i].self_attn, name).weight, HEADS)
            for name in ("k_proj", "v_proj")
        ]
        for i in LAYERS
    }
    with lorc.compress(model, lorc.LorcConfig(rank_k=rank, rank_v=rank)):
        for i, (x, query) in states.items():
            attention = model.model.layers[i].self_attn
            lengths, made, exact, sigma = x.norm(dim=-1), [], [], []
            for name, matrices in zip(("k_proj", "v_proj"), whole[i], strict=True):
                module = getattr(attention, name)
                narrow = module.down.double().view(HEADS, rank, -1)
                basis = narrow @ torch.linalg.pinv(matrices)  # A^T = B W^T
                made.append(x @ narrow.mT @ basis)
                exact.append(x @ matrices.mT)
                sigma.append(torch.linalg.svdvals(matrices)[:, rank])
                errors = (made[-1] - exact[-1]).norm(dim=-1)
                assert (errors <= sigma[-1][:, None] * lengths * (1 + 1e-5) + 1e-6).all()
                assert errors.max() > 0.05 * (sigma[-1][:, None] * lengths).max()  # not because nothing was cut
            got = attention.k_proj(x.float()).double().view(len(x), HEADS, D).transpose(0, 1)
            assert (got - made[0]).norm() < 1e-4 * made[0].norm()
            query, spread = turned(query, model), torch.arange(HEADS).repeat_interleave(GROUP)
            hidden = torch.full((len(x), len(x)), float("-inf"), dtype=torch.float64).triu(1)
            logits, other = (query @ turned(keys, model)[spread].mT * D**-0.5 for keys in (exact[0], made[0]))
            delta = (logits - other).abs()
            bound = query.norm(dim=-1)[..., None] * sigma[0][spread][:, None, None] * lengths * D**-0.5
            assert (delta <= bound * (1 + 1e-5) + 1e-6).all()
            p, q = ((one + hidden).softmax(-1) for one in (logits, other))
            most = 2 * torch.tanh(delta.tril().amax(-1) / 2)
            assert ((p - q).abs().sum(-1) <= most + 1e-9).all()
            error = (p @ exact[1][spread] - q @ made[1][spread]).norm(dim=-1)
            values = made[1].norm(dim=-1).cummax(-1).values[spread]
            limit = most * values + sigma[1][spread][:, None] * lengths.cummax(0).values
            assert (error <= limit * (1 + 1e-5) + 1e-6).all()
