# An image with nbdhost and the plugins and filters of Debian's nbdkit package:
#
#     docker build -t nbdhost .
#     docker run --rm -p 10809:10809 --read-only --cap-drop=ALL nbdhost memory 1G
#
# docs/deployment.md says more.

FROM golang:1.26-bookworm AS build
ARG GOPROXY
WORKDIR /src
COPY go.mod go.sum ./
RUN --mount=type=cache,target=/go/pkg/mod go mod download
COPY . .
ARG VERSION=
RUN --mount=type=cache,target=/go/pkg/mod --mount=type=cache,target=/root/.cache/go-build \
    go build -trimpath -buildvcs=false -ldflags="-s -w ${VERSION:+-X main.version=$VERSION}" -o /nbdhost ./cmd/nbdhost \
 && deploy/notices.sh /nbdhost >/copyright

FROM debian:bookworm-slim
# Debian has the plugins, the filters and nbdkit itself in one package. The last is left
# out: /usr/bin/nbdkit is a link to nbdhost.
RUN echo path-exclude=/usr/bin/nbdkit >/etc/dpkg/dpkg.cfg.d/nbdhost \
 && apt-get update \
 && apt-get install -y --no-install-recommends nbdkit \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/apt /var/log/dpkg.log /var/log/alternatives.log \
 && ln -s /usr/local/bin/nbdhost /usr/bin/nbdkit
# What the curl plugin trusts.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /copyright /usr/share/doc/nbdhost/copyright
COPY --from=build /nbdhost /usr/local/bin/nbdhost

# Plugins and filters of one's own are found by name in a directory mounted here.
ENV NBDHOST_PLUGIN_PATH=/plugins NBDHOST_FILTER_PATH=/plugins

# Where plugins and filters that need a temporary file make it: where the root file
# system is read-only, one writable /tmp is enough.
ENV TMPDIR=/tmp

# nobody, as a number: Kubernetes' runAsNonRoot understands no names.
USER 65534:65534
EXPOSE 10809
# Metrics and health can be asked for within the container; --metrics=0.0.0.0:9809 among
# the arguments lets others ask, too.
ENTRYPOINT ["nbdhost", "--foreground", "--metrics=127.0.0.1:9809"]
HEALTHCHECK --interval=10s --timeout=10s --start-period=30s --retries=3 \
    CMD ["nbdhost", "--healthcheck=127.0.0.1:9809"]

ARG VERSION=
ARG REVISION=
LABEL org.opencontainers.image.title="nbdhost" \
      org.opencontainers.image.description="NBD server that runs nbdkit plugins" \
      org.opencontainers.image.licenses="BSD-3-Clause" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.base.name="docker.io/library/debian:bookworm-slim"
