#!/bin/sh
# Regenerates the committed stubs beside the .proto files. Usage: protos/generate.sh [OUTPUT_DIR]
# grpcio-tools must be the pinned version: a test compares the stubs byte by byte.
set -eu
root="$(cd "$(dirname "$0")" && pwd)"
out="${1:-$root}"
"${PYTHON:-python}" -m grpc_tools.protoc -I "$root" -I "$root/third_party" \
  --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" "$root"/attribution/v1/*.proto
