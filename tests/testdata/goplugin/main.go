// Command goplugin is an nbdkit plugin when it is built with -buildmode=c-shared:
// a disk of 1 MiB in memory. A read at 524301 fails. Memory that it allocates at
// each request keeps its own garbage collector busy.
package main

/*
#cgo CFLAGS: -Wno-unused-parameter
#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>
#include <stdlib.h>

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

extern int goRead(void *buf, uint32_t count, uint64_t offset);
extern int goWrite(void *buf, uint32_t count, uint64_t offset);
extern int goZero(uint32_t count, uint64_t offset);
extern int goChild(void);

static void *g_open(int readonly) { return NBDKIT_HANDLE_NOT_NEEDED; }
static int64_t g_get_size(void *h) { return 1 << 20; }
static int g_pread(void *h, void *buf, uint32_t count, uint64_t offset, uint32_t flags) { return goRead(buf, count, offset); }
static int g_pwrite(void *h, const void *buf, uint32_t count, uint64_t offset, uint32_t flags) { return goWrite((void *)buf, count, offset); }
static int g_zero(void *h, uint32_t count, uint64_t offset, uint32_t flags) { return goZero(count, offset); }
static int g_flush(void *h, uint32_t flags) { return 0; }
static void failed(const char *text, int err) { nbdkit_error("%s", text); nbdkit_set_error(err); }

static struct nbdkit_plugin plugin = {
	._struct_size = sizeof plugin, ._api_version = NBDKIT_API_VERSION, ._thread_model = THREAD_MODEL,
	.name = "disk", .config_complete = goChild, .open = g_open, .get_size = g_get_size, .pread = g_pread,
	.pwrite = g_pwrite, .zero = g_zero, .trim = g_zero, .flush = g_flush,
};
static struct nbdkit_plugin *get_plugin(void) { return &plugin; }
*/
import "C"

import (
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"unsafe"
)

var (
	mu   sync.RWMutex
	disk = make([]byte, 1<<20)
)

//export plugin_init
func plugin_init() *C.struct_nbdkit_plugin { return C.get_plugin() }

//export goChild
func goChild() C.int {
	cmd := exec.Command("sed", "-n", "s/^Sig[IB]/child: &/p", "/proc/self/status")
	cmd.Stdout = os.Stderr
	if err := cmd.Run(); err != nil {
		return fail(err.Error(), syscall.EIO)
	}
	return 0
}

func fail(text string, errno syscall.Errno) C.int {
	s := C.CString(text)
	defer C.free(unsafe.Pointer(s))
	C.failed(s, C.int(errno))
	return -1
}

//export goRead
func goRead(buf unsafe.Pointer, count C.uint32_t, offset C.uint64_t) C.int {
	if offset == 524301 {
		runtime.GC()
		goChild()
		return fail("fails as asked", syscall.ENOSPC)
	}
	mu.RLock()
	defer mu.RUnlock()
	// By way of garbage.
	copy(unsafe.Slice((*byte)(buf), count), append([]byte(nil), disk[offset:][:count]...))
	return 0
}

//export goWrite
func goWrite(buf unsafe.Pointer, count C.uint32_t, offset C.uint64_t) C.int {
	mu.Lock()
	defer mu.Unlock()
	copy(disk[offset:], append([]byte(nil), unsafe.Slice((*byte)(buf), count)...))
	return 0
}

//export goZero
func goZero(count C.uint32_t, offset C.uint64_t) C.int {
	mu.Lock()
	defer mu.Unlock()
	clear(disk[offset:][:count])
	return 0
}

func main() {}
