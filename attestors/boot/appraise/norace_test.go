//go:build !race

package appraise

const mutantStride = 1 // see race_test.go
