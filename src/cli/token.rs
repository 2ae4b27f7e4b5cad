//! `tidemill token …`: makes access tokens. The server's file holds only their hashes.

use std::io::Read as _;

use anyhow::{Context, ensure};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use clap::{Subcommand, ValueEnum};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::{
    meter::{note, note_terminal},
    out,
};
use crate::domain::Weight;

/// Random bytes in a token: enough that a plain hash is safe.
const TOKEN_BYTES: usize = 32;

/// Commands for tokens.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make a token. Prints the line for the server's --tokens file, and the token itself, which is shown only once: on
    /// stderr, or with --json in the object on stdout.
    #[command(after_help = "Example:\n  tidemill token new --name search-team --role submit >> tokens.txt\n  \
                            tidemill serve --listen 0.0.0.0:4080 --tokens tokens.txt")]
    New {
        /// The owner's name: 1 to 64 letters, digits, "-", "_" and ".".
        #[arg(long, value_parser = name)]
        name: String,
        /// What the token allows.
        #[arg(long, default_value = "submit")]
        role: TokenRole,
        /// The owner's share of the workers, 1 to 1000, while several owners have work: three times the weight is three
        /// times the share. All tokens of a name have the same weight.
        #[arg(long, value_name = "N", default_value = "1")]
        weight: Weight,
    },
    /// Read a token from stdin and print its hash, as in the server's --tokens file.
    Hash,
}

/// What a token allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TokenRole {
    /// Files, batches and results.
    Submit,
    /// Everything.
    Admin,
}

/// Runs a command. With `json` the token itself is printed on stdout too.
///
/// # Errors
/// What went wrong, for people.
pub fn run(command: TokenCommand, json: bool) -> anyhow::Result<()> {
    match command {
        TokenCommand::New { name, role, weight } => {
            let secret: [u8; TOKEN_BYTES] = rand::random();
            let token = format!("tm_{}", BASE64_URL_SAFE_NO_PAD.encode(secret));
            let line = file_line(&name, role, weight, &token);
            if json {
                return Ok(out::line(json!({"name": name, "token": token, "line": line}))?);
            }
            out::line(line)?;
            // On stderr, so that stdout can be appended to the file.
            note(&format!("the token, shown only now: {token}"));
        }
        TokenCommand::Hash => {
            note_terminal();
            let mut token = String::new();
            std::io::stdin().read_to_string(&mut token).context("stdin")?;
            let token = token.trim();
            ensure!(!token.is_empty(), "no token on stdin");
            let hash = hash(token);
            if json { out::line(json!({ "hash": hash }))? } else { out::line(hash)? }
        }
    }
    Ok(())
}

/// A line of the server's tokens file: name, role, hash, and the weight if it is not 1.
fn file_line(name: &str, role: TokenRole, weight: Weight, token: &str) -> String {
    let role = match role {
        TokenRole::Submit => "submit",
        TokenRole::Admin => "admin",
    };
    let weight = if weight == Weight::default() { String::new() } else { format!(" weight={}", weight.get()) };
    format!("{name} {role} {}{weight}", hash(token))
}

/// The hash of a token as in the server's tokens file.
fn hash(token: &str) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(token)))
}

fn name(text: &str) -> Result<String, String> {
    let valid = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if text.is_empty() || text.len() > 64 || !text.chars().all(valid) {
        return Err("expected 1 to 64 letters, digits, \"-\", \"_\" and \".\"".to_owned());
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_holds_the_hash_and_not_the_token() {
        let line = file_line("team", TokenRole::Admin, Weight::default(), "abc");
        // FIPS 180-4's example
        assert_eq!(line, "team admin sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn the_server_reads_what_is_written() {
        let line = file_line("team", TokenRole::Submit, Weight::new(20).unwrap(), "abc");
        assert!(line.ends_with(" weight=20"), "{line}");
        let tokens = crate::access::Tokens::parse(&line).unwrap();
        assert_eq!(
            (tokens.find("abc").unwrap().owner.as_str(), tokens.weights().of(&"team".into()).get()),
            ("team", 20)
        );
    }

    #[test]
    fn names_can_not_break_the_line() {
        assert!(name("search-team.1").is_ok());
        for bad in ["", "a b", "a\nb", "é", &"x".repeat(65)] {
            assert!(name(bad).is_err(), "{bad:?}");
        }
    }
}
