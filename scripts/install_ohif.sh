#!/usr/bin/env bash
# The viewer OHIF for a slow test, from npm:  scripts/install_ohif.sh [VERSION]
set -euo pipefail
version="${1:-3.13.2}"
goal="${HOME}/.cache/ctinstruct_hf/ohif/$version"
[ -f "$goal/index.html" ] && exit 0
command -v npm >/dev/null || { echo "This needs npm." >&2; exit 2; }
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
(cd "$work" && npm pack --silent "@ohif/app@$version" >/dev/null && tar xzf ./*.tgz --exclude='*.map' package/dist) \
  || { echo "The package @ohif/app of npm cannot be downloaded." >&2; exit 2; }
mkdir -p "$(dirname "$goal")"
rm -rf "$goal"
mv "$work/package/dist" "$goal"
