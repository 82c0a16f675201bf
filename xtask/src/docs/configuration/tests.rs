use kata_config::{Config, Reading};

use super::*;

/// Upstream's keys in sections of hypervisors, Kata Containers 4.1, both runtimes.
const HYPERVISOR: &str = "
    path kernel image initrd firmware machine_type rootfs_type vm_rootfs_driver rootless rootless_user enable_annotations
    valid_hypervisor_paths valid_ctlpaths valid_jailer_paths valid_virtio_fs_daemon_paths valid_vhost_user_store_paths
    valid_entropy_sources jailer_path ctlpath kernel_params kernel_verity_params default_vcpus default_maxvcpus overhead_vcpus
    default_memory default_maxmemory overhead_memory memory_slots default_bridges pcie_root_port pcie_switch_port memory_offset
    enable_virtio_mem enable_mem_prealloc enable_hugepages hugepage_type reclaim_guest_freed_memory enable_guest_swap
    guest_swap_path guest_swap_size_percent guest_swap_create_threshold_secs shared_fs virtio_fs_daemon virtio_fs_cache
    virtio_fs_cache_size virtio_fs_queue_size virtio_fs_extra_args disable_block_device_use block_device_driver block_device_aio
    block_device_cache_set block_device_cache_direct block_device_cache_noflush block_device_logical_sector_size
    block_device_physical_sector_size queue_size num_queues enable_iothreads indep_iothreads disk_rate_limiter_bw_max_rate
    disk_rate_limiter_bw_one_time_burst disk_rate_limiter_ops_max_rate disk_rate_limiter_ops_one_time_burst
    rx_rate_limiter_max_rate tx_rate_limiter_max_rate enable_vhost_user_store vhost_user_store_path enable_iommu
    enable_iommu_platform cold_plug_vfio disable_vhost_net network_queues machine_accelerators cpu_features seccomp_sandbox
    pflashes entropy_source disable_image_nvdimm disable_nested_virtualization disable_seccomp confidential_guest sev_snp_guest
    snp_id_block snp_id_auth snp_guest_policy tdx_quote_generation_service_socket_port initdata guest_hook_path disable_selinux
    disable_guest_selinux selinux_label enable_debug log_level extra_monitor_socket guest_memory_dump_path
    guest_memory_dump_paging disable_nesting_checks enable_template template_path boot_to_be_template boot_from_template
    memory_path device_state_path remote_hypervisor_socket remote_hypervisor_timeout default_gpus default_gpu_model
    guest_extension_images";
const AGENT: &str = "
    enable_debug log_level enable_tracing kernel_modules debug_console_enabled container_pipe_size launch_process_timeout
    visible_cdi_devices policy server_port log_port dial_timeout_ms reconnect_timeout_ms create_container_timeout
    cdh_api_timeout_ms mem_agent_enable memcg_disable memcg_swap memcg_swappiness_max memcg_period_secs
    memcg_period_psi_percent_limit memcg_eviction_psi_percent_limit memcg_eviction_run_aging_count_min compact_disable
    compact_period_secs compact_period_psi_percent_limit compact_psi_percent_limit compact_sec_max compact_order
    compact_threshold compact_force_times";
const RUNTIME: &str = "
    name hypervisor_name agent_name internetworking_model disable_new_netns dan_conf sandbox_cgroup_only
    static_sandbox_resource_mgmt disable_guest_seccomp enable_vcpus_pinning vfio_mode emptydir_mode sandbox_bind_mounts
    shared_mounts enable_tracing jaeger_endpoint jaeger_user jaeger_password enable_pprof experimental keep_abnormal
    use_passfd_io passfd_listener_port pod_resource_api_sock log_level enable_debug";
/// Upstream's keys that the Go runtime alone has.
const GO: &str = "
    factory.vm_cache_number factory.vm_cache_endpoint hypervisor.*.enable_numa hypervisor.*.numa_mapping
    hypervisor.*.net_rate_limiter_bw_max_rate hypervisor.*.net_rate_limiter_bw_one_time_burst
    hypervisor.*.net_rate_limiter_ops_max_rate hypervisor.*.net_rate_limiter_ops_one_time_burst hypervisor.*.hot_plug_vfio
    hypervisor.*.firmware_volume hypervisor.*.measurement_algo hypervisor.*.use_legacy_serial
    hypervisor.*.vhost_user_reconnect_timeout_sec hypervisor.*.hypervisor_loglevel hypervisor.*.seccompsandbox
    runtime.guest_selinux_label runtime.experimental_force_guest_pull runtime.kubelet_root_dir hypervisor.*.msize_9p
    agent.kata.dial_timeout agent.kata.cdh_api_timeout runtime.create_container_timeout";
const ANNOTATIONS: &str = "
    pkg.oci.bundle_path pkg.oci.container_type container.resource.swappiness container.resource.swap_in_bytes
    volume.overlayfs.create_directory config.runtime.name config.runtime.hypervisor_name config.runtime.agent_name
    config.runtime.disable_guest_seccomp config.runtime.disable_new_netns config.runtime.enable_pprof config.runtime.experimental
    config.runtime.internetworking_model config.runtime.sandbox_cgroup_only config.runtime.enable_vcpus_pinning
    config.runtime.vfio_mode config.runtime.shared_mounts config.runtime.sandbox_bind_mounts
    config.runtime.create_container_timeout config.runtime.experimental_force_guest_pull config.agent.kernel_modules
    config.agent.enable_tracing config.agent.container_pipe_size config.agent.cdh_api_timeout_ms config.agent.cdh_api_timeout
    config.agent.policy config_path";
const HYPERVISOR_ANNOTATIONS: &str = "
    path kernel image initrd firmware jailer_path path_hash kernel_hash image_hash initrd_hash firmware_hash jailer_hash
    asset_hash_type kernel_params kernel_verity_params machine_type machine_accelerators cpu_features default_vcpus
    default_max_vcpus default_memory memory_slots memory_offset enable_mem_prealloc enable_hugepages enable_virtio_mem
    enable_guest_swap enable_iothreads enable_iommu enable_iommu_platform enable_vhost_user_store indep_iothreads hugepage_type
    pcie_root_port pcie_switch_port block_device_driver block_device_cache_set block_device_cache_direct
    block_device_cache_noflush block_device_num_queues block_device_queue_size blk_logical_sector_size blk_physical_sector_size
    disable_block_device_use disable_image_nvdimm disable_vhost_net vhost_user_store_path rx_rate_limiter_max_rate
    tx_rate_limiter_max_rate network_queues shared_fs virtio_fs_daemon virtio_fs_cache virtio_fs_cache_size virtio_fs_extra_args
    entropy_source guest_hook_path rootless cc_init_data default_gpus default_gpu_model prefetch_files.list hot_plug_vfio
    cold_plug_vfio numa_mapping block_device_aio reclaim_guest_freed_memory firmware_volume use_legacy_serial msize_9p
    vhost_user_reconnect_timeout_sec";

/// The part of the page below a heading.
fn below(page: &str, heading: &str) -> String {
    let mut parts = page.split("\n## ");
    let part = parts.find(|part| part.starts_with(heading));
    part.unwrap_or_else(|| panic!("no {heading}")).to_owned()
}

#[test]
fn every_key_of_upstreams_has_a_row() {
    let page = page();
    for (section, names) in [("`[hypervisor.*", HYPERVISOR), ("`[agent.kata", AGENT), ("`[runtime", RUNTIME)]
    {
        let parts: String = page.split("\n## ").filter(|part| part.starts_with(section)).collect();
        for name in names.split_whitespace() {
            assert!(parts.contains(&format!("\n| `{name}` | ")), "no row for {name} in {section}");
        }
    }
    let removed = below(&page, "Removed");
    for name in GO.split_whitespace() {
        assert!(removed.contains(&format!("\n| `{name}` | [D")), "no row for {name}");
    }
}

#[test]
fn every_annotation_of_upstreams_has_a_row() {
    let part = below(&page(), "Annotations");
    let of_hypervisor =
        HYPERVISOR_ANNOTATIONS.split_whitespace().map(|name| format!("config.hypervisor.{name}"));
    for name in ANNOTATIONS.split_whitespace().map(str::to_owned).chain(of_hypervisor) {
        assert!(part.contains(&format!("\n| `io.katacontainers.{name}` | ")), "no row for {name}");
    }
}

#[test]
fn the_example_is_the_defaults_commented_out_or_not() {
    let example = example();
    let read =
        |text: &str| Reading::of_text("example".as_ref(), text).unwrap_or_else(|errors| panic!("{errors}"));
    assert_eq!(read(&example).config, Config::default());
    let uncommented: String = example
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(key) if !key.starts_with(' ') => format!("{key}\n"),
            _ => format!("{line}\n"),
        })
        .collect();
    let reading = read(&uncommented);
    assert_eq!(reading.config, Config::default());
    let supported = keys::all().filter(|key| key.is_supported()).count();
    assert_eq!((reading.written.len(), reading.notes.len(), reading.unmet.len()), (supported, 0, 0));
}

#[test]
fn the_schema_knows_every_key_of_every_section() {
    let schema: Value = serde_json::from_str(&schema().unwrap()).unwrap();
    let at = |path: &str| {
        path.split('.').try_fold(&schema, |node, name| node.get("properties")?.get(name)).cloned()
    };
    let memory = at("hypervisor.clh.default_memory").unwrap();
    assert_eq!(
        (&memory["type"], &memory["minimum"], &memory["default"]),
        (&json!("integer"), &json!(64), &json!(2048))
    );
    assert!(at("hypervisor.qemu.factory.enable_template").is_some());
    assert!(at("agent.kata.mem_agent.memcg_swap").is_some());
    assert_eq!(at("runtime").unwrap()["additionalProperties"], json!(false));
    assert!(at("runtime.hypervisor_name").unwrap()["enum"].as_array().unwrap().contains(&json!("clh")));
    for key in keys::all() {
        assert!(at(&key.own_path()).is_some(), "{key:?}");
    }
}

#[test]
fn the_man_page_has_every_key() {
    let man = man();
    for key in keys::all() {
        assert!(man.contains(&format!("\\fB{}\\fR", key.name.replace('-', "\\-"))), "{key:?}");
    }
}
