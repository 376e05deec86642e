package policy

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
	_ "time/tzdata" // CEL loads time zones by name when it evaluates

	"cel.dev/cel-go/cel"
	celast "cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/types"

	boot "github.com/countersign/countersign/attestors/boot/appraise"
	"github.com/countersign/countersign/broker/internal/verify/appraise"
	"github.com/countersign/countersign/internal/bounded"
	"github.com/countersign/countersign/internal/hclread"
)

const (
	maxCondition = 4096 // bytes
	// maxCost bounds an evaluation, in CEL's unit: about one per value looked
	// at. It is what ends a condition, not a clock, so that the same facts give
	// the same outcome on a busy broker.
	maxCost = 100_000
)

// A fact is one field that conditions can name. An optional one may be absent:
// has() asks, reading it then is an error and so a fault.
type fact struct {
	name string
	kind *cel.Type
}

var (
	mappingType = cel.ObjectType("countersign.Mapping")
	parentType  = cel.ObjectType("countersign.Parent")
	hostType    = cel.ObjectType("countersign.Host")
	processType = cel.ObjectType("countersign.Process")
	subjectType = cel.ObjectType("countersign.Subject")
	windowsType = cel.ObjectType("countersign.Windows")
)

// vocabulary is all that a condition can name, by type.
var vocabulary = map[string][]fact{
	hostType.TypeName(): {
		{"id", cel.StringType}, {"name", cel.StringType}, {"labels", cel.MapType(cel.StringType, cel.StringType)},
		{"tier", cel.StringType}, {"reference", cel.StringType}, {"address", cel.StringType}, {"boot", cel.StringType},
		{"os", cel.StringType}, {"pcrs", cel.MapType(cel.IntType, cel.StringType)},
		// Absent unless an event log was appraised and proves them.
		{"secure_boot", cel.BoolType}, {"secure_boot_mode", cel.StringType}, {"firmware_version", cel.StringType},
		{"kernel_command_line", cel.StringType}, {"kernel_command_lines", cel.ListType(cel.StringType)},
		{"boot_images", cel.ListType(cel.StringType)}, {"boot_files", cel.ListType(cel.StringType)}, {"authorities", cel.ListType(cel.StringType)},
		{"windows", windowsType}, // absent unless it is a Windows' log
		{"pcrs_replayed", cel.ListType(cel.IntType)}, {"pcrs_incomplete", cel.ListType(cel.IntType)}, {"pcrs_understood", cel.ListType(cel.IntType)}, {"kernel_command_lines_complete", cel.BoolType},
		// Absent unless an IMA list was appraised.
		{"ima", cel.StringType}, {"ima_bank", cel.StringType}, {"ima_entries", cel.IntType}, {"ima_violations", cel.IntType}, {"ima_unexpected", cel.IntType}, {"ima_others", cel.IntType},
	},
	processType.TypeName(): {
		{"exe", cel.StringType}, {"sha256", cel.StringType}, {"user", cel.StringType}, {"unit", cel.StringType}, // "": of none
		{"uid", cel.IntType}, {"gid", cel.IntType}, {"groups", cel.ListType(cel.IntType)}, {"cgroup", cel.StringType}, // absent on another system than Linux
		{"starting", cel.BoolType}, {"releases", cel.ListType(cel.StringType)},
		{"measured", cel.BoolType}, // absent unless an IMA list was appraised
		{"mappings", cel.ListType(mappingType)}, {"parent", parentType},
	},
	windowsType.TypeName(): {
		{"boot_debugging", cel.BoolType}, {"kernel_debugging", cel.BoolType}, {"hypervisor_debugging", cel.BoolType}, {"test_signing", cel.BoolType},
		{"flight_signing", cel.BoolType}, {"safe_mode", cel.BoolType}, {"winpe", cel.BoolType},
		// Absent where the log doesn't say.
		{"code_integrity", cel.BoolType}, {"dep", cel.BoolType}, {"dep_policy", cel.StringType}, {"vbs", cel.BoolType}, {"hvci", cel.BoolType},
		{"bitlocker", cel.ListType(cel.IntType)}, {"images", cel.ListType(cel.StringType)},
	},
	mappingType.TypeName(): {{"path", cel.StringType}, {"deleted", cel.BoolType}},
	parentType.TypeName():  {{"pid", cel.IntType}, {"exe", cel.StringType}},
	subjectType.TypeName(): {{"risk", cel.IntType}},
}

var variables = []fact{{"host", hostType}, {"process", processType}, {"subject", subjectType}, {"now", cel.TimestampType}}

// object is a value of one of the vocabulary's types; a missing key is an
// absent fact.
type object = map[string]any

// provider lets CEL's checker know the vocabulary, so that a misspelt fact is
// an error of the file and not of a request.
type provider struct{ types.Provider }

func (p provider) FindStructType(name string) (*types.Type, bool) {
	if _, ok := vocabulary[name]; ok {
		return types.NewTypeTypeWithParam(types.NewObjectType(name)), true
	}
	return p.Provider.FindStructType(name)
}

func (p provider) FindStructFieldNames(name string) ([]string, bool) {
	if facts, ok := vocabulary[name]; ok {
		return names(facts), true
	}
	return p.Provider.FindStructFieldNames(name)
}

func (p provider) FindStructFieldType(name, field string) (*types.FieldType, bool) {
	facts, ok := vocabulary[name]
	if !ok {
		return p.Provider.FindStructFieldType(name, field)
	}
	i := slices.IndexFunc(facts, func(f fact) bool { return f.name == field })
	if i < 0 {
		return nil, false
	}
	return &types.FieldType{
		Type: facts[i].kind,
		IsSet: func(target any) bool {
			o, _ := target.(object)
			v, ok := o[field]
			return ok && v != ""
		},
		GetFrom: func(target any) (any, error) {
			o, _ := target.(object)
			v, ok := o[field]
			if !ok {
				return nil, fmt.Errorf("%s is not known of this %s; has() asks before", field, strings.ToLower(strings.TrimPrefix(name, "countersign.")))
			}
			return v, nil
		},
	}, true
}

func names(facts []fact) (out []string) {
	for _, f := range facts {
		out = append(out, f.name)
	}
	return out
}

// environment is made once; it is read-only afterwards.
var environment = sync.OnceValues(func() (*cel.Env, error) {
	registry, err := types.NewRegistry()
	if err != nil {
		return nil, err
	}
	options := []cel.EnvOption{
		cel.CustomTypeProvider(provider{registry}), cel.CustomTypeAdapter(registry),
		cel.ParserExpressionSizeLimit(maxCondition), cel.ParserRecursionLimit(50), cel.DefaultUTCTimeZone(true),
		cel.ASTValidators(cel.ValidateDurationLiterals(), cel.ValidateTimestampLiterals(), cel.ValidateRegexLiterals()),
	}
	for _, v := range variables {
		options = append(options, cel.Variable(v.name, v.kind))
	}
	return cel.NewEnv(options...)
})

// A mistake is one error of a condition, at a line of it counted from 1.
type mistake struct {
	line                int
	message, suggestion string
}

var unknownWord = regexp.MustCompile(`^(?:undefined field|undeclared reference to) '([^']+)'`)

// compile checks a condition and makes it ready to run.
func compile(text string) (cel.Program, []mistake) {
	if len(text) > maxCondition {
		return nil, []mistake{{line: 1, message: fmt.Sprintf("a condition of %d bytes; at most %d are read", len(text), maxCondition)}}
	}
	env, err := environment()
	if err != nil {
		return nil, []mistake{{line: 1, message: err.Error()}}
	}
	ast, issues := env.Compile(text)
	if issues.Err() != nil {
		var out []mistake
		for _, e := range issues.Errors() {
			m := mistake{line: max(e.Location.Line(), 1), message: e.Message}
			m.message, _, _ = strings.Cut(e.Message, "\n")
			if found := unknownWord.FindStringSubmatch(e.Message); found != nil {
				m.message = fmt.Sprintf("no fact is called %q", found[1])
				m.suggestion = hclread.Nearest(found[1], words())
			}
			out = append(out, m)
		}
		return nil, out
	}
	if ast.OutputType() != cel.BoolType {
		return nil, []mistake{{line: 1, message: fmt.Sprintf("a condition is true or false; this one is a %s", ast.OutputType())}}
	}
	if zone, line := unknownZone(ast.NativeRep()); zone != "" {
		return nil, []mistake{{line: line, message: fmt.Sprintf("%q is no time zone, as Europe/Berlin or +02:00", bounded.Text(zone, maxName))}}
	}
	program, err := env.Program(ast, cel.CostLimit(maxCost))
	if err != nil {
		return nil, []mistake{{line: 1, message: err.Error()}}
	}
	return program, nil
}

// unknownZone finds a time zone, written out, that every evaluation would fail
// on.
func unknownZone(ast *celast.AST) (zone string, line int) {
	for _, e := range celast.MatchDescendants(celast.NavigateAST(ast), celast.KindMatcher(celast.CallKind)) {
		call := e.AsCall()
		if !call.IsMemberFunction() || len(call.Args()) != 1 || call.Args()[0].Kind() != celast.LiteralKind ||
			ast.GetType(call.Target().ID()) != types.TimestampType {
			continue
		}
		name, ok := call.Args()[0].AsLiteral().Value().(string)
		if !ok || strings.Contains(name, ":") {
			continue
		}
		if _, err := time.LoadLocation(name); err != nil {
			return name, max(ast.SourceInfo().GetStartLocation(e.ID()).Line(), 1)
		}
	}
	return "", 0
}

// words are all names a condition can use.
func words() []string {
	out := names(variables)
	for _, facts := range vocabulary {
		out = append(out, names(facts)...)
	}
	return out
}

// activation is the facts as conditions see them.
func activation(f appraise.Facts, now time.Time) map[string]any {
	pcrs := make(map[int64]string, len(f.Host.PCRs))
	for i, d := range f.Host.PCRs {
		pcrs[int64(i)] = d.String()
	}
	labels := f.Host.Labels
	if labels == nil {
		labels = map[string]string{}
	}
	host := object{
		"id": f.Host.ID, "name": f.Host.Name, "labels": labels, "tier": f.Host.Tier, "reference": f.Host.Reference,
		"address": f.Host.Address, "boot": f.Host.Boot, "os": f.Host.OS, "pcrs": pcrs,
	}
	if f.Host.SecureBoot != nil {
		host["secure_boot"] = *f.Host.SecureBoot
	}
	if l := f.Host.EventLog; l != nil {
		host["secure_boot_mode"] = l.SecureBootMode
		if l.FirmwareVersion != nil {
			host["firmware_version"] = *l.FirmwareVersion
		}
		if l.KernelCommandLine != nil {
			host["kernel_command_line"] = *l.KernelCommandLine
		}
		host["kernel_command_lines"] = l.CommandLines()
		// A list that isn't whole isn't known: what holds of each of its members may
		// not hold of one that is missing.
		for _, list := range []struct {
			name string
			pcr  int
			have []string
		}{{"boot_images", 4, l.Images}, {"boot_files", 9, l.Files}, {"authorities", 7, l.Authorities}} {
			if !slices.Contains(l.Incomplete, list.pcr) {
				host[list.name] = list.have
			}
		}
		if l.Windows != nil {
			host["windows"] = windows(l.Windows)
		}
		host["pcrs_replayed"], host["pcrs_incomplete"], host["kernel_command_lines_complete"] = l.PCRs, l.Incomplete, l.LinesComplete
		host["pcrs_understood"] = l.Understood()
	}
	if f.Host.IMA != nil {
		host["ima"] = *f.Host.IMA
	}
	if l := f.Host.List; l != nil {
		host["ima_bank"], host["ima_entries"], host["ima_violations"] = string(l.Bank), int64(l.Proven), int64(l.Violations)
		host["ima_unexpected"], host["ima_others"] = int64(l.Unexpected), int64(l.Others)
	}
	subject := object{}
	if f.Subject.Risk != nil {
		subject["risk"] = *f.Subject.Risk
	}
	process := object{}
	if p := f.Program; p != nil {
		mappings := make([]object, len(p.Mappings))
		for i, m := range p.Mappings {
			mappings[i] = object{"path": m.Path, "deleted": m.Deleted}
		}
		process = object{
			"exe": p.Main().Path, "sha256": p.Main().SHA256.String(), "user": p.User, "unit": p.Unit(), "starting": p.Starting, "mappings": mappings,
		}
		if l := p.Linux; l != nil {
			groups := make([]int64, len(l.Groups))
			for i, g := range l.Groups {
				groups[i] = int64(g)
			}
			process["uid"], process["gid"], process["groups"], process["cgroup"] = int64(l.UID), int64(l.GID), groups, l.Cgroup
		}
		if f.Releases == nil {
			f.Releases = []string{}
		}
		process["releases"] = f.Releases
		if f.Measured != nil {
			process["measured"] = f.Measured.Exe && len(f.Measured.Unmeasured) == 0
		}
		if p.Parent != nil {
			process["parent"] = object{"pid": int64(p.Parent.PID), "exe": p.Parent.Exe}
		}
	}
	return map[string]any{"host": host, "process": process, "subject": subject, "now": now}
}

// windows is what a Windows' log says, as conditions see it.
func windows(w *boot.Windows) object {
	images := make([]string, len(w.Modules))
	for i, m := range w.Modules {
		images[i] = m.Authenticode
	}
	unlocked := make([]int64, len(w.BitLocker))
	for i, flags := range w.BitLocker {
		unlocked[i] = int64(flags)
	}
	out := object{
		"boot_debugging": w.BootDebugging, "kernel_debugging": w.KernelDebugging, "hypervisor_debugging": w.HypervisorDebug, "test_signing": w.TestSigning,
		"flight_signing": w.FlightSigning, "safe_mode": w.SafeMode, "winpe": w.WinPE, "bitlocker": unlocked, "images": images,
	}
	for name, fact := range map[string]*bool{"code_integrity": w.CodeIntegrity, "dep": w.DEP, "vbs": w.VBS, "hvci": w.HVCI} {
		if fact != nil {
			out[name] = *fact
		}
	}
	if w.DEPPolicy != "" {
		out["dep_policy"] = string(w.DEPPolicy)
	}
	return out
}
