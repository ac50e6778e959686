"""Makes the bundled checkpoint `src/ctinstruct_hf/assets/ctinstruct-tiny` with random weights, marked as untrained.

python scripts/build_tiny.py [-o FOLDER] [--seed 0]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ctinstruct_hf.data.tiny import build_tiny

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).parents[1] / "src" / "ctinstruct_hf" / "assets" / "ctinstruct-tiny"
    parser.add_argument("-o", "--output", type=Path, default=default)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    build_tiny(arguments.output, arguments.seed)
    print(f"wrote {arguments.output}")
