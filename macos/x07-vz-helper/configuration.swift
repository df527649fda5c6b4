import Darwin
import Foundation
import Virtualization

#if arch(arm64)
    let architecture = "arm64"
    let kernelMagic = (offset: 56, bytes: "ARMd", form: "a raw arm64 Image")
#else
    let architecture = "x86_64"
    let kernelMagic = (offset: 0x202, bytes: "HdrS", form: "a bzImage")
#endif
let mebibyte: UInt64 = 1024 * 1024

/// Refuse a kernel that the framework cannot start. Its own error would not say why, or the guest would hang.
func checkKernel(_ path: String) throws {
    let what = "cannot use the kernel \(path)"
    let fd = open(path, O_RDONLY | O_CLOEXEC)
    guard fd >= 0 else {
        throw Failure(what: what, why: String(cString: strerror(errno)), fix: "Build the guest bundle again.")
    }
    defer { close(fd) }
    var head = [UInt8](repeating: 0, count: 1024)
    let count = read(fd, &head, head.count)
    let end = kernelMagic.offset + kernelMagic.bytes.utf8.count
    guard count >= end, Array(head[kernelMagic.offset..<end]) == Array(kernelMagic.bytes.utf8) else {
        let fix = "Build the guest bundle for \(architecture)."
        throw Failure(what: what, why: "it is not \(kernelMagic.form)", fix: fix)
    }
}

/// Return the memory size, rounded up to whole MiB, if this Mac allows it.
func memorySize(_ bytes: UInt64) throws -> UInt64 {
    let size = (bytes + mebibyte - 1) / mebibyte * mebibyte
    typealias Allowed = VZVirtualMachineConfiguration
    let range = Allowed.minimumAllowedMemorySize...Allowed.maximumAllowedMemorySize
    guard range.contains(size) else { throw outside("\(size) bytes of memory", "\(range)", "--mem-bytes") }
    return size
}

/// Return the number of processors, if this Mac allows it.
func cpuCount(_ count: Int) throws -> Int {
    typealias Allowed = VZVirtualMachineConfiguration
    let range = Allowed.minimumAllowedCPUCount...Allowed.maximumAllowedCPUCount
    guard range.contains(count) else { throw outside("\(count) processors", "\(range)", "--cpus") }
    return count
}

private func outside(_ asked: String, _ range: String, _ flag: String) -> Failure {
    Failure(what: "cannot give the machine \(asked)", why: "this Mac allows \(range)", fix: "Change \(flag).")
}

/// Make the scratch disk, a clone of an empty image: on APFS it takes no space until the guest writes.
func cloneScratch(_ options: Options) throws {
    guard clonefile(options.scratchFrom, options.scratch, 0) == 0 else {
        let why = String(cString: strerror(errno))
        throw Failure(what: "cannot clone the scratch disk", why: why, fix: "Keep both files on one APFS volume.")
    }
}

/// Return the machine's configuration. It has no network device: bytes leave the guest only through its ports.
func configuration(
    _ options: Options, console: Pipe, channel: Port, net: Port?
) throws -> VZVirtualMachineConfiguration {
    let loader = VZLinuxBootLoader(kernelURL: URL(fileURLWithPath: options.kernel))
    loader.initialRamdiskURL = options.initrd.map { URL(fileURLWithPath: $0) }
    loader.commandLine = options.commandLine
    let machine = VZVirtualMachineConfiguration()
    machine.bootLoader = loader
    machine.memorySize = try memorySize(options.memoryBytes)
    machine.cpuCount = try cpuCount(options.cpus)
    machine.entropyDevices = [VZVirtioEntropyDeviceConfiguration()]

    // The guest's init mounts the first disk; its agent finds the others by their identifiers.
    machine.storageDevices = [
        try disk(options.root, "x07root", readOnly: true), try disk(options.scratch, "x07scratch", readOnly: false),
    ]
    if let program = options.program {
        machine.storageDevices.append(try disk(program, "x07program", readOnly: true))
    }

    let serial = VZVirtioConsoleDeviceSerialPortConfiguration()
    serial.attachment = VZFileHandleSerialPortAttachment(
        fileHandleForReading: nil, fileHandleForWriting: console.fileHandleForWriting)
    machine.serialPorts = [serial]

    let ports = VZVirtioConsoleDeviceConfiguration()
    ports.ports[0] = port("x07.0", channel)
    if let net = net { ports.ports[1] = port("x07.net", net) }
    machine.consoleDevices = [ports]
    try machine.validate()
    return machine
}

/// The guest's agent finds a port by its name.
private func port(_ name: String, _ pipes: Port) -> VZVirtioConsolePortConfiguration {
    let port = VZVirtioConsolePortConfiguration()
    port.name = name
    port.attachment = VZFileHandleSerialPortAttachment(
        fileHandleForReading: pipes.toGuest.fileHandleForReading,
        fileHandleForWriting: pipes.fromGuest.fileHandleForWriting)
    return port
}

private func disk(_ path: String, _ identifier: String, readOnly: Bool) throws -> VZVirtioBlockDeviceConfiguration {
    // With the default caching mode, file systems of Linux guests were damaged (lima issue 1957).
    let image = try VZDiskImageStorageDeviceAttachment(
        url: URL(fileURLWithPath: path), readOnly: readOnly, cachingMode: .cached, synchronizationMode: .fsync)
    let disk = VZVirtioBlockDeviceConfiguration(attachment: image)
    disk.blockDeviceIdentifier = identifier
    return disk
}
