package collect

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/test/check"
)

// The tests run themselves as a program, and as an agent that may not follow map_files.
const (
	memfdMode  = "COUNTERSIGN_COLLECT_MEMFD"
	weakMode   = "COUNTERSIGN_COLLECT_WEAK"
	strongMode = "with map_files"
)

func TestMain(m *testing.M) {
	if name := os.Getenv(memfdMode); name != "" {
		mapMemfd(name)
	}
	os.Exit(m.Run())
}

// asAgents runs a test with the right to follow map_files, and without.
func asAgents(t *testing.T, test func(t *testing.T, follows bool)) {
	t.Helper()
	check.Root(t)
	if os.Getenv(weakMode) != "" {
		test(t, false)
		return
	}
	t.Run(strongMode, func(t *testing.T) { test(t, true) })
	weak := exec.Command("setpriv", "--bounding-set=-checkpoint_restore", "/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
	weak.Args[2] = check.Must(os.Executable())(t)
	weak.Env = append(os.Environ(), weakMode+"=1")
	if out, err := weak.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("without map_files: %v\n%s", err, out)
	}
}

// weaken takes from this thread what mounting takes, too.
func weaken(t *testing.T, follows bool) {
	t.Helper()
	if follows {
		return
	}
	runtime.LockOSThread()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	check.Nil(t, unix.Capget(&header, &data[0]))
	data[0].Effective &^= 1 << unix.CAP_SYS_ADMIN
	check.Nil(t, unix.Capset(&header, &data[0]))
	t.Cleanup(func() {
		data[0].Effective |= 1 << unix.CAP_SYS_ADMIN
		check.Nil(t, unix.Capset(&header, &data[0]))
	})
}

// library puts a library where the program is, which is preloaded as LIB.
func (s stage) library(t *testing.T) string {
	t.Helper()

	libs := check.Must(filepath.Glob("/lib/*/libm.so.6"))(t)
	if len(libs) == 0 {
		t.Fatal("no libm to preload")
	}
	lib := filepath.Join(s.dir, "lib", "libplain.so")
	b := check.Must(os.ReadFile(libs[0]))(t)
	check.Nil(t, os.MkdirAll(filepath.Dir(lib), 0o755), os.WriteFile(lib+".new", b, 0o755), os.Rename(lib+".new", lib))
	return lib
}

// preload is a script's part that runs the program with the stage's library, and waits for it.
const preload = `LD_PRELOAD="${FROM-}$DIR/lib/libplain.so" "$EXE" 60 & while ! grep -q libplain /proc/$!/maps; do sleep 0.01; done; `

// A mapping is told by its path where it is the host's file of that path, and as another
// otherwise, however the path came to be printed.
func TestMappingsOfOthers(t *testing.T) {
	const copied = `mkdir -p "$TMP/lib"; cp "$DIR/lib/libplain.so" "$TMP/lib/"; `
	asAgents(t, func(t *testing.T, follows bool) {
		for name, tt := range map[string]struct {
			how     []string
			script  string
			deleted bool
			folder  string // before the path
			weak    string // where map_files can't be followed
		}{
			"the host's":                     {plain, preload + `cat`, false, "", ""},
			"the host's, of a user":          {asNobody, preload + `cat`, false, "", ""},
			"the host's, with mounts":        {ownMounts, preload + `cat`, false, "", ""},
			"the host's, in user namespaces": {nobodysUsers, preload + `cat`, false, "", ""},
			"replaced":                       {plain, preload + `cp "$EXE" "$DIR/lib/new"; mv "$DIR/lib/new" "$DIR/lib/libplain.so"; cat`, true, "", process.Foreign},
			"replaced, with mounts":          {ownMounts, preload + `rm "$DIR/lib/libplain.so"; cat`, true, "", process.Foreign},

			"a tmpfs":                    {nobodysUsers, `mount -t tmpfs x "$TMP"; ` + copied + `mount --bind "$TMP/lib" "$DIR/lib"; ` + preload + `cat`, false, process.Foreign, process.Foreign},
			"a tmpfs, removed":           {nobodysUsers, `mount -t tmpfs x "$TMP"; ` + copied + `mount --bind "$TMP/lib" "$DIR/lib"; ` + preload + `rm "$DIR/lib/libplain.so"; cat`, true, process.Foreign, process.Foreign},
			"a tmpfs, let go of":         {nobodysUsers, `mount -t tmpfs x "$TMP"; mkdir -p "$TMP$DIR/lib"; cp "$DIR/lib/libplain.so" "$TMP$DIR/lib"; FROM="$TMP"; ` + preload + `umount -l "$TMP"; cat`, false, process.Foreign, process.Foreign},
			"another folder":             {nobodysUsers, copied + `mount --bind "$TMP/lib" "$DIR/lib"; ` + preload + `cat`, false, process.Foreign, process.Foreign},
			"another folder, removed":    {nobodysUsers, copied + `mount --bind "$TMP/lib" "$DIR/lib"; ` + preload + `rm "$DIR/lib/libplain.so"; cat`, true, process.Foreign, process.Foreign},
			"a file over it":             {nobodysUsers, copied + `mount --bind "$TMP/lib/libplain.so" "$DIR/lib/libplain.so"; ` + preload + `cat`, false, process.Foreign, process.Foreign},
			"an overlay":                 {nobodysUsers, `mount -t tmpfs x "$TMP"; mkdir "$TMP/u" "$TMP/w"; cp "$DIR/lib/libplain.so" "$TMP/u"; mount -t overlay -o "lowerdir=$DIR/lib,upperdir=$TMP/u,workdir=$TMP/w" x "$DIR/lib"; ` + preload + `cat`, false, process.Foreign, process.Foreign},
			"from another's mounts":      {asNobody, copied + `unshare -Urm sh -c 'mount --bind "$TMP/lib" "$DIR/lib"; exec sleep 30' 2>/dev/null & P=$!; until test "$(stat -Lc %i /proc/$P/root$DIR/lib)" != "$(stat -c %i $DIR/lib)"; do sleep 0.01; done; FROM=/proc/$P/root; ` + preload + `cat`, false, process.Foreign, process.Foreign},
			"from another's, removed":    {asNobody, copied + `unshare -Urm sh -c 'mount --bind "$TMP/lib" "$DIR/lib"; exec sleep 30' 2>/dev/null & P=$!; until test "$(stat -Lc %i /proc/$P/root$DIR/lib)" != "$(stat -c %i $DIR/lib)"; do sleep 0.01; done; FROM=/proc/$P/root; ` + preload + `rm "$TMP/lib/libplain.so"; cat`, true, process.Foreign, process.Foreign},
			"the host's and another's":   {nobodysUsers, `cp "$DIR/lib/libplain.so" "$TMP/x"; mount --bind "$TMP" "$DIR/lib"; mv "$TMP/x" "$TMP/libplain.so"; ` + preload + `cat`, false, process.Foreign, process.Foreign},
			"root's mounts":              {ownMounts, copied + `mount --bind "$TMP/lib" "$DIR/lib"; ` + preload + `cat`, false, process.Private, process.Foreign},
			"root's mounts, of a user":   {ofUserAfter(copied + `mount --bind "$TMP/lib" "$DIR/lib"`), preload + `cat`, false, process.Private, process.Foreign},
			"root's mounts, and removed": {ownMounts, copied + `mount --bind "$TMP/lib" "$DIR/lib"; ` + preload + `rm "$TMP/lib/libplain.so"; cat`, true, process.Foreign, process.Foreign},
		} {
			t.Run(name, func(t *testing.T) {
				s := newStage(t)
				lib := s.library(t)
				check.Nil(t, os.Chmod(filepath.Dir(lib), 0o755))
				pid := s.play(t, tt.how, tt.script, s.exe)
				want := process.Mapping{Path: tt.folder + lib, Deleted: tt.deleted}
				if !follows {
					want.Path = tt.weak + lib
				}
				weaken(t, follows)
				var got []process.Mapping
				check.Eventually(t, 10*time.Second, fmt.Sprintf("it is told as %+v", want), func() (bool, string) {
					p, err := Process(pid)
					got = slices.DeleteFunc(p.Mappings, func(m process.Mapping) bool { return !strings.Contains(m.Path, "libplain") })
					return err == nil && len(got) == 1 && got[0].Path == want.Path && got[0].Deleted == want.Deleted, fmt.Sprintf("%+v, %v", got, err)
				})
				if odd := want.Path != lib; odd != (got[0].Inode != 0 && got[0].Device != "") {
					t.Errorf("which file: %+v", got[0])
				}
			})
		}
	})
}

// ofUserAfter is a mount namespace of root's in which a script ran, and a user then.
func ofUserAfter(script string) []string {
	return []string{"unshare", "-m", "sh", "-ec", script + `; exec "$0" "$@"`, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"}
}

// A root on an overlay, as an image's, has numbers of its own in maps.
func TestMappingsOfAnOverlay(t *testing.T) {
	asAgents(t, func(t *testing.T, follows bool) {
		s := newStage(t)
		lib := s.library(t)
		for _, dir := range []string{"u", "w"} {
			check.Nil(t, os.Mkdir(filepath.Join(s.tmp, dir), 0o755))
		}
		check.Nil(t, unix.Mount("x", filepath.Dir(lib), "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s/u,workdir=%[2]s/w", filepath.Dir(lib), s.tmp)))
		t.Cleanup(func() { check.Nil(t, unix.Unmount(filepath.Dir(lib), unix.MNT_DETACH)) })
		pid := s.play(t, plain, preload+`cat`, s.exe)
		weaken(t, follows)
		p, err := Process(pid)
		if err != nil || !slices.Contains(p.Mappings, process.Mapping{Path: lib}) {
			t.Errorf("%+v, %v", p.Mappings, err)
		}
	})
}

// mapMemfd is a program with code in a file that has no place, under a name of its choice.
func mapMemfd(name string) {
	fd, err := unix.MemfdCreate(name, 0)
	if err == nil {
		err = unix.Ftruncate(fd, 4096)
	}
	if err == nil {
		_, err = unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE)
	}
	fmt.Println(err)
	time.Sleep(time.Minute)
	os.Exit(1)
}

// Memory with a name is no file of a library's folder.
func TestAMemfdsName(t *testing.T) {
	asAgents(t, func(t *testing.T, follows bool) {
		for name, want := range map[string]string{"plain": "/[foreign]/memfd:plain", "a/../../usr/lib/libz.so": "/[foreign]/usr/lib/libz.so"} {
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), memfdMode+"="+name)
			out := check.Must(cmd.StdoutPipe())(t)
			check.Nil(t, cmd.Start())
			line := make([]byte, 6)
			if _, err := out.Read(line); err != nil || string(line) != "<nil>\n" {
				t.Fatalf("%q %v", line, err)
			}
			weaken(t, follows)
			p, err := Process(cmd.Process.Pid)
			if !slices.ContainsFunc(p.Mappings, func(m process.Mapping) bool { return m.Path == want && m.Deleted }) {
				t.Errorf("%s: %+v, %v", name, p.Mappings, err)
			}
			check.Nil(t, errors.Join(cmd.Process.Kill()))
			_ = cmd.Wait()
		}
	})
}
