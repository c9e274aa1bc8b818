#!/usr/bin/env bash
# A trained and analyzed run of the embedded model, on a machine with Python 3.11 and nothing else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash install.sh
.venv/bin/clipctl train --preset tiny
.venv/bin/clipctl analyze runs/
