# SPDX-License-Identifier: Apache-2.0
"""HeadProfile: entropies and rank counts of a calibration run; the groups of any layer and any G from it."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from uncomp import grouping
from uncomp.calibration import files
from uncomp.calibration.checks import ROWS, HeadTable, check_tables, check_votes, refuse, tuples
from uncomp.calibration.fingerprint import ModelFacts, config_hash
from uncomp.entropy import STATISTICS, WITHOUT_TOP, elbow

__all__ = ["ROWS", "CalibrationRun", "HeadProfile", "ModelFacts", "config_hash", "from_votes"]

TENSORS = ("query", "key", "value", "hidden")


@dataclass(frozen=True)
class CalibrationRun:
    """How a profile was made.

    Fields:
        samples, seqlen, seed: texts, tokens of each, seed of their starts.
        k: eigenvalues kept. kind: "truncated", "renormalized", "renyi2" or "variance" (the last two ignore k).
        reductions: what was reduced how, {"entropy": "mean"}.
        sha256: of the text, hex.
        tensor: whose entropy was measured: "query", "key", "value" or "hidden".
        rope: whether queries or keys were measured "after" their rotation or "before".
    """

    samples: int
    seqlen: int
    seed: int
    k: int
    kind: str
    reductions: dict[str, str]
    sha256: str
    tensor: str = "query"
    rope: str = "after"


@dataclass(frozen=True)
class HeadProfile:
    """Entropies of all heads of a model, averaged over texts, and how often each row had each rank.

    Keys and values have Hkv heads: each stands once for every query head that reads it. Hidden states have one entropy
    a layer, which stands for all heads and orders none.

    Fields:
        model, run: what was measured, and how.
        entropy: [L][Hq] mean entropy of k eigenvalues, share of ln D; of kind "variance" the mean variance instead,
            squared units of the states, and ranks and entropy_spread with it.
        entropy_full: [L][Hq] the same of all D eigenvalues.
        spectrum: [D] mean eigenvalues over layers and heads, largest first; of hidden states [E].
        curve: [L] one number a layer, from which stages of layers follow.
        rank_votes: {"kv_head": [L][Hkv][Hkv], "query_head": [L][Hq][Hq]}: in how many samples a row had each rank.
        entropy_spread: [L][Hq] standard deviation of the entropy over the samples; 0 for one sample.
        erank, erank_spread: [L][Hq] mean and standard deviation of the effective rank exp(H_k).
        stability: {"kv_head", "query_head"}: {"layer": mean over the layers, "model": over the rows of all layers} of
            the rank correlation between the mean entropies of the odd and of the even samples, in [-1, 1]; None where
            there is nothing to correlate.
        The last four are None in a profile of format 1.
    Raises:
        ValueError: a field of another shape, or one that holds NaN or Inf.
    Source: docs/method.md "Calibration and profiles".
    """

    model: ModelFacts
    run: CalibrationRun
    entropy: HeadTable
    entropy_full: HeadTable
    spectrum: tuple[float, ...]
    curve: tuple[float, ...]
    rank_votes: dict[str, tuple[tuple[tuple[int, ...], ...], ...]]
    entropy_spread: HeadTable | None = None
    erank: HeadTable | None = None
    erank_spread: HeadTable | None = None
    stability: dict[str, dict[str, float | None]] | None = None

    def __post_init__(self):
        """Turns lists into tuples and checks every shape."""
        facts, run = self.model, self.run
        if min(facts.L, facts.Hq, facts.Hkv, facts.D) < 1 or facts.Hq % facts.Hkv:
            raise refuse(f"model must have L, Hq, Hkv, D of at least 1 and Hkv dividing Hq; got {facts}")
        for name, allowed in (("kind", STATISTICS), ("tensor", TENSORS), ("rope", ("after", "before"))):
            if getattr(run, name) not in allowed:
                raise refuse(f"run.{name} must be one of {', '.join(allowed)}; got {getattr(run, name)!r}")
        if run.reductions.get("entropy") not in ("mean", "max"):
            raise refuse(f'run.reductions must say "mean" or "max" for entropy; got {run.reductions}')
        for name in ("samples", "seqlen", "k"):
            if getattr(run, name) < 1:
                raise refuse(f"run.{name} must be at least 1; got {getattr(run, name)}")
        for field in dataclasses.fields(self):
            if field.name not in ("model", "run", "rank_votes", "stability"):
                object.__setattr__(self, field.name, tuples(getattr(self, field.name)))
        if isinstance(self.rank_votes, dict):
            object.__setattr__(self, "rank_votes", {rows: tuples(v) for rows, v in self.rank_votes.items()})
        check_tables(self)
        check_votes(self.rank_votes, facts, run.samples)

    @property
    def elbow(self) -> int:
        """Eigenvalues at the elbow of the mean spectrum."""
        return elbow(self.spectrum)

    # ---- file
    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the profile as JSON, arrays beside it where they are large; a reader sees the old file or the new one.

        Args:
            path: the JSON file. Above files.LARGE bytes its tables go to PATH's stem + digest + ".safetensors".
        Raises:
            OSError: the folder cannot be written, or the disk is full; begins with "uncomp.calibration".
        """
        files.write(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeadProfile:
        """Reads a profile of format 1 or 2.

        Args:
            path: a JSON file, or the name of a profile that comes with the package, like "smollm2-135m".
        Raises:
            FileNotFoundError: no such file, or the file of its arrays is missing.
            ValueError: not JSON (cut off, or something else), not a profile, another format, or wrong shapes; the text
                names the file and what is wrong.
        """
        return files.read(cls, files.locate(path), {"model": ModelFacts, "run": CalibrationRun})

    def push_to_hub(self, repo_id: str, *, token: str | bool | None = None, private: bool | None = None) -> str:
        """Uploads the profile to a repository of the Hugging Face Hub, which is made if missing.

        Args:
            repo_id: "user/name", or a local folder: an absolute path, or one that begins with a dot.
            token, private: as huggingface_hub has them.
        Returns:
            the address of the commit, or the folder.
        Raises:
            ImportError: huggingface_hub is missing.
            OSError: the hub or the folder does not take it.
        """
        return files.push(self, repo_id, token=token, private=private)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> HeadProfile:
        """Reads head_profile.json from a local folder, or from a repository of the Hugging Face Hub.

        Args:
            name: folder or "user/name".
            options: revision, token, cache_dir, local_files_only, as huggingface_hub has them.
        Raises:
            FileNotFoundError: neither has a profile. ImportError: huggingface_hub is missing.
            ValueError: as load.
        """
        return cls.load(files.fetch(name, **options))

    # ---- use
    def check(self, model: ModelFacts, k: int | str | None, kind: str) -> None:
        """Refuses a model or a setting that the profile was not made with.

        Args:
            model: facts of the model that is to be compressed.
            k: eigenvalues kept, "elbow" for the elbow of the profile's spectrum, None for those of the profile.
                "renyi2" and "variance" have no k.
            kind: "truncated", "renormalized", "renyi2" or "variance".
        Raises:
            ValueError: another type, L, Hq, Hkv or D, another kind, another k.
        Warns:
            UserWarning: the configs differ in something else, seen by their hashes.
        """
        for name in ("L", "Hq", "Hkv", "D", "type"):
            ours, theirs = getattr(self.model, name), getattr(model, name)
            if ours != theirs:
                raise refuse(
                    f"{name} of the model must be {ours}, as in the profile ({self.model}); got {theirs} ({model})"
                )
        if kind != self.run.kind:
            raise refuse(f"kind must be {self.run.kind!r}, as the profile was made with; got {kind!r}")
        wanted = self.run.k if k is None else self.elbow if k == "elbow" else k
        if kind not in WITHOUT_TOP and wanted != self.run.k:
            got = f"'elbow' = {wanted}" if k == "elbow" else k
            raise refuse(f"k must be {self.run.k}, as the profile was made with; got {got}")
        if model.hash != self.model.hash:
            warnings.warn(
                f"uncomp.calibration: the profile was made with another config of {self.model.type} "
                f"(hash {self.model.hash[:12]}, the model has {model.hash[:12]})",
                stacklevel=2,
            )

    def at_layers(self, layers: Sequence[int]) -> HeadProfile:
        """The profile of some of the layers, in their order, as if the model had no others; the spectrum stays.

        Args:
            layers: indices from 0 to L - 1.
        Raises:
            ValueError: none, or one outside these.
        """
        if not layers or min(layers) < 0 or max(layers) >= self.model.L:
            raise refuse(f"layers must lie in [0, {self.model.L}) and be at least one; got {list(layers)}")
        changes: dict[str, Any] = {"model": dataclasses.replace(self.model, L=len(layers))}
        for name in ("entropy", "entropy_full", "curve", "entropy_spread", "erank", "erank_spread"):
            table = getattr(self, name)
            changes[name] = None if table is None else tuple(table[layer] for layer in layers)
        changes["rank_votes"] = {rows: [votes[layer] for layer in layers] for rows, votes in self.rank_votes.items()}
        return dataclasses.replace(self, **changes)

    def _rows(self, rows: str) -> int:
        if rows not in ROWS:
            raise refuse(f"rows must be one of {', '.join(ROWS)}; got {rows!r}")
        if self.run.tensor == "hidden":
            raise refuse("tensor of the profile must be query, key or value to order heads; got hidden")
        return self.model.Hkv if rows == "kv_head" else self.model.Hq

    def groups(self, layer: int, num_groups: int, rows: str = "kv_head") -> list[int]:
        """Group id of every row of a layer, from the votes of the samples; 0 = lowest entropy.

        Args:
            layer: 0 to L - 1.
            num_groups: G, 1 to the rows of the layer.
            rows: "kv_head" (Hkv rows) or "query_head" (Hq rows).
        Raises:
            ValueError: a layer, G or rows outside these; a profile of hidden states.
        Source: docs/method.md "Calibration and profiles".
        """
        self._rows(rows)
        if not 0 <= layer < self.model.L:
            raise refuse(f"layer must lie in [0, {self.model.L}); got {layer}")
        return grouping.group_ids(grouping.groups_from_votes(self.rank_votes[rows][layer], num_groups))

    def votes(self, num_groups: int, rows: str = "query_head") -> list[list[list[int]]]:
        """In how many samples every row fell into every group, [L][H][G]: what votes.Votes writes as tables.

        Args:
            num_groups: G, 1 to the rows of a layer. rows: "kv_head" or "query_head".
        Raises:
            ValueError: G or rows outside these; a profile of hidden states.
        Source: docs/method.md "Calibration and profiles".
        """
        self._rows(rows)
        return [grouping.label_votes(layer, num_groups) for layer in self.rank_votes[rows]]

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
            ValueError: G or rows outside these; a profile of hidden states.
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
