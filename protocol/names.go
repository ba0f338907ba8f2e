package protocol

import (
	"fmt"
	"math/bits"
	"strings"
)

// flagNames spells a set of bits with the names of its members, joined by "|".
// Bits without a name appear together in hexadecimal.
func flagNames(set uint64, names []string) string {
	if set == 0 {
		return "0"
	}
	var b strings.Builder
	var unknown uint64
	for rest := set; rest != 0; rest &= rest - 1 {
		i := bits.TrailingZeros64(rest)
		if i >= len(names) || names[i] == "" {
			unknown |= 1 << i
			continue
		}
		if b.Len() > 0 {
			b.WriteByte('|')
		}
		b.WriteString(names[i])
	}
	if unknown != 0 {
		if b.Len() > 0 {
			b.WriteByte('|')
		}
		fmt.Fprintf(&b, "%#x", unknown)
	}
	return b.String()
}

// valueName looks a value up in names, and falls back on kind and the number.
func valueName[T ~uint16 | ~uint32](v T, names map[T]string, kind string) string {
	if s, ok := names[v]; ok {
		return s
	}
	return fmt.Sprintf("%s(%d)", kind, uint32(v))
}
