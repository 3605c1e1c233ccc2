# SPDX-License-Identifier: Apache-2.0
"""What configurations share: fields that name themselves in errors, and reading from plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class CheckedFields:
    """Base of frozen dataclasses whose fields are checked on construction."""

    @classmethod
    def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
        """What `to_dict` wrote; ValueError for a key that is no field."""
        names = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown:
            raise ValueError(
                f"uncomp.{cls.__name__}: unknown field {', '.join(unknown)}; known: {', '.join(sorted(names))}"
            )
        return cls(**values)

    def _require(self, name: str, ok: bool, wanted: str) -> None:
        if not ok:
            raise ValueError(f"uncomp.{type(self).__name__}: {name} must be {wanted}; got {getattr(self, name)!r}")
