//! The caller's terminal with a status line in its last row.
//!
//! The shell is told one row fewer than there is, and the terminal's scroll region (DECSTBM) leaves the last one out, so
//! that full-screen programs work as ever. A line in the window's title would be simpler, but many terminals, tabs and
//! multiplexers don't show one. Output goes through as it comes; drawing it from an emulation, as tmux does, would take
//! the terminal's scrollback away.
//!
//! Two things are wrong with it, and harmless: a program that asks the terminal for its size instead of the kernel
//! (`resize`) learns of one row more, and the line isn't drawn between a program's saving of the cursor and its
//! restoring, since the terminal remembers only one position.

use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::keyboard::window_size;

/// Fewer rows than this are all the shell's.
const LEAST_ROWS: u16 = 4;

pub struct Display(Mutex<State>);

struct State {
    filter: Filter,
    size: (u16, u16),
    /// In raw mode, on a terminal: what was changed has to be taken back.
    tidies: bool,
    lined: bool,
    resized: bool,
    line: String,
}

impl Display {
    /// With a line if the caller has the terminal in raw mode, and sees the output.
    pub fn new(raw: bool) -> Display {
        let size = window_size();
        let tidies = raw && io::stdout().is_terminal();
        let plain = std::env::var("TERM").is_ok_and(|term| term == "dumb");
        let lined = tidies && !plain;
        let state =
            State { filter: Filter::default(), size, tidies, lined, resized: false, line: String::new() };
        if let Some(rows) = state.rows() {
            // Make room: on the last row this scrolls.
            state.put(&format!("\n\x1b[A{}", margins(rows)));
        }
        Display(Mutex::new(state))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Columns and rows for the shell.
    pub fn size(&self) -> (u16, u16) {
        let state = self.state();
        (state.size.0, state.rows().unwrap_or(state.size.1))
    }

    /// Takes over the window's new size.
    pub fn resize(&self) {
        let mut state = self.state();
        state.size = window_size();
        state.resized = true;
        state.draw();
    }

    /// Output of the shell.
    pub fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.state();
        let mut out = Vec::with_capacity(bytes.len());
        let rows = state.rows();
        let damaged = state.filter.pass(bytes, rows, &mut out);
        put(&out)?;
        if damaged {
            state.draw();
        }
        Ok(())
    }

    /// Columns of the status line; `None` without one.
    pub fn width(&self) -> Option<usize> {
        let state = self.state();
        state.rows().map(|_| state.size.0.into())
    }

    pub fn set_line(&self, line: &str) {
        let mut state = self.state();
        if state.line != line || state.filter.damaged {
            line.clone_into(&mut state.line);
            state.draw();
        }
    }

    /// Gives the row back, and takes back what a full-screen program that was left alone had switched on.
    pub fn close(&self) {
        let mut state = self.state();
        if !state.tidies {
            return;
        }
        let mut text = String::new();
        if state.filter.alternate {
            text.push_str("\x1b[?1049l");
        }
        if let Some(rows) = state.rows() {
            text.push_str(&format!("\x1b7\x1b[r\x1b[{};1H\x1b[0m\x1b[2K\x1b8", rows + 1));
        }
        // Colours, cursor, cursor keys, keypad, bracketed paste, mouse.
        text.push_str(
            "\x1b[0m\x1b[?25h\x1b[?1l\x1b>\x1b[?2004l\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\r\n",
        );
        state.put(&text);
        (state.tidies, state.lined) = (false, false);
    }
}

impl State {
    /// The shell's rows where there is a line.
    fn rows(&self) -> Option<u16> {
        (self.lined && self.size.1 >= LEAST_ROWS).then(|| self.size.1 - 1)
    }

    fn draw(&mut self) {
        if !self.lined {
            return;
        }
        // Later: in the middle of a character or sequence nothing may be drawn.
        self.filter.damaged = !self.filter.at_rest();
        if self.filter.damaged {
            return;
        }
        let mut text = String::new();
        if std::mem::take(&mut self.resized) {
            // The old line is somewhere below the cursor; full-screen programs draw all anew.
            text = self.rows().map_or_else(|| "\x1b7\x1b[r\x1b8".to_owned(), margins) + "\x1b[J";
        }
        if let Some(rows) = self.rows() {
            text += &line(&self.line, rows + 1, self.size.0.into());
        }
        self.put(&text);
    }

    fn put(&self, text: &str) {
        // Without the terminal there is nothing to draw on.
        let _ = put(text.as_bytes());
    }
}

fn put(bytes: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout();
    stdout.write_all(bytes).and_then(|()| stdout.flush())
}

/// Setting them moves the cursor, which is therefore saved.
fn margins(rows: u16) -> String {
    format!("\x1b7\x1b[1;{rows}r\x1b8")
}

/// The line's text in reverse, between a saving and a restoring of the cursor, colours and character set.
fn line(text: &str, row: u16, width: usize) -> String {
    format!("\x1b7\x1b[?6l\x1b[{row};1H\x1b(B\x0f\x1b[0;7m{text:width$.width$}\x1b[0m\x1b8")
}

/// Follows the output, as far as the line depends on it.
#[derive(Debug, Default)]
struct Filter {
    at: At,
    parameters: Vec<u8>,
    /// Bytes that the character under way still lacks.
    lacking: usize,
    saved: bool,
    /// A full-screen program has the alternate screen.
    alternate: bool,
    /// The line has to be drawn again.
    damaged: bool,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum At {
    #[default]
    Text,
    Escape,
    Csi,
    /// Up to BEL or ST: a title, for example.
    String,
    StringEscape,
}

const LONGEST_PARAMETERS: usize = 256;

impl Filter {
    /// Adds the output to `out`, with margins that spare the line below `rows`. `true` when it may be damaged.
    fn pass(&mut self, bytes: &[u8], rows: Option<u16>, out: &mut Vec<u8>) -> bool {
        for &byte in bytes {
            self.lacking = match byte {
                0xc2..=0xdf => 1,
                0xe0..=0xef => 2,
                0xf0..=0xf4 => 3,
                0x80..=0xbf => self.lacking.saturating_sub(1),
                _ => 0,
            };
            match (self.at, byte) {
                (At::String, 0x07 | 0x18 | 0x1a) => self.at = At::Text,
                (At::String, 0x1b) => self.at = At::StringEscape,
                (At::String, _) => {}
                (At::StringEscape, b'\\') => self.at = At::Text,
                (_, 0x1b) => self.at = At::Escape,
                (At::Text, _) => {}
                (At::Escape | At::StringEscape, b'[') => {
                    self.at = At::Csi;
                    self.parameters.clear();
                }
                (At::Escape | At::StringEscape, b']' | b'P' | b'X' | b'^' | b'_') => self.at = At::String,
                // Those of more bytes, such as of character sets.
                (At::Escape | At::StringEscape, b' '..=b'/') => self.at = At::Escape,
                (At::Escape | At::StringEscape, _) => {
                    self.at = At::Text;
                    match byte {
                        b'7' => self.saved = true,
                        b'8' => self.saved = false,
                        b'c' => {
                            out.push(byte);
                            self.reset(rows, out);
                            continue;
                        }
                        _ => {}
                    }
                }
                (At::Csi, b'@'..=b'~') => {
                    self.at = At::Text;
                    self.control(byte, rows, out);
                    continue;
                }
                (At::Csi, _) if self.parameters.len() < LONGEST_PARAMETERS => self.parameters.push(byte),
                (At::Csi, _) => {}
            }
            out.push(byte);
        }
        self.damaged
    }

    /// The last byte of a control sequence.
    fn control(&mut self, byte: u8, rows: Option<u16>, out: &mut Vec<u8>) {
        let parameters = std::mem::take(&mut self.parameters);
        let screens: [&[u8]; 3] = [b"47", b"1047", b"1049"];
        let modes = parameters.strip_prefix(b"?").unwrap_or_default();
        let switches = matches!(byte, b'h' | b'l')
            && modes.split(|&byte| byte == b';').any(|mode| screens.contains(&mode));
        if byte == b'r'
            && let Some(rows) = rows
        {
            out.extend_from_slice(missing_bottom(&parameters, rows).as_bytes());
        }
        out.push(byte);
        match byte {
            b's' if parameters.is_empty() => self.saved = true,
            b'u' if parameters.is_empty() => self.saved = false,
            b'J' => self.damaged = true,
            b'p' if parameters == b"!" => self.reset(rows, out),
            _ if switches => {
                self.alternate = byte == b'h';
                // Some terminals have margins for each screen.
                self.reset(rows, out);
            }
            _ => {}
        }
        self.parameters = parameters;
    }

    /// Behind a sequence that takes the margins away.
    fn reset(&mut self, rows: Option<u16>, out: &mut Vec<u8>) {
        self.saved = false;
        self.damaged = true;
        if let Some(rows) = rows {
            out.extend_from_slice(margins(rows).as_bytes());
        }
    }

    fn at_rest(&self) -> bool {
        self.at == At::Text && self.lacking == 0 && !self.saved
    }
}

/// Completes margins that go down to the terminal's last row, so that they end at the shell's.
fn missing_bottom(parameters: &[u8], rows: u16) -> String {
    let mut numbers = parameters.split(|&byte| byte == b';');
    let (top, bottom) = (numbers.next().unwrap_or_default(), numbers.next());
    let zero = |number: &[u8]| number.iter().all(|&byte| byte == b'0');
    match bottom {
        _ if !parameters.iter().all(|byte| byte.is_ascii_digit() || *byte == b';') => String::new(),
        // Behind zeros, too.
        Some(bottom) if zero(bottom) => rows.to_string(),
        Some(_) => String::new(),
        None if top.is_empty() => format!("1;{rows}"),
        None => format!(";{rows}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROWS: u16 = 5;

    /// The line is drawn wherever the output was cut, if it may be.
    fn shown(output: &[u8], piece: usize) -> vt100::Parser {
        let mut terminal = vt100::Parser::new(ROWS + 1, 20, 0);
        let mut filter = Filter::default();
        terminal.process(margins(ROWS).as_bytes());
        for bytes in output.chunks(piece) {
            let mut out = Vec::new();
            filter.pass(bytes, Some(ROWS), &mut out);
            terminal.process(&out);
            if filter.at_rest() {
                terminal.process(line("status", ROWS + 1, 20).as_bytes());
            }
        }
        assert!(filter.at_rest(), "{filter:?}");
        terminal
    }

    #[test]
    fn programs_see_a_terminal_of_their_own() {
        for output in [
            "one\r\ntwo\r\n3\r\n4\r\n5\r\n6\r\n7\r\n8",
            "\x1b[2J\x1b[3;4Hthree\x1b[J",
            "\x1b[31mred \u{e4}\u{20ac}\u{1f600} \x1b]0;a title;\x07\x1b]0;another\x1b\\text\x1b(Bmore",
            "\x1b[2;4r\x1b[4;1Ha\nb\nc\x1b[r\x1b[5;1Hd\ne\nf",
            "a\x1b[?1049h\x1b[5;1Hb\nc\nd\x1b[?1049lz",
            "a\r\nb\x1bcc\n\n\n\n\n\n\nd",
            "a\x1b[!p\x1b[5;1Hb\nc\nd",
            "12345678901234567890wrapped\r\n12345678901234567890",
            "\x1b[0;5rfrom \x1b7\x1b[3;1Hthere\x1b8here\x1b[5;1H\n\n",
            "\x1b[2r\x1b[5;1Ha\nb\x1b[0;r\x1b[5;1Hc\n\x1b[1;0rd\x1b[5;1H\ne",
        ] {
            let mut alone = vt100::Parser::new(ROWS, 20, 0);
            alone.process(output.as_bytes());
            for piece in 1..8 {
                let with = shown(output.as_bytes(), piece);
                let mut rows: Vec<_> = with.screen().rows(0, 20).collect();
                assert_eq!(
                    rows.pop().as_deref().map(str::trim_end),
                    Some("status"),
                    "{output:?} in pieces of {piece}"
                );
                assert_eq!(rows, alone.screen().rows(0, 20).collect::<Vec<_>>(), "{output:?}, {piece}");
                let cursor = |terminal: &vt100::Parser| terminal.screen().cursor_position();
                assert_eq!(cursor(&with), cursor(&alone), "{output:?}, {piece}");
            }
        }
    }
}
