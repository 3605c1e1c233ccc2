# SPDX-License-Identifier: Apache-2.0
"""calibration.files: tables beside a profile, the hub without the network, the profiles that come with the package."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_profile import FULL, made

from uncomp import HeadProfile, UncompConfig
from uncomp.calibration import files
from uncomp.entropy import default_top
from uncomp.policies import make_policy
from uncomp.types import CacheShape

ROOT = Path(__file__).resolve().parents[2]


def test_large_tables_lie_beside(tmp_path, monkeypatch):
    """A JSON file and a file of arrays with its digest in the name; the arrays of an older version go."""
    pytest.importorskip("safetensors")
    monkeypatch.setattr(files, "LARGE", 100)
    path = tmp_path / "big.json"
    for profile in (made(), made(**FULL)):
        profile.save(path)
        assert HeadProfile.load(path) == profile
        names = sorted(p.name for p in tmp_path.iterdir())
        assert names[1] == "big.json" and len(names) == 2 and names[0].endswith(".safetensors")
    assert "rank_votes" not in json.loads(path.read_text())
    beside = tmp_path / names[0]
    content = beside.read_bytes()
    beside.write_bytes(content[:-8] + b"12345678")
    with pytest.raises(ValueError, match="is damaged or belongs to another profile"):
        HeadProfile.load(path)
    beside.unlink()
    with pytest.raises(FileNotFoundError, match=r"which holds the arrays of .*big\.json, is missing"):
        HeadProfile.load(path)
    monkeypatch.setattr(files, "LARGE", 2**20)
    made().save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["big.json"]


def test_parts_of_killed_runs_go(tmp_path):
    """A process that dies while it writes leaves a part; the next run on this machine takes it away, and no other."""
    code = (
        "import os, sys; from uncomp.calibration import files; files.os.fsync = lambda _: os.kill(os.getpid(), 9); "
        "files.replace_file(sys.argv[1], b'half')"
    )
    path = tmp_path / "p[1].json"
    for name in ("p[1].json", "p[1].json.state", f"p[1].{'0a' * 6}.safetensors", "p[1].json.json", "p1.json"):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], cwd=ROOT, check=False)
        assert done.returncode == -signal.SIGKILL
    alive = tmp_path / f"p[1].json.{files._host()}.{os.getpid()}.part"
    other = tmp_path / "p[1].json.another-machine.4194305.part"
    for kept in (alive, other):
        kept.write_bytes(b"")
    assert len(list(tmp_path.iterdir())) == 7
    files.clear_parts(path)
    left = {p.name.removesuffix(".part").rpartition(".")[0] for p in tmp_path.iterdir()}
    host = files._host()
    assert alive.exists() and other.exists() and len(list(tmp_path.iterdir())) == 4
    assert left == {f"p[1].json.{host}", "p[1].json.another-machine", f"p[1].json.json.{host}", f"p1.json.{host}"}


def test_arrays_of_an_older_profile_go_whatever_the_name(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGE", 1)
    path = tmp_path / "p[1].json"
    made().save(path)
    made(**FULL).save(path)
    assert len(list(tmp_path.iterdir())) == 2
    assert HeadProfile.load(path) == made(**FULL)


def test_a_local_folder_serves_as_a_hub(tmp_path):
    made(**FULL).push_to_hub(str(tmp_path / "folder"))
    assert HeadProfile.from_pretrained(tmp_path / "folder") == made(**FULL)
    with pytest.raises(FileNotFoundError, match=r"has no head_profile\.json"):
        HeadProfile.from_pretrained(tmp_path)


def test_the_hub(tmp_path, monkeypatch):
    """What goes to huggingface_hub and what comes back, without the network."""
    hub = pytest.importorskip("huggingface_hub")
    kept = {}

    class Api:
        def __init__(self, token=None):
            kept["token"] = token

        def create_repo(self, name, private=None, exist_ok=False):
            kept["repo"] = (name, private, exist_ok)

        def upload_folder(self, repo_id, folder_path, commit_message):
            kept["files"] = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}")

    def download(name, allow_patterns, **options):
        if name != "me/heads":
            raise OSError("no such repository")
        for file, content in kept["files"].items():
            (tmp_path / file).write_bytes(content)
        return str(tmp_path)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert made().push_to_hub("me/heads", token="t", private=True) == "https://hub/me/heads"
    assert (kept["repo"], kept["token"]) == (("me/heads", True, True), "t")
    assert HeadProfile.from_pretrained("me/heads") == made()
    with pytest.raises(FileNotFoundError, match="does not exist and the hub did not give it"):
        HeadProfile.from_pretrained("me/none")


# ---- profiles of the package
@pytest.mark.parametrize("name", files.shipped_names())
def test_a_profile_of_the_package(name):
    """Small, whole, and found by its name."""
    assert files.locate(name).stat().st_size < 200_000
    profile = HeadProfile.load(name)
    assert profile.run.k == default_top(profile.model.D) and profile.run.tensor == "query"
    facts = profile.model
    shape = CacheShape(
        facts.L, facts.Hq, facts.Hkv, facts.D, facts.Hkv, tuple(range(facts.L)), facts.L, facts.type, facts.hash
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_policy(UncompConfig(profile=name), shape)


# ---- damage
TABLES = ("entropy", "entropy_full", "entropy_spread", "erank", "erank_spread", "rank_votes")


def saved(tmp_path, change):
    path = tmp_path / "p.json"
    made(**FULL).save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return path


def without_tables(data, arrays):
    for name in TABLES:
        del data[name]
    data["arrays"] = arrays


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda d: d.update(rank_votes=None), "rank_votes must hold kv_head and query_head; got NoneType"),
        (lambda d: d.update(rank_votes=1.5), "rank_votes must hold kv_head and query_head; got float"),
        (lambda d: d["curve"].__setitem__(0, 10**400), "curve must hold finite numbers"),
        (lambda d: d["entropy"][0].__setitem__(0, 10**400), "entropy must hold finite numbers"),
        (lambda d: d["entropy"][0].__setitem__(0, 3.0), r"entropy must lie in \[0, 1\]; got 3.0"),
        (lambda d: d["entropy_full"][0].__setitem__(0, -1.0), r"entropy_full must lie in \[0, 1\]; got -1.0"),
        (lambda d: d["run"].update(k=0), "run.k must be at least 1; got 0"),
        (lambda d: d["run"].update(seqlen=-1), "run.seqlen must be at least 1; got -1"),
        (lambda d: d["run"].update(reductions={}), 'run.reductions must say "mean" or "max" for entropy; got {}'),
        (lambda d: d["stability"]["kv_head"].update(layer=True), r"stability.kv_head.layer must lie in \[-1, 1\]"),
        (lambda d: without_tables(d, {"file": 5, "sha256": "x"}), "must name the file and sha256 of its arrays"),
        (lambda d: without_tables(d, {"file": "", "sha256": "x"}), "must name the file and sha256 of its arrays"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_profile_is_named_with_what_is_wrong(tmp_path, change, wrong):
    path = saved(tmp_path, change)
    with pytest.raises(ValueError, match=f"^uncomp.calibration: .*{wrong}.*") as error:
        HeadProfile.load(path)
    assert str(path) in str(error.value)


def test_arrays_that_are_no_safetensors_file(tmp_path):
    pytest.importorskip("safetensors")
    content = b"12345678 and so on"
    (tmp_path / "a.safetensors").write_bytes(content)
    arrays = {"file": "a.safetensors", "sha256": hashlib.sha256(content).hexdigest()}
    with pytest.raises(ValueError, match=r"^uncomp.calibration: .*a\.safetensors is no safetensors file"):
        HeadProfile.load(saved(tmp_path, lambda data: without_tables(data, arrays)))


def test_a_number_of_thousands_of_digits_and_a_folder(tmp_path):
    path = tmp_path / "p.json"
    path.write_text('{"format": ' + 5000 * "1" + "}")
    with pytest.raises(ValueError, match=r"^uncomp.calibration: .*p\.json is not a whole JSON file"):
        HeadProfile.load(path)
    with pytest.raises(ValueError, match=r"^uncomp.calibration: .* is a folder, not a profile"):
        HeadProfile.load(tmp_path)


def test_nothing_but_a_file_is_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(OSError, match=r"cannot be written \(it is a folder or a device, not a file\)"):
            files.replace_file(path, b"content")
    assert pipe.is_fifo() and [p.name for p in tmp_path.iterdir()] == ["pipe"]
