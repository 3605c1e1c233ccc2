# SPDX-License-Identifier: Apache-2.0
"""append_kv_ on rows that are Python lists of (key, value, position)."""


def append_kv(rows, key, value, position, *, first=None, length=None):
    """Appends the real new tokens of each row's sequence to its list."""
    batch, num_heads, tokens = key.shape[:3]
    for number, row in enumerate(rows):
        rows_of_sequence = len(rows) // batch
        sequence, local = divmod(number, rows_of_sequence)
        head = local * num_heads // rows_of_sequence
        begin = 0 if first is None else int(first[sequence])
        end = tokens if length is None else begin + int(length[sequence])
        for t in range(begin, end):
            row.append((key[sequence, head, t].cpu(), value[sequence, head, t].cpu(), int(position[sequence, t])))
