# SPDX-License-Identifier: Apache-2.0
"""Compresses the key/value cache of language models head by head, by the information each head carries."""

from typing import TYPE_CHECKING

from uncomp import ops, policies
from uncomp._extension import build_info, limits, raise_device_errors, warmup
from uncomp._version import __version__
from uncomp.calibration.profile import HeadProfile
from uncomp.config import UncompConfig, known_policies
from uncomp.policies import Policy, register_policy
from uncomp.prefill import PrefillPruning
from uncomp.report import cache_stats

if TYPE_CHECKING:
    from uncomp import lorc
    from uncomp.calibration.collect import calibrate
    from uncomp.hf.attention import UncompCache
    from uncomp.layer_merge import merge_retrieval_layer
    from uncomp.patching import PatchHandle, generate, patch

__all__ = [
    "HeadProfile",
    "PatchHandle",
    "Policy",
    "PrefillPruning",
    "UncompCache",
    "UncompConfig",
    "__version__",
    "build_info",
    "cache_stats",
    "calibrate",
    "generate",
    "known_policies",
    "limits",
    "lorc",
    "merge_retrieval_layer",
    "ops",
    "patch",
    "policies",
    "raise_device_errors",
    "register_policy",
    "warmup",
]

_NEEDS_TRANSFORMERS = {
    "UncompCache": "uncomp.hf.attention",
    "PatchHandle": "uncomp.patching",
    "calibrate": "uncomp.calibration.collect",
    "generate": "uncomp.patching",
    "merge_retrieval_layer": "uncomp.layer_merge",
    "patch": "uncomp.patching",
    "lorc": "uncomp.lorc",
}


def __getattr__(name: str):
    """Loads what needs transformers at first use, so that `import uncomp` does not import it."""
    if name not in _NEEDS_TRANSFORMERS:
        raise AttributeError(f"module 'uncomp' has no attribute {name!r}")
    import importlib

    from uncomp.hf import compat

    compat.check()  # a release that is not supported is refused in one line, before its modules are imported
    found = importlib.import_module(_NEEDS_TRANSFORMERS[name])
    return found if found.__name__ == f"uncomp.{name}" else getattr(found, name)
