//! `exec`

mod vm;

use std::path::Path;

use kata_oci::{RootStack, User};

use super::{Outcome, exit_code};
use crate::bundle;
use crate::cli::ExecArgs;
use crate::failure::Failure;
use crate::pod::{
    self, Client, PodDir, RawTerminal, Session, Signals, StreamPaths, Streams, Wanted, is_terminal,
    random_name, terminal_size,
};

/// Runs the command in the pod's container, as its main process is run but for what the flags change.
pub async fn run(args: &ExecArgs) -> Outcome {
    if args.vm {
        return vm::run(&args.name, &args.command).await;
    }
    let raw = args.tty && args.interactive;
    if raw && !is_terminal() {
        return Err(Failure::text("-i with -t needs a terminal at the standard input"));
    }
    let pod = PodDir::alive(&args.name)?;
    let mut signals = Signals::catch()?;
    let client = Client::connect(&pod).await?;
    let container = pod::choose(&client, &client.inspect().await?, args.container.as_deref()).await?;
    let process = process(args, &client.bundle(&container).await?)?;
    let id = random_name()?;
    let wanted = Wanted { stdin: args.interactive, stderr: !args.tty };
    let streams = Streams::make(&pod.io(), &format!("{id}-"), wanted)?;
    // What a machine that hangs never answers, the user may want to leave.
    let exec = tokio::select! {
        begun = begin(&client, &container, &id, &process, &streams) => begun.map_err(pod::CallError::into_start_failure)?,
        signal = signals.ending() => return Err(Failure::silent(exit_code(128 + signal))),
    };
    let terminal = if raw { Some(RawTerminal::enter()?) } else { None };
    let code = Session::attach(exec.clone(), streams, terminal).run(&mut signals).await?;
    if let Err(error) = exec.delete().await {
        // The pod may have ended with it.
        tracing::debug!("the exec was not deleted: {error}");
    }
    Ok(exit_code(code))
}

/// Registers and starts a process.
///
/// # Errors
/// What the pod says; nothing of it is left then.
pub(super) async fn begin(
    client: &Client,
    container: &str,
    id: &str,
    process: &oci_spec::runtime::Process,
    streams: &Streams,
) -> Result<pod::Process, pod::CallError> {
    let exec = client.exec(container, id, process, &StreamPaths::of(streams)).await?;
    if let Err(error) = exec.start().await {
        // It is over, and its entry with the pod serves nobody.
        if let Err(error) = exec.delete().await {
            tracing::debug!("the exec was not deleted: {error}");
        }
        return Err(error);
    }
    Ok(exec)
}

fn process(args: &ExecArgs, bundle_dir: &Path) -> Result<oci_spec::runtime::Process, Failure> {
    let mut process = bundle::process_of(bundle_dir)?;
    process.set_args(Some(args.command.clone())).set_terminal(Some(args.tty));
    process.set_console_size(if args.tty { console_size() } else { None });
    let mut env = process.env().clone().unwrap_or_default();
    if args.tty && !env.iter().any(|entry| entry.starts_with("TERM=")) {
        env.push(format!("TERM={}", std::env::var("TERM").unwrap_or_else(|_| "xterm".to_owned())));
    }
    bundle::extend_env(&mut env, &args.env)?;
    process.set_env(Some(env));
    if let Some(workdir) = &args.workdir {
        process.set_cwd(bundle::absolute(workdir)?.into());
    }
    if let Some(user) = &args.user {
        let user = User::resolve(user, &RootStack::load(bundle_dir)?)?;
        let mut runtime_user = oci_spec::runtime::User::default();
        runtime_user.set_uid(user.uid).set_gid(user.gid).set_additional_gids(Some(user.groups));
        process.set_user(runtime_user);
    }
    Ok(process)
}

fn console_size() -> Option<oci_spec::runtime::Box> {
    let (columns, rows) = terminal_size()?;
    let size = oci_spec::runtime::BoxBuilder::default().height(u64::from(rows)).width(u64::from(columns));
    // It wants both, and has both.
    size.build().ok()
}
