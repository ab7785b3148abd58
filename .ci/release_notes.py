"""Print the changelog's section of a version: `python .ci/release_notes.py 0.1.0`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

CHANGELOG = Path(__file__).parent.parent / "CHANGELOG.md"


def notes(version: str) -> str:
    """The text between a version's heading and the next one."""
    section = re.search(
        rf"^## \[{re.escape(version)}\].*?\n(.*?)(?=^## |\Z)", CHANGELOG.read_text(encoding="utf-8"), re.S | re.M
    )
    if section is None:
        raise SystemExit(f"CHANGELOG.md has no section [{version}]")
    return section[1].strip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(notes(sys.argv[1]))
