#!/bin/sh
# Compares the protos with those that were published (published.binpb, written by `make publish-protos`).
# Usage, with buf on the PATH: protos/breaking.sh. Both sides are images, as buf does not compare a workspace with one.
set -eu
root="$(cd "$(dirname "$0")" && pwd)"
image="$(mktemp -d)"
trap 'rm -rf "$image"' EXIT
cd "$root/.."
buf build protos -o "$image/now.binpb" --exclude-source-info
buf breaking "$image/now.binpb" --against "$root/published.binpb"
