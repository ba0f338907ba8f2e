# What to type: make run, make install, make test, make lint, make fuzz, make image.
# Everything installs what it needs where it may (root on Debian), and says what
# is missing where it may not.

GO     ?= go
BIN     = bin/nbdhost
FUZZTIME ?= 1m

# A test that fails runs once more, alone, and both results are printed: see
# RATIONALE.md.
GOTESTSUM = $(GO) tool gotestsum --format pkgname --rerun-fails=1 --rerun-fails-run-root-test \
    --rerun-fails-max-failures=6

RUN_PACKAGES  = gcc libc6-dev nbdkit libnbd-bin
TEST_PACKAGES = $(RUN_PACKAGES) binutils nbdkit-plugin-dev libnbd0 python3-libnbd qemu-utils qemu-system-x86 fio \
	e2fsprogs dosfstools mtools genisoimage xorriso strace gnutls-bin openssl mmdebstrap \
	nbdkit-plugin-python nbdkit-plugin-perl nbdkit-plugin-lua nbdkit-plugin-tcl nbdkit-plugin-ruby \
	nbdkit-plugin-guestfs nbdkit-plugin-libvirt libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients \
	python3-boto3 curl prometheus g++ lzip mandoc groff zsh fish

DEPLOY_PACKAGES = $(RUN_PACKAGES) binutils python3-libnbd xz-utils systemd mmdebstrap buildah podman runc \
	containernetworking-plugins iptables prometheus

.PHONY: all build install uninstall run test lint fuzz fuzz-differential bench image deb test-deploy screenshot clean
all: build

# install PACKAGES, those of them that are missing. dpkg-query exits with an error
# for packages it does not know; what counts is which are installed. No service of
# theirs is started (SYSTEMD_OFFLINE).
define install
	@missing=$$(for p in $(1); do \
	    dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing" $$missing; \
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive SYSTEMD_OFFLINE=1 \
	      apt-get install -y -qq --no-install-recommends $$missing; } >/dev/null || exit 1; \
	else \
	    echo "make: error: these Debian packages are missing:" $$missing >&2; \
	    echo "install them as root: apt-get install" $$missing >&2; exit 1; \
	fi
endef

build:
	$(GO) build -trimpath $(if $(LDFLAGS),-ldflags='$(LDFLAGS)') -o $(BIN) ./cmd/nbdhost

# Installs the program, its manual page and completions. PREFIX=DIR is where to
# (/usr/local), DESTDIR=DIR is put before that for packages, and NBDKIT=yes adds a
# link named nbdkit, for what starts nbdkit.
PREFIX ?= /usr/local
bindir    = $(DESTDIR)$(PREFIX)/bin
share     = $(DESTDIR)$(PREFIX)/share
INSTALLED = $(bindir)/nbdhost $(share)/man/man1/nbdhost.1 $(share)/bash-completion/completions/nbdhost \
	$(share)/zsh/site-functions/_nbdhost $(share)/fish/vendor_completions.d/nbdhost.fish

install: build
	@umask 022 && mkdir -p $(dir $(INSTALLED))
	install -m 755 $(BIN) $(bindir)/nbdhost
	umask 022 && $(BIN) --man >$(share)/man/man1/nbdhost.1
	umask 022 && $(BIN) --completion=bash >$(share)/bash-completion/completions/nbdhost
	umask 022 && $(BIN) --completion=zsh >$(share)/zsh/site-functions/_nbdhost
	umask 022 && $(BIN) --completion=fish >$(share)/fish/vendor_completions.d/nbdhost.fish
ifeq ($(NBDKIT),yes)
	ln -sf nbdhost $(bindir)/nbdkit
endif

# A file named nbdkit is removed only if it is the link to nbdhost.
uninstall:
	rm -f $(INSTALLED)
	@if [ "$$(readlink $(bindir)/nbdkit)" = nbdhost ]; then rm $(bindir)/nbdkit; fi

# Serves 1 GiB of memory on a Unix socket until Ctrl-C.
run:
	$(call install,$(RUN_PACKAGES))
	$(MAKE) --no-print-directory build
	@dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT && trap : INT TERM && \
	echo "serving 1 GiB of memory at nbd+unix:///?socket=$$dir/nbd.sock" && \
	echo "in another terminal try:" && \
	echo "    nbdinfo 'nbd+unix:///?socket=$$dir/nbd.sock'" && \
	echo "    nbdcopy /etc/services 'nbd+unix:///?socket=$$dir/nbd.sock'" && \
	echo "Ctrl-C stops it." && \
	$(BIN) --foreground --unix "$$dir/nbd.sock" memory 1G

# -race needs cgo; the packages without C are tested without it as well.
# The leak checks of LeakSanitizer know nothing of Go's memory.
test:
	$(call install,$(TEST_PACKAGES))
	@echo "nbdkit of other releases:" $$(tests/trees.sh trixie sid)
	$(MAKE) --no-print-directory build
	$(GOTESTSUM) --packages=./... -- -race -shuffle=on -timeout 40m
	CGO_ENABLED=0 $(GOTESTSUM) --packages="./protocol ./backend ./server ./client" -- -shuffle=on
	GOMAXPROCS=1 $(GOTESTSUM) --packages="./backend ./server" -- -shuffle=on
	ASAN_OPTIONS=detect_leaks=0 $(GOTESTSUM) --packages="./abi ./cshim ./loader" -- -asan -shuffle=on

lint:
	@test -z "$$(gofmt -l .)" || { gofmt -d .; exit 1; }
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
	$(GO) mod tidy -diff
	$(GO) mod verify
	cd deploy && $(GO) vet ./... && $(GO) mod tidy -diff && $(GO) mod verify

# Every fuzz target for FUZZTIME each.
fuzz:
	@for pkg in $$($(GO) list ./...); do \
	    for target in $$($(GO) test -list '^Fuzz' $$pkg | grep '^Fuzz'); do \
	        echo "$$pkg $$target"; \
	        $(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 1s $$pkg || exit 1; \
	    done; \
	done

# Has the same random conversations with nbdkit and with nbdhost for each of several
# plugins, and the same requests made of random chains of filters, all at once for FUZZTIME.
fuzz-differential: FUZZTIME = 1h
fuzz-differential:
	$(call install,$(TEST_PACKAGES))
	$(GO) test -run '^Test(Differential|FilterChains)$$' -timeout 0 -parallel 8 -v ./tests -args -differential $(FUZZTIME) -differential-seed $$(date +%s)

# Compares nbdhost with nbdkit, qemu-nbd and the floor, on an idle machine for about
# 20 minutes. ROWS=REGEXP chooses rows, ROUNDS=N and SECONDS=S say how often and how
# long; DOC=docs/performance.md writes the tables and plots; PERF=DIR writes profiles.
bench:
	$(call install,$(TEST_PACKAGES))
	$(MAKE) --no-print-directory build
	$(GO) run ./tests/bench --nbdhost $(BIN) $(if $(value ROWS),--rows '$(value ROWS)') $(if $(ROUNDS),--rounds $(ROUNDS)) \
	    $(if $(SECONDS),--seconds $(SECONDS)) $(if $(DOC),--doc $(DOC)) $(if $(PERF),--perf $(PERF))

# Builds the image of the Dockerfile, where need be with images to begin with made of
# Debian's packages (deploy/containers.sh), and tests what is in it. Who has docker, or
# podman and a registry, needs none of this: docker build .
image:
	$(call install,$(DEPLOY_PACKAGES))
	deploy/containers.sh buildah bud --isolation chroot --format docker --pull-never --layers \
	    --build-arg GOPROXY="$$($(GO) env GOPROXY)" --build-arg REVISION="$$(git rev-parse HEAD)" \
	    --build-arg VERSION="$$(sed -n 's/^var version = "\(.*\)"/\1/p' cmd/nbdhost/config.go)" --tag nbdhost .
	cd deploy && $(GO) test -count=1 -v -run '^TestImage' .

# Makes bin/nbdhost_VERSION_ARCH.deb.
deb:
	$(call install,gcc libc6-dev binutils)
	deploy/deb.sh bin

# Draws the dashboard to docs/dashboard.png, with a server that has some clients.
screenshot:
	$(call install,$(DEPLOY_PACKAGES) chromium fonts-dejavu-core)
	cd deploy && $(GO) test -count=1 -run '^TestDashboard$$' . -args -screenshot "$(CURDIR)/docs/dashboard.png"

# Runs what is in deploy/, but for the image.
test-deploy:
	$(call install,$(DEPLOY_PACKAGES))
	cd deploy && $(GO) vet . && $(GO) test -count=1 -skip '^TestImage' .

clean:
	rm -rf bin
