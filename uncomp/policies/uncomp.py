# SPDX-License-Identifier: Apache-2.0
"""UNComp: rows whose queries carry more information store more tokens (arXiv 2410.03090)."""

from __future__ import annotations

from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from uncomp import budget, grouping, presets
from uncomp.calibration import named
from uncomp.calibration.profile import HeadProfile, ModelFacts
from uncomp.entropy import reduce_heads, row_entropy
from uncomp.policies import compete
from uncomp.policies.base import Policy, register_policy
from uncomp.types import PlanRequest
from uncomp.view import LayerView, PromptView

ALLOCATORS = ("groups", "groups*layer_topk")


@register_policy
class UNComp(Policy):
    """Rows are ranked by the entropy of their rotated queries and cut into groups; higher groups store more.

        A = Z^T Z / n                                  Z: centred queries of unit length
        H = -sum_{i <= k} s_i ln s_i / ln D            s: spectrum of A / tr A, largest first
        b_h proportional to 1 - x + 2 x g / (G - 1)    g: group of row h, 0 = lowest entropy

    A NaN entropy ranks highest. Tokens of a row: the attention of the last W queries, pooled. docs/method.md has all of
    it: "Entropy", "Grouping", "Budget", "Presets".

    policy_options: allocator "groups" (default) or "groups*layer_topk": the weight of a row's group times f_h, how many
    of its layer's best tokens are the row's (docs/policies.md "uncomp").
    """

    name = "uncomp"
    defaults: ClassVar = {}
    options: ClassVar = {"allocator": ALLOCATORS[0]}

    def __init__(self, config, shape) -> None:
        super().__init__(config, shape)
        if self.option["allocator"] not in ALLOCATORS:
            known = ", ".join(map(repr, ALLOCATORS))
            raise ValueError(f"uncomp: allocator of uncomp must be one of {known}; got {self.option['allocator']!r}")
        self.scope = config.group_scope
        self.whole = config.group_scope == "model"
        self.continuous = config.shape == "entropy"  # every row has a weight of its own
        self.rows = shape.rows * (shape.num_layers if self.whole else 1)  # rows that are cut into groups together
        self.delete_heads = self._deletes()
        self.named = self._named()
        self.num_groups = [len(self._values(layer)) for layer in range(shape.num_layers)]
        self._weights = self._fixed_weights()
        self._check_extreme()
        self._profile = None if config.profile == "online" else self._read_profile()
        self._entropies: dict[torch.device, Tensor] = {}  # [L, rows] of the profile

    # ---- the order of the rows
    def statistic(self, view: LayerView) -> Tensor | None:
        """[B, rows] float32, entropy as a share of ln D; None where a profile, the lot or a single group decides."""
        config = self.config
        lot = config.order == "random" and not self.continuous
        ordered = self.delete_heads or max(self.num_groups) > 1
        if self._profile is not None or lot or not ordered:
            return None
        if not isinstance(view, PromptView):
            raise TypeError("uncomp: the order of heads is measured on a prompt; got a view of stored rows")
        return row_entropy(
            view.query,
            self.shape.rows,
            top=config.entropy_top,
            kind=config.entropy_kind,
            reduce=config.reduce_entropy,
            first=view.first,
            length=view.tokens,
        )

    def groups(self, request: PlanRequest) -> Tensor:
        """[B, N] int32, group of every row, 0 = lowest entropy."""
        config, layer = self.config, 0 if self.whole else request.layers[0]
        count = self.num_groups[layer]
        statistic = self._statistic_of(request)
        if statistic is not None and count > 1:
            return grouping.groups_online(statistic, count, config.order, config.seed, layer)
        ids = grouping.int32_on(request.device, self._host_groups(layer))
        return ids.repeat(len(request.lengths), 1)

    def deleted_rows(self, layer: int, statistic: Tensor | None, batch: int, device: torch.device) -> Tensor:
        """[B, rows] bool, the rows lowest in the order (reverse: highest, random: of the lot's permutation)."""
        config, rows = self.config, self.rows
        if statistic is not None:
            return grouping.groups_online(statistic, rows, config.order, config.seed, layer) < self.delete_heads
        if config.order == "random":
            gone = [rank < self.delete_heads for rank in grouping.random_groups(rows, rows, config.seed, layer)]
        else:
            votes = self._profile.rank_votes[config.rows][layer]
            high = config.order == "reverse"
            lowest = grouping.lowest_rows(votes, rows - self.delete_heads if high else self.delete_heads)
            gone = [(row in lowest) != high for row in range(rows)]
        return grouping.int32_on(device, tuple(map(int, gone))).bool().repeat(batch, 1)

    def _deletes(self) -> int:
        config = self.config
        if not config.delete_heads:
            return 0
        if config.delete_heads >= self.shape.rows:
            most = self.shape.rows - 1
            raise ValueError(f"uncomp: delete_heads must lie in [0, {most}], a row stays; got {config.delete_heads}")
        for name, plain in (("groups", None), ("group_scope", "layer"), ("shape", "linear"), ("extreme", None)):
            given = getattr(config, name)
            if given != plain and (name, given) != ("groups", 1):
                raise ValueError(
                    f"uncomp: {name} must be left out where delete_heads is given, the rows that stay share equally; "
                    f"got {given!r}"
                )
        if self.option["allocator"] != "groups":
            given = self.option["allocator"]
            raise ValueError(f"uncomp: allocator must be 'groups' where delete_heads is given; got {given!r}")
        return config.delete_heads

    def _host_groups(self, layer: int) -> tuple[int, ...]:
        """Groups that do not hang on the prompt."""
        config, count = self.config, self.num_groups[layer]
        ids = [0] * self.rows
        if self._profile is not None and self.whole:
            ids = [g for row in self._profile.model_groups(count, config.rows) for g in row]
        elif self._profile is not None:
            ids = self._profile.groups(layer, count, config.rows)
        return tuple(grouping.ordered(ids, count, config.order, seed=config.seed, layer=layer))

    def _statistic_of(self, request: PlanRequest) -> Tensor | None:
        """[B, N] float32: measured, or where rows have weights of their own the profile's; else None."""
        if not self.continuous or self._profile is None:
            return request.statistic
        if request.device not in self._entropies:
            heads = torch.tensor(self._profile.entropy, dtype=torch.float64)  # [L, Hq]
            rows = reduce_heads(heads, self.shape.rows, self._profile.run.reductions.get("entropy", "mean"))
            self._entropies[request.device] = rows.float().to(request.device)
        return self._entropies[request.device][request.layers].flatten().repeat(len(request.lengths), 1)

    def _read_profile(self) -> HeadProfile:
        """The profile of the compressed layers; it covers every layer of the model."""
        profile, config, shape = named.load(self.config.profile), self.config, self.shape
        ours = (shape.model_layers or shape.num_layers, shape.num_q_heads, shape.num_kv_heads, shape.head_dim)
        facts = ModelFacts(shape.model_type or profile.model.type, *ours, shape.config_hash or profile.model.hash)
        profile.check(facts, config.entropy_top, config.entropy_kind)
        if profile.run.tensor == "hidden":
            raise ValueError(f"uncomp: profile {config.profile} is of hidden states, which order no heads")
        return profile.at_layers(shape.layers) if shape.layers else profile

    # ---- how much each group gets
    def totals(self, layer: int, lengths: list[int]) -> list[int]:
        """[B] tokens that the rows of a layer share; with scope "model" only their sum over the layers counts."""
        if self.config.budget is not None:
            shared = super().totals(layer, lengths)
            if self.delete_heads and not self.config.delete_total:
                return [total // self.rows * (self.rows - self.delete_heads) for total in shared]
            return shared
        layers = self.shape.num_layers
        whole = [self.named.total(self.rows, self.config.floor, layer, layers, n) for n in lengths]
        return [t // layers + (layer < t % layers) for t in whole] if self.whole else whole

    def limits(self, request: PlanRequest) -> Tensor:
        """[B, N] int32; a sequence's row sums to its total exactly."""
        config = self.config
        if self.delete_heads:
            group = torch.zeros(
                len(request.lengths), self.rows - self.delete_heads, dtype=torch.int32, device=request.device
            )
            return budget.limits(group, [1], request.lengths, request.totals, config.floor)
        layer = 0 if self.whole else request.layers[0]
        weights = self._weights[layer]
        if self.continuous and self.rows > 1:
            weights = budget.entropy_weights(self._statistic_of(request), _spread(config.spread))
        elif weights is None:
            table = [self._weights_of(layer, n, t) for n, t in zip(request.lengths, request.totals, strict=True)]
            weights = grouping.int32_on(request.device, tuple(w for row in table for w in row)).view(len(table), -1)
        group = self.groups(request)
        if self.option["allocator"] != "groups":
            weights = compete.row_weights(request, group, weights, config, self.shape.rows)
            every = grouping.int32_on(request.device, tuple(range(group.shape[1])))
            group = every.repeat(len(request.lengths), 1)  # every row is a group of its own
        return budget.limits(group, weights, request.lengths, request.totals, config.floor)

    def _named(self) -> presets.Shape | None:
        """The shape that says tokens group by group; None for the linear one."""
        config = self.config
        if config.shape == "linear" or (config.shape == "entropy" and config.extreme is None):
            return None
        if config.extreme is not None:
            raise ValueError(f"uncomp: extreme makes a shape of its own; leave shape at 'linear', not {config.shape!r}")
        if isinstance(config.shape, tuple):
            if not config.shape or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in config.shape):
                raise ValueError(f"uncomp: shape must hold positive integers; got {config.shape}")
            named = presets.Shape("shape", config.shape)
        else:
            named = presets.preset(config.shape)
        if self.whole and named.inner is not None:
            raise ValueError(f'uncomp: shape {config.shape} differs by layer and needs group_scope="layer"')
        if config.budget is None and config.layer_shape != "uniform":
            raise ValueError(f"uncomp: layer_shape={config.layer_shape!r} of a named shape needs a budget")
        return named

    def _values(self, layer: int) -> tuple:
        """As many entries as the layer has groups."""
        config = self.config
        if self.named is not None:
            values = self.named.at_layer(layer, self.shape.num_layers)
            if config.groups not in (None, len(self.named.values)):
                raise ValueError(
                    f"uncomp: groups must be {len(self.named.values)}, as shape {config.shape} has; got {config.groups}"
                )
        elif self.continuous:
            if config.groups is not None:
                raise ValueError(f'uncomp: groups must be left out where shape is "entropy"; got {config.groups}')
            values = (None,) * self.rows
        elif self.delete_heads:
            values = (None,)
        else:
            count = 2 if config.extreme is not None else min(2, self.rows)
            if config.extreme is not None and config.groups not in (None, 2):
                raise ValueError(f"uncomp: groups must be 2 where extreme is given; got {config.groups}")
            values = (None,) * (config.groups or count)
        if len(values) > self.rows:
            what = "of the model" if self.whole else "of a layer"
            raise ValueError(f"uncomp: groups must lie in [1, {self.rows}], the rows {what}; got {len(values)}")
        return values

    def _fixed_weights(self) -> list[list[int] | None]:
        """Weights of each layer's groups; None where they depend on the prompt."""
        config, layers = self.config, self.shape.num_layers
        if config.extreme is not None:
            return [None] * layers
        if self.continuous:
            budget.group_weights(1, _spread(config.spread))  # refuses a spread outside [0, 1)
            return [[1]] * layers  # of a single row; more are weighed by their entropies
        if self.named is None:
            return [budget.group_weights(self.num_groups[0], _spread(config.spread))] * layers
        weights = []
        for layer in range(layers):
            open_ended = None in self._values(layer)
            weights.append(None if open_ended else self.named.weights(layer, layers))
            if config.budget is None and not open_ended:
                self.named.total(self.rows, config.floor, layer, layers)  # refuses what is below window and sinks
        return weights

    def _weights_of(self, layer: int, n: int, total: int) -> list[int]:
        """Weights for one sequence of n tokens whose rows share `total`."""
        if self.config.extreme is None:
            return self.named.weights(layer, self.shape.num_layers, n)
        mean = total // self.rows
        return budget.extreme_weights(min(self.config.extreme, mean), mean, self.rows, self.config.floor)

    def _check_extreme(self) -> None:
        config = self.config
        if config.extreme is None:
            return
        mean = config.budget if isinstance(config.budget, int) else max(config.extreme, config.floor)
        budget.extreme_weights(config.extreme, mean, self.rows, config.floor)


def _spread(spread: float | str | None) -> Fraction | None:
    if spread is None:
        return None
    try:
        return Fraction(spread) if isinstance(spread, str) else budget.exact(spread)
    except (ValueError, TypeError, ZeroDivisionError):
        raise ValueError(f"uncomp: spread must be a number in [0, 1), like 0.5 or '2/3'; got {spread!r}") from None


@register_policy
class UNCompStage(UNComp):
    """The same cache behind a prompt that loses tokens between stages of layers: UncompConfig(prefill=...) is on.

    docs/method.md "Hidden-state pruning".
    """

    name = "uncomp_stage"
