#!/usr/bin/env bash
# Writes constraints.txt anew: the newest versions that pyproject.toml allows, of everything that installing,
# building, testing and the style need. Run .ci/run with it before it lands.
#
# It asks the package index through uv, in an environment of its own, and installs nothing else. Python 3.11 or later.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q uv

{
  cat <<'END'
# What .ci/run and README.md's test command install: one version of each requirement of pyproject.toml, of theirs,
# and of the build's. CI runs Python 3.11; where another Python needs another version, the line says so.
# Made by tools/refresh_constraints.sh; not to be edited.
END
  {
    python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")'
    printf '%s\n' cmake ninja # scikit-build-core asks for them where the machine has none
  } | "$work/venv/bin/uv" pip compile pyproject.toml - --quiet --all-extras --universal --python-version 3.10 \
    --no-header --no-annotate
} >"$work/constraints.txt"
cp "$work/constraints.txt" constraints.txt
