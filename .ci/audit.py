"""Ask PyPI for known weaknesses of the pinned requirements, and say which of them it could not look up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def audited() -> list[dict[str, Any]] | None:
    """pip-audit's answer per requirement; None where it reached nobody."""
    files = [word for path in sorted(ROOT.glob("requirements*.txt")) for word in ("-r", str(path))]
    command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--format", "json", *files]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    if not run.stdout:
        sys.stderr.write(run.stderr.strip().splitlines()[-1] + "\n")
        return None
    found: list[dict[str, Any]] = json.loads(run.stdout)["dependencies"]
    return found


def main() -> int:
    """Print the weaknesses and the gaps; returns 1 for a weakness, 2 where something could not be looked up."""
    answers = audited()
    if answers is None:
        sys.stdout.write("NOT AUDITED: nothing could be looked up, see above\n")
        return 2
    weak = [
        (one["name"], weakness["id"], weakness["fix_versions"]) for one in answers for weakness in one.get("vulns", ())
    ]
    unknown = [one["name"] for one in answers if "skip_reason" in one]
    sys.stdout.writelines(
        f"{name}: {weakness}, fixed in {', '.join(fixed) or 'no version'}\n" for name, weakness, fixed in weak
    )
    sys.stdout.write(f"{len(weak)} known weaknesses in {len(answers) - len(unknown)} of {len(answers)} packages\n")
    if unknown:
        sys.stdout.write(f"NOT AUDITED: PyPI has no answer for {', '.join(unknown)}\n")
    return 1 if weak else 2 * bool(unknown)


if __name__ == "__main__":
    raise SystemExit(main())
