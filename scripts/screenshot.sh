#!/usr/bin/env bash
# The picture of the demo's page in README: needs Chromium (Debian's package chromium).  make demo && scripts/screenshot.sh
set -euo pipefail
cd "$(dirname "$0")/.."
profile="$(mktemp -d)"
chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
  --disable-component-update --disable-sync --user-data-dir="$profile" --hide-scrollbars --window-size=1100,2200 \
  --screenshot=docs/report.png "file://$PWD/demo_output/results/report.html" >/dev/null 2>&1
rm -rf "$profile"
.venv/bin/python -c 'from PIL import Image; Image.open("docs/report.png").convert("RGB").quantize(256).save("docs/report.png", optimize=True)'
echo docs/report.png
