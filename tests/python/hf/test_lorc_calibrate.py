# SPDX-License-Identifier: Apache-2.0
"""Calibration tokens run once for several compressions, and what an evaluation counts of a compressed model."""

import math

import pytest
import torch
from lorc_support import prompt

from uncomp import UncompConfig, lorc, patch
from uncomp.eval import batch, perplexity
from uncomp.eval.prompts import Prompt
from uncomp.testing import tiny_model

pytestmark = pytest.mark.hf


@pytest.mark.parametrize("grain", ["head", "group:2", "layer"])
def test_moments_that_were_kept_give_the_factors_of_the_tokens(grain):
    """For every schedule, before and behind compressions that came back."""
    model, ids, said = tiny_model("llama", num_hidden_layers=2), prompt(columns=40)[0], []
    kept = lorc.calibrate(model, ids, granularity=grain, progress=said.append)
    assert said == ["calibration 1/2", "calibration 2/2"]
    for schedule in ("uniform", "linear"):
        config = lorc.LorcConfig(rho=0.5, schedule=schedule, granularity=grain, whiten="calib")
        made = []
        for calibration in (ids, kept):
            with lorc.compress(model, config, calibration=calibration):
                made.append([layer.self_attn.k_proj.down for layer in model.model.layers])
        assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))


def test_moments_that_do_not_fit_are_refused():
    ids, model = prompt()[0], tiny_model("llama", num_hidden_layers=2)
    kept = lorc.calibrate(model, ids)
    config = lorc.LorcConfig(rho=0.5, whiten="calib")
    wanted = r"^uncomp\.lorc\.compress: calibration must be of {} layers .* moments \[{}, {}, {}\] a layer; got 2 "
    with pytest.raises(ValueError, match=wanted.format(3, 4, 64, 64)):
        lorc.compress(tiny_model("llama", num_hidden_layers=3), config, calibration=kept)
    with pytest.raises(ValueError, match=wanted.format(2, 1, 256, 256)):
        lorc.compress(model, lorc.LorcConfig(rho=0.5, whiten="calib", granularity="layer"), calibration=kept)
    with pytest.raises(ValueError, match="exactly with whiten"):
        lorc.compress(model, lorc.LorcConfig(rho=0.5), calibration=kept)
    with lorc.compress(model), pytest.raises(ValueError, match=r"^uncomp\.lorc\.calibrate: .* compressed already"):
        lorc.calibrate(model, ids)
    with pytest.raises(ValueError, match='granularity must be "head"'):
        lorc.calibrate(model, ids, granularity="heads")
    for tokens, text in ((ids.float(), r"\[N, S\] int64 tokens; got"), (ids - 200, "from 0 to 198; got -")):
        with pytest.raises(ValueError, match=rf"^uncomp\.lorc\.calibrate: tokens must be {text}"):
            lorc.calibrate(model, tokens)


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (lambda t: t * math.nan, ValueError, "have finite moments; got NaN"),
        (torch.Tensor.float, TypeError, "have moments of float64 in memory; got torch.float32 on cpu"),
        (lambda t: t.to("meta"), TypeError, "have moments of float64 in memory; got torch.float64 on meta"),
        (torch.Tensor.numpy, TypeError, "have moments of float64 in memory; got ndarray"),
        (None, ValueError, "be of 2 layers .* two moments .* a layer; got 2 layers"),
    ],
)
def test_moments_that_are_none_are_refused(change, kind, text):
    """Before anything of the model changes; a change of None leaves the values' moments out."""
    model = tiny_model("llama", num_hidden_layers=2)
    kept = lorc.calibrate(model, prompt()[0])
    moments = [pair[:1] if change is None else tuple(map(change, pair)) for pair in kept.moments]
    with pytest.raises(kind, match=rf"^uncomp\.lorc\.compress: calibration must {text}"):
        lorc.compress(model, lorc.LorcConfig(rho=0.5, whiten="calib"), calibration=lorc.Calibration(moments))
    assert type(model.model.layers[0].self_attn.k_proj) is torch.nn.Linear


def test_an_evaluation_counts_bytes_of_latents():
    """Ranks that differ by layer and between keys and values, 4 bytes a number; full is at full width."""
    model = tiny_model("llama", num_hidden_layers=2)
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    ids = torch.randint(3, 190, (1, 60), generator=torch.Generator().manual_seed(0))
    config = lorc.LorcConfig(rank_k=(16, 48), rank_v=(32, 16))
    widths = (48, 64)
    with lorc.compress(model, config):
        for fields, tokens in (({"policy": "full"}, 60), ({"budget": 20, "groups": 1}, 20)):
            made = perplexity.score(model, ids[:, :60], ids[:, :3], UncompConfig(**fields))
            assert made.bytes["kv"] == 4 * heads * tokens * sum(widths)
            assert made.bytes["full"] == 4 * heads * 60 * 2 * dim * 2
        with patch(model, UncompConfig(policy="full", max_new_tokens=8)) as handle:
            prompts = [Prompt(ids[0, :n].tolist(), 0, 0, []) for n in (60, 40)]
            long, short = batch.run(model, handle, prompts, max_new_tokens=4, agnostic=False, pad=0, eos=())
    for outcome, tokens in ((long, 63), (short, 43)):
        assert outcome.bytes["kv"] == 4 * heads * tokens * sum(widths)
        assert outcome.bytes["full"] == 4 * heads * tokens * 2 * dim * 2
        assert outcome.bytes["kv"] <= outcome.bytes["allocated"] < outcome.bytes["full"]
