// A stub of the parts of Darwin and Dispatch that Linux lacks (see Virtualization.swift). On a Mac, they come with
// Foundation, and this file is not used.
@_exported import Glibc
import Dispatch
import Foundation

/// A plain copy stands in for APFS's clone.
public func clonefile(_ source: UnsafePointer<CChar>, _ target: UnsafePointer<CChar>, _ flags: UInt32) -> Int32 {
    let input = open(source, O_RDONLY)
    guard input >= 0 else { return -1 }
    defer { close(input) }
    let output = open(target, O_WRONLY | O_CREAT | O_EXCL, 0o600)
    guard output >= 0 else { return -1 }
    defer { close(output) }
    var buffer = [UInt8](repeating: 0, count: 65536)
    while true {
        let count = read(input, &buffer, buffer.count)
        if count <= 0 { return Int32(count) }
        if write(output, buffer, count) != count { return -1 }
    }
}

extension DispatchSource {
    public struct ProcessEvent: OptionSet {
        public let rawValue: UInt
        public init(rawValue: UInt) { self.rawValue = rawValue }
        public static let exit = ProcessEvent(rawValue: 0x8000_0000)
    }

    /// A thread that looks every 20 ms stands in for kqueue's NOTE_EXIT. It knows only the parent.
    public class func makeProcessSource(
        identifier: pid_t, eventMask: ProcessEvent, queue: DispatchQueue? = nil
    ) -> DispatchSourceProtocol {
        let source = DispatchSource.makeUserDataAddSource(queue: queue)
        Thread.detachNewThread {
            while getppid() == identifier { usleep(20_000) }
            source.add(data: 1)
        }
        return source
    }
}
