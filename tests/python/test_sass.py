# SPDX-License-Identifier: Apache-2.0
"""Machine code of the built module: the instructions that the kernels claim, and no register in memory.

Needs cuobjdump of the CUDA toolkit and a build with kernels.
"""

import collections
import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import uncomp
from uncomp import _extension

pytestmark = [
    pytest.mark.skipif(shutil.which("cuobjdump") is None, reason="cuobjdump is not installed"),
    pytest.mark.skipif(not uncomp.build_info()["cuda"], reason="built without CUDA kernels"),
]

MULTIPLY = r"\b(HMMA|HGMMA)\b"  # tensor cores, half precision in, fp32 out
WARPGROUPS = r"\bHGMMA\b"  # four warps at once, operands in shared memory; sm_90a
COPY = r"\bLDGSTS\b"  # global to shared memory without registers
TENSOR_COPY = r"\bUTMALDG\b"
WIDE_LOAD = r"\bLDG\.E\.[\w.]*128"
WIDE_STORE = r"\bSTG\.E\.[\w.]*128"

# Begin of a kernel's name, with the begin of its half-precision types -> what its machine code must hold.
CLAIMS = {
    "split_kernel<__": [MULTIPLY, COPY],
    "latent_split_kernel<__": [MULTIPLY, COPY],
    "latent_split_kernel<__nv_bfloat16, uncomp::kernels::WarpgroupBlock": [WARPGROUPS, COPY],
    "evict_attend_kernel<__": [MULTIPLY, COPY],
    "tiles_kernel<__": [MULTIPLY, COPY],
    "score_pass_kernel<__": [MULTIPLY, COPY],
    "lse_pass_kernel<__": [MULTIPLY, COPY],
    "vote_pass_kernel<__": [MULTIPLY, COPY],
    "warpgroup_kernel<__": [WARPGROUPS, TENSOR_COPY],
    "stream_lse_kernel<__": [WARPGROUPS, COPY],
    "stream_scores_kernel<__": [WARPGROUPS, COPY],
    "stream_gram_kernel": [WARPGROUPS, COPY],
    "gram_kernel": [MULTIPLY, WIDE_LOAD],
    "compact_kv_kernel<uint4": [WIDE_LOAD, WIDE_STORE],
    "append_kv_kernel<uint4": [WIDE_LOAD, WIDE_STORE],
    "gather_tokens_kernel": [WIDE_LOAD, WIDE_STORE],
}
LOCAL = re.compile(r"\b(LDL|STL)\b")  # spills and arrays with run-time indices


@functools.cache
def kernels() -> dict[str, collections.Counter]:
    """Demangled name -> opcodes with their modifiers, of every kernel of every architecture in the module."""
    module = Path(_extension._C.__file__)
    text = subprocess.run(["cuobjdump", "-sass", str(module)], capture_output=True, text=True, check=True).stdout
    names = {}
    opcodes = None
    for line in text.splitlines():
        if "Function :" in line:
            opcodes = names.setdefault(line.split("Function :")[1].strip(), collections.Counter())
        elif opcodes is not None and (found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)):
            opcodes[found[1]] += 1
    demangler = shutil.which("cu++filt") or shutil.which("c++filt")
    if demangler is None:
        pytest.skip("neither cu++filt nor c++filt is installed")
    mangled = list(names)
    plain = subprocess.run([demangler], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    return {f"{readable} [{name}]": names[name] for name, readable in zip(mangled, plain.splitlines(), strict=True)}


def test_no_kernel_keeps_registers_in_memory():
    found = {name: [op for op in ops if LOCAL.search(op)] for name, ops in kernels().items()}
    assert len(found) > 50
    assert {name: ops for name, ops in found.items() if ops} == {}


@pytest.mark.parametrize("part", sorted(CLAIMS))
def test_instructions_that_a_kernel_claims(part):
    mine = {name: " ".join(ops) for name, ops in kernels().items() if re.search(rf"\b{re.escape(part)}", name)}
    if WARPGROUPS in CLAIMS[part] and "90a" not in uncomp.build_info()["cuda_archs"]:
        pytest.skip("built without sm_90a")
    assert mine, f"no kernel has {part!r} in its name: {sorted(kernels())}"
    for name, ops in mine.items():
        for claim in CLAIMS[part]:
            assert re.search(claim, ops), f"{name} has no {claim}"
