//! The serial console: what the guest writes goes to a descriptor, at the guest's own cost. A reader
//! that does not keep up loses text and never stops the guest.

use std::fs::File;
use std::io::{self, Write};

use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// Signals the console's interrupt.
pub(super) struct Line(pub(super) EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Where the guest's text goes: lines are written whole, so that a line is one system call.
pub(super) struct Sink {
    out: File,
    line: Vec<u8>,
}

/// Longest line that is gathered.
const LINE_MAX: usize = 240;

impl Sink {
    pub(super) fn new(out: File) -> Self {
        Self {
            out,
            line: Vec::with_capacity(LINE_MAX),
        }
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            self.line.push(*byte);
            if *byte == b'\n' || self.line.len() == LINE_MAX {
                self.send();
            }
        }
        Ok(bytes.len())
    }

    // The UART flushes after each byte; a line goes when it is whole.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink {
    /// Sends what was gathered.
    pub(super) fn send(&mut self) {
        // A full or closed descriptor: the text is lost.
        let _ = self.out.write(&self.line);
        self.line.clear();
    }
}

/// The console's UART.
pub(super) type Console = Serial<Line, NoEvents, Sink>;

/// A console as after a reset, or as another one was.
pub(super) fn console(line: Line, sink: Sink, was: Option<&SerialState>) -> io::Result<Console> {
    match was {
        None => Ok(Serial::new(line, sink)),
        Some(state) => Serial::from_state(state, line, NoEvents, sink)
            .map_err(|e| io::Error::other(e.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_reader_that_does_not_keep_up_never_stops_the_guest() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let mut sink = Sink::new(File::from(OwnedFd::from(theirs)));
        for _ in 0..100_000 {
            sink.write_all(b"a line that nobody reads\n").unwrap();
        }
        drop(sink);
        let mut text = String::new();
        (&ours).read_to_string(&mut text).unwrap();
        assert!(text.starts_with("a line that nobody reads\n"));
    }
}
