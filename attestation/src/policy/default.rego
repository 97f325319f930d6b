# The default appraisal policy. It sees what the verifiers found and only says no: evidence that fails
# a check never gets here. docs/attestation.md describes the input.
package sealpod

import rego.v1

default allow := false

allow if count(deny) == 0

# Simulated anchors count only where the configuration names them.
deny contains "the evidence rests on simulated anchors, which the configuration does not allow" if {
	input.simulated
	not input.allow_simulated
}

# What the built-in checks compare only if reference values are given has to be given.
demanded := {
	"snp": {"report-data", "host-data", "measurement", "tcb-minimum"},
	"tdx": {"report-data", "mr-config-id", "mr-td", "tcb-status"},
}

deny contains sprintf("check %s was not made: give its reference value", [name]) if {
	some name in demanded[input.cpu.tee]
	object.get(input.cpu.checks, name, "none") != "pass"
}

deny contains sprintf("no rule for a guest of type %s", [input.cpu.tee]) if not demanded[input.cpu.tee]

# The limits of a reference file can let a debug guest pass; this policy does not.
deny contains "the host may debug the guest" if input.cpu.claims.policy.debug

deny contains "the host may debug the guest" if input.cpu.claims.td_attributes.debug

# A device counts only with its manifests.
deny contains sprintf("device %s: %s was not checked", [gpu.device_id, name]) if {
	some gpu in input.gpus
	some name in {"nonce", "report-signature", "chain", "measurements"}
	object.get(gpu.checks, name, "none") != "pass"
}
