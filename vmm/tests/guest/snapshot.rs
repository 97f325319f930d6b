//! Machines that are written down and go on.

use std::fs::File;
use std::time::Instant;

use sealpod_vmm::machine::{Error, Machine, Restore};
use sealpod_vmm::snapshot::Files;

use crate::bench::{Bench, Devices, devices};

/// Counts, on its console and on its disk, sector after sector.
const GUEST: &str = "n=0\n\
    while :; do n=$((n+1)); echo $n | dd of=/dev/vda bs=512 seek=$n conv=fsync,notrunc 2>/dev/null\n\
    echo tick $n; done\n";

#[test]
fn clones_of_a_written_down_machine_go_on_where_it_stood_each_for_itself() {
    let Some(bench) = Bench::new(GUEST) else {
        return;
    };
    let begin = Instant::now();
    let first = bench.boot(2);
    first.machine.resume();
    let counted = first.wait_for(5);
    eprintln!("boot to tick {counted}: {:?}", begin.elapsed());
    first.machine.pause();
    let snapshot = bench.path().join("snapshot");
    std::fs::create_dir(&snapshot).unwrap();
    let begin = Instant::now();
    first
        .machine
        .save(&Files::create(&snapshot).unwrap())
        .unwrap();
    eprintln!("save: {:?}", begin.elapsed());
    // The first machine goes on as if nothing had been.
    first.machine.resume();
    first.wait_for(counted + 3);
    first.machine.stop();

    let clones = [
        bench.restore(&snapshot, "one"),
        bench.restore(&snapshot, "two"),
        bench.restore(&snapshot, "three"),
    ];
    for clone in &clones {
        let begin = Instant::now();
        clone.machine.resume();
        let next = clone.tick();
        eprintln!("resume to tick {next}: {:?}", begin.elapsed());
        assert!((counted..counted + 5).contains(&next), "{counted} {next}");
        let later = clone.wait_for(next + 4);
        assert_eq!(clone.sector(later), later);
    }
    // A clone can be written down like any other.
    let again = bench.path().join("again");
    std::fs::create_dir(&again).unwrap();
    clones[0].machine.pause();
    let files = Files::create(&again).unwrap();
    clones[0].machine.save(&files).unwrap();
    let clone = bench.restore(&again, "four");
    clone.machine.resume();
    assert!(clone.tick() > counted);
}

#[test]
fn a_snapshot_is_refused_where_it_does_not_fit() {
    let Some(bench) = Bench::new(GUEST) else {
        return;
    };
    let guest = bench.boot(1);
    guest.machine.resume();
    guest.wait_for(1);
    let snapshot = bench.path().join("snapshot");
    std::fs::create_dir(&snapshot).unwrap();
    let files = Files::create(&snapshot).unwrap();
    assert!(matches!(guest.machine.save(&files), Err(Error::NotPaused)));
    guest.machine.pause();
    guest.machine.save(&files).unwrap();
    // Not over another one, which somebody may go on from.
    assert!(matches!(
        guest.machine.save(&files),
        Err(Error::Snapshot(_))
    ));

    let restore = |devices: Devices| {
        let restore = Restore {
            snapshot: Files::open(&snapshot).unwrap(),
            write_set: Vec::new(),
            console: File::options().write(true).open("/dev/null").unwrap(),
            devices,
            confined: None,
        };
        Machine::restore(restore, |_| {}).err().unwrap().to_string()
    };
    let all = || devices(&bench.disk("first"));
    let mut fewer = all();
    fewer.pop();
    assert!(restore(fewer).contains("needs a device of type 5"));
    let mut others = all();
    others.swap(0, 1);
    assert!(restore(others).contains("slot 0 needs a device of type 4"));
    let mut more = all();
    more.extend(all());
    assert!(restore(more).contains("fewer devices"));

    let state = snapshot.join("state");
    let mut raw = std::fs::read(&state).unwrap();
    let middle = raw.len() / 2;
    raw[middle] ^= 1;
    std::fs::write(&state, &raw).unwrap();
    assert!(restore(all()).contains("checksum"));
    raw[middle] ^= 1;
    std::fs::write(&state, &raw).unwrap();
    File::options()
        .write(true)
        .open(snapshot.join("memory"))
        .unwrap()
        .set_len(5)
        .unwrap();
    assert!(restore(all()).contains("5 bytes"));
}
