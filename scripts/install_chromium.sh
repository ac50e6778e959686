#!/usr/bin/env bash
# Chromium for the tests of the page, from Debian's packages, where this is root: scripts/install_chromium.sh
set -euo pipefail
for name in chromium chromium-browser google-chrome; do
  if command -v "$name" >/dev/null; then exit 0; fi
done
command -v apt-get >/dev/null && [ "$(id -u)" = 0 ] || { echo "No Chromium is installed, and only root may install it." >&2; exit 2; }
export DEBIAN_FRONTEND=noninteractive
install() { timeout 600 apt-get -o Acquire::http::Timeout=20 install -y -qq --no-install-recommends chromium >/dev/null 2>&1; }
install || { apt-get -o Acquire::http::Timeout=20 update -qq >/dev/null 2>&1 && install; } \
  || { echo "The package chromium cannot be installed." >&2; exit 2; }
