//! The state in which QEMU and KVM start a processor: the page that the hardware keeps it in (AMD64 Architecture Programmer's Manual,
//! volume 2, table B-4), and what QEMU's models of processors call themselves.

use super::PAGE;

/// Where the first processor starts.
pub(super) const FIRST: u32 = 0xffff_fff0;

/// A model of processor, as QEMU names it.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    /// QEMU's name.
    pub name: &'static str,
    family: u32,
    model: u32,
    stepping: u32,
}

const fn model(name: &'static str, family: u32, model: u32, stepping: u32) -> Model {
    Model { name, family, model, stepping }
}

/// Those that have SEV-SNP, and the one that guests get: without a version it is the first.
pub const MODELS: [Model; 12] = [
    model("EPYC-v4", 23, 1, 2),
    model("EPYC", 23, 1, 2),
    model("EPYC-v1", 23, 1, 2),
    model("EPYC-v2", 23, 1, 2),
    model("EPYC-v3", 23, 1, 2),
    model("EPYC-Rome", 23, 49, 0),
    model("EPYC-Milan", 25, 1, 1),
    model("EPYC-Milan-v1", 25, 1, 1),
    model("EPYC-Milan-v2", 25, 1, 1),
    model("EPYC-Genoa", 25, 17, 0),
    model("EPYC-Genoa-v1", 25, 17, 0),
    model("EPYC-Turin", 26, 0, 0),
];

impl Model {
    /// The one of this name.
    pub fn named(name: &str) -> Option<Self> {
        MODELS.into_iter().find(|model| model.name == name)
    }

    /// What the processor says of itself (CPUID Fn0000_0001 EAX, AMD's CPUID Specification): families from 15 on are 15 and the
    /// rest.
    pub fn signature(self) -> u32 {
        let (base, extended) = if self.family > 15 { (15, self.family - 15) } else { (self.family, 0) };
        extended << 20
            | (self.model >> 4 & 15) << 16
            | base << 8
            | (self.model & 15) << 4
            | (self.stepping & 15)
    }
}

/// The page of a processor that starts at `start`.
pub(super) fn state(start: u32, signature: u32) -> Vec<u8> {
    let mut page = vec![0; PAGE];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = page.get_mut(at..).and_then(|rest| rest.get_mut(..bytes.len())) {
            place.copy_from_slice(bytes);
        }
    };
    // Selector, attributes, limit, base: es, cs, ss, ds, fs, gs, gdtr, ldtr, idtr, tr.
    let code = u64::from(start & 0xffff_0000);
    let segments: [(u16, u16, u64); 10] = [
        (0, 0x93, 0),
        (0xf000, 0x9b, code),
        (0, 0x93, 0),
        (0, 0x93, 0),
        (0, 0x93, 0),
        (0, 0x93, 0),
        (0, 0, 0),
        (0, 0x82, 0),
        (0, 0, 0),
        (0, 0x8b, 0),
    ];
    for (number, (selector, attributes, base)) in segments.into_iter().enumerate() {
        let at = number * 16;
        put(at, &selector.to_le_bytes());
        put(at + 2, &attributes.to_le_bytes());
        put(at + 4, &0xffff_u32.to_le_bytes());
        put(at + 8, &base.to_le_bytes());
    }
    let registers: [(usize, u64); 11] = [
        // EFER: KVM sets SVME. CR4: KVM sets MCE.
        (0xd0, 0x1000),
        (0x148, 0x40),
        (0x158, 0x10),
        (0x160, 0x400),
        (0x168, 0xffff_0ff0),
        (0x170, 2),
        (0x178, u64::from(start & 0xffff)),
        // The page attribute table after a reset.
        (0x268, 0x0007_0406_0007_0406),
        (0x310, u64::from(signature)),
        // SEV features: SEV-SNP, and none of the others.
        (0x3b0, 1),
        (0x3e8, 1),
    ];
    for (at, value) in registers {
        put(at, &value.to_le_bytes());
    }
    // MXCSR, and the control word of the x87.
    put(0x408, &0x1f80_u32.to_le_bytes());
    put(0x410, &0x37f_u16.to_le_bytes());
    page
}
