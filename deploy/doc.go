// Package deploy has what puts nbdhost into operation, and tests that do so. There is
// nothing in it to import. It is a module of its own: what the tests and the packager
// need is no business of who builds nbdhost.
//
// What is where:
//
//	containers.sh       runs buildah or podman, with the images that the Dockerfile begins with
//	deb.sh              makes the Debian package, of debian/
//	notices.sh          the licences of the program and of what is linked into it
//	debian/             what nfpm makes the package of
//	grafana/            a dashboard
//	kubernetes/         a Deployment, a StatefulSet, and a server beside another program
//	prometheus/         alerts, tests of these, and what to scrape
//	systemd/            template units for servers and their sockets
//
// and the tests:
//
//	main_test.go        builds the program under test; starts and watches commands
//	image_test.go       the image that make image has built
//	deb_test.go         the package in a clean tree, and its units under systemd
//	systemd_test.go     what systemd says of the units; a start with a socket
//	dashboard_test.go   each query of the dashboard, asked of a Prometheus that watches a server
//	screenshot_test.go  draws docs/dashboard.png
//	kubernetes_test.go  Kubernetes' schema, and what the manifests say to nbdhost
//
// The tests of images and packages run containers, as root. make image, make test-deploy
// and make screenshot run them.
package deploy
