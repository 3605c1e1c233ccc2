# SPDX-License-Identifier: Apache-2.0
"""matrix_spectrum with matrix_entropy: queries of a calibration prompt and of an online profile; bare eigenvalues.

torch's eigvalsh takes matrices of this size one by one; cuSOLVER's batched solver gets finished Gram matrices.
"""

import torch
from harness import Case
from rivals import SyevBatched, compiled

from uncomp import ops


def states(i, heads, tokens, dim, dtype):
    generator = torch.Generator("cuda").manual_seed(i)
    mix = torch.randn(dim, dim, device="cuda", generator=generator) / dim**0.5
    return (torch.randn(1, heads, tokens, dim, device="cuda", generator=generator) @ mix).to(dtype)


def torch_gram(x):
    centred = x.float() - x.float().mean(dim=2, keepdim=True)
    unit = torch.nn.functional.normalize(centred, dim=3)
    gram = unit.mT @ unit
    return gram / gram.diagonal(dim1=2, dim2=3).sum(-1)[..., None, None]


def torch_entropy(x, top):
    shares = torch.linalg.eigvalsh(torch_gram(x)).flip(-1)[..., :top].clamp_min(1e-10)
    return -(shares * shares.log()).sum(-1) / torch.tensor(float(x.shape[3]), device="cuda").log()


def case(heads, tokens, dim=128, top=None, dtype=torch.bfloat16):
    top = dim // 4 if top is None else top

    def ours(i):
        x = states(i, heads, tokens, dim, dtype)
        return lambda: ops.matrix_entropy(ops.matrix_spectrum(x, top), top, dim)

    def eager(i):
        x = states(i, heads, tokens, dim, dtype)
        return lambda: torch_entropy(x, top)

    def only_gram(i):
        x = states(i, heads, tokens, dim, dtype)
        return lambda: torch_gram(x)

    def batched_solver(i):
        return SyevBatched(torch_gram(states(i, heads, tokens, dim, dtype))[0].contiguous())

    moved = heads * tokens * dim * dtype.itemsize + heads * (2 * top + 2) * 4
    rivals = {
        "torch eager": eager,
        "torch eager without eigvalsh": only_gram,
        "torch.compile without eigvalsh": compiled(only_gram),
        "cuSOLVER XsyevBatched alone": batched_solver,
    }
    shape = f"{heads}x{tokens} D {dim} top {top}"
    return Case("matrix_spectrum", shape, str(dtype)[6:], moved, ours, rivals)


def cases() -> list[Case]:
    """With 129 tokens nearly all of the time goes to the eigenvalues."""
    return [
        case(32, 129),
        case(256, 129, top=128),
        case(256, 129),
        case(32, 4096),
        case(32, 32768),
        case(8, 32768),
        case(8, 131072),
        case(8, 4096, dim=256),
        case(32, 4096, dim=64),
    ]
