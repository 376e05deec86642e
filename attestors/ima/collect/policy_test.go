package collect

import (
	"slices"
	"testing"
)

func TestUsersRules(t *testing.T) {
	for policy, want := range map[string][]string{
		"": nil,
		"dont_measure fsmagic=0x9fa0\nmeasure func=MMAP_CHECK mask=MAY_EXEC\nmeasure func=BPRM_CHECK  mask=MAY_EXEC\n": {"measure func=MMAP_CHECK mask=MAY_EXEC", "measure func=BPRM_CHECK mask=MAY_EXEC"},
		"measure func=BPRM_CHECK euid=0\nmeasure func=CREDS_CHECK uid=0\nmeasure func=MODULE_CHECK":                    nil,
		"measure func=BPRM_CHECK uid=1001 pcr=15\nmeasure func=MMAP_CHECK pcr=15 mask=MAY_EXEC":                        nil,
		"measure func=BPRM_CHECK uid=1001\nmeasure func=MMAP_CHECK euid>0\nmeasure func=FILE_CHECK pcr=10":             {"measure func=BPRM_CHECK uid=1001", "measure func=MMAP_CHECK euid>0", "measure func=FILE_CHECK pcr=10"},
	} {
		if got := UsersRules(policy); !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", policy, got, want)
		}
	}
}
