#!/bin/sh
# usage: tests/kernel.sh DIR
#
# Fetches, where they are missing, Debian's kernel and the programs that a virtual
# machine needs to use it as a client, and unpacks them below DIR/root.
set -eu

dir=$1
mkdir -p "$dir"
exec 9>"$dir/.lock"
flock 9
[ ! -e "$dir/root/.done" ] || exit 0

kernel=$(apt-cache depends linux-image-amd64 | sed -n 's/.*Depends: \(linux-image-[^ ]*\)$/\1/p' | head -n 1)
[ -n "$kernel" ]
rm -rf "$dir/new" "$dir/root"
mkdir "$dir/new"
cd "$dir/new"
apt-get download -qq -o APT::Sandbox::User=root "$kernel" busybox-static nbd-client libnl-3-200 libnl-genl-3-200
for deb in *.deb; do
  dpkg -x "$deb" root
done
touch root/.done
mv root "$dir/root"
rm -rf "$dir/new"
