//! Points in time: whole seconds since 1970-01-01T00:00:00Z. No clock is read here; verifiers are
//! handed the time.

use std::fmt;
use std::str::FromStr;

/// Seconds since the Unix epoch, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Timestamp(pub i64);

/// The text is not a time this product reads.
#[derive(Debug, thiserror::Error)]
#[error("Not a UTC time of the form 2026-11-21T09:00:00Z (or seconds since 1970): {0:?}")]
pub struct TimeError(String);

impl Timestamp {
    /// From a proleptic Gregorian date and a time of day, all UTC; `None` if a field is out of range.
    pub fn from_civil(
        year: i64,
        month: u32,
        day: u32,
        hour: u32,
        min: u32,
        sec: u32,
    ) -> Option<Self> {
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let days_in_month = match month {
            1 | 3 | 5 | 7 | 8 | 10 | 12 => 31,
            4 | 6 | 9 | 11 => 30,
            2 => 28 + u32::from(leap),
            _ => return None,
        };
        if !(0..=9999).contains(&year)
            || day == 0
            || day > days_in_month
            || hour > 23
            || min > 59
            || sec > 59
        {
            return None;
        }
        // Days from civil, counting years from March so that the leap day is the last of the year.
        let y = if month <= 2 { year - 1 } else { year };
        let era = y.div_euclid(400);
        let yoe = y.rem_euclid(400);
        let mp = i64::from((month + 9) % 12);
        let doy = (153 * mp + 2) / 5 + i64::from(day) - 1;
        let doe = yoe * 365 + yoe / 4 - yoe / 100 + doy;
        let days = era * 146_097 + doe - 719_468;
        Some(Self(
            days * 86_400 + i64::from(hour) * 3600 + i64::from(min) * 60 + i64::from(sec),
        ))
    }

    /// ASN.1 UTCTime content, `YYMMDDHHMMSSZ` (RFC 5280 section 4.1.2.5.1).
    pub fn from_utc_time(text: &[u8]) -> Option<Self> {
        if text.len() != 13 || text[12] != b'Z' {
            return None;
        }
        let yy = digits(&text[0..2])?;
        let year = if yy >= 50 { 1900 + yy } else { 2000 + yy };
        Self::from_fields(i64::from(year), &text[2..12])
    }

    /// ASN.1 GeneralizedTime content, `YYYYMMDDHHMMSSZ` (RFC 5280 section 4.1.2.5.2).
    pub fn from_generalized_time(text: &[u8]) -> Option<Self> {
        if text.len() != 15 || text[14] != b'Z' {
            return None;
        }
        Self::from_fields(i64::from(digits(&text[0..4])?), &text[4..14])
    }

    fn from_fields(year: i64, rest: &[u8]) -> Option<Self> {
        let field = |i: usize| digits(rest.get(i..i + 2)?);
        Self::from_civil(year, field(0)?, field(2)?, field(4)?, field(6)?, field(8)?)
    }

    fn civil(self) -> (i64, i64, i64) {
        let z = self.0.div_euclid(86_400) + 719_468;
        let era = z.div_euclid(146_097);
        let doe = z.rem_euclid(146_097);
        let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
        let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
        let mp = (5 * doy + 2) / 153;
        let day = doy - (153 * mp + 2) / 5 + 1;
        let month = if mp < 10 { mp + 3 } else { mp - 9 };
        (yoe + era * 400 + i64::from(month <= 2), month, day)
    }
}

fn digits(text: &[u8]) -> Option<u32> {
    text.iter().try_fold(0u32, |n, c| {
        c.is_ascii_digit().then(|| n * 10 + u32::from(c - b'0'))
    })
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (y, m, d) = self.civil();
        let s = self.0.rem_euclid(86_400);
        write!(
            f,
            "{y:04}-{m:02}-{d:02}T{:02}:{:02}:{:02}Z",
            s / 3600,
            s / 60 % 60,
            s % 60
        )
    }
}

impl FromStr for Timestamp {
    type Err = TimeError;

    /// RFC 3339 in UTC (seconds and `Z`), a date alone (midnight), or seconds since 1970.
    fn from_str(text: &str) -> Result<Self, TimeError> {
        let error = || TimeError(text.chars().take(40).collect());
        let b = text.as_bytes();
        if !b.is_empty() && b.len() <= 12 && b.iter().all(u8::is_ascii_digit) {
            return text.parse().map(Self).map_err(|_| error());
        }
        let date_ok = b.len() >= 10 && b[4] == b'-' && b[7] == b'-';
        let time_ok = match b.len() {
            10 => true,
            17 => b[16] == b'Z' && b[10] == b'T' && b[13] == b':',
            20 => b[19] == b'Z' && b[10] == b'T' && b[13] == b':' && b[16] == b':',
            _ => false,
        };
        if !date_ok || !time_ok {
            return Err(error());
        }
        let parse = || {
            let field = |i: usize| {
                if b.len() >= i + 2 && i != 17 || b.len() == 20 {
                    digits(&b[i..i + 2])
                } else {
                    Some(0)
                }
            };
            Self::from_civil(
                i64::from(digits(&b[0..4])?),
                digits(&b[5..7])?,
                digits(&b[8..10])?,
                field(11)?,
                field(14)?,
                field(17)?,
            )
        };
        parse().ok_or_else(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_survive_the_round_trip() {
        for text in [
            "1970-01-01T00:00:00Z",
            "2000-02-29T23:59:59Z",
            "2026-11-21T09:14:35Z",
            "9999-12-31T23:59:59Z",
        ] {
            assert_eq!(text.parse::<Timestamp>().unwrap().to_string(), text);
        }
        assert_eq!(
            "2026-11-21".parse::<Timestamp>().unwrap().to_string(),
            "2026-11-21T00:00:00Z"
        );
        assert_eq!(
            "2026-11-21T09:15Z"
                .parse::<Timestamp>()
                .unwrap()
                .to_string(),
            "2026-11-21T09:15:00Z"
        );
        assert_eq!("0".parse::<Timestamp>().unwrap(), Timestamp(0));
    }

    #[test]
    fn impossible_times_are_refused() {
        for text in [
            "",
            "2025-02-29",
            "2025-13-01",
            "2025-01-01T24:00:00Z",
            "2025-01-01T00:00:00+01:00",
            "yesterday",
            "é025-01-01",
        ] {
            assert!(text.parse::<Timestamp>().is_err(), "{text}");
        }
    }
}
