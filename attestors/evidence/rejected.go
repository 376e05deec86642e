package evidence

import (
	"errors"
	"fmt"
)

// A Check names one thing that evidence must fulfil. The rooms that appraise
// name their own.
type Check string

// A Rejected is evidence that says no.
type Rejected struct {
	Check  Check
	Detail string
}

func (r *Rejected) Error() string {
	return fmt.Sprintf("evidence rejected: %s: %s", r.Check, r.Detail)
}

// CheckOf names the check that an error failed, or is empty if the error isn't
// a rejection.
func CheckOf(err error) Check {
	var r *Rejected
	if errors.As(err, &r) {
		return r.Check
	}
	return ""
}
