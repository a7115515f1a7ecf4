#!/usr/bin/env bash
# Makes sure that what the C++ library builds with is here: Debian's packages, and ONNX Runtime's library from the
# virtual environment with the headers that its wheel lacks. `setup.sh VENV FOLDER [PACKAGE …]`.
set -euo pipefail
venv=$1 folder=$2
shift 2

fail() {
    echo "setup: error: $*" >&2
    exit 2
}

missing=()
for package in cmake g++ make pkg-config nlohmann-json3-dev libpng-dev "$@"; do
    command -v dpkg-query >/dev/null || break # no Debian: CMake says what is missing
    dpkg-query -W -f '${Status}\n' "$package" 2>/dev/null | grep -q '^install ok' || missing+=("$package")
done
if ((${#missing[@]})); then
    command -v apt-get >/dev/null || fail "needs ${missing[*]}, and there is no apt-get here; install them by hand"
    [ "$(id -u)" = 0 ] || fail "needs ${missing[*]}; run: sudo apt-get install ${missing[*]}"
    echo "installing ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

# The user's own ONNX Runtime comes first; CMake reads the same variable.
[ -z "${ONNXRUNTIME_ROOT:-}" ] || exit 0
root=$folder/onnxruntime
library=$(ls "$venv"/lib/python3*/site-packages/onnxruntime/capi/libonnxruntime.so.* 2>/dev/null | head -n 1 || true)
[ -n "$library" ] || fail "no ONNX Runtime in $venv; run: make setup"
mkdir -p "$root/lib"
# The wheel's library calls itself libonnxruntime.so.1 but is stored under its full version.
ln -sfn "$(realpath "$library")" "$root/lib/libonnxruntime.so.1"
ln -sfn libonnxruntime.so.1 "$root/lib/libonnxruntime.so"
[ ! -f "$root/include/onnxruntime_c_api.h" ] || exit 0

# Headers: Debian packages them from 13 on; on 12 they are fetched from there with sources and caches of our own.
apt=$root/apt
rm -rf "$apt"
mkdir -p "$apt"/{sources,lists/partial,cache/archives/partial}
options=()
if ! apt-cache show libonnxruntime-dev >/dev/null 2>&1; then
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*; do
        if grep -sqE '(^|[[:space:]])bookworm([[:space:]]|$)' "$file"; then
            sed 's/bookworm/trixie/g' "$file" >"$apt/sources/$(basename "$file")"
        fi
    done
    [ -n "$(ls "$apt/sources")" ] || fail "apt knows no libonnxruntime-dev here; unpack ONNX Runtime's own archive and set ONNXRUNTIME_ROOT"
    options=(-o "Dir::Etc::sourcelist=/dev/null" -o "Dir::Etc::sourceparts=$apt/sources"
        -o "Dir::State::lists=$apt/lists" -o "Dir::Cache=$apt/cache" -o "APT::Sandbox::User=")
    # As root or not: these lists and caches are ours.
    apt-get "${options[@]}" update -qq || fail "apt could not read Debian 13's package lists; set ONNXRUNTIME_ROOT"
fi
(cd "$apt" && apt-get "${options[@]}" download -qq libonnxruntime-dev) || fail "libonnxruntime-dev could not be downloaded; set ONNXRUNTIME_ROOT"
dpkg -x "$apt"/libonnxruntime-dev_*.deb "$apt/out"
rm -rf "$root/include"
mv "$apt/out/usr/include/onnxruntime" "$root/include"
rm -rf "$apt"
