# SPDX-License-Identifier: Apache-2.0
"""Factors of a layer's weights: their error bounds, and that what is folded or absorbed computes the same."""

from __future__ import annotations

import math

import pytest
import torch

from uncomp import latent, remade
from uncomp.transforms.lorc import factors

E, D, HEADS, GROUP, RANK, TOKENS = 96, 64, 3, 2, 32, 50


def weights(seed: int = 0, out: int = HEADS * D, decay: float = 0.05) -> torch.Tensor:
    """[out, E] float64 whose singular values fall: full matrices would hide an error in their order."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(out, E, generator=generator, dtype=torch.float64)
    left, values, right = torch.linalg.svd(wide, full_matrices=False)
    return left * values * (-decay * torch.arange(len(values))).exp() @ right


def states(seed: int = 9) -> torch.Tensor:
    return torch.randn(TOKENS, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def split(weight: torch.Tensor, rank: int = RANK):
    """Matrices [h, D, E], basis [h, r, D] and latents' projection [h, r, E] of a projection."""
    matrices = factors.per_head(weight, HEADS)
    basis = factors.exact_basis(matrices, rank)
    return matrices, basis, factors.down(matrices, basis).view(HEADS, rank, E)


# ---- the decomposition
def test_the_basis_is_orthonormal_and_lengths_are_those_of_the_rebuilt_vectors():
    _, basis, narrow = split(weights())
    assert torch.allclose(basis @ basis.mT, torch.eye(RANK, dtype=torch.float64).expand(HEADS, -1, -1), atol=1e-12)
    latents = states() @ narrow.mT
    assert torch.allclose(latents.norm(dim=-1), (latents @ basis).norm(dim=-1), rtol=1e-12)


@pytest.mark.parametrize("rank", [16, 32, 48, 64])
def test_the_error_is_what_the_singular_values_say(rank):
    """Frobenius norm of the tail, and sigma_{r+1} for each token: the bounds of docs/policies.md."""
    matrices, basis, narrow = split(weights(), rank)
    values = torch.linalg.svdvals(matrices)
    lost = matrices - basis.mT @ narrow
    tail = values[:, rank:].square().sum(-1).sqrt()
    assert torch.allclose(lost.flatten(1).norm(dim=1), tail, rtol=1e-9, atol=1e-10)
    largest = values[:, rank] if rank < D else torch.zeros(HEADS)
    errors = (states() @ lost.mT).norm(dim=-1)
    assert (errors <= largest.unsqueeze(1) * states().norm(dim=-1) + 1e-10).all()


def test_a_head_dim_above_the_model_width_has_a_full_basis():
    matrices = factors.per_head(torch.randn(2 * 64, 24, dtype=torch.float64), 2)
    basis = factors.exact_basis(matrices, 48)
    assert basis.shape == (2, 48, 64)
    assert torch.allclose(basis.mT @ basis @ matrices, matrices, atol=1e-10)


def test_a_random_search_finds_nearly_the_best_basis():
    matrices = factors.per_head(weights(decay=0.15), HEADS)
    best, found = (
        (matrices - basis.mT @ basis @ matrices).flatten(1).norm(dim=1)
        for basis in (factors.exact_basis(matrices, 16), factors.random_basis(matrices, 16, seed=3))
    )
    assert (found <= 1.02 * best).all() and (found >= best * (1 - 1e-9)).all()
    assert torch.equal(factors.random_basis(matrices, 16, 3), factors.random_basis(matrices, 16, 3))


def test_whitening_minimises_the_error_of_outputs():
    """By its definition, Cholesky and SVD of SᵀW, and better on those tokens than the plain factors."""
    tokens = states() * (-0.08 * torch.arange(E)).exp()
    matrices = factors.per_head(weights(), HEADS)
    outputs = tokens @ matrices.mT
    basis = factors.whitened_basis(outputs.mT @ outputs, 16)
    root = torch.linalg.cholesky(tokens.T @ tokens + 1e-14 * torch.eye(E, dtype=torch.float64))
    slow = torch.linalg.svd(root.T @ matrices.mT).Vh[:, :16]
    assert torch.allclose(basis.mT @ basis, slow.mT @ slow, atol=1e-6)

    def error(b):
        return (outputs - outputs @ b.mT @ b).norm()

    assert error(basis) < 0.9 * error(factors.exact_basis(matrices, 16))


# ---- condition numbers
def test_condition_numbers_by_hand():
    """diag(8, 2) and diag(4, 0): 4 for the first head; the second's smallest counts as 1e-6 of its largest."""
    weight = torch.zeros(4, 2)
    weight[0, 0], weight[1, 1], weight[2, 0] = 8.0, 2.0, 4.0
    assert factors.log_kappa(weight[:2], 1, "layer") == pytest.approx(math.log(4))
    expected = (math.log(4) + math.log(1e6)) / 2
    assert factors.log_kappa(weight, 2, "per_head_mean") == pytest.approx(expected)
    assert factors.log_kappa(weight, 2, "layer") == pytest.approx(math.log(math.sqrt(80) / 2))


@pytest.mark.parametrize(("bad", "text"), [(0.0, "all be zero"), (math.nan, "finite"), (math.inf, "finite")])
def test_weights_without_a_condition_number_are_refused(bad, text):
    with pytest.raises(ValueError, match=f"^uncomp.lorc: weights .*{text}"):
        factors.log_kappa(torch.full((4, 4), bad), 1, "layer")


# ---- what is folded
def test_values_folded_into_the_output_projection_are_exact():
    """Mixing latents, then the folded weights = rebuilding every value, mixing, then the weights as they were."""
    _, basis, narrow = split(weights(1))
    out, bias = torch.randn(E, HEADS * GROUP * D, dtype=torch.float64), torch.randn(E, dtype=torch.float64)
    value_bias = torch.randn(HEADS * D, dtype=torch.float64)
    weight, folded_bias = factors.folded_output(out, bias, basis, value_bias)
    mix = torch.rand(HEADS * GROUP, TOKENS, dtype=torch.float64).softmax(-1)
    spread = torch.arange(HEADS).repeat_interleave(GROUP)
    latents = (states() @ narrow.mT)[spread]  # [Hq, T, r]
    rebuilt = latents @ basis[spread] + value_bias.view(HEADS, 1, D)[spread]
    want = torch.einsum("qt,qtd->qd", mix, rebuilt).flatten() @ out.T + bias
    mixed = torch.einsum("qt,qtr->qr", mix, latents).flatten()
    assert torch.allclose(mixed @ weight.T + folded_bias, want, rtol=1e-12)
    single = mixed.float() @ weight.float().T + folded_bias.float()
    assert (single - want).norm() <= 1e-6 * want.norm()


def test_keys_absorbed_into_the_query_projection_are_exact():
    """(x Wq Bᵀ) c = (x Wq) (c B) for every pair of tokens, in float32 too."""
    _, basis, narrow = split(weights(2))
    query = factors.per_head(weights(3), HEADS)
    absorbed = factors.down(query, basis).view(HEADS, RANK, E)
    x = states()
    want = (x @ query.mT) @ ((x @ narrow.mT) @ basis).mT
    got = (x.float() @ absorbed.float().mT) @ (x.float() @ narrow.float().mT).mT
    assert (got - want).norm() <= 1e-6 * want.norm()


# ---- attention of one layer
def test_logits_weights_and_outputs_stay_within_their_bounds():
    """Truncated keys and values of the same x: logits, total variation of the weights, and outputs."""
    x, scale = states(), D**-0.5
    for seed in range(8):
        (wk, bk, ak), (wv, bv, av) = split(weights(seed)), split(weights(seed + 50))
        query = torch.randn(HEADS, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        keys, approx = x @ wk.mT, x @ ak.mT @ bk
        logits, other = (torch.einsum("hd,htd->ht", query, k) * scale for k in (keys, approx))
        delta = (logits - other).abs()
        sigma = [torch.linalg.svdvals(w)[:, RANK] for w in (wk, wv)]
        bound = query.norm(dim=-1).unsqueeze(1) * sigma[0].unsqueeze(1) * x.norm(dim=-1) * scale
        assert (delta <= bound).all()
        p, q = logits.softmax(-1), other.softmax(-1)
        most = 2 * torch.tanh(delta.amax(-1) / 2)
        assert ((p - q).abs().sum(-1) <= most + 1e-12).all()
        values = x @ av.mT @ bv
        out = torch.einsum("ht,htd->hd", p, x @ wv.mT) - torch.einsum("ht,htd->hd", q, values)
        limit = most * values.norm(dim=-1).amax(-1) + sigma[1] * x.norm(dim=-1).max()
        assert (out.norm(dim=-1) <= limit).all()


# ---- keys made again
def slow_keys(codec, rows, position, row_start, rows_of_one, offset):
    """Each slot by itself, in float64, with complex numbers for the rotation."""
    basis, dim = codec.projection.basis.double(), codec.projection.basis.shape[2]
    bias = codec.projection.bias.double().view(basis.shape[0], dim)
    out = torch.zeros(rows.shape[0], dim, dtype=torch.float64)
    for row in range(len(row_start) - 1):
        head = row % rows_of_one * basis.shape[0] // rows_of_one
        for slot in range(int(row_start[row]), int(row_start[row + 1])):
            key = rows[slot].double() @ basis[head] + bias[head]
            key = codec.norm(key)
            where = int(position[slot]) + (0 if offset is None else int(offset[row // rows_of_one]))
            turn = torch.polar(torch.ones(dim // 2).double(), where * frequencies(dim))
            turned = torch.complex(key[: dim // 2], key[dim // 2 :]) * turn
            out[slot] = torch.cat((turned.real, turned.imag))
    return out


def frequencies(dim):
    return 100.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def angles(like, position):
    turn = position.unsqueeze(-1).double() * torch.cat([frequencies(64)] * 2)
    return turn.cos().to(like.dtype), turn.sin().to(like.dtype)


class Projection:
    def __init__(self):
        self.basis, self.bias = torch.randn(2, 16, 64), torch.randn(128)
        self.heads, self.rank, self.head_dim = 2, 16, 64


@pytest.mark.parametrize("rows_of_one", [2, 6])
@pytest.mark.parametrize("offset", [None, [0, 5]])
def test_keys_of_an_arena_are_those_of_the_slow_reference(rows_of_one, offset):
    """Ragged rooms, an empty row, two sequences, query heads as rows, dead slots that hold NaN and absurd positions."""
    rooms = [5, 0, 9, 1, 3, 7, 2, 2, 8, 4, 1, 6][: 2 * rows_of_one]
    row_start = torch.tensor([0, *torch.tensor(rooms).cumsum(0).tolist()], dtype=torch.int32)
    capacity = int(row_start[-1])
    rows, position = torch.randn(capacity, 16), torch.randperm(4 * capacity)[:capacity].to(torch.int32)
    offset = None if offset is None else torch.tensor(offset, dtype=torch.int32)
    codec = latent.RotaryKeys(Projection(), 64, lambda k: k / k.norm(dim=-1, keepdim=True), angles, lambda: "a test")
    want = slow_keys(codec, rows, position, row_start, rows_of_one, offset)
    rows[4], position[4] = float("nan"), 2**31 - 8  # the last slot of the first row is dead
    slots = remade.Slots(row_start, max(rooms), rows_of_one, capacity)
    got = remade.arena_keys(codec, rows, position, slots, offset)
    live = torch.arange(capacity) != 4
    assert got.shape == want.shape and got[4].isnan().all()
    assert (got[live] - want[live]).abs().max() < 1e-5


def test_rows_that_heads_share_become_one_for_each_head():
    """Ragged rooms, an empty row, a short one: what a row held is what each of its three has, in its own channels."""
    rooms, lengths = [3, 0, 5, 2], [2, 0, 5, 1]
    row_start = torch.tensor([0, 3, 3, 8, 10], dtype=torch.int32)
    states, slots = torch.randn(10, 3 * 4), remade.Slots(row_start, 5, 2, 10)
    got = remade.unfolded(states, slots, 3)
    start, length = remade.unfolded_layout(row_start, torch.tensor(lengths, dtype=torch.int32), 3)
    assert start.dtype == length.dtype == torch.int32 and start[-1] == len(got) == 30
    for row, held in enumerate(lengths):
        for j in range(3):
            new = 3 * row + j
            assert length[new] == held and start[new + 1] - start[new] == rooms[row]
            part = states[int(row_start[row]) :][:held, 4 * j : 4 * j + 4]
            assert torch.equal(got[int(start[new]) :][:held], part)


def test_slots_behind_all_rows_touch_no_row():
    """An arena longer than its rows: every slot of a row is as in one without such slots."""
    row_start = torch.tensor([0, 3, 3, 8, 10], dtype=torch.int32)
    found = []
    for capacity in (10, 31):
        slots = remade.Slots(row_start, 5, 2, capacity)
        states = torch.arange(capacity * 12.0).view(capacity, 12)
        assert torch.equal(slots.flat(states[slots.place()])[:10], states[:10])
        found.append(remade.unfolded(states, slots, 3))
    assert len(found[1]) == 93 and torch.equal(found[1][:30], found[0])
    assert torch.equal(found[1].flatten().sort().values, torch.arange(31 * 12.0))


def test_latents_reach_the_attention_of_their_own_projection_once():
    owner, other = object(), object()
    rows = torch.zeros(1, 2, 3)
    latent.leave(owner, rows)
    assert latent.take(owner) is rows
    for leave in (
        lambda: None,
        lambda: latent.leave(other, rows),
        lambda: (latent.leave(owner, rows), latent.forget()),
    ):
        leave()
        with pytest.raises(RuntimeError, match=r"^uncomp: the projections of this layer did not run"):
            latent.take(owner)
