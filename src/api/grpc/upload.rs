//! An upload: a spec, then chunks, as they come.

use std::error::Error;

use futures::{StreamExt, TryStreamExt};
use tonic::{Code, Status, Streaming};

use super::{
    convert, read,
    status::{error, unreadable},
};
use crate::{
    access::{Account, Caller, Received},
    pb::{self, upload_file_request::Payload},
    service::{Service, ServiceError, files::Patience},
};

/// Takes a file. If the client breaks off, the upload is dropped here, and nothing is left of it.
pub(super) async fn upload(
    service: &Service,
    caller: &Caller,
    account: &Account,
    messages: Streaming<pb::UploadFileRequest>,
    received: Received,
) -> Result<pb::File, Status> {
    service.in_time(take_file(service, caller, account, messages, received)).await
}

async fn take_file(
    service: &Service,
    caller: &Caller,
    account: &Account,
    messages: Streaming<pb::UploadFileRequest>,
    received: Received,
) -> Result<pb::File, Status> {
    let mut messages = messages.map_err(broken_off).boxed();
    let mut patience = Patience::new(received.clone());
    let first = patience.next(|| false, &mut messages).await?;
    let Some(Payload::Spec(spec)) = first.and_then(|first| first.payload) else {
        return Err(ServiceError::field("spec", "must be in the first message").into());
    };
    let mut upload = service.begin_upload(caller, account, read::file(spec), received).await?;
    while !upload.is_settled() {
        let message = tokio::select! {
            biased;
            gives_way = upload.gives_way() => return Err(gives_way.into()),
            message = patience.next(|| service.is_crowded(), &mut messages) => message?,
        };
        let Some(message) = message else { break };
        upload.write(read::chunk(message)?).await?;
    }
    Ok(convert::file(upload.finish().await?))
}

fn broken_off(status: Status) -> Status {
    if status.source().is_some() {
        // The stream broke: nobody is there to read this, but it is no failure of the server.
        error(Code::Cancelled, "UPLOAD_BROKEN_OFF", "the upload broke off before its end")
    } else {
        unreadable(status)
    }
}
