//! Text in columns.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Lines of cells, each column as wide as its widest cell; the last one is not padded. Colours take no room.
pub fn columns<const N: usize>(lines: &[[String; N]]) -> String {
    let mut widths = [0; N];
    for line in lines {
        for (widest, cell) in widths.iter_mut().zip(line) {
            *widest = width(cell).max(*widest);
        }
    }
    let mut text = String::new();
    for line in lines {
        let mut row = String::new();
        for (cell, widest) in line.iter().zip(widths) {
            row.push_str(cell);
            row.extend(std::iter::repeat_n(' ', widest - width(cell) + 2));
        }
        text.push_str(row.trim_end());
        text.push('\n');
    }
    text
}

/// Characters that are seen: escape sequences for colours are not.
fn width(text: &str) -> usize {
    let (mut count, mut escape) = (0, false);
    for c in text.chars() {
        match c {
            '\x1b' => escape = true,
            'm' if escape => escape = false,
            _ => count += usize::from(!escape),
        }
    }
    count
}

/// An amount of memory, in the largest unit that leaves a whole number before the point.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut scale, mut unit) = (1_u64, UNITS[0]);
    for larger in UNITS.into_iter().skip(1) {
        if count / scale < 1024 {
            break;
        }
        (scale, unit) = (scale * 1024, larger);
    }
    match scale {
        1 => format!("{count} B"),
        scale => {
            let tenths = u128::from(count) * 10 / u128::from(scale);
            format!("{}.{} {unit}", tenths / 10, tenths % 10)
        }
    }
}

/// A processor's time, as `top` tells it: minutes, seconds, hundredths.
pub fn cpu_time(micros: u64) -> String {
    let hundredths = micros / 10_000;
    format!("{}:{:02}.{:02}", hundredths / 6000, hundredths / 100 % 60, hundredths % 100)
}

/// A span in its largest unit: `5 minutes`.
pub fn span(span: Duration) -> String {
    let (count, unit) = match span.as_secs() {
        seconds @ 0..60 => (seconds, "second"),
        seconds @ 60..3600 => (seconds / 60, "minute"),
        seconds @ 3600..172_800 => (seconds / 3600, "hour"),
        seconds => (seconds / 86_400, "day"),
    };
    format!("{count} {unit}{}", if count == 1 { "" } else { "s" })
}

/// How long ago a moment (milliseconds since the epoch) was; `-` for none.
pub fn age(at_ms: u64, now: SystemTime) -> String {
    if at_ms == 0 {
        return "-".to_owned();
    }
    let age = now.duration_since(UNIX_EPOCH + Duration::from_millis(at_ms)).unwrap_or_default();
    format!("{} ago", span(age))
}

/// A moment (milliseconds since the epoch) in UTC: `2026-11-25T14:00:00.123Z`; the end of the calendar for what is beyond it.
pub fn timestamp(at_ms: u64) -> String {
    const LAST_MS: u64 = 253_402_300_799_999;
    let at = UNIX_EPOCH + Duration::from_millis(at_ms.min(LAST_MS));
    humantime::format_rfc3339_millis(at).to_string()
}

/// A container's or pod's name in a table: of the 64 hexadecimal digits that containerd's clients use, the first 12.
pub fn short(name: &str) -> &str {
    let long = name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
    if long { name.get(..12).unwrap_or(name) } else { name }
}

/// A command line on one line of at most `width` characters, whatever the arguments hold.
pub fn shortened(command: &[String], width: usize) -> String {
    let line: String = command.join(" ").chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    match line.char_indices().nth(width) {
        Some((end, _)) => format!("{}…", line.get(..end).unwrap_or_default()),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_not_padded() {
        let lines = [["A".to_owned(), "B".to_owned()], ["äöü".to_owned(), "x".to_owned()]];
        assert_eq!(columns(&lines), "A    B\näöü  x\n");
        let lines = [["A".to_owned(), "B".to_owned()], ["\x1b[1;31mred\x1b[0m".to_owned(), "x".to_owned()]];
        assert_eq!(columns(&lines), "A    B\n\x1b[1;31mred\x1b[0m  x\n");
    }

    #[test]
    fn amounts_are_told_in_their_largest_unit() {
        for (count, told) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (1 << 20, "1.0 MiB"),
            (u64::MAX, "16777215.9 TiB"),
        ] {
            assert_eq!(bytes(count), told);
        }
        assert_eq!(cpu_time(61_230_000), "1:01.23");
    }

    #[test]
    fn ages_are_told_in_the_largest_unit() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let told = |seconds: u64| age((1_000_000 - seconds) * 1000, now);
        assert_eq!(told(1), "1 second ago");
        assert_eq!(told(59), "59 seconds ago");
        assert_eq!(told(125), "2 minutes ago");
        assert_eq!(told(7200), "2 hours ago");
        assert_eq!(told(3 * 86_400), "3 days ago");
        assert_eq!(age(0, now), "-");
        assert_eq!(age(u64::MAX / 1_000_000, UNIX_EPOCH), "0 seconds ago", "a clock that was set back");
    }

    #[test]
    fn timestamps_follow_the_calendar() {
        assert_eq!(timestamp(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(timestamp(951_782_400_007), "2000-02-29T00:00:00.007Z");
        assert_eq!(timestamp(1_795_391_999_999), "2026-11-22T23:59:59.999Z");
    }

    #[test]
    fn commands_stay_on_one_line() {
        assert_eq!(shortened(&["sh".into(), "-c".into(), "a\nb".into()], 40), "sh -c a b");
        assert_eq!(shortened(&["ä".repeat(50)], 40).chars().count(), 41);
    }

    #[test]
    fn only_long_hexadecimal_names_are_cut() {
        assert_eq!(short(&"0a".repeat(32)), "0a0a0a0a0a0a");
        assert_eq!(short(&"x".repeat(64)), "x".repeat(64));
        assert_eq!(short("web"), "web");
    }
}
