//! What the executable says when it lacks what was left out of it.

#[cfg(all(feature = "dbus", not(feature = "tls")))]
mod without_tls {
    use crate::harness::device::Generation;
    use crate::harness::doctor::Office;
    use crate::harness::front::Proxy;
    use crate::harness::rig::Setup;
    use crate::harness::server::Server;
    use crate::harness::wait::SOON;
    use crate::remote::shell_works;

    #[test]
    fn a_secure_server_is_out_of_reach_until_there_is_a_plain_one() {
        for scheme in ["https", "wss"] {
            let mut rig = Setup::new().token("").start();
            let secure = rig.server.url().replace("http", scheme);
            rig.manager.change("token", &secure);
            let line = rig.daemon.wait_for_log("connection manager failed to connect", SOON);
            assert!(line.contains(&secure), "{line}");
            assert!(line.contains("tls: built without TLS, only http servers can be reached"), "{line}");
            rig.daemon.wait_for_log("connectionmanager backoff: retrying in", SOON);
            rig.manager.change("token", &rig.server.url());
            shell_works(&rig.device());
            assert!(rig.daemon.is_running());
        }
    }

    #[test]
    fn doctor_says_so() {
        let (found, advice) = Office::at("https://device.invalid").ask().assert_break("tls");
        assert!(found.contains("built without TLS") && advice.contains("forwarder"), "{found}: {advice}");
    }

    /// Neither the resolver nor a proxy is asked, so that no words of theirs hide the reason.
    #[test]
    fn a_secure_server_is_not_even_looked_for() {
        let server = Server::start(Generation::New);
        let proxy = Proxy::start(server.address());
        for proxies in ["", &proxy.authority()] {
            let rig = Setup::new().url("https://device.invalid").env("HTTPS_PROXY", proxies).start();
            rig.daemon.wait_for_log("tls: built without TLS", SOON);
        }
        assert!(proxy.requests().is_empty());
    }
}

#[cfg(not(feature = "dbus"))]
mod without_dbus {
    use std::process::Output;

    use serde_json::{Value, json};

    use crate::harness::daemon;
    use crate::harness::doctor::Office;
    use crate::harness::rig::bash_config;

    fn run(config: &Value, command: &str) -> (Output, String) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let file = dir.path().join("conf");
        std::fs::write(&file, config.to_string()).expect("write");
        let file = file.to_str().expect("UTF-8");
        let output = daemon::run(&["--config", file, "--fallback-config", "/nonexistent", command]);
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        (output, log)
    }

    #[test]
    fn the_daemon_ends_at_once_and_says_why() {
        let (output, log) = run(&bash_config(), "daemon");
        assert_eq!(output.status.code(), Some(1), "{log}");
        assert!(
            log.contains("built without D-Bus, a token can only come from a file: Auth.Source must be"),
            "{log}"
        );
    }

    #[test]
    fn doctor_says_so() {
        let (found, advice) = Office::open().ask().assert_break("bus");
        assert!(found.contains("built without D-Bus") && advice.contains("Auth.Source"), "{found}: {advice}");
    }

    #[test]
    fn a_wrong_configuration_is_told_first() {
        let (output, log) = run(&json!({"ShellCommand": "/bin/sh"}), "daemon");
        assert_eq!(output.status.code(), Some(1), "{log}");
        assert!(log.contains("please provide a user to run the shell as"), "{log}");
        assert!(!log.contains("D-Bus"), "{log}");
    }

    #[test]
    fn check_knows_that_a_token_can_only_come_from_a_file() {
        let mut config = bash_config();
        let (output, _) = run(&config, "check");
        let report = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "{report}");
        assert!(report.contains("Auth.Source: built without D-Bus"), "{report}");
        config["Auth"] = json!({"Source": "file", "TokenFile": "/t", "ServerURL": "https://host"});
        assert_eq!(run(&config, "check").0.status.code(), Some(0));
    }
}
