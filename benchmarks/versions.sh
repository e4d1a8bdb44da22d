#!/usr/bin/env bash
# The fast tests with the lowest versions that pyproject.toml allows and with the newest ones.
#
#     pip install uv
#     benchmarks/versions.sh [lowest] [newest]       both, unless one is named
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- lowest newest
for versions in "$@"; do
    case $versions in
        lowest) resolution=lowest-direct ;;
        newest) resolution=highest ;;
        *) echo "$versions: expected lowest or newest" >&2; exit 2 ;;
    esac
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    uv venv --quiet --seed --python 3.11 "$folder"  # with pip, which a test calls
    source "$folder/bin/activate"
    uv pip install --quiet --resolution "$resolution" -e '.[test]'
    echo "== $versions: $(uv pip freeze | grep -E '^(torch|transformers|tokenizers|bitsandbytes|numpy|peft|trl)==' | tr '\n' ' ')"
    pytest -q
    deactivate
    rm -rf "$folder"
done
