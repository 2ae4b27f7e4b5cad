//! Any RPC, by its descriptor, with messages as bytes.

use std::time::Duration;

use bytes::{Buf, BufMut};
use prost_reflect::MethodDescriptor;
use tokio::time::timeout;
use tonic::{
    Request, Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::Channel,
};

/// The HTTP path of a method.
pub fn path_of(method: &MethodDescriptor) -> http::uri::PathAndQuery {
    format!("/{}/{}", method.parent_service().full_name(), method.name()).parse().unwrap()
}

/// Calls with a token, if there is one, and takes the first answers.
pub async fn call(
    channel: Channel,
    method: &MethodDescriptor,
    token: Option<&str>,
    messages: Vec<Vec<u8>>,
) -> Result<Vec<Vec<u8>>, Status> {
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.map_err(|error| Status::internal(error.to_string()))?;
    let (path, mut request) = (path_of(method), Request::new(futures::stream::iter(messages)));
    if let Some(token) = token {
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    }
    if !method.is_server_streaming() {
        return Ok(vec![grpc.client_streaming(request, path, Raw).await?.into_inner()]);
    }
    let mut answers = grpc.streaming(request, path, Raw).await?.into_inner();
    let mut taken = Vec::new();
    // A watch goes on for ever: what comes at once is enough.
    while taken.len() < 3 {
        match timeout(Duration::from_millis(300), answers.message()).await {
            Ok(answer) => match answer? {
                Some(answer) => taken.push(answer),
                None => break,
            },
            Err(_) => break,
        }
    }
    Ok(taken)
}

/// Messages as they are on the wire.
#[derive(Clone, Copy)]
pub struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let mut message = vec![0; from.remaining()];
        from.copy_to_slice(&mut message);
        Ok(Some(message))
    }
}
