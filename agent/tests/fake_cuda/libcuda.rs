//! A CUDA driver without cards: just the functions that discovery calls. `FAKE_CUDA` picks what it answers.
//! Compiled into a shared library by the test `proof_cuda`.

use std::ffi::{c_char, c_int, c_uint};

const SUCCESS: c_int = 0;
const NO_DEVICE: c_int = 100;
const INVALID_DEVICE: c_int = 101;
const SYSTEM_DRIVER_MISMATCH: c_int = 803;

fn mode() -> String {
    std::env::var("FAKE_CUDA").unwrap_or_default()
}

fn known(device: c_int) -> bool {
    (0..2).contains(&device)
}

#[unsafe(no_mangle)]
extern "C" fn cuInit(_flags: c_uint) -> c_int {
    match mode().as_str() {
        "none" => NO_DEVICE,
        "mismatch" => SYSTEM_DRIVER_MISMATCH,
        _ => SUCCESS,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> c_int {
    unsafe { *count = if mode() == "empty" { 0 } else { 2 } };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> c_int {
    unsafe { *device = ordinal };
    if known(ordinal) { SUCCESS } else { INVALID_DEVICE }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, length: c_int, device: c_int) -> c_int {
    let text = b"NVIDIA H100 80GB HBM3\0";
    if !known(device) || (length as usize) < text.len() {
        return INVALID_DEVICE;
    }
    unsafe { std::ptr::copy_nonoverlapping(text.as_ptr().cast(), name, text.len()) };
    SUCCESS
}

#[cfg(not(without_uuid))]
#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetUuid(uuid: *mut [u8; 16], device: c_int) -> c_int {
    // The high bit is set: bytes of a UUID are unsigned, `char` is not.
    unsafe { *uuid = [0xa0 + device as u8; 16] };
    if known(device) { SUCCESS } else { INVALID_DEVICE }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int) -> c_int {
    unsafe { *bytes = 85_031_714_816 };
    if known(device) { SUCCESS } else { INVALID_DEVICE }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_uint, device: c_int) -> c_int {
    // Numbers of the attributes as the driver's interface defines them.
    let answer = match attribute {
        13 => 1_980_000,                  // clock rate
        16 if mode() == "nonsense" => -1, // multiprocessors
        16 => 132,
        33 => 0x3b + device, // PCI bus
        34 | 50 => 0,        // PCI device, PCI domain
        39 => 2048,          // threads per multiprocessor
        _ => return 1,
    };
    unsafe { *value = answer };
    if known(device) { SUCCESS } else { INVALID_DEVICE }
}
