#!/bin/sh
# usage: tests/appliance.sh KERNEL DIR
#
# Makes the appliance of libguestfs in DIR, of this machine's packages and the
# kernel that kernel.sh has unpacked below KERNEL/root. It needs root.
set -eu

root=$1/root
version=$(ls "$root/lib/modules")
export SUPERMIN_KERNEL="$root/boot/vmlinuz-$version" SUPERMIN_KERNEL_VERSION="$version"
export SUPERMIN_MODULES="$root/lib/modules/$version"

# supermin looks for /lib/modules too, which a machine without a kernel does not have.
exec 9>"$1/.lock"
flock 9
[ -e "$SUPERMIN_MODULES/modules.dep" ] || depmod -b "$root" "$version"
unshare --mount sh -c 'mount -t overlay -o "lowerdir=$1/lib:/usr/lib" overlay /usr/lib &&
  exec supermin --build --copy-kernel -f ext2 --host-cpu x86_64 /usr/lib/x86_64-linux-gnu/guestfs/supermin.d -o "$2"' \
  sh "$root" "$2"
echo "made by supermin" >"$2/README.fixed"
