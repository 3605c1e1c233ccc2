# SPDX-License-Identifier: Apache-2.0
"""Keys from stored latents, one token at a time in float64, and the arena that holds them instead."""

import math

import torch


def make_key(latent, position, head, transform):
    """rotate(norm(latent @ basis + bias)) of one token [r] of KV head `head`."""
    key = latent.double() @ transform.basis[head].cpu().double()
    if transform.bias is not None:
        key = key + transform.bias[head].cpu().double()
    if transform.norm is not None:
        key = key / torch.sqrt((key * key).mean() + transform.norm_eps) * transform.norm.cpu().double()
    turned = key.clone()
    half = 0 if transform.frequency is None else transform.frequency.shape[0]
    for i in range(half):
        angle = position * float(transform.frequency[i])
        cos, sin = math.cos(angle) * transform.rotary_scale, math.sin(angle) * transform.rotary_scale
        turned[i] = cos * key[i] - sin * key[i + half]
        turned[i + half] = cos * key[i + half] + sin * key[i]
    return turned


def make_arena_keys(key_rows, slot_position, row_start, row_len, batch, transform):
    """[C, D] float64: the keys of the live slots, zeros elsewhere."""
    keys = torch.zeros(key_rows.shape[0], transform.basis.shape[2], dtype=torch.float64)
    rows = row_len.shape[0] // max(batch, 1)
    for row, (start, length) in enumerate(zip(row_start.tolist(), row_len.tolist(), strict=False)):
        offset = 0 if transform.offset is None else int(transform.offset[row // rows])
        head = row % rows // (rows // transform.basis.shape[0])
        for slot in range(start, start + length):
            position = 0 if slot_position is None else int(slot_position[slot]) + offset
            keys[slot] = make_key(key_rows[slot].cpu(), position, head, transform)
    return keys
