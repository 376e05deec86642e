package api

import (
	"context"
	"strings"
	"sync"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Values from fixed lists are in a message twice: as a string, which all versions so far
// have, and as an enum, in the field of the same name with the suffix _code. Client and
// server use the interceptor Codes, which sets the field that the sender left empty. So
// code on either side may set or read either field, whatever version the peer has.

// Codes returns an interceptor, for clients and servers, that calls CompleteCodes on each
// message that is sent or received.
func Codes() connect.Interceptor {
	return connect.UnaryInterceptorFunc(func(next connect.UnaryFunc) connect.UnaryFunc {
		return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
			complete(req.Any())
			res, err := next(ctx, req)
			if err == nil {
				complete(res.Any())
			}
			return res, err
		}
	})
}

func complete(message any) {
	if m, ok := message.(proto.Message); ok {
		CompleteCodes(m)
	}
}

// CompleteCodes sets the empty field of each pair of string and enum in m. If both are set
// and differ, the string wins, because every version reads it. A value that this version
// doesn't know leaves the other field empty.
func CompleteCodes(m proto.Message) {
	if r := m.ProtoReflect(); r.IsValid() {
		each(r, func(m protoreflect.Message, p pair) {
			if text := m.Get(p.text).String(); text != "" {
				if code, ok := p.byText[text]; ok {
					m.Set(p.code, protoreflect.ValueOfEnum(code))
				} else {
					m.Clear(p.code)
				}
				return
			}
			if text := p.byCode[m.Get(p.code).Enum()]; text != "" {
				m.Set(p.text, protoreflect.ValueOfString(text))
			}
		})
	}
}

// WithoutCodes returns a copy of m without the enums, for output to people.
func WithoutCodes[M proto.Message](m M) M {
	plain := proto.Clone(m)
	each(plain.ProtoReflect(), func(m protoreflect.Message, p pair) { m.Clear(p.code) })
	return plain.(M)
}

// A pair is the string and the enum field of one value.
type pair struct {
	text, code protoreflect.FieldDescriptor
	byText     map[string]protoreflect.EnumNumber
	byCode     map[protoreflect.EnumNumber]string
}

// pairs lists the pairs of a message type, and its fields whose messages contain pairs.
type pairs struct {
	own   []pair
	inner []protoreflect.FieldDescriptor // messages, or lists of them
}

var known sync.Map // pairs by protoreflect.FullName

func pairsOf(d protoreflect.MessageDescriptor) pairs {
	if p, ok := known.Load(d.FullName()); ok {
		return p.(pairs)
	}
	var p pairs
	for i := range d.Fields().Len() {
		f := d.Fields().Get(i)
		switch {
		case f.IsMap():
		case f.Kind() == protoreflect.MessageKind:
			if in := pairsOf(f.Message()); len(in.own)+len(in.inner) > 0 {
				p.inner = append(p.inner, f)
			}
		case f.Kind() == protoreflect.EnumKind:
			if text := d.Fields().ByName(protoreflect.Name(strings.TrimSuffix(string(f.Name()), "_code"))); text != nil {
				p.own = append(p.own, newPair(text, f))
			}
		}
	}
	known.Store(d.FullName(), p)
	return p
}

func newPair(text, code protoreflect.FieldDescriptor) pair {
	p := pair{text: text, code: code, byText: map[string]protoreflect.EnumNumber{}, byCode: map[protoreflect.EnumNumber]string{}}
	values := code.Enum().Values()
	prefix := strings.TrimSuffix(string(values.ByNumber(0).Name()), "UNSPECIFIED")
	for i := range values.Len() {
		v := values.Get(i)
		if v.Number() == 0 {
			continue
		}
		word := strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(string(v.Name()), prefix), "_", "-"))
		p.byText[word], p.byCode[v.Number()] = v.Number(), word
	}
	return p
}

// each calls do for every pair in m and in the messages inside it.
func each(m protoreflect.Message, do func(protoreflect.Message, pair)) {
	p := pairsOf(m.Descriptor())
	for _, one := range p.own {
		do(m, one)
	}
	for _, f := range p.inner {
		if !m.Has(f) {
			continue
		}
		if !f.IsList() {
			each(m.Mutable(f).Message(), do)
			continue
		}
		list := m.Mutable(f).List()
		for i := range list.Len() {
			each(list.Get(i).Message(), do)
		}
	}
}
