# SPDX-License-Identifier: Apache-2.0
"""Keys from stored latents, one row at a time in float64, and the arena that holds them instead."""

import torch


def make_keys(latents, position, head, transform):
    """rotate(norm(latents @ basis + bias)) of tokens [n, r] of KV head `head` at positions [n]."""
    keys = latents.double() @ transform.basis[head].cpu().double()
    if transform.bias is not None:
        keys = keys + transform.bias[head].cpu().double()
    if transform.norm is not None:
        mean_square = (keys * keys).mean(-1, keepdim=True)
        keys = keys / torch.sqrt(mean_square + transform.norm_eps) * transform.norm.cpu().double()
    if transform.frequency is None:
        return keys
    half = transform.frequency.shape[0]
    angle = position.double()[:, None] * transform.frequency.cpu().double()
    cos, sin = torch.cos(angle) * transform.rotary_scale, torch.sin(angle) * transform.rotary_scale
    x, y, rest = keys[:, :half], keys[:, half : 2 * half], keys[:, 2 * half :]
    return torch.cat([cos * x - sin * y, cos * y + sin * x, rest], 1)


def make_arena_keys(key_rows, slot_position, row_start, row_len, batch, transform):
    """[C, D] float64: the keys of the live slots, zeros elsewhere."""
    keys = torch.zeros(key_rows.shape[0], transform.basis.shape[2], dtype=torch.float64)
    rows = row_len.shape[0] // max(batch, 1)
    for row, (start, length) in enumerate(zip(row_start.tolist(), row_len.tolist(), strict=False)):
        live = slice(start, start + length)
        offset = 0 if transform.offset is None else int(transform.offset[row // rows])
        position = torch.zeros(length) if slot_position is None else slot_position[live].cpu().long() + offset
        head = row % rows // (rows // transform.basis.shape[0])
        keys[live] = make_keys(key_rows[live].cpu(), position, head, transform)
    return keys
