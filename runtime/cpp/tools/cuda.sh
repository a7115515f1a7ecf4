#!/usr/bin/env bash
# Unpacks CUDA's headers and static runtime, two packages of NVIDIA, for the test that links them: `cuda.sh VENV FOLDER`.
set -euo pipefail
venv=$1 folder=$2
[ ! -f "$folder/include/cuda_runtime_api.h" ] || exit 0
rm -rf "$folder"
mkdir -p "$folder/wheels"
if "$venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --dest "$folder/wheels" nvidia-cuda-runtime==13.5.37 nvidia-cuda-crt==13.5.37; then
    for wheel in "$folder"/wheels/*.whl; do "$venv/bin/python" -m zipfile -e "$wheel" "$folder/unpacked"; done
    mv "$folder"/unpacked/nvidia/cu13/{include,lib} "$folder"
else
    echo "cuda: CUDA's headers could not be downloaded; the test that links them is left out" >&2
fi
rm -rf "$folder"/{wheels,unpacked}
