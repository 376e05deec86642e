package appraise

import (
	"crypto/sha1"
	"encoding/binary"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	boot "github.com/countersign/countersign/attestors/boot/appraise"
	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/ima"
	imaappraise "github.com/countersign/countersign/attestors/ima/appraise"
	"github.com/countersign/countersign/attestors/process"
	tpmappraise "github.com/countersign/countersign/attestors/tpm/appraise"
	"github.com/countersign/countersign/broker/internal/verify/reference"
	"github.com/countersign/countersign/test/check"
)

// recorded is a boot's logs and PCRs; cut says after how many entries its IMA
// list was sent first, and the PCRs of that moment.
func recorded(t *testing.T, name string, cut int) (whole Logs, pcrs map[int]evidence.Digest, first Logs, then map[int]evidence.Digest) {
	t.Helper()
	file := func(f string) []byte {
		return check.Must(os.ReadFile(filepath.Join("../../../../test/vectors/boots", name, f)))(t)
	}
	pcrs = check.Must(tpmappraise.ParsePCRRead(string(file("pcrs.txt"))))(t)
	whole = Logs{Event: file("binary_bios_measurements"), IMA: file("ima_binary_runtime_measurements"), IMAPresent: true}
	first, then = whole, maps.Clone(pcrs)
	var ten evidence.Digest
	r := ima.NewReader(whole.IMA, 0)
	for range cut {
		e, _, err := r.Next()
		check.Nil(t, err)
		d := evidence.Sum(e.Data)
		ten = evidence.Sum(append(ten[:], d[:]...))
	}
	first.IMA, then[10] = whole.IMA[:r.Offset()], ten
	return whole, pcrs, first, then
}

const (
	bootID = "11111111-2222-3333-4444-555555555555"
	reset  = 7
)

// What is known needn't be sent again, and whatever doesn't continue it starts
// over.
func TestResume(t *testing.T) {
	whole, pcrs, first, then := recorded(t, "clean", 20)
	k := check.Must(appraiseLogs(first, bootID, reset, then, nil))(t)
	id, logs, offset := k.Resume()
	if id != bootID || offset != len(first.IMA) || logs != evidence.LogsDigest(whole.Event, nil) || k.files.len() != 19 {
		t.Fatalf("%s %s %d, %d files", id, logs, offset, k.files.len())
	}
	news := Logs{EventKnown: true, IMA: whole.IMA[offset:], IMAOffset: offset, IMAPresent: true}
	next := check.Must(appraiseLogs(news, bootID, reset, pcrs, k))(t)
	all := check.Must(appraiseLogs(whole, bootID, reset, pcrs, nil))(t)
	if !slices.EqualFunc(next.Measured(), all.Measured(), func(a, b imaappraise.Measurement) bool { return a.Name == b.Name && a.Digest == b.Digest }) {
		t.Errorf("resumed: %d files, at once %d", next.files.len(), all.files.len())
	}
	if next.facts != k.facts || next.BootFacts() == nil {
		t.Error("facts weren't kept")
	}
	if (&Known{}).Size()+len(whole.Event) > k.Size() || next.Size() <= k.Size() {
		t.Errorf("%d and %d bytes are remembered", k.Size(), next.Size())
	}
	for name, tt := range map[string]struct {
		logs  Logs
		reset uint32
		pcrs  map[int]evidence.Digest
		prior *Known
	}{
		"another boot":           {news, reset + 1, pcrs, k},
		"nothing known":          {news, reset, pcrs, nil},
		"an offset further on":   {Logs{EventKnown: true, IMA: whole.IMA[offset:], IMAOffset: offset + 1, IMAPresent: true}, reset, pcrs, k},
		"a list that shrank":     {Logs{EventKnown: true, IMAOffset: offset - 60, IMAPresent: true}, reset, pcrs, k},
		"news that don't fit":    {Logs{EventKnown: true, IMA: whole.IMA[offset+127:], IMAOffset: offset, IMAPresent: true}, reset, pcrs, k},
		"PCRs of another boot":   {news, reset, func() map[int]evidence.Digest { _, p, _, _ := recorded(t, "cmdline", 0); return p }(), k},
		"an event log not known": {Logs{EventKnown: true}, reset, pcrs, nil},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := appraiseLogs(tt.logs, bootID, tt.reset, tt.pcrs, tt.prior); !errors.Is(err, ErrResync) {
				t.Errorf("%v, want a new start", err)
			}
		})
	}
	// A list that was shown is shown again, or the host hides what ran.
	_, err := appraiseLogs(Logs{EventKnown: true}, bootID, reset, pcrs, k)
	if evidence.CheckOf(err) != imaappraise.CheckReplay || !strings.Contains(err.Error(), "now shows none") {
		t.Errorf("a hidden list: %v", err)
	}
	// A false list from its start is no new start.
	_, err = appraiseLogs(first, bootID, reset, pcrs, nil)
	if evidence.CheckOf(err) != imaappraise.CheckReplay {
		t.Errorf("a list that was cut: %v", err)
	}
	// Without an event log, what was proven of the same values stays so.
	silent := check.Must(appraiseLogs(Logs{IMA: whole.IMA[offset:], IMAOffset: offset, IMAPresent: true}, bootID, reset, pcrs, k))(t)
	if silent.BootFacts() != k.BootFacts() {
		t.Error("facts were lost with the log")
	}
	other := maps.Clone(pcrs)
	other[12] = evidence.Sum([]byte("later"))
	_, err = appraiseLogs(Logs{IMA: whole.IMA[offset:], IMAOffset: offset, IMAPresent: true}, bootID, reset, other, k)
	if evidence.CheckOf(err) != boot.CheckReplay || !strings.Contains(err.Error(), "shows none") {
		t.Errorf("a hidden event log: %v", err)
	}
	// Another boot id is the agent's word; the TPM wasn't reset.
	_, err = appraiseLogs(Logs{}, "66666666-2222-3333-4444-555555555555", reset, other, k)
	if evidence.CheckOf(err) == "" {
		t.Errorf("hidden behind another boot id: %v", err)
	}
}

// A log that isn't understood gives no facts, and fails who asks for some; one
// that was understood before in this boot can't be replaced by it.
func TestOddEventLog(t *testing.T) {
	whole, pcrs, _, _ := recorded(t, "clean", 0)
	odd := whole
	odd.Event = slices.Clone(whole.Event[:len(whole.Event)-100])
	k := check.Must(appraiseLogs(odd, bootID, reset, pcrs, nil))(t)
	if k.BootFacts() != nil || !strings.Contains(k.problem, "event-log-structure") {
		t.Errorf("facts of a broken log, or no reason: %q", k.problem)
	}
	var h Host
	if k.describe(&h); h.EventLogProblem != k.problem || h.SecureBoot != nil {
		t.Errorf("%+v", h)
	}
	good := check.Must(appraiseLogs(whole, bootID, reset, pcrs, nil))(t)
	if err := rulesOf(t, good, "1", nil).match(k, pcrs); evidence.CheckOf(err) != CheckReference || !strings.Contains(err.Error(), "event-log-structure") {
		t.Errorf("under a set that asks for facts: %v", err)
	}
	if _, err := appraiseLogs(odd, bootID, reset, pcrs, good); evidence.CheckOf(err) != boot.CheckStructure {
		t.Errorf("after a good one: %v", err)
	}
	// Whatever a host measures, what is written down of it stays short.
	long := &EventLog{LinesComplete: true, KernelCommandLines: []string{strings.Repeat("x", 900_000), "y"}, Images: make([]string, 5000)}
	long.bound()
	if long.LinesComplete || len(long.KernelCommandLines) != 1 || len(long.Images) != maxFacts || !slices.Equal(long.Incomplete, []int{pcrImages}) {
		t.Errorf("%d lines, %d images, incomplete %v", len(long.KernelCommandLines), len(long.Images), long.Incomplete)
	}
	for modules, kept := range map[int]bool{150: true, 5000: false} {
		e := &EventLog{Windows: &boot.Windows{Modules: slices.Repeat([]boot.WindowsImage{{Path: `\Windows\System32\drivers\disk.sys`, Authenticode: strings.Repeat("a", 64)}}, modules)}}
		if e.bound(); (e.Windows != nil) != kept || slices.Contains(e.Incomplete, 13) == kept {
			t.Errorf("%d modules: kept %v, incomplete %v", modules, e.Windows != nil, e.Incomplete)
		}
	}
}

// rulesOf is a set learned of k, changed by edit, in force.
func rulesOf(t *testing.T, k *Known, rules string, edit func(*reference.Content)) *Reference {
	t.Helper()
	content := reference.Learn(k.BootFacts(), nil, nil, k.Measured())
	if edit != nil {
		edit(&content)
	}
	v := Version{Content: content}
	if content.IMA != nil {
		v.Files = check.Must(content.IMA.Compile())(t)
	}
	return &Reference{Name: "prod", Rules: rules, Versions: []Version{v}}
}

// New files are judged when they come, and all when the rules change.
func TestFilesAreJudged(t *testing.T) {
	whole, pcrs, first, then := recorded(t, "clean", 20)
	tampered, changed, _, _ := recorded(t, "tampered", 0)
	k := check.Must(appraiseLogs(first, bootID, reset, then, nil))(t)
	learned := rulesOf(t, k, "1", nil)
	check.Nil(t, learned.match(k, then))
	news := Logs{EventKnown: true, IMA: whole.IMA[len(first.IMA):], IMAOffset: len(first.IMA), IMAPresent: true}
	next := check.Must(appraiseLogs(news, bootID, reset, pcrs, k))(t)
	rejects := func(r *Reference, k *Known, pcrs map[int]evidence.Digest, says string) {
		t.Helper()
		err := r.match(k, pcrs)
		if (says == "") != (err == nil) || says != "" && (evidence.CheckOf(err) != CheckReference || !strings.Contains(err.Error(), says)) {
			t.Errorf("%v, want %q", err, says)
		}
	}
	rejects(learned, next, pcrs, "and 13 more") // what ran since
	all := check.Must(appraiseLogs(whole, bootID, reset, pcrs, nil))(t)
	full := rulesOf(t, all, "2", nil)
	rejects(full, next, pcrs, "")
	rejects(full, check.Must(appraiseLogs(tampered, bootID, reset, changed, nil))(t), changed, `"/usr/local/bin/app" with sha256:49e57d73`)
	// What was fine is not, once the rules say so.
	rejects(rulesOf(t, all, "3", func(c *reference.Content) { c.IMA.Allow = c.IMA.Allow[1:] }), next, pcrs, "of no allowed path")
	// Maintenance, and observing, tell and let be.
	for name, r := range map[string]*Reference{
		"observe":     rulesOf(t, k, "4", func(c *reference.Content) { c.IMA.Mode = "observe" }),
		"maintenance": rulesOf(t, k, "5", nil),
	} {
		r.Lenient = name == "maintenance"
		one := check.Must(appraiseLogs(news, bootID, reset, pcrs, k))(t)
		rejects(r, one, pcrs, "")
		var h Host
		one.describe(&h)
		if h.List.Unexpected != 23 || len(h.List.Examples) != shown || *h.IMA != IMAVerified {
			t.Errorf("%s: %+v", name, h.List)
		}
		rejects(full, one, pcrs, "") // and when it is over, all are judged
		one.describe(&h)
		if h.List.Unexpected != 0 {
			t.Errorf("%s: judged anew: %+v", name, h.List)
		}
	}
	// Two versions in force allow what either does; a release what it announced.
	both := rulesOf(t, k, "6", nil)
	both.Versions = append(both.Versions, full.Versions...)
	rejects(both, check.Must(appraiseLogs(whole, bootID, reset, pcrs, nil))(t), pcrs, "")
	announced := rulesOf(t, all, "7", nil)
	announced.Expected = Expected{}
	announced.Expected.Add("/usr/local/bin/app", "sha256:49e57d732eb25dc2a1a4b42d6a20cad6d6c723f497a01fccfbe14f586d58fbe5")
	rejects(announced, check.Must(appraiseLogs(tampered, bootID, reset, changed, nil))(t), changed, "")
	// A set that speaks of files wants a list.
	rejects(full, check.Must(appraiseLogs(Logs{Event: whole.Event}, bootID, reset, pcrs, nil))(t), pcrs, "no IMA list was shown")
	// What came while there was no set is judged when there is one again.
	gap := check.Must(appraiseLogs(first, bootID, reset, then, nil))(t)
	rejects(learned, gap, then, "")
	unjudged := check.Must(appraiseLogs(news, bootID, reset, pcrs, gap))(t)
	rejects(nil, unjudged, pcrs, "")
	again := check.Must(appraiseLogs(Logs{EventKnown: true, IMAOffset: len(whole.IMA), IMAPresent: true}, bootID, reset, pcrs, unjudged))(t)
	rejects(learned, again, pcrs, "and 13 more")
	// A machine that measures nothing shows nothing bad.
	silent := maps.Clone(pcrs)
	silent[10] = evidence.Digest{}
	rejects(full, check.Must(appraiseLogs(whole, bootID, reset, silent, nil))(t), silent, "no file was measured")
	rejects(&Reference{Name: "empty"}, all, pcrs, "no version of it is in force")
}

// ran is l and pcrs after a file was measured into a PCR; "": a violation.
func ran(t *testing.T, l Logs, pcrs map[int]evidence.Digest, pcr int, name, content string) (Logs, map[int]evidence.Digest) {
	t.Helper()
	field := func(b []byte, data string) []byte {
		return append(binary.LittleEndian.AppendUint32(b, uint32(len(data))), data...)
	}
	sum := evidence.Sum([]byte(content))
	data := field(field(nil, "sha256:\x00"+string(sum[:])), name+"\x00")
	template := sha1.Sum(data) // as long as those of the recorded list
	with := evidence.Sum(data)
	if content == "" {
		clear(template[:])
		for i := range with {
			with[i] = 0xff
		}
	}
	l.IMA = ima.Entry{PCR: pcr, TemplateDigest: template[:], Template: "ima-ng", Data: data}.Append(slices.Clone(l.IMA))
	pcrs = maps.Clone(pcrs)
	was := pcrs[pcr]
	pcrs[pcr] = evidence.Sum(append(was[:], with[:]...))
	return l, pcrs
}

// A local user can't end a host's credentials by what he runs: his are counted. What root runs
// is held, and so are the scope's own program and what it maps.
func TestWhatUsersRun(t *testing.T) {
	const exe, lib = "/usr/bin/billingd", "/usr/lib/libbilling.so"
	base, start, _, _ := recorded(t, "clean", 0)
	base, start = ran(t, base, start, 15, exe, "billingd")
	base, start = ran(t, base, start, 15, lib, "library")
	learned := func(edit func(*reference.Content)) *Reference {
		k := check.Must(appraiseLogs(base, bootID, reset, start, nil))(t)
		return rulesOf(t, k, "1", edit)
	}
	program := process.Program{Executables: process.OneFile(exe, evidence.Sum([]byte("billingd"))), Mappings: []process.Mapping{{Path: lib}, {Path: process.Anonymous}}}
	all := func(c *reference.Content) { c.IMA.Files = "all" }
	type step struct {
		pcr           int
		name, content string
	}
	for name, tt := range map[string]struct {
		ran      []step
		edit     func(*reference.Content)
		rejected string
		others   int
		unlisted []string
	}{
		"nothing more":                     {},
		"nothing more, of all":             {edit: all},
		"a user's":                         {ran: []step{{15, "/home/u/x", "x"}, {15, "/tmp/y", "y"}}, others: 2},
		"a user's, of all":                 {ran: []step{{15, "/home/u/x", "x"}}, edit: all, rejected: `"/home/u/x"`},
		"anybody's in PCR 10, of programs": {ran: []step{{10, "/home/u/x", "x"}, {10, "/bin/busybox", "y"}}, edit: func(c *reference.Content) { c.IMA.Files = "programs" }, others: 2},
		"root's":                           {ran: []step{{10, "/home/u/x", "x"}}, rejected: `"/home/u/x"`},
		"root's, which a user ran before":  {ran: []step{{15, "/home/u/x", "x"}, {10, "/home/u/x", "x"}}, rejected: `"/home/u/x"`},
		"a user's, as an excluded path":    {ran: []step{{15, "/var/lib/x/y", "x"}}, edit: func(c *reference.Content) { c.IMA.Exclude = []string{"/var/lib/x/**"} }},
		"a user's, as a system file":       {ran: []step{{15, "/bin/busybox", "x"}}, others: 1},
		"a user's, as the program":         {ran: []step{{15, exe, "x"}, {15, lib, "x"}}, others: 2},
		"a user's violation":               {ran: []step{{10, "/home/u/x", ""}}},
		"a violation, if they are held":    {ran: []step{{10, "/home/u/x", ""}}, edit: func(c *reference.Content) { c.IMA.Violations = "reject" }, rejected: "a violation"},
	} {
		t.Run(name, func(t *testing.T) {
			l, pcrs := base, start
			for _, s := range tt.ran {
				l, pcrs = ran(t, l, pcrs, s.pcr, s.name, s.content)
			}
			r := learned(tt.edit)
			k := check.Must(appraiseLogs(l, bootID, reset, pcrs, nil))(t)
			err := r.match(k, pcrs)
			if (err == nil) != (tt.rejected == "") || err != nil && !strings.Contains(err.Error(), tt.rejected) {
				t.Fatalf("%v, want %q", err, tt.rejected)
			}
			if err != nil {
				return
			}
			var h Host
			k.describe(&h)
			if h.List.Others != tt.others || len(h.List.OtherExamples) != tt.others || !slices.Equal(h.List.PCRs, []int{15}) || h.List.Unexpected != 0 {
				t.Errorf("%+v", h.List)
			}
			if m := k.measured(&program, r); !m.Exe || len(m.Unmeasured)+len(m.Unlisted) > 0 {
				t.Errorf("the honest program: %+v", m)
			}
		})
	}

	// The program's own files are held, wherever they were measured.
	for name, tt := range map[string]struct {
		step step
		edit func(*process.Program)
		want []string
	}{
		"another exe": {step{15, "/usr/bin/other", "evil"}, func(p *process.Program) {
			p.Executables = process.OneFile("/usr/bin/other", evidence.Sum([]byte("evil")))
		}, []string{"/usr/bin/other"}},
		"an exe under a listed path": {step{15, exe, "evil"}, func(p *process.Program) { p.Executables[0].SHA256 = evidence.Sum([]byte("evil")) }, []string{exe}},
		"a library":                  {step{15, "/opt/my lib.so", "evil"}, func(p *process.Program) { p.Mappings = append(p.Mappings, process.Mapping{Path: "/opt/my lib.so"}) }, []string{"/opt/my lib.so"}},
	} {
		l, pcrs := ran(t, base, start, tt.step.pcr, strings.ReplaceAll(tt.step.name, " ", "_"), tt.step.content)
		r := learned(func(c *reference.Content) {
			if tt.step.pcr == 10 {
				c.IMA.Files = "programs"
			}
		})
		k := check.Must(appraiseLogs(l, bootID, reset, pcrs, nil))(t)
		check.Nil(t, r.match(k, pcrs))
		p := program
		p.Executables, p.Mappings = slices.Clone(p.Executables), slices.Clone(p.Mappings)
		tt.edit(&p)
		if m := k.measured(&p, r); !slices.Equal(m.Unlisted, tt.want) {
			t.Errorf("%s: %+v", name, m)
		}
		r.Lenient = true
		if m := k.measured(&p, r); m.Unlisted != nil {
			t.Errorf("%s, in maintenance: %+v", name, m)
		}
	}

	// A list that grows in another PCR is no new boot, and no other machine.
	k := check.Must(appraiseLogs(base, bootID, reset, start, nil))(t)
	more, pcrs := ran(t, base, start, 15, "/home/u/x", "x")
	news := Logs{EventKnown: true, IMA: more.IMA[len(base.IMA):], IMAOffset: len(base.IMA), IMAPresent: true}
	next := check.Must(appraiseLogs(news, bootID, reset, pcrs, k))(t)
	if next.facts != k.facts || slices.Contains(next.facts.PCRsUnexplained, 15) {
		t.Errorf("facts: %+v", next.facts)
	}
	r := learned(nil)
	check.Nil(t, r.match(k, start), r.match(next, pcrs))
	digest := func(k *Known, pcrs map[int]evidence.Digest) evidence.Digest {
		h := Host{PCRs: pcrs}
		k.describe(&h)
		return check.Must(h.Digest())(t)
	}
	if digest(k, start) != digest(next, pcrs) {
		t.Error("what a user runs is another machine")
	}
	// What the list doesn't explain is false, or unexplained.
	forged := maps.Clone(pcrs)
	forged[15] = evidence.Sum([]byte("another"))
	if k := check.Must(appraiseLogs(more, bootID, reset, forged, nil))(t); k.Violations() != 0 || len(k.ima.PCRs()) != 1 || !slices.Contains(k.facts.PCRsUnexplained, 15) {
		t.Errorf("another value, as if it were measured later: %+v", k.facts)
	}
	last, led := ran(t, more, pcrs, 10, "/bin/busybox", "b")
	led[15] = forged[15]
	if _, err := appraiseLogs(last, bootID, reset, led, nil); evidence.CheckOf(err) != imaappraise.CheckReplay {
		t.Errorf("another value: %v", err)
	}
	none, _, _, _ := recorded(t, "clean", 0)
	hidden := maps.Clone(pcrs)
	if k := check.Must(appraiseLogs(none, bootID, reset, hidden, nil))(t); !slices.Contains(k.facts.PCRsUnexplained, 15) {
		t.Errorf("hidden entries: %+v", k.facts)
	}
	// Users' files alone are no sign of a policy.
	only := Logs{Event: base.Event, IMAPresent: true}
	only.IMA = none.IMA[:firstEntry(t, none.IMA)]
	alone, values := ran(t, only, start, 15, "/home/u/x", "x")
	values[15] = pcrs15(t, "/home/u/x", "x")
	values[10] = extendedBy(t, only.IMA)
	k = check.Must(appraiseLogs(alone, bootID, reset, values, nil))(t)
	if err := r.match(k, values); err == nil || !strings.Contains(err.Error(), "no file was measured") {
		t.Errorf("users' alone: %v", err)
	}
}

// firstEntry is the length of a list's first entry.
func firstEntry(t *testing.T, list []byte) int {
	t.Helper()
	r := ima.NewReader(list, 0)
	_, _, err := r.Next()
	check.Nil(t, err)
	return r.Offset()
}

// extendedBy is the value of PCR 10 after a list of one entry.
func extendedBy(t *testing.T, list []byte) evidence.Digest {
	t.Helper()
	e, _, err := ima.NewReader(list, 0).Next()
	check.Nil(t, err)
	d := evidence.Sum(e.Data)
	return evidence.Sum(append(make([]byte, 32), d[:]...))
}

func pcrs15(t *testing.T, name, content string) evidence.Digest {
	t.Helper()
	_, pcrs := ran(t, Logs{}, map[int]evidence.Digest{}, 15, name, content)
	return pcrs[15]
}

func TestMeasuredProgram(t *testing.T) {
	whole, pcrs, _, _ := recorded(t, "clean", 0)
	k := check.Must(appraiseLogs(whole, bootID, reset, pcrs, nil))(t)
	app := process.Program{Executables: process.OneFile("/usr/local/bin/app", check.Must(evidence.ParseDigest("958b719038e8aa676698c3b1da64e157f6eb15b6baaf7d3ea1646cc7056db645"))(t)),
		Mappings: []process.Mapping{{Path: "/bin/busybox"}, {Path: process.Anonymous}}}
	if m := k.measured(&app, nil); !m.Exe || m.Unmeasured != nil {
		t.Errorf("%+v", m)
	}
	app.Executables[0].SHA256[0] ^= 1
	app.Mappings = append(app.Mappings, process.Mapping{Path: "/tmp/my library.so"})
	if m := k.measured(&app, nil); m.Exe || !slices.Equal(m.Unmeasured, []string{"/tmp/my library.so"}) {
		t.Errorf("%+v", m)
	}
	if m := (&Known{}).measured(&app, nil); m != nil {
		t.Errorf("without a list: %+v", m)
	}
}

// A set of files is the same whether it was built at once or layer by layer.
func TestFileLayers(t *testing.T) {
	var set *files
	var want []file
	for i := range 100 {
		f := fileOf(imaappraise.Measurement{Name: strings.Repeat("x", i), Digest: "sha256:" + strings.Repeat("y", i%7)})
		want = append(want, f)
		grown, fresh := set.with(slices.Values([]file{f, f, want[i/2]}))
		if len(fresh) != 1 || fresh[0] != f || set.has(f) {
			t.Fatalf("file %d: %d fresh, the old set changed: %v", i, len(fresh), set.has(f))
		}
		set = grown
		if set.depth > maxDepth || set.len() != i+1 {
			t.Fatalf("%d layers, %d files of %d", set.depth, set.len(), i+1)
		}
	}
	for _, f := range want {
		if !set.has(f) || !set.hasName(f.name) || !set.hasDigest(f.digest.text()) {
			t.Fatalf("%q is lost", f.name)
		}
	}
	if n := len(slices.Collect(set.all())); n != 100 || set.hasName("nothing") || set.hasDigest("nothing") {
		t.Errorf("%d files", n)
	}
}
