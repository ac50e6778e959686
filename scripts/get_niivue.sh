#!/usr/bin/env bash
# Fetches the viewer of the page, NiiVue (BSD-2-Clause), from npm into the package:  scripts/get_niivue.sh [VERSION]
set -euo pipefail
cd "$(dirname "$0")/.."
version="${1:-0.69.0}"
target="src/ctinstruct_hf/app/static"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
(cd "$folder" && npm pack --silent "@niivue/niivue@$version" >/dev/null && tar xzf ./*.tgz package/dist/niivue.umd.js)
sha256sum "$folder/package/dist/niivue.umd.js" | cut -d ' ' -f 1
cp "$folder/package/dist/niivue.umd.js" "$target/niivue.js"
chmod 644 "$target/niivue.js"
