//! Where in a report things are: AMD 56860, "ATTESTATION_REPORT Structure"; Intel's "TDX DCAP Quoting Library API", quotes of
//! version 4 and 5.

use std::ops::Range;

use crate::Hardware;

/// What of a report can be compared with what one knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fields<'a> {
    /// What whoever asked wanted to be in it.
    pub report_data: &'a [u8],
    /// SEV-SNP's launch digest, TDX's MRTD.
    pub measurement: &'a [u8],
    /// SEV-SNP's `HOST_DATA`, TDX's `MRCONFIGID`: what binds the initdata.
    pub host_data: &'a [u8],
}

struct Places {
    report_data: Range<usize>,
    measurement: Range<usize>,
    host_data: Range<usize>,
}

const SNP: Places = Places { report_data: 0x50..0x90, measurement: 0x90..0xc0, host_data: 0xc0..0xe0 };
/// From the body of the quote on, which is behind its header and, since version 5, its own type and size.
const TDX: Places = Places { report_data: 520..584, measurement: 136..184, host_data: 184..232 };
const TDX_HEADER: usize = 48;
const TDX_BODY_HEAD: usize = 6;

impl<'a> Fields<'a> {
    /// The fields of the report that a provider of this name has made; none where it is not known, or the report is too short.
    pub fn of(provider: &str, report: &'a [u8]) -> Option<Self> {
        let hardware = Hardware::ALL.into_iter().find(|it| it.provider() == provider)?;
        let (places, body) = match hardware {
            Hardware::Snp => (SNP, report),
            Hardware::Tdx => {
                let head = match report.first_chunk()? {
                    [4, 0] => TDX_HEADER,
                    [5, 0] => TDX_HEADER + TDX_BODY_HEAD,
                    _ => return None,
                };
                (TDX, report.get(head..)?)
            }
        };
        Some(Self {
            report_data: body.get(places.report_data)?,
            measurement: body.get(places.measurement)?,
            host_data: body.get(places.host_data)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that tell where they are from.
    fn report(head: &[u8]) -> Vec<u8> {
        let mut report: Vec<u8> = (0..1200_u32).map(|at| u8::try_from(at / 8).unwrap()).collect();
        report[..head.len()].copy_from_slice(head);
        report
    }

    #[test]
    fn fields_are_where_the_makers_of_the_hardware_say() {
        let (snp, old, new) = (report(&[3, 0]), report(&[4, 0]), report(&[5, 0]));
        let all = [
            (Fields::of("sev_guest", &snp).unwrap(), [0x50, 0x90, 0xc0], [64, 48, 32]),
            (Fields::of("tdx_guest", &old).unwrap(), [568, 184, 232], [64, 48, 48]),
            (Fields::of("tdx_guest", &new).unwrap(), [574, 190, 238], [64, 48, 48]),
        ];
        for (found, begins, sizes) in all {
            let fields = [found.report_data, found.measurement, found.host_data];
            assert_eq!(fields.map(<[u8]>::len), sizes);
            assert_eq!(fields.map(|field| usize::from(field[0])), begins.map(|at| at / 8), "{found:?}");
        }
    }

    #[test]
    fn report_of_somebody_else_and_one_that_is_cut_have_none() {
        assert_eq!(Fields::of("other_guest", &report(&[])), None);
        assert_eq!(Fields::of("sev_guest", &report(&[])[..0xdf]), None);
        assert_eq!(Fields::of("tdx_guest", &report(&[3, 0])), None);
        assert_eq!(Fields::of("tdx_guest", &report(&[4, 0])[..500]), None);
        assert_eq!(Fields::of("tdx_guest", &[]), None);
    }
}
