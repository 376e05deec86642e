//go:build race

package appraise

// mutantStride is how many events TestMutants goes on: the race detector makes each
// appraisal ten times as slow, and `make fuzz` tries them all without it.
const mutantStride = 16
