import Foundation

let usage = """
    usage: x07-vz-helper preflight
           x07-vz-helper run --kernel FILE --command-line TEXT --root FILE --scratch-from FILE --scratch FILE
               --mem-bytes N --wall-ms N [--initrd FILE] [--program FILE] [--cpus N] [--net-fd N] [--console-bytes N]
    """

/// The options of `x07-vz-helper run`. Each may appear once.
struct Options {
    var kernel = ""
    var initrd: String?
    var commandLine = ""
    var root = ""
    var program: String?
    var scratchFrom = ""
    var scratch = ""
    var memoryBytes: UInt64 = 0
    var cpus = 1
    var wallMs = 0
    var netFd: Int32?
    var consoleBytes = 64 * 1024

    private static let required = [
        "--kernel", "--command-line", "--root", "--scratch-from", "--scratch", "--mem-bytes", "--wall-ms",
    ]

    init(_ arguments: [String]) throws {
        var seen = Set<String>()
        for index in stride(from: 0, to: arguments.count, by: 2) {
            let flag = arguments[index]
            guard index + 1 < arguments.count else { throw Options.refused("\(flag) needs a value") }
            guard seen.insert(flag).inserted else { throw Options.refused("\(flag) appears twice") }
            try set(flag, arguments[index + 1])
        }
        if let missing = Options.required.first(where: { !seen.contains($0) }) {
            throw Options.refused("\(missing) is missing")
        }
    }

    private mutating func set(_ flag: String, _ value: String) throws {
        switch flag {
        case "--kernel": kernel = value
        case "--initrd": initrd = value
        case "--command-line": commandLine = value
        case "--root": root = value
        case "--program": program = value
        case "--scratch-from": scratchFrom = value
        case "--scratch": scratch = value
        case "--mem-bytes": memoryBytes = try number(flag, value, 1...(1 << 46))
        case "--cpus": cpus = try number(flag, value, 1...1024)
        case "--wall-ms": wallMs = try number(flag, value, 1...(1 << 40))
        case "--net-fd": netFd = try number(flag, value, 3...(1 << 20))
        case "--console-bytes": consoleBytes = try number(flag, value, 0...(1 << 30))
        default: throw Options.refused("there is no option \(flag)")
        }
    }

    private func number<Number: FixedWidthInteger>(
        _ flag: String, _ value: String, _ range: ClosedRange<Number>
    ) throws -> Number {
        guard value.utf8.allSatisfy({ (48...57).contains($0) }), let number = Number(value), range.contains(number)
        else { throw Options.refused("\(flag) must be a number from \(range.lowerBound) to \(range.upperBound)") }
        return number
    }

    static func refused(_ why: String) -> Failure {
        Failure(what: "cannot read the command line", why: why, fix: usage)
    }
}
