// The manifest's parts that the loader reads.
import Foundation

struct Manifest: Decodable {
    let variants: [Variant]
    let inputs: [Signature]
    let golden: String
    let canary: Canary?
    let preprocessing: Preprocessing?
    let postprocessing: Postprocessing?
    let labels: [String]
    let files: [String: FileFacts]

    enum CodingKeys: CodingKey { case variants, inputs, golden, canary, preprocessing, postprocessing, labels, files }

    init(from decoder: Decoder) throws {
        let all = try decoder.container(keyedBy: CodingKeys.self)
        variants = try all.decode([Variant].self, forKey: .variants)
        inputs = try all.decode([Signature].self, forKey: .inputs)
        golden = try all.decode(String.self, forKey: .golden)
        labels = try all.decode([String].self, forKey: .labels)
        files = try all.decode([String: FileFacts].self, forKey: .files)
        // {} where the package has none
        canary = try? all.decode(Canary.self, forKey: .canary)
        preprocessing = try? all.decode(Preprocessing.self, forKey: .preprocessing)
        postprocessing = try? all.decode(Postprocessing.self, forKey: .postprocessing)
    }
}

struct Signature: Decodable { let name: String }

struct FileFacts: Decodable { let sha256: String; let needed: Bool }

struct Variant: Decodable {
    let name: String
    let model: String
    let requires: Needs
    let session: [String: String]
    let golden: Golden
}

struct Needs: Decodable { let provider: String }

struct Golden: Decodable { let runs: [Run]; let tolerances: [String: Double] }

struct Run: Decodable { let inputs: [String: Reference]; let outputs: [String: Reference] }

/// Where an array lies in the golden file.
struct Reference: Decodable { let dtype: String; let shape: [Int]; let offset: Int; let bytes: Int }

struct Canary: Decodable { let height: Int; let width: Int; let at: [Int]; let values: [Double]; let tolerance: Double }

struct Postprocessing: Decodable { let output: String; let activation: String; let top: Int; let threshold: Double }

struct Preprocessing: Decodable {
    let resize: Sides?
    let crop: [Int]?
    let interpolation: String
    let scale: Float
    let mean: [Float]
    let std: [Float]
    let layout: String
    let channels: String
    let dtype: String?
}

/// A shorter side, or height and width.
enum Sides: Decodable {
    case shorter(Int), both([Int])

    init(from decoder: Decoder) throws {
        let one = try decoder.singleValueContainer()
        if let side = try? one.decode(Int.self) { self = .shorter(side) } else { self = .both(try one.decode([Int].self)) }
    }
}

public struct Refused: LocalizedError {
    public let errorDescription: String?
    init(_ words: String) { errorDescription = words }
}

public struct Tensor {
    public let type: String
    public let shape: [Int]
    public let data: Data
    public init(type: String, shape: [Int], data: Data) { (self.type, self.shape, self.data) = (type, shape, data) }
}

public struct Answer { public let label: String; public let index: Int; public let score: Double }

/// RGB, a byte a channel, rows from the top.
public struct Picture {
    public let height: Int, width: Int, pixels: [UInt8]
    public init(height: Int, width: Int, pixels: [UInt8]) { (self.height, self.width, self.pixels) = (height, width, pixels) }
}
