//! The agent on this machine: in namespaces of its own it builds real containers, driven over its real
//! service by Unix sockets in place of vsock. Needs root and Debian's busybox-static; where it has not got
//! them it says so, and passes unless `SEALPOD_TEST_REQUIRE` is 1. What needs a guest kernel (limits, disks,
//! virtiofs) is tested in VMs.
//!
//!     cargo test -p sealpod-agent --test containers [part of a test's name]
//!
//! cargo-nextest lists the tests and runs each in a process of its own.

mod confinement;
mod guest;
mod lifecycle;
mod pod;
mod streams;

use std::process::ExitCode;

type Failure = Box<dyn std::error::Error>;
type Outcome = Result<(), Failure>;

/// Fails a test with a reason.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($reason:tt)+) => {
        if !$condition { return Err(format!($($reason)+).into()); }
    };
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, folder] = args.as_slice()
        && flag == "--serve"
    {
        return guest::serve(folder.as_ref());
    }
    let given = |flag: &str| args.iter().any(|a| a == flag);
    if given("--list") {
        // None is ignored.
        for name in NAMES.iter().filter(|_| !given("--ignored")) {
            println!("{name}: test");
        }
        return ExitCode::SUCCESS;
    }
    if let Some(missing) = guest::missing() {
        eprintln!("SKIPPED: the agent's container tests need {missing}");
        let required = std::env::var("SEALPOD_TEST_REQUIRE").is_ok_and(|v| v == "1");
        return if required {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        };
    }
    let name = args.iter().find(|a| !a.starts_with('-'));
    let wanted = |test: &str| match name {
        Some(name) if given("--exact") => test == name,
        Some(name) => test.contains(name.as_str()),
        None => true,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let failed = runtime.map_or(1, |runtime| runtime.block_on(run(wanted)));
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

macro_rules! tests {
    ($($test:path),+ $(,)?) => {
        const NAMES: &[&str] = &[$(stringify!($test)),+];

        /// Runs the tests that are wanted, each with a guest of its own; returns how many failed.
        async fn run(wanted: impl Fn(&str) -> bool) -> u32 {
            let mut failed = 0;
            $(
                let name = stringify!($test);
                if wanted(name) {
                    let outcome = async {
                        let guest = guest::Guest::start().await?;
                        let outcome = $test(&guest).await;
                        let end = guest.end().await;
                        outcome.and(end)
                    }.await;
                    match outcome {
                        Ok(()) => println!("test {name} ... ok"),
                        Err(e) => { println!("test {name} ... FAILED: {e}"); failed += 1; }
                    }
                }
            )+
            failed
        }
    };
}

tests!(
    lifecycle::a_container_runs_to_its_exit_code_and_leaves_nothing,
    lifecycle::a_killed_container_reports_the_signal,
    lifecycle::requests_in_the_wrong_state_get_the_code_that_containerd_expects,
    lifecycle::missing_programs_are_reported_in_the_words_of_runc,
    lifecycle::specifications_that_cannot_be_kept_change_nothing,
    lifecycle::a_paused_container_does_not_run_until_it_is_resumed,
    lifecycle::deleting_a_running_container_kills_all_of_it,
    lifecycle::a_container_can_be_made_again_under_its_name,
    lifecycle::two_hundred_execs_leave_no_descriptor_and_no_process,
    streams::input_reaches_the_process_and_its_end_does_too,
    streams::a_terminal_has_the_size_it_was_given_and_then_the_new_one,
    streams::a_daemon_that_keeps_the_output_open_does_not_hold_up_the_exit,
    streams::much_output_arrives_complete_through_a_slow_reader,
    streams::an_argument_list_that_is_too_long_is_named,
    confinement::an_exec_is_as_confined_as_its_container,
    confinement::users_groups_limits_and_umask_are_those_of_the_specification,
    confinement::mounts_devices_and_protected_paths_are_as_specified,
    confinement::links_in_an_image_cannot_lead_a_mount_out_of_it,
    confinement::a_user_namespace_maps_root_to_another_user,
    confinement::start_hooks_run_in_the_container_before_its_program,
    pod::containers_of_a_pod_share_one_pid_namespace,
    pod::a_port_of_the_guest_is_reached_through_a_stream,
    pod::the_pod_is_set_up_once_and_a_missing_interface_is_named,
);
