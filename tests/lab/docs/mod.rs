//! The README, the manual pages and the pages beside them: every command in them is run ([`typed`]), and what they
//! say of keys, options and log lines is what the program has ([`facts`]).
//!
//! A fenced block without a language, or with `sh`, has commands, one in each line, or what [`STARTS`] as the output of
//! one. Blocks with `json` are configurations or what a command prints, those with `log` quote the log. In the manual
//! pages lines of examples that start with a prompt are commands, and examples that start with a brace configurations.

use std::fs;
use std::path::Path;

mod facts;
mod typed;

/// Where commands are expected.
const PAGES: [&str; 12] = [
    "README.md",
    "docs/guide.md",
    "docs/configuration.md",
    "docs/operations.md",
    "docs/migration.md",
    "docs/troubleshooting.md",
    "docs/SECURITY.md",
    "docs/performance.md",
    "docs/architecture.md",
    "yocto/README.md",
    "docs/man/mender-connect.8",
    "docs/man/mender-connect.conf.5",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// In place of a language: what a command prints, which starts with one of these.
const PRINTED: &str = "printed";
const STARTS: [&str; 3] = ["error: ", "✓ ", "mender-connect 1."];

/// A literal piece of a page.
struct Block {
    language: String,
    lines: Vec<String>,
}

fn blocks(page: &str) -> Vec<Block> {
    let text = read(page);
    if page.ends_with(".md") { fences(&text) } else { examples(&text) }
}

fn fences(text: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut open: Option<Block> = None;
    for line in text.lines() {
        match (line.strip_prefix("```"), &mut open) {
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (Some(language), None) => {
                open = Some(Block { language: language.to_owned(), lines: Vec::new() });
            }
            (None, Some(block)) => {
                if block.lines.is_empty() && STARTS.iter().any(|start| line.starts_with(start)) {
                    PRINTED.clone_into(&mut block.language);
                }
                block.lines.push(line.to_owned());
            }
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "a fence is open at the end");
    blocks
}

/// The displays of an mdoc page.
fn examples(text: &str) -> Vec<Block> {
    let mut displays: Vec<Vec<String>> = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        let plain =
            line.replace("\\-", "-").replace("\\(aq", "'").replace("\\(ha", "^").replace("\\(dq", "\"");
        if line.starts_with(".Bd ") {
            inside = true;
            displays.push(Vec::new());
        } else if line == ".Ed" {
            inside = false;
        } else if let Some(line) = plain.strip_prefix(".Dl ") {
            displays.push(vec![line.to_owned()]);
        } else if inside {
            displays.last_mut().expect("a display").push(plain);
        }
    }
    let block = |lines: Vec<String>| {
        let commands = lines.iter().map(|line| line.strip_prefix("# ").or(line.strip_prefix("$ ")));
        match commands.map(|line| line.map(str::to_owned)).collect() {
            Some(lines) => Block { language: "sh".to_owned(), lines },
            None => Block { language: "json".to_owned(), lines },
        }
    };
    displays.into_iter().map(block).collect()
}

/// The commands of a page, block by block.
fn commands_of(page: &str) -> Vec<Vec<String>> {
    let blocks = blocks(page).into_iter().filter(|block| ["", "sh"].contains(&block.language.as_str()));
    blocks.map(|block| block.lines.into_iter().filter(|line| !line.is_empty()).collect()).collect()
}
