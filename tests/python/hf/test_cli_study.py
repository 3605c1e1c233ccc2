# SPDX-License-Identifier: Apache-2.0
"""`uncomp study ratio`: kept tokens and correlations against plain sums, the command on a tiny model, its bad input."""

from __future__ import annotations

import json
import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

from hf.test_load import make_folder  # noqa: E402
from uncomp import cli, patch  # noqa: E402
from uncomp.calibration import recent  # noqa: E402
from uncomp.hf.load import load_model  # noqa: E402

pytestmark = pytest.mark.hf
TEXT = "the quick brown fox jumps over the lazy dog\n" * 40
SMALL = ("--samples", "2", "--seqlen", "64", "--budget", "24", "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny")
    make_folder(path)
    (path / "text.txt").write_text(TEXT, encoding="utf-8")
    (path / "short.txt").write_text("too short")
    return path


def call(folder, capsys, *options, text="text.txt"):
    """(status, stdout, stderr)"""
    try:
        status = cli.main(["study", "ratio", "--model", str(folder), "--text", str(folder / text), *options])
    except SystemExit as stopped:
        status = stopped.code
    return status, *capsys.readouterr()


# ---- values
def test_newest_tokens_and_the_heaviest_others():
    mass = torch.tensor([[5.0, 1, 3, 3, 9, 0], [1.0, 2, 3, 4, 5, 6]])
    assert recent.kept_tokens(mass, 3, 1).tolist() == [[0, 4, 5], [3, 4, 5]]
    assert recent.kept_tokens(mass, 3, 0).tolist() == [[0, 2, 4], [3, 4, 5]]  # a tie goes to the lower position
    assert recent.kept_tokens(mass, 3, 3).tolist() == [[3, 4, 5], [3, 4, 5]]


def test_correlation_of_curves():
    assert recent.correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert recent.correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert recent.correlation([1, 2, 4], [1, 3, 2]) == pytest.approx(0.3273268353539886)
    assert recent.correlation([0.1, 0.1, 0.1], [1, 2, 3]) is None


def test_the_best_share():
    def study(*found):
        return recent.RecentStudy(1, 9, 4, 0, "key", "", (0.0, 0.5, 1.0), (0, 2, 4), (), (), found)

    assert study(0.1, 0.9, 0.3).best == 1 and study(0.5, None, 0.5).best == 0 and study(None, None, None).best is None


def test_entropies_against_plain_sums(folder):
    """Weights by softmax, tokens by sorting, entropy by eigenvalues, all in float64."""
    model, tokenizer = load_model(str(folder), dtype="float32", device="cpu")
    study = recent.study_recent_share(
        model, tokenizer, TEXT, samples=1, seqlen=48, budget=20, shares=(0.25, 1.0), tensor="query"
    )
    assert study.recent == (5, 20) and len(study.whole) == 2
    states = {}

    def keep(query, key, value, scale):
        states[len(states)] = query.double(), key.double(), scale

    drawn = recent.draw(tokenizer, TEXT, 1, 48, 42)
    with torch.inference_mode(), recent._watched(model, lambda layer: keep) as stack:
        stack(input_ids=next(drawn.batches(1)), use_cache=False)

    def entropy(x):
        centred = x - x.mean(0)
        unit = centred / centred.norm(dim=1, keepdim=True)
        shares = torch.linalg.eigvalsh(unit.T @ unit / unit.norm() ** 2).flip(0)[: x.shape[1] // 4].clamp(min=1e-30)
        return float(-(shares * shares.log()).sum() / math.log(x.shape[1]))

    for layer, (query, key, scale) in states.items():
        heads, group = query.shape[1], query.shape[1] // key.shape[1]
        logits = query[0] @ key[0].repeat_interleave(group, 0).mT * scale
        mass = logits.masked_fill(torch.ones(48, 48).triu(1).bool(), -math.inf).softmax(-1).sum(1)
        mass = mass.view(-1, group, 48).mean(1)
        assert study.whole[layer] == pytest.approx(sum(map(entropy, query[0])) / heads, abs=1e-4)
        for x, newest in enumerate(study.recent):
            want = []
            for head in range(heads):
                weight = mass[head // group].tolist()
                heavy = sorted(range(48 - newest), key=lambda j: (-weight[j], j))[: 20 - newest]
                want.append(entropy(query[0, head, sorted(heavy) + list(range(48 - newest, 48))]))
            assert study.kept[x][layer] == pytest.approx(sum(want) / heads, abs=1e-4)


# ---- the command
def test_lines_json_and_file(folder, tmp_path, capsys):
    status, printed, err = call(folder, capsys, *SMALL, "--shares", "0,0.5,1", "--out", str(tmp_path / "s.json"))
    assert (status, err) == (0, "") and printed.count("chosen") == 1
    assert "2 samples of 64 tokens, 24 stay" in printed and len(printed.splitlines()) == 5
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["recent"] == [0, 12, 24] and found["best_share"] in found["shares"]
    again = call(folder, capsys, *SMALL, "--shares", "0,0.5,1", "--json")[1]
    assert json.loads(again) == found  # the same for a seed
    assert len(json.loads(call(folder, capsys, *SMALL, "--json")[1])["shares"]) == 11


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--samples", "0"), "samples must be an integer of at least 1; got 0"),
        (("--budget", "64"), "budget must be below seqlen = 64, so that some token goes; got 64"),
        (("--budget", "1"), "budget must be an integer of at least 2; got 1"),
        (("--shares", "0,2"), "shares must ascend inside [0, 1]; got [0.0, 2.0]"),
        (("--shares", "0.5,0.5"), "shares must ascend"),
        (("--shares", "nan"), "shares must ascend"),
        (("--shares", "half"), "must be shares like 0,0.25,0.5; got 'half'"),
        (("--seqlen", "4096"), "texts must have at least 4096 tokens"),
        (("--out", "/nowhere/s.json"), 'out "/nowhere/s.json" lies in no folder that exists'),
    ],
)
def test_bad_input_is_one_line(folder, capsys, options, line):
    status, printed, err = call(folder, capsys, *SMALL, *options)
    assert (status, printed, err.count("\n")) == (2, "", 1), err
    assert err.startswith("uncomp") and line in err


def test_the_model_is_left_as_it_was(folder):
    model, tokenizer = load_model(str(folder), dtype="float32", device="cpu")
    before = model.config._attn_implementation
    model.train()
    with pytest.raises(ValueError, match="texts must have at least"):
        recent.study_recent_share(model, tokenizer, "too short", seqlen=64, budget=24)
    recent.study_recent_share(model, tokenizer, TEXT, samples=1, seqlen=64, budget=24)
    assert model.config._attn_implementation == before and model.training and not len(recent._measuring)
    model.eval()
    with patch(model), pytest.raises(ValueError, match="the model is patched"):
        recent.study_recent_share(model, tokenizer, TEXT, samples=1, seqlen=64, budget=24)
