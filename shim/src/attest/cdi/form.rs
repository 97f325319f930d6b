//! A CDI specification as a file: JSON, or YAML as `nvidia-ctk cdi generate` writes it. Whoever writes it is
//! the node's administrator or a vendor's tool, but nothing of it is believed to be small: size, depth, and
//! what aliases may grow to are bounded. A key that comes twice is refused in both.

use std::{
    error::Error,
    fs::File,
    io::{self, Read},
    path::Path,
};

use serde::de::DeserializeOwned;
use serde_saphyr::{
    Options, UserMessageFormatter,
    options::{DuplicateKeyPolicy, MergeKeyPolicy},
};

use super::CdiError;

/// Largest file, bytes.
const SIZE_MAX: u64 = 1 << 20;
/// Most lists and maps in each other; a specification has seven.
const DEPTH_MAX: usize = 16;
/// Most values, keys, beginnings and ends of a YAML file; a specification of 256 devices has about 6000.
const EVENTS_MAX: usize = 1 << 16;
/// Most aliases, and anchors.
const ALIASES_MAX: usize = 64;
/// Most of [`EVENTS_MAX`] that may come of aliases.
const REPLAYED_MAX: usize = 1 << 12;
/// Most characters of the reader's words.
const TEXT_MAX: usize = 400;

/// What the file at `path` says.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Result<T, CdiError> {
    let form = match path.extension().and_then(|e| e.to_str()) {
        Some("json") => "JSON",
        Some("yaml" | "yml") => "YAML",
        _ => {
            let path = path.into();
            let reason = "is named neither .json nor .yaml nor .yml".into();
            return Err(CdiError::Content { path, reason });
        }
    };
    let failed = |source| CdiError::Read {
        path: path.into(),
        source,
    };
    let mut text = Vec::new();
    let read = File::open(path).and_then(|f| f.take(SIZE_MAX + 1).read_to_end(&mut text));
    if read.map_err(failed)? as u64 > SIZE_MAX {
        let long = format!("larger than {SIZE_MAX} bytes");
        return Err(failed(io::Error::other(long)));
    }
    let parsed = match form {
        "JSON" => serde_json::from_slice(&text).map_err(Into::into),
        _ => yaml(&text),
    };
    parsed.map_err(|source| CdiError::Form {
        path: path.into(),
        form,
        source,
    })
}

fn yaml<T: DeserializeOwned>(text: &[u8]) -> Result<T, Box<dyn Error + Send + Sync>> {
    serde_saphyr::from_slice_with_options(text, options()).map_err(|error| told(&error).into())
}

/// What is wrong, in one line; where it is a bound, with the bounds.
fn told(error: &serde_saphyr::Error) -> String {
    let words = error.render_with_formatter(&UserMessageFormatter);
    let bound = words.contains("too complex") || words.starts_with("recursion");
    let words: String = words.chars().take(TEXT_MAX).collect();
    let words = words.replace(char::is_control, " ");
    if !bound {
        return words;
    }
    format!(
        "{words}; allowed are {DEPTH_MAX} levels, {EVENTS_MAX} values, {ALIASES_MAX} anchors and \
         aliases that stand for {REPLAYED_MAX} values"
    )
}

fn options() -> Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: DEPTH_MAX,
            flow_nesting_limit: DEPTH_MAX,
            max_events: EVENTS_MAX,
            max_documents: 1,
            max_aliases: ALIASES_MAX,
            max_anchors: ALIASES_MAX,
            max_recorded_anchor_events: REPLAYED_MAX,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: REPLAYED_MAX,
            max_replay_stack_depth: DEPTH_MAX,
        },
        duplicate_keys: DuplicateKeyPolicy::Error,
        merge_keys: MergeKeyPolicy::Error,
        // As in JSON, and as the vendors' own readers have it: what looks like a number is none of a name.
        no_schema: true,
        strict_booleans: true,
        reject_unsupported_tags: true,
        reject_tagged_field_names: true,
        with_snippet: false,
    }
}
