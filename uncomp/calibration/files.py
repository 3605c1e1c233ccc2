# SPDX-License-Identifier: Apache-2.0
"""A profile as files: JSON, safetensors beside it for large tables, the profiles of the package, the hub."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import re
import tempfile
from pathlib import Path
from typing import Any

from uncomp.calibration.checks import read_record, refuse
from uncomp.whole_files import write_whole

FORMAT = 2
READS = (1, 2)
LARGE = 2**20  # bytes of JSON from which tables go to a file of their own
HUB_FILE = "head_profile.json"
SHIPPED = Path(__file__).parent / "profiles"
_TABLES = ("entropy", "entropy_full", "entropy_spread", "erank", "erank_spread")


# ---- writing
def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file beside and renames it: a reader sees the old file or the whole new one.

    Raises:
        OSError: the folder cannot be written, the disk is full, or the path is a folder or a device; begins with
            "uncomp.calibration". Nothing is left.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f'uncomp.calibration: "{path}" cannot be written (it is a folder or a device, not a file)')
    try:
        write_whole({path: content}, mark=f"{_host()}.{os.getpid()}")
    except OSError as error:
        reason = error.strerror or error
        raise type(error)(f'uncomp.calibration: "{path}" cannot be written ({reason})') from error


def _host() -> str:
    """This machine as a part of a file name."""
    return re.sub(r"[^\w-]", "_", platform.node())


def clear_parts(path: str | os.PathLike[str]) -> None:
    """Removes what processes of this machine that were killed while they wrote a profile there have left beside it."""
    path = Path(path)
    ours = re.compile(
        rf"(?:{re.escape(path.name)}(?:\.state|\.try)?|{re.escape(path.stem)}\.[0-9a-f]{{12}}\.safetensors)"
        rf"\.{re.escape(_host())}\.(\d+)\.part"
    )
    for beside in path.parent.iterdir():
        found = ours.fullmatch(beside.name)
        if found and not _runs(int(found[1])):
            beside.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def write(profile: Any, path: str | os.PathLike[str]) -> None:
    """See HeadProfile.save."""
    path = Path(path)
    values = {"format": FORMAT, **dataclasses.asdict(profile), "elbow": profile.elbow}
    text = json.dumps(values, allow_nan=False, separators=(",", ":")) + "\n"
    beside = None
    if len(text) > LARGE:
        content = _tables(values)
        digest = hashlib.sha256(content).hexdigest()
        beside = path.with_name(f"{path.stem}.{digest[:12]}.safetensors")  # an older profile keeps its own until then
        values["arrays"] = {"file": beside.name, "sha256": digest}
        replace_file(beside, content)
        text = json.dumps(values, allow_nan=False, separators=(",", ":")) + "\n"
    replace_file(path, text.encode())
    arrays = re.compile(rf"{re.escape(path.stem)}\.[0-9a-f]{{12}}\.safetensors")
    for old in path.parent.iterdir():
        if old != beside and arrays.fullmatch(old.name):
            old.unlink(missing_ok=True)


def _tables(values: dict[str, Any]) -> bytes:
    """Takes the tables out of the values, as the content of a safetensors file."""
    import torch

    tensors = {name: torch.tensor(values[name], dtype=torch.float64) for name in _TABLES if values[name] is not None}
    tensors |= {f"rank_votes.{rows}": torch.tensor(v, dtype=torch.int32) for rows, v in values["rank_votes"].items()}
    for name in (*_TABLES, "rank_votes"):
        values.pop(name)
    return _safetensors().save(tensors)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"uncomp.calibration: large arrays need safetensors ({error})") from error
    return safetensors.torch


# ---- reading
def locate(path: str | os.PathLike[str]) -> Path:
    """The file of a profile: of a name that comes with the package, else the path itself; ./NAME is always a path."""
    shipped = SHIPPED / f"{os.fspath(path)}.json"
    return shipped if os.fspath(path) in shipped_names() else Path(path)


def shipped_names() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(file.stem for file in SHIPPED.glob("*.json"))


def read(cls: type, path: Path, records: dict[str, type]) -> Any:
    """See HeadProfile.load; `records` says which entries are dataclasses."""
    if path.is_dir():
        raise refuse(f"{path} is a folder, not a profile")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise refuse(f"{path} is not a whole JSON file ({error})") from error
    if not isinstance(data, dict) or "format" not in data:
        raise refuse(f"{path} is not a head profile: it has no entry named format")
    found = data.pop("format")
    if isinstance(found, bool) or found not in READS:
        raise refuse(f"{path} has format {found!r}; this version reads {' and '.join(map(str, READS))}")
    if "arrays" in data and found > 1:
        data |= _read_tables(path, data.pop("arrays"))
    said = data.pop("elbow", None) if found > 1 else None
    fields = dataclasses.fields(cls)
    needed = {f.name for f in fields if found > 1 or f.default is dataclasses.MISSING}
    if data.keys() != needed:
        missing, foreign = sorted(needed - data.keys()), sorted(data.keys() - needed)
        raise refuse(f"{path} is not a head profile: missing {missing}, unknown {foreign}")
    try:
        for name, record in records.items():
            data[name] = read_record(record, name, data[name])
        profile = cls(**data)
        if said not in (None, profile.elbow):
            raise refuse(f"elbow must be {profile.elbow}, as the spectrum says; got {said!r}")
        return profile
    except (ValueError, OverflowError) as error:
        text = f"{error}" if str(error).startswith("uncomp") else f"uncomp.calibration: {error}"
        raise ValueError(f"{text} (in {path})") from error


def is_profile(path: str | os.PathLike[str]) -> bool:
    """Whether a file is meant to be a profile: JSON with a format. A folder or a broken file is none."""
    try:
        data = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and "format" in data


def _read_tables(path: Path, arrays: Any) -> dict[str, Any]:
    named = isinstance(arrays, dict) and set(arrays) == {"file", "sha256"} and isinstance(arrays["file"], str)
    if not named or not arrays["file"] or Path(arrays["file"]).name != arrays["file"]:
        raise refuse(f"{path} must name the file and sha256 of its arrays; got {arrays!r}")
    beside = path.with_name(arrays["file"])
    try:
        content = beside.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f'uncomp.calibration: "{beside}", which holds the arrays of {path}, is missing'
        ) from error
    if hashlib.sha256(content).hexdigest() != arrays["sha256"]:
        raise refuse(f"{beside} is damaged or belongs to another profile than {path}: its sha256 differs")
    values: dict[str, Any] = {name: None for name in _TABLES} | {"rank_votes": {}}
    try:
        tables = _safetensors().load(content)
    except Exception as error:  # safetensors has an error type of its own
        raise refuse(f"{beside} is no safetensors file ({first_line(error)})") from error
    for name, tensor in tables.items():
        table, _, rows = name.partition(".")
        if rows:
            values[table][rows] = tensor.tolist()
        else:
            values[table] = tensor.tolist()
    return values


# ---- hub
def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(f"uncomp.calibration: the hub needs huggingface_hub ({error})") from error
    return huggingface_hub


def push(profile: Any, repo_id: str, *, token: str | bool | None = None, private: bool | None = None) -> str:
    """See HeadProfile.push_to_hub."""
    name = os.fspath(repo_id)
    if os.path.isabs(name) or name.startswith("."):
        Path(name).mkdir(parents=True, exist_ok=True)
        write(profile, Path(name) / HUB_FILE)
        return name
    api = _hub().HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        write(profile, Path(folder) / HUB_FILE)
        try:
            api.create_repo(name, private=private, exist_ok=True)
            done = api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Head profile: {profile.model}")
        except (OSError, ValueError) as error:
            raise type_of(error)(f'uncomp.calibration: the hub does not take "{name}" ({first_line(error)})') from error
    return str(done.commit_url)


def fetch(name: str | os.PathLike[str], **options: Any) -> Path:
    """See HeadProfile.from_pretrained: the path of head_profile.json, its arrays beside it."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / HUB_FILE).is_file():
            raise FileNotFoundError(f'uncomp.calibration: folder "{name}" has no {HUB_FILE}')
        return folder / HUB_FILE
    try:
        patterns = [HUB_FILE, f"{Path(HUB_FILE).stem}.*.safetensors"]
        found = Path(_hub().snapshot_download(os.fspath(name), allow_patterns=patterns, **options)) / HUB_FILE
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f'uncomp.calibration: folder "{name}" does not exist and the hub did not give it ({first_line(error)})'
        ) from error
    if not found.is_file():
        raise FileNotFoundError(f'uncomp.calibration: "{name}" on the hub has no {HUB_FILE}')
    return found


def type_of(error: Exception) -> type[Exception]:
    """What an error of the hub is raised as: its own types take more than a text."""
    return OSError if isinstance(error, OSError) else ValueError


def first_line(error: Exception) -> str:
    """The first line of an error, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
