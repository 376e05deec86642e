package packages

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
)

const (
	maxManifest = 64 << 20
	maxLine     = maxPath + 128
)

// ReadManifest takes a list of absolute paths with their SHA-256, by path: lines
// as sha256sum prints them, lines of "sha256:hex path", or a JSON list of
// {"path": …, "digest": "sha256:hex"}.
func ReadManifest(r io.Reader) ([]File, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxManifest+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxManifest {
		return nil, fmt.Errorf("a manifest of more than %d bytes", maxManifest)
	}
	files := fileSet{most: usual.entries, digests: map[string]string{}}
	if bytes.HasPrefix(bytes.TrimSpace(b), []byte("[")) {
		err = files.readJSON(b)
	} else {
		err = files.readLines(b)
	}
	if err != nil {
		return nil, err
	}
	return files.list(), nil
}

func (s fileSet) readJSON(b []byte) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	var list []File
	if err := d.Decode(&list); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something follows the JSON list")
	}
	for i, f := range list {
		text, prefixed := strings.CutPrefix(f.Digest, digestPrefix)
		if !prefixed {
			return fmt.Errorf("file %d: a digest is written sha256:hex", i)
		}
		if err := s.addListed(f.Path, text); err != nil {
			return fmt.Errorf("file %d: %w", i, err)
		}
	}
	return nil
}

// unescape undoes what sha256sum does to a name that holds a backslash or a line's
// end; a backslash in front of the line tells.
var unescape = strings.NewReplacer(`\\`, `\`, `\n`, "\n", `\r`, "\r")

func (s fileSet) readLines(b []byte) error {
	lines := bufio.NewScanner(bytes.NewReader(b))
	lines.Buffer(nil, maxLine)
	n := 0
	for lines.Scan() {
		n++
		line := lines.Text()
		if line == "" {
			continue
		}
		line, escaped := strings.CutPrefix(line, `\`)
		digest, name, _ := strings.Cut(line, " ")
		if text, prefixed := strings.CutPrefix(digest, digestPrefix); prefixed {
			digest = text
		} else if len(name) > 0 && (name[0] == ' ' || name[0] == '*') { // read as text, or as binary
			name = name[1:]
		}
		if escaped {
			name = unescape.Replace(name)
		}
		if err := s.addListed(name, digest); err != nil {
			return fmt.Errorf("line %d: %w", n, err)
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("line %d: %w", n+1, err)
	}
	return nil
}

func (s fileSet) addListed(name, digest string) error {
	digest, err := digestOf(digest)
	if err != nil {
		return err
	}
	if !strings.HasPrefix(name, "/") {
		return fmt.Errorf("%.80q is no absolute path: run sha256sum on files at the paths they will have", name)
	}
	p, err := clean(name)
	if err != nil {
		return err
	}
	return s.add(p, digest)
}
