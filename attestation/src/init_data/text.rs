//! The subset of TOML that init-data is written in: keys, strings of all four kinds, comments, one
//! table. Anything else is an error with its line.

use std::collections::BTreeMap;

use super::{InitDataError, shown};

/// Most entries.
const MAX_ENTRIES: usize = 64;

pub(super) fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out += "\\\"",
            '\\' => out += "\\\\",
            '\n' => out += "\\n",
            c if c.is_control() => out += &format!("\\u{:04X}", u32::from(c)),
            c => out.push(c),
        }
    }
    out + "\""
}

pub(super) type Table = BTreeMap<String, String>;

/// The text and how far it was read.
pub(super) struct Document<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Document<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self { text, at: 0 }
    }

    /// The keys before `[data]`, and those in it.
    pub(super) fn read(mut self) -> Result<(Table, Table), InitDataError> {
        let (mut top, mut data) = (Table::new(), Table::new());
        let mut in_data = false;
        loop {
            self.skip_blank();
            if self.rest().is_empty() {
                return Ok((top, data));
            }
            if self.take("[") {
                let header = self.key()?;
                if in_data || header != "data" || !self.take("]") {
                    return Err(self.syntax("the only table is [data], once"));
                }
                in_data = true;
            } else {
                let key = self.key()?;
                self.skip_spaces();
                if !self.take("=") {
                    return Err(self.syntax("expected key = \"text\""));
                }
                self.skip_spaces();
                let value = self.string()?;
                let table = if in_data { &mut data } else { &mut top };
                if table.len() == MAX_ENTRIES {
                    return Err(self.syntax("more than 64 entries"));
                }
                if table.insert(key.clone(), value).is_some() {
                    return Err(InitDataError::Twice(shown(&key)));
                }
            }
            self.end_of_line()?;
        }
    }

    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn syntax(&self, what: &'static str) -> InitDataError {
        InitDataError::Syntax(self.text[..self.at].matches('\n').count() + 1, what)
    }

    fn take(&mut self, token: &str) -> bool {
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    fn take_while(&mut self, keep: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let end = rest.find(|c| !keep(c)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    fn skip_spaces(&mut self) {
        self.take_while(|c| matches!(c, ' ' | '\t'));
    }

    fn skip_blank(&mut self) {
        loop {
            self.take_while(|c| matches!(c, ' ' | '\t' | '\n' | '\r'));
            if !self.take("#") {
                return;
            }
            self.take_while(|c| c != '\n');
        }
    }

    fn end_of_line(&mut self) -> Result<(), InitDataError> {
        self.skip_spaces();
        if self.take("#") {
            self.take_while(|c| !matches!(c, '\n' | '\r'));
        }
        if self.rest().is_empty() || self.take("\n") || self.take("\r\n") {
            return Ok(());
        }
        Err(self.syntax("text behind the end of a value"))
    }

    fn key(&mut self) -> Result<String, InitDataError> {
        if self.rest().starts_with(['"', '\'']) {
            return self.string();
        }
        let key = self.take_while(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
        if key.is_empty() {
            return Err(self.syntax("expected a key"));
        }
        Ok(key.to_owned())
    }

    /// Any of TOML's four kinds of string.
    fn string(&mut self) -> Result<String, InitDataError> {
        for (quote, raw, lines) in [
            ("'''", true, true),
            ("\"\"\"", false, true),
            ("'", true, false),
            ("\"", false, false),
        ] {
            if self.take(quote) {
                if lines && !self.take("\n") {
                    self.take("\r\n");
                }
                return self.string_until(quote, raw, lines);
            }
        }
        Err(self.syntax("values are strings in quotes"))
    }

    fn string_until(
        &mut self,
        quote: &str,
        raw: bool,
        lines: bool,
    ) -> Result<String, InitDataError> {
        let mut value = String::new();
        loop {
            if self.rest().starts_with(quote) {
                // Up to two quotes may stand right before the three that close.
                if lines && self.rest()[1..].starts_with(quote) {
                    value.push_str(&quote[..1]);
                    self.at += 1;
                    continue;
                }
                self.at += quote.len();
                return Ok(value);
            }
            if lines && self.take("\r\n") {
                value.push_str("\r\n");
                continue;
            }
            let Some(c) = self.rest().chars().next() else {
                return Err(self.syntax("a string without end"));
            };
            self.at += c.len_utf8();
            match c {
                '\\' if !raw => self.escape(&mut value, lines)?,
                '\n' if lines => value.push('\n'),
                '\t' => value.push('\t'),
                c if c.is_control() => return Err(self.syntax("a control character in a string")),
                c => value.push(c),
            }
        }
    }

    fn escape(&mut self, value: &mut String, lines: bool) -> Result<(), InitDataError> {
        let Some(c) = self.rest().chars().next() else {
            return Err(self.syntax("a string without end"));
        };
        self.at += c.len_utf8();
        let digits = match c {
            '"' | '\\' => {
                value.push(c);
                return Ok(());
            }
            'n' | 't' | 'r' => {
                value.push(match c {
                    'n' => '\n',
                    't' => '\t',
                    _ => '\r',
                });
                return Ok(());
            }
            // A backslash at the end of a line swallows all white space up to the next text.
            '\n' | '\r' if lines => {
                self.take_while(|c| matches!(c, ' ' | '\t' | '\n' | '\r'));
                return Ok(());
            }
            'u' => 4,
            'U' => 8,
            _ => return Err(self.syntax("an unknown escape in a string")),
        };
        let code = self.rest().get(..digits);
        let scalar = code
            .filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()))
            .and_then(|d| u32::from_str_radix(d, 16).ok())
            .and_then(char::from_u32);
        value.push(scalar.ok_or_else(|| self.syntax("an escape that is no character"))?);
        self.at += digits;
        Ok(())
    }
}
