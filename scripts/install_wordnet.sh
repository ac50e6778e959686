#!/usr/bin/env bash
# WordNet 3.0 for METEOR from Debian's packages, without root: scripts/install_wordnet.sh
set -euo pipefail
goal="${HOME}/.cache/ctinstruct_hf/wordnet"
[ -f "$goal/index.sense" ] || [ -f /usr/share/wordnet/index.sense ] && exit 0
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || { echo "This needs apt-get and dpkg-deb." >&2; exit 2; }
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
fetch() {
  apt-get -o Acquire::http::Timeout=20 -o Acquire::Retries=0 "$@" -qq >/dev/null 2>&1
}
# where the lists of packages were never read, root may read them
fetch download wordnet-base wordnet-sense-index \
  || { [ "$(id -u)" = 0 ] && fetch update && fetch download wordnet-base wordnet-sense-index; } \
  || { echo "The packages wordnet-base and wordnet-sense-index cannot be downloaded." >&2; exit 2; }
for package in *.deb; do dpkg-deb -x "$package" unpacked; done
mkdir -p "$(dirname "$goal")"
rm -rf "$goal.part"
chmod -R go-w unpacked/usr/share/wordnet
mv unpacked/usr/share/wordnet "$goal.part"
mv "$goal.part" "$goal"
