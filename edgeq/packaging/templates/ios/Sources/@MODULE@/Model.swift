// Opens the edgeq package in this module and refuses it when a byte or a result is wrong.
//
//   let model = try Model()                       // off the main thread: the first start checks everything
//   for row in try model.answer(picture) { print(row.label, row.score) }
import CryptoKit
import Foundation
import onnxruntime_objc

/// The one digest that all others hang on: the app trusts this code, and nothing it reads.
let manifestSHA256 = "@DIGEST@"

private let runs = 5 // of a golden run, to tell which variant is fastest
private let clearly = 0.95 // a later variant must beat the preferred one by more than noise

public final class Model {
    public let variant: String
    public let passedOver: [String]
    private let manifest: Manifest
    private let session: ORTSession

    /// A first start that went well is remembered in the app's defaults; files of an app's bundle can't change later.
    public init(package: URL = Bundle.module.url(forResource: "package", withExtension: nil)!, fresh: Bool = false) throws {
        manifest = try Model.read(package)
        let environment = try ORTEnv(loggingLevel: .error)
        let place = "edgeq \(manifestSHA256) \(ORTVersion() ?? "")", known = fresh ? nil : UserDefaults.standard.stringArray(forKey: place)
        if let known, let row = manifest.variants.first(where: { $0.name == known[0] }) {
            session = try open(row, package, environment)
            (variant, passedOver) = (row.name, Array(known.dropFirst()))
            return
        }
        try Model.checkFiles(package, manifest)
        try Model.checkCanary(manifest)
        (session, variant, passedOver) = try choose(manifest, package, environment)
        UserDefaults.standard.set([variant] + passedOver, forKey: place)
    }

    public func run(_ inputs: [String: Tensor]) throws -> [String: Tensor] { try repeated(session, inputs) }

    /// Best first; of a batch the first row.
    public func answer(_ picture: Picture) throws -> [Answer] {
        guard let before = manifest.preprocessing else { throw Refused("the package holds no preprocessing for pictures: use run()") }
        guard let after = manifest.postprocessing else { throw Refused("the package holds no postprocessing: use run()") }
        let found = try run([manifest.inputs[0].name: preprocess(picture, before)])
        guard let scores = found[after.output] else { throw Refused("the model has no output '\(after.output)'") }
        return try postprocess(scores, after, manifest.labels)
    }

    private static func read(_ package: URL) throws -> Manifest {
        let text = try Data(contentsOf: package.appendingPathComponent("manifest.json"))
        guard sha256(text) == manifestSHA256 else { throw Refused("manifest.json is altered: its sha256 isn't the app's") }
        return try JSONDecoder().decode(Manifest.self, from: text)
    }

    private static func checkFiles(_ package: URL, _ manifest: Manifest) throws {
        for (name, facts) in manifest.files {
            let file = package.appendingPathComponent(name)
            if !facts.needed && !FileManager.default.fileExists(atPath: file.path) { continue } // for people only
            guard sha256(try Data(contentsOf: file, options: .mappedIfSafe)) == facts.sha256 else {
                throw Refused("\(name) is altered: its sha256 isn't the manifest's")
            }
        }
    }

    private static func checkCanary(_ manifest: Manifest) throws {
        guard let canary = manifest.canary, let how = manifest.preprocessing else { return }
        let made = try numbers(preprocess(canaryPicture(canary.height, canary.width), how))
        for (index, value) in zip(canary.at, canary.values) where !(abs(made[index] - value) <= canary.tolerance) {
            throw Refused("preprocessing makes \(made[index]) of the canary picture at \(index), expected \(value)")
        }
    }
}

private func sha256(_ data: Data) -> String {
    SHA256.hash(data: data).map { String(format: "%02x", $0) }.joined()
}

/// The first variant that runs and repeats its golden runs, unless a later one is clearly faster.
private func choose(_ manifest: Manifest, _ package: URL, _ environment: ORTEnv) throws -> (ORTSession, String, [String]) {
    let golden = try Data(contentsOf: package.appendingPathComponent(manifest.golden))
    var passed = [String](), best: (session: ORTSession, name: String, took: Double)?
    for one in manifest.variants {
        do {
            let opened = try open(one, package, environment)
            let took = try repeatGolden(opened, one, golden, timed: manifest.variants.count > 1)
            if let before = best {
                if took >= clearly * before.took { continue }
                passed.append("'\(before.name)' isn't used: \(before.took) ms a run, '\(one.name)' \(took)")
            }
            best = (opened, one.name, took)
        } catch { passed.append("'\(one.name)' isn't used: \(error.localizedDescription)") }
    }
    guard let best else { throw Refused("no variant runs here: \(passed.joined(separator: "; "))") }
    return (best.session, best.name, passed)
}

private func open(_ variant: Variant, _ package: URL, _ environment: ORTEnv) throws -> ORTSession {
    let options = try ORTSessionOptions()
    switch variant.requires.provider {
    case "CPUExecutionProvider": break
    case "CoreMLExecutionProvider": try options.appendCoreMLExecutionProvider(with: ORTCoreMLExecutionProviderOptions())
    default: throw Refused("this runtime has no \(variant.requires.provider)")
    }
    for (key, value) in variant.session { try options.addConfigEntry(withKey: key, value: value) }
    let path = package.appendingPathComponent(variant.model).path
    return try ORTSession(env: environment, modelPath: path, sessionOptions: options)
}

private let types: [(String, ORTTensorElementDataType, Int)] = [
    ("float32", .float, 4), ("int8", .int8, 1), ("uint8", .uInt8, 1), ("int32", .int32, 4), ("uint32", .uInt32, 4),
    ("int64", .int64, 8), ("uint64", .uInt64, 8),
]

private func repeated(_ session: ORTSession, _ inputs: [String: Tensor]) throws -> [String: Tensor] {
    let given = try inputs.mapValues { tensor -> ORTValue in
        guard let type = types.first(where: { $0.0 == tensor.type }) else { throw Refused("tensors of type \(tensor.type) can't be passed") }
        let shape = tensor.shape.map { NSNumber(value: $0) }
        return try ORTValue(tensorData: NSMutableData(data: tensor.data), elementType: type.1, shape: shape)
    }
    let found = try session.run(withInputs: given, outputNames: Set(try session.outputNames()), runOptions: nil)
    return try found.mapValues { value in
        let info = try value.tensorTypeAndShapeInfo()
        guard let type = types.first(where: { $0.1 == info.elementType }) else { throw Refused("outputs of this type can't be read") }
        return Tensor(type: type.0, shape: info.shape.map(\.intValue), data: try value.tensorData() as Data)
    }
}

/// Throws unless all golden runs are repeated; the median of some more in ms, 0 when nobody asks for times.
private func repeatGolden(_ session: ORTSession, _ variant: Variant, _ golden: Data, timed: Bool) throws -> Double {
    for (index, run) in variant.golden.runs.enumerated() {
        let found = try repeated(session, try run.inputs.mapValues { try tensor(golden, $0) })
        for (name, tolerance) in variant.golden.tolerances {
            guard let got = found[name], let want = run.outputs[name], try near(got, try tensor(golden, want), tolerance) else {
                throw Refused("'\(name)' differs from golden sample \(index) by more than \(tolerance)")
            }
        }
    }
    guard timed, let first = variant.golden.runs.first else { return 0 }
    let inputs = try first.inputs.mapValues { try tensor(golden, $0) }
    let laps = try (0..<runs).map { _ -> Double in
        let start = DispatchTime.now().uptimeNanoseconds
        _ = try repeated(session, inputs)
        return Double(DispatchTime.now().uptimeNanoseconds - start) / 1e6
    }
    return laps.sorted()[runs / 2]
}

private func tensor(_ golden: Data, _ reference: Reference) throws -> Tensor {
    let end = reference.offset + reference.bytes
    guard end <= golden.count else { throw Refused("the golden file is too short") }
    return Tensor(type: reference.dtype, shape: reference.shape, data: golden.subdata(in: reference.offset..<end))
}

private func near(_ got: Tensor, _ want: Tensor, _ tolerance: Double) throws -> Bool {
    guard got.shape == want.shape, got.type == want.type else { return false }
    return zip(try numbers(got), try numbers(want)).allSatisfy { abs($0 - $1) <= tolerance || $0 == $1 || ($0.isNaN && $1.isNaN) }
}

func numbers(_ tensor: Tensor) throws -> [Double] {
    func all<T>(_: T.Type, _ convert: (T) -> Double) -> [Double] {
        (0..<tensor.data.count / MemoryLayout<T>.size).map { index in
            tensor.data.withUnsafeBytes { convert($0.loadUnaligned(fromByteOffset: index * MemoryLayout<T>.size, as: T.self)) }
        }
    }
    switch tensor.type {
    case "float32": return all(Float.self) { Double($0) }
    case "int8": return all(Int8.self) { Double($0) }
    case "uint8": return all(UInt8.self) { Double($0) }
    case "int32": return all(Int32.self) { Double($0) }
    case "uint32": return all(UInt32.self) { Double($0) }
    case "int64": return all(Int64.self) { Double($0) }
    case "uint64": return all(UInt64.self) { Double($0) }
    default: throw Refused("tensors of type \(tensor.type) can't be compared")
    }
}

func postprocess(_ scores: Tensor, _ how: Postprocessing, _ labels: [String]) throws -> [Answer] {
    var row = Array(try numbers(scores).prefix(scores.shape.last ?? 0))
    if how.activation == "softmax" {
        let top = row.max() ?? 0
        row = row.map { exp($0 - top) }
        let sum = row.reduce(0, +)
        row = row.map { $0 / sum }
    } else if how.activation == "sigmoid" { row = row.map { 1 / (1 + exp(-$0)) } }
    let best = row.indices.sorted { row[$0] != row[$1] ? row[$0] > row[$1] : $0 < $1 }
    return best.prefix(how.top > 0 ? how.top : best.count).filter { row[$0] >= how.threshold }
        .map { Answer(label: $0 < labels.count ? labels[$0] : "\($0)", index: $0, score: row[$0]) }
}
