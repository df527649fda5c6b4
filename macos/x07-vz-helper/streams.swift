import Darwin
import Foundation

/// A port of the machine: two pipes, since the helper and not the framework must see the end of the caller's stdin.
final class Port {
    let toGuest = Pipe()
    let fromGuest = Pipe()
}

/// The copying of the guest's outputs. `drain` lets them end once the machine has stopped.
final class Outputs {
    // The framework keeps its ends of the pipes open, so they never reach their end. Closing this one wakes the copies.
    private let stopped = Pipe()
    private let running = DispatchGroup()

    /// Copy the guest's output in a thread of its own. limit: bytes to pass on; the rest is read and discarded.
    /// lost: called if the reader of *target* has gone.
    func copy(from source: Int32, to target: Int32, limit: Int = .max, lost: @escaping () -> Void) {
        running.enter()
        Thread.detachNewThread {
            self.run(from: source, to: target, limit: limit, lost: lost)
            self.running.leave()
        }
    }

    /// Wait until the outputs are quiet for 100 ms after the machine's stop, at most a second.
    func drain() {
        try? stopped.fileHandleForWriting.close()
        _ = running.wait(timeout: .now() + 1)
    }

    private func run(from source: Int32, to target: Int32, limit: Int, lost: () -> Void) {
        var left = limit
        var timeoutMs: Int32 = -1
        while true {
            let wake = timeoutMs < 0 ? stopped.fileHandleForReading.fileDescriptor : -1
            var fds = [source, wake].map { pollfd(fd: $0, events: Int16(POLLIN), revents: 0) }
            let ready = poll(&fds, 2, timeoutMs)
            if ready < 0 && errno == EINTR { continue }
            if ready <= 0 { return }
            if fds[1].revents != 0 { timeoutMs = 100 }
            if fds[0].revents == 0 { continue }
            guard let bytes = readSome(source) else { return }
            let passed = bytes.prefix(left)
            if !writeAll(target, passed) {
                lost()
                left = 0  // go on reading: a full pipe would block the guest
            } else if limit != .max {
                left -= passed.count
            }
        }
    }
}

/// Copy the caller's bytes to the guest in a thread of its own. ended: called at the end of *source*.
func copyInput(from source: Int32, to target: Int32, ended: @escaping () -> Void) {
    Thread.detachNewThread {
        while let bytes = readSome(source), writeAll(target, bytes[...]) {}
        ended()
    }
}

/// Make a descriptor block: its other holder may have set O_NONBLOCK.
func setBlocking(_ fd: Int32) -> Bool {
    let flags = fcntl(fd, F_GETFL)
    return flags >= 0 && fcntl(fd, F_SETFL, flags & ~O_NONBLOCK) == 0
}

/// Read what there is; nil at the end and on errors.
func readSome(_ fd: Int32) -> [UInt8]? {
    var buffer = [UInt8](repeating: 0, count: 64 * 1024)
    while true {
        let count = read(fd, &buffer, buffer.count)
        if count < 0 && errno == EINTR { continue }
        return count > 0 ? Array(buffer[..<count]) : nil
    }
}

/// Write all bytes. Return false if that fails.
func writeAll(_ fd: Int32, _ bytes: ArraySlice<UInt8>) -> Bool {
    var rest = bytes
    while !rest.isEmpty {
        let count = rest.withUnsafeBytes { write(fd, $0.baseAddress, $0.count) }
        if count < 0 && errno == EINTR { continue }
        if count <= 0 { return false }
        rest = rest.dropFirst(count)
    }
    return true
}
