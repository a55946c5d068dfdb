"""Looks for known vulnerabilities in requirements.lock with pip-audit, which needs the network.

python .ci/audit_lock.py

`allowed_vulnerabilities.toml` beside this file names those that are accepted for a time. An entry
that has expired, or lasts too long, is an error, as is a vulnerability that has no entry.
"""

from __future__ import annotations

import datetime
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
ALLOWED = ROOT / ".ci" / "allowed_vulnerabilities.toml"
LONGEST = datetime.timedelta(days=180)
_KEYS = {"id", "package", "reason", "until"}


def allowed(text: str, today: datetime.date) -> list[str]:
    """The ids of an allow-list.

    Args:
      text: TOML with any number of tables `[[allowed]]`, each of `id`, `package`, `reason` and
        `until`, the last date on which it holds.
      today: the date of the check.

    Raises:
      ValueError: an entry is incomplete, has expired, or ends more than `LONGEST` from now.
    """
    found = []
    entries = tomllib.loads(text)
    if entries.keys() - {"allowed"}:
        raise ValueError(f"unknown tables {sorted(entries.keys() - {'allowed'})}: use [[allowed]].")
    for entry in entries.get("allowed", []):
        name = entry.get("id", "an entry without id")
        if entry.keys() != _KEYS:
            raise ValueError(f"{name}: an entry has exactly {', '.join(sorted(_KEYS))}.")
        if not all(isinstance(entry[key], str) and entry[key] for key in _KEYS - {"until"}):
            raise ValueError(f"{name}: id, package and reason are texts.")
        if type(entry["until"]) is not datetime.date:
            raise ValueError(f"{name}: until is a date, such as 2030-01-31.")
        if entry["until"] < today:
            raise ValueError(
                f"{name} of {entry['package']} was allowed until {entry['until']}: update the "
                "package in requirements.lock, or look at it again and set another date."
            )
        if entry["until"] - today > LONGEST:
            raise ValueError(f"{name}: until is at most {LONGEST.days} days from now.")
        found.append(name)
    return found


def command(ids: list[str]) -> list[str]:
    """What looks the packages of the lock up, and fails for a vulnerability not among `ids`."""
    words = [sys.executable, "-m", "pip_audit", f"--requirement={LOCK}"]
    words += ["--require-hashes", "--disable-pip", "--strict"]
    return [*words, *(word for name in ids for word in ("--ignore-vuln", name))]


def main() -> int:
    """Returns the status of pip-audit; 1 if the allow-list is refused."""
    try:
        ids = allowed(ALLOWED.read_text(encoding="utf-8"), datetime.date.today())
    except ValueError as error:
        sys.stderr.write(f"{ALLOWED.relative_to(ROOT)}: {error}\n")
        return 1
    return subprocess.run(command(ids), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
