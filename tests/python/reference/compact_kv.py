# SPDX-License-Identifier: Apache-2.0
"""compact_kv, one token at a time, as lists of tokens per row."""


def compact_kv(key, value, index, index_start, row_start, capacity, *, position=None, first=None, source_start=None):
    """Keys, values and positions of every row, as lists."""
    rows = []
    for row in range(len(index_start) - 1):
        kept = index[int(index_start[row]) : int(index_start[row + 1])].tolist()
        if source_start is not None:
            start = int(source_start[row])
            keys, values = key[start:], value[start:]
            positions = position[start:]
        else:
            batch, num_heads = key.shape[:2]
            rows_of_sequence = (len(index_start) - 1) // batch
            sequence, local = divmod(row, rows_of_sequence)
            head = local * num_heads // rows_of_sequence
            start = 0 if first is None else int(first[sequence])
            keys, values = key[sequence, head, start:], value[sequence, head, start:]
            positions = range(keys.shape[0]) if position is None else position[sequence, start:]
        rows.append(([keys[t].cpu() for t in kept], [values[t].cpu() for t in kept], [int(positions[t]) for t in kept]))
    return rows
