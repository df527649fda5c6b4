// x07-vz-helper: runs one virtual machine with Apple's Virtualization framework (docs/backends/vz.md).
import Darwin
import Foundation

signal(SIGPIPE, SIG_IGN)
let arguments = Array(CommandLine.arguments.dropFirst())
do {
    switch arguments.first {
    case "preflight" where arguments.count == 1:
        let report = Preflight()
        print(try report.json())
        exit(report.ok ? ExitCode.ended : ExitCode.refused)
    case "run":
        let machine = Machine(try Options(Array(arguments.dropFirst())))
        do {
            try machine.run()
        } catch let failure as Failure {
            machine.end(ExitCode.refused, "\(failure.what): \(failure.why). \(failure.fix)")
        } catch {
            machine.end(ExitCode.refused, "the framework refuses the machine: \(error)")
        }
        dispatchMain()
    default:
        throw Options.refused("the first word must be preflight or run")
    }
} catch {
    let failure = error as? Failure
    say(failure.map { "\($0.what): \($0.why)\n\($0.fix)" } ?? "\(error)")
    exit(ExitCode.refused)
}
