package packages

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"
	"testing"
)

// wellFormed holds of everything that leaves the package.
func wellFormed(t *testing.T, list []File) {
	t.Helper()
	for i, f := range list {
		if !strings.HasPrefix(f.Path, "/") || path.Clean(f.Path) != f.Path || len(f.Path) > maxPath+1 {
			t.Errorf("path %q", f.Path)
		}
		if text, found := strings.CutPrefix(f.Digest, digestPrefix); !found || len(text) != 64 || strings.Trim(text, "0123456789abcdef") != "" {
			t.Errorf("digest %q", f.Digest)
		}
		if i > 0 && list[i-1].Path >= f.Path {
			t.Errorf("%q before %q", list[i-1].Path, f.Path)
		}
	}
}

func FuzzRead(f *testing.F) {
	small := tarOf(f, regular("./usr/bin/x", 100), tar.Header{Name: "./usr/bin/y", Typeflag: tar.TypeLink, Linkname: "./usr/bin/x"})
	dir := f.TempDir()
	f.Add(debOf(f, member{"data.tar", small}))
	f.Add(debOf(f, member{"control.tar", nil}, member{"data.tar.gz", gzipped(f, small)}))
	for _, c := range []struct{ suffix, name, args string }{{".xz", "xz", "-c"}, {".zst", "zstd", "-cq"}} {
		plain := dir + "/plain"
		if err := os.WriteFile(plain, small, 0o600); err != nil {
			f.Fatal(err)
		}
		f.Add(debOf(f, member{"data.tar" + c.suffix, tool(f, dir, c.name, c.args, plain)}))
	}
	f.Add(debOf(f, member{"data.tar", tarOf(f, regular("../x", 1))}))
	f.Add(debOf(f, member{"data.tar", tarOf(f, regular("x", 1), regular("./x", 1))}))
	f.Add(debOf(f, member{"data.tar.gz", gzipped(f, append(small, make([]byte, 2<<20)...))}))
	f.Add(rpmOf("/usr/bin/", "x", strings.Repeat("ab", 32), 0))
	f.Add(rpmOf("/usr/bin/", "x", strings.Repeat("ab", 32), 0xffffffff))
	pkg, _ := buildRPM(f, 8, 100)
	f.Add(pkg)
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := readBytes(b, limits{bytes: 1 << 20, entries: 100})
		if err == nil {
			wellFormed(t, list)
		}
	})
}

// A manifest that is taken is the same when it is written and read again.
func FuzzManifest(f *testing.F) {
	hex := strings.Repeat("0a", 32)
	f.Add([]byte(hex + "  /b\n" + hex + " */a b\n\n"))
	f.Add([]byte("sha256:" + hex + " /usr//bin/./x"))
	f.Add([]byte(`\` + hex + `  /a\\nb`))
	f.Add([]byte(`[{"path":"/x","digest":"sha256:` + hex + `"}]`))
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := ReadManifest(bytes.NewReader(b))
		if err != nil {
			return
		}
		wellFormed(t, list)
		var text []byte
		for _, one := range list {
			text = fmt.Appendf(text, "%s %s\n", one.Digest, one.Path)
		}
		if again, err := ReadManifest(bytes.NewReader(text)); err != nil || !slices.Equal(again, list) {
			t.Errorf("%v: %v, then %v", err, list, again)
		}
	})
}
