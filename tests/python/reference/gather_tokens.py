# SPDX-License-Identifier: Apache-2.0
"""gather_tokens, one token at a time."""

import torch


def gather_tokens(tensors, index):
    gathered = []
    for tensor in tensors:
        out = torch.zeros(*index.shape, *tensor.shape[2:], dtype=tensor.dtype)
        for b in range(index.shape[0]):
            for n in range(index.shape[1]):
                token = int(index[b, n])
                if token >= 0:
                    out[b, n] = tensor[b if tensor.shape[0] > 1 else 0, token].cpu()
        gathered.append(out)
    return gathered
