//! mender-auth's local forwarder.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;

use crate::forwards::listen;
use crate::harness::front::Acceptor;
use crate::harness::relay::Relay;
use crate::harness::wait::spawn;

const BLOCK: usize = 16_384;

/// A relay to `target` as it is: blocks of 16 KiB, and Nagle's algorithm as TCP comes with it.
pub fn start(target: SocketAddr) -> Result<Relay, String> {
    let listener = listen()?;
    let acceptor = Acceptor::start("forwarder", listener, move |agent| {
        let Ok(server) = TcpStream::connect(target) else { return };
        let (Ok(agent_again), Ok(server_again)) = (agent.try_clone(), server.try_clone()) else { return };
        let down = spawn("forwarder-down", move || copy(server_again, agent_again));
        copy(agent, server);
        let _ = down.join();
    });
    Ok(Relay { acceptor, sent_up: Arc::default() })
}

fn copy(mut from: TcpStream, mut to: TcpStream) {
    let mut block = [0; BLOCK];
    while let Ok(count @ 1..) = from.read(&mut block) {
        if to.write_all(&block[..count]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
