# SPDX-License-Identifier: Apache-2.0
"""calibration.profile: what is written is read back, what is not a profile is refused, and votes become groups."""

import dataclasses
import json
import random
import warnings

import pytest
import torch
from support import published_votes

from uncomp.calibration import files
from uncomp.calibration.fingerprint import model_hash
from uncomp.calibration.profile import CalibrationRun, HeadProfile, ModelFacts, config_hash, from_votes

FACTS = ModelFacts(type="llama", L=3, Hq=4, Hkv=2, D=8, hash=config_hash({"hidden_size": 32}))
RUN = CalibrationRun(
    samples=5, seqlen=64, seed=42, k=2, kind="truncated", reductions={"entropy": "mean"}, sha256="00" * 32
)


def counted(rows, samples, rng):
    """rank_votes of one layer from random rankings."""
    votes = [[0] * rows for _ in range(rows)]
    for _ in range(samples):
        for rank, row in enumerate(rng.sample(range(rows), rows)):
            votes[row][rank] += 1
    return votes


def made(**changes) -> HeadProfile:
    rng = random.Random(0)
    values = {
        "model": FACTS,
        "run": RUN,
        "entropy": [[0.2, 0.6, 0.5, 0.45], [0.1, 0.1, 0.3, 0.3], [0.5, 0.3, 0.9, 0.1]],
        "entropy_full": [[rng.random() for _ in range(4)] for _ in range(3)],
        "spectrum": [0.5, 0.2, 0.1, 0.08, 0.06, 0.03, 0.02, 0.01],
        "curve": [4.5, 4.0, 3.25],
        "rank_votes": {
            "kv_head": [[[4, 1], [1, 4]], [[0, 5], [5, 0]], [[3, 2], [2, 3]]],
            "query_head": [counted(4, 5, rng) for _ in range(3)],
        },
    }
    return HeadProfile(**{**values, **changes})


# ---- file
def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "llama.json"
    made().save(path)
    assert HeadProfile.load(path) == made()
    assert [p.name for p in tmp_path.iterdir()] == ["llama.json"]


def test_the_schema(tmp_path):
    made().save(tmp_path / "p.json")
    data = json.loads((tmp_path / "p.json").read_text())
    assert data["format"] == 2
    assert set(data) == {
        "format", "model", "run", "entropy", "entropy_full", "spectrum", "curve", "rank_votes",
        "entropy_spread", "erank", "erank_spread", "stability", "elbow",
    }  # fmt: skip
    assert set(data["model"]) == {"type", "L", "Hq", "Hkv", "D", "hash"}
    assert set(data["run"]) == {"samples", "seqlen", "seed", "k", "kind", "reductions", "tensor", "rope", "sha256"}
    assert data["run"]["tensor"] == "query"
    assert set(data["rank_votes"]) == {"kv_head", "query_head"}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "p.json"
    made().save(path)
    before = path.read_bytes()

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        made(curve=[1, 2, 3]).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_cut_off_file_is_refused(tmp_path, share):
    path = tmp_path / "cut.json"
    made().save(path)
    text = path.read_text().rstrip()
    path.write_text(text[: int(len(text) * share)])
    with pytest.raises(ValueError, match=r"uncomp\.calibration: .*cut\.json is not a whole JSON file"):
        HeadProfile.load(path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xff\xfe\x00", "is not a whole JSON file"),
        (b"PK\x03\x04", "is not a whole JSON file"),
        (b"[1, 2]", "is not a head profile: it has no entry named format"),
        (b"{}", "is not a head profile: it has no entry named format"),
        (b'{"format": 3}', "has format 3; this version reads 1 and 2"),
        (b'{"format": 1, "votes": []}', r"is not a head profile: missing \['curve', .*\], unknown \['votes'\]"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path, content, text):
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"other\.json {text}"):
        HeadProfile.load(path)


@pytest.mark.parametrize(
    ("entry", "value", "text"),
    [
        ("entropy", [[0.1] * 4] * 2, r"entropy must have shape \[3, 4\]"),
        ("entropy", [[0.1] * 4, [0.1] * 3, [0.1] * 4], r"entropy must have shape \[3, 4\]"),
        ("entropy_full", 5, r"entropy_full must have shape \[3, 4\]"),
        ("spectrum", [float("nan")] * 8, r"spectrum must hold finite numbers \(float\); got nan"),
        ("curve", ["a", "b", "c"], r"curve must hold finite numbers \(float\); got 'a'"),
        ("model", {"type": "llama"}, r"model must hold D, Hkv, Hq, L, hash, type; got \['type'\]"),
        ("model", dataclasses.asdict(FACTS) | {"L": "3"}, r"model\.L must be int; got '3'"),
        ("model", dataclasses.asdict(FACTS) | {"Hkv": 3}, "Hkv dividing Hq"),
        ("run", [], "run must hold k, kind, .*; got list"),
        ("run", dataclasses.asdict(RUN) | {"kind": "x"}, r"run\.kind must be one of .*; got 'x'"),
        ("rank_votes", {"kv_head": []}, "rank_votes must hold kv_head and query_head; got"),
    ],
)
def test_a_wrong_entry_is_refused(tmp_path, entry, value, text):
    path = tmp_path / "p.json"
    made().save(path)
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {entry: value}))
    with pytest.raises(ValueError, match=rf"uncomp\.calibration: .*{text}.* \(in .*p\.json\)"):
        HeadProfile.load(path)


def test_votes_that_do_not_add_up_are_refused():
    votes = dict(made().rank_votes)
    for bad in ([[4, 2], [1, 4]], [[5, 0], [5, 0]], [[6, -1], [-1, 6]]):
        votes["kv_head"] = [bad, bad, bad]
        with pytest.raises(ValueError, match=r"rank_votes\.kv_head\[0\] must sum to run\.samples"):
            made(rank_votes=votes)


def test_a_missing_file_is_the_usual_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        HeadProfile.load(tmp_path / "none.json")


def test_format_1_is_read(tmp_path):
    made().save(tmp_path / "p.json")
    data = json.loads((tmp_path / "p.json").read_text()) | {"format": 1}
    for name in ("entropy_spread", "erank", "erank_spread", "stability", "elbow"):
        del data[name]
    del data["run"]["rope"]
    (tmp_path / "old.json").write_text(json.dumps(data))
    assert HeadProfile.load(tmp_path / "old.json") == made()
    (tmp_path / "mixed.json").write_text(json.dumps(data | {"erank": None}))
    with pytest.raises(ValueError, match=r"unknown \['erank'\]"):
        HeadProfile.load(tmp_path / "mixed.json")


FULL = {
    "entropy_spread": [[0.01] * 4] * 3,
    "erank": [[2.5] * 4] * 3,
    "erank_spread": [[0.5] * 4] * 3,
    "stability": {"kv_head": {"layer": 0.5, "model": 1}, "query_head": {"layer": None, "model": -0.25}},
}


@pytest.mark.parametrize(
    ("entry", "value", "text"),
    [
        ("erank", [[1.0] * 4], r"erank must have shape \[3, 4\]"),
        ("entropy_spread", [[float("inf")] * 4] * 3, "entropy_spread must hold finite numbers"),
        ("stability", {"kv_head": {}}, "stability must hold layer and model"),
        (
            "stability",
            {r: {"layer": 2, "model": 0} for r in ("kv_head", "query_head")},
            r"must lie in \[-1, 1\]; got 2",
        ),
        ("run", dataclasses.replace(RUN, tensor="output"), r"run\.tensor must be one of query, key, value, hidden"),
        ("run", dataclasses.replace(RUN, rope="no"), r"run\.rope must be one of after, before; got 'no'"),
    ],
)
def test_what_format_2_adds_is_checked(entry, value, text):
    with pytest.raises(ValueError, match=text):
        made(**{**FULL, entry: value})


def test_an_elbow_that_the_spectrum_does_not_have_is_refused(tmp_path):
    made(**FULL).save(tmp_path / "p.json")
    data = json.loads((tmp_path / "p.json").read_text())
    assert data["elbow"] == made().elbow == 3
    (tmp_path / "p.json").write_text(json.dumps(data | {"elbow": 4}))
    with pytest.raises(ValueError, match="elbow must be 3, as the spectrum says; got 4"):
        HeadProfile.load(tmp_path / "p.json")


# ---- layers and hidden states
def test_some_layers_as_a_model_of_their_own():
    whole = made(**FULL)
    part = whole.at_layers([2, 0])
    assert part.model.L == 2 and part.curve == (3.25, 4.5) and part.entropy == (whole.entropy[2], whole.entropy[0])
    assert [part.groups(layer, 2) for layer in range(2)] == [whole.groups(2, 2), whole.groups(0, 2)]
    assert whole.at_layers(range(3)) == whole
    for bad in ([], [3], [-1]):
        with pytest.raises(ValueError, match=r"layers must lie in \[0, 3\)"):
            whole.at_layers(bad)


def test_hidden_states_order_no_heads():
    profile = made(run=dataclasses.replace(RUN, tensor="hidden"), spectrum=[0.5, 0.3, 0.2])
    with pytest.raises(ValueError, match="must be query, key or value to order heads; got hidden"):
        profile.groups(0, 2)
    with pytest.raises(ValueError, match=r"spectrum must have shape \[8\]"):
        made(spectrum=[0.5, 0.3, 0.2])


# ---- check
def test_check_accepts_what_it_was_made_with():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made().check(FACTS, 2, "truncated")


@pytest.mark.parametrize(("name", "value"), [("L", 4), ("Hq", 8), ("Hkv", 4), ("D", 16)])
def test_check_refuses_another_model(name, value):
    ours = getattr(FACTS, name)
    with pytest.raises(
        ValueError,
        match=rf"{name} of the model must be {ours}, as in the profile \(llama, 3 layers, .*\); got {value} \(llama, ",
    ):
        made().check(dataclasses.replace(FACTS, **{name: value}), 2, "truncated")


def test_check_refuses_another_k_or_kind():
    with pytest.raises(ValueError, match="k must be 2, as the profile was made with; got 3"):
        made().check(FACTS, 3, "truncated")
    with pytest.raises(ValueError, match="kind must be 'truncated', as the profile was made with; got 'renyi2'"):
        made().check(FACTS, 2, "renyi2")
    made(run=dataclasses.replace(RUN, kind="renyi2")).check(FACTS, 7, "renyi2")  # has no k


def test_check_takes_the_k_of_the_profile():
    made().check(FACTS, None, "truncated")
    with pytest.raises(
        ValueError, match=r"type of the model must be llama, .*; got qwen2 \(qwen2, 3 layers, 4/2 heads"
    ):
        made().check(dataclasses.replace(FACTS, type="qwen2"), None, "truncated")


def test_check_takes_the_elbow_of_the_profile():
    made(run=dataclasses.replace(RUN, k=3)).check(FACTS, "elbow", "truncated")
    with pytest.raises(ValueError, match="k must be 2, as the profile was made with; got 'elbow' = 3"):
        made().check(FACTS, "elbow", "truncated")


def test_check_warns_of_another_config():
    with pytest.warns(UserWarning, match="made with another config of llama"):
        made().check(dataclasses.replace(FACTS, hash="ab" * 32), 2, "truncated")


def test_config_hash_sees_the_model_and_not_its_use():
    config = {"hidden_size": 64, "rope": {"theta": 1e4, "type": "x"}, "layers": [1, 2], "dtype": torch.bfloat16}
    same = {"layers": (1, 2), "rope": {"type": "x", "theta": 1e4}, "hidden_size": 64, "_name_or_path": "here",
            "transformers_version": "5.0", "use_cache": False}  # fmt: skip
    assert config_hash(config) == config_hash(same)
    assert len(config_hash(config)) == 64
    for change in ({"hidden_size": 65}, {"rope": {"theta": 1e6, "type": "x"}}, {"layers": [2, 1]}, {"new": None}):
        assert config_hash({**config, **change}) != config_hash(config)
    assert config_hash({"id2label": {0: "a", "b": 1}}) == config_hash({"id2label": {"b": 1, "0": "a"}})


def test_model_hash_is_over_what_is_computed():
    class Config(dict):
        to_dict = dict.copy

    one = Config(hidden_size=64, rms_norm_eps=1e-5, rope_parameters={"rope_theta": 100000}, architectures=["A"])
    same = Config(hidden_size=64, rms_norm_eps=9.999999747378752e-06, rope_parameters={"rope_theta": 1e5}, new=3)
    assert model_hash(one) == model_hash(same)
    for change in ({"rms_norm_eps": 1e-6}, {"rope_parameters": {"rope_theta": 1e4}}, {"hidden_size": 65}):
        assert model_hash(Config(one | change)) != model_hash(one)


# ---- groups
def test_groups_of_a_layer():
    profile = made()
    assert [profile.groups(layer, 2) for layer in range(3)] == [[0, 1], [1, 0], [0, 1]]
    assert profile.groups(0, 1) == [0, 0]
    for num_groups in (1, 2, 3, 4):
        assert sorted(set(profile.groups(1, num_groups, "query_head"))) == list(range(num_groups))


def test_groups_of_the_whole_model():
    profile = made()
    # Means of the rows: 0.4, 0.475 | 0.1, 0.3 | 0.4, 0.5; the tie of 0.4 goes to the lower layer.
    assert profile.model_groups(6) == [[2, 4], [0, 1], [3, 5]]
    assert profile.model_groups(2) == [[0, 1], [0, 0], [1, 1]]
    assert profile.model_groups(12, "query_head") == [[3, 10, 8, 7], [0, 1, 4, 5], [9, 6, 11, 2]]
    most = made(run=dataclasses.replace(RUN, reductions={"entropy": "max"}))
    assert most.model_groups(6) == [[4, 2], [0, 1], [3, 5]]


def test_groups_errors():
    with pytest.raises(ValueError, match=r"layer must lie in \[0, 3\); got 3"):
        made().groups(3, 2)
    with pytest.raises(ValueError, match=r"num_groups must lie in \[1, rows = 2\]; got 3"):
        made().groups(0, 3)
    with pytest.raises(ValueError, match="rows must be one of kv_head, query_head; got 'head'"):
        made().groups(0, 2, "head")
    with pytest.raises(ValueError, match=r"num_groups must lie in \[1, rows = 6\]; got 7"):
        made().model_groups(7)


# ---- published votes
@pytest.mark.parametrize(("name", "want"), [("llama3-instruct__2_groups__svd32", 74), ("512__mistral__query", 62)])
def test_query_heads_of_a_kv_head_seldom_agree(name, want):
    # 256 KV heads of four query heads each.
    together = 0
    for ids in from_votes(published_votes(name)):
        together += sum(len(set(ids[head : head + 4])) == 1 for head in range(0, 32, 4))
    assert together == want


def test_truncation_orders_heads_differently_from_full_entropy():
    def upper(name):
        return [{head for head, g in enumerate(ids) if g == 1} for ids in from_votes(published_votes(name))]

    def shared(a, b):
        return sum(len(x & y) for x, y in zip(upper(a), upper(b), strict=True)) / (32 * 16)

    at_32 = "512__llama2-chat__query__svd32"
    assert round(shared(at_32, "512__llama2-chat__query__svd128"), 2) == 0.51
    assert round(shared(at_32, "512__llama2-chat__query__svd16"), 2) == 0.81
    assert round(shared("512__llama2-chat__query", "512__llama2-chat__key"), 2) == 0.69
    assert round(shared("512__llama2-chat__query", "512__llama2-chat__value"), 2) == 0.47


def test_from_votes_gives_ids_of_every_layer():
    assert from_votes([[[3, 1], [1, 3]], [[0, 4], [4, 0]]]) == [[0, 1], [1, 0]]
