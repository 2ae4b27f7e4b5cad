//! Compiles `proto/` with protox, a protobuf compiler in Rust: no `protoc` to install.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

const PROTOS: [&str; 3] =
    ["tidemill/v1/batch.proto", "tidemill/v1/worker_admin.proto", "tidemill/v1/webhook_admin.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(PROTOS, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".tidemill.v1").btree_map(".tidemill.v1").compile_fds(descriptors)?;
    Ok(())
}
