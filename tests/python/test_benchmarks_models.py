# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of whole models, on tiny ones without a GPU: their rows, and the table of them."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import model_rows

from uncomp import ops

pytestmark = pytest.mark.hf
pytest.importorskip("transformers")
SHARED = {"device": "a device", "commit": "abc"}


def test_every_kind_of_model_row_holds_what_a_number_needs():
    from uncomp.testing import tiny_model

    model = tiny_model("llama", max_position_embeddings=8192)
    import bench_decode
    import bench_memory
    import bench_prefill
    import bench_throughput
    from engines import STATIC, STOCK, full, ours

    small = {"budget": 40, "groups": 2}
    cases = [(STOCK, 2), (STATIC, 1), (full(compiled=False), 2), (ours(**small), 1), (ours(**small, loop=True), 3)]
    rows = [
        *bench_decode.rows(model, cases, context=96, steps=3),
        *bench_throughput.rows(model, [("a case", ours(**small, loop=True), 4, 96)]),
        *bench_prefill.rows(model, (96,), ours(**small), (64,), n_min=24),
        *bench_memory.rows(model, (STOCK, ours(**small)), context=96),
    ]
    assert [row["what"] for row in rows] == ["decode"] * 5 + ["throughput"] + ["prefill"] * 6 + ["memory"] * 2
    for row in rows:
        assert set(row) >= {"what", "engine", "batch", "context", "stored_tokens", "peak_bytes", "cache_bytes"}
        if row["what"] in ("decode", "throughput"):
            assert row["tokens_per_second"] == pytest.approx(1e3 * row["batch"] / row["ms_per_step"])
    assert [row["stored_tokens"] for row in rows[3:6]] == [40] * 3
    assert rows[4]["cache_bytes"] == 3 * rows[3]["cache_bytes"]
    assert rows[-1]["named_bytes"] == rows[-1]["cache_bytes"] + rows[-1]["state_bytes"]
    base, thin, batch, thin_batch = rows[8:12]
    assert "pruned" in thin["engine"]
    assert thin["speedup"] == base["ms"] / thin["ms"]
    assert thin_batch["speedup"] == batch["ms"] / thin_batch["ms"]
    assert thin_batch["case"] == batch["case"] == "lengths 64, 48, 32, 16"
    assert all(0 < row["pruning_ms"] < row["ms"] for row in (thin, thin_batch))
    assert thin["stored_tokens"] < base["stored_tokens"] == 40
    text = model_rows.table(rows)
    assert text.count("### ") == 4
    assert "a case" in text


def test_rows_of_a_narrower_cache():
    """Half the width is half the bytes, by the formula to the byte, at each engine; weights shrink; the model comes
    back."""
    import bench_lorc
    from engines import full, ours

    from uncomp.testing import tiny_model

    model = tiny_model("llama", num_hidden_layers=2)
    kinds = {name: type(module) for name, module in model.named_modules()}
    engines = (full(compiled=False), ours(budget=40, groups=2, loop=True))
    rows = list(bench_lorc.rows(model, engines, context=96, steps=3))
    assert [row["case"] for row in rows] == ["width 64"] * 3 + ["ranks 32"] * 4
    assert [row["engine"] for row in rows[4:]] == [row["engine"] for row in rows[:3]]
    for wide, narrow in zip(rows[1:3], rows[5:], strict=True):
        assert wide["cache_bytes"] == 2 * narrow["cache_bytes"] and wide["stored_tokens"] == narrow["stored_tokens"]
        assert narrow["of_full_width"] == narrow["ms_per_step"] / wide["ms_per_step"]
    for held, width in ((rows[0], 128), (rows[4], 64)):
        layers, heads, slots = 2, 4, held["slots"]
        assert slots >= 96
        assert held["cache_bytes"] == held["formula_bytes"] == layers * heads * slots * width * 4
        assert held["position_bytes"] == layers * heads * slots * 4 <= held["state_bytes"]
    assert rows[4]["weights_bytes"] < rows[0]["weights_bytes"]
    assert rows[3]["ms"] > 0 and rows[3]["projections_bytes"][1] < rows[3]["projections_bytes"][0]
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert "ranks 32" in model_rows.table(rows)


def test_attention_over_latents_is_timed_beside_full_width(monkeypatch):
    """Both in one run, at every length; one that fails says why."""
    import bench_lorc
    import harness

    timed = []

    def entry(make, moved, plan):
        timed.append((make.__name__, moved))
        us = float(len(timed))
        return harness.Timing(error="no room") if us == 7 else harness.Timing(us, us, us)

    monkeypatch.setattr(bench_lorc.harness, "time_entry", entry)
    rows = list(bench_lorc.kernel_rows())
    assert [name for name, _ in timed] == ["full_width", "ours"] * 4
    cases = [(row["engine"], row["case"]) for row in rows]
    assert cases[:2] == [("decode_attention", "8x16384, full width"), ("decode_attention", "8x16384, latents of 64")]
    assert cases[-1] == ("decode_evict_", "8x1552, latents of 64")
    assert [row.get("of_full_width") for row in rows] == [None, 2.0, None, 4 / 3, None, 6 / 5, None, None]
    assert rows[6]["error"] == "no room"
    assert "8x131072, latents of 64" in model_rows.table(rows)


def test_calibration_rows(monkeypatch):
    """Both models, all four rows; a long run's ratio follows from the times; NumPy's entropies are ours."""
    import bench_calibrate

    from uncomp.testing import tiny_model

    monkeypatch.setattr(bench_calibrate, "ROUNDS", 1)
    small = tiny_model("qwen2", num_hidden_layers=2)
    rows = list(bench_calibrate.rows(tiny_model("llama", num_hidden_layers=2), 64, small))
    assert [row["what"] for row in rows] == ["calibrate"] * 8
    assert [row.get("case") for row in rows] == [None] * 4 + ["Qwen2.5-0.5B"] * 4
    for plain, ours, alone, numpy in (rows[:4], rows[4:]):
        assert (plain["engine"], ours["engine"]) == ("plain forwards", "uncomp.calibrate")
        assert ours["ratio"] == pytest.approx((ours["ms_once"] / 500 + ours["ms_per_piece"]) / plain["ms_per_piece"])
        assert ours["ms_per_piece"] > 0 and ours["weights_bytes"] > 0
        assert numpy["slower"] == pytest.approx(numpy["ms_per_piece"] / alone["ms_per_piece"])
        assert numpy["engine"].endswith("4 of 16 heads measured and scaled")
    assert json.loads(json.dumps(rows)) == rows
    assert "of plain" in model_rows.table(rows)

    states = torch.randn(3, 50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want, _ = ops.matrix_entropy(ops.matrix_spectrum(states[None], 8), 2, 8)
    assert bench_calibrate.singular_values(states) == pytest.approx(want[0].tolist(), abs=1e-9)


def test_peaks_of_calibration_leave_other_models_out(monkeypatch):
    """Rows of a device with counters: what lay there before is taken off, the model's weights are put on."""
    import bench_calibrate

    from uncomp.testing import tiny_model

    peaks = iter([1300, 1400] * 3)
    monkeypatch.setattr(bench_calibrate, "peak_bytes", lambda _: next(peaks))
    monkeypatch.setattr(bench_calibrate, "allocated", lambda _: 1000)
    model = tiny_model("llama", num_hidden_layers=1)
    plain, ours, *_ = bench_calibrate._rows(model, 32, None)
    weights = sum(p.numel() for p in model.parameters()) * 4
    assert (plain["peak_bytes"], ours["peak_bytes"]) == (weights + 300, weights + 400)
    assert ours["work_ratio"] == pytest.approx(4 / 3)
    assert ours["peak_ratio"] == pytest.approx((weights + 400) / (weights + 300))


def test_rows_may_name_their_own_model(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "bench_decode", types.SimpleNamespace(rows=lambda model: iter([{"what": "decode", "model": "b"}]))
    )
    assert [row["model"] for row in model_rows.rows(["decode"], None, {**SHARED, "model": "a"})] == ["b"]


def test_a_model_benchmark_that_fails_is_a_row(monkeypatch):
    def broken(model):
        yield {"what": "decode", "engine": "one"}
        raise ValueError("no room\nfor more")

    monkeypatch.setitem(sys.modules, "bench_decode", types.SimpleNamespace(rows=broken))
    rows = list(model_rows.rows(["decode"], None, SHARED))
    assert [row.get("error") for row in rows] == [None, "ValueError: no room"]
    assert "ValueError: no room" in model_rows.table(rows)


def test_quality_of_pruned_prompts(tmp_path, monkeypatch, capsys):
    """Pieces are the same in every way; nothing is lost where nothing is pruned; the table has every row."""
    import prefill_quality

    from uncomp.hf import load
    from uncomp.testing import tiny_model, tiny_tokenizer

    model, tokenizer = tiny_model("llama", vocab_size=260), tiny_tokenizer()
    prompt, answer = prefill_quality.haystack(torch.arange(900) % 256 + 4, tokenizer, 400, 0.5, "48291")
    text = tokenizer.decode(prompt[0])
    assert prompt.shape == (1, 400) and text.count("number of the old lighthouse is 48291.") == 1
    assert text.endswith("The secret number of the old lighthouse")
    assert tokenizer.decode(answer[0]) == " is 48291"
    with pytest.raises(ValueError, match="the text must have at least 4000 tokens; got 900"):
        prefill_quality.haystack(torch.arange(900), tokenizer, 4000, 0.5, "48291")

    (tmp_path / "text.txt").write_text("All that is gold does not glitter. " * 40)
    monkeypatch.setattr(load, "load_model", lambda *args, **kwargs: (model, tokenizer))
    call = ["--model", "tiny", "--text", str(tmp_path / "text.txt"), "--contexts", "300", "--windows", "2"]
    call += ["--needles", "2", "--stages", "0,1,3", "--budget", "40"]
    found = {}
    for n_min in ("300", "60"):
        assert prefill_quality.main([*call, "--n-min", n_min, "--json", str(tmp_path / "rows.json")]) == 0
        rows = json.loads((tmp_path / "rows.json").read_text())
        found[n_min] = {row["way"]: row for row in rows}
        assert list(found[n_min]) == ["stock", "pruned", "budget 40", "pruned, budget 40", "newest"]
        assert capsys.readouterr().out.count("\n") == 7
    whole, short = found["300"], found["60"]
    assert whole["pruned"]["loss"] == pytest.approx(whole["stock"]["loss"], abs=1e-5)
    assert whole["stock"]["losses"] == short["stock"]["losses"]
    assert short["pruned"]["stored_tokens"] == (300 + 180 * 2 + 60) / 4
    assert short["pruned"]["loss"] != pytest.approx(whole["pruned"]["loss"], abs=1e-6)
    assert short["newest"]["loss"] != pytest.approx(short["pruned"]["loss"], abs=1e-6)
