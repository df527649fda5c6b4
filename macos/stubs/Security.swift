// A stub of the parts of Apple's Security framework that the helper uses (see Virtualization.swift).
// CFString and CFTypeRef are Core Foundation's, which Linux does not export.
import Foundation

public typealias CFAllocator = AnyObject
public typealias CFError = NSError
public typealias CFString = NSString
public typealias CFTypeRef = AnyObject

public final class SecTask {}

public func SecTaskCreateFromSelf(_ allocator: CFAllocator?) -> SecTask? { SecTask() }

/// No process of the stand-in has an entitlement.
public func SecTaskCopyValueForEntitlement(
    _ task: SecTask, _ entitlement: CFString, _ error: UnsafeMutablePointer<Unmanaged<CFError>?>?
) -> CFTypeRef? { nil }
