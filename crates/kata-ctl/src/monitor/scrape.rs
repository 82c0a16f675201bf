//! `/metrics`: the figures of all pods, put together.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kata_api::metrics::{Durations, Exposition, Families, Kind, process};
use tokio::task::JoinSet;

use super::sandboxes::Sandbox;
use crate::failure::chain;
use crate::pod::management::ask;

/// Bound on one pod's answer. The owner itself gives a guest two seconds; scrapers give us ten.
pub const BOUND: Duration = Duration::from_secs(5);
/// Most of one pod's text that is taken.
const TEXT_MAX: usize = 4 << 20;

/// Scrapes, and counts that.
#[derive(Default)]
pub struct Scraper {
    scrapes: AtomicU64,
    failures: AtomicU64,
    took: Durations,
}

impl Scraper {
    /// The figures of this monitor and of `sandboxes`, of families whose names begin with one of `prefixes`, or all. A pod
    /// that does not answer in time is counted, and missing.
    pub async fn scrape(&self, sandboxes: &[Sandbox], prefixes: &[String]) -> String {
        let start = Instant::now();
        self.scrapes.fetch_add(1, Ordering::Relaxed);
        let wanted =
            |name: &str| prefixes.is_empty() || prefixes.iter().any(|prefix| name.starts_with(prefix));
        let mut asked: JoinSet<Option<(Sandbox, String)>> =
            sandboxes.iter().filter(|sandbox| sandbox.alive).cloned().map(figures).collect();
        let mut texts = Vec::new();
        while let Some(answer) = asked.join_next().await {
            match answer {
                Ok(Some(answer)) => texts.push(answer),
                Ok(None) | Err(_) => drop(self.failures.fetch_add(1, Ordering::Relaxed)),
            }
        }
        // By name, for a text that differs as little as the figures do.
        texts.sort_by(|(one, _), (two, _)| one.id.cmp(&two.id));
        let mut families = Families::default();
        for (sandbox, text) in &texts {
            let cri = &sandbox.cri;
            let labels = [
                ("cri_name", cri.cri_name.as_str()),
                ("cri_namespace", cri.cri_namespace.as_str()),
                ("cri_uid", cri.cri_uid.as_str()),
                ("sandbox_id", sandbox.id.as_str()),
            ];
            families.read(text, &labels, wanted);
        }
        self.took.record("", start.elapsed());
        let mut own = Families::default();
        own.read(&self.own(texts.len()), &[], wanted);
        let mut out = Exposition::default();
        own.write(&mut out);
        families.write(&mut out);
        out.into_text()
    }

    /// The families of this process.
    fn own(&self, running: usize) -> String {
        let mut out = Exposition::default();
        let help = "Owners of pods that answered the last scrape.";
        out.family("kata_monitor_running_shim_count", Kind::Gauge, help).sample(&[], running);
        let help = "Times that this monitor was asked for its figures.";
        let scrapes = self.scrapes.load(Ordering::Relaxed);
        out.family("kata_monitor_scrape_count", Kind::Counter, help).sample(&[], scrapes);
        let help = "Pods that did not answer a scrape in time.";
        let failures = self.failures.load(Ordering::Relaxed);
        out.family("kata_monitor_scrape_failed_count", Kind::Counter, help).sample(&[], failures);
        let help = "How long it took to ask all pods.";
        self.took.write(&mut out, "kata_monitor_scrape_durations_histogram_milliseconds", help, "");
        process(&mut out, "kata_monitor", "this monitor", &["/proc/self"]);
        out.into_text()
    }
}

async fn figures(sandbox: Sandbox) -> Option<(Sandbox, String)> {
    match ask(&sandbox.run_dir, ("GET", "/metrics"), Vec::new(), BOUND).await {
        Ok(text) if text.len() <= TEXT_MAX => {
            let text = String::from_utf8_lossy(&text).into_owned();
            Some((sandbox, text))
        }
        Ok(text) => {
            tracing::warn!(sandbox = sandbox.id, bytes = text.len(), "a pod tells too much: left out");
            None
        }
        Err(error) => {
            tracing::warn!(sandbox = sandbox.id, error = chain(&error), "a pod is left out");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;

    use super::super::sandboxes::Cri;
    use super::*;
    use crate::pod::management::MONITOR_SOCKET;
    use crate::start::Start;

    fn sandbox(dir: &Path, id: &str) -> Sandbox {
        let run_dir = dir.join(id);
        std::fs::create_dir_all(&run_dir).unwrap();
        Sandbox {
            id: id.to_owned(),
            state: "running".to_owned(),
            owner_pid: 1,
            containers: Vec::new(),
            cri: Cri { cri_name: format!("name-{id}"), ..Cri::default() },
            start: Start::default(),
            run_dir,
            alive: true,
        }
    }

    fn listener(sandbox: &Sandbox) -> UnixListener {
        UnixListener::bind(sandbox.run_dir.join(MONITOR_SOCKET)).unwrap()
    }

    fn answering(sandbox: &Sandbox, body: &'static str) {
        let listener = listener(sandbox);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let _ = stream.read(&mut [0; 1024]).await;
                let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
                let _ = stream.write_all((head + body).as_bytes()).await;
            }
        });
    }

    #[tokio::test(start_paused = true)]
    async fn pods_that_hang_or_are_gone_are_counted_and_hold_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let good = sandbox(dir.path(), "good");
        answering(&good, "# HELP kata_shim_fds Open.\n# TYPE kata_shim_fds gauge\nkata_shim_fds 7\n");
        let (hung, gone) = (sandbox(dir.path(), "hung"), sandbox(dir.path(), "gone"));
        let _held = listener(&hung);
        let scraper = Scraper::default();
        let begin = tokio::time::Instant::now();
        let text = scraper.scrape(&[good.clone(), hung, gone], &[]).await;
        assert!(begin.elapsed() <= BOUND + Duration::from_millis(100), "{:?}", begin.elapsed());
        // The parser wants counters to be called `_total`, which the format does not, and upstream's are not.
        let as_gauges = text.replace("_count counter\n", "_count gauge\n");
        let exposition = openmetrics_parser::prometheus::parse_prometheus(&as_gauges).unwrap();
        assert!(exposition.families.contains_key("kata_monitor_scrape_durations_histogram_milliseconds"));
        for line in [
            "kata_shim_fds{cri_name=\"name-good\",cri_namespace=\"\",cri_uid=\"\",sandbox_id=\"good\"} 7",
            "kata_monitor_running_shim_count 1",
            "kata_monitor_scrape_count 1",
            "kata_monitor_scrape_failed_count 2",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        let text = scraper.scrape(&[good], &["kata_shim".to_owned()]).await;
        assert!(text.contains("kata_shim_fds{") && !text.contains("kata_monitor"), "{text}");
    }
}
