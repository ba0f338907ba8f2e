package loader

import (
	"slices"
	"strings"
)

// debianBase is the Debian package with most modules.
const debianBase = "nbdkit"

// debianPlugins are the plugins that have a package of their own, as of Debian 12.
var debianPlugins = map[string]string{
	"S3": "nbdkit-plugin-python", "example1": "nbdkit-plugin-dev", "example2": "nbdkit-plugin-dev",
	"example3": "nbdkit-plugin-dev", "example4": "nbdkit-plugin-dev", "gcs": "nbdkit-plugin-python",
	"guestfs": "nbdkit-plugin-guestfs", "libvirt": "nbdkit-plugin-libvirt", "lua": "nbdkit-plugin-lua",
	"perl": "nbdkit-plugin-perl", "python": "nbdkit-plugin-python", "ruby": "nbdkit-plugin-ruby",
	"tcl": "nbdkit-plugin-tcl",
}

// debianModules are the modules of debianBase, up to release 1.48.
var debianModules = map[Kind][]string{
	PluginKind: strings.Fields(`blkio cc cdi curl data eval file floppy full info iso linuxdisk memory nbd
		null ondemand ones partitioning pattern random sh sparse-random split ssh tmpdisk torrent vram zero`),
	FilterKind: strings.Fields(`blocksize blocksize-policy bzip2 cache cacheextents checkwrite count cow ddrescue
		delay error evil exitlast exitwhen exportname ext2 extentlist fua gzip indexed-gzip ip limit log luks lzip
		map multi-conn nocache noextents nofilter noparallel nozero offset openonce partition pause protect
		qcow2dec rate readahead readonly retry retry-request rotational scan spinning stats swab tar time-limit
		tls-fallback truncate xor xz`),
}

// debianPackage returns the package in which Debian has a module, or "".
func debianPackage(kind Kind, name string) string {
	if pkg := debianPlugins[name]; pkg != "" && kind == PluginKind {
		return pkg
	}
	if slices.Contains(debianModules[kind], name) {
		return debianBase
	}
	return ""
}
