//! The thread that reads a device's websocket and keeps the link alive as the real servers do.

use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};

use super::device::Inner;
use super::device::{Device, Generation, Reading};
use super::msg::{self, Ints, Msg, SHELL};
use super::wait::{secs, spawn};
use super::wire::{self, Parser, WireFrame};

/// Messages that the released server keeps for a session's client (its `channelSize`).
const PLACES: usize = 25;

/// A session's client, as fast as it reads.
fn take_slowly(device: &Weak<Inner>, messages: &Receiver<Msg>) {
    let mut free = Instant::now();
    while let Ok(msg) = messages.recv() {
        let Some(device) = device.upgrade().map(Device) else { return };
        let rate = device.0.state.peek(|s| s.client_rate);
        if rate > 0 {
            free = free.max(Instant::now()) + Duration::from_secs_f64(msg.raw.len() as f64 / f64::from(rate));
            while let Some(left) = free.checked_duration_since(Instant::now()) {
                std::thread::park_timeout(left);
            }
        }
        device.deliver(msg);
    }
}

impl Device {
    pub(super) fn read(&self, stream: Arc<TcpStream>) {
        let mut parser = Parser::default();
        let mut message: Option<(u8, Vec<u8>)> = None;
        let mut buffer = vec![0; 64 << 10];
        let mut pause_until = Instant::now();
        loop {
            let now = Instant::now();
            let (quit, reading) = self.0.state.peek(|s| (s.quit, s.reading));
            if quit {
                return;
            }
            let due = match self.keep_alive(now) {
                Ok(due) => due,
                Err(why) => return self.end(why),
            };
            let wanted = match reading {
                Reading::Full => buffer.len(),
                Reading::Paused => 0,
                Reading::Rate(_) if now < pause_until => 0,
                Reading::Rate(rate) => (rate as usize / 100).clamp(1, buffer.len()),
            };
            let mut wait = due.saturating_duration_since(now);
            if matches!(reading, Reading::Rate(_)) && wanted == 0 {
                wait = wait.min(pause_until - now);
            }
            let timeout = PollTimeout::try_from(wait.as_millis() + 1).unwrap_or(PollTimeout::MAX);
            let mut fds = vec![PollFd::new(self.0.wake.as_fd(), PollFlags::POLLIN)];
            if wanted > 0 {
                fds.push(PollFd::new(stream.as_fd(), PollFlags::POLLIN));
            }
            let _ = poll(&mut fds, timeout);
            let _ = self.0.wake.read();
            if wanted == 0 || fds.get(1).and_then(PollFd::any) != Some(true) {
                continue;
            }
            let count = match recv(stream.as_raw_fd(), &mut buffer[..wanted], MsgFlags::MSG_DONTWAIT) {
                Ok(0) => return self.end("the device closed the connection".to_owned()),
                Ok(count) => count,
                Err(nix::Error::EAGAIN | nix::Error::EINTR) => continue,
                Err(e) => return self.end(format!("reading from the device: {e}")),
            };
            if let Reading::Rate(rate) = reading {
                pause_until = Instant::now() + Duration::from_secs_f64(count as f64 / f64::from(rate.max(1)));
            }
            parser.feed(&buffer[..count]);
            self.0.state.update(|s| s.bytes += count as u64);
            loop {
                match parser.next() {
                    Ok(Some(frame)) => self.take_frame(frame, &mut message),
                    Ok(None) => break,
                    Err(why) => {
                        self.0.state.update(|s| s.broken.push(why.clone()));
                        return self.end(why);
                    }
                }
            }
        }
    }

    /// Pings when it is time; says when to look again, or that the deadline has passed.
    fn keep_alive(&self, now: Instant) -> Result<Instant, String> {
        let (due, deadline, mute) = self.0.state.peek(|s| {
            let due = match self.0.generation {
                Generation::New => s.wrote.max(s.heard) + secs(30),
                Generation::Released => s.wrote + secs(54),
            };
            (due, s.deadline, s.mute)
        });
        if let Some(deadline) = deadline
            && now >= deadline
        {
            return Err("the server heard nothing from the device for 60 s".to_owned());
        }
        if now >= due {
            self.0.state.update(|s| s.wrote = now);
            if !mute {
                let _ = self.write(&wire::encode(true, wire::PING, b"60"));
            }
            return Ok(now + secs(1));
        }
        Ok(deadline.map_or(due, |d| d.min(due)))
    }

    /// Puts a message into its session's queue, as the released server does, or drops it if that is full.
    fn queue(&self, msg: Msg) {
        let Some(sid) = msg.sid.clone() else { return self.deliver(msg) };
        self.0.state.update(|s| {
            let client = s.clients.entry(sid).or_insert_with(|| {
                let (sender, receiver) = sync_channel(PLACES);
                let device = Arc::downgrade(&self.0);
                spawn("client", move || take_slowly(&device, &receiver));
                sender
            });
            s.dropped += usize::from(client.try_send(msg).is_err());
        });
    }

    /// A message has reached its client.
    fn deliver(&self, msg: Msg) {
        let answer = self.0.state.update(|s| {
            let asked = s.clients_answer && (msg.proto, msg.typ.as_str()) == (SHELL, "ping");
            match msg.sid.clone() {
                Some(sid) if asked => return Some(sid),
                Some(sid) if s.discarded.contains(&sid) => {}
                _ => s.inbox.push_back(msg),
            }
            None
        });
        if let Some(sid) = answer {
            let pong = msg::encode(&msg::message(SHELL, "pong", &sid, &[], b""), Ints::Compact);
            // The device may be gone by now.
            let _ = self.try_frame(true, wire::BINARY, &pong);
        }
    }

    fn take_frame(&self, frame: WireFrame, message: &mut Option<(u8, Vec<u8>)>) {
        let now = Instant::now();
        let control = matches!(frame.opcode, wire::PING | wire::PONG);
        let mute = self.0.state.update(|s| {
            if control {
                s.heard = now;
            }
            if control || self.0.generation == Generation::New {
                s.deadline = Some(now + secs(60));
            }
            s.mute
        });
        match frame.opcode {
            wire::PING => {
                self.0.state.update(|s| s.pings.push((now, frame.payload.clone())));
                if !mute {
                    let _ = self.write(&wire::encode(true, wire::PONG, &frame.payload));
                }
            }
            wire::PONG => self.0.state.update(|s| s.pongs.push((now, frame.payload))),
            wire::CLOSE => {
                let code = frame.payload.first_chunk().map_or(1005, |b| u16::from_be_bytes(*b));
                let reason = String::from_utf8_lossy(frame.payload.get(2..).unwrap_or_default()).into_owned();
                self.0.state.update(|s| s.close = Some((code, reason)));
            }
            opcode => {
                let (kind, mut bytes) = match (opcode, message.take()) {
                    (wire::CONTINUATION, Some(begun)) => begun,
                    (wire::BINARY, None) => (wire::BINARY, Vec::new()),
                    (opcode, _) => {
                        self.0.state.update(|s| s.broken.push(format!("unexpected opcode {opcode}")));
                        return;
                    }
                };
                bytes.extend_from_slice(&frame.payload);
                if !frame.fin {
                    *message = Some((kind, bytes));
                    return;
                }
                match msg::decode(&bytes) {
                    Ok(msg) if self.0.generation == Generation::Released => self.queue(msg),
                    Ok(msg) => self.deliver(msg),
                    Err(why) => self.0.state.update(|s| s.broken.push(why)),
                }
            }
        }
    }
}
