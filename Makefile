# The commands of the project. Each does all of its own set-up on a Debian 12 machine with Rust, as
# root, and shows progress on what takes long; a second run repeats nothing.
.PHONY: help build guest-kernel guest hostile-guest demo test lint bench lab lab-e2e bench-lab shell install clean
.DEFAULT_GOAL := help

PREFIX ?= /usr/local
# containerd of `make demo`, `make bench` and `make shell`: 1.6, 1.7 or 2.1
CONTAINERD ?= 1.7
# program of `make lab`, and its arguments; by default the tests that need KVM
RUN ?=
# arguments of `make lab-e2e`: tests/lab/e2e.sh has them
E2E ?=
SETUP := tests/setup/setup.sh
SAY := @printf '\033[1m==>\033[0m %s\n'
BENCH := cargo run -q --profile test -p sealpod-tests --bin

help: ## Show this
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

build: guest ## Build everything: guest kernel, agent, initramfs, virtiofsd, shim, VMM
	$(SAY) "virtiofsd"
	@shim/get-virtiofsd.sh >/dev/null
	$(SAY) "shim and VMM"
	@cargo build --release -p sealpod-shim -p sealpod-vmm -p sealpod-attestation

guest-kernel:
	@$(SETUP) build
	$(SAY) "guest kernel (6 minutes the first time, then from the cache)"
	@$(MAKE) -s -C guest-kernel all

guest: guest-kernel
	$(SAY) "agent and initramfs"
	@agent/build.sh
	@initramfs/pack.sh --init target/guest/sealpod-agent

# For tests: a guest whose agent breaks the rules.
hostile-guest: guest
	@agent/build.sh --of sealpod-hostile-agent
	@initramfs/pack.sh --init target/guest/sealpod-hostile-agent --out target/guest/hostile.cpio

demo: build ## Show a container in a VM of its own: kernel, exec, HTTP over CNI, times
	@$(SETUP) clients
	@$(BENCH) demo -- $(CONTAINERD)

test: build hostile-guest ## Unit, component and end-to-end tests
	@$(SETUP) clients
	@tests/run.sh

lint: ## Format, clippy, documentation
	@$(SETUP) build
	$(SAY) "format, clippy, documentation"
	@cargo fmt --all --check
	@cargo clippy -q --workspace --all-targets -- -D warnings
	@RUSTDOCFLAGS="-Dwarnings -Arustdoc::private-intra-doc-links" cargo doc -q --workspace --no-deps --document-private-items

bench: build ## Measure starts, memory and verifications: target/bench/{start,attest}.json
	@$(SETUP) clients
	@initramfs/pack.sh --floor
	@$(BENCH) bench -- $(CONTAINERD)
	$(SAY) "gates"
	@$(BENCH) bench_gate -- $(CONTAINERD)
	$(SAY) "attestation"
	@cargo bench -q -p sealpod-attestation --bench attest

lab: build ## Run RUN, by default the tests that need KVM, on a real KVM: docs/lab.md
	@$(if $(RUN),tests/lab/run.sh $(RUN),tests/lab/tests.sh)

lab-e2e: build hostile-guest ## End-to-end tests with sealpod-vmm on a real KVM: docs/lab.md
	@$(SETUP) clients
	@tests/lab/e2e.sh $(E2E)

bench-lab: build ## Measure sealpod-vmm, QEMU and pods on a real KVM: target/bench/{vmm,speed}.json
	@$(SETUP) clients
	@initramfs/pack.sh --floor
	@cargo build -q --profile test -p sealpod-tests --bin bench_vmm --bin bench_pods
	@SEALPOD_BENCH_GUEST=$$(cargo test -q --release --no-run --message-format=json -p sealpod-vmm --test guest | \
		sed -n 's/.*"executable":"\([^"]*\/deps\/guest-[^"]*\)".*/\1/p') SEALPOD_LAB_ENV=SEALPOD_BENCH_GUEST \
		tests/lab/run.sh -t 1800 -o target/bench tests/lab/bench.sh $(CURDIR)/target/bench $(CURDIR)/target/debug $(OTHER)

shell: build ## A shell with a private containerd whose default runtime is sealpod
	@$(SETUP) clients
	@$(BENCH) shell -- $(CONTAINERD)

install: build ## Install below PREFIX (default /usr/local) and the configuration in /etc/sealpod
	install -D -m 0755 -t $(DESTDIR)$(PREFIX)/bin \
		target/release/containerd-shim-sealpod-v2 target/release/sealpod target/release/sealpod-attest
	install -D -m 0755 "$$(shim/get-virtiofsd.sh)" $(DESTDIR)$(PREFIX)/libexec/sealpod/virtiofsd
	install -D -m 0755 target/release/sealpod-vmm $(DESTDIR)$(PREFIX)/libexec/sealpod/sealpod-vmm
	install -D -m 0644 -t $(DESTDIR)$(PREFIX)/share/sealpod \
		target/guest/vmlinux target/guest/bzImage target/guest/initramfs.cpio*
	test -e $(DESTDIR)/etc/sealpod/sealpod.toml || \
		install -D -m 0644 configs/sealpod.toml $(DESTDIR)/etc/sealpod/sealpod.toml

clean: ## Remove what was built; the cache outside the tree stays
	cargo clean
