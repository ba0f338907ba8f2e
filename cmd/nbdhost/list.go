package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"nbdhost/loader"
)

// A description is what --list and --complete want to know about a module.
type description struct {
	Name, Version        string
	LongName             string
	Description          string
	ConfigHelp, MagicKey string
	Script               string // the script that the plugin would run, or ""
}

// describeTime is how long one module may take to be loaded.
const describeTime = 20 * time.Second

// executable is this program, also where its file has been replaced.
func executable() string {
	if path, err := os.Executable(); err == nil {
		return path
	}
	return "/proc/self/exe"
}

// describeModule loads a module in a process of its own, which may crash or hang.
func describeModule(kind loader.Kind, name string, o *options) (d description, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), describeTime)
	defer cancel()
	args := []string{"--describe"}
	for _, dirs := range o.searchPath(kind) {
		args = append(args, "--"+kind.String()+"-path="+dirs)
	}
	if o.filterAnyRelease {
		args = append(args, "--filter-any-release")
	}
	if kind == loader.FilterKind {
		args = append(args, "--filter="+name)
	} else {
		args = append(args, "--", name)
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
	cmd.Args[0] = os.Args[0]
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.WaitDelay = time.Second // what the module started may hold the pipes
	out, err := cmd.Output()
	if err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("it took longer than %v", describeTime)
		} else if line, _, _ := strings.Cut(strings.TrimSpace(stderr.String()), "\n"); line != "" {
			if _, text, ok := strings.Cut(line, ": error: "); ok {
				line = text
			}
			err = errors.New(line)
		}
		return d, err
	}
	// The module may have printed something before.
	lines := bytes.Split(bytes.TrimSpace(out), []byte("\n"))
	return d, json.Unmarshal(lines[len(lines)-1], &d)
}

// list writes the tables of --list.
func list(w io.Writer, o *options) error {
	for i, kind := range []loader.Kind{loader.PluginKind, loader.FilterKind} {
		if i > 0 {
			if err := write(w, "\n"); err != nil {
				return err
			}
		}
		names := loader.Installed(kind, o.searchPath(kind)...)
		rows := make([][3]string, len(names))
		var running sync.WaitGroup
		free := make(chan struct{}, runtime.NumCPU())
		for i, name := range names {
			running.Add(1)
			go func() {
				defer running.Done()
				free <- struct{}{}
				rows[i] = listRow(kind, name, o)
				<-free
			}()
		}
		running.Wait()
		title := [3]string{strings.ToUpper(kind.String()), "VERSION", "DESCRIPTION"}
		if err := write(w, table(append([][3]string{title}, rows...))); err != nil {
			return err
		}
	}
	return nil
}

// table returns rows as lines with aligned columns.
func table(rows [][3]string) string {
	var width [2]int
	for _, row := range rows {
		for i := range width {
			width[i] = max(width[i], len(row[i]))
		}
	}
	var b strings.Builder
	for _, row := range rows {
		line := fmt.Sprintf("%-*s  %-*s  %s", width[0], row[0], width[1], row[1], row[2])
		b.WriteString(strings.TrimRight(line, " ") + "\n")
	}
	return b.String()
}

func listRow(kind loader.Kind, name string, o *options) [3]string {
	d, err := describeModule(kind, name, o)
	if err != nil {
		return [3]string{name, "-", fmt.Sprintf("cannot be used: %v", err)}
	}
	text := d.LongName
	if text == "" {
		text, _, _ = strings.Cut(strings.TrimSpace(d.Description), "\n")
	}
	if d.Script != "" {
		text = fmt.Sprintf("a script for %s: %s", d.Name, filepath.Base(d.Script))
	}
	return [3]string{name, d.Version, text}
}

func describeFilter(w io.Writer, o *options) error {
	found, err := loader.Find(loader.FilterKind, o.filters[0], o.filterPath...)
	if err != nil {
		return err
	}
	f, err := loader.OpenFilter(found.Path, o.filterAnyRelease)
	if err != nil {
		return err
	}
	return json.NewEncoder(w).Encode(description{
		Name: f.Name(), Version: f.Version(), LongName: f.LongName(),
		Description: f.Description(), ConfigHelp: f.ConfigHelp(),
	})
}

// describe writes a description of the plugin, or else of the filter, that the
// command line names.
func describe(w io.Writer, o *options) error {
	if err := loader.Init(loader.Host{}); err != nil {
		return err
	}
	if len(o.args) == 0 {
		return describeFilter(w, o)
	}
	found, err := loader.Find(loader.PluginKind, o.args[0], o.pluginPath...)
	if err != nil {
		return err
	}
	p, err := loader.Open(found.Path)
	if err != nil {
		return err
	}
	return json.NewEncoder(w).Encode(description{
		Name: p.Name(), Version: p.Version(), LongName: p.LongName(),
		Description: p.Description(), ConfigHelp: p.ConfigHelp(), MagicKey: p.MagicConfigKey(), Script: found.Script,
	})
}
