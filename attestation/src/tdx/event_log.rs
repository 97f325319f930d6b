//! The confidential-computing event log (CCEL; UEFI specification section 38, TCG PC client
//! platform firmware profile section 10): read, and replayed into the runtime measurement registers.

use crate::crypto::sha384;

/// Logs fill an area of 64 KiB as a rule.
const MAX_LOG: usize = 4 << 20;
const MAX_EVENTS: usize = 16_384;
const EV_NO_ACTION: u32 = 3;
const ALG_SHA384: u16 = 0x000c;

/// Why a log cannot be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum EventLogError {
    /// Larger than any log.
    #[error("Event log has {0} bytes; at most {MAX_LOG} are read")]
    TooLong(usize),
    /// It ends within an event.
    #[error("Event log ends within event {0}")]
    Truncated(usize),
    /// No log of this format.
    #[error("Event log does not begin with a Spec ID Event03")]
    Format,
    /// An event without the digest that registers are made of.
    #[error("Event {0} has digest algorithm 0x{1:x} in place of one SHA-384 digest")]
    Digest(usize, u16),
    /// A register that does not exist.
    #[error("Event {0} is for measurement register {1}; known are 0 (MRTD) to 4 (RTMR3)")]
    Register(usize, u32),
    /// More events than any boot has.
    #[error("Event log has more than {MAX_EVENTS} events")]
    TooMany,
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event<'a> {
    /// 0 is MRTD, 1 to 4 are RTMR0 to RTMR3.
    pub register: u32,
    /// TCG event type.
    pub kind: u32,
    /// What the register was extended with.
    pub digest: [u8; 48],
    /// What happened; not covered by the register unless the digest is of it.
    pub data: &'a [u8],
}

/// Whether the bytes begin as a log does.
pub fn looks_like_event_log(bytes: &[u8]) -> bool {
    bytes.get(32..48) == Some(b"Spec ID Event03\0")
}

/// The events of a log, without its header.
///
/// # Errors
/// When it is not a log with SHA-384 digests.
pub fn parse_event_log(bytes: &[u8]) -> Result<Vec<Event<'_>>, EventLogError> {
    if bytes.len() > MAX_LOG {
        return Err(EventLogError::TooLong(bytes.len()));
    }
    if !looks_like_event_log(bytes) {
        return Err(EventLogError::Format);
    }
    let mut rest = bytes;
    // The header is an event of the old form: register, type, SHA-1 digest, size, data.
    take(&mut rest, 28).ok_or(EventLogError::Truncated(0))?;
    let size = word(&mut rest).ok_or(EventLogError::Truncated(0))?;
    take(&mut rest, size as usize).ok_or(EventLogError::Truncated(0))?;
    let mut events = Vec::new();
    // The area behind the last event is erased to all zeros or all ones.
    while !rest.iter().all(|b| *b == 0) && !rest.iter().all(|b| *b == 0xff) {
        let index = events.len() + 1;
        if index > MAX_EVENTS {
            return Err(EventLogError::TooMany);
        }
        let event = event(&mut rest, index)?;
        events.push(event);
    }
    Ok(events)
}

fn event<'a>(rest: &mut &'a [u8], index: usize) -> Result<Event<'a>, EventLogError> {
    let truncated = EventLogError::Truncated(index);
    let fields = (word(rest), word(rest), word(rest));
    let (Some(register), Some(kind), Some(count)) = fields else {
        return Err(truncated);
    };
    let algorithm = take(rest, 2)
        .map(|b| u16::from_le_bytes([b[0], b[1]]))
        .ok_or(EventLogError::Truncated(index))?;
    if count != 1 || algorithm != ALG_SHA384 {
        return Err(EventLogError::Digest(index, algorithm));
    }
    if register > 4 {
        return Err(EventLogError::Register(index, register));
    }
    let mut digest = [0; 48];
    digest.copy_from_slice(take(rest, 48).ok_or(EventLogError::Truncated(index))?);
    let size = word(rest).ok_or(EventLogError::Truncated(index))?;
    let data = take(rest, size as usize).ok_or(truncated)?;
    Ok(Event {
        register,
        kind,
        digest,
        data,
    })
}

fn take<'a>(rest: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (head, tail) = rest.split_at_checked(count)?;
    *rest = tail;
    Some(head)
}

fn word(rest: &mut &[u8]) -> Option<u32> {
    take(rest, 4)
        .and_then(|b| b.try_into().ok())
        .map(u32::from_le_bytes)
}

/// RTMR0 to RTMR3 as the events make them.
pub fn replay(events: &[Event<'_>]) -> [[u8; 48]; 4] {
    let mut registers = [[0; 48]; 4];
    for event in events.iter().filter(|e| e.kind != EV_NO_ACTION) {
        let slot = (event.register as usize)
            .checked_sub(1)
            .and_then(|i| registers.get_mut(i));
        if let Some(register) = slot {
            *register = sha384(&[*register, event.digest].concat());
        }
    }
    registers
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(events: &[(u32, u32, u16)]) -> Vec<u8> {
        let mut log = vec![0; 28];
        log.extend(16u32.to_le_bytes());
        log.extend(b"Spec ID Event03\0");
        for (register, kind, algorithm) in events {
            log.extend(register.to_le_bytes());
            log.extend(kind.to_le_bytes());
            log.extend(1u32.to_le_bytes());
            log.extend(algorithm.to_le_bytes());
            log.extend([7; 48]);
            log.extend(2u32.to_le_bytes());
            log.extend(b"ab");
        }
        log
    }

    #[test]
    fn events_extend_their_register_and_padding_is_the_end() {
        let mut bytes = log(&[(2, 1, ALG_SHA384), (3, EV_NO_ACTION, ALG_SHA384)]);
        bytes.extend([0xff; 100]);
        let events = parse_event_log(&bytes).unwrap();
        let registers = replay(&events);
        assert_eq!(registers[1], sha384(&[[0; 48], [7; 48]].concat()));
        assert_eq!(registers[2], [0; 48]);
    }

    #[test]
    fn other_digests_registers_and_cuts_are_refused() {
        assert_eq!(
            parse_event_log(&log(&[(1, 1, 4)])).unwrap_err(),
            EventLogError::Digest(1, 4)
        );
        assert_eq!(
            parse_event_log(&log(&[(5, 1, ALG_SHA384)])).unwrap_err(),
            EventLogError::Register(1, 5)
        );
        let bytes = log(&[(1, 1, ALG_SHA384)]);
        assert_eq!(
            parse_event_log(&bytes[..bytes.len() - 1]).unwrap_err(),
            EventLogError::Truncated(1)
        );
        assert_eq!(
            parse_event_log(&bytes[..20]).unwrap_err(),
            EventLogError::Format
        );
    }
}
