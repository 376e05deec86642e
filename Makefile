# `make help` lists what there is. Everything a target needs is installed by it,
# as root on Debian; otherwise it says what to install.
GO       ?= go
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
LDFLAGS   = -s -w -X main.version=$(VERSION)
BUILD     = CGO_ENABLED=0 $(GO) build -trimpath
BROKER    = ./broker/cmd/countersign
AGENT     = ./hostagent/cmd/countersign-agent
# A count, not a time: at the end of a time Go's fuzzer can take the input it is in
# for a failure ("context deadline exceeded").
FUZZTIME ?= 3000x

.DEFAULT_GOAL := help
.PHONY: help build faults-build setup check unit test test-older test-vm demo bench bench-large corpus faults fuzz lint generate clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-11s %s\n", $$1, $$2 }' Makefile

build: ## bin/countersign and bin/countersign-agent, static
	$(BUILD) -ldflags '$(LDFLAGS)' -o bin/countersign $(BROKER)
	$(BUILD) -ldflags '$(LDFLAGS)' -o bin/countersign-agent $(AGENT)

# The same mains with a clock that can be stepped and points to die at.
faults-build:
	$(BUILD) -tags faults -ldflags '$(LDFLAGS)' -o bin/faults/countersign $(BROKER)
	$(BUILD) -tags faults -ldflags '$(LDFLAGS)' -o bin/faults/countersign-agent $(AGENT)

setup:
	@sh test/setup.sh

unit: ## tests that start no service: no TPM, Vault, PostgreSQL or systemd
	@sh test/unit.sh

check: lint unit ## what a change has to pass on any machine

test: setup build faults-build ## all tests, against real parts
	@sh test/run.sh

test-older: setup build ## agents of another version with this broker: AGAINST=COMMIT
	@sh test/against.sh $(or $(AGAINST),HEAD^) $(AGENT)
	COUNTERSIGN_AGENT=$(CURDIR)/bin/against/countersign-agent $(GO) test -count=1 -timeout 20m -run 'TestWholePath|TestUnit$$|TestUnitHandOver|TestTheft' ./test/e2e

test-vm: setup build ## a real machine with Secure Boot and IMA boots the agent, in QEMU
	@sh test/vm/setup.sh
	$(GO) test -count=1 -timeout 15m ./test/vm

demo: setup build ## a legacy program gets in with an earned credential, and loses it
	@$(GO) run ./test/demo

bench: setup build ## speed and size, as ratios against floors; ONLY=certificates is a part; AGAINST=COMMIT compares with that commit's broker, MOST=0.65 bounds the ratio
	@$(if $(AGAINST),sh test/against.sh $(AGAINST) $(BROKER))
	@$(GO) run ./test/bench $(if $(ONLY),-only $(ONLY)) $(if $(AGAINST),-against bin/against/countersign) $(if $(MOST),-most $(MOST))

bench-large: setup build ## a broker whose store is like a year's use, and a watch over 2 GB of logs; SCALE=0.1 BYTES=200M is a tenth
	$(BUILD) -o bin/fill ./broker/internal/ops/fill
	@$(GO) run ./test/large -scale $(or $(SCALE),1)
	@$(GO) run ./test/bench/largelog -bytes $(or $(BYTES),2G)

corpus: build ## what the watch finds in labelled logs, of a seed that is drawn; SEED repeats one
	@$(GO) run ./test/corpus $(if $(SEED),-seed $(SEED))

faults: setup build faults-build ## kill, fill, seal and step clocks: 20 rounds each
	$(GO) test -count=1 -timeout 80m ./test/faults -rounds 20

fuzz: ## every fuzz target, FUZZTIME inputs each, and every mutant of the boot logs
	$(GO) test -count=1 ./attestors/boot/appraise -run '^TestMutants$$'
	@sh test/fuzz.sh $(FUZZTIME)

lint: ## gofmt, vet, staticcheck; cross-build and vet the agent
	@sh test/lint.sh

generate: ## the Go code of the wire contract, by Debian's protobuf-compiler
	GOBIN=$(CURDIR)/bin/tools $(GO) install google.golang.org/protobuf/cmd/protoc-gen-go connectrpc.com/connect/cmd/protoc-gen-connect-go
	PATH=$(CURDIR)/bin/tools:$$PATH protoc -I broker/api --go_out=broker/api --go_opt=paths=source_relative \
		--connect-go_out=broker/api --connect-go_opt=paths=source_relative countersign/v1/countersign.proto

clean: ## remove what was built here
	rm -rf bin bench.json
