//! The command line, in the syntax of Go's flag package, as existing scripts and units use it. Does no I/O.
//!
//! `mender-connect [global options] command`: a global option after the command is an error. A flag takes one dash
//! or two, and its value after `=` or as the next argument; `--` ends the flags.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use log::LevelFilter;

const DEFAULT_CONFIG: &str = "/etc/mender/mender-connect.conf";
const DEFAULT_FALLBACK_CONFIG: &str = "/var/lib/mender/mender-connect.conf";

const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\ttarget: ", env!("TARGET"), "\n");

/// Names, command and summary.
const COMMANDS: &[(&str, Command, &str)] = &[
    ("daemon", Command::Daemon, "run in the foreground until SIGTERM"),
    (
        "check",
        Command::Check,
        "say what the daemon would make of its configuration; exit status 1 if it wouldn't start",
    ),
    ("doctor", Command::Doctor, "walk the way to the server, and say where it ends and what to do about it"),
    ("status", Command::Status, "say what the running daemon is doing"),
    ("version", Command::Version, "print the version"),
    ("help, h", Command::Help, "print help, of all or of one command"),
];

const HEAD: &str = "\
NAME:
   mender-connect - remote terminal, files and ports of this device through its Mender server

USAGE:
   mender-connect [global options] command

COMMANDS:
";

const GLOBAL_OPTIONS: &str = "
GLOBAL OPTIONS:
   --config FILE, -c FILE           configuration file (default: /etc/mender/mender-connect.conf)
   --fallback-config FILE, -b FILE  read first, the configuration file wins over it
                                    (default: /var/lib/mender/mender-connect.conf)
   --debug, -d                      log what a developer wants to know
   --trace, --dd                    log even more
   --help, -h                       print this help
   --version, -v                    print the version
";

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Invocation {
    Daemon(Options),
    Check(Options),
    Doctor {
        options: Options,
        /// `None` without the flag: the output decides.
        json: Option<bool>,
    },
    Status {
        json: bool,
        /// Prints a new picture each second.
        watch: bool,
    },
    /// Print to standard output and exit with 0.
    Print(String),
    /// Print to standard error and exit with `code`.
    Refuse {
        text: String,
        code: u8,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) config: PathBuf,
    /// Read first; `config` wins over it.
    pub(crate) fallback_config: PathBuf,
    pub(crate) level: LevelFilter,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Command {
    Daemon,
    Check,
    Doctor,
    Status,
    Version,
    Help,
}

/// `args` are without the program's name.
pub(crate) fn parse<I: IntoIterator<Item = OsString>>(args: I) -> Invocation {
    try_parse(args.into_iter().collect()).unwrap_or_else(|invocation| invocation)
}

fn try_parse(mut args: VecDeque<OsString>) -> Result<Invocation, Invocation> {
    let mut settings = Settings::default();
    settings.take(None, &mut args).map_err(|error| wrong_usage(&error, &help()))?;
    if settings.version && !settings.help {
        return Ok(Invocation::Print(VERSION.to_owned()));
    }
    let Some(name) = args.pop_front().filter(|_| !settings.help) else {
        return Ok(Invocation::Print(help()));
    };
    let command = Command::find(&name)?;
    settings.take(Some(command), &mut args).map_err(|error| wrong_usage(&error, &command.help()))?;
    if settings.help {
        return Ok(Invocation::Print(command.help()));
    }
    let level = match (settings.trace, settings.debug) {
        (true, _) => LevelFilter::Trace,
        (_, true) => LevelFilter::Debug,
        _ => LevelFilter::Info,
    };
    let options = Options {
        config: settings.config.unwrap_or_else(|| DEFAULT_CONFIG.into()),
        fallback_config: settings.fallback_config.unwrap_or_else(|| DEFAULT_FALLBACK_CONFIG.into()),
        level,
    };
    Ok(match (command, args.pop_front()) {
        (Command::Daemon, _) => Invocation::Daemon(options),
        (Command::Check, _) => Invocation::Check(options),
        (Command::Doctor, _) => Invocation::Doctor { options, json: settings.json },
        (Command::Status, _) => {
            Invocation::Status { json: settings.json.unwrap_or(false), watch: settings.watch }
        }
        (Command::Version, _) => Invocation::Print(VERSION.to_owned()),
        (Command::Help, None) => Invocation::Print(help()),
        (Command::Help, Some(topic)) => Invocation::Print(Command::find(&topic)?.help()),
    })
}

fn wrong_usage(error: &str, help: &str) -> Invocation {
    Invocation::Refuse { text: format!("Incorrect Usage: {error}\n\n{help}"), code: 1 }
}

fn help() -> String {
    let mut text = HEAD.to_owned();
    for (names, _, summary) in COMMANDS {
        text += &format!("   {names:7}  {summary}\n");
    }
    text + GLOBAL_OPTIONS
}

impl Command {
    fn find(name: &OsStr) -> Result<Self, Invocation> {
        let found = COMMANDS.iter().find(|(names, ..)| names.split(", ").any(|n| n == name));
        let text = || format!("No help topic for '{}'\n", name.display());
        found.map(|row| row.1).ok_or_else(|| Invocation::Refuse { text: text(), code: 3 })
    }

    fn help(self) -> String {
        let row = COMMANDS.iter().find(|row| row.1 == self);
        let (names, summary) = row.map_or(("", ""), |(names, _, summary)| (names, summary));
        let name = names.trim_end_matches(", h");
        let (arguments, options) = match self {
            Self::Doctor => ("", "   --json      write JSON, as without a terminal; --json=false: text\n"),
            Self::Status => {
                ("", "   --json      write JSON\n   --watch     go on, with a new picture each second\n")
            }
            Self::Help => (" [command]", ""),
            Self::Daemon | Self::Check | Self::Version => ("", ""),
        };
        format!(
            "NAME:\n   mender-connect {name} - {summary}\n\n\
             USAGE:\n   mender-connect [global options] {name} [options]{arguments}\n\n\
             OPTIONS:\n{options}   --help, -h  print this help\n"
        )
    }
}

#[derive(Debug, Default)]
struct Settings {
    config: Option<PathBuf>,
    fallback_config: Option<PathBuf>,
    debug: bool,
    trace: bool,
    help: bool,
    version: bool,
    json: Option<bool>,
    watch: bool,
}

impl Settings {
    /// Takes the flags that come first in `args`: those of `command`, or the global ones.
    fn take(&mut self, command: Option<Command>, args: &mut VecDeque<OsString>) -> Result<(), String> {
        use Command::{Doctor, Status};
        while let Some(flag) = next_flag(args)? {
            match (command, flag.name.as_str()) {
                (None, "config" | "c") => self.config = Some(flag.path(args)?),
                (None, "fallback-config" | "b") => self.fallback_config = Some(flag.path(args)?),
                (None, "debug" | "d") => self.debug = flag.switch()?,
                (None, "trace" | "dd") => self.trace = flag.switch()?,
                (None, "version" | "v") => self.version = flag.switch()?,
                (_, "help" | "h") => self.help = flag.switch()?,
                (Some(Doctor | Status), "json") => self.json = Some(flag.switch()?),
                (Some(Status), "watch") => self.watch = flag.switch()?,
                (_, name) => return Err(format!("flag provided but not defined: -{name}")),
            }
        }
        Ok(())
    }
}

struct Flag {
    /// Without dashes.
    name: String,
    value: Option<OsString>,
}

/// Takes the next argument if it is a flag. Takes `--` as well, which ends the flags.
fn next_flag(args: &mut VecDeque<OsString>) -> Result<Option<Flag>, String> {
    let is_flag = |arg: &OsString| arg.len() > 1 && arg.as_bytes().starts_with(b"-");
    if !args.front().is_some_and(is_flag) {
        return Ok(None);
    }
    let Some(arg) = args.pop_front().filter(|arg| arg != "--") else { return Ok(None) };
    let bytes = arg.as_bytes();
    let bare = bytes.strip_prefix(b"--").unwrap_or(&bytes[1..]);
    if bare.starts_with(b"-") || bare.starts_with(b"=") {
        return Err(format!("bad flag syntax: {}", arg.display()));
    }
    let mut parts = bare.splitn(2, |byte| *byte == b'=');
    let name = String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
    let value = parts.next().map(|value| OsStr::from_bytes(value).to_owned());
    Ok(Some(Flag { name, value }))
}

impl Flag {
    fn path(self, args: &mut VecDeque<OsString>) -> Result<PathBuf, String> {
        let value = self.value.or_else(|| args.pop_front());
        value.map(PathBuf::from).ok_or_else(|| format!("flag needs an argument: -{}", self.name))
    }

    fn switch(&self) -> Result<bool, String> {
        let Some(value) = &self.value else { return Ok(true) };
        match value.as_bytes() {
            b"1" | b"t" | b"T" | b"true" | b"TRUE" | b"True" => Ok(true),
            b"0" | b"f" | b"F" | b"false" | b"FALSE" | b"False" => Ok(false),
            _ => {
                let value = value.to_string_lossy();
                Err(format!("invalid boolean value {value:?} for -{}: parse error", self.name))
            }
        }
    }
}

#[cfg(test)]
mod tests;
