# SPDX-License-Identifier: Apache-2.0
"""Prints where torch, Python and pybind11 keep headers and libraries, one KEY=value a line."""

import importlib.util
import os
import re
import sys
import sysconfig
from pathlib import Path

MINIMUM = (2, 11)


def fail(text):
    """Ends with one line of what to install."""
    sys.exit(f"uncomp: {text}")


# torch is found, not imported: that is quicker, and where we only build, its CUDA libraries may be absent.
spec = importlib.util.find_spec("torch")
if spec is None or not spec.submodule_search_locations:
    fail(f"torch is missing in {sys.prefix}: install torch>={MINIMUM[0]}.{MINIMUM[1]} first")
root = Path(spec.submodule_search_locations[0])
version = re.search(r"__version__ = ['\"]([^'\"]+)", (root / "version.py").read_text())[1]
if tuple(int(x) for x in version.split("+")[0].split(".")[:2]) < MINIMUM:
    fail(f"torch {version} is too old: install torch>={MINIMUM[0]}.{MINIMUM[1]}")

# In an isolated build pybind11 lives beside the build tools, not beside torch, and setup.py says where.
pybind11_include = os.environ.get("UNCOMP_PYBIND11_INCLUDE")
if not pybind11_include:
    try:
        import pybind11
    except ImportError:
        fail(f"pybind11 is missing in {sys.executable}: install pybind11>=3,<4")
    pybind11_include = pybind11.get_include()
found = re.search(r"VERSION_MAJOR (\d+)", (Path(pybind11_include) / "pybind11/detail/common.h").read_text())
if not found or int(found[1]) < 3:
    fail(f"pybind11 in {pybind11_include} is too old: install pybind11>=3,<4")

include = root / "include"
print(f"TORCH_VERSION={version}")
print(f"TORCH_INCLUDES={include}|{include / 'torch' / 'csrc' / 'api' / 'include'}")
print(f"TORCH_LIB={root / 'lib'}")
print(f"TORCH_HAS_CUDA={int((root / 'lib' / 'libtorch_cuda.so').exists())}")
print(f"PYTHON_INCLUDE={sysconfig.get_paths()['include']}")
print(f"PYBIND11_INCLUDE={pybind11_include}")
print(f"EXT_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}")
