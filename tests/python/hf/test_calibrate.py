# SPDX-License-Identifier: Apache-2.0
"""calibrate on tiny models: values against a loop in float64, runs that repeat and resume, and what is given back."""

from __future__ import annotations

import math
import random

import pytest
import torch

transformers = pytest.importorskip("transformers")

from reference.matrix_spectrum import head_spectrum  # noqa: E402

import uncomp  # noqa: E402
from uncomp import UncompConfig, calibrate  # noqa: E402
from uncomp.calibration import collect  # noqa: E402
from uncomp.testing import tiny_model, tiny_model_types  # noqa: E402

pytestmark = pytest.mark.hf
TEXT = "".join(random.Random(5).choices("abcdefgh ijklmnop\n", k=900))


class Bytes:
    """A tokenizer of bytes; with a BOS in front of a text if it has one."""

    def __init__(self, bos: int | None = None):
        self.bos_token_id = bos

    def __call__(self, text, add_special_tokens=True, **_):
        front = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": front + [b % 190 + 3 for b in text.encode()]}


SMALL = {"samples": 5, "seqlen": 40}


def run(model, tokenizer=None, texts=TEXT, **options):
    return calibrate(model, tokenizer or Bytes(), texts, **{**SMALL, **options})


def states_of(model, ids, tensor):
    """[L, heads, S, D] of one sample, by hooks on the stock model: rotated queries and keys, values, hidden states."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    found = []

    def keep(module, args, kwargs, output):
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        shape = (*hidden.shape[:2], -1, module.head_dim)
        q, k, v = (p(hidden).view(shape).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
        plain = {"query": q, "key": k}
        q, k = apply_rotary_pos_emb(q, k, *kwargs["position_embeddings"])
        found.append({"query": q, "key": k, "value": v, "plain query": plain["query"], "plain key": plain["key"]})

    hooks = [layer.self_attn.register_forward_hook(keep, with_kwargs=True) for layer in model.model.layers]
    if tensor == "hidden":
        for hook in hooks:
            hook.remove()
        hooks = [layer.register_forward_hook(lambda m, a, out: found.append({"hidden": out[:, None]}))
                 for layer in model.model.layers]  # fmt: skip
    with torch.inference_mode():
        model(input_ids=ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack([layer[tensor][0] for layer in found])


def expected(model, samples, tensor, k):
    """Entropies [samples, L, heads] of k and of all eigenvalues, effective ranks, and spectra, in float64."""
    spectra = []
    for ids in samples:
        states = states_of(model, ids, tensor).double()
        spectra.append(torch.stack([torch.stack([head_spectrum(x, x.shape[1]) for x in heads]) for heads in states]))
    spectrum = torch.stack(spectra)
    dim = spectrum.shape[-1]
    part, whole = -torch.xlogy(spectrum[..., :k], spectrum[..., :k]).sum(-1), -torch.xlogy(spectrum, spectrum).sum(-1)
    return part / math.log(dim), whole / math.log(dim), part.exp(), spectrum


def drawn(samples=5, seqlen=40, seed=42, bos=None):
    tokens = torch.tensor(Bytes()(TEXT)["input_ids"])
    m, rng = seqlen - (bos is not None), random.Random(seed)
    starts = [rng.randrange(len(tokens) - m + 1) for _ in range(samples)]
    front = [] if bos is None else [torch.tensor([bos])]
    return [torch.cat([*front, tokens[s : s + m]]) for s in starts]


# ---- values
@pytest.mark.parametrize(
    ("tensor", "rope"),
    [*((tensor, "after") for tensor in ("query", "key", "value", "hidden")), ("query", "before"), ("key", "before")],
)
def test_entropies_of_every_head(tensor, rope):
    """Against spectra by singular values in float64 of states that hooks of this file take."""
    model = tiny_model("llama")
    name = f"plain {tensor}" if rope == "before" else tensor
    k = 16
    part, whole, erank, spectrum = expected(model, drawn(), name, k)
    profile = run(model, tensor=tensor, rope=rope)

    def heads(table):
        return table.repeat_interleave(8 // table.shape[-1], -1).tolist()

    for got, want, bound in (
        (profile.entropy, part.mean(0), 2e-5),
        (profile.entropy_full, whole.mean(0), 2e-5),
        (profile.entropy_spread, part.std(0), 2e-5),
        (profile.erank, erank.mean(0), 2e-3),
        (profile.erank_spread, erank.std(0), 2e-3),
    ):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(heads(want)), atol=bound, rtol=0)
    torch.testing.assert_close(torch.tensor(profile.spectrum), spectrum.mean((0, 1, 2)).float(), atol=1e-5, rtol=1e-4)
    want = [sum(math.exp(h) for h in layer) for layer in profile.entropy_full]
    assert profile.curve == pytest.approx(want)
    assert (profile.run.k, profile.run.tensor, profile.run.rope, profile.run.seqlen) == (k, tensor, rope, 40)


@pytest.mark.parametrize("kind", ["truncated", "renormalized", "renyi2"])
def test_votes_are_the_ranks_of_every_sample(kind):
    model, k = tiny_model("llama"), 5
    _, _, _, spectrum = expected(model, drawn(), "query", k)
    kept = spectrum[..., :k]
    shares = kept / kept.sum(-1, keepdim=True)
    values = {
        "truncated": -torch.xlogy(kept, kept).sum(-1),
        "renormalized": -torch.xlogy(shares, shares).sum(-1),
        "renyi2": -spectrum.square().sum(-1).log(),
    }
    entropy = values[kind]  # [samples, L, Hq]
    profile = run(model, top=k, kind=kind)
    for rows, by_row in (("query_head", entropy), ("kv_head", entropy.unflatten(-1, (4, 2)).mean(-1))):
        for layer in range(4):
            count = by_row.shape[-1]
            want = [[0] * count for _ in range(count)]
            for sample in by_row[:, layer].tolist():
                for rank, row in enumerate(sorted(range(count), key=lambda i: (sample[i], i))):
                    want[row][rank] += 1
            assert [list(row) for row in profile.rank_votes[rows][layer]] == want


@pytest.mark.parametrize("tensor", ["query", "key"])
def test_variance_ranks_the_heads(tensor):
    """Its mean, spread and ranks stand where those of the entropy do; curve, spectrum and whole entropy stay."""
    model, other = tiny_model("llama"), run(tiny_model("llama"), tensor=tensor, top="all")
    states = [states_of(model, ids, tensor) for ids in drawn()]
    want = torch.stack([s.double().var(2, correction=0).mean(-1) for s in states])  # [samples, L, heads]
    want = want.repeat_interleave(8 // want.shape[-1], -1)
    profile = run(model, tensor=tensor, kind="variance")
    torch.testing.assert_close(torch.tensor(profile.entropy), want.mean(0).float(), atol=0, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(profile.entropy_spread), want.std(0).float(), atol=1e-4, rtol=1e-3)
    for layer in range(4):
        by_row = want[:, layer].unflatten(-1, (4, 2)).mean(-1)
        votes = [[0] * 4 for _ in range(4)]
        for sample in by_row.tolist():
            for rank, row in enumerate(sorted(range(4), key=lambda i: (sample[i], i))):
                votes[row][rank] += 1
        assert [list(row) for row in profile.rank_votes["kv_head"][layer]] == votes
    assert (profile.curve, profile.spectrum, profile.erank) == (other.curve, other.spectrum, other.erank)
    assert profile.run.kind == "variance" and profile.run.k == 64


def test_elbow_is_that_of_the_run():
    """One pass with the elbow gives the profile of a pass with that number."""
    model = tiny_model("llama")
    found = run(model, top="elbow")
    assert found == run(model, top=found.elbow)
    assert found.run.k == found.elbow
    assert run(model, top="all").run.k == 64


def test_stability_compares_halves():
    """The rank correlation of what even and odd samples say alone; none for a single sample."""
    model = tiny_model("llama")
    found = run(model, samples=6)
    part, _, _, _ = expected(model, drawn(6), "query", 16)
    scipy = pytest.importorskip("scipy.stats")
    even, odd = part[::2].mean(0), part[1::2].mean(0)
    by_layer = [scipy.spearmanr(a, b).statistic for a, b in zip(even, odd, strict=True)]
    assert found.stability["query_head"]["layer"] == pytest.approx(sum(by_layer) / 4, abs=1e-6)
    assert found.stability["query_head"]["model"] == pytest.approx(
        scipy.spearmanr(even.flatten(), odd.flatten()).statistic, abs=1e-6
    )
    single = run(model, samples=1)
    assert single.stability["kv_head"] == {"layer": None, "model": None}
    assert single.entropy_spread[0] == (0.0,) * 8


def test_batches_and_bos():
    """A batch gives what its samples give alone; a tokenizer's BOS stands in front and counts."""
    model = tiny_model("llama")
    one, three = run(model), run(model, batch_size=3)
    assert one.rank_votes == three.rank_votes
    torch.testing.assert_close(torch.tensor(one.entropy), torch.tensor(three.entropy), atol=1e-5, rtol=0)
    part, _, _, _ = expected(model, drawn(bos=1), "query", 16)
    profile = run(model, Bytes(bos=1))
    torch.testing.assert_close(torch.tensor(profile.entropy), part.mean(0).float(), atol=2e-5, rtol=0)
    assert profile.run.seqlen == 40


@pytest.mark.parametrize("model_type", tiny_model_types())
@pytest.mark.parametrize("rope", ["after", "before"])
def test_every_family(model_type, rope):
    """All families give a profile of all layers; queries without rotation have other entropies."""
    model = tiny_model(model_type)
    profile = run(model, samples=2, rope=rope)
    assert profile.model.L == 4 and profile.model.type == model_type
    assert min(map(min, profile.entropy)) > 0.1 and max(map(max, profile.entropy)) <= 1
    assert profile.entropy != run(model, samples=2, rope="before" if rope == "after" else "after").entropy


# ---- the model afterwards
def test_the_model_is_given_back(monkeypatch):
    """Attention, hooks and training mode, after success and after an error in the middle."""
    model = tiny_model("llama")
    model.train()
    model.model.layers[1].eval()
    before = model.config._attn_implementation
    modes = [m.training for m in model.modules()]
    for tensor, rope in (("query", "before"), ("hidden", "after")):
        run(model, tensor=tensor, rope=rope)
        monkeypatch.setattr(collect.Sums, "take", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, tensor=tensor, rope=rope)
        monkeypatch.undo()
        assert model.config._attn_implementation == before
        assert [m.training for m in model.modules()] == modes
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_nan_is_named():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight[3 * 64] = float("nan")
    with pytest.raises(ValueError, match=r"uncomp\.calibrate: the states of sample 0, layer 2, head 3 hold NaN"):
        run(model)


def test_nan_of_a_later_sample_is_named(monkeypatch):
    """Samples are counted several at a time; the error names the right one all the same."""
    take, calls = collect.Sums.take, []

    def spoilt(self, spectra):
        calls.append(1)
        spectra[1][0, 5] = float("nan") if len(calls) == 4 else spectra[1][0, 5]
        take(self, spectra)

    monkeypatch.setattr(collect.Sums, "take", spoilt)
    for settle in (2, 8):
        monkeypatch.setattr(collect, "SETTLE_SAMPLES", settle)
        calls.clear()
        with pytest.raises(ValueError, match="the states of sample 3, layer 1, head 5 hold NaN"):
            run(tiny_model("llama"))


# ---- refusals
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"texts": "short"}, "texts must have at least 40 tokens for seqlen = 40; got 5"),
        ({"texts": " \n"}, "texts must hold some text; got none"),
        ({"texts": []}, "texts must hold some text; got none"),
        ({"texts": "a\udcff" * 40}, "texts must be Unicode text; character 1 is none"),
        ({"samples": 0}, "samples must be an integer of at least 1; got 0"),
        ({"seqlen": 1}, "seqlen must be an integer of at least 2; got 1"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1; got 0"),
        ({"top": 65}, "top must be an integer from 1 to 64"),
        ({"top": "half"}, "top must be an integer from 1 to 64"),
        ({"tensor": "output"}, "tensor must be one of query, key, value, hidden; got 'output'"),
        ({"rope": "before", "tensor": "value"}, 'rope must be "after" for tensor value'),
        ({"kind": "range"}, "kind must be one of truncated, renormalized, renyi2, variance; got 'range'"),
    ],
)
def test_bad_arguments(options, text):
    with pytest.raises(ValueError, match=rf"^uncomp\.calibrate: {text}"):
        run(tiny_model("llama"), **options)


def test_tokens_stand_for_texts():
    """The tokens of a text give what the text gives, up to the name of the text."""
    model, tokens = tiny_model("llama"), torch.tensor(Bytes()(TEXT)["input_ids"])
    by_tokens, by_text = calibrate(model, None, tokens, **SMALL), run(model)
    assert by_tokens.entropy == by_text.entropy and by_tokens.rank_votes == by_text.rank_votes
    assert by_tokens.run.sha256 != by_text.run.sha256
    for texts, kind, text in (
        (tokens.int(), TypeError, r"texts must be strings, or tokens \[N\] int64; got a tensor \[900\] int32"),
        (tokens[None], TypeError, r"got a tensor \[1, 900\] int64"),
        (tokens[:39], ValueError, "texts must have at least 40 tokens for seqlen = 40; got 39"),
        (tokens - 200, ValueError, r"tokens must lie in \[0, 199\), the model's; got -"),
        (tokens + 200, ValueError, r"tokens must lie in \[0, 199\), the model's; got 3\d\d; is the tokenizer"),
        (TEXT, ValueError, "tokenizer must be the model's for texts that are strings; got None"),
    ):
        with pytest.raises(kind, match=rf"^uncomp\.calibrate: .*{text}"):
            calibrate(model, None, texts, **SMALL)


def test_a_patched_model_is_refused():
    model = tiny_model("llama")
    with uncomp.patch(model, UncompConfig(budget=32)), pytest.raises(ValueError, match="the model is patched"):
        run(model)


def test_long_samples_are_cut_to_what_the_model_takes():
    assert run(tiny_model("llama", max_position_embeddings=32)).run.seqlen == 32
