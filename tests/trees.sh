#!/bin/sh
# usage: tests/trees.sh RELEASE...
#
# Makes, where it is missing, a directory tree for each release of Debian, with
# that release's nbdkit, its plugins and what they run, and prints its path. The
# trees are kept in $XDG_CACHE_HOME/nbdkit-trees (~/.cache/nbdkit-trees). It needs
# root, mmdebstrap, and the mirror that apt uses on this machine.
set -eu

# sshd is what the ssh plugins of all releases talk to. bookworm's nbdkit is
# the machine's own.
packages="nbdkit nbdkit-plugin-dev nbdkit-plugin-lua nbdkit-plugin-perl
  nbdkit-plugin-python nbdkit-plugin-tcl libnbd-bin python3-libnbd qemu-utils
  nbdkit-plugin-guestfs nbdkit-plugin-libvirt
  gcc libc6-dev e2fsprogs xorriso openssh-server"
# What does for a graphics card; sid's plugins alone have one that needs it.
sid="pocl-opencl-icd"

# Snapshots of the mirror may be older than they say they are valid.
stale='Acquire::Check-Valid-Until "false"; Acquire::Check-Date "false";'

cache=${XDG_CACHE_HOME:-$HOME/.cache}/nbdkit-trees
mkdir -p "$cache"
exec 9>"$cache/.lock"
flock 9

mirror() {
  sed -n 's/^URIs: *//p; s/^deb \(\[[^]]*\] *\)\?\([^ ]*\).*/\2/p' \
    /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | head -n 1
}

for release; do
  tree=$cache/$release
  case $release in
    sid) wanted=$(echo $packages $sid) ;;
    *) wanted=$(echo $packages) ;;
  esac
  if [ ! -d "$tree" ]; then
    rm -rf --one-file-system "$tree.new"
    mmdebstrap --quiet --mode=root --variant=apt --aptopt="$stale" \
      "$release" "$tree.new" "$(mirror)" >&2 9>&-
    mv "$tree.new" "$tree"
  fi
  if [ "$(cat "$tree/.packages" 2>/dev/null)" != "$wanted" ]; then
    # Nothing that is installed may start.
    printf '#!/bin/sh\nexit 101\n' >"$tree/usr/sbin/policy-rc.d"
    chmod +x "$tree/usr/sbin/policy-rc.d"
    echo "$stale" >"$tree/etc/apt/apt.conf.d/99stale"
    # Some packages look at what /proc has when they are installed. The mounts are
    # gone with the shell.
    DEBIAN_FRONTEND=noninteractive unshare --mount sh -ec '
      mount --rbind /proc "$1/proc"
      mount --rbind /dev "$1/dev"
      chroot "$1" apt-get update -qq
      chroot "$1" apt-get install -y -qq --no-install-recommends $2
    ' sh "$tree" "$wanted" >"$tree/.log" 2>&1 9>&- </dev/null || { cat "$tree/.log" >&2; exit 1; }
    echo "$wanted" >"$tree/.packages"
  fi
  echo "$tree"
done
