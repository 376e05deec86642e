package systemd

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os/user"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"

	"github.com/countersign/countersign/hostagent/internal/program"
)

// askTime bounds one question to the system manager.
const askTime = 10 * time.Second

// A unit is what the system manager says of one.
type unit struct {
	active     string // ActiveState
	mainPID    int
	invocation string
	cgroup     string
	execStart  string // its file
	elsewhere  string // the setting by which execStart is another file than the host's, "" for none
	user       string
	group      string
}

// A manager is the connection to the system manager, made when it is needed
// and again when it was lost.
type manager struct {
	changed func(unit string) // "" for all

	mu      sync.Mutex
	conn    *dbus.Conn        // guarded by mu
	cgroups map[string]string // guarded by mu; last seen, by unit
}

func (m *manager) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.conn != nil {
		m.conn.Close()
		m.conn = nil
	}
}

func (m *manager) connected() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.conn != nil && m.conn.Connected()
}

func (m *manager) lastCgroup(name string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.cgroups[name]
}

func (m *manager) connect(ctx context.Context) {
	if _, err := m.get(ctx); err == nil {
		m.changed("")
	}
}

func (m *manager) get(ctx context.Context) (*dbus.Conn, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.conn != nil && m.conn.Connected() {
		return m.conn, nil
	}
	if m.conn != nil {
		m.conn.Close()
		m.conn = nil
	}
	// The connection outlives the question that made it.
	conn, err := dbus.NewSystemdConnectionContext(context.WithoutCancel(ctx))
	if err != nil {
		return nil, fmt.Errorf("the system manager can't be reached (is systemd running, and this root?): %w", err)
	}
	if err := conn.Subscribe(); err != nil {
		conn.Close()
		return nil, err
	}
	updates, lost := make(chan *dbus.PropertiesUpdate, 256), make(chan error, 1)
	conn.SetPropertiesSubscriber(updates, lost)
	go m.forward(conn, updates, lost)
	m.conn = conn
	return conn, nil
}

// forward passes signals on until conn is closed.
func (m *manager) forward(conn *dbus.Conn, updates <-chan *dbus.PropertiesUpdate, lost <-chan error) {
	ticker := time.NewTicker(pollEvery)
	defer ticker.Stop()
	for {
		select {
		case u := <-updates:
			m.changed(u.UnitName)
		case <-lost: // signals were dropped
			m.changed("")
		case <-ticker.C:
			if !conn.Connected() {
				return
			}
		}
	}
}

// unit asks for one unit's properties.
func (m *manager) unit(ctx context.Context, name string) (unit, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	conn, err := m.get(ctx)
	if err != nil {
		return unit{}, err
	}
	general, err := conn.GetUnitPropertiesContext(ctx, name)
	if err != nil {
		return unit{}, fmt.Errorf("unit %s: %w", name, err)
	}
	if general["LoadState"] == "not-found" {
		return unit{}, fmt.Errorf("%w: there is no unit %s", program.ErrNotRunning, name)
	}
	if canonical, _ := general["Id"].(string); canonical != name {
		return unit{}, fmt.Errorf("unit %s is an alias of %s: use that name", name, canonical)
	}
	service, err := conn.GetUnitTypePropertiesContext(ctx, name, "Service")
	if err != nil {
		return unit{}, fmt.Errorf("unit %s is no service: %w", name, err)
	}
	u := unit{}
	u.active, _ = general["ActiveState"].(string)
	if id, _ := general["InvocationID"].([]byte); len(id) == 16 {
		u.invocation = hex.EncodeToString(id)
	}
	pid, _ := service["MainPID"].(uint32)
	u.mainPID = int(pid)
	u.cgroup, _ = service["ControlGroup"].(string)
	u.user, _ = service["User"].(string)
	u.group, _ = service["Group"].(string)
	if lines, _ := service["ExecStart"].([][]any); len(lines) > 0 && len(lines[0]) > 0 {
		u.execStart, _ = lines[0][0].(string)
	}
	u.elsewhere = elsewhere(service, u.execStart)
	if u.mainPID != 0 && u.invocation == "" {
		return unit{}, errors.New("the system manager gave no invocation id: systemd is older than 232")
	}
	if u.cgroup != "" {
		m.mu.Lock()
		if m.cgroups == nil {
			m.cgroups = map[string]string{}
		}
		m.cgroups[name] = u.cgroup
		m.mu.Unlock()
	}
	return u, nil
}

// elsewhere returns the setting by which a service sees another file at path than the host.
func elsewhere(service map[string]any, path string) string {
	for _, name := range []string{"RootDirectory", "RootImage"} {
		if root, _ := service[name].(string); root != "" && root != "/" {
			return name
		}
	}
	for _, name := range []string{"ExtensionImages", "ExtensionDirectories"} {
		if list := reflect.ValueOf(service[name]); list.Kind() == reflect.Slice && list.Len() > 0 {
			return name
		}
	}
	// Where the setting has the place that it covers.
	for name, at := range map[string]int{"BindPaths": 1, "BindReadOnlyPaths": 1, "MountImages": 1, "TemporaryFileSystem": 0} {
		list, _ := service[name].([][]any)
		for _, one := range list {
			if len(one) <= at {
				continue
			}
			place, _ := one[at].(string)
			if place == path || strings.HasPrefix(path, strings.TrimSuffix(place, "/")+"/") {
				return name
			}
		}
	}
	return ""
}

// identity resolves a unit's user and group; empty ones are root's.
func identity(name, group string) (userName string, uid, gid uint32, err error) {
	if name == "" {
		name = "root"
	}
	u, err := user.Lookup(name)
	if err != nil {
		if u, err = user.LookupId(name); err != nil {
			return "", 0, 0, fmt.Errorf("there is no user %s", name)
		}
	}
	id, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return "", 0, 0, err
	}
	gidText := u.Gid
	if group != "" {
		g, err := user.LookupGroup(group)
		if err != nil {
			return "", 0, 0, fmt.Errorf("there is no group %s", group)
		}
		gidText = g.Gid
	}
	primary, err := strconv.ParseUint(gidText, 10, 32)
	return u.Username, uint32(id), uint32(primary), err
}
