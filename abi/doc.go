// Package abi mirrors the C structs through which nbdkit modules
// and the server meet: struct nbdkit_plugin and struct nbdkit_filter
// (nbdkit-plugin(3), API versions 1 and 2; nbdkit-filter(3), of the releases that
// [CopyFilter] knows).
//
// A module hands over a pointer to its struct once, from its *_init function;
// [CopyPlugin] copies it, bounded by the size the module was compiled with, and
// the copy is what the rest of the server reads. The struct of a filter has no
// size in it: its layout follows from the release that it was built for. A struct
// belongs to the module and is valid until the library is unloaded, and so are
// the strings and functions that it points to. Nothing here calls C or keeps
// state, so every function may be called on any goroutine.
//
// A test compiles a C program against the installed nbdkit headers and compares
// every offset and size with the Go declarations.
package abi
