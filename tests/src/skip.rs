//! Tests whose set-up is missing are skipped loudly, and fail where `SEALPOD_TEST_REQUIRE=1` says that
//! everything has to be there (CI does).

/// Prints why a test does not run.
///
/// # Panics
/// With `SEALPOD_TEST_REQUIRE=1`: a skipped test is a failed one there.
pub fn skipped(reason: &str) {
    let name = std::thread::current().name().unwrap_or("?").to_owned();
    assert!(
        std::env::var("SEALPOD_TEST_REQUIRE").as_deref() != Ok("1"),
        "{name} must not be skipped here: {reason}"
    );
    eprintln!("SKIPPED {name}: {reason}");
}

/// Ends the calling test, loudly, when it cannot run on this machine.
#[macro_export]
macro_rules! need {
    ($what:expr) => {
        if let Err(reason) = $what {
            $crate::skip::skipped(&format!("{reason:#}"));
            return;
        }
    };
}

/// Ends the calling test where it says nothing about the runtime under test.
#[macro_export]
macro_rules! only_sealpod {
    () => {
        if $crate::assets::runtime() != $crate::assets::SEALPOD_RUNTIME {
            eprintln!("does not apply to {}", $crate::assets::runtime());
            return;
        }
    };
}
