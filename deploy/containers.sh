#!/bin/sh
# usage: deploy/containers.sh COMMAND...
#
# Runs COMMAND, which is buildah or podman with its arguments, on a store of images of
# its own, after the two images that the Dockerfile begins with have been put there,
# where they are missing: debian:bookworm-slim from Debian's packages, and
# golang:1.26-bookworm from that, gcc and this machine's Go. So an image can be built
# where no registry can be reached. The store is kept in $XDG_CACHE_HOME/nbdhost-image
# (~/.cache/nbdhost-image). It needs root, mmdebstrap, buildah, and the mirror that apt
# uses on this machine.
set -eu

cache=${XDG_CACHE_HOME:-$HOME/.cache}/nbdhost-image
mkdir -p "$cache/tmp"

# buildah and podman read where everything is in these files.
export CONTAINERS_STORAGE_CONF=$cache/storage.conf
export CONTAINERS_REGISTRIES_CONF=$cache/registries.conf
export CONTAINERS_CONF=$cache/containers.conf
export TMPDIR=$cache/tmp # buildah keeps what RUN --mount=type=cache names in there
cat >"$CONTAINERS_STORAGE_CONF.$$" <<EOF
[storage]
driver = "overlay"
graphroot = "$cache/store"
runroot = "${XDG_RUNTIME_DIR:-/run}/nbdhost-image"
EOF
cat >"$CONTAINERS_REGISTRIES_CONF.$$" <<EOF
unqualified-search-registries = ["docker.io"]
short-name-mode = "permissive"
EOF
# crun does not run everywhere that runc does; the usual limits may be above the hard ones.
cat >"$CONTAINERS_CONF.$$" <<EOF
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "none"
EOF
for f in "$CONTAINERS_STORAGE_CONF" "$CONTAINERS_REGISTRIES_CONF" "$CONTAINERS_CONF"; do
  mv "$f.$$" "$f" # who reads it sees all of it
done

debian=docker.io/library/debian:bookworm-slim
golang=docker.io/library/golang:1.26-bookworm

mirror() {
  sed -n 's/^URIs: *//p; s/^deb \(\[[^]]*\] *\)\?\([^ ]*\).*/\2/p' \
    /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | head -n 1
}

# Like the image of that name: no documentation, no translations, no package lists.
make_debian() {
  echo "making $debian from Debian's packages" >&2
  tree=$cache/debian
  rm -rf --one-file-system "$tree"
  mmdebstrap --quiet --mode=root --variant=apt --include=usr-is-merged --aptopt='Apt::Install-Recommends "false"' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/info/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --customize-hook='chroot "$1" apt-get purge -y -qq usrmerge perl perl-modules-5.36 libperl5.36 >/dev/null' \
    bookworm "$tree" "$(mirror)"
  rm -rf "$tree"/var/lib/apt/lists/* "$tree"/var/cache/apt/*.bin "$tree"/etc/apt/apt.conf.d/99mmdebstrap
  # As there, packages that have been installed are not kept.
  echo 'DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb || true"; };' >"$tree/etc/apt/apt.conf.d/docker-clean"
  commit scratch "$debian" --cmd bash
}

# Like the image of that name, as far as the Dockerfile needs it.
make_golang() {
  echo "making $golang from that and this machine's Go" >&2
  tree=$cache/golang
  rm -rf --one-file-system "$tree"
  mkdir -p "$tree/usr/local" "$tree/etc/ssl/certs"
  cp -a "$(go env GOROOT)" "$tree/usr/local/go"
  # The proxy for modules may have a certificate that only this machine knows.
  cp /etc/ssl/certs/ca-certificates.crt "$tree/etc/ssl/certs/"
  commit "$debian" "$golang" --env GOPATH=/go --env GOTOOLCHAIN=local \
    --env PATH=/go/bin:/usr/local/go/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin -- \
    'apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends gcc libc6-dev make pkg-config >/dev/null && rm -rf /var/lib/apt/lists/*'
}

# commit BASE IMAGE CONFIG... [-- COMMAND] adds $tree to BASE.
commit() {
  container=$(buildah from --pull-never "$1")
  image=$2
  shift 2
  config=
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    config="$config $1"
    shift
  done
  if [ $# -gt 0 ]; then
    buildah run --isolation chroot "$container" -- sh -c "$2"
  fi
  buildah add -q "$container" "$tree" / >/dev/null
  buildah config $config "$container"
  buildah commit -q --format docker --rm "$container" "$image" >/dev/null
  rm -rf --one-file-system "$tree"
}

(
  flock 9
  buildah inspect --type image "$debian" >/dev/null 2>&1 || make_debian
  buildah inspect --type image "$golang" >/dev/null 2>&1 || make_golang
) 9>"$cache/.lock" </dev/null

exec "$@"
