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
	"text/tabwriter"
	"time"

	"nbdhost/loader"
)

// A description is what --list and --complete want to know about a module.
type description struct {
	Kind                 string
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
func describeModule(kind loader.Kind, name string, pluginPath []string) (d description, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), describeTime)
	defer cancel()
	args := []string{"--describe"}
	for _, dirs := range pluginPath {
		args = append(args, "--plugin-path="+dirs)
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
		rows := make([]string, len(names))
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
		table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		fmt.Fprintf(table, "%s\tVERSION\tDESCRIPTION\n", strings.ToUpper(kind.String()))
		for _, row := range rows {
			fmt.Fprintln(table, row)
		}
		if err := table.Flush(); err != nil {
			return err
		}
	}
	return nil
}

func listRow(kind loader.Kind, name string, o *options) string {
	d, err := describeModule(kind, name, o.searchPath(kind))
	if err != nil {
		return fmt.Sprintf("%s\t-\tcannot be used: %v", name, err)
	}
	text := d.LongName
	if text == "" {
		text, _, _ = strings.Cut(strings.TrimSpace(d.Description), "\n")
	}
	if d.Script != "" {
		text = fmt.Sprintf("a script for %s: %s", d.Name, filepath.Base(d.Script))
	}
	return strings.TrimRight(fmt.Sprintf("%s\t%s\t%s", name, d.Version, text), " \t")
}

// describe writes a description of the plugin, or else of the filter, that the
// command line names.
func describe(w io.Writer, o *options) error {
	if err := loader.Init(loader.Host{}); err != nil {
		return err
	}
	if len(o.args) == 0 {
		return errors.New("describe filter: filters are not supported yet")
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
		Kind: loader.PluginKind.String(), Name: p.Name(), Version: p.Version(), LongName: p.LongName(),
		Description: p.Description(), ConfigHelp: p.ConfigHelp(), MagicKey: p.MagicConfigKey(), Script: found.Script,
	})
}
