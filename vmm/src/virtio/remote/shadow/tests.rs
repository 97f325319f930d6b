//! The shadow queue against a daemon's side that is honest, and one that is not.

use super::*;
use virtio_queue::QueueOwnedT;

const MIB: usize = 1 << 20;
const SLOTS: u16 = 8;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MIB)]).unwrap()
}

/// A request of pieces that follow each other with gaps, from `at` on.
fn request(head: u16, mut at: u64, said: &[usize], room: &[usize]) -> Request {
    let mut place = |length: &usize| {
        let piece = (GuestAddress(at), *length);
        at += *length as u64 + 3;
        piece
    };
    Request {
        head,
        said: said.iter().map(&mut place).collect(),
        room: room.iter().map(place).collect(),
    }
}

/// The daemon's side: takes what is there, and answers each with what it said, turned around.
fn serve(device: &mut Queue, window: &GuestMemoryMmap, backwards: bool) {
    let chains: Vec<_> = device.iter(window).unwrap().collect();
    let mut answers = Vec::new();
    for chain in chains {
        let head = chain.head_index();
        let mut said = Vec::new();
        for piece in chain.clone().readable() {
            let mut bytes = vec![0; piece.len() as usize];
            window.read_slice(&mut bytes, piece.addr()).unwrap();
            said.extend(bytes);
        }
        said.reverse();
        let mut written = 0;
        for piece in chain.writable() {
            let count = said.len().min(piece.len() as usize);
            window.write_slice(&said[..count], piece.addr()).unwrap();
            written += count as u32;
        }
        answers.push((head, written));
    }
    if backwards {
        answers.reverse();
    }
    for (head, written) in answers {
        device.add_used(window, head, written).unwrap();
    }
}

fn device_side(shadow: &Shadow) -> Queue {
    Queue::try_from(shadow.queue.state()).unwrap()
}

#[test]
fn every_request_gets_its_own_answer_in_whatever_order_they_come() {
    let (window, guest) = (memory(), memory());
    let (mut shadow, _) = Shadow::new(&window, 0, SLOTS, 64 << 10).unwrap();
    let mut device = device_side(&shadow);
    let mut seed = 7_usize;
    let mut next = |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) % below
    };
    for round in 0..500_u32 {
        let mut asked = Vec::new();
        for head in 0..SLOTS {
            let said = [next(3000), next(3000)];
            let room = [next(3000), next(4000)];
            let at = u64::from(head) * 0x4000;
            let bytes = 0..said[0] as u32 + 3 + said[1] as u32;
            let bytes: Vec<u8> = bytes.map(|byte| (byte ^ round) as u8).collect();
            guest.write_slice(&bytes, GuestAddress(at)).unwrap();
            match shadow.offer(&window, &guest, request(head, at, &said, &room)) {
                Ok(()) => asked.push((head, at, said, room)),
                Err(Refused::Never) => assert_eq!(said.iter().chain(&room).sum::<usize>(), 0),
                Err(Refused::Later) => break,
            }
        }
        assert!(shadow.publish(&window).unwrap());
        serve(&mut device, &window, round % 2 == 1);
        let mut answered = 0;
        while let Some((head, length)) = shadow.collect(&window, &guest).unwrap() {
            let (_, at, said, room) = asked
                .iter()
                .find(|asked| asked.0 == head)
                .expect("it was asked");
            let read = |at: u64, length: usize| {
                let mut bytes = vec![0; length];
                guest.read_slice(&mut bytes, GuestAddress(at)).unwrap();
                bytes
            };
            let second = at + said[0] as u64 + 3;
            let answer = second + said[1] as u64 + 3;
            let mut expected = [read(*at, said[0]), read(second, said[1])].concat();
            expected.reverse();
            expected.truncate(room[0] + room[1]);
            assert_eq!(length as usize, expected.len());
            let first = expected.len().min(room[0]);
            let rest = answer + room[0] as u64 + 3;
            let found = [read(answer, first), read(rest, expected.len() - first)].concat();
            assert_eq!(found, expected);
            answered += 1;
        }
        assert_eq!(answered, asked.len());
    }
    // Nothing is lost: the whole room is free again.
    let all = request(0, 0, &[64 << 10], &[]);
    assert!(shadow.offer(&window, &guest, all).is_ok());
}

#[test]
fn what_has_no_room_waits_or_is_refused() {
    let (window, guest) = (memory(), memory());
    let (mut shadow, end) = Shadow::new(&window, 0, SLOTS, 64 << 10).unwrap();
    assert!(end < 128 << 10);
    let mut device = device_side(&shadow);
    let offer = |shadow: &mut Shadow, said: &[usize], room: &[usize]| {
        shadow
            .offer(&window, &guest, request(1, 0, said, room))
            .err()
    };
    for (said, room) in [(0, 0), (64 << 10, 1), (1, 64 << 10)] {
        let refused = offer(&mut shadow, &[said], &[room]);
        assert!(matches!(refused, Some(Refused::Never)), "{said} {room}");
    }
    assert!(offer(&mut shadow, &[60 << 10], &[]).is_none());
    assert!(matches!(
        offer(&mut shadow, &[8 << 10], &[]),
        Some(Refused::Later)
    ));
    shadow.publish(&window).unwrap();
    serve(&mut device, &window, false);
    assert_eq!(shadow.collect(&window, &guest).unwrap(), Some((1, 0)));
    for _ in 0..SLOTS {
        assert!(offer(&mut shadow, &[1], &[1]).is_none());
    }
    assert!(matches!(
        offer(&mut shadow, &[1], &[1]),
        Some(Refused::Later)
    ));
    assert!(Shadow::new(&window, 0, SLOTS, 2 << 20).is_err());
}

#[test]
fn a_daemon_that_lies_is_found_out_and_the_guests_memory_stays_as_it_was() {
    let lies: [(&[[u32; 2]], u16); 6] = [
        (&[[0, 0], [0, 0]], 2),    // the same twice
        (&[[1, 0]], 1),            // no head
        (&[[2, 0]], 1),            // never asked
        (&[[u32::MAX - 1, 0]], 1), // no slot
        (&[[0, 17]], 1),           // more than there is room for
        (&[[0, 0]], 40_000),       // more than there can be
    ];
    for (said, index) in lies {
        let (window, guest) = (memory(), memory());
        let (mut shadow, _) = Shadow::new(&window, 0, SLOTS, 64 << 10).unwrap();
        (shadow.offer(&window, &guest, request(5, 0, &[4], &[16])))
            .ok()
            .unwrap();
        shadow.publish(&window).unwrap();
        let used = shadow.queue.used_ring();
        for (n, element) in said.iter().enumerate() {
            window
                .write_obj(*element, GuestAddress(used + 4 + n as u64 * 8))
                .unwrap();
        }
        window.write_obj(index, GuestAddress(used + 2)).unwrap();
        let mut found = None;
        for _ in 0..3 {
            match shadow.collect(&window, &guest) {
                Err(lie) => found = found.or(Some(lie)),
                Ok(done) => assert!(found.is_none() && done == Some((5, 0)), "{said:?}"),
            }
        }
        assert!(found.is_some(), "{said:?}");
        let mut whole = vec![1; MIB];
        guest.read_slice(&mut whole, GuestAddress(0)).unwrap();
        assert!(whole.iter().all(|byte| *byte == 0));
    }
}

#[test]
fn whatever_a_daemon_scribbles_is_an_answer_to_what_was_asked_or_a_lie() {
    let mut seed = 11_u64;
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let (window, guest) = (memory(), memory());
    let mut lies = 0;
    for _ in 0..500 {
        let (mut shadow, _) = Shadow::new(&window, 0, SLOTS, 64 << 10).unwrap();
        let mut asked = Vec::new();
        for head in 0..SLOTS {
            let at = u64::from(head) * 0x1000;
            let request = request(head, at, &[8], &[64]);
            assert!(shadow.offer(&window, &guest, request).is_ok());
            asked.push(head);
        }
        shadow.publish(&window).unwrap();
        let used = shadow.queue.used_ring();
        for n in 0..u64::from(SLOTS * 2) {
            let element = [next() as u32 % 20, next() as u32 % 70];
            let at = GuestAddress(used + 4 + n * 8);
            window.write_obj(element, at).unwrap();
        }
        window
            .write_obj(next() as u16, GuestAddress(used + 2))
            .unwrap();
        loop {
            match shadow.collect(&window, &guest) {
                Ok(None) => break,
                Ok(Some((head, length))) => {
                    let place = asked.iter().position(|other| *other == head);
                    asked.remove(place.expect("it was asked, and not answered before"));
                    assert!(length <= 64);
                }
                Err(_) => {
                    lies += 1;
                    break;
                }
            }
        }
    }
    assert!(lies > 400, "{lies}");
}
