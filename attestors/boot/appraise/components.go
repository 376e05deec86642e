package appraise

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"slices"
	"strings"

	"github.com/countersign/countersign/attestors/evidence"
)

// PCRs of boot loaders and kernels.
const (
	pcrGRUB       = 8
	pcrFiles      = 9
	pcrSections   = 11
	pcrConfig     = 12
	pcrExtensions = 13
	pcrMOK        = 14
	pcrSystem     = 15
)

// maxText bounds what is taken for a message of the firmware. The authenticated
// part of an image hashes to its digest too, so an image could be passed off as
// text that firmware measured, but for its length and its binary head.
const maxText = 256

// read makes facts of what replayed.
func (b *bootLog) read(f *Facts) {
	b.firmware(f)
	b.secureBoot(f)
	b.components(f)
	b.commandLine(f)
	b.windows(f)
}

// firmware reads the version, which PCR 0 measures first (Platform Firmware
// Profile, EV_S_CRTM_VERSION), or second where an authenticated code module such as
// Boot Guard's measures the CRTM before it runs (EV_S_CRTM_CONTENTS), whose digest
// is of no data. Such a start is proven by the TPM's locality; where firmware leaves
// that out, it is the host's word, so that only what reads like a version is one.
func (b *bootLog) firmware(f *Facts) {
	events := b.pcr[pcrFirmware]
	if len(events) == 0 {
		return
	}
	m := &events[0]
	const contents = 0x07 // EV_S_CRTM_CONTENTS
	if b.locality != 0 || m.opaque() && m.Type == contents {
		if len(events) == 1 {
			return
		}
		const guid = 16
		m = &events[1]
		if _, text := utf16Text(m.proven); !text && len(m.proven) != guid {
			return
		}
	}
	if m.opaque() || separators[m.digest] {
		return
	}

	version, ok := utf16Text(m.proven)
	switch {
	case len(m.proven) > maxText:
		version = "sha256:" + m.digest.String()
	case !ok: // a GUID, or a vendor's structure
		version = "hex:" + hex.EncodeToString(m.proven)
	}
	f.FirmwareVersion = &version
	b.took("firmware_version", pcrFirmware)
}

// componentFacts are the names of the facts that a PCR's components make.
var componentFacts = map[uint32]string{pcrDrivers: "drivers", pcrImages: "boot_images", pcrFiles: "boot_files",
	pcrSections: "sections", pcrConfig: "config", pcrExtensions: "extensions"}

// components lists what was measured by digest, PCR by PCR.
func (b *bootLog) components(f *Facts) {
	add := func(m *measurement, kind, label string) {
		f.Components = append(f.Components, Component{PCR: int(m.PCR), Kind: kind, SHA256: m.digest})
		f.Asserted.Components = append(f.Asserted.Components, m.Type.String()+" "+label)
		b.took(componentFacts[m.PCR], int(m.PCR))
	}
	for _, list := range []struct {
		pcr  int
		kind string
	}{{pcrDrivers, KindDriver}, {pcrImages, KindApplication}} {
		for _, m := range b.images(list.pcr) {
			add(m, list.kind, imagePath(m.Data))
		}
	}
	for i := range b.pcr[pcrFiles] {
		m := &b.pcr[pcrFiles][i]
		add(m, KindFile, label(m.Data))
	}
	named := sections(b.pcr[pcrSections])
	for _, s := range named {
		add(s.content, KindSection+" "+s.name, label(s.content.Data))
	}
	for i := 2 * len(named); i < len(b.pcr[pcrSections]); i++ {
		m := &b.pcr[pcrSections][i]
		add(m, KindSection, label(m.Data))
	}
	for i := range b.pcr[pcrExtensions] {
		m := &b.pcr[pcrExtensions][i]
		add(m, KindExtension, label(m.Data))
	}
	for i := range b.pcr[pcrMOK] {
		m := &b.pcr[pcrMOK][i]
		f.MOK = append(f.MOK, m.digest)
		f.Asserted.MOK = append(f.Asserted.MOK, label(m.Data))
		b.took("mok", pcrMOK)
	}
}

// images lists what may be an image in a PCR: everything but separators and
// messages. An image's digest is of no data, so an event that says that it hashes
// its data, and doesn't, may be an image or a text: the PCR has no list then.
func (b *bootLog) images(pcr int) (list []*measurement) {
	for i := range b.pcr[pcr] {
		m := &b.pcr[pcr][i]
		switch {
		case separators[m.digest] || messages[m.digest] != "" || message(m):
		case m.digest == separatorError, m.opaque() && hashesData(m.Type):
			b.state[pcr].withheld = true
		default:
			list = append(list, m)
		}
	}
	if b.state[pcr].withheld {
		return nil
	}
	return list
}

// message reports whether an event is firmware's word on what it does ("Calling EFI
// Application from Boot Option") and no image.
func message(m *measurement) bool {
	return !m.opaque() && len(m.proven) > 0 && len(m.proven) <= maxText && printable(strings.TrimSuffix(string(m.proven), "\x00"))
}

// sectionNames are what systemd's stub measures of a unified kernel image; each
// name is measured, with its NUL, before its content.
var sectionNames = func() map[evidence.Digest]string {
	names := map[evidence.Digest]string{}
	for _, n := range []string{".linux", ".osrel", ".cmdline", ".initrd", ".ucode", ".splash", ".dtb",
		".dtbauto", ".uname", ".sbat", ".pcrsig", ".pcrpkey", ".profile", ".hwids", ".efifw"} {
		names[evidence.Sum([]byte(n+"\x00"))] = n
	}
	return names
}()

type section struct {
	name    string
	content *measurement
}

// sections pairs names with contents in PCR 11, as long as they alternate.
func sections(pcr []measurement) []section {
	var out []section
	for i := 0; i+1 < len(pcr); i += 2 {
		name, ok := sectionNames[pcr[i].digest]
		if !ok {
			break
		}
		out = append(out, section{name, &pcr[i+1]})
	}
	return out
}

// What GRUB puts before a text that it measures; the digest is of the text alone,
// so which of these it was is the host's word.
var grubPrefixes = []string{"grub_cmd: ", "grub_cmd ", "kernel_cmdline: ", "module_cmdline: ", "grub_kernel_cmdline ", "grub_module_cmdline "}

// meddling are GRUB's commands with which a kernel may run with another command
// line than GRUB measured: those that start or prepare something else than the
// kernel of a kernel_cmdline, and those that write to memory or devices.
var meddling = wordSet(`chainloader multiboot multiboot2 xen_hypervisor kfreebsd knetbsd kopenbsd
	xnu_kernel xnu_kernel64 xnu_resume plan9 ntldr freedos truecrypt lnxboot appleloader pxechainloader legacy_kernel uki blsuki exit
	write_byte write_word write_dword outb outw outl wrmsr setpci cutmem badram devicetree fakebios loadbios acpi`)

// wrappers are GRUB's words that run the rest of their text as a command, which
// GRUB then doesn't measure by itself (grub-core/script/execute.c and
// commands/time.c).
var wrappers = wordSet("! time")

func wordSet(text string) map[string]bool {
	words := map[string]bool{}
	for _, w := range strings.Fields(text) {
		words[w] = true
	}
	return words
}

// unwrapped is the command that a text runs, its first word, and the rest.
func unwrapped(text string) (command, word, arguments string) {
	for {
		word, arguments, _ = strings.Cut(text, " ")
		if !wrappers[word] || arguments == "" {
			return text, word, arguments
		}
		text = arguments
	}
}

// commandLine reads GRUB's texts from PCR 8 and those of systemd-boot and its stub
// from PCR 12.
//
// GRUB measures a command line as the text of the command that was given, and again
// as the text that the kernel gets. A command's text hashes the same, so a line of
// grub.cfg that is no command at all could be passed off as the kernel's, and a
// kernel whose file has a command's name could be passed off as that command. Hence
// every text that doesn't begin as a command does is a candidate, whatever it is
// called, and so are the arguments of every command that loads a kernel. The fact is
// there only with one candidate, no other loader, and both PCRs known whole.
func (b *bootLog) commandLine(f *Facts) {
	f.LinesComplete = f.Complete(pcrGRUB) && f.Complete(pcrConfig) &&
		!slices.ContainsFunc(f.Userspace, func(r Record) bool { return r.PCR == pcrConfig })

	var kernels []string // arguments of linux commands
	for i := range b.pcr[pcrGRUB] {
		m := &b.pcr[pcrGRUB][i]
		text, kernel, ok := grubText(m)
		if !ok {
			f.LinesComplete = false
			b.limit(pcrGRUB, m.Event, "the digest isn't of a text, as GRUB has it")
			continue
		}
		f.GRUBCommands = append(f.GRUBCommands, text)
		b.took("grub_commands", pcrGRUB)
		command, word, arguments := unwrapped(text)
		if strings.HasPrefix(word, "linux") && !strings.Contains(word, "=") {
			kernels = append(kernels, arguments)
		}
		if kernel || !commandLike(command) {
			f.KernelCommandLines = append(f.KernelCommandLines, text)
		}
		if meddling[word] {
			f.LinesComplete = false // what runs may have another line
		}
	}

	windowsEnds := windowsEnd(b.pcr[pcrConfig])
	for i := range b.pcr[pcrConfig] {
		m := &b.pcr[pcrConfig][i]
		if text, ok := utf16Text(m.proven); ok && bytes.HasSuffix(m.proven, []byte{0, 0}) {
			f.KernelConfig = append(f.KernelConfig, text)
			b.took("kernel_config", pcrConfig)
			f.KernelCommandLines = append(f.KernelCommandLines, text)
			continue
		}
		f.LinesComplete = false
		f.Components = append(f.Components, Component{PCR: pcrConfig, Kind: KindConfig, SHA256: m.digest})
		f.Asserted.Components = append(f.Asserted.Components, m.Type.String()+" "+label(m.Data))
		b.took(componentFacts[pcrConfig], pcrConfig)
		switch {
		case i <= windowsEnds:
		case m.opaque():
			b.limit(pcrConfig, m.Event, "the digest isn't of the data, and may be a kernel's command line")
		default:
			b.limit(pcrConfig, m.Event, "the data isn't a command line's text, as systemd's stub has it")
		}
	}

	known := map[string]bool{}
	for _, line := range f.KernelCommandLines {
		known[unquoted(line)] = true
	}
	for _, line := range kernels {
		if plain := unquoted(line); !known[plain] {
			known[plain] = true
			f.KernelCommandLines = append(f.KernelCommandLines, line)
		}
	}
	f.KernelCommandLines = distinct(f.KernelCommandLines) // systemd-boot and its stub measure one each
	if f.LinesComplete && len(f.KernelCommandLines) == 1 {
		f.KernelCommandLine = &f.KernelCommandLines[0]
		b.took("kernel_command_line", pcrGRUB, pcrConfig)
	}
}

// unquoted leaves out the marks by which GRUB's text of a command differs from that
// of the kernel's command line which it makes.
func unquoted(line string) string {
	return strings.Map(func(r rune) rune {
		if strings.ContainsRune("\"'\\", r) {
			return -1
		}
		return r
	}, line)
}

// commands are those of GRUB, and functions that distributions' grub.cfg defines.
// Another first word may be a kernel's relative path.
var commands = wordSet(`. [ all_functional_test authenticate background_color background_image blocklist boot break cat
		clear cmosclean cmosdump cmostest cmp color_normal configfile continue crc cryptomount date distrust drivemap
		echo efitextmode eval export extract_entries_configfile extract_entries_source extract_syslinux_entries_configfile
		extract_syslinux_entries_source false font function fwsetup gfxmode gptsync halt hashsum help hexdump if in initrd initrd16 initrdefi insmod
		keymap keystatus legacy_configfile linux linux16 linuxefi list_env list_trusted load_env load_video loadfont loadkey loopback ls lsefi
		lsefimmap lsefisystab lsfonts lsmmap lsmod lspci lssal md5sum menuentry module module2 nativedisk net_add_addr
		net_add_dns net_add_route net_bootp net_bootp6 net_del_addr net_del_dns net_del_route net_dhcp net_get_dhcp_option net_ipv6_autoconf
		net_ls_addr net_ls_cards net_ls_dns net_ls_routes net_nslookup normal normal_exit parttool password password_pbkdf2 pcidump
		play probe rdmsr read read_byte read_dword read_word reboot recordfail regexp return rmmod save_env savedefault search search.file
		search.fs_label search.fs_uuid sendkey serial set setparams sha1sum sha256sum sha512sum shift shim_lock sleep smbios source submenu
		syslinux_configfile syslinux_source terminal_input terminal_output terminfo test test_blockarg testload testspeed tr true trust unset
		usb blscfg hwmatch initrdfail increment decrement menu_color_normal menu_color_highlight bli btrfs-mount-subvol btrfs-list-snapshots
		btrfs-info btrfs-get-default-subvol zfs-bootfs tpm tpm2_key_protector_init tpm2_key_protector_clear key_protector version efivar
		verify_detached videoinfo xen_module zfsinfo zfskey gptpriority gptrepair`)

// commandLike says whether a text is a command: one that GRUB or its usual
// configuration has, or an assignment.
func commandLike(text string) bool {
	word, _, _ := strings.Cut(text, " ")
	name, _, assigns := strings.Cut(word, "=")
	return word == "" || commands[word] || meddling[word] || assigns && !strings.ContainsAny(name, "/()'\"")
}

// grubText is the text that an event's digest proves, and whether it calls itself
// a kernel's command line.
func grubText(m *measurement) (text string, kernel, ok bool) {
	data := strings.TrimSuffix(string(m.Data), "\x00")
	for _, prefix := range grubPrefixes {
		text, found := strings.CutPrefix(data, prefix)
		// GRUB of RHEL 8 hashes a command with its NUL.
		if found && (m.digest == evidence.Sum([]byte(text)) || m.digest == evidence.Sum([]byte(text+"\x00"))) {
			return text, strings.Contains(prefix, "kernel_cmdline"), true
		}
	}
	return "", false, false
}

// label is what an event says that it measured.
func label(data []byte) string {
	text := strings.TrimSuffix(string(data), "\x00")
	if len(data) > 8 && binary.LittleEndian.Uint32(data[4:]) == uint32(len(data)-8) { // a tagged event
		text = strings.TrimSuffix(string(data[8:]), "\x00")
	}
	if wide, ok := utf16Text(data); ok && strings.Contains(text, "\x00") {
		text = wide
	}
	if len(text) > maxText || !printable(text) {
		return ""
	}
	return text
}

// imagePath is the file's path in an UEFI_IMAGE_LOAD_EVENT, if it has one.
func imagePath(data []byte) string {
	const header = 4 * 8
	if len(data) < header || binary.LittleEndian.Uint64(data[24:]) != uint64(len(data)-header) {
		return ""
	}
	var path string
	for node := data[header:]; len(node) >= 4; {
		size := int(binary.LittleEndian.Uint16(node[2:]))
		if size < 4 || size > len(node) {
			break
		}
		if node[0] == 4 && node[1] == 4 { // media, file path
			if text, ok := utf16Text(node[4:size]); ok && len(text) <= maxText {
				path += text
			}
		}
		node = node[size:]
	}
	return path
}
