package api

import (
	"context"
	"strings"
	"sync"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// A value of a fixed list stands in a message twice: as a string, as all versions so far
// have it, and as an enum in the field of the same name with _code behind it. Both ends
// of a connection make the two say the same, so that either may be set and either read,
// whatever version the peer is of.

// Codes is for both ends of a connection: it completes the messages that come and go.
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

// CompleteCodes sets each string or enum of a pair that isn't set by the other. Where
// both are set and differ, the string stands: it is what every version reads. A value
// that this version doesn't know leaves the other unset.
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

// WithoutCodes is a copy of m for people, to whom the strings say enough.
func WithoutCodes[M proto.Message](m M) M {
	plain := proto.Clone(m)
	each(plain.ProtoReflect(), func(m protoreflect.Message, p pair) { m.Clear(p.code) })
	return plain.(M)
}

// A pair is the two fields of one value.
type pair struct {
	text, code protoreflect.FieldDescriptor
	byText     map[string]protoreflect.EnumNumber
	byCode     map[protoreflect.EnumNumber]string
}

// pairs are those of a kind of message, and where in it more lie.
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

// each calls do with every pair in m and in the messages that it holds.
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
