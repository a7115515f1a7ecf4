# A machine to develop on, as CI's: docker build -f deploy/docker/dev.Dockerfile -t dit-dev . &&
# docker run --rm -it -v "$PWD:/source" dit-dev make setup check
# A test lints this file and checks what it installs. It was not built: the project's machines have no container daemon.
FROM python:3.11-slim-bookworm
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends \
    chromium clang cmake g++ g++-aarch64-linux-gnu git libclang-rt-dev libgtest-dev libpng-dev make nlohmann-json3-dev \
    pkg-config qemu-user && rm -rf /var/lib/apt/lists/*
WORKDIR /source
