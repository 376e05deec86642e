package server

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
)

// What is decoded takes more memory than what was sent: an empty message of two
// bytes becomes a struct of a hundred. So the parts of a request are counted
// before they are decoded.

const (
	fewParts      = 512 // that any request may have
	partBytes     = 64  // and one more for each so many bytes
	operatorBytes = 16  // or, of an operator, so many: hosts with their labels
	maxDepth      = 16
)

// unmarshal decodes what a host signed, unless it has more parts than its length
// is worth.
func unmarshal(b []byte, m proto.Message) error {
	if err := checkParts(b, m.ProtoReflect().Descriptor(), partBytes); err != nil {
		return err
	}
	return proto.Unmarshal(b, m)
}

// calls has all calls, by their path.
var calls = func() map[string]protoreflect.MethodDescriptor {
	out := map[string]protoreflect.MethodDescriptor{}
	services := v1.File_countersign_v1_countersign_proto.Services()
	for i := range services.Len() {
		methods := services.Get(i).Methods()
		for j := range methods.Len() {
			out["/"+string(services.Get(i).FullName())+"/"+string(methods.Get(j).Name())] = methods.Get(j)
		}
	}
	return out
}()

// checkParts fails for an encoded message with more parts than fewParts, and one
// for each so many bytes.
func checkParts(b []byte, of protoreflect.MessageDescriptor, each int) error {
	left := fewParts + len(b)/each
	return countParts(b, of, &left, maxDepth)
}

var errParts = errors.New("it has more parts than its length is worth")

func countParts(b []byte, of protoreflect.MessageDescriptor, left *int, depth int) error {
	if depth == 0 {
		return fmt.Errorf("more than %d messages in one another", maxDepth)
	}
	return eachField(b, func(number protowire.Number, kind protowire.Type, value []byte) error {
		f := of.Fields().ByNumber(number)
		if f == nil {
			return nil
		}
		switch {
		case kind == protowire.BytesType && f.Message() != nil:
			*left--
			if err := countParts(value, f.Message(), left, depth-1); err != nil {
				return err
			}
		case kind == protowire.BytesType && f.IsPacked():
			*left -= len(value)
		case f.IsList():
			*left--
		}
		if *left < 0 {
			return errParts
		}
		return nil
	})
}

// eachField calls each with the fields of an encoded message; value is that of a
// field of bytes, without its length, and of others as it is encoded.
func eachField(b []byte, each func(number protowire.Number, kind protowire.Type, value []byte) error) error {
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		if n = protowire.ConsumeFieldValue(number, kind, b); n < 0 {
			return protowire.ParseError(n)
		}
		value := b[:n]
		if kind == protowire.BytesType {
			value, _ = protowire.ConsumeBytes(value)
		}
		if err := each(number, kind, value); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// Numbers of the fields on the way to logs: of ProveRequest and of IssueRequest,
// of Attested, and of Logs.
const (
	attestedField  = 1
	logsField      = 4
	eventLogField  = 1
	userspaceField = 2
	imaField       = 4
)

// longLogs are the logs of a request that is too large to be decoded: they are
// parts of what was read.
type longLogs struct{ event, userspace, ima []byte }

// takeLogs separates the logs of an encoded ProveRequest or IssueRequest from
// the rest of it, which is a new one of at most so many bytes.
func takeLogs(b []byte, most int) (rest []byte, logs longLogs, err error) {
	rest, err = rewrite(b, most, attestedField, func(attested []byte) ([]byte, error) {
		return rewrite(attested, most, logsField, func(in []byte) (kept []byte, err error) {
			err = eachField(in, func(number protowire.Number, kind protowire.Type, value []byte) error {
				to := map[protowire.Number]*[]byte{eventLogField: &logs.event, userspaceField: &logs.userspace, imaField: &logs.ima}[number]
				if to != nil && kind == protowire.BytesType {
					*to = value
					return nil
				}
				kept, err = appendField(kept, most, number, kind, value)
				return err
			})
			return kept, err
		})
	})
	return rest, logs, err
}

// rewrite copies a message, with change in the place of each value of a field.
func rewrite(b []byte, most int, field protowire.Number, change func([]byte) ([]byte, error)) (out []byte, err error) {
	err = eachField(b, func(number protowire.Number, kind protowire.Type, value []byte) (err error) {
		if number == field && kind == protowire.BytesType {
			if value, err = change(value); err != nil {
				return err
			}
		}
		out, err = appendField(out, most, number, kind, value)
		return err
	})
	return out, err
}

var errRest = errors.New("it is too long beside its logs")

func appendField(out []byte, most int, number protowire.Number, kind protowire.Type, value []byte) ([]byte, error) {
	if len(out)+len(value) > most {
		return nil, errRest
	}
	out = protowire.AppendTag(out, number, kind)
	if kind == protowire.BytesType {
		return protowire.AppendBytes(out, value), nil
	}
	return append(out, value...), nil
}
