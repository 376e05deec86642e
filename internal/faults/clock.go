// Package faults is the one place where tests reach into a running broker or
// agent: a wall clock that can be stepped, and points in the code where the
// process can be made to die. Both exist only in binaries built with the
// faults tag; in every other build Now is time.Now, Point is nothing, and the
// names of the points are not in the binary.
package faults
