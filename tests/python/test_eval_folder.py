# SPDX-License-Identifier: Apache-2.0
"""What a run's folder says of itself."""

import re

from uncomp.eval import folder


def test_the_commit_is_what_is_named_or_gits(monkeypatch):
    monkeypatch.delenv("UNCOMP_COMMIT", raising=False)
    found = folder.commit()
    assert found is None or re.fullmatch(r"[\w.-]*[0-9a-f]{7,}(-dirty)?", found)
    monkeypatch.setenv("UNCOMP_COMMIT", "0123abc")
    assert folder.commit() == "0123abc"
