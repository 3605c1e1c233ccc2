# SPDX-License-Identifier: Apache-2.0
"""matrix_entropy: spectra of one layer and of all layers of a calibration run."""

import math

import torch
from harness import Case
from rivals import compiled

from uncomp import ops


def case(rows, width, dim):
    def spectrum(i):
        generator = torch.Generator("cuda").manual_seed(i)
        x = torch.rand(rows, width, device="cuda", generator=generator).sort(-1, descending=True).values
        return x / x.sum(-1, keepdim=True)

    def ours(i):
        x = spectrum(i)
        return lambda: ops.matrix_entropy(x, width, dim)

    def eager(i):
        x = spectrum(i)

        def run():
            nats = torch.special.entr(x).sum(-1)
            return nats / math.log(dim), nats.exp()

        return run

    rivals = {"torch eager": eager, "torch.compile": compiled(eager)}
    return Case("matrix_entropy", f"{rows}x{width}", "float32", 4 * rows * (width + 2), ours, rivals)


def cases() -> list[Case]:
    return [case(32, 32, 128), case(32 * 32, 128, 128)]
