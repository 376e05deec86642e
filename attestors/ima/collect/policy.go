package collect

import (
	"slices"
	"strings"
)

// PolicyPath is where Linux shows the IMA policy that is in force, to root, if it was built to.
const PolicyPath = "/sys/kernel/security/ima/policy"

// ran are the hooks that files go through which somebody runs or reads.
var ran = []string{"BPRM_CHECK", "CREDS_CHECK", "MMAP_CHECK", "MMAP_CHECK_REQPROT", "FILE_MMAP", "FILE_CHECK", "PATH_CHECK"}

// UsersRules are the rules of a policy by which files that other users than root run or read are
// measured into IMA's own PCR, among root's.
func UsersRules(policy string) (rules []string) {
	for line := range strings.Lines(policy) {
		words := strings.Fields(line)
		if len(words) == 0 || words[0] != "measure" {
			continue
		}
		hook, root, apart := "", false, false
		for _, w := range words[1:] {
			name, value, _ := strings.Cut(w, "=")
			switch name {
			case "func":
				hook = value
			case "uid", "euid":
				root = root || value == "0"
			case "pcr":
				apart = value != "10"
			}
		}
		if slices.Contains(ran, hook) && !root && !apart {
			rules = append(rules, strings.Join(words, " "))
		}
	}
	return rules
}
