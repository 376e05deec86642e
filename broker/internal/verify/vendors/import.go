package vendors

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"
	"unicode"

	"github.com/smallstep/pkcs7"
	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/internal/durable"
)

// MaxInput bounds a file that is imported; Microsoft's cabinet has less than 1 MiB.
const MaxInput = 32 << 20

// An Item is one thing that was found in an imported file: a certificate, or
// something that can't be used as one.
type Item struct {
	Source  string `json:"source"` // the file, and behind a colon the file in it
	Vendor  string `json:"vendor"` // a cabinet's folder, or else the certificate's organization
	Subject string `json:"subject,omitempty"`
	Root    bool   `json:"root"`
	LeftOut string `json:"left_out,omitempty"` // the reason, or "" if it is to be taken

	cert *x509.Certificate
}

// Read returns what a file holds: certificates in PEM, DER or PKCS#7, or a
// cabinet of such files that Microsoft signed. One item that can't be used
// doesn't keep the others out; a cabinet that can't be trusted or read is an
// error.
func Read(name string, data []byte, now time.Time) ([]Item, error) {
	return read(name, data, microsoft(), now)
}

func read(name string, data []byte, signers *x509.CertPool, now time.Time) ([]Item, error) {
	if len(data) > MaxInput {
		return nil, fmt.Errorf("%s: more than %d bytes", name, MaxInput)
	}
	if !bytes.HasPrefix(data, []byte("MSCF")) {
		return readFile(name, "", data, now), nil
	}

	if err := checkSignature(data, signers); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	files, err := unpack(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	var items []Item
	for _, file := range files {
		vendor, _, _ := strings.Cut(file.name, "/")
		source := name + ":" + file.name
		switch strings.ToLower(path.Ext(file.name)) {
		case ".crt", ".cer", ".der", ".pem", ".p7b", ".p7c":
			items = append(items, readFile(source, vendor, file.data, now)...)
		default:
			items = append(items, Item{Source: source, Vendor: vendor, LeftOut: "it isn't a certificate's file"})
		}
	}
	return items, nil
}

// readFile reads a file that is no cabinet. Without a vendor, each certificate
// names its own.
func readFile(source, vendor string, data []byte, now time.Time) (items []Item) {
	leaveOut := func(format string, args ...any) {
		items = append(items, Item{Source: source, Vendor: vendor, LeftOut: fmt.Sprintf(format, args...)})
	}
	addDER := func(der []byte) {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			leaveOut("it can't be read: %v", err)
			return
		}
		items = append(items, judge(source, vendor, cert, now))
	}
	addPKCS7 := func(der []byte) {
		certs, err := parsePKCS7(der)
		if err != nil {
			leaveOut("it can't be read as PKCS#7: %v", err)
		}
		for _, cert := range certs {
			addDER(cert.Raw)
		}
	}

	if bytes.Contains(data, []byte("-----BEGIN ")) {
		blocks, damaged := pemBlocks(data)
		for _, block := range blocks {
			switch block.Type {
			case "CERTIFICATE", "X509 CERTIFICATE":
				addDER(block.Bytes)
			case "PKCS7", "CMS":
				addPKCS7(block.Bytes)
			default:
				leaveOut("a PEM block of type %q holds no certificate", block.Type)
			}
		}
		if damaged > 0 {
			leaveOut("%d PEM blocks are damaged", damaged)
		}
		return items
	}

	_, err := x509.ParseCertificate(data)
	if err == nil {
		addDER(data)
		return items
	}
	if certs, e := parsePKCS7(data); e == nil {
		if len(certs) == 0 {
			leaveOut("it is PKCS#7 without a certificate")
		}
		for _, cert := range certs {
			addDER(cert.Raw)
		}
		return items
	}
	leaveOut("it is neither PEM, DER nor PKCS#7 that can be read: %v", err)
	return items
}

// parsePKCS7 returns the certificates of a degenerate SignedData (RFC 5652,
// section 5.2). Where one of them is too odd for crypto/x509, the library's
// older parser reads them all, and each is then judged by itself.
func parsePKCS7(data []byte) (certs []*x509.Certificate, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = errors.New("its structure is wrong")
		}
	}()

	message, err := pkcs7.Parse(data)
	if err != nil {
		pkcs7.SetFallbackLegacyX509CertificateParserEnabled(true)
		defer pkcs7.SetFallbackLegacyX509CertificateParserEnabled(false)
		if message, err = pkcs7.Parse(data); err != nil {
			return nil, err
		}
	}
	return message.Certificates, nil
}

func judge(source, vendor string, cert *x509.Certificate, now time.Time) Item {
	if vendor == "" {
		vendor = cert.Subject.CommonName
		if len(cert.Subject.Organization) > 0 {
			vendor = cert.Subject.Organization[0]
		}
	}
	return Item{Source: source, Vendor: vendor, Subject: cert.Subject.String(), Root: selfSigned(cert), LeftOut: flaw(cert, now), cert: cert}
}

// Merge adds the certificates of items to the PEM file out, and makes it where
// there is none. What the file holds stays as it is, byte for byte; items that
// it has already are marked as left out. It returns how many were added.
//
// One Merge at a time writes to a folder.
func Merge(out string, items []Item) (added int, err error) {
	if target, err := filepath.EvalSymlinks(out); err == nil {
		out = target
	}
	unlock, err := lock(filepath.Dir(out))
	if err != nil {
		return 0, err
	}
	defer unlock()

	content, err := readRegular(out)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}

	have := map[string]string{} // a certificate's DER, and where it is
	if len(bytes.TrimSpace(content)) > 0 {
		certs, err := parsePEM(content)
		if err != nil {
			return 0, fmt.Errorf("%s isn't changed, since it can't be read: %w (mend it, or give another file by --out)", out, err)
		}
		for _, cert := range certs {
			have[string(cert.Raw)] = out
		}
		if !bytes.HasSuffix(content, []byte("\n")) {
			content = append(content, '\n')
		}
	}
	for i, item := range items {
		if item.LeftOut != "" {
			continue
		}
		if where, ok := have[string(item.cert.Raw)]; ok {
			items[i].LeftOut = "it is in " + where + " already"
			continue
		}
		have[string(item.cert.Raw)] = item.Source
		content = append(content, "# "+comment(item.Vendor)+": "+comment(item.Subject)+"\n"...)
		content = append(content, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: item.cert.Raw})...)
		added++
	}
	if added == 0 {
		return 0, nil
	}
	if certs, err := parsePEM(content); err != nil || len(certs) != len(have) {
		return 0, fmt.Errorf("%s isn't changed: the broker couldn't read %d certificates with the new ones among them: %w", out, len(have), err)
	}
	return added, replace(out, content)
}

// lock keeps other imports from the folder until unlock.
func lock(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", dir, err), f.Close())
	}
	return func() { _ = f.Close() }, nil
}

// readRegular reads a file, and refuses to wait for a pipe or to replace a device.
func readRegular(name string) ([]byte, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s isn't a regular file (%s), and is not replaced", name, info.Mode().Type())
	}
	return os.ReadFile(name)
}

// replace writes a file whole or not at all, and keeps its owner and mode. The new
// file has a name that nobody can foresee: out may be in a folder where others may
// write, who could put a link of that name there.
func replace(out string, content []byte) (err error) {
	mode := fs.FileMode(0o644) // certificates are public
	old, err := os.Stat(out)
	if err == nil {
		mode = old.Mode().Perm()
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}

	f, err := os.CreateTemp(filepath.Dir(out), ".new-*.pem")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	_, err = f.Write(content)
	if owner, ok := owners(old); err == nil && ok {
		err = f.Chown(int(owner.Uid), int(owner.Gid))
	}
	if err == nil {
		err = f.Chmod(mode) // after Chown, which may clear bits
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), out); err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(out))
}

// owners are those of a file that was there.
func owners(info fs.FileInfo) (*syscall.Stat_t, bool) {
	if info == nil {
		return nil, false
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	return stat, ok
}

// comment keeps a name of somebody else's from ending a comment in PEM, or from
// beginning a block.
func comment(s string) string {
	dash := false
	return strings.Map(func(r rune) rune {
		again := dash && r == '-'
		dash = r == '-'
		switch {
		case again:
			return -1
		case !unicode.IsPrint(r):
			return ' '
		}
		return r
	}, s)
}
