# A policy for a gate that hands out GPUs: what the default demands, and more. Give it to
# `sealpod-attest serve` ([verifier] policy), `sealpod-attest verify --policy` or the shim.
# docs/attestation.md describes the input. Evidence that fails a check never gets here.
package sealpod

import rego.v1

default allow := false

allow if count(deny) == 0

# An undefined value refuses nothing by itself: every rule asks `not` for what is good.
deny contains "only real hardware" if not input.simulated == false

deny contains "the host may debug the guest" if not closed

closed if input.cpu.claims.policy.debug == false

closed if input.cpu.claims.td_attributes.debug == false

demanded := {"snp": {"report-data", "measurement"}, "tdx": {"report-data", "mr-td"}}

deny contains "no rule for this type of guest" if not demanded[input.cpu.tee]

deny contains sprintf("check %s was not made", [name]) if {
	some name in demanded[input.cpu.tee]
	not input.cpu.checks[name] == "pass"
}

# Nothing is left to a missing reference value.
deny contains sprintf("check %s was not made", [name]) if {
	some name, outcome in input.cpu.checks
	outcome != "pass"
	not name in optional
}

# Checks that have nothing to compare with on many machines.
optional := {
	"chip-allowed",
	"id-key-digest",
	"author-key-digest",
	"platform-allowed",
	"mr-owner",
	"mr-owner-config",
	"rtmr0",
	"rtmr3",
}

# Every device with all of its manifests and with a current answer about its certificates.
deny contains sprintf("device %s: %s was not checked", [gpu.device_id, name]) if {
	some gpu in input.gpus
	some name in {"nonce", "report-signature", "chain", "measurements"}
	not gpu.checks[name] == "pass"
}
