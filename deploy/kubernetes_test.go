package deploy

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/yaml"
)

// decode reads the objects of a manifest with the API server's own decoder: a field that
// the schema does not have, or that is there twice, is an error.
func decode(t *testing.T, path string) (objects []runtime.Object) {
	t.Helper()
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, appsv1.AddToScheme, batchv1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	strict := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for docs := yaml.NewYAMLReader(bufio.NewReader(file)); ; {
		doc, err := docs.Read()
		if err == io.EOF {
			return objects
		} else if err != nil {
			t.Fatal(err)
		}
		object, _, err := strict.Decode(doc, nil, nil)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		objects = append(objects, object)
	}
}

// podOf returns what an object says about its pods, and the labels by which it finds them.
func podOf(o runtime.Object) (pod *corev1.PodTemplateSpec, selector map[string]string) {
	switch o := o.(type) {
	case *appsv1.Deployment:
		return &o.Spec.Template, o.Spec.Selector.MatchLabels
	case *appsv1.StatefulSet:
		return &o.Spec.Template, o.Spec.Selector.MatchLabels
	case *batchv1.Job:
		return &o.Spec.Template, nil
	}
	return nil, nil
}

func contains(labels, selector map[string]string) bool {
	for k, v := range selector {
		if labels[k] != v {
			return false
		}
	}
	return true
}

// eachManifest runs f on the objects of each manifest, and on the pods among them.
func eachManifest(t *testing.T, f func(t *testing.T, objects []runtime.Object, pod *corev1.PodTemplateSpec)) {
	files, _ := filepath.Glob("kubernetes/*.yaml")
	if len(files) < 3 {
		t.Fatalf("find manifests: got %q", files)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			objects := decode(t, file)
			pods := 0
			for _, o := range objects {
				if pod, _ := podOf(o); pod != nil {
					pods++
					f(t, objects, pod)
				}
			}
			if pods != 1 {
				t.Errorf("got %d objects with pods, need 1", pods)
			}
		})
	}
}

// TestKubernetesSchema reads the manifests strictly, and looks for what the schema does
// not say: names that must be the same in two places.
func TestKubernetesSchema(t *testing.T) {
	eachManifest(t, func(t *testing.T, objects []runtime.Object, pod *corev1.PodTemplateSpec) {
		volumes := map[string]bool{}
		for _, v := range pod.Spec.Volumes {
			volumes[v.Name] = true
		}
		for _, o := range objects {
			if _, selector := podOf(o); !contains(pod.Labels, selector) {
				t.Errorf("selector %v does not fit the labels %v", selector, pod.Labels)
			}
			switch o := o.(type) {
			case *corev1.Service:
				if !contains(pod.Labels, o.Spec.Selector) {
					t.Errorf("service %s: selector %v does not fit the labels %v", o.Name, o.Spec.Selector, pod.Labels)
				}
				for _, p := range o.Spec.Ports {
					if !hasPort(pod.Spec.Containers, p.TargetPort.StrVal) {
						t.Errorf("service %s: no container has the port %q", o.Name, p.TargetPort.StrVal)
					}
				}
			case *appsv1.StatefulSet:
				for _, c := range o.Spec.VolumeClaimTemplates {
					volumes[c.Name] = true
				}
				if !slices.ContainsFunc(objects, func(s runtime.Object) bool {
					service, ok := s.(*corev1.Service)
					return ok && service.Name == o.Spec.ServiceName && service.Spec.ClusterIP == corev1.ClusterIPNone
				}) {
					t.Errorf("stateful set %s: its service %q is not there, or not headless", o.Name, o.Spec.ServiceName)
				}
			}
		}
		for _, v := range pod.Spec.Volumes {
			if v.Secret != nil && !slices.ContainsFunc(objects, func(s runtime.Object) bool {
				secret, ok := s.(*corev1.Secret)
				return ok && secret.Name == v.Secret.SecretName
			}) {
				t.Errorf("volume %s: the secret %q is not there", v.Name, v.Secret.SecretName)
			}
		}
		for _, c := range append(pod.Spec.InitContainers, pod.Spec.Containers...) {
			for _, m := range c.VolumeMounts {
				if !volumes[m.Name] {
					t.Errorf("container %s mounts %q, which is no volume", c.Name, m.Name)
				}
			}
		}
	})
}

func hasPort(containers []corev1.Container, name string) bool {
	return slices.ContainsFunc(containers, func(c corev1.Container) bool {
		return slices.ContainsFunc(c.Ports, func(p corev1.ContainerPort) bool { return p.Name == name })
	})
}

// TestKubernetesRestricted holds the pods to Kubernetes' Pod Security Standard
// "restricted", with a read-only root file system on top.
func TestKubernetesRestricted(t *testing.T) {
	eachManifest(t, func(t *testing.T, _ []runtime.Object, pod *corev1.PodTemplateSpec) {
		s := pod.Spec.SecurityContext
		if s == nil || !*s.RunAsNonRoot || *s.RunAsUser == 0 || s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
			t.Errorf("pod: got security context %v", s)
		}
		if *pod.Spec.AutomountServiceAccountToken {
			t.Error("pod: a token for the API server is mounted, which nobody needs")
		}
		for _, c := range append(pod.Spec.InitContainers, pod.Spec.Containers...) {
			s := c.SecurityContext
			if s == nil || *s.AllowPrivilegeEscalation || !*s.ReadOnlyRootFilesystem || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) {
				t.Errorf("container %s: got security context %v", c.Name, s)
			}
		}
	})
}

// server returns the container that runs nbdhost.
func server(t *testing.T, pod *corev1.PodTemplateSpec) *corev1.Container {
	t.Helper()
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			if list[i].Name == "nbdhost" {
				return &list[i]
			}
		}
	}
	t.Fatal("no container is named nbdhost")
	return nil
}

// TestKubernetesGrace holds the time before SIGKILL to what the server may take.
func TestKubernetesGrace(t *testing.T) {
	eachManifest(t, func(t *testing.T, _ []runtime.Object, pod *corev1.PodTemplateSpec) {
		c := server(t, pod)
		needed := 10 // of --drain-timeout
		for _, arg := range c.Args {
			if v, ok := strings.CutPrefix(arg, "--drain-timeout="); ok {
				var err error
				if needed, err = strconv.Atoi(v); err != nil {
					t.Fatal(err)
				}
			}
		}
		if c.Lifecycle != nil {
			n, err := strconv.Atoi(c.Lifecycle.PreStop.Exec.Command[1])
			if err != nil {
				t.Fatal(err)
			}
			needed += n
		}
		if got := *pod.Spec.TerminationGracePeriodSeconds; got <= int64(needed) {
			t.Errorf("got a grace period of %d s: preStop and --drain-timeout take up to %d", got, needed)
		}
		if c.Resources.Limits.Memory().Cmp(resource.MustParse("64Mi")) < 0 {
			t.Errorf("got a limit of memory of %v", c.Resources.Limits.Memory())
		}
	})
}

// TestKubernetesArguments runs nbdhost as the containers do, but for paths, addresses
// and URLs, which are the test's.
func TestKubernetesArguments(t *testing.T) {
	disk := bytes.Repeat([]byte("disk"), 1<<18)
	dir := t.TempDir()
	writeFile(t, dir+"/disk", string(disk))
	run(t, "xz", "--block-size=131072", "-k", dir+"/disk")
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, ".xz") {
			http.ServeFile(w, r, dir+"/disk.xz")
			return
		}
		http.ServeFile(w, r, dir+"/disk")
	}))
	defer web.Close()
	eachManifest(t, func(t *testing.T, objects []runtime.Object, pod *corev1.PodTemplateSpec) {
		dir := t.TempDir()
		c := server(t, pod)
		replace := []string{"https://images.example.com", web.URL, "0.0.0.0:9809", "unix:" + dir + "/metrics"}
		for _, m := range c.VolumeMounts {
			replace = append(replace, m.MountPath, dir)
		}
		test := strings.NewReplacer(replace...)
		for _, o := range objects {
			if s, ok := o.(*corev1.Secret); ok {
				for name, text := range s.StringData {
					writeFile(t, filepath.Join(dir, name), test.Replace(text))
				}
			}
		}
		writeFile(t, dir+"/disk.img", string(disk))
		args := []string{"--foreground", "--pidfile=" + dir + "/pid"}
		socket := dir + "/sock"
		if !slices.ContainsFunc(c.Args, func(a string) bool { return strings.HasPrefix(a, "--unix=") }) {
			args = append(args, "--unix="+socket)
		}
		for _, a := range c.Args {
			args = append(args, test.Replace(a))
		}
		server := start(t, exec.Command(nbdhost, args...))
		server.await(t, "the server", func() bool { return serves(socket) })
		run(t, "nbdcopy", uri(socket), dir+"/copy")
		if got, err := os.ReadFile(dir + "/copy"); err != nil || !bytes.Equal(got, disk) {
			t.Errorf("copy: got %d bytes, %v: need the %d of the disk", len(got), err, len(disk))
		}
		probes(t, c, dir+"/metrics")
		server.Process.Signal(os.Interrupt)
		if err := server.wait(t); err != nil {
			t.Errorf("stop: %v", err)
		}
	})
}

// probes asks what Kubernetes would ask, of the socket where the metrics are.
func probes(t *testing.T, c *corev1.Container, socket string) {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	defer client.CloseIdleConnections()
	asked := 0
	for _, p := range []*corev1.Probe{c.StartupProbe, c.LivenessProbe, c.ReadinessProbe} {
		if p == nil {
			continue
		}
		asked++
		if name := p.HTTPGet.Port.StrVal; !hasPort([]corev1.Container{*c}, name) {
			t.Errorf("probe of port %q, which the container does not have", name)
		}
		r, err := client.Get("http://server" + p.HTTPGet.Path)
		if err != nil {
			t.Error(err)
			continue
		}
		r.Body.Close()
		if r.StatusCode != http.StatusOK {
			t.Errorf("probe %s: got status %d", p.HTTPGet.Path, r.StatusCode)
		}
	}
	if asked < 2 {
		t.Errorf("got %d probes, need 2", asked)
	}
}
