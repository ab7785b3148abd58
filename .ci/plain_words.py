"""Find words that read as if translated, in code, messages and documents; `make lint` and pre-commit run it.

`WORDS` says what to write instead. A line that means such a word literally goes to `plain_words_allowed.txt`.
"""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALLOWED = Path(__file__).with_name("plain_words_allowed.txt")
CHECKED = ("*.py", "*.j2", "*.md", "*.yaml", "*.yml", "*.ipynb", "*.toml", "*.html", "*.txt", "Makefile")
OWN = (".ci/plain_words.py", ".ci/plain_words_allowed.txt", "tests/test_words.py")
EVERYWHERE = True  # True checks all files, False those of DONE
DONE = (
    ".ci/*",
    ".github/*",
    "README*.md",
    "benchmarks/*",
    "configs/*",
    "docs/*/[!k]*.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Makefile",
    "ebr_finetune.py",
    "ebr_lib/*/config.py",
    "ebr_lib/__*.py",
    "ebr_lib/cli.py",
    "ebr_lib/config.py",
    "ebr_lib/data/*",
    "ebr_lib/errors.py",
    "ebr_lib/evaluate/*",
    "ebr_lib/extras.py",
    "ebr_lib/index/*",
    "ebr_lib/inference/*",
    "ebr_lib/knobs/*",
    "ebr_lib/metrics.py",
    "ebr_lib/model/*",
    "ebr_lib/notebook.py",
    "ebr_lib/tables.py",
    "ebr_lib/visualize/*",
    "pyproject.toml",
    "requirements*.txt",
    "tests/conftest.py",
    "tests/data/*",
    "tests/evaluate/*",
    "tests/index/*",
    "tests/inference/*",
    "tests/model/*",
    "tests/test_benchmarks.py",
    "tests/test_docs.py",
    "tests/test_guides.py",
    "tests/test_moving.py",
    "tests/test_knobs.py",
    "tests/test_package.py",
    "tests/test_security.py",
    "tests/test_logs.py",
    "tests/test_metrics.py",
    "tests/test_notebook.py",
    "tests/test_structure.py",
    "tests/test_tables.py",
    "tests/visualize/*",
)

_COUNT = r"(an?|one|two|\d+|[Tt]okens|[Pp]airs|[Bb]atches|[Rr]ows|[Tt]exts|[Bb]ytes)"
_NOUN = r"((?!(?:of|in|from|on|is|as|that|without|with|for|to|at|by|and|or|not|share)\b)\w+ )?"
_UNIT = (
    r"(actor|batch|column|core|device|epoch|file|GPU|kind|label|line|machine|pair|part|process|processor|query|row|run"
    r"|second|shard|side|stage|step|subject|text|token|window)"
)
WORDS = {
    r"told": "say who does it: gives, sets, logs, warns, reports",
    r"stead": "instead, replace",
    r"anew": "again, each time",
    r"mend(s|ed|ing)?": "fix, error",
    r"behind": "after",
    r"(?<!here[ _])(is|are|was|were) no(?! longer| more)": "is not a, has no",
    r"so many": "at most, the number of",
    r"for want of": "for lack of, probably out of",
    r"bears?": "has, allows",
    r"what (holds?|tells?|stands?|knows?|bears)": "name the thing",
    r"but for": "except",
    r"hang(s|ing)? on": "depend on, belong to",
    r"has it that": "say",
    r"upon": "on",
    r"void": "invalid",
    rf"{_COUNT} {_NOUN}an? {_UNIT}\b(?! is| of)": "per",
}
_IN_NAMES = [re.sub(r" (?![_\]])", "[ _]", word) for word in WORDS]  # of tests, too
_FORBIDDEN = re.compile("|".join(rf"(?P<w{i}>(?<![A-Za-z]){word}(?![A-Za-z]))" for i, word in enumerate(_IN_NAMES)))


def forbidden(line: str) -> Iterator[tuple[str, str]]:
    """Yield the words of a line that are on the list, each with what to write instead."""
    for found in _FORBIDDEN.finditer(line):
        yield found[0], list(WORDS.values())[int(str(found.lastgroup)[1:])]


def tracked() -> list[str]:
    """Files of the repository, new ones too."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()


def is_checked(name: str) -> bool:
    """Whether a file of the repository is held to the list."""
    own = name in OWN or not (ROOT / name).is_file()
    written = any(fnmatch.fnmatch(Path(name).name, pattern) for pattern in CHECKED)
    return written and not own and (EVERYWHERE or any(fnmatch.fnmatch(name, pattern) for pattern in DONE))


def complaints(name: str) -> Iterator[str]:
    """Yield a sentence per forbidden word of a file."""
    allowed = set(ALLOWED.read_text(encoding="utf-8").splitlines())
    for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1):
        for word, better in forbidden(line) if line.strip() not in allowed else ():
            yield f"{name}:{number}: {word!r}: {better}"


def main(names: Sequence[str]) -> int:
    """Check the given files, or all; returns 1 where a word of the list was found."""
    found = [line for name in names or tracked() if is_checked(name) for line in complaints(name)]
    sys.stdout.writelines(f"{line}\n" for line in found)
    return bool(found)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
