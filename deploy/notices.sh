#!/bin/sh
# usage: deploy/notices.sh PROGRAM
#
# Prints the licences of a Go program of this module and of what has been linked into
# it, as those licences demand of who hands the program on.
set -eu
cd "$(dirname "$0")/.."

echo "nbdhost is under this licence:"
echo
cat LICENSE
notice() { # NAME DIRECTORY
  printf '\n%s\n\nThe program contains %s, which is under this licence:\n\n' \
    "$(printf '%080d' 0 | tr 0 -)" "$1"
  found=
  for f in "$2"/LICENSE* "$2"/COPYING* "$2"/NOTICE*; do
    if [ -f "$f" ]; then
      cat "$f"
      found=yes
    fi
  done
  [ "$found" ] || { echo "notices: no licence in $2" >&2; exit 1; }
}
go version -m "$1" | while read -r kind module version _; do
  if [ "$kind" = dep ]; then
    notice "$module $version" "$(go mod download -json "$module@$version" | sed -n 's/^[[:space:]]*"Dir": "\(.*\)",*/\1/p')"
  fi
done
notice "Go's standard library" "$(go env GOROOT)"
