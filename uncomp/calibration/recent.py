# SPDX-License-Identifier: Apache-2.0
"""How a budget is best split between the newest tokens and heavy hitters: the share whose entropies follow the whole's.

Takes: a model and texts. Gives: for every share of newest tokens the correlation, over the layers, of the entropy of
the tokens that would stay with that of all tokens. docs/method.md "Recent tokens against heavy hitters".
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from uncomp.budget import exact
from uncomp.calibration.samples import draw
from uncomp.config import UncompConfig
from uncomp.entropy import row_entropy
from uncomp.models import describe, family_of
from uncomp.types import Lengths
from uncomp.view import PromptView

NAME = "uncomp_study"
SHARES = tuple(i / 10 for i in range(11))
TENSORS = ("key", "value", "query")
_measuring: weakref.WeakKeyDictionary[torch.nn.Module, Callable] = weakref.WeakKeyDictionary()


def _refuse(text: str) -> ValueError:
    return ValueError(f"uncomp.study: {text}")


def _attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs: Any):
    """transformers' own sdpa, after the module's states were measured."""
    measure = _measuring.get(module)
    if measure is not None:
        measure(query, key, value, kwargs.get("scaling") or module.scaling)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


# ---- the pieces
def kept_tokens(mass: Tensor, budget: int, recent: int) -> Tensor:
    """The newest tokens of a row and the heaviest of the others.

    Args:
        mass: [R, n] float32, attention that every token has got. budget: tokens that stay, at most n.
        recent: newest tokens among them.
    Returns:
        [R, budget] int64, ascending; ties go to the lower position.
    """
    tokens = mass.shape[1]
    older = mass[:, : tokens - recent].sort(dim=1, descending=True, stable=True).indices[:, : budget - recent]
    newest = torch.arange(tokens - recent, tokens, device=mass.device).expand(mass.shape[0], -1)
    return torch.cat([older.sort(dim=1).values, newest], 1)


def correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Pearson's correlation of two curves; None where one of them is constant.

    Raises:
        ValueError: curves of different lengths, or of fewer than two numbers.
    """
    if len(one) != len(other) or len(one) < 2:
        raise _refuse(f"curves must have one length of at least 2; got {len(one)} and {len(other)}")
    a, b = ([x - math.fsum(curve) / len(curve) for x in curve] for curve in (one, other))
    # A constant curve is one up to the rounding of its mean.
    sizes = [math.sqrt(math.fsum(x * x for x in curve)) for curve in (a, b)]
    if any(size <= 1e-12 * max(map(abs, curve)) for size, curve in zip(sizes, (one, other), strict=True)):
        return None
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / (sizes[0] * sizes[1])


@dataclass(frozen=True)
class RecentStudy:
    """What a study found.

    Fields:
        samples, seqlen, budget, seed: pieces, tokens of each, tokens that a row keeps, seed of the pieces.
        tensor: whose entropy. sha256: of the text.
        shares: [X] shares of newest tokens. recent: [X] the tokens that they are.
        whole: [L] mean entropy of all tokens, share of ln D. kept: [X][L] that of the tokens that stay.
        correlation: [X] of kept[x] and whole over the layers; None where undefined.
    """

    samples: int
    seqlen: int
    budget: int
    seed: int
    tensor: str
    sha256: str
    shares: tuple[float, ...]
    recent: tuple[int, ...]
    whole: tuple[float, ...]
    kept: tuple[tuple[float, ...], ...]
    correlation: tuple[float | None, ...]

    @property
    def best(self) -> int | None:
        """Index of the share with the largest correlation, ties to the smaller share; None where none is defined."""
        known = [(r, -i) for i, r in enumerate(self.correlation) if r is not None]
        return -max(known)[1] if known else None


# ---- the run
@contextlib.contextmanager
def _watched(model: Any, measure: Callable[[int], Callable]) -> Iterator[Any]:
    """Measures every layer's states inside the attention call; behind the `with` the model is as it was."""
    family = family_of(model.config)
    stack, before = family.text_stack(model), model.config._attn_implementation
    training = [module for module in model.modules() if module.training]
    try:
        model.set_attn_implementation(NAME)
        for i, layer in enumerate(stack.layers):
            _measuring[family.attention(layer)] = measure(i)
        model.eval()
        yield stack
    finally:
        for layer in stack.layers:
            _measuring.pop(family.attention(layer), None)
        for module in training:
            module.training = True
        model.set_attn_implementation(before)


def study_recent_share(
    model: torch.nn.Module,
    tokenizer: Any,
    texts: str | Sequence[str],
    *,
    samples: int = 8,
    seqlen: int = 1024,
    budget: int = 384,
    shares: Sequence[float] = SHARES,
    tensor: str = "key",
    seed: int = 42,
    progress: Callable[[str], None] | None = None,
) -> RecentStudy:
    """Measures how well the tokens that stay keep the trend of the entropy over the layers, for shares of newest ones.

    Args:
        model: a causal language model of a supported family, all layers of full attention, not patched. Its mode and
            attention implementation are given back as they were.
        tokenizer: of the model. texts: one or several, joined by two newlines.
        samples, seqlen, seed: pieces, tokens of each, seed of their starts.
        budget: tokens that a row keeps, at least 2, fewer than seqlen.
        shares: of the budget that are newest tokens, in [0, 1], ascending; floats count as the decimals they print as.
        tensor: "key", "value" or "query": whose entropy.
        progress: called with a line of text after every piece.
    Raises:
        ValueError: an argument out of its range, a text that is too short, fewer than two layers, NaN in the states.
        NotImplementedError: the model's family is not known, or it has other than full attention.
    Source: docs/method.md "Recent tokens against heavy hitters".
    """
    shares = tuple(float(share) for share in shares)
    for name, value, least in (
        ("samples", samples, 1),
        ("seqlen", seqlen, 3),
        ("budget", budget, 2),
        ("seed", seed, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise _refuse(f"{name} must be an integer of at least {least}; got {value!r}")
    if tensor not in TENSORS:
        raise _refuse(f"tensor must be one of {', '.join(TENSORS)}; got {tensor!r}")
    if not shares or list(shares) != sorted(set(shares)) or not 0 <= shares[0] <= shares[-1] <= 1:
        raise _refuse(f"shares must ascend inside [0, 1]; got {list(shares)}")
    if model.config._attn_implementation == "uncomp":
        raise _refuse("the model is patched; call .remove() on its handle first")
    config = UncompConfig(policy="full")
    shape = describe(model.config, config).shape
    if shape.num_layers < 2:
        raise _refuse(f"model must have at least 2 layers, whose trends are compared; got {shape.num_layers}")
    drawn = draw(tokenizer, texts, samples, seqlen, seed)
    if budget >= drawn.seqlen:
        raise _refuse(f"budget must be below seqlen = {drawn.seqlen}, so that some token goes; got {budget}")
    recent = tuple(math.floor(exact(share) * budget + exact(0.5)) for share in shares)
    found: list[Tensor | None] = [None] * shape.num_layers

    def measure(layer: int) -> Callable:
        def of(query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
            lengths = Lengths([key.shape[2]], key.shape[2])
            mass = PromptView(layer, shape, config, query, key, value, lengths, scale).accumulated_scores()
            states = {"query": query, "key": key, "value": value}[tensor]
            heads, dim = states.shape[1], states.shape[3]
            entropies = [row_entropy(states, heads).mean()]
            for newest in recent:
                index = kept_tokens(mass, budget, newest).repeat_interleave(heads // mass.shape[0], 0)
                stay = states.gather(2, index.view(1, heads, budget, 1).expand(-1, -1, -1, dim))
                entropies.append(row_entropy(stay, heads).mean())
            found[layer] = torch.stack(entropies).double()

        return of

    total = torch.zeros(shape.num_layers, 1 + len(shares), dtype=torch.float64)
    device = next(model.parameters()).device
    with torch.inference_mode(), _watched(model, measure) as stack:
        for piece, ids in enumerate(drawn.batches(1)):
            stack(input_ids=ids.to(device), use_cache=False)
            now = torch.stack([entropy.cpu() for entropy in found])
            if not now.isfinite().all():
                layer = int((~now.isfinite()).any(1).nonzero()[0])
                raise _refuse(f"states must be finite; got NaN in sample {piece}, layer {layer}")
            total += now
            if progress is not None:
                progress(f"{piece + 1} of {samples} samples")
    whole, *kept = (total / samples).t().tolist()
    return RecentStudy(
        samples, drawn.seqlen, budget, seed, tensor, drawn.sha256, shares, recent, tuple(whole),
        tuple(map(tuple, kept)), tuple(correlation(curve, whole) for curve in kept),
    )  # fmt: skip
