//! The command line in the syntax of Go's flag package, which existing scripts and units use. Does no I/O.
//!
//! `mender-connect [global options] command`: a global option after the command is an error. A flag takes one or two
//! dashes, and its value after `=` or as the next argument; `--` ends the flags.

use std::ffi::{OsStr, OsString};
use std::iter::Peekable;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use log::LevelFilter;

use self::Set::{File, Switch};

const DEFAULT_CONFIG: &str = "/etc/mender/mender-connect.conf";
const DEFAULT_FALLBACK_CONFIG: &str = "/var/lib/mender/mender-connect.conf";

const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\ttarget: ", env!("TARGET"), "\n");

/// Spellings, help text, effect.
type Flag = (&'static str, &'static str, Set);

enum Set {
    Switch(fn(&mut Options, bool)),
    File(fn(&mut Options, PathBuf)),
}

const HELP: Flag = ("--help, -h", "print this help", Switch(|options, on| options.help = on));

const JSON: Set = Switch(|options, on| options.json = Some(on));

const GLOBAL: &[Flag] = &[
    (
        "--config FILE, -c FILE",
        "configuration file (default: /etc/mender/mender-connect.conf)",
        File(|options, file| options.config = file),
    ),
    (
        "--fallback-config FILE, -b FILE",
        "read first, the configuration file wins over it
                                    (default: /var/lib/mender/mender-connect.conf)",
        File(|options, file| options.fallback_config = file),
    ),
    ("--debug, -d", "log what a developer wants to know", Switch(|options, on| options.debug = on)),
    ("--trace, --dd", "log even more", Switch(|options, on| options.trace = on)),
    HELP,
    ("--version, -v", "print the version", Switch(|options, on| options.version = on)),
];

/// Names, summary, flags, what runs.
type Command = (&'static str, &'static str, &'static [Flag], fn(Options) -> Invocation);

const COMMANDS: &[Command] = &[
    ("daemon", "run in the foreground until SIGTERM", &[HELP], Invocation::Daemon),
    (
        "check",
        "say what the daemon would make of its configuration; exit status 1 if it wouldn't start",
        &[HELP],
        Invocation::Check,
    ),
    (
        "doctor",
        "walk the way to the server, and say where it ends and what to do about it",
        &[("--json", "write JSON, as without a terminal; --json=false: text", JSON), HELP],
        Invocation::Doctor,
    ),
    (
        "status",
        "say what the running daemon is doing",
        &[
            ("--json", "write JSON", JSON),
            ("--watch", "go on, with a new picture each second", Switch(|options, on| options.watch = on)),
            HELP,
        ],
        Invocation::Status,
    ),
    ("version", "print the version", &[HELP], |_| Invocation::Print(VERSION.to_owned())),
    ("help, h", "print help, of all or of one command", &[HELP], |options| {
        let text = options.topic.as_deref().map_or_else(|| Ok(help()), |topic| find(topic).map(help_of));
        text.map_or_else(|refusal| refusal, Invocation::Print)
    }),
];

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Invocation {
    Daemon(Options),
    Check(Options),
    Doctor(Options),
    Status(Options),
    Print(String),
    /// Print to standard error and exit with this code.
    Refuse(String, u8),
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) config: PathBuf,
    pub(crate) fallback_config: PathBuf,
    pub(crate) json: Option<bool>,
    pub(crate) watch: bool,
    debug: bool,
    trace: bool,
    help: bool,
    version: bool,
    /// Argument of `help`.
    topic: Option<OsString>,
}

/// `args` lacks the name of the program.
pub(crate) fn parse<I: IntoIterator<Item = OsString>>(args: I) -> Invocation {
    try_parse(&mut args.into_iter().peekable()).unwrap_or_else(|invocation| invocation)
}

fn try_parse(args: &mut Peekable<impl Iterator<Item = OsString>>) -> Result<Invocation, Invocation> {
    let (config, fallback_config) = (DEFAULT_CONFIG.into(), DEFAULT_FALLBACK_CONFIG.into());
    let mut options = Options { config, fallback_config, ..Options::default() };
    options.take(GLOBAL, args).map_err(|error| wrong_usage(&error, &help()))?;
    if options.version && !options.help {
        return Ok(Invocation::Print(VERSION.to_owned()));
    }
    let Some(name) = args.next().filter(|_| !options.help) else {
        return Ok(Invocation::Print(help()));
    };
    let command = find(&name)?;
    options.take(command.2, args).map_err(|error| wrong_usage(&error, &help_of(command)))?;
    if options.help {
        return Ok(Invocation::Print(help_of(command)));
    }
    options.topic = args.next();
    // Mender's agent ignores what follows its commands. These aren't its: `check FILE` looked at another file.
    if let (Some(extra), "check" | "doctor" | "status") = (&options.topic, command.0) {
        let error = format!("unexpected argument: {}", extra.display());
        return Err(wrong_usage(&error, &help_of(command)));
    }
    Ok((command.3)(options))
}

fn wrong_usage(error: &str, help: &str) -> Invocation {
    Invocation::Refuse(format!("Incorrect Usage: {error}\n\n{help}"), 1)
}

fn find(name: &OsStr) -> Result<&'static Command, Invocation> {
    let command = COMMANDS.iter().find(|command| names(command.0).any(|n| n == name));
    command.ok_or_else(|| Invocation::Refuse(format!("No help topic for '{}'\n", name.display()), 3))
}

/// `--config FILE, -c FILE` has the names `config` and `c`.
fn names(spellings: &str) -> impl Iterator<Item = &str> {
    spellings.split(", ").filter_map(|name| name.trim_start_matches('-').split(' ').next())
}

fn help() -> String {
    let commands: String = COMMANDS.iter().map(|row| format!("   {:7}  {}\n", row.0, row.1)).collect();
    format!(
        "NAME:\n   mender-connect - remote terminal, files and ports of this device through its Mender server\n\n\
         USAGE:\n   mender-connect [global options] command\n\n\
         COMMANDS:\n{commands}\nGLOBAL OPTIONS:\n{}",
        list(GLOBAL, 31)
    )
}

fn help_of((names, summary, flags, _): &Command) -> String {
    let (name, arguments) = match names.split_once(", ") {
        // Only `help` has a short name, and an argument.
        Some((name, _)) => (name, " [command]"),
        None => (*names, ""),
    };
    format!(
        "NAME:\n   mender-connect {name} - {summary}\n\n\
         USAGE:\n   mender-connect [global options] {name} [options]{arguments}\n\n\
         OPTIONS:\n{}\nGlobal options, such as --config, go before it.\n",
        list(flags, 10)
    )
}

fn list(flags: &[Flag], width: usize) -> String {
    flags.iter().map(|(spellings, text, _)| format!("   {spellings:width$}  {text}\n")).collect()
}

impl Options {
    pub(crate) fn level(&self) -> LevelFilter {
        match (self.trace, self.debug) {
            (true, _) => LevelFilter::Trace,
            (_, true) => LevelFilter::Debug,
            _ => LevelFilter::Info,
        }
    }

    /// Parses leading flags off `args`, and the `--` that ends them.
    fn take(
        &mut self,
        flags: &[Flag],
        args: &mut Peekable<impl Iterator<Item = OsString>>,
    ) -> Result<(), String> {
        let is_flag = |arg: &OsString| arg.len() > 1 && arg.as_bytes().starts_with(b"-");
        while let Some(arg) = args.next_if(is_flag).filter(|arg| arg != "--") {
            let bytes = arg.as_bytes();
            let bare = bytes.strip_prefix(b"--").unwrap_or(&bytes[1..]);
            if bare.starts_with(b"-") || bare.starts_with(b"=") {
                return Err(format!("bad flag syntax: {}", arg.display()));
            }
            let mut parts = bare.splitn(2, |byte| *byte == b'=');
            let name = String::from_utf8_lossy(parts.next().unwrap_or_default());
            let value = parts.next().map(OsStr::from_bytes);
            match flags.iter().find(|flag| names(flag.0).any(|n| n == name)).map(|flag| &flag.2) {
                None => return Err(format!("flag provided but not defined: -{name}")),
                Some(File(set)) => {
                    let file = value.map(OsStr::to_owned).or_else(|| args.next());
                    let file = file.ok_or_else(|| format!("flag needs an argument: -{name}"))?;
                    set(self, file.into());
                }
                Some(Switch(set)) => match value.map_or(&b"true"[..], OsStr::as_bytes) {
                    b"1" | b"t" | b"T" | b"true" | b"TRUE" | b"True" => set(self, true),
                    b"0" | b"f" | b"F" | b"false" | b"FALSE" | b"False" => set(self, false),
                    value => {
                        let value = String::from_utf8_lossy(value);
                        return Err(format!("invalid boolean value {value:?} for -{name}: parse error"));
                    }
                },
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
