package backend

import (
	"errors"
	"fmt"
	"math"
	"syscall"
	"testing"
)

func TestExtentsAdd(t *testing.T) {
	for _, tt := range []struct {
		name string
		add  []Extent
		want string
		fail int // which Add fails, from 1
	}{
		{"none", nil, "[]", 0},
		{"exact", []Extent{{100, 100, 0}}, "[{100 100 0}]", 0},
		{"cut off on both sides", []Extent{{0, 1000, 3}}, "[{100 100 3}]", 0},
		{"neighbours of one type are one", []Extent{{100, 10, 1}, {110, 10, 1}, {120, 10, 0}}, "[{100 20 1} {120 10 0}]", 0},
		{"all before the start", []Extent{{0, 50, 1}, {50, 50, 0}}, "[]", 0},
		{"before the start, then in", []Extent{{0, 50, 1}, {50, 60, 0}, {110, 5, 1}}, "[{100 10 0} {110 5 1}]", 0},
		{"after the end", []Extent{{100, 100, 0}, {200, 100, 1}}, "[{100 100 0}]", 0},
		{"empty ones anywhere", []Extent{{5000, 0, 0}, {100, 10, 0}, {7, 0, 1}, {110, 10, 1}}, "[{100 10 0} {110 10 1}]", 0},
		{"a gap", []Extent{{100, 10, 0}, {111, 10, 0}}, "[{100 10 0}]", 2},
		{"backwards", []Extent{{100, 10, 0}, {100, 10, 0}}, "[{100 10 0}]", 2},
		{"a gap before the start", []Extent{{0, 10, 0}, {20, 100, 0}}, "[]", 2},
		{"first one too late", []Extent{{101, 10, 0}}, "[]", 1},
		{"2^64 and more", []Extent{{100, math.MaxUint64, 2}}, "[{100 100 2}]", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var x Extents
			for range 2 { // the second time in used memory
				x.Reset(100, 200)
				for i, e := range tt.add {
					err := x.Add(e.Offset, e.Length, e.Type)
					if (err != nil) != (tt.fail == i+1) || err != nil && !errors.Is(err, syscall.ERANGE) {
						t.Errorf("add %v: %v", e, err)
					}
				}
				if got := fmt.Sprint(x.List()); got != tt.want {
					t.Errorf("got %s, need %s", got, tt.want)
				}
			}
			if s, e := x.start, x.end; s != 100 || e != 200 {
				t.Errorf("got range %d, %d", s, e)
			}
		})
	}
}

func TestExtentsLimit(t *testing.T) {
	var x Extents
	x.Reset(0, math.MaxInt64)
	for i := range uint64(MaxExtents + 10) {
		if err := x.Add(i, 1, uint32(i%2)); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(x.List()); n != MaxExtents {
		t.Errorf("got %d, need %d", n, MaxExtents)
	}
}

// Whatever is added, the list is ascending, without gaps, within the range, and
// no two neighbours have the same type.
func FuzzExtents(f *testing.F) {
	f.Add(uint64(0), uint64(100), []byte{1, 10, 0, 2, 20, 1})
	f.Add(uint64(5), uint64(20), []byte{0, 10, 3, 10, 0, 1, 10, 255, 3})
	f.Fuzz(func(t *testing.T, start, length uint64, ops []byte) {
		if start > math.MaxInt64 || length > math.MaxInt64 {
			t.Skip()
		}
		var x Extents
		x.Reset(start, start+length)
		at := start - min(start, 16)
		for ; len(ops) >= 3; ops = ops[3:] {
			off, n := at+uint64(int64(int8(ops[0]))/64), uint64(ops[1])
			if x.Add(off, n, uint32(ops[2]%4)) == nil && n > 0 {
				at = off + n
			}
		}
		next := start
		for i, e := range x.List() {
			if e.Offset != next || e.Length == 0 || e.Offset+e.Length > start+length || i > 0 && x.List()[i-1].Type == e.Type {
				t.Fatalf("entry %d of %v in [%d, %d)", i, x.List(), start, start+length)
			}
			next += e.Length
		}
	})
}
