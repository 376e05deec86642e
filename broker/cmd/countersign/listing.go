package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/countersign/countersign/broker/api"
	"github.com/countersign/countersign/internal/terminal"
)

// A paging is what the verbs that list have in common: how much of the list is wanted.
type paging struct {
	limit uint32
	after string
}

func (p *paging) flags(cmd *cobra.Command) {
	cmd.Flags().Uint32Var(&p.limit, "limit", 0, "show at most so many; 0: all")
	cmd.Flags().StringVar(&p.after, "after", "", "go on where an earlier list ended, with the same flags")
}

// walk asks for page after page until the list or the limit ends. Page asks for at most
// limit rows (0: as many as the broker sends at once) behind after; it returns how many
// came, and where the list goes on, empty at its end. So does walk.
func (p *paging) walk(page func(limit uint32, after string) (rows int, next string, err error)) (next string, err error) {
	next, left := p.after, p.limit
	for {
		rows, following, err := page(left, next)
		if err != nil {
			return "", err
		}
		if next = following; next == "" {
			return "", nil
		}
		if p.limit > 0 {
			if left -= min(left, uint32(rows)); left == 0 {
				return next, nil
			}
		}
	}
}

// firstRows is how many rows of a table are looked at for the widths of its columns.
const firstRows = 200

// A listing prints rows as they come, so that a long list needs no memory: as one JSON
// object, or as a table whose columns have the widths of its first rows.
type listing struct {
	w       io.Writer
	notes   io.Writer // where people read what is no row
	json    bool
	name    string // of the list in JSON
	header  []string
	first   [][]string // rows that wait for the widths
	widths  []int      // nil until they are known
	started bool
}

// listing begins a list; header names the columns of its table.
func (o *options) listing(cmd *cobra.Command, name, header string) *listing {
	return &listing{w: cmd.OutOrStdout(), notes: cmd.ErrOrStderr(), json: o.output == "json", name: name, header: strings.Fields(header)}
}

// row prints a row: m as JSON, or its cells.
func (l *listing) row(m proto.Message, cells ...any) error {
	if l.json {
		b, err := protojson.MarshalOptions{UseProtoNames: true, EmitDefaultValues: true}.Marshal(api.WithoutCodes(m))
		if err != nil {
			return err
		}
		return l.value(b)
	}
	text := make([]string, len(cells))
	for i, c := range cells {
		if text[i] = strings.ReplaceAll(terminal.Printable(fmt.Sprint(c)), "\t", " "); text[i] == "" {
			text[i] = "-"
		}
	}
	if l.widths != nil {
		return l.print(text)
	}
	if l.first = append(l.first, text); len(l.first) < firstRows {
		return nil
	}
	return l.flush()
}

// value prints one value of the list in JSON, without protojson's unstable spacing.
func (l *listing) value(b []byte) error {
	var compact bytes.Buffer
	compact.WriteString(",")
	if !l.started {
		compact.Reset()
		fmt.Fprintf(&compact, "{%q:[", l.name)
		l.started = true
	}
	if err := json.Compact(&compact, b); err != nil {
		return err
	}
	_, err := l.w.Write(compact.Bytes())
	return err
}

// flush prints the first rows.
func (l *listing) flush() error {
	l.widths = make([]int, len(l.header))
	rows := append([][]string{l.header}, l.first...)
	for _, row := range rows {
		for i, cell := range row {
			l.widths[i] = max(l.widths[i], utf8.RuneCountInString(cell))
		}
	}
	l.first = nil
	for _, row := range rows {
		if err := l.print(row); err != nil {
			return err
		}
	}
	return nil
}

func (l *listing) print(row []string) error {
	var line strings.Builder
	for i, cell := range row {
		line.WriteString(cell)
		if i < len(row)-1 {
			line.WriteString(strings.Repeat(" ", max(l.widths[i]-utf8.RuneCountInString(cell), 0)+2))
		}
	}
	line.WriteByte('\n')
	_, err := io.WriteString(l.w, line.String())
	return err
}

// end ends the list. Next is where it goes on, where it was cut short.
func (l *listing) end(next string) error {
	if l.json {
		if !l.started {
			if _, err := fmt.Fprintf(l.w, "{%q:[", l.name); err != nil {
				return err
			}
		}
		_, err := fmt.Fprintf(l.w, "],\"next\":%q}\n", next)
		return err
	}
	if l.widths == nil {
		if err := l.flush(); err != nil {
			return err
		}
	}
	if next != "" {
		fmt.Fprintf(l.notes, "there are more: --after %s\n", next)
	}
	return nil
}
