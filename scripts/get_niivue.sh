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
# without 3D rendering nobody sees the gradients, which take two thirds of the time to draw a scan
without='s/this\.gradientTexture=\(Ti({[^}]*})\)),/this.opts.gradientAmount>0\&\&(this.gradientTexture=\1)),/'
sed "$without" "$folder/package/dist/niivue.umd.js" >"$target/niivue.js"
grep -q 'opts.gradientAmount>0&&(this.gradientTexture=Ti' "$target/niivue.js" # minified names differ by version
chmod 644 "$target/niivue.js"
