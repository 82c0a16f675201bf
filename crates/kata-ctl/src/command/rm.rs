//! `rm`

use super::Outcome;
use crate::cli::RmArgs;
use crate::failure::{Failure, NO_SUCH, chain};
use crate::pod::{Client, PodDir, PodState, delete};

/// Removes each pod; one that cannot be removed does not keep the others.
pub async fn run(args: &RmArgs) -> Outcome {
    let mut code = 0;
    for name in &args.names {
        match remove(name, args.force).await {
            Ok(()) => println!("{name}"),
            Err(failure) => {
                let unknown = failure.error.as_ref().is_some_and(|error| crate::pod::is_unknown(&**error));
                code = code.max(if unknown { NO_SUCH } else { 1 });
                if let Some(error) = failure.error {
                    eprintln!("kata-ctl: {}", chain(&*error));
                }
            }
        }
    }
    Ok(code)
}

async fn remove(name: &str, force: bool) -> Result<(), Failure> {
    let pod = PodDir::existing(name)?;
    if !force && is_alive(&pod).await {
        return Err(Failure::text(format!(
            "pod {name} is running: end it with `kata-ctl kill {name}`, or remove it with -f"
        )));
    }
    Ok(delete(name).await?)
}

/// A pod whose state cannot be read is alive if somebody serves it.
async fn is_alive(pod: &PodDir) -> bool {
    match PodState::load(&pod.run_dir) {
        Ok(Some(state)) => !state.is_stopped() && state.owner_lives(),
        Ok(None) | Err(_) => Client::connect(pod).await.is_ok(),
    }
}
