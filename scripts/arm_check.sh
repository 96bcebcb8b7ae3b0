#!/usr/bin/env bash
# Run bundles on emulated processors (Raspberry Pi 4 and 5, a current Arm core, x86 without VNNI) and compare them with
# this machine, or count the instructions of a token: scripts/arm_check.sh [--prepare] [--count] [MODEL ...]. Needs Debian
# on x86-64, installs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup
exec "${EDGELM_VENV:-.venv}/bin/python" -m scripts.emulated.check "$@"
