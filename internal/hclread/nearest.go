package hclread

import "slices"

// longest is the longest word that a likely one is looked for.
const longest = 64

// Nearest finds what was most likely meant by word, or nothing.
func Nearest(word string, known []string) string {
	if len(word) > longest {
		return ""
	}
	best, at := "", min(len(word), len(word)/3+2)
	for _, k := range slices.Sorted(slices.Values(known)) {
		if d := distance(word, k); d < at {
			best, at = k, d
		}
	}
	return best
}

// distance is Levenshtein's, in bytes.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
