package appraise

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"github.com/countersign/countersign/attestors/evidence"
)

// Windows is what the Windows boot manager and loader measured into PCR 12 and 13
// before they closed them. It says something of Windows only beside boot components
// that are Windows': another system may extend the same.
//
// Settings that weaken are true if they were ever measured so; settings that
// protect are true only if they always were, and absent if they never were
// measured.
type Windows struct {
	BootDebugging   bool           `json:"boot_debugging"`
	KernelDebugging bool           `json:"kernel_debugging"`
	TestSigning     bool           `json:"test_signing"`
	FlightSigning   bool           `json:"flight_signing"`
	SafeMode        bool           `json:"safe_mode"`
	WinPE           bool           `json:"winpe"`
	HypervisorDebug bool           `json:"hypervisor_debugging"`
	CodeIntegrity   *bool          `json:"code_integrity,omitempty"`
	DEP             *bool          `json:"dep,omitempty"`        // DEPPolicy protects programs by default
	DEPPolicy       DEPPolicy      `json:"dep_policy,omitempty"` // absent where it isn't one policy that is known
	VBS             *bool          `json:"vbs,omitempty"`        // virtual secure mode was launched
	HVCI            *bool          `json:"hvci,omitempty"`       // hypervisor-enforced code integrity
	BitLocker       []uint64       `json:"bitlocker,omitempty"`  // how each volume was unlocked, in Microsoft's flags
	BootCount       *uint64        `json:"boot_count,omitempty"`
	ELAM            []WindowsELAM  `json:"elam,omitempty"`
	Modules         []WindowsImage `json:"modules,omitempty"` // boot manager, loader, kernel and boot drivers

	protects map[uint32][]uint64 // values of settings that protect, as they were measured
}

// DEPPolicy is Windows' policy for data execution prevention, the boot option nx.
type DEPPolicy string

const (
	DEPOptIn     DEPPolicy = "opt-in"     // 0: Windows' own programs, and those that ask for it
	DEPOptOut    DEPPolicy = "opt-out"    // 1: all programs but those that are excepted
	DEPAlwaysOff DEPPolicy = "always-off" // 2
	DEPAlwaysOn  DEPPolicy = "always-on"  // 3
)

var depPolicies = []DEPPolicy{DEPOptIn, DEPOptOut, DEPAlwaysOff, DEPAlwaysOn}

// WindowsELAM is the measured configuration of an early-launch antimalware driver.
type WindowsELAM struct {
	Name     string `json:"name"`
	Measured string `json:"measured,omitempty"`
	Policy   string `json:"policy,omitempty"`
	Config   string `json:"config,omitempty"`
}

// WindowsImage is one module that was loaded while Windows booted.
type WindowsImage struct {
	Path         string `json:"path"`
	Authenticode string `json:"authenticode"`
	Validated    bool   `json:"validated"`
	Publisher    string `json:"publisher,omitempty"`
}

// Types of SIPA events, as Windows' wbcl.h names them.
const (
	sipaBootCounter       = 0x00020002
	sipaBitLockerUnlock   = 0x00020005
	sipaBootDebugging     = 0x00040001
	sipaKernelDebug       = 0x00050001
	sipaCodeIntegrity     = 0x00050002
	sipaTestSigning       = 0x00050003
	sipaDEP               = 0x00050004
	sipaSafeMode          = 0x00050005
	sipaWinPE             = 0x00050006
	sipaHypervisorDebug   = 0x0005000D
	sipaVSMLaunch         = 0x00050012
	sipaFlightSigning     = 0x00050021
	sipaFilePath          = 0x00070001
	sipaAuthenticode      = 0x00070004
	sipaPublisher         = 0x00070008
	sipaImageValidated    = 0x0007000A
	sipaELAMKeyName       = 0x00090001
	sipaELAMConfiguration = 0x00090002
	sipaELAMPolicy        = 0x00090003
	sipaELAMMeasured      = 0x00090004
	sipaHVCI              = 0x000A0007
	sipaELAM              = 0x40010002
	sipaLoadedModule      = 0x40010003

	sipaKindMask  = 0x000F0000
	sipaContainer = 0x00010000
)

// wbclSeparator closes PCR 12 to 14 before anything but Windows' loader runs.
var wbclSeparator = evidence.Sum([]byte("WBCL"))

// windowsEnd is the place of Windows' separator in a PCR, or -1.
func windowsEnd(pcr []measurement) int {
	return slices.IndexFunc(pcr, func(m measurement) bool { return m.digest == wbclSeparator })
}

// windows reads what stands before the separators. A host that didn't close both
// PCRs has no such facts, and neither has one with an event there that can't be
// read: it could weaken any of them.
func (b *bootLog) windows(f *Facts) {
	if windowsEnd(b.pcr[12]) < 0 || windowsEnd(b.pcr[13]) < 0 {
		return
	}
	w, ok := &Windows{}, true
	for _, pcr := range []int{12, 13} {
		for i := range b.pcr[pcr][:windowsEnd(b.pcr[pcr])] {
			m := &b.pcr[pcr][i]
			why := "the digest isn't of the data, as everything before Windows' separator is"
			if !m.opaque() {
				err := w.read(m.proven, pcr)
				if err == nil {
					continue
				}
				why = err.Error()
			}
			b.limit(pcr, m.Event, why)
			ok = false
		}
	}
	if !ok {
		return
	}
	w.derive()
	w.Modules, w.ELAM = distinct(w.Modules), distinct(w.ELAM) // most are measured into both
	f.Windows = w
	b.took("windows", 12, 13)
}

// A sipaEvent is one of Windows' own events, many of which make up the data of
// one measured event.
type sipaEvent struct {
	kind uint32
	data []byte
}

// cutSIPA takes the first of the events that stand one behind another in b.
func cutSIPA(b []byte) (e sipaEvent, rest []byte, err error) {
	if len(b) < 8 {
		return e, nil, fmt.Errorf("%d bytes follow the last of Windows' events", len(b))
	}
	e.kind = binary.LittleEndian.Uint32(b)
	size := binary.LittleEndian.Uint32(b[4:])
	if uint64(size) > uint64(len(b)-8) {
		return e, nil, fmt.Errorf("the Windows event 0x%08x reaches past its end", e.kind)
	}
	e.data = b[8 : 8+size]
	return e, b[8+size:], nil
}

// splitSIPA is all of them, without what stands within them.
func splitSIPA(b []byte) (events []sipaEvent, err error) {
	for len(b) > 0 {
		var e sipaEvent
		if e, b, err = cutSIPA(b); err != nil {
			return nil, err
		}
		events = append(events, e)
	}
	return events, nil
}

// read takes the facts from one measured event. open are the containers that it is
// within, each at what is left of it.
func (w *Windows) read(data []byte, pcr int) error {
	open := [][]byte{data}
	for len(open) > 0 {
		top := len(open) - 1
		if len(open[top]) == 0 {
			open = open[:top]
			continue
		}
		e, rest, err := cutSIPA(open[top])
		if err != nil {
			return err
		}
		open[top] = rest
		switch {
		case e.kind == sipaLoadedModule:
			err = w.module(e.data)
		case e.kind == sipaELAM:
			err = w.elam(e.data)
		case e.kind&sipaKindMask == sipaContainer:
			open = append(open, e.data)
		default:
			err = w.setting(e, pcr)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// setting reads an event that holds one number. Those that aren't known are left.
func (w *Windows) setting(e sipaEvent, pcr int) error {
	var weakens *bool
	switch e.kind {
	case sipaBootDebugging:
		weakens = &w.BootDebugging
	case sipaKernelDebug:
		weakens = &w.KernelDebugging
	case sipaTestSigning:
		weakens = &w.TestSigning
	case sipaFlightSigning:
		weakens = &w.FlightSigning
	case sipaSafeMode:
		weakens = &w.SafeMode
	case sipaWinPE:
		weakens = &w.WinPE
	case sipaHypervisorDebug:
		weakens = &w.HypervisorDebug
	case sipaCodeIntegrity, sipaDEP, sipaVSMLaunch, sipaHVCI:
	case sipaBootCounter, sipaBitLockerUnlock:
	default:
		return nil
	}
	if len(e.data) == 0 || len(e.data) > 8 {
		return fmt.Errorf("the Windows event 0x%08x has %d bytes where a number is", e.kind, len(e.data))
	}
	var full [8]byte
	copy(full[:], e.data)
	n := binary.LittleEndian.Uint64(full[:])
	switch {
	case weakens != nil:
		*weakens = *weakens || n != 0
	case e.kind == sipaCodeIntegrity || e.kind == sipaDEP || e.kind == sipaVSMLaunch || e.kind == sipaHVCI:
		if w.protects == nil {
			w.protects = map[uint32][]uint64{}
		}
		w.protects[e.kind] = append(w.protects[e.kind], n)
	case e.kind == sipaBitLockerUnlock:
		if pcr == 12 { // measured into both
			w.BitLocker = append(w.BitLocker, n)
		}
	case w.BootCount != nil && *w.BootCount != n:
		return fmt.Errorf("the boot counter of Windows is %d and %d", *w.BootCount, n)
	default:
		w.BootCount = &n
	}
	return nil
}

// derive makes facts of the settings that protect. Those that turn something on are
// 1, and off 0; Windows has more values for some, so that another one is neither.
func (w *Windows) derive() {
	for kind, fact := range map[uint32]**bool{sipaCodeIntegrity: &w.CodeIntegrity, sipaVSMLaunch: &w.VBS, sipaHVCI: &w.HVCI} {
		values := w.protects[kind]
		if len(values) == 0 || slices.ContainsFunc(values, func(n uint64) bool { return n > 1 }) {
			continue
		}
		on := !slices.Contains(values, 0)
		*fact = &on
	}
	policies := w.protects[sipaDEP]
	w.protects = nil
	if len(policies) == 0 || slices.ContainsFunc(policies, func(n uint64) bool { return n >= uint64(len(depPolicies)) || n != policies[0] }) {
		return
	}
	w.DEPPolicy = depPolicies[policies[0]]
	on := w.DEPPolicy == DEPOptOut || w.DEPPolicy == DEPAlwaysOn
	w.DEP = &on
}

func (w *Windows) module(data []byte) error {
	events, err := splitSIPA(data)
	if err != nil {
		return err
	}
	var image WindowsImage
	for _, e := range events {
		switch e.kind {
		case sipaFilePath:
			image.Path, _ = utf16Text(e.data)
		case sipaPublisher:
			image.Publisher, _ = utf16Text(e.data)
		case sipaAuthenticode:
			image.Authenticode = hex.EncodeToString(e.data)
		case sipaImageValidated:
			image.Validated = len(e.data) == 1 && e.data[0] == 1
		}
	}
	w.Modules = append(w.Modules, image)
	return nil
}

// elam reads one driver's configuration, which some versions wrap twice.
func (w *Windows) elam(data []byte) error {
	events, err := splitSIPA(data)
	for err == nil && len(events) == 1 && events[0].kind == sipaELAM {
		events, err = splitSIPA(events[0].data)
	}
	if err != nil {
		return err
	}
	var driver WindowsELAM
	for _, e := range events {
		switch e.kind {
		case sipaELAM:
			return errors.New("a driver's configuration stands among another's")
		case sipaELAMKeyName:
			driver.Name, _ = utf16Text(e.data)
		case sipaELAMMeasured:
			driver.Measured = hex.EncodeToString(e.data)
		case sipaELAMPolicy:
			driver.Policy = hex.EncodeToString(e.data)
		case sipaELAMConfiguration:
			driver.Config = hex.EncodeToString(e.data)
		}
	}
	w.ELAM = append(w.ELAM, driver)
	return nil
}

// distinct leaves out what stands in a list a second time.
func distinct[T comparable](list []T) []T {
	seen := make(map[T]bool, len(list))
	return slices.DeleteFunc(list, func(v T) bool {
		again := seen[v]
		seen[v] = true
		return again
	})
}
