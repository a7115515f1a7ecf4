#!/usr/bin/env bash
# The C++ tests and programs under AddressSanitizer and UBSan, then the threads and programs under ThreadSanitizer:
# `sanitize.sh CONFIGURE FOLDER JOBS PYTHON`, where CONFIGURE is the cmake command without its build folder.
set -euo pipefail
configure=$1 folder=$2 jobs=$3 python=$4
here=$(cd "$(dirname "$0")" && pwd)

build() { # NAME SANITIZERS TARGETS…
    eval "$configure -B '$folder/cpp-$1' -DDIT_TESTS=ON -DDIT_PROGRAMS=ON -DDIT_SANITIZE=$2 -DCMAKE_BUILD_TYPE=Debug"
    cmake --build "$folder/cpp-$1" --parallel "$jobs" --target "${@:3}"
}

# dit-server with the clients of its tests, which load it, leave, swap its bundle and let it drain. Left out is what a
# sanitizer changes: an answer within two seconds, and the memory that stays after large bodies. ThreadSanitizer also
# holds back signals that reach a thread of an engine.
serve() { # NAME OPTIONS…
    DIT_CPP_BUILD=$(realpath "$folder/cpp-$1") "$python" -m pytest tests/cpp/test_server.py tests/cpp/test_server_edits.py \
        --deselect tests/cpp/test_server.py::test_overload_is_answered \
        --deselect tests/cpp/test_server_edits.py::test_limits "${@:2}"
}

build asan address,undefined,float-cast-overflow all
# TBB's plain dlopen: its usual one does not go with a sanitizer.
export TBB_ENABLE_SANITIZERS=1 UBSAN_OPTIONS=print_stacktrace=1
# LeakSanitizer itself crashes at the end where it reads the variables of OpenVINO's threads.
export ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1:intercept_tls_get_addr=0
export LSAN_OPTIONS=suppressions=$here/lsan.txt:print_suppressions=0
ctest --test-dir "$folder/cpp-asan" --output-on-failure
serve asan

build tsan thread api-tests dit-generate dit-server
ctest --test-dir "$folder/cpp-tsan" --output-on-failure -R '^(bundle|captioned|wave|video|free)$'
# The engines are not built with ThreadSanitizer; what they do among themselves it cannot judge.
# Their locks are not seen, so an unlock of theirs looks like one too many.
export TSAN_OPTIONS=suppressions=$here/tsan.txt:halt_on_error=1:report_mutex_bugs=0
"$folder/cpp-tsan/tests/api-tests" --gtest_filter='Threads.*:BatcherApi.*:*Model*:*Service*'
program=$folder/cpp-tsan/programs/dit-generate
"$program" "$folder/cpp-tsan/test-bundle" --labels 1 2 --steps 4 -o "$folder/cpp-tsan/sample.npz"
"$program" "$folder/cpp-tsan/test-bundle" --verify
serve tsan --deselect tests/cpp/test_server.py::test_swaps_and_signals
