# SPDX-License-Identifier: Apache-2.0
"""What a calibration run keeps: sums over the samples, on the device of the model, from which the profile follows.

Their size does not depend on the number of samples. With k = "elbow" the spectrum of the whole run decides k, so the
entropies and ranks of every k are summed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from uncomp import ops
from uncomp.calibration.checks import ROWS
from uncomp.calibration.fingerprint import ModelFacts
from uncomp.calibration.summary import rank_correlation
from uncomp.entropy import elbow, reduce_heads
from uncomp.stages import layer_curve

_DIGITS = 9  # of the numbers in a profile: more than float32 has, and files stay small


class Sums:
    """Sums of entropies, effective ranks and ranks of rows.

    Args:
        facts: sizes of the model. dim: channels of the states, D of the spectrum.
        top: eigenvalues kept, or None for the elbow of the run's spectrum.
        kind, reduce: as entropy.row_entropy; "variance" counts that instead of an entropy, and all eigenvalues.
        device: where the sums lie.
    """

    def __init__(
        self, facts: ModelFacts, dim: int, top: int | None, kind: str, reduce: str, device: torch.device
    ) -> None:
        self.facts, self.dim, self.kind, self.reduce = facts, dim, kind, reduce
        self.tops = list(range(1, dim + 1)) if top is None else [top]
        self.samples = 0
        self._waiting: list[Tensor] = []
        heads = (len(self.tops), facts.L, facts.Hq)

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.sums = {
            "halves": zeros(2, *heads),  # entropies of even and of odd samples
            "squares": zeros(*heads),
            "full": zeros(facts.L, facts.Hq),
            "erank": zeros(*heads),
            "erank_squares": zeros(*heads),
            "spectrum": zeros(dim),
        }
        for rows, count in zip(ROWS, (facts.Hkv, facts.Hq), strict=True):
            self.sums[f"votes.{rows}"] = zeros(len(self.tops), facts.L, count, count, dtype=torch.int32)

    @property
    def waiting(self) -> int:
        """Samples that were taken and are not counted yet."""
        return sum(map(len, self._waiting))

    def take(self, spectra: list[Tensor]) -> None:
        """Keeps the spectra of one batch until `settle`. No host sync.

        Args:
            spectra: L tensors [B, heads, D], eigenvalues descending; heads is Hq, Hkv or 1. With kind "variance"
                [B, heads, D + 1], the variance behind them.
        """
        home = self.sums["full"].device
        self._waiting.append(torch.stack([s.to(home) for s in spectra], 1).float())  # [B, L, heads, D]

    def settle(self) -> None:
        """Counts what waits, one sample after the other, so that no batch or pause shows in a sum; reads one flag back.

        Raises:
            ValueError: a spectrum with NaN; names sample, layer and head. Nothing of what waits is counted.
        """
        if not self._waiting:
            return
        spectrum = torch.cat(self._waiting)
        self._waiting = []
        if not bool(spectrum.isfinite().all()):
            self._refuse_nan(spectrum)
        if spectrum.shape[2] != self.facts.Hq:
            spectrum = spectrum.repeat_interleave(self.facts.Hq // spectrum.shape[2], 2)
        spectrum, variance = spectrum[..., : self.dim].contiguous(), spectrum[..., self.dim :]
        kind = "truncated" if self.kind == "variance" else self.kind
        found = [ops.matrix_entropy(spectrum, top, self.dim, kind=kind) for top in self.tops]
        entropy = torch.stack([h for h, _ in found], 1)  # [B, K, L, Hq]
        if self.kind == "variance":
            entropy = variance.movedim(-1, 1)
        erank = torch.stack([r for _, r in found], 1)
        full, _ = ops.matrix_entropy(spectrum, self.dim, self.dim)
        ranks = {rows: self._ranks(entropy, rows) for rows in ROWS}
        sums = self.sums
        for b in range(len(spectrum)):
            wide, rank = entropy[b].double(), erank[b].double()
            sums["halves"][self.samples % 2] += wide
            sums["squares"] += wide.square()
            sums["full"] += full[b]
            sums["erank"] += rank
            sums["erank_squares"] += rank.square()
            sums["spectrum"] += spectrum[b].double().mean((0, 1))
            for rows in ROWS:
                column = torch.arange(ranks[rows].shape[-1], device=spectrum.device)
                sums[f"votes.{rows}"] += ranks[rows][b].unsqueeze(-1) == column
            self.samples += 1

    def _ranks(self, entropy: Tensor, rows: str) -> Tensor:
        """[B, K, L, rows] int64, the rank of every row by ascending (entropy, row)."""
        count = self.facts.Hkv if rows == "kv_head" else self.facts.Hq
        by_row = reduce_heads(entropy, count, self.reduce)
        return by_row.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)

    def _refuse_nan(self, spectrum: Tensor) -> None:
        b, layer, head = (~spectrum.isfinite()).any(-1).nonzero()[0].tolist()
        raise ValueError(
            f"uncomp.calibrate: the states of sample {self.samples + b}, layer {layer}, head {head} hold NaN or Inf; "
            "take another dtype (bfloat16, float32) or another text"
        )

    # ---- what a run is resumed from
    def state(self) -> dict[str, Tensor]:
        """The sums on the CPU."""
        return {name: value.cpu() for name, value in self.sums.items()}

    def restore(self, state: dict[str, Tensor], samples: int) -> None:
        """Goes on where `state` was taken, after that many samples.

        Raises:
            ValueError: sums of other names, shapes or dtypes.
        """
        ours = {name: (value.shape, value.dtype) for name, value in self.sums.items()}
        if ours != {name: (value.shape, value.dtype) for name, value in state.items()}:
            raise ValueError("uncomp.calibrate: the state holds sums of another run")
        for name, value in state.items():
            self.sums[name].copy_(value)
        self.samples = samples

    # ---- what a profile is made from
    def tables(self) -> tuple[int, dict[str, Any]]:
        """The k of the run, and the tables of a HeadProfile by field.

        Source: docs/method.md "Calibration and profiles".
        """
        n, sums = self.samples, self.state()
        spectrum = _rounded((sums["spectrum"] / n).tolist())
        k = elbow(spectrum) if len(self.tops) > 1 else self.tops[0]
        at = self.tops.index(k)
        halves = sums["halves"][:, at]
        mean, erank = halves.sum(0) / n, sums["erank"][at] / n
        full = _rounded((sums["full"] / n).tolist())
        return k, {
            "entropy": _rounded(mean.tolist()),
            "entropy_full": full,
            "spectrum": spectrum,
            "curve": _rounded(layer_curve(full)),
            "rank_votes": {rows: sums[f"votes.{rows}"][at].tolist() for rows in ROWS},
            "entropy_spread": _rounded(_spread(mean, sums["squares"][at], n).tolist()),
            "erank": _rounded(erank.tolist()),
            "erank_spread": _rounded(_spread(erank, sums["erank_squares"][at], n).tolist()),
            "stability": self._stability(halves),
        }

    def _stability(self, halves: Tensor) -> dict[str, dict[str, float | None]]:
        found = {}
        for rows, count in zip(ROWS, (self.facts.Hkv, self.facts.Hq), strict=True):
            even, odd = (reduce_heads(half, count, self.reduce) for half in halves)
            by_layer = [_correlation(a, b) for a, b in zip(even.tolist(), odd.tolist(), strict=True)]
            known = [r for r in by_layer if r is not None]
            model = _correlation(even.flatten().tolist(), odd.flatten().tolist())
            layer = _rounded(math.fsum(known) / len(known)) if known else None
            single = self.samples == 1
            found[rows] = {"layer": None if single else layer, "model": None if single else model}
        return found


def _rounded(value: Any) -> Any:
    return [_rounded(v) for v in value] if isinstance(value, list) else float(f"{value:.{_DIGITS}g}")


def _spread(mean: Tensor, squares: Tensor, n: int) -> Tensor:
    """Standard deviation over n samples from their mean and sum of squares; 0 for one."""
    return ((squares - n * mean.square()).clamp_min(0) / max(n - 1, 1)).sqrt()


def _correlation(one: list[float], other: list[float]) -> float | None:
    """Rank correlation; None where one of them orders nothing."""
    if min(len(set(one)), len(set(other))) < 2:
        return None
    return _rounded(max(-1.0, min(1.0, rank_correlation(one, other))))
