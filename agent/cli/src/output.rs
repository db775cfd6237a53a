//! Printing: tables with rounded or heavy boxes, JSON, YAML, colours where there is a terminal.

use std::io::{self, IsTerminal, Write};

use anyhow::Result;
use serde_json::Value;

use crate::args::Output;

/// Writes a line for people to stderr. Where that fails there is nobody to tell.
pub(crate) fn warn(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// True if the reader of our output has gone: that is no failure.
pub(crate) fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<io::Error>();
    io.is_some_and(|io| io.kind() == io::ErrorKind::BrokenPipe)
}

/// Asks on stderr; true for `y`.
pub(crate) fn confirmed(question: &str, expected: &str) -> Result<bool> {
    let mut stderr = io::stderr().lock();
    write!(stderr, "{question}")?;
    stderr.flush()?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    Ok(answer.trim().eq_ignore_ascii_case(expected))
}

/// Colours of cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Colour {
    Red,
    Green,
    Yellow,
    Blue,
}

/// Where and how results go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Printer {
    output: Option<Output>,
    colours: bool,
}

impl Printer {
    pub(crate) fn new(output: Option<Output>) -> Self {
        let colours = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { output, colours }
    }

    /// JSON if `raw` and nothing else was asked for.
    pub(crate) fn or_json(self, raw: bool) -> Self {
        let output = if raw { Some(Output::Json) } else { self.output };
        Self { output, ..self }
    }

    /// True if tables are wanted.
    pub(crate) fn wants_tables(&self) -> bool {
        matches!(self.output, None | Some(Output::Table))
    }

    pub(crate) fn line(&self, line: &str) -> Result<()> {
        Ok(writeln!(io::stdout().lock(), "{line}")?)
    }

    /// A value: YAML if asked for, else JSON, two spaces deep.
    pub(crate) fn value(&self, value: &Value) -> Result<()> {
        match self.output {
            Some(Output::Yaml) => self.yaml(value),
            _ => self.line(&serde_json::to_string_pretty(value)?),
        }
    }

    /// A value that people read: JSON if asked for, else YAML.
    pub(crate) fn readable(&self, value: &Value) -> Result<()> {
        match self.output {
            Some(Output::Json) => self.line(&serde_json::to_string_pretty(value)?),
            _ => self.yaml(value),
        }
    }

    fn yaml(&self, value: &Value) -> Result<()> {
        let mut text = String::new();
        yaml(value, 0, &mut text);
        self.line(text.trim_end())
    }

    pub(crate) fn paint(&self, colour: Colour, text: &str) -> String {
        if !self.colours {
            return text.to_owned();
        }
        let code = match colour {
            Colour::Red => 31,
            Colour::Green => 32,
            Colour::Yellow => 33,
            Colour::Blue => 34,
        };
        format!("\u{1b}[{code}m{text}\u{1b}[0m")
    }

    pub(crate) fn table(&self, table: &Table) -> Result<()> {
        self.line(&table.render())
    }
}

/// YAML that any reader takes: block style, texts quoted as JSON quotes them.
fn yaml(value: &Value, depth: usize, out: &mut String) {
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(members) if !members.is_empty() => {
            for (key, value) in members {
                out.push_str(&format!("{indent}{}:", yaml_key(key)));
                yaml_child(value, depth, out);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for item in items {
                out.push_str(&format!("{indent}-"));
                yaml_child(item, depth, out);
            }
        }
        scalar => out.push_str(&format!("{indent}{scalar}\n")),
    }
}

fn yaml_child(value: &Value, depth: usize, out: &mut String) {
    let is_block = match value {
        Value::Object(members) => !members.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => false,
    };
    if is_block {
        out.push('\n');
        yaml(value, depth + 1, out);
    } else {
        out.push_str(&format!(" {value}\n"));
    }
}

fn yaml_key(key: &str) -> String {
    let plain = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphabetic() || c == '_');
    // Words that YAML 1.1 takes for something else.
    let taken = ["y", "n", "yes", "no", "on", "off", "true", "false", "null"];
    if plain && !taken.contains(&key.to_ascii_lowercase().as_str()) {
        key.to_owned()
    } else {
        Value::String(key.to_owned()).to_string()
    }
}

/// Which lines a table is drawn with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lines {
    Rounded,
    Heavy,
}

/// A table; cells may carry colours.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    title: String,
    lines: Lines,
    headers: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(title: &str, lines: Lines, headers: &[&str]) -> Self {
        Self {
            title: title.to_owned(),
            lines,
            headers: headers.iter().map(|header| (*header).to_owned()).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row with as many cells as there are headers.
    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    fn render(&self) -> String {
        let widths: Vec<usize> = (0..self.headers.len())
            .map(|column| {
                let cells = self.rows.iter().filter_map(|row| row.get(column));
                let widest = cells.map(|cell| width(cell)).max().unwrap_or(0);
                widest.max(width(&self.headers[column]))
            })
            .collect();
        let parts: [&str; 5] = match self.lines {
            Lines::Rounded => ["╭─┬╮", "├─┼┤", "╰─┴╯", "│", "│"],
            Lines::Heavy => ["┏━┳┓", "┡━╇┩", "└─┴┘", "┃", "│"],
        };
        let rule = |marks: &str| {
            let marks: Vec<char> = marks.chars().collect();
            let cells: Vec<String> = widths
                .iter()
                .map(|width| marks[1].to_string().repeat(width + 2))
                .collect();
            format!("{}{}{}", marks[0], cells.join(&marks[2].to_string()), marks[3])
        };
        let line = |cells: &[String], bar: &str| {
            let padded = cells
                .iter()
                .zip(&widths)
                .map(|(cell, width_)| format!(" {cell}{} ", " ".repeat(width_.saturating_sub(width(cell)))));
            format!("{bar}{}{bar}", padded.collect::<Vec<_>>().join(bar))
        };
        let total = widths.iter().map(|width| width + 3).sum::<usize>() + 1;
        let mut lines = Vec::new();
        if !self.title.is_empty() {
            let left = total.saturating_sub(width(&self.title)) / 2;
            lines.push(format!("{}{}", " ".repeat(left), self.title));
        }
        lines.push(rule(parts[0]));
        lines.push(line(&self.headers, parts[3]));
        lines.push(rule(parts[1]));
        lines.extend(self.rows.iter().map(|row| line(row, parts[4])));
        lines.push(rule(parts[2]));
        lines.join("\n")
    }
}

/// Characters that are seen: colour codes are not.
fn width(text: &str) -> usize {
    let mut seen = 0;
    let mut in_code = false;
    for c in text.chars() {
        match c {
            '\u{1b}' => in_code = true,
            'm' if in_code => in_code = false,
            _ if in_code => {}
            _ => seen += 1,
        }
    }
    seen
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_table_is_as_wide_as_its_widest_cells() {
        let mut table = Table::new("Server: a", Lines::Rounded, &["Property", "Value"]);
        table.row(vec!["Status".to_owned(), "\u{1b}[32mReady\u{1b}[0m".to_owned()]);
        let expected = "     Server: a\n╭──────────┬───────╮\n│ Property │ Value │\n├──────────┼───────┤\n│ Status   │ \u{1b}[32mReady\u{1b}[0m │\n╰──────────┴───────╯";
        assert_eq!(table.render(), expected);
    }

    #[test]
    fn yaml_is_nested_and_quoted() {
        let value = json!({"a": [1, {"b": "x: y"}], "no": null, "e": [], "gpu-1": true});
        let mut text = String::new();
        yaml(&value, 0, &mut text);
        assert_eq!(
            text,
            "a:\n  - 1\n  -\n    b: \"x: y\"\ne: []\n\"gpu-1\": true\n\"no\": null\n"
        );
    }
}
