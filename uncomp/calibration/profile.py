# SPDX-License-Identifier: Apache-2.0
"""HeadProfile: entropies and rank counts of a calibration run, as JSON; the groups of any layer and any G from it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from uncomp import grouping
from uncomp.entropy import KINDS, elbow

FORMAT = 1
ROWS = ("kv_head", "query_head")
# Entries of a model's config that say how it is run or where it came from, not what it computes.
_NOT_HASHED = {"attn_implementation", "dtype", "torch_dtype", "transformers_version", "use_cache"}


def _refuse(text: str) -> ValueError:
    return ValueError(f"uncomp.calibration: {text}")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {str(k): _plain(v) for k, v in value.items() if not str(k).startswith("_") and k not in _NOT_HASHED}
        return dict(sorted(kept.items()))
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def config_hash(config: Mapping[str, Any]) -> str:
    """Fingerprint of a model's config: sha256 of its entries in sorted order, as 64 hex digits.

    Entries that begin with an underscore, and those that say how the model is run (dtype, attention implementation,
    use_cache, library version), do not enter, at any depth.
    """
    return hashlib.sha256(json.dumps(_plain(config), separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class ModelFacts:
    """What a profile must agree with: layers L, query heads Hq, KV heads Hkv, head dim D; type, config_hash."""

    type: str
    L: int
    Hq: int
    Hkv: int
    D: int
    hash: str


@dataclass(frozen=True)
class CalibrationRun:
    """How a profile was made.

    Fields:
        samples, seqlen, seed: texts, tokens of each, seed of their starts.
        k: eigenvalues kept. kind: "truncated", "renormalized" or "renyi2" (which ignores k).
        reductions: what was reduced how, {"entropy": "mean"}.
        sha256: of the text, hex.
        tensor: whose entropy was measured.
    """

    samples: int
    seqlen: int
    seed: int
    k: int
    kind: str
    reductions: dict[str, str]
    sha256: str
    tensor: str = "query"


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _check_array(name: str, value: Any, shape: tuple[int, ...], kind: type) -> None:
    """Raises ValueError unless value is nested tuples of that shape holding finite numbers."""
    level = [value]
    for depth, size in enumerate(shape):
        if any(not isinstance(part, tuple) or len(part) != size for part in level):
            raise _refuse(f"{name} must have shape {list(shape)}; got another length in dimension {depth}")
        level = [item for part in level for item in part]
    for item in level:
        if isinstance(item, bool) or not isinstance(item, (int, kind)) or not math.isfinite(item):
            raise _refuse(f"{name} must hold finite numbers ({kind.__name__}); got {item!r}")


def _read(cls: type, name: str, value: Any) -> Any:
    wanted = {f.name for f in fields(cls)}
    if not isinstance(value, dict) or value.keys() != wanted:
        got = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise _refuse(f"{name} must hold {', '.join(sorted(wanted))}; got {got}")
    for f in fields(cls):
        kind = {"int": int, "str": str}.get(f.type, dict)
        if not isinstance(value[f.name], kind) or isinstance(value[f.name], bool):
            raise _refuse(f"{name}.{f.name} must be {kind.__name__}; got {value[f.name]!r}")
    return cls(**value)


@dataclass(frozen=True)
class HeadProfile:
    """Entropies of all heads of a model, averaged over texts, and how often each row had each rank.

    Fields:
        model, run: what was measured, and how.
        entropy: [L][Hq] mean entropy of k eigenvalues, share of ln D.
        entropy_full: [L][Hq] the same of all D eigenvalues.
        spectrum: [D] mean eigenvalues over layers and heads, largest first.
        curve: [L] one number a layer, from which stages of layers follow.
        rank_votes: {"kv_head": [L][Hkv][Hkv], "query_head": [L][Hq][Hq]}: in how many samples a row had each rank.
    Raises:
        ValueError: a field of another shape, or one that holds NaN or Inf.
    Source: docs/method.md "Calibration and profiles".
    """

    model: ModelFacts
    run: CalibrationRun
    entropy: tuple[tuple[float, ...], ...]
    entropy_full: tuple[tuple[float, ...], ...]
    spectrum: tuple[float, ...]
    curve: tuple[float, ...]
    rank_votes: dict[str, tuple[tuple[tuple[int, ...], ...], ...]]

    def __post_init__(self):
        """Turns lists into tuples and checks every shape."""
        facts = self.model
        if min(facts.L, facts.Hq, facts.Hkv, facts.D) < 1 or facts.Hq % facts.Hkv:
            raise _refuse(f"model must have L, Hq, Hkv, D of at least 1 and Hkv dividing Hq; got {facts}")
        if self.run.kind not in KINDS:
            raise _refuse(f"run.kind must be one of {', '.join(KINDS)}; got {self.run.kind!r}")
        shapes = {
            "entropy": (facts.L, facts.Hq),
            "entropy_full": (facts.L, facts.Hq),
            "spectrum": (facts.D,),
            "curve": (facts.L,),
        }
        for name, shape in shapes.items():
            object.__setattr__(self, name, _tuples(getattr(self, name)))
            _check_array(name, getattr(self, name), shape, float)
        if not isinstance(self.rank_votes, dict) or set(self.rank_votes) != set(ROWS):
            raise _refuse(f"rank_votes must hold {' and '.join(ROWS)}; got {list(self.rank_votes)}")
        object.__setattr__(self, "rank_votes", {rows: _tuples(self.rank_votes[rows]) for rows in ROWS})
        for rows, count in zip(ROWS, (facts.Hkv, facts.Hq), strict=True):
            _check_array(f"rank_votes.{rows}", self.rank_votes[rows], (facts.L, count, count), int)
            for layer, votes in enumerate(self.rank_votes[rows]):
                if min(map(min, votes)) < 0 or {sum(line) for line in (*votes, *zip(*votes, strict=True))} != {
                    self.run.samples
                }:
                    raise _refuse(f"rank_votes.{rows}[{layer}] must sum to run.samples in every row and every rank")

    # ---- file
    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the profile as JSON; a reader sees the old file or the whole new one, never a part.

        Raises:
            OSError: the folder cannot be written.
        """
        path = Path(path)
        text = json.dumps({"format": FORMAT, **asdict(self)}, allow_nan=False) + "\n"
        beside = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeadProfile:
        """Reads a profile.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON (cut off, or something else), not a profile, another format, or wrong shapes; the text
                names the file and what is wrong.
        """
        try:
            data = json.loads(Path(path).read_bytes())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise _refuse(f"{path} is not a whole JSON file ({error})") from error
        wanted = {"format", *(f.name for f in fields(cls))}
        if not isinstance(data, dict) or "format" not in data:
            raise _refuse(f"{path} is not a head profile: it has no entry named format")
        if data["format"] != FORMAT:
            raise _refuse(f"{path} has format {data['format']!r}; this version reads {FORMAT}")
        if data.keys() != wanted:
            missing, foreign = sorted(wanted - data.keys()), sorted(data.keys() - wanted)
            raise _refuse(f"{path} is not a head profile: missing {missing}, unknown {foreign}")
        del data["format"]
        try:
            data["model"] = _read(ModelFacts, "model", data["model"])
            data["run"] = _read(CalibrationRun, "run", data["run"])
            return cls(**data)
        except ValueError as error:
            raise ValueError(f"{error} (in {path})") from error

    # ---- use
    def check(self, model: ModelFacts, k: int | str, kind: str) -> None:
        """Refuses a model or a setting that the profile was not made with.

        Args:
            model: facts of the model that is to be compressed.
            k: eigenvalues kept, or "elbow" for the elbow of the profile's spectrum. "renyi2" has no k.
            kind: "truncated", "renormalized" or "renyi2".
        Raises:
            ValueError: another L, Hq, Hkv or D, another kind, another k.
        Warns:
            UserWarning: the configs differ in something else, seen by their hashes.
        """
        for name in ("L", "Hq", "Hkv", "D"):
            ours, theirs = getattr(self.model, name), getattr(model, name)
            if ours != theirs:
                raise _refuse(
                    f"{name} of the model must be {ours}, as in the profile ({self.model.type}); got {theirs}"
                )
        if kind != self.run.kind:
            raise _refuse(f"kind must be {self.run.kind!r}, as the profile was made with; got {kind!r}")
        wanted = elbow(self.spectrum) if k == "elbow" else k
        if kind != "renyi2" and wanted != self.run.k:
            got = f"'elbow' = {wanted}" if k == "elbow" else k
            raise _refuse(f"k must be {self.run.k}, as the profile was made with; got {got}")
        if model.hash != self.model.hash:
            warnings.warn(
                f"uncomp.calibration: the profile was made with another config of {self.model.type} "
                f"(hash {self.model.hash[:12]}, the model has {model.hash[:12]})",
                stacklevel=2,
            )

    def _rows(self, rows: str) -> int:
        if rows not in ROWS:
            raise _refuse(f"rows must be one of {', '.join(ROWS)}; got {rows!r}")
        return self.model.Hkv if rows == "kv_head" else self.model.Hq

    def groups(self, layer: int, num_groups: int, rows: str = "kv_head") -> list[int]:
        """Group id of every row of a layer, from the votes of the samples; 0 = lowest entropy.

        Args:
            layer: 0 to L - 1.
            num_groups: G, 1 to the rows of the layer.
            rows: "kv_head" (Hkv rows) or "query_head" (Hq rows).
        Raises:
            ValueError: a layer, G or rows outside these.
        Source: docs/method.md "Calibration and profiles".
        """
        self._rows(rows)
        if not 0 <= layer < self.model.L:
            raise _refuse(f"layer must lie in [0, {self.model.L}); got {layer}")
        return grouping.group_ids(grouping.groups_from_votes(self.rank_votes[rows][layer], num_groups))

    def model_groups(self, num_groups: int, rows: str = "kv_head") -> list[list[int]]:
        """Group id of every row of every layer, when the rows of the whole model are cut into G groups at once.

        The rows of all layers are ranked by ascending mean entropy over the samples, ties to the lower (layer, row),
        and cut by group_sizes(L * rows, G). The rank votes do not enter: they compare rows of one layer only. A KV
        head's entropy is the run's reduction of the mean entropies of its query heads.

        Args:
            num_groups: G, 1 to L * rows.
            rows: "kv_head" or "query_head".
        Returns:
            [L][rows] group ids; 0 = lowest entropy.
        Raises:
            ValueError: G or rows outside these.
        Source: docs/method.md "Calibration and profiles".
        """
        count = self._rows(rows)
        size = self.model.Hq // count
        worst = self.run.reductions.get("entropy", "mean") == "max"
        flat = []
        for heads in self.entropy:
            parts = [heads[row * size : (row + 1) * size] for row in range(count)]
            flat += [max(part) if worst else math.fsum(part) / size for part in parts]
        ids = [0] * len(flat)
        ranked = sorted(range(len(flat)), key=lambda i: (flat[i], i))
        for row, label in zip(ranked, grouping.labels(len(flat), num_groups), strict=True):
            ids[row] = label
        return [ids[layer * count : (layer + 1) * count] for layer in range(self.model.L)]


def from_votes(votes: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    """Group ids of every layer from votes that were counted for one G, as the paper's authors published theirs.

    Args:
        votes: [L][H][G], in how many samples a head fell into each group, group 0 = lowest entropy.
    Returns:
        [L][H] group ids.
    Raises:
        ValueError: as grouping.groups_from_labels.
    Source: docs/method.md "Calibration and profiles".
    """
    return [grouping.group_ids(grouping.groups_from_labels(layer)) for layer in votes]
