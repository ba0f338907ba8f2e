# Two stages: Go and a C compiler build the program; Debian's nbdkit package
# brings the plugins that it serves.
FROM golang:1.26-bookworm AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
RUN go build -trimpath -ldflags=-s -o /nbdhost ./cmd/nbdhost

FROM debian:bookworm-slim
RUN apt-get update \
 && apt-get install -y --no-install-recommends nbdkit \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /nbdhost /usr/local/bin/nbdhost
USER nobody
EXPOSE 10809
ENTRYPOINT ["/usr/local/bin/nbdhost", "--foreground"]
CMD ["memory", "64M"]
