//! Standard streams by request, for peers that have no stream connections.

use kata_api::agent::{ReadStreamRequest, TtyWinResizeRequest, WriteStreamRequest};

use super::agent::Agent;
use super::error::RpcError;
use crate::stdio::StdioError;

/// A frame of the protocol holds no more than 4 MiB.
const READ_AT_MOST: usize = 1 << 20;

/// Writes all of the request's data.
///
/// # Errors
/// Unknown process, no such stream, nobody reads.
pub async fn write(agent: &Agent, request: &WriteStreamRequest) -> Result<u32, RpcError> {
    let process = agent.process(&request.container_id, &request.exec_id)?;
    process.stdio.write_stdin(&request.data).await?;
    u32::try_from(request.data.len()).map_err(|_| RpcError::Invalid("more than 4 GiB at once".to_owned()))
}

/// Reads what there is, waiting for the first byte.
///
/// # Errors
/// Unknown process, no such stream; at the end, [`StdioError::End`].
pub async fn read(agent: &Agent, request: &ReadStreamRequest, stderr: bool) -> Result<Vec<u8>, RpcError> {
    let process = agent.process(&request.container_id, &request.exec_id)?;
    let length = usize::try_from(request.len).unwrap_or(READ_AT_MOST).clamp(1, READ_AT_MOST);
    let stdio = &process.stdio;
    let read = if stderr { stdio.read_stderr(length).await } else { stdio.read_stdout(length).await };
    Ok(read?)
}

/// Sets the size of the terminal.
///
/// # Errors
/// Unknown process, no terminal, a size beyond what terminals have.
pub fn resize(agent: &Agent, request: &TtyWinResizeRequest) -> Result<(), RpcError> {
    let process = agent.process(&request.container_id, &request.exec_id)?;
    let small = |cells: u32| {
        u16::try_from(cells).map_err(|_| RpcError::Invalid(format!("a terminal of {cells} rows or columns")))
    };
    process
        .stdio
        .resize(small(request.row)?, small(request.column)?)
        .map_err(|error: StdioError| error.into())
}
