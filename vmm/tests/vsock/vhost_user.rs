//! The device behind vhost-user, in its own threads, as QEMU meets it.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Instant;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

use crate::guest::noise;
use crate::kernel::CID;
use crate::machine::{Machine, device, granted};

fn assert_echoes(client: &mut UnixStream) {
    client.write_all(b"echo").unwrap();
    let mut answer = [0; 4];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"echo");
}

fn assert_over(client: &mut UnixStream) {
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
}

#[test]
fn the_configuration_space_holds_the_guests_cid() {
    let mut machine = Machine::new();
    let flags = VhostUserConfigFlags::WRITABLE;
    let read = machine.frontend.get_config(0, 8, flags, &[0; 8]).unwrap();
    assert_eq!(read.1, CID.to_le_bytes());
}

#[test]
fn megabytes_are_echoed_through_the_threads() {
    let mut machine = Machine::new();
    machine.kernel.listening.insert(1);
    let mut client = machine.client(1);
    let running = machine.run();
    granted(&mut client);
    let data = noise(11, 8 << 20);
    let (mut writer, sent) = (client.try_clone().unwrap(), data.clone());
    let writing = thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut got = Vec::new();
    client.read_to_end(&mut got).unwrap();
    writing.join().unwrap();
    assert!(got == data);
    running.halt();
}

#[test]
fn many_clients_at_once_are_served() {
    let mut machine = Machine::new();
    machine.kernel.listening.extend(0..60);
    let mut clients: Vec<_> = (0..60).map(|port| machine.client(port)).collect();
    let running = machine.run();
    for client in &mut clients {
        granted(client);
    }
    for client in &mut clients {
        assert_echoes(client);
    }
    running.halt();
}

#[test]
fn a_paused_vm_keeps_its_connections() {
    let mut machine = Machine::new();
    machine.kernel.listening.insert(1);
    let mut client = machine.client(1);
    let running = machine.run();
    granted(&mut client);
    assert_echoes(&mut client);

    let mut machine = running.halt();
    let positions = machine.stop();
    client.write_all(b"meanwhile").unwrap();
    machine.start(positions);
    let running = machine.run();
    let mut answer = [0; 9];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"meanwhile");
    running.halt();
}

#[test]
fn a_guest_that_reboots_loses_its_connections_and_gets_new_ones() {
    let mut machine = Machine::new();
    machine.kernel.listening.insert(1);
    let mut client = machine.client(1);
    let running = machine.run();
    granted(&mut client);
    assert_echoes(&mut client);

    let mut machine = running.halt();
    machine.stop();
    machine.driver.reset();
    machine.driver.refill();
    machine.kernel.sockets.clear();
    machine.start([0, 0]);
    let running = machine.run();
    assert_over(&mut client);
    let mut client = running.client(1);
    granted(&mut client);
    assert_echoes(&mut client);
    running.halt();
}

#[test]
fn what_was_sent_right_before_the_device_stopped_still_arrives() {
    let mut machine = Machine::new();
    machine.kernel.listening.insert(1);
    let mut client = machine.client(1);
    let running = machine.run();
    granted(&mut client);
    let mut machine = running.halt();
    let name = *machine.kernel.sockets.keys().next().unwrap();
    assert_eq!(machine.kernel.send(name, b"last words"), 10);
    machine.send(); // the kick is lost
    machine.stop();
    drop(machine.frontend);
    let mut got = String::new();
    client.read_to_string(&mut got).unwrap();
    assert_eq!(got, "last words");
}

#[test]
fn when_qemu_is_gone_clients_are_closed_and_new_ones_refused() {
    let mut machine = Machine::new();
    machine.kernel.listening.insert(1);
    let mut client = machine.client(1);
    let running = machine.run();
    granted(&mut client);
    let machine = running.halt();
    let uds = machine.uds();
    drop(machine.frontend);
    assert_over(&mut client);
    let error = UnixStream::connect(&uds).unwrap_err();
    assert!(matches!(
        error.kind(),
        ErrorKind::NotFound | ErrorKind::ConnectionRefused
    ));
    machine.device.stop();
}

#[test]
fn stop_closes_everything_and_may_be_called_again() {
    let mut machine = Machine::new();
    machine.kernel.listening.insert(1);
    let mut client = machine.client(1);
    let running = machine.run();
    granted(&mut client);
    let machine = running.halt();
    machine.device.stop();
    assert!(!machine.uds().exists());
    assert_over(&mut client);
    machine.device.stop();
    assert!(machine.frontend.get_features().is_err());
}

#[test]
fn a_device_that_qemu_never_found_can_be_stopped() {
    let (device, dir) = device();
    let mut client = UnixStream::connect(dir.path().join("vsock.sock")).unwrap();
    client.write_all(b"CONNECT 1\n").unwrap();
    device.stop();
    match client.read(&mut [0]) {
        Ok(count) => assert_eq!(count, 0),
        Err(e) => assert_eq!(e.kind(), ErrorKind::ConnectionReset), // was not yet accepted
    }
    device.stop();
}

/// Not a promise, a number: `cargo test --release -p sealpod-vmm --test vsock -- --ignored speed
/// --nocapture`. The guest is a thread that sleeps on an eventfd, without the cost of a VM exit.
#[test]
#[ignore = "a measurement"]
fn speed() {
    let mut machine = Machine::new();
    machine.driver.rx_layout = vec![4096];
    machine.kernel.window = 256 << 10;
    machine.kernel.listening.insert(1);
    let mut client = machine.client(1);
    let running = machine.run();
    granted(&mut client);
    let rounds = 10_000;
    let start = Instant::now();
    for _ in 0..rounds {
        assert_echoes(&mut client);
    }
    println!("round trip: {:?}", start.elapsed() / rounds);
    let data = noise(1, 256 << 20);
    let start = Instant::now();
    let mut writer = client.try_clone().unwrap();
    let size = data.len();
    let writing = thread::spawn(move || {
        writer.write_all(&data).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let (mut got, mut piece) = (0, vec![0; 1 << 20]);
    while got < size {
        got += client.read(&mut piece).unwrap();
    }
    let seconds = start.elapsed().as_secs_f64();
    writing.join().unwrap();
    println!("echo: {:.0} MB/s each way", size as f64 / 1e6 / seconds);
    running.halt();
}
