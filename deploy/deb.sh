#!/bin/sh
# usage: deploy/deb.sh DIR
#
# Makes a Debian package of nbdhost in DIR, and prints its path. make deb calls it.
set -eu
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/.."

DEST=$(mktemp -d)
trap 'rm -rf "$DEST"' EXIT
make --no-print-directory install BIN="$DEST/nbdhost" DESTDIR="$DEST" PREFIX=/usr LDFLAGS='-s -w' >&2
gzip -9n "$DEST/usr/share/man/man1/nbdhost.1"
deploy/notices.sh "$DEST/nbdhost" >"$DEST/copyright"

# zsh looks for what packages bring in vendor-completions.
mv "$DEST/usr/share/zsh/site-functions" "$DEST/usr/share/zsh/vendor-completions"

SOURCE_DATE_EPOCH=$(git log -1 --format=%ct 2>/dev/null || date +%s) # the same source makes the same package
VERSION=$("$DEST/nbdhost" --version | sed 's/.* //')
ARCH=$(dpkg --print-architecture)
LIBC=$(objdump -T "$DEST/nbdhost" | sed -n 's/.*GLIBC_\([0-9.]*\).*/\1/p' | sort -V | tail -n 1)
maintainer=$(sed -n 's/^maintainer: //p' deploy/debian/nfpm.yaml)
mkdir -p "$DEST/usr/share/doc/nbdhost"
gzip -9n >"$DEST/usr/share/doc/nbdhost/changelog.gz" <<EOF
nbdhost ($VERSION) unstable; urgency=medium

  * Release $VERSION.

 -- $maintainer  $(date -uRd "@$SOURCE_DATE_EPOCH")
EOF
mv "$DEST/copyright" "$DEST/usr/share/doc/nbdhost/copyright"

export DEST VERSION ARCH LIBC SOURCE_DATE_EPOCH
cd deploy
go tool nfpm package --packager deb --config debian/nfpm.yaml --target "$out" >&2
echo "$out/nbdhost_${VERSION}_$ARCH.deb"
