# The default appraisal policy. It sees what the verifiers found and only says no: evidence that fails
# a check never gets here. docs/attestation.md describes the input.
#
# What is missing in the input has to refuse, and an undefined value refuses nothing by itself: every
# rule asks `not` for what is good.
package sealpod

import rego.v1

default allow := false

allow if count(deny) == 0

# Simulated anchors count only where the configuration names them.
deny contains "the evidence rests on simulated anchors, which the configuration does not allow" if {
	not input.simulated == false
	not input.allow_simulated == true
}

# What the built-in checks compare only if reference values are given has to be given.
demanded := {
	"snp": {"report-data", "host-data", "measurement", "tcb-minimum"},
	"tdx": {"report-data", "mr-config-id", "mr-td", "tcb-status"},
}

deny contains sprintf("check %s was not made: give its reference value", [name]) if {
	some name in demanded[input.cpu.tee]
	not input.cpu.checks[name] == "pass"
}

deny contains sprintf("no rule for a guest of type %v", [object.get(input, ["cpu", "tee"], "none")]) if {
	not demanded[input.cpu.tee]
}

# The limits of a reference file can let a debug guest pass; this policy does not.
deny contains "the host may debug the guest" if not closed

closed if {
	input.cpu.tee == "snp"
	input.cpu.claims.policy.debug == false
}

closed if {
	input.cpu.tee == "tdx"
	input.cpu.claims.td_attributes.debug == false
}

# A device counts only with its manifests.
deny contains "there is no list of devices" if not is_array(input.gpus)

deny contains sprintf("device %v: %s was not checked", [object.get(gpu, "device_id", "?"), name]) if {
	some gpu in input.gpus
	some name in {"nonce", "report-signature", "chain", "measurements"}
	not gpu.checks[name] == "pass"
}
