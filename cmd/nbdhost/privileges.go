package main

import (
	"fmt"
	"log/slog"
	"os"
	"os/user"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// keep stands for a user or group that stays as it is.
const keep = -1

// An identity is whom the process goes on as, after --user and --group.
type identity struct {
	uid, gid int   // or keep
	groups   []int // if gid is not keep

	user, group string // as they were asked for
}

// lookUpIdentity finds a user and a group by names or numbers; "" stands for no
// change. Without a group it is the user's own, with the others that the user is in:
// who gives up the superuser's rights does not mean to keep its groups.
func lookUpIdentity(userName, groupName string) (identity, error) {
	id := identity{uid: keep, gid: keep, user: userName, group: groupName}
	if userName != "" {
		u, err := user.Lookup(userName)
		if err != nil {
			if _, err = parseID(userName); err == nil { // LookupId would take it modulo 2^32
				u, err = user.LookupId(userName)
			}
		}
		if err == nil {
			id.uid, _ = strconv.Atoi(u.Uid) // numbers on Unix
			id.gid, _ = strconv.Atoi(u.Gid)
			id.group = u.Gid
			names, _ := u.GroupIds() // where they cannot be had, the own one must do
			for _, n := range names {
				gid, _ := strconv.Atoi(n)
				id.groups = append(id.groups, gid)
			}
		} else if id.uid, err = parseID(userName); err != nil {
			return id, fmt.Errorf("option --user: got %q: need the name or number of a user", userName)
		}
	}
	if groupName != "" {
		g, err := user.LookupGroup(groupName)
		if err == nil {
			id.gid, err = strconv.Atoi(g.Gid)
		} else {
			id.gid, err = parseID(groupName)
		}
		if err != nil {
			return id, fmt.Errorf("option --group: got %q: need the name or number of a group", groupName)
		}
		id.groups, id.group = []int{id.gid}, groupName
	}
	return id, nil
}

func parseID(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err == nil && n == 1<<32-1 { // what chown(2) takes for no change
		err = strconv.ErrRange
	}
	return int(n), err
}

// isOurs tells whether the process is that user already, with that group.
func (id identity) isOurs() bool {
	return (id.uid == keep || id.uid == os.Getuid()) && (id.gid == keep || id.gid == os.Getgid())
}

// assume makes every thread go on as id. The directory of a private socket goes
// along, since it is to be removed at the end.
func (id identity) assume(private string, log *slog.Logger) error {
	if private != "" && id.uid != keep {
		if err := os.Chown(private, id.uid, id.gid); err != nil {
			return fmt.Errorf("change owner of the private socket: %w", err)
		}
	}
	const advice = "need to be started by the superuser"
	if id.gid != keep {
		if err := syscall.Setgroups(id.groups); err != nil && !(err == unix.EPERM && id.isOurs()) {
			return fmt.Errorf("give up groups: %w: %s", err, advice)
		}
		if err := syscall.Setgid(id.gid); err != nil {
			return fmt.Errorf("change group to %d: %w: %s", id.gid, err, advice)
		}
		log.Debug("changed group to " + id.group)
	}
	if id.uid != keep {
		if err := syscall.Setuid(id.uid); err != nil {
			return fmt.Errorf("change user to %d: %w: %s", id.uid, err, advice)
		}
		log.Debug("changed user to " + id.user)
	}
	return nil
}

// lockMemory keeps all memory of the process, also what it will have, from being
// written to swap space. who is whom the server goes on as.
func lockMemory(who identity, log *slog.Logger) error {
	// The limit counts for whom --user makes us, too. Only the superuser may raise it;
	// others have what they have.
	unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY})
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
		return fmt.Errorf("lock memory: %w", err)
	}
	if limit.Cur < limit.Max {
		limit.Cur = limit.Max
		if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
			return fmt.Errorf("lock memory: %w", err)
		}
	}
	err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE)
	switch {
	case err != nil && limit.Cur != unix.RLIM_INFINITY:
		return fmt.Errorf("lock memory: %w: got a limit of %d KiB (ulimit -l), need none, or the superuser's rights; "+
			"what counts is address space, of which Go has a lot", err, limit.Cur>>10)
	case err != nil:
		return fmt.Errorf("lock memory: %w: need the right to lock memory (CAP_IPC_LOCK)", err)
	case limit.Cur != unix.RLIM_INFINITY && (who.uid > 0 || !mayLockMemory()):
		if n := lockedMemory(); n > limit.Cur>>10 {
			return fmt.Errorf("lock memory: got a limit of %d KiB (ulimit -l), and the user of --user would have %d KiB locked: "+
				"need no limit, or no --user", limit.Cur>>10, n)
		}
		log.Warn(fmt.Sprintf("lock memory: got a limit of %d KiB (ulimit -l): the server ends when it needs more; need no limit", limit.Cur>>10))
	}
	return nil
}

// lockedMemory is how much the process has locked, in KiB; 0 if that is not known.
func lockedMemory() (n uint64) {
	text, _ := os.ReadFile("/proc/self/status")
	_, rest, _ := strings.Cut(string(text), "\nVmLck:")
	fmt.Sscan(rest, &n)
	return n
}

// mayLockMemory tells whether the limit of locked memory does not matter.
func mayLockMemory() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData // as that version has it
	err := unix.Capget(&header, &data[0])
	return err == nil && data[0].Effective&(1<<unix.CAP_IPC_LOCK) != 0
}

// labelSockets gives the sockets that this thread makes from now on an SELinux
// label, as setsockcreatecon(3) does; "" takes it back.
func labelSockets(label string) error {
	err := os.WriteFile("/proc/thread-self/attr/sockcreate", []byte(label), 0)
	if err != nil {
		return fmt.Errorf("give sockets the label %q: %w: need a kernel with SELinux, and a label of its policy", label, cause(err))
	}
	return nil
}
