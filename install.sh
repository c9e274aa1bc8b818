#!/usr/bin/env bash
# Makes .venv beside this file with the pinned CPU environment and clipctl in it. Safe to run again; does nothing then.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
stamp=.venv/installed-$(cat requirements-cpu.txt pyproject.toml | sha256sum | cut -c1-16)
[ -e "$stamp" ] && exit 0
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || python=python3
"$python" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || {
    echo "install.sh: $("$python" --version) is too old; set PYTHON to a Python 3.11" >&2
    exit 3
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip --disable-pip-version-check install --quiet)
"${pip[@]}" torch==2.13.0
"${pip[@]}" --no-deps -r requirements-cpu.txt
"${pip[@]}" --no-deps --no-build-isolation --editable .
touch "$stamp"
