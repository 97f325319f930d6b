//! `sealpod-vmm`: one virtual machine in a process of its own. `boot` starts one by hand, for benches
//! and for looking into a guest that does not come up; the shim uses `serve` (`control`).

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, mpsc};

use sealpod_vmm::confine::May;
use sealpod_vmm::control;
use sealpod_vmm::log;
use sealpod_vmm::machine::{Boot, Config, End, Machine};
use sealpod_vmm::virtio::{Block, Device, Net, NetConfig, Rng, open_tap};

const USAGE: &str = "\
usage: sealpod-vmm boot --kernel FILE [OPTIONS]
       sealpod-vmm serve CONTROL_FD DESCRIPTORS_FD

  --kernel FILE     vmlinux, uncompressed
  --initrd FILE     cpio archive
  --cmdline TEXT    the kernel's command line (default: console=ttyS0)
  --memory MIB      default 256
  --vcpus N         default 1
  --disk FILE       a disk, written to; repeatable
  --tap NAME        a network device on a tap that was made with vnet_hdr; repeatable
  --rng             a device that gives entropy
  --shared-memory   memory that another process could map
  --spare-slots N   for devices that come later

The guest's console is the standard output. The VM ends when the guest restarts or fails.";

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    log::start();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.split_first() {
        Some((command, rest)) if command == "boot" => boot(rest),
        Some((command, [control, descriptors])) if command == "serve" => {
            serve(control, descriptors)
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let mut text = e.to_string();
            let mut source = e.source();
            while let Some(cause) = source {
                text += &format!(": {cause}");
                source = cause.source();
            }
            eprintln!("sealpod-vmm: {text}");
            ExitCode::FAILURE
        }
    }
}

/// Serves the shim on inherited descriptors.
fn serve(control: &str, descriptors: &str) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let number = |word: &str| word.parse().map_err(|e| format!("{word}: {e}"));
    runtime.block_on(control::serve(number(control)?, number(descriptors)?))
}

/// Boots a machine and waits for its end.
fn boot(arguments: &[String]) -> Result<(), Failure> {
    let config = parse(arguments)?;
    let (tell, told) = mpsc::channel();
    let machine = Machine::new(config, move |end| {
        let _ = tell.send(end);
    })?;
    machine.resume();
    match told.recv()? {
        End::Reset | End::TripleFault => Ok(()),
        End::Failed(why) => Err(why.into()),
    }
}

fn parse(arguments: &[String]) -> Result<Config, Failure> {
    let mut kernel = None;
    let mut initramfs = None;
    let mut cmdline = "console=ttyS0".to_owned();
    let (mut memory_mib, mut vcpus, mut spare_slots) = (256, 1, 0);
    let mut shared_memory = false;
    let mut devices: Vec<Arc<Mutex<dyn Device>>> = Vec::new();
    let mut words = arguments.iter();
    while let Some(name) = words.next() {
        match name.as_str() {
            "--shared-memory" => {
                shared_memory = true;
                continue;
            }
            "--rng" => {
                devices.push(Arc::new(Mutex::new(Rng::new()?)));
                continue;
            }
            _ => {}
        }
        let value = words
            .next()
            .ok_or_else(|| format!("{name} needs a value"))?;
        let open = |file: &str| File::open(file).map_err(|e| format!("{file}: {e}"));
        let number = || value.parse().map_err(|e| format!("{name} {value}: {e}"));
        match name.as_str() {
            "--kernel" => kernel = Some(open(value)?),
            "--initrd" => initramfs = Some(open(value)?),
            "--cmdline" => cmdline.clone_from(value),
            "--memory" => memory_mib = number()?,
            "--vcpus" => vcpus = u32::try_from(number()?)?,
            "--spare-slots" => spare_slots = usize::try_from(number()?)?,
            "--disk" => {
                let file = OpenOptions::new().read(true).write(true).open(value);
                let file = file.map_err(|e| format!("{value}: {e}"))?;
                let serial = format!("disk{}", devices.len());
                devices.push(Arc::new(Mutex::new(Block::new(file, false, &serial)?)));
            }
            "--tap" => {
                let config = NetConfig {
                    mac: [2, 0, 0, 0, 0, devices.len() as u8],
                    mtu: 1500,
                };
                let net = Net::new(vec![open_tap(value)?], config)?;
                devices.push(Arc::new(Mutex::new(net)));
            }
            _ => return Err(format!("unknown argument {name}\n{USAGE}").into()),
        }
    }
    let console: OwnedFd = std::io::stdout().as_fd().try_clone_to_owned()?;
    Ok(Config {
        boot: Boot {
            kernel: kernel.ok_or("--kernel is missing")?,
            initramfs,
            cmdline,
        },
        memory_mib,
        shared_memory,
        vcpus,
        console: File::from(console),
        devices,
        spare_slots,
        confined: Some(May::Run),
    })
}
