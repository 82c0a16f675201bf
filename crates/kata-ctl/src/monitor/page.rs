//! The status page: one HTML document without script, served whole.

use std::fmt::Write as _;
use std::time::{Duration, UNIX_EPOCH};

use super::sandboxes::Sandbox;
use crate::start::waterfall::{self, escaped};
use crate::start::{LAYERS, Start, ms, shares};

/// Pods whose pictures are open from the start.
const OPEN: usize = 4;

/// The page for these pods and the starts of pods that have ended.
pub fn render(sandboxes: &[Sandbox], ended: &[Start]) -> String {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let host = escaped(&host);
    let mut main = String::new();
    // Writing to a String never fails, here and below.
    let _ = write!(main, "<h1>Pods on {host}</h1>{}", tiles(sandboxes));
    if sandboxes.is_empty() {
        main.push_str("<p class=\"empty\">No pod is here now. One is made by <code>kata-ctl run IMAGE</code>, or by containerd.</p>");
    } else {
        let _ = write!(main, "{}{}", legend(), table(sandboxes));
        main.push_str("<h2>How they started</h2>");
        for (position, sandbox) in sandboxes.iter().enumerate() {
            main.push_str(&picture(&sandbox.start, position < OPEN));
        }
    }
    if !ended.is_empty() {
        main.push_str("<h2>Starts of pods that have ended</h2>");
        if sandboxes.is_empty() {
            main.push_str(&legend());
        }
        ended.iter().for_each(|start| main.push_str(&picture(start, false)));
    }
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Pods on {host}</title>\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><meta name=\"color-scheme\" content=\"light dark\">\
         <style>{STYLE}{}</style></head>\n<body><main>{main}</main>\n<footer><nav aria-label=\"Other paths\">\
         <a href=\"/metrics\">metrics</a> · <a href=\"/sandboxes\">sandboxes</a> · <a href=\"/api/sandboxes\">JSON</a></nav>\
         <p>kata-ctl {} · reload for news</p></footer></body></html>\n",
        waterfall::style(),
        env!("CARGO_PKG_VERSION"),
    )
}

fn tiles(sandboxes: &[Sandbox]) -> String {
    let of = |states: &[&str]| sandboxes.iter().filter(|it| states.contains(&it.state.as_str())).count();
    let mut starts: Vec<u64> = sandboxes.iter().map(|it| it.start.total_us()).filter(|us| *us > 0).collect();
    starts.sort_unstable();
    let median = starts.get(starts.len() / 2).map_or_else(|| "–".to_owned(), |us| format!("{} ms", ms(*us)));
    let failed = sandboxes.iter().filter(|it| it.state == "dead" || it.start.fault.is_some()).count();
    let tile = |value: &str, of: &str| format!("<li><b>{value}</b>{of}</li>");
    format!(
        "<ul class=\"tiles\">{}{}{}{}</ul>",
        tile(&sandboxes.len().to_string(), if sandboxes.len() == 1 { "pod" } else { "pods" }),
        tile(&of(&["running", "ready"]).to_string(), "running"),
        tile(&failed.to_string(), "failed"),
        tile(&median, "median start"),
    )
}

fn legend() -> String {
    let mut list = String::from("<ul class=\"legend\" aria-label=\"Layers of a start\">");
    for (layer, about) in LAYERS {
        let _ = write!(list, "<li>{}<span title=\"{about}\">{layer}</span></li>", swatch(layer));
    }
    let _ = write!(list, "<li>{}<span>between stages</span></li>", swatch("other"));
    list + "</ul>"
}

fn swatch(class: &str) -> String {
    format!(
        "<svg class=\"kw swatch\" viewBox=\"0 0 9 9\" aria-hidden=\"true\"><rect class=\"{class}\" width=\"9\" height=\"9\" rx=\"2\"/></svg>"
    )
}

fn table(sandboxes: &[Sandbox]) -> String {
    let mut rows = String::new();
    for sandbox in sandboxes {
        let start = &sandbox.start;
        let kubernetes = match (sandbox.cri.cri_namespace.as_str(), sandbox.cri.cri_name.as_str()) {
            ("", "") => String::new(),
            (namespace, name) => format!("<small>{}/{}</small>", escaped(namespace), escaped(name)),
        };
        let fault = start.fault.as_ref().map(|fault| format!("<small>{}</small>", escaped(fault)));
        let _ = write!(
            rows,
            "<tr><th scope=\"row\">{}{kubernetes}</th><td><span class=\"state {}\">{}</span>{}</td><td>{}</td><td>{}</td>\
             <td>{}</td><td class=\"n\">{}</td><td>{}</td></tr>",
            escaped(&sandbox.id),
            escaped(&sandbox.state),
            escaped(&sandbox.state),
            fault.unwrap_or_default(),
            containers(sandbox),
            escaped(&start.machine()),
            created(start),
            ms(start.total_us()),
            strip(start),
        );
    }
    format!(
        "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"Pods\"><table><thead><tr><th scope=\"col\">Pod</th>\
         <th scope=\"col\">State</th><th scope=\"col\">Containers</th><th scope=\"col\">Machine</th><th scope=\"col\">Created</th>\
         <th scope=\"col\" class=\"n\">Start (ms)</th><th scope=\"col\">Spent in</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )
}

fn containers(sandbox: &Sandbox) -> String {
    let told = sandbox.containers.iter().map(|container| {
        let command: String = container.args.join(" ").chars().take(60).collect();
        let state = match container.exit_code {
            Some(code) if container.state == "stopped" => format!(" <small>exited ({code})</small>"),
            _ if container.state == "running" => String::new(),
            _ => format!(" <small>{}</small>", escaped(&container.state)),
        };
        format!("<div><code>{}</code>{state}</div>", escaped(&command))
    });
    told.collect()
}

/// When the pod was made; nothing for what the calendar does not have.
fn created(start: &Start) -> String {
    const YEAR_9999_MS: u64 = 253_370_764_800_000;
    if !(1..YEAR_9999_MS).contains(&start.created_at_ms) {
        return String::new();
    }
    let time = UNIX_EPOCH + Duration::from_secs(start.created_at_ms / 1000);
    let stamp = humantime::format_rfc3339_seconds(time).to_string();
    format!("<time datetime=\"{stamp}\">{}</time>", stamp.replace('T', " ").replace('Z', " UTC"))
}

/// The layers' shares side by side.
fn strip(start: &Start) -> String {
    let total = start.total_us().max(1);
    let (mut bars, mut words, mut x) = (String::new(), Vec::new(), 0.0);
    for share in shares(start).iter().filter(|share| share.own_us > 0) {
        #[allow(clippy::cast_precision_loss, reason = "a picture has a thousand points")]
        let width = 160.0 * (share.own_us as f64 / total as f64);
        let _ = write!(
            bars,
            "<rect class=\"{}\" x=\"{x:.1}\" y=\"0\" width=\"{width:.1}\" height=\"12\"/>",
            share.layer
        );
        words.push(format!("{} {} ms", share.layer, ms(share.own_us)));
        x += width;
    }
    let words = words.join(", ");
    format!(
        "<svg class=\"kw strip\" viewBox=\"0 0 160 12\" role=\"img\" aria-label=\"{words}\"><title>{words}</title>{bars}</svg>"
    )
}

fn picture(start: &Start, open: bool) -> String {
    if start.timeline.is_empty() {
        return String::new();
    }
    format!(
        "<details{}><summary><b>{}</b> <span>{} ms · {} · {}</span></summary>{}<div class=\"scroll\" tabindex=\"0\" role=\"region\" \
         aria-label=\"Waterfall of {}\">{}</div></details>",
        if open { " open" } else { "" },
        escaped(&start.id),
        ms(start.total_us()),
        escaped(&start.machine()),
        created(start),
        start.fault.as_ref().map(|fault| format!("<p>{}</p>", escaped(fault))).unwrap_or_default(),
        escaped(&start.id),
        waterfall::inline(start)
    )
}

const STYLE: &str = "
:root{--ink:#1f2328;--dim:#59636e;--line:#d8dee4;--paper:#fff;--card:#f6f8fa;--link:#0b5cad;--good:#13795b;--bad:#b42318;--warn:#8a6100}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--dim:#9aa4af;--line:#30363d;--paper:#0d1117;--card:#161b22;--link:#6cb2ff;--good:#47c496;--bad:#ff8b80;--warn:#e8c15c}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,'DejaVu Sans',sans-serif}
main,footer{max-width:1080px;margin:0 auto;padding:0 20px}h1{font-size:24px;margin:28px 0 16px}h2{font-size:17px;margin:32px 0 10px}
small{display:block;color:var(--dim);font-size:13px}code{font:13px ui-monospace,'DejaVu Sans Mono',monospace}a{color:var(--link)}
.tiles{display:flex;flex-wrap:wrap;gap:12px;list-style:none;margin:0 0 18px;padding:0}
.tiles li{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 16px;min-width:130px;color:var(--dim)}
.tiles b{display:block;font-size:22px;line-height:1.3;color:var(--ink);font-variant-numeric:tabular-nums}
.legend{display:flex;flex-wrap:wrap;gap:16px;list-style:none;margin:0 0 10px;padding:0;color:var(--dim);font-size:13px}
.legend li{display:flex;align-items:center;gap:6px}.swatch{width:11px;height:11px}
.scroll{overflow-x:auto}.scroll:focus-visible,summary:focus-visible,a:focus-visible{outline:2px solid var(--link);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:14px}th,td{text-align:left;vertical-align:top;padding:9px 14px 9px 0;border-bottom:1px solid var(--line)}
thead th{color:var(--dim);font-weight:500;font-size:13px;white-space:nowrap}tbody th{font-weight:600;overflow-wrap:anywhere;min-width:120px}
.n{text-align:right;font-variant-numeric:tabular-nums}time{white-space:nowrap}td small{display:inline}
.state{color:var(--warn);white-space:nowrap}.state::before{content:'';display:inline-block;width:8px;height:8px;border-radius:50%;background:currentColor;margin-right:6px}
.state.running,.state.ready{color:var(--good)}.state.dead{color:var(--bad)}.state.stopped{color:var(--dim)}
.strip{width:160px;height:12px;display:block;margin-top:5px;border-radius:3px;overflow:hidden}
details{border:1px solid var(--line);border-radius:8px;margin:0 0 12px;overflow:hidden}summary{cursor:pointer;padding:10px 14px;background:var(--card)}
summary span{color:var(--dim);margin-left:8px}details p{margin:10px 14px;color:var(--bad)}details svg.kw{display:block;min-width:760px;width:100%;height:auto}
.empty{color:var(--dim)}footer{color:var(--dim);font-size:13px;margin-top:36px;padding-bottom:28px;display:flex;justify-content:space-between;flex-wrap:wrap}footer p{margin:0}
";

#[cfg(test)]
mod tests {
    use super::super::sandboxes::{Container, Cri};
    use super::*;
    use crate::start::samples;

    fn sandbox(id: &str) -> Sandbox {
        Sandbox {
            id: id.to_owned(),
            state: "running".to_owned(),
            owner_pid: 1,
            containers: vec![Container {
                id: id.to_owned(),
                state: "running".to_owned(),
                args: vec!["<sleep>".to_owned()],
                exit_code: None,
            }],
            cri: Cri::default(),
            start: samples::start(id),
            run_dir: "/".into(),
            alive: true,
        }
    }

    #[test]
    fn the_page_has_each_pod_with_its_waterfall_and_nothing_of_elsewhere() {
        let page = render(&[sandbox("web"), sandbox("db")], &[samples::start("old")]);
        assert_eq!(page.matches("<details").count(), 3);
        assert!(page.contains("Start of pod web: 1000.0 ms") && page.contains("Start of pod old"));
        assert!(page.contains("&lt;sleep&gt;") && !page.contains("<sleep>"));
        for outside in ["http:", "https:", "<script", "<link", "@import", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
    }

    #[test]
    fn a_host_without_pods_says_how_to_get_one() {
        let page = render(&[], &[]);
        assert!(page.contains("kata-ctl run IMAGE"), "{page}");
    }

    #[test]
    fn a_time_out_of_this_world_is_left_out() {
        let start = Start { created_at_ms: u64::MAX, ..samples::start("web") };
        assert!(picture(&start, true).contains("web"));
    }
}
