import Foundation
import Security
import Virtualization

/// What `x07-vz-helper preflight` prints, as JSON.
struct Preflight: Encodable {
    let schemaVersion = "x07.vz.preflight@0.1.0"
    let macos: String
    let arch: String
    let supported: Bool
    let entitled: Bool
    let memoryBytes: [UInt64]  // least and most
    let cpus: [Int]
    let ok: Bool

    init() {
        let version = ProcessInfo.processInfo.operatingSystemVersion
        macos = "\(version.majorVersion).\(version.minorVersion).\(version.patchVersion)"
        arch = architecture
        supported = VZVirtualMachine.isSupported
        entitled = hasEntitlement()
        typealias Allowed = VZVirtualMachineConfiguration
        memoryBytes = [Allowed.minimumAllowedMemorySize, Allowed.maximumAllowedMemorySize]
        cpus = [Allowed.minimumAllowedCPUCount, Allowed.maximumAllowedCPUCount]
        ok = supported && entitled
    }

    func json() throws -> String {
        let encoder = JSONEncoder()
        encoder.keyEncodingStrategy = .convertToSnakeCase
        encoder.outputFormatting = .sortedKeys
        return String(decoding: try encoder.encode(self), as: UTF8.self)
    }
}

/// Installers and packagers lose the entitlement if they sign the helper again.
private func hasEntitlement() -> Bool {
    guard let task = SecTaskCreateFromSelf(nil) else { return false }
    let value = SecTaskCopyValueForEntitlement(task, "com.apple.security.virtualization" as CFString, nil)
    return value as? Bool ?? false
}
