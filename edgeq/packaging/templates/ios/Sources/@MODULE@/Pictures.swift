// Pictures as model inputs, to the bit what edgeq's own loader makes: weights in whole numbers of 2**-22, each pass
// rounded to the nearest level, the width brought to size first.
import Foundation

private let precision = 22

private struct Image { let height: Int, width: Int, channels: Int, pixels: [UInt8] }

private struct Taps { let first: Int, weights: [Int32] }

private func sinc(_ x: Double) -> Double { x == 0 ? 1 : sin(.pi * x) / (.pi * x) }

private func support(_ name: String) -> Double { ["box": 0.5, "bicubic": 2, "lanczos": 3][name] ?? 1 }

private func weight(_ name: String, _ at: Double) -> Double {
    let x = abs(at)
    switch name {
    case "box": return at > -0.5 && at <= 0.5 ? 1 : 0
    case "bilinear": return max(1 - x, 0)
    case "hamming": return x < 1 ? sinc(at) * (0.54 + 0.46 * cos(.pi * at)) : 0
    case "lanczos": return x < 3 ? sinc(at) * sinc(at / 3) : 0
    default: return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((2.5 - 0.5 * x) * x - 4) * x + 2 : 0
    }
}

private func taps(_ index: Int, _ found: Int, _ size: Int, _ name: String) -> Taps {
    let ratio = Double(found) / Double(size)
    if name == "nearest" { return Taps(first: min(Int((Double(index) + 0.5) * ratio), found - 1), weights: [1 << precision]) }
    let stretch = max(ratio, 1), centre = (Double(index) + 0.5) * ratio, reach = support(name) * stretch
    let first = max(Int(centre - reach + 0.5), 0), last = min(Int(centre + reach + 0.5), found)
    let parts = (first..<last).map { weight(name, (Double($0) - centre + 0.5) / stretch) }
    let sum = parts.reduce(0, +)
    return Taps(first: first, weights: parts.map { part in
        let whole = part / sum * Double(1 << precision)
        return Int32((whole + (whole.sign == .minus ? -0.5 : 0.5)).rounded(.towardZero))
    })
}

private func resampled(_ image: Image, _ size: Int, wide: Bool, _ name: String) -> Image {
    let found = wide ? image.width : image.height
    if found == size { return image }
    let height = wide ? image.height : size, width = wide ? size : image.width
    let step = wide ? image.channels : image.width * image.channels
    let all = (0..<size).map { taps($0, found, size, name) }
    var pixels = [UInt8]()
    pixels.reserveCapacity(height * width * image.channels)
    for y in 0..<height {
        for x in 0..<width {
            let line = all[wide ? x : y]
            let begin = (wide ? y * image.width : x) * image.channels + line.first * step
            for c in 0..<image.channels {
                var sum = Int32(1) << Int32(precision - 1)
                for (tap, weight) in line.weights.enumerated() { sum += weight * Int32(image.pixels[begin + tap * step + c]) }
                pixels.append(UInt8(clamping: sum >> Int32(precision)))
            }
        }
    }
    return Image(height: height, width: width, channels: image.channels, pixels: pixels)
}

private func cropped(_ image: Image, _ height: Int, _ width: Int) -> Image {
    let top = Int((Double(image.height - height) / 2).rounded(.toNearestOrEven))
    let left = Int((Double(image.width - width) / 2).rounded(.toNearestOrEven))
    var pixels = [UInt8](repeating: 0, count: height * width * image.channels)
    for y in stride(from: max(-top, 0), to: min(height, image.height - top), by: 1) {
        for x in stride(from: max(-left, 0), to: min(width, image.width - left), by: 1) {
            for c in 0..<image.channels {
                pixels[(y * width + x) * image.channels + c] =
                    image.pixels[((y + top) * image.width + x + left) * image.channels + c]
            }
        }
    }
    return Image(height: height, width: width, channels: image.channels, pixels: pixels)
}

private func grey(_ picture: Picture) -> Image {
    let pixels = (0..<picture.height * picture.width).map { i -> UInt8 in
        let (r, g, b) = (Int(picture.pixels[3 * i]), Int(picture.pixels[3 * i + 1]), Int(picture.pixels[3 * i + 2]))
        return UInt8((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16)
    }
    return Image(height: picture.height, width: picture.width, channels: 1, pixels: pixels)
}

func preprocess(_ picture: Picture, _ how: Preprocessing) -> Tensor {
    var image = how.channels == "L"
        ? grey(picture) : Image(height: picture.height, width: picture.width, channels: 3, pixels: picture.pixels)
    if let resize = how.resize {
        let sides: [Int]
        switch resize {
        case .both(let given): sides = given
        case .shorter(let side): // the longer one is truncated
            let shorter = Double(min(image.height, image.width))
            sides = [image.height, image.width].map { Int(Double(side) * Double($0) / shorter) }
        }
        image = resampled(image, sides[1], wide: true, how.interpolation)
        image = resampled(image, sides[0], wide: false, how.interpolation)
    }
    if let crop = how.crop { image = cropped(image, crop[0], crop[1]) }
    return scaled(image, how)
}

private func scaled(_ image: Image, _ how: Preprocessing) -> Tensor {
    let planes = how.layout == "NCHW", count = image.height * image.width, channels = image.channels
    var values = [Float](repeating: 0, count: count * channels)
    for i in 0..<count {
        for c in 0..<channels {
            let pixel = Float(image.pixels[i * channels + (how.channels == "BGR" ? channels - 1 - c : c)]) * how.scale
            let value = (pixel - how.mean[how.mean.count > 1 ? c : 0]) / how.std[how.std.count > 1 ? c : 0]
            values[planes ? c * count + i : i * channels + c] = value
        }
    }
    let shape = planes ? [1, channels, image.height, image.width] : [1, image.height, image.width, channels]
    if how.dtype == "uint8" { return Tensor(type: "uint8", shape: shape, data: Data(values.map { UInt8($0) })) }
    return Tensor(type: "float32", shape: shape, data: values.withUnsafeBytes { Data($0) })
}

/// The picture whose values the manifest knows.
func canaryPicture(_ height: Int, _ width: Int) -> Picture {
    let pixels = (0..<height * width * 3).map { UInt8(truncatingIfNeeded: (UInt32($0) &* 2654435761) >> 24) }
    return Picture(height: height, width: width, pixels: pixels)
}
