#!/usr/bin/env bash
# Builds what a release has, into dist/ or $DIST:
#
#   ./release.sh                          for all targets
#   ./release.sh linux/amd64 linux/arm/7  for these
#
# The version is git's: tag first. One commit and one release of Go give the
# same bytes anywhere; `go version -m FILE` tells both.
set -euo pipefail
cd "$(dirname "$0")"
targets=(linux/amd64 linux/arm64 linux/arm/7 darwin/amd64 darwin/arm64 windows/amd64)
if [ $# -gt 0 ]; then
  targets=("$@")
fi
dist=${DIST:-dist}
version=$(git describe --tags --always --dirty=+dirty)

# Whatever this machine has set for Go must not show in the bytes.
export CGO_ENABLED=0 GOFLAGS= GOWORK=off GOEXPERIMENT= GOFIPS140=off GOAMD64=v1 GOARM64=v8.0 LC_ALL=C
mkdir -p "$dist"
rm -f "$dist"/wxscan_* "$dist"/LICENSES.txt "$dist"/SHA256SUMS # of another version
for target in "${targets[@]}"; do
  IFS=/ read -r os arch arm <<<"$target"
  name=wxscan_${version}_${os}_$arch${arm:+v$arm}
  if [ "$os" = windows ]; then
    name+=.exe
  fi
  GOOS=$os GOARCH=$arch GOARM=${arm:-7} \
    go build -buildvcs=true -trimpath -ldflags "-s -w" -o "$dist/$name" .
  echo "$name"
done

# The binary holds Go's library and go-qrcode, whose licenses ask to go along.
qrcode=$(go list -m -f '{{.Dir}}' github.com/skip2/go-qrcode)
for license in LICENSE "$qrcode/LICENSE" "$(go env GOROOT)/LICENSE"; do
  cat "$license"
  echo
done >"$dist/LICENSES.txt"

cd "$dist"
sha256sum -- * >SHA256SUMS.new
mv SHA256SUMS.new SHA256SUMS
