import Darwin
import Foundation

/// The exit codes of the helper (docs/backends/vz.md). A signal N gives 128 + N.
enum ExitCode {
    static let ended: Int32 = 0  // the guest powered off, or the caller closed stdin or died
    static let failed: Int32 = 1  // the machine did not start, or stopped with an error
    static let refused: Int32 = 2  // the command line, a file or this Mac does not allow a start
    static let deadline: Int32 = 124
}

/// What failed, why, and what to do.
struct Failure: Error {
    let what, why, fix: String
}

/// Write one line to stderr. It never fails: nobody may be reading.
func say(_ message: String) {
    _ = writeAll(2, Array("x07-vz-helper: \(message)\n".utf8)[...])
}
