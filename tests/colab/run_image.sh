#!/usr/bin/env bash
# Notebooks under the package versions of Colab's image: `bash tests/colab/run_image.sh FREEZE [PYTHON]`, smoke profile.
# FREEZE is a pip-freeze.gpu.txt of github.com/googlecolab/backend-info, by default the part of it kept here.
# It needs neither Google's package nor root; what only those can show (secrets, Drive) is in test_colab.py.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
freeze=$(realpath "${1:-$here/freeze.txt}") python=${2:-python3.13}
cd "$here/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/env"
pip="$work/env/bin/pip --disable-pip-version-check -q"
# Of the image only what the requirements touch, without CUDA's build of torch: names in freeze.txt, versions in FREEZE.
grep -v '^#' "$here/freeze.txt" | cut -d= -f1 | grep -viE '^(nvidia|triton|cuda)' > "$work/names"
grep -iE "^($(paste -sd'|' "$work/names"))==" "$freeze" | sed 's/+cu[0-9]*//' > "$work/image"
$pip install -r "$work/image" ipykernel
$work/env/bin/python - <<PY
import importlib.metadata as found
print("image:", ", ".join(f"{name} {found.version(name)}" for name in ("torch", "torchao", "transformers", "peft", "datasets")))
PY
$pip install -r requirements.txt
MEDQA_PROFILE=smoke MEDQA_HOME="$work/home" "$work/env/bin/python" -m medqa_lib 00 04 11 14 30
