// Package kinds names the kinds of programs that are found on each system. It
// trusts them to keep what [program.Kind] promises.
package kinds
