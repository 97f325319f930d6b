//! The last lines of something that never stops writing: a VM's console, a child's output. What it
//! keeps is printable text of bounded size, safe to put into an error or a log.

use std::collections::VecDeque;

/// Keeps the last lines of a byte stream.
#[derive(Debug)]
pub struct Tail {
    lines: VecDeque<String>,
    open: Vec<u8>,
    escape: Escape,
    lines_max: usize,
    line_bytes: usize,
}

/// Where in a terminal escape sequence the stream is (ECMA-48): firmware and kernels send them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Escape {
    None,
    /// After ESC.
    Start,
    /// After ESC [, until a byte of 0x40 to 0x7e.
    Sequence,
}

impl Tail {
    /// Keeps at most `lines_max` lines, each cut to `line_bytes` bytes.
    #[must_use]
    pub fn new(lines_max: usize, line_bytes: usize) -> Self {
        Self {
            lines: VecDeque::new(),
            open: Vec::new(),
            escape: Escape::None,
            lines_max,
            line_bytes,
        }
    }

    /// Takes the next bytes of the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        self.push_telling(bytes, |_| {});
    }

    /// The same, and tells each line that ends with them.
    pub fn push_telling(&mut self, bytes: &[u8], mut tell: impl FnMut(&str)) {
        for &byte in bytes {
            match (self.escape, byte) {
                (Escape::None, 0x1b) => self.escape = Escape::Start,
                (Escape::None, b'\n') => self.end_line(&mut tell),
                (Escape::None, _) => {
                    let printable = byte == b'\t' || byte >= b' ' && byte != 0x7f;
                    if printable && self.open.len() < self.line_bytes {
                        self.open.push(byte);
                    }
                }
                (Escape::Start, b'[') => self.escape = Escape::Sequence,
                (Escape::Sequence, 0x20..=0x3f) => {}
                (Escape::Start | Escape::Sequence, _) => self.escape = Escape::None,
            }
        }
    }

    fn end_line(&mut self, tell: &mut impl FnMut(&str)) {
        let line = self.take_open();
        if line.is_empty() {
            return;
        }
        tell(&line);
        if self.lines.len() == self.lines_max {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    fn take_open(&mut self) -> String {
        let line = String::from_utf8_lossy(&self.open).trim_end().to_owned();
        self.open.clear();
        line
    }

    /// The lines, oldest first, with the one that is not ended yet. Empty lines are not kept.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let open = String::from_utf8_lossy(&self.open).trim_end().to_owned();
        let open = (!open.is_empty()).then_some(open);
        self.lines.iter().cloned().chain(open).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_lines_are_kept_and_each_is_cut() {
        let mut tail = Tail::new(2, 5);
        tail.push(b"one\ntwo\r\n\nthree-and-more\nfo");
        assert_eq!(tail.lines(), ["two", "three", "fo"]);
        tail.push(b"ur\n");
        assert_eq!(tail.lines(), ["three", "four"]);
    }

    #[test]
    fn each_line_is_told_once_when_it_ends() {
        let mut tail = Tail::new(2, 5);
        let mut told = Vec::new();
        for part in ["one\n\ntw", "o", "\n", "a\nb\nc\nd"] {
            tail.push_telling(part.as_bytes(), |line| told.push(line.to_owned()));
            told.push("|".into());
        }
        assert_eq!(told.join(" "), "one | | two | a b c |");
    }

    #[test]
    fn escapes_and_control_bytes_do_not_reach_a_log() {
        let mut tail = Tail::new(4, 64);
        tail.push(b"\x1b[2J\x1b[1;31mred\x1b[0m\x07\x00 \x1bcok\xff\n\x1b[");
        assert_eq!(tail.lines(), ["red ok\u{fffd}"]);
        tail.push(b"31;1mon\n");
        assert_eq!(tail.lines()[1], "on");
    }

    #[test]
    fn an_endless_line_takes_bounded_memory() {
        let mut tail = Tail::new(4, 64);
        for _ in 0..10_000 {
            tail.push(&[b'x'; 1000]);
        }
        assert_eq!(tail.lines(), ["x".repeat(64)]);
    }
}
