// A stub of the parts of Apple's Virtualization framework that x07-vz-helper uses, for scripts/check_vz_helper.sh on
// Linux. The declarations were written by hand from Apple's documentation (developer.apple.com/documentation/
// virtualization), in Swift's form without Objective-C. It is not the framework: a passed check shows that the helper's
// Swift fits these declarations, not that they are Apple's, and it knows nothing of macOS versions.
//
// The bodies are a stand-in for the framework, so that tests can start the helper on Linux. It runs no machine and no
// guest: `StandInGuest` below writes the command line to the console, echoes each port, and obeys two lines.
import Foundation

open class VZBootLoader: NSObject {}

public final class VZLinuxBootLoader: VZBootLoader {
    public var kernelURL: URL
    public var initialRamdiskURL: URL?
    public var commandLine = ""
    public init(kernelURL: URL) { self.kernelURL = kernelURL }
}

open class VZSerialPortAttachment: NSObject {}

public final class VZFileHandleSerialPortAttachment: VZSerialPortAttachment {
    public let fileHandleForReading: FileHandle?
    public let fileHandleForWriting: FileHandle?
    public init(fileHandleForReading: FileHandle?, fileHandleForWriting: FileHandle?) {
        self.fileHandleForReading = fileHandleForReading
        self.fileHandleForWriting = fileHandleForWriting
    }
}

open class VZSerialPortConfiguration: NSObject {
    public var attachment: VZSerialPortAttachment?
}

public final class VZVirtioConsoleDeviceSerialPortConfiguration: VZSerialPortConfiguration {}

open class VZConsolePortConfiguration: NSObject {
    public var attachment: VZSerialPortAttachment?
}

public final class VZVirtioConsolePortConfiguration: VZConsolePortConfiguration {
    public var name: String?
    public var isConsole = false
}

public final class VZVirtioConsolePortConfigurationArray: NSObject {
    fileprivate var ports: [Int: VZVirtioConsolePortConfiguration] = [:]
    public var maximumPortCount: UInt32 = 0
    public subscript(portIndex: Int) -> VZVirtioConsolePortConfiguration? {
        get { ports[portIndex] }
        set { ports[portIndex] = newValue }
    }
}

open class VZConsoleDeviceConfiguration: NSObject {}

public final class VZVirtioConsoleDeviceConfiguration: VZConsoleDeviceConfiguration {
    public let ports = VZVirtioConsolePortConfigurationArray()
}

open class VZEntropyDeviceConfiguration: NSObject {}

public final class VZVirtioEntropyDeviceConfiguration: VZEntropyDeviceConfiguration {}

public enum VZDiskImageCachingMode: Int { case automatic, uncached, cached }

public enum VZDiskImageSynchronizationMode: Int { case full = 1, fsync, none }

open class VZStorageDeviceAttachment: NSObject {}

public final class VZDiskImageStorageDeviceAttachment: VZStorageDeviceAttachment {
    public init(
        url: URL, readOnly: Bool, cachingMode: VZDiskImageCachingMode,
        synchronizationMode: VZDiskImageSynchronizationMode
    ) throws {
        let size = try FileManager.default.attributesOfItem(atPath: url.path)[.size] as? Int ?? 0
        if size % 512 != 0 { throw StandInError(text: "\(url.path) is no multiple of 512 bytes") }
    }
}

open class VZStorageDeviceConfiguration: NSObject {}

public final class VZVirtioBlockDeviceConfiguration: VZStorageDeviceConfiguration {
    public init(attachment: VZStorageDeviceAttachment) {}
    public var blockDeviceIdentifier = ""
}

public final class VZVirtualMachineConfiguration: NSObject {
    public var bootLoader: VZBootLoader?
    public var memorySize: UInt64 = 0
    public var cpuCount = 0
    public var entropyDevices: [VZEntropyDeviceConfiguration] = []
    public var storageDevices: [VZStorageDeviceConfiguration] = []
    public var serialPorts: [VZSerialPortConfiguration] = []
    public var consoleDevices: [VZConsoleDeviceConfiguration] = []
    public func validate() throws {}
    public class var minimumAllowedMemorySize: UInt64 { 4 << 20 }
    public class var maximumAllowedMemorySize: UInt64 { 8 << 30 }
    public class var minimumAllowedCPUCount: Int { 1 }
    public class var maximumAllowedCPUCount: Int { 4 }
}

/// The framework's methods are optional. Here they are required, so that a wrong signature is an error.
public protocol VZVirtualMachineDelegate: NSObjectProtocol {
    func guestDidStop(_ virtualMachine: VZVirtualMachine)
    func virtualMachine(_ virtualMachine: VZVirtualMachine, didStopWithError error: Error)
}

public final class VZVirtualMachine: NSObject {
    public class var isSupported: Bool { false }
    public weak var delegate: VZVirtualMachineDelegate?
    public private(set) var canStop = false
    private let configuration: VZVirtualMachineConfiguration
    private let queue: DispatchQueue

    public init(configuration: VZVirtualMachineConfiguration, queue: DispatchQueue) {
        self.configuration = configuration
        self.queue = queue
    }

    public func start(completionHandler: @escaping (Result<Void, Error>) -> Void) {
        dispatchPrecondition(condition: .onQueue(queue))  // the framework stops the process too
        if line.contains("standin.fail") { return completionHandler(.failure(StandInError(text: "told to fail"))) }
        canStop = true
        StandInGuest(machine: self, configuration: configuration, line: line).start()
        completionHandler(.success(()))
    }

    /// standin.hang: a framework that does not answer.
    public func stop(completionHandler: @escaping (Error?) -> Void) {
        dispatchPrecondition(condition: .onQueue(queue))
        if !line.contains("standin.hang") { completionHandler(nil) }
    }

    private var line: String { (configuration.bootLoader as? VZLinuxBootLoader)?.commandLine ?? "" }

    fileprivate func stopped(_ error: Error?) {
        queue.async {
            self.canStop = false
            if let error = error {
                self.delegate?.virtualMachine(self, didStopWithError: error)
            } else {
                self.delegate?.guestDidStop(self)
            }
        }
    }
}

struct StandInError: Error { let text: String }

/// Stands in for a guest. Lines that it obeys: "poweroff" and "crash".
private final class StandInGuest {
    let machine: VZVirtualMachine
    let configuration: VZVirtualMachineConfiguration
    let line: String

    init(machine: VZVirtualMachine, configuration: VZVirtualMachineConfiguration, line: String) {
        self.machine = machine
        self.configuration = configuration
        self.line = line
    }

    func start() {
        for case let serial as VZFileHandleSerialPortAttachment in configuration.serialPorts.map(\.attachment) {
            serial.fileHandleForWriting?.write(Data("console: \(line)\n".utf8))
        }
        for case let device as VZVirtioConsoleDeviceConfiguration in configuration.consoleDevices {
            for port in device.ports.ports.values { Thread.detachNewThread { self.echo(port) } }
        }
    }

    private func echo(_ port: VZVirtioConsolePortConfiguration) {
        guard let attachment = port.attachment as? VZFileHandleSerialPortAttachment,
            let input = attachment.fileHandleForReading, let output = attachment.fileHandleForWriting
        else { return }
        output.write(Data("port \(port.name ?? "")\n".utf8))
        while case let data = input.availableData, !data.isEmpty {
            output.write(data)
            if data.starts(with: Data("poweroff".utf8)) { machine.stopped(nil) }
            if data.starts(with: Data("crash".utf8)) { machine.stopped(StandInError(text: "told to crash")) }
        }
    }
}
