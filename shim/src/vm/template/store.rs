//! The folder of all templates, below the state folder and for root alone. Whoever holds its lock makes and
//! removes, and writes what was learnt; whoever finds a template whole may use it without.
//!
//! ```text
//!  <name>.part/   being made; what a crash leaves of it goes with the next lock
//!  <name>/        about.json, state, memory: whole, by a rename; write_set.json later
//!  <name>.failed  why there is none; not tried again for ten minutes
//! ```

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};
use sealpod_vmm::snapshot::Files;

use super::TemplateError;
use super::about::About;
use super::write_set::WriteSet;
use crate::ledger::remove_tree;

/// The folder, in the state folder.
const FOLDER: &str = "templates";
const LOCK: &str = "lock";
const ABOUT: &str = "about.json";
const WRITE_SET: &str = "write_set.json";
/// Most templates; each has what a guest takes for itself, some tens of MiB.
const TEMPLATES_MAX: usize = 8;
/// How long one that failed is not tried again.
const FAILED: Duration = Duration::from_secs(600);
/// Most that is read of what is written here, bytes.
const SIZE_MAX: u64 = 128 << 10;

/// See the file's head.
#[derive(Debug, Clone)]
pub(super) struct Store(PathBuf);

/// Held by whoever makes a template.
#[derive(Debug)]
pub(super) struct Lock(#[expect(dead_code, reason = "the lock is held by its descriptor")] File);

/// What there is of a template.
#[derive(Debug)]
pub(super) enum Found {
    Whole(Files, WriteSet),
    None,
    Failed(String),
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TemplateError {
    let path = path.to_owned();
    move |source| TemplateError::Host {
        action,
        path,
        source,
    }
}

impl Store {
    /// The one in this state folder; made if there is none.
    pub(super) fn open(state_dir: &Path) -> Result<Self, TemplateError> {
        let folder = state_dir.join(FOLDER);
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder
            .create(&folder)
            .map_err(failed("make folder", &folder))?;
        let found = fs::symlink_metadata(&folder).map_err(failed("look at", &folder))?;
        let own = found.uid() == rustix::process::geteuid().as_raw();
        if !found.is_dir() || !own || found.mode() & 0o077 != 0 {
            return Err(TemplateError::Folder(folder));
        }
        Ok(Self(folder))
    }

    /// What there is under this name.
    pub(super) fn find(&self, name: &str) -> Result<Found, TemplateError> {
        let folder = self.0.join(name);
        match Files::open(&folder) {
            Ok(files) => {
                // When it was used last; whoever makes room goes by it.
                let about = OpenOptions::new().write(true).open(folder.join(ABOUT));
                let touched = about.and_then(|file| file.set_modified(SystemTime::now()));
                touched.map_err(failed("touch", &folder))?;
                return Ok(Found::Whole(files, self.write_set(name)?));
            }
            Err(_) if !folder.exists() => {}
            Err(e) => return Err(e.into()),
        }
        match fs::symlink_metadata(self.failure(name)) {
            Ok(found) if is_young(&found) => {
                let why = read(&self.failure(name)).unwrap_or_default();
                Ok(Found::Failed(String::from_utf8_lossy(&why).into_owned()))
            }
            _ => Ok(Found::None),
        }
    }

    /// What VMs from a template write to, as far as it is known.
    fn write_set(&self, name: &str) -> Result<WriteSet, TemplateError> {
        let path = self.0.join(name).join(WRITE_SET);
        let json = match read(&path) {
            Ok(json) => json,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(WriteSet::default()),
            Err(e) => return Err(failed("read", &path)(e)),
        };
        let parsed = serde_json::from_slice(&json).map_err(io::Error::from);
        parsed.map_err(failed("read", &path))
    }

    /// Learns that a VM from a template wrote to these pages; returns what is known now.
    pub(super) fn learn(
        &self,
        _: &Lock,
        name: &str,
        written: Vec<u64>,
    ) -> Result<WriteSet, TemplateError> {
        let known = self.write_set(name)?;
        if !known.is_open() {
            return Ok(known);
        }
        let known = known.and(written);
        let path = self.0.join(name).join(WRITE_SET);
        let part = path.with_extension("part");
        remove(&part)?;
        let json = serde_json::to_vec(&known).map_err(io::Error::from);
        json.and_then(|json| write(&part, &json))
            .and_then(|()| fs::rename(&part, &path))
            .map_err(failed("write", &path))?;
        Ok(known)
    }

    /// The right to make and remove, if nobody else has it now.
    pub(super) fn lock(&self) -> Result<Option<Lock>, TemplateError> {
        let path = self.0.join(LOCK);
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(&path).map_err(failed("open", &path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Lock(file))),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(e) => Err(failed("lock", &path)(e.into())),
        }
    }

    /// Makes room for one more: removes what is stale or half made, and of the rest, if they are too many,
    /// those that were not used for longest.
    pub(super) fn clear(&self, _: &Lock) -> Result<(), TemplateError> {
        let mut whole = Vec::new();
        let entries = fs::read_dir(&self.0).map_err(failed("list", &self.0))?;
        for entry in entries {
            let path = entry.map_err(failed("list", &self.0))?.path();
            if path.ends_with(LOCK) {
                continue;
            }
            let about = path.join(ABOUT);
            let used = fs::metadata(&about).and_then(|found| found.modified());
            let current = || {
                let about = read(&about).ok()?;
                Some(serde_json::from_slice::<About>(&about).ok()?.is_current())
            };
            match (path.extension().and_then(|e| e.to_str()), used) {
                (None, Ok(used)) if current() == Some(true) => whole.push((used, path)),
                (Some("failed"), _) if fs::symlink_metadata(&path).is_ok_and(|f| is_young(&f)) => {}
                _ => remove(&path)?,
            }
        }
        whole.sort();
        let too_many = (whole.len() + 1).saturating_sub(TEMPLATES_MAX);
        for (_, path) in &whole[..too_many] {
            remove(path)?;
        }
        Ok(())
    }

    /// Begins one: empty files.
    pub(super) fn begin(&self, _: &Lock, name: &str) -> Result<Files, TemplateError> {
        let part = self.part(name);
        let mut builder = DirBuilder::new();
        builder.mode(0o700);
        builder
            .create(&part)
            .map_err(failed("make folder", &part))?;
        Ok(Files::create(&part)?)
    }

    /// Makes the one that was begun the template of this name.
    pub(super) fn finish(&self, _: &Lock, name: &str, about: &About) -> Result<(), TemplateError> {
        let part = self.part(name);
        let json = serde_json::to_vec(about).map_err(io::Error::from);
        let path = part.join(ABOUT);
        json.and_then(|json| write(&path, &json))
            .map_err(failed("write", &path))?;
        fs::rename(&part, self.0.join(name)).map_err(failed("rename", &part))
    }

    /// There is none of this name, whole or half made, for this reason.
    pub(super) fn give_up(&self, _: &Lock, name: &str, why: &str) -> Result<(), TemplateError> {
        let failure = self.failure(name);
        for path in [self.0.join(name), self.part(name), failure.clone()] {
            remove(&path)?;
        }
        let why: String = why.chars().take(1000).collect();
        write(&failure, why.as_bytes()).map_err(failed("write", &failure))
    }

    fn part(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.part"))
    }

    fn failure(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.failed"))
    }
}

fn is_young(found: &fs::Metadata) -> bool {
    let age = found.modified().ok().and_then(|at| at.elapsed().ok());
    age.is_some_and(|age| age < FAILED)
}

fn remove(path: &Path) -> Result<(), TemplateError> {
    remove_tree(path).map_err(failed("remove", path))
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    use std::io::Read;
    let mut content = Vec::new();
    let file = File::open(path)?;
    file.take(SIZE_MAX).read_to_end(&mut content)?;
    Ok(content)
}

fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    options.open(path)?.write_all(content)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::about::tests::config;
    use super::*;

    struct Bench {
        dir: tempfile::TempDir,
        store: Store,
        lock: Lock,
    }

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::open(dir.path()).unwrap();
            let lock = store.lock().unwrap().unwrap();
            Self { dir, store, lock }
        }

        fn about(&self, slots: u32) -> (About, String) {
            let about = About::of(&config(self.dir.path()), String::new(), slots).unwrap();
            let name = about.name().unwrap();
            (about, name)
        }

        fn make(&self, about: &About) -> String {
            let name = about.name().unwrap();
            self.store.begin(&self.lock, &name).unwrap();
            self.store.finish(&self.lock, &name, about).unwrap();
            name
        }

        fn has(&self, name: &str) -> bool {
            matches!(self.store.find(name).unwrap(), Found::Whole(..))
        }
    }

    #[test]
    fn one_at_a_time_makes_templates_and_only_whole_ones_are_found() {
        let bench = Bench::new();
        assert!(bench.store.lock().unwrap().is_none());
        let (about, name) = bench.about(1);
        assert!(!bench.has(&name));
        bench.store.begin(&bench.lock, &name).unwrap();
        assert!(!bench.has(&name));
        bench.store.finish(&bench.lock, &name, &about).unwrap();
        assert!(bench.has(&name));
        let Bench { lock, store, .. } = bench;
        drop(lock);
        assert!(store.lock().unwrap().is_some());
    }

    #[test]
    fn nobody_else_can_read_a_template_and_a_folder_that_others_can_is_not_used() {
        let bench = Bench::new();
        let name = bench.make(&bench.about(1).0);
        let folder = bench.dir.path().join(FOLDER);
        let mode = |path: &Path| path.metadata().unwrap().mode() & 0o777;
        assert_eq!(mode(&folder), 0o700);
        assert_eq!(mode(&folder.join(&name)), 0o700);
        for file in ["state", "memory", ABOUT] {
            assert_eq!(mode(&folder.join(&name).join(file)), 0o600, "{file}");
        }
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
        let opened = Store::open(bench.dir.path());
        assert!(matches!(opened, Err(TemplateError::Folder(_))));
    }

    #[test]
    fn a_template_learns_from_two_vms_and_what_is_damaged_is_refused() {
        let bench = Bench::new();
        let name = bench.make(&bench.about(1).0);
        let known = || match bench.store.find(&name).unwrap() {
            Found::Whole(_, write_set) => write_set,
            other => panic!("{other:?}"),
        };
        assert_eq!(known(), WriteSet::default());
        bench
            .store
            .learn(&bench.lock, &name, vec![1, 2, 3])
            .unwrap();
        assert!(known().is_open());
        let learnt = bench
            .store
            .learn(&bench.lock, &name, vec![2, 3, 4])
            .unwrap();
        assert_eq!(learnt.runs(), [(2, 2)]);
        bench.store.learn(&bench.lock, &name, vec![3]).unwrap();
        assert_eq!(known(), learnt);
        let path = bench.dir.path().join(FOLDER).join(&name).join(WRITE_SET);
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
        for damaged in ["", "[]", "{\"vms\":2,\"pages\":[-1]}"] {
            fs::write(&path, damaged).unwrap();
            assert!(bench.store.find(&name).is_err(), "{damaged}");
        }
        assert!(bench.store.learn(&bench.lock, "none", vec![1]).is_err());
    }

    #[test]
    fn what_is_stale_half_made_or_too_much_goes() {
        let bench = Bench::new();
        let (stale, stale_name) = bench.about(99);
        let half = bench.about(98).1;
        // From here on the files are others.
        let names: Vec<_> = (0..TEMPLATES_MAX as u32 + 2)
            .map(|slots| About::of(&config(bench.dir.path()), String::new(), slots).unwrap())
            .collect();
        let newest = About::of(&config(bench.dir.path()), String::new(), 0).unwrap();
        bench.make(&stale);
        for about in &names {
            bench.make(about);
        }
        assert!(bench.has(&stale_name));
        bench.store.begin(&bench.lock, &half).unwrap();
        bench.store.clear(&bench.lock).unwrap();
        // All of `names` are of files that were written again since.
        assert_eq!(fs::read_dir(&bench.store.0).unwrap().count(), 1);

        let many: Vec<_> = (0..TEMPLATES_MAX as u32 + 1)
            .map(|slots| {
                let mut about = newest.clone();
                about.set_slots(slots);
                bench.make(&about)
            })
            .collect();
        assert!(bench.has(&many[0]));
        bench.store.clear(&bench.lock).unwrap();
        // The first was used last; there is room for one more.
        let left: Vec<_> = many.iter().filter(|name| bench.has(name)).collect();
        assert_eq!(left.len(), TEMPLATES_MAX - 1);
        assert!(left.contains(&&many[0]));
    }

    #[test]
    fn one_that_failed_is_gone_and_not_tried_again_for_a_while() {
        let bench = Bench::new();
        let name = bench.make(&bench.about(1).0);
        (bench.store.give_up(&bench.lock, &name, "the reason")).unwrap();
        let Found::Failed(why) = bench.store.find(&name).unwrap() else {
            panic!("it is there");
        };
        assert_eq!(why, "the reason");
        bench.store.clear(&bench.lock).unwrap();
        assert!(matches!(bench.store.find(&name).unwrap(), Found::Failed(_)));
        let failure = File::options()
            .write(true)
            .open(bench.store.failure(&name))
            .unwrap();
        failure
            .set_modified(SystemTime::now() - FAILED * 2)
            .unwrap();
        assert!(matches!(bench.store.find(&name).unwrap(), Found::None));
        bench.store.clear(&bench.lock).unwrap();
        assert!(!bench.store.failure(&name).exists());
    }
}
