//! Makes what the fuzz targets start from: the recorded frames, in the form that each target takes, and what is in
//! `seeds`. Existing inputs stay.

use std::fs;
use std::path::Path;

use data_encoding::HEXLOWER;
use mender_connect::internals::{
    CONTROL, FILE_TRANSFER, Frame, Map, PORT_FORWARD, SHELL, SessionId, control, file, forward,
};

fn main() {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    let put = |target: &str, number: usize, bytes: &[u8]| {
        let folder = own.join("corpus").join(target);
        fs::create_dir_all(&folder).expect("a folder for the corpus");
        fs::write(folder.join(format!("seed-{number}")), bytes).expect("write a seed");
    };

    let frames = fs::read_to_string(own.join("../golden/frames.jsonl")).expect("the recorded frames");
    let mut stream = vec![0, 0];
    for (number, line) in frames.lines().enumerate() {
        let entry: serde_json::Value = serde_json::from_str(line).expect("JSON");
        let message =
            HEXLOWER.decode(entry["hex"].as_str().expect("a string").as_bytes()).expect("hex digits");
        let frame = Frame::decode(&message.clone().into()).expect("a frame");
        put("frame", number, &message);
        if let Some(kind) = body_kind(&frame) {
            put("body", number, &[&[kind], &frame.body[..]].concat());
        }
        if let Some(at) = message.windows(6).position(|bytes| bytes == b"\xa5props") {
            put("body", 1000 + number, &[&[5], &message[at + 6..]].concat());
        }
        let websocket = websocket_frame(&message);
        put("websocket", number, &[&[0, number as u8], &websocket[..]].concat());
        if message.len() < 150 {
            stream.extend(websocket);
        }
    }
    put("websocket", 1000, &stream[..stream.len().min(4096)]);
    // A ping, a text in two parts with a pong between them, and a goodbye.
    put("websocket", 1001, b"\0\x03\x89\x0260\x01\x03\x81\xa3h\x8a\x08\0\0\0\0\0\0\0\x01\x80\x0adr\x81\xa5proto\x01\x88\x05\x03\xe8bye");

    // Steps: long sequences of any content.
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for number in 0..64 {
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        };
        let steps: Vec<u8> = std::iter::repeat_with(&mut next).take(256).collect();
        for target in ["script", "shells", "files", "forward"] {
            put(target, number, &steps);
        }
    }

    for (number, (lines, end, sent, typed)) in
        [(0, 0, 0, 0), (3, 60, 45, 5), (3, 1000, 7, 0), (4000, 80_000, 79_000, 0)].into_iter().enumerate()
    {
        let props = Map::new().with_str("user_id", "u").with_i64("started", 1_700_000_000);
        let props = props.with_i64("end", end).with_i64("sent", sent).with_i64("typed", typed);
        let body = b"a line of output\x1b[6n\r\n".repeat(lines);
        let shell =
            Frame::new(SHELL, "kept-1", SessionId::new("s").as_ref()).with_props(props).with_body(body);
        for back in 0..3 {
            put("kept", 10 * number + usize::from(back), &[&[0, back], &shell.encode()[..]].concat());
        }
    }

    let entries = fs::read_to_string(own.join("seeds/allow.txt")).expect("entries");
    for (number, entry) in entries.lines().enumerate() {
        let probe = b"\n\0\0\x50\x7f\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\x01localhost.";
        put("allow", number, &[entry.as_bytes(), probe].concat());
    }
    for (number, file) in fs::read_dir(own.join("seeds/config")).expect("configurations").enumerate() {
        put("config", number, &fs::read(file.expect("an entry").path()).expect("a configuration"));
    }
}

/// The first byte of the input for `body`.
fn body_kind(frame: &Frame) -> Option<u8> {
    Some(match (frame.proto, frame.typ.as_str()) {
        (CONTROL, control::OPEN) => 0,
        (CONTROL, control::ACCEPT) => 1,
        (_, "error") => 2,
        (FILE_TRANSFER, file::STAT | file::GET_FILE | file::PUT_FILE) => 3,
        (PORT_FORWARD, forward::NEW) => 4,
        _ => return None,
    })
}

/// A message in one binary frame, as a server sends it.
fn websocket_frame(message: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x82];
    match message.len() {
        length @ ..126 => frame.push(length as u8),
        length => {
            frame.push(126);
            frame.extend((length as u16).to_be_bytes());
        }
    }
    frame.extend(message);
    frame
}
