// Package deliver makes of a credential's fields what a program reads, by the
// config's templates. The packages below it are the ways in which that reaches
// the program.
//
// It trusts the config, and neither the fields' values, which a broker sent,
// nor the readers of what is written: a value stays inside its place. No error
// has a byte of a secret in it.
package deliver

// MaxContent bounds one file's content.
const MaxContent = 1 << 20
