import Darwin
import Foundation
import Virtualization

/// One virtual machine, and the end of this process: `end` is called once, from whatever thread sees a reason first.
final class Machine: NSObject, VZVirtualMachineDelegate {
    private static let stopSeconds = 2.0  // for the hard stop, which needs nothing from the guest

    private let options: Options
    // All calls of the framework are on this queue. The main queue could be blocked by its own waits.
    private let queue = DispatchQueue(label: "x07.machine")
    private let outputs = Outputs()
    private let lock = NSLock()
    private var ending = false
    private var cloned = false
    private var machine: VZVirtualMachine?
    private var sources: [DispatchSourceProtocol] = []
    private var kept: [AnyObject] = []  // a pipe closes its descriptors when nobody refers to it

    init(_ options: Options) { self.options = options }

    /// Start the machine and return; the process then ends in `end`.
    func run() throws {
        watch()
        try checkKernel(options.kernel)
        for fd in [0, 1] + (options.netFd.map { [$0] } ?? []) where !setBlocking(fd) {
            throw Options.refused("descriptor \(fd) is not open")
        }
        try cloneScratch(options)
        lock.withLock { cloned = true }
        let console = Pipe()
        let channel = Port()
        let net = options.netFd.map { _ in Port() }
        kept = [console, channel] + (net.map { [$0] } ?? [])
        let machine = VZVirtualMachine(
            configuration: try configuration(options, console: console, channel: channel, net: net), queue: queue)
        outputs.copy(from: console.fileHandleForReading.fileDescriptor, to: 2, limit: options.consoleBytes) {}
        connect(channel, 0, 1) { self.end(ExitCode.ended, "the caller closed the channel") }
        // The machine goes on without the caller's end of the relay.
        if let net = net, let fd = options.netFd { connect(net, fd, fd) {} }
        queue.async {
            self.machine = machine
            machine.delegate = self
            machine.start { result in
                if case .failure(let error) = result {
                    self.end(ExitCode.failed, "cannot start the machine: \(error)")
                }
            }
        }
    }

    /// Stop the machine without its help, remove the scratch disk, and exit.
    func end(_ code: Int32, _ why: String) {
        if lock.withLock({ let again = ending; ending = true; return again }) { return }
        say(why)
        // Not on the machine's queue, which may be blocked.
        DispatchQueue.global().asyncAfter(deadline: .now() + Machine.stopSeconds) { self.leave(code) }
        queue.async {
            guard let machine = self.machine, machine.canStop else { return self.leave(code) }
            machine.stop { _ in self.leave(code) }
        }
    }

    private func leave(_ code: Int32) {
        if lock.withLock({ cloned }) { unlink(options.scratch) }
        _exit(code)
    }

    /// Watch the deadline, the signals and the parent, before anything can block.
    private func watch() {
        let deadline = DispatchTime.now() + .milliseconds(options.wallMs)
        DispatchQueue.global().asyncAfter(deadline: deadline) { self.end(ExitCode.deadline, "the deadline has passed") }
        for number in [SIGTERM, SIGINT] {
            signal(number, SIG_IGN)  // or else the default action comes first
            let source = DispatchSource.makeSignalSource(signal: number, queue: .global())
            source.setEventHandler { self.end(128 + number, "ended by signal \(number)") }
            sources.append(source)
        }
        let parent = getppid()
        let source = DispatchSource.makeProcessSource(identifier: parent, eventMask: .exit, queue: .global())
        source.setEventHandler { self.end(ExitCode.ended, "the caller has exited") }
        sources.append(source)
        sources.forEach { $0.activate() }
        // It may have exited before it was watched.
        if getppid() != parent { end(ExitCode.ended, "the caller has exited") }
    }

    private func connect(_ port: Port, _ input: Int32, _ output: Int32, closed: @escaping () -> Void) {
        copyInput(from: input, to: port.toGuest.fileHandleForWriting.fileDescriptor, ended: closed)
        outputs.copy(from: port.fromGuest.fileHandleForReading.fileDescriptor, to: output, lost: closed)
    }

    func guestDidStop(_ virtualMachine: VZVirtualMachine) {
        DispatchQueue.global().async {
            self.outputs.drain()
            self.end(ExitCode.ended, "the guest has powered off")
        }
    }

    func virtualMachine(_ virtualMachine: VZVirtualMachine, didStopWithError error: Error) {
        end(ExitCode.failed, "the machine stopped: \(error)")
    }
}
