package packages

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// tool runs a program that packages are made with.
func tool(t testing.TB, dir, name string, args ...string) []byte {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Fatalf("%v: install it, as test/setup.sh does", err)
	}
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s%s", name, args, err, out, &stderr)
	}
	return out
}

const large = 3<<20 + 17 // more than decompressors hold at once

// tree makes a program of so many bytes, other files, and everything that isn't a regular file
// beside them.
func tree(t testing.TB, root string, program int) {
	t.Helper()
	content := make([]byte, program)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(content)
	long := "/usr/lib/" + strings.Repeat("billing-", 12) + "/" + strings.Repeat("plugin-", 14) + ".so"
	for name, content := range map[string][]byte{
		"/usr/bin/billingd": content, "/etc/billing.conf": []byte("a = 1\n"), "/usr/share/empty": nil, long: []byte("long"),
		"/usr/share/größe with spaces": []byte("x"), `/usr/lib/systemd/system/a\x2db.slice`: []byte("[Slice]\n"), "/usr/bin/..data": []byte("dots"),
	} {
		file := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, content, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range []error{os.Link(root+"/usr/bin/billingd", root+"/usr/bin/billingctl"), os.Symlink("billingd", root+"/usr/bin/billing")} {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// sums are what sha256sum says of a tree's regular files.
func sums(t testing.TB, root string) []File {
	t.Helper()
	text := tool(t, root, "sh", "-c", `find . -path ./DEBIAN -prune -o -type f -exec sha256sum {} +`)
	text = bytes.ReplaceAll(text, []byte("  ./"), []byte("  /"))
	list, err := ReadManifest(bytes.NewReader(text))
	if err != nil || len(list) != 8 {
		t.Fatalf("%v: %d files of %s", err, len(list), text)
	}
	return list
}

func buildDeb(t testing.TB, compression string) (deb []byte, want []File) {
	t.Helper()
	root := t.TempDir()
	tree(t, root, large)
	want = sums(t, root)
	if err := os.Mkdir(root+"/DEBIAN", 0o755); err != nil {
		t.Fatal(err)
	}
	control := "Package: billingd\nVersion: 1\nArchitecture: all\nMaintainer: M <m@example.com>\nDescription: bills\n"
	if err := os.WriteFile(root+"/DEBIAN/control", []byte(control), 0o644); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "billingd.deb")
	tool(t, root, "dpkg-deb", "--root-owner-group", "-Z"+compression, "--build", root, out)
	deb, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return deb, want
}

func buildRPM(t testing.TB, digestAlgorithm, program int) (pkg []byte, want []File) {
	t.Helper()
	root, top := t.TempDir(), t.TempDir()
	tree(t, root, program)
	want = sums(t, root)
	spec := "Name: billingd\nVersion: 1\nRelease: 1\nSummary: bills\nLicense: none\nBuildArch: noarch\n%description\nbills\n%install\nmkdir -p %{buildroot}/var/lib\n" +
		"cp -a " + root + "/. %{buildroot}\necho later > %{buildroot}/var/lib/state\n%files\n/usr\n%config /etc/billing.conf\n%ghost /var/lib/state\n"
	if err := os.WriteFile(top+"/billingd.spec", []byte(spec), 0o644); err != nil {
		t.Fatal(err)
	}
	algorithm := fmt.Sprintf("_binary_filedigest_algorithm %d", digestAlgorithm)
	tool(t, top, "rpmbuild", "-bb", "--define", "_topdir "+top, "--define", algorithm, "--define", "__os_install_post %{nil}", "billingd.spec")
	pkg, err := os.ReadFile(top + "/RPMS/noarch/billingd-1-1.noarch.rpm")
	if err != nil {
		t.Fatal(err)
	}
	return pkg, want
}

func readBytes(b []byte, most limits) ([]File, error) {
	return read(bytes.NewReader(b), int64(len(b)), most)
}

func accepts(t *testing.T, b []byte, want []File) {
	t.Helper()
	got, err := Read(bytes.NewReader(b), int64(len(b)))
	if err != nil || !slices.Equal(got, want) {
		t.Fatalf("%v\n%v, not\n%v", err, got, want)
	}
}

func refuses(t *testing.T, b []byte, most limits, words string) {
	t.Helper()
	if list, err := readBytes(b, most); err == nil || !strings.Contains(err.Error(), words) {
		t.Errorf("%d files, error %v, which lacks %q", len(list), err, words)
	}
}

// A package cut off anywhere is refused.
func refusesCuts(t *testing.T, b []byte) {
	t.Helper()
	step := 1
	if testing.Short() {
		step = 5
	}
	for i := 0; i < 16; i += step {
		if list, err := readBytes(b[:len(b)*i/16], usual); err == nil {
			t.Errorf("%d/16 of it is taken: %d files", i, len(list))
		}
	}
	if _, err := readBytes(b[:len(b)-9], usual); err == nil {
		t.Error("taken without its last bytes")
	}
}

func TestDeb(t *testing.T) {
	for _, compression := range []string{"gzip", "xz", "zstd", "none"} {
		t.Run(compression, func(t *testing.T) {
			deb, want := buildDeb(t, compression)
			accepts(t, deb, want)
			refusesCuts(t, deb)
			refuses(t, deb, limits{bytes: 2 << 20, entries: 1000}, "unpacks to more than 2097152 bytes")
			refuses(t, deb, limits{bytes: 1 << 30, entries: 9}, "more than 9 entries")
		})
	}
	t.Run("bzip2", func(t *testing.T) {
		refuses(t, debOf(t, member{"data.tar.bz2", []byte("BZh9")}), usual, "not among gz, xz, zst and none")
	})
}

func TestRPM(t *testing.T) {
	pkg, want := buildRPM(t, 8, large)
	accepts(t, pkg, want)
	refusesCuts(t, pkg)
	old, _ := buildRPM(t, 1, large)
	refuses(t, old, usual, "not SHA-256")
}

// Each flipped bit of an .rpm's header or payload is refused; one of its
// signature header changes nothing that is said of its files.
func TestRPMFlips(t *testing.T) {
	pkg, want := buildRPM(t, 8, 100)
	_, end, err := readRPMHeader(bytes.NewReader(pkg), rpmLead, int64(len(pkg)))
	if err != nil {
		t.Fatal(err)
	}
	header := int(end+7) &^ 7
	step := 1
	if testing.Short() {
		step = 23 // a prime, which meets each bit of bytes
	}
	for bit := rpmLead * 8; bit < len(pkg)*8; bit += step {
		pkg[bit/8] ^= 1 << (bit % 8)
		list, err := readBytes(pkg, usual)
		switch {
		case err == nil && bit/8 >= header:
			t.Errorf("bit %d of byte %d flipped: taken", bit%8, bit/8)
		case err == nil && !slices.Equal(list, want):
			t.Errorf("bit %d of byte %d flipped: %v", bit%8, bit/8, list)
		}
		pkg[bit/8] ^= 1 << (bit % 8)
	}
	accepts(t, pkg, want)
}

// An .rpm of before payload digests is whole if its size says so.
func TestRPMSize(t *testing.T) {
	pkg := rpmOf("/usr/bin/", "x", strings.Repeat("ab", 32), 0)
	accepts(t, pkg, []File{{"/usr/bin/x", "sha256:" + strings.Repeat("ab", 32)}})
	refuses(t, pkg[:len(pkg)-1], usual, "nothing says that its payload")
	refuses(t, append(slices.Clone(pkg), 0), usual, "nothing says that its payload")
}

func TestHostileRPM(t *testing.T) {
	digest := strings.Repeat("ab", 32)
	for _, c := range []struct{ dir, base, digest, words string }{
		{"/usr/../etc/", "x", digest, "with .. in it"},
		{"/usr/bin/", "..", digest, "with .. in it"},
		{"usr/bin/", "x", digest, "no absolute path"},
		{"/" + strings.Repeat("d", 5000), "x", digest, "a path of 5001 bytes"},
		{"/usr/bin/", "x\ny", digest, "control characters"},
		{"/usr/bin/", "x", digest[2:], "no SHA-256"},
		{"/usr/bin/", "x", "", "no SHA-256"},
	} {
		refuses(t, rpmOf(c.dir, c.base, c.digest, 0), usual, c.words)
	}
	// The index says how many: more than are there, or than any package has.
	for _, count := range []uint32{2, 0x7fffffff, 0xffffffff} {
		if _, err := readBytes(rpmOf("/usr/bin/", "x", digest, count), usual); err == nil {
			t.Errorf("taken with %d claimed names", count)
		}
	}
	whole := rpmOf("/usr/bin/", "x", digest, 0)
	for _, at := range []int{rpmLead + 8, rpmLead + 12} {
		b := slices.Clone(whole)
		binary.BigEndian.PutUint32(b[at:], 0xfffffff0)
		refuses(t, b, usual, "at most")
		binary.BigEndian.PutUint32(b[at:], 60_000)
		refuses(t, b, usual, "cut off")
	}
}

// rpmOf is an .rpm of one file, without digests of itself; claimed is how many
// names its index claims, if not one.
func rpmOf(dir, base, digest string, claimed uint32) []byte {
	type entry struct {
		tag, kind, count uint32
		value            []byte
	}
	header := func(entries ...entry) []byte {
		var index, store []byte
		for _, e := range entries {
			for _, v := range []uint32{e.tag, e.kind, uint32(len(store)), e.count} {
				index = binary.BigEndian.AppendUint32(index, v)
			}
			store = append(store, e.value...)
		}
		b := append([]byte(rpmHeaderMagic), 0, 0, 0, 0)
		b = binary.BigEndian.AppendUint32(b, uint32(len(entries)))
		b = binary.BigEndian.AppendUint32(b, uint32(len(store)))
		return append(append(b, index...), store...)
	}
	names := max(claimed, 1)
	main := header(
		entry{tagBaseNames, kindStrings, names, []byte(base + "\x00")}, entry{tagDirNames, kindStrings, 1, []byte(dir + "\x00")},
		entry{tagDirIndexes, kindInt32, 1, make([]byte, 4)}, entry{tagFileModes, kindInt16, 1, []byte{0x81, 0xed}}, entry{tagFileFlags, kindInt32, 1, make([]byte, 4)},
		entry{tagDigestAlgo, kindInt32, 1, []byte{0, 0, 0, 8}}, entry{tagFileDigests, kindStrings, 1, []byte(digest + "\x00")})
	payload := []byte("payload")
	size := binary.BigEndian.AppendUint32(nil, uint32(len(main)+len(payload)))
	b := append([]byte(rpmLeadMagic), make([]byte, rpmLead-4)...)
	b = append(b, header(entry{sigSize, kindInt32, 1, size})...)
	for len(b)%8 != 0 {
		b = append(b, 0)
	}
	return append(append(b, main...), payload...)
}

type member struct {
	name string
	body []byte
}

// debOf is a Debian package of the given members after debian-binary.
func debOf(t testing.TB, members ...member) []byte {
	t.Helper()
	b := []byte(arMagic)
	for _, m := range append([]member{{"debian-binary", []byte("2.0\n")}}, members...) {
		b = fmt.Appendf(b, "%-16s%-12d%-6d%-6d%-8s%-10d`\n%s", m.name, 0, 0, 0, "100644", len(m.body), m.body)
		if len(m.body)%2 == 1 {
			b = append(b, '\n')
		}
	}
	return b
}

func tarOf(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		h.Mode = 0o755
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(make([]byte, h.Size)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func regular(name string, size int64) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeReg, Size: size, Format: tar.FormatPAX}
}

func gzipped(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	if _, err := z.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestHostileDeb(t *testing.T) {
	twin := tarOf(t, regular("./usr/bin/x", 100))
	x := File{"/usr/bin/x", fmt.Sprintf("sha256:%x", sha256.Sum256(make([]byte, 100)))}
	accepts(t, debOf(t, member{"data.tar", twin}), []File{x})
	accepts(t, debOf(t, member{"control.tar/", nil}, member{"data.tar/", twin}, member{"_gpgorigin", []byte("odd")}), []File{x})
	link := tar.Header{Name: "./usr/bin/y", Typeflag: tar.TypeLink, Linkname: "./usr/bin/x"}
	accepts(t, debOf(t, member{"data.tar", tarOf(t, regular("usr/./bin//x", 100), link)}), []File{x, {"/usr/bin/y", x.Digest}})

	for name, c := range map[string]struct {
		words   string
		headers []tar.Header
	}{
		"up":              {"with .. in it", []tar.Header{regular("./usr/../../etc/x", 1)}},
		"up, folder":      {"with .. in it", []tar.Header{{Name: "../", Typeflag: tar.TypeDir}}},
		"up, link":        {"with .. in it", []tar.Header{regular("./x", 1), {Name: "./y", Typeflag: tar.TypeLink, Linkname: "../x"}}},
		"twice":           {"there twice", []tar.Header{regular("./usr/bin/x", 1), regular("usr/bin/x", 2)}},
		"twice, symlink":  {"there twice", []tar.Header{regular("./x", 1), {Name: "x", Typeflag: tar.TypeSymlink, Linkname: "y"}}},
		"link to nothing": {"which is not before it", []tar.Header{{Name: "./y", Typeflag: tar.TypeLink, Linkname: "./x"}}},
		"long":            {"a path of 4097 bytes", []tar.Header{regular(strings.Repeat("a", 4097), 1)}},
		"not UTF-8":       {"not in UTF-8", []tar.Header{{Name: "a\xff", Typeflag: tar.TypeReg, Format: tar.FormatGNU}}},
		"two lines":       {"control characters", []tar.Header{regular("a\nb", 1)}},
	} {
		t.Run(name, func(t *testing.T) {
			refuses(t, debOf(t, member{"data.tar", tarOf(t, c.headers...)}), usual, c.words)
		})
	}

	t.Run("ar", func(t *testing.T) {
		whole := debOf(t, member{"data.tar", twin})
		at := bytes.Index(whole, []byte("data.tar"))
		for field, words := range map[string]string{"9999999999": "cut off: it claims 9999999999 bytes", "-1        ": "is no number", "          ": "is no number", "0x10      ": "is no number"} {
			b := slices.Clone(whole)
			copy(b[at+48:], field)
			refuses(t, b, usual, words)
		}
		b := slices.Clone(whole)
		b[at+58] = 'x'
		refuses(t, b, usual, "no end mark")
		refuses(t, whole[:at+30], usual, "header is cut off")
		refuses(t, whole[:at], usual, "without data.tar")
		refuses(t, debOf(t, member{"data.tar", twin}, member{"data.tar.gz", gzipped(t, twin)}), usual, "a package has one")
		refuses(t, []byte(strings.Replace(string(whole), "2.0\n", "3.0\n", 1)), usual, "no Debian package of format 2")
		refuses(t, []byte(strings.Replace(string(whole), "debian-binary", "debian-bundle", 1)), usual, "no Debian package of format 2")
		refuses(t, []byte("PK\x03\x04 something else"), usual, "neither a .deb nor an .rpm")
		refuses(t, nil, usual, "neither a .deb nor an .rpm")
	})
	t.Run("damaged gzip", func(t *testing.T) {
		z := gzipped(t, twin)
		z[len(z)-5] ^= 1 // of the checksum
		refuses(t, debOf(t, member{"data.tar.gz", z}), usual, "checksum")
	})
}

// What unpacks to more than the bound is refused once the bound is reached, or
// claimed.
func TestBombs(t *testing.T) {
	small := limits{bytes: 1 << 20, entries: 1000}
	var claims bytes.Buffer
	z := gzip.NewWriter(&claims)
	w := tar.NewWriter(z)
	h := regular("./zeros", 5<<30)
	if err := w.WriteHeader(&h); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	refuses(t, debOf(t, member{"data.tar.gz", claims.Bytes()}), usual, "unpacks to more than 4294967296 bytes")

	var many []tar.Header
	for i := range 40 {
		many = append(many, regular(fmt.Sprintf("./zeros%d", i), 50_000))
	}
	accepts(t, debOf(t, member{"data.tar.gz", gzipped(t, tarOf(t, many[:1]...))}), []File{{"/zeros0", fmt.Sprintf("sha256:%x", sha256.Sum256(make([]byte, 50_000)))}})
	refuses(t, debOf(t, member{"data.tar.gz", gzipped(t, tarOf(t, many...))}), small, "unpacks to more than 1048576 bytes")
	// After the archive's end, where only the checksum is waited for.
	refuses(t, debOf(t, member{"data.tar.gz", gzipped(t, append(tarOf(t, many[0]), make([]byte, 2<<20)...))}), small, "unpacks to more than 1048576 bytes")
	// Holes take no room in the stream.
	dir := t.TempDir()
	tool(t, dir, "truncate", "-s", "5G", "holes")
	for _, format := range []string{"gnu", "posix"} {
		sparse := tool(t, dir, "tar", "--sparse", "--format="+format, "-c", "holes")
		if len(sparse) > 1<<20 {
			t.Fatalf("tar made %d bytes of a hole", len(sparse))
		}
		refuses(t, debOf(t, member{"data.tar", sparse}), usual, "unpacks to more than 4294967296 bytes")
	}
	for _, c := range []struct{ suffix, name, args string }{{".xz", "xz", "-c"}, {".zst", "zstd", "-cq"}} {
		plain := filepath.Join(t.TempDir(), "plain")
		if err := os.WriteFile(plain, tarOf(t, many...), 0o600); err != nil {
			t.Fatal(err)
		}
		refuses(t, debOf(t, member{"data.tar" + c.suffix, tool(t, dir, c.name, c.args, plain)}), small, "unpacks to more than 1048576 bytes")
	}
}

func TestManifest(t *testing.T) {
	hex := strings.Repeat("0a", 32)
	for text, want := range map[string][]File{
		hex + "  /b\n" + hex + " */a b\n\n":                                {{"/a b", "sha256:" + hex}, {"/b", "sha256:" + hex}},
		"sha256:" + hex + " /usr//bin/./x":                                 {{"/usr/bin/x", "sha256:" + hex}},
		`\` + hex + `  /a\\nb`:                                             {{`/a\nb`, "sha256:" + hex}},
		` [{"path":"/x","digest":"sha256:` + strings.ToUpper(hex) + `"}] `: {{"/x", "sha256:" + hex}},
	} {
		got, err := ReadManifest(strings.NewReader(text))
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
	for text, words := range map[string]string{
		hex + "  usr/bin/x\n":                    "line 1: \"usr/bin/x\" is no absolute path",
		hex + "  /x\n" + hex[2:] + "  /y":        "line 2: ",
		hex + "  /x\n" + hex + "  //x":           "line 2: \"/x\": there twice",
		hex + "  /usr/../x":                      "with .. in it",
		hex:                                      "no absolute path",
		`\` + hex + `  /a\nb`:                    "control characters",
		"sha512:" + hex + " /x":                  "no SHA-256",
		hex + "  /" + strings.Repeat("x", 5000):  "line 1: ",
		`[{"path":"/x","digest":"` + hex + `"}]`: "sha256:hex",
		`[{"path":"/x","digest":"sha256:` + hex + `","size":1}]`:  "unknown field",
		`[{"path":"x","digest":"sha256:` + hex + `"}]`:            "file 0: ",
		`[{"path":"/x","digest":"sha256:` + hex + `"}] more`:      "",
		`[{"path":"/x","digest":"sha256:` + hex + `"},{"path":"/`: "",
	} {
		if list, err := ReadManifest(strings.NewReader(text)); err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("%q: %v, error %v", text, list, err)
		}
	}
	endless := io.MultiReader(strings.NewReader("["), zeros{})
	if _, err := ReadManifest(endless); err == nil || !strings.Contains(err.Error(), "more than 67108864 bytes") {
		t.Error(err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
