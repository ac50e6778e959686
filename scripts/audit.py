"""Known holes in the tested set of packages, by pip-audit:  python scripts/audit.py

Exit code 1 where a package of constraints.txt has one that is not explained below. Packages that the index has no advisories
for, as on a mirror, are counted and said.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
# id -> why it does not touch us
EXPLAINED: dict[str, str] = {}


def judge(told: dict) -> tuple[list[str], str]:
    """Holes that nobody explained, and a sentence on what was looked at."""
    packages = told["dependencies"]
    asked = [one for one in packages if "skip_reason" not in one]
    holes = [
        f"{one['name']} {one['version']}: {hole['id']}, mended in {', '.join(hole['fix_versions']) or 'no release'}"
        for one in asked
        for hole in one["vulns"]
        if hole["id"] not in EXPLAINED
    ]
    sentence = f"{len(asked)} of {len(packages)} packages were asked for, {len(holes)} holes are not explained."
    if not asked:
        sentence += " The index at hand has no advisories: ask where PyPI can be reached."
    return holes, sentence


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "-r", str(CONSTRAINTS), "--no-deps", "--disable-pip", "-f", "json"]
    done = subprocess.run([*command, "--progress-spinner", "off"], capture_output=True, text=True, check=False)
    try:
        told = json.loads(done.stdout)
    except ValueError:
        print("pip-audit could not ask: " + (done.stderr.strip().splitlines() or ["no answer"])[-1])
        return 0
    holes, sentence = judge(told)
    print("\n".join([*holes, sentence]))
    return 1 if holes else 0


if __name__ == "__main__":
    sys.exit(main())
