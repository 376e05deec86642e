package appraise

import (
	"reflect"
	"slices"
)

// falseFacts names the facts that another log of the same PCR values has, and that
// are neither those of the honest log nor absent. A list that is given as whole
// must hold everything that the honest one has, in order. Lists of components may
// hold more: a text that firmware measured can be presented as an image that it
// isn't, which no policy allows.
func falseFacts(honest, got Facts) (out []string) {
	check := func(name string, want, have any) {
		if v := reflect.ValueOf(have); !v.IsZero() && !reflect.DeepEqual(want, have) {
			out = append(out, name)
		}
	}
	check("firmware version", honest.FirmwareVersion, got.FirmwareVersion)
	check("secure boot", honest.SecureBoot, got.SecureBoot)
	check("secure boot mode", honest.SecureBootMode, got.SecureBootMode)
	check("secure boot notes", honest.SecureBootNotes, got.SecureBootNotes)
	check("databases", honest.Databases, got.Databases)
	check("authorities", honest.Authorities, got.Authorities)
	check("SBAT level", honest.SbatLevel, got.SbatLevel)
	check("MOK", honest.MOK, got.MOK)
	check("kernel command line", honest.KernelCommandLine, got.KernelCommandLine)
	check("windows", honest.Windows, got.Windows)

	for _, whole := range []struct {
		name      string
		pcr       int
		want, got int
	}{
		{"authorities", pcrSecureBoot, len(honest.Authorities), len(got.Authorities)},
		{"MOK", pcrMOK, len(honest.MOK), len(got.MOK)},
	} {
		if got.Complete(whole.pcr) && whole.got < whole.want {
			out = append(out, whole.name+" hidden")
		}
	}
	for pcr := range firmwarePCRs + 8 {
		want, have := componentsOf(honest, pcr), componentsOf(got, pcr)
		known := slices.DeleteFunc(slices.Clone(have), func(c Component) bool { return !slices.Contains(want, c) })
		if pcr != pcrConfig && len(have) > 0 && !slices.Equal(want, known) {
			out = append(out, "components")
		}
		for _, c := range want {
			if got.Complete(pcr) && !slices.Contains(have, c) {
				out = append(out, "a component hidden")
			}
		}
		if got.proven(pcr) && !honest.proven(pcr) {
			out = append(out, "a PCR proven")
		}
	}
	for _, line := range honest.KernelCommandLines {
		if got.LinesComplete && !slices.Contains(got.KernelCommandLines, line) {
			out = append(out, "a command line hidden")
		}
	}
	return out
}

func componentsOf(f Facts, pcr int) (list []Component) {
	for _, c := range f.Components {
		if c.PCR == pcr && c.Kind != KindUserspace {
			list = append(list, c)
		}
	}
	return list
}
