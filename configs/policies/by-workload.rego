# A policy that looks at the init-data: what the owner of a pod wrote there, and the guest's
# measurement carries. Here: pods name their team, and a team has its own devices.
package sealpod

import rego.v1

default allow := false

allow if count(deny) == 0

# How many devices a team may attest with.
devices := {"research": 8, "web": 0}

team := object.get(input.init_data, "team", "")

deny contains sprintf("no team %q", [team]) if not devices[team]

deny contains sprintf("team %s may use %d devices, not %d", [team, devices[team], count(input.gpus)]) if {
	count(input.gpus) > devices[team]
}

# An undefined value refuses nothing by itself: every rule asks `not` for what is good.
deny contains "simulated evidence" if {
	not input.simulated == false
	not input.allow_simulated == true
}

deny contains "the host may debug the guest" if not closed

closed if input.cpu.claims.policy.debug == false

closed if input.cpu.claims.td_attributes.debug == false

demanded := {"snp": {"report-data", "measurement"}, "tdx": {"report-data", "mr-td"}}

deny contains "no rule for this type of guest" if not demanded[input.cpu.tee]

deny contains sprintf("check %s was not made", [name]) if {
	some name in demanded[input.cpu.tee]
	not input.cpu.checks[name] == "pass"
}
