// Package account finds the users and groups of the host that the config names.
//
// It trusts /etc/passwd and /etc/group. A number stands for itself, so that users whom only a
// directory service knows can be named.
package account

import (
	"fmt"
	"os/user"
	"strconv"
)

// An Account is what a process of a user runs as.
type Account struct {
	UID, GID int
	Groups   []int // supplementary groups
}

// UID returns the number of the user name.
func UID(name string) (int, error) {
	u, err := user.Lookup(name)
	if err != nil {
		if n, ok := number(name); ok {
			return n, nil
		}
		return 0, fmt.Errorf("no user %q in /etc/passwd: create it, or give the number of one that a directory service knows", name)
	}
	return strconv.Atoi(u.Uid)
}

// GID returns the number of the group name.
func GID(name string) (int, error) {
	g, err := user.LookupGroup(name)
	if err != nil {
		if n, ok := number(name); ok {
			return n, nil
		}
		return 0, fmt.Errorf("no group %q in /etc/group: create it, or give the number of one that a directory service knows", name)
	}
	return strconv.Atoi(g.Gid)
}

// Of returns the account of the user name with the groups that the host gives it. A number that
// no user has runs with the group fallback alone.
func Of(name, fallback string) (Account, error) {
	uid, err := UID(name)
	if err != nil {
		return Account{}, err
	}
	u, err := user.Lookup(name)
	if err != nil {
		u, err = user.LookupId(strconv.Itoa(uid))
	}
	if err != nil {
		gid, err := GID(fallback)
		return Account{UID: uid, GID: gid, Groups: []int{gid}}, err
	}
	gid, err := strconv.Atoi(u.Gid)
	if err != nil {
		return Account{}, fmt.Errorf("user %q: group %q is no number", name, u.Gid)
	}
	ids, err := u.GroupIds()
	if err != nil {
		return Account{}, fmt.Errorf("groups of user %q: %w", name, err)
	}
	a := Account{UID: uid, GID: gid}
	for _, id := range ids {
		n, err := strconv.Atoi(id)
		if err != nil {
			return Account{}, fmt.Errorf("user %q: group %q is no number", name, id)
		}
		a.Groups = append(a.Groups, n)
	}
	return a, nil
}

func number(s string) (int, bool) {
	n, err := strconv.ParseUint(s, 10, 31)
	return int(n), err == nil
}
