//! Devices of the host, as commands name them.

use kata_vmm_api::HostDeviceSpec;

use super::{Descriptors, MachineError};
use crate::dma::Dma;
use crate::kvm::Hypervisor;
use crate::pci::passed::Lent;

/// What takes devices of the host for one machine.
#[cfg(feature = "vfio")]
pub(super) struct Passing(crate::vfio::Lender);

#[cfg(feature = "vfio")]
impl Passing {
    pub(super) fn new(hypervisor: &Hypervisor, dma: Dma) -> Passing {
        Passing(crate::vfio::Lender::new(dma, hypervisor.lending()))
    }

    /// Takes one, with the descriptors that the command names.
    pub(super) fn take(
        &self,
        spec: &HostDeviceSpec,
        files: &mut Descriptors,
    ) -> Result<Box<dyn Lent>, MachineError> {
        let offer = crate::vfio::Offer {
            container: files.take(spec.container)?,
            group: files.take(spec.group)?,
            number: spec.group_number,
            name: spec.address.clone(),
        };
        let failed = |source: crate::vfio::VfioError| MachineError::Device {
            id: spec.id.clone(),
            source: source.into(),
        };
        self.0.take(offer).map_err(failed)
    }
}

/// This build takes none.
#[cfg(not(feature = "vfio"))]
pub(super) struct Passing;

#[cfg(not(feature = "vfio"))]
impl Passing {
    pub(super) fn new(_: &Hypervisor, _: Dma) -> Passing {
        Passing
    }

    pub(super) fn take(
        &self,
        _: &HostDeviceSpec,
        _: &mut Descriptors,
    ) -> Result<Box<dyn Lent>, MachineError> {
        Err(MachineError::Unsupported { what: "a device of the host, without the feature vfio," })
    }
}
