//! `token`: creates, lists and revokes tokens for access over the network.

use clap::{Args, Subcommand};
use coordinator_api::Client;
use coordinator_api::access::{NewToken, Role, TokenInfo, TokenList};
use coordinator_api::quantity::parse_duration;
use coordinator_api::report;

use crate::output::{Output, ago, table};

/// What to do with tokens.
#[derive(Subcommand)]
pub(crate) enum Token {
    /// Make a token and show it: the only time that it is shown
    Create(Create),
    /// List the tokens
    #[command(visible_alias = "ls")]
    List,
    /// Revoke a token: it is refused from now on
    #[command(visible_alias = "rm")]
    Revoke {
        /// The token's name
        name: String,
    },
}

/// The arguments of `token create`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  (umask 077; cachefsctl token create node-7 --role host > node-7.token)
  cachefsctl token create team --role viewer --images 'registry.example.com/team/*' --expires 90d")]
pub(crate) struct Create {
    /// What to call it, such as the name of the host that it is for
    name: String,
    /// What it allows: viewer (look), host (what cachefs mount needs), admin (everything)
    #[arg(long, value_parser = role)]
    role: Role,
    /// Images that it is for, such as registry.example.com/team/* (** crosses slashes) [default: all]
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    images: Vec<String>,
    /// How long it is good: 12h, 90d [default: until it is revoked]
    #[arg(long, value_name = "DURATION", value_parser = life)]
    expires: Option<u64>,
}

fn role(text: &str) -> Result<Role, String> {
    let found = Role::ALL.into_iter().find(|role| role.word() == text);
    found.ok_or_else(|| format!("{text:?} is no role: write viewer, host or admin"))
}

/// Parses a duration into whole seconds.
fn life(text: &str) -> Result<u64, String> {
    parse_duration(text).map(|life| life.as_secs())
}

/// Runs `cachefsctl token`.
pub(crate) async fn run(client: &Client, output: Output, command: Token) -> anyhow::Result<()> {
    match command {
        Token::Create(Create { name, role, images, expires }) => {
            let created = client.create_token(&NewToken { name, role, images, expires_seconds: expires }).await?;
            if output == Output::Text {
                // On stderr, so that stdout can be redirected into a file with the token alone.
                report::say(&format!(
                    "token {} ({}): keep it safe, it is not shown again",
                    created.info.name, created.info.role
                ));
            }
            output.print(&created, |created| created.token.clone())
        }
        Token::List => output.print(&client.tokens().await?, |list: &TokenList| {
            let head = ["NAME", "ID", "ROLE", "IMAGES", "CREATED", "BY", "EXPIRES", "LAST USED"];
            table(head, list.tokens.iter().map(row))
        }),
        Token::Revoke { name } => {
            output.print(&client.revoke_token(&name).await?, |token| format!("revoked {}", token.name))
        }
    }
}

fn row(token: &TokenInfo) -> [String; 8] {
    let images = if token.images.is_empty() { "all".to_owned() } else { token.images.join(" ") };
    [
        token.name.clone(),
        token.id.clone(),
        token.role.to_string(),
        images,
        ago(token.created_at),
        token.created_by.clone(),
        token.expires_at.map_or_else(|| "never".to_owned(), |at| at.strftime("%FT%TZ").to_string()),
        token.last_used_at.map_or_else(|| "never".to_owned(), ago),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lives_and_roles_are_read() {
        for (text, seconds) in [("90d", 7_776_000), ("12h", 43_200), ("5m", 300), ("2w", 1_209_600), ("7s", 7)] {
            assert_eq!(life(text), Ok(seconds));
        }
        for bad in ["", "90", "d", "1y", "-1d", "99999999999999999999d", "1mo"] {
            assert!(life(bad).is_err(), "{bad}");
        }
        assert_eq!(role("host"), Ok(Role::Host));
        assert!(role("root").unwrap_err().contains("viewer, host or admin"));
    }
}
