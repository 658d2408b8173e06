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

const HELP: &str = "\
NAME:
   mender-connect - remote terminal, files and ports of this device through its Mender server

USAGE:
   mender-connect [global options] command

COMMANDS:
   daemon   run in the foreground until SIGTERM
   check    say what the daemon would make of its configuration
   doctor   walk the way to the server, and say where it ends and what to do about it
   status   say what the running daemon is doing
   version  print the version
   help, h  print help, of all or of one command

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
    /// Print to standard error and exit with 3.
    UnknownCommand(String),
    /// Wrong flag: print `error` and `help` to standard error and exit with 1.
    Usage {
        error: String,
        /// Of the command, if the flag came after one.
        help: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) config: PathBuf,
    /// Read first; `config` wins over it.
    pub(crate) fallback_config: PathBuf,
    pub(crate) level: LevelFilter,
}

/// `args` are without the program's name.
pub(crate) fn parse<I: IntoIterator<Item = OsString>>(args: I) -> Invocation {
    parse_global(args.into_iter().collect()).unwrap_or_else(|invocation| invocation)
}

fn parse_global(mut args: VecDeque<OsString>) -> Result<Invocation, Invocation> {
    let mut config = PathBuf::from(DEFAULT_CONFIG);
    let mut fallback_config = PathBuf::from(DEFAULT_FALLBACK_CONFIG);
    let (mut debug, mut trace, mut help, mut version) = (false, false, false, false);
    let usage = |error| Invocation::Usage { error, help: HELP.to_owned() };
    while let Some(flag) = next_flag(&mut args).map_err(usage)? {
        match flag.name.as_str() {
            "config" | "c" => config = flag.path(&mut args).map_err(usage)?,
            "fallback-config" | "b" => fallback_config = flag.path(&mut args).map_err(usage)?,
            "debug" | "d" => debug = flag.switch().map_err(usage)?,
            "trace" | "dd" => trace = flag.switch().map_err(usage)?,
            "help" | "h" => help = flag.switch().map_err(usage)?,
            "version" | "v" => version = flag.switch().map_err(usage)?,
            _ => return Err(usage(flag.undefined())),
        }
    }
    let command = args.pop_front();
    let command = match command {
        Some(command) if !help && !version => Command::find(&command)?,
        _ if version && !help => return Ok(Invocation::Print(VERSION.to_owned())),
        _ => return Ok(Invocation::Print(HELP.to_owned())),
    };
    let Flags { json, watch } = command.parse_flags(&mut args)?;
    let level = match (trace, debug) {
        (true, _) => LevelFilter::Trace,
        (_, true) => LevelFilter::Debug,
        _ => LevelFilter::Info,
    };
    let options = Options { config, fallback_config, level };
    match (command, args.pop_front()) {
        (Command::Daemon, _) => Ok(Invocation::Daemon(options)),
        (Command::Check, _) => Ok(Invocation::Check(options)),
        (Command::Doctor, _) => Ok(Invocation::Doctor { options, json }),
        (Command::Status, _) => Ok(Invocation::Status { json: json.unwrap_or(false), watch }),
        (Command::Version, _) => Ok(Invocation::Print(VERSION.to_owned())),
        (Command::Help, None) => Ok(Invocation::Print(HELP.to_owned())),
        (Command::Help, Some(topic)) => Ok(Invocation::Print(Command::find(&topic)?.help())),
    }
}

#[derive(Debug, Clone, Copy)]
enum Command {
    Daemon,
    Check,
    Doctor,
    Status,
    Version,
    Help,
}

/// Flags of the commands themselves.
#[derive(Debug, Default)]
struct Flags {
    json: Option<bool>,
    watch: bool,
}

impl Command {
    fn find(name: &OsStr) -> Result<Self, Invocation> {
        match name.as_bytes() {
            b"daemon" => Ok(Self::Daemon),
            b"check" => Ok(Self::Check),
            b"doctor" => Ok(Self::Doctor),
            b"status" => Ok(Self::Status),
            b"version" => Ok(Self::Version),
            b"help" | b"h" => Ok(Self::Help),
            _ => Err(Invocation::UnknownCommand(format!("No help topic for '{}'", name.display()))),
        }
    }

    fn help(self) -> String {
        let (name, what, arguments, options) = match self {
            Self::Daemon => ("daemon", "run in the foreground until SIGTERM", "", ""),
            Self::Check => (
                "check",
                "say what the daemon would make of its configuration; exit status 1 if it wouldn't start",
                "",
                "",
            ),
            Self::Doctor => (
                "doctor",
                "walk the way to the server, and say where it ends and what to do about it",
                "",
                "   --json      write JSON, as without a terminal; --json=false: text\n",
            ),
            Self::Status => (
                "status",
                "say what the running daemon is doing",
                "",
                "   --json      write JSON\n   --watch     go on, with a new picture each second\n",
            ),
            Self::Version => ("version", "print the version", "", ""),
            Self::Help => ("help", "print help, of all or of one command", " [command]", ""),
        };
        format!(
            "NAME:\n   mender-connect {name} - {what}\n\n\
             USAGE:\n   mender-connect [global options] {name} [options]{arguments}\n\n\
             OPTIONS:\n{options}   --help, -h  print this help\n"
        )
    }

    fn parse_flags(self, args: &mut VecDeque<OsString>) -> Result<Flags, Invocation> {
        let usage = |error| Invocation::Usage { error, help: self.help() };
        let mut help = false;
        let mut flags = Flags::default();
        while let Some(flag) = next_flag(args).map_err(usage)? {
            match (self, flag.name.as_str()) {
                (_, "help" | "h") => help = flag.switch().map_err(usage)?,
                (Self::Doctor | Self::Status, "json") => flags.json = Some(flag.switch().map_err(usage)?),
                (Self::Status, "watch") => flags.watch = flag.switch().map_err(usage)?,
                _ => return Err(usage(flag.undefined())),
            }
        }
        if help { Err(Invocation::Print(self.help())) } else { Ok(flags) }
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

    fn undefined(&self) -> String {
        format!("flag provided but not defined: -{}", self.name)
    }
}

#[cfg(test)]
mod tests;
