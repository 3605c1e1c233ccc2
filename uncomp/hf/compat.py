# SPDX-License-Identifier: Apache-2.0
"""The one file that knows versions of transformers: it reads signatures and refuses what it does not know."""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

OLDEST = (5, 10, 1)
BELOW = (6, 0, 0)
NEWEST_TESTED = (5, 23)
RANGE = "transformers>=5.10.1,<6"

# Parameters after `self` or `cls`; a member with others is one that this package was not written for.
_LAYER = {
    "update": "key_states, value_states, *args, **kwargs",
    "get_mask_sizes": "query_length",
    "lazy_initialization": "key_states, value_states",
    "get_seq_length": "",
}
_REGISTER = "key, value"
_FORWARD = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"uncomp.hf: transformers could not be imported ({error}); pip install '{RANGE}' accelerate gguf"
        ) from error
    return transformers


def _parse(text: str) -> tuple[int, int, int]:
    numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(n or 0) for n in numbers.groups()) if numbers else (0, 0, 0)


@functools.cache
def _accept(text: str) -> tuple[int, int, int]:
    """The parsed version, refused outside the range; warns once above the newest tested release."""
    found = _parse(text)
    if not OLDEST <= found < BELOW:
        raise ImportError(f"uncomp.hf: transformers {text} is not supported; pip install '{RANGE}'")
    if found[:2] > NEWEST_TESTED:
        newest = ".".join(map(str, NEWEST_TESTED))
        warnings.warn(f"uncomp.hf: transformers {text} is newer than {newest}, the newest tested", stacklevel=4)
    return found


def version() -> tuple[int, int, int]:
    """Version of the installed transformers as (major, minor, patch).

    Raises:
        ImportError: transformers is missing, or outside the supported range.
    """
    return _accept(_transformers().__version__)


def _parameters(function: Callable) -> str:
    """Names and kinds of the parameters after self; defaults and annotations may change freely."""
    prefix = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(prefix.get(p.kind, "") + p.name for p in parameters if p.name != "self")


def _unknown(member: str, found: str, wanted: str) -> NotImplementedError:
    return NotImplementedError(
        f"uncomp.hf: transformers {_transformers().__version__} has an unknown {member}: wanted {wanted}, "
        f"got {found}; install a release from 5.10.1 to {'.'.join(map(str, NEWEST_TESTED))}"
    )


def _verify(owner: type, member: str, wanted: str) -> None:
    function = getattr(owner, member, None)
    found = _parameters(function) if callable(function) else None
    if found != wanted:
        got = "nothing" if found is None else f"({found})"
        raise _unknown(f"{owner.__name__}.{member}", got, f"({wanted})")


@functools.cache
def check() -> None:
    """Verifies, once a process, every member of transformers that this package builds on.

    Raises:
        ImportError: transformers is missing, or outside the supported range.
        NotImplementedError: a member is missing or has other parameters; names the version and the member.
    """
    version()
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.cache_utils import CacheLayerMixin, DynamicLayer
    from transformers.models.llama.modeling_llama import LlamaModel

    for owner in (CacheLayerMixin, DynamicLayer):
        for member, wanted in _LAYER.items():
            _verify(owner, member, wanted)
    for owner in (AttentionInterface, AttentionMaskInterface):
        _verify(owner, "register", _REGISTER)
    found = tuple(inspect.signature(LlamaModel.forward).parameters)
    missing = [name for name in _FORWARD if name not in found]
    if missing or "cache_position" in found:
        wanted = ", ".join(_FORWARD) + " and no cache_position"
        raise _unknown("LlamaModel.forward", f"({', '.join(found[1:])})", wanted)


def has_chunked_turns() -> bool:
    """Whether a chunked prefill on a cache that already holds tokens gets the right positions (from 5.21)."""
    return version() >= (5, 21, 0)


def crop_target(n: Any, length: int) -> int:
    """New length that `crop(n)` asks for under the installed transformers.

    A negative n removes -n tokens in every release. Zero empties the layer below 5.14 and changes nothing since. A
    positive n is the final length until 5.19 and is refused from 5.20.

    Args:
        n: int or 0-d integer tensor, tokens.
        length: present length, tokens.
    Returns:
        Length after the crop, 0 to length.
    Raises:
        ValueError: n is positive under transformers 5.20 or newer.
    """
    n, found = int(n), version()
    if n < 0:
        return max(0, length + n)
    if n == 0 and found >= (5, 14, 0):
        return length
    if found >= (5, 20, 0):
        raise ValueError(f"uncomp.hf: crop takes the negative number of tokens to remove; got {n}")
    return min(n, length)


def gguf_options() -> dict[str, Any]:
    """Keywords that make `from_pretrained(gguf_file=...)` unpack every weight.

    Without them releases that can keep weights packed do so where they find a kernel, or fetch one from the hub.
    """
    version()
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
