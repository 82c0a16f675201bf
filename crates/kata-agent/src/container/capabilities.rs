//! Linux capabilities of a process (capabilities(7)): the five sets, and the order in which they can be given up.

use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};
use rustix::io;
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set, configure_capability_in_ambient_set,
    remove_capability_from_bounding_set, set_capabilities,
};
use serde::{Deserialize, Serialize};

use super::EngineError;

/// The five sets, one bit for each capability number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct CapabilityPlan {
    pub bounding: u64,
    pub effective: u64,
    pub inheritable: u64,
    pub permitted: u64,
    pub ambient: u64,
}

impl CapabilityPlan {
    /// No section in the spec means no capability at all.
    pub(super) fn of(asked: Option<&LinuxCapabilities>) -> Result<Self, EngineError> {
        let Some(asked) = asked else { return Ok(Self::default()) };
        let plan = Self {
            bounding: bits(asked.bounding().as_ref()),
            effective: bits(asked.effective().as_ref()),
            inheritable: bits(asked.inheritable().as_ref()),
            permitted: bits(asked.permitted().as_ref()),
            ambient: bits(asked.ambient().as_ref()),
        };
        if plan.effective & !plan.permitted != 0 {
            return Err(EngineError::invalid(
                "process.capabilities.effective",
                "has more than the permitted set",
            ));
        }
        if plan.ambient & !(plan.permitted & plan.inheritable) != 0 {
            return Err(EngineError::invalid(
                "process.capabilities.ambient",
                "has more than the permitted and inheritable sets",
            ));
        }
        Ok(plan)
    }

    /// Takes what is not asked for from the bounding set. Needs `CAP_SETPCAP`, so it goes before the others.
    pub(super) fn limit(&self) -> io::Result<()> {
        for number in 0..u64::BITS {
            let one = CapabilitySet::from_bits_retain(1 << number);
            if self.bounding & (1 << number) != 0 {
                continue;
            }
            match remove_capability_from_bounding_set(one) {
                // The kernel knows no capability of this number, nor of a higher one.
                Err(io::Errno::INVAL) => break,
                result => result?,
            }
        }
        Ok(())
    }

    /// Becomes as weak as the container's process when it acts, but able to get back what
    /// [`regain`](Self::regain) takes.
    pub(super) fn act_as(&self, permitted: CapabilitySet) -> io::Result<()> {
        let effective = CapabilitySet::from_bits_retain(self.effective) & permitted;
        set_capabilities(None, CapabilitySets { effective, permitted, inheritable: CapabilitySet::empty() })
    }

    /// Everything that is still permitted becomes effective.
    pub(super) fn regain(permitted: CapabilitySet) -> io::Result<()> {
        let inheritable = CapabilitySet::empty();
        set_capabilities(None, CapabilitySets { effective: permitted, permitted, inheritable })
    }

    /// The final sets; nothing comes back after this.
    pub(super) fn apply(&self) -> io::Result<()> {
        set_capabilities(
            None,
            CapabilitySets {
                effective: CapabilitySet::from_bits_retain(self.effective),
                permitted: CapabilitySet::from_bits_retain(self.permitted),
                inheritable: CapabilitySet::from_bits_retain(self.inheritable),
            },
        )?;
        clear_ambient_capability_set()?;
        for number in (0..u64::BITS).filter(|number| self.ambient & (1 << number) != 0) {
            configure_capability_in_ambient_set(CapabilitySet::from_bits_retain(1 << number), true)?;
        }
        Ok(())
    }
}

fn bits(set: Option<&Capabilities>) -> u64 {
    set.into_iter().flatten().fold(0, |bits, capability| bits | (1 << number(*capability)))
}

/// Numbers of `linux/capability.h`.
fn number(capability: Capability) -> u32 {
    match capability {
        Capability::Chown => 0,
        Capability::DacOverride => 1,
        Capability::DacReadSearch => 2,
        Capability::Fowner => 3,
        Capability::Fsetid => 4,
        Capability::Kill => 5,
        Capability::Setgid => 6,
        Capability::Setuid => 7,
        Capability::Setpcap => 8,
        Capability::LinuxImmutable => 9,
        Capability::NetBindService => 10,
        Capability::NetBroadcast => 11,
        Capability::NetAdmin => 12,
        Capability::NetRaw => 13,
        Capability::IpcLock => 14,
        Capability::IpcOwner => 15,
        Capability::SysModule => 16,
        Capability::SysRawio => 17,
        Capability::SysChroot => 18,
        Capability::SysPtrace => 19,
        Capability::SysPacct => 20,
        Capability::SysAdmin => 21,
        Capability::SysBoot => 22,
        Capability::SysNice => 23,
        Capability::SysResource => 24,
        Capability::SysTime => 25,
        Capability::SysTtyConfig => 26,
        Capability::Mknod => 27,
        Capability::Lease => 28,
        Capability::AuditWrite => 29,
        Capability::AuditControl => 30,
        Capability::Setfcap => 31,
        Capability::MacOverride => 32,
        Capability::MacAdmin => 33,
        Capability::Syslog => 34,
        Capability::WakeAlarm => 35,
        Capability::BlockSuspend => 36,
        Capability::AuditRead => 37,
        Capability::Perfmon => 38,
        Capability::Bpf => 39,
        Capability::CheckpointRestore => 40,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<CapabilityPlan, String> {
        let asked: LinuxCapabilities = serde_json::from_str(json).map_err(|error| error.to_string())?;
        CapabilityPlan::of(Some(&asked)).map_err(|error| error.to_string())
    }

    #[test]
    fn no_capability_section_means_none_at_all() {
        assert_eq!(CapabilityPlan::of(None).unwrap(), CapabilityPlan::default());
    }

    #[test]
    fn an_unknown_capability_name_is_refused_by_the_spec_parser() {
        assert!(parse(r#"{"bounding":["CAP_TIME_TRAVEL"]}"#).is_err());
    }

    #[test]
    fn numbers_are_the_kernels() {
        let plan = parse(r#"{"bounding":["CAP_CHOWN","CAP_SYS_ADMIN","CAP_CHECKPOINT_RESTORE"]}"#).unwrap();
        assert_eq!(plan.bounding, 1 | 1 << 21 | 1 << 40);
    }

    #[test]
    fn ambient_beyond_inheritable_is_refused_instead_of_dropped() {
        let json = r#"{"permitted":["CAP_KILL"],"ambient":["CAP_KILL"]}"#;
        assert!(parse(json).unwrap_err().contains("ambient"));
    }

    #[test]
    fn effective_beyond_permitted_is_refused() {
        assert!(parse(r#"{"effective":["CAP_KILL"]}"#).unwrap_err().contains("effective"));
    }
}
