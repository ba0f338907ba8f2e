package main

import (
	"debug/elf"
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"nbdhost/loader"
)

// version is what --version shows; the linker may set it (-X main.version=...).
var version = "0.1.0"

// nbdkitVersion is the release of nbdkit whose options and functions there are.
// Programs that run nbdkit want to know it.
const nbdkitVersion = "1.48.1"

// calledAsNbdkit tells whether the program has nbdkit's name, by a link perhaps.
func calledAsNbdkit(name string) bool { return filepath.Base(name) == "nbdkit" }

// versionText is what --version shows first.
func versionText(name string) string {
	if calledAsNbdkit(name) {
		return fmt.Sprintf("nbdkit %s (nbdhost %s)", nbdkitVersion, version)
	}
	return "nbdhost " + version
}

// dumpConfig returns the KEY=VALUE lines of --dump-config (nbdkit-probing(1)).
// Programs look for version, version_major and version_minor: called as
// nbdkit these are nbdkit's.
func dumpConfig(name string) string {
	yes := func(ok bool) string {
		if ok {
			return "yes"
		}
		return "no"
	}
	title, release := "nbdhost", version
	if calledAsNbdkit(name) {
		title, release = "nbdkit", nbdkitVersion
	}
	part := strings.Split(release, ".")
	plugins, filters := loader.Directory(loader.PluginKind), loader.Directory(loader.FilterKind)
	self := executable()
	lines := []string{
		"binary=" + self,
		"bindir=" + filepath.Dir(self),
		"exit_with_parent=yes",
		"filterdir=" + filters,
		"host_cpu=" + cpuName(),
		"host_os=linux-gnu",
		"libdir=" + filepath.Dir(filepath.Dir(plugins)),
		"mandir=/usr/share/man",
		"max_api_version=2", // of plugins
		"name=" + title,
		"nbdhost_version=" + version,
		"nbdkit_version=" + nbdkitVersion,
		"plugindir=" + plugins,
		"root_tls_certificates_dir=/etc/pki/nbdkit",
		"run_default_socket=Unix",
		"sbindir=" + filepath.Dir(self),
		"selinux=yes",
		"soext=so",
		"sysconfdir=/etc",
		"timeout_option=yes",
		"tls=yes",
		"version=" + release,
		"version_major=" + part[0],
		"version_minor=" + part[1],
		"vsock_option=yes",
		"zstd=" + yes(usesZstd(filepath.Join(plugins, "nbdkit-memory-plugin.so"))),
	}
	return strings.Join(lines, "\n") + "\n"
}

// cpuName is the processor's name as configuration scripts have it.
func cpuName() string {
	name, ok := map[string]string{"amd64": "x86_64", "386": "i686", "arm64": "aarch64", "ppc64le": "powerpc64le"}[runtime.GOARCH]
	if !ok {
		return runtime.GOARCH
	}
	return name
}

// usesZstd tells whether a module was compiled with zstd: with one of those that can be, all are.
func usesZstd(module string) bool {
	f, err := elf.Open(module)
	if err != nil {
		return false
	}
	defer f.Close()
	libs, err := f.ImportedLibraries()
	return err == nil && slices.ContainsFunc(libs, func(l string) bool { return strings.HasPrefix(l, "libzstd.") })
}
