# SPDX-License-Identifier: Apache-2.0
"""calibrate: texts go through the unpatched model once, and what its heads look like becomes a HeadProfile."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from uncomp.calibration import state
from uncomp.calibration.checks import refuse
from uncomp.calibration.files import clear_parts, replace_file
from uncomp.calibration.fingerprint import ModelFacts, model_hash
from uncomp.calibration.profile import TENSORS, CalibrationRun, HeadProfile
from uncomp.calibration.samples import Samples, draw
from uncomp.calibration.sums import Sums
from uncomp.calibration.watch import spectrum_of, watched, with_variance
from uncomp.entropy import REDUCTIONS, STATISTICS, WITHOUT_TOP, default_top
from uncomp.models import family_of

Progress = Callable[[str], None]
# The device is asked, and the state is written, when so many samples wait or so many seconds have passed: a read for
# every sample would leave a GPU idle until the next forward is launched.
SETTLE_SAMPLES, SETTLE_SECONDS = 8, 10.0


def calibrate(
    model: torch.nn.Module,
    tokenizer: Any,
    texts: str | Sequence[str] | torch.Tensor,
    *,
    samples: int = 100,
    seqlen: int = 4096,
    tensor: str = "query",
    rope: str = "after",
    top: int | str | None = None,
    kind: str = "truncated",
    reduce: str = "mean",
    batch_size: int = 1,
    seed: int = 42,
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> HeadProfile:
    """Measures the heads of a model over pieces of a text.

    One forward of the decoder a batch, without padding, cache or logits; the entropy is computed on the model's device
    inside the attention call and no activation is kept. Every decoder layer is measured, sliding windows included. Two
    runs with the same arguments on the same machine give the same profile; so does a run that was killed and called
    again, where `out` is given.

    Args:
        model: a causal language model of a supported family, not patched. Its mode and attention implementation are
            given back as they were.
        tokenizer: of the model; None where `texts` are tokens.
        texts: one text or several, which are joined by two newlines; or tokens, [N] int64.
        samples: pieces that are measured, at least 1.
        seqlen: tokens of a piece, BOS included where the tokenizer adds one; lowered to what the model takes.
        tensor: "query", "key", "value", or "hidden" (what leaves a layer, one entropy for all its heads).
        rope: "after", or "before": queries or keys without their rotation.
        top: eigenvalues kept: a number, "all", "elbow" (of the run's mean spectrum), or None for a quarter of them.
        kind: "truncated", "renormalized", "renyi2"; or "variance", which stands in for the entropies of the profile.
        reduce: "mean" or "max" over the query heads of a row.
        batch_size: pieces a forward.
        seed: of the starts.
        out: file of the profile. The run leaves its state in OUT.state now and then and goes on from there.
        progress: called with a line of text after every batch.
    Returns:
        the profile; also written to `out` if given.
    Raises:
        TypeError: texts that are neither strings nor tokens.
        ValueError: an argument out of its range; a text that is too short; tokens that the model does not have; a state
            of another run; NaN in the states, by sample, layer and head.
        NotImplementedError: the model's family is not known.
        OSError: `out` cannot be written.
    Source: docs/method.md "Calibration and profiles".
    """
    _check(samples=samples, seqlen=seqlen, batch_size=batch_size, seed=seed)
    for name, value, allowed in (
        ("tensor", tensor, TENSORS),
        ("rope", rope, ("after", "before")),
        ("kind", kind, STATISTICS),
        ("reduce", reduce, REDUCTIONS),
    ):
        if value not in allowed:
            raise ValueError(f"uncomp.calibrate: {name} must be one of {', '.join(allowed)}; got {value!r}")
    if rope == "before" and tensor not in ("query", "key"):
        raise ValueError(f'uncomp.calibrate: rope must be "after" for tensor {tensor}, which is never rotated')
    family, facts = family_of(model.config), facts_of(model)
    if model.config._attn_implementation == "uncomp":
        raise ValueError("uncomp.calibrate: the model is patched; call .remove() on its handle first")
    text_config = model.config.get_text_config(decoder=True)
    dim = text_config.hidden_size if tensor == "hidden" else facts.D
    kept = _top(top, dim, kind)
    longest = getattr(text_config, "max_position_embeddings", None) or seqlen
    drawn = draw(tokenizer, texts, samples, min(seqlen, longest), seed)
    _check_tokens(drawn, family.text_stack(model).get_input_embeddings().num_embeddings)
    device = next(model.parameters()).device
    sums = Sums(facts, dim, kept, kind, reduce, device)
    settings = {
        "model": str(facts) + facts.hash,
        "dtype": str(next(model.parameters()).dtype),
        "device": device.type,
        "samples": samples,
        "seqlen": drawn.seqlen,
        "seed": seed,
        "top": "elbow" if kept is None else kept,
        "kind": kind,
        "reduce": reduce,
        "tensor": tensor,
        "rope": rope,
        "batch_size": batch_size,
        "text": drawn.sha256,
    }
    path = None if out is None else _writable(out)
    if path is not None:
        state.resume(state.state_path(path), settings, sums)
    _run(model, family, drawn, sums, settings, path, progress)
    k, tables = sums.tables()
    run = CalibrationRun(samples, drawn.seqlen, seed, k, kind, {"entropy": reduce}, drawn.sha256, tensor, rope)
    profile = HeadProfile(facts, run, **tables)
    if path is not None:
        profile.save(path)
        state.state_path(path).unlink(missing_ok=True)
    return profile


def facts_of(model: torch.nn.Module) -> ModelFacts:
    """What a profile of a model says about it.

    Raises:
        NotImplementedError: the model's family is not known.
    """
    text, family = model.config.get_text_config(decoder=True), family_of(model.config)
    heads = (text.num_attention_heads, text.num_key_value_heads)
    return ModelFacts(text.model_type, text.num_hidden_layers, *heads, family.head_dim(text), model_hash(text))


def _run(
    model: Any,
    family: Any,
    drawn: Samples,
    sums: Sums,
    settings: dict[str, Any],
    path: Path | None,
    progress: Progress | None,
) -> None:
    before, start = sums.samples, time.monotonic()
    settled, last, stack = start, len(drawn.starts), family.text_stack(model)
    device = next(stack.parameters()).device
    measure = with_variance if settings["kind"] == "variance" else spectrum_of
    watch = watched(model, family, settings["tensor"], settings["rope"], measure)
    with watch as found, torch.inference_mode():
        for batch in drawn.batches(settings["batch_size"], sums.samples):
            # From pinned memory, because a copy from any other waits for the forward before.
            ids = batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch.to(device)
            stack(input_ids=ids, use_cache=False)
            sums.take(found)
            found[:] = [None] * len(found)
            done, now = sums.samples + sums.waiting, time.monotonic()
            if done == last or sums.waiting >= SETTLE_SAMPLES or now - settled >= SETTLE_SECONDS:
                sums.settle()
                if path is not None and done < last:
                    state.save(state.state_path(path), settings, sums)
                settled = time.monotonic()
            if progress is not None:
                progress(_line(done, before, last, drawn.seqlen, time.monotonic() - start))


def _line(done: int, before: int, samples: int, seqlen: int, seconds: float) -> str:
    each = seconds / (done - before)
    left = round(each * (samples - done))
    clock = f"{left // 3600}:{left % 3600 // 60:02}:{left % 60:02}" if left >= 3600 else f"{left // 60}:{left % 60:02}"
    return f"{done} of {samples} samples, {seqlen / max(each, 1e-9):.0f} tokens/s, {clock} left"


def _check(**numbers: int) -> None:
    least = {"samples": 1, "seqlen": 2, "batch_size": 1, "seed": 0}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least[name]:
            raise ValueError(f"uncomp.calibrate: {name} must be an integer of at least {least[name]}; got {value!r}")


def _check_tokens(drawn: Samples, known: int) -> None:
    """Raises ValueError for tokens without an embedding: on a GPU they would end the process's use of it."""
    ids = drawn.tokens if drawn.bos is None else torch.cat([drawn.tokens, torch.tensor([drawn.bos])])
    low, high = (int(v) for v in ids.aminmax())
    if low < 0 or high >= known:
        raise ValueError(
            f"uncomp.calibrate: tokens must lie in [0, {known}), the model's; got {low if low < 0 else high}; is the "
            "tokenizer that of the model?"
        )


def _top(top: int | str | None, dim: int, kind: str) -> int | None:
    """Eigenvalues kept; None for the elbow."""
    if kind in WITHOUT_TOP or top == "all":
        return dim
    if top == "elbow":
        return None
    kept = default_top(dim) if top is None else top
    if isinstance(kept, bool) or not isinstance(kept, int) or not 1 <= kept <= dim:
        raise ValueError(f'uncomp.calibrate: top must be an integer from 1 to {dim}, "elbow" or "all"; got {top!r}')
    return kept


def _writable(out: str | os.PathLike[str]) -> Path:
    """The path of the profile, after a file was made beside it: no run of hours may end at a folder that refuses."""
    path = Path(out)
    if path.is_dir():
        raise refuse(f'out "{path}" must be a file; it is a folder')
    if path.exists() and not path.is_file():
        raise refuse(f'out "{path}" must be a file; it is a device or a pipe')
    try:
        clear_parts(path)
        replace_file(path.with_name(f"{path.name}.try"), b"")
    except OSError as error:
        reason = error.__cause__ or error
        raise refuse(
            f'out "{path}" cannot be written: "{path.parent}" must be a folder that can be written to '
            f"({getattr(reason, 'strerror', None) or reason})"
        ) from error
    path.with_name(f"{path.name}.try").unlink(missing_ok=True)
    return path
