# SPDX-License-Identifier: Apache-2.0
"""`uncomp eval perplexity`: windows of a text, each policy beside the full cache, resumed without repeats."""

from __future__ import annotations

import json
import math

import pytest

pytest.importorskip("transformers")

import eval_support as support
import torch

from uncomp import cli


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("perplexity")
    support.make_model(folder / "model")
    (folder / "text.txt").write_text(support.words(150))
    return folder


def call(place, capsys, out, *options, sizes=("120", "9")):
    given = ["--model", str(place / "model"), "--data", str(place / "text.txt"), "--out", str(out), "--device", "cpu"]
    given += ["--prefix", sizes[0], "--continuation", sizes[1], "--budget", "40", "--json", "--limit", "2"]
    status = cli.main(["eval", "perplexity", *given, *options])
    return status, *capsys.readouterr()


def test_full_is_the_stock_model(place, capsys, tmp_path):
    """And a policy is worse or better than it by what the summary says."""
    from uncomp.hf.load import load_model

    status, out, err = call(place, capsys, tmp_path, "--policy", "uncomp", "--policy", "full")
    assert status == 0, err
    full, compressed = map(json.loads, out.splitlines())
    model, tokenizer = load_model(place / "model")
    ids = torch.tensor(tokenizer((place / "text.txt").read_text()).input_ids)
    losses = []
    for start in (0, ids.numel() - 129):
        piece = ids[start : start + 129]
        with torch.no_grad():
            logits = model(piece[None]).logits[0, 120:-1].log_softmax(-1)
        losses.append(-logits.gather(1, piece[121:, None]).mean())
    assert full["score"] == pytest.approx(math.exp(sum(losses) / 2), rel=1e-3)
    assert (full["total"]["perplexity_ratio"], full["total"]["equal_argmax"]) == (1.0, 1.0)
    assert full["total"]["stored"]["end"] == 120 and compressed["total"]["stored"]["end"] == 40
    assert compressed["total"]["perplexity_ratio"] == pytest.approx(compressed["score"] / full["score"], rel=1e-3)
    assert compressed["total"]["kl"] > 0
    text = model.config
    token = 2 * 4 * text.head_dim * text.num_key_value_heads * text.num_hidden_layers  # bytes, float32
    for name in ("full-full", "uncomp-40"):  # the first window of a run pays for what the others find ready
        lines = (tmp_path / f"perplexity/{name}-agnostic/examples.jsonl").read_text().splitlines()
        assert [json.loads(line)["warmup"] for line in lines] == [True, False]
    assert full["total"]["bytes"] == {"kv": 120 * token, "allocated": full["total"]["bytes"]["allocated"], "share": 1.0}
    assert (compressed["total"]["bytes"]["kv"], compressed["total"]["bytes"]["share"]) == (40 * token, 0.33333)


def test_resume(place, capsys, tmp_path):
    first = call(place, capsys, tmp_path, "--policy", "snapkv", "--mode", "chunk")
    part = tmp_path / "perplexity/snapkv-40-agnostic/part-0.jsonl"
    whole = part.read_bytes()
    part.write_bytes(whole.splitlines(keepends=True)[0] + b'{"subset"')
    again = call(place, capsys, tmp_path, "--policy", "snapkv", "--mode", "chunk", "--resume")
    one, other = (json.loads(out) for _, out, _ in (first, again))
    assert {**one, "call": 0} == {**other, "call": 0}
    status, _, err = call(place, capsys, tmp_path, "--policy", "snapkv", "--resume")
    assert status == 2 and "mode 'chunk' there, 'stepwise' here" in err


def test_a_text_that_is_too_short(place, capsys, tmp_path):
    tokens = len((place / "text.txt").read_text())  # bytes are tokens
    status, _, err = call(place, capsys, tmp_path, sizes=(str(tokens - 8), "9"))
    assert status == 2 and f"must have at least {tokens + 1} tokens (--prefix and --continuation); got {tokens}" in err
    status, _, err = call(place, capsys, tmp_path / "b", sizes=("1020", "9"))
    assert status == 2 and "must stay below the model's 1024 positions" in err
