# SPDX-License-Identifier: Apache-2.0
"""Runs the code cells of a notebook in this process, as `python notebook.py FILE [FOLDER]`, without Jupyter.

What the last expression of a cell shows is made: a figure as PNG, written to FOLDER if given, else the repr.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path


def run(path: Path, folder: Path | None = None) -> int:
    """Runs all cells in one namespace; returns how many figures were shown."""
    namespace: dict = {"__name__": "__main__"}
    figures = 0
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] != "code":
            continue
        name = f"{path.name}, cell {number}"
        tree = ast.parse("".join(cell["source"]), name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), namespace)
        value = eval(compile(ast.Expression(last.value), name, "eval"), namespace) if last is not None else None
        if hasattr(value, "_repr_png_"):
            picture = value._repr_png_()
            figures += 1
            if folder is not None:
                (folder / f"{path.stem}-{figures}.png").write_bytes(picture)
        elif value is not None:
            print(repr(value))
    return figures


if __name__ == "__main__":
    print(run(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None), "figures")
