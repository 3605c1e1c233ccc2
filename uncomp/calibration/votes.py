# SPDX-License-Identifier: Apache-2.0
"""Vote tables in the form that the paper's authors published theirs: read, written, counted, and made from counts.

A table belongs to one layer: a CSV file without a header, one row a sample, one column a head, each entry the group
(label) that the head fell into in that sample; 0 = lowest entropy. A folder holds one table a layer. Sums over the
samples, votes[layer][head][label], fit in one JSON file. A profile gives its own for any G by `HeadProfile.votes`.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uncomp import grouping
from uncomp.whole_files import write_whole

TABLE = "head_type_search_layer{}.csv"  # one layer's table in a folder, as the authors name it


def _refuse(text: str) -> ValueError:
    return ValueError(f"uncomp.calibration: {text}")


def _write(texts: dict[Path, str]) -> None:
    """Writes all files or none.

    Raises:
        OSError: the folder cannot be written or the disk is full; begins with "uncomp.calibration". Nothing is left.
    """
    try:
        write_whole({path: text.encode("utf-8") for path, text in texts.items()})
    except OSError as error:
        first = next(iter(texts))
        where = first if len(texts) == 1 else first.parent
        raise type(error)(f'uncomp.calibration: "{where}" cannot be written ({error.strerror or error})') from error


# ---- one layer's table
def read_table(path: str | os.PathLike[str]) -> list[list[int]]:
    """Labels of one layer's table.

    Returns:
        [samples][H] labels, at least one sample.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, no rows, rows of different lengths, an entry that is no whole number from 0; the text
            names the file and the line.
    """
    try:
        lines = list(csv.reader(io.StringIO(Path(path).read_bytes().decode("utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise _refuse(f"{path} must be a CSV file in UTF-8; {error}") from error
    table: list[list[int]] = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        wrong = [entry for entry in line if not re.fullmatch(r"\s*[0-9]{1,9}\s*", entry)]
        if wrong:
            raise _refuse(f"{path} must hold group ids, whole numbers from 0; got {wrong[0]!r} in line {number}")
        if table and len(line) != len(table[0]):
            raise _refuse(f"{path} must have {len(table[0])} columns in every row; line {number} has {len(line)}")
        table.append([int(entry) for entry in line])
    if not table:
        raise _refuse(f"{path} must hold at least one row, a sample; got an empty file")
    return table


def _table_text(table: Sequence[Sequence[int]]) -> str:
    return "".join(",".join(map(str, row)) + "\r\n" for row in table)


def write_table(path: str | os.PathLike[str], table: Sequence[Sequence[int]]) -> None:
    """Writes [samples][H] labels as one layer's table; a reader sees the old file or the whole new one.

    Raises:
        OSError: the folder cannot be written.
    """
    _write({Path(path): _table_text(table)})


def count_votes(table: Sequence[Sequence[int]], num_groups: int | None = None) -> list[list[int]]:
    """Votes V[head][label] of one layer: in how many samples each head carried each label.

    Args:
        table: [samples][H] labels.
        num_groups: G; None takes the largest label and one.
    Returns:
        [H][G].
    Raises:
        ValueError: no sample, rows of different lengths, a label outside 0 .. G - 1.
    Source: docs/method.md "Calibration and profiles".
    """
    heads = {len(row) for row in table}
    if len(heads) != 1 or not max(heads):
        raise _refuse(f"table must be [samples][H] with one H; got rows of {sorted(heads)} heads")
    most = max(map(max, table))
    num_groups = most + 1 if num_groups is None else num_groups
    if min(map(min, table)) < 0 or most >= num_groups:
        raise _refuse(f"table must hold labels from 0 to {num_groups - 1}; got {most if most >= num_groups else '< 0'}")
    votes = [[0] * num_groups for _ in table[0]]
    for row in table:
        for head, label in enumerate(row):
            votes[head][label] += 1
    return votes


# ---- from counts back to a table
def table_from_votes(votes: Sequence[Sequence[int]]) -> list[list[int]]:
    """A table that has these votes, in which the groups of every sample have the sizes that they have on average.

    Votes are cut, in the order of the labels, into as many slots as there are heads, each as full as there are samples:
    heads by slots is then a matrix of equal sums, which is a sum of permutations (Birkhoff), and each permutation gives
    one slot to each head. Which sample was which is not in the votes, so the rows stand in an arbitrary, fixed order.

    Args:
        votes: [H][G]; every head has one vote a sample. From the rank counts of a HeadProfile: grouping.label_votes.
    Returns:
        [samples][H] labels.
    Raises:
        ValueError: heads with different numbers of votes or labels, or with none.
    Source: docs/method.md "Calibration and profiles".
    """
    totals, widths = {sum(row) for row in votes}, {len(row) for row in votes}
    if len(totals) != 1 or len(widths) != 1 or not max(totals) or min(map(min, votes)) < 0:
        raise _refuse(f"votes must be [H][G] with one vote a sample for every head; got sums {sorted(totals)[:4]}")
    samples, heads = totals.pop(), len(votes)
    cells: list[list[list[int]]] = [[[] for _ in range(heads)] for _ in range(heads)]  # labels, highest first
    filled = 0
    for label in range(widths.pop()):
        for head, row in enumerate(votes):
            left = row[label]
            while left:
                here = min(left, samples - filled % samples)
                cells[head][filled // samples][:0] = [label] * here
                filled, left = filled + here, left - here
    slot_of: list[int | None] = [None] * heads
    head_in: list[int | None] = [None] * heads

    def seek(head: int, tried: set[int]) -> bool:
        """Gives a head a slot that still has votes of it, if need be by moving another head."""
        for slot in range(heads):
            if cells[head][slot] and slot not in tried:
                tried.add(slot)
                other = head_in[slot]
                if other is None or seek(other, tried):
                    slot_of[head], head_in[slot] = slot, head
                    return True
        return False

    table = []
    for _ in range(samples):
        for head in range(heads):
            if slot_of[head] is None:
                seek(head, set())  # equal sums: there always is one
        table.append([cells[head][slot].pop() for head, slot in enumerate(slot_of)])
        for head, slot in enumerate(slot_of):
            if not cells[head][slot]:
                slot_of[head] = head_in[slot] = None
    return table


# ---- all layers
@dataclass(frozen=True)
class Votes:
    """Votes of all layers of a model, counted for one number of groups.

    Fields:
        votes: [L][H][G], in how many samples a head fell into each group; group 0 = lowest entropy.
        source: where they come from, in words.
    Raises:
        ValueError: another shape, negative or broken numbers, or heads of a layer with different numbers of votes.
    """

    votes: tuple[tuple[tuple[int, ...], ...], ...]
    source: str = ""

    def __post_init__(self) -> None:
        """Turns lists into tuples and checks every number."""
        try:
            votes = tuple(tuple(tuple(row) for row in layer) for layer in self.votes)
        except TypeError:
            raise _refuse("votes must be [layers][heads][labels]; got something that is not nested like this") from None
        object.__setattr__(self, "votes", votes)
        shapes = {(len(layer), len(row)) for layer in votes for row in layer}
        if len(shapes) != 1 or not all(votes) or not all(shapes.copy().pop()):
            raise _refuse(f"votes must be [L][H][G] with one H and one G; got layers and rows of sizes {shapes or 0}")
        for layer, rows in enumerate(votes):
            bad = [v for row in rows for v in row if isinstance(v, bool) or not isinstance(v, int) or v < 0]
            if bad or len({sum(row) for row in rows}) != 1 or not sum(rows[0]):
                raise _refuse(f"votes of layer {layer} must be whole numbers, for every head one vote a sample")

    @property
    def samples(self) -> list[int]:
        """[L] samples of each layer."""
        return [sum(layer[0]) for layer in self.votes]

    def group_ids(self) -> list[list[int]]:
        """[L][H] group of every head, 0 = lowest entropy, in groups of the sizes that the votes have.

        Source: docs/method.md "Calibration and profiles".
        """
        return [
            grouping.group_ids(grouping.groups_from_labels(layer, self._sizes(layer, samples)))
            for layer, samples in zip(self.votes, self.samples, strict=True)
        ]

    @staticmethod
    def _sizes(layer: Sequence[Sequence[int]], samples: int) -> list[int] | None:
        """Heads of each group in a sample; None, the usual sizes, where samples differed in them."""
        totals = [sum(column) for column in zip(*layer, strict=True)]
        return None if any(total % samples for total in totals) else [total // samples for total in totals]

    # ---- files
    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Votes:
        """Reads a JSON file of votes, or a folder of tables of the layers 0, 1, ... without a gap.

        Raises:
            FileNotFoundError: no such file, or a folder without the table of layer 0.
            ValueError: a file that is not whole, or not votes; layers that are missing or differ; the text names it.
        """
        path = Path(path)
        if path.is_dir():
            return cls._load_tables(path)
        try:
            data: Any = json.loads(path.read_bytes())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise _refuse(f"{path} is not a whole JSON file ({error})") from error
        if not isinstance(data, dict) or not isinstance(data.get("votes"), list):
            raise _refuse(f"{path} is not a file of votes: it has no list named votes")
        try:
            made = cls(data["votes"], str(data.get("source", "")))
        except ValueError as error:
            raise ValueError(f"{error} (in {path})") from error
        said = [data.get(name, is_) for name, is_ in made._facts().items()]
        if said != list(made._facts().values()):
            raise _refuse(f"{path} must hold what it says: {', '.join(made._facts())} differ from its votes")
        return made

    @classmethod
    def _load_tables(cls, folder: Path) -> Votes:
        pattern = re.escape(TABLE).replace(r"\{\}", r"(\d+)")
        found = {int(m[1]) for name in os.listdir(folder) if (m := re.fullmatch(pattern, name))}
        missing = sorted(set(range(max(found, default=0) + 1)) - found)
        if missing:
            raise FileNotFoundError(f"uncomp.calibration: {folder} must hold {TABLE.format(missing[0])}; it is missing")
        tables = [read_table(folder / TABLE.format(layer)) for layer in range(len(found))]
        num_groups = 1 + max(label for table in tables for row in table for label in row)
        return cls(tuple(count_votes(table, num_groups) for table in tables), str(folder.name))

    def _facts(self) -> dict[str, Any]:
        votes = self.votes
        sizes = {"layers": len(votes), "heads": len(votes[0]), "groups": len(votes[0][0])}
        return {**sizes, "samples_per_layer": self.samples}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the votes as one JSON file; a reader sees the old file or the whole new one.

        Raises:
            OSError: the folder cannot be written.
        """
        data = {"source": self.source, **self._facts(), "votes": self.votes}
        _write({Path(path): json.dumps(data, separators=(",", ":")) + "\n"})

    def save_tables(self, folder: str | os.PathLike[str]) -> None:
        """Writes one table a layer into a folder, which is made if missing. See table_from_votes.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = Path(folder)
        texts = {
            folder / TABLE.format(layer): _table_text(table_from_votes(rows)) for layer, rows in enumerate(self.votes)
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise type(error)(f'uncomp.calibration: "{folder}" cannot be made ({error.strerror or error})') from error
        _write(texts)
