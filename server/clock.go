package server

import "time"

var programBegan = time.Now()

// now is the time since the program began. Requests are timed by it: it looks at one clock, where
// time.Now looks at two.
func now() time.Duration { return time.Since(programBegan) }
