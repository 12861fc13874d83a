// swift-tools-version:5.9
// A model by edgeq as a Swift package for iOS and macOS. Generated; not compiled where edgeq was tested.
import PackageDescription

let package = Package(
    name: "@MODULE@",
    platforms: [.iOS(.v15), .macOS(.v12)],
    products: [.library(name: "@MODULE@", targets: ["@MODULE@"])],
    dependencies: [
        .package(url: "https://github.com/microsoft/onnxruntime-swift-package-manager", from: "@ORT_IOS@"),
    ],
    targets: [
        .target(
            name: "@MODULE@",
            dependencies: [.product(name: "onnxruntime", package: "onnxruntime-swift-package-manager")],
            resources: [.copy("package")]
        ),
    ]
)
